"""A model's sensors from Isaac Gym's tensors: pure functions, without a simulator.

Isaac Gym tells where bodies are, how they move, and the sum of the contact forces on each. Its own force sensors tell
the net force on a body, which is 0 at rest, and its joint forces those along the axes of joints; neither is what a
body exerts on the next one. So forces and torques between bodies follow from Newton and Euler: what the bodies beyond
a joint gain in momentum during the last substep, less what gravity, contacts and external forces give them.

Arrays of robots are `[bodies, components, N]` here, so that each operation runs along memory, in the precision of Isaac
Gym's tensors. Positions are taken relative to a body of the robot before they are multiplied: far from the origin
single precision is coarse.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import mujoco
import numpy as np
import torch
from torch import Tensor

from rlcore import rotations
from rlcore.physics.isaacgym_model import actuator_table, refusal

_SITE, _BODY, _XBODY = (int(getattr(mujoco.mjtObj, f"mjOBJ_{k}")) for k in ("SITE", "BODY", "XBODY"))
# Sensors by what they are computed from: the body that they are on, its acceleration, and the forces on its subtree.
_OF_BODIES = ("FRAMEPOS", "FRAMEQUAT", "FRAMELINVEL", "FRAMEANGVEL", "GYRO", "VELOCIMETER", "TOUCH")
_OF_ACCELERATIONS = ("ACCELEROMETER",)
_OF_FORCES = ("FORCE", "TORQUE")
_OF_JOINTS = ("JOINTPOS", "JOINTVEL", "ACTUATORFRC", "JOINTACTFRC")
_SENSORS = (*_OF_BODIES, *_OF_ACCELERATIONS, *_OF_FORCES, *_OF_JOINTS, "SUBTREEANGMOM")
_KIND = {int(getattr(mujoco.mjtSensor, f"mjSENS_{name}")): name for name in _SENSORS}
_SPHERE, _CAPSULE, _BOX = (int(getattr(mujoco.mjtGeom, f"mjGEOM_{k}")) for k in ("SPHERE", "CAPSULE", "BOX"))
# Points of a body's shapes carry its contact force if they are at most so much higher than its lowest one, m.
_SOLE = 0.01
# Robots whose states are transposed at a time.
_PIECE = 512


class Sensor(NamedTuple):
    """One sensor, with all that is needed to compute it.

    Attributes:
      name, kind: its name and the end of MuJoCo's name of its type.
      place: its slice of sensordata.
      body: its body's id in the model.
      pos, quat: the site or inertial frame in the body's frame.
      inertial: whether `pos` is the body's centre of mass.
      number: the joint's place in qpos or qvel, or the actuator.
    """

    name: str
    kind: str
    place: slice
    body: int
    pos: tuple[float, ...]
    quat: tuple[float, ...]
    inertial: bool
    number: int


def sensors_of(model: mujoco.MjModel) -> tuple[Sensor, ...]:
    """The sensors of a model.

    Raises:
      InputError: for a sensor that cannot be computed from what Isaac Gym tells, by name: another type, one in a frame
        of reference other than the world's, one with a cutoff, one that is fixed to the world.
    """
    found = []
    for s in range(model.nsensor):
        name, kind = model.sensor(s).name or f"sensor {s}", _KIND.get(int(model.sensor_type[s]))
        type_name = mujoco.mjtSensor(int(model.sensor_type[s])).name[7:].lower()
        if kind is None:
            raise refusal(f"sensor {name!r} is of type {type_name}, which Isaac Gym's tensors do not tell")
        if int(model.sensor_refid[s]) >= 0 or model.sensor_cutoff[s] or model.sensor_noise[s]:
            raise refusal(f"sensor {name!r} has a frame of reference, a cutoff or noise")
        kind_of, obj = int(model.sensor_objtype[s]), int(model.sensor_objid[s])
        body, index, inertial = 0, 0, False
        pos: tuple[float, ...] = (0.0, 0.0, 0.0)
        quat: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0)
        if kind_of == _SITE:
            body = int(model.site_bodyid[obj])
            pos, quat = tuple(map(float, model.site_pos[obj])), tuple(map(float, model.site_quat[obj]))
        elif kind_of == _XBODY or (kind_of == _BODY and kind == "SUBTREEANGMOM"):
            body = obj
        elif kind_of == _BODY:
            body, inertial = obj, True
            pos, quat = tuple(map(float, model.body_ipos[obj])), tuple(map(float, model.body_iquat[obj]))
        elif kind in ("JOINTPOS", "JOINTVEL", "JOINTACTFRC"):
            index = int((model.jnt_qposadr if kind == "JOINTPOS" else model.jnt_dofadr)[obj])
        elif kind == "ACTUATORFRC":
            index = obj
        else:
            raise refusal(f"sensor {name!r} is attached to neither a site nor a body")
        if body == 0 and kind in (*_OF_BODIES, *_OF_ACCELERATIONS, *_OF_FORCES):
            raise refusal(f"sensor {name!r} is fixed to the world")
        start = int(model.sensor_adr[s])
        place = slice(start, start + int(model.sensor_dim[s]))
        found.append(Sensor(name, kind, place, body, pos, quat, inertial, index))
    return tuple(found)


def watched(model: mujoco.MjModel, sensors: Sequence[Sensor]) -> tuple[int, ...]:
    """The bodies whose states the sensors are computed from."""
    needed = {s.body for s in sensors if s.kind in _OF_BODIES} | set(accelerated(model, sensors))
    for sensor in sensors:
        if sensor.kind == "SUBTREEANGMOM":
            needed |= set(_subtree(model, sensor.body))
    return tuple(sorted(needed))


def accelerated(model: mujoco.MjModel, sensors: Sequence[Sensor]) -> tuple[int, ...]:
    """The bodies, among those that are watched, whose states before the last substep are needed as well."""
    needed = {s.body for s in sensors if s.kind in _OF_ACCELERATIONS}
    for sensor in sensors:
        if sensor.kind in _OF_FORCES:
            needed |= set(_subtree(model, sensor.body))
    return tuple(sorted(needed))


def _subtree(model: mujoco.MjModel, root: int) -> list[int]:
    """A body and all that hangs on it, without the world."""
    inside = {root}
    for b in range(root + 1, model.nbody):
        if int(model.body_parentid[b]) in inside:
            inside.add(b)
    return sorted(inside - {0})


class Motion(NamedTuple):
    """What sensors are computed from, of N robots at the end of a step.

    Attributes:
      body: `[N, watched, 13]` Isaac Gym's rigid body states.
      contact: `[N, watched, 3]` its net contact forces of the last substep, world frame, N.
      before: `[N, accelerated, 13]` rigid body states before the last substep.
      qpos, qvel: `[N, nq]`, `[N, nv]`.
      force: `[N, nu]` forces of the actuators, before their gears.
      wrench: `[N, nbody, 6]` external force and torque on each body at its centre of mass, world frame; None for none.
    """

    body: Tensor
    contact: Tensor
    before: Tensor
    qpos: Tensor
    qvel: Tensor
    force: Tensor
    wrench: Tensor | None = None


class Inertial(NamedTuple):
    """Masses of all bodies of a model, `[...]` or, where robots differ, `[N, ...]`.

    Attributes:
      mass: `[..., nbody]` kg.
      inertia: `[..., nbody, 3]` principal moments, kg m2.
      centre: `[..., nbody, 3]` centres of mass in the bodies' frames, m.
    """

    mass: Tensor
    inertia: Tensor
    centre: Tensor


class _Points(NamedTuple):
    """Frames fixed to bodies, of S sensors of one type.

    Attributes:
      rows: of the bodies.
      arm: `[S, 3, 1 or N]` where the frames are, in the bodies' own.
      lever: the same from the point of the body that velocities are of.
      turn: `[S, 3, 3, 1]` their axes in the bodies' own, and `quat` `[S, 4]`.
      quat: as told above.
      columns: where the values belong in sensordata.
    """

    rows: slice | Tensor
    arm: Tensor
    lever: Tensor
    turn: Tensor
    quat: Tensor
    columns: slice | Tensor


class _Masses(NamedTuple):
    """Masses of B bodies, whose last axis is 1 where robots are alike.

    Attributes:
      mass: `[B, 1, N]`.
      inertia: `[B, 3, 3, N]` about the centre of mass, in the axes of the body.
      centre: `[B, 3, N]`.
    """

    mass: Tensor
    inertia: Tensor
    centre: Tensor


class _Soles(NamedTuple):
    """Where S bodies may touch the floor: K balls each, which are spheres and the ends and corners of other shapes.

    Attributes:
      rows: `[S]` of the bodies.
      pos: `[S, K, 3, 1]` their centres in the body's frame.
      radius: `[S, K, 1]`, infinitely negative for what fills up a body with fewer.
    """

    rows: Tensor
    pos: Tensor
    radius: Tensor


class _States(NamedTuple):
    """States of B bodies in the world frame: `[B, ..., N]`.

    Attributes:
      position: `[B, 3, N]`.
      quaternion: `[B, 4, N]` x y z w.
      linear, angular: `[B, 3, N]`.
      matrix: `[B, 3, 3, N]` the body's axes.
    """

    position: Tensor
    quaternion: Tensor
    linear: Tensor
    angular: Tensor
    matrix: Tensor


class SensorArray:
    """All sensors of a model of N robots, with what they need put into tensors.

    They are those of the end of the step, but accelerations and forces are of its last substep, as all are in MuJoCo. A
    touch sensor is the vertical force of all contacts of its body, upwards, where MuJoCo counts the normal forces
    within the site: the same on a level floor if the site encloses the body's contacts.

    A force is what the parent exerts on the site's body. A torque, too, and it is exact as long as nothing touches the
    bodies beyond: where contacts act is not told. They are taken to act on a floor at height 0, under the lowest points
    of the body's shapes. Of a body with one ball for a foot this is so; of others the torque may be wrong by the
    contact force times half the extent of what it stands on.

    Args:
      model: the model.
      sensors: as from `sensors_of`.
      inertial: masses of its bodies.
      of_com: whether Isaac Gym's linear velocities are of centres of mass, not of the origins of the bodies' frames.
      gravity: `[3]` m/s2.
      substep: length of a substep, s.
      dtype, device: of the tensors that it is called with.
    """

    def __init__(
        self,
        model: mujoco.MjModel,
        sensors: Sequence[Sensor],
        inertial: Inertial,
        *,
        of_com: bool,
        gravity: Tensor,
        substep: float,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        self._model, self._of_com, self._substep = model, of_com, substep
        self._inertial, self._dtype, self._device = inertial, dtype, device
        self._gravity = self._real(gravity).unsqueeze(-1)
        every, moved = watched(model, sensors), accelerated(model, sensors)
        self._size = sum(s.place.stop - s.place.start for s in sensors)
        of_kind: dict[str, list[Sensor]] = {kind: [s for s in sensors if s.kind == kind] for kind in _SENSORS}
        self._points = {
            kind: self._points_of(found, moved if kind in (*_OF_ACCELERATIONS, *_OF_FORCES) else every)
            for kind, found in of_kind.items()
            if found and kind not in _OF_JOINTS and kind != "SUBTREEANGMOM"
        }
        self._numbers = {
            kind: (self._places([s.number for s in found]), self._places(_columns(found)))
            for kind, found in of_kind.items()
            if found and kind in ("JOINTPOS", "JOINTVEL", "ACTUATORFRC")
        }
        table = actuator_table(model)
        driven = {int(place): a for a, place in enumerate(table.qvel)}
        forced = [s for s in of_kind["JOINTACTFRC"] if s.number in driven]
        chosen = [driven[s.number] for s in forced]
        gear = torch.as_tensor(table.gear[chosen], device=device)
        self._joint_forces = self._places(chosen), self._places(_columns(forced)), gear
        self._momenta = [
            (self._rows_of(every, _subtree(model, s.body)), self._places(_columns([s])))
            for s in of_kind["SUBTREEANGMOM"]
        ]
        self._subtrees = [[self._rows_of(moved, _subtree(model, s.body)) for s in of_kind[kind]] for kind in _OF_FORCES]
        self._moved = self._rows_of(every, moved)
        self._accelerated = list(moved)
        self._of_motion = bool(self._momenta) or any(kind != "TOUCH" for kind in self._points)
        self._masses, self._moved_masses = self._masses_of(every), self._masses_of(moved)
        self._soles = self._soles_of(moved) if of_kind["TORQUE"] else None

    def __call__(self, motion: Motion) -> Tensor:
        """`[N, nsensordata]` float64, in MuJoCo's order and units."""
        values = motion.body.new_zeros(self._size, len(motion.body))
        if self._of_motion:
            now = _states(motion.body)
            self._frame_sensors(now, values)
            self._momentum_sensors(now, values)
            if self._accelerated:
                self._force_sensors(now, motion, values)
        out = values.t().contiguous().to(motion.qpos.dtype)
        if "TOUCH" in self._points:
            points = self._points["TOUCH"]
            out[:, points.columns] = motion.contact[:, points.rows, 2].clamp(min=0.0).to(out.dtype)
        for kind, joints in (
            ("JOINTPOS", motion.qpos),
            ("JOINTVEL", motion.qvel),
            ("ACTUATORFRC", motion.force),
        ):
            if kind in self._numbers:
                numbers, columns = self._numbers[kind]
                out[:, columns] = joints[:, numbers]
        actuators, columns, gear = self._joint_forces
        out[:, columns] = gear * motion.force[:, actuators]
        return out

    # --- constants ------------------------------------------------------------------------------------------

    def _real(self, values: object) -> Tensor:
        return torch.as_tensor(values, dtype=self._dtype, device=self._device)

    def _whole(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int64, device=self._device)

    def _rows_of(self, ids: Sequence[int], some: Sequence[int]) -> slice | Tensor:
        """The rows of some bodies among others: a slice, which copies nothing, where it can be one."""
        return self._places([ids.index(b) for b in some])

    def _places(self, places: Sequence[int]) -> slice | Tensor:
        step = places[1] - places[0] if len(places) > 1 else 1
        if places and step > 0 and list(places) == list(range(places[0], places[-1] + 1, step)):
            return slice(places[0], places[-1] + 1, step)
        return self._whole(places)

    def _points_of(self, sensors: Sequence[Sensor], ids: Sequence[int]) -> _Points:
        centre = self._centres([s.body for s in sensors])
        fixed = self._real([s.pos for s in sensors]).unsqueeze(-1)
        inertial = torch.tensor([s.inertial for s in sensors], device=self._device).reshape(-1, 1, 1)
        arm = torch.where(inertial, centre, fixed) if any(s.inertial for s in sensors) else fixed
        return _Points(
            rows=self._rows_of(ids, [s.body for s in sensors]),
            arm=arm,
            lever=arm - centre if self._of_com else arm,
            turn=self._real(np.stack([_matrix_of(s.quat) for s in sensors])).unsqueeze(-1),
            quat=self._real([s.quat for s in sensors]),
            columns=self._places(_columns(sensors)),
        )

    def _centres(self, ids: Sequence[int]) -> Tensor:
        """`[B, 3, 1 or N]`"""
        return self._by_robot(self._inertial.centre[..., list(ids), :], 2)

    def _by_robot(self, values: Tensor, rank: int) -> Tensor:
        """`[...]` or `[N, ...]` of that rank without robots, with robots last."""
        return self._real(values.unsqueeze(-1) if values.ndim == rank else values.movedim(0, -1)).contiguous()

    def _masses_of(self, ids: Sequence[int]) -> _Masses:
        some = list(ids)
        axes = torch.as_tensor(np.array([_matrix_of(self._model.body_iquat[b]) for b in some]).reshape(-1, 3, 3))
        # In double precision until it is turned.
        tensor = axes * self._inertial.inertia[..., some, :].to(axes).unsqueeze(-2) @ axes.mT
        return _Masses(
            self._by_robot(self._inertial.mass[..., some, None], 2), self._by_robot(tensor, 3), self._centres(some)
        )

    def _soles_of(self, ids: Sequence[int]) -> _Soles | None:
        found = {b: balls for b in ids if (balls := _balls(self._model, b))}
        if not found:
            return None
        most = max(map(len, found.values()))
        nothing = (np.zeros(3), -np.inf)
        padded = [balls + [nothing] * (most - len(balls)) for balls in found.values()]
        return _Soles(
            self._whole([ids.index(b) for b in found]),
            self._real(np.array([[pos for pos, _ in balls] for balls in padded])).unsqueeze(-1),
            self._real(np.array([[radius for _, radius in balls] for balls in padded])).unsqueeze(-1),
        )

    # --- values ---------------------------------------------------------------------------------------------

    def _frame_sensors(self, now: _States, values: Tensor) -> None:
        """Write the sensors of the motion of frames into `values` `[nsensordata, N]`."""
        for kind, points in self._points.items():
            rows = points.rows
            if kind == "FRAMEPOS":
                value = now.position[rows] + _turn(now.matrix[rows], points.arm)
            elif kind == "FRAMEQUAT":
                x, y, z, w = now.quaternion[rows].unbind(1)
                quaternion = rotations.multiply(torch.stack([w, x, y, z], -1), points.quat.unsqueeze(1))
                value = (quaternion / quaternion.norm(dim=-1, keepdim=True)).movedim(-1, 1)
            elif kind in ("FRAMEANGVEL", "GYRO"):
                value = now.angular[rows]
            elif kind in ("FRAMELINVEL", "VELOCIMETER"):
                value = _velocity(now, rows, points.lever)
            else:
                continue
            if kind in ("GYRO", "VELOCIMETER"):
                value = _turn_back(points.turn, _turn_back(now.matrix[rows], value))
            values[points.columns] = value.flatten(0, 1)

    def _momentum_sensors(self, now: _States, values: Tensor) -> None:
        """Write the angular momentum of bodies with all that hangs on each, about their common centre of mass."""
        if not self._momenta:
            return
        masses = self._masses
        arm = _turn(now.matrix, masses.centre)
        place = now.position - now.position[:1] + arm
        velocity = now.linear if self._of_com else now.linear + _cross(now.angular, arm)
        carried, momentum = masses.mass * place, masses.mass * velocity
        about = _spin(masses, now) + _cross(carried, velocity)
        for rows, columns in self._momenta:
            of_all = [x[rows] for x in (about, carried, momentum, masses.mass)]
            total, moment, drift, mass = (x.sum(0) for x in of_all)
            values[columns] = total - _cross(moment, drift) / mass

    def _force_sensors(self, now: _States, motion: Motion, values: Tensor) -> None:
        """Write accelerometers, forces and torques, in the frames where the substep began: there the forces acted."""
        start, masses = _states(motion.before), self._moved_masses
        end = _States(*(value[self._moved] for value in now))
        if "ACCELEROMETER" in self._points:
            points = self._points["ACCELEROMETER"]
            gained = _velocity(end, points.rows, points.lever) - _velocity(start, points.rows, points.lever)
            value = _turn_back(start.matrix[points.rows], gained / self._substep - self._gravity)
            values[points.columns] = _turn_back(points.turn, value).flatten(0, 1)
        if not any(self._subtrees):
            return
        arm = _turn(start.matrix, masses.centre)
        gained = end.linear - start.linear
        if not self._of_com:
            gained = gained + _cross(end.angular, _turn(end.matrix, masses.centre)) - _cross(start.angular, arm)
        contact = _by_component(motion.contact)[self._moved]
        inner = masses.mass * (gained / self._substep - self._gravity)
        wrench = None
        if motion.wrench is not None:
            wrench = _by_component(motion.wrench[:, self._accelerated].to(inner.dtype))
            inner = inner - wrench[:, 0:3]
        force = inner - contact
        origin = start.position[:1]
        moment = None
        if "TORQUE" in self._points:
            centre = start.position - origin + arm
            moment = (_spin(masses, end) - _spin(masses, start)) / self._substep + _cross(centre, inner)
            moment = moment - _cross(self._contact_points(start, centre, origin), contact)
            if wrench is not None:
                moment = moment - wrench[:, 3:6]
        for kind, subtrees in zip(_OF_FORCES, self._subtrees, strict=True):
            if not subtrees:
                continue
            points = self._points[kind]
            total = lambda x: torch.stack([x[r].sum(0) for r in subtrees])  # noqa: B023, E731
            value, matrix = total(force), start.matrix[points.rows]
            if kind == "TORQUE":
                site = start.position[points.rows] - origin + _turn(matrix, points.arm)
                value = total(moment) - _cross(site, value)
            values[points.columns] = _turn_back(points.turn, _turn_back(matrix, value)).flatten(0, 1)

    def _contact_points(self, start: _States, centre: Tensor, origin: Tensor) -> Tensor:
        """`[B, 3, N]` where the contact force of each body is taken to act, from the origin."""
        if self._soles is None:
            return centre
        rows, pos, radius = self._soles
        balls = start.position[rows].unsqueeze(1) + _turn(start.matrix[rows].unsqueeze(1), pos)
        bottom = balls[:, :, 2] - radius
        share = (bottom.amin(1, keepdim=True) + _SOLE - bottom).clamp(min=0.0).unsqueeze(2)
        # A contact is between the bottom of the shape and the floor.
        place = torch.cat([balls[:, :, 0:2], 0.5 * bottom.nan_to_num(posinf=0.0).unsqueeze(2)], dim=2)
        return centre.index_copy(0, rows, (share * place).sum(1) / share.sum(1) - origin)


