"""MuJoCo on CPUs: the embedded default engine.

Runs `mujoco.batch.Batch`, a thread pool over many simulations whose results do not depend on the number of
threads. The batch's rows are scratch memory: every call writes the whole state it was given, so that a step
is a function of its arguments. Only model fields stay in the rows between calls, because writing them means
recomputing derived constants: a row is rewritten where its values differ from the ones asked for.

MuJoCo's own automatic reset of unstable simulations is switched off, since it would replace a state silently,
and so is its log, for the whole process: what it warns of there is told by `PhysicsState.fault` and recorded,
robot by robot.
"""

import difflib
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import torch
from mujoco.batch import MODEL_FIELDS, Batch, SimulationError
from torch import Tensor

from rlcore.errors import InputError
from rlcore.physics.engine import (
    FAULT_ACTION,
    FAULT_ENGINE,
    FAULT_NAMES,
    FAULT_NONE,
    FAULT_UNSTABLE,
    FAULTS_KEPT,
    BatchEngine,
    Fault,
    Joint,
    ModelInfo,
    PhysicsParams,
    Rows,
    record_fault,
)
from rlcore.tree import where

# Positions and velocities beyond this (m, rad, m/s, rad/s) are no robot's: the simulation has exploded.
STATE_LIMIT = 1e4
# Step of the central differences, in the units of what is perturbed. Rounding costs about 1e-10, curvature
# less.
_DIFFERENCE = 1e-6
# A linearization takes two simulations per input; it runs in pieces of about this many rows.
_JACOBIAN_ROWS = 4096
# Batches of this many different sizes are kept ready.
_BATCHES_KEPT = 6

# Warnings after which a step is not to be trusted: contacts or constraints were left out for want of memory.
_OVERFLOWS = [int(mujoco.mjtWarning.mjWARN_CONTACTFULL), int(mujoco.mjtWarning.mjWARN_CNSTRFULL)]

# What a simulation may carry from step to step that `PhysicsState` has no place for.
_HIDDEN_STATE = {
    "delayed actuators or sensors": mujoco.mjtState.mjSTATE_HISTORY,
    "plugins with a state": mujoco.mjtState.mjSTATE_PLUGIN,
    "plastic deformation": mujoco.mjtState.mjSTATE_PLASTIC,
}

# What of `mjData` may be read beside the sensors: real arrays that every evaluation of the dynamics fills.
EXTRA = (
    *("xpos", "xquat", "xmat", "xipos", "ximat", "geom_xpos", "site_xpos", "site_xmat", "subtree_com", "cinert"),
    *("ten_length", "ten_velocity", "actuator_length", "actuator_velocity", "actuator_force", "cvel"),
    *("qfrc_actuator", "qfrc_passive", "qfrc_bias", "qfrc_constraint", "qacc", "cfrc_ext"),
)

_JOINT_KINDS = {0: "free", 1: "ball", 2: "slide", 3: "hinge"}


def load_model(path: str | Path) -> mujoco.MjModel:
    """Read an MJCF file.

    Raises:
      InputError: if the file is missing or MuJoCo rejects it; the message carries MuJoCo's own line number.
    """
    return _read(path, mujoco.MjModel.from_xml_path)


def load_spec(path: str | Path) -> mujoco.MjSpec:
    """Read an MJCF file to change it before it is compiled, as by `rlcore.physics.terrain`. Raises as `load_model`."""
    return _read(path, mujoco.MjSpec.from_file)


def _read(path: str | Path, reader: Callable[[str], Any]) -> Any:
    path = Path(path)
    if not path.is_file():
        raise InputError(f"model file {path} does not exist")
    try:
        return reader(str(path))
    except ValueError as error:
        raise InputError(f"model file {path}: {' '.join(str(error).split())}") from error


