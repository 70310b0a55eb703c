"""What every physics engine promises, on a small robot with contacts. Another engine joins `ENGINES`.

Isaac Gym is there as the stand-in for it that MuJoCo simulates, in a process of its own.
"""

import math
import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple

import mujoco
import pytest
import torch
from torch.func import grad, jacrev, jvp, vmap

from rlcore.errors import InputError
from rlcore.physics import engine as physics
from rlcore.physics.engine import FAULT_ACTION, FAULT_UNSTABLE, Engine, Joint, drain_faults
from rlcore.physics.isaacgym import IsaacGymEngine
from rlcore.physics.isaacgym_settings import Settings
from rlcore.physics.mujoco import MujocoEngine
from rlcore.tree import index, map_leaves, named_leaves, replace, stack, where
from tests.rlcore.physics import standin

# A box with an arm above a floor: a free joint, a limited hinge, a lagging servo, a motor, and sensors of
# position, velocity and force.
MODEL = """
<mujoco model="box">
  <compiler angle="radian"/>
  <option timestep="0.005" integrator="implicitfast"/>
  <worldbody>
    <geom name="floor" type="plane" size="5 5 0.1"/>
    <body name="box" pos="0 0 2">
      <freejoint name="root"/>
      <geom name="box" type="box" size="0.1 0.2 0.3" mass="4"/>
      <site name="imu"/>
      <body name="arm" pos="0 0.2 0.3">
        <joint name="shoulder" axis="1 0 0" damping="0.2" range="-2 2" limited="true"/>
        <geom name="arm" type="capsule" fromto="0 0 0 0 0 0.4" size="0.04" mass="1" contype="0"
          conaffinity="0"/>
        <body name="hand" pos="0 0 0.4">
          <joint name="wrist" axis="0 1 0" damping="0.1"/>
          <geom name="hand" type="box" size="0.05 0.1 0.15" mass="0.5" contype="0" conaffinity="0"/>
        </body>
      </body>
    </body>
  </worldbody>
  <actuator>
    <general name="servo" joint="shoulder" dyntype="filter" dynprm="0.05" gainprm="5" biastype="affine"
      biasprm="0 -5 -0.2" ctrlrange="-1 1" ctrllimited="true"/>
    <motor name="motor" joint="wrist"/>
  </actuator>
  <sensor>
    <framepos name="position" objtype="body" objname="hand"/>
    <gyro name="gyro" site="imu"/>
    <jointactuatorfrc name="torque" joint="wrist"/>
  </sensor>
  <keyframe>
    <key name="lying" qpos="0 0 0.29 1 0 0 0 0.1 -0.2" ctrl="0.5 -0.1"/>
  </keyframe>
</mujoco>
"""

FIELDS = ("body_mass", "geom_friction", "dof_damping", "actuator_gainprm", "opt.gravity")
LEAVES = tuple(f.name for f in fields(physics.PhysicsState))


class Subject(NamedTuple):
    """An engine as it is tested here.

    Attributes:
      kind: its class.
      make: the engine of a model's XML and a number of threads.
      xml: the robot.
      fields: groups of model fields that go together and may differ from robot to robot at any time.
      sizes: batch sizes in which it is called in between, more than it keeps with the one that it is called in.
      sensor_age: how old sensors are after a step, physics substeps.
      warm: whether a step goes on from the state's warm start.
      lacks: what it has not, and the words with which it refuses it.
      more: further fields, which it takes at a cost.
    """

    kind: type
    make: Callable[..., Any]
    xml: str
    fields: tuple[tuple[str, ...], ...]
    sizes: int
    sensor_age: int
    warm: bool
    lacks: dict[str, str]
    more: tuple[tuple[str, ...], ...] = ()


def _isaacgym(xml, threads=1):
    model = mujoco.MjModel.from_xml_string(xml)
    return IsaacGymEngine(model, Settings(standin.interpreter(), spacing=0.0), num_threads=threads)


ENGINES = {
    "mujoco": Subject(
        kind=MujocoEngine,
        make=lambda xml, threads=1: MujocoEngine(mujoco.MjModel.from_xml_string(xml), threads),
        xml=MODEL,
        fields=tuple((name,) for name in FIELDS),
        sizes=8,
        sensor_age=1,
        warm=True,
        lacks={},
    ),
    "isaacgym": Subject(
        kind=IsaacGymEngine,
        make=_isaacgym,
        xml=MODEL.replace('dyntype="filter" dynprm="0.05" ', ""),
        fields=(("geom_friction",), ("dof_damping",), ("actuator_gainprm", "actuator_biasprm")),
        sizes=3,
        sensor_age=0,
        warm=False,
        lacks={
            "derivatives": "Isaac Gym has no derivatives: differentiate on the engine of rlcore.physics.mujoco",
            "activations": "actuator 'servo' has an activation of its own",
            "gravities": "model field 'opt.gravity' is one for all robots on Isaac Gym; it cannot differ",
            "gains": "actuator_gainprm and actuator_biasprm no longer describe position servos",
            "sizes": "model field 'geom_size' cannot differ between robots on Isaac Gym",
            "timesteps": "model field 'opt.timestep' cannot differ between robots on Isaac Gym",
        },
        more=(("body_mass",),),
    ),
}
DIFFERENTIABLE = [name for name, subject in ENGINES.items() if "derivatives" not in subject.lacks]


