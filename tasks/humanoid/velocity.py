"""Walk where it is told: the humanoid follows a velocity command, through stages from balancing to turning.

Observation, rewards and curriculum are those of `tasks/walking.py`; here are the humanoid's own numbers. At evaluation
there is no curriculum: commands come from the whole range, or are what `rlcore.commands.fixed_command` makes them.
"""

from collections.abc import Sequence

from rlcore.curriculum import Stage
from rlcore.env import Env
from rlcore.physics.engines import PhysicsChoice
from tasks.humanoid.body import make_humanoid
from tasks.walking import STAGES, WalkingSettings, make_walking

SETTINGS = WalkingSettings(
    posture={
        "*": 0.15,
        "*_shoulder_pitch": 0.3,
        "*_elbow": 0.3,
        "*_hip_pitch": 0.5,
        "*_knee": 0.6,
        "*_ankle_pitch": 0.3,
    }
)


def make_humanoid_velocity(
    num_threads: int = 0,
    seconds: float = 20.0,
    push_interval: float = 4.0,
    push_speed: float = 0.5,
    stages: Sequence[Stage] = STAGES,
    physics: PhysicsChoice = "mujoco",
) -> Env:
    """The task with pushes and a time limit, without automatic resets.

    Args:
      num_threads: physics threads; 0 takes every CPU.
      seconds: length of an episode.
      push_interval: mean time between pushes, s.
      push_speed: largest change of the pelvis's horizontal velocity by a push, m/s.
      stages: the curriculum; none for the whole range of commands from the beginning on.
      physics: the engine, see `rlcore.physics.engines`.

    Raises:
      InputError: for a number out of its range, or an engine that cannot run here.
    """
    return make_walking(
        make_humanoid(num_threads, physics),
        "humanoid_velocity",
        SETTINGS,
        seconds=seconds,
        push_interval=push_interval,
        push_speed=push_speed,
        stages=stages,
    )
