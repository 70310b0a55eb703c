"""MuJoCo Warp on NVIDIA GPUs: the engine for thousands of robots.

It steps the model that `rlcore.physics.mujoco` steps, on the GPU and in float32. States come in and go out as float64,
as everywhere, so that a task computes the same on every engine and a checkpoint goes from one to the other; what the
engine returns are float32 numbers in float64 tensors, but for the time, which is kept in full precision. The same step
taken twice may differ in the last bits, since threads add up forces in any order.

All state is written before a step and read after it, in memory that Warp and torch share. The substeps of a control
step are captured once as a CUDA graph. No call waits for the GPU: faults stay there until `drain_faults` asks.

Memory for contacts is taken for the most that the model's pairs of geoms can give, where these are few. Where they are
many, it is an estimate, and a robot for which it was too small gets a fault.
"""

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mujoco
import mujoco_warp
import numpy as np
import torch
import warp
from torch import Tensor

from rlcore.errors import EngineFailed, InputError
from rlcore.jit import tracing
from rlcore.physics.engine import (
    FAULT_ACTION,
    FAULT_ENGINE,
    FAULT_NAMES,
    FAULT_NONE,
    FAULT_UNSTABLE,
    FAULTS_KEPT,
    Fault,
    PhysicsParams,
    Rows,
    record_fault,
)
from rlcore.physics.mujoco import STATE_LIMIT, ModelEngine, feeds_constants, model_field, same_memory

# Batches of this many different sizes are kept ready.
_BATCHES_KEPT = 6
# Up to this many contacts of one robot there is memory for all that its pairs of geoms can give.
_MOST_CERTAIN_CONTACTS = 64
# Most contacts of a pair, by MuJoCo's types of geoms; 8 of any pair that is not listed.
_CONTACTS = {("PLANE", "SPHERE"): 1, ("PLANE", "CAPSULE"): 2, ("PLANE", "BOX"): 4, ("PLANE", "CYLINDER"): 4,
             ("PLANE", "ELLIPSOID"): 1, ("SPHERE", "SPHERE"): 1, ("SPHERE", "CAPSULE"): 1, ("SPHERE", "CYLINDER"): 1,
             ("SPHERE", "BOX"): 1, ("CAPSULE", "CAPSULE"): 2, ("CAPSULE", "BOX"): 2}  # fmt: skip
# Flags that MuJoCo Warp does not know and does not need: it has no midphase, and resets nothing by itself.
_UNKNOWN_FLAGS = int(mujoco.mjtDisableBit.mjDSBL_MIDPHASE) | int(mujoco.mjtDisableBit.mjDSBL_AUTORESET)
# What MuJoCo Warp leaves out contacts or constraints for; the limits on iterations are the model's own.
_OVERFLOWS = int(mujoco_warp.OverflowType.ALL) & ~int(
    mujoco_warp.OverflowType.ITERATIONS | mujoco_warp.OverflowType.LS_ITERATIONS
)
# Those of memory that all robots share: no robot's contacts are then complete.
_SHARED_OVERFLOWS = int(
    mujoco_warp.OverflowType.BROADPHASE | mujoco_warp.OverflowType.NARROWPHASE | mujoco_warp.OverflowType.CCD
)
# What `set_const` derives from other fields, and so differs where they do.
_DERIVED = (
    *("body_subtreemass", "body_invweight0", "dof_invweight0", "tendon_length0", "tendon_invweight0", "actuator_acc0"),
    *("cam_pos0", "cam_poscom0", "cam_mat0", "light_pos0", "light_poscom0", "light_dir0", "geom_aabb", "geom_rbound"),
)


