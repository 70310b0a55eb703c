"""The simulator: as much of it as rlcore's server calls, with its documented rules enforced."""

import copy
import ctypes
import os
import time
from enum import IntEnum
from xml.etree import ElementTree

import mujoco
import numpy as np


class RuleBroken(RuntimeError):
    """Something was called in a way that the real package does not allow."""


class SimType(IntEnum):
    SIM_PHYSX = 0
    SIM_FLEX = 1


class UpAxis(IntEnum):
    UP_AXIS_Y = 0
    UP_AXIS_Z = 1


class ContactCollection(IntEnum):
    CC_NEVER = 0
    CC_LAST_SUBSTEP = 1
    CC_ALL_SUBSTEPS = 2


class IndexDomain(IntEnum):
    DOMAIN_ACTOR = 0
    DOMAIN_ENV = 1
    DOMAIN_SIM = 2


class CoordinateSpace(IntEnum):
    ENV_SPACE = 0
    LOCAL_SPACE = 1
    GLOBAL_SPACE = 2


class DofDriveMode(IntEnum):
    DOF_MODE_NONE = 0
    DOF_MODE_POS = 1
    DOF_MODE_VEL = 2
    DOF_MODE_EFFORT = 3


for _enum in (SimType, UpAxis, ContactCollection, IndexDomain, CoordinateSpace, DofDriveMode):
    globals().update(_enum.__members__)


class _Struct:
    """Fields with defaults; another name is a mistake that the real package would tell of, too."""

    fields = {}

    def __init__(self):
        for name, default in self.fields.items():
            object.__setattr__(self, name, default() if callable(default) else default)

    def __setattr__(self, name, value):
        if name not in self.fields:
            raise AttributeError("%s has no %s" % (type(self).__name__, name))
        object.__setattr__(self, name, value)


class Vec3:
    def __init__(self, x=0.0, y=0.0, z=0.0):
        self.x, self.y, self.z = float(x), float(y), float(z)


class Quat:
    def __init__(self, x=0.0, y=0.0, z=0.0, w=1.0):
        self.x, self.y, self.z, self.w = float(x), float(y), float(z), float(w)


class Transform:
    def __init__(self, p=None, r=None):
        self.p, self.r = p or Vec3(), r or Quat()


class Mat33(_Struct):
    fields = {"x": Vec3, "y": Vec3, "z": Vec3}


class PhysXParams(_Struct):
    fields = {
        "always_use_articulations": False,
        "bounce_threshold_velocity": 0.2,
        "contact_collection": ContactCollection.CC_ALL_SUBSTEPS,
        "contact_offset": 0.02,
        "default_buffer_size_multiplier": 2.0,
        "max_depenetration_velocity": 100.0,
        "max_gpu_contact_pairs": 1024 * 1024,
        "num_position_iterations": 4,
        "num_threads": 4,
        "num_velocity_iterations": 1,
        "rest_offset": 0.001,
        "solver_type": 1,
        "use_gpu": True,
    }


class SimParams(_Struct):
    fields = {
        "dt": 1.0 / 60.0,
        "gravity": lambda: Vec3(0.0, -9.8, 0.0),
        "physx": PhysXParams,
        "substeps": 2,
        "up_axis": UpAxis.UP_AXIS_Y,
        "use_gpu_pipeline": False,
    }


class AssetOptions(_Struct):
    fields = {
        "angular_damping": 0.5,
        "armature": 0.0,
        "collapse_fixed_joints": False,
        "default_dof_drive_mode": 0,
        "disable_gravity": False,
        "enable_gyroscopic_forces": True,
        "fix_base_link": False,
        "linear_damping": 0.0,
        "max_angular_velocity": 64.0,
        "max_linear_velocity": 1000.0,
        "use_physx_armature": True,
    }


