"""MuJoCo Warp against MuJoCo: the same model, the same states, single precision apart.

On a GPU only: for a CPU, Warp compiles its kernels for minutes.
"""

import mujoco
import numpy as np
import pytest
import torch
from torch.func import vmap

from rlcore.errors import InputError
from rlcore.physics.engine import FAULT_ACTION, FAULT_ENGINE, FAULT_UNSTABLE, drain_faults
from rlcore.physics.engines import make_engine
from rlcore.physics.mujoco import MujocoEngine, load_model
from rlcore.tree import index, map_leaves, named_leaves, replace, stack
from tasks.humanoid.body import MODEL as HUMANOID
from tests.rlcore.physics.test_engine import FIELDS, MODEL, noise, row, some_params, some_states

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _no_faults_left():
    yield
    drain_faults()


@pytest.fixture(scope="module")
def cpu():
    return MujocoEngine(mujoco.MjModel.from_xml_string(MODEL), 1)


@pytest.fixture(scope="module")
def engine(cpu):
    return make_engine(cpu.mjmodel, physics="warp")


def moved(tree, device):
    return map_leaves(lambda x: x.to(device), tree)


def assert_close(actual, expected, tolerance=1e-3):
    """Equal within `tolerance` of the size of each leaf's numbers."""
    for (name, a), (_, b) in zip(named_leaves(actual), named_leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=tolerance, atol=tolerance)


def settled(engine, num):
    """States of robots that have moved for a moment, so that contacts are ordinary ones and the solver starts warm."""
    states, ctrl = some_states(engine, num), noise(num, 2)
    return vmap(lambda s, c: engine.step({}, s, c, substeps=40))(states, ctrl)


def test_states_are_double_and_on_the_gpu(engine):
    state = engine.initial(torch.zeros(9, device="cuda"), torch.zeros(8, device="cuda"))
    after = engine.step({}, state, torch.zeros(2, device="cuda"), substeps=1)
    for _, leaf in named_leaves(after):
        assert leaf.is_cuda and leaf.dtype in (torch.float64, torch.int64)


def test_forward_gives_mujocos_sensors(cpu, engine):
    states = settled(cpu, 32)
    expected = vmap(lambda s: cpu.forward({}, s))(states)
    actual = vmap(lambda s: engine.forward({}, s))(moved(states, "cuda"))
    assert_close(actual.sensordata, expected.sensordata)


def test_a_step_is_mujocos(cpu, engine):
    states, ctrl, wrench = settled(cpu, 32), noise(32, 2), noise(32, 4, 6)
    step = lambda e: vmap(lambda s, c, w: e.step({}, s, c, w, substeps=2))  # noqa: E731
    expected = step(cpu)(states, ctrl, wrench)
    actual = step(engine)(*moved((states, ctrl, wrench), "cuda"))
    for name in ("time", "qpos", "qvel", "act", "sensordata", "fault"):
        assert_close(getattr(actual, name), getattr(expected, name), 5e-3)
    # And without the wrench it is another step: the forces do not stay.
    assert not torch.allclose(
        vmap(lambda s, c: engine.step({}, s, c, substeps=2))(*moved((states, ctrl), "cuda")).qvel, actual.qvel
    )
    again = vmap(lambda s, c: engine.step({}, s, c, substeps=2))(*moved((states, ctrl), "cuda"))
    assert_close(again.qvel, vmap(lambda s, c: cpu.step({}, s, c, substeps=2))(states, ctrl).qvel, 5e-3)


def test_the_humanoid_stands_as_on_mujoco():
    model = load_model(HUMANOID)
    model.opt.iterations, model.opt.ls_iterations = 100, 50  # both solve to the end, and so alike
    cpu, gpu = MujocoEngine(model, 1), make_engine(model, physics="warp")
    qpos, ctrl = cpu.model.keyframe("stand")
    qpos = qpos + torch.cat([torch.zeros(16, 7), noise(16, 21, scale=0.05)], dim=1)
    states = vmap(cpu.initial)(qpos, noise(16, 27, seed=1, scale=0.1))
    step = lambda e, u: vmap(lambda s: e.step({}, s, u, substeps=4))  # noqa: E731
    for _ in range(10):
        states = step(cpu, ctrl)(states)
    for _ in range(3):
        expected, actual = step(cpu, ctrl)(states), step(gpu, ctrl.cuda())(moved(states, "cuda"))
        assert_close(actual.qpos, expected.qpos, 1e-4)
        assert_close(actual.qvel, expected.qvel, 1e-2)
        for name in ("left_foot_position", "left_foot_velocity", "angular_momentum", "left_knee_torque", "imu_gyro"):
            place = cpu.model.sensor(name)
            assert_close(actual.sensordata[:, place], expected.sensordata[:, place], 2e-2)
        contact = cpu.model.sensor("left_foot_contact")
        assert_close(actual.sensordata[:, contact] / 500, expected.sensordata[:, contact] / 500, 2e-2)  # N of a weight
        states = expected


