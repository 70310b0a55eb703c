"""The MuJoCo engine against MuJoCo's own loop, on the humanoid, and where MuJoCo itself fails."""

import math
from pathlib import Path

import mujoco
import numpy as np
import pytest
import torch
from torch.func import grad, vmap

import tasks.humanoid
from rlcore.errors import InputError
from rlcore.physics.engine import FAULT_ENGINE, drain_faults
from rlcore.physics.mujoco import MujocoEngine, load_model
from rlcore.tree import index, map_leaves, replace
from tests.rlcore.physics.test_engine import (
    FIELDS,
    MODEL,
    assert_same,
    difference,
    noise,
    replay,
    row,
    some_params,
    some_states,
)

HUMANOID = Path(tasks.humanoid.__file__).parent / "humanoid.xml"


@pytest.fixture(scope="module")
def engine():
    return MujocoEngine(mujoco.MjModel.from_xml_string(MODEL), 1)


@pytest.fixture(scope="module")
def humanoid():
    return MujocoEngine(load_model(HUMANOID), 1)


@pytest.fixture(autouse=True)
def _no_faults_left():
    drain_faults()
    yield
    drain_faults()


# --- MuJoCo's own loop ------------------------------------------------------------------------------------


def model_with(source, params):
    """A model of its own with some fields changed, as a user of plain MuJoCo would change them."""
    model = mujoco.MjModel.from_xml_string(source) if "<" in str(source) else load_model(source)
    for name, value in params.items():
        if name.startswith("opt."):
            getattr(model.opt, name[4:])[:] = value.numpy()
        else:
            getattr(model, name)[:] = value.numpy()
    if params:
        mujoco.mj_setConst(model, mujoco.MjData(model))
    return model


def data_at(model, state, ctrl=None, wrench=None):
    data = mujoco.MjData(model)
    data.time = state.time.item()
    data.qpos[:], data.qvel[:], data.act[:] = state.qpos.numpy(), state.qvel.numpy(), state.act.numpy()
    data.qacc_warmstart[:] = state.warmstart.numpy()
    if ctrl is not None:
        data.ctrl[:] = ctrl.numpy()
    if wrench is not None:
        data.xfrc_applied[:] = wrench.numpy()
    return data


def assert_state_is(state, data):
    golden = (data.qpos, data.qvel, data.act, data.qacc_warmstart, data.sensordata)
    ours = (state.qpos, state.qvel, state.act, state.warmstart, state.sensordata)
    for a, b in zip(ours, golden, strict=True):
        np.testing.assert_array_equal(a.numpy(), b)
    assert state.time.item() == data.time


@pytest.mark.parametrize("changed", ["nothing", "body_mass", "wrench", "everything"])
def test_step_equals_a_loop_of_mj_step(engine, changed):
    states, every, wrenches = some_states(engine, 4), some_params(engine, 4), noise(4, 4, 6, scale=5)
    names = {"nothing": (), "wrench": (), "body_mass": ("body_mass",), "everything": FIELDS}[changed]
    params = {name: every[name] for name in names}
    wrench = wrenches if changed in ("wrench", "everything") else None
    controls = noise(10, 4, 2)
    datas = [
        data_at(model_with(MODEL, row(params, i)), index(states, i), None, None if wrench is None else wrench[i])
        for i in range(4)
    ]
    in_dims = (0, 0, 0, None if wrench is None else 0)
    for ctrl in controls:
        states = vmap(lambda p, s, c, w: engine.step(p, s, c, w, substeps=3), in_dims=in_dims)(
            params, states, ctrl, wrench
        )
        for i, data in enumerate(datas):
            data.ctrl[:] = ctrl[i].numpy()
            for _ in range(3):
                mujoco.mj_step(model_with(MODEL, row(params, i)), data)
            assert_state_is(index(states, i), data)
    assert datas[0].ncon > 0


def test_humanoid_equals_a_loop_of_mj_step(humanoid):
    qpos, ctrl = humanoid.model.keyframe("stand")
    state, model = humanoid.initial(qpos, noise(humanoid.model.nv, scale=0.5)), load_model(HUMANOID)
    model.opt.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_AUTORESET)
    data = data_at(model, state, ctrl)
    for _ in range(25):
        state = humanoid.step({}, state, ctrl, substeps=4)
        mujoco.mj_step(model, data, 4)
    assert data.ncon > 0
    assert_state_is(state, data)