class WarpEngine(ModelEngine):
    """The Engine contract over MuJoCo Warp.

    Args:
      model: a compiled model; it is copied.
      extra: as for `ModelEngine`.
      device: an NVIDIA GPU; "cpu" is there for tests and slow.
      max_contacts: contacts that there is memory for, of one robot on average; by default see above.
      max_constraints: rows of constraints that there is memory for, of each robot.

    Raises:
      InputError: if MuJoCo Warp cannot run the model, and as from `ModelEngine`.
    """

    def __init__(
        self,
        model: mujoco.MjModel,
        extra: Sequence[str] = (),
        device: torch.device | str = "cuda",
        max_contacts: int | None = None,
        max_constraints: int | None = None,
    ):
        super().__init__(model, extra)
        warp.config.log_level = warp.LOG_WARNING  # it tells of each kernel that it loads
        warp.init()
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._warp_device = warp.device_from_torch(self.device)
        self._bare = mujoco.MjModel.__copy__(self.mjmodel)
        self._bare.opt.disableflags &= ~_UNKNOWN_FLAGS
        try:
            with warp.ScopedDevice(self._warp_device):
                self._nominal = mujoco_warp.put_model(self._bare)
        except (NotImplementedError, ValueError) as error:
            raise InputError(f"MuJoCo Warp cannot run this model: {' '.join(str(error).split())}") from error
        options = self._nominal.opt
        options.warn_overflow = 0  # it would print a line for each robot and step; `fault` tells
        # A loop inside of a graph costs more than the few iterations that it could save.
        options.graph_conditional = options.iterations > 8 and self.device.type == "cuda"
        options.run_rne_postconstraint = "cfrc_ext" in self.extra
        settable = {name: shape for name, shape in self._field_shapes.items() if _batched_array(self._nominal, name)}
        self._field_shapes = settable
        self.field_ranks = {name: len(shape) for name, shape in settable.items()}
        contacts, constraints = _memory(self._bare, self._nominal)
        self.max_contacts = contacts if max_contacts is None else max_contacts
        self.max_constraints = constraints if max_constraints is None else max_constraints
        self._buffers: OrderedDict[int, _Buffers] = OrderedDict()
        self._log: _Log | None = None
        self._overflow = torch.zeros((), dtype=torch.bool, device=self.device)

    def _check_fields(self, params: PhysicsParams, lead: Sequence[int]) -> None:
        for name in params:
            if name not in self._field_shapes:
                model_field(self.mjmodel, name)  # tells what is wrong with it, if MuJoCo itself has it not
                raise InputError(f"model field {name!r} cannot differ between robots on MuJoCo Warp")
        super()._check_fields(params, lead)

    def _of_size(self, size: int) -> "_Buffers":
        buffers = self._buffers.pop(size, None)
        if buffers is None:
            buffers = _Buffers(self, size)
            while len(self._buffers) >= _BATCHES_KEPT:
                self._buffers.popitem(last=False)
        self._buffers[size] = buffers
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
        buffers = self._of_size(rows.qpos.shape[0])
        buffers.write_fields(fields)
        usable = torch.isfinite(ctrl).all(dim=1)
        buffers.write(rows, torch.where(usable.unsqueeze(1), ctrl, 0.0), wrench)
        buffers.run(substeps)
        time = rows.time + substeps * self.model.timestep
        out, sane, overflow = buffers.read(time)
        fault = torch.where(sane, FAULT_NONE, FAULT_UNSTABLE)
        fault = torch.where(usable, fault, FAULT_ACTION)
        fault = torch.where((overflow & _OVERFLOWS) != 0, FAULT_ENGINE, fault)
        bad = fault != FAULT_NONE
        after = Rows(*(_choose(bad, old, new) for old, new in zip(rows, out, strict=True)))
        if not tracing():
            self._overflow |= ((overflow & _SHARED_OVERFLOWS) != 0).any()
            self._keep(fields, rows, ctrl, wrench, substeps, key, fault)
        return after, fault

    def forward_rows(self, fields: PhysicsParams, rows: Rows, mask: Tensor) -> Tensor:
        buffers = self._of_size(rows.qpos.shape[0])
        buffers.write_fields(fields)
        buffers.write(rows, None, None)
        buffers.run(0)
        out, _, overflow = buffers.read(rows.time)
        # A robot whose contacts were too many keeps its old sensor values; its next step reports the fault.
        return _choose(mask & ((overflow & _OVERFLOWS) == 0), out.sensordata, rows.sensordata)

    def jacobian_rows(
        self, fields: PhysicsParams, rows: Rows, ctrl: Tensor, wrench: Tensor | None, substeps: int
    ) -> Tensor:
        raise RuntimeError("MuJoCo Warp has no derivatives here: differentiate on the engine of rlcore.physics.mujoco")

    def tangent_rows(self, qpos: Tensor) -> Tensor:
        raise RuntimeError("MuJoCo Warp has no derivatives here: differentiate on the engine of rlcore.physics.mujoco")

    # --- faults ---------------------------------------------------------------------------------------------

    def _keep(
        self,
        fields: PhysicsParams,
        rows: Rows,
        ctrl: Tensor,
        wrench: Tensor | None,
        substeps: int,
        key: Tensor | None,
        fault: Tensor,
    ) -> None:
        """Copy the first robots that fail into a log on the device, without asking whether there are any."""
        parts = {**rows._asdict(), "ctrl": ctrl}
        if wrench is not None:
            parts["wrench"] = wrench.flatten(1)
        if key is not None:
            parts["key"] = key  # its words have 32 bits, which float64 holds
        widths = {name: 1 if part.ndim == 1 else part.shape[1] for name, part in parts.items()}
        log = self._log
        if log is None or not log.fits(widths, substeps, fields):
            self._tell_log()
            log = self._log = _Log(widths, substeps, fields, self.device)
        log.add(list(parts.values()), fault)

    def _tell_log(self) -> None:
        log, self._log = self._log, None
        if log is not None:
            for code, row, arrays in log.read():
                arrays["substeps"] = np.asarray(log.substeps)
                if "wrench" in arrays:
                    arrays["wrench"] = arrays["wrench"].reshape(len(self.model.bodies), 6)
                if "key" in arrays:
                    arrays["key"] = arrays["key"].astype(np.int64)
                arrays["time"] = np.asarray(arrays["time"][0])
                for name, value in log.fields.items():
                    own = value if value.ndim == self.field_ranks[name] else value[row]
                    arrays[f"params.{name}"] = own.cpu().numpy().copy()
                message = FAULT_NAMES[code]
                if code == FAULT_ENGINE:
                    message = "no memory for all contacts and constraints"
                if code == FAULT_ACTION:
                    broken = np.flatnonzero(~np.isfinite(arrays["ctrl"]))
                    message += ": " + ", ".join(self.model.actuators[j] for j in broken)
                record_fault(Fault(code, message, arrays))

    def tell_faults(self) -> None:
        self._tell_log()
        if bool(self._overflow):
            self._overflow.zero_()
            raise EngineFailed(
                f"the memory for contacts, {self.max_contacts} for each robot on average, was too small, and contacts "
                "were left out: give WarpEngine a larger max_contacts"
            )


