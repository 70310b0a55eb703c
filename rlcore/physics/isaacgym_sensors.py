"""A model's sensors from Isaac Gym's tensors: pure functions, without a simulator."""

from collections.abc import Sequence
from typing import NamedTuple

import mujoco
import torch
from torch import Tensor

from rlcore import rotations
from rlcore.errors import InputError

_FREE = int(mujoco.mjtJoint.mjJNT_FREE)
_SITE, _BODY, _XBODY = (int(getattr(mujoco.mjtObj, f"mjOBJ_{k}")) for k in ("SITE", "BODY", "XBODY"))
# Sensors that are computed from the state of the body that they are on.
_OF_BODIES = ("FRAMEPOS", "FRAMEQUAT", "FRAMELINVEL", "FRAMEANGVEL", "GYRO", "VELOCIMETER", "TOUCH")
_SENSORS = (*_OF_BODIES, "ACCELEROMETER", "JOINTPOS", "JOINTVEL", "ACTUATORFRC", "JOINTACTFRC", "SUBTREEANGMOM")
_KIND = {int(getattr(mujoco.mjtSensor, f"mjSENS_{name}")): name for name in _SENSORS}


def _refuse(what: str) -> InputError:
    return InputError(f"Isaac Gym cannot run this model: {what} (--physics isaacgym)")


def _frame(quaternion: Tensor) -> Tensor:
    """A unit quaternion."""
    return quaternion / quaternion.norm(dim=-1, keepdim=True)


class Sensor(NamedTuple):
    """One sensor, with all that is needed to compute it.

    Attributes:
      name, kind: its name and the end of MuJoCo's name of its type.
      place: its slice of sensordata.
      body: its body's id in the model.
      pos, quat: the site or inertial frame in the body's frame.
      number: the joint's place in qpos or qvel, or the actuator.
    """

    name: str
    kind: str
    place: slice
    body: int
    pos: tuple[float, ...]
    quat: tuple[float, ...]
    number: int


def sensors_of(model: mujoco.MjModel) -> tuple[Sensor, ...]:
    """The sensors of a model.

    Raises:
      InputError: for a sensor that cannot be computed from what Isaac Gym tells, by name: another type, one in a frame
        of reference other than the world's, one with a cutoff, an accelerometer that is not on a free root.
    """
    found = []
    for s in range(model.nsensor):
        name, kind = model.sensor(s).name or f"sensor {s}", _KIND.get(int(model.sensor_type[s]))
        type_name = mujoco.mjtSensor(int(model.sensor_type[s])).name[7:].lower()
        if kind is None:
            raise _refuse(f"sensor {name!r} is of type {type_name}, which Isaac Gym's tensors do not tell")
        if int(model.sensor_refid[s]) >= 0 or model.sensor_cutoff[s] or model.sensor_noise[s]:
            raise _refuse(f"sensor {name!r} has a frame of reference, a cutoff or noise")
        kind_of, obj = int(model.sensor_objtype[s]), int(model.sensor_objid[s])
        body, index = 0, 0
        pos: tuple[float, ...] = (0.0, 0.0, 0.0)
        quat: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0)
        if kind_of == _SITE:
            body = int(model.site_bodyid[obj])
            pos, quat = tuple(map(float, model.site_pos[obj])), tuple(map(float, model.site_quat[obj]))
        elif kind_of == _XBODY or (kind_of == _BODY and kind == "SUBTREEANGMOM"):
            body = obj
        elif kind_of == _BODY:
            body = obj
            pos, quat = tuple(map(float, model.body_ipos[obj])), tuple(map(float, model.body_iquat[obj]))
        elif kind in ("JOINTPOS", "JOINTVEL", "JOINTACTFRC"):
            index = int((model.jnt_qposadr if kind == "JOINTPOS" else model.jnt_dofadr)[obj])
        elif kind == "ACTUATORFRC":
            index = obj
        else:
            raise _refuse(f"sensor {name!r} is attached to neither a site nor a body")
        if kind == "ACCELEROMETER" and not (model.njnt and int(model.jnt_type[0]) == _FREE and body == 1):
            raise _refuse(f"accelerometer {name!r} is not on a root that moves freely")
        if body == 0 and kind in _OF_BODIES:
            raise _refuse(f"sensor {name!r} is fixed to the world")
        start = int(model.sensor_adr[s])
        place = slice(start, start + int(model.sensor_dim[s]))
        found.append(Sensor(name, kind, place, body, pos, quat, index))
    return tuple(found)


