"""What Isaac Gym is told of a MuJoCo model, and what its tensors mean: pure functions, without a simulator.

Isaac Gym reads a small part of MJCF. `describe` writes a compiled model, whatever file it was compiled from, in that
part: bodies of one hinge or slide each, with explicit inertia, and the primitive geoms that touch something. It refuses
by name whatever has no counterpart there. What Isaac Gym keeps elsewhere (gains, limits of torque, armature, friction,
which shapes touch, the floor) is in `Description`.

The other functions translate states; sensors are those of `isaacgym_sensors`:

| | Isaac Gym | here |
|---|---|---|
| quaternion | x y z w | w x y z |
| angular velocity of a free root | world frame | body frame |
| linear velocity | of the centre of mass | of the origin of the body's frame |
| joints and bodies | depth first, by name | the model's order |
| friction of two shapes | the mean | the larger |
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from xml.etree import ElementTree

import mujoco
import numpy as np
import torch
from torch import Tensor

from rlcore import rotations
from rlcore.errors import InputError

# The body that a robot without a free joint is fixed to, since an asset has one root.
BASE = "fixed_base"
# The body that has the shapes which stand in the world around such a robot.
SURROUNDINGS = "surroundings"
# What each of a body's joints but the last takes of the body's mass and inertia for a link of its own, see `describe`.
LINK_SHARE = 1e-3
# PhysX keeps a shape's collision filter in an integer of 32 bits with a sign.
_FILTER_BITS = 31
# Torque of a joint without a limit, N or N m: Isaac Gym takes a limit for each.
_UNLIMITED = 1e9

_GEOMS = {
    int(mujoco.mjtGeom.mjGEOM_SPHERE): ("sphere", 1),
    int(mujoco.mjtGeom.mjGEOM_CAPSULE): ("capsule", 2),
    int(mujoco.mjtGeom.mjGEOM_BOX): ("box", 3),
}
_PLANE = int(mujoco.mjtGeom.mjGEOM_PLANE)
_FREE, _SLIDE, _HINGE = (int(getattr(mujoco.mjtJoint, f"mjJNT_{k}")) for k in ("FREE", "SLIDE", "HINGE"))
# Flags of MuJoCo that concern how it solves, or what it computes beside the motion.
_HARMLESS_FLAGS = (
    "WARMSTART", "REFSAFE", "MIDPHASE", "EULERDAMP", "AUTORESET", "NATIVECCD", "ISLAND", "MULTICCD",
    "ENERGY", "FWDINV", "INVDISCRETE", "SLEEP", "DIAGEXACT", "IPC", "SPECULATIVE",
)  # fmt: skip
# Flags that are done as they say, or switch off what is refused anyway.
_FOLLOWED_FLAGS = (
    "CONSTRAINT", "LIMIT", "CONTACT", "CLAMPCTRL", "FILTERPARENT", "EQUALITY", "SPRING", "FRICTIONLOSS",
)  # fmt: skip
_UPRIGHT = np.array([1.0, 0.0, 0.0, 0.0])


class Drive(NamedTuple):
    """How a joint is driven: Isaac Gym's own mode and numbers (N m/rad, N m s/rad, N m, kg m2; or N and m)."""

    mode: str
    stiffness: Any
    damping: Any
    effort: Any
    armature: Any


@dataclass(frozen=True, eq=False)
class Description:
    """A model as Isaac Gym is told of it.

    Attributes:
      xml: the asset, in MJCF.
      floating: whether the robot has a free joint; otherwise its root is fixed to the world.
      dofs: names of the hinges and slides, in the model's order.
      dof_qpos, dof_qvel: `[dofs]` where they are in qpos and qvel.
      bodies: names of the asset's bodies in the model's order; the first is the root.
      body_ids: each one's row in per-body fields (-1 for bodies that the model has not: the base of a fixed robot, its
        surroundings, and the links between several joints of a body).
      mass_ids: the row in per-body fields that each one has its mass of, and
      mass_shares: its share of it (-1 and 1 for bodies that have a mass of their own, and are fixed).
      geoms: the model's geoms that are shapes of the asset, in its order.
      geom_bodies: the name of each one's body in the asset.
      filters: for each one its collision filter: two of them touch if these have no bit in common.
      floor: the geom that is the floor; None without a floor.
      ground: its friction; None without a floor.
      self_collision: whether shapes of one robot touch each other.
    """

    xml: str
    floating: bool
    dofs: tuple[str, ...]
    dof_qpos: np.ndarray
    dof_qvel: np.ndarray
    bodies: tuple[str, ...]
    body_ids: tuple[int, ...]
    mass_ids: tuple[int, ...]
    mass_shares: tuple[float, ...]
    geoms: tuple[int, ...]
    geom_bodies: tuple[str, ...]
    filters: tuple[int, ...]
    floor: int | None
    ground: float | None
    self_collision: bool