@pytest.fixture(scope="module", params=ENGINES)
def subject(request):
    return ENGINES[request.param]


@pytest.fixture(scope="module")
def make_engine(subject):
    return subject.make


@pytest.fixture(scope="module")
def engine(subject):
    return subject.make(subject.xml)


def differentiable(test):
    return pytest.mark.parametrize("subject", DIFFERENTIABLE, indirect=True)(test)


@pytest.fixture(autouse=True)
def _no_faults_left():
    drain_faults()
    yield
    drain_faults()


def noise(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1)


def some_states(engine, num):
    """States from lying on the floor to flying above it, all of them moving."""
    qpos, _ = engine.model.keyframe("lying")
    qpos = qpos + noise(num, 9, scale=0.1)
    qpos[num // 2 :, 2] += 1.0
    qpos[:, 3:7] /= qpos[:, 3:7].norm(dim=1, keepdim=True)
    states = vmap(engine.initial)(qpos, noise(num, 8, seed=1))
    return replace(states, act=noise(num, engine.model.na, seed=2, scale=0.5), warmstart=noise(num, 8, seed=3))


def some_params(engine, num, names=None):
    """Every robot with its own fields, within a fifth of the nominal ones."""
    if names is None:
        own = next((subject for subject in ENGINES.values() if isinstance(engine, subject.kind)), ENGINES["mujoco"])
        names = [name for group in own.fields for name in group]
    params = {
        name: value * (1 + noise(num, *value.shape, seed=seed, scale=0.2))
        for seed, (name, value) in enumerate(engine.nominal(*names).items())
    }
    if "actuator_biasprm" in params:  # what a servo gains from its target it loses from its position
        params["actuator_biasprm"][:, 0, 1] = -params["actuator_gainprm"][:, 0, 0]
    return params


def row(tree, i):
    return {k: v[i] for k, v in tree.items()}


def assert_same(actual, expected):
    """Equal bit for bit, leaf by leaf."""
    for (name, a), (_, b) in zip(named_leaves(actual), named_leaves(expected), strict=True):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), f"{name} differs by {(a - b).abs().max()}"


def assert_differs(a, b):
    assert not all(torch.equal(x, y) for (_, x), (_, y) in zip(named_leaves(a), named_leaves(b), strict=True))


# --- Purity -----------------------------------------------------------------------------------------------


def test_satisfies_the_protocol(engine):
    assert isinstance(engine, Engine)


GIVEN = [
    (name, given)
    for name, subject in ENGINES.items()
    for given in ("nothing", *map("+".join, (*subject.fields, *subject.more)), "wrench", "everything")
]


@pytest.mark.parametrize(("subject", "given"), GIVEN, indirect=["subject"])
def test_vmapped_step_equals_loop(subject, engine, given):
    states, ctrl = some_states(engine, 6), noise(6, 2)
    groups = (*subject.fields, *subject.more)
    names = [name for group in groups for name in group if given in ("+".join(group), "everything")]
    params = some_params(engine, 6, names)
    wrench = noise(6, 4, 6, scale=5) if given in ("wrench", "everything") else None
    key = torch.arange(12).reshape(6, 2)
    step = lambda p, s, c, w, k: engine.step(p, s, c, w, substeps=3, key=k)  # noqa: E731
    batched = vmap(step, in_dims=(0, 0, 0, None if wrench is None else 0, 0))(params, states, ctrl, wrench, key)
    # Each robot's own masses cost Isaac Gym a start.
    some = [1, 4] if set(names).intersection(*map(set, subject.more)) else list(range(6))
    looped = stack(
        [step(row(params, i), index(states, i), ctrl[i], None if wrench is None else wrench[i], key[i]) for i in some]
    )
    assert_same(index(batched, torch.tensor(some)), looped)
    assert (batched.fault == 0).all()
    plain = vmap(lambda s, c: engine.step({}, s, c, substeps=3))(states, ctrl)
    if given == "nothing":
        assert_same(batched, plain)  # and the key changes nothing
    else:
        # And the field changes every robot that lies on the floor.
        assert not (batched.qvel == plain.qvel)[:3].all(dim=1).any()


def test_vmapped_forward_equals_loop(engine):
    states, params = some_states(engine, 6), some_params(engine, 6)
    batched = vmap(engine.forward)(params, states)
    looped = stack([engine.forward(row(params, i), index(states, i)) for i in range(6)])
    assert_same(batched, looped)
    assert_same(replace(batched, sensordata=states.sensordata), states)
    assert (batched.sensordata != 0).any(dim=1).all()


