"""What Isaac Gym is told of a MuJoCo model, and what its tensors mean: pure functions, without a simulator.

Isaac Gym reads a small part of MJCF. `asset` writes a compiled model in that part: bodies with explicit inertia, hinges
and slides, and the primitive geoms that touch something; `describe` refuses by name whatever has no counterpart there.
What Isaac Gym keeps elsewhere (gains, limits of torque, armature, friction, the floor) is in `Description`.

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
# Torque of a joint without a limit, N or N m: Isaac Gym takes a limit for each.
_UNLIMITED = 1e9

_GEOMS = {
    int(mujoco.mjtGeom.mjGEOM_SPHERE): ("sphere", 1),
    int(mujoco.mjtGeom.mjGEOM_CAPSULE): ("capsule", 2),
    int(mujoco.mjtGeom.mjGEOM_BOX): ("box", 3),
}
_PLANE = int(mujoco.mjtGeom.mjGEOM_PLANE)
_FREE, _SLIDE, _HINGE = (int(getattr(mujoco.mjtJoint, f"mjJNT_{k}")) for k in ("FREE", "SLIDE", "HINGE"))


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
      body_ids: each one's row in per-body fields (-1 for the base of a fixed robot).
      geoms: the model's geoms that are shapes of the asset, in its order.
      ground: friction of the floor; None without a floor.
      self_collision: whether shapes of one robot touch each other.
    """

    xml: str
    floating: bool
    dofs: tuple[str, ...]
    dof_qpos: np.ndarray
    dof_qvel: np.ndarray
    bodies: tuple[str, ...]
    body_ids: tuple[int, ...]
    geoms: tuple[int, ...]
    ground: float | None
    self_collision: bool


def _refuse(what: str) -> InputError:
    return InputError(f"Isaac Gym cannot run this model: {what} (--physics isaacgym)")


def describe(model: mujoco.MjModel) -> Description:
    """What Isaac Gym needs to know of a model.

    Raises:
      InputError: for anything that has no counterpart in Isaac Gym, by its name: more than one root, a free joint that
        is not the root's, ball joints, springs, friction loss, reference angles, equality constraints, tendons, contact
        pairs, geoms that touch and are no sphere, capsule or box, walls, a floor that is not level at height 0, pairs
        of geoms of which only some touch, and actuators other than motors and position servos of one joint each.
    """
    names = _body_names(model)
    roots = [b for b in range(1, model.nbody) if model.body_parentid[b] == 0]
    if len(roots) != 1:
        raise _refuse(f"it must have one root body, got {', '.join(names[b] for b in roots) or 'none'}")
    for count, what in (
        (model.neq, "equality constraints"),
        (model.ntendon, "tendons"),
        (model.npair, "listed contact pairs"),
        (model.nmocap, "mocap bodies"),
        (model.nflex, "flexible bodies"),
    ):
        if count:
            raise _refuse(f"it has {what} ({count})")
    floating = False
    dofs = []
    for j in range(model.njnt):
        kind, name = int(model.jnt_type[j]), _joint_name(model, j)
        if kind == _FREE:
            if int(model.jnt_bodyid[j]) != roots[0]:
                raise _refuse(f"free joint {name!r} is not the root's")
            floating = True
            continue
        if kind not in (_SLIDE, _HINGE):
            raise _refuse(f"joint {name!r} is neither free, nor a hinge, nor a slide")
        place, dof = int(model.jnt_qposadr[j]), int(model.jnt_dofadr[j])
        if np.any(model.jnt_stiffness[j]) or model.dof_frictionloss[dof]:
            raise _refuse(f"joint {name!r} has a spring or friction loss")
        if model.qpos0[place]:
            raise _refuse(f"joint {name!r} has a reference of {model.qpos0[place]}, not 0")
        dofs.append((name, place, dof))
    bodies = [names[b] for b in range(1, model.nbody)]
    ids = list(range(1, model.nbody))
    if not floating:
        bodies, ids = [BASE, *bodies], [-1, *ids]
    if len(set(bodies)) != len(bodies) or len({d[0] for d in dofs}) != len(dofs):
        raise _refuse("two bodies or two joints have the same name")
    geoms, ground, self_collision = _contacts(model)
    drives(model, actuator_table(model), {})  # tells what is wrong with the actuators
    return Description(
        xml=_asset(model, roots[0], floating, names, geoms),
        floating=floating,
        dofs=tuple(d[0] for d in dofs),
        dof_qpos=np.array([d[1] for d in dofs], np.int64),
        dof_qvel=np.array([d[2] for d in dofs], np.int64),
        bodies=tuple(bodies),
        body_ids=tuple(ids),
        # Depth first, as the asset is written and read.
        geoms=tuple(geoms),
        ground=ground,
        self_collision=self_collision,
    )