def refusal(what: str) -> InputError:
    """The error that tells what of a model Isaac Gym cannot run."""
    return InputError(f"Isaac Gym cannot run this model: {what} (--physics isaacgym)")


def describe(model: mujoco.MjModel) -> Description:
    """What Isaac Gym needs to know of a model.

    Users report that Isaac Gym makes one spherical joint of several hinges on one body. So each joint of a body but the
    last gets a link of its own between the body and its parent. Each link takes `LINK_SHARE` of the body's mass and
    inertia, about the body's centre of mass: at joints of 0 the whole is exactly the body, elsewhere these shares do
    not follow the later joints. That much moves the humanoid, in MuJoCo, with and without links for 1 s under its
    servos: its joint angles differ by 0.0002 rad at most in the median of 20 motions (0.0013 in the worst) while it
    stands and its targets move by 0.1 rad, and by 0.008 rad (0.11) in the air while they sweep half of their ranges.
    The accelerations of articulated bodies, as PhysX computes them, are exact to 1e-6 in single precision for every
    share from 0.03 to 1e-7, since the light directions of a link are those that the next joint turns in.

    Raises:
      InputError: for anything that has no counterpart in Isaac Gym, by its name: more than one root, a free joint that
        is not the root's, ball joints, springs, friction loss, damping that is not linear, reference angles, equality
        constraints, tendons, contact pairs, plugins, compensated gravity, a fluid, flags that switch off physics,
        bodies without mass or inertia, geoms that touch and are no sphere, capsule or box, walls around a floating
        robot, a floor that is not level at height 0, contacts whose friction is not that of sliding, or is not the
        larger of two, patterns of which shapes touch that need more than 31 filters, actuators other than motors and
        position servos of one joint each, and servos whose limits of force differ by direction.
    """
    names = _body_names(model)
    roots = [b for b in range(1, model.nbody) if model.body_parentid[b] == 0]
    if len(roots) != 1:
        raise refusal(f"it must have one root body, got {', '.join(names[b] for b in roots) or 'none'}")
    for count, what in (
        (model.neq, "equality constraints"),
        (model.ntendon, "tendons"),
        (model.npair, "listed contact pairs"),
        (model.nmocap, "mocap bodies"),
        (model.nflex, "flexible bodies"),
        (model.nplugin, "plugins"),
    ):
        if count:
            raise refusal(f"it has {what} ({count})")
    _check_options(model)
    for b in range(1, model.nbody):
        if model.body_gravcomp[b]:
            raise refusal(f"body {names[b]!r} has a gravcomp of {model.body_gravcomp[b]}, not 0")
        if not (model.body_mass[b] > 0.0 and np.all(model.body_inertia[b] > 0.0)):
            raise refusal(f"body {names[b]!r} has no mass or no inertia")
    floating = False
    dofs = []
    for j in range(model.njnt):
        kind, name = int(model.jnt_type[j]), _joint_name(model, j)
        if kind == _FREE:
            if int(model.jnt_bodyid[j]) != roots[0]:
                raise refusal(f"free joint {name!r} is not the root's")
            floating = True
            continue
        if kind not in (_SLIDE, _HINGE):
            raise refusal(f"joint {name!r} is neither free, nor a hinge, nor a slide")
        dofs.append((name, int(model.jnt_qposadr[j]), int(model.jnt_dofadr[j])))
    for j in range(model.njnt):
        _check_joint(model, j)
    links = _link_names(model, names)
    bodies: list[tuple[str, int, int, float]] = []
    for b in range(1, model.nbody):
        own = [links[j] for j in _joints_of(model, b) if j in links]
        bodies += [(name, -1, b, LINK_SHARE) for name in own]
        bodies.append((names[b], b, b, 1.0 - LINK_SHARE * len(own)))
    shapes = _contacts(model, floating)
    if not floating:
        bodies.insert(0, (BASE, -1, -1, 1.0))
        if any(model.body_weldid[model.geom_bodyid[g]] == 0 for g in shapes.geoms):
            bodies.insert(1, (SURROUNDINGS, -1, -1, 1.0))
    if len({d[0] for d in dofs}) != len(dofs) or len({name for name, *_ in bodies}) != len(bodies):
        raise refusal("two bodies or two joints have the same name")
    drives(model, actuator_table(model), {})  # tells what is wrong with the actuators
    xml, order = _asset(model, roots[0], floating, names, links, shapes.geoms)
    filters = dict(zip(shapes.geoms, shapes.filters, strict=True))
    static = {g for g in order if model.body_weldid[model.geom_bodyid[g]] == 0}
    return Description(
        xml=xml,
        floating=floating,
        dofs=tuple(d[0] for d in dofs),
        dof_qpos=np.array([d[1] for d in dofs], np.int64),
        dof_qvel=np.array([d[2] for d in dofs], np.int64),
        bodies=tuple(body[0] for body in bodies),
        body_ids=tuple(body[1] for body in bodies),
        mass_ids=tuple(body[2] for body in bodies),
        mass_shares=tuple(body[3] for body in bodies),
        geoms=tuple(order),
        geom_bodies=tuple(SURROUNDINGS if g in static else names[int(model.geom_bodyid[g])] for g in order),
        filters=tuple(filters[g] for g in order),
        floor=shapes.floor,
        ground=None if shapes.floor is None else float(model.geom_friction[shapes.floor, 0]),
        self_collision=shapes.self_collision,
    )


