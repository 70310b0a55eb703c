"""Balance: the humanoid starts in a random posture, is pushed now and then, and must not fall.

The policy sees what a real robot measures: angular velocity, the direction of gravity, joint angles and velocities,
and its own last action. The value function also sees what only a simulation knows.
"""

import torch
from torch import Tensor

from rlcore import rotations
from rlcore.env import Env, EnvState, Params, make_env, random_pushes, time_limit
from rlcore.physics.engine import PhysicsState
from rlcore.rewards import Term, action_rate, alive, exponential
from tasks.humanoid.body import FALLEN_HEIGHT, STANDING_HEIGHT, make_humanoid

FALLEN_TILT = -0.7  # vertical component of gravity in the body frame: about 45 degrees from upright


def make_humanoid_balance(
    num_threads: int = 0, seconds: float = 20.0, push_interval: float = 2.0, push_speed: float = 0.5
) -> Env:
    """The balance task with pushes and a time limit, without automatic resets.

    Args:
      num_threads: physics threads; 0 takes every CPU.
      seconds: length of an episode.
      push_interval: mean time between pushes, s.
      push_speed: largest change of the pelvis's horizontal velocity by a push, m/s.
    """
    engine, robot, action_bounds, control, initial = make_humanoid(num_threads)
    model, pose, joint_qpos, joint_qvel = engine.model, robot.pose, robot.joint_qpos, robot.joint_qvel
    velocimeter = model.sensor("imu_linear_velocity")
    contacts = [model.sensor("left_foot_contact"), model.sensor("right_foot_contact")]
    first, last = model.sensor("waist_yaw_torque").start, model.sensor("right_ankle_roll_torque").stop

    def observe(params: Params, state: EnvState) -> dict[str, dict[str, Tensor]]:
        physics = state.physics
        policy = {
            "angular_velocity": physics.qvel[3:6],
            "gravity": rotations.projected_gravity(physics.qpos[3:7]),
            "joint_position": physics.qpos[joint_qpos] - pose,
            "joint_velocity": physics.qvel[joint_qvel],
            "last_action": state.memory["last_action"],
        }
        privileged = {
            "linear_velocity": physics.sensordata[velocimeter],
            "height": physics.qpos[2:3],
            "foot_contact": torch.cat([physics.sensordata[s] for s in contacts]),
        }
        return {"policy": policy, "critic": {**policy, **privileged}}

    def terminate(params: Params, physics: PhysicsState) -> Tensor:
        return (physics.qpos[2] < FALLEN_HEIGHT) | (rotations.projected_gravity(physics.qpos[3:7])[2] > FALLEN_TILT)

    def torque(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
        """`||tau||^2`, (Nm)^2."""
        return after.physics.sensordata[first:last].square().sum()

    def joint_speed(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
        """`||qd||^2`, (rad/s)^2."""
        return after.physics.qvel[joint_qvel].square().sum()

    def metrics(params: Params, before: EnvState, action: Tensor, after: EnvState) -> dict[str, Tensor]:
        torques = after.physics.sensordata[first:last]
        return {
            "torque": torques.abs().mean(),
            "power": (torques * after.physics.qvel[joint_qvel]).abs().sum(),
            "height": after.physics.qpos[2],
            "speed": torch.sqrt(after.physics.qvel[:2].square().sum()),
        }

    def posture(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
        """`exp(-mean((q - q0)^2) / 0.3^2)`: near the standing pose."""
        return exponential((after.physics.qpos[joint_qpos] - pose).square().mean(), 0.3)

    env = make_env(
        engine,
        name="humanoid_balance",
        control_dt=0.02,
        initial=initial,
        control=control,
        action_bounds=action_bounds,
        observe=observe,
        terminate=terminate,
        metrics=metrics,
        terms=[
            Term("alive", 1.0, alive),
            Term("upright", 1.0, upright),
            Term("height", 0.5, height),
            Term("stillness", 1.0, stillness),
            Term("posture", 0.5, posture),
            Term("action_rate", -0.02, action_rate),
            Term("torque", -1e-5, torque),
            Term("joint_speed", -1e-3, joint_speed),
        ],
    )
    return time_limit(random_pushes(env, push_interval, push_speed), seconds)


def upright(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
    """`exp(-(g_x^2 + g_y^2) / 0.3^2)`, with g the unit vector of gravity in the pelvis's frame."""
    gravity = rotations.projected_gravity(after.physics.qpos[3:7])
    return exponential(gravity[:2].square().sum(), 0.3)


def height(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
    """`exp(-(z - z0)^2 / 0.1^2)`: the pelvis at its standing height (m)."""
    return exponential((after.physics.qpos[2] - STANDING_HEIGHT).square(), 0.1)


def stillness(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
    """`exp(-||v_xy||^2 / 0.5^2)`: staying in place (m/s)."""
    return exponential(after.physics.qvel[:2].square().sum(), 0.5)
