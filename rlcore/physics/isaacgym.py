"""Isaac Gym as an engine, in a process of its own.

Isaac Gym needs a Python of 3.8 at the latest, so `rlcore.physics.isaacgym_server` runs in the user's Isaac Gym
interpreter, and this file is its other half. Tensors go through memory that both have mapped, one round trip a control
step. States are double precision here and single there. With Isaac Gym's CPU pipeline, tensors are in the CPU's memory,
wherever physics run; with its GPU pipeline they stay on the GPU, and what the engine computes with them is computed
there. MuJoCo, which gives the sensors of a state just written, is on the CPU either way.

A step is a function of its arguments, as with every engine: the rows of a batch that differ from what the simulator
returned last are written before it steps. An ordinary step writes none. What PhysX keeps beyond positions and
velocities, such as its cache of contacts, cannot be written: a robot put back to a state goes on nearly, not exactly,
as before. Where model fields differ that Isaac Gym takes only before it starts, the simulator is started again.

Sensors after a step are of its end, not one substep older, but for accelerations and forces, which are of the last
substep. Those of a state just written come from MuJoCo, forces of contacts included, since Isaac Gym computes nothing
before it simulates.
"""

import contextlib
import json
import mmap
import os
import re
import select
import signal
import socket
import struct
import subprocess
import tempfile
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import torch
from torch import Tensor

from rlcore.errors import EngineFailed, InputError
from rlcore.jit import one_thread
from rlcore.physics import isaacgym_model as layout
from rlcore.physics import isaacgym_sensors as sensing
from rlcore.physics.engine import FAULT_ACTION, FAULT_NONE, FAULT_UNSTABLE, PhysicsParams, Rows
from rlcore.physics.isaacgym_server import CudaMemory, Refused
from rlcore.physics.isaacgym_settings import Settings, find_python
from rlcore.physics.mujoco import STATE_LIMIT, ModelEngine, MujocoEngine, model_field, same_memory
from rlcore.tree import where

PROTOCOL = 2
SERVER = Path(__file__).with_name("isaacgym_server.py")

# Simulators of this many batch sizes are kept; each is a process.
_SERVERS_KEPT = 3
_LENGTH = struct.Struct("<I")
# Isaac Gym has room for 64,000 materials; friction is rounded so that far fewer are asked for.
_FRICTION_STEP = 1e-3
# Characters of the server's output that an error message shows.
_LAST_WORDS = 300
# Bytes of that output which are read for them: white space is told as one space.
_LAST_BYTES = 4096
# Contacts that PhysX gets memory for on a GPU: so many for each shape of each robot, and at least its own default.
_CONTACTS_PER_SHAPE = 64
_LEAST_CONTACTS = 1 << 20
# PhysX leaves out contacts for which it has no memory, and says no more of it than a line that this finds.
_OVERFLOW = re.compile(rb"overflow detected|DynamicsMemoryConfig|will miss interactions", re.IGNORECASE)

# Model fields that may be given, by when Isaac Gym takes them.
_AT_START = ("body_mass", "body_inertia", "body_ipos", "opt.gravity")
_DRIVES = ("dof_damping", "dof_armature", "actuator_gainprm", "actuator_biasprm", "actuator_forcerange")
_FRICTION = ("geom_friction",)


def contact_memory(num_envs: int, shapes: int) -> tuple[int, float]:
    """Memory that PhysX is given for contacts on a GPU.

    Args:
      num_envs: robots.
      shapes: shapes of one robot that may touch something.

    Returns:
      `max_gpu_contact_pairs`: 64 for each shape of each robot, rounded up to a power of two, and at least Isaac Gym's
      own default of 2^20; and `default_buffer_size_multiplier`: 5 where there are shapes, else its default of 2.
    """
    wanted = max(_LEAST_CONTACTS, num_envs * shapes * _CONTACTS_PER_SHAPE)
    return 1 << (wanted - 1).bit_length(), 5.0 if shapes else 2.0