def _disabled(model: mujoco.MjModel, *flags: str) -> bool:
    """Whether any of these flags of mjtDisableBit is set."""
    bits = sum(int(getattr(mujoco.mjtDisableBit, f"mjDSBL_{flag}")) for flag in flags)
    return bool(int(model.opt.disableflags) & bits)


def _check_options(model: mujoco.MjModel) -> None:
    for kind, prefix, word, value in (
        (mujoco.mjtDisableBit, "mjDSBL_", "disables", int(model.opt.disableflags)),
        (mujoco.mjtEnableBit, "mjENBL_", "enables", int(model.opt.enableflags)),
    ):
        for name, bit in kind.__members__.items():
            flag = name.removeprefix(prefix)
            if name.startswith(prefix) and value & int(bit) and flag not in (*_HARMLESS_FLAGS, *_FOLLOWED_FLAGS):
                raise refusal(f"its option {word} {flag.lower()}")
    for name in ("density", "viscosity", "disableactuator"):
        if value := getattr(model.opt, name):
            raise refusal(f"its option {name} is {value}, not 0")


def _check_joint(model: mujoco.MjModel, j: int) -> None:
    name, place, dof = _joint_name(model, j), int(model.jnt_qposadr[j]), int(model.jnt_dofadr[j])
    size = 6 if int(model.jnt_type[j]) == _FREE else 1
    own = slice(dof, dof + size)
    if np.any(model.jnt_stiffness[j]) or np.any(model.jnt_stiffnesspoly[j]) or np.any(model.dof_frictionloss[own]):
        raise refusal(f"joint {name!r} has a spring or friction loss")
    if np.any(model.dof_dampingpoly[own]):
        raise refusal(f"joint {name!r} has damping that is not linear")
    if size == 6:
        if np.any(model.dof_damping[own]) or np.any(model.dof_armature[own]):
            raise refusal(f"free joint {name!r} has damping or armature")
    elif model.qpos0[place]:
        raise refusal(f"joint {name!r} has a reference of {model.qpos0[place]}, not 0")


def _body_names(model: mujoco.MjModel) -> list[str]:
    return [model.body(b).name or f"body_{b}" for b in range(model.nbody)]


def _joint_name(model: mujoco.MjModel, j: int) -> str:
    return model.joint(j).name or f"joint_{j}"


def _joints_of(model: mujoco.MjModel, b: int) -> range:
    return range(int(model.body_jntadr[b]), int(model.body_jntadr[b]) + int(model.body_jntnum[b]))


def _link_names(model: mujoco.MjModel, names: list[str]) -> dict[int, str]:
    """The name of the link of each joint that is not the last of its body, by the joint."""
    taken, found = {*names, BASE, SURROUNDINGS}, {}
    for b in range(1, model.nbody):
        for j in _joints_of(model, b)[:-1]:
            name = f"{_joint_name(model, j)}_link"
            while name in taken:
                name += "_"
            taken.add(name)
            found[j] = name
    return found


# --- contacts -----------------------------------------------------------------------------------------------


def _touch(model: mujoco.MjModel, a: int, b: int) -> bool:
    types, affinities = model.geom_contype, model.geom_conaffinity
    return bool((types[a] & affinities[b]) or (types[b] & affinities[a]))


class _Shapes(NamedTuple):
    """The geoms that touch something, their filters, the floor, and whether they touch each other."""

    geoms: list[int]
    filters: list[int]
    floor: int | None
    self_collision: bool