class PlaneParams(_Struct):
    fields = {
        "distance": 0.0,
        "dynamic_friction": 1.0,
        "normal": lambda: Vec3(0.0, 1.0, 0.0),
        "restitution": 0.0,
        "static_friction": 1.0,
    }


class RigidBodyProperties(_Struct):
    fields = {"com": Vec3, "flags": 0, "inertia": Mat33, "mass": 0.0}


class RigidShapeProperties(_Struct):
    fields = {"filter": 0, "friction": 1.0, "restitution": 0.0}


class IndexRange(_Struct):
    fields = {"start": 0, "count": 0}


class Tensor(_Struct):
    """One of the simulator's, with its numbers in `array` and what copies them to a GPU in `mirrors`; or one that it
    is given, with what reads its numbers in `read`."""

    fields = {"shape": (), "dtype": None, "array": None, "mirrors": None, "gpu": None, "read": None, "source": None}


_DOF = np.dtype(
    [("hasLimits", "?"), ("lower", "f4"), ("upper", "f4"), ("driveMode", "i4"), ("velocity", "f4"), ("effort", "f4")]
    + [(name, "f4") for name in ("stiffness", "damping", "friction", "armature")]
)


class _Asset:
    def __init__(self, text, options):
        self.options, root = options, ElementTree.fromstring(text)
        for body in root.iter("body"):
            if len(body.findall("joint")) > 1:
                raise RuleBroken("one joint is made of all joints of a body, here of %s" % body.get("name"))
        # MuJoCo has a faster way for inertias along the axes of a frame, and keeps to it when they are turned later.
        for inertial in root.iter("inertial"):
            inertial.set("quat", "0.9 0.3 0.2 0.1")
        # A drive of each joint: force = stiffness target - stiffness position - damping velocity, within the effort.
        actuators = ElementTree.SubElement(root, "actuator")
        for joint in root.iter("joint"):
            ElementTree.SubElement(
                actuators, "general", joint=joint.get("name"), biastype="affine", forcelimited="true", forcerange="0 1"
            )
        world = root.find("worldbody")
        if len(world) != 1:
            raise RuleBroken("an MJCF file must have one child of worldbody, got %d" % len(world))
        ElementTree.SubElement(
            world, "geom", name="ground", type="plane", size="0 0 1", contype="0", conaffinity="0", priority="0"
        )
        for geom in root.iter("geom"):
            if geom.get("type") not in ("sphere", "capsule", "box", "plane"):
                raise RuleBroken("only primitives are read from MJCF, got %s" % geom.get("type"))
        self.model = mujoco.MjModel.from_xml_string(ElementTree.tostring(root, encoding="unicode"))
        m = self.model
        # The reader of MJCF is said to take principal axes for those of the frame.
        m.body_iquat[:] = (1.0, 0.0, 0.0, 0.0)
        m.opt.integrator = int(mujoco.mjtIntegrator.mjINT_IMPLICITFAST)
        # Which shapes touch is told by the geoms alone.
        m.opt.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_FILTERPARENT)
        self.fixed = not (m.njnt and int(m.jnt_type[0]) == int(mujoco.mjtJoint.mjJNT_FREE))
        if self.fixed != options.fix_base_link:
            raise RuleBroken("fix_base_link and the root's joint disagree")
        first = 0 if self.fixed else 1
        # Isaac Gym keeps joints and bodies in an order of its own: here one that cannot be mistaken for the model's.
        self.joints = list(range(m.njnt - 1, first - 1, -1))
        self.bodies = [1, *range(m.nbody - 1, 1, -1)]
        m.body_inertia[1:] += options.armature
        self.dof_names = [m.joint(j).name for j in self.joints]
        self.body_names = [m.body(b).name for b in self.bodies]
        self.geoms = [[g for g in range(m.ngeom) if int(m.geom_bodyid[g]) == b] for b in self.bodies]


