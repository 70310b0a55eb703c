"""Terms of walking robots: values by hand, memory that ends with its episode, mirror symmetry, finite slopes."""

import functools
import math

import mujoco
import pytest
import torch
from torch.func import grad, vmap

from rlcore import random, tree
from rlcore.env import EnvState, Memory, Params, auto_reset, batch, make_env, time_limit
from rlcore.errors import InputError
from rlcore.physics.mujoco import MujocoEngine, load_model
from rlcore.rewards import Term, action_rate, alive, locomotion, termination
from rlcore.rewards.locomotion import feet_memory, gait_memory, previous_action_memory
from rlcore.robot import make_robot
from tasks.humanoid.body import MODEL

DT = 0.02
NOTHING = Params({}, {}, {})
HALF = math.sqrt(0.5)


@functools.cache
def engine():
    return MujocoEngine(load_model(MODEL), 1)


@functools.cache
def robot():
    model = engine().model
    return make_robot(model, pose=model.keyframe("stand")[0][7:], angular_momentum="angular_momentum")


def vector(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def feet(contact=(True, True), landed=(False, False), air=(0.0, 0.0), ground=(0.0, 0.0), peak=(0.0, 0.0)):
    return {
        "contact": torch.tensor(contact),
        "landed": torch.tensor(landed),
        "air_time": vector(*air),
        "contact_time": vector(*ground),
        "peak_height": vector(*peak),
    }


def given(*, height=0.8, turn=(1, 0, 0, 0), linear=(0, 0, 0), angular=(0, 0, 0), joints=(), speeds=(), **rest):
    """A state in the standing pose but for what is named; joints are offsets from the pose."""
    model = engine().model
    sensors, memory = rest.pop("sensors", {}), rest.pop("memory", {})
    assert not rest
    qpos = torch.cat([vector(0, 0, height), vector(*turn), robot().pose])
    qvel = torch.cat([vector(*linear), vector(*angular), torch.zeros(21).double()])
    for name, value in dict(joints).items():
        qpos[model.joint(name).qpos] += value
    for name, value in dict(speeds).items():
        qvel[model.joint(name).qvel] = value
    sensordata = torch.zeros(model.nsensor).double()
    for name, value in sensors.items():
        sensordata[model.sensor(name)] = torch.tensor(value, dtype=torch.float64)
    physics = tree.replace(engine().initial(qpos, qvel), sensordata=sensordata)
    memory = {"feet": feet(), "last_action": torch.zeros(21).double(), **memory}
    return EnvState(physics, memory, random.key(0), torch.tensor(0))


def command(*velocity):
    return given(memory={"command": {"velocity": vector(*velocity)}})


ROLL_30 = (math.cos(math.pi / 12), math.sin(math.pi / 12), 0, 0)
YAW_90 = (HALF, 0, 0, HALF)
# Yaw by 90 degrees, then roll by 30: (cos 45, 0, 0, sin 45) (cos 15, sin 15, 0, 0).
YAW_90_ROLL_30 = tuple(HALF * x for x in (ROLL_30[0], ROLL_30[1], ROLL_30[1], ROLL_30[0]))
MOVED = {"left_knee": 0.2, "right_hip_roll": -0.1}
TORQUES = {"left_knee_torque": 3.0, "waist_yaw_torque": -4.0}
SLIDING = {
    "left_foot_velocity": (0.3, -0.4, 1.0),
    "right_foot_velocity": (0.0, 0.2, 0.0),
    "left_foot_position": (0.0, 0.1, 0.14),
    "right_foot_position": (0.0, -0.1, 0.05),
    "left_foot_contact": 0.0,
    "right_foot_contact": 400.0,
}
L = locomotion
HOME = torch.tensor([[0.02, 0.1], [0.02, -0.1]], dtype=torch.float64)


def track_feet(r, **changes):
    return L.track_feet(r, HOME, 0.8, **{"stance": 0.5, "lift": 0.1, "scale": 0.2, "vertical": 4.0, **changes})


def walking(phase, left, right, **rest):
    """The feet at positions seen from a pelvis 0.8 m up, which the state puts at the world's origin."""
    sensors = {"left_foot_position": left, "right_foot_position": right}
    return given(sensors=sensors, memory={"gait": vector(phase).squeeze()}, **rest)


@pytest.mark.parametrize(
    ("make", "before", "after", "expected"),
    [
        # Facing north and leaning, a world velocity (-0.2, 1, 0.3) is 1 forward, 0.2 left, 0.3 up; e2 = 0.3^2.
        (lambda r: L.track_planar_velocity(r), lambda: command(0.7, 0.2, 9.0),
         lambda: given(turn=YAW_90_ROLL_30, linear=(-0.2, 1.0, 0.3)), math.exp(-0.09 / 0.25)),
        (lambda r: L.track_planar_velocity(r, 0.6, vertical=1.0), lambda: command(0.7, 0.2, 9.0),
         lambda: given(turn=YAW_90, linear=(-0.2, 1.0, 0.3)), math.exp(-0.18 / 0.36)),
        (lambda r: L.track_yaw_rate(r), lambda: command(9.0, 9.0, 0.5),
         lambda: given(angular=(0.3, 0.4, 1.0)), math.exp(-0.25 / 0.25)),
        (lambda r: L.track_yaw_rate(r, roll_pitch=1.0), lambda: command(9.0, 9.0, 0.5),
         lambda: given(angular=(0.3, 0.4, 1.0)), math.exp(-0.5 / 0.25)),
        # Rolled by 30 degrees, 2 rad/s about the pelvis's axis are 2 cos 30 about the vertical.
        (lambda r: L.track_yaw_rate(r), lambda: command(0.0, 0.0, math.sqrt(3)),
         lambda: given(turn=ROLL_30, angular=(0.0, 0.0, 2.0)), 1.0),
        # sin(30 degrees)^2 = 1/4
        (lambda r: L.tilt(r), None, lambda: given(turn=YAW_90_ROLL_30), 0.25),
        (lambda r: L.upright(r, 0.5), None, lambda: given(turn=ROLL_30), math.exp(-1)),
        (lambda r: L.height_error(r, 0.9), None, lambda: given(height=0.7), 0.04),
        (lambda r: L.keep_height(r, 0.9, 0.1), None, lambda: given(height=0.7), math.exp(-4)),
        (lambda r: L.vertical_velocity(r), None, lambda: given(turn=ROLL_30, linear=(3.0, 4.0, -0.5)), 0.25),
        (lambda r: L.roll_pitch_velocity(r), None, lambda: given(angular=(3.0, 4.0, 9.0)), 25.0),
        (lambda r: L.angular_momentum(r), None, lambda: given(sensors={"angular_momentum": (1, 2, -2)}), 9.0),
        (lambda r: L.torque(r), None, lambda: given(sensors=TORQUES), 25.0),
        # |3 x -2| + |-4 x 0.5|
        (lambda r: L.power(r), None,
         lambda: given(sensors=TORQUES, speeds={"left_knee": -2.0, "waist_yaw": 0.5}), 8.0),
        # (0.4 / 0.02)^2 + (-0.1 / 0.02)^2
        (lambda r: L.joint_acceleration(r, DT), lambda: given(speeds={"left_knee": 1.0, "waist_yaw": 0.1}),
         lambda: given(speeds={"left_knee": 1.4}), 425.0),
        # Knees of 0 to 2.5 are soft within 0.25 to 2.25, elbows of -2.5 to 0 within -2.25 to -0.25: 0.15 + 0.1.
        (lambda r: L.joint_limits(r, 0.8), None,
         lambda: given(joints={"left_knee": 2.4 - 0.36, "right_elbow": -2.35 + 0.35}), 0.25),
        (lambda r: L.joint_limits(r, 1.0), None,
         lambda: given(joints={"left_knee": 2.4 - 0.36, "right_elbow": -2.35 + 0.35}), 0.0),
        # 2 x 0.2^2 + 0.1^2
        (lambda r: L.posture_error(r, {"*": 1.0, "*_knee": 2.0}), None, lambda: given(joints=MOVED), 0.09),
        (lambda r: L.posture_deviation(r, {"*": 1.0, "*_knee": 2.0}), None, lambda: given(joints=MOVED), 0.5),
        # ((0.2 / 0.2)^2 + (0.1 / 0.5)^2) / 21
        (lambda r: L.keep_posture(r, {"*": 0.5, "*_knee": 0.2}), None,
         lambda: given(joints=MOVED), math.exp(-1.04 / 21)),
        (lambda r: L.stand_still(r, 0.1, velocity=0.5), lambda: command(0.05, 0.0, 0.05),
         lambda: given(joints=MOVED, speeds={"left_elbow": -0.4}), 0.3 + 0.2),
        (lambda r: L.stand_still(r, 0.1, velocity=0.5), lambda: command(0.0, 0.0, 0.2),
         lambda: given(joints=MOVED, speeds={"left_elbow": -0.4}), 0.0),
        # 0.7 - 0.5 for the left foot, 0.4 - 0.5 for the right one.
        (lambda r: L.foot_air_time(r), lambda: command(1.0, 0.0, 0.0),
         lambda: given(memory={"feet": feet(landed=(True, True), air=(0.7, 0.4))}), 0.1),
        (lambda r: L.foot_air_time(r), lambda: command(1.0, 0.0, 0.0),
         lambda: given(memory={"feet": feet((True, False), (True, False), air=(0.7, 0.4))}), 0.2),
        (lambda r: L.foot_air_time(r), lambda: command(0.05, 0.0, 0.0),
         lambda: given(memory={"feet": feet(landed=(True, True), air=(0.7, 0.7))}), 0.0),
        (lambda r: L.foot_air_time(r, still=0), None,
         lambda: given(memory={"feet": feet(landed=(True, False), air=(0.7, 0.0))}), 0.2),
        # One foot on the ground: the left for 0.3 s, the right in the air for 0.25 s.
        (lambda r: L.single_stance(r), lambda: command(1.0, 0.0, 0.0),
         lambda: given(memory={"feet": feet((True, False), air=(0.0, 0.25), ground=(0.3, 0.0))}), 0.25),
        (lambda r: L.single_stance(r, cap=0.2), lambda: command(1.0, 0.0, 0.0),
         lambda: given(memory={"feet": feet((True, False), air=(0.0, 0.25), ground=(0.3, 0.0))}), 0.2),
        (lambda r: L.single_stance(r, still=0), None,
         lambda: given(memory={"feet": feet((True, True), ground=(0.3, 0.3))}), 0.0),
        (lambda r: L.single_stance(r, still=0), None,
         lambda: given(memory={"feet": feet((False, False), air=(0.3, 0.3))}), 0.0),
        # At 0.2 the left foot (0.2) is to stand and the right one (0.7) to swing.
        *[(lambda r: L.gait_contact(r), None,
           lambda c=contact: given(memory={"gait": vector(0.2).squeeze(), "feet": feet(c)}), agree)
          for contact, agree in (((True, False), 2.0), ((True, True), 1.0), ((False, True), 0.0))],
        # At 0.52 both stand: 0.52 and 0.02.
        (lambda r: L.gait_contact(r), None,
         lambda: given(memory={"gait": vector(0.52).squeeze(), "feet": feet((True, True))}), 2.0),
        # A stance at 1 m/s goes 0.4 m. A quarter into the stride the left foot stands at home and the right one, half a
        # swing on, is there too, as high as it gets.
        (track_feet, lambda: command(1.0, 0.0, 0.0),
         lambda: walking(0.25, (0.02, 0.1, 0.0), (0.02, -0.1, 0.1)), 1.0),
        # The left foot is off by one scale; the right one is 0.1 m low, which counts for 0.2 m.
        (track_feet, lambda: command(1.0, 0.0, 0.0),
         lambda: walking(0.25, (0.02, 0.3, 0.0), (0.02, -0.1, 0.1)), (math.exp(-1) + 1) / 2),
        (track_feet, lambda: command(1.0, 0.0, 0.0),
         lambda: walking(0.25, (0.02, 0.1, 0.0), (0.02, -0.1, 0.0)), (1 + math.exp(-1)) / 2),
        # A stride begins with the left foot half a stance's way ahead and the right one as far behind, both down.
        (track_feet, lambda: command(1.0, 0.0, 0.0),
         lambda: walking(0.0, (0.22, 0.1, 0.0), (-0.18, -0.1, 0.0)), 1.0),
        (track_feet, lambda: command(-0.5, 0.2, 0.0),
         lambda: walking(0.0, (-0.08, 0.14, 0.0), (0.12, -0.14, 0.0)), 1.0),
        # Turning left at 1 rad/s, where a foot stands goes by -y, and x: 0.4 (-+0.1, 0.02) in a stance.
        (track_feet, lambda: command(0.0, 0.0, 1.0),
         lambda: walking(0.0, (0.0, 0.104, 0.0), (0.0, -0.104, 0.0)), 1.0),
        # Facing north: forward is the world's y, left its -x.
        (track_feet, lambda: command(1.0, 0.0, 0.0),
         lambda: walking(0.0, (-0.1, 0.22, 0.0), (0.1, -0.18, 0.0), turn=YAW_90), 1.0),
        # Told to stand, no foot is to rise, whatever the clock says.
        (track_feet, lambda: command(0.05, 0.0, 0.0),
         lambda: walking(0.25, (0.02, 0.1, 0.0), (0.02, -0.1, 0.0)), 1.0),
        # The left foot is in the air and 0.06 m too high.
        (lambda r: L.swing_height(r, 0.08), None,
         lambda: given(sensors=SLIDING, memory={"feet": feet((False, True))}), 0.0036),
        # (0.05 / 0.1 - 1)^2, of the foot that lands.
        (lambda r: L.swing_peak(r, 0.1, still=0), None,
         lambda: given(memory={"feet": feet(landed=(True, False), peak=(0.05, 0.3))}), 0.25),
        # |0.14 - 0.1| x 0.5 + |0.05 - 0.1| x 0.2
        (lambda r: L.foot_clearance(r, 0.1), lambda: command(1.0, 0.0, 0.0), lambda: given(sensors=SLIDING), 0.03),
        (lambda r: L.foot_slip(r), None, lambda: given(sensors=SLIDING), 0.25 + 0.04),
        (lambda r: L.foot_slip(r), None,
         lambda: given(sensors=SLIDING, memory={"feet": feet((False, True))}), 0.04),
        # The pelvis's velocity is no slip.
        (lambda r: L.foot_slip(r), None, lambda: given(linear=(1.0, 1.0, 0.0)), 0.0),
        (lambda r: L.landing_impact(r), None,
         lambda: given(sensors=SLIDING, memory={"feet": feet(landed=(False, True))}), 400.0),
    ],
)  # fmt: skip
def test_values_by_hand(make, before, after, expected):
    after = after()
    before = after if before is None else before()
    value = make(robot())(NOTHING, before, torch.zeros(21).double(), after)
    assert value.shape == () and value.dtype == torch.float64
    assert float(value) == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_action_acceleration_by_hand():
    def action(value):
        return torch.cat([vector(value, 1.0), torch.zeros(19).double()])

    before = given(memory={"last_action": action(1.0), "previous_action": action(0.25)})
    # 0.5 - 2 x 1 + 0.25 = -1.25; the second number stays at 1.
    assert float(locomotion.action_acceleration(NOTHING, before, action(0.5), before)) == 1.5625


SELF_CONTACT = """
<mujoco>
  <option><flag filterparent="disable"/></option>
  <worldbody>
    <body pos="0 0 1">
      <freejoint name="root"/>
      <geom name="trunk" size="0.1"/>
      <site name="sole"/>
      <body pos="0 0 0.3"><joint name="arm" axis="0 1 0"/><geom name="hand" size="0.1" pos="0.3 0 0"/></body>
      <body pos="0.15 0 0"><joint name="leg" axis="0 1 0"/><geom name="knee" size="0.1" pos="0 0 -0.3"/></body>
    </body>
  </worldbody>
  <actuator><motor name="arm" joint="arm"/></actuator>
  <sensor>
    <contact name="hand_trunk" geom1="hand" geom2="trunk" data="found"/>
    <contact name="knee_trunk" geom1="knee" geom2="trunk" data="found"/>
    <framepos name="foot_position" objtype="site" objname="sole"/>
    <framelinvel name="foot_velocity" objtype="site" objname="sole"/>
    <touch name="foot_contact" site="sole"/>
    <actuatorfrc name="arm_torque" actuator="arm"/>
  </sensor>
</mujoco>
"""


def test_self_collision_counts_pairs_that_touch():
    own = MujocoEngine(mujoco.MjModel.from_xml_string(SELF_CONTACT), 1)
    touching = ["hand_trunk", "knee_trunk"]
    term = locomotion.self_collision(make_robot(own.model, pose=torch.zeros(1), feet=["foot"], self_contacts=touching))
    # The arm ahead touches nothing, and hanging down the trunk; the knee touches it when it is bent up behind.
    for arm, leg, expected in ((0.0, 0.0, 0), (math.pi / 2, 0.0, 1), (math.pi / 2, math.pi / 2, 2)):
        state = own.forward({}, own.initial(vector(0, 0, 1, 1, 0, 0, 0, arm, leg), torch.zeros(8)))
        after = EnvState(state, {}, random.key(0), torch.tensor(0))
        assert float(term(NOTHING, after, torch.zeros(1), after)) == expected


# --- Memory ---


def sole(left, right, left_height=0.0, right_height=0.0):
    return given(
        sensors={
            "left_foot_contact": left,
            "right_foot_contact": right,
            "left_foot_position": (0.0, 0.1, left_height),
            "right_foot_position": (0.0, -0.1, right_height),
        }
    ).physics


def test_memory_of_the_feet_by_hand():
    memory = feet_memory(robot(), DT)
    begin = memory.init(NOTHING, sole(500.0, 0.0, 0.0, 0.2), random.key(0))
    assert begin["contact"].tolist() == [True, False] and not begin["landed"].any()
    assert begin["peak_height"].tolist() == [0.0, 0.2]
    remembered = begin
    # Of the left foot: force, height; then contact, landed, time in the air and on the ground, highest.
    steps = [
        (500.0, 0.00, True, False, 0.00, 0.02, 0.00),
        (0.0, 0.03, False, False, 0.02, 0.00, 0.03),
        (0.0, 0.08, False, False, 0.04, 0.00, 0.08),
        (0.5, 0.05, False, False, 0.06, 0.00, 0.08),  # half a newton is no contact
        (300.0, 0.01, True, True, 0.06, 0.02, 0.08),  # the swing that ended is told once
        (300.0, 0.01, True, False, 0.00, 0.04, 0.01),
        (0.0, 0.02, False, False, 0.02, 0.00, 0.02),
        (300.0, 0.01, True, True, 0.02, 0.02, 0.02),
        (0.0, 0.04, False, False, 0.02, 0.00, 0.04),  # one step on the ground is a landing too
    ]
    for number, (force, height, contact, landed, air, ground, peak) in enumerate(steps, start=1):
        before = given(memory={"feet": remembered})
        remembered = memory.update(NOTHING, before, torch.zeros(21), sole(force, 0.0, height, 0.2))
        assert bool(remembered["contact"][0]) == contact and bool(remembered["landed"][0]) == landed, number
        for name, value in (("air_time", air), ("contact_time", ground), ("peak_height", peak)):
            assert float(remembered[name][0]) == pytest.approx(value, abs=1e-12), (number, name)
        # The right foot stays in the air.
        assert float(remembered["air_time"][1]) == pytest.approx(number * DT, abs=1e-12)
        assert not remembered["landed"][1] and remembered["peak_height"][1] == 0.2


def test_the_gait_clock_goes_round():
    memory = gait_memory(0.8)
    before = given()
    phase = memory.init(NOTHING, before.physics, random.key(0))
    assert phase.shape == () and float(phase) == 0.0
    seen = []
    for number in range(1, 100):
        time = vector(number * DT).squeeze()
        physics = tree.replace(before.physics, time=time)
        phase = memory.update(NOTHING, tree.replace(before, memory={"gait": phase}), torch.zeros(21), physics)
        before = tree.replace(before, physics=physics)
        seen.append(float(phase))
    # 0.02 s of 0.8 s is a fortieth.
    for number, value in enumerate(seen, start=1):
        turns = number / 40
        assert math.cos(2 * math.pi * value) == pytest.approx(math.cos(2 * math.pi * turns), abs=1e-9)
        assert math.sin(2 * math.pi * value) == pytest.approx(math.sin(2 * math.pi * turns), abs=1e-9)
    assert min(seen) >= 0 and max(seen) < 1


# --- A task with every term ---


def every_term():
    r = robot()
    return [
        Term("planar", 2.0, L.track_planar_velocity(r, vertical=0.5)),
        Term("yaw", 1.0, L.track_yaw_rate(r, roll_pitch=0.1)),
        Term("stand_still", -0.5, L.stand_still(r, velocity=0.1)),
        Term("tilt", -1.0, L.tilt(r)),
        Term("upright", 1.0, L.upright(r)),
        Term("height_error", -10.0, L.height_error(r, 0.83)),
        Term("height", 1.0, L.keep_height(r, 0.83)),
        Term("vertical", -2.0, L.vertical_velocity(r)),
        Term("roll_pitch", -0.05, L.roll_pitch_velocity(r)),
        Term("momentum", -0.02, L.angular_momentum(r)),
        Term("torque", -1e-5, L.torque(r)),
        Term("power", -1e-3, L.power(r)),
        Term("acceleration", -2.5e-7, L.joint_acceleration(r, DT)),
        Term("action_rate", -0.01, action_rate),
        Term("action_acceleration", -0.01, L.action_acceleration),
        Term("limits", -5.0, L.joint_limits(r)),
        Term("posture_error", -0.1, L.posture_error(r, {"*": 0.1, "*_hip_*": 0.25})),
        Term("posture_deviation", -0.1, L.posture_deviation(r)),
        Term("posture", 1.0, L.keep_posture(r)),
        Term("air_time", 1.0, L.foot_air_time(r, 0.3)),
        Term("single_stance", 0.25, L.single_stance(r)),
        Term("gait", 0.18, L.gait_contact(r)),
        Term("feet", 1.0, L.track_feet(r, HOME, 0.8)),
        Term("swing_height", -20.0, L.swing_height(r)),
        Term("swing_peak", -0.25, L.swing_peak(r)),
        Term("clearance", -2.0, L.foot_clearance(r)),
        Term("slip", -0.2, L.foot_slip(r)),
        Term("landing", -1e-5, L.landing_impact(r)),
        Term("alive", 0.15, alive),
        Term("termination", -200.0, termination),
    ]


@functools.cache
def walker():
    """The humanoid, falling from its pose, with a command that its attitude at the reset gives."""
    model = engine().model
    stand, ctrl = model.keyframe("stand")

    def initial(params, key):
        draw = random.uniform(key, (model.nv,), -0.5, 0.5, dtype=torch.float64)
        return stand, draw

    return make_env(
        engine(),
        name="walker",
        control_dt=DT,
        initial=initial,
        control=lambda params, state, action: ctrl + 0.3 * action,
        observe=lambda params, state: {"policy": {"joints": robot().joint_position(state.physics)}},
        terms=every_term(),
        # Episodes end at different times: the command that an episode has says when.
        terminate=lambda params, physics: physics.qpos[:2].abs().sum() > 0.04,
        memory={
            "command": Memory(
                init=lambda params, physics, key: {"velocity": 2 * physics.qvel[:3]},
                update=lambda params, before, action, physics: before.memory["command"],
            ),
            "feet": feet_memory(robot(), DT),
            "gait": gait_memory(0.8),
            "previous_action": previous_action_memory(21),
        },
    )


def assert_same(a, b):
    left, right = tree.named_leaves(a), tree.named_leaves(b)
    assert [name for name, _ in left] == [name for name, _ in right]
    for (name, x), (_, y) in zip(left, right, strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y), name


def test_recorded_equals_vmap_equals_loop_and_a_reset_forgets():
    env = auto_reset(time_limit(walker(), 8 * DT))
    num, steps = 3, 10
    acts = random.uniform(random.key(5), (steps, num, 21), -1.0, 1.0)
    keys = random.split(random.key(6), num)
    recorded = batch(env)
    mapped = vmap(env.step, in_dims=(None, 0, 0))
    state, _ = recorded.reset(env.params, keys)
    alone = [env.reset(env.params, key)[0] for key in keys]
    ends = 0
    for t in range(steps):
        carried = state
        state, transition = recorded.step(env.params, carried, acts[t])
        assert_same((state, transition), mapped(env.params, carried, acts[t]))
        for i in range(num):
            alone[i], one = env.step(env.params, alone[i], acts[t, i])
            assert_same((alone[i], one), tree.index((state, transition), i))
            if not one.terminated | one.truncated:
                continue
            # Nothing of the episode that ended is in the state that comes after it: it is what its key alone makes.
            ends += 1
            assert_same(alone[i], env.reset(env.params, carried.key[i])[0])
            memory = alone[i].memory
            assert float(memory["gait"]) == 0.0 and not memory["previous_action"].any()
            assert not memory["feet"]["air_time"].any() and not memory["feet"]["contact_time"].any()
            assert not memory["feet"]["landed"].any() and not memory["terminated"] and not memory["last_action"].any()
    assert ends >= num


def test_every_memory_is_used_within_an_episode():
    # The test above would hold for memories that nothing ever writes.
    state, _ = walker().reset(walker().params, random.key(0))
    for _ in range(6):
        state, _ = walker().step(walker().params, state, torch.ones(21))
    memory = state.memory
    assert float(memory["gait"]) > 0 and memory["previous_action"].all() and memory["last_action"].all()
    assert bool(((memory["feet"]["air_time"] > 0) | (memory["feet"]["contact_time"] > 0)).all())


# --- Mirror symmetry ---


def mirrored_places(names):
    """For each name its mirror image's place, left and right exchanged."""
    swap = {"left": "right", "right": "left"}
    images = ["_".join(swap.get(word, word) for word in name.split("_")) for name in names]
    return [list(names).index(image) for image in images]


def mirror_joints(x):
    """Joints in their order: sides exchanged; roll and yaw turn the other way."""
    names = robot().joints
    sign = vector(*(-1.0 if name.endswith(("_roll", "_yaw")) else 1.0 for name in names))
    return sign * x[..., mirrored_places(names)]


def mirror_physics(physics):
    """The robot as seen in a mirror in the plane of x and z: vectors change y, axes of rotation x and z."""
    model = engine().model
    flip, turn = vector(1, -1, 1), vector(-1, 1, -1)
    qpos = torch.cat([
        flip * physics.qpos[:3], vector(1, -1, 1, -1) * physics.qpos[3:7], mirror_joints(physics.qpos[7:])
    ])  # fmt: skip
    qvel = torch.cat([flip * physics.qvel[:3], turn * physics.qvel[3:6], mirror_joints(physics.qvel[6:])])
    sensordata = physics.sensordata.clone()
    sensors = list(model.sensors)
    for name, place in zip(sensors, mirrored_places(sensors), strict=True):
        sign = torch.ones(1)
        if name.endswith(("_position", "_velocity")):
            sign = flip
        elif name == "angular_momentum":
            sign = turn
        elif name.endswith(("_roll_torque", "_yaw_torque")):
            sign = -sign
        elif name.startswith("imu"):
            continue
        sensordata[model.sensor(name)] = sign * physics.sensordata[model.sensor(sensors[place])]
    return tree.replace(physics, qpos=qpos, qvel=qvel, sensordata=sensordata)


def mirror(state):
    memory = state.memory
    phase = memory["gait"] + 0.5
    return tree.replace(
        state,
        physics=mirror_physics(state.physics),
        memory={
            **memory,
            "command": {"velocity": vector(1, -1, -1) * memory["command"]["velocity"]},
            "feet": {name: value.flip(0) for name, value in memory["feet"].items()},
            # Half a stride later each foot does what the other did.
            "gait": phase - torch.floor(phase),
            "last_action": mirror_joints(memory["last_action"]),
            "previous_action": mirror_joints(memory["previous_action"]),
        },
    )


@functools.cache
def some_steps():
    """Steps (before, action, after) of five robots thrown about, some with landings and single stances."""
    env = walker()
    step = vmap(env.step, in_dims=(None, 0, 0))
    state, _ = vmap(env.reset, in_dims=(None, 0))(env.params, random.split(random.key(1), 5))
    # They need not be steps that physics makes: scale the command, so that some stand.
    still = vector(1.0, 1.0, 0.0, 1.0, 0.0)[:, None]
    velocity = still * state.memory["command"]["velocity"]
    state = tree.replace(state, memory={**state.memory, "command": {"velocity": velocity}})
    steps = []
    for action in random.uniform(random.key(2), (30, 5, 21), -1.0, 1.0):
        before = state
        state, _ = step(env.params, before, action)
        steps += [(tree.index(before, i), action[i].double(), tree.index(state, i)) for i in range(5)]
    return steps[::7]


def test_a_mirrored_robot_gets_the_same_reward():
    env = walker()
    seen: dict[str, set[float]] = {term.name: set() for term in every_term()}
    for before, action, after in some_steps():
        assert_same(mirror(mirror(before)).physics, before.physics)
        other_before, other_after, other = mirror(before), mirror(after), mirror_joints(action)
        for term in every_term():
            ours = float(term.fn(env.params, before, action, after))
            theirs = float(term.fn(env.params, other_before, other, other_after))
            assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-9), term.name
            seen[term.name].add(ours)
        # What is remembered of a mirrored step is the mirror image of what is remembered of the step.
        for name, memory in (("feet", feet_memory(robot(), DT)), ("gait", gait_memory(0.8))):
            expected = mirror(tree.replace(after, memory={**after.memory, name: after.memory[name]})).memory[name]
            got = memory.update(env.params, other_before, other, other_after.physics)
            for (leaf, x), (_, y) in zip(tree.named_leaves(got), tree.named_leaves(expected), strict=True):
                torch.testing.assert_close(x, y, rtol=0, atol=1e-9, msg=f"{name}.{leaf}")
    # Terms that are the same in every one of these steps would have shown nothing.
    assert {name for name, values in seen.items() if len(values) < 2} == {"alive"}


