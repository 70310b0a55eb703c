"""Domain randomization: robots of one model that differ in mass, motors and ground.

`make_randomizer` turns ranges into a pure function of one robot's parameters and a key; `torch.func.vmap` over keys
makes a population. It starts from the nominal model whatever the parameters hold already, so that randomizing twice
is randomizing once, and it leaves alone every model field that no range touches.

A robot keeps what is drawn here for the whole run, since MuJoCo derives constants from these fields. What changes
with each episode (encoder offsets, delays, noise, pushes) is a wrapper's: see `rlcore.env`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rlcore import random, rotations, tree
from rlcore.env import Env, Params
from rlcore.errors import InputError

Range = tuple[float, float]


def each_robots(params: Params, randomize: Callable[[Params, Tensor], Params], key: Tensor, num_envs: int) -> Params:
    """Parameters of as many robots, drawn for each: every leaf is `[num_envs, ...]`.

    Args:
      params: the nominal parameters.
      randomize: `(params, key) -> params` of one robot.
      key: random key.
      num_envs: how many.
    """
    drawn = torch.func.vmap(randomize, in_dims=(None, 0))(params, random.split(key, num_envs))
    # What all share is an expanded view under vmap, and would come back from a checkpoint as none.
    return tree.map_leaves(torch.Tensor.contiguous, drawn)


class NothingToChange(InputError):
    """A range for what the model has none of, such as the stiffness of servos where there are only motors."""


@dataclass(frozen=True)
class Randomization:
    """Ranges (lowest, highest) to draw each robot's parameters from, uniformly; by default nothing changes."""

    mass_scale: Range = (1.0, 1.0)
    """Factor of a body's mass and rotational inertia together, drawn for each body."""
    inertia_scale: Range = (1.0, 1.0)
    """Further factor of a body's rotational inertia alone, drawn for each body."""
    payload: Range = (0.0, 0.0)
    """Mass added at the centre of mass of payload_body, kg; negative takes mass away."""
    payload_body: str = ""
    """The body that carries the payload."""
    com_offset: Range = (0.0, 0.0)
    """Shift of the centre of mass of com_body along each axis of its frame, m."""
    com_body: str = ""
    """The body whose centre of mass is shifted."""
    friction_scale: Range = (1.0, 1.0)
    """Factor of sliding friction, one for all geoms of a robot. MuJoCo takes the larger friction of two geoms that
    touch: where only some are named in friction_geoms, the others still bound it from below."""
    friction_geoms: tuple[str, ...] = ()
    """Geoms whose friction changes; by default all, and the contact pairs that the model lists."""
    damping_scale: Range = (1.0, 1.0)
    """Factor of a joint's own damping, drawn for each joint (a servo's is kd_scale)."""
    armature_scale: Range = (1.0, 1.0)
    """Factor of a joint's armature (rotor inertia), drawn for each joint."""
    joints: tuple[str, ...] = ()
    """Joints whose damping and armature change; all by default."""
    kp_scale: Range = (1.0, 1.0)
    """Factor of a position servo's stiffness, drawn for each actuator."""
    kd_scale: Range = (1.0, 1.0)
    """Factor of a position servo's damping, drawn for each actuator."""
    strength_scale: Range = (1.0, 1.0)
    """Factor of an actuator's force or torque limit, drawn for each actuator."""
    gravity_scale: Range = (1.0, 1.0)
    """Factor of gravity."""
    gravity_tilt: Range = (0.0, 0.0)
    """Rotation of gravity about the world's x and y axes, each, rad: level ground acts like a slope."""

    def __post_init__(self) -> None:
        for name, identity in _IDENTITIES.items():
            low, high = getattr(self, name)
            _check(self, name, -math.inf < low <= high < math.inf, "two finite numbers, the lower first")
            if identity == (1.0, 1.0):
                _check(self, name, low > 0, "factors above 0")
        low, high = self.gravity_tilt
        _check(self, "gravity_tilt", max(-low, high) < math.pi / 2, "less than a quarter turn")
        for name, body in (("payload", "payload_body"), ("com_offset", "com_body")):
            if getattr(self, name) != _IDENTITIES[name]:
                _check(self, body, getattr(self, body) != "", f"the name of a body for {name}")


_IDENTITIES: dict[str, Range] = {
    field.name: field.default
    for field in dataclasses.fields(Randomization)
    if isinstance(field.default, tuple) and field.default
}
# A range's draw depends on its place, not on which others are in use.
_PLACES = {name: place for place, name in enumerate(_IDENTITIES)}


def _check(ranges: Randomization, name: str, valid: bool, what: str) -> None:
    if not valid:
        flag = "--randomization." + name.replace("_", "-")
        raise InputError(f"{name} must be {what}, got {getattr(ranges, name)!r} ({flag})")


