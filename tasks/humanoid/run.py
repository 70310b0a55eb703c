"""Run: the humanoid runs to a target far away. Observation and reward are those of Isaac Gym's Humanoid.

The robot is our own with a motor in place of each servo. Torques are half of what the servos could give, 15 to 90 N m,
which is near the published robot's 22 to 135; half of a servo's damping stays in its joint as that of a gearbox, 1 to
8 N m s/rad (published: up to 5). Physics steps are as long as published, 8.3 ms, two thirds longer than the servos were
tuned for: rotors of three times the inertia keep kicked feet from spinning, and Newton takes four iterations. Random
actions of full strength still break the physics about once in 50,000 control steps, which ends that episode.

One thing of the task differs: heights. In the published one the torso begins 1.34 m and has fallen below 0.8 m; our
humanoid is smaller and its root is the pelvis, which with straight legs is 0.85 m above the soles. It begins two
centimetres above that, and has fallen at the same share of that height (0.52 m).
"""

from pathlib import Path

import mujoco
import torch
from torch import Tensor

from rlcore.env import Env
from rlcore.physics.engines import PhysicsChoice, make_engine
from tasks.humanoid.body import MODEL
from tasks.running import CONTROL_DT, EPISODE_STEPS, RunnerSettings, make_runner

START_HEIGHT = 0.87  # m
FALLEN_HEIGHT = START_HEIGHT * 0.8 / 1.34
TORQUE, DAMPING = 0.5, 0.5  # of each servo's
ROTOR = 3.0  # times the servo's inertia, as the joint feels it


def at_limit(position: Tensor, share: Tensor) -> Tensor:
    """`sum 0.25 (|q| - 0.98) / 0.02 share` over joints of |q| > 0.98: `[nu]`, `[nu]` to `[]`."""
    return (12.5 * torch.clamp(position.abs() - 0.98, min=0.0) * share).sum()


def motor_model(path: Path = MODEL) -> mujoco.MjModel:
    """The humanoid with a motor for each servo, and sensors of what acts on its feet."""
    spec = mujoco.MjSpec.from_file(str(path))
    servos = spec.compile()
    torques, dampings = servos.actuator_forcerange[:, 1].copy(), -servos.actuator_biasprm[:, 2]
    for actuator, torque, damping in zip(spec.actuators, torques, dampings, strict=True):
        actuator.set_to_motor()
        actuator.gainprm[0] = TORQUE * torque  # not the gear, so that its force is what the joint feels
        actuator.ctrlrange, actuator.forcerange = [-1, 1], [0, 0]
        actuator.ctrllimited, actuator.forcelimited = True, False
        joint = spec.joint(actuator.target)
        joint.damping = [DAMPING * damping, 0.0, 0.0]  # linear: the others are of the square and the cube
        joint.armature *= ROTOR
    for side in ("left", "right"):
        for what, kind in (("force", mujoco.mjtSensor.mjSENS_FORCE), ("torque", mujoco.mjtSensor.mjSENS_TORQUE)):
            name = f"{side}_foot"
            spec.add_sensor(name=f"{name}_{what}", type=kind, objtype=mujoco.mjtObj.mjOBJ_SITE, objname=name)
    for key in list(spec.keys):  # its controls are joint targets
        spec.delete(key)
    spec.option.timestep, spec.option.iterations, spec.option.ls_iterations = CONTROL_DT / 2, 4, 8
    return spec.compile()


def make_humanoid_run(num_threads: int = 0, steps: int = EPISODE_STEPS, physics: PhysicsChoice = "mujoco") -> Env:
    """The running humanoid with a limit of `steps` control steps (of 0.0166 s), without automatic resets.

    Args:
      num_threads: physics threads; 0 takes every CPU.
      steps: length of an episode, control steps.
      physics: the engine, see `rlcore.physics.engines`.
    """
    engine = make_engine(motor_model(), num_threads, physics=physics)
    settings = RunnerSettings(
        start_height=START_HEIGHT,
        fallen_height=FALLEN_HEIGHT,
        alive=2.0,
        action_cost=0.01,
        energy_cost=0.05,
        limit_cost=at_limit,
        death=-1.0,
        foot_sensors=[f"{side}_foot_{what}" for side in ("left", "right") for what in ("force", "torque")],
        foot_scale=0.01,
        feet=("left_foot", "right_foot"),
        joint_velocity_scale=0.1,
        joint_sensors=[f"{joint}_torque" for joint in engine.model.actuators],
        joint_force_scale=0.01,
        angular_velocity_scale=0.25,
    )
    return make_runner(engine, "humanoid_run", settings, steps)