def _contacts(model: mujoco.MjModel, floating: bool) -> _Shapes:
    """What touches what. Geoms of the world that are no floor are shapes of a fixed robot's surroundings."""
    if _disabled(model, "CONTACT", "CONSTRAINT"):
        return _Shapes([], [], None, False)
    label = lambda g: repr(model.geom(g).name or f"geom {g}")  # noqa: E731
    weld = model.body_weldid
    above = weld[model.body_parentid[weld]]
    excluded = {int(signature) for signature in model.exclude_signature}
    moves = [bool(weld[model.geom_bodyid[g]]) for g in range(model.ngeom)]

    def touch(a: int, b: int) -> bool:
        """Whether MuJoCo looks for contacts of two geoms of which one moves."""
        one, two = sorted((int(model.geom_bodyid[a]), int(model.geom_bodyid[b])))
        w_one, w_two = int(weld[one]), int(weld[two])
        if w_one == w_two or ((one << 16) + two) in excluded:
            return False
        if w_one and w_two and not _disabled(model, "FILTERPARENT") and (w_one == above[two] or w_two == above[one]):
            return False
        return _touch(model, a, b)

    def joined(a: int, b: int) -> bool:
        """Whether PhysX lets two shapes pass through each other in any case: of one body, or of two with a joint."""
        one, two = int(model.geom_bodyid[a]), int(model.geom_bodyid[b])
        if not (moves[a] and moves[b]):
            return not (moves[a] or moves[b])
        links = ((one, two), (two, one))
        return one == two or any(model.body_parentid[c] == p and model.body_jntnum[c] <= 1 for c, p in links)

    own = [g for g in range(model.ngeom) if moves[g]]
    around = [g for g in range(model.ngeom) if not moves[g] and any(touch(g, h) for h in own)]
    floors = [g for g in around if int(model.geom_type[g]) == _PLANE]
    for g in around:
        if g not in floors and floating:
            raise refusal(f"{label(g)} stands in the world and is no floor; only a plane may touch a floating robot")
    for g in floors:
        if model.geom_pos[g][2] or not np.allclose(model.geom_quat[g][1:3], 0.0) or int(model.geom_bodyid[g]):
            raise refusal(f"the floor {label(g)} must be level and at height 0")
    if len(floors) > 1:
        raise refusal(f"it has several floors: {', '.join(label(g) for g in floors)}")
    bodies = [*own, *(g for g in around if g not in floors)]
    together = {(a, b) for i, a in enumerate(bodies) for b in bodies[i + 1 :] if (moves[a] or moves[b]) and touch(a, b)}
    on_floor = {(f, g) for f in floors for g in own if touch(f, g)}
    shapes = [g for g in bodies if any(g in pair for pair in (*together, *on_floor))]
    for g in shapes:
        if int(model.geom_type[g]) not in _GEOMS:
            kind = mujoco.mjtGeom(int(model.geom_type[g])).name[7:].lower()
            raise refusal(f"geom {label(g)} is a {kind}; only spheres, capsules and boxes may touch something")
        if moves[g] and floors and (floors[0], g) not in on_floor:
            raise refusal(f"geom {label(g)} touches other geoms but not the floor")
    for g in (*floors, *shapes):
        if np.any(model.geom_adhesion[g]) or np.any(model.geom_surfacevel[g]):
            raise refusal(f"geom {label(g)} has adhesion or a velocity of its surface")
    for a, b in sorted({*together, *on_floor}):
        if model.geom_priority[a] != model.geom_priority[b]:
            raise refusal(f"geoms {label(a)} and {label(b)} touch, and their priorities differ")
        if (condim := max(model.geom_condim[a], model.geom_condim[b])) != 3:
            raise refusal(f"geoms {label(a)} and {label(b)} touch with a condim of {condim}, not 3")
        if joined(a, b):
            raise refusal(f"geoms {label(a)} and {label(b)} are of bodies that a joint links, and touch")
    needless = {(a, b) for a in shapes for b in shapes if joined(a, b)}
    filters = _filters(shapes, together, needless)
    if any(f >> _FILTER_BITS for f in filters):
        raise refusal(f"which of its geoms touch each other cannot be told with {_FILTER_BITS} filters")
    return _Shapes(shapes, filters, floors[0] if floors else None, bool(together))


def _filters(shapes: list[int], together: set[tuple[int, int]], needless: set[tuple[int, int]]) -> list[int]:
    """For each shape a number that shares a bit with those of all shapes which it must not touch, and of none it must.

    A bit is of a group of shapes of which no two are `together`. Groups are gathered greedily until every pair that is
    neither together nor `needless`, touching in no case, is in one.
    """
    filters, bit = dict.fromkeys(shapes, 0), 1

    def may_share(c: int, group: list[int]) -> bool:
        return all((c, g) not in together and (g, c) not in together for g in group)

    for i, a in enumerate(shapes):
        for b in shapes[i + 1 :]:
            if (a, b) not in needless and may_share(a, [b]) and not filters[a] & filters[b]:
                group = [a, b]
                for c in shapes:
                    if c not in group and may_share(c, group):
                        group.append(c)
                for c in group:
                    filters[c] |= bit
                bit <<= 1
    return [filters[g] for g in shapes]


