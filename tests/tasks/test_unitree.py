"""G1 and H1: what is read from the package of models, what the task shows, how they stand, and their mirror image."""

import importlib.util
import math
from pathlib import Path

import mujoco
import numpy as np
import pytest
import torch

from algos.ppo import PPOConfig
from experiments import ppo_g1_velocity
from rlcore import random, symmetry, tree
from rlcore.env import auto_reset, batch
from rlcore.errors import InputError
from rlcore.physics.engine import drain_faults
from rlcore.physics.mujoco import load_model
from rlcore.randomize import Randomization, make_randomizer
from rlcore.symmetry import apply, axis_signs, mirror_joints, mirror_state
from tasks.unitree.body import COARSE, MODELS, PACKAGE, ROBOTS, rotor_gains, unitree, unitree_model
from tasks.unitree.velocity import make_unitree_velocity, velocity_symmetry

models = pytest.importorskip(PACKAGE.replace("-", "_"), reason=f"the models are not installed: pip install {PACKAGE}")

NUM = 16
MASS = {"g1": 33.341142, "h1": 51.437}  # kg, of the links in the model files

# The greatest torque of a motor, Nm, and the joints that have it.
TORQUES = {
    "g1": {
        139: "hip_roll knee",
        88: "hip_pitch hip_yaw waist_yaw",
        50: "ankle_pitch ankle_roll waist_roll waist_pitch",
        25: "shoulder_pitch shoulder_roll shoulder_yaw elbow wrist_roll",
        5: "wrist_pitch wrist_yaw",
    },
    "h1": {
        300: "knee",
        200: "hip_yaw hip_roll hip_pitch torso",
        40: "ankle shoulder_pitch shoulder_roll",
        18: "shoulder_yaw elbow",
    },
}


@pytest.fixture(scope="module", params=ROBOTS)
def env(request):
    """Without a curriculum and without pushes."""
    return make_unitree_velocity(request.param, 1, push_speed=0.0, stages=())


def robot_of(env):
    return env.spec.name.removesuffix("_velocity")


def standing(env):
    """The state of a robot in its standing pose, at rest."""
    qpos, _ = env.spec.model.keyframe("stand")
    state, _ = env.reset(env.params, random.key(0))
    start = env.engine.initial(qpos, torch.zeros(env.spec.model.nv, dtype=torch.float64))
    return tree.replace(state, physics=env.engine.forward({}, start))


def drawn(model):
    """For each mesh of each body the lowest and highest coordinates of its points in the body's frame, m."""
    boxes = {}
    for geom in np.flatnonzero(model.geom_type == mujoco.mjtGeom.mjGEOM_MESH):
        mesh, turn = model.geom_dataid[geom], np.zeros(9)
        start = model.mesh_vertadr[mesh]
        mujoco.mju_quat2Mat(turn, model.geom_quat[geom])
        points = model.mesh_vert[start : start + model.mesh_vertnum[mesh]] @ turn.reshape(3, 3).T + model.geom_pos[geom]
        boxes[model.geom_bodyid[geom], model.mesh(mesh).name] = points.min(0), points.max(0)
    return boxes


def test_what_is_seen_has_these_names_and_sizes(env):
    n = {"g1": 29, "h1": 19}[robot_of(env)]
    policy = [
        *(("angular_velocity", 3), ("gravity", 3), ("command", 3), ("gait", 2)),
        *(("joint_position", n), ("joint_velocity", n), ("last_action", n)),
    ]
    privileged = [
        *(("linear_velocity", 3), ("height", 1), ("foot_force", 2), ("foot_height", 2), ("mass", 1), ("friction", 2))
    ]
    assert list(env.spec.observations["policy"]) == policy
    assert list(env.spec.observations["critic"]) == policy + privileged
    assert env.spec.control_dt == 0.02 and env.spec.substeps == 4
    _, transition = env.step(env.params, standing(env), torch.zeros(n))
    # What experiments.report reads beside these are torque sensors and feet.
    assert transition.metrics.keys() >= {"velocity_error", "yaw_rate_error"}
    model = env.spec.model
    wanted = {f"{name}_torque" for name in model.actuators} | {"imu_gyro", "imu_accelerometer", "imu_orientation"}
    wanted |= {f"{side}_foot_{what}" for side in ("left", "right") for what in ("position", "velocity", "contact")}
    assert set(model.sensors) == wanted


