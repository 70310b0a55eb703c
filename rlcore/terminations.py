"""Rules that end an episode early, each a pure function of one robot's mechanical state.

A rule is `(params, physics) -> [] bool`. A task gives its rules names and says which ones are switched on; `ends_if`
makes of these the `terminate` that `make_env` wants, and `ended_by` the metrics that tell which rule it was. A rule
remembers nothing and rewards nothing.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from rlcore import rotations
from rlcore.env import Params
from rlcore.errors import InputError
from rlcore.physics.engine import ModelInfo, PhysicsState

Rule = Callable[[Params, PhysicsState], Tensor]
"""`(params, physics) -> [] bool`: whether the episode is over."""


def _free_joint(model: ModelInfo, name: str) -> slice:
    joint = model.joint(name)
    if joint.kind != "free":
        raise InputError(f"height and tilt are those of a free joint; {name!r} is a {joint.kind}")
    return joint.qpos


def below_height(model: ModelInfo, height: float, joint: str = "root") -> Rule:
    """Ends where the free joint is lower than `height` (m above the world's origin).

    Raises:
      InputError: for a height that is not finite, or a joint that is unknown or not free.
    """
    if not math.isfinite(height):
        raise InputError(f"height must be a finite number of m, got {height}")
    z = _free_joint(model, joint).start + 2

    def rule(params: Params, physics: PhysicsState) -> Tensor:
        return physics.qpos[z] < height

    return rule


def tilted(model: ModelInfo, degrees: float, joint: str = "root") -> Rule:
    """Ends where the free joint's z axis is more than `degrees` from the vertical.

    Raises:
      InputError: for an angle outside (0, 180), or a joint that is unknown or not free.
    """
    if not 0 < degrees < 180:
        raise InputError(f"tilt must be between 0 and 180 degrees, got {degrees}")
    start = _free_joint(model, joint).start
    highest = -math.cos(math.radians(degrees))

    def rule(params: Params, physics: PhysicsState) -> Tensor:
        # The vertical component of gravity in the body frame is minus the cosine of the tilt.
        return rotations.projected_gravity(physics.qpos[start + 3 : start + 7])[2] > highest

    return rule


def forbidden_contact(model: ModelInfo, sensors: Sequence[str], force: float = 1.0) -> Rule:
    """Ends where one of the named touch sensors feels more than `force` (N), as of the last physics substep.

    Raises:
      InputError: for no sensor, an unknown sensor, one of several numbers, or a negative force.
    """
    if not sensors:
        raise InputError("forbidden contact needs at least one touch sensor, got none")
    if not 0 <= force < math.inf:
        raise InputError(f"force must be 0 N or more, got {force}")
    places = [model.sensor(name) for name in sensors]
    for name, place in zip(sensors, places, strict=True):
        if place.stop - place.start != 1:
            raise InputError(f"sensor {name!r} is no touch sensor: it has {place.stop - place.start} numbers")

    def rule(params: Params, physics: PhysicsState) -> Tensor:
        return (torch.cat([physics.sensordata[place] for place in places]) > force).any()

    return rule


def beyond_limits(model: ModelInfo, joints: Sequence[str] | None = None, margin: float = 0.0) -> Rule:
    """Ends where a hinge or slide joint is more than `margin` (rad or m) outside its limits.

    Limits are soft: a joint that is pressed against one exceeds it a little, so a small margin is wanted.

    Args:
      model: the robot.
      joints: names of the joints; by default every hinge and slide joint that has limits.
      margin: distance beyond a limit that is allowed.

    Raises:
      InputError: for an unknown joint, one without limits, no joint at all, or a negative margin.
    """
    if not 0 <= margin < math.inf:
        raise InputError(f"margin must be 0 or more, got {margin}")
    limited = [
        j for j in model.joints if j.kind in ("hinge", "slide") and math.isfinite(j.lower) | math.isfinite(j.upper)
    ]
    chosen = limited if joints is None else [model.joint(name) for name in joints]
    without = [joint.name for joint in chosen if joint not in limited]
    if without:
        raise InputError(f"joints without limits cannot exceed them: {', '.join(without)}")
    if not chosen:
        raise InputError("joint limits need at least one joint that has limits, got none")
    places = [joint.qpos.start for joint in chosen]
    contiguous = places == list(range(places[0], places[0] + len(places)))
    at: slice | list[int] = slice(places[0], places[-1] + 1) if contiguous else places
    low = torch.tensor([joint.lower - margin for joint in chosen], dtype=torch.float64)
    high = torch.tensor([joint.upper + margin for joint in chosen], dtype=torch.float64)

    def rule(params: Params, physics: PhysicsState) -> Tensor:
        angle = physics.qpos[at]
        return ((angle < low.to(angle.device)) | (angle > high.to(angle.device))).any()

    return rule


def switched_on(rules: Mapping[str, Rule], on: Sequence[str]) -> dict[str, Rule]:
    """The rules named in `on`, in that order.

    Raises:
      InputError: for an unknown name, or one that comes twice.
    """
    unknown = [name for name in on if name not in rules]
    if unknown:
        raise InputError(f"no termination rule {unknown[0]!r}; there are: {', '.join(rules) or 'none'}")
    if len(set(on)) != len(on):
        raise InputError(f"termination rules are switched on once each, got {', '.join(on)}")
    return {name: rules[name] for name in on}


def ends_if(rules: Mapping[str, Rule], on: Sequence[str]) -> Rule:
    """A rule that ends where one of those named in `on` does, and never if none is: for `make_env(terminate=...)`.

    Raises:
      InputError: for an unknown name, or one that comes twice.
    """
    chosen = switched_on(rules, on)

    def terminate(params: Params, physics: PhysicsState) -> Tensor:
        ended = torch.zeros_like(physics.fault, dtype=torch.bool)
        for rule in chosen.values():
            ended = ended | rule(params, physics)
        return ended

    return terminate


def ended_by(rules: Mapping[str, Rule], on: Sequence[str], params: Params, physics: PhysicsState) -> dict[str, Tensor]:
    """For each rule named in `on` the metric `ended/<name>` `[]`: 1 where it ends the episode, else 0.

    Call it in a task's `metrics` with the physics after the step. Rules that `ends_if` has asked already cost nothing
    more in a recording, which computes equal operations once.

    Raises:
      InputError: for an unknown name, or one that comes twice.
    """
    return {
        f"ended/{name}": rule(params, physics).to(physics.time.dtype) for name, rule in switched_on(rules, on).items()
    }
