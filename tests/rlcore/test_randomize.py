"""Domain randomization: from the nominal model, within its ranges, and with the effects that mechanics predicts."""

import functools
import math
from typing import Any

import mujoco
import pytest
import torch

from rlcore import random, tree
from rlcore.env import auto_reset, batch, make_env
from rlcore.errors import InputError
from rlcore.physics.mujoco import MujocoEngine
from rlcore.randomize import Randomization, make_randomizer

# A sliding block, a pendulum of one point mass on a massless rod, a vertical servo under gravity, and a motor.
MODEL = """
<mujoco>
  <compiler autolimits="true"/>
  <option timestep="0.002" integrator="implicitfast" cone="elliptic" impratio="100"/>
  <worldbody>
    <geom name="floor" type="plane" size="0 0 1" friction="0.5"/>
    <body name="block" pos="0 0 0.1">
      <freejoint name="root"/>
      <inertial pos="0 0 0.001" mass="2" diaginertia="0.02 0.02 0.02"/>
      <geom name="block" type="box" size="0.2 0.2 0.1" friction="0.5"/>
    </body>
    <body name="pendulum" pos="0 5 2">
      <joint name="swing" axis="0 1 0"/>
      <inertial pos="0 0 -1" mass="1" diaginertia="0.1 0.1 0.1"/>
      <geom name="bob" size="0.05" pos="0 0 -1" contype="0" conaffinity="0"/>
    </body>
    <body name="lift" pos="0 9 2">
      <joint name="lift" type="slide" axis="0 0 1" damping="3" armature="0.5"/>
      <inertial pos="0 0 0" mass="2" diaginertia="0.1 0.1 0.1"/>
    </body>
    <body name="cart" pos="0 12 2">
      <joint name="cart" type="slide" axis="1 0 0" actuatorfrcrange="-6 6"/>
      <inertial pos="0 0 0" mass="3" diaginertia="0.1 0.1 0.1"/>
    </body>
    <body name="frame" pos="0 20 2"/>
  </worldbody>
  <actuator>
    <position name="hold" joint="lift" kp="100" kv="20" forcerange="-40 50"/>
    <motor name="push" joint="cart"/>
  </actuator>
</mujoco>
"""
G = 9.81
DT = 0.01
ALL = Randomization(
    mass_scale=(0.8, 1.2),
    inertia_scale=(0.9, 1.1),
    payload=(-0.2, 0.5),
    payload_body="block",
    com_offset=(-0.03, 0.02),
    com_body="pendulum",
    friction_scale=(0.6, 1.4),
    damping_scale=(0.5, 2.0),
    armature_scale=(0.7, 1.3),
    kp_scale=(0.85, 1.15),
    kd_scale=(0.75, 1.25),
    strength_scale=(0.65, 1.0),
    gravity_scale=(0.95, 1.05),
    gravity_tilt=(-0.1, 0.05),
)
FIELDS = {
    "mass_scale": {"body_mass", "body_inertia"},
    "inertia_scale": {"body_inertia"},
    "payload": {"body_mass"},
    "com_offset": {"body_ipos"},
    "friction_scale": {"geom_friction"},
    "damping_scale": {"dof_damping"},
    "armature_scale": {"dof_armature"},
    "kp_scale": {"actuator_gainprm", "actuator_biasprm"},
    "kd_scale": {"actuator_biasprm"},
    "strength_scale": {"actuator_forcerange", "jnt_actfrcrange"},
    "gravity_scale": {"opt.gravity"},
    "gravity_tilt": {"opt.gravity"},
}
BODIES = {"payload": {"payload_body": "block"}, "com_offset": {"com_body": "pendulum"}}


@functools.cache
def engine(model=MODEL):
    return MujocoEngine(mujoco.MjModel.from_xml_string(model), 1)


def make(model=MODEL, speed=0.0, swing=0.0):
    """The robots at rest but for the block's speed (m/s, along x) and the pendulum's angle (rad)."""
    running = engine(model)
    info = running.model

    def initial(params, key):
        qpos, qvel = torch.from_numpy(running.mjmodel.qpos0.copy()), torch.zeros(info.nv).double()
        qpos[info.joint("swing").qpos] = swing
        qvel[0] = speed
        return qpos, qvel

    return make_env(
        running,
        name="workshop",
        control_dt=DT,
        initial=initial,
        observe=lambda params, state: {"policy": {"qpos": state.physics.qpos}},
        terms=[],
        terminate=lambda params, physics: physics.time < 0,
        values={"level": 2.0},
    )


@functools.cache
def env():
    return make()