class _Log:
    """The first robots that failed since somebody asked, on the device."""

    def __init__(self, widths: dict[str, int], substeps: int, fields: PhysicsParams, device: torch.device):
        self.widths, self.substeps, self.fields = widths, substeps, dict(fields)
        # A row for each robot kept, and one for all that are not: its fault, its place in the batch, its numbers.
        width = 2 + sum(widths.values())
        self._rows = torch.zeros((FAULTS_KEPT + 1, width), dtype=torch.float64, device=device)
        self._count = torch.zeros((), dtype=torch.int64, device=device)

    def fits(self, widths: dict[str, int], substeps: int, fields: PhysicsParams) -> bool:
        same = self.fields.keys() == fields.keys() and all(fields[n] is v for n, v in self.fields.items())
        return same and self.widths == widths and self.substeps == substeps

    def add(self, parts: list[Tensor], fault: Tensor) -> None:
        bad = fault != FAULT_NONE
        order = torch.arange(len(fault), device=fault.device)
        columns = [fault.unsqueeze(1), order.unsqueeze(1), *(p.reshape(len(p), -1) for p in parts)]
        numbers = torch.cat([column.to(torch.float64) for column in columns], dim=1)
        place = self._count + torch.cumsum(bad, 0) - 1
        place = torch.where(bad & (place < FAULTS_KEPT), place, FAULTS_KEPT)
        self._rows.index_copy_(0, place, numbers)
        self._count += bad.sum()

    def read(self) -> list[tuple[int, int, dict[str, np.ndarray]]]:
        """For each robot its fault, its place in the batch, and its numbers."""
        count = min(int(self._count), FAULTS_KEPT)
        found = []
        for row in self._rows[:count].cpu().numpy():
            edges = np.cumsum([0, *self.widths.values()]) + 2
            arrays = {name: row[a:b].copy() for name, a, b in zip(self.widths, edges[:-1], edges[1:], strict=True)}
            found.append((int(row[0]), int(row[1]), arrays))
        return found


@dataclass
class _Shared:
    """An array of Warp's and the same memory as torch sees it."""

    array: Any
    tensor: Tensor

    @classmethod
    def of(cls, array: Any, device: torch.device) -> "_Shared":
        if array.size == 0:
            return cls(array, torch.zeros(array.shape, dtype=torch.float32, device=device))
        return cls(array, warp.to_torch(array))


