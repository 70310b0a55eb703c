"""What legged robots are watched by: every number by hand, for two feet and for four."""

import math

import pytest
import torch
from torch.func import vmap

from rlcore import random, tree
from rlcore.env import Params
from rlcore.errors import InputError
from rlcore.jit import jit
from rlcore.measurement import scalars
from rlcore.monitoring import robot_metrics
from rlcore.physics.mujoco import MujocoEngine, load_model
from rlcore.robot import joint_group, make_robot
from tasks import ant
from tasks.humanoid.run import motor_model
from tests.rlcore.rewards.test_locomotion import DT, NOTHING, engine, feet, given, robot

WEIGHT = 50 * 9.81  # N
ACTION = torch.zeros(21).double()


def measured(after, before=None, params=NOTHING, **settings):
    """The numbers of one step by name."""
    metrics = robot_metrics(engine(), robot(), DT, **settings)(params, before or given(), ACTION, after)
    return {name: float(value) for name, value in scalars(metrics).items()}


# --- Joints ---

TORQUES = {"left_knee_torque": 3.0, "right_knee_torque": -5.0, "waist_yaw_torque": -4.0}


def test_torques_of_joints_and_of_their_groups():
    now = measured(given(sensors=TORQUES))
    joints = {name: now[f"torque/{name}"] for name in robot().joints}
    named = {"left_knee": 3.0, "right_knee": 5.0, "waist_yaw": 4.0}
    assert joints == {**dict.fromkeys(robot().joints, 0.0), **named}
    groups = {name.removeprefix("torque_group/"): x for name, x in now.items() if name.startswith("torque_group/")}
    # Two knees, three joints of the waist, 21 in all.
    expected = {"knee": 4.0, "waist": 4 / 3, "hip": 0.0, "ankle": 0.0, "shoulder": 0.0, "elbow": 0.0, "all": 12 / 21}
    assert groups == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("left_hip_yaw", "hip"), ("right_knee", "knee"), ("waist_roll", "waist"), ("FL_calf_joint", "calf"),
        ("front_left_ankle", "ankle"), ("LHipRoll", "hip"), ("Left_Shoulder_Pitch", "shoulder"),
        ("l_hip_ie", "hip"), ("right_shoulder1", "shoulder"), ("hip_pitch_left", "hip"), ("left", "left"), ("7", "7"),
    ],
)  # fmt: skip
def test_groups_are_named_by_joints(name, group):
    assert joint_group(name) == group


def test_groups_share_out_the_joints():
    groups = robot().groups()
    assert sorted(place for places in groups.values() for place in places) == list(range(21))
    assert {name: len(places) for name, places in groups.items()} == {
        "waist": 3, "shoulder": 4, "elbow": 2, "hip": 6, "knee": 2, "ankle": 4,
    }  # fmt: skip


def test_saturation_counts_actuators_at_their_limits():
    # Knees give 180 Nm at most, the waist's yaw 80: within a thousandth of it, or not.
    sensors = {"left_knee_torque": 180.0, "right_knee_torque": 179.0, "waist_yaw_torque": -79.95}
    now = given(sensors=sensors)
    assert measured(now)["torque_saturation"] == pytest.approx(2 / 21)
    # Of robots of their own, their own limits count.
    field = "actuator_forcerange"
    weaker = Params({field: 0.99 * engine().nominal(field)[field]}, {}, {})
    assert measured(now, params=weaker)["torque_saturation"] == pytest.approx(3 / 21)
    limits = torch.full((21,), 200.0)
    assert measured(now, torque_limits=limits)["torque_saturation"] == 0.0
    limits[robot().joints.index("left_knee")] = 100.0
    assert measured(now, torque_limits=limits)["torque_saturation"] == pytest.approx(1 / 21)


def test_actuators_without_limits_have_no_saturation():
    motors = MujocoEngine(motor_model(), 1)
    legged = make_robot(motors.model, pose=torch.zeros(21).double())
    qpos = torch.cat([torch.tensor([0, 0, 0.9, 1, 0, 0, 0]).double(), torch.zeros(21).double()])
    physics = motors.forward({}, motors.initial(qpos, torch.zeros(27).double()))
    now = tree.replace(given(), physics=physics)
    assert "torque_saturation" not in robot_metrics(motors, legged, DT)(NOTHING, now, ACTION, now)
    limited = robot_metrics(motors, legged, DT, torque_limits=torch.full((21,), 50.0))(NOTHING, now, ACTION, now)
    assert float(limited["torque_saturation"]) == 0.0