def _columns(sensors: Sequence[Sensor]) -> list[int]:
    return [c for s in sensors for c in range(s.place.start, s.place.stop)]


def _matrix_of(quat: Sequence[float] | np.ndarray) -> np.ndarray:
    flat = np.zeros(9)
    mujoco.mju_quat2Mat(flat, np.asarray(quat, dtype=float))
    return flat.reshape(3, 3)


def _balls(model: mujoco.MjModel, body: int) -> list[tuple[np.ndarray, float]]:
    """Balls on which a body may stand, by centre in the body's frame and radius."""
    found = []
    for g in range(model.ngeom):
        if int(model.geom_bodyid[g]) != body or not (model.geom_contype[g] or model.geom_conaffinity[g]):
            continue
        kind, size, axes = int(model.geom_type[g]), model.geom_size[g], _matrix_of(model.geom_quat[g])
        if kind == _SPHERE:
            corners, radius = np.zeros((1, 3)), float(size[0])
        elif kind == _CAPSULE:
            corners, radius = np.array([[0, 0, -size[1]], [0, 0, size[1]]]), float(size[0])
        elif kind == _BOX:
            corners, radius = size * np.array(list(itertools.product((-1, 1), repeat=3))), 0.0
        else:
            continue
        found += [(model.geom_pos[g] + axes @ corner, radius) for corner in corners]
    return found