class _Buffers:
    """The memory of one batch size, and the graphs that run on it."""

    def __init__(self, engine: WarpEngine, size: int):
        self.size, self.device, self.warp_device = size, engine.device, engine._warp_device
        self.mjmodel = engine.mjmodel
        with warp.ScopedDevice(self.warp_device):
            self.data = mujoco_warp.make_data(
                engine._bare, nworld=size, nconmax=engine.max_contacts, njmax=engine.max_constraints
            )
        # Fields of its own may come into it later.
        self.model = copy.copy(engine._nominal)
        self.model.opt = copy.copy(engine._nominal.opt)
        shared = lambda name: _Shared.of(getattr(self.data, name), self.device).tensor  # noqa: E731
        self.time, self.qpos, self.qvel, self.act = (shared(n) for n in ("time", "qpos", "qvel", "act"))
        self.warmstart, self.ctrl, self.sensordata = (shared(n) for n in ("qacc_warmstart", "ctrl", "sensordata"))
        self.wrench, self.overflow = shared("xfrc_applied"), shared("overflow")
        self.extra = [shared(name) for name in engine.extra]
        self.graphs: dict[int, Any] = {}
        self.ran: set[int] = set()
        self.pushed = False
        self.fields: dict[str, Tensor] = {}
        self.seen: dict[str, tuple[Tensor, int] | None] = {}

    def write(self, rows: Rows, ctrl: Tensor | None, wrench: Tensor | None) -> None:
        self.time.copy_(rows.time)
        self.qpos.copy_(rows.qpos)
        self.qvel.copy_(rows.qvel)
        self.act.copy_(rows.act)
        self.warmstart.copy_(rows.warmstart)
        if ctrl is None:
            self.ctrl.zero_()
        else:
            self.ctrl.copy_(ctrl)
        if wrench is not None:
            self.wrench.copy_(wrench)
            self.pushed = True
        elif self.pushed:
            self.wrench.zero_()
            self.pushed = False

    def run(self, substeps: int) -> None:
        """Take that many physics steps; with 0 evaluate the dynamics only, for the sensors."""
        self.overflow.zero_()
        if self.device.type != "cuda":
            with warp.ScopedDevice(self.warp_device):
                self._launch(substeps)
            return
        stream = warp.stream_from_torch(torch.cuda.current_stream(self.device))
        if substeps in self.graphs:
            warp.capture_launch(self.graphs[substeps], stream=stream)
        elif substeps not in self.ran:
            # Once as it is, which compiles and loads the kernels.
            self.ran.add(substeps)
            with warp.ScopedStream(stream):
                self._launch(substeps)
        else:
            side = torch.cuda.Stream(self.device)
            side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(side), warp.ScopedStream(warp.stream_from_torch(side)) as capturing:
                with warp.ScopedCapture(stream=warp.get_stream(self.warp_device)) as capture:
                    self._launch(substeps)
                del capturing
            torch.cuda.current_stream(self.device).wait_stream(side)
            self.graphs[substeps] = capture.graph
            warp.capture_launch(capture.graph, stream=stream)

    def _launch(self, substeps: int) -> None:
        if substeps == 0:
            mujoco_warp.forward(self.model, self.data)
        for _ in range(substeps):
            mujoco_warp.step(self.model, self.data)

    def read(self, time: Tensor) -> tuple[Rows, Tensor, Tensor]:
        """The rows, in new memory; whether each is finite and within bounds; and what overflowed in each."""
        motion = torch.cat([self.qpos, self.qvel], dim=1)
        # One comparison finds NaN, infinity and explosion alike, since NaN compares false.
        sane = motion.abs().amax(dim=1) < STATE_LIMIT
        wide = motion.to(torch.float64)
        qpos, qvel = wide.split([self.qpos.shape[1], self.qvel.shape[1]], dim=1)
        sensors = torch.cat([self.sensordata, *(x.reshape(self.size, -1) for x in self.extra)], dim=1)
        rows = Rows(
            time, qpos, qvel, self.act.to(torch.float64), self.warmstart.to(torch.float64), sensors.to(torch.float64)
        )
        return rows, sane, self.overflow

    def write_fields(self, fields: PhysicsParams) -> None:
        """Make every robot's model fields those asked for: nominal where none is."""
        if not fields and not self.fields:
            return
        if fields.keys() == self.seen.keys() and all(same_memory(fields[n], self.seen[n]) for n in fields):
            return
        changed = False
        for name in [*fields, *(n for n in self.fields if n not in fields)]:
            if name not in self.fields:
                self._expand(name)
            rows = self.fields[name]
            wanted = fields[name] if name in fields else torch.as_tensor(model_field(self.mjmodel, name).copy())
            wanted = wanted.to(device=self.device, dtype=torch.float32)
            if name == "opt.impratio":
                wanted = wanted.clamp(min=float(mujoco.mjMINVAL)).rsqrt()
            # Fields change rarely: here, and nowhere else, the processor waits for the GPU.
            if bool((rows != wanted).any()):
                rows.copy_(wanted.expand_as(rows))
                changed |= feeds_constants(name)
        if changed:
            for name in _DERIVED:
                if name not in self.fields:
                    self._expand(name, derived=True)
            self._derive()
        self.seen = {n: None if field.is_inference() else (field, field._version) for n, field in fields.items()}

    def _expand(self, name: str, derived: bool = False) -> None:
        """Give each robot a value of its own. What was captured on the shared one is of no use then."""
        owner, attribute = _place(self.model, name)
        array = getattr(owner, attribute)
        if array.size and array.shape[0] != self.size:
            with warp.ScopedDevice(self.warp_device):
                many = warp.empty((self.size, *array.shape[1:]), dtype=array.dtype)
            target, source = warp.to_torch(many), warp.to_torch(array)
            target.copy_(source.expand_as(target))
            setattr(many, "_is_batched", True)  # noqa: B010
            setattr(owner, attribute, many)
            array = many
        if not derived:
            self.fields[name] = _Shared.of(array, self.device).tensor
        self.graphs.clear()

    def _derive(self) -> None:
        """Compute the constants that MuJoCo derives from the fields."""
        if self.device.type != "cuda":
            with warp.ScopedDevice(self.warp_device):
                mujoco_warp.set_const(self.model, self.data, restore=False)
            return
        with warp.ScopedStream(warp.stream_from_torch(torch.cuda.current_stream(self.device))):
            mujoco_warp.set_const(self.model, self.data, restore=False)