class Bodies(NamedTuple):
    """The rigid bodies that sensors read, as Isaac Gym tells of them, in its precision.

    Attributes:
      ids: the model's ids of these bodies.
      position: `[N, bodies, 3]` origin of the body's frame, world frame, m.
      quaternion: `[N, bodies, 4]` w x y z, of unit length.
      linear: `[N, bodies, 3]` velocity of that origin, world frame, m/s.
      angular: `[N, bodies, 3]` world frame, rad/s.
      contact: `[N, bodies, 3]` sum of the forces of contacts, world frame, N.
    """

    ids: tuple[int, ...]
    position: Tensor
    quaternion: Tensor
    linear: Tensor
    angular: Tensor
    contact: Tensor


def bodies_from_tensors(ids: tuple[int, ...], body: Tensor, contact: Tensor, com: Tensor | None) -> Bodies:
    """What Isaac Gym's rigid body states `[N, bodies, 13]` and net contact forces `[N, bodies, 3]` say.

    Args:
      ids: the model's ids of the bodies.
      body, contact: Isaac Gym's tensors.
      com: `[bodies, 3]` or `[N, bodies, 3]` centres of mass where its linear velocities are those of these points; None
        where they are those of the frames' origins.
    """
    quaternion = _frame(torch.cat([body[..., 6:7], body[..., 3:6]], dim=-1))
    linear, angular = body[..., 7:10], body[..., 10:13]
    if com is not None:
        arm = rotations.rotate(quaternion, com.to(body.dtype).expand_as(linear))
        linear = linear - torch.linalg.cross(angular, arm)
    return Bodies(ids, body[..., 0:3], quaternion, linear, angular, contact)


class Motion(NamedTuple):
    """What sensors are computed from, beside the bodies: of N robots, at the end of a step.

    Attributes:
      qpos, qvel: `[N, nq]`, `[N, nv]`.
      before: `[N, 6]` or more, qvel before the step, and `qpos_before` `[N, 7]` or more.
      qpos_before: as told above.
      elapsed: length of the step, s.
      gravity: `[3]` m/s2.
      force: `[N, nu]` forces of the actuators.
      joint_force: `[N, nv]` the same through the gears, on the joints.
      mass: `[nbody]` or `[N, nbody]` kg.
      inertia: `[nbody, 3]` or `[N, nbody, 3]` principal moments, kg m2.
    """

    qpos: Tensor
    qvel: Tensor
    qpos_before: Tensor
    before: Tensor
    elapsed: float
    gravity: Tensor
    force: Tensor
    joint_force: Tensor
    mass: Tensor
    inertia: Tensor


def sensor_values(model: mujoco.MjModel, sensors: Sequence[Sensor], bodies: Bodies, motion: Motion) -> Tensor:
    """The model's sensors from Isaac Gym's tensors: `[N, nsensor]`, in MuJoCo's order and units.

    They are those of the end of the step. A touch sensor is the vertical force of all contacts of its body, upwards,
    where MuJoCo counts the normal forces within the site: the same on a level floor if the site encloses the body's
    contacts. An accelerometer is the mean over the step.

    Args:
      model: the model.
      sensors: as from `sensors_of`.
      bodies: those that `watched` names.
      motion: the rest of the state.
    """
    rows = {b: i for i, b in enumerate(bodies.ids)}
    columns = []
    for sensor in sensors:
        kind = sensor.kind
        if kind == "ACTUATORFRC":
            columns.append(motion.force[:, sensor.number, None])
        elif kind == "JOINTACTFRC":
            columns.append(motion.joint_force[:, sensor.number, None])
        elif kind in ("JOINTPOS", "JOINTVEL"):
            columns.append((motion.qpos if kind == "JOINTPOS" else motion.qvel)[:, sensor.number, None])
        elif kind == "SUBTREEANGMOM":
            columns.append(_angular_momentum(model, sensor.body, bodies, motion))
        elif kind == "ACCELEROMETER":
            columns.append(_acceleration(sensor, motion))
        else:
            columns.append(_frame_sensor(sensor, bodies, rows[sensor.body]))
    return (
        torch.cat([column.double() for column in columns], dim=1)
        if columns
        else motion.qpos.new_zeros(len(motion.qpos), 0)
    )


