"""Isaac Gym as an engine, against a stand-in for it that MuJoCo simulates, in a process of its own.

The stand-in keeps single precision and an order of joints and bodies of its own, and raises where Isaac Gym's
documented rules are broken. That it has Isaac Gym's signatures is tested in test_isaacgym_model.py.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace as with_fields
from pathlib import Path

import mujoco
import numpy as np
import pytest
import torch
from torch.func import vmap

from experiments import verify_isaacgym
from rlcore.errors import EngineFailed, InputError
from rlcore.metrics import read_metrics
from rlcore.physics import engines
from rlcore.physics import isaacgym as bridge
from rlcore.physics.engine import drain_faults
from rlcore.physics.engines import device_of, make_engine
from rlcore.physics.isaacgym import IsaacGymEngine, Server
from rlcore.physics.isaacgym_settings import PYTHON_VARIABLE, Settings, find_python
from rlcore.physics.mujoco import MujocoEngine, load_model
from rlcore.tree import map_leaves, named_leaves, replace
from tasks.cartpole import MODEL as CARTPOLE
from tasks.humanoid.body import MODEL as HUMANOID
from tests.rlcore.physics.standin import STANDIN, interpreter, program
from tests.rlcore.physics.test_engine import MODEL as BOX
from tests.rlcore.physics.test_engine import noise

# The robot of the other engines' tests with a servo that has no activation of its own.
MODEL = (
    BOX.replace('dyntype="filter" dynprm="0.05" ', "")
    .replace('name="hand" type="box"', 'name="palm" type="box"')
    .replace(
        "<sensor>", '<sensor><touch name="touch" site="all"/><framelinvel name="speed" objtype="site" objname="imu"/>'
    )
    .replace('<site name="imu"/>', '<site name="imu" pos="0.1 0 0.2"/><site name="all" type="sphere" size="1"/>')
)
TOLERANCE = 2e-5  # of single precision, some substeps later


@pytest.fixture(scope="session")
def python():
    """An interpreter that finds the stand-in where it would find Isaac Gym."""
    return interpreter()


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    drain_faults()
    yield
    drain_faults()


@pytest.fixture(scope="module")
def engine(python):
    made = IsaacGymEngine(mujoco.MjModel.from_xml_string(MODEL), Settings(python))
    yield made
    made.close()


@pytest.fixture(scope="module")
def reference():
    return MujocoEngine(mujoco.MjModel.from_xml_string(MODEL), 1)


def cartpole(python, **settings):
    return IsaacGymEngine(mujoco.MjModel.from_xml_string(CARTPOLE), Settings(python, **settings))


def some_states(engine, num):
    """States from lying on the floor to flying above it, all of them moving."""
    qpos, _ = engine.model.keyframe("lying")
    qpos = qpos + noise(num, 9, scale=0.1)
    qpos[num // 2 :, 2] += 1.0
    qpos[:, 3:7] /= qpos[:, 3:7].norm(dim=1, keepdim=True)
    states = vmap(engine.initial)(qpos, noise(num, 8, seed=1))
    return vmap(lambda s: engine.forward({}, s))(states)


def assert_close(actual, expected, tolerance=TOLERANCE):
    for (name, a), (_, b) in zip(named_leaves(actual), named_leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=tolerance, atol=tolerance, msg=f"{name}: {a} is not {b}")


def without_sensors(state):
    return replace(state, sensordata=torch.zeros_like(state.sensordata), warmstart=torch.zeros_like(state.warmstart))


def some_params(engine, num, *names):
    return {
        name: value * (1 + noise(num, *value.shape, seed=seed, scale=0.2))
        for seed, (name, value) in enumerate(engine.nominal(*names).items())
    }


# --- What it is beside the contract of all engines, which test_engine.py has -----------------------------------


def test_a_step_is_mujocos(engine, reference):
    states, ctrl, wrench = some_states(reference, 6), noise(6, 2), noise(6, 4, 6, scale=5)
    step = lambda e: vmap(lambda s, c, w: e.step({}, s, c, w, substeps=2))(states, ctrl, wrench)  # noqa: E731
    actual, expected = step(engine), step(reference)
    # The warm start of PhysX, if it has one, is not told; the sensors are newer by a substep.
    assert_close(without_sensors(actual), without_sensors(expected))
    # Without the wrench it is another step: forces do not stay.
    plain = vmap(lambda s, c: engine.step({}, s, c, substeps=2))(states, ctrl)
    assert_close(
        without_sensors(plain),
        without_sensors(vmap(lambda s, c: reference.step({}, s, c, substeps=2))(states, ctrl)),
    )
    assert (plain.qvel - actual.qvel).abs().max() > 0.01


def test_sensors_after_a_step_are_mujocos_of_that_state(engine, reference):
    states, ctrl = some_states(reference, 6), noise(6, 2)
    after = vmap(lambda s, c: engine.step({}, s, c, substeps=2))(states, ctrl)
    current = vmap(lambda s: reference.forward({}, s))(after)
    older = vmap(lambda s, c: reference.step({}, s, c, substeps=2))(states, ctrl)
    for name in ("position", "gyro", "speed"):
        place = engine.model.sensor(name)
        torch.testing.assert_close(after.sensordata[:, place], current.sensordata[:, place], rtol=1e-5, atol=1e-5)
    # Forces are those that acted in the last substep.
    touch = engine.model.sensor("touch")
    torch.testing.assert_close(after.sensordata[:, touch], older.sensordata[:, touch], rtol=1e-3, atol=1e-3)
    assert (older.sensordata[:3, touch] > 1.0).any()
    torch.testing.assert_close(after.sensordata[:, engine.model.sensor("torque")][:, 0], ctrl[:, 1])


def test_an_ordinary_step_writes_nothing_and_a_reset_the_reset_rows(engine, reference):
    states, ctrl = some_states(engine, 6), noise(6, 2)
    step = vmap(lambda s, c: engine.step({}, s, c, substeps=2))
    simulator = engine.simulator(6)
    state = step(states, ctrl)
    for _ in range(5):
        state = step(map_leaves(torch.clone, state), ctrl)
        assert simulator.written == 0
    reset = torch.tensor([False, True, False, False, True, False])
    fresh = map_leaves(lambda a, b: torch.where(reset.reshape(-1, *[1] * (a.ndim - 1)), a, b), states, state)
    after = step(fresh, ctrl)
    assert simulator.written == 2
    expected = vmap(lambda s, c: reference.step({}, s, c, substeps=2))(fresh, ctrl)
    assert_close(without_sensors(after), without_sensors(expected))
    # Putting everything back to the start is the first step again.
    assert_close(step(states, ctrl), vmap(lambda s, c: engine.step({}, s, c, substeps=2))(states, ctrl))
    assert simulator.written == 6


def test_what_is_written_into_a_result_is_told_to_the_simulator(engine):
    states, ctrl = some_states(engine, 6), noise(6, 2)
    step = vmap(lambda s, c: engine.step({}, s, c, substeps=1))
    state = step(states, ctrl)
    state.qpos[2, 7] += 0.1
    moved = map_leaves(torch.clone, state)
    after = step(state, ctrl)
    assert engine.simulator(6).written == 1
    step(states, ctrl)
    assert_close(without_sensors(step(moved, ctrl)), without_sensors(after))


# --- Model fields -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("body_mass", "body_inertia", "body_ipos"), ("dof_damping",), ("geom_friction",)])
def test_a_step_with_fields_is_mujocos(engine, reference, names):
    states, ctrl, params = some_states(reference, 6), noise(6, 2), some_params(reference, 6, *names)
    step = lambda e, p: vmap(lambda p, s, c: e.step(p, s, c, substeps=2))(p, states, ctrl)  # noqa: E731
    changed, plain = step(engine, params), step(engine, {})
    # Friction is rounded to thousandths, which moves a robot on the floor a little.
    tolerance = 2e-3 if names == ("geom_friction",) else TOLERANCE
    assert_close(without_sensors(changed), without_sensors(step(reference, params)), tolerance)
    assert_close(without_sensors(plain), without_sensors(step(reference, {})))
    assert not torch.equal(changed.qvel[:3], plain.qvel[:3])


def test_gains_of_servos_are_each_robots(engine, reference):
    states, ctrl = some_states(reference, 6), noise(6, 2)
    gain, bias = (reference.nominal(f"actuator_{x}prm")[f"actuator_{x}prm"].repeat(6, 1, 1) for x in ("gain", "bias"))
    factors = 1 + noise(6, scale=0.5)
    gain[:, 0, 0] *= factors
    bias[:, 0, 1] *= factors
    params = {"actuator_gainprm": gain, "actuator_biasprm": bias}
    step = lambda e: vmap(lambda p, s, c: e.step(p, s, c, substeps=2))(params, states, ctrl)  # noqa: E731
    assert_close(without_sensors(step(engine)), without_sensors(step(reference)))
    process = engine.simulator(6, params).server.process.pid
    assert engine.simulator(6).server.process.pid == process  # without starting again


@pytest.fixture
def started(monkeypatch):
    """The batch sizes for which a server has been started."""
    sizes, start = [], Server.__init__

    def counted(server, settings, setup):
        sizes.append(setup["num_envs"])
        start(server, settings, setup)

    monkeypatch.setattr(Server, "__init__", counted)
    return sizes


def test_the_simulator_is_started_again_for_other_values_only(python, reference, started):
    engine = IsaacGymEngine(mujoco.MjModel.from_xml_string(MODEL), Settings(python))
    states, ctrl = some_states(reference, 3), noise(3, 2)
    step = lambda p, dims=0: vmap(lambda p, s, c: engine.step(p, s, c, substeps=2), in_dims=(dims, 0, 0))(  # noqa: E731
        p, states, ctrl
    )
    nominal = engine.nominal("body_mass", "body_inertia", "geom_friction", "dof_damping", "opt.gravity")
    rows = {name: value.repeat(3, *[1] * value.ndim) for name, value in nominal.items()}
    plain = step({})
    for given, dims in ((nominal, None), (rows, 0), ({"body_mass": rows["body_mass"]}, 0), ({}, 0)):
        assert_close(step(given, dims), plain, 0.0)
    assert started == [3]
    # What may change while it runs is changed: beside masses that are given and nominal, too.
    slippery = step(rows | {"geom_friction": 0.5 * rows["geom_friction"]})
    assert not torch.equal(slippery.qvel, plain.qvel) and started == [3]
    assert_close(step(rows), plain, 0.0)
    heavy = {"body_mass": 1.5 * nominal["body_mass"]}
    first = step(heavy, None)
    assert started == [3, 3] and not torch.equal(first.qvel, plain.qvel)
    for given, dims in (
        ({"body_mass": 1.5 * rows["body_mass"]}, 0),
        ({"body_mass": heavy["body_mass"].clone()}, None),
        (rows | {"body_mass": 1.5 * rows["body_mass"]}, 0),
    ):
        assert_close(step(given, dims), first, 0.0)
    assert started == [3, 3]
    assert_close(step(rows), plain, 0.0)
    assert started == [3, 3, 3]
    moon = {"opt.gravity": 0.2 * nominal["opt.gravity"]}
    first = step(moon, None)
    assert_close(step({"opt.gravity": 0.2 * rows["opt.gravity"]}), first, 0.0)
    assert started == [3, 3, 3, 3]
    engine.close()


# --- What a model is told as -----------------------------------------------------------------------------------


def mutant_server(tmp_path, monkeypatch, old, new):
    """Let servers run a copy of the program with one change."""
    source = bridge.SERVER.read_text()
    assert old in source
    path = tmp_path / "isaacgym_server.py"
    path.write_text(source.replace(old, new))
    monkeypatch.setattr(bridge, "SERVER", path)


def mutant_standin(tmp_path, old, new):
    """An interpreter whose Isaac Gym is a copy of the stand-in with one change."""
    folder = tmp_path / "standin"
    shutil.copytree(STANDIN, folder)
    path = folder / "isaacgym" / "gymapi.py"
    source = path.read_text()
    assert old in source
    path.write_text(source.replace(old, new))
    return script(tmp_path, f'PYTHONPATH={shlex.quote(str(folder))} exec {shlex.quote(program())} "$@"\n')


def both(model, python):
    return IsaacGymEngine(model, Settings(python)), MujocoEngine(model, 1)


def test_the_humanoid_steps_as_mujocos_does(python):
    """Whose bodies have up to three joints: one link each is between them, and no force acts on those."""
    engine, reference = both(load_model(HUMANOID), python)
    stand, still = reference.model.keyframe("stand")
    qpos = stand + noise(4, len(stand), scale=0.05)
    qpos[:, 2] += 0.3  # above the floor: contacts are another test's
    qpos[:, 3:7] /= qpos[:, 3:7].norm(dim=1, keepdim=True)
    states = vmap(reference.initial)(qpos, noise(4, 27, seed=1, scale=0.3))
    ctrl, wrench = still + noise(4, 21, scale=0.05), noise(4, 13, 6, seed=3, scale=2)
    params = {
        "body_mass": reference.nominal("body_mass")["body_mass"] * (1 + noise(4, 13, seed=4).clamp(-1, 1) / 2),
        "body_inertia": reference.nominal("body_inertia")["body_inertia"]
        * (1 + noise(4, 13, 1, seed=5).clamp(-1, 1) / 2),
    }
    step = lambda e, p: vmap(lambda p, s, c, w: e.step(p, s, c, w, substeps=4))(p, states, ctrl, wrench)  # noqa: E731
    expected, actual = step(reference, params), step(engine, params)
    # What the links hold of a body does not follow its later joints; masses that were not told would be seen.
    torch.testing.assert_close(actual.qpos, expected.qpos, rtol=0, atol=3e-4)
    torch.testing.assert_close(actual.qvel, expected.qvel, rtol=0, atol=5e-3)
    other = step(reference, {})
    assert (other.qvel - expected.qvel).abs().max() > 5e-2
    simulator = engine.simulator(4, params)
    assert {len(rows) for rows in simulator._masses().values()} == {4}
    assert {len(rows) for rows in engine.simulator(4)._masses().values()} == {1}
    engine.close()


TOP = """
<mujoco>
  <option timestep="0.005" integrator="implicitfast"/>
  <worldbody>
    <body name="top"><freejoint/>
      <inertial pos="0.1 0 0" quat="0.8 0.4 0.2 0.4" mass="2" diaginertia="0.05 0.03 0.025"/>
      <body name="arm" pos="0 0 0.2"><joint name="hinge" axis="0 1 0"/>
        <inertial pos="0 0.1 0" quat="0.6 0 0.8 0" mass="1" diaginertia="0.02 0.015 0.01"/></body>
    </body>
  </worldbody>