def test_half_a_mirror_is_none():
    """The test above can fail: with a command that is not mirrored, or signs that are not, rewards differ."""
    before, action, after = some_steps()[0]
    planar, yaw, posture = L.track_planar_velocity(robot()), L.track_yaw_rate(robot()), L.keep_posture(robot())
    unsigned = torch.cat([mirror(after).physics.qpos[:7], mirror_joints(after.physics.qpos[7:]).abs()])
    signless = tree.replace(after, physics=tree.replace(after.physics, qpos=unsigned))
    for fn, wrong in ((planar, mirror(after)), (yaw, mirror(after)), (posture, signless)):
        ours, theirs = fn(NOTHING, before, action, after), fn(NOTHING, before, action, wrong)
        assert abs(float(ours - theirs)) > 1e-6


# --- Slopes ---


def attitudes():
    """Nose down, nose up, on the side, upside down, upright."""
    return [(HALF, 0, HALF, 0), (HALF, 0, -HALF, 0), (HALF, HALF, 0, 0), (0, 1, 0, 0), (1, 0, 0, 0)]


@pytest.mark.parametrize("term", every_term(), ids=lambda term: term.name)
def test_slopes_are_finite_everywhere(term):
    memories = {"command": {"velocity": vector(0, 0, 0)}, "gait": vector(0).squeeze()}
    memories |= {"previous_action": torch.zeros(21).double(), "terminated": torch.tensor(False)}
    points = [(given(turn=turn, memory=memories), given(turn=turn, memory=memories)) for turn in attitudes()]
    points += [(before, after) for before, _, after in some_steps()]
    before, after = (tree.stack(states) for states in zip(*points, strict=True))

    def value(moving, before, after):
        qpos, qvel, sensordata, qvel_tm1, action, commanded = moving
        memory = {**before.memory, "command": {"velocity": commanded}}
        before = tree.replace(before, physics=tree.replace(before.physics, qvel=qvel_tm1), memory=memory)
        physics = tree.replace(after.physics, qpos=qpos, qvel=qvel, sensordata=sensordata)
        # Peaks and phases come from the state too.
        kept = {**after.memory, "feet": feet_memory(robot(), DT).update(walker().params, before, action, physics)}
        return term.fn(walker().params, before, action, tree.replace(after, physics=physics, memory=kept))

    def moving(before, after):
        command = before.memory["command"]["velocity"]
        physics = after.physics
        return (
            physics.qpos,
            physics.qvel,
            physics.sensordata,
            before.physics.qvel,
            before.memory["last_action"],
            command,
        )

    slopes = vmap(grad(value))(moving(before, after), before, after)
    for slope in slopes:
        assert torch.isfinite(slope).all()
    values = vmap(value)(moving(before, after), before, after)
    assert torch.isfinite(values).all() and values.shape == (len(points),)