def _body_names(model: mujoco.MjModel) -> list[str]:
    return [model.body(b).name or f"body_{b}" for b in range(model.nbody)]


def _joint_name(model: mujoco.MjModel, j: int) -> str:
    return model.joint(j).name or f"joint_{j}"


# --- contacts -----------------------------------------------------------------------------------------------


def _touch(model: mujoco.MjModel, a: int, b: int) -> bool:
    types, affinities = model.geom_contype, model.geom_conaffinity
    return bool((types[a] & affinities[b]) or (types[b] & affinities[a]))


def _contacts(model: mujoco.MjModel) -> tuple[list[int], float | None, bool]:
    """The geoms that touch something, the friction of the floor, and whether the robot touches itself."""
    if int(model.opt.disableflags) & int(mujoco.mjtDisableBit.mjDSBL_CONTACT):
        return [], None, False
    label = lambda g: repr(model.geom(g).name or f"geom {g}")  # noqa: E731
    own = [g for g in range(model.ngeom) if model.body_weldid[model.geom_bodyid[g]] != 0]
    still = [g for g in range(model.ngeom) if g not in own]
    parents = model.body_parentid[model.body_weldid]
    excluded = {int(signature) for signature in model.exclude_signature}

    def may_touch(a: int, b: int) -> bool:
        """Whether MuJoCo looks for contacts of two of the robot's own geoms, but for their types."""
        one, two = sorted((int(model.geom_bodyid[a]), int(model.geom_bodyid[b])))
        weld_one, weld_two = int(model.body_weldid[one]), int(model.body_weldid[two])
        if weld_one == weld_two or ((one << 16) + two) in excluded:
            return False
        return weld_two not in (int(parents[one]),) and weld_one != int(parents[two])

    floors = [g for g in still if any(_touch(model, g, h) for h in own)]
    for g in floors:
        if int(model.geom_type[g]) != _PLANE:
            raise _refuse(f"{label(g)} stands in the world and is no floor; only a plane may touch the robot")
        if model.geom_pos[g][2] or not np.allclose(model.geom_quat[g][1:3], 0.0):
            raise _refuse(f"the floor {label(g)} must be level and at height 0")
    if len(floors) > 1:
        raise _refuse(f"it has several floors: {', '.join(label(g) for g in floors)}")
    pairs = [(a, b) for i, a in enumerate(own) for b in own[i + 1 :] if may_touch(a, b)]
    touching = [pair for pair in pairs if _touch(model, *pair)]
    shapes = [g for g in own if any(_touch(model, g, f) for f in floors) or any(g in pair for pair in touching)]
    for g in shapes:
        if int(model.geom_type[g]) not in _GEOMS:
            kind = mujoco.mjtGeom(int(model.geom_type[g])).name[7:].lower()
            raise _refuse(f"geom {label(g)} is a {kind}; only spheres, capsules and boxes may touch something")
        if floors and not _touch(model, g, floors[0]):
            raise _refuse(f"geom {label(g)} touches other geoms but not the floor")
    between = [pair for pair in pairs if pair[0] in shapes and pair[1] in shapes]
    if touching and len(touching) != len(between):
        a, b = next(pair for pair in between if pair not in touching)
        raise _refuse(f"some of its geoms touch each other and some do not, as {label(a)} and {label(b)}")
    return shapes, float(model.geom_friction[floors[0], 0]) if floors else None, bool(touching)


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