def only(name, low, high):
    fields: dict[str, Any] = {name: (low, high), **BODIES.get(name, {})}
    return Randomization(**fields)


def drawn(ranges, seed=0):
    return make_randomizer(env(), ranges)(env().params, random.key(seed)).physics


def many(ranges, num, seed=0):
    keys = random.split(random.key(seed), num)
    return torch.func.vmap(make_randomizer(env(), ranges), in_dims=(None, 0))(env().params, keys)


def assert_same(a, b):
    left, right = tree.named_leaves(a), tree.named_leaves(b)
    assert [name for name, _ in left] == [name for name, _ in right]
    for (name, x), (_, y) in zip(left, right, strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y), name


def run(world, params, seconds, ctrl=(0.0, 0.0), interval=DT):
    """`[T]` states of one robot under a constant control, an interval apart."""
    physics, ctrl = world.reset(params, random.key(0))[0].physics, torch.tensor(ctrl)
    states = [physics]
    for _ in range(round(seconds / interval)):
        physics = world.engine.step(params.physics, physics, ctrl, substeps=round(interval / 0.002))
        states.append(physics)
    return tree.stack(states)


# --- From the nominal ---


def test_ranges_of_identity_give_the_nominal_itself():
    params = make_randomizer(env(), Randomization())(env().params, random.key(3))
    assert params is env().params and params.physics == {}
    assert many(Randomization(), 3).physics == {}


@pytest.mark.parametrize("name", FIELDS)
def test_a_range_touches_its_fields_only(name):
    low, high = (0.1, 0.2) if name in ("payload", "com_offset", "gravity_tilt") else (1.1, 1.2)
    physics = drawn(only(name, low, high))
    assert set(physics) == FIELDS[name]
    for field, value in physics.items():
        nominal = env().engine.nominal(field)[field]
        assert value.shape == nominal.shape and value.dtype == torch.float64
        assert not torch.equal(value, nominal), field


@pytest.mark.parametrize("name", [n for n in FIELDS if n not in ("payload", "com_offset", "gravity_tilt")])
def test_factors_of_one_number_are_exact(name):
    # A range of one number is that number: what it should give can be said to the last bit.
    for field, value in drawn(only(name, 2.0, 2.0)).items():
        nominal = env().engine.nominal(field)[field]
        twice = {"geom_friction": [0], "actuator_gainprm": [0], "actuator_biasprm": [1] if name == "kp_scale" else [2]}
        columns = twice.get(field, range(nominal.shape[-1]))
        expected = nominal.clone()
        if field.startswith("actuator_") and field != "actuator_forcerange":
            expected[0, columns] *= 2  # the servo; a motor is none
        else:
            expected[..., columns] *= 2
        assert torch.equal(value, expected), field


def test_randomizing_again_does_not_compound():
    randomize = make_randomizer(env(), ALL)
    first, second = (randomize(env().params, random.key(seed)) for seed in (1, 2))
    assert not torch.equal(first.physics["body_mass"], second.physics["body_mass"])
    assert_same(randomize(first, random.key(2)), second)


def test_fields_of_the_environment_are_its_nominal():
    heavy = {"body_mass": 3.0 * env().engine.nominal("body_mass")["body_mass"]}
    world = env()._replace(params=tree.replace(env().params, physics=heavy))
    params = make_randomizer(world, only("mass_scale", 2.0, 2.0))(env().params, random.key(0))
    assert torch.equal(params.physics["body_mass"], 2.0 * heavy["body_mass"])
    # Fields that no range touches, weights and values are passed on.
    params = make_randomizer(world, only("friction_scale", 2.0, 2.0))(world.params, random.key(0))
    assert params.physics["body_mass"] is heavy["body_mass"] and params.values is world.params.values


def test_vmap_equals_a_loop_and_numbers_do_not_matter():
    together = many(ALL, 6)
    keys = random.split(random.key(0), 6)
    assert_same(together, tree.stack([make_randomizer(env(), ALL)(env().params, key) for key in keys]))
    assert_same(together.physics, tree.index(many(ALL, 64).physics, slice(0, 6)))


def test_a_draw_does_not_depend_on_other_ranges():
    alone, beside = drawn(only("friction_scale", 0.6, 1.4)), drawn(ALL)
    assert torch.equal(alone["geom_friction"], beside["geom_friction"])