</mujoco>
"""


def top_after(engine):
    state = engine.initial(torch.tensor([0.0, 0, 1, 1, 0, 0, 0, 0.3]), torch.tensor([0.0, 0, 0, 3, 2, -4, 1]))
    return engine.step({}, state, torch.zeros(0), substeps=20)


def test_inertias_that_lean_are_told_beside_the_asset(python, tmp_path, monkeypatch):
    engine, reference = both(mujoco.MjModel.from_xml_string(TOP), python)
    expected = top_after(reference)
    assert_close(without_sensors(top_after(engine)), without_sensors(expected))
    engine.close()
    # Isaac Gym's reader drops how they lean, as the stand-in does.
    mutant_server(tmp_path, monkeypatch, '        self._set_bodies(i, self.setup["masses"])\n', "")
    assert (top_after(engine).qvel - expected.qvel).abs().max() > 0.1
    engine.close()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("model.body_mass[b] = own.mass", "pass", "mass of body arm"),
        ("model.body_ipos[b] = (own.com.x, own.com.y, own.com.z)", "pass", "centre of mass of body arm"),
        ("model.body_inertia[b] = values", "pass", "inertia of body top"),
    ],
)
def test_masses_that_are_not_kept_are_told_of(tmp_path, old, new, words):
    model = mujoco.MjModel.from_xml_string(TOP)
    engine = IsaacGymEngine(model, Settings(mutant_standin(tmp_path, old, new)))
    state = engine.initial(torch.tensor([0.0, 0, 1, 1, 0, 0, 0, 0]), torch.zeros(7))
    mass, centre = engine.nominal("body_mass")["body_mass"], engine.nominal("body_ipos")["body_ipos"].clone()
    params = {"body_mass": mass * torch.tensor([1.0, 1.0, 1.01]), "body_ipos": centre}
    centre[2, 0] += 1e-3
    words = f"Isaac Gym keeps another {words} than it is told"
    step = lambda: engine.step(params, state, torch.zeros(0), substeps=1)  # noqa: E731
    if "inertia" in words:
        with pytest.warns(RuntimeWarning, match=f"{words}: .*verify_isaacgym tells whether bodies turn"):
            step()
        engine.close()
        return
    with pytest.raises(InputError, match=words) as error:
        step()
    assert "\n" not in str(error.value)


# Balls of which some overlap. In MuJoCo only the rod and the right one touch: the rod and the left one are excluded,
# the rod hangs on the car by two hinges, and the pack and the bag are both fixed to the car. The tip could touch all.
CROWD = """
<mujoco>
  <option timestep="0.002" integrator="implicitfast"/>
  <default><geom type="sphere" size="0.1" friction="0 0 0"/></default>
  <worldbody>
    <body name="car"><inertial pos="0 0 0" mass="1" diaginertia="0.1 0.1 0.1"/><joint name="slide" type="slide"/>
      <geom name="car"/>
      <body name="pack" pos="0 0 0.15"><inertial pos="0 0 0" mass="1" diaginertia="0.1 0.1 0.1"/>
        <geom name="pack"/></body>
      <body name="bag" pos="0.1 0 0.25"><inertial pos="0 0 0" mass="1" diaginertia="0.1 0.1 0.1"/>
        <geom name="bag"/></body>
      <body name="rod"><inertial pos="0.1 0 0" mass="1" diaginertia="0.1 0.1 0.1"/>
        <joint name="yaw" axis="0 0 1"/><joint name="pitch" axis="0 1 0"/><geom name="rod" pos="0.18 0 0.02"/>
        <body name="tip" pos="2 0 0"><joint name="tip" axis="0 0 1"/><geom name="tip"/></body></body>
      <body name="left"><inertial pos="0 0 0" mass="1" diaginertia="0.1 0.1 0.1"/>
        <joint name="left" axis="0 0 1"/><geom name="left" pos="0.31 0.13 0"/></body>
      <body name="right"><inertial pos="0 0 0" mass="1" diaginertia="0.1 0.1 0.1"/>
        <joint name="right" axis="0 0 1"/><geom name="right" pos="0.31 -0.13 0"/></body>
    </body>
  </worldbody>
  <contact><exclude body1="rod" body2="left"/></contact>