def test_servos_have_the_gains_of_the_rotors_and_the_torques_of_the_motors(env):
    model = env.engine.mjmodel
    for i in range(model.nu):
        name = model.actuator(i).name
        part = name.removesuffix("_joint").removeprefix("left_").removeprefix("right_")
        torque = next(nm for nm, parts in TORQUES[robot_of(env)].items() if part in parts.split())
        assert model.actuator_forcerange[i].tolist() == [-torque, torque], name
        joint = model.joint(model.actuator_trnid[i, 0])
        np.testing.assert_allclose(model.actuator_ctrlrange[i], joint.range, rtol=1e-9)
        assert joint.frictionloss[0] == 0 and not model.jnt_actfrclimited[joint.id]
        kp, kd = model.actuator_gainprm[i, 0], -model.actuator_biasprm[i, 2]
        assert model.actuator_biasprm[i, 1] == -kp
        if robot_of(env) == "g1":
            assert (kp, kd) == rotor_gains(float(joint.armature[0])), name
    gains = {model.actuator(i).name: (model.actuator_gainprm[i, 0], -model.actuator_biasprm[i, 2]) for i in range(8)}
    if robot_of(env) == "g1":
        # A rotor of 0.010178 kg m2: (2 pi 10)^2 = 3947.84 times that, and 4 x 62.832 times that.
        assert gains["left_hip_pitch_joint"] == pytest.approx((40.179, 2.5579), rel=1e-4)
        assert gains["right_hip_pitch_joint"] == gains["left_hip_pitch_joint"]
    else:
        assert (gains["left_knee"], gains["right_hip_yaw"]) == ((200.0, 4.0), (150.0, 2.0))


def test_an_action_of_four_asks_for_the_whole_torque(env):
    """The servo of a joint in its pose is asked to go as far as takes it to its limit."""
    low, high = env.spec.action_low[0], env.spec.action_high[0]
    assert (low, high) == (-4.0, 4.0)
    # In the air without gravity; only hip pitches, whose targets stay within the joints' limits.
    state = standing(env)
    up = torch.where(torch.arange(env.spec.model.nq) == 2, 5.0, 0.0).double()
    physics = env.engine.initial(state.physics.qpos + up, state.physics.qvel)
    model, engine = env.spec.model, env.engine.mjmodel
    name = next(name for name in model.actuators if name.startswith("left_shoulder_pitch"))
    i = model.actuator(name)
    # With one substep the sensor tells the torque at its beginning, where nothing has moved.
    action = torch.where(torch.arange(model.nu) == i, 2.0, 0.0).double()
    ctrl = state.physics.qpos[7:] + 0.25 * action * torch.from_numpy(
        engine.actuator_forcerange[:, 1] / engine.actuator_gainprm[:, 0]
    )
    still = {"opt.gravity": torch.zeros(3).double()}
    after = env.engine.step(still, physics, ctrl, substeps=1)
    torque = after.sensordata[model.sensor(f"{name}_torque")]
    torch.testing.assert_close(torque, torch.tensor([0.5 * engine.actuator_forcerange[i, 1]]).double())
    # The environment's own control is that: four substeps later it is where four such steps lead.
    weightless = tree.replace(env.params, physics=still)
    moved, _ = env.step(weightless, tree.replace(state, physics=physics), action)
    assert torch.equal(moved.physics.qpos, env.engine.step(still, physics, ctrl, substeps=4).qpos)


def test_without_a_policy_it_stands_for_one_or_two_seconds_and_no_longer(env):
    """Two ankles of 28 (G1) or 40 (H1) Nm/rad cannot hold a body that needs m g h = 220 (500) Nm/rad, as in reality."""
    name, many = robot_of(env), batch(env)
    state = tree.map_leaves(lambda x: x.unsqueeze(0), standing(env))
    height = float(state.physics.qpos[0, 2])
    feet = [env.spec.model.sensor(f"{side}_foot_contact") for side in ("left", "right")]
    carried, fallen_after = [], math.inf
    for step in range(150):
        state, transition = many.step(env.params, state, torch.zeros(1, env.spec.action_size))
        physics = state.physics
        if step < 30:  # It settles on its soles, and leans no more than 0.2 rad.
            assert float(physics.qpos[0, 2]) > 0.96 * height
            assert float(transition.obs["policy"][0, 5]) < -math.cos(0.2)
        if 20 <= step < 30:
            carried.append(sum(float(physics.sensordata[0, foot]) for foot in feet))
        if bool(transition.terminated):
            fallen_after = 0.02 * (step + 1)
            break
    # On average the floor carries the weight (Newton).
    assert sum(carried) / len(carried) == pytest.approx(9.81 * MASS[name], rel=0.05)
    low, high = {"g1": (1.0, 1.3), "h1": (2.0, 2.7)}[name]
    assert low < fallen_after < high