class _Change(NamedTuple):
    """What one range does: how many numbers it draws, and each field's new value from its old one and those."""

    shape: tuple[int, ...]
    fields: Mapping[str, Callable[[Tensor, Tensor], Tensor]]


def make_randomizer(env: Env, ranges: Randomization) -> Callable[[Params, Tensor], Params]:
    """`randomize(params, key [2]) -> params` for one robot, pure.

    The model fields that a range touches are those of `env.params` (where it has none, the model's own), changed;
    whatever `params.physics` says of them is replaced. All else in `params` is passed on. Ranges that change
    nothing give `params` as they are.

    Args:
      env: an environment of one robot.
      ranges: what to draw from.

    Raises:
      InputError: for an unknown body, geom or joint, a range of something that the model does not have, a mass that
        could fall to zero, or model fields that MuJoCo rejects.
    """
    model = env.spec.model
    for name in filter(None, (ranges.payload_body, ranges.com_body)):
        model.body(name)
    for name in ranges.friction_geoms:
        model.geom(name)
    for name in ranges.joints:
        model.joint(name)
    changes = {
        name: _CHANGES[name](env, ranges) for name, identity in _IDENTITIES.items() if getattr(ranges, name) != identity
    }
    start = {field: _nominal(env, field) for change in changes.values() for field in change.fields}

    def randomize(params: Params, key: Tensor) -> Params:
        fields: dict[str, Tensor] = {}
        for name, change in changes.items():
            low, high = getattr(ranges, name)
            draw_key = random.fold_in(key, _PLACES[name])
            drawn = random.uniform(draw_key, change.shape, low, high, dtype=torch.float64)
            for field, changed in change.fields.items():
                fields[field] = changed(fields.get(field, start[field]), drawn)
        return tree.replace(params, physics={**params.physics, **fields}) if fields else params

    if changes:
        # An engine looks at model fields when they are first used; a mistake had better be told now.
        env.reset(randomize(env.params, random.key(0)), random.key(0))
    return randomize


def _nominal(env: Env, field: str) -> Tensor:
    given = env.params.physics.get(field)
    return env.engine.nominal(field)[field] if given is None else given


def _refuse_unless(there: Tensor, ranges: Randomization, name: str, what: str) -> None:
    if not bool(there.any()):
        raise NothingToChange(f"{name} {getattr(ranges, name)} has nothing to change: {what}")


# --- bodies -------------------------------------------------------------------------------------------------


def _mass_scale(env: Env, ranges: Randomization) -> _Change:
    fields = {"body_mass": lambda mass, u: mass * u, "body_inertia": lambda inertia, u: inertia * u.unsqueeze(-1)}
    return _Change((len(env.spec.model.bodies),), fields)


def _inertia_scale(env: Env, ranges: Randomization) -> _Change:
    return _Change((len(env.spec.model.bodies),), {"body_inertia": lambda inertia, u: inertia * u.unsqueeze(-1)})


def _one_body(env: Env, ranges: Randomization, name: str, body: str) -> tuple[Tensor, Tensor]:
    """The mask `[nbody]` of a body that has mass, and its mass."""
    mask = torch.tensor([body == other for other in env.spec.model.bodies])
    mass = _nominal(env, "body_mass")[mask]
    _refuse_unless(mass > 0, ranges, name, f"body {body!r} has no mass")
    return mask, mass


def _payload(env: Env, ranges: Randomization) -> _Change:
    mask, mass = _one_body(env, ranges, "payload", ranges.payload_body)
    least = float(mass[0]) * ranges.mass_scale[0]
    if not least + ranges.payload[0] > 0:
        raise InputError(
            f"payload must leave body {ranges.payload_body!r} of {least} kg some mass, got {ranges.payload}"
        )
    return _Change((), {"body_mass": lambda mass, u: torch.where(mask, mass + u, mass)})


def _com_offset(env: Env, ranges: Randomization) -> _Change:
    mask, _ = _one_body(env, ranges, "com_offset", ranges.com_body)
    return _Change((3,), {"body_ipos": lambda at, u: torch.where(mask.unsqueeze(-1), at + u, at)})


# --- contacts and joints ------------------------------------------------------------------------------------


def _friction_scale(env: Env, ranges: Randomization) -> _Change:
    geoms, names = env.spec.model.geoms, ranges.friction_geoms
    chosen = torch.tensor([not names or geom in names for geom in geoms])
    # A geom has one number for sliding, then torsion and rolling; a listed pair has two, one for each direction.
    sliding = chosen.unsqueeze(-1) & torch.tensor([True, False, False])
    pair_sliding = torch.tensor([True, True, False, False, False])
    _refuse_unless(sliding & (_nominal(env, "geom_friction") > 0), ranges, "friction_scale", "the geoms have none")
    fields = {"geom_friction": lambda friction, u: torch.where(sliding, friction * u, friction)}
    if not names and len(_nominal(env, "pair_friction")):
        fields["pair_friction"] = lambda friction, u: torch.where(pair_sliding, friction * u, friction)
    return _Change((), fields)