</mujoco>
"""


def crowd_after(engine):
    return engine.step({}, engine.initial(torch.zeros(6), torch.zeros(6)), torch.zeros(0), substeps=10)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("filters)", "filters)", ""),
        ('        self._set_filters(i, self.setup["filters"])\n', "", "fixed to each other"),
        ('self._set_shapes(i, "filter", filters)', 'self._set_shapes(i, "filter", {"bag": [1], "pack": [1]})', None),
        (
            'self._set_shapes(i, "filter", filters)',
            'self._set_shapes(i, "filter", {name: [1] for name in filters})',
            None,
        ),
    ],
)
def test_shapes_of_a_robot_touch_as_mujocos_do(python, tmp_path, monkeypatch, old, new, words):
    engine, reference = both(mujoco.MjModel.from_xml_string(CROWD), python)
    expected = crowd_after(reference)
    left, right = expected.qvel[4:6]
    assert right < -0.05 < left
    mutant_server(tmp_path, monkeypatch, old, new)
    if words:  # which the stand-in tells of
        with pytest.raises(RuntimeError, match=words):
            crowd_after(engine)
    elif words is None:
        assert (crowd_after(engine).qvel - expected.qvel).abs().max() > 0.05
    else:
        assert_close(without_sensors(crowd_after(engine)), without_sensors(expected), 1e-3)
    engine.close()


def link(name, geometry="", mass=1.0):
    collision = (
        f'<collision><origin xyz="0 0 0.01" rpy="0.5 0.3 0"/><geometry>{geometry}</geometry></collision>'
        if geometry
        else ""
    )
    moments = '<inertia ixx="0.02" iyy="0.03" izz="0.025" ixy="0.002" ixz="0.001" iyz="0"/>'
    inertial = f'<inertial><origin xyz="0 0 0.05" rpy="0.3 0 0"/><mass value="{mass}"/>{moments}</inertial>'
    return f'<link name="{name}">{inertial}{collision}</link>'


FIXED = f"""
<robot name="arm">
  {link("base", '<box size="0.1 0.1 0.1"/>')}
  {link("upper")}
  {link("lower", '<sphere radius="0.05"/>')}
  <joint name="shoulder" type="revolute"><parent link="base"/><child link="upper"/><origin xyz="0 0 0.2" rpy="0 0 0.4"/>
    <axis xyz="0 1 0"/><limit lower="-2" upper="3.2" effort="10" velocity="5"/></joint>
  <joint name="elbow" type="revolute"><parent link="upper"/><child link="lower"/><origin xyz="0 0 0.2" rpy="0 0 0"/>
    <axis xyz="0 1 0"/><limit lower="-3" upper="3" effort="10" velocity="5"/></joint>