# --- Power and what it moves ---


def working(watts, speed):
    """A robot that spends so many watts in one knee and moves at that speed in some direction."""
    sensors = {"left_knee_torque": -watts / 2}
    return given(linear=(0.6 * speed, 0.8 * speed, 5.0), speeds={"left_knee": 2.0}, sensors=sensors)


def test_power_and_speed():
    now = measured(given(linear=(0.3, -0.4, 7.0), speeds={"left_knee": -2.0, "waist_yaw": 0.5}, sensors=TORQUES))
    # |3 x -2| + |-4 x 0.5|, whether given or taken; the speed is horizontal.
    assert now["power"] == pytest.approx(8.0) and now["speed"] == pytest.approx(0.5)
    assert now["height"] == pytest.approx(0.8)


def test_cost_of_transport_is_energy_per_weight_and_distance():
    assert measured(working(100.0, 0.5))["cost_of_transport"] == pytest.approx(100 / (WEIGHT * 0.5))
    metrics = robot_metrics(engine(), robot(), DT)
    steps = [metrics(NOTHING, given(), ACTION, working(*x)) for x in ((100.0, 0.5), (900.0, 0.09), (300.0, 1.5))]
    means = scalars(tree.map_leaves(lambda x: x.mean(0), tree.stack(steps)))
    # 400 W over 2 m/s: the robot that stands and works counts for nothing.
    assert float(means["cost_of_transport"]) == pytest.approx(400 / (WEIGHT * 2.0))
    assert float(means["power"]) == pytest.approx(1300 / 3)


def test_cost_of_transport_of_a_robot_that_stands_is_none():
    assert math.isnan(measured(working(100.0, 0.09))["cost_of_transport"])
    assert math.isnan(measured(working(0.0, 0.0))["cost_of_transport"])
    assert not math.isnan(measured(working(100.0, 0.09), slowest=0.05)["cost_of_transport"])


def test_a_robot_of_its_own_has_its_own_weight():
    mass = {"body_mass": 2 * engine().nominal("body_mass")["body_mass"]}
    moon = {"opt.gravity": torch.tensor([0.0, 0.0, -1.62]).double()}
    for physics, weight in ((mass, 2 * WEIGHT), (moon, 50 * 1.62), ({**mass, **moon}, 100 * 1.62)):
        now = measured(working(100.0, 0.5), params=Params(physics, {}, {}))
        assert now["cost_of_transport"] == pytest.approx(100 / (weight * 0.5))
    friction = {"geom_friction": engine().nominal("geom_friction")["geom_friction"]}
    now = measured(working(100.0, 0.5), params=Params(friction, {}, {}))
    assert now["cost_of_transport"] == pytest.approx(100 / (WEIGHT * 0.5))


# --- Feet ---


def standing(*forces, memory=None):
    sensors = dict(zip(("left_foot_contact", "right_foot_contact"), forces, strict=True))
    return given(sensors=sensors, memory=memory or {})


@pytest.mark.parametrize(
    ("forces", "pattern"),
    [((0.0, 0.9), "none"), ((400.0, 0.0), "left_foot"), ((1.0, 1.1), "right_foot"), ((250.0, 240.0), "both")],
)
def test_which_feet_carry(forces, pattern):
    now = measured(standing(*forces))
    shares = {name: now[f"contact/{name}"] for name in ("none", "left_foot", "right_foot", "both")}
    assert shares == {name: float(name == pattern) for name in shares}
    assert "contact/air_time" in now