class ModelEngine(BatchEngine):
    """What every engine that steps a compiled MuJoCo model has in common: the model, its names and its fields.

    Args:
      model: a compiled model; it is copied.
      extra: fields of `mjData`, among `EXTRA`, that sensordata shall hold after the sensors, each flattened and
        under its own name: `model.sensor("cinert")`.

    Raises:
      InputError: if the model carries a state that `PhysicsState` does not hold, or an extra field is unknown,
        repeated, of no size in this model, or has the name of a sensor.
    """

    def __init__(self, model: mujoco.MjModel, extra: Sequence[str] = ()):
        super().__init__()
        for what, component in _HIDDEN_STATE.items():
            if mujoco.mj_stateSize(model, int(component)):
                raise InputError(f"the model has {what}, which a step as a function of its state cannot have")
        if int(model.opt.enableflags) & int(mujoco.mjtEnableBit.mjENBL_SLEEP):
            raise InputError('the model lets bodies sleep; set <flag sleep="disable"/>: what sleeps has no state')
        self.mjmodel: mujoco.MjModel = mujoco.MjModel.__copy__(model)
        self.mjmodel.opt.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_AUTORESET)
        self.extra = tuple(extra)
        self.model = _with_extra(_model_info(self.mjmodel), self.mjmodel, self.extra)
        # A table, so that torch.compile meets nothing but look-ups.
        self._field_shapes = {name: model_field(self.mjmodel, name).shape for name in _real_fields(self.mjmodel)}
        self.field_ranks = {name: len(shape) for name, shape in self._field_shapes.items()}

    def nominal(self, *names: str) -> PhysicsParams:
        return {name: torch.as_tensor(np.array(model_field(self.mjmodel, name)), device=self.device) for name in names}

    def _check_fields(self, params: PhysicsParams, lead: Sequence[int]) -> None:
        for name, value in params.items():
            if name not in self._field_shapes:
                model_field(self.mjmodel, name)  # tells what is wrong with it
            core = self._field_shapes[name]
            if value.shape != core and value.shape != (*lead, *core):
                raise InputError(f"model field {name!r} must have shape {core}, got {tuple(value.shape)}")

    def _record(
        self,
        fields: PhysicsParams,
        rows: Rows,
        ctrl: Tensor,
        wrench: Tensor | None,
        substeps: int,
        key: Tensor | None,
        fault: np.ndarray,
        errors: dict[int, str],
    ) -> None:
        for i in np.flatnonzero(fault)[:FAULTS_KEPT]:
            arrays = {name: value[i].numpy().copy() for name, value in rows._asdict().items()}
            arrays["ctrl"] = ctrl[i].numpy().copy()
            arrays["substeps"] = np.asarray(substeps)
            if wrench is not None:
                arrays["wrench"] = wrench[i].numpy().copy()
            if key is not None:
                arrays["key"] = key[i].numpy().copy()
            for name, value in fields.items():
                row = value if value.ndim == self.field_ranks[name] else value[i]
                arrays[f"params.{name}"] = row.numpy().copy()
            message = errors.get(int(i), FAULT_NAMES[fault[i]])
            if fault[i] == FAULT_ACTION:
                broken = np.flatnonzero(~np.isfinite(arrays["ctrl"]))
                message += ": " + ", ".join(self.model.actuators[j] for j in broken)
            record_fault(Fault(int(fault[i]), message, arrays))