def test_draws_fill_their_ranges():
    physics = many(ALL, 2000).physics
    nominal = env().engine.nominal(*physics)
    model = env().spec.model
    block, pendulum, lift = (model.body(name) for name in ("block", "pendulum", "lift"))
    dof, hold, cart = model.joint("lift").qvel.start, model.actuator("hold"), model.joints.index(model.joint("cart"))

    def share(field, *place):
        return physics[field][(slice(None), *place)] / nominal[field][place]

    payload = many(only("payload", -0.2, 0.5), 2000).physics["body_mass"][:, block] - 2.0
    scaled = share("body_mass", pendulum)
    factors = [
        (scaled, ALL.mass_scale),
        (share("body_inertia", lift, 2) / share("body_mass", lift), ALL.inertia_scale),
        (payload, ALL.payload),
        (physics["body_ipos"][:, pendulum, 0] - nominal["body_ipos"][pendulum, 0], ALL.com_offset),
        (share("geom_friction", 1, 0), ALL.friction_scale),
        (share("dof_damping", dof), ALL.damping_scale),
        (share("dof_armature", dof), ALL.armature_scale),
        (share("actuator_gainprm", hold, 0), ALL.kp_scale),
        (share("actuator_biasprm", hold, 2), ALL.kd_scale),
        (share("actuator_forcerange", hold, 1), ALL.strength_scale),
        (share("jnt_actfrcrange", cart, 0), ALL.strength_scale),
        (physics["opt.gravity"].norm(dim=-1) / G, ALL.gravity_scale),
    ]
    for value, (low, high) in factors:
        assert low - 1e-9 <= float(value.min()) and float(value.max()) <= high + 1e-9
        # The outermost of 2000 lie within a hundredth of the ends; the mean within 5 deviations of the middle.
        assert float(value.min()) < low + 0.01 * (high - low) and float(value.max()) > high - 0.01 * (high - low)
        assert float(value.mean()) == pytest.approx((low + high) / 2, abs=5 * (high - low) / math.sqrt(12 * 2000))
    # Gains and biases stay one servo's, and what is drawn apart is independent.
    assert torch.equal(physics["actuator_gainprm"][:, hold, 0], -physics["actuator_biasprm"][:, hold, 1])
    draws = torch.stack([value for value, _ in factors if value is not payload])
    correlation = torch.corrcoef(draws) - torch.eye(len(draws))
    assert float(correlation.abs().max()) < 5 / math.sqrt(2000)


# --- What mechanics says ---


def test_period_of_a_pendulum():
    # T = 2 pi sqrt((I + m l^2) / (m g l)), m = 1 kg, l = 1 m, I = 0.1 kg m2: the mass cancels with its inertia,
    # a larger inertia alone slows it, and gravity speeds it up.
    world = make(swing=0.05)

    def period(ranges):
        params = make_randomizer(world, ranges)(world.params, random.key(0))
        angle = run(world, params, 5.0, interval=0.02).qpos[:, world.spec.model.joint("swing").qpos.start]
        place = (angle[1:] * angle[:-1] < 0).nonzero().squeeze(-1)
        times = 0.02 * (place + angle[place] / (angle[place] - angle[place + 1]))
        return float(2 * (times[-1] - times[0]) / (len(times) - 1))

    plain = 2 * math.pi * math.sqrt(1.1 / G)
    for ranges, expected in (
        (Randomization(), plain),
        (only("mass_scale", 3.0, 3.0), plain),
        (only("inertia_scale", 5.0, 5.0), 2 * math.pi * math.sqrt(1.5 / G)),
        # 2 kg more at the end of the rod: (0.1 + 3) / (3 g).
        (Randomization(payload=(2.0, 2.0), payload_body="pendulum"), 2 * math.pi * math.sqrt(3.1 / (3 * G))),
        (only("gravity_scale", 0.25, 0.25), 2 * plain),
    ):
        assert period(ranges) == pytest.approx(expected, rel=2e-3)


def test_friction_stops_a_sliding_block():
    # Friction takes mu g of speed a second: v^2 / (2 mu g) = 4 / (2 * 0.5 * 9.81) = 0.408 m.
    world = make(speed=2.0)
    for ranges, mu in (
        (Randomization(), 0.5),
        (only("friction_scale", 0.5, 0.5), 0.25),
        (only("friction_scale", 1.6, 1.6), 0.8),
        # The larger friction of the two that touch counts.
        (Randomization(friction_scale=(0.5, 0.5), friction_geoms=("block",)), 0.5),
        (Randomization(friction_scale=(1.6, 1.6), friction_geoms=("block",)), 0.8),
    ):
        params = make_randomizer(world, ranges)(world.params, random.key(0))
        states = run(world, params, 1.2, interval=1.2)
        assert float(states.qpos[-1, 0]) == pytest.approx(4 / (2 * mu * G), rel=0.03)


