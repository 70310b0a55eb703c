"""Left and right: mirror images of states, observations and actions.

A robot whose right half is the mirror image of its left one does, in a mirrored world, the mirror image of what it does
in this one. The mirror is the plane y = 0 of a frame with x forward, y left and z up. Every quantity of a robot goes
over by exchanging left and right and changing signs: a `SignedPermutation`. They are built here from the names of
joints and of observation parts, never from tables of places, and each is its own inverse. Nothing here measures whether
a robot is symmetric: a model with other masses on one side has maps too, which then are no symmetry of it.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from jaxtyping import Float, Int64, Num
from torch import Tensor

from rlcore import tree
from rlcore.env import EnvSpec
from rlcore.errors import InputError
from rlcore.physics.engine import ModelInfo, PhysicsState
from rlcore.tree import pytree

Sides = Sequence[tuple[str, str]]
"""Pairs of a left and a right word, such as `("left", "right")`. Underscores around a word are ignored."""

SIDES: Sides = (("left", "right"), ("Left", "Right"))

KINDS = ("scalar", "polar", "axial", "command", "phase", "feet", "feet_polar", "feet_axial", "joints", "action")
"""What an observation part can be, and so how it is mirrored.

- `scalar`: numbers that know no side, such as a height; unchanged.
- `polar`: vectors (x, y, z) such as a velocity, a position or gravity; y changes its sign.
- `axial`: vectors (x, y, z) of rotation, such as an angular velocity, an angular momentum or a torque; x and z change
  theirs.
- `command`: (forward velocity, velocity to the left, yaw rate); the last two change their sign.
- `phase`: sine and cosine of a clock of the gait: half a period later the other foot is where this one was, and both
  numbers change their sign.
- `feet`: the left foot's numbers, then the right foot's (contacts, heights, sines and cosines of a clock for each
  foot); the halves are exchanged.
- `feet_polar`, `feet_axial`: the left foot's vectors, then the right foot's; exchanged and mirrored.
- `joints`: a number for each actuated joint in the order of the actuators (angle, velocity, torque).
- `action`: an action.