class MujocoEngine(ModelEngine):
    """The Engine contract over `mujoco.batch`.

    Args:
      model: a compiled model; it is copied.
      num_threads: threads to step on; 0 takes every CPU. The results do not depend on it.
      extra: as for `ModelEngine`. After a step they are what `mj_step` leaves in `mjData`: of its last evaluation of
        the dynamics, which with RK4 is the last stage of the last substep. `cfrc_ext` is what `mj_rnePostConstraint`
        makes of that; it takes a simulation's whole `mjData`, and so memory for each and a third more time.

    Raises:
      InputError: if num_threads is negative, and as from `ModelEngine`.
    """

    def __init__(self, model: mujoco.MjModel, num_threads: int = 0, extra: Sequence[str] = ()):
        super().__init__(model, extra)
        if num_threads < 0:
            raise InputError(f"num_threads must be 0 (every CPU) or more, got {num_threads}")
        log = mujoco.MjLogConfig.get()
        log.logto_console = log.logto_file = False
        log.set()
        self.num_threads = num_threads
        self._buffers: OrderedDict[int, _Buffers] = OrderedDict()

    def _of_size(self, size: int) -> "_Buffers":
        buffers = self._buffers.pop(size, None)
        if buffers is None:
            buffers = _Buffers(self.mjmodel, size, self.num_threads, self.extra)
            while len(self._buffers) >= _BATCHES_KEPT:
                self._buffers.popitem(last=False)
        self._buffers[size] = buffers
        return buffers

    def _load(self, fields: PhysicsParams, rows: Rows, some: Any = slice(None)) -> "_Buffers":
        buffers = self._of_size(rows.qpos.shape[0])
        try:
            buffers.write_fields(fields)
        except SimulationError as error:
            del self._buffers[rows.qpos.shape[0]]  # its rows are half written
            raise InputError(f"MuJoCo rejects the model fields {', '.join(fields)}: {error}") from error
        buffers.write_state(rows, some)
        return buffers

    def step_rows(
        self,
        fields: PhysicsParams,
        rows: Rows,
        ctrl: Tensor,
        wrench: Tensor | None,
        substeps: int,
        key: Tensor | None,
    ) -> tuple[Rows, Tensor]:
        buffers = self._load(fields, rows)
        controls = ctrl.numpy()
        bad_ctrl = None
        if not np.isfinite(controls).all():
            bad_ctrl = ~np.isfinite(controls).all(axis=1)
            controls = np.where(bad_ctrl[:, None], 0.0, controls)
        buffers.ctrl[:] = controls
        buffers.write_wrench(wrench)
        errors = buffers.step(substeps)
        fault = np.zeros(len(controls), np.int64)
        sane = buffers.sane()
        if errors or bad_ctrl is not None or not sane.all():
            fault[~sane] = FAULT_UNSTABLE
            if bad_ctrl is not None:
                fault[bad_ctrl] = FAULT_ACTION
            fault[list(errors)] = FAULT_ENGINE
        out = buffers.read()
        if fault.any():
            bad = torch.from_numpy(fault != FAULT_NONE)
            out = Rows(*(where(bad, before, after) for before, after in zip(rows, out, strict=True)))
            self._record(fields, rows, ctrl, wrench, substeps, key, fault, errors)
        return out, torch.from_numpy(fault)

    def forward_rows(self, fields: PhysicsParams, rows: Rows, mask: Tensor) -> Tensor:
        ids = mask.numpy()
        if not ids.any():
            return rows.sensordata.clone()
        some = slice(None) if ids.all() else np.flatnonzero(ids)
        buffers = self._load(fields, rows, some)
        buffers.ctrl[some] = 0.0
        buffers.write_wrench(None)
        errors = buffers.forward(None if ids.all() else ids)
        out = rows.sensordata.clone()
        out.numpy()[some] = buffers.sensors(some)
        for row in errors:  # it keeps its old sensor values; its next step reports the fault
            out[row] = rows.sensordata[row]
        return out

    def jacobian_rows(
        self, fields: PhysicsParams, rows: Rows, ctrl: Tensor, wrench: Tensor | None, substeps: int
    ) -> Tensor:
        m, n = self.model, rows.qpos.shape[0]
        inputs = 2 * m.nv + m.na + m.nu + (0 if wrench is None else 6 * len(m.bodies))
        piece = max(1, _JACOBIAN_ROWS // (2 * inputs))
        outputs = []
        for start in range(0, n, piece):
            part = slice(start, min(start + piece, n))
            outputs.append(
                self._differences(
                    {k: v if v.ndim == self.field_ranks[k] else v[part] for k, v in fields.items()},
                    Rows(*(t[part] for t in rows)),
                    ctrl[part],
                    None if wrench is None else wrench[part],
                    substeps,
                )
            )
        return torch.cat(outputs)

    def _differences(
        self, fields: PhysicsParams, rows: Rows, ctrl: Tensor, wrench: Tensor | None, substeps: int
    ) -> Tensor:
        """Central differences of a few rows: `[N, outputs, inputs]`."""
        m, n = self.model, rows.qpos.shape[0]
        tangent = _tangent_map(self.mjmodel, rows.qpos.numpy())  # [N, nq, nv]
        sizes = [m.nv, m.nv, m.na, m.nu] + ([] if wrench is None else [6 * len(m.bodies)])
        inputs = sum(sizes)

        def repeated(t: Tensor) -> np.ndarray:
            """`[N, k]` to `[N, 2, inputs, k]`: one row for each input moved up and one for it moved down."""
            return np.repeat(t.numpy().reshape(n, 1, 1, -1), 2, axis=1).repeat(inputs, axis=2)

        moved = [repeated(t) for t in (rows.qpos, rows.qvel, rows.act, ctrl)]
        if wrench is not None:
            moved.append(repeated(wrench.reshape(n, -1)))
        start = 0
        for place, size in enumerate(sizes):
            columns = slice(start, start + size)
            direction = tangent.transpose(0, 2, 1) if place == 0 else np.eye(size)
            for side, sign in enumerate((1.0, -1.0)):
                moved[place][:, side, columns] += sign * _DIFFERENCE * direction
            start += size
        flat = [torch.from_numpy(x.reshape(n * 2 * inputs, x.shape[-1])) for x in moved]
        wide = lambda t: torch.from_numpy(repeated(t).reshape(n * 2 * inputs, *t.shape[1:]))  # noqa: E731
        every = {
            k: v if v.ndim == self.field_ranks[k] else v.repeat_interleave(2 * inputs, dim=0) for k, v in fields.items()
        }
        still = wide(rows.warmstart), wide(rows.sensordata)
        buffers = self._load(every, Rows(wide(rows.time), flat[0], flat[1], flat[2], *still))
        buffers.ctrl[:] = flat[3].numpy()
        buffers.write_wrench(None if wrench is None else flat[4].reshape(-1, len(m.bodies), 6))
        errors = buffers.step(substeps)
        sane = buffers.sane()
        sane[list(errors)] = False
        out = buffers.read()
        after = torch.cat([out.qpos, out.qvel, out.act, out.sensordata], dim=1).reshape(n, 2, inputs, -1)
        jacobian = (after[:, 0] - after[:, 1]) / (2 * _DIFFERENCE)
        # Where a step fails nothing can be said of its slope.
        usable = torch.from_numpy(sane.reshape(n, -1).all(axis=1)) & torch.isfinite(jacobian).all(-1).all(-1)
        return where(usable, jacobian, jacobian.new_zeros(())).transpose(1, 2).contiguous()

    def tangent_rows(self, qpos: Tensor) -> Tensor:
        tangent = _tangent_map(self.mjmodel, qpos.numpy())
        # For a quaternion the map T has T'T = |q|^2 / 4: the least gradient g with T'g = h is 4 T h / |q|^2.
        squares = (tangent**2).sum(axis=1, keepdims=True)
        return torch.from_numpy(tangent / np.where(squares == 0.0, 1.0, squares))


class _Buffers:
    """The rows of one batch size, and what is written in them."""

    def __init__(self, model: mujoco.MjModel, size: int, num_threads: int, extra: Sequence[str] = ()):
        # The forces of contacts stay in each simulation's own data, where only a persistent batch keeps them.
        self.data = mujoco.MjData(model) if "cfrc_ext" in extra else None
        self.batch = Batch(model, size, num_threads, persistent=self.data is not None)
        self.model = model
        self.time: Any = self.batch.bind("time")
        self.qpos: Any = self.batch.bind("qpos")
        self.qvel: Any = self.batch.bind("qvel")
        self.act: Any = self.batch.bind("act")
        self.warmstart: Any = self.batch.bind("qacc_warmstart")
        self.ctrl: Any = self.batch.bind("ctrl")
        self.sensordata: Any = self.batch.bind("sensordata")
        self.external: Any = np.zeros((size, model.nbody, 6))
        self.extra: list[Any] = [self.external if n == "cfrc_ext" else self.batch.bind(n) for n in extra]
        self.wrench: Any = None
        start = self.qpos.ctypes.data - self.batch.state.ctypes.data
        first = start // self.batch.state.itemsize if model.nq else 0
        # qpos and qvel lie side by side in a row: one view serves to check both.
        self.motion: Any = self.batch.state[:, first : first + model.nq + model.nv]
        self.fields: dict[str, Any] = {}
        self.seen: dict[str, tuple[Tensor, int] | None] = {}

    def step(self, substeps: int) -> dict[int, str]:
        """Step every row; returns what went wrong, by row."""
        return self._run(lambda: self.batch.step(nstep=substeps), None)

    def forward(self, ids: np.ndarray | None) -> dict[int, str]:
        """Run `mj_forward` on the rows where the mask `ids` is true (None: on all); returns as `step`."""
        return self._run(lambda: self.batch.forward(ids), ids)

    def _run(self, call: Callable[[], None], ids: np.ndarray | None) -> dict[int, str]:
        errors: dict[int, str] = {}
        try:
            call()
        except SimulationError as error:
            # MuJoCo's advice on how to change the model follows on lines of its own.
            errors = {int(i): self.batch.error(int(i)).partition("\n")[0] for i in error.ids}
        overflows = self.batch.warning[:, _OVERFLOWS, 1]
        if overflows.any():
            full = "no memory for all contacts and constraints"
            errors |= {int(i): full for i in np.flatnonzero(overflows.any(axis=1))}
            self.batch.warning[:, _OVERFLOWS] = 0  # or the next call would be blamed for it
        if self.data is not None:
            for i in range(self.batch.nsim) if ids is None else np.flatnonzero(ids):
                self.batch.get_data(i, self.data)
                mujoco.mj_rnePostConstraint(self.model, self.data)
                self.external[i] = self.data.cfrc_ext
        return errors

    def sane(self) -> np.ndarray:
        """`[N]` whether positions and velocities are finite and within bounds."""
        # One comparison finds NaN, infinity and explosion alike, since NaN compares false.
        return np.abs(self.motion).max(axis=1, initial=0.0) < STATE_LIMIT

    def write_state(self, rows: Rows, some: Any) -> None:
        self.time[some] = rows.time.numpy()[some]
        self.qpos[some] = rows.qpos.numpy()[some]
        self.qvel[some] = rows.qvel.numpy()[some]
        self.act[some] = rows.act.numpy()[some]
        self.warmstart[some] = rows.warmstart.numpy()[some]

    def write_wrench(self, wrench: Tensor | None) -> None:
        if wrench is not None:
            if self.wrench is None:
                self.wrench = self.batch.bind("xfrc_applied")
            self.wrench[:] = wrench.numpy()
        elif self.wrench is not None:
            self.wrench[:] = 0.0
            self.wrench = None

    def write_fields(self, fields: PhysicsParams) -> None:
        """Make every row's model fields those asked for: nominal where none is."""
        if not fields and not self.fields:
            return
        # Every written field is in `seen`, or is None there because its writes are not counted.
        if fields.keys() == self.seen.keys() and all(same_memory(fields[k], self.seen[k]) for k in fields):
            return
        changed = np.zeros(self.batch.nsim, bool)
        for name in [*fields, *(n for n in self.fields if n not in fields)]:
            if name not in self.fields:
                self.fields[name] = self.batch.expand(name)
            rows = self.fields[name]
            wanted = fields[name].numpy() if name in fields else model_field(self.model, name)
            differs = (rows != wanted).reshape(len(rows), -1).any(axis=1)
            if differs.any():
                rows[differs] = np.broadcast_to(wanted, rows.shape)[differs]
                changed |= differs & feeds_constants(name)
        if changed.any():
            self.seen = {}
            self.batch.set_const(changed)
        # Inference tensors do not count their writes, so they are compared every time.
        self.seen = {n: None if field.is_inference() else (field, field._version) for n, field in fields.items()}

    def sensors(self, some: Any) -> np.ndarray:
        """The sensors of some rows, then the extra fields: `[n, nsensor]`, a copy."""
        values = [self.sensordata[some], *(x[some] for x in self.extra)]
        return np.concatenate([x.reshape(len(x), math.prod(x.shape[1:])) for x in values], axis=1)

    def read(self) -> Rows:
        copy = lambda a: torch.from_numpy(a.copy())  # noqa: E731
        return Rows(
            copy(self.time),
            copy(self.qpos),
            copy(self.qvel),
            copy(self.act),
            copy(self.warmstart),
            torch.from_numpy(self.sensors(slice(None))),
        )


def _with_extra(info: ModelInfo, model: mujoco.MjModel, extra: Sequence[str]) -> ModelInfo:
    """The model's description with the extra fields' places in sensordata."""
    sensors, size = dict(info.sensors), info.nsensor
    data = mujoco.MjData(model) if extra else None
    for name in extra:
        if name not in EXTRA:
            close = ", ".join(difflib.get_close_matches(name, EXTRA, n=3)) or ", ".join(EXTRA)
            raise InputError(f"extra field {name!r} cannot be read beside the sensors; near it are: {close}")
        if name in sensors:
            raise InputError(f"extra field {name!r} is given twice, or the model has a sensor of that name")
        width = int(np.size(getattr(data, name)))
        if width == 0:
            raise InputError(f"extra field {name!r} is empty in this model")
        sensors[name] = slice(size, size + width)
        size += width
    return replace(info, sensors=sensors, nsensor=size)


def same_memory(a: Tensor, seen: tuple[Tensor, int] | None) -> bool:
    """Whether `a` is memory that was seen before, unwritten since.

    The tensor that was seen is held, so its memory cannot have gone to another.
    """
    if seen is None:
        return False
    b, version = seen
    return (
        a.data_ptr() == b.data_ptr()
        and not a.is_inference()
        and a._version == version
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
    )


def feeds_constants(name: str) -> bool:
    """Whether MuJoCo derives constants from this model field."""
    return name.startswith("opt.") or name in mujoco.MjModel._setconst_inputs


def _is_derived(name: str) -> bool:
    return name in mujoco.MjModel._setconst_outputs and name not in mujoco.MjModel._setconst_inputs


def _real_fields(model: mujoco.MjModel) -> list[str]:
    """The model fields that `PhysicsParams` may hold."""
    given = [name for name in MODEL_FIELDS if not _is_derived(name)]
    return [name for name in given if _raw_field(model, name).dtype.kind == "f"]


def _raw_field(model: mujoco.MjModel, name: str) -> np.ndarray:
    return np.asarray(getattr(model.opt, name[4:]) if name.startswith("opt.") else getattr(model, name))


def model_field(model: mujoco.MjModel, name: str) -> np.ndarray:
    """The model's own value of a field; raises InputError for one that cannot differ between robots."""
    if name not in MODEL_FIELDS:
        close = ", ".join(difflib.get_close_matches(name, MODEL_FIELDS, n=3)) or "none"
        raise InputError(f"{name!r} is not a model field that can differ between robots; near it are: {close}")
    if _is_derived(name):
        raise InputError(f"MuJoCo computes model field {name!r} from others; it cannot be given")
    value = _raw_field(model, name)
    if value.dtype.kind != "f":
        raise InputError(f"model field {name!r} holds {value.dtype}, not real numbers; it cannot be given")
    return value


def _tangent_map(model: mujoco.MjModel, qpos: np.ndarray) -> np.ndarray:
    """d qpos / d (small motion in the tangent space), `[N, nq, nv]`.

    Hinges and slides: 1. A quaternion q turned by the body-frame rotation vector w moves by q (0, w) / 2.
    """
    out = np.zeros((len(qpos), model.nq, model.nv))
    for j in range(model.njnt):
        kind = _JOINT_KINDS[int(model.jnt_type[j])]
        p, v = int(model.jnt_qposadr[j]), int(model.jnt_dofadr[j])
        if kind == "free":
            out[:, range(p, p + 3), range(v, v + 3)] = 1.0
            p, v = p + 3, v + 3
        if kind in ("free", "ball"):
            w, x, y, z = (qpos[:, p + k] / 2 for k in range(4))
            columns = ((-x, w, z, -y), (-y, -z, w, x), (-z, y, -x, w))
            for k, column in enumerate(columns):
                for row, value in enumerate(column):
                    out[:, p + row, v + k] = value
        else:
            out[:, p, v] = 1.0
    return out


def _model_info(model: mujoco.MjModel) -> ModelInfo:
    names = lambda kind, n: tuple(getattr(model, kind)(i).name for i in range(n))  # noqa: E731
    joints = []
    for j in range(model.njnt):
        kind = _JOINT_KINDS[int(model.jnt_type[j])]
        nq, nv = {"free": (7, 6), "ball": (4, 3)}.get(kind, (1, 1))
        p, v = int(model.jnt_qposadr[j]), int(model.jnt_dofadr[j])
        limits = model.jnt_range[j] if model.jnt_limited[j] else (-np.inf, np.inf)
        places = slice(p, p + nq), slice(v, v + nv)
        joints.append(Joint(model.joint(j).name, kind, *places, float(limits[0]), float(limits[1])))
    joint_kinds = (int(mujoco.mjtTrn.mjTRN_JOINT), int(mujoco.mjtTrn.mjTRN_JOINTINPARENT))
    limited = model.actuator_ctrllimited.astype(bool)
    driven = lambda a: model.joint(int(model.actuator_trnid[a, 0])).name  # noqa: E731
    sensor_ends = model.sensor_adr + model.sensor_dim
    return ModelInfo(
        nq=model.nq,
        nv=model.nv,
        na=model.na,
        nu=model.nu,
        nsensor=model.nsensordata,
        timestep=float(model.opt.timestep),
        bodies=names("body", model.nbody),
        geoms=names("geom", model.ngeom),
        joints=tuple(joints),
        actuators=names("actuator", model.nu),
        actuator_joints=tuple(
            driven(a) if int(model.actuator_trntype[a]) in joint_kinds else "" for a in range(model.nu)
        ),
        ctrl_lower=tuple(float(x) for x in np.where(limited, model.actuator_ctrlrange[:, 0], -np.inf)),
        ctrl_upper=tuple(float(x) for x in np.where(limited, model.actuator_ctrlrange[:, 1], np.inf)),
        sensors={
            model.sensor(i).name: slice(int(model.sensor_adr[i]), int(sensor_ends[i])) for i in range(model.nsensor)
        },
        keyframes={
            model.key(i).name: (tuple(map(float, model.key_qpos[i])), tuple(map(float, model.key_ctrl[i])))
            for i in range(model.nkey)
        },
    )