def test_slopes_go_through_physics():
    env = walker()
    state, _ = env.reset(env.params, random.key(0))
    resting = tree.replace(state, physics=tree.replace(state.physics, qvel=torch.zeros_like(state.physics.qvel)))
    slope = grad(lambda action: env.step(env.params, resting, action)[1].reward)(torch.zeros(21).double())
    assert torch.isfinite(slope).all() and slope.abs().max() > 1e-6


# --- Mistakes ---


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (lambda r: feet_memory(r, 0.0), "dt must be more than 0, got 0.0"),
        (lambda r: feet_memory(r, DT, -1.0), "threshold must be 0 or more, got -1.0"),
        (lambda r: gait_memory(math.nan), "period must be more than 0, got nan"),
        (lambda r: previous_action_memory(0), "size must be at least 1 action, got 0"),
        (lambda r: L.track_planar_velocity(r, 0.0), "scale must be more than 0, got 0.0"),
        (lambda r: L.track_planar_velocity(r, vertical=-1.0), "vertical must be 0 or more, got -1.0"),
        (lambda r: L.track_yaw_rate(r, -1.0), "scale must be more than 0, got -1.0"),
        (lambda r: L.track_yaw_rate(r, roll_pitch=math.inf), "roll_pitch must be 0 or more, got inf"),
        (lambda r: L.stand_still(r, 0.0), "still must be more than 0, got 0.0"),
        (lambda r: L.stand_still(r, position=-1.0), "position must be 0 or more, got -1.0"),
        (lambda r: L.stand_still(r, velocity=-1.0), "velocity must be 0 or more, got -1.0"),
        (lambda r: L.upright(r, 0.0), "scale must be more than 0"),
        (lambda r: L.height_error(r, 0.0), "target must be more than 0"),
        (lambda r: L.keep_height(r, 0.8, 0.0), "scale must be more than 0"),
        (lambda r: L.angular_momentum(make_robot(engine().model, pose=r.pose)), "make_robot.angular_momentum=NAME"),
        (lambda r: L.joint_acceleration(r, 0.0), "dt must be more than 0"),
        (lambda r: L.joint_limits(r, 0.0), "soft must be a share .* got 0.0"),
        (lambda r: L.joint_limits(r, 1.1), "soft must be a share .* got 1.1"),
        (lambda r: L.posture_error(r, {"tail": 1.0}), "no joint is named like 'tail'"),
        (lambda r: L.posture_deviation(r, {"*_knee": 1.0}), "every joint needs a number"),
        (lambda r: L.keep_posture(r, {"*": 1.0, "left_knee": 0.0}), "scale of left_knee must be more than 0"),
        (lambda r: L.foot_air_time(r, 0.0), "target must be more than 0"),
        (lambda r: L.foot_air_time(r, still=-1.0), "still must be 0 or more"),
        (lambda r: L.single_stance(r, 0.0), "cap must be more than 0"),
        (lambda r: L.gait_contact(r, (0.0,)), r"for each of 2 feet, got \(0.0,\)"),
        (lambda r: L.gait_contact(r, (0.0, 1.0)), r"offsets must be .* got \(0.0, 1.0\)"),
        (lambda r: L.gait_contact(r, stance=1.0), "stance must be .* got 1.0"),
        (lambda r: L.swing_height(r, 0.0), "target must be more than 0"),
        (lambda r: L.swing_peak(r, 0.0), "target must be more than 0"),
        (lambda r: L.foot_clearance(r, -0.1), "target must be more than 0"),
        (lambda r: L.self_collision(r), "make_robot.self_contacts"),
    ],
)  # fmt: skip
def test_mistakes_are_refused(mistake, words):
    with pytest.raises(InputError, match=words):
        mistake(robot())


@pytest.mark.parametrize(
    ("term", "name"),
    [
        (lambda r: L.track_yaw_rate(r), "command"),
        (lambda r: L.foot_slip(r), "feet"),
        (lambda r: L.gait_contact(r), "gait"),
        (lambda r: L.action_acceleration, "previous_action"),
    ],
)
def test_a_term_whose_memory_is_missing_is_told_of(term, name):
    model = engine().model
    with pytest.raises(InputError, match=f"needs memory '{name}'"):
        make_env(
            engine(),
            name="forgetful",
            control_dt=DT,
            initial=lambda params, key: (model.keyframe("stand")[0], torch.zeros(model.nv)),
            observe=lambda params, state: {"policy": {"joints": state.physics.qpos[7:]}},
            terms=[Term("term", 1.0, term(robot()))],
            terminate=lambda params, physics: physics.time < 0,
        )