class _Actor:
    def __init__(self, sim, asset, pose, group, filter):
        self.asset, self.model = asset, copy.copy(asset.model)
        m = self.model
        m.opt.timestep = sim.params.dt / sim.params.substeps
        g = sim.params.gravity
        m.opt.gravity[:] = (g.x, g.y, g.z)
        self.ground, self.on_ground = m.geom("ground").id, sim.plane is not None
        self.shapes = [g for body in asset.geoms for g in body]
        self.filters = [filter] * len(self.shapes)
        self.drive = np.zeros(len(asset.joints), _DOF)
        self.drive["hasLimits"] = m.jnt_limited[asset.joints]
        self.friction = [1.0] * len(self.shapes)
        self.data = mujoco.MjData(m)
        if asset.fixed:
            m.body_pos[1] += (pose.p.x, pose.p.y, pose.p.z)
        else:
            self.data.qpos[:3] = (pose.p.x, pose.p.y, pose.p.z)
        self.contact = np.zeros((len(asset.bodies), 3))
        self.target, self.effort = np.zeros(len(asset.joints)), np.zeros(len(asset.joints))

    def touching(self):
        """Pairs of shapes that PhysX looks for contacts of: not those of one body, nor of two that a joint links."""
        m, found = self.model, []
        for i, a in enumerate(self.shapes):
            for k, b in enumerate(self.shapes[:i]):
                one, two = int(m.geom_bodyid[a]), int(m.geom_bodyid[b])
                linked = one == two or m.body_parentid[one] == two or m.body_parentid[two] == one
                if not linked and not self.filters[i] & self.filters[k]:
                    found.append((a, b))
        return found

    def apply_filters(self):
        """A bit for each shape and one for the ground; a geom has the bits of those that it touches."""
        m = self.model
        if len(self.shapes) > 30:
            raise NotImplementedError("more shapes than bits")
        bits = {g: 1 << i for i, g in enumerate(self.shapes)}
        for g in self.shapes:
            m.geom_contype[g], m.geom_conaffinity[g], m.geom_priority[g] = bits[g], int(self.on_ground) << 30, 1
        m.geom_contype[self.ground] = int(self.on_ground) << 30
        for a, b in self.touching():
            if m.body_weldid[m.geom_bodyid[a]] == m.body_weldid[m.geom_bodyid[b]]:
                raise RuleBroken("shapes of bodies that are fixed to each other touch, and push each other apart")
            m.geom_conaffinity[a] |= bits[b]
            m.geom_conaffinity[b] |= bits[a]
        # Older MuJoCos look at these first, and do not derive them from the geoms again.
        m.body_contype[:] = m.body_conaffinity[:] = 0
        for g in range(m.ngeom):
            m.body_contype[m.geom_bodyid[g]] |= m.geom_contype[g]
            m.body_conaffinity[m.geom_bodyid[g]] |= m.geom_conaffinity[g]

    def apply_drive(self):
        m = self.model
        for i, j in enumerate(self.asset.joints):
            drive, position = self.drive[i], int(self.drive[i]["driveMode"]) == DofDriveMode.DOF_MODE_POS
            # The actuators are in the model's order of joints, without the free one.
            a = j - (0 if self.asset.fixed else 1)
            kp = float(drive["stiffness"]) if position else 0.0
            m.actuator_gainprm[a, 0], m.actuator_biasprm[a, 1] = kp, -kp
            m.actuator_biasprm[a, 2] = -float(drive["damping"])
            m.actuator_forcerange[a] = (-float(drive["effort"]), float(drive["effort"]))
            m.dof_armature[m.jnt_dofadr[j]] = float(drive["armature"])
        mujoco.mj_setConst(m, mujoco.MjData(m))

    def set_root(self, row):
        row = row.astype(np.float64)
        self.data.qpos[:3], self.data.qpos[3], self.data.qpos[4:7] = row[:3], row[6], row[3:6]
        self.data.qvel[:3], self.data.qvel[3:6] = row[7:10], self._turned(row[10:13], self.data.qpos[3:7], True)
        if self._of_com():
            self.data.qvel[:3] -= np.cross(row[10:13], self._arm())

    def _of_com(self):
        return os.environ.get("ISAACGYM_STANDIN_VELOCITY", "com") == "com"

    def _arm(self):
        return self._turned(self.model.body_ipos[1], self.data.qpos[3:7], False)

    @staticmethod
    def _turned(vector, quaternion, back):
        matrix = np.zeros(9)
        mujoco.mju_quat2Mat(matrix, quaternion / np.linalg.norm(quaternion))
        matrix = matrix.reshape(3, 3)
        return (matrix.T if back else matrix) @ vector

    def root(self):
        row = np.zeros(13, np.float32)
        if self.asset.fixed:
            row[6] = 1.0
            return row
        q, v = self.data.qpos, self.data.qvel
        spin = self._turned(v[3:6], q[3:7], False)
        row[:3], row[3:6], row[6] = q[:3], q[4:7], q[3]
        row[7:10] = v[:3] + (np.cross(spin, self._arm()) if self._of_com() else 0.0)
        row[10:13] = spin
        return row

    def joint_state(self):
        m, joints = self.model, self.asset.joints
        return np.stack([self.data.qpos[m.jnt_qposadr[joints]], self.data.qvel[m.jnt_dofadr[joints]]], 1)

    def set_joints(self, rows):
        m, joints = self.model, self.asset.joints
        self.data.qpos[m.jnt_qposadr[joints]], self.data.qvel[m.jnt_dofadr[joints]] = rows[:, 0], rows[:, 1]

    def simulate(self, sim, wrench):
        m, d, joints = self.model, self.data, self.asset.joints
        for i, j in enumerate(joints):
            mode = int(self.drive[i]["driveMode"])
            d.ctrl[j - (0 if self.asset.fixed else 1)] = self.target[i]
            d.qfrc_applied[m.jnt_dofadr[j]] = self.effort[i] if mode == DofDriveMode.DOF_MODE_EFFORT else 0.0
        d.xfrc_applied[:] = 0.0
        if wrench is not None:
            d.xfrc_applied[self.asset.bodies] = wrench
        for _ in range(sim.params.substeps):
            d.qacc_warmstart[:] = 0.0
            mujoco.mj_step(m, d)
            if not self.asset.fixed:
                options = self.asset.options
                d.qvel[:3] *= 1.0 - options.linear_damping * m.opt.timestep
                d.qvel[3:6] *= 1.0 - options.angular_damping * m.opt.timestep
        self._collect(sim.params.physx.contact_collection)
        # The state is single precision; from here on it is a function of what is told of it.
        root, rows = self.root(), self.joint_state().astype(np.float32)
        if not self.asset.fixed:
            self.set_root(root)
        self.set_joints(rows)
        self.effort[:] = 0.0

    def _collect(self, collection):
        self.contact[:] = 0.0
        if collection == ContactCollection.CC_NEVER:
            return
        place, force = {b: i for i, b in enumerate(self.asset.bodies)}, np.zeros(6)
        for c in range(self.data.ncon):
            contact = self.data.contact[c]
            mujoco.mj_contactForce(self.model, self.data, c, force)
            world = np.array(contact.frame).reshape(3, 3).T @ force[:3]
            for geom, sign in ((contact.geom1, -1.0), (contact.geom2, 1.0)):
                body = int(self.model.geom_bodyid[geom])
                if body in place:
                    self.contact[place[body]] += sign * world

    def body_rows(self):
        m, d, out = self.model, self.data, np.zeros((len(self.asset.bodies), 13), np.float32)
        mujoco.mj_kinematics(m, d)
        mujoco.mj_comPos(m, d)
        mujoco.mj_comVel(m, d)
        velocity = np.zeros(6)
        kind = mujoco.mjtObj.mjOBJ_BODY if self._of_com() else mujoco.mjtObj.mjOBJ_XBODY
        for i, b in enumerate(self.asset.bodies):
            mujoco.mj_objectVelocity(m, d, kind, b, velocity, 0)
            out[i, :3], out[i, 3:6], out[i, 6] = d.xpos[b], d.xquat[b][1:], d.xquat[b][0]
            out[i, 7:10], out[i, 10:13] = velocity[3:], velocity[:3]
        return out


