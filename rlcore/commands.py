"""Velocity commands: what a walking robot is told to do, as an entry of its memory.

`EnvState.memory["command"]["velocity"]` `[3]` is forward and leftward speed (m/s, in the heading frame: z up, x where
the robot faces) and yaw rate (rad/s). It is there when a reset first observes and is brought up to date after each
step: a policy that acts on `before` saw `before.memory["command"]`, so a reward for that step compares with that one.

Ranges and shares are read from `params.values`, so that they may differ from robot to robot, between the levels of a
curriculum, and in an evaluation. A command is drawn for the robots whose time has come; the others draw nothing.
This module gives no rewards and makes no observations.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlcore import random, rotations, tree
from rlcore.env import COMMAND_SALT, EnvState, Memory, Params
from rlcore.errors import InputError
from rlcore.physics.engine import ModelInfo, PhysicsState

_RANGES = ("command_vx", "command_vy", "command_yaw_rate")
# Time is a sum of rounded steps: a command that is due now is due although that sum falls a little short.
_SLACK = 1e-6  # s


@dataclass(frozen=True)
class VelocityCommands:
    """Which commands an episode draws from.

    Attributes:
      vx: forward speed, m/s, lowest and highest.
      vy: leftward speed, m/s.
      yaw_rate: rad/s, positive to the left; also the bounds of the yaw rate that turns to a heading.
      resample_seconds: shortest and longest time that a command holds; drawn anew for each.
      standing_fraction: share of commands that are exactly zero.
      heading_fraction: share of the others that give a heading to turn to instead of a yaw rate. With 0 here the
        environment has no headings at all.
      heading_gain: yaw rate per angle to the commanded heading, 1/s.
      smallest: commands shorter than this (the root of the sum of squares, m/s and rad/s alike) are set to zero.

    Raises:
      InputError: for a crossed or infinite range, a share outside [0, 1], or a negative time, gain or `smallest`.
    """

    vx: tuple[float, float] = (-0.5, 1.0)
    vy: tuple[float, float] = (-0.3, 0.3)
    yaw_rate: tuple[float, float] = (-1.0, 1.0)
    resample_seconds: tuple[float, float] = (3.0, 8.0)
    standing_fraction: float = 0.1
    heading_fraction: float = 0.0
    heading_gain: float = 1.0
    smallest: float = 0.1

    def __post_init__(self) -> None:
        for name in ("vx", "vy", "yaw_rate", "resample_seconds"):
            low, high = getattr(self, name)
            if not -math.inf < low <= high < math.inf:
                raise InputError(f"{name} must be two finite numbers, the lower one first, got {low} and {high}")
        if not self.resample_seconds[0] > 0:
            raise InputError(f"resample_seconds must be above 0 s, got {self.resample_seconds[0]}")
        for name in ("standing_fraction", "heading_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("heading_gain", "smallest"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must be 0 or more, got {getattr(self, name)}")


def command_values(commands: VelocityCommands) -> dict[str, Tensor]:
    """What `params.values` must hold for these commands; give it to `make_env(values=...)`.

    Returns:
      `command_vx`, `command_vy` and `command_yaw_rate` `[2]`, `standing_fraction` `[]` and, if there are headings,
      `heading_fraction` `[]`.
    """
    values = {
        "command_vx": commands.vx,
        "command_vy": commands.vy,
        "command_yaw_rate": commands.yaw_rate,
        "standing_fraction": commands.standing_fraction,
    }
    if commands.heading_fraction > 0:
        values["heading_fraction"] = commands.heading_fraction
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def velocity_commands(model: ModelInfo, commands: VelocityCommands, joint: str = "root") -> dict[str, Memory]:
    """The entry `command` of what a task remembers; give it to `make_env(memory=...)`.

    It is `{"velocity": [3], "until": []}`, the command and when the next one comes (s). With headings it has
    besides `drawn` `[3]`, the command as it was drawn; `heading` `[]`, the target yaw in the world (rad); and
    `turning` `[]` bool, whether the yaw rate is `heading_gain (heading - yaw)`, clipped to its range.

    Args:
      model: the robot.
      commands: which commands there are. Of these, what `command_values` names is read from `params.values`.
      joint: name of the free joint whose yaw is the robot's heading.

    Raises:
      InputError: if the joint is unknown or not free.
    """
    free = model.joint(joint)
    if free.kind != "free":
        raise InputError(f"a heading needs a free joint; {joint!r} is a {free.kind}")
    quaternion = slice(free.qpos.start + 3, free.qpos.stop)
    shortest, longest = commands.resample_seconds
    headings = commands.heading_fraction > 0

    def draw(params: Params, physics: PhysicsState, key: Tensor) -> dict[str, Tensor]:
        """A new command, before small ones are set to zero."""
        values = params.values
        unit = random.uniform(key, (7 if headings else 5,), dtype=torch.float64)
        low, high = torch.stack([values[name] for name in _RANGES]).unbind(-1)
        standing = unit[3] < values["standing_fraction"]
        velocity = torch.where(standing, 0.0, low + unit[:3] * (high - low))
        until = physics.time + (shortest + (longest - shortest) * unit[4])
        if not headings:
            return {"velocity": velocity, "until": until}
        turning = ~standing & (unit[5] < values["heading_fraction"])
        heading = math.pi * (2 * unit[6] - 1)
        return {"velocity": velocity, "until": until, "drawn": velocity, "heading": heading, "turning": turning}

    def finished(params: Params, physics: PhysicsState, command: dict[str, Tensor]) -> dict[str, Tensor]:
        """The command with its yaw rate towards the heading, and zero where it is small."""
        velocity = command["drawn"] if headings else command["velocity"]
        if headings:
            error = command["heading"] - rotations.yaw(physics.qpos[quaternion])
            # Both angles are within half a turn, so their difference is off by one turn at most.
            error = error - 2 * math.pi * ((error > math.pi).to(error.dtype) - (error < -math.pi).to(error.dtype))
            low, high = params.values["command_yaw_rate"].unbind()
            rate = commands.heading_gain * error
            rate = torch.where(rate < low, low, torch.where(rate > high, high, rate))
            rate = torch.where(command["turning"], rate, velocity[2])
            velocity = torch.cat([velocity[:2], rate.unsqueeze(0)])
        x, y, turn = velocity.unbind()
        small = x * x + y * y + turn * turn < commands.smallest**2
        return {**command, "velocity": torch.where(small, 0.0, velocity)}

    def init(params: Params, physics: PhysicsState, key: Tensor) -> dict[str, Tensor]:
        return finished(params, physics, draw(params, physics, random.fold_in(key, COMMAND_SALT)))

    def update(params: Params, before: EnvState, action: Tensor, physics: PhysicsState) -> dict[str, Tensor]:
        command = before.memory["command"]
        due = physics.time > command["until"] - _SLACK
        # Where none is due the key is null and draws nothing. The reset drew with the counter 0.
        key = random.fold_in(random.null_unless(due, before.key), before.steps + (1 + COMMAND_SALT))
        command = tree.where(due, draw(params, physics, key), command)
        return finished(params, physics, command)

    return {"command": Memory(init, update)}


def true_velocity(model: ModelInfo, joint: str = "root") -> Callable[[PhysicsState], Tensor]:
    """What a command is compared with, as a function of the mechanical state of any number of robots.

    Args:
      model: the robot.
      joint: name of the free joint that is told where to go.

    Returns:
      `physics -> [..., 3]`: the joint's forward and leftward velocity in the heading frame (m/s), and its angular
      velocity about the vertical (rad/s).

    Raises:
      InputError: if the joint is unknown or not free.
    """
    free = model.joint(joint)
    if free.kind != "free":
        raise InputError(f"a velocity in the plane needs a free joint; {joint!r} is a {free.kind}")
    position, first = free.qpos.start, free.qvel.start

    def velocity(physics: PhysicsState) -> Tensor:
        q = physics.qpos[..., position + 3 : position + 7]
        linear, angular = physics.qvel[..., first : first + 3], physics.qvel[..., first + 3 : first + 6]
        planar = rotations.to_heading(rotations.heading(q), linear)[..., :2]
        turn = rotations.rotate(q, angular)[..., 2:]
        return torch.cat([planar, turn], dim=-1)

    return velocity


def fixed_command(params: Params, vx: float = 0.0, vy: float = 0.0, yaw_rate: float = 0.0) -> Params:
    """Parameters under which every command is this one, from the next reset on: for evaluation and films.

    A command below `VelocityCommands.smallest` is zero, as in training.

    Raises:
      InputError: if the environment of these parameters has no velocity commands.
    """
    missing = [name for name in (*_RANGES, "standing_fraction") if name not in params.values]
    if missing:
        raise InputError(f"these parameters have no velocity commands: params.values lacks {', '.join(missing)}")
    changes = {
        name: torch.full_like(params.values[name], v) for name, v in zip(_RANGES, (vx, vy, yaw_rate), strict=True)
    }
    for name in ("standing_fraction", "heading_fraction"):
        if name in params.values:
            changes[name] = torch.zeros_like(params.values[name])
    return tree.replace(params, values={**params.values, **changes})
