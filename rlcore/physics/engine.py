"""Physics as one operation on tensors.

`Engine.step(params, state, ctrl)` is a pure function: what it needs comes in as tensors and what it made goes
out as tensors. It is written for one robot; `torch.func.vmap` turns the mapped axis into the engine's own
batch axis, in any nesting. `grad`, `vjp` and `jacrev` go through it by a finite-difference linearization that
runs on the same thread pool. This file holds the contract and the operations; it knows no particular engine:
each one lives in a file beside it and registers itself under a handle.

The state that goes in is authoritative. An engine may keep buffers, but nothing in them outlives a call in a
way that a caller could see.
"""

import difflib
import itertools
import math
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from rlcore.errors import InputError
from rlcore.jit import DIRECT, HOST, tracing
from rlcore.tree import pytree, replace
from rlcore.wall_time import PHYSICS, timed

# What can be wrong with a step, as `PhysicsState.fault` tells it.
FAULT_NONE, FAULT_ENGINE, FAULT_UNSTABLE, FAULT_ACTION = 0, 1, 2, 3
FAULT_NAMES = ("none", "engine error", "unstable", "action not finite")


@pytree
class PhysicsState:
    """One robot's mechanical state, in the engine's own dtype (float64 on MuJoCo).

    Attributes:
      time: `[]` s.
      qpos: `[nq]` generalized positions; a free joint is world position (m), then quaternion w x y z.
      qvel: `[nv]` generalized velocities; a free joint is linear velocity in the world frame (m/s), then
        angular velocity in the body frame (rad/s).
      act: `[na]` actuator activations.
      warmstart: `[nv]` the solver's warm start; with it, stepping from a saved state is exact.
      sensordata: `[nsensor]` the model's sensors: one physics substep old after `step`, current after
        `forward`.
      fault: `[]` int64, one of the `FAULT_*` codes. Where it is not 0 the other leaves are those from before
        the step, so that rewards and observations computed from them stay finite.
    """

    time: Tensor
    qpos: Tensor
    qvel: Tensor
    act: Tensor
    warmstart: Tensor
    sensordata: Tensor
    fault: Tensor


PhysicsParams = dict[str, Tensor]
"""Model fields by name (`body_mass`, `geom_friction`, `opt.gravity`, ...) that replace the nominal ones."""


class Joint(NamedTuple):
    """Where a joint lives: slices of qpos and qvel, its limits in rad or m (infinite where it has none)."""

    name: str
    kind: str
    qpos: slice
    qvel: slice
    lower: float
    upper: float