class Sim:
    def __init__(self, params):
        self.params, self.plane = params, None
        self.envs, self.actors = [], []
        self.prepared = self.fetched = False
        self.refreshed, self.buffers = set(), {}
        self.called, self.held, self.simulated = set(), [], 0
        self.orders, self.mirrors = [], {}
        self.wrench, self.gpu = None, None


class Env:
    def __init__(self, sim):
        self.sim, self.actors = sim, []


def _log(name):
    path = os.environ.get("ISAACGYM_STANDIN_CALLS")
    if path:
        with open(path, "a") as file:
            file.write(name + "\n")


def _print(text):
    """As PhysX prints, through C's own buffer."""
    ctypes.CDLL(None).puts(text.encode())


class Gym:
    """The interface. Arguments are named as in the real package's own signatures."""

    _created = False

    # --- building -----------------------------------------------------------------------------------------------

    def create_sim(self, compute_device=0, graphics_device=0, type=SimType.SIM_FLEX, params=None):
        if Gym._created:
            raise RuleBroken("there can be one simulation in a process")
        if type != SimType.SIM_PHYSX:
            raise RuleBroken("tensors need SIM_PHYSX")
        if params.use_gpu_pipeline and not params.physx.use_gpu:
            raise RuleBroken("the GPU pipeline needs physics on the GPU")
        if params.up_axis == UpAxis.UP_AXIS_Y and params.gravity.z:
            raise RuleBroken("gravity points along z and the up axis is y")
        if os.environ.get("ISAACGYM_STANDIN_FAULT") == "no_sim":
            return None
        Gym._created = True
        sim = Sim(params)
        _print("Physics Engine: PhysX")
        _log("pipeline %s" % ("gpu" if params.use_gpu_pipeline else "cpu"))
        _log("contacts %d %g" % (params.physx.max_gpu_contact_pairs, params.physx.default_buffer_size_multiplier))
        sim.gpu = compute_device if params.use_gpu_pipeline else None
        return sim

    def destroy_sim(self, arg0):
        Gym._created = False

    def add_ground(self, sim, params):
        if (params.normal.x, params.normal.y, params.normal.z) != (0.0, 0.0, 1.0):
            raise RuleBroken("the ground's normal must be the up axis")
        self._before_prepare(sim)
        sim.plane = params

    def load_asset(self, sim, rootpath, filename, options=None):
        with open(os.path.join(rootpath, filename)) as file:
            return _Asset(file.read(), options or AssetOptions())

    def create_env(self, arg0, arg1, arg2, arg3):
        self._before_prepare(arg0)
        env = Env(arg0)
        arg0.envs.append(env)
        return env

    def create_actor(self, env, asset, pose, name=None, group=-1, filter=-1, segmentationId=0):
        self._before_prepare(env.sim)
        if group != env.sim.envs.index(env):
            raise RuleBroken("robots of other environments would collide: the group must be the environment's index")
        actor = _Actor(env.sim, asset, pose, group, filter)
        env.sim.actors.append(actor)
        env.actors.append(actor)
        return len(env.actors) - 1

    def prepare_sim(self, arg0):
        if arg0.prepared:
            raise RuleBroken("prepare_sim is called once")
        for actor in arg0.actors:
            actor.apply_drive()
            actor.apply_filters()
        bodies = sum(len(actor.asset.bodies) for actor in arg0.actors)
        joints = sum(len(actor.asset.joints) for actor in arg0.actors)
        shapes = {"root": (len(arg0.actors), 13), "dof": (joints, 2), "body": (bodies, 13), "contact": (bodies, 3)}
        arg0.buffers = {name: np.full(shape, np.nan, np.float32) for name, shape in shapes.items()}
        arg0.prepared = True
        return True

    def _before_prepare(self, sim):
        if sim.prepared:
            raise RuleBroken("this must come before prepare_sim")

    # --- names and properties -----------------------------------------------------------------------------------

    def get_asset_dof_names(self, arg0):
        return list(arg0.dof_names)

    def get_asset_rigid_body_names(self, arg0):
        return list(arg0.body_names)

    def get_actor_index(self, arg0, arg1, arg2):
        if arg2 != IndexDomain.DOMAIN_SIM:
            raise RuleBroken("indexed setters take indices of DOMAIN_SIM")
        return arg0.sim.actors.index(arg0.actors[arg1])

    def get_actor_dof_properties(self, arg0, arg1):
        return arg0.actors[arg1].drive.copy()

    def set_actor_dof_properties(self, arg0, arg1, arg2):
        actor = arg0.actors[arg1]
        actor.drive[:] = arg2
        if arg0.sim.prepared:
            actor.apply_drive()
        return True

    def get_actor_rigid_body_properties(self, arg0, arg1):
        model, found = arg0.actors[arg1].model, []
        for b in arg0.actors[arg1].asset.bodies:
            own, turn = RigidBodyProperties(), np.zeros(9)
            mujoco.mju_quat2Mat(turn, model.body_iquat[b])
            turn = turn.reshape(3, 3)
            rows = np.float32(turn @ np.diag(model.body_inertia[b]) @ turn.T)
            own.mass, own.com = float(np.float32(model.body_mass[b])), Vec3(*np.float32(model.body_ipos[b]))
            own.inertia.x, own.inertia.y, own.inertia.z = (Vec3(*row) for row in rows)
            found.append(own)
        return found

    def set_actor_rigid_body_properties(self, env, actorHandle, props, recomputeInertia=False):
        self._before_prepare(env.sim)
        model = env.actors[actorHandle].model
        # Older MuJoCos do not look again at which frames are the same.
        for kind in ("body", "geom", "site"):
            getattr(model, kind + "_sameframe")[:] = 0
        model.body_simple[:] = 0
        for b, own in zip(env.actors[actorHandle].asset.bodies, props):
            model.body_mass[b] = own.mass
            model.body_ipos[b] = (own.com.x, own.com.y, own.com.z)
            rows = [[v.x, v.y, v.z] for v in (own.inertia.x, own.inertia.y, own.inertia.z)]
            values, vectors = np.linalg.eigh(np.float32(rows).astype(np.float64))
            if values[0] <= 0.0:
                raise RuleBroken("an inertia must be positive")
            if np.linalg.det(vectors) < 0:
                vectors[:, 0] *= -1
            model.body_inertia[b] = values
            mujoco.mju_mat2Quat(model.body_iquat[b], np.ascontiguousarray(vectors).ravel())
        return True

    def get_actor_rigid_shape_properties(self, arg0, arg1):
        found = []
        for friction, filter in zip(arg0.actors[arg1].friction, arg0.actors[arg1].filters):
            own = RigidShapeProperties()
            own.friction, own.filter = friction, filter
            found.append(own)
        return found

    def set_actor_rigid_shape_properties(self, arg0, arg1, arg2):
        actor, plane = arg0.actors[arg1], arg0.sim.plane
        actor.friction = [own.friction for own in arg2]
        if len(actor.shapes) != len(arg2):
            raise RuleBroken("there must be properties for each shape")
        filters = [own.filter for own in arg2]
        if filters != actor.filters:
            self._before_prepare(arg0.sim)
            actor.filters = filters
        for g, own in zip(actor.shapes, arg2):
            other = own.friction if plane is None else plane.static_friction
            actor.model.geom_friction[g, 0] = (own.friction + other) / 2.0
        return True

    def get_actor_rigid_body_shape_indices(self, arg0, arg1):
        start, found = 0, []
        for geoms in arg0.actors[arg1].asset.geoms:
            own = IndexRange()
            own.start, own.count = start, len(geoms)
            start += len(geoms)
            found.append(own)
        return found

    # --- tensors ------------------------------------------------------------------------------------------------

    def _acquire(self, sim, name):
        if name not in sim.refreshed:
            raise RuleBroken("%s is acquired before it was refreshed: it would not be numbers" % name)
        tensor = Tensor()
        tensor.array = sim.buffers[name]
        tensor.shape = tensor.array.shape
        tensor.gpu, tensor.mirrors = sim.gpu, sim.mirrors.setdefault(name, [])
        return tensor

    def acquire_actor_root_state_tensor(self, arg0):
        return self._acquire(arg0, "root")

    def acquire_dof_state_tensor(self, arg0):
        return self._acquire(arg0, "dof")

    def acquire_rigid_body_state_tensor(self, arg0):
        return self._acquire(arg0, "body")

    def acquire_net_contact_force_tensor(self, arg0):
        return self._acquire(arg0, "contact")

    def _refresh(self, sim, name, rows):
        if not sim.prepared:
            raise RuleBroken("refresh comes after prepare_sim")
        if sim.called & {"root", "dof"}:
            raise RuleBroken("a refresh between a setter and simulate may be stale")
        sim.buffers[name][:] = rows.reshape(sim.buffers[name].shape)
        for mirror in sim.mirrors.get(name, ()):
            mirror()
        sim.refreshed.add(name)
        return True

    def refresh_actor_root_state_tensor(self, arg0):
        return self._refresh(arg0, "root", np.stack([actor.root() for actor in arg0.actors]))

    def refresh_dof_state_tensor(self, arg0):
        return self._refresh(arg0, "dof", np.concatenate([actor.joint_state() for actor in arg0.actors]))

    def refresh_rigid_body_state_tensor(self, arg0):
        return self._refresh(arg0, "body", np.concatenate([actor.body_rows() for actor in arg0.actors]))

    def refresh_net_contact_force_tensor(self, arg0):
        return self._refresh(arg0, "contact", np.concatenate([actor.contact for actor in arg0.actors]))

    # --- setters ------------------------------------------------------------------------------------------------

    def _set(self, sim, name, *tensors):
        _log(name)
        if not sim.prepared:
            raise RuleBroken("setters come after prepare_sim")
        if name in sim.called:
            raise RuleBroken("%s is set twice between two simulates" % name)
        sim.called.add(name)
        for tensor in tensors:
            if tensor.source() is None:
                raise RuleBroken("a tensor for %s is gone before the simulator read it" % name)
            if tensor.gpu not in ("any", sim.gpu):
                raise RuleBroken("a tensor for %s is not where the pipeline has its own" % name)
            sim.held.append((name, tensor.source))
            # Nothing but an address is kept: what the tensor held is lost with it.

    @staticmethod
    def _order(sim, order):
        """The GPU reads what it is given when it simulates, and not before."""
        if sim.gpu is None:
            order()
        else:
            sim.orders.append(order)

    @staticmethod
    def _floats(tensor, shape):
        if tensor.dtype != "float32":
            raise RuleBroken("tensors for the simulator are float32, got %s" % tensor.dtype)
        if int(np.prod(tensor.shape)) != int(np.prod(shape)):
            raise RuleBroken("the whole buffer must be given, got %s" % (tensor.shape,))
        return lambda: tensor.read().reshape(shape)

    @staticmethod
    def _chosen(indices, count, size):
        if indices.dtype != "int32":
            raise RuleBroken("indices are int32, got %s" % indices.dtype)
        chosen = indices.read()
        if chosen.size != count or len(set(chosen.tolist())) != count:
            raise RuleBroken("there must be as many different indices as are counted")
        if count and not 0 <= chosen.min() <= chosen.max() < size:
            raise RuleBroken("an index is of no actor")
        return indices.read

    def set_actor_root_state_tensor_indexed(self, arg0, arg1, arg2, arg3):
        self._set(arg0, "root", arg1, arg2)
        rows, chosen = self._floats(arg1, (len(arg0.actors), 13)), self._chosen(arg2, arg3, len(arg0.actors))
        if arg0.actors[0].asset.fixed:
            raise RuleBroken("the root of a fixed actor cannot be set")

        def order():
            values = rows()
            for i in chosen():
                arg0.actors[i].set_root(values[i])

        self._order(arg0, order)
        return True

    def set_dof_state_tensor_indexed(self, arg0, arg1, arg2, arg3):
        self._set(arg0, "dof", arg1, arg2)
        joints = len(arg0.actors[0].asset.joints)
        if not joints:
            raise RuleBroken("actors without joints must not be passed")
        rows, chosen = self._floats(arg1, (len(arg0.actors), joints, 2)), self._chosen(arg2, arg3, len(arg0.actors))

        def order():
            values = rows()
            for i in chosen():
                arg0.actors[i].set_joints(values[i])

        self._order(arg0, order)
        return True

    def _command(self, sim, name, tensor):
        self._set(sim, name, tensor)
        rows = self._floats(tensor, (len(sim.actors), len(sim.actors[0].asset.joints)))

        def order():
            for actor, row in zip(sim.actors, rows()):
                getattr(actor, name)[:] = row

        self._order(sim, order)

    def set_dof_position_target_tensor(self, arg0, arg1):
        self._command(arg0, "target", arg1)
        return True

    def set_dof_actuation_force_tensor(self, arg0, arg1):
        self._command(arg0, "effort", arg1)
        return True

    def apply_rigid_body_force_tensors(self, sim, forceTensor=None, torqueTensor=None, space=CoordinateSpace.ENV_SPACE):
        if space == CoordinateSpace.LOCAL_SPACE:
            raise NotImplementedError("forces in the bodies' own frames")
        self._set(sim, "wrench", forceTensor, torqueTensor)
        shape = (len(sim.actors), len(sim.actors[0].asset.bodies), 3)
        force, torque = self._floats(forceTensor, shape), self._floats(torqueTensor, shape)

        def order():
            sim.wrench = np.concatenate([force(), torque()], axis=2)

        self._order(sim, order)
        return True

    # --- time ---------------------------------------------------------------------------------------------------

    def simulate(self, arg0):
        _log("simulate")
        if not arg0.prepared:
            raise RuleBroken("simulate comes after prepare_sim")
        for name, source in arg0.held:
            if source() is None:
                raise RuleBroken("a tensor for %s is gone before the simulator read it" % name)
        if arg0.simulated and not arg0.fetched and arg0.gpu is None:
            raise RuleBroken("results must be fetched between two simulates on the CPU")
        arg0.simulated += 1
        fault, _, when = os.environ.get("ISAACGYM_STANDIN_FAULT", "").partition(":")
        if when and arg0.simulated == int(when):
            if fault == "crash":
                os.abort()
            while fault == "hang":
                time.sleep(1.0)
            if fault == "overflow":
                pairs = arg0.params.physx.max_gpu_contact_pairs
                text = "Contact buffer overflow detected, please increase its size to at least %d in the scene desc!"
                _print("internal error : " + text % (2 * pairs))
        for order in arg0.orders:
            order()
        arg0.orders = []
        for i, actor in enumerate(arg0.actors):
            actor.simulate(arg0, None if arg0.wrench is None else arg0.wrench[i])
        arg0.wrench, arg0.called, arg0.held, arg0.fetched = None, set(), [], False

    def fetch_results(self, arg0, arg1):
        if not arg1:
            raise RuleBroken("fetch_results must wait")
        arg0.fetched = True


def acquire_gym():
    return Gym()