def shape_friction(
    friction: np.ndarray, geoms: Sequence[int], ground: float | None, now: np.ndarray | float | None
) -> np.ndarray:
    """Friction of Isaac Gym's shapes with which a contact with the floor has MuJoCo's.

    MuJoCo takes the larger friction m of two geoms, Isaac Gym the mean: a shape on a floor of friction f gets
    2 m - f. Two shapes of one robot then have the mean of theirs.

    Args:
      friction: `[..., ngeom]` sliding friction.
      geoms: the geoms that are shapes.
      ground: friction that Isaac Gym's floor was made with; None without a floor.
      now: friction that the floor has to have, `[..., 1]`; None without a floor.

    Returns:
      `[..., len(geoms)]`, never negative.
    """
    own = friction[..., list(geoms)]
    if ground is None or now is None:
        return own
    return np.maximum(2.0 * np.maximum(own, now) - ground, 0.0)


# --- the asset ----------------------------------------------------------------------------------------------


def _numbers(values: Any) -> str:
    return " ".join(repr(float(x)) for x in np.ravel(values))


def _asset(
    model: mujoco.MjModel, root: int, floating: bool, names: list[str], links: dict[int, str], shapes: list[int]
) -> tuple[str, list[int]]:
    """The model in the part of MJCF that Isaac Gym reads, and its shapes in the order in which they are written."""
    document = ElementTree.Element("mujoco", model="robot")
    # MJCF's own unit of angles is the degree.
    ElementTree.SubElement(document, "compiler", angle="radian", autolimits="true")
    parent = ElementTree.SubElement(document, "worldbody")
    limits = not _disabled(model, "LIMIT", "CONSTRAINT")
    order: list[int] = []

    def body(parent: ElementTree.Element, name: str, pos: Any, quat: Any) -> ElementTree.Element:
        return ElementTree.SubElement(parent, "body", name=name, pos=_numbers(pos), quat=_numbers(quat))

    def fixed(parent: ElementTree.Element, name: str) -> ElementTree.Element:
        element = body(parent, name, np.zeros(3), _UPRIGHT)
        ElementTree.SubElement(element, "inertial", pos="0 0 0", mass="1", diaginertia="1 1 1")
        return element

    def inertial(element: ElementTree.Element, b: int, share: float) -> None:
        ElementTree.SubElement(
            element,
            "inertial",
            pos=_numbers(model.body_ipos[b]),
            quat=_numbers(model.body_iquat[b]),
            mass=_numbers(share * model.body_mass[b]),
            diaginertia=_numbers(share * model.body_inertia[b]),
        )

    def joint(element: ElementTree.Element, j: int) -> None:
        name = _joint_name(model, j)
        if int(model.jnt_type[j]) == _FREE:
            ElementTree.SubElement(element, "freejoint", name=name)
            return
        kind = "hinge" if int(model.jnt_type[j]) == _HINGE else "slide"
        axis, pos = _numbers(model.jnt_axis[j]), _numbers(model.jnt_pos[j])
        written = ElementTree.SubElement(element, "joint", name=name, type=kind, axis=axis, pos=pos)
        if model.jnt_limited[j] and limits:
            written.set("limited", "true")
            written.set("range", _numbers(model.jnt_range[j]))

    def geom(element: ElementTree.Element, g: int, pos: Any, quat: Any) -> None:
        kind, sizes = _GEOMS[int(model.geom_type[g])]
        size = _numbers(model.geom_size[g][:sizes])
        name = f"geom_{g}"
        ElementTree.SubElement(element, "geom", name=name, type=kind, size=size, pos=_numbers(pos), quat=_numbers(quat))
        order.append(g)

    def add(parent: ElementTree.Element, b: int) -> None:
        pos, quat = model.body_pos[b], model.body_quat[b]
        joints = _joints_of(model, b)
        for j in joints[:-1]:
            parent = body(parent, links[j], pos, quat)
            inertial(parent, b, LINK_SHARE)
            joint(parent, j)
            pos, quat = np.zeros(3), _UPRIGHT
        element = body(parent, names[b], pos, quat)
        inertial(element, b, 1.0 - LINK_SHARE * len(joints[:-1]))
        for j in joints[-1:]:
            joint(element, j)
        for g in shapes:
            if int(model.geom_bodyid[g]) == b and model.body_weldid[b]:
                geom(element, g, model.geom_pos[g], model.geom_quat[g])
        for child in range(1, model.nbody):
            if int(model.body_parentid[child]) == b:
                add(element, child)

    if not floating:
        parent = fixed(parent, BASE)
        around = [g for g in shapes if model.body_weldid[model.geom_bodyid[g]] == 0]
        if around:
            # Beside the robot's root and not its parent: bodies that are linked do not touch.
            element, data, quat = fixed(parent, SURROUNDINGS), mujoco.MjData(model), np.zeros(4)
            mujoco.mj_kinematics(model, data)
            for g in around:
                mujoco.mju_mat2Quat(quat, data.geom_xmat[g])
                geom(element, g, data.geom_xpos[g], quat)
    add(parent, root)
    ElementTree.indent(document)
    return ElementTree.tostring(document, encoding="unicode"), order