@dataclass(frozen=True)
class ModelInfo:
    """A model by its names, the same whichever engine runs it.

    Attributes:
      nq, nv, na, nu, nsensor: sizes of qpos, qvel, act, ctrl, sensordata.
      timestep: physics substep, s.
      bodies: body names, in the order of the rows of per-body fields such as `body_mass`.
      geoms: geom names, in the order of the rows of per-geom fields.
      joints: every joint, in order.
      actuators: actuator names, in the order of ctrl.
      actuator_joints: the joint that each actuator drives ("" where it drives something else).
      ctrl_lower, ctrl_upper: control range of each actuator, infinite where it has none.
      sensors: sensor name to its slice of sensordata.
      keyframes: name to (qpos, ctrl).
    """

    nq: int
    nv: int
    na: int
    nu: int
    nsensor: int
    timestep: float
    bodies: tuple[str, ...]
    geoms: tuple[str, ...]
    joints: tuple[Joint, ...]
    actuators: tuple[str, ...]
    actuator_joints: tuple[str, ...]
    ctrl_lower: tuple[float, ...]
    ctrl_upper: tuple[float, ...]
    sensors: dict[str, slice]
    keyframes: dict[str, tuple[tuple[float, ...], tuple[float, ...]]]

    def sensor(self, name: str) -> slice:
        """The slice of sensordata that the sensor `name` fills.

        Raises:
          InputError: if the model has no sensor of that name.
        """
        return self.sensors[_known("sensor", name, self.sensors)]

    def body(self, name: str) -> int:
        """The row of body `name` in per-body fields and wrenches. Raises InputError for an unknown name."""
        return self.bodies.index(_known("body", name, self.bodies))

    def geom(self, name: str) -> int:
        """The row of geom `name` in per-geom fields. Raises InputError for an unknown name."""
        return self.geoms.index(_known("geom", name, self.geoms))

    def joint(self, name: str) -> Joint:
        """The joint `name`. Raises InputError for an unknown name."""
        names = tuple(joint.name for joint in self.joints)
        return self.joints[names.index(_known("joint", name, names))]

    def actuator(self, name: str) -> int:
        """The place of actuator `name` in ctrl. Raises InputError for an unknown name."""
        return self.actuators.index(_known("actuator", name, self.actuators))

    def keyframe(self, name: str) -> tuple[Tensor, Tensor]:
        """Keyframe `name` as float64 (qpos `[nq]`, ctrl `[nu]`). Raises InputError for an unknown name."""
        qpos, ctrl = self.keyframes[_known("keyframe", name, self.keyframes)]
        return torch.tensor(qpos, dtype=torch.float64), torch.tensor(ctrl, dtype=torch.float64)

    def actuated(self) -> tuple[slice | list[int], slice | list[int]]:
        """Where the actuated joints' positions and velocities are, in the order of the actuators.

        Returns:
          Two indices, into qpos and qvel: slices where the places are contiguous (a slice costs no copy).

        Raises:
          InputError: if an actuator drives no hinge or slide joint.
        """
        qpos, qvel = [], []
        for actuator, name in zip(self.actuators, self.actuator_joints, strict=True):
            joint = next((j for j in self.joints if j.name == name), None) if name else None
            if joint is None or joint.kind not in ("hinge", "slide"):
                raise InputError(f"actuator {actuator!r} drives no hinge or slide joint")
            qpos.append(joint.qpos.start)
            qvel.append(joint.qvel.start)
        return _as_slice(qpos), _as_slice(qvel)


def _as_slice(places: list[int]) -> slice | list[int]:
    contiguous = bool(places) and places == list(range(places[0], places[0] + len(places)))
    return slice(places[0], places[0] + len(places)) if contiguous else places


def _known(kind: str, name: str, names: Iterable[str]) -> str:
    names = list(names)
    if name in names:
        return name
    close = difflib.get_close_matches(name, names, n=3) or [n for n in names if n][:8]
    raise InputError(f"the model has no {kind} {name!r}; near it are: {', '.join(close) or 'none'}")


@runtime_checkable
class Engine(Protocol):
    """What every physics engine offers. All methods are pure, for one robot, and pass through vmap."""

    model: ModelInfo
    handle: int

    def step(
        self,
        params: PhysicsParams,
        state: PhysicsState,
        ctrl: Tensor,
        wrench: Tensor | None = None,
        *,
        substeps: int,
        key: Tensor | None = None,
    ) -> PhysicsState:
        """Advance by `substeps` physics steps under constant `ctrl` `[nu]` and `wrench` `[nbody, 6]`."""
        ...

    def forward(self, params: PhysicsParams, state: PhysicsState, mask: Tensor | None = None) -> PhysicsState:
        """Recompute the sensors of a state just written, where `mask` `[]` is true (None: everywhere)."""
        ...


class Fault(NamedTuple):
    """A step that failed, with all that is needed to run it again.

    Attributes:
      code: one of the `FAULT_*` codes.
      message: what went wrong, in one line.
      arrays: one robot's time, qpos, qvel, act, warmstart, sensordata, ctrl and substeps; where they were
        given, wrench, key and each model field as `params.NAME`.
    """

    code: int
    message: str
    arrays: dict[str, np.ndarray]


