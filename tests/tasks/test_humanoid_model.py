"""The humanoid's MJCF by itself: proportions, servos, symmetry, contacts, and the physics of free flight."""

import pathlib

import mujoco
import numpy as np
import pytest

import tasks.humanoid

MODEL_PATH = pathlib.Path(tasks.humanoid.__file__).parent / "humanoid.xml"
LEG = ("hip_yaw", "hip_roll", "hip_pitch", "knee", "ankle_pitch", "ankle_roll")
ARM = ("shoulder_pitch", "shoulder_roll", "elbow")
WAIST = ("waist_yaw", "waist_roll", "waist_pitch")
JOINTS = WAIST + tuple(f"{side}_{joint}" for side in ("left", "right") for joint in LEG + ARM)


@pytest.fixture
def model():
    # Compiled anew for each test: some of them change it.
    return mujoco.MjModel.from_xml_path(str(MODEL_PATH))


@pytest.fixture
def data(model):
    data = mujoco.MjData(model)
    mujoco.mj_resetDataKeyframe(model, data, model.key("stand").id)
    mujoco.mj_forward(model, data)
    return data


def is_mirrored_with_opposite_sign(name):
    return name.endswith(("_yaw", "_roll"))


def mirror_name(name):
    if name.startswith("left_"):
        return "right_" + name.removeprefix("left_")
    if name.startswith("right_"):
        return "left_" + name.removeprefix("right_")
    return name


def random_joint_angles(model, rng):
    low, high = model.jnt_range[1:].T
    return rng.uniform(low, high)


def test_mass_height_and_proportions(model, data):
    assert model.body_subtreemass[model.body("pelvis").id] == pytest.approx(50.0, abs=1e-9)
    # Standing straight: the highest point of any of the robot's geoms less the lowest.
    data.qpos[7:] = 0
    mujoco.mj_forward(model, data)
    tops, bottoms = [], []
    for geom in range(model.ngeom):
        if model.geom_bodyid[geom] == 0:
            continue
        size, rotation = model.geom_size[geom], data.geom_xmat[geom].reshape(3, 3)
        kind = model.geom_type[geom]
        if kind == mujoco.mjtGeom.mjGEOM_SPHERE:
            extent = size[0]
        elif kind == mujoco.mjtGeom.mjGEOM_CAPSULE:
            extent = size[0] + size[1] * abs(rotation[2, 2])
        else:
            assert kind == mujoco.mjtGeom.mjGEOM_ELLIPSOID
            extent = np.linalg.norm(size * rotation[2])
        tops.append(data.geom_xpos[geom, 2] + extent)
        bottoms.append(data.geom_xpos[geom, 2] - extent)
    assert 1.55 < max(tops) - min(bottoms) < 1.65
    # Each leg with foot is .0145 + .0465 + .100 = .161 of the mass (Winter).
    for side in ("left", "right"):
        leg = model.body_subtreemass[model.body(f"{side}_thigh").id]
        assert leg == pytest.approx(0.161 * 50.0, rel=1e-6)
    # No inertia is impossible: the largest principal moment is at most the sum of the two others.
    moments = np.sort(model.body_inertia[1:], axis=1)
    assert (moments[:, 2] <= moments[:, 0] + moments[:, 1]).all()


def test_every_joint_is_limited_and_has_a_servo_of_its_name(model):
    assert model.nu >= 21
    names = [model.joint(index).name for index in range(model.njnt)]
    assert names[0] == "root" and model.jnt_type[0] == mujoco.mjtJoint.mjJNT_FREE
    assert set(names[1:]) == set(JOINTS) and len(names) == len(JOINTS) + 1
    assert [model.actuator(index).name for index in range(model.nu)] == names[1:]
    for index, name in enumerate(names[1:]):
        joint = model.joint(name)
        assert model.jnt_limited[joint.id] and joint.range[0] < joint.range[1]
        assert model.actuator_trnid[index, 0] == joint.id
        np.testing.assert_allclose(model.actuator_ctrlrange[index], joint.range, atol=1e-12)
        # An affine position servo: torque = kp ctrl - kp angle - kv velocity, clipped.
        kp = model.actuator_gainprm[index, 0]
        assert kp > 0
        np.testing.assert_array_equal(model.actuator_biasprm[index, :2], [0, -kp])
        assert model.actuator_biasprm[index, 2] < 0
        assert model.actuator_forcelimited[index] and 20 <= model.actuator_forcerange[index, 1] <= 200
        assert model.actuator_forcerange[index, 0] == -model.actuator_forcerange[index, 1]
        assert model.dof_armature[joint.dofadr[0]] > 0