Where a part is longer, it is several of these, one after the other.
"""

_VECTORS = {"polar": (1, -1, 1), "axial": (-1, 1, -1), "command": (1, -1, -1), "phase": (-1, -1)}
# Rotations about the lateral axis look the same in the mirror, those about the two axes in its plane are reversed.
_TURNS = {"roll": -1, "yaw": -1, "pitch": 1}
# What these words call turns about the lateral axis, unless one of the words above says otherwise.
_BENDS = {"knee": 1, "elbow": 1, "ankle": 1, "thigh": 1, "calf": 1}
# How robots name sides. A name that looks like one side and is not known as one is refused, not taken for the middle.
_SIDE_WORDS = {"l", "r", "fl", "fr", "rl", "rr", "hl", "hr", "bl", "br", "lf", "rf", "lh", "rh"}
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_HISTORY = re.compile(r"\[-?[0-9]+\]$")


@pytree
class SignedPermutation:
    """A map `y_i = sign_i x_permutation_i`.

    Attributes:
      permutation: `[n]` where each number comes from.
      sign: `[n]` 1 or -1, float32.
    """

    permutation: Int64[Tensor, " n"]
    sign: Float[Tensor, " n"]


@pytree
class Symmetry:
    """How a task looks in the mirror.

    Attributes:
      observations: the map of each observation group.
      action: the map of actions.
    """

    observations: dict[str, SignedPermutation]
    action: SignedPermutation


def apply(mirror: SignedPermutation, x: Num[Tensor, "*batch n"]) -> Num[Tensor, "*batch n"]:
    """`x` in the mirror: `x[..., permutation] * sign`, in the dtype of `x`."""
    return x.index_select(-1, mirror.permutation) * mirror.sign.to(x.dtype)


def concatenate(mirrors: Sequence[SignedPermutation]) -> SignedPermutation:
    """The map of vectors laid one after the other.

    Raises:
      InputError: if there are none.
    """
    if not mirrors:
        raise InputError("mirrors must be at least one map, got none")
    permutation, start = [], 0
    for mirror in mirrors:
        permutation.append(mirror.permutation + start)
        start += mirror.permutation.shape[0]
    return SignedPermutation(torch.cat(permutation), torch.cat([mirror.sign for mirror in mirrors]))


def _map(permutation: Sequence[int], sign: Sequence[float]) -> SignedPermutation:
    return SignedPermutation(torch.tensor(permutation, dtype=torch.int64), torch.tensor(sign, dtype=torch.float32))


# --- joints -------------------------------------------------------------------------------------------------


def mirror_joints(
    names: Sequence[str], *, sides: Sides = SIDES, signs: Mapping[str, float] | None = None
) -> SignedPermutation:
    """The map of a number for each joint: left and right change places, angles of roll and yaw their sign.

    Names are read word by word: `left_hip_roll_joint`, `hip_roll_left` and, with `sides=(("L", "R"),)`, `LHipRoll` are
    all understood. A joint that names no side is in the middle and stays where it is. The sign is -1 where a word is
    `roll` or `yaw`, and 1 where one is `pitch` or, without those three, `knee`, `elbow`, `ankle`, `thigh` or `calf`.
    That holds where the axes of a left and a right joint point the same way, as in most robots; where they do not, or
    where names do not tell, `signs` does, and `axis_signs` finds it from the axes.

    Args:
      names: the joints, in the order of the numbers.
      sides: left and right words.
      signs: signs of some joints; a joint that is not named has that of the one across.

    Raises:
      InputError: for a name that occurs twice, looks like one side but has no word of `sides`, has nobody across, or
        tells no sign; for signs of unknown joints, other than 1 and -1, or unlike the one across.
    """
    names = tuple(names)
    across = _across(names, sides)
    given = dict(signs or {})
    if unknown := [name for name in given if name not in names]:
        raise InputError(f"signs must name joints of {_list(names)}; got {_list(unknown)}")
    if wrong := [name for name, sign in given.items() if sign not in (1, -1)]:
        raise InputError(f"signs must be 1 or -1, got {_list(f'{n}: {given[n]}' for n in wrong)}")
    chosen: list[float | None] = []
    for name, other in zip(names, across, strict=True):
        chosen.append(given.get(name, given.get(names[other], _sign_by_name(name))))
    if silent := [name for name, sign in zip(names, chosen, strict=True) if sign is None]:
        raise InputError(
            f"names without roll, pitch or yaw do not tell how they are mirrored: {_list(silent)}; give their signs, "
            "-1 where an angle is reversed in the mirror and 1 where it stays"
        )
    sign = [float(s) for s in chosen if s is not None]
    if unlike := [name for i, name in enumerate(names) if sign[i] != sign[across[i]]]:
        raise InputError(
            f"signs of a joint and of the one across must be equal, got different ones for {_list(unlike)}"
        )
    return _map(across, sign)


def axis_signs(
    names: Sequence[str],
    axes: Num[Tensor, "joints 3"],
    *,
    sides: Sides = SIDES,
    kinds: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """The signs of joints from the directions of their axes: what the names are taken to mean, measured.

    A turn by q about the axis a is in the mirror one by q about `(-a_x, a_y, -a_z)`: the sign is 1 where the joint
    across has that axis and -1 where it has the opposite one. A slide's axis is mirrored to `(a_x, -a_y, a_z)`.

    Args:
      names: hinges and slides.
      axes: of each, a unit vector in the world frame, where the robot stands upright facing x with its joints at zero.
      sides: left and right words.
      kinds: the kind of joints that are no hinge: `slide`.

    Returns:
      For each name 1 or -1, as `mirror_joints(signs=...)` takes them.

    Raises:
      InputError: as from `mirror_joints`, for axes that are not `[joints, 3]`, or that are no mirror image of those
        across: such a robot is not symmetric.
    """
    names = tuple(names)
    if axes.shape != (len(names), 3):
        raise InputError(f"axes must be [{len(names)}, 3], one for each joint, got {list(axes.shape)}")
    slides = torch.tensor([(kinds or {}).get(name) == "slide" for name in names])
    polar, axial = (torch.tensor(_VECTORS[kind], dtype=axes.dtype) for kind in ("polar", "axial"))
    image = axes * torch.where(slides.unsqueeze(-1), polar, axial)
    along = (image * axes[_across(names, sides)]).sum(-1)
    # Models are written with a few digits: a deviation of 0.01 is an angle of 8 degrees, none that is meant.
    if bad := [name for name, dot in zip(names, along.tolist(), strict=True) if not abs(abs(dot) - 1) < 0.01]:
        raise InputError(f"axes must be unit vectors and mirror images of those across; not so for {_list(bad)}")
    return dict(zip(names, torch.sign(along).tolist(), strict=True))


def _across(names: tuple[str, ...], sides: Sides) -> list[int]:
    """The place of the joint on the other side, for each; its own for one in the middle."""
    other: dict[str, str] = {}
    for left, right in ((a.strip("_"), b.strip("_")) for a, b in sides):
        if not left or not right or left == right:
            raise InputError(f"sides must be pairs of different words, got {(left, right)}")
        other |= {left: right, right: left}
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"names must differ, got more than once: {_list(twice)}")
    place = {name: i for i, name in enumerate(names)}
    opposite = [_WORD.sub(lambda match: other.get(match[0], match[0]), name) for name in names]
    hidden = [n for n, o in zip(names, opposite, strict=True) if n == o and _looks_sided(n)]
    if hidden:
        raise InputError(
            f"names look like one side of a pair: {_list(hidden)}; give their words, as in sides=(('l', 'r'),); "
            f"got {_list(sides)}"
        )
    if alone := [f"{n} (no {o})" for n, o in zip(names, opposite, strict=True) if o not in place]:
        raise InputError(f"names have nobody across: {_list(alone)}; there are {_list(names)}")
    return [place[o] for o in opposite]


def _looks_sided(name: str) -> bool:
    words = [word.lower() for word in _WORD.findall(name)]
    return any(word in _SIDE_WORDS or word.startswith(("left", "right")) for word in words)


def _sign_by_name(name: str) -> int | None:
    words = [word.lower() for word in _WORD.findall(name)]
    for meanings in (_TURNS, _BENDS):
        found = {meanings[word] for word in words if word in meanings}
        if found:
            return found.pop() if len(found) == 1 else None
    return None


def _list(names: Iterable[object]) -> str:
    return ", ".join(map(str, names)) or "none"


# --- states -------------------------------------------------------------------------------------------------


def mirror_coordinates(
    model: ModelInfo, *, sides: Sides = SIDES, signs: Mapping[str, float] | None = None
) -> tuple[SignedPermutation, SignedPermutation]:
    """The maps of a model's positions `[nq]` and velocities `[nv]`.

    The world is mirrored at its plane y = 0, which a free joint's position, quaternion `(w, -x, y, -z)`, linear and
    angular velocity follow. Frames of bodies with a free or ball joint must be x forward, y left, z up.

    Args:
      model: the robot.
      sides: left and right words in the names of joints.
      signs: signs of hinges and slides, as for `mirror_joints`.

    Raises:
      InputError: as from `mirror_joints`, or where a joint is of another kind than the one across.
    """
    joints = model.joints
    across = _across(tuple(joint.name for joint in joints), sides)
    simple = [joint.name for joint in joints if joint.kind in ("hinge", "slide")]
    if unlike := [joint.name for joint, i in zip(joints, across, strict=True) if joint.kind != joints[i].kind]:
        raise InputError(f"joints must be of the kind of those across, which is not so for {_list(unlike)}")
    sign = dict(zip(simple, mirror_joints(simple, sides=sides, signs=signs).sign.tolist(), strict=True))
    polar, axial = _VECTORS["polar"], _VECTORS["axial"]
    quaternion = (1, *axial)
    qpos, qvel = ([0] * n for n in (model.nq, model.nv))
    qpos_sign, qvel_sign = ([0.0] * n for n in (model.nq, model.nv))
    for joint, i in zip(joints, across, strict=True):
        one = (sign.get(joint.name, 0.0),)
        positions = {"free": (*polar, *quaternion), "ball": quaternion}.get(joint.kind, one)
        velocities = {"free": (*polar, *axial), "ball": axial}.get(joint.kind, one)
        qpos[joint.qpos] = range(model.nq)[joints[i].qpos]
        qvel[joint.qvel] = range(model.nv)[joints[i].qvel]
        qpos_sign[joint.qpos] = map(float, positions)
        qvel_sign[joint.qvel] = map(float, velocities)
    return _map(qpos, qpos_sign), _map(qvel, qvel_sign)


def mirror_state(
    model: ModelInfo, *, sides: Sides = SIDES, signs: Mapping[str, float] | None = None
) -> Callable[[PhysicsState], PhysicsState]:
    """A function that gives the mirror image of a state, `[...]` to `[...]`.

    Sensors are not mirrored but zero, as in every state just written: `Engine.forward` computes them.

    Args:
      model: the robot.
      sides: left and right words in the names of joints.
      signs: signs of hinges and slides, as for `mirror_joints`.

    Raises:
      InputError: as from `mirror_coordinates`, or if there are activations that do not belong to the actuators one by
        one.
    """
    qpos, qvel = mirror_coordinates(model, sides=sides, signs=signs)
    if model.na not in (0, model.nu):
        raise InputError(f"activations must be none or one for each of {model.nu} actuators, got {model.na}")
    act = _actuators(model, sides, signs) if model.na else _map([], [])

    def mirrored(state: PhysicsState) -> PhysicsState:
        return tree.replace(
            state,
            qpos=apply(qpos, state.qpos),
            qvel=apply(qvel, state.qvel),
            act=apply(act, state.act) if model.na else state.act,
            warmstart=apply(qvel, state.warmstart),
            sensordata=torch.zeros_like(state.sensordata),
        )

    return mirrored


def _actuators(model: ModelInfo, sides: Sides, signs: Mapping[str, float] | None) -> SignedPermutation:
    """The map of a number for each actuator: that of the joint which it drives."""
    names = model.actuator_joints
    if loose := [a for a, joint in zip(model.actuators, names, strict=True) if not joint]:
        raise InputError(f"actuators must drive joints to be mirrored, which is not so for {_list(loose)}")
    # Signs may be given for all joints of the model, driven or not.
    known = {joint.name for joint in model.joints}
    given = {n: s for n, s in (signs or {}).items() if n in names or n not in known}
    return mirror_joints(names, sides=sides, signs=given)


# --- observations and actions -------------------------------------------------------------------------------


def mirror_action(
    spec: EnvSpec, *, sides: Sides = SIDES, signs: Mapping[str, float] | None = None
) -> SignedPermutation:
    """The map of actions, where there is one for each actuator: that of the joints which they drive.

    Args:
      spec: the environment.
      sides: left and right words in the names of joints.
      signs: signs of joints, as for `mirror_joints`.

    Raises:
      InputError: as from `mirror_joints`, if actions are not one to one with actuators, or if an action's bounds are
        not the mirror image of those of the one across.
    """
    model = spec.model
    if spec.actions != model.actuators:
        raise InputError(f"actions must be one to one with actuators to be mirrored by name, got {_list(spec.actions)}")
    mirror = _actuators(model, sides, signs)
    bounds = torch.tensor([spec.action_low, spec.action_high], dtype=torch.float64)
    image = apply(mirror, bounds)
    image = torch.where(mirror.sign > 0, image, image.flip(0))
    wrong = ~torch.isclose(image, bounds, rtol=1e-6, atol=1e-9).all(0)
    if bad := [name for name, is_wrong in zip(spec.actions, wrong.tolist(), strict=True) if is_wrong]:
        raise InputError(f"action bounds must be mirror images of those across, which is not so for {_list(bad)}")
    return mirror


def mirror_observation(
    spec: EnvSpec,
    group: str,
    parts: Mapping[str, SignedPermutation | str],
    *,
    sides: Sides = SIDES,
    signs: Mapping[str, float] | None = None,
) -> SignedPermutation:
    """The map of an observation group, from what each of its parts is.

    A part that `observation_history` repeats, such as `gravity[-2]`, is what `gravity` is.

    Args:
      spec: the environment.
      group: the observation group.
      parts: for every part its kind, one of `KINDS`, or its map.
      sides: left and right words in the names of joints.
      signs: signs of joints, as for `mirror_joints`.

    Raises:
      InputError: for an unknown group or kind, a part that is missing or unknown, a map of a wrong size or one that is
        not its own inverse, or as from `mirror_joints` and `mirror_action`.
    """
    sizes = dict(spec.parts(group))
    key_of = {part: part if part in parts else _HISTORY.sub("", part) for part in sizes}
    missing = dict.fromkeys(key for key in key_of.values() if key not in parts)
    unknown = [key for key in parts if key not in key_of.values()]
    if missing or unknown:
        raise InputError(
            f"parts must be those of observation group {group!r}: "
            f"missing are {_list(missing)}; unknown are {_list(unknown)}"
        )
    mirrors = []
    for part, size in sizes.items():
        what = parts[key_of[part]]
        mirror = _of_kind(spec, part, what, size, sides, signs) if isinstance(what, str) else what
        _check_map(f"the map of {part!r}", mirror, size)
        mirrors.append(mirror)
    return concatenate(mirrors)


def make_symmetry(
    spec: EnvSpec,
    parts: Mapping[str, SignedPermutation | str],
    *,
    sides: Sides = SIDES,
    signs: Mapping[str, float] | None = None,
) -> Symmetry:
    """The maps of all observation groups and of actions.

    Args:
      spec: the environment.
      parts: for every part of every group its kind, one of `KINDS`, or its map; a part of several groups is named
        once.
      sides: left and right words in the names of joints.
      signs: signs of joints, as for `mirror_joints`.

    Raises:
      InputError: for a part of no group, or as from `mirror_observation` and `mirror_action`.
    """
    maps, used = {}, set()
    for group in spec.observations:
        names = {name for part, _ in spec.parts(group) for name in (part, _HISTORY.sub("", part))}
        of_group = {name: kind for name, kind in parts.items() if name in names}
        maps[group] = mirror_observation(spec, group, of_group, sides=sides, signs=signs)
        used |= names
    if unknown := [name for name in parts if name not in used]:
        raise InputError(f"parts must be those of an observation group; {_list(unknown)} are in none")
    return Symmetry(maps, mirror_action(spec, sides=sides, signs=signs))


def check_symmetry(symmetry: Symmetry, spec: EnvSpec, groups: Sequence[str]) -> None:
    """Raise InputError where a symmetry lacks one of the groups, or a map does not fit the environment."""
    if missing := [group for group in groups if group not in symmetry.observations]:
        raise InputError(
            f"symmetry must have a map for each observation group; missing are {_list(missing)}, "
            f"there are {_list(symmetry.observations)}"
        )
    for group in groups:
        _check_map(f"symmetry of {group!r}", symmetry.observations[group], spec.observation_size(group))
    _check_map("symmetry of actions", symmetry.action, spec.action_size)


def _of_kind(
    spec: EnvSpec, part: str, kind: str, size: int, sides: Sides, signs: Mapping[str, float] | None
) -> SignedPermutation:
    if kind not in KINDS:
        raise InputError(f"kind of {part!r} must be one of {_list(KINDS)}, got {kind!r}")
    if kind == "action":
        unit = mirror_action(spec, sides=sides, signs=signs)
    elif kind == "joints":
        unit = _actuators(spec.model, sides, signs)
    elif kind in _VECTORS:
        vector = _VECTORS[kind]
        unit = _map(range(len(vector)), vector)
    elif kind == "scalar":
        unit = _map([0], [1])
    else:
        vector = _VECTORS.get(kind.removeprefix("feet_"), (1,))
        half = size // 2
        if size % (2 * len(vector)):
            raise InputError(f"part {part!r} of kind {kind!r} must be a multiple of {2 * len(vector)}, got {size}")
        return _map([*range(half, size), *range(half)], vector * (size // len(vector)))
    length = unit.permutation.shape[0]
    if size % length:
        raise InputError(f"part {part!r} of kind {kind!r} must be a multiple of {length}, got {size}")
    return concatenate([unit] * (size // length))


def _check_map(what: str, mirror: SignedPermutation, size: int) -> None:
    permutation, sign = mirror.permutation, mirror.sign
    if permutation.shape != (size,) or sign.shape != (size,):
        raise InputError(f"{what} must be of size {size}, got {list(permutation.shape)} and {list(sign.shape)}")
    if sorted(permutation.tolist()) != list(range(size)) or not bool((sign.abs() == 1).all()):
        raise InputError(f"{what} must be a permutation of 0 to {size - 1} and signs of 1 or -1, got {mirror}")
    again = apply(mirror, apply(mirror, torch.arange(1.0, size + 1)))
    if not torch.equal(again, torch.arange(1.0, size + 1)):
        raise InputError(f"{what} must be its own inverse, got {mirror}")