def test_it_stands_by_its_servos_and_its_feet_are_where_they_belong():
    """Soles on the floor, below the body, and nothing but servos holds it."""
    model = unitree_model("g1")
    data = mujoco.MjData(model)
    mujoco.mj_resetDataKeyframe(model, data, 0)
    mujoco.mj_forward(model, data)
    for side, sign in (("left", 1), ("right", -1)):
        x, y, z = data.sensor(f"{side}_foot_position").data
        assert abs(x - data.subtree_com[1, 0]) < 0.02 and sign * y > 0.1 and abs(z) < 2e-3
    model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_ACTUATION
    mujoco.mj_step(model, data, 80)
    assert data.qpos[2] < 0.7 * model.key("stand").qpos[2]  # 0.4 s, in which the servos hold it


def test_bodies_and_joints_are_those_of_the_file_and_are_drawn_with_fewer_triangles(env):
    path = Path(models.__file__).parent / MODELS / unitree(robot_of(env)).scene
    theirs, ours = load_model(path), env.engine.mjmodel
    for field in ("body_mass", "body_inertia", "body_ipos", "body_pos", "jnt_range", "jnt_axis", "dof_armature"):
        np.testing.assert_array_equal(getattr(ours, field), getattr(theirs, field), err_msg=field)
    assert [ours.body(i).name for i in range(ours.nbody)] == [theirs.body(i).name for i in range(theirs.nbody)]
    assert ours.nmesh == theirs.nmesh and 0.1 * theirs.nmeshface < ours.nmeshface < 0.25 * theirs.nmeshface
    # What is drawn of each body is as large as before, and where it was, to a cell.
    boxes, wanted = drawn(ours), drawn(theirs)
    assert boxes.keys() == wanted.keys()
    for name, box in boxes.items():
        np.testing.assert_allclose(box, wanted[name], atol=COARSE, err_msg=str(name))


def test_only_feet_collide_and_only_with_the_floor(env):
    model = env.engine.mjmodel
    data, rng = mujoco.MjData(model), np.random.default_rng(0)
    seen = 0
    for _ in range(30):
        # Lying, kneeling, folded into itself and sunk into the floor.
        mujoco.mj_resetData(model, data)
        data.qpos[2] = rng.uniform(0.0, 0.7)
        data.qpos[3:7] = rng.normal(size=4)
        data.qpos[7:] = rng.uniform(*model.jnt_range[1:].T)
        mujoco.mj_forward(model, data)
        for pair in data.contact.geom:
            names = sorted(model.geom(i).name for i in pair)
            assert names[0] == "floor" and names[1].startswith(("left_foot", "right_foot"))
            seen += 1
    assert seen > 0
    mujoco.mj_resetDataKeyframe(model, data, 0)
    data.qpos[2] -= 0.003
    mujoco.mj_forward(model, data)
    assert data.ncon == 8  # four under each flat foot
    # Friction is the foot's alone.
    assert (data.contact.friction[:, 0] == {"g1": 0.6, "h1": 1.0}[robot_of(env)]).all()


def test_names_say_what_the_axes_are(env):
    """Signs by names, and by hand where a name does not tell, are what the directions of the axes give."""
    model = env.engine.mjmodel
    data = mujoco.MjData(model)
    mujoco.mj_kinematics(model, data)
    names = [model.joint(j).name for j in range(1, model.njnt)]
    # Joints that lean in the body's frame, as G1's shoulders, are mirrored too, but are no unit axes of the world.
    signs = axis_signs(names, torch.from_numpy(data.xaxis[1:].copy()))
    given = unitree(robot_of(env)).signs
    assert list(signs.values()) == mirror_joints(names, signs=given).sign.tolist()


def test_the_mirror_image_moves_and_sees_as_the_mirror_image(env):
    """Within what the models' left and right sides differ: a torso's centre of mass is 0.3 (G1) or 2.8 mm (H1) off."""
    name, many = robot_of(env), batch(env)
    maps, image_of = velocity_symmetry(env, name), mirror_state(env.spec.model, signs=unitree(name).signs)
    state, _ = many.reset(env.params, random.split(random.key(0), NUM))
    close = {"g1": (3e-4, 0.02), "h1": (1e-3, 0.06)}[name]  # rad and m, per second
    unlike = []
    for action in random.uniform(random.key(1), (20, NUM, env.spec.action_size), -1.0, 1.0):
        memory = {**state.memory, "last_action": apply(maps.action, state.memory["last_action"])}
        mirrored = tree.replace(state, physics=image_of(state.physics), memory=memory)
        image, _ = many.step(env.params, mirrored, apply(maps.action, action))
        state, _ = many.step(env.params, state, action)
        wanted = image_of(state.physics)
        torch.testing.assert_close(image.physics.qpos, wanted.qpos, rtol=0, atol=close[0])
        torch.testing.assert_close(image.physics.qvel, wanted.qvel, rtol=0, atol=close[1])
        unlike.append(float((state.physics.qvel - wanted.qvel).abs().max()))
    assert min(unlike) > 50 * close[1]  # no robot moved alike left and right