def _place(model: Any, name: str) -> tuple[Any, str]:
    """Where MuJoCo Warp keeps a model field: the object and its attribute."""
    if name == "opt.impratio":
        return model.opt, "impratio_invsqrt"
    return (model.opt, name[4:]) if name.startswith("opt.") else (model, name)


def _batched_array(model: Any, name: str) -> bool:
    """Whether the field may differ between robots."""
    owner, attribute = _place(model, name)
    array = getattr(owner, attribute, None)
    spec = type(owner).__dataclass_fields__.get(attribute)
    shape: Any = getattr(spec.type, "shape", ()) if spec is not None else ()
    return isinstance(array, warp.array) and tuple(shape[:1]) == ("*",)


def _memory(model: mujoco.MjModel, put: Any) -> tuple[int, int]:
    """Contacts, on average over robots, and rows of constraints of a robot that there should be memory for."""
    kinds = [mujoco.mjtGeom(int(kind)).name.removeprefix("mjGEOM_") for kind in model.geom_type]
    pairs = np.asarray(put.nxn_geom_pair_filtered.numpy()).reshape(-1, 2)
    contacts = 0
    for a, b in pairs:
        kind = kinds[a], kinds[b]
        contacts += _CONTACTS.get(kind, _CONTACTS.get(kind[::-1], 8))
    certain = contacts <= _MOST_CERTAIN_CONTACTS
    if not certain:
        contacts = _MOST_CERTAIN_CONTACTS
    condim = max([1, *model.geom_condim.tolist(), *model.pair_dim.tolist()])
    pyramidal = int(model.opt.cone) == int(mujoco.mjtCone.mjCONE_PYRAMIDAL)
    rows_of_contact = 2 * (condim - 1) if pyramidal and condim > 1 else condim
    limits = int(model.jnt_limited.sum()) + 2 * int(model.tendon_limited.sum())
    friction = int((model.dof_frictionloss > 0).sum()) + int((model.tendon_frictionloss > 0).sum())
    rows = contacts * rows_of_contact + limits + friction + 7 * model.neq
    return max(contacts, 1), max(rows, 1)


def _choose(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(condition.reshape(-1, *(1,) * (a.ndim - 1)), a, b)
