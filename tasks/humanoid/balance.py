"""Balance: the humanoid starts in a random posture, is pushed now and then, and must not fall.

The policy sees what a real robot measures: angular velocity, the direction of gravity, joint angles and velocities,
and its own last action. The value function also sees what only a simulation knows.
"""

from torch import Tensor

from rlcore.env import Env, EnvState, Params, make_env, random_pushes, time_limit
from rlcore.monitoring import robot_metrics
from rlcore.physics.engine import PhysicsState
from rlcore.physics.engines import PhysicsChoice
from rlcore.rewards import Term, action_rate, alive, exponential, locomotion
from tasks.humanoid.body import FALLEN_HEIGHT, STANDING_HEIGHT, make_humanoid
from tasks.walking import CONTROL_DT

FALLEN_TILT = -0.7  # vertical component of gravity in the body frame: about 45 degrees from upright


def make_humanoid_balance(
    num_threads: int = 0,
    seconds: float = 20.0,
    push_interval: float = 2.0,
    push_speed: float = 0.5,
    physics: PhysicsChoice = "mujoco",
) -> Env:
    """The balance task with pushes and a time limit, without automatic resets.

    Args:
      num_threads: physics threads; 0 takes every CPU.
      seconds: length of an episode.
      push_interval: mean time between pushes, s.
      push_speed: largest change of the pelvis's horizontal velocity by a push, m/s.
      physics: the engine, see `rlcore.physics.engines`.

    Raises:
      InputError: for a number out of its range, or an engine that cannot run here.
    """
    walker = make_humanoid(num_threads, physics)
    engine, robot = walker.engine, walker.robot
    velocimeter = engine.model.sensor("imu_linear_velocity")

    def observe(params: Params, state: EnvState) -> dict[str, dict[str, Tensor]]:
        physics = state.physics
        policy = {
            "angular_velocity": robot.angular_velocity(physics),
            "gravity": robot.gravity(physics),
            "joint_position": robot.joint_position(physics) - robot.pose,
            "joint_velocity": robot.joint_velocity(physics),
            "last_action": state.memory["last_action"],
        }
        privileged = {
            "linear_velocity": physics.sensordata[velocimeter],
            "height": robot.height(physics).unsqueeze(0),
            "foot_contact": robot.foot_contact(physics),
        }
        return {"policy": policy, "critic": {**policy, **privileged}}

    def terminate(params: Params, physics: PhysicsState) -> Tensor:
        return (robot.height(physics) < FALLEN_HEIGHT) | (robot.gravity(physics)[2] > FALLEN_TILT)

    def joint_speed(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
        """`||qd||^2`, (rad/s)^2."""
        return robot.joint_velocity(after.physics).square().sum()

    def posture(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
        """`exp(-mean((q - q0)^2) / 0.3^2)`: near the standing pose."""
        return exponential((robot.joint_position(after.physics) - robot.pose).square().mean(), 0.3)

    env = make_env(
        engine,
        name="humanoid_balance",
        control_dt=CONTROL_DT,
        initial=walker.initial,
        control=walker.control,
        action_bounds=walker.action_bounds,
        observe=observe,
        terminate=terminate,
        metrics=robot_metrics(engine, robot, CONTROL_DT),
        terms=[
            Term("alive", 1.0, alive),
            Term("upright", 1.0, locomotion.upright(robot, 0.3)),
            Term("height", 0.5, locomotion.keep_height(robot, STANDING_HEIGHT, 0.1)),
            Term("stillness", 1.0, stillness),
            Term("posture", 0.5, posture),
            Term("action_rate", -0.02, action_rate),
            Term("torque", -1e-5, locomotion.torque(robot)),
            Term("joint_speed", -1e-3, joint_speed),
        ],
    )
    return time_limit(random_pushes(env, push_interval, push_speed), seconds)


def stillness(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
    """`exp(-||v_xy||^2 / 0.5^2)`: staying in place (m/s)."""
    return exponential(after.physics.qvel[:2].square().sum(), 0.5)
