"""Isaac Gym's running task on our ant and humanoid: observations by name, rewards by hand, falls, beginnings."""

import dataclasses
import math

import mujoco
import numpy as np
import pytest
import torch

from rlcore import random, tree
from rlcore.env import auto_reset, batch
from rlcore.errors import InputError
from rlcore.physics.engine import drain_faults
from rlcore.physics.mujoco import MujocoEngine, load_model
from tasks import ant
from tasks.ant import make_ant
from tasks.humanoid import run
from tasks.humanoid.run import make_humanoid_run, motor_model
from tasks.running import CONTROL_DT, TARGET, make_runner

NUM = 256


@pytest.fixture(scope="module")
def the_ant():
    return make_ant(1)


@pytest.fixture(scope="module")
def the_humanoid():
    return make_humanoid_run(1)


@pytest.fixture(params=["the_ant", "the_humanoid"])
def env(request):
    return request.getfixturevalue(request.param)


def still(env, position=None, quaternion=(1.0, 0.0, 0.0, 0.0), joints=None, qvel=None):
    """A state far above the floor, where a step changes little but what is asked for."""
    m = env.spec.model
    root = torch.tensor([*(position or (0.0, 0.0, 5.0)), *quaternion], dtype=torch.float64)
    middle = torch.tensor([(m.joint(j).lower + m.joint(j).upper) / 2 for j in m.actuator_joints]).double()
    qvel = torch.zeros(m.nv).double() if qvel is None else qvel
    state, _ = env.reset(env.params, random.key(0))
    physics = env.engine.initial(torch.cat([root, middle if joints is None else joints]), qvel)
    return tree.replace(state, physics=env.engine.forward({}, physics))


def seen(env, transition):
    names, sizes = zip(*env.spec.parts("policy"), strict=True)
    return dict(zip(names, torch.split(transition.next_obs["policy"].double(), list(sizes)), strict=True))


def weightless(env):
    """Parameters without gravity."""
    return tree.replace(env.params, physics={"opt.gravity": torch.zeros(3).double()})


def test_observations_by_name_and_size(the_ant, the_humanoid):
    first = [("height", 1), ("linear_velocity", 3), ("angular_velocity", 3), ("angles", 3), ("projections", 2)]
    joints = lambda n: [("joint_position", n), ("joint_velocity", n)]  # noqa: E731
    assert list(the_ant.spec.parts("policy")) == [*first, *joints(8), ("foot_force", 24), ("last_action", 8)]
    expected = [*first, *joints(21), ("joint_force", 21), ("foot_force", 12), ("last_action", 21)]
    assert list(the_humanoid.spec.parts("policy")) == expected
    assert the_ant.spec.observation_size("policy") == 60
    assert the_humanoid.spec.observation_size("policy") == 108
    for env in (the_ant, the_humanoid):
        assert set(env.spec.action_low) == {-1.0} and set(env.spec.action_high) == {1.0}
        assert env.spec.control_dt == 0.0166 and env.spec.substeps == 2