def test_nested_vmap_equals_one_vmap(engine):
    states, params, ctrl = some_states(engine, 6), some_params(engine, 6), noise(6, 2)
    step = lambda p, s, c: engine.step(p, s, c, substeps=2)  # noqa: E731
    flat = vmap(step)(params, states, ctrl)
    folded = map_leaves(lambda x: x.reshape(2, 3, *x.shape[1:]), (params, states, ctrl))
    nested = vmap(vmap(step))(*folded)
    assert_same(map_leaves(lambda x: x.flatten(0, 1), nested), flat)
    # Other axes than the first, and fields that only the outer axis maps.
    middle = {k: v.movedim(0, -1) if v.ndim < 3 else v.movedim(0, 1) for k, v in params.items()}
    dims = {k: v.ndim - 1 if v.ndim < 3 else 1 for k, v in params.items()}
    assert_same(vmap(step, in_dims=(dims, 0, 1))(middle, states, ctrl.T), flat)
    outer = {k: v[:2] for k, v in params.items()}
    mixed = vmap(vmap(step, in_dims=(None, 0, 0)))(outer, *folded[1:])
    for i in range(2):
        expected = vmap(step, in_dims=(None, 0, 0))(row(outer, i), *index(folded[1:], i))
        assert_same(index(mixed, i), expected)


def test_unmapped_arguments_are_shared(engine):
    states, params, ctrl = some_states(engine, 4), row(some_params(engine, 1), 0), noise(2)
    step = lambda p, s, c: engine.step(p, s, c, substeps=2)  # noqa: E731
    shared = vmap(step, in_dims=(None, 0, None))(params, states, ctrl)
    assert_same(shared, stack([step(params, index(states, i), ctrl) for i in range(4)]))
    state = index(states, 0)
    many = vmap(step, in_dims=(None, None, 0))(params, state, noise(3, 2))
    assert_same(many, stack([step(params, state, c) for c in noise(3, 2)]))


def test_neighbours_change_nothing(engine):
    states, params, ctrl = some_states(engine, 512), some_params(engine, 512), noise(512, 2)
    step = vmap(lambda p, s, c: engine.step(p, s, c, substeps=2))
    many = step(params, states, ctrl)
    few = step(*map_leaves(lambda x: x[250:258], (params, states, ctrl)))
    assert_same(index(many, slice(250, 258)), few)


def test_threads_change_nothing(subject, make_engine, engine):
    states, params, ctrl = some_states(engine, 64), some_params(engine, 64), noise(64, 2)
    one, two = (
        vmap(lambda p, s, c, e=e: e.forward(p, e.step(p, s, c, substeps=4)))(params, states, ctrl)
        for e in (engine, make_engine(subject.xml, 2))
    )
    assert_same(one, two)


def test_other_calls_in_between_change_nothing(subject, make_engine):
    engine = make_engine(subject.xml)
    states, ctrl = some_states(engine, 8), noise(8, 2)
    step = vmap(lambda p, s, c: engine.step(p, s, c, substeps=2))
    params = some_params(engine, 8)
    plain, changed = step({}, states, ctrl), step(params, states, ctrl)
    sensed = vmap(engine.forward)(params, states)
    assert_differs(plain, changed)
    others, first = {k: v * 0.9 for k, v in params.items()}, next(iter(params))
    interruptions = [
        lambda: step(others, states, ctrl),
        lambda: step({first: others[first]}, states, ctrl),
        lambda: step({}, states, 3 * ctrl),
        lambda: vmap(lambda s, c, w: engine.step({}, s, c, w, substeps=1))(states, ctrl, noise(8, 4, 6)),
        lambda: vmap(engine.forward)(others, states),
        *([] if "derivatives" in subject.lacks else [lambda: grad(lambda c: step(others, states, c).qpos.sum())(ctrl)]),
        lambda: [step({}, index(states, slice(0, n)), ctrl[:n]) for n in range(1, subject.sizes + 1)],
        lambda: step(params, states, torch.full_like(ctrl, math.nan)),
        lambda: step(params, replace(states, qvel=states.qvel + 1e9), ctrl),
    ]
    for interrupt in interruptions:
        interrupt()
        assert_same(step(params, states, ctrl), changed)
        interrupt()
        assert_same(step({}, states, ctrl), plain)
        interrupt()
        assert_same(vmap(engine.forward)(params, states), sensed)


def test_fields_written_in_place_are_seen(engine):
    states, ctrl = some_states(engine, 4), noise(4, 2)
    step = vmap(lambda p, s, c: engine.step(p, s, c, substeps=2))
    params = some_params(engine, 4) | some_params(engine, 4, ["body_mass"])
    before = step(params, states, ctrl)
    params["body_mass"][2] *= 2
    after = step(params, states, ctrl)
    expected = step({k: v.clone() for k, v in params.items()}, states, ctrl)
    assert_same(after, expected)
    assert torch.equal(after.qvel[:2], before.qvel[:2])
    assert not torch.equal(after.qvel[2], before.qvel[2])


def test_works_in_inference_mode(engine):
    with torch.inference_mode():
        states, params, ctrl = some_states(engine, 3), some_params(engine, 3), noise(3, 2)
        inferred = [vmap(lambda p, s, c: engine.step(p, s, c, substeps=2))(params, states, ctrl) for _ in "ab"]
    states, params = some_states(engine, 3), some_params(engine, 3)
    expected = vmap(lambda p, s, c: engine.step(p, s, c, substeps=2))(params, states, noise(3, 2))
    assert_same(map_leaves(torch.clone, inferred[0]), expected)
    assert_same(map_leaves(torch.clone, inferred[1]), expected)