_engines: "weakref.WeakValueDictionary[int, BatchEngine]" = weakref.WeakValueDictionary()
_faults: list[Fault] = []
FAULTS_KEPT = 16


def record_fault(fault: Fault) -> None:
    """Keep a fault for whoever asks next. Only the first few between two drains are kept; all are counted."""
    if len(_faults) < FAULTS_KEPT and not tracing():
        _faults.append(fault)


def drain_faults() -> list[Fault]:
    """The faults recorded since the last call. A log: no result of a step depends on it.

    Raises:
      RuntimeError: if an engine has found since then that its results are not to be trusted.
    """
    for engine in list(_engines.values()):
        engine.tell_faults()
    faults, _faults[:] = list(_faults), []
    return faults


class Rows(NamedTuple):
    """A batch of robots as plain `[N, ...]` tensors, the form in which an engine gets its work."""

    time: Tensor
    qpos: Tensor
    qvel: Tensor
    act: Tensor
    warmstart: Tensor
    sensordata: Tensor


class BatchEngine:
    """Base of engines that run `[N, ...]` rows: turns the row functions below into the Engine contract.

    Attributes:
      model: the model by its names.
      handle: what the operations know the engine by.
      dtype: of every state that the engine takes and gives.
      device: where states are.
      field_ranks: number of axes of each model field of one robot, by name.
    """

    model: ModelInfo
    field_ranks: Mapping[str, int]
    dtype: torch.dtype = torch.float64
    device: torch.device = torch.device("cpu")

    # Handles count up for the life of the process, so that a traced graph never meets another engine.
    _count: ClassVar[Iterator[int]] = itertools.count(1)

    def __init__(self) -> None:
        self.handle: int = next(self._count)
        _engines[self.handle] = self

    # --- what an engine implements --------------------------------------------------------------------------

    def step_rows(
        self,
        fields: PhysicsParams,
        rows: Rows,
        ctrl: Tensor,
        wrench: Tensor | None,
        substeps: int,
        key: Tensor | None,
    ) -> tuple[Rows, Tensor]:
        """Step N robots; fields are `[N, ...]`, or `[...]` where all share them.

        Returns:
          The rows after the step (those of failed robots as they were), and fault codes `[N]` int64.
        """
        raise NotImplementedError

    def forward_rows(self, fields: PhysicsParams, rows: Rows, mask: Tensor) -> Tensor:
        """sensordata `[N, nsensor]` of the rows where mask `[N]`; the rows' own elsewhere."""
        raise NotImplementedError

    def jacobian_rows(
        self, fields: PhysicsParams, rows: Rows, ctrl: Tensor, wrench: Tensor | None, substeps: int
    ) -> Tensor:
        """d(qpos, qvel, act, sensordata) / d(qpos tangent, qvel, act, ctrl, wrench): `[N, outputs, inputs]`.

        Zero for a robot whose step fails.
        """
        raise NotImplementedError

    def tangent_rows(self, qpos: Tensor) -> Tensor:
        """The map from a gradient in the tangent space at qpos `[N, nq]` to one in qpos: `[N, nq, nv]`."""
        raise NotImplementedError

    def tell_faults(self) -> None:
        """Hand over to `record_fault` what the engine has kept on its device until somebody asks."""

    # --- the contract ---------------------------------------------------------------------------------------

    def nominal(self, *names: str) -> PhysicsParams:
        """The model's own values of some fields, as float64 tensors: where randomization starts from.

        Raises:
          InputError: for a field that cannot differ between robots.
        """
        raise NotImplementedError

    def initial(self, qpos: Tensor, qvel: Tensor) -> PhysicsState:
        """A state at time 0 from positions `[nq]` and velocities `[nv]`; sensordata is zero until `forward`.

        Raises:
          InputError: for positions or velocities of a wrong size.
        """
        m = self.model
        if qpos.shape[-1:] != (m.nq,) or qvel.shape != (*qpos.shape[:-1], m.nv):
            shapes = f"{tuple(qpos.shape)} and {tuple(qvel.shape)}"
            raise InputError(f"qpos and qvel must have shapes ({m.nq},) and ({m.nv},), got {shapes}")
        qpos, qvel = qpos.to(self.dtype), qvel.to(self.dtype)
        zeros = lambda n: qvel.new_zeros((*qvel.shape[:-1], *n))  # noqa: E731
        return PhysicsState(
            time=zeros(()),
            qpos=qpos,
            qvel=qvel,
            act=zeros((m.na,)),
            warmstart=zeros((m.nv,)),
            sensordata=zeros((m.nsensor,)),
            fault=zeros(()).long(),
        )

    def step(
        self,
        params: PhysicsParams,
        state: PhysicsState,
        ctrl: Tensor,
        wrench: Tensor | None = None,
        *,
        substeps: int,
        key: Tensor | None = None,
    ) -> PhysicsState:
        """Advance one robot by `substeps` physics steps.

        Args:
          params: model fields that replace the nominal ones.
          state: where the robot is.
          ctrl: `[nu]` controls, held constant; a non-finite one is a fault.
          wrench: `[nbody, 6]` force (N) and torque (Nm) at each body's centre of mass, world frame; or None.
          substeps: physics steps to take.
          key: recorded with a fault, so that it can be replayed; it changes nothing.

        Returns:
          The next state. A robot whose step failed keeps its state and tells why in `fault`.

        Raises:
          InputError: for a control, wrench or model field of a wrong shape, a state of another dtype, an
            unknown model field, or fewer than one substep.
          RuntimeError: from a backward pass that asks for the gradient of a model field, or for a second
            derivative.

        Derivatives: with respect to qpos, qvel, act, ctrl and wrench, by central differences of the step in
        the tangent space (quaternions move by rotation vectors), warm start held fixed; zero for a robot
        whose step failed. Model fields have none: detach them.
        """
        m, lead = self.model, state.qpos.shape[:-1]
        if substeps < 1:
            raise InputError(f"substeps must be at least 1, got {substeps}")
        if state.qpos.dtype != self.dtype:
            raise InputError(f"the state must be {self.dtype}, got {state.qpos.dtype}")
        if ctrl.shape != (*lead, m.nu):
            known = ", ".join(m.actuators[:4]) + (", ..." if m.nu > 4 else "")
            raise InputError(f"ctrl must have shape {(*lead, m.nu)} ({known}), got {tuple(ctrl.shape)}")
        if wrench is not None and wrench.shape != (*lead, len(m.bodies), 6):
            raise InputError(
                f"wrench must have shape {(*lead, len(m.bodies), 6)}, a row for each body, got {tuple(wrench.shape)}"
            )
        names, fields = ",".join(params), list(params.values())
        self._check_fields(params, lead)
        # Dynamo cannot trace the Function's variable number of fields. The bare operation raises when
        # something compiled asks for its gradient, so no gradient is lost silently.
        apply = _Step.forward if torch.compiler.is_compiling() else _Step.apply
        out = apply(
            self.handle,
            substeps,
            names,
            key,
            wrench,
            ctrl.to(state.qpos.dtype),
            state.time,
            state.qpos,
            state.qvel,
            state.act,
            state.warmstart,
            state.sensordata,
            *fields,
        )
        return PhysicsState(*out)

    def forward(self, params: PhysicsParams, state: PhysicsState, mask: Tensor | None = None) -> PhysicsState:
        """Recompute the sensors for a state that was just written, where `mask` is true.

        Under vmap only the masked rows are computed: resetting three of 4096 robots costs three.

        Raises:
          InputError: for an unknown model field or one of a wrong shape.

        The new sensordata has no derivative; the other leaves are passed on with theirs.
        """
        if mask is None:
            mask = torch.ones_like(state.time, dtype=torch.bool)
        self._check_fields(params, state.qpos.shape[:-1])
        sensordata = torch.ops.rlcore.physics_forward(
            self.handle,
            ",".join(params),
            list(params.values()),
            mask,
            state.time.detach(),
            state.qpos.detach(),
            state.qvel.detach(),
            state.act.detach(),
            state.warmstart.detach(),
            state.sensordata.detach(),
        )
        return replace(state, sensordata=sensordata, fault=torch.zeros_like(state.fault))

    def _check_fields(self, params: PhysicsParams, lead: Sequence[int]) -> None:
        """Raise InputError for a field that is unknown, or neither `[*core]` nor `[*lead, *core]`."""
        raise NotImplementedError