def test_observations_are_what_mujoco_computes(env):
    m = env.spec.model
    qvel = random.uniform(random.key(1), (m.nv,), -1.0, 1.0, dtype=torch.float64)
    state = still(env, (0.3, 40.0, 5.0), (0.8, 0.3, -0.1, 0.5099), qvel=qvel)
    action = random.uniform(random.key(2), (m.nu,), -0.5, 0.5)
    after, transition = env.step(env.params, state, action)
    obs, data = seen(env, transition), mujoco.MjData(env.engine.mjmodel)
    data.qpos[:], data.qvel[:] = after.physics.qpos.numpy(), after.physics.qvel.numpy()
    mujoco.mj_forward(env.engine.mjmodel, data)
    velocity, root = np.zeros(6), 1
    mujoco.mj_objectVelocity(env.engine.mjmodel, data, mujoco.mjtObj.mjOBJ_XBODY, root, velocity, 1)
    matrix = data.xmat[root].reshape(3, 3)
    target = np.array([TARGET, 0.0]) - data.qpos[:2]
    yaw, bearing = math.atan2(matrix[1, 0], matrix[0, 0]), math.atan2(target[1], target[0])
    humanoid = "joint_force" in obs
    joints = [m.joint(name) for name in m.actuator_joints]
    scaled = [-1 + 2 * (data.qpos[j.qpos][0] - j.lower) / (j.upper - j.lower) for j in joints]
    expected = {
        "height": data.qpos[2:3],
        "linear_velocity": velocity[3:],
        "angular_velocity": (0.25 if humanoid else 1.0) * velocity[:3],
        "angles": [yaw, math.atan2(matrix[2, 1], matrix[2, 2]), bearing - yaw],
        "projections": [matrix[2, 2], matrix[:2, 0] @ target / np.linalg.norm(target)],
        "joint_position": scaled,
        "joint_velocity": (0.1 if humanoid else 0.2) * np.array([data.qvel[j.qvel][0] for j in joints]),
        "last_action": action.numpy(),
    }
    if humanoid:
        # What each joint feels, N m: action x the motor's torque.
        expected["joint_force"] = 0.01 * action.numpy() * torques(env)
    for name, value in expected.items():
        np.testing.assert_allclose(obs[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    feet = env.engine.model.sensor
    first, last = (
        ("left_foot_force", "right_foot_torque") if humanoid else ("front_left_foot_force", "front_right_foot_torque")
    )
    forces = after.physics.sensordata[feet(first).start : feet(last).stop]
    np.testing.assert_allclose(obs["foot_force"], (0.01 if humanoid else 0.1) * forces, rtol=1e-5, atol=1e-5)
    assert float(forces.abs().max()) > 0.1


def torques(env):
    """Of each motor at full action, N m: half of the servo's for the humanoid."""
    servos = load_model(run.MODEL).actuator_forcerange[:, 1]
    return 0.5 * servos if env.spec.name == "humanoid_run" else np.full(8, 15.0)


def per_step(transition):
    return {name: float(value) for name, value in transition.terms.items()}


def test_what_a_quiet_step_is_paid(env):
    """Far above the floor, level, facing the target, without action and weight: alive, up and heading in full.

    Ant: 0.5 + 0.1 + 0.5 = 1.1. Humanoid: 2.0 + 0.1 + 0.5 = 2.6.
    """
    _, transition = env.step(weightless(env), still(env), torch.zeros(env.spec.action_size))
    terms, humanoid = per_step(transition), env.spec.name == "humanoid_run"
    assert terms["alive"] == pytest.approx(2.0 if humanoid else 0.5)
    assert terms["up"] == pytest.approx(0.1) and terms["heading"] == pytest.approx(0.5)
    for name in ("progress", "action", "energy", "limits", "death"):
        assert terms[name] == pytest.approx(0.0, abs=1e-9), name
    assert float(transition.reward) == pytest.approx(2.6 if humanoid else 1.1)
    assert not transition.terminated


def test_progress_is_speed_towards_the_target(env):
    """From (0, 750) m the target is 1250 m away, at (0.8, -0.6): 3 m/s along x and -1 along y make 2.4 + 0.6."""
    qvel = torch.zeros(env.spec.model.nv).double()
    qvel[:2] = torch.tensor([3.0, -1.0])
    state = still(env, (0.0, 750.0, 5.0), qvel=qvel)
    _, transition = env.step(weightless(env), state, torch.zeros(env.spec.action_size))
    # Published potentials are distances over the interval, so progress has the unit of a speed.
    assert per_step(transition)["progress"] == pytest.approx(3.0, abs=1e-3)


@pytest.mark.parametrize(("degrees", "paid"), [(30.0, 0.5), (60.0, 0.5 * 0.5 / 0.8), (120.0, -0.5 * 0.5 / 0.8)])
def test_heading_is_paid_by_its_projection(env, degrees, paid):
    """cos 30 degrees is above 0.8; cos 60 degrees is 0.5; turned away it costs."""
    turn = math.radians(degrees) / 2
    state = still(env, quaternion=(math.cos(turn), 0.0, 0.0, math.sin(turn)))
    _, transition = env.step(weightless(env), state, torch.zeros(env.spec.action_size))
    assert per_step(transition)["heading"] == pytest.approx(paid, abs=1e-6)
    assert per_step(transition)["up"] == pytest.approx(0.1)


@pytest.mark.parametrize(("degrees", "paid"), [(20.0, 0.1), (23.0, 0.0), (180.0, 0.0)])
def test_up_is_paid_above_its_threshold(env, degrees, paid):
    """cos 21.6 degrees is 0.93."""
    lean = math.radians(degrees) / 2
    state = still(env, quaternion=(math.cos(lean), math.sin(lean), 0.0, 0.0))
    _, transition = env.step(weightless(env), state, torch.zeros(env.spec.action_size))
    assert per_step(transition)["up"] == pytest.approx(paid)


def test_costs_of_action_and_energy(env):
    """Actions beyond [-1, 1] count as their bounds; energy weighs each joint by its motor's share of the strongest."""
    humanoid = env.spec.name == "humanoid_run"
    action = torch.linspace(-2.0, 2.0, env.spec.action_size)
    _, transition = env.step(weightless(env), still(env), action)
    clipped, terms = action.clamp(-1, 1).double(), per_step(transition)
    assert terms["action"] == pytest.approx(-(0.01 if humanoid else 0.005) * float((clipped**2).sum()))
    speed = seen(env, transition)["joint_velocity"]
    share = torch.from_numpy(torques(env) / torques(env).max())
    expected = -0.05 * float(((clipped * speed).abs() * share).sum())
    assert terms["energy"] == pytest.approx(expected, rel=1e-5) and expected < -1e-3


def test_costs_of_limits():
    """Ant: 0.1 for each of two joints above 0.99. Humanoid: 0.25 (0.995 - 0.98) / 0.02 x 0.5 + 0.25 x 1 = 0.34375."""
    share = torch.tensor([0.5, 1.0, 1.0, 0.2]).double()
    assert float(ant.at_limit(torch.tensor([0.995, 1.2, -1.0, 0.98]).double(), share)) == pytest.approx(0.2)
    assert float(run.at_limit(torch.tensor([0.995, -1.0, 0.98, 0.1]).double(), share)) == pytest.approx(0.34375)


def test_limits_reach_the_reward(env):
    m = env.spec.model
    upper = torch.tensor([m.joint(j).upper for j in m.actuator_joints]).double()
    lower = torch.tensor([m.joint(j).lower for j in m.actuator_joints]).double()
    joints = (lower + upper) / 2
    joints[2] = upper[2]
    _, transition = env.step(weightless(env), still(env, joints=joints), torch.zeros(m.nu))
    # A soft limit gives a little: the ant pays 0.1 for one joint; the humanoid's third waist joint, of 60 of 90 N m,
    # pays close to 0.25 x 2/3.
    paid = per_step(transition)["limits"]
    expected = -0.25 * 2 / 3 if env.spec.name == "humanoid_run" else -0.1
    assert paid == pytest.approx(expected, rel=0.2)


def test_a_fall_replaces_the_reward(env):
    humanoid = env.spec.name == "humanoid_run"
    fallen, death = (run.FALLEN_HEIGHT, -1.0) if humanoid else (0.31, -2.0)
    qvel = torch.zeros(env.spec.model.nv).double()
    qvel[0] = 4.0
    for height, over in ((fallen + 0.02, False), (fallen - 0.02, True)):
        state = still(env, (0.0, 0.0, height), qvel=qvel)
        # Without contacts, so that it stays where it was put.
        params = tree.replace(env.params, physics={
            "opt.gravity": torch.zeros(3).double(),
            "geom_margin": torch.full((len(env.spec.model.geoms),), -10.0).double(),
        })  # fmt: skip
        _, transition = env.step(params, state, torch.ones(env.spec.action_size))
        assert bool(transition.terminated) == over and not transition.metrics["fault"]
        terms = per_step(transition)
        assert float(transition.reward) == pytest.approx(sum(terms.values()))
        if over:
            assert terms.pop("death") == pytest.approx(death) and set(terms.values()) == {0.0}
        else:
            assert terms["death"] == 0.0 and terms["alive"] > 0


def test_weights_are_published_ones_over_the_interval(env):
    humanoid = env.spec.name == "humanoid_run"
    published = {"progress": 1.0, "up": 0.1, "heading": 0.5, "limits": -1.0, "energy": -0.05}
    published |= {"alive": 2.0, "action": -0.01, "death": -1.0} if humanoid else {}
    published |= {} if humanoid else {"alive": 0.5, "action": -0.005, "death": -2.0}
    assert {n: float(w) * CONTROL_DT for n, w in env.params.weights.items()} == pytest.approx(published)


def test_episodes_begin_near_the_nominal_posture(env):
    state, _ = batch(env).reset(env.params, random.split(random.key(3), NUM))
    m = env.spec.model
    height = run.START_HEIGHT if env.spec.name == "humanoid_run" else 0.44
    root = torch.tensor([0.0, 0.0, height, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    assert torch.equal(state.physics.qpos[:, :7], root.expand(NUM, 7))
    assert torch.equal(state.physics.qvel[:, :6], torch.zeros(NUM, 6).double())
    # Uniform on +-0.1: deviation 0.0577.
    assert float(state.physics.qvel.abs().max()) <= 0.1
    np.testing.assert_allclose(state.physics.qvel[:, 6:].std(0), 0.0577, rtol=0.2)
    for j, name in enumerate(m.actuator_joints):
        joint, position = m.joint(name), state.physics.qpos[:, 7 + j]
        # Around zero, or the limit nearest to it, within 0.2 rad and the limits.
        around = min(max(0.0, joint.lower), joint.upper)
        assert float(position.min()) >= max(joint.lower, around - 0.2)
        assert float(position.max()) <= min(joint.upper, around + 0.2)
        assert float(position.max() - position.min()) > 0.15


def test_the_ant_stands_and_random_actions_are_no_faults(the_ant):
    drain_faults()
    many = batch(auto_reset(the_ant))
    state, _ = many.reset(the_ant.params, random.split(random.key(4), 16))
    for _ in range(60):
        state, transition = many.step(the_ant.params, state, torch.zeros(16, 8))
        assert not transition.terminated.any()
    assert float(state.physics.qvel.abs().max()) < 0.05
    fallen = 0
    for action in random.uniform(random.key(5), (120, 16, 8), -1.0, 1.0):
        state, transition = many.step(the_ant.params, state, action)
        fallen += int(transition.terminated.sum())
    assert fallen > 0 and not drain_faults()


def test_vmap_equals_a_loop(env):
    env = auto_reset(env)
    many = batch(env)
    state, _ = many.reset(env.params, random.split(random.key(6), 2))
    alone = [tree.index(state, i) for i in range(2)]
    for action in random.uniform(random.key(7), (5, 2, env.spec.action_size), -1.2, 1.2):
        state, transition = many.step(env.params, state, action)
        for i in range(2):
            alone[i], single = env.step(env.params, alone[i], action[i])
            pairs = zip(
                tree.named_leaves((tree.index(state, i), tree.index(transition, i))),
                tree.named_leaves((alone[i], single)),
                strict=True,
            )
            for (name, a), (_, b) in pairs:
                assert torch.equal(a, b), name


def test_episodes_are_cut_after_their_steps():
    env = make_ant(1, steps=2)
    state, _ = env.reset(env.params, random.key(0))
    state, first = env.step(env.params, state, torch.zeros(8))
    _, second = env.step(env.params, state, torch.zeros(8))
    assert (bool(first.truncated), bool(second.truncated)) == (False, True)


def test_the_humanoid_has_motors_of_its_servos_torque():
    servos, motors = load_model(run.MODEL), motor_model()
    assert motors.nu == servos.nu == 21
    assert [motors.actuator(a).name for a in range(21)] == [servos.actuator(a).name for a in range(21)]
    np.testing.assert_allclose(motors.dof_damping[6:], 0.5 * -servos.actuator_biasprm[:, 2])
    np.testing.assert_allclose(motors.body_mass, servos.body_mass)
    data = mujoco.MjData(motors)
    data.ctrl[:] = np.linspace(-2, 2, 21)
    mujoco.mj_forward(motors, data)
    expected = np.clip(data.ctrl, -1, 1) * 0.5 * servos.actuator_forcerange[:, 1]
    np.testing.assert_allclose(data.actuator_force, expected)
    np.testing.assert_allclose(data.qfrc_actuator[6:], expected)


def test_settings_and_models_that_cannot_work():
    for height in (0.0, 0.5, math.nan):
        with pytest.raises(InputError, match=r"fallen_height must be above 0 m and below start_height 0\.44"):
            dataclasses.replace(ant.SETTINGS, fallen_height=height)
    engine = MujocoEngine(load_model(ant.MODEL), 1)
    with pytest.raises(InputError, match="no sensor 'tail_force'"):
        make_runner(engine, "ant", dataclasses.replace(ant.SETTINGS, foot_sensors=["tail_force"]))
    apart = ["front_left_foot_force", "back_left_foot_force"]
    with pytest.raises(InputError, match="must follow each other: front_left_foot_force, back_left"):
        make_runner(engine, "ant", dataclasses.replace(ant.SETTINGS, foot_sensors=apart))
    free = MujocoEngine(_without_limits(), 1)
    with pytest.raises(InputError, match="joints without limits cannot be scaled by them: front_left_hip, "):
        make_runner(free, "ant", ant.SETTINGS)


def _without_limits():
    spec = mujoco.MjSpec.from_file(str(ant.MODEL))
    for joint in spec.joints:
        joint.limited = mujoco.mjtLimited.mjLIMITED_FALSE
    return spec.compile()