</robot>
"""
FLOATING = f"""
<robot name="hopper">
  <mujoco><compiler fusestatic="false"/></mujoco>
  <link name="world"/>
  {link("trunk", '<box size="0.2 0.2 0.1"/>')}
  {link("foot", '<sphere radius="0.05"/>')}
  <joint name="root" type="floating"><parent link="world"/><child link="trunk"/><origin xyz="0 0 0.3"/></joint>
  <joint name="leg" type="prismatic"><parent link="trunk"/><child link="foot"/><origin xyz="0 0 -0.2" rpy="0.1 0 0"/>
    <axis xyz="0 0 1"/><limit lower="-0.05" upper="0.05" effort="100" velocity="5"/></joint>
</robot>
"""


def from_urdf(text, floor):
    """A URDF in MuJoCo, with a motor for each joint and, if asked for, a floor."""
    spec = mujoco.MjSpec.from_string(text)
    spec.option.timestep, spec.option.integrator = 0.002, mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    if floor:
        spec.worldbody.add_geom(name="floor", type=mujoco.mjtGeom.mjGEOM_PLANE, size=[5, 5, 1])
    for joint in spec.joints:
        if joint.type != mujoco.mjtJoint.mjJNT_FREE:
            motor = spec.add_actuator(name=f"{joint.name}_motor", target=joint.name, trntype=mujoco.mjtTrn.mjTRN_JOINT)
            motor.set_to_motor()
    return spec.compile()


@pytest.mark.parametrize("fixed", [True, False])
def test_a_urdf_that_mujoco_has_compiled_steps_as_in_mujoco(python, fixed):
    model = from_urdf(FIXED if fixed else FLOATING, not fixed)
    assert model.nu == (2 if fixed else 1) and np.abs(model.body_iquat[-1, 1:]).max() > 0.1
    engine, reference = both(model, python)
    assert engine.description.floating != fixed
    # The lower arm lies on the base, which is fixed; the foot stands in the floor.
    qpos = torch.tensor([2.6, 0.5]) if fixed else torch.tensor([0.0, 0, 0.24, 1, 0, 0, 0, 0])
    state = reference.initial(qpos.double(), torch.zeros(model.nv).double())
    # More than the effort that the joint may take.
    ctrl = torch.tensor([15.0, -3.0] if fixed else [150.0]).double()
    step = lambda e: e.step({}, state, ctrl, substeps=20)  # noqa: E731
    expected, actual = step(reference), step(engine)
    data = mujoco.MjData(model)
    data.qpos[:] = qpos
    mujoco.mj_forward(model, data)
    assert data.ncon > 0
    assert_close(without_sensors(actual), without_sensors(expected), 1e-3)
    engine.close()


# --- The process --------------------------------------------------------------------------------------------


def shared_names():
    return sorted(os.listdir("/dev/shm"))


def gone(process, seconds=10.0):
    """Whether a process ends, which may be a zombie that nobody waits for."""
    for _ in range(int(seconds * 20)):
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def test_a_killed_server_is_told_of_and_the_next_step_starts_another(python):
    engine, before = cartpole(python), shared_names()
    state, ctrl = engine.initial(noise(2, scale=0.1), noise(2, scale=0.1)), noise(1)
    first = engine.step({}, state, ctrl, substeps=2)
    first = engine.step({}, first, ctrl, substeps=2)
    process = engine.simulator(1).server.process
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="ended by signal SIGKILL") as error:
        engine.simulator(1).server.step(1, 0, False)
    assert "\n" not in str(error.value)
    again = engine.step({}, state, ctrl, substeps=2)
    assert_close(engine.step({}, again, ctrl, substeps=2), first, 0.0)
    other = engine.simulator(1).server.process.pid
    assert other != process.pid
    engine.close()
    assert gone(other) and shared_names() == before


def test_a_server_that_ends_between_two_steps_is_started_anew_with_a_warning(python):
    engine = cartpole(python)
    state, ctrl = engine.initial(noise(2, scale=0.1), noise(2, scale=0.1)), noise(1)
    first = engine.step({}, state, ctrl, substeps=2)
    process = engine.simulator(1).server.process
    process.kill()
    process.wait()
    with pytest.warns(RuntimeWarning, match="had ended by signal SIGKILL since its last step, and another"):
        assert_close(engine.step({}, state, ctrl, substeps=2), first, 0.0)
    engine.close()


@pytest.mark.parametrize(
    ("fault", "words"), [("crash:1", "SIGABRT in a step"), ("hang:1", r"3 s of a step.*--isaacgym\.step-timeout")]
)
def test_a_crash_or_a_hang_is_one_line(python, monkeypatch, fault, words):
    monkeypatch.setenv("ISAACGYM_STANDIN_FAULT", fault)
    engine = cartpole(python, step_timeout=3.0)
    with pytest.raises(EngineFailed, match=words) as error:
        engine.step({}, engine.initial(torch.zeros(2), torch.zeros(2)), noise(1), substeps=2)
    assert "\n" not in str(error.value)
    monkeypatch.delenv("ISAACGYM_STANDIN_FAULT")
    assert engine.step({}, engine.initial(torch.zeros(2), torch.zeros(2)), noise(1), substeps=2).fault == 0
    engine.close()


@pytest.mark.parametrize("hang", [False, True])
def test_the_server_dies_with_its_parent(python, hang):
    before = shared_names()
    source = f"""
