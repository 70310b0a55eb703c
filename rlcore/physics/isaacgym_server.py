"""The half of the Isaac Gym engine that runs inside the user's Isaac Gym: a program.

Isaac Gym needs a Python of 3.8 at the latest, and this project a newer one. So this file is run by that other
interpreter, imports nothing but isaacgym, torch and numpy, and is written in Python 3.8. `rlcore.physics.isaacgym`
starts it, hands it an asset and settings, and owns it: tensors go through memory that both have mapped, words through
a socket that both inherited, so that neither a port nor a file in shared memory exists that could be left behind. With
Isaac Gym's GPU pipeline that memory is the GPU's: `CudaMemory`, the one part of this file that the other half uses too.

It knows nothing of MuJoCo, of tasks, or of the order in which the other side keeps joints: everything here is in Isaac
Gym's own layout. A step sets what it is told to set, simulates, and copies out what Isaac Gym has computed.
"""

import contextlib
import ctypes
import ctypes.util
import json
import math
import mmap
import os
import select
import signal
import socket
import struct
import sys
import traceback

PROTOCOL = 2
# What a message is preceded by: its length in bytes.
_LENGTH = struct.Struct("<I")
# How often the watcher looks whether the parent is still the parent, s.
_WATCH = 0.5


def send(channel, message):
    """Send a JSON value with its length before it."""
    text = json.dumps(message).encode()
    channel.sendall(_LENGTH.pack(len(text)) + text)


def receive(channel):
    """The next JSON value, or None when the other side has closed."""
    header = _exactly(channel, _LENGTH.size)
    if header is None:
        return None
    text = _exactly(channel, _LENGTH.unpack(header)[0])
    return None if text is None else json.loads(text.decode())


def _exactly(channel, size):
    parts = []
    while size:
        part = channel.recv(size)
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _short(numbers):
    return " ".join("%.5g" % x for x in numbers)


class Refused(Exception):
    """Something that the user can put right, told in one line."""