def test_parameters_are_mirror_symmetric(model):
    for body in range(1, model.nbody):
        other = model.body(mirror_name(model.body(body).name)).id
        assert model.body_mass[body] == model.body_mass[other]
        np.testing.assert_array_equal(model.body_inertia[body], model.body_inertia[other])
        np.testing.assert_array_equal(model.body_pos[body], model.body_pos[other] * [1, -1, 1])
        np.testing.assert_array_equal(model.body_ipos[body], model.body_ipos[other] * [1, -1, 1])
    for name in JOINTS:
        joint, other = model.joint(name), model.joint(mirror_name(name))
        np.testing.assert_array_equal(joint.axis, other.axis)
        expected = -other.range[::-1] if is_mirrored_with_opposite_sign(name) else other.range
        np.testing.assert_array_equal(joint.range, expected)
        assert model.dof_armature[joint.dofadr[0]] == model.dof_armature[other.dofadr[0]]
        servo, other_servo = model.actuator(name).id, model.actuator(mirror_name(name)).id
        for field in (model.actuator_gainprm, model.actuator_biasprm, model.actuator_forcerange):
            np.testing.assert_array_equal(field[servo], field[other_servo])


def test_a_mirrored_pose_has_the_mirrored_centre_of_mass_and_feet(model):
    rng = np.random.default_rng(0)
    first, second = mujoco.MjData(model), mujoco.MjData(model)
    for _ in range(10):
        first.qpos[:7] = second.qpos[:7] = [0, 0, 1, 1, 0, 0, 0]
        first.qpos[7:] = random_joint_angles(model, rng)
        for name in JOINTS:
            sign = -1 if is_mirrored_with_opposite_sign(name) else 1
            second.joint(mirror_name(name)).qpos[:] = sign * first.joint(name).qpos
        mujoco.mj_forward(model, first)
        mujoco.mj_forward(model, second)
        np.testing.assert_allclose(second.subtree_com[1], first.subtree_com[1] * [1, -1, 1], atol=1e-12)
        for side, other in (("left", "right"), ("right", "left")):
            np.testing.assert_allclose(
                second.sensor(f"{side}_foot_position").data,
                first.sensor(f"{other}_foot_position").data * [1, -1, 1],
                atol=1e-12,
            )
            for geom in ("heel", "toe"):
                # The collision geoms too: a capsule's centre is the middle of its segment.
                np.testing.assert_allclose(
                    second.geom(f"{side}_foot_{geom}").xpos,
                    first.geom(f"{other}_foot_{geom}").xpos * [1, -1, 1],
                    atol=1e-12,
                )


def test_keyframe_touches_the_floor_and_its_servos_hold_the_pose(model, data):
    np.testing.assert_array_equal(data.ctrl, data.qpos[7:])
    low, high = model.jnt_range[1:].T
    assert ((data.qpos[7:] >= low) & (data.qpos[7:] <= high)).all()
    for side in ("left", "right"):
        heel = data.geom(f"{side}_foot_heel").xpos[2] - model.geom(f"{side}_foot_heel").size[0]
        toe = data.geom(f"{side}_foot_toe").xpos[2] - model.geom(f"{side}_foot_toe").size[0]
        assert heel == pytest.approx(0, abs=1e-4) and toe == pytest.approx(0, abs=1e-4)