def body_masses(
    model: mujoco.MjModel, description: Description, mass: np.ndarray, inertia: np.ndarray, centre: np.ndarray
) -> dict[str, np.ndarray]:
    """Mass, centre of mass and inertia of the asset's bodies, but for those that are fixed.

    They are told to Isaac Gym beside the asset, since its reader of MJCF may take a body's principal axes for the axes
    of its frame.

    Args:
      model: the model.
      description: as `describe` tells it.
      mass: `[N, nbody]` kg.
      inertia: `[N, nbody, 3]` principal moments, kg m2, about the axes of the model's `body_iquat`.
      centre: `[N, nbody, 3]` centres of mass in the frames of the bodies, m.

    Returns:
      For each name `[N, 13]`, or `[1, 13]` where all robots are alike: the mass, the centre, and the rows of the
      inertia about the centre in the axes of the body's frame.
    """
    found = {}
    for name, b, share in zip(description.bodies, description.mass_ids, description.mass_shares, strict=True):
        if b < 0:
            continue
        flat = np.zeros(9)
        mujoco.mju_quat2Mat(flat, model.body_iquat[b])
        turn = flat.reshape(3, 3)
        tensor = np.einsum("ij,nj,kj->nik", turn, inertia[:, b], turn).reshape(len(mass), 9)
        rows = np.concatenate([share * mass[:, b, None], centre[:, b], share * tensor], axis=1)
        found[name] = one_row(rows)
    return found


def one_row(rows: np.ndarray) -> np.ndarray:
    """`[1, ...]` of the rows `[N, ...]` where they are all alike, else all of them."""
    return rows[:1] if np.all(rows == rows[:1]) else rows


# --- actuators ----------------------------------------------------------------------------------------------


class Actuators(NamedTuple):
    """The actuators of a model, in its order: each drives one joint.

    They are numpy's arrays as `actuator_table` makes them; tensors, on any device, serve as well.

    Attributes:
      dof: `[nu]` the joint's place in `Description.dofs`.
      qpos, qvel: `[nu]` its places in qpos and qvel.
      gear: `[nu]` transmission ratio.
      servo: `[nu]` whether it is a position servo; otherwise its force is the control times a gain.
      lower, upper: `[nu]` range of the control, infinite where there is none.
    """

    dof: Any
    qpos: Any
    qvel: Any
    gear: Any
    servo: Any
    lower: Any
    upper: Any


def actuator_table(model: mujoco.MjModel) -> Actuators:
    """The actuators of a model. Raises InputError for those that Isaac Gym has no counterpart of, by name."""
    hinges = [j for j in range(model.njnt) if int(model.jnt_type[j]) in (_SLIDE, _HINGE)]
    joints = []
    for a in range(model.nu):
        name = model.actuator(a).name or f"actuator {a}"
        joint = int(model.actuator_trnid[a, 0])
        if int(model.actuator_trntype[a]) != int(mujoco.mjtTrn.mjTRN_JOINT) or joint not in hinges:
            raise refusal(f"actuator {name!r} drives no hinge or slide")
        if joint in joints:
            raise refusal(f"joint {_joint_name(model, joint)!r} has two actuators")
        if int(model.actuator_dyntype[a]) != int(mujoco.mjtDyn.mjDYN_NONE):
            raise refusal(f"actuator {name!r} has an activation of its own")
        for field in ("actuator_delay", "actuator_armature", "actuator_damping", "actuator_dampingpoly"):
            if np.any(getattr(model, field)[a]):
                raise refusal(f"actuator {name!r} has {field.removeprefix('actuator_')}")
        motor = int(model.actuator_biastype[a]) == int(mujoco.mjtBias.mjBIAS_NONE)
        servo = (
            int(model.actuator_biastype[a]) == int(mujoco.mjtBias.mjBIAS_AFFINE)
            and model.actuator_biasprm[a, 0] == 0.0
            and model.actuator_biasprm[a, 1] == -model.actuator_gainprm[a, 0]
        )
        if int(model.actuator_gaintype[a]) != int(mujoco.mjtGain.mjGAIN_FIXED) or not (motor or servo):
            raise refusal(f"actuator {name!r} is neither a motor nor a position servo")
        joints.append(joint)
    limited = model.actuator_ctrllimited.astype(bool) & (not _disabled(model, "CLAMPCTRL"))
    return Actuators(
        dof=np.array([hinges.index(j) for j in joints], np.int64),
        qpos=model.jnt_qposadr[joints].astype(np.int64),
        qvel=model.jnt_dofadr[joints].astype(np.int64),
        gear=model.actuator_gear[:, 0].copy(),
        servo=model.actuator_biastype == int(mujoco.mjtBias.mjBIAS_AFFINE),
        lower=np.where(limited, model.actuator_ctrlrange[:, 0], -np.inf),
        upper=np.where(limited, model.actuator_ctrlrange[:, 1], np.inf),
    )