def test_which_of_four_feet_carry():
    ants = MujocoEngine(load_model(ant.MODEL), 1)
    legged = make_robot(ants.model, pose=torch.zeros(8).double(), feet=ant.LEGS)
    metrics = robot_metrics(ants, legged, DT)
    names = ("none", *ant.LEGS, "several", "all")
    for carrying, pattern in (
        ((), "none"), (("back_right",), "back_right"), (ant.LEGS[:3], "several"), (ant.LEGS[1:3], "several"),
        (ant.LEGS, "all"),
    ):  # fmt: skip
        physics = ants.initial(torch.tensor([0, 0, 0.5, 1, 0, 0, 0, *[0] * 8]).double(), torch.zeros(14).double())
        sensordata = physics.sensordata.clone()
        for leg in carrying:
            sensordata[ants.model.sensor(f"{leg}_contact")] = 2.0
        state = tree.replace(given(), physics=tree.replace(physics, sensordata=sensordata), memory={})
        now = scalars(metrics(NOTHING, state, torch.zeros(8), state))
        assert {name: float(now[f"contact/{name}"]) for name in names} == {n: float(n == pattern) for n in names}
        # No memory of feet, no time in the air.
        assert "contact/air_time" not in now


def test_steps_are_counted_where_a_foot_lands():
    def landings(before, after):
        return measured(standing(*after), before=standing(*before))["contact/landings_per_second"]

    # One landing in an interval of 0.02 s is 50 a second.
    assert landings((0.0, 400.0), (30.0, 400.0)) == pytest.approx(50.0)
    assert landings((0.0, 0.0), (30.0, 400.0)) == pytest.approx(100.0)
    assert landings((30.0, 400.0), (30.0, 0.0)) == 0.0


def test_air_time_is_that_of_the_swings_that_end():
    metrics = robot_metrics(engine(), robot(), DT)
    steps = []
    for before, after, air in (
        ((0.0, 400.0), (300.0, 200.0), (0.4, 0.0)),  # the left foot lands after 0.4 s
        ((0.0, 0.0), (100.0, 0.0), (0.1, 0.7)),  # and after 0.1 s, while the right one goes on
        ((300.0, 200.0), (300.0, 0.0), (0.0, 0.02)),
    ):
        memory = {"feet": feet(contact=tuple(x > 1 for x in after), air=air)}
        steps.append(metrics(NOTHING, standing(*before), ACTION, standing(*after, memory=memory)))
    means = scalars(tree.map_leaves(lambda x: x.mean(0), tree.stack(steps)))
    assert float(means["contact/air_time"]) == pytest.approx(0.25)
    none = measured(standing(300.0, 200.0), before=standing(300.0, 200.0))
    assert math.isnan(none["contact/air_time"])


# --- For many robots ---


def test_many_robots_have_the_numbers_of_each():
    model = engine().model
    draw = random.normal(random.key(0), (6, model.nq + model.nv + model.nsensor), dtype=torch.float64)
    qpos = torch.cat([draw[:, :3], torch.nn.functional.normalize(draw[:, 3:7]), draw[:, 7 : model.nq]], dim=1)
    physics = engine().initial(qpos, draw[:, model.nq : model.nq + model.nv])
    physics = tree.replace(physics, sensordata=100 * draw[:, model.nq + model.nv :])
    states = tree.replace(tree.stack([given()] * 6), physics=physics)
    before, after = tree.index(states, slice(0, 3)), tree.index(states, slice(3, 6))
    metrics = robot_metrics(engine(), robot(), DT)
    many = jit(vmap(metrics, in_dims=(None, 0, 0, 0)))(NOTHING, before, torch.zeros(3, 21), after)
    for i in range(3):
        one = metrics(NOTHING, tree.index(before, i), ACTION, tree.index(after, i))
        for (name, x), (_, y) in zip(tree.named_leaves(tree.index(many, i)), tree.named_leaves(one), strict=True):
            assert torch.equal(x, y), name
    assert bool((many["torque"].values.amax(-1) > 50).all())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"contact_force": -1.0}, "contact_force must be 0 N or more, got -1.0"),
        ({"slowest": 0.0}, "slowest must be more than 0 m/s, got 0.0"),
        ({"torque_limits": torch.ones(20)}, "torque_limits must be 21 numbers above 0 Nm"),
        ({"torque_limits": torch.zeros(21)}, "torque_limits must be 21 numbers above 0 Nm"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        robot_metrics(engine(), robot(), DT, **settings)
    with pytest.raises(InputError, match="control_dt must be more than 0 s, got 0"):
        robot_metrics(engine(), robot(), 0.0)
