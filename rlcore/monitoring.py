"""What every legged robot is watched by: torques, power, cost of transport, feet.

`robot_metrics` gives a task's `metrics` function what any robot with feet can be measured by; the task adds what only
it knows, such as the error of a command. Nothing here rewards or ends anything, and no state depends on it.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlcore.env import EnvState, Params
from rlcore.errors import InputError
from rlcore.measurement import Parts, Ratio
from rlcore.physics.engine import BatchEngine
from rlcore.robot import Robot

MetricsFn = Callable[[Params, EnvState, Tensor, EnvState], dict[str, Any]]
"""`(params, before, action, after) -> metrics`, as `make_env(metrics=...)` wants it."""

_AT_LIMIT = 0.999  # of the limit: engines in single precision clip a little beside it


def robot_metrics(
    engine: BatchEngine,
    robot: Robot,
    control_dt: float,
    *,
    contact_force: float = 1.0,
    slowest: float = 0.1,
    torque_limits: Tensor | None = None,
) -> MetricsFn:
    """What to log of a legged robot at each step.

    - `torque/JOINT`: magnitude of each joint's torque, Nm.
    - `torque_group/GROUP`: the mean of these over the joints of a group (see `Robot.groups`), left and right together,
      and over `all` joints.
    - `torque_saturation`: share of the actuators that are at their torque limit (within a thousandth). Actuators
      without a limit are left out, and so is the metric where none has one.
    - `power`: mechanical, `sum_i |tau_i qd_i|`, W: what is taken from a joint costs as much as what is given to it.
    - `cost_of_transport`: `power / (m g v)`, energy per weight and distance, with v the horizontal speed of the root in
      m/s and m the mass of all bodies. It is a ratio of means over the steps in which the robot moves, that is with
      `v >= slowest`. Slower steps count neither in the energy nor in the distance, so that standing robots do not
      push it to infinity; where none moves it is NaN.
    - `contact/...`: shares of time by which feet carry more than `contact_force`: `none`, each foot alone under its
      name, for more than two feet `several`, and `both` (of two) or `all`. They add up to 1.
    - `contact/landings_per_second`: how often any foot lands, 1/s: the step frequency. A foot that carried nothing
      at the last step and does now has landed, so feet that chatter count too.
    - `contact/air_time`: mean duration of the swings that end, s; where the task has `feet_memory`.
    - `height`: of the root, m. `speed`: horizontal, of the root, m/s.

    Args:
      engine: for masses, gravity and torque limits; what `params.physics` says of these counts.
      robot: its joints and feet.
      control_dt: control interval, s.
      contact_force: normal force of a contact, N.
      slowest: speed from which on a robot moves, m/s.
      torque_limits: `[n]` Nm, by default the force ranges of the actuators.

    Raises:
      InputError: for an interval or speed that is not above 0, a negative force, or limits that are not one number
        above 0 for each joint.
    """
    if not 0 < control_dt < math.inf:
        raise InputError(f"control_dt must be more than 0 s, got {control_dt}")
    if not 0 <= contact_force < math.inf:
        raise InputError(f"contact_force must be 0 N or more, got {contact_force}")
    if not 0 < slowest < math.inf:
        raise InputError(f"slowest must be more than 0 m/s, got {slowest}")
    weight = _weight(engine)
    saturation = _saturation(engine, robot, torque_limits)
    groups = {**robot.groups(), "all": list(range(len(robot.joints)))}
    patterns = _pattern_names([foot.name for foot in robot.feet])

    def metrics(params: Params, before: EnvState, action: Tensor, after: EnvState) -> dict[str, Any]:
        physics = after.physics
        torque = robot.joint_torque(physics)
        size = torque.abs()
        power = (torque * robot.joint_velocity(physics)).abs().sum()
        forward, left, _ = robot.heading_velocity(physics).unbind(-1)
        square = forward * forward + left * left
        speed, moves = torch.sqrt(square), square >= slowest**2
        contact = robot.foot_contact(physics) > contact_force
        landed = contact & ~(robot.foot_contact(before.physics) > contact_force)
        landings = _total(landed.to(torque.dtype))
        joints = size.unbind(-1)
        means = [_sum([joints[i] for i in places]) * (1.0 / len(places)) for places in groups.values()]
        measured = {
            "torque": Parts(size, robot.joints),
            "torque_group": Parts(torch.stack(means), tuple(groups)),
            **saturation(params, torque),
            "power": power,
            "cost_of_transport": Ratio(torch.where(moves, power, 0.0), torch.where(moves, weight(params) * speed, 0.0)),
            "contact": Parts(_patterns(contact, torque.dtype), patterns),
            "contact/landings_per_second": landings * (1.0 / control_dt),
            "height": robot.height(physics),
            "speed": speed,
        }
        if "feet" in after.memory:
            swung = _total(torch.where(landed, after.memory["feet"]["air_time"], 0.0))
            measured["contact/air_time"] = Ratio(swung, landings)
        return measured

    return metrics


def _weight(engine: BatchEngine) -> Callable[[Params], Tensor | float]:
    """`m |g|` of the bodies of a robot with these parameters, N."""
    nominal = engine.nominal("body_mass", "opt.gravity")

    def weight(params: Params) -> Tensor | float:
        if params.physics.keys().isdisjoint(nominal):
            return fixed
        device = next(iter(params.physics.values())).device
        mass, gravity = (params.physics.get(name, nominal[name].to(device)) for name in nominal)
        return mass.sum(-1) * torch.sqrt((gravity * gravity).sum(-1))

    fixed = float(nominal["body_mass"].sum() * torch.linalg.vector_norm(nominal["opt.gravity"]))
    return weight


def _saturation(
    engine: BatchEngine, robot: Robot, limits: Tensor | None
) -> Callable[[Params, Tensor], dict[str, Tensor]]:
    """`(params, torque [n]) -> {"torque_saturation": []}`, or `{}` where no actuator has a limit."""
    field = "actuator_forcerange"
    if limits is None:
        nominal = engine.nominal(field)[field]
    else:
        if limits.shape != (len(robot.joints),) or not bool((limits > 0).all()):
            raise InputError(f"torque_limits must be {len(robot.joints)} numbers above 0 Nm, got {limits.tolist()}")
        nominal = torch.stack([-limits, limits], -1).to(torch.float64)
    # An actuator without a limit has a range of nothing; one that only pulls has no limit at 0.
    bounded = nominal[:, 0] < nominal[:, 1]
    pulls, pushes = bounded & (nominal[:, 0] < 0), bounded & (nominal[:, 1] > 0)
    count = int((pulls | pushes).sum())

    def saturation(params: Params, torque: Tensor) -> dict[str, Tensor]:
        if not count:
            return {}
        device = torque.device
        ranges = nominal.to(device) if limits is not None else params.physics.get(field, nominal.to(device))
        low, high = ranges.unbind(-1)
        at_low, at_high = torque <= _AT_LIMIT * low, torque >= _AT_LIMIT * high
        at_limit = (pulls.to(device) & at_low) | (pushes.to(device) & at_high)
        return {"torque_saturation": at_limit.to(torque.dtype).sum() * (1.0 / count)}

    return saturation


def _pattern_names(feet: list[str]) -> tuple[str, ...]:
    names = ["none", *feet]
    if len(feet) > 2:
        names.append("several")
    if len(feet) > 1:
        names.append("both" if len(feet) == 2 else "all")
    return tuple(names)


def _patterns(contact: Tensor, dtype: torch.dtype) -> Tensor:
    """Which pattern of contacts `[feet]` it is, 1 there and 0 elsewhere, in the order of `_pattern_names`."""
    feet = contact.shape[-1]
    count = _total(contact.to(dtype))
    found = [count == 0, *(alone & (count == 1) for alone in contact.unbind(-1))]
    if feet > 2:
        found.append((count > 1) & (count < feet))
    if feet > 1:
        found.append(count == feet)
    return torch.stack(found).to(dtype)


def _total(x: Tensor) -> Tensor:
    """The sum over a short axis, written out: a recording fuses additions with what is around them."""
    return _sum(list(x.unbind(-1)))


def _sum(numbers: list[Tensor]) -> Tensor:
    total = numbers[0]
    for number in numbers[1:]:
        total = total + number
    return total
