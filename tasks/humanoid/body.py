"""What all tasks of the humanoid share: the model, how actions move its servos, and how episodes begin.

Actions are offsets from the standing pose's joint targets; an action of 1 moves a target as far as takes the servo
from no torque to its limit, so that equal actions mean equal effort in an ankle and in a hip.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rlcore import random
from rlcore.env import EnvState, Params
from rlcore.physics.engines import Physics, make_engine
from rlcore.physics.mujoco import ModelEngine, load_model
from rlcore.robot import Robot, make_robot

MODEL = Path(__file__).parent / "humanoid.xml"
ACTION_BOUND = 4.0
STANDING_HEIGHT = 0.83  # m, pelvis above the floor
FALLEN_HEIGHT = 0.6  # m
JOINT_NOISE = 0.12  # rad, of the posture that an episode begins with
LEAN = 0.05  # rad about each axis, of the attitude that it begins with
SPEED = 0.1  # m/s and rad/s, of every velocity that it begins with


class Humanoid(NamedTuple):
    """The robot, its engine, and the functions of a task that do not depend on what the robot is to do."""

    engine: ModelEngine
    robot: Robot
    action_bounds: tuple[list[float], list[float]]
    control: Callable[[Params, EnvState, Tensor], Tensor]
    """`(params, state, action [21]) -> servo targets [21]`, rad."""
    initial: Callable[[Params, Tensor], tuple[Tensor, Tensor]]
    """`(params, key) -> (qpos [28], qvel [27])`: the standing pose with joints off by up to `JOINT_NOISE`, leaning a
    little in any direction, and moving."""


def make_humanoid(num_threads: int = 0, physics: Physics = "mujoco") -> Humanoid:
    """The humanoid on an engine.

    Args:
      num_threads: physics threads; 0 takes every CPU.
      physics: the engine, see `rlcore.physics.engines`.
    """
    engine = make_engine(load_model(MODEL), num_threads, physics=physics)
    model = engine.model
    stand_qpos, stand_ctrl = model.keyframe("stand")
    pose = stand_qpos[model.actuated()[0]]
    robot = make_robot(model, pose=pose, angular_momentum="angular_momentum")
    # Two centimetres up, so that no foot begins inside the floor.
    raised = stand_qpos[:3] + torch.tensor([0.0, 0.0, 0.02], dtype=torch.float64)
    stiffness = torch.as_tensor(engine.mjmodel.actuator_gainprm[:, 0].copy())
    scale = torch.as_tensor(engine.mjmodel.actuator_forcerange[:, 1].copy()) / stiffness  # rad per unit of action

    def control(params: Params, state: EnvState, action: Tensor) -> Tensor:
        return stand_ctrl + scale * torch.clamp(action, -ACTION_BOUND, ACTION_BOUND)

    def initial(params: Params, key: Tensor) -> tuple[Tensor, Tensor]:
        draw = random.uniform(key, (3 + model.nu + model.nv,), -1.0, 1.0, dtype=torch.float64)
        lean, joints, velocity = torch.split(draw, [3, model.nu, model.nv])
        # A small rotation: half its vector beside a scalar of one, made a unit quaternion.
        turn = torch.cat([torch.ones_like(lean[:1]), LEAN / 2 * lean])
        turn = turn / torch.sqrt(turn.square().sum())
        posture = torch.clamp(pose + JOINT_NOISE * joints, robot.lower, robot.upper)
        return torch.cat([raised, turn, posture]), SPEED * velocity

    bounds = [-ACTION_BOUND] * model.nu, [ACTION_BOUND] * model.nu
    return Humanoid(engine, robot, bounds, control, initial)