def _asset(model: mujoco.MjModel, root: int, floating: bool, names: list[str], geoms: list[int]) -> str:
    """The model in the part of MJCF that Isaac Gym reads."""
    document = ElementTree.Element("mujoco", model="robot")
    # Without it MuJoCo would balance inertias, and Isaac Gym degrees are not radians.
    ElementTree.SubElement(document, "compiler", angle="radian", autolimits="true")
    parent = ElementTree.SubElement(document, "worldbody")
    if not floating:
        parent = ElementTree.SubElement(parent, "body", name=BASE, pos="0 0 0")
        ElementTree.SubElement(parent, "inertial", pos="0 0 0", mass="1", diaginertia="1 1 1")
    order: list[int] = []

    def add(parent: ElementTree.Element, b: int) -> None:
        pos, quat = _numbers(model.body_pos[b]), _numbers(model.body_quat[b])
        element = ElementTree.SubElement(parent, "body", name=names[b], pos=pos, quat=quat)
        ElementTree.SubElement(
            element,
            "inertial",
            pos=_numbers(model.body_ipos[b]),
            quat=_numbers(model.body_iquat[b]),
            mass=_numbers(model.body_mass[b]),
            diaginertia=_numbers(model.body_inertia[b]),
        )
        for j in range(int(model.body_jntadr[b]), int(model.body_jntadr[b]) + int(model.body_jntnum[b])):
            if int(model.jnt_type[j]) == _FREE:
                ElementTree.SubElement(element, "freejoint", name=_joint_name(model, j))
                continue
            kind = "hinge" if int(model.jnt_type[j]) == _HINGE else "slide"
            joint = ElementTree.SubElement(
                element,
                "joint",
                name=_joint_name(model, j),
                type=kind,
                axis=_numbers(model.jnt_axis[j]),
                pos=_numbers(model.jnt_pos[j]),
            )
            if model.jnt_limited[j]:
                joint.set("limited", "true")
                joint.set("range", _numbers(model.jnt_range[j]))
        for g in range(int(model.body_geomadr[b]), int(model.body_geomadr[b]) + int(model.body_geomnum[b])):
            if g in geoms:
                kind, sizes = _GEOMS[int(model.geom_type[g])]
                ElementTree.SubElement(
                    element,
                    "geom",
                    name=f"geom_{g}",
                    type=kind,
                    size=_numbers(model.geom_size[g][:sizes]),
                    pos=_numbers(model.geom_pos[g]),
                    quat=_numbers(model.geom_quat[g]),
                )
                order.append(g)
        for child in range(1, model.nbody):
            if int(model.body_parentid[child]) == b:
                add(element, child)

    add(parent, root)
    geoms[:] = order
    ElementTree.indent(document)
    return ElementTree.tostring(document, encoding="unicode")


# --- actuators ----------------------------------------------------------------------------------------------


class Actuators(NamedTuple):
    """The actuators of a model, in its order: each drives one joint.

    Attributes:
      dof: `[nu]` the joint's place in `Description.dofs`.
      qpos, qvel: `[nu]` its places in qpos and qvel.
      gear: `[nu]` transmission ratio.
      servo: `[nu]` whether it is a position servo; otherwise its force is the control times a gain.
      lower, upper: `[nu]` range of the control, infinite where there is none.
    """

    dof: np.ndarray
    qpos: np.ndarray
    qvel: np.ndarray
    gear: np.ndarray
    servo: np.ndarray
    lower: np.ndarray
    upper: np.ndarray


