"""What a policy is measured under: the command that it is given, and physics that differ from the nominal ones.

`experiments.evaluate`, `experiments.play` and `experiments.report` share it. No episode is run here.
"""

import math
from typing import Any, NamedTuple

from rlcore.errors import InputError

# Factors of the model's own values that are drawn from, and what a person calls them.
UNSEEN_RANGES: dict[str, Any] = {"mass_scale": (0.8, 1.2), "friction_scale": (0.4, 1.2), "kp_scale": (0.8, 1.2)}
_WORDS = {"mass_scale": "masses", "friction_scale": "friction", "kp_scale": "stiffness of servos"}
_LATE = 1  # control steps
# Folded into the key, of which episode i has child i: so large that the two never meet.
_PHYSICS = 1 << 31


def given_command(vx: float | None, vy: float | None, yaw_rate: float | None) -> dict[str, float] | None:
    """The velocity command that flags ask for, m/s and rad/s; None if none of them is given.

    Of a command that is given in part, the rest is 0.

    Raises:
      InputError: if a number is not finite.
    """
    given = {"vx": vx, "vy": vy, "yaw_rate": yaw_rate}
    for name, value in given.items():
        if value is not None and not math.isfinite(value):
            raise InputError(f"{name} must be a finite number, got {value} (--{name.replace('_', '-')})")
    if all(value is None for value in given.values()):
        return None
    return {name: 0.0 if value is None else value for name, value in given.items()}


def command_text(command: dict[str, float]) -> str:
    """A velocity command for a person."""
    return f"{command['vx']:g} m/s ahead, {command['vy']:g} m/s to the left, {command['yaw_rate']:g} rad/s"


def why_no_command(env: Any) -> str | None:
    """Why an environment cannot be given a fixed velocity command; None if it can."""
    if "command_vx" not in env.params.values:
        return f"{env.spec.name} follows no velocity commands"
    if any(name.startswith("curriculum/values/command_") for name in env.params.values):
        return f"the curriculum of {env.spec.name} chooses the commands: leave it out of evaluation_env"
    return None


def commanded(env: Any, command: dict[str, float]) -> Any:
    """The environment with this as its only velocity command.

    Raises:
      InputError: if it has no velocity commands, or they are not its parameters' to choose.
    """
    from rlcore.commands import fixed_command

    if (reason := why_no_command(env)) is not None:
        raise InputError(f"{reason} (--vx, --vy, --yaw-rate)")
    return env._replace(params=fixed_command(env.params, **command))


class Unseen(NamedTuple):
    """Robots of one task that differ in their physics."""

    env: Any
    """The environment, with actions that arrive late."""
    params: Any
    """Parameters, each leaf `[robots, ...]`."""
    text: str
    """What differs, for a person."""


def unseen_physics(env: Any, key: Any, robots: int) -> Unseen:
    """Draw a robot's masses, friction and stiffness each from `UNSEEN_RANGES`, and let its actions come a step late.

    What a model has none of stays as it is, such as stiffness where no actuator is a servo.

    Args:
      env: an environment of one robot.
      key: random key `[2]`; robot i depends on it and on i alone.
      robots: how many.
    """
    import torch

    from rlcore import random
    from rlcore.env import action_delay
    from rlcore.randomize import NothingToChange, Randomization, make_randomizer

    late = action_delay(env, _LATE)
    ranges: dict[str, Any] = {}
    for name, span in UNSEEN_RANGES.items():
        try:
            make_randomizer(late, Randomization(**{name: span}))
        except NothingToChange:
            continue
        ranges[name] = span
    draw = torch.func.vmap(make_randomizer(late, Randomization(**ranges)), in_dims=(None, 0))
    params = draw(late.params, random.split(random.fold_in(key, _PHYSICS), robots))
    changed = [f"{_WORDS[name]} x {low:g} to {high:g}" for name, (low, high) in ranges.items()]
    return Unseen(late, params, ", ".join([*changed, f"actions {1000 * _LATE * env.spec.control_dt:g} ms late"]))