class CudaMemory:
    """Memory of a GPU that two processes have, and torch's tensors over it.

    One process allocates it and sends `handle` to the other, which opens it. The other closes it before the first
    does. Each calls the CUDA runtime that its own torch has loaded, so their versions may differ.

    Attributes:
      handle: 64 bytes that let another process of this machine open the memory; empty in that which has opened it.
    """

    # Of a smaller allocation the handle would give away its neighbours, too.
    _GRANULE = 2 << 20
    # cudaIpcMemLazyEnablePeerAccess, the only value there is.
    _OPEN_FLAGS = 1

    class _Handle(ctypes.Structure):
        _fields_ = [("bytes", ctypes.c_ubyte * 64)]

    @staticmethod
    def device(torch, gpu):
        """Where tensors over the memory of GPU number `gpu` are, as torch calls it."""
        return torch.device("cuda", gpu)

    def __init__(self, torch, gpu, size, handle=b""):
        """Allocate `size` bytes on GPU number `gpu`, or open what another process has allocated.

        Raises:
          Refused: if torch has no CUDA, there is no such memory, or it cannot be shared.
        """
        if not torch.cuda.is_available():
            raise Refused("the GPU pipeline needs an NVIDIA GPU, and torch of %s finds none" % sys.executable)
        if gpu >= torch.cuda.device_count():
            raise Refused(
                "there is no GPU number %d: torch of %s finds %d" % (gpu, sys.executable, torch.cuda.device_count())
            )
        self._torch, self._place, self._opened = torch, self.device(torch, gpu), bool(handle)
        torch.empty(0, device=self._place)  # torch makes its context, and with it loads the runtime
        self._cuda = ctypes.CDLL(_cuda_runtime())
        self._cuda.cudaGetErrorString.restype = ctypes.c_char_p
        address, self.handle = ctypes.c_void_p(), b""
        if handle:
            given = self._Handle.from_buffer_copy(handle)
            self._call("cudaIpcOpenMemHandle", ctypes.byref(address), given, ctypes.c_uint(self._OPEN_FLAGS))
        else:
            whole = -(-size // self._GRANULE) * self._GRANULE
            self._call("cudaMalloc", ctypes.byref(address), ctypes.c_size_t(whole))
        self._address = address.value
        if not handle:
            made = self._Handle()
            try:
                self._call("cudaIpcGetMemHandle", ctypes.byref(made), address)
            except Refused:
                self.close()
                raise
            self.handle = bytes(made)

    def _call(self, name, *arguments):
        with self._torch.cuda.device(self._place):
            code = getattr(self._cuda, name)(*arguments)
            if code:
                # Or torch would take the error for one of its own.
                self._cuda.cudaGetLastError()
        if code:
            why = "%s: error %d, %s" % (name, code, self._cuda.cudaGetErrorString(code).decode())
            if "Ipc" not in name:
                raise Refused("the GPU has no memory for the tensors of the two processes (%s)" % why)
            raise Refused(
                "two processes cannot share memory of the GPU here, which some containers and drivers do not allow; "
                "there is the CPU pipeline (%s)" % why
            )

    def tensor(self, offset, shape, kind):
        """A tensor of `shape` over the memory from `offset` in bytes; `kind` is float32 or int32."""
        if 0 in shape:
            return self._torch.zeros(shape, dtype=getattr(self._torch, kind), device=self._place)

        interface = {
            "shape": tuple(shape),
            "typestr": {"float32": "<f4", "int32": "<i4"}[kind],
            "data": (self._address + offset, False),
            "strides": None,
            "version": 2,
        }
        block = type("Block", (), {"__cuda_array_interface__": interface})
        return self._torch.as_tensor(block(), device=self._place)

    def synchronize(self):
        """Wait until the GPU has done what this process asked of it: then the other one finds it in the memory."""
        self._torch.cuda.synchronize(self._place)

    def close(self):
        """Give the memory back; the tensors over it must not be used afterwards. May be called again."""
        if self._address is None:
            return
        address, self._address = ctypes.c_void_p(self._address), None
        # A GPU that has failed, or is gone as the process ends, has no memory to give back.
        with contextlib.suppress(Exception):
            self.synchronize()
            self._call("cudaIpcCloseMemHandle" if self._opened else "cudaFree", address)


def _cuda_runtime():
    """The CUDA runtime that this process has loaded; else the system's."""
    with open("/proc/self/maps") as file:
        paths = {line.split(None, 5)[5].strip() for line in file if "libcudart" in line}
    found = sorted(paths)[:1] or [ctypes.util.find_library("cudart")]
    if not found[0]:
        raise Refused(
            "there is no CUDA runtime (libcudart) for the GPU pipeline: torch of %s has loaded none" % sys.executable
        )
    return found[0]


def die_with_parent(parent, lifeline):
    """Start a process that kills this one as soon as the parent is gone, even while the simulator hangs.

    `lifeline` is a pipe whose other end only the parent holds. A process that the parent has forked may hold it too,
    so the parent's number is looked at as well.
    """
    # A script that sets up the environment may stand between the two.
    own, above = os.getpid(), os.getppid()
    alive, held = os.pipe()
    if os.fork():
        os.close(alive)
        os.set_inheritable(held, False)
        return
    # Here is the watcher. It keeps nothing open but the two pipes, or the parent would never see this process end.
    kept = {lifeline, alive}
    for descriptor in [int(name) for name in os.listdir("/proc/self/fd")]:
        if descriptor not in kept:
            with contextlib.suppress(OSError):
                os.close(descriptor)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        ready, _, _ = select.select([lifeline, alive], [], [], _WATCH)
        if alive in ready:
            os._exit(0)
        if lifeline in ready or _parent_of(own) != above or not os.path.exists("/proc/%d" % parent):
            with contextlib.suppress(OSError):
                os.kill(own, signal.SIGKILL)
            os._exit(0)


def _parent_of(process):
    """The number of a process's parent, 0 if there is no such process."""
    try:
        with open("/proc/%d/stat" % process) as file:
            # The name, in brackets, may hold spaces.
            return int(file.read().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return 0


def import_isaacgym():
    """`gymapi`, `gymtorch`, `torch` and `numpy`, in the order that Isaac Gym asks for.

    Raises:
      Refused: if they cannot be imported; the message says by which Python.
    """
    # This file's folder has modules of the same names as packages that Isaac Gym uses.
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path or ".") != here]
    version = "%d.%d.%d" % sys.version_info[:3]
    if "torch" in sys.modules:
        raise Refused(
            "torch is imported before isaacgym as Python starts, which Isaac Gym does not allow: look for a "
            "sitecustomize or a .pth file of %s that imports it" % sys.executable
        )
    try:
        from isaacgym import gymapi, gymtorch
    except Exception as error:
        raise Refused(
            "isaacgym cannot be imported by %s (Python %s; Isaac Gym Preview 4 is for 3.6 to 3.8): %s: %s"
            % (sys.executable, version, type(error).__name__, " ".join(str(error).split()))
        ) from None
    import numpy
    import torch

    return gymapi, gymtorch, torch, numpy