import os, torch
from tests.rlcore.physics.test_isaacgym import cartpole
engine = cartpole({python!r})
state = engine.initial(torch.zeros(2), torch.zeros(2))
simulator = engine.simulator(1)
print(simulator.server.process.pid, flush=True)
if {hang}:
    engine.step({{}}, state, torch.zeros(1), substeps=1)
else:
    os.kill(os.getpid(), 9)
"""
    environment = dict(os.environ, ISAACGYM_STANDIN_FAULT="hang:1" if hang else "")
    parent = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, env=environment, text=True)
    assert parent.stdout is not None
    server = int(parent.stdout.readline())
    assert Path(f"/proc/{server}").exists()
    if hang:
        time.sleep(1.0)
        parent.kill()
    parent.wait()
    assert gone(server)
    assert shared_names() == before


def test_the_servers_last_words_do_not_move_where_it_writes(python):
    engine = cartpole(python)
    server = engine.simulator(1).server
    file = server.log.fileno()
    os.pwrite(file, b"first\n" + bytes(100_000) + b"\nlast  words\n", 0)
    os.lseek(file, 3, os.SEEK_SET)
    words = server.last_words()
    assert words.endswith("last words") and len(words) <= 300
    assert os.lseek(file, 0, os.SEEK_CUR) == 3
    engine.close()


def script(tmp_path, text):
    path = tmp_path / "python"
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


def test_a_python_without_isaac_gym_is_one_line():
    with pytest.raises(InputError, match=r"isaacgym cannot be imported by .*Preview 4 is for 3.6 to 3.8") as error:
        cartpole(sys.executable).simulator(1)
    assert "\n" not in str(error.value) and "ModuleNotFoundError" in str(error.value)


def test_torch_imported_first_is_one_line(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import torch\n")
    path = f'PYTHONPATH={tmp_path}:{STANDIN} exec {sys.executable} "$@"\n'
    with pytest.raises(InputError, match="torch is imported before isaacgym"):
        cartpole(script(tmp_path, path)).simulator(1)


def test_a_simulation_that_cannot_be_created_is_one_line(python, monkeypatch):
    monkeypatch.setenv("ISAACGYM_STANDIN_FAULT", "no_sim")
    with pytest.raises(InputError, match="NVIDIA driver"):
        cartpole(python).simulator(1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("echo no such interpreter; exit 3\n", "exit code 3 in starting; it printed last: no such interpreter"),
        ("sleep 60\n", "starting"),
    ],
)
def test_what_is_no_server_is_one_line(tmp_path, text, words):
    with pytest.raises(RuntimeError, match=words) as error:
        cartpole(script(tmp_path, text), start_timeout=2.0).simulator(1)
    assert "\n" not in str(error.value)


def test_a_server_of_another_version_is_refused(python, monkeypatch):
    monkeypatch.setattr(bridge, "PROTOCOL", 99)
    with pytest.raises(InputError, match="speaks version 2 and the engine 99"):
        cartpole(python).simulator(1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gpu": -2}, "gpu must be a GPU's number, or -1 for CPUs, got -2 (--isaacgym.gpu)"),
        ({"num_position_iterations": 0}, "num_position_iterations must be at least 1, got 0"),
        ({"num_velocity_iterations": -1}, "num_velocity_iterations must be at least 0, got -1"),
        ({"contact_offset": 0.0}, "contact_offset must be more than 0 and finite, got 0.0 (--isaacgym.contact-offset)"),
        ({"start_timeout": float("nan")}, "start_timeout must be more than 0 and finite, got nan"),
        ({"step_timeout": float("inf")}, "step_timeout must be more than 0 and finite, got inf"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, words):
    with pytest.raises(InputError, match=re.escape(words)):
        Settings(**settings)


@pytest.mark.parametrize(
    ("given", "environment", "words"),
    [
        ("", {}, "name the interpreter that has Isaac Gym, as in docs/isaacgym.md (--isaacgym.python, or the env"),
        (
            "",
            {PYTHON_VARIABLE: "/no/python"},
            "RLCORE_ISAACGYM_PYTHON must name an interpreter, but '/no/python' is no program",
        ),
        (
            "/no/it",
            {PYTHON_VARIABLE: sys.executable},
            "--isaacgym.python must name an interpreter, but '/no/it' is no program",
        ),
        (str(STANDIN), {}, "is a directory"),
    ],
)
def test_an_interpreter_that_is_none_is_refused(given, environment, words):
    with pytest.raises(InputError, match=re.escape(words)) as error:
        find_python(Settings(given), environment)
    assert "\n" not in str(error.value)


def test_the_interpreter_is_the_setting_or_else_the_variable(tmp_path, monkeypatch):
    own = script(tmp_path, "")
    assert find_python(Settings(own), {PYTHON_VARIABLE: sys.executable}) == own
    assert find_python(Settings(), {PYTHON_VARIABLE: own}) == own
    # The server starts elsewhere.
    monkeypatch.chdir(tmp_path)
    assert find_python(Settings("./python"), {}) == own
    (tmp_path / "link").symlink_to(own)
    assert find_python(Settings("./link"), {}) == str(tmp_path / "link")


def test_the_engine_is_chosen_by_name(python, monkeypatch):
    model = mujoco.MjModel.from_xml_string(CARTPOLE)
    monkeypatch.setenv(PYTHON_VARIABLE, python)
    engines.check_available("isaacgym")
    made = make_engine(model, 3, physics="isaacgym")
    assert isinstance(made, IsaacGymEngine) and (made.settings.python, made.num_threads) == (python, 3)
    assert made.device == device_of("isaacgym") == device_of(Settings()) == torch.device("cpu")
    monkeypatch.delenv(PYTHON_VARIABLE)
    for check in (engines.check_available, lambda physics: make_engine(model, physics=physics)):
        with pytest.raises(InputError, match=PYTHON_VARIABLE):
            check("isaacgym")
    settings = Settings(python, gpu=-1, num_position_iterations=7, contact_offset=0.01)
    engines.check_available(settings)
    made = make_engine(model, physics=settings)
    assert isinstance(made, IsaacGymEngine) and made.settings == settings
    with pytest.raises(InputError, match="num_threads must be 0"):
        make_engine(model, -1, physics=settings)


@pytest.mark.parametrize("point", ["com", "origin"])
def test_either_point_of_velocities_gives_mujocos_step(python, reference, monkeypatch, point):
    monkeypatch.setenv("ISAACGYM_STANDIN_VELOCITY", point)
    xml = MODEL.replace('<geom name="box" type="box"', '<geom name="box" type="box" pos="0.05 0 0.1"')
    model = mujoco.MjModel.from_xml_string(xml)
    engine, mujocos = IsaacGymEngine(model, Settings(python, velocity_point=point)), MujocoEngine(model, 1)
    states, ctrl = some_states(mujocos, 2), noise(2, 2)
    step = lambda e: vmap(lambda s, c: e.step({}, s, c, substeps=2))(states, ctrl)  # noqa: E731
    actual = step(engine)
    assert_close(without_sensors(actual), without_sensors(step(mujocos)))
    engine.settings = with_fields(engine.settings, velocity_point="com" if point == "origin" else "origin")
    engine.close()
    assert (step(engine).qvel - actual.qvel).abs().max() > 1e-3  # and the other point is told from it
    engine.close()


def test_a_server_can_be_closed_twice_and_another_batch_size_has_another(python):
    engine = cartpole(python)
    server, other = engine.simulator(1).server, engine.simulator(2).server
    assert isinstance(server, Server) and server.alive and other.process.pid != server.process.pid
    assert engine.simulator(1).server is server
    server.close()
    server.close()
    assert not server.alive and other.alive
    engine.close()
    assert not other.alive


def test_ctrl_c_is_not_for_the_server(python):
    engine = cartpole(python)
    state = engine.initial(torch.zeros(2), torch.zeros(2))
    engine.step({}, state, noise(1), substeps=1)
    process = engine.simulator(1).server.process
    # A terminal sends it to the processes of one group.
    assert os.getpgid(process.pid) != os.getpgid(0)
    engine.close()


def test_a_question_that_is_interrupted_leaves_no_answer_for_the_next(python, monkeypatch):
    engine = cartpole(python)
    state, ctrl = engine.initial(noise(2, scale=0.1), noise(2, scale=0.1)), noise(1)
    first = engine.step({}, state, ctrl, substeps=2)
    expected = engine.step({}, first, ctrl, substeps=2)
    process = engine.simulator(1).server.process

    def interrupted(self, size):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Server, "_read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.simulator(1).server.step(1, 0, False)
    assert gone(process.pid)
    again = engine.step({}, state, ctrl, substeps=2)
    assert_close(engine.step({}, again, ctrl, substeps=2), expected, 0.0)
    engine.close()


def test_it_begins_in_inference_mode_and_goes_on_outside(python):
    engine = cartpole(python)
    state, ctrl = engine.initial(noise(2, scale=0.1), noise(2, scale=0.1)), noise(1)
    with torch.inference_mode():
        first = engine.step({}, state, ctrl, substeps=2)
    assert_close(engine.step({}, state, ctrl, substeps=2), first, 0.0)
    engine.close()


def test_a_script_may_stand_between_training_and_server(tmp_path):
    path = script(tmp_path, f'export PYTHONPATH={shlex.quote(str(STANDIN))}\n{shlex.quote(program())} "$@"\nexit $?\n')
    engine = cartpole(path)
    state = engine.initial(torch.zeros(2), torch.zeros(2))
    engine.step({}, state, noise(1), substeps=1)
    time.sleep(1.0)  # longer than the server takes to look for its parent
    engine.step({}, state, noise(1), substeps=1)
    launcher = engine.simulator(1).server.process.pid
    (inner,) = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    engine.close()
    assert gone(launcher) and gone(int(inner))


# --- What uses it -------------------------------------------------------------------------------------------


def test_the_verification_finds_the_standin_right_and_a_wrong_point_wrong(python, monkeypatch, capsys):
    assert verify_isaacgym.verify(Settings(python), 0.03)
    assert capsys.readouterr().out.count("ok  ") == len(verify_isaacgym.CHECKS)
    monkeypatch.setattr(verify_isaacgym, "CHECKS", (verify_isaacgym.spinning,))
    assert not verify_isaacgym.verify(Settings(python, velocity_point="origin"), 0.03)
    assert "--isaacgym.velocity-point com" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("check", "old", "new"),
    [
        ("falling", "m.opt.gravity[:] = (g.x, g.y, g.z)", "m.opt.gravity[:] = (g.x, g.y, 0.9 * g.z)"),
        ("resting", "sign * world", "0.9 * sign * world"),
        ("turning", 'float(drive["armature"])', "0.0"),
        ("slowing", '-float(drive["damping"])', '-0.8 * float(drive["damping"])'),
        ("following", 'float(drive["stiffness"]) if', '0.9 * float(drive["stiffness"]) if'),
        ("following", '-float(drive["damping"])', '-0.8 * float(drive["damping"])'),
        # Joints of a body in another order, and others in their place.
        ("gimbal", "def set_joints(self, rows):\n", "def set_joints(self, rows):\n        rows = rows[::-1]\n"),
        ("gimbal", 'for inertial in root.iter("inertial"):', 'for n, joint in enumerate(root.iter("joint")):\n'
         '            joint.set("axis", ("0 0 1", "0 1 0", "1 0 0")[n])\n'
         '        for inertial in root.iter("inertial"):'),
        # Inertias are told as they were set, and forgotten.
        ("leaning", "            actor.apply_drive()\n            actor.apply_filters()",
         "            actor.model.body_iquat[:] = (1.0, 0.0, 0.0, 0.0)\n            actor.apply_drive()"),
        ("heavier", "            actor.apply_drive()\n            actor.apply_filters()",
         "            actor.model.body_mass[:] = actor.asset.model.body_mass\n            actor.apply_drive()"),
        ("sliding", "(own.friction + other) / 2.0", "max(own.friction, other)"),
        ("pushing", "d.xfrc_applied[self.asset.bodies] = wrench", "d.xfrc_applied[self.asset.bodies] = 0.9 * wrench"),
        # At the origin of the frame and not at the centre of mass.
        ("pushing", "d.xfrc_applied[self.asset.bodies] = wrench",
         "d.xfrc_applied[self.asset.bodies] = wrench\n"
         "            for b in self.asset.bodies:\n"
         "                d.xfrc_applied[b, 3:] -= np.cross(d.xipos[b] - d.xpos[b], d.xfrc_applied[b, :3])"),
    ],
)  # fmt: skip
def test_each_check_of_the_verification_finds_what_it_is_for(tmp_path, monkeypatch, capsys, check, old, new):
    broken = mutant_standin(tmp_path, old, new)
    monkeypatch.setattr(verify_isaacgym, "CHECKS", (getattr(verify_isaacgym, check),))
    assert not verify_isaacgym.verify(Settings(broken), 0.03)
    assert capsys.readouterr().out.startswith("FAIL")


@pytest.mark.slow
def test_ppo_learns_cartpole_through_it(python, tmp_path):
    command = [sys.executable, "-m", "experiments.ppo_cartpole", "--physics", "isaacgym", "--training.iterations", "16"]
    command += ["--training.run-dir", str(tmp_path / "run"), "--num-threads", "1", "--episode-seconds", "2"]
    command += ["--training.no-tensorboard", "--training.no-video"]
    environment = {**os.environ, PYTHON_VARIABLE: python}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    returns = [r["episode/return"] for r in records if r.get("episode/return") is not None]
    # Two seconds are 100 at best, and a policy that knows nothing falls within one.
    assert returns[0] < 60 and max(returns) > 80, returns