def test_keyframe_stands_by_itself_for_five_seconds(model, data):
    start = data.qpos.copy()
    for _ in range(round(5.0 / model.opt.timestep)):
        mujoco.mj_step(model, data)
        # It sinks by what the knees give under the weight, and does not tip.
        assert data.qpos[2] > start[2] - 0.02
        assert data.xmat[1].reshape(3, 3)[2, 2] > np.cos(0.1)
    assert np.abs(data.qpos[:2]).max() < 0.05
    assert np.abs(data.qvel).max() < 0.05
    # In balance the floor carries the weight, half on each foot (Newton's third law).
    contact = [data.sensor(f"{side}_foot_contact").data[0] for side in ("left", "right")]
    assert sum(contact) == pytest.approx(50.0 * 9.81, rel=0.02)
    assert contact[0] == pytest.approx(contact[1], rel=0.02)


def test_standing_needs_the_servos(model, data):
    # Without them it collapses: so the test above cannot pass for a reason other than the servos.
    model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_ACTUATION
    mujoco.mj_step(model, data, round(1.0 / model.opt.timestep))
    assert data.qpos[2] < 0.6


def test_only_feet_collide_and_only_with_the_floor(model):
    data = mujoco.MjData(model)
    rng = np.random.default_rng(1)
    floor = model.geom("floor").id
    feet = {model.geom(f"{side}_foot_{part}").id for side in ("left", "right") for part in ("heel", "toe")}
    seen = 0
    for _ in range(50):
        # Lying, kneeling, folded into itself and sunk into the floor.
        mujoco.mj_resetData(model, data)
        data.qpos[2] = rng.uniform(0.0, 0.7)
        data.qpos[3:7] = rng.normal(size=4)
        data.qpos[7:] = random_joint_angles(model, rng)
        mujoco.mj_forward(model, data)
        for index in range(data.ncon):
            pair = set(data.contact.geom[index].tolist())
            assert floor in pair and len(pair & feet) == 1
            seen += 1
    assert seen > 0
    # Three contacts a foot is the most there can be: buffers of other engines are sized by it.
    mujoco.mj_resetDataKeyframe(model, data, 0)
    data.qpos[2] -= 0.005
    mujoco.mj_forward(model, data)
    assert data.ncon == 6


def energy_and_momentum(model, data):
    """Energy, J; linear momentum, kg m/s; angular momentum about the centre of mass, kg m^2/s."""
    mujoco.mj_forward(model, data)
    mujoco.mj_energyPos(model, data)
    mujoco.mj_energyVel(model, data)
    mujoco.mj_subtreeVel(model, data)
    mass = model.body_subtreemass[1]
    return data.energy.sum(), mass * data.subtree_linvel[1].copy(), data.subtree_angmom[1].copy()


@pytest.mark.parametrize("gravity", [0.0, -9.81])
def test_energy_and_momentum_are_conserved_in_free_flight(model, gravity):
    # What exchanges energy with the outside is off: servos (their kv is the only damping in the model) and
    # joint limits, whose springs dissipate; contact is off because it flies. Armature stays on: rotors store
    # kinetic energy, which mj_energyVel counts as it is in the inertia matrix, and act only between two
    # links, so that they change neither momentum. RK4 at 0.5 ms, because implicitfast is of first order.
    model.opt.integrator = mujoco.mjtIntegrator.mjINT_RK4
    model.opt.timestep = 5e-4
    model.opt.gravity[:] = [0, 0, gravity]
    model.opt.disableflags |= (
        mujoco.mjtDisableBit.mjDSBL_ACTUATION | mujoco.mjtDisableBit.mjDSBL_LIMIT | mujoco.mjtDisableBit.mjDSBL_CONTACT
    )
    assert (model.dof_damping == 0).all() and (model.dof_frictionloss == 0).all()
    assert (model.jnt_stiffness == 0).all()
    data = mujoco.MjData(model)
    rng = np.random.default_rng(2)
    mujoco.mj_resetDataKeyframe(model, data, 0)
    data.qpos[2] += 2.0
    data.qvel[:3] = [1.0, -0.5, 2.0]
    data.qvel[3:] = rng.uniform(-2, 2, model.nv - 3)
    before_pose = data.qpos[7:].copy()
    energy, linear, angular = energy_and_momentum(model, data)
    steps = 600
    for _ in range(steps):
        mujoco.mj_step(model, data)
    energy_after, linear_after, angular_after = energy_and_momentum(model, data)
    impulse = model.body_subtreemass[1] * gravity * steps * model.opt.timestep
    # It did move, so conservation is not that of standing still.
    assert np.abs(data.qpos[7:] - before_pose).max() > 0.3
    assert energy_after == pytest.approx(energy, rel=1e-6)
    np.testing.assert_allclose(linear_after, linear + np.array([0, 0, impulse]), atol=1e-6)
    np.testing.assert_allclose(angular_after, angular, atol=1e-6)
    # The sensor tells the same angular momentum.
    np.testing.assert_allclose(data.sensor("angular_momentum").data, angular_after, atol=1e-9)