def force_limits(model: mujoco.MjModel, table: Actuators, forcerange: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least and greatest force of each actuator before the gear, N m or N: within its own range and its joint's.

    Args:
      model: the model.
      table: its actuators.
      forcerange: `[..., nu, 2]` ranges of the actuators; those of actuators without a limit are not looked at.

    Returns:
      Two arrays `[..., nu]`, infinite where there is no limit.
    """
    limited = model.actuator_forcelimited.astype(bool)
    low = np.where(limited, forcerange[..., 0], -np.inf)
    high = np.where(limited, forcerange[..., 1], np.inf)
    hinges = np.array([j for j in range(model.njnt) if int(model.jnt_type[j]) in (_SLIDE, _HINGE)], np.int64)
    for a, (joint, gear) in enumerate(zip(hinges[table.dof], table.gear, strict=True)):
        if model.jnt_actfrclimited[joint] and gear:
            least, most = sorted(model.jnt_actfrcrange[joint] / gear)
            low[..., a], high[..., a] = np.clip(low[..., a], least, most), np.clip(high[..., a], least, most)
    return low, high


def drives(model: mujoco.MjModel, table: Actuators, fields: dict[str, np.ndarray]) -> list[Drive]:
    """The drive of each joint, in the order of `Description.dofs`.

    A servo's torque g (kp (u - g q) - kv g v) is Isaac Gym's kp' (u' - q) - kd' v with kp' = g^2 kp, kd' = g^2 kv and
    the target u' = u / g. Damping of the joint is damping of its drive, in whichever mode.

    Args:
      model: the model.
      table: its actuators.
      fields: model fields that replace the model's own, `[...]` or `[N, ...]`.

    Raises:
      InputError: if a field would make of a servo something else, or limits of a servo's force differ by direction.
    """
    value = lambda name: np.asarray(fields.get(name, getattr(model, name)))  # noqa: E731
    gain, bias = value("actuator_gainprm"), value("actuator_biasprm")
    damping, armature = value("dof_damping"), value("dof_armature")
    if np.any(bias[..., table.servo, 1] != -gain[..., table.servo, 0]) or np.any(bias[..., table.servo, 0]):
        raise refusal("actuator_gainprm and actuator_biasprm no longer describe position servos")
    low, high = force_limits(model, table, value("actuator_forcerange"))
    found = []
    places = [int(model.jnt_dofadr[j]) for j in range(model.njnt) if int(model.jnt_type[j]) in (_SLIDE, _HINGE)]
    for dof, place in enumerate(places):
        [a] = np.flatnonzero(table.dof == dof) if dof in table.dof else [None]
        own = np.asarray(damping[..., place])
        if a is None:
            found.append(Drive("effort", 0.0, own, _UNLIMITED, armature[..., place]))
            continue
        gear = table.gear[a]
        if table.servo[a]:
            name = model.actuator(a).name or f"actuator {a}"
            if gear == 0.0:
                raise refusal(f"actuator {name!r} has a gear of 0")
            if np.any(low[..., a] != -high[..., a]):
                raise refusal(f"servo {name!r} has limits of force that differ by direction")
            kp, kv = gear**2 * gain[..., a, 0], -(gear**2) * bias[..., a, 2]
            if np.any(kp < 0.0) or np.any(kv + own < 0.0):
                raise refusal(f"servo {name!r} has a negative gain")
            most = np.minimum(np.abs(gear) * high[..., a], _UNLIMITED)
            found.append(Drive("position", kp, kv + own, most, armature[..., place]))
        else:
            # A motor's own limit is kept before its torque is sent; here it would bind the damping too.
            found.append(Drive("effort", 0.0, own, _UNLIMITED, armature[..., place]))
    return found


def commands(
    table: Actuators, ctrl: Tensor, gain: Tensor, low: Tensor, high: Tensor, dofs: int
) -> tuple[Tensor, Tensor]:
    """Isaac Gym's position targets and efforts for controls.

    Args:
      table: the actuators.
      ctrl: `[N, nu]` controls, clipped here to their range.
      gain: `[nu]` or `[N, nu]` gain of each actuator.
      low, high: `[nu]` or `[N, nu]` limits of each actuator's force, infinite where it has none.
      dofs: number of joints.

    Returns:
      `[N, dofs]` targets (rad or m) and `[N, dofs]` efforts (N m or N), in the order of `Description.dofs`; 0 for
      joints that have no actuator of that kind.
    """
    as_row = lambda x: torch.as_tensor(x, dtype=ctrl.dtype, device=ctrl.device)  # noqa: E731
    as_place = lambda x: torch.as_tensor(x, device=ctrl.device)  # noqa: E731
    bounded = torch.minimum(torch.maximum(ctrl, as_row(table.lower)), as_row(table.upper))
    gear, servo = as_row(table.gear), as_place(table.servo)
    effort = gear * torch.minimum(torch.maximum(gain * bounded, low), high)
    target = bounded / torch.where(servo, gear, 1.0)
    place = as_place(table.dof)
    blank = ctrl.new_zeros(len(ctrl), dofs)
    targets = blank.index_copy(1, place, torch.where(servo, target, 0.0))
    efforts = blank.index_copy(1, place, torch.where(servo, 0.0, effort))
    return targets, efforts


def actuator_force(
    table: Actuators,
    ctrl: Tensor,
    qpos: Tensor,
    qvel: Tensor,
    gain: Tensor,
    kv: Tensor,
    low: Tensor,
    high: Tensor,
) -> Tensor:
    """`[N, nu]` the force of each actuator before the gear, N m or N, at qpos `[N, nq]` and qvel `[N, nv]`."""
    as_row = lambda x: torch.as_tensor(x, dtype=ctrl.dtype, device=ctrl.device)  # noqa: E731
    as_place = lambda x: torch.as_tensor(x, device=ctrl.device)  # noqa: E731
    bounded = torch.minimum(torch.maximum(ctrl, as_row(table.lower)), as_row(table.upper))
    gear, servo = as_row(table.gear), as_place(table.servo)
    length, speed = gear * qpos[:, as_place(table.qpos)], gear * qvel[:, as_place(table.qvel)]
    force = gain * bounded - torch.where(servo, gain * length + kv * speed, 0.0)
    return torch.minimum(torch.maximum(force, low), high)


# --- states -------------------------------------------------------------------------------------------------


def _frame(quaternion: Tensor) -> Tensor:
    """A unit quaternion in double precision: rounded to single it is not quite one, and would scale vectors."""
    return quaternion / quaternion.norm(dim=-1, keepdim=True)


def root_from_qpos(qpos: Tensor, qvel: Tensor, com: Tensor | None) -> Tensor:
    """Isaac Gym's root state `[N, 13]` of a free joint: position, quaternion x y z w, velocities in the world frame.

    Args:
      qpos, qvel: `[N, >=7]`, `[N, >=6]` float64, the free joint first.
      com: `[3]` or `[N, 3]` the root's centre of mass in its frame where Isaac Gym's linear velocity is that of this
        point; None where it is that of the frame's origin.
    """
    quaternion = _frame(qpos[:, 3:7])
    angular = rotations.rotate(quaternion, qvel[:, 3:6])
    linear = qvel[:, 0:3]
    if com is not None:
        linear = linear + torch.linalg.cross(angular, rotations.rotate(quaternion, com.expand(len(qpos), 3)))
    return torch.cat([qpos[:, 0:3], qpos[:, 4:7], qpos[:, 3:4], linear, angular], dim=1)


def qpos_from_root(root: Tensor, com: Tensor | None) -> tuple[Tensor, Tensor]:
    """The free joint's qpos `[N, 7]` and qvel `[N, 6]` of root states `[N, 13]`: what `root_from_qpos` undoes."""
    root = root.double()
    quaternion = torch.cat([root[:, 6:7], root[:, 3:6]], dim=1)
    unit, linear, angular = _frame(quaternion), root[:, 7:10], root[:, 10:13]
    if com is not None:
        linear = linear - torch.linalg.cross(angular, rotations.rotate(unit, com.expand(len(root), 3)))
    return (
        torch.cat([root[:, 0:3], quaternion], dim=1),
        torch.cat([linear, rotations.rotate_inverse(unit, angular)], dim=1),
    )