def test_nominal_fields_given_are_no_fields(subject, engine):
    states, ctrl = some_states(engine, 4), noise(4, 2)
    step = vmap(lambda p, s, c: engine.step(p, s, c, substeps=4), in_dims=(None, 0, 0))
    plain = step({}, states, ctrl)
    step(row(some_params(engine, 1), 0), states, ctrl)
    names = [name for group in (*subject.fields, *subject.more) for name in group]
    assert_same(step(engine.nominal(*names), states, ctrl), plain)


def test_two_steps_are_one_of_twice_the_substeps(engine):
    states, ctrl = some_states(engine, 4), noise(4, 2)
    step = lambda n: vmap(lambda s, c: engine.step({}, s, c, substeps=n))  # noqa: E731
    assert_same(step(3)(step(3)(states, ctrl), ctrl), step(6)(states, ctrl))


def test_a_masked_reset_is_a_fresh_start(engine):
    fresh, params, ctrl = some_states(engine, 6), some_params(engine, 6), noise(6, 2)
    step = vmap(lambda p, s, c: engine.step(p, s, c, substeps=2))
    later = step(params, step(params, fresh, ctrl), ctrl)
    reset = torch.tensor([False, True, False, False, True, False])
    mixed = vmap(engine.forward)(params, where(reset, fresh, later), reset)
    after = step(params, mixed, ctrl)
    moved = lambda state: replace(state, sensordata=state.sensordata[:, :0])  # noqa: E731
    assert_same(index(moved(after), reset), index(moved(step(params, fresh, ctrl)), reset))
    assert_same(index(moved(after), ~reset), index(moved(step(params, later, ctrl)), ~reset))
    assert torch.equal(mixed.sensordata[~reset], later.sensordata[~reset])
    assert torch.equal(mixed.sensordata[reset], vmap(engine.forward)(params, fresh).sensordata[reset])


def test_results_share_no_memory(engine):
    states, ctrl = some_states(engine, 4), noise(4, 2)
    step = vmap(lambda s, c: engine.step({}, s, c, substeps=1))
    kept = map_leaves(torch.clone, states)
    first = step(states, ctrl)
    copy = map_leaves(torch.clone, first)
    second = step(states, 2 * ctrl)
    assert_same(first, copy)
    map_leaves(lambda x: x.fill_(7), second)
    assert_same(first, copy)
    assert_same(states, kept)


# --- Sensors where asked ----------------------------------------------------------------------------------


def test_masked_forward_leaves_the_rest_alone(engine):
    states, params = replace(some_states(engine, 5), sensordata=noise(5, 7)), some_params(engine, 5)
    full = vmap(engine.forward)(params, states)
    for bits in range(0, 32, 5):
        mask = torch.tensor([bool(bits >> i & 1) for i in range(5)])
        masked = vmap(engine.forward)(params, states, mask)
        assert torch.equal(masked.sensordata[mask], full.sensordata[mask])
        assert torch.equal(masked.sensordata[~mask], states.sensordata[~mask])
        assert_same(replace(masked, sensordata=full.sensordata), full)
    nested = map_leaves(lambda x: x[:4].reshape(2, 2, *x.shape[1:]), (params, states, mask))
    inner = vmap(vmap(engine.forward))(*nested)
    assert torch.equal(inner.sensordata.flatten(0, 1), masked.sensordata[:4])


# --- Faults -----------------------------------------------------------------------------------------------


def replay(engine, fault):
    """The step of a fault again, from what was recorded of it."""
    arrays = {name: torch.from_numpy(array) for name, array in fault.arrays.items()}
    params = {n.removeprefix("params."): a for n, a in arrays.items() if n.startswith("params.")}
    state = physics.PhysicsState(**{n: arrays[n] for n in LEAVES if n != "fault"}, fault=torch.tensor(0))
    return engine.step(
        params,
        state,
        arrays["ctrl"],
        arrays.get("wrench"),
        substeps=int(arrays["substeps"]),
        key=arrays.get("key"),
    )