def actuator_table(model: mujoco.MjModel) -> Actuators:
    """The actuators of a model. Raises InputError for those that Isaac Gym has no counterpart of, by name."""
    hinges = [j for j in range(model.njnt) if int(model.jnt_type[j]) in (_SLIDE, _HINGE)]
    joints = []
    for a in range(model.nu):
        name = model.actuator(a).name or f"actuator {a}"
        joint = int(model.actuator_trnid[a, 0])
        if int(model.actuator_trntype[a]) != int(mujoco.mjtTrn.mjTRN_JOINT) or joint not in hinges:
            raise _refuse(f"actuator {name!r} drives no hinge or slide")
        if joint in joints:
            raise _refuse(f"joint {_joint_name(model, joint)!r} has two actuators")
        if int(model.actuator_dyntype[a]) != int(mujoco.mjtDyn.mjDYN_NONE):
            raise _refuse(f"actuator {name!r} has an activation of its own")
        motor = int(model.actuator_biastype[a]) == int(mujoco.mjtBias.mjBIAS_NONE)
        servo = (
            int(model.actuator_biastype[a]) == int(mujoco.mjtBias.mjBIAS_AFFINE)
            and model.actuator_biasprm[a, 0] == 0.0
            and model.actuator_biasprm[a, 1] == -model.actuator_gainprm[a, 0]
        )
        if int(model.actuator_gaintype[a]) != int(mujoco.mjtGain.mjGAIN_FIXED) or not (motor or servo):
            raise _refuse(f"actuator {name!r} is neither a motor nor a position servo")
        if model.jnt_actfrclimited[joint]:
            raise _refuse(
                f"joint {_joint_name(model, joint)!r} limits the force of its actuator; let the actuator do so"
            )
        joints.append(joint)
    limited = model.actuator_ctrllimited.astype(bool)
    return Actuators(
        dof=np.array([hinges.index(j) for j in joints], np.int64),
        qpos=model.jnt_qposadr[joints].astype(np.int64),
        qvel=model.jnt_dofadr[joints].astype(np.int64),
        gear=model.actuator_gear[:, 0].copy(),
        servo=model.actuator_biastype == int(mujoco.mjtBias.mjBIAS_AFFINE),
        lower=np.where(limited, model.actuator_ctrlrange[:, 0], -np.inf),
        upper=np.where(limited, model.actuator_ctrlrange[:, 1], np.inf),
    )


def drives(model: mujoco.MjModel, table: Actuators, fields: dict[str, np.ndarray]) -> list[Drive]:
    """The drive of each joint, in the order of `Description.dofs`.

    A servo's torque g (kp (u - g q) - kv g v) is Isaac Gym's kp' (u' - q) - kd' v with kp' = g^2 kp, kd' = g^2 kv and
    the target u' = u / g. Damping of the joint is damping of its drive, in whichever mode.

    Args:
      model: the model.
      table: its actuators.
      fields: model fields that replace the model's own, `[...]` or `[N, ...]`.

    Raises:
      InputError: if a field would make of a servo something else.
    """
    value = lambda name: np.asarray(fields.get(name, getattr(model, name)))  # noqa: E731
    gain, bias = value("actuator_gainprm"), value("actuator_biasprm")
    damping, armature = value("dof_damping"), value("dof_armature")
    if np.any(bias[..., table.servo, 1] != -gain[..., table.servo, 0]) or np.any(bias[..., table.servo, 0]):
        raise _refuse("actuator_gainprm and actuator_biasprm no longer describe position servos")
    limit = value("actuator_forcerange")[..., 1]
    limited = model.actuator_forcelimited.astype(bool)
    found = []
    places = [int(model.jnt_dofadr[j]) for j in range(model.njnt) if int(model.jnt_type[j]) in (_SLIDE, _HINGE)]
    for dof, place in enumerate(places):
        [a] = np.flatnonzero(table.dof == dof) if dof in table.dof else [None]
        own = np.asarray(damping[..., place])
        if a is None:
            found.append(Drive("effort", 0.0, own, _UNLIMITED, armature[..., place]))
            continue
        gear = table.gear[a]
        most = np.abs(gear) * limit[..., a] if limited[a] else np.asarray(_UNLIMITED)
        if table.servo[a]:
            if gear == 0.0:
                raise _refuse(f"actuator {model.actuator(a).name!r} has a gear of 0")
            kp, kv = gear**2 * gain[..., a, 0], -(gear**2) * bias[..., a, 2]
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
    as_row = lambda x: torch.as_tensor(x, dtype=ctrl.dtype)  # noqa: E731
    bounded = torch.minimum(torch.maximum(ctrl, as_row(table.lower)), as_row(table.upper))
    gear, servo = as_row(table.gear), torch.as_tensor(table.servo)
    effort = gear * torch.minimum(torch.maximum(gain * bounded, low), high)
    target = bounded / torch.where(servo, gear, 1.0)
    place = torch.as_tensor(table.dof)
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
    as_row = lambda x: torch.as_tensor(x, dtype=ctrl.dtype)  # noqa: E731
    bounded = torch.minimum(torch.maximum(ctrl, as_row(table.lower)), as_row(table.upper))
    gear, servo = as_row(table.gear), torch.as_tensor(table.servo)
    length, speed = gear * qpos[:, torch.as_tensor(table.qpos)], gear * qvel[:, torch.as_tensor(table.qvel)]
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