@pytest.mark.parametrize("field", FIELDS)
def test_model_fields_differ_between_robots(cpu, engine, field):
    states, ctrl = settled(cpu, 16), noise(16, 2)
    params = {field: some_params(cpu, 16)[field]}
    step = lambda e: vmap(lambda p, s, c: e.step(p, s, c, substeps=4))  # noqa: E731
    expected = step(cpu)(params, states, ctrl)
    given = moved((params, states, ctrl), "cuda")
    actual = step(engine)(*given)
    assert_close(actual.qpos, expected.qpos, 1e-3)
    assert_close(actual.qvel, expected.qvel, 2e-2)
    again = step(engine)(*given)
    assert_close(again.qvel, actual.qvel, 1e-3)
    # Fields that are no longer given are nominal again.
    plain = lambda e: vmap(lambda s, c: e.step({}, s, c, substeps=4))  # noqa: E731
    assert_close(plain(engine)(*given[1:]).qvel, plain(cpu)(states, ctrl).qvel, 2e-2)


def test_vmap_is_a_loop_and_neighbours_change_nothing(cpu, engine):
    states, ctrl = moved((settled(cpu, 6), noise(6, 2)), "cuda")
    params = moved(some_params(cpu, 6), "cuda")
    step = lambda p, s, c: engine.step(p, s, c, substeps=2)  # noqa: E731
    batched = vmap(step)(params, states, ctrl)
    looped = stack([step(row(params, i), index(states, i), ctrl[i]) for i in range(6)])
    assert_close(batched, looped, 1e-3)
    nested = vmap(vmap(step))(*map_leaves(lambda x: x.reshape(2, 3, *x.shape[1:]), (params, states, ctrl)))
    assert_close(map_leaves(lambda x: x.flatten(0, 1), nested), batched, 1e-3)


def test_forward_computes_where_the_mask_is_true(cpu, engine):
    states = moved(settled(cpu, 4), "cuda")
    marked = replace(states, sensordata=torch.full_like(states.sensordata, 7.0))
    mask = torch.tensor([True, False, True, False], device="cuda")
    out = vmap(lambda s, m: engine.forward({}, s, m))(marked, mask).sensordata
    assert (out[1] == 7).all() and (out[3] == 7).all()
    assert_close(out[mask], vmap(lambda s: engine.forward({}, s))(states).sensordata[mask])


def test_a_step_depends_on_its_arguments_alone(cpu, engine):
    states, ctrl = moved((settled(cpu, 8), noise(8, 2)), "cuda")
    step = vmap(lambda s, c: engine.step({}, s, c, substeps=3))
    before = map_leaves(torch.clone, (states, ctrl))
    first = step(states, ctrl)
    kept = map_leaves(torch.clone, first)
    step(first, -ctrl)
    vmap(lambda s: engine.forward({}, s))(first)
    assert_close(step(states, ctrl), first, 1e-4)
    for (_, a), (_, b) in zip(named_leaves((states, ctrl, first)), named_leaves((*before, kept)), strict=True):
        assert torch.equal(a, b)


def test_what_goes_wrong_is_told_of_the_robot_and_leaves_the_others_alone(cpu, engine):
    states, ctrl = settled(cpu, 4), noise(4, 2)
    ctrl[1, 1] = torch.nan
    qvel = states.qvel.clone()
    qvel[2, 0] = 1e6
    states = replace(states, qvel=qvel)
    drain_faults()
    step = lambda e: vmap(lambda s, c: e.step({}, s, c, substeps=2))  # noqa: E731
    out = step(engine)(*moved((states, ctrl), "cuda"))
    assert out.fault.tolist() == [0, FAULT_ACTION, FAULT_UNSTABLE, 0]
    for i in (1, 2):
        assert torch.equal(out.qvel[i].cpu(), states.qvel[i])
    assert_close(out.qvel[[0, 3]], step(cpu)(states, ctrl).qvel[[0, 3]], 5e-2)
    drain = drain_faults()
    drained = [fault for fault in drain if fault.arrays["qvel"].shape == (8,)]
    assert {fault.code for fault in drained} == {FAULT_ACTION, FAULT_UNSTABLE}
    action = next(fault for fault in drained if fault.code == FAULT_ACTION)
    assert action.message == "action not finite: motor"
    assert np.array_equal(action.arrays["qpos"], states.qpos[1].numpy())
    assert drain_faults() == []


def test_too_little_memory_for_contacts_is_a_fault_and_raises_when_asked(cpu):
    from rlcore.physics.warp import WarpEngine

    small = WarpEngine(cpu.mjmodel, max_constraints=2)
    states = moved(settled(cpu, 4), "cuda")
    out = vmap(lambda s: small.step({}, s, torch.zeros(2, device="cuda"), substeps=1))(states)
    assert (out.fault == FAULT_ENGINE).any()
    drain_faults()
    few = WarpEngine(cpu.mjmodel, max_contacts=1)
    lying = cpu.model.keyframe("lying")[0].repeat(4, 1)  # on four corners each
    states = vmap(few.initial)(lying.cuda(), torch.zeros(4, 8, device="cuda"))
    out = vmap(lambda s: few.step({}, s, torch.zeros(2, device="cuda"), substeps=1))(states)
    assert (out.fault == FAULT_ENGINE).all()
    with pytest.raises(RuntimeError, match="max_contacts"):
        drain_faults()


def test_what_warp_cannot_do_is_refused(engine):
    with pytest.raises(InputError, match="geom_nosuch"):
        engine.step(
            {"geom_nosuch": torch.zeros(2)}, engine.initial(torch.zeros(9), torch.zeros(8)), torch.zeros(2), substeps=1
        )