def test_forward_equals_mj_forward(engine):
    states, params = some_states(engine, 4), some_params(engine, 4)
    mask = torch.tensor([True, False, True, True])
    ours = vmap(engine.forward)(params, states, mask)
    for i in range(4):
        model = model_with(MODEL, row(params, i))
        data = data_at(model, index(states, i))
        mujoco.mj_forward(model, data)
        expected = data.sensordata if mask[i] else states.sensordata[i].numpy()
        np.testing.assert_array_equal(ours.sensordata[i].numpy(), expected)


# --- Fields of mjData beside the sensors --------------------------------------------------------------------

EXTRA = ("subtree_com", "cvel", "qfrc_actuator", "cfrc_ext")


@pytest.fixture(scope="module", params=["implicitfast", "RK4"])
def extended(request):
    """An engine that shows further fields, and its source. RK4 leaves those of a stage between two steps."""
    source = MODEL.replace('integrator="implicitfast"', f'integrator="{request.param}"')
    return MujocoEngine(mujoco.MjModel.from_xml_string(source), 2, extra=EXTRA), source


def shown(data):
    """What the engine is to show: the sensors, then the fields as plain MuJoCo leaves them."""
    mujoco.mj_rnePostConstraint(data.model, data)
    return np.concatenate([data.sensordata, *(getattr(data, name).ravel() for name in EXTRA)])


def test_extra_fields_are_those_of_mj_step(extended):
    engine, source = extended
    states, params = some_states(engine, 4), some_params(engine, 4)
    datas = [data_at(model_with(source, row(params, i)), index(states, i)) for i in range(4)]
    touched = 0
    for ctrl in noise(10, 4, 2):
        states = vmap(lambda p, s, c: engine.step(p, s, c, substeps=3))(params, states, ctrl)
        for i, data in enumerate(datas):
            data.ctrl[:] = ctrl[i].numpy()
            mujoco.mj_step(data.model, data, 3)
            np.testing.assert_array_equal(states.sensordata[i].numpy(), shown(data))
            np.testing.assert_array_equal(states.qpos[i].numpy(), data.qpos)
            touched += data.cfrc_ext.any()
    assert touched > 5
    # By name, in a place of their own after the sensors.
    assert engine.model.sensor("gyro") == slice(3, 6)
    assert torch.equal(states.sensordata[0, engine.model.sensor("cvel")], torch.from_numpy(datas[0].cvel.ravel()))
    assert engine.model.sensor("cfrc_ext").stop == engine.model.nsensor == states.sensordata.shape[1]


def test_extra_fields_after_forward_and_in_a_loop(extended):
    engine, source = extended
    states, mask = some_states(engine, 5), torch.tensor([True, False, True, True, False])
    states = replace(states, sensordata=noise(5, engine.model.nsensor))
    ours = vmap(lambda s, m: engine.forward({}, s, m))(states, mask)
    for i in range(5):
        data = data_at(model_with(source, {}), index(states, i))
        mujoco.mj_forward(data.model, data)
        expected = shown(data) if mask[i] else states.sensordata[i].numpy()
        np.testing.assert_array_equal(ours.sensordata[i].numpy(), expected)
    ctrl = noise(5, 2)
    together = vmap(lambda s, c: engine.step({}, s, c, substeps=2))(ours, ctrl)
    for i in range(5):
        assert_same(index(together, i), engine.step({}, index(ours, i), ctrl[i], substeps=2))