# --- the operations -----------------------------------------------------------------------------------------
#
# Each takes tensors with any leading batch axes. vmap adds one more in front, so nesting needs no special
# care; the implementation flattens the axes into rows.


def _engine(handle: int) -> BatchEngine:
    engine = _engines.get(handle)
    if engine is None:
        raise RuntimeError("the physics engine of this operation no longer exists; keep the engine alive")
    return engine


def _flatten(tensor: Tensor, core: int) -> Tensor:
    """`[*batch, *core]` to `[N, *core]`."""
    lead = tensor.shape[: tensor.ndim - core]
    return tensor.detach().reshape(math.prod(lead), *tensor.shape[tensor.ndim - core :])


def _flatten_field(field: Tensor, core: int) -> Tensor:
    """A model field as `[N, *core]`, or `[*core]` where all rows share one value."""
    lead = field.ndim - core
    if all(field.stride(i) == 0 or field.shape[i] == 1 for i in range(lead)):
        return field.detach()[(0,) * lead]
    return _flatten(field, core)


def _timed(tensor: Tensor) -> AbstractContextManager[None]:
    """Time an engine that has done its work when it returns; one on a GPU has only begun."""
    return timed(PHYSICS) if tensor.is_cpu else nullcontext()


def _rows(engine: BatchEngine, tensors: Sequence[Tensor]) -> Rows:
    return Rows(*(_flatten(t, 0 if i == 0 else 1) for i, t in enumerate(tensors)))