def test_maps_are_their_own_inverse(env):
    maps = velocity_symmetry(env, robot_of(env))
    for group, mirror in maps.observations.items():
        x = random.normal(random.key(2), (env.spec.observation_size(group),))
        image = symmetry.apply(mirror, x)
        assert torch.equal(symmetry.apply(mirror, image), x) and not torch.equal(image, x)
    x = random.normal(random.key(3), (env.spec.action_size,))
    assert torch.equal(apply(maps.action, apply(maps.action, x)), x)


def test_ranges_of_identity_change_nothing(env):
    assert make_randomizer(env, Randomization())(env.params, random.key(0)) is env.params
    # Ranges that are in use but add less than the last bit: fields are given, and they are the nominal ones.
    least = (0.0, 5e-324)
    ranges = Randomization(payload=least, payload_body="torso_link", com_offset=least, com_body="torso_link")
    params = make_randomizer(env, ranges)(env.params, random.key(0))
    nominal = env.engine.nominal("body_mass", "body_ipos")
    assert params.physics.keys() == nominal.keys()
    assert all(torch.equal(params.physics[name], nominal[name]) for name in nominal)
    action = random.uniform(random.key(1), (env.spec.action_size,), -1.0, 1.0)
    (_, one), (_, other) = (env.step(p, standing(env), action) for p in (env.params, params))
    for (name, x), (_, y) in zip(tree.named_leaves(one), tree.named_leaves(other), strict=True):
        assert torch.equal(x, y), name


def test_the_value_function_sees_what_was_drawn(env):
    ranges = Randomization(mass_scale=(1.2, 1.2), friction_scale=(0.5, 0.5))
    params = make_randomizer(env, ranges)(env.params, random.key(0))
    _, obs = env.reset(params, random.key(1))
    friction = {"g1": 0.6, "h1": 1.0}[robot_of(env)]
    torch.testing.assert_close(obs["critic"][-3:], torch.tensor([1.2, friction / 2, friction / 2]))
    _, obs = env.reset(env.params, random.key(1))
    torch.testing.assert_close(obs["critic"][-3:], torch.tensor([1.0, friction, friction]))


def test_random_actions_make_no_faults(env):
    drain_faults()
    many, few = batch(auto_reset(env)), NUM // 4
    state, _ = many.reset(env.params, random.split(random.key(1), few))
    low, high = env.spec.action_low[0], env.spec.action_high[0]
    fallen = 0
    for action in random.uniform(random.key(2), (80, few, env.spec.action_size), low, high):
        state, transition = many.step(env.params, state, action)
        for name, leaf in tree.named_leaves(transition):
            assert torch.isfinite(leaf).all(), name
        fallen += int(transition.terminated.sum())
    assert fallen > 0 and not drain_faults()


@pytest.mark.parametrize("robot", ROBOTS)
def test_an_update_of_the_experiment_is_finite(robot):
    tiny = PPOConfig(num_envs=8, num_steps=4, num_minibatches=2, num_epochs=2, symmetry_augmentation=True)
    config = ppo_g1_velocity.Config(robot=robot, num_threads=1, ppo=tiny)
    algorithm = ppo_g1_velocity.build(config).algorithm
    state = algorithm.init(random.key(0))
    after, metrics = algorithm.update(state)
    moved = 0
    for (name, old), (_, new) in zip(tree.named_leaves(state.params), tree.named_leaves(after.params), strict=True):
        assert torch.isfinite(new).all(), name
        moved += int(not torch.equal(old, new))
    assert moved > 0
    for name, value in metrics.items():
        assert name.startswith("episode") or torch.isfinite(value).all(), name


def test_what_is_missing_is_told(monkeypatch):
    with pytest.raises(InputError, match="robot must be one of g1, h1, got 'g2'"):
        unitree_model("g2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=f"pip install {PACKAGE}$"):
        make_unitree_velocity("g1")