def test_servo_against_gravity():
    # It sags until kp x = m g: 2 * 9.81 / 100 = 0.196 m; its force is at most the limit.
    world = make()
    place = world.spec.model.joint("lift").qpos.start
    for ranges, expected in (
        (Randomization(), 0.1962),
        (only("kp_scale", 2.0, 2.0), 0.0981),
        (only("kd_scale", 2.0, 2.0), 0.1962),
        (only("mass_scale", 2.0, 2.0), 0.3924),
        (only("gravity_scale", 0.5, 0.5), 0.0981),
    ):
        params = make_randomizer(world, ranges)(world.params, random.key(0))
        assert float(run(world, params, 6.0, interval=6.0).qpos[-1, place]) == pytest.approx(-expected, rel=1e-3)


def test_damping_of_servo_and_joint():
    # What damps is kd and the joint's own damping, 20 + 3; what is moved are 2 kg and 0.5 kg of armature.
    world = make()
    joint = world.spec.model.joint("lift")
    weightless = tree.replace(world.params, physics={"opt.gravity": torch.zeros(3).double()})
    world = world._replace(params=weightless)

    def decay(ranges):
        """Rate at which a speed of 1 m/s falls at the servo's target, 1/s."""
        params = make_randomizer(world, ranges)(world.params, random.key(0))
        state, _ = world.reset(params, random.key(0))
        qvel = state.physics.qvel.clone()
        qvel[joint.qvel] = 1.0
        state = tree.replace(state, physics=tree.replace(state.physics, qvel=qvel))
        after, _ = world.step(params, state, torch.zeros(2))
        return -math.log(float(after.physics.qvel[joint.qvel])) / DT

    # The spring adds kp dt / 2 / m = 0.2 per second on average, and the damping is implicit: within 5 %.
    for ranges, expected in (
        (Randomization(), 23 / 2.5),
        (only("kd_scale", 2.0, 2.0), 43 / 2.5),
        (only("damping_scale", 5.0, 5.0), 35 / 2.5),
        (only("armature_scale", 5.0, 5.0), 23 / 4.5),
    ):
        assert decay(ranges) == pytest.approx(expected, rel=0.05)


def test_strength_limits_force():
    # Without gravity, with far targets: the lift gets 50 N (no speed yet), the cart 6 N of the 100 N asked for.
    world = make()
    lift, cart = (world.spec.model.joint(name).qvel.start for name in ("lift", "cart"))
    for ranges, scale in ((Randomization(), 1.0), (only("strength_scale", 0.5, 0.5), 0.5)):
        params = make_randomizer(world, ranges)(world.params, random.key(0))
        speed = run(world, params, DT, (10.0, 100.0)).qvel[-1]
        assert float(speed[cart]) == pytest.approx(scale * 6 / 3 * DT, rel=1e-6)
        assert float(speed[lift]) == pytest.approx((scale * 50 - 2 * G) / 2.5 * DT, rel=0.02)


def test_tilted_gravity_pulls_sideways():
    # A turn by 0.3 about x and y is one of 0.3 sqrt(2) about (1, 1, 0) / sqrt(2), which takes (0, 0, -g) to
    # (-g sin(angle) / sqrt(2), g sin(angle) / sqrt(2), -g cos(angle)); the cart rolls without friction.
    ranges = Randomization(gravity_tilt=(0.3, 0.3))
    gravity = drawn(ranges)["opt.gravity"]
    angle = 0.3 * math.sqrt(2)
    side = G * math.sin(angle) / math.sqrt(2)
    assert gravity.tolist() == pytest.approx([-side, side, -G * math.cos(angle)], rel=1e-12)
    params = make_randomizer(env(), ranges)(env().params, random.key(0))
    speed = run(env(), params, 0.5).qvel[-1, env().spec.model.joint("cart").qvel.start]
    assert float(speed) == pytest.approx(-side * 0.5, rel=1e-6)


def test_shifted_centre_of_mass_hangs_below_the_joint():
    # The bob 0.3 m further out along x and y, and 0.3 up: at rest it hangs turned by atan(0.3 / 0.7) about y.
    ranges = Randomization(com_offset=(0.3, 0.3), com_body="pendulum")
    angle = math.atan2(0.3, 0.7)
    world = make(swing=angle)
    params = make_randomizer(world, ranges)(world.params, random.key(0))
    swing = run(world, params, 2.0, interval=0.1).qpos[:, world.spec.model.joint("swing").qpos.start]
    assert float((swing - angle).abs().max()) < 1e-6