def _joint_scale(env: Env, ranges: Randomization, name: str, field: str) -> _Change:
    """Scales a field of `[nv]` by one factor for all degrees of freedom of a joint."""
    model = env.spec.model
    joint_of = torch.zeros(model.nv, dtype=torch.int64)
    chosen = torch.zeros(model.nv, dtype=torch.bool)
    for j, joint in enumerate(model.joints):
        joint_of[joint.qvel] = j
        chosen[joint.qvel] = not ranges.joints or joint.name in ranges.joints
    _refuse_unless(chosen & (_nominal(env, field) > 0), ranges, name, f"{field} of the joints is 0")
    return _Change((len(model.joints),), {field: lambda value, u: torch.where(chosen, value * u[joint_of], value)})


def _damping_scale(env: Env, ranges: Randomization) -> _Change:
    return _joint_scale(env, ranges, "damping_scale", "dof_damping")


def _armature_scale(env: Env, ranges: Randomization) -> _Change:
    return _joint_scale(env, ranges, "armature_scale", "dof_armature")


# --- actuators ----------------------------------------------------------------------------------------------


def _servos(env: Env) -> tuple[Tensor, Tensor]:
    """Which actuators are position servos, `[nu, 1]`, and the damping of each, `[nu, 1]`.

    A servo's force is `kp ctrl - kp length - kd velocity`: kp is gain 0 and minus bias 1, kd minus bias 2.
    """
    gain, bias = _nominal(env, "actuator_gainprm"), _nominal(env, "actuator_biasprm")
    servo = (gain[:, :1] != 0) & (bias[:, 1:2] == -gain[:, :1])
    return servo, torch.where(servo, -bias[:, 2:3], 0.0)


def _scaled(mask: Tensor, place: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Scales one column of a field `[nu, n]` in the rows of `mask` `[nu, 1]`."""

    def scale(value: Tensor, u: Tensor) -> Tensor:
        column = torch.arange(value.shape[-1]) == place
        return torch.where(mask & column, value * u.unsqueeze(-1), value)

    return scale


def _kp_scale(env: Env, ranges: Randomization) -> _Change:
    servo, _ = _servos(env)
    _refuse_unless(servo, ranges, "kp_scale", "no actuator is a position servo")
    return _Change((len(servo),), {"actuator_gainprm": _scaled(servo, 0), "actuator_biasprm": _scaled(servo, 1)})


def _kd_scale(env: Env, ranges: Randomization) -> _Change:
    servo, kd = _servos(env)
    _refuse_unless(kd > 0, ranges, "kd_scale", "no position servo has damping")
    return _Change((len(servo),), {"actuator_biasprm": _scaled(servo, 2)})


def _strength_scale(env: Env, ranges: Randomization) -> _Change:
    model = env.spec.model
    fields: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
    if bool(_nominal(env, "actuator_forcerange").any()):
        fields["actuator_forcerange"] = lambda limit, u: limit * u.unsqueeze(-1)
    # Some models limit the torque in the joint instead; the factor is that of the actuator which drives it.
    driver = [
        model.actuator_joints.index(j.name) if j.name in model.actuator_joints else model.nu for j in model.joints
    ]
    driven = torch.tensor(driver) < model.nu
    if bool(_nominal(env, "jnt_actfrcrange")[driven].any()):
        chosen = torch.tensor(driver)
        fields["jnt_actfrcrange"] = lambda limit, u: limit * torch.cat([u, u.new_ones(1)])[chosen].unsqueeze(-1)
    _refuse_unless(torch.tensor(bool(fields)), ranges, "strength_scale", "no actuator and no driven joint has a limit")
    return _Change((model.nu,), fields)


# --- gravity ------------------------------------------------------------------------------------------------


def _gravity_scale(env: Env, ranges: Randomization) -> _Change:
    return _Change((), {"opt.gravity": lambda gravity, u: gravity * u})


def _gravity_tilt(env: Env, ranges: Randomization) -> _Change:
    def tilted(gravity: Tensor, u: Tensor) -> Tensor:
        return rotations.rotate(rotations.from_rotation_vector(torch.cat([u, u.new_zeros(1)])), gravity)

    return _Change((2,), {"opt.gravity": tilted})


_CHANGES: dict[str, Callable[[Env, Randomization], _Change]] = {
    "mass_scale": _mass_scale,
    "inertia_scale": _inertia_scale,
    "payload": _payload,
    "com_offset": _com_offset,
    "friction_scale": _friction_scale,
    "damping_scale": _damping_scale,
    "armature_scale": _armature_scale,
    "kp_scale": _kp_scale,
    "kd_scale": _kd_scale,
    "strength_scale": _strength_scale,
    "gravity_scale": _gravity_scale,
    "gravity_tilt": _gravity_tilt,
}