@pytest.mark.parametrize("breakage", ["nan ctrl", "infinite ctrl", "explosion", "nan wrench"])
def test_fault_of_one_robot(engine, breakage):
    states, params, ctrl = some_states(engine, 5), some_params(engine, 5), noise(5, 2)
    states = replace(states, time=torch.arange(5.0).double(), sensordata=noise(5, 7, seed=9))
    wrench, key = noise(5, 4, 6), torch.arange(10).reshape(5, 2)
    step = lambda: vmap(lambda p, s, c, w, k: engine.step(p, s, c, w, substeps=3, key=k))(  # noqa: E731
        params, states, ctrl, wrench, key
    )
    healthy = step()
    assert not drain_faults()
    assert (healthy.fault == 0).all()
    if breakage == "explosion":
        qvel = states.qvel.clone()
        qvel[2, 1] = 1e8
        states = replace(states, qvel=qvel)
    elif breakage == "nan wrench":
        wrench[2, 1, 0] = math.nan
    else:
        ctrl[2, 1] = math.nan if breakage == "nan ctrl" else math.inf
    code = FAULT_ACTION if "ctrl" in breakage else FAULT_UNSTABLE
    broken = step()
    assert broken.fault.tolist() == [0, 0, code, 0, 0]
    others = torch.tensor([0, 1, 3, 4])
    assert_same(index(broken, others), index(healthy, others))
    assert_same(replace(index(broken, 2), fault=torch.tensor(0)), index(states, 2))

    [fault] = drain_faults()
    assert not drain_faults()
    assert fault.code == code
    assert "\n" not in fault.message
    if code == FAULT_ACTION:
        assert "motor" in fault.message and "servo" not in fault.message
    assert torch.equal(torch.from_numpy(fault.arrays["key"]), key[2])
    again = replay(engine, fault)
    assert_same(again, index(broken, 2))
    [same] = drain_faults()
    assert same.message == fault.message
    assert same.arrays.keys() == fault.arrays.keys()
    for name, array in fault.arrays.items():
        assert torch.equal(torch.from_numpy(same.arrays[name]).isnan(), torch.from_numpy(array).isnan())
        assert torch.from_numpy(same.arrays[name]).nan_to_num().equal(torch.from_numpy(array).nan_to_num())


def test_a_healthy_step_clears_the_fault(engine):
    state, ctrl = index(some_states(engine, 1), 0), noise(2)
    state = engine.step({}, state, ctrl * math.nan, substeps=1)
    assert state.fault == FAULT_ACTION
    assert engine.forward({}, state).fault == 0
    assert engine.step({}, state, ctrl, substeps=1).fault == 0


def test_the_first_faults_are_kept(engine):
    states = some_states(engine, 20)
    vmap(lambda s, c: engine.step({}, s, c, substeps=1))(states, torch.full((20, 2), math.nan))
    kept = drain_faults()
    assert 1 <= len(kept) < 20
    assert [f.arrays["qpos"][0] for f in kept] == states.qpos[: len(kept), 0].tolist()


@differentiable
def test_a_failed_step_has_no_slope(engine):
    states, ctrl = some_states(engine, 2), noise(2, 2)
    qvel = states.qvel.clone()
    qvel[1, 0] = 1e8
    loss = lambda c, v: (  # noqa: E731
        vmap(lambda s, c: engine.step({}, s, c, substeps=2).qvel.sum())(replace(states, qvel=v), c).sum()
    )
    broken, healthy = grad(loss)(ctrl, qvel), grad(loss)(ctrl, states.qvel)
    assert torch.equal(broken[0], healthy[0])
    assert (healthy[1] != 0).any()
    assert (broken[1] == 0).all()


# --- What an engine has not -------------------------------------------------------------------------------


def attempt(subject, engine, what):
    """Ask an engine for something that it may not have."""
    states, ctrl = some_states(engine, 2), noise(2, 2)
    step = vmap(lambda p, s, c: engine.step(p, s, c, substeps=1))
    if what == "activations":
        return subject.make(MODEL)
    if what == "derivatives":
        return grad(lambda c: step({}, states, c).qpos.sum())(ctrl)
    fields = {
        "gravities": "opt.gravity",
        "gains": "actuator_gainprm",
        "sizes": "geom_size",
        "timesteps": "opt.timestep",
    }
    return step(some_params(engine, 2, [fields[what]]), states, ctrl)


@pytest.mark.parametrize("what", ["activations", "derivatives", "gravities", "gains", "sizes", "timesteps"])
def test_what_an_engine_has_not_it_refuses(subject, engine, what):
    if what not in subject.lacks:
        attempt(subject, engine, what)
        return
    with pytest.raises((InputError, RuntimeError), match=re.escape(subject.lacks[what])) as error:
        attempt(subject, engine, what)
    assert "\n" not in str(error.value)
    # And goes on as before.
    state = index(some_states(engine, 2), 0)
    assert engine.step({}, state, noise(2), substeps=1).fault == 0


def test_sensors_after_a_step_are_as_old_as_is_said(subject, engine):
    states, ctrl = some_states(engine, 6), noise(6, 2)
    step = lambda n: vmap(lambda s, c: engine.step({}, s, c, substeps=n))(states, ctrl)  # noqa: E731
    sensed = vmap(lambda s: engine.forward({}, s))(step(3 - subject.sensor_age)).sensordata
    newer = vmap(lambda s: engine.forward({}, s))(step(2 + subject.sensor_age)).sensordata
    for name in ("position", "gyro"):
        place = engine.model.sensor(name)
        told = step(3).sensordata[:, place]
        torch.testing.assert_close(told, sensed[:, place], rtol=1e-6, atol=1e-6)
        assert (told - newer[:, place]).abs().max() > 1e-3
    # The motor's torque is its control.
    torch.testing.assert_close(step(3).sensordata[:, engine.model.sensor("torque")][:, 0], ctrl[:, 1])