class Simulation:
    """One simulator with equal robots, and the memory shared with the other side.

    Args:
      modules: as from `import_isaacgym`.
      setup: what the other side asks for, see `rlcore.physics.isaacgym`.
    """

    def __init__(self, modules, setup):
        self.gymapi, self.gymtorch, self.torch, self.numpy = modules
        self.setup = setup
        self.gym = self.gymapi.acquire_gym()
        self.size = setup["num_envs"]
        self.sim = self.gym.create_sim(max(setup["gpu"], 0), -1, self.gymapi.SIM_PHYSX, self._sim_params(setup))
        if self.sim is None:
            raise Refused("Isaac Gym could not create a simulation: is the NVIDIA driver new enough for it?")
        self.on_gpu = setup["pipeline"] == "gpu"
        self._add_ground(setup["ground"])
        self.asset = self._load(setup)
        self.dofs = self.gym.get_asset_dof_names(self.asset)
        self.bodies = self.gym.get_asset_rigid_body_names(self.asset)
        # Robots that stood in one place would all be pairs to look at for PhysX, though none touches another.
        side = math.ceil(math.sqrt(self.size))
        self.places = [
            (setup["spacing"] * (i % side - side // 2), setup["spacing"] * (i // side - side // 2))
            for i in range(self.size)
        ]
        self.envs, self.actors, self.note = [], [], ""
        for i in range(self.size):
            self._add_robot(i)
        if not self.gym.prepare_sim(self.sim):
            raise Refused("Isaac Gym could not prepare the simulation (prepare_sim failed)")
        self._acquire()
        # Where Isaac Gym has its tensors there must be all that it is given.
        self.device = self.root.device
        self.indices = self.torch.tensor(
            [
                self.gym.get_actor_index(env, actor, self.gymapi.DOMAIN_SIM)
                for env, actor in zip(self.envs, self.actors)
            ],
            dtype=self.torch.int32,
            device=self.device,
        )
        self.place = self.torch.tensor([[x, y, 0.0] for x, y in self.places], device=self.device)

    # --- building -------------------------------------------------------------------------------------------

    def _sim_params(self, setup):
        params = self.gymapi.SimParams()
        params.dt = setup["timestep"]
        params.substeps = 1
        params.up_axis = self.gymapi.UP_AXIS_Z
        params.gravity = self.gymapi.Vec3(*setup["gravity"])
        params.use_gpu_pipeline = setup["pipeline"] == "gpu"
        params.physx.use_gpu = setup["gpu"] >= 0
        if params.physx.use_gpu:
            params.physx.max_gpu_contact_pairs = setup["max_gpu_contact_pairs"]
            params.physx.default_buffer_size_multiplier = setup["buffer_size_multiplier"]
        params.physx.solver_type = 1
        params.physx.num_position_iterations = setup["position_iterations"]
        params.physx.num_velocity_iterations = setup["velocity_iterations"]
        params.physx.num_threads = setup["num_threads"]
        params.physx.contact_offset = setup["contact_offset"]
        params.physx.rest_offset = 0.0
        params.physx.bounce_threshold_velocity = 0.5
        params.physx.max_depenetration_velocity = 10.0
        params.physx.always_use_articulations = True
        params.physx.contact_collection = self.gymapi.CC_LAST_SUBSTEP
        return params

    def _add_ground(self, friction):
        if friction is None:
            return
        plane = self.gymapi.PlaneParams()
        plane.normal = self.gymapi.Vec3(0.0, 0.0, 1.0)
        plane.distance = 0.0
        plane.static_friction = friction
        plane.dynamic_friction = friction
        plane.restitution = 0.0
        self.gym.add_ground(self.sim, plane)

    def _load(self, setup):
        options = self.gymapi.AssetOptions()
        options.fix_base_link = setup["fixed_base"]
        options.collapse_fixed_joints = False
        options.angular_damping = 0.0
        options.linear_damping = 0.0
        options.armature = 0.0
        options.use_physx_armature = True
        options.max_angular_velocity = 1000.0
        options.max_linear_velocity = 1000.0
        options.disable_gravity = False
        options.enable_gyroscopic_forces = True
        asset = self.gym.load_asset(self.sim, setup["asset_root"], setup["asset_file"], options)
        if asset is None:
            raise Refused("Isaac Gym could not read the model that was written for it")
        names = set(self.gym.get_asset_dof_names(asset))
        missing = sorted(set(setup["dofs"]) ^ names)
        if missing:
            raise Refused("Isaac Gym reads other joints from the model than it has: %s" % ", ".join(missing))
        missing = sorted(set(setup["bodies"]) ^ set(self.gym.get_asset_rigid_body_names(asset)))
        if missing:
            raise Refused("Isaac Gym reads other bodies from the model than it has: %s" % ", ".join(missing))
        return asset

    def _add_robot(self, i):
        zero = self.gymapi.Vec3(0.0, 0.0, 0.0)
        env = self.gym.create_env(self.sim, zero, zero, max(1, int(self.size**0.5)))
        pose = self.gymapi.Transform()
        x, y, z = self.setup["start"]
        east, north = self.places[i]
        pose.p = self.gymapi.Vec3(x + east, y + north, z)
        actor = self.gym.create_actor(env, self.asset, pose, "robot", i, 0 if self.setup["self_collision"] else 1, 0)
        self.envs.append(env)
        self.actors.append(actor)
        self.set_drives(i, self.setup["drives"])
        self._set_bodies(i, self.setup["masses"])
        self._set_filters(i, self.setup["filters"])
        self.set_friction(i, self.setup["friction"])

    def set_drives(self, i, drives):
        """Modes, gains, limits and armatures of the joints of robot i, by name; a list has one value a robot."""
        properties = self.gym.get_actor_dof_properties(self.envs[i], self.actors[i])
        modes = {"position": self.gymapi.DOF_MODE_POS, "effort": self.gymapi.DOF_MODE_EFFORT}
        for j, name in enumerate(self.dofs):
            drive = drives[name]
            properties["driveMode"][j] = int(modes[drive["mode"]])
            for field in ("stiffness", "damping", "effort", "armature"):
                value = drive[field]
                properties[field][j] = value[i] if isinstance(value, list) else value
            properties["velocity"][j] = 1000.0
            properties["friction"][j] = 0.0
        self.gym.set_actor_dof_properties(self.envs[i], self.actors[i], properties)

    def _set_bodies(self, i, masses):
        """Mass, centre and inertia of the bodies of robot i, before prepare_sim only: one row for all, or one each."""
        properties = self.gym.get_actor_rigid_body_properties(self.envs[i], self.actors[i])
        told = {name: rows[i if len(rows) > 1 else 0] for name, rows in masses.items()}
        for name, row in told.items():
            own = properties[self.bodies.index(name)]
            own.mass = row[0]
            if not self.on_gpu:  # where Isaac Gym does not support it; the asset's is the model's
                own.com = self.gymapi.Vec3(*row[1:4])
            matrix = self.gymapi.Mat33()
            matrix.x = self.gymapi.Vec3(*row[4:7])
            matrix.y = self.gymapi.Vec3(*row[7:10])
            matrix.z = self.gymapi.Vec3(*row[10:13])
            own.inertia = matrix
        self.gym.set_actor_rigid_body_properties(self.envs[i], self.actors[i], properties, False)
        properties = self.gym.get_actor_rigid_body_properties(self.envs[i], self.actors[i])
        for name, row in told.items():
            own = properties[self.bodies.index(name)]
            inertia = [x for line in (own.inertia.x, own.inertia.y, own.inertia.z) for x in (line.x, line.y, line.z)]
            com = [own.com.x, own.com.y, own.com.z]
            for what, kept, wanted in (
                ("mass", [own.mass], row[0:1]),
                ("centre of mass", com, row[1:4]),
                ("inertia", inertia, row[4:13]),
            ):
                # What is kept is of single precision, an inertia as principal moments and axes.
                room = 1e-4 * max(abs(x) for x in wanted) + (1e-6 if what == "centre of mass" else 0.0)
                if not all(abs(x - y) <= room for x, y in zip(kept, wanted)):
                    differs = "Isaac Gym keeps another %s of body %s than it is told: %s instead of %s" % (
                        what,
                        name,
                        _short(kept),
                        _short(wanted),
                    )
                    if what != "inertia":
                        raise Refused(differs)
                    # It may tell an inertia in other axes than it takes it in; how a body turns is what counts.
                    self.note = self.note or differs

    def _set_filters(self, i, filters):
        """Which shapes of robot i touch each other: for each body one number a shape."""
        self._set_shapes(i, "filter", filters)

    def set_friction(self, i, friction):
        """Sliding friction of the shapes of robot i: for each body a row for all robots or one each, of its shapes."""
        self._set_shapes(i, "friction", {name: rows[i if len(rows) > 1 else 0] for name, rows in friction.items()})

    def _set_shapes(self, i, field, values):
        shapes = self.gym.get_actor_rigid_shape_properties(self.envs[i], self.actors[i])
        places = self.gym.get_actor_rigid_body_shape_indices(self.envs[i], self.actors[i])
        for name, row in values.items():
            place = places[self.bodies.index(name)]
            if place.count != len(row):
                raise Refused("Isaac Gym reads %d shapes of %s, which has %d" % (place.count, name, len(row)))
            for k, value in enumerate(row):
                setattr(shapes[place.start + k], field, value)
        for shape in shapes:
            shape.restitution = 0.0
        if shapes:
            self.gym.set_actor_rigid_shape_properties(self.envs[i], self.actors[i], shapes)

    def _acquire(self):
        gym, sim, wrap = self.gym, self.sim, self.gymtorch.wrap_tensor
        # Root states are not numbers if they are acquired before they were refreshed once.
        self._refresh()
        n, dofs, bodies = self.size, len(self.dofs), len(self.bodies)
        self.root = wrap(gym.acquire_actor_root_state_tensor(sim)).view(n, 13)
        self.dof = wrap(gym.acquire_dof_state_tensor(sim)).view(n, dofs, 2) if dofs else None
        self.body = wrap(gym.acquire_rigid_body_state_tensor(sim)).view(n, bodies, 13)
        self.contact = wrap(gym.acquire_net_contact_force_tensor(sim)).view(n, bodies, 3)
        self._refresh()
        # What setters read: copies, since a refresh overwrites Isaac Gym's own, and kept, since Isaac Gym remembers
        # nothing but addresses.
        self.root_set = self.root.clone()
        self.dof_set = self.dof.clone() if dofs else None

    def _refresh(self):
        self.gym.refresh_actor_root_state_tensor(self.sim)
        if self.dofs:
            self.gym.refresh_dof_state_tensor(self.sim)
        self.gym.refresh_rigid_body_state_tensor(self.sim)
        self.gym.refresh_net_contact_force_tensor(self.sim)

    # --- memory ---------------------------------------------------------------------------------------------

    def map(self, descriptor, mapping):
        """Lay torch's tensors over the memory that both sides have.

        Args:
          descriptor: of the file that is the memory of the CPU pipeline.
          mapping: the memory's `size` in bytes, the `places` of tensors by name, offset, shape and type, and with the
            GPU pipeline the `handle` of the memory, in hexadecimal digits.
        """
        if self.on_gpu:
            handle = bytes.fromhex(mapping["handle"])
            self.memory = CudaMemory(self.torch, self.setup["gpu"], mapping["size"], handle)
            tensor = self.memory.tensor
        else:
            self.memory = mmap.mmap(descriptor, mapping["size"])
            tensor = self._tensor_of_file
        self.shared = {name: tensor(offset, shape, kind) for name, offset, shape, kind in mapping["places"]}
        watched = [self.bodies.index(name) for name in self.setup["watched"]]
        self.body_rows = self.torch.tensor(watched, dtype=self.torch.int64, device=self.device)
        accelerated = [self.bodies.index(name) for name in self.setup["accelerated"]]
        self.before_rows = self.torch.tensor(accelerated, dtype=self.torch.int64, device=self.device)

    def _tensor_of_file(self, offset, shape, kind):
        count = int(self.numpy.prod(shape, dtype=int))
        array = self.numpy.frombuffer(self.memory, dtype=kind, count=count, offset=offset).reshape(shape)
        return self.torch.from_numpy(array)

    # --- stepping -------------------------------------------------------------------------------------------

    def step(self, substeps, written, wrench, simulate=True):
        """Write the rows that the other side names, simulate, and copy out. Returns how many rows were written."""
        gym, sim, unwrap, shared = self.gym, self.sim, self.gymtorch.unwrap_tensor, self.shared
        if written:
            rows = shared["rows"][:written].long()
            # Int32, contiguous, and alive until the simulator has read them.
            self.chosen = self.indices[rows].contiguous()
            if not self.setup["fixed_base"]:
                self.root_set[rows] = shared["root_in"][:written]
                self.root_set[rows, 0:3] += self.place[rows]
                gym.set_actor_root_state_tensor_indexed(sim, unwrap(self.root_set), unwrap(self.chosen), written)
            if self.dofs:
                self.dof_set[rows] = shared["dof_in"][:written]
                gym.set_dof_state_tensor_indexed(sim, unwrap(self.dof_set), unwrap(self.chosen), written)
        if len(self.before_rows) and (substeps == 1 or not simulate):
            self._hand_out("before", self.before_rows)
        for i in range(substeps if simulate else 0):
            if i and i == substeps - 1 and len(self.before_rows):
                # Before any setter, or it may be stale.
                gym.refresh_rigid_body_state_tensor(sim)
                self._hand_out("before", self.before_rows)
            # Efforts and forces last for one simulate; targets stay, and to set them again changes nothing.
            if self.setup["targets"]:
                gym.set_dof_position_target_tensor(sim, unwrap(shared["target"]))
            if self.setup["efforts"]:
                gym.set_dof_actuation_force_tensor(sim, unwrap(shared["effort"]))
            if wrench:
                gym.apply_rigid_body_force_tensors(
                    sim, unwrap(shared["force"]), unwrap(shared["torque"]), self.gymapi.ENV_SPACE
                )
            gym.simulate(sim)
            if not self.on_gpu:
                gym.fetch_results(sim, True)
        if simulate:
            self._refresh()
        shared["root"].copy_(self.root)
        shared["root"][:, 0:3] -= self.place
        if self.dofs:
            shared["dof"].copy_(self.dof)
        if len(self.body_rows):
            self._hand_out("body", self.body_rows)
            self.torch.index_select(self.contact, 1, self.body_rows, out=shared["contact"])
        if self.on_gpu:
            self.memory.synchronize()
        return written

    def _hand_out(self, name, rows):
        """Copy the states of some bodies to where the other side has them, as if each robot stood in the middle."""
        self.torch.index_select(self.body, 1, rows, out=self.shared[name])
        self.shared[name][..., 0:3] -= self.place.unsqueeze(1)

    def close(self):
        """Free the simulator."""
        if self.on_gpu:
            self.memory.close()
        self.gym.destroy_sim(self.sim)


def serve(channel, memory_descriptor):
    """Answer the other side until it closes."""
    setup = receive(channel)
    if setup is None:
        return
    if setup["protocol"] != PROTOCOL:
        raise Refused("the server speaks version %d and the engine %d" % (PROTOCOL, setup["protocol"]))
    simulation = Simulation(import_isaacgym(), setup)
    send(channel, {"protocol": PROTOCOL, "dofs": simulation.dofs, "bodies": simulation.bodies, "note": simulation.note})
    mapping = receive(channel)
    if mapping is None:
        return
    simulation.map(memory_descriptor, mapping)
    os.close(memory_descriptor)
    send(channel, {"mapped": True})
    while True:
        message = receive(channel)
        if message is None:
            break
        order = message["do"]
        if order == "step":
            written = simulation.step(message["substeps"], message["written"], message["wrench"], message["simulate"])
            send(channel, {"written": written})
        elif order == "drives":
            for i in range(simulation.size):
                simulation.set_drives(i, message["drives"])
            send(channel, {"set": True})
        elif order == "friction":
            for i in range(simulation.size):
                simulation.set_friction(i, message["friction"])
            send(channel, {"set": True})
        else:
            raise Refused("there is no order %r" % order)
    simulation.close()


def main(arguments):
    """Run with the numbers of the inherited socket, memory and lifeline, and of the parent process."""
    channel_descriptor, memory_descriptor, lifeline, parent = [int(argument) for argument in arguments]
    channel = socket.socket(fileno=channel_descriptor)
    die_with_parent(parent, lifeline)
    os.close(lifeline)
    try:
        serve(channel, memory_descriptor)
    except Refused as error:
        send(channel, {"error": str(error), "refused": True})
        return 2
    except (BrokenPipeError, ConnectionResetError):
        return 0
    except Exception as error:
        traceback.print_exc()
        text = "%s: %s" % (type(error).__name__, " ".join(str(error).split()))
        send(channel, {"error": text, "refused": False})
        return 1
    return 0


if __name__ == "__main__":
    # Isaac Gym may hang or crash while Python tears it down: nothing is left to do by then.
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
