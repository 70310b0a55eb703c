"""Velocity: a robot of Unitree's walks where it is told, through stages from balancing to turning.

Observation, rewards and curriculum are those of `tasks/walking.py`; here is what differs from robot to robot. Without
a policy G1 stays on its feet for 1.1 s and H1 for 2.3 s: the ankles of either are too soft to hold a body upright, as
those of the real robots are.
"""

from collections.abc import Sequence

from rlcore.curriculum import Stage
from rlcore.env import Env
from rlcore.physics.engines import PhysicsChoice
from rlcore.symmetry import Symmetry
from tasks.unitree.body import make_unitree, unitree
from tasks.walking import STAGES, WalkingSettings, make_walking, walking_symmetry

_POSTURE = {"*": 0.15, "*_shoulder_pitch*": 0.3, "*_elbow*": 0.3, "*_hip_pitch*": 0.5, "*_knee*": 0.6}

SETTINGS = {
    "g1": WalkingSettings(posture={**_POSTURE, "*_ankle_pitch*": 0.3}),
    "h1": WalkingSettings(posture={**_POSTURE, "*_ankle": 0.3}),
}


def make_unitree_velocity(
    robot: str = "g1",
    num_threads: int = 0,
    seconds: float = 20.0,
    push_interval: float = 4.0,
    push_speed: float = 0.5,
    stages: Sequence[Stage] = STAGES,
    physics: PhysicsChoice = "mujoco",
) -> Env:
    """The task `g1_velocity` or `h1_velocity`, with pushes and a time limit, without automatic resets.

    Args:
      robot: g1 or h1.
      num_threads: physics threads; 0 takes every CPU.
      seconds: length of an episode.
      push_interval: mean time between pushes, s.
      push_speed: largest change of the pelvis's horizontal velocity by a push, m/s.
      stages: the curriculum; none for the whole range of commands from the beginning on.
      physics: the engine, see `rlcore.physics.engines`.

    Raises:
      InputError: for an unknown robot, a number out of its range, an engine that cannot run here, or if the package of
        the robot's model is not installed.
    """
    walker = make_unitree(robot, num_threads, physics)
    return make_walking(
        walker,
        f"{robot}_velocity",
        SETTINGS[robot],
        seconds=seconds,
        push_interval=push_interval,
        push_speed=push_speed,
        stages=stages,
    )


def velocity_symmetry(env: Env, robot: str = "g1") -> Symmetry:
    """The mirror maps of that task, or of an environment wrapped around it.

    Raises:
      InputError: for an unknown robot, or an environment that shows parts which are not this task's.
    """
    return walking_symmetry(env, unitree(robot).signs)