def test_the_warm_start_is_used_or_is_nothing(subject, engine):
    states, ctrl = some_states(engine, 6), noise(6, 2)
    step = vmap(lambda s, c: engine.step({}, s, c, substeps=2))
    after, cold = step(states, ctrl), step(replace(states, warmstart=0.0 * states.warmstart), ctrl)
    assert (after.warmstart != 0).any() == subject.warm
    # Of robots on the floor, whose contacts the solver has to find.
    assert torch.equal(after.qvel[:3], cold.qvel[:3]) != subject.warm


# --- Derivatives ------------------------------------------------------------------------------------------


def turned(qpos, motion):
    """qpos moved by `motion` in the tangent space: `[..., 9]` and `[..., 8]`."""
    w, x, y, z = qpos[3:7]
    a, b, c = motion[3:6] / 2
    turn = torch.stack([-x * a - y * b - z * c, w * a + y * c - z * b, w * b + z * a - x * c, w * c + x * b - y * a])
    return torch.cat([qpos[:3] + motion[:3], qpos[3:7] + turn, qpos[7:] + motion[6:]])


def make_loss(engine, steps):
    """A function of (ctrl, qpos tangent, qvel, wrench, act) at a state, through steps of four substeps."""
    state = replace(index(some_states(engine, 2), 1), warmstart=noise(8, scale=0.0))
    weights = noise(9, seed=5), noise(8, seed=6), noise(7, seed=7), noise(1, seed=8)

    def loss(ctrl, motion, qvel, wrench, act):
        s = replace(state, qpos=turned(state.qpos, motion), qvel=qvel, act=act)
        for _ in range(steps):
            s = engine.step({}, s, ctrl, wrench, substeps=4)
        return sum((w * x).sum() for w, x in zip(weights, (s.qpos, s.qvel, s.sensordata, s.act), strict=True))

    wrench = noise(4, 6, seed=10)
    wrench[0] = 0
    return loss, (noise(2, scale=0.5), noise(8, scale=0.0), state.qvel, wrench, state.act)


def difference(fn, args, place, direction, size):
    """The slope of `fn` along a direction of one argument, of fourth order in float64."""
    at = lambda k: fn(*(a + k * size * direction if i == place else a for i, a in enumerate(args)))  # noqa: E731
    return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * size)


@differentiable
@pytest.mark.parametrize("steps", [1, 5])
def test_gradients_equal_finite_differences(engine, steps):
    loss, args = make_loss(engine, steps)
    gradients = grad(loss, argnums=(0, 1, 2, 3, 4))(*args)
    for place, (gradient, arg) in enumerate(zip(gradients, args, strict=True)):
        assert gradient.norm() > 1e-3
        for seed in range(2):
            direction = noise(*arg.shape, seed=seed)
            direction /= direction.norm()
            slope = difference(loss, args, place, direction, 1e-3 if place == 3 else 1e-4)
            # Measured: 5e-10 of the gradient.
            assert abs((gradient * direction).sum() - slope) < 1e-7 * gradient.norm()


@differentiable
def test_backward_equals_grad(engine):
    loss, args = make_loss(engine, 2)
    tracked = [a.clone().requires_grad_() for a in args]
    loss(*tracked).backward()
    for a, b in zip(tracked, grad(loss, argnums=(0, 1, 2, 3, 4))(*args), strict=True):
        assert torch.equal(a.grad, b)


@differentiable
def test_transforms_of_grad_equal_loops(engine):
    states, ctrl, params = some_states(engine, 3), noise(3, 2, scale=0.5), some_params(engine, 3)

    def step(c, s, p):
        after = engine.step(p, s, c, substeps=2)
        return torch.cat([after.qpos, after.qvel, after.sensordata])

    loss = lambda c, s, p: (step(c, s, p) ** 2).sum()  # noqa: E731
    one_by_one = [(ctrl[i], index(states, i), row(params, i)) for i in range(3)]
    looped = torch.stack([grad(loss)(*args) for args in one_by_one])
    assert torch.equal(vmap(grad(loss))(ctrl, states, params), looped)
    summed = grad(lambda c: vmap(loss)(c, states, params).sum())(ctrl)
    assert torch.equal(summed, looped)
    jacobians = torch.stack([jacrev(step)(*args) for args in one_by_one])
    assert torch.equal(vmap(jacrev(step))(ctrl, states, params), jacobians)
    assert jacobians.shape == (3, 24, 2)
    # A row of the Jacobian is the gradient of that output.
    for output in (0, 12, 23):
        single = grad(lambda c, s, p, o=output: step(c, s, p)[o])(*one_by_one[0])
        torch.testing.assert_close(jacobians[0, output], single, rtol=1e-12, atol=1e-15)
    # Through every leaf of the state too; the warm start counts as fixed.
    rest = index(states, 0)
    leaves = {name: getattr(rest, name) for name in LEAVES if name != "fault"}
    whole = grad(lambda x: loss(ctrl[0], replace(rest, **x), row(params, 0)))(leaves)
    assert {name for name, g in whole.items() if (g != 0).any()} == {"qpos", "qvel", "act"}