def test_extra_fields_have_derivatives():
    engine = MujocoEngine(mujoco.MjModel.from_xml_string(MODEL), 1, extra=("subtree_com",))
    state, place = index(some_states(engine, 2), 1), engine.model.sensor("subtree_com")

    def height(qpos):
        """Of the centre of mass, one substep old: it rises with the root, whatever else happens."""
        return engine.step({}, replace(state, qpos=qpos), noise(2), substeps=2).sensordata[place][2]

    assert float(grad(height)(state.qpos)[2]) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["cinrt"], "extra field 'cinrt' cannot be read .* near it are: cinert"),
        (["efc_force"], "extra field 'efc_force' cannot be read"),
        (["cvel", "cvel"], "'cvel' is given twice"),
        (["position"], "extra field 'position' cannot be read"),
        (["ten_length"], "'ten_length' is empty in this model"),
    ],
)
def test_extra_fields_that_cannot_be_read(extra, message):
    with pytest.raises(InputError, match=message):
        MujocoEngine(mujoco.MjModel.from_xml_string(MODEL), extra=extra)
    named = MODEL.replace('name="gyro"', 'name="cvel"')
    with pytest.raises(InputError, match="the model has a sensor of that name"):
        MujocoEngine(mujoco.MjModel.from_xml_string(named), extra=["cvel"])


# --- Derivatives of the humanoid --------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["flight", "standing"])
@pytest.mark.parametrize("steps", [1, 5])
def test_humanoid_gradients_equal_finite_differences(humanoid, where, steps):
    m = humanoid.model
    qpos, target = m.keyframe("stand")
    if where == "flight":
        qpos[2] += 1.0
        state = humanoid.initial(qpos, noise(m.nv, scale=0.5))
    else:
        state = humanoid.initial(qpos, torch.zeros(m.nv).double())
        for _ in range(25):
            state = humanoid.step({}, state, target, substeps=4)
        assert state.sensordata[m.sensor("left_foot_contact")] > 50  # N: it stands
    weights = noise(m.nq, seed=1), noise(m.nv, seed=2)

    def loss(ctrl, joints, qvel, wrench):
        s = replace(state, qpos=torch.cat([state.qpos[:7], joints]), qvel=qvel)
        for _ in range(steps):
            s = humanoid.step({}, s, ctrl, wrench, substeps=4)
        return (weights[0] * s.qpos).sum() + (weights[1] * s.qvel).sum()

    wrench = noise(len(m.bodies), 6, scale=0.1)
    args = (target, state.qpos[7:], state.qvel, wrench)
    gradients = grad(loss, argnums=(0, 1, 2, 3))(*args)
    for place, (gradient, arg) in enumerate(zip(gradients, args, strict=True)):
        direction = noise(*arg.shape, seed=3)
        direction /= direction.norm()
        slope = difference(loss, args, place, direction, 1e-3 if place == 3 else 1e-5)
        # Measured: 1e-9 of the gradient in flight and 3e-7 in contact, of the wrench.
        assert gradient.norm() > 1e-2
        assert abs((gradient * direction).sum() - slope) < 1e-5 * gradient.norm()


def test_many_gradients_in_pieces_equal_one_by_one(humanoid):
    """More robots than one piece of the linearization holds."""
    m = humanoid.model
    qpos, target = m.keyframe("stand")
    num = 40  # of 73 inputs, so 5840 simulations
    state = vmap(humanoid.initial)(qpos.expand(num, -1), noise(num, m.nv))
    mass = humanoid.nominal("body_mass")["body_mass"] * (1 + noise(num, 1, scale=0.1))
    slope = grad(lambda c, s, b: humanoid.step({"body_mass": b}, s, c, substeps=1).qvel.square().sum())
    many = vmap(slope, in_dims=(None, 0, 0))(target, state, mass)
    for i in (0, 27, 28, 39):
        assert torch.equal(many[i], slope(target, index(state, i), mass[i]))


# --- Where MuJoCo fails -----------------------------------------------------------------------------------