def test_servo_torque_is_clipped_and_reported(model, data):
    # Far from its target each servo gives exactly its limit; at its target and at rest it gives nothing.
    np.testing.assert_allclose(data.actuator_force, 0, atol=1e-9)
    data.qpos[2] += 1.0
    data.ctrl[:] = data.qpos[7:] + 10.0
    model.actuator_ctrllimited[:] = 0
    mujoco.mj_forward(model, data)
    for index in range(model.nu):
        name = model.actuator(index).name
        assert data.sensor(f"{name}_torque").data[0] == model.actuator_forcerange[index, 1]


def test_sensors_are_there_with_their_sizes_and_frames(model, data):
    expected = {
        "imu_gyro": 3,
        "imu_accelerometer": 3,
        "imu_orientation": 4,
        "imu_linear_velocity": 3,
        "root_position": 3,
        "left_foot_contact": 1,
        "right_foot_contact": 1,
        "left_foot_position": 3,
        "right_foot_position": 3,
        "left_foot_velocity": 3,
        "right_foot_velocity": 3,
        "angular_momentum": 3,
    }
    expected |= {f"{name}_torque": 1 for name in JOINTS}
    sizes = {model.sensor(index).name: int(model.sensor_dim[index]) for index in range(model.nsensor)}
    assert sizes == expected

    # Turned by 90 degrees to the left and moving along world x: that is to the right in the body frame.
    data.qpos[2] += 1.0
    data.qpos[3:7] = [np.sqrt(0.5), 0, 0, np.sqrt(0.5)]
    data.qvel[:] = 0
    data.qvel[0] = 1.0
    data.qvel[5] = 0.0
    mujoco.mj_forward(model, data)
    np.testing.assert_allclose(data.sensor("imu_orientation").data, data.qpos[3:7], atol=1e-12)
    np.testing.assert_allclose(data.sensor("imu_linear_velocity").data, [0, -1, 0], atol=1e-12)
    np.testing.assert_allclose(data.sensor("root_position").data, data.qpos[:3], atol=1e-12)
    np.testing.assert_allclose(data.sensor("left_foot_velocity").data, [1, 0, 0], atol=1e-12)
    assert data.sensor("left_foot_contact").data[0] == 0
    # Left is left: in world axes now at smaller x, since the robot faces +y.
    left, right = (data.sensor(f"{side}_foot_position").data for side in ("left", "right"))
    assert left[0] < right[0]


def test_what_is_only_looked_at_weighs_nothing_and_can_be_taken_out(model):
    # Training models may drop group 2 for a few per cent of speed: the motion is the same.
    spec = mujoco.MjSpec.from_file(str(MODEL_PATH))
    for geom in list(spec.geoms):
        if geom.classname is not None and geom.classname.name == "visual":
            spec.delete(geom)
    bare = spec.compile()
    assert bare.ngeom < model.ngeom
    ends = []
    for each in (model, bare):
        data = mujoco.MjData(each)
        mujoco.mj_resetDataKeyframe(each, data, 0)
        mujoco.mj_step(each, data, 100)
        ends.append(data.qpos.copy())
    np.testing.assert_array_equal(ends[0], ends[1])