@differentiable
def test_quaternion_gradient_is_tangent(engine):
    ctrl = noise(2, scale=0.5)
    state = index(some_states(engine, 2), 1)
    qpos_loss = lambda q: engine.step({}, replace(state, qpos=q), ctrl, substeps=1).qvel.sum()  # noqa: E731
    gradient = grad(qpos_loss)(state.qpos)[3:7]
    assert abs(gradient @ state.qpos[3:7]) < 1e-9 * gradient.norm()
    assert gradient.norm() > 1e-3


@differentiable
def test_second_derivatives_are_refused(engine):
    loss, args = make_loss(engine, 1)
    for second in (
        lambda: grad(lambda c: grad(loss)(c, *args[1:]).sum())(args[0]),
        lambda: jvp(loss, args, args),
    ):
        with pytest.raises(RuntimeError, match=r"second derivatives|jvp"):
            second()
    ctrl = args[0].clone().requires_grad_()
    [first] = torch.autograd.grad(loss(ctrl, *args[1:]), ctrl, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        first.sum().backward()


@differentiable
def test_derivatives_of_model_fields_are_refused(engine):
    states, ctrl, params = some_states(engine, 2), noise(2, 2), some_params(engine, 2)
    loss = lambda p, c, s: engine.step(p, s, c, substeps=1).qpos.sum()  # noqa: E731
    one = row(params, 0), ctrl[0], index(states, 0)
    attempts = [
        lambda: grad(loss)(*one),
        lambda: grad(loss, argnums=(0, 1))(*one),
        lambda: jacrev(loss)(*one),
        lambda: vmap(grad(loss))(params, ctrl, states),
        lambda: grad(lambda p: vmap(loss)(p, ctrl, states).sum())(params),
        lambda: grad(lambda mass: loss({**one[0], "body_mass": 2 * mass}, *one[1:]))(one[0]["body_mass"]),
        lambda: loss({k: v.clone().requires_grad_() for k, v in one[0].items()}, *one[1:]).backward(),
    ]
    for attempt in attempts:
        with pytest.raises(RuntimeError, match=r"no derivative with respect to model fields.*body_mass"):
            attempt()
    tracked = {k: v.clone().requires_grad_() for k, v in one[0].items()}
    with pytest.raises(RuntimeError, match="model fields"):
        loss(tracked, *one[1:]).backward()
    detached = grad(lambda c: loss({k: v.detach() for k, v in tracked.items()}, c, one[2]))
    assert detached(one[1]).norm() > 0


# --- Compiled ---------------------------------------------------------------------------------------------

COMPILED = """
import torch
from torch.func import grad, vmap
from tests.rlcore.physics import test_engine as t

torch.set_num_threads(1)
subject = t.ENGINES["{engine}"]
engine = subject.make(subject.xml)
wrench = t.noise(3, 4, 6)
states, params, ctrl = t.some_states(engine, 3), t.some_params(engine, 3), t.noise(3, 2)

def step(p, s, c, w):
    return engine.forward(p, engine.step(p, s, 2 * c, w, substeps=2), s.time < 1)

eager = vmap(step)(params, states, ctrl, wrench)
compiled = torch.compile(vmap(step), backend="aot_eager", fullgraph=True)(params, states, ctrl, wrench)
t.assert_same(compiled, eager)
single = torch.compile(step, backend="aot_eager", fullgraph=True)
args = {{k: v[0] for k, v in params.items()}}, t.index(states, 0), ctrl[0], wrench[0]
t.assert_same(single(*args), step(*args))
try:
    c = ctrl[0].clone().requires_grad_()
    single(args[0], args[1], c, args[3]).qpos.sum().backward()
except RuntimeError:
    assert c.grad is None
else:
    raise AssertionError("a gradient was lost silently")

state = (states.time, states.qpos, states.qvel, states.act, states.warmstart, states.sensordata)
names, fields, mask = ",".join(params), list(params.values()), states.time < 1
key = torch.zeros(3, 2, dtype=torch.int64)
ops, tests = torch.ops.rlcore, ("test_schema", "test_faketensor", "test_aot_dispatch_static")
for w, k, n, f in ((wrench, key, names, fields), (None, None, "", [])):
    torch.library.opcheck(ops.physics_step, (engine.handle, 2, n, f, k, w, ctrl, *state), test_utils=tests)
    if "derivatives" not in subject.lacks:
        torch.library.opcheck(ops.physics_jacobian, (engine.handle, 2, n, f, w, ctrl, *state), test_utils=tests)
torch.library.opcheck(ops.physics_forward, (engine.handle, names, fields, mask, *state), test_utils=tests)

if "derivatives" not in subject.lacks:
    vmap(grad(lambda c, s: engine.step({{}}, s, c, substeps=1).qpos.sum()))(ctrl, states)
print("done")
"""


@pytest.mark.parametrize("name", ENGINES)
def test_compiled_equals_eager_and_no_slow_fallback(name, run_python):
    source = COMPILED.format(engine=name)
    # torch writes of a missing vmap rule to the standard error, which is caught here with the output.
    merged = "import os, sys\nos.dup2(1, 2)\n" + source
    printed = run_python(merged)
    assert printed.splitlines()[-1] == "done"
    assert "performance drop" not in printed
    assert "WARNING" not in printed


# --- Names and mistakes -----------------------------------------------------------------------------------


def test_the_model_by_its_names(subject, engine):
    m, na = engine.model, int("dyntype" in subject.xml)
    assert (m.nq, m.nv, m.na, m.nu, m.nsensor, m.timestep) == (9, 8, na, 2, 7, 0.005)
    assert m.bodies == ("world", "box", "arm", "hand")
    assert (m.body("arm"), m.geom("hand"), m.actuator("motor")) == (2, 3, 1)
    assert m.joint("root") == Joint("root", "free", slice(0, 7), slice(0, 6), -math.inf, math.inf)
    assert m.joint("shoulder") == Joint("shoulder", "hinge", slice(7, 8), slice(6, 7), -2.0, 2.0)
    assert (m.sensor("position"), m.sensor("gyro"), m.sensor("torque")) == (
        slice(0, 3),
        slice(3, 6),
        slice(6, 7),
    )
    assert (m.ctrl_lower, m.ctrl_upper) == ((-1.0, -math.inf), (1.0, math.inf))
    assert m.actuator_joints == ("shoulder", "wrist")
    assert m.actuated() == (slice(7, 9), slice(6, 8))
    qpos, ctrl = m.keyframe("lying")
    assert qpos.tolist() == [0, 0, 0.29, 1, 0, 0, 0, 0.1, -0.2]
    assert ctrl.tolist() == [0.5, -0.1]


def test_actuators_out_of_order(subject, make_engine):
    swapped = subject.xml.replace('"servo" joint="shoulder"', '"servo" joint="wrist"')
    model = make_engine(swapped.replace('"motor" joint="wrist"', '"motor" joint="shoulder"')).model
    assert model.actuator_joints == ("wrist", "shoulder")
    assert model.actuated() == ([8, 7], [7, 6])
    fixed = subject.xml.replace('"motor" joint="wrist"', '"motor" joint="root"')
    with pytest.raises(InputError, match="'motor' drives no hinge"):
        make_engine(fixed).model.actuated()


@pytest.mark.parametrize("kind", ["sensor", "body", "geom", "joint", "actuator", "keyframe"])
def test_unknown_names_are_told_with_near_ones(engine, kind):
    near = {
        "sensor": ("gyr", "gyro"),
        "body": ("hnad", "hand"),
        "geom": ("flor", "floor"),
        "joint": ("shoulders", "shoulder"),
        "actuator": ("moter", "motor"),
        "keyframe": ("flying", "lying"),
    }
    wrong, right = near[kind]
    with pytest.raises(InputError, match=f"no {kind} '{wrong}'.*{right}") as error:
        getattr(engine.model, kind)(wrong)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=f"{right}"):
        getattr(engine.model, kind)("zzzz")