def _physics_step_rows(
    handle: int,
    substeps: int,
    names: str,
    fields: Sequence[Tensor],
    key: Tensor | None,
    wrench: Tensor | None,
    ctrl: Tensor,
    time: Tensor,
    qpos: Tensor,
    qvel: Tensor,
    act: Tensor,
    warmstart: Tensor,
    sensordata: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    engine, lead = _engine(handle), qpos.shape[:-1]
    with _timed(qpos):
        out, fault = engine.step_rows(
            _named_fields(engine, names, fields),
            _rows(engine, (time, qpos, qvel, act, warmstart, sensordata)),
            _flatten(ctrl, 1),
            None if wrench is None else _flatten(wrench, 2),
            substeps,
            None if key is None else _flatten(key, 1),
        )
    return (
        out.time.reshape(lead),
        out.qpos.reshape(qpos.shape),
        out.qvel.reshape(qvel.shape),
        out.act.reshape(act.shape),
        out.warmstart.reshape(warmstart.shape),
        out.sensordata.reshape(sensordata.shape),
        fault.reshape(lead),
    )


_physics_step = torch.library.custom_op("rlcore::physics_step", _physics_step_rows, mutates_args=())
DIRECT[torch.ops.rlcore.physics_step.default] = _physics_step_rows
HOST[torch.ops.rlcore.physics_step.default] = _physics_step_rows


@_physics_step.register_fake
def _(handle, substeps, names, fields, key, wrench, ctrl, time, qpos, qvel, act, warmstart, sensordata):  # type: ignore[no-untyped-def]
    empty = torch.empty_like
    return (
        torch.empty_like(time, memory_format=torch.contiguous_format),
        *(empty(t, memory_format=torch.contiguous_format) for t in (qpos, qvel, act, warmstart, sensordata)),
        torch.empty_like(time, dtype=torch.int64, memory_format=torch.contiguous_format),
    )


def _physics_forward_rows(
    handle: int,
    names: str,
    fields: Sequence[Tensor],
    mask: Tensor,
    time: Tensor,
    qpos: Tensor,
    qvel: Tensor,
    act: Tensor,
    warmstart: Tensor,
    sensordata: Tensor,
) -> Tensor:
    engine = _engine(handle)
    rows = _rows(engine, (time, qpos, qvel, act, warmstart, sensordata))
    with _timed(qpos):
        out = engine.forward_rows(_named_fields(engine, names, fields), rows, _flatten(mask, 0))
    return out.reshape(sensordata.shape)


_physics_forward = torch.library.custom_op("rlcore::physics_forward", _physics_forward_rows, mutates_args=())
DIRECT[torch.ops.rlcore.physics_forward.default] = _physics_forward_rows
HOST[torch.ops.rlcore.physics_forward.default] = _physics_forward_rows


@_physics_forward.register_fake
def _(handle, names, fields, mask, time, qpos, qvel, act, warmstart, sensordata):  # type: ignore[no-untyped-def]
    return torch.empty_like(sensordata, memory_format=torch.contiguous_format)


@torch.library.custom_op("rlcore::physics_jacobian", mutates_args=())
def _physics_jacobian(
    handle: int,
    substeps: int,
    names: str,
    fields: Sequence[Tensor],
    wrench: Tensor | None,
    ctrl: Tensor,
    time: Tensor,
    qpos: Tensor,
    qvel: Tensor,
    act: Tensor,
    warmstart: Tensor,
    sensordata: Tensor,
) -> tuple[Tensor, Tensor]:
    engine, lead = _engine(handle), qpos.shape[:-1]
    jacobian = engine.jacobian_rows(
        _named_fields(engine, names, fields),
        _rows(engine, (time, qpos, qvel, act, warmstart, sensordata)),
        _flatten(ctrl, 1),
        None if wrench is None else _flatten(wrench, 2),
        substeps,
    )
    tangent = engine.tangent_rows(_flatten(qpos, 1))
    return jacobian.reshape(lead + jacobian.shape[1:]), tangent.reshape(lead + tangent.shape[1:])


@_physics_jacobian.register_fake
def _(handle, substeps, names, fields, wrench, ctrl, time, qpos, qvel, act, warmstart, sensordata):  # type: ignore[no-untyped-def]
    lead = qpos.shape[:-1]
    inputs = 2 * qvel.shape[-1] + act.shape[-1] + ctrl.shape[-1]
    if wrench is not None:
        inputs += wrench.shape[-2] * 6
    outputs = qpos.shape[-1] + qvel.shape[-1] + act.shape[-1] + sensordata.shape[-1]
    return qpos.new_empty((*lead, outputs, inputs)), qpos.new_empty((*lead, qpos.shape[-1], qvel.shape[-1]))


def _named_fields(engine: BatchEngine, names: str, fields: Sequence[Tensor]) -> PhysicsParams:
    if not names:
        return {}
    ranks = engine.field_ranks
    return {n: _flatten_field(f, ranks[n]) for n, f in zip(names.split(","), fields, strict=True)}


def _lift(size: int, dim: int | None, tensor: Tensor) -> Tensor:
    """The mapped axis in front; a shared tensor is expanded, which copies nothing."""
    if dim is None:
        return tensor.unsqueeze(0).expand(size, *tensor.shape)
    return tensor.movedim(dim, 0)


def _vmap_rule(op: Any, outputs: int) -> Any:
    """One rule for all three operations: every tensor gets the mapped axis in front."""

    def rule(info, in_dims, *args):  # type: ignore[no-untyped-def]
        lifted: list[Any] = []
        for arg, dim in zip(args, in_dims, strict=True):
            if isinstance(arg, Tensor):
                lifted.append(_lift(info.batch_size, dim, arg))
            elif isinstance(arg, (list, tuple)):
                dims = dim if isinstance(dim, (list, tuple)) else [dim] * len(arg)
                lifted.append([_lift(info.batch_size, d, a) for a, d in zip(arg, dims, strict=True)])
            else:
                lifted.append(arg)
        return op(*lifted), (0 if outputs == 1 else (0,) * outputs)

    return rule


_physics_step.register_vmap(_vmap_rule(_physics_step, 7))
_physics_forward.register_vmap(_vmap_rule(_physics_forward, 1))
_physics_jacobian.register_vmap(_vmap_rule(_physics_jacobian, 2))


class _Step(torch.autograd.Function):
    """The step with its derivative.

    `custom_op.register_autograd` does not work under `torch.func.grad`; an autograd.Function with a separate
    `setup_context` and a generated vmap rule does, for `grad`, `vmap(grad)`, `jacrev` and their nestings.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(handle, substeps, names, key, wrench, *tensors):  # type: ignore[no-untyped-def]
        ctrl_and_state, fields = tensors[:7], list(tensors[7:])
        return torch.ops.rlcore.physics_step(handle, substeps, names, fields, key, wrench, *ctrl_and_state)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        handle, substeps, names, _, wrench, *tensors = inputs
        ctx.constants = handle, substeps, names
        ctx.save_for_backward(wrench, *tensors)
        ctx.mark_non_differentiable(output[6])

    @staticmethod
    def backward(ctx, g_time, g_qpos, g_qvel, g_act, g_warmstart, g_sensordata, _):  # type: ignore[no-untyped-def]
        wrench, ctrl, time, qpos, qvel, act, warmstart, sensordata, *fields = ctx.saved_tensors
        if any(ctx.needs_input_grad[12:]):
            raise RuntimeError(
                "the physics step has no derivative with respect to model fields; detach them "
                f"({', '.join(itertools.compress(ctx.constants[2].split(','), ctx.needs_input_grad[12:]))})"
            )
        jacobian, tangent = _Jacobian.apply(
            *ctx.constants, wrench, ctrl, time, qpos, qvel, act, warmstart, sensordata, *fields
        )
        cotangent = torch.cat([g_qpos, g_qvel, g_act, g_sensordata], dim=-1)
        gradient = (cotangent.unsqueeze(-1) * jacobian).sum(-2)
        nv, na, nu = qvel.shape[-1], act.shape[-1], ctrl.shape[-1]
        g_tangent, d_qvel, d_act, d_ctrl, d_wrench = torch.split(
            gradient, [nv, nv, na, nu, gradient.shape[-1] - 2 * nv - na - nu], dim=-1
        )
        d_qpos = (tangent * g_tangent.unsqueeze(-2)).sum(-1)
        g_wrench = None if wrench is None else d_wrench.reshape(wrench.shape)
        # Time only counts; the warm start and the old sensor values do not move the step beyond the solver's
        # tolerance, so their derivative is taken to be zero.
        zeros = torch.zeros_like
        return (
            None,
            None,
            None,
            None,
            g_wrench,
            d_ctrl,
            g_time,
            d_qpos,
            d_qvel,
            d_act,
            zeros(warmstart),
            zeros(sensordata),
            *(zeros(f) for f in fields),
        )


class _Jacobian(torch.autograd.Function):
    """The linearization; functorch differentiates a backward too, so it needs a Function of its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(handle, substeps, names, wrench, ctrl, time, qpos, qvel, act, warmstart, sensordata, *fields):  # type: ignore[no-untyped-def]
        return torch.ops.rlcore.physics_jacobian(
            handle, substeps, names, list(fields), wrench, ctrl, time, qpos, qvel, act, warmstart, sensordata
        )

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        pass

    @staticmethod
    def backward(ctx, *_):  # type: ignore[no-untyped-def]
        raise RuntimeError("the physics step has first derivatives only; second derivatives are not available")