def _by_component(tensor: Tensor) -> Tensor:
    """`[N, B, k]` to `[B, k, N]`."""
    size, bodies, width = tensor.shape
    rows, out = tensor.reshape(size, bodies * width), tensor.new_empty(bodies * width, size)
    # In pieces that a cache holds: half the time of the whole at once.
    for start in range(0, size, _PIECE):
        out[:, start : start + _PIECE] = rows[start : start + _PIECE].t()
    return out.reshape(bodies, width, size)


def _states(body: Tensor) -> _States:
    """What Isaac Gym's rigid body states `[N, B, 13]` say."""
    parts = _by_component(body)
    quaternion = parts[:, 3:7]
    # Rounded, a quaternion is not quite of unit length; divided by its square it scales nothing.
    doubled = quaternion * (2.0 / (quaternion * quaternion).sum(1, keepdim=True))
    x, y, z, w = quaternion.unbind(1)
    matrix = quaternion.new_empty(len(parts), 3, 3, parts.shape[-1])
    # What is written in place need not be gathered afterwards, which would cost as much as all of the arithmetic.
    x2, y2, z2, _ = doubled.unbind(1)
    xx, yy, zz, xy, xz, yz = x * x2, y * y2, z * z2, x * y2, x * z2, y * z2
    wx, wy, wz = w * x2, w * y2, w * z2
    for i, (p, q) in enumerate(((yy, zz), (xx, zz), (xx, yy))):
        torch.sub(1.0 - p, q, out=matrix[:, i, i])
    for i, j, p, q in ((1, 0, xy, wz), (0, 2, xz, wy), (2, 1, yz, wx)):
        torch.add(p, q, out=matrix[:, i, j])
        torch.sub(p, q, out=matrix[:, j, i])
    return _States(parts[:, 0:3], quaternion, parts[:, 7:10], parts[:, 10:13], matrix)