def test_what_cannot_work_is_refused(engine):
    states = some_states(engine, 2)
    state, ctrl = index(states, 0), noise(2)
    step = lambda p=None, s=state, c=ctrl, w=None, n=1: engine.step(p or {}, s, c, w, substeps=n)  # noqa: E731
    mass = engine.nominal("body_mass")["body_mass"]
    mistakes = {
        "ctrl .*servo, motor.*got": lambda: step(c=noise(3)),
        r"ctrl .*\(2, 2\).*got": lambda: step(s=states),
        "wrench .*4, 6.*got": lambda: step(w=noise(3, 6)),
        "substeps must be at least 1, got 0": lambda: step(n=0),
        "float64, got torch.float32": lambda: step(s=replace(state, qpos=state.qpos.float())),
        "'body_mas'.*near it are: body_mass": lambda: step({"body_mas": mass}),
        "'body_mass' must have shape": lambda: step({"body_mass": mass[:2]}),
        "'geom_friction' must have shape": lambda: engine.forward({"geom_friction": mass}, state),
        r"'body_mass' must have shape \(4,\), got \(3, 4\)": lambda: step({"body_mass": mass.expand(3, 4)}),
        "qpos and qvel must have": lambda: engine.initial(noise(8), noise(8)),
        "qpos and qvel .*have": lambda: engine.initial(noise(9), noise(3, 8)),
        "'nonsense'": lambda: engine.nominal("nonsense"),
    }
    for message, mistake in mistakes.items():
        with pytest.raises(InputError, match=message) as error:
            mistake()
        assert "\n" not in str(error.value)


def test_initial_takes_the_engine_s_precision(engine):
    qpos, _ = engine.model.keyframe("lying")
    state = engine.initial(qpos.float(), torch.zeros(8))
    assert {leaf.dtype for name, leaf in named_leaves(state) if name != "fault"} == {torch.float64}
    assert state.fault.dtype == torch.int64
    assert engine.step({}, state, torch.zeros(2), substeps=1).fault == 0


def test_an_engine_that_is_gone_is_told(subject, make_engine):
    gone = make_engine(subject.xml)
    handle, state = gone.handle, index(some_states(gone, 1), 0)
    assert handle != make_engine(subject.xml).handle
    del gone
    leaves = [getattr(state, name) for name in LEAVES[:-1]]
    with pytest.raises(RuntimeError, match="keep the engine alive"):
        torch.ops.rlcore.physics_forward(handle, "", [], torch.tensor(True), *leaves)