def test_listed_pairs_rub_as_their_geoms():
    pair = '<contact><pair geom1="floor" geom2="block" friction="0.4 0.3 0 0 0"/></contact>'
    world = make(MODEL.replace("<actuator>", pair + "<actuator>"))
    params = make_randomizer(world, only("friction_scale", 2.0, 2.0))(world.params, random.key(0))
    assert params.physics["pair_friction"].tolist() == [[0.8, 0.6, 0.0, 0.0, 0.0]]


def test_robots_of_their_own_step_as_alone():
    world = auto_reset(make(speed=1.0))
    randomize = make_randomizer(world, ALL)
    keys = random.split(random.key(5), 3)
    own = torch.func.vmap(randomize, in_dims=(None, 0))(world.params, keys)
    together, alone = batch(world, shared_params=False), batch(world)
    acts = random.uniform(random.key(6), (20, 3, 2), -1.0, 1.0)
    state, _ = together.reset(own, keys)
    for action in acts:
        state, _ = together.step(own, state, action)
    for i in range(3):
        params = randomize(world.params, keys[i])
        single, _ = alone.reset(params, keys[i : i + 1])
        for action in acts:
            single, _ = alone.step(params, single, action[i : i + 1])
        assert_same(tree.index(state, slice(i, i + 1)), single)


# --- Mistakes ---

PLAIN = MODEL.replace('damping="3" armature="0.5"', "").replace(' forcerange="-40 50"', "")
PLAIN = PLAIN.replace(' actuatorfrcrange="-6 6"', "").replace(
    '<position name="hold" joint="lift" kp="100" kv="20"/>', ""
)
PLAIN = PLAIN.replace('friction="0.5"', 'friction="0"').replace('contype="0"', 'contype="0" friction="0"')


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mass_scale": (1.2, 0.8)}, r"two finite numbers, .* got \(1.2, 0.8\) \(--randomization.mass-scale\)"),
        ({"mass_scale": (0.0, 1.0)}, r"mass_scale must be factors above 0, got \(0.0, 1.0\)"),
        ({"kp_scale": (-1.0, 1.0)}, "kp_scale must be factors above 0"),
        ({"friction_scale": (1.0, math.inf)}, "friction_scale must be two finite numbers"),
        ({"gravity_scale": (math.nan, 1.0)}, "gravity_scale must be two finite numbers"),
        ({"gravity_tilt": (0.0, 2.0)}, "gravity_tilt must be less than a quarter turn"),
        ({"payload": (0.0, 1.0)}, r"payload_body must be the name of a body for payload, got '' \(--randomization.pay"),
        ({"com_offset": (0.0, 0.1)}, "com_body must be the name of a body for com_offset"),
        ({"payload": (1.0, 0.0), "payload_body": "block"}, "payload must be two finite numbers"),
        ({"payload": (0.0, 1.0), "payload_body": "blok"}, "no body 'blok'; near it are: block"),
        ({"payload_body": "blok"}, "no body 'blok'"),
        ({"com_offset": (0.0, 0.1), "com_body": "frame"}, r"com_offset \(0.0, 0.1\) .* body 'frame' has no mass"),
        ({"payload": (-1.7, 0.0), "payload_body": "block", "mass_scale": (0.8, 1.0)}, "leave body 'block' of 1.6 kg"),
        ({"friction_geoms": ("foot",)}, "no geom 'foot'"),
        ({"joints": ("knee",)}, "no joint 'knee'"),
        ({"joints": ("swing",), "damping_scale": (0.5, 1.0)}, "damping_scale .* has nothing to change: dof_damping"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_one_line(fields, words):
    with pytest.raises(InputError, match=words) as caught:
        make_randomizer(env(), Randomization(**fields))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["friction_scale", "damping_scale", "armature_scale", "kp_scale", "kd_scale", "strength_scale"]
)
def test_ranges_of_what_a_model_lacks_are_refused(name):
    with pytest.raises(InputError, match=f"{name} .* has nothing to change"):
        make_randomizer(make(PLAIN), only(name, 0.5, 1.0))


def test_fields_that_mujoco_rejects_are_refused_at_once():
    # A free ball is compiled as a simple body, whose centre of mass cannot move.
    ball = '<body name="ball" pos="0 20 2"><freejoint/><geom size="0.1"/></body>'
    simple = MODEL.replace('<body name="frame" pos="0 20 2"/>', ball)
    with pytest.raises(InputError, match="MuJoCo rejects the model fields body_ipos"):
        make_randomizer(make(simple), Randomization(com_offset=(0.1, 0.1), com_body="ball"))