def test_an_engine_error_in_one_robot(engine):
    states, ctrl = some_states(engine, 4), noise(4, 2)
    lying = index(states, torch.tensor([0, 1, 0, 1]))
    quaternions = engine.nominal("geom_quat")["geom_quat"].repeat(4, 1, 1)
    step_one = lambda q, s, c: engine.step({"geom_quat": q}, s, c, substeps=2)  # noqa: E731
    step = vmap(step_one)
    healthy = step(quaternions, lying, ctrl)
    assert (healthy.fault == 0).all()
    broken_quaternions = quaternions.clone()
    broken_quaternions[1] = 0.0  # a frame without axes
    broken = step(broken_quaternions, lying, ctrl)
    assert broken.fault.tolist() == [0, FAULT_ENGINE, 0, 0]
    others = torch.tensor([0, 2, 3])
    assert_same(index(broken, others), index(healthy, others))
    assert_same(replace(index(broken, 1), fault=torch.tensor(0)), index(lying, 1))
    [fault] = drain_faults()
    assert "frame" in fault.message and "\n" not in fault.message
    assert not fault.arrays["params.geom_quat"].any()
    assert_same(replay(engine, fault), index(broken, 1))
    assert drain_faults()[0].message == fault.message
    # A forward that fails keeps the sensor values it was given, whatever this row computed before.
    vmap(lambda q, s: engine.forward({"geom_quat": q}, s))(quaternions, lying)
    given = replace(lying, sensordata=noise(4, 7, seed=4))
    failed = vmap(lambda q, s: engine.forward({"geom_quat": q}, s))(broken_quaternions, given)
    assert torch.equal(failed.sensordata[1], given.sensordata[1])
    assert not torch.equal(failed.sensordata[0], given.sensordata[0])
    # And a linearization with failures in it says nothing, for that robot alone.
    after = lambda v, q, s, c: step_one(q, replace(s, qvel=v), c)  # noqa: E731
    slope = vmap(grad(lambda *args: after(*args).qvel.sum()))
    flat, fine = (slope(lying.qvel, q, lying, ctrl) for q in (broken_quaternions, quaternions))
    assert (flat[1] == 0).all() and (fine[1] != 0).any()
    assert torch.equal(flat[others], fine[others])
    assert_same(step(quaternions, lying, ctrl), healthy)


CROWDED = """
<mujoco>
  <size memory="20K"/>
  <worldbody>
    <geom type="plane" size="5 5 0.1"/>
    BODIES
  </worldbody>
</mujoco>
""".replace(
    "BODIES",
    "".join(f'<body pos="{0.3 * i} 0 1"><freejoint/><geom type="box" size="0.1 0.1 0.1"/></body>' for i in range(4)),
)


def test_contacts_without_memory_are_a_fault_of_their_own_call():
    engine = MujocoEngine(mujoco.MjModel.from_xml_string(CROWDED), 1)
    high = torch.from_numpy(engine.mjmodel.qpos0.copy()).repeat(3, 1)
    low = high.clone()
    low[1, 2::7] = 0.09
    zeros = torch.zeros(3, 24).double()
    flying, mixed = vmap(engine.initial)(high, zeros), vmap(engine.initial)(low, zeros)
    step = vmap(lambda s: engine.step({}, s, torch.zeros(0), substeps=2))
    healthy = step(flying)
    assert healthy.fault.tolist() == [0, 0, 0]
    for full_first in (
        lambda: vmap(lambda s: engine.forward({}, s))(mixed),
        lambda: grad(lambda v: step(replace(mixed, qvel=v)).qpos.sum())(zeros),
        lambda: step(mixed),
    ):
        full_first()
        drain_faults()
        assert_same(step(flying), healthy)
        assert not drain_faults()
    full = step(mixed)
    assert full.fault.tolist() == [0, FAULT_ENGINE, 0]
    assert "memory" in drain_faults()[0].message
    assert torch.equal(full.qpos[1], mixed.qpos[1])


QUIET = """
import math, os, tempfile
import mujoco, torch
from torch.func import vmap
from rlcore.physics.engine import drain_faults
from tests.rlcore.physics import test_engine as t
from tests.rlcore.physics.test_mujoco import CROWDED

os.chdir(tempfile.mkdtemp())
engine = t.ENGINES["mujoco"].make(t.MODEL)
states, ctrl = t.some_states(engine, 4), t.noise(4, 2)
ctrl[1] = math.nan
states.qvel[2] = 1e9
states.qpos[3] = math.nan
quaternions = engine.nominal("geom_quat")["geom_quat"].repeat(4, 1, 1)
quaternions[0] = 0.0
step = vmap(lambda q, s, c: engine.step({"geom_quat": q}, s, c, substeps=2))
assert step(quaternions, states, ctrl).fault.tolist() == [1, 3, 2, 2]
crowded = t.ENGINES["mujoco"].make(CROWDED)
state = crowded.initial(torch.from_numpy(crowded.mjmodel.qpos0 * 0.0 + 0.09), torch.zeros(24).double())
assert crowded.step({}, state, torch.zeros(0), substeps=2).fault == 1
assert len(drain_faults()) == 5
assert os.listdir() == [], os.listdir()
"""