def watched(model: mujoco.MjModel, sensors: Sequence[Sensor]) -> tuple[int, ...]:
    """The bodies whose states the sensors are computed from."""
    needed = {s.body for s in sensors if s.kind in _OF_BODIES}
    for sensor in sensors:
        if sensor.kind == "SUBTREEANGMOM":
            needed |= set(_subtree(model, sensor.body))
    return tuple(sorted(needed))


def _subtree(model: mujoco.MjModel, root: int) -> list[int]:
    inside = {root}
    for b in range(root + 1, model.nbody):
        if int(model.body_parentid[b]) in inside:
            inside.add(b)
    return sorted(inside)


def _frame_sensor(sensor: Sensor, bodies: Bodies, row: int) -> Tensor:
    quaternion, angular = bodies.quaternion[:, row], bodies.angular[:, row]
    if sensor.kind == "TOUCH":
        return bodies.contact[:, row, 2:3].clamp(min=0.0)
    pos, quat = quaternion.new_tensor(sensor.pos), quaternion.new_tensor(sensor.quat)
    frame = rotations.multiply(quaternion, quat.expand_as(quaternion))
    if sensor.kind == "FRAMEQUAT":
        return frame
    if sensor.kind == "FRAMEANGVEL":
        return angular
    if sensor.kind == "GYRO":
        return rotations.rotate_inverse(frame, angular)
    arm = rotations.rotate(quaternion, pos.expand_as(angular))
    if sensor.kind == "FRAMEPOS":
        return bodies.position[:, row] + arm
    velocity = bodies.linear[:, row] + torch.linalg.cross(angular, arm)
    return velocity if sensor.kind == "FRAMELINVEL" else rotations.rotate_inverse(frame, velocity)


def _acceleration(sensor: Sensor, motion: Motion) -> Tensor:
    def velocity(qpos: Tensor, qvel: Tensor) -> tuple[Tensor, Tensor]:
        quaternion = _frame(qpos[:, 3:7])
        arm = qpos.new_tensor(sensor.pos).expand(len(qpos), 3)
        turning = rotations.rotate(quaternion, torch.linalg.cross(qvel[:, 3:6], arm))
        return quaternion, qvel[:, 0:3] + turning

    _, start = velocity(motion.qpos_before, motion.before)
    quaternion, end = velocity(motion.qpos, motion.qvel)
    frame = rotations.multiply(quaternion, quaternion.new_tensor(sensor.quat).expand_as(quaternion))
    return rotations.rotate_inverse(frame, (end - start) / motion.elapsed - motion.gravity)


def _angular_momentum(model: mujoco.MjModel, root: int, bodies: Bodies, motion: Motion) -> Tensor:
    """Of a body and all that hangs on it, about their common centre of mass, world frame, kg m2/s."""
    ids = [b for b in _subtree(model, root) if b]
    rows = [bodies.ids.index(b) for b in ids]
    quaternion, angular = bodies.quaternion[:, rows], bodies.angular[:, rows]
    as_rows = lambda x: torch.as_tensor(x, dtype=quaternion.dtype)  # noqa: E731
    arm = rotations.rotate(quaternion, as_rows(model.body_ipos[ids]).expand_as(angular))
    place = bodies.position[:, rows] + arm
    velocity = bodies.linear[:, rows] + torch.linalg.cross(angular, arm)
    mass = as_rows(motion.mass[..., ids]).unsqueeze(-1).expand(len(quaternion), len(ids), 1)
    principal = rotations.multiply(quaternion, as_rows(model.body_iquat[ids]).expand_as(quaternion))
    spin = rotations.rotate(
        principal, as_rows(motion.inertia[..., ids, :]) * rotations.rotate_inverse(principal, angular)
    )
    total = mass.sum(1, keepdim=True)
    centre, drift = (mass * place).sum(1, keepdim=True) / total, (mass * velocity).sum(1, keepdim=True) / total
    return (spin + mass * torch.linalg.cross(place - centre, velocity - drift)).sum(1)
