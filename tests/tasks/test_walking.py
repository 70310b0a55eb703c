"""What any robot on two legs gets from tasks/walking.py, shown with our own humanoid; and what it refuses."""

import mujoco
import pytest
import torch

from rlcore import random
from rlcore.errors import InputError
from rlcore.physics.mujoco import MujocoEngine, load_model
from tasks.humanoid import body
from tasks.walking import PARTS, WEIGHTS, WalkingSettings, make_walker, make_walking, walking_symmetry


@pytest.fixture(scope="module")
def walker():
    return make_walker(MujocoEngine(load_model(body.MODEL), 1))


@pytest.fixture(scope="module")
def env(walker):
    return make_walking(walker, "walk", WalkingSettings(posture={"*": 0.3}, weights={"height": -7.0}), stages=())


def test_an_action_moves_a_servo_by_its_share_of_the_torque_limit(walker, env):
    state, _ = env.reset(env.params, random.key(2))
    model, names = walker.engine.mjmodel, walker.engine.model.actuators
    action = torch.linspace(-6.0, 6.0, len(names), dtype=torch.float64)
    targets = walker.control(env.params, state, action)
    standing = model.key("stand").ctrl
    for i, name in enumerate(names):
        kp, limit = model.actuator(name).gainprm[0], model.actuator(name).forcerange[1]
        # Force of a servo at rest in the standing pose: kp (target - angle). Actions end at 4 either way.
        assert kp * (float(targets[i]) - standing[i]) == pytest.approx(limit * min(max(float(action[i]), -4.0), 4.0))


def test_episodes_begin_near_the_standing_pose(walker, env):
    stand, model = torch.as_tensor(walker.engine.mjmodel.key("stand").qpos), walker.engine.mjmodel
    draw = torch.func.vmap(lambda key: walker.initial(env.params, key))
    qpos, qvel = draw(random.split(random.key(1), 500))
    assert walker.standing_height == pytest.approx(0.834, abs=1e-3)
    torch.testing.assert_close(qpos[:, :3], (stand[:3] + torch.tensor([0.0, 0.0, 0.02])).expand(500, 3))
    # Half a rotation of at most 0.05 rad about each axis is the quaternion's vector, to third order.
    lean = 2 * qpos[:, 4:7].abs()
    assert 0.045 < float(lean.max()) <= 0.05 and torch.allclose(qpos[:, 3:7].norm(dim=-1), torch.ones(1).double())
    off = (qpos[:, 7:] - stand[7:]).abs()
    assert 0.115 < float(off.max()) <= 0.12
    bounds = torch.as_tensor(model.jnt_range[1:])
    assert bool(((qpos[:, 7:] >= bounds[:, 0]) & (qpos[:, 7:] <= bounds[:, 1])).all())
    assert 0.095 < float(qvel.abs().max()) <= 0.1 and float(qvel.mean().abs()) < 0.005


def test_feet_are_at_home_in_the_standing_pose(walker):
    # 0.055 m before the ankles, which are below the hips at +-0.085 m (humanoid.xml), and knees bent a little.
    (left_x, left_y), (right_x, right_y) = walker.home.tolist()
    assert left_x == right_x and left_y == -right_y and 0.0 < left_x < 0.1 and left_y > 0.05


def test_a_share_of_the_torque_scales_actions(walker, env):
    quarter = make_walker(walker.engine, action_share=0.25)
    _, pose = walker.engine.model.keyframe("stand")
    action = random.uniform(random.key(0), (21,), -1.0, 1.0, dtype=torch.float64)
    state, _ = env.reset(env.params, random.key(2))
    moved = walker.control(env.params, state, action) - pose
    torch.testing.assert_close(quarter.control(env.params, state, action) - pose, 0.25 * moved)


def test_weights_of_a_robot_take_the_place_of_the_usual_ones(env):
    weights = {name: float(value) for name, value in env.params.weights.items()}
    assert weights == {**WEIGHTS, "height": -7.0}
    assert set(env.spec.terms) == set(WEIGHTS)


def test_every_part_that_is_seen_has_a_mirror_image(env):
    assert {name for group in env.spec.observations.values() for name, _ in group} == set(PARTS)
    maps = walking_symmetry(env)
    assert maps.observations.keys() == {"policy", "critic"}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"action_share": 0.0}, "action_share must be above 0"),
        ({"action_bound": -1.0}, "action_bound must be above 0"),
        ({"joint_noise": -0.1}, "joint_noise must be 0 or more"),
        ({"lean": float("inf")}, "lean must be 0 or more"),
        ({"keyframe": "sit"}, "no keyframe 'sit'"),
    ],
)
def test_numbers_that_make_no_robot_are_refused(walker, arguments, match):
    with pytest.raises(InputError, match=match):
        make_walker(walker.engine, **arguments)


def test_motors_are_refused():
    spec = mujoco.MjSpec.from_file(str(body.MODEL))
    spec.actuator("left_knee").set_to_motor()
    with pytest.raises(InputError, match=r"must be position servos with a torque limit.*left_knee"):
        make_walker(MujocoEngine(spec.compile(), 1))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"weights": {"heigth": -1.0}}, "weights must be of reward terms .*got heigth"),
        ({"fallen_height": 1.0}, "fallen_height must be a share"),
    ],
)
def test_settings_that_make_no_task_are_refused(arguments, match):
    with pytest.raises(InputError, match=match):
        WalkingSettings(posture={"*": 0.3}, **arguments)


def test_a_robot_whose_feet_have_no_geom_of_their_name_is_refused():
    spec = mujoco.MjSpec.from_file(str(body.MODEL))
    spec.geom("left_foot_heel").name, spec.geom("left_foot_toe").name = "a", "b"
    walker = make_walker(MujocoEngine(spec.compile(), 1))
    with pytest.raises(InputError, match="a geom of each foot must be named like it, as left_foot_sole"):
        make_walking(walker, "walk", WalkingSettings(posture={"*": 0.3}))