def test_failures_print_nothing_and_write_no_log(run_python):
    assert run_python("import os\nos.dup2(1, 2)\n" + QUIET) == ""


# --- What is refused --------------------------------------------------------------------------------------


def test_load_model(tmp_path):
    assert load_model(str(HUMANOID)).nu == load_model(HUMANOID).nu == 21
    broken = tmp_path / "broken.xml"
    broken.write_text("<mujoco>\n<worldbody>\n<body><geom sise='1'/></body>\n</worldbody>\n</mujoco>")
    not_xml = tmp_path / "not.xml"
    not_xml.write_text("not a model")
    for path, message in (
        (tmp_path / "missing.xml", "missing.xml does not exist"),
        (tmp_path, "does not exist"),
        (broken, "broken.xml: .*sise.*line 3"),
        (not_xml, "not.xml: "),
    ):
        with pytest.raises(InputError, match=message) as error:
            load_model(path)
        assert "\n" not in str(error.value)


def test_models_and_settings_that_cannot_work(engine):
    with pytest.raises(InputError, match=r"num_threads must be 0 .* got -1"):
        MujocoEngine(engine.mjmodel, -1)
    delayed = MODEL.replace('name="motor" joint="wrist"/>', 'name="motor" joint="wrist" delay="0.02" nsample="5"/>')
    with pytest.raises(InputError, match="delayed actuators"):
        MujocoEngine(mujoco.MjModel.from_xml_string(delayed))
    asleep = MODEL.replace("<option ", '<option sleep_tolerance="1e-4" ').replace(
        'integrator="implicitfast"/>', 'integrator="implicitfast"><flag sleep="enable"/></option>'
    )
    with pytest.raises(InputError, match="sleep"):
        MujocoEngine(mujoco.MjModel.from_xml_string(asleep))


def test_model_fields_that_cannot_be_given(engine):
    state, ctrl = index(some_states(engine, 1), 0), noise(2)
    for name, message in {
        "geom_type": "'geom_type' holds int32, not real numbers",
        "body_subtreemass": "computes model field 'body_subtreemass' from others",
        "qpos": r"'qpos' is not a model field.*near it are: qpos0",
    }.items():
        for call in (engine.nominal, lambda n: engine.step({n: torch.ones(4)}, state, ctrl, substeps=1)):
            with pytest.raises(InputError, match=message):
                call(name)


SLIDER = """
<mujoco>
  <worldbody>
    <body><joint type="slide"/><geom size="0.1" mass="1" contype="0" conaffinity="0"/></body>
  </worldbody>
</mujoco>
"""


def test_fields_that_mujoco_rejects_leave_nothing_behind():
    engine = MujocoEngine(mujoco.MjModel.from_xml_string(SLIDER), 1)
    step = vmap(lambda m, s: engine.step({"body_mass": m}, s, torch.zeros(0), substeps=1))
    states = vmap(engine.initial)(noise(3, 1), noise(3, 1, seed=1))
    mass = engine.nominal("body_mass")["body_mass"].repeat(3, 1)
    before = step(mass, states)
    weightless = mass.clone()
    weightless[1, 1] = 0
    for _ in range(2):  # the second time too
        with pytest.raises(InputError, match=r"MuJoCo rejects the model fields body_mass: .*\(1\)") as error:
            step(weightless, states)
        assert "\n" not in str(error.value)
    assert_same(step(mass, states), before)


def test_the_model_given_is_not_kept(engine):
    model = mujoco.MjModel.from_xml_string(MODEL)
    own = MujocoEngine(model, 1)
    states, ctrl = some_states(own, 2), noise(2, 2)
    before = vmap(lambda s, c: own.step({}, s, c, substeps=1))(states, ctrl)
    model.opt.gravity[:] = 0
    model.body_mass[:] *= 2
    own.nominal("body_mass")["body_mass"].zero_()
    after = vmap(lambda s, c: own.step({}, s, c, substeps=1))(map_leaves(torch.clone, states), ctrl)
    assert_same(after, before)
    assert math.isclose(own.nominal("body_mass")["body_mass"].sum().item(), 5.5)