class Server:
    """The process that simulates, and the memory shared with it.

    Neither a port nor a named file is used: the socket and the memory are inherited, and vanish with the last of the
    two processes. The server ends when this process does, however that happens, and when `close` is called or this
    object is collected.

    Args:
      settings: how to run it.
      setup: what to simulate, as `isaacgym_server.Simulation` reads it.

    Raises:
      InputError: if the interpreter cannot run, has no usable Isaac Gym, or Isaac Gym refuses the model.
      RuntimeError: if the server crashes or hangs while it starts.
    """

    def __init__(self, settings: Settings, setup: dict[str, Any]):
        self.settings, self.size, self.contacts = settings, int(setup["num_envs"]), setup["max_gpu_contact_pairs"]
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        ours, theirs = socket.socketpair()
        self.memory = os.memfd_create("rlcore-isaacgym", os.MFD_CLOEXEC)
        lifeline, held = os.pipe()
        inherited = (theirs.fileno(), self.memory, lifeline)
        try:
            # Unbuffered, so that what PhysX prints of a step is in the log when the step is done.
            self.process = subprocess.Popen(
                [settings.python, "-u", str(SERVER), *map(str, inherited), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=subprocess.STDOUT,
                pass_fds=inherited,
                cwd="/",
                # Ctrl-C is for the training, which wants to end its step and save.
                start_new_session=True,
            )
        except OSError as error:
            for descriptor in (self.memory, lifeline, held):
                os.close(descriptor)
            ours.close()
            raise InputError(f"{settings.python!r} cannot be run: {error.strerror} (--isaacgym.python)") from error
        finally:
            theirs.close()
        os.close(lifeline)
        self.channel = ours
        # Memory on the GPU, once there is any: given back when the process that has opened it is gone.
        self._on_gpu: list[CudaMemory] = []
        self._finalizer = weakref.finalize(self, _end, self.process, ours, held, self.memory, self._on_gpu)
        self.tensors: dict[str, Tensor] = {}
        self._log_seen = 0
        self._warned = False
        try:
            answer = self._ask({"protocol": PROTOCOL, **setup}, settings.start_timeout, "starting")
            if answer["protocol"] != PROTOCOL:
                raise InputError(f"the Isaac Gym server speaks version {answer['protocol']}, not {PROTOCOL}")
            self.dofs: list[str] = answer["dofs"]
            self.bodies: list[str] = answer["bodies"]
            if answer["note"]:
                advice = "python -m experiments.verify_isaacgym tells whether bodies turn as they should"
                warnings.warn(f"{answer['note']}; {advice}", RuntimeWarning, stacklevel=2)
            self._share(len(setup["watched"]), len(setup["accelerated"]))
        except BaseException:
            self.close()
            raise

    def _share(self, watched: int, accelerated: int) -> None:
        n, dofs, bodies = self.size, len(self.dofs), len(self.bodies)
        shapes = {
            "rows": (n,),
            "root_in": (n, 13),
            "dof_in": (n, dofs, 2),
            "target": (n, dofs),
            "effort": (n, dofs),
            "force": (n, bodies, 3),
            "torque": (n, bodies, 3),
            "root": (n, 13),
            "dof": (n, dofs, 2),
            "body": (n, watched, 13),
            "contact": (n, watched, 3),
            "before": (n, accelerated, 13),
        }
        places, offset = [], 0
        for name, shape in shapes.items():
            places.append((name, offset, shape, "int32" if name == "rows" else "float32"))
            offset += -(-4 * int(np.prod(shape)) // 64) * 64
        size = max(offset, 64)
        mapping: dict[str, Any] = {"size": size, "places": places}
        with torch.inference_mode(False):  # what is made there could not be written anywhere else
            if self.settings.pipeline == "gpu":
                try:
                    memory = CudaMemory(torch, self.settings.gpu, size)
                except Refused as error:
                    raise InputError(f"{error} (--isaacgym.pipeline)") from None
                self._on_gpu.append(memory)
                mapping["handle"] = memory.handle.hex()
                self.tensors = {name: memory.tensor(start, shape, kind) for name, start, shape, kind in places}
            else:
                os.ftruncate(self.memory, size)
                mapped = mmap.mmap(self.memory, size)  # the arrays keep it
                self.tensors = {
                    name: torch.from_numpy(np.ndarray(shape, kind, buffer=mapped, offset=start))
                    for name, start, shape, kind in places
                }
        self._ask(mapping, self.settings.start_timeout, "mapping memory")

    def step(self, substeps: int, written: int, wrench: bool, simulate: bool = True) -> int:
        """Simulate; returns how many rows were written before. Raises RuntimeError if the server crashes or hangs."""
        for memory in self._on_gpu:
            memory.synchronize()
        message = {"do": "step", "substeps": substeps, "written": written, "wrench": wrench, "simulate": simulate}
        answer = self._ask(message, self.settings.step_timeout, "a step")
        self._look_for_overflow()
        return int(answer["written"])

    def _look_for_overflow(self) -> None:
        """Warn, once, if PhysX has printed since the last look that it leaves out contacts for want of memory."""
        size = os.fstat(self.log.fileno()).st_size
        if size == self._log_seen or self._warned:
            return
        text = os.pread(self.log.fileno(), size - self._log_seen, self._log_seen)
        found = next((line for line in text.splitlines() if _OVERFLOW.search(line)), None)
        # The end of what has been read may be the beginning of a line.
        self._log_seen += text.rfind(b"\n") + 1
        if found is not None:
            self._warned = True
            printed = " ".join(found.decode(errors="replace").split())
            warnings.warn(
                "PhysX leaves out contacts for want of memory on the GPU: give --isaacgym.max-gpu-contacts more than "
                f"{self.contacts} if its line is of contacts, and --isaacgym.spacing more if it is of pairs; "
                f"it printed: {printed}",
                RuntimeWarning,
                stacklevel=2,
            )

    def set_drives(self, drives: dict[str, Any]) -> None:
        """Give the joints other gains, limits and armatures."""
        self._ask({"do": "drives", "drives": drives}, self.settings.start_timeout, "setting drives")

    def set_friction(self, friction: dict[str, Any]) -> None:
        """Give the shapes other friction."""
        self._ask({"do": "friction", "friction": friction}, self.settings.start_timeout, "setting friction")

    def _ask(self, message: dict[str, Any], timeout: float, what: str) -> dict[str, Any]:
        self.channel.settimeout(timeout)
        text = json.dumps(message).encode()
        try:
            # Where it is gone, it may have said why.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.channel.sendall(_LENGTH.pack(len(text)) + text)
            header = self._read(_LENGTH.size)
            answer = json.loads(self._read(_LENGTH.unpack(header)[0]))
        except TimeoutError:
            raise self._hung(timeout, what) from None
        except (EOFError, ConnectionResetError):
            raise self._gone(what) from None
        except BaseException:
            # Interrupted between question and answer: the next answer would be this one's.
            self.close()
            raise
        if "error" in answer:
            words = self.last_words()
            self.close()
            if answer["refused"]:
                raise InputError(f"{answer['error']} (--physics isaacgym with {self.settings.python})")
            raise EngineFailed(f"the Isaac Gym server failed in {what}: {answer['error']}; it printed: {words}")
        return dict(answer)

    def _read(self, size: int) -> bytes:
        parts = b""
        while len(parts) < size:
            part = self.channel.recv(size - len(parts))
            if not part:
                raise EOFError
            parts += part
        return parts

    def _hung(self, timeout: float, what: str) -> EngineFailed:
        self.close()
        flag = "step-timeout" if what == "a step" else "start-timeout"
        return EngineFailed(
            f"the Isaac Gym server did not answer within {timeout:g} s of {what}, and was ended (--isaacgym.{flag})"
        )

    def _gone(self, what: str) -> EngineFailed:
        try:
            how = _how(self.process.wait(10.0))
        except subprocess.TimeoutExpired:
            how = "its talk"
        words = self.last_words()
        self.close()
        printed = f"; it printed last: {words}" if words else ""
        return EngineFailed(f"the Isaac Gym server ended {how} in {what}{printed}")

    def warn_if_ended(self) -> None:
        """Warn if the process has ended by itself since it was last asked for something."""
        if self._finalizer.alive and (code := self.process.poll()) is not None:
            warnings.warn(
                f"the Isaac Gym server had ended {_how(code)} since its last step, and another one is started",
                RuntimeWarning,
                stacklevel=2,
            )

    def last_words(self) -> str:
        """The end of what the server printed, in one line."""
        # Read in place: the server writes where this file's offset is, which both have in common.
        file = self.log.fileno()
        printed = os.pread(file, _LAST_BYTES, max(0, os.fstat(file).st_size - _LAST_BYTES))
        return " ".join(printed.decode(errors="replace").split())[-_LAST_WORDS:]

    @property
    def alive(self) -> bool:
        """Whether it has neither been closed nor ended by itself."""
        return self._finalizer.alive and self.process.poll() is None

    def close(self) -> None:
        """End the process. May be called again."""
        self.tensors.clear()  # their memory on the GPU ends
        self._finalizer()
        self.log.close()


def _how(code: int) -> str:
    """How a process ended."""
    return f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"


def _end(process: "subprocess.Popen[bytes]", channel: socket.socket, held: int, memory: int, on_gpu: list[Any]) -> None:
    channel.close()
    os.close(memory)
    # It ends by itself when the socket closes, unless it hangs.
    descriptor = os.pidfd_open(process.pid) if process.poll() is None else -1
    if descriptor >= 0:
        select.select([descriptor], [], [], 1.0)
        os.close(descriptor)
    if process.poll() is None:
        process.kill()
    process.wait()
    os.close(held)
    for block in on_gpu:
        block.close()


class IsaacGymEngine(ModelEngine):
    """The Engine contract over Isaac Gym.

    Args:
      model: a compiled model, from MJCF, URDF or code alike; it is copied.
      settings: how the simulator runs.
      extra: must be empty: `mjData` has no counterpart there.
      num_threads: PhysX's threads on CPUs; 0 takes every CPU.

    Raises:
      InputError: if no interpreter is named or it is no program; if the model has something that Isaac Gym cannot
        simulate or its tensors do not tell, by its name; and as from `ModelEngine`.
    """

    def __init__(self, model: mujoco.MjModel, settings: Settings, extra: Sequence[str] = (), num_threads: int = 0):
        super().__init__(model)
        if num_threads < 0:
            raise InputError(f"num_threads must be 0 (every CPU) or more, got {num_threads}")
        if extra:
            raise InputError(f"extra fields of mjData cannot be read from Isaac Gym: {', '.join(extra)}")
        self.settings = replace(settings, python=find_python(settings))
        self.num_threads = num_threads or len(os.sched_getaffinity(0))
        self.device = CudaMemory.device(torch, settings.gpu) if settings.pipeline == "gpu" else torch.device("cpu")
        self.description = layout.describe(self.mjmodel)
        self.actuators = layout.actuator_table(self.mjmodel)
        self.sensors = sensing.sensors_of(self.mjmodel)
        self.watched = sensing.watched(self.mjmodel, self.sensors)
        self.accelerated = sensing.accelerated(self.mjmodel, self.sensors)
        self._mujoco = MujocoEngine(model, 1)
        # Made only where it is used: a step of one substep from states that were just written.
        self._kinematics: MujocoEngine | None = None
        settable = {n: s for n, s in self._field_shapes.items() if n in (*_AT_START, *_DRIVES, *_FRICTION)}
        if settings.pipeline == "gpu":
            del settable["body_ipos"]  # Isaac Gym does not support other centres of mass there
        self._field_shapes = settable
        self.field_ranks = {name: len(shape) for name, shape in settable.items()}
        self._simulators: OrderedDict[int, _Simulator] = OrderedDict()
        self._moved: tuple[PhysicsParams, dict[str, tuple[Tensor, int] | None]] = {}, {}

    def _check_fields(self, params: PhysicsParams, lead: Sequence[int]) -> None:
        for name in params:
            if name not in self._field_shapes:
                model_field(self.mjmodel, name)  # tells what is wrong with it, if MuJoCo itself has it not
                known = ", ".join(self._field_shapes)
                raise InputError(f"model field {name!r} cannot differ between robots on Isaac Gym; these can: {known}")
        super()._check_fields(params, lead)

    def simulator(self, size: int, fields: PhysicsParams | None = None) -> "_Simulator":
        """The simulator of that many robots with these model fields, started if need be. Raises as `Server`."""
        found = self._simulators.pop(size, None)
        if found is None or not found.take_fields(fields or {}):
            if found is not None:
                found.server.warn_if_ended()
                found.server.close()
            found = _Simulator(self, size, fields or {})
            while len(self._simulators) >= _SERVERS_KEPT:
                self._simulators.popitem(last=False)[1].server.close()
        self._simulators[size] = found
        return found

    def close(self) -> None:
        """End all simulators; the next step starts them again."""
        while self._simulators:
            self._simulators.popitem()[1].server.close()

    def step_rows(
        self,
        fields: PhysicsParams,
        rows: Rows,
        ctrl: Tensor,
        wrench: Tensor | None,
        substeps: int,
        key: Tensor | None,
    ) -> tuple[Rows, Tensor]:
        rows = Rows(*(part.to(self.device) for part in rows))
        ctrl, wrench = ctrl.to(self.device), None if wrench is None else wrench.to(self.device)
        fields = self._fields_on_cpu(fields)
        simulator = self.simulator(len(rows.qpos), fields)
        usable = torch.isfinite(ctrl).all(dim=1)
        controls = torch.where(usable.unsqueeze(1), ctrl, 0.0)
        # What is no state is not given to the simulator, which might not recover from it.
        sane = _sane(rows.qpos, rows.qvel)
        if wrench is not None:
            finite = torch.isfinite(wrench).flatten(1).all(dim=1)
            wrench_sent = torch.where(finite.reshape(-1, 1, 1), wrench, 0.0)
            sane &= finite
        else:
            wrench_sent = None
        qpos, qvel, sensordata = simulator.step(rows, controls, wrench_sent, substeps, sane)
        fault = torch.where(sane & _sane(qpos, qvel), FAULT_NONE, FAULT_UNSTABLE)
        fault = torch.where(usable, fault, FAULT_ACTION)
        time = rows.time + substeps * self.model.timestep
        out = Rows(time, qpos, qvel, rows.act.clone(), torch.zeros_like(rows.warmstart), sensordata)
        if bool(fault.any()):
            bad = fault != FAULT_NONE
            out = Rows(*(where(bad, before, after) for before, after in zip(rows, out, strict=True)))
            self._record(
                fields,
                Rows(*(part.cpu() for part in rows)),
                ctrl.cpu(),
                None if wrench is None else wrench.cpu(),
                substeps,
                None if key is None else key.cpu(),
                fault.cpu().numpy(),
                {},
            )
        return out, fault

    def forward_rows(self, fields: PhysicsParams, rows: Rows, mask: Tensor) -> Tensor:
        fields = self._fields_on_cpu(fields)
        if self.settings.pipeline == "cpu":
            return self._mujoco.forward_rows(fields, Rows(*(part.cpu() for part in rows)), mask.cpu())
        # Only what is asked for crosses between the two memories.
        out, mask = rows.sensordata.to(self.device, copy=True), mask.cpu()
        chosen = torch.nonzero(mask).squeeze(1)
        if len(chosen):
            places = chosen.to(rows.qpos.device)
            some = Rows(*(_scattered(part, places, chosen) for part in rows))
            out[chosen.to(self.device)] = self._mujoco.forward_rows(fields, some, mask)[chosen].to(self.device)
        return out

    def _fields_on_cpu(self, fields: PhysicsParams) -> PhysicsParams:
        """The model fields where they are written: the same tensors again as long as the fields are the same."""
        if all(field.is_cpu for field in fields.values()):
            return fields
        moved, seen = self._moved
        if fields.keys() != seen.keys() or not all(same_memory(fields[n], seen[n]) for n in fields):
            moved = {name: field.cpu() for name, field in fields.items()}
            self._moved = moved, _as_seen(fields)
        return moved

    def body_states(self, fields: PhysicsParams, rows: Rows, mask: Tensor) -> Tensor:
        """`[N, accelerated, 13]` Isaac Gym's rigid body states of the masked rows; of others anything. On the CPU."""
        if self._kinematics is None:
            self._kinematics = MujocoEngine(self.mjmodel, 1, ("xpos", "xquat", "xipos", "cvel", "subtree_com"))
        engine, n, ids = self._kinematics, len(rows.qpos), list(self.accelerated)
        data = engine.forward_rows(fields, rows._replace(sensordata=rows.qpos.new_zeros(n, engine.model.nsensor)), mask)
        value = lambda name: data[:, engine.model.sensor(name)].unflatten(1, (self.mjmodel.nbody, -1))  # noqa: E731
        position, quaternion, spatial = value("xpos")[:, ids], value("xquat")[:, ids], value("cvel")[:, ids]
        # The velocity of the point of each body that now is where the robot's centre of mass is.
        centre = value("subtree_com")[:, self.mjmodel.body_rootid[ids]]
        point = value("xipos")[:, ids] if self.settings.velocity_point == "com" else position
        angular = spatial[..., 0:3]
        linear = spatial[..., 3:6] + torch.linalg.cross(angular, point - centre)
        return torch.cat([position, quaternion[..., 1:4], quaternion[..., 0:1], linear, angular], dim=2)

    def jacobian_rows(
        self, fields: PhysicsParams, rows: Rows, ctrl: Tensor, wrench: Tensor | None, substeps: int
    ) -> Tensor:
        raise RuntimeError("Isaac Gym has no derivatives: differentiate on the engine of rlcore.physics.mujoco")

    def tangent_rows(self, qpos: Tensor) -> Tensor:
        raise RuntimeError("Isaac Gym has no derivatives: differentiate on the engine of rlcore.physics.mujoco")


def _scattered(part: Tensor, places: Tensor, chosen: Tensor) -> Tensor:
    """A tensor of the shape of `part` on the CPU, with its rows `chosen` (`places` where `part` is); 0 elsewhere."""
    rows = torch.zeros(part.shape, dtype=part.dtype, device="cpu")
    rows[chosen] = part[places].cpu()
    return rows


def _sane(qpos: Tensor, qvel: Tensor) -> Tensor:
    """`[N]` whether positions and velocities are finite and within bounds."""
    worst = torch.maximum(qpos.abs().amax(1), qvel.abs().amax(1)) if qpos.shape[1] else qpos.new_zeros(len(qpos))
    return worst < STATE_LIMIT  # NaN compares false


def _as_seen(fields: PhysicsParams) -> dict[str, tuple[Tensor, int] | None]:
    """The fields as `same_memory` knows them again; those of inference mode, which count no writes, it does not."""
    return {name: None if field.is_inference() else (field, field._version) for name, field in fields.items()}


class _Simulator:
    """The simulator of one batch size: its server, what it returned last, and the model fields it has."""

    def __init__(self, engine: IsaacGymEngine, size: int, fields: PhysicsParams):
        self.model, self.settings, self.size = engine.mjmodel, engine.settings, size
        self.num_threads = engine.num_threads
        self.description, self.actuators = engine.description, engine.actuators
        self.sensors, self.watched, self.accelerated = engine.sensors, engine.watched, engine.accelerated
        self.body_states = engine.body_states
        self.device = engine.device
        self.ranks = engine.field_ranks
        self.fields = self._not_nominal(fields)
        self.seen = _as_seen(fields)
        self.written = 0
        d = self.description
        with tempfile.TemporaryDirectory(prefix="rlcore-isaacgym-") as folder:
            Path(folder, "robot.xml").write_text(d.xml)
            self.server = Server(self.settings, self._setup(folder))
        dofs, bodies = self.server.dofs, self.server.bodies
        # `dof_order[k]` is the place of Isaac Gym's joint k in the model's order, `dof_places` the other way.
        places = lambda x: torch.as_tensor(x, dtype=torch.int64, device=self.device)  # noqa: E731
        self.dof_order = places([d.dofs.index(name) for name in dofs])
        self.dof_places = places([dofs.index(name) for name in d.dofs])
        ids = [d.body_ids[d.bodies.index(name)] for name in bodies]
        self.body_ids = places([max(b, 0) for b in ids])
        self.dof_qpos, self.dof_qvel = places(d.dof_qpos), places(d.dof_qvel)
        self.actuated = layout.Actuators(*(torch.as_tensor(x, device=self.device) for x in engine.actuators))
        self.qpos: Tensor | None = None
        self.qvel: Tensor | None = None
        self._derive()

    def _setup(self, folder: str) -> dict[str, Any]:
        d, model, size = self.description, self.model, self.size
        gravity = self._value("opt.gravity")
        if gravity.ndim == 2:
            if np.any(gravity != gravity[0]):
                raise InputError("model field 'opt.gravity' is one for all robots on Isaac Gym; it cannot differ")
            gravity = gravity[0]
        names = dict(zip(d.body_ids, d.bodies, strict=True))
        modes = [drive["mode"] for drive in self._drives().values()]
        by_rule, multiplier = contact_memory(size, len(d.geoms))
        return {
            "num_envs": size,
            "timestep": float(model.opt.timestep),
            "gravity": gravity.tolist(),
            "gpu": self.settings.gpu,
            "pipeline": self.settings.pipeline,
            "max_gpu_contact_pairs": self.settings.max_gpu_contacts or by_rule,
            "buffer_size_multiplier": multiplier,
            "num_threads": self.num_threads,
            "position_iterations": self.settings.num_position_iterations,
            "velocity_iterations": self.settings.num_velocity_iterations,
            "contact_offset": self.settings.contact_offset,
            "spacing": self.settings.spacing,
            "ground": d.ground,
            "asset_root": folder,
            "asset_file": "robot.xml",
            "fixed_base": not d.floating,
            "self_collision": d.self_collision,
            "start": model.qpos0[:3].tolist() if d.floating else [0.0, 0.0, 0.0],
            "dofs": list(d.dofs),
            "bodies": list(d.bodies),
            "watched": [names[b] for b in self.watched],
            "accelerated": [names[b] for b in self.accelerated],
            "drives": self._drives(),
            "masses": self._masses(),
            "filters": self._filters(),
            "friction": self._friction(),
            "targets": "position" in modes,
            "efforts": "effort" in modes,
        }

    # --- model fields ---------------------------------------------------------------------------------------

    def _value(self, name: str) -> np.ndarray:
        return self.fields[name].numpy() if name in self.fields else np.array(model_field(self.model, name))

    def _rows(self, name: str) -> np.ndarray:
        value = self._value(name)
        core = value.shape if name not in self.fields else value.shape[value.ndim - self.ranks[name] :]
        return np.broadcast_to(value, (self.size, *core))

    def _drives(self) -> dict[str, Any]:
        given = {name: self._value(name) for name in _DRIVES if name in self.fields}
        found = layout.drives(self.model, self.actuators, given)
        as_json = lambda x: x if isinstance(x, str) else np.asarray(x, dtype=float).tolist()  # noqa: E731
        return {
            name: {field: as_json(value) for field, value in drive._asdict().items()}
            for name, drive in zip(self.description.dofs, found, strict=True)
        }

    def _masses(self) -> dict[str, Any]:
        fields = (self._rows(name) for name in ("body_mass", "body_inertia", "body_ipos"))
        found = layout.body_masses(self.model, self.description, *fields)
        return {name: rows.tolist() for name, rows in found.items()}

    def _filters(self) -> dict[str, Any]:
        d = self.description
        found: dict[str, list[int]] = {}
        for name, number in zip(d.geom_bodies, d.filters, strict=True):
            found.setdefault(name, []).append(number)
        return found

    def _friction(self) -> dict[str, Any]:
        d, friction = self.description, self._rows("geom_friction")[..., 0]
        ground = None if d.floor is None else friction[:, d.floor, None]
        shapes = layout.shape_friction(friction, d.geoms, d.ground, ground)
        shapes = np.round(shapes / _FRICTION_STEP) * _FRICTION_STEP
        places = {name: [i for i, body in enumerate(d.geom_bodies) if body == name] for name in d.geom_bodies}
        return {name: layout.one_row(shapes[:, own]).tolist() for name, own in places.items()}

    def take_fields(self, fields: PhysicsParams) -> bool:
        """Make the simulator's model fields these, and tell whether that can be done without starting it again."""
        if not self.server.alive:
            return False
        if fields.keys() == self.seen.keys() and all(same_memory(fields[k], self.seen[k]) for k in fields):
            return True
        own = self._not_nominal(fields)
        # One value for all robots is equal to as many rows of it.
        changed = {
            name
            for name in {*own, *self.fields}
            if name not in own or name not in self.fields or bool((own[name] != self.fields[name]).any())
        }
        if changed.intersection(_AT_START):
            return False
        if changed:
            self.fields = own
        if changed.intersection(_DRIVES):
            self.server.set_drives(self._drives())
        if changed.intersection(_FRICTION):
            self.server.set_friction(self._friction())
        if changed:
            self._derive()
        self.seen = _as_seen(fields)
        return True

    def _not_nominal(self, fields: PhysicsParams) -> PhysicsParams:
        """Copies of the fields in which a robot differs from the model: to be given the others is to be given none."""
        nominal = lambda name: torch.as_tensor(np.array(model_field(self.model, name)))  # noqa: E731
        return {name: value.clone() for name, value in fields.items() if bool((value != nominal(name)).any())}

    def _derive(self) -> None:
        """What a step computes with, from the model fields."""
        tensor = lambda x: torch.as_tensor(np.array(x, dtype=np.float64), device=self.device)  # noqa: E731
        limits = layout.force_limits(self.model, self.actuators, self._value("actuator_forcerange"))
        self.low, self.high = map(tensor, limits)
        self.gain = tensor(self._value("actuator_gainprm")[..., 0])
        self.kv = tensor(-self._value("actuator_biasprm")[..., 2])
        gravity = tensor(self._value("opt.gravity"))
        centres = tensor(self._value("body_ipos"))
        com = self.settings.velocity_point == "com"
        self.sensor_array = sensing.SensorArray(
            self.model,
            self.sensors,
            sensing.Inertial(tensor(self._value("body_mass")), tensor(self._value("body_inertia")), centres),
            of_com=com,
            gravity=gravity if gravity.ndim == 1 else gravity[0],
            substep=float(self.model.opt.timestep),
            device=self.device,
        )
        self.root_com = centres[..., 1, :] if com and self.description.floating else None

    # --- stepping -------------------------------------------------------------------------------------------

    def step(
        self,
        rows: Rows,
        ctrl: Tensor,
        wrench: Tensor | None,
        substeps: int,
        sane: Tensor,
        simulate: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """qpos, qvel and sensordata of the end of a step; of the rows that are not sane, anything.

        Without `simulate` all is done but the physics, to be timed.
        """
        shared, dofs = self.server.tensors, len(self.description.dofs)
        targets, efforts = layout.commands(self.actuated, ctrl, self.gain, self.low, self.high, dofs)
        torch.index_select(targets.float(), 1, self.dof_order, out=shared["target"])
        torch.index_select(efforts.float(), 1, self.dof_order, out=shared["effort"])
        if wrench is not None:
            # None for the world, whose row stands for bodies that the model has not.
            sent = torch.nn.functional.pad(wrench[:, 1:].float(), (0, 0, 1, 0))
            torch.index_select(sent[..., 0:3], 1, self.body_ids, out=shared["force"])
            torch.index_select(sent[..., 3:6], 1, self.body_ids, out=shared["torque"])
        count = self._write_state(rows, sane)
        # Until it has been read, what the simulator has is not known: if anything fails, all is written again.
        self.qpos = self.qvel = None
        self.written = self.server.step(substeps, count, wrench is not None, simulate)
        if substeps == 1 and count and self.accelerated:
            self._mend_before(rows, count)
        self.qpos, self.qvel = self._read_state()
        # Copies, since the caller may write into what is returned, and what was returned is to be known.
        return self.qpos.clone(), self.qvel.clone(), self._sensors(rows, ctrl, wrench)

    def _write_state(self, rows: Rows, sane: Tensor) -> int:
        """Hand over the rows that the simulator has not returned as they are. Returns how many."""
        if self.qpos is None or self.qvel is None:
            changed = sane
        else:
            changed = ((rows.qpos != self.qpos).any(dim=1) | (rows.qvel != self.qvel).any(dim=1)) & sane
        chosen = torch.nonzero(changed).squeeze(1)
        count = len(chosen)
        if count:
            shared, d = self.server.tensors, self.description
            qpos, qvel = rows.qpos[chosen], rows.qvel[chosen]
            shared["rows"][:count] = chosen.int()
            if d.floating:
                com = self.root_com
                com = com if com is None or com.ndim == 1 else com[chosen]
                shared["root_in"][:count] = layout.root_from_qpos(qpos, qvel, com).float()
            if d.dofs:
                state = torch.stack([qpos[:, self.dof_qpos], qvel[:, self.dof_qvel]], dim=2).float()
                shared["dof_in"][:count] = state[:, self.dof_order]
        return count

    def _mend_before(self, rows: Rows, count: int) -> None:
        """Put the states of rows just written in place of those before the substep: Isaac Gym's are older."""
        shared = self.server.tensors
        written = shared["rows"][:count].long()
        mask = torch.zeros(self.size, dtype=torch.bool).index_fill(0, written.cpu(), True)
        states = self.body_states(self.fields, Rows(*(part.cpu() for part in rows)), mask).to(self.device)
        shared["before"][written] = states[written].float()

    def _read_state(self) -> tuple[Tensor, Tensor]:
        shared = self.server.tensors
        state = shared["dof"].index_select(1, self.dof_places).double()
        position, velocity = state[..., 0], state[..., 1]
        if not self.description.floating:
            return position.clone(), velocity.clone()
        root_qpos, root_qvel = layout.qpos_from_root(shared["root"], self.root_com)
        return torch.cat([root_qpos, position], dim=1), torch.cat([root_qvel, velocity], dim=1)

    def _sensors(self, rows: Rows, ctrl: Tensor, wrench: Tensor | None) -> Tensor:
        assert self.qpos is not None and self.qvel is not None
        if not self.sensors:
            return rows.sensordata.clone()
        shared = self.server.tensors
        # Their operations are so short that other threads gain nothing, and are waited for where other work has them.
        with one_thread(self.size // 4):
            force = layout.actuator_force(
                self.actuated, ctrl, self.qpos, self.qvel, self.gain, self.kv, self.low, self.high
            )
            return self.sensor_array(
                sensing.Motion(shared["body"], shared["contact"], shared["before"], self.qpos, self.qvel, force, wrench)
            )