def _turn(matrix: Tensor, v: Tensor) -> Tensor:
    """`[..., 3, 3, N]` times `[..., 3, N]`."""
    x, y, z = v.unsqueeze(-3).unbind(-2)
    a, b, c = matrix.unbind(-2)
    return torch.addcmul(torch.addcmul(a * x, b, y), c, z)


def _turn_back(matrix: Tensor, v: Tensor) -> Tensor:
    """The transpose of `[..., 3, 3, N]` times `[..., 3, N]`."""
    x, y, z = v.unsqueeze(-2).unbind(-3)
    a, b, c = matrix.unbind(-3)
    return torch.addcmul(torch.addcmul(a * x, b, y), c, z)


def _cross(a: Tensor, b: Tensor) -> Tensor:
    """`[..., 3, N]`, `[..., 3, N]` to `[..., 3, N]`."""
    out = torch.empty(torch.broadcast_shapes(a.shape, b.shape), dtype=a.dtype, device=a.device)
    for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        torch.mul(a[..., j, :], b[..., k, :], out=out[..., i, :])
        out[..., i, :].addcmul_(a[..., k, :], b[..., j, :], value=-1.0)
    return out


def _velocity(states: _States, rows: slice | Tensor, lever: Tensor) -> Tensor:
    """`[S, 3, N]` of points of bodies, in the world frame."""
    return states.linear[rows] + _cross(states.angular[rows], _turn(states.matrix[rows], lever))


def _spin(masses: _Masses, states: _States) -> Tensor:
    """`[B, 3, N]` angular momentum of each body about its own centre of mass, world frame."""
    return _turn(states.matrix, _turn(masses.inertia, _turn_back(states.matrix, states.angular)))
