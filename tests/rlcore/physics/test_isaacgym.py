"""Isaac Gym as an engine, against a stand-in for it that MuJoCo simulates, in a process of its own.

The stand-in keeps single precision and an order of joints and bodies of its own, and raises where Isaac Gym's
documented rules are broken. That it has Isaac Gym's signatures is tested in test_isaacgym_model.py.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace as with_fields
from pathlib import Path

import mujoco
import pytest
import torch
from torch.func import grad, vmap

from experiments import verify_isaacgym
from rlcore.errors import InputError
from rlcore.metrics import read_metrics
from rlcore.physics import engines
from rlcore.physics import isaacgym as bridge
from rlcore.physics.engine import FAULT_ACTION, FAULT_UNSTABLE, Engine, drain_faults
from rlcore.physics.engines import device_of, make_engine
from rlcore.physics.isaacgym import PYTHON_VARIABLE, IsaacGymEngine, Server, Settings, settings_from_environment
from rlcore.physics.mujoco import MujocoEngine
from rlcore.tree import index, map_leaves, named_leaves, replace, stack
from tasks.cartpole import MODEL as CARTPOLE
from tests.rlcore.physics.test_engine import MODEL as BOX
from tests.rlcore.physics.test_engine import noise

STANDIN = Path(__file__).resolve().parents[2] / "isaacgym_standin"
# The robot of the other engines' tests with a servo that has no activation of its own.
MODEL = (
    BOX.replace('dyntype="filter" dynprm="0.05" ', "")
    .replace('name="hand" type="box"', 'name="palm" type="box"')
    .replace(
        "<sensor>", '<sensor><touch name="touch" site="all"/><framelinvel name="speed" objtype="site" objname="imu"/>'
    )
    .replace('<site name="imu"/>', '<site name="imu" pos="0.1 0 0.2"/><site name="all" type="sphere" size="1"/>')
)
FIELDS = ("body_mass", "body_inertia", "body_ipos", "geom_friction", "dof_damping", "actuator_gainprm")
TOLERANCE = 2e-5  # of single precision, some substeps later


@pytest.fixture(scope="session")
def python(tmp_path_factory):
    """An interpreter that finds the stand-in where it would find Isaac Gym.

    RLCORE_STANDIN_PYTHON names another than this one, such as a Python 3.8 with mujoco, torch and numpy.
    """
    program = os.environ.get("RLCORE_STANDIN_PYTHON", sys.executable)
    path = tmp_path_factory.mktemp("isaacgym") / "python"
    path.write_text(f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(STANDIN))} exec {shlex.quote(program)} "$@"\n')
    path.chmod(0o755)
    return str(path)


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
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=f"{name}: {a} is not {b}")


def without_sensors(state):
    return replace(state, sensordata=torch.zeros_like(state.sensordata), warmstart=torch.zeros_like(state.warmstart))


def some_params(engine, num, *names):
    return {
        name: value * (1 + noise(num, *value.shape, seed=seed, scale=0.2))
        for seed, (name, value) in enumerate(engine.nominal(*names).items())
    }


# --- The contract -------------------------------------------------------------------------------------------


def test_satisfies_the_protocol(engine):
    assert engine.device == device_of("isaacgym") == torch.device("cpu")
    assert isinstance(engine, Engine)


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


def test_vmapped_step_equals_loop(engine):
    states, ctrl, wrench = some_states(engine, 6), noise(6, 2), noise(6, 4, 6, scale=5)
    step = lambda s, c, w: engine.step({}, s, c, w, substeps=2)  # noqa: E731
    batched = vmap(step)(states, ctrl, wrench)
    assert_close(batched, stack([step(index(states, i), ctrl[i], wrench[i]) for i in range(6)]))
    folded = map_leaves(lambda x: x.reshape(2, 3, *x.shape[1:]), (states, ctrl, wrench))
    assert_close(map_leaves(lambda x: x.flatten(0, 1), vmap(vmap(step))(*folded)), batched)


def test_neighbours_change_nothing(engine):
    states, ctrl = some_states(engine, 12), noise(12, 2)
    step = vmap(lambda s, c: engine.step({}, s, c, substeps=2))
    few = step(index(states, slice(3, 9)), ctrl[3:9])
    assert_close(index(step(states, ctrl), slice(3, 9)), few)


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


def test_two_steps_are_one_of_twice_the_substeps(engine):
    states, ctrl = some_states(engine, 6), noise(6, 2)
    step = lambda n: vmap(lambda s, c: engine.step({}, s, c, substeps=n))  # noqa: E731
    assert_close(without_sensors(step(3)(step(3)(states, ctrl), ctrl)), without_sensors(step(6)(states, ctrl)))


def test_results_share_no_memory(engine):
    states, ctrl = some_states(engine, 6), noise(6, 2)
    step = vmap(lambda s, c: engine.step({}, s, c, substeps=1))
    kept, first = map_leaves(torch.clone, states), step(states, ctrl)
    copy = map_leaves(torch.clone, first)
    second = step(states, 2 * ctrl)
    map_leaves(lambda x: x.fill_(7), second)
    assert_close(first, copy, 0.0)
    assert_close(states, kept, 0.0)
    # What is written into a result is told to the simulator.
    third = step(kept, ctrl)
    third.qpos[2, 7] += 0.1
    moved = map_leaves(torch.clone, third)
    after = step(third, ctrl)
    assert engine.simulator(6).written == 1
    step(states, ctrl)
    assert_close(without_sensors(step(moved, ctrl)), without_sensors(after))


def test_masked_forward_leaves_the_rest_alone(engine, reference):
    states = replace(some_states(engine, 6), sensordata=noise(6, engine.model.nsensor))
    mask = torch.tensor([True, False, False, True, True, False])
    masked = vmap(lambda s, m: engine.forward({}, s, m))(states, mask)
    full = vmap(lambda s: reference.forward({}, s))(states)
    assert torch.equal(masked.sensordata[mask], full.sensordata[mask])
    assert torch.equal(masked.sensordata[~mask], states.sensordata[~mask])


@pytest.mark.parametrize("breakage", ["nan ctrl", "explosion", "nan wrench"])
def test_fault_of_one_robot(engine, breakage):
    states, ctrl, wrench = some_states(engine, 6), noise(6, 2), noise(6, 4, 6)
    step = lambda: vmap(lambda s, c, w: engine.step({}, s, c, w, substeps=2))(states, ctrl, wrench)  # noqa: E731
    healthy = step()
    assert not drain_faults() and (healthy.fault == 0).all()
    if breakage == "explosion":
        qvel = states.qvel.clone()
        qvel[2, 1] = 1e8
        states = replace(states, qvel=qvel)
    elif breakage == "nan wrench":
        wrench[2, 1, 0] = float("nan")
    else:
        ctrl[2, 1] = float("nan")
    code = FAULT_ACTION if "ctrl" in breakage else FAULT_UNSTABLE
    broken = step()
    assert broken.fault.tolist() == [0, 0, code, 0, 0, 0]
    others = torch.tensor([0, 1, 3, 4, 5])
    assert_close(index(broken, others), index(healthy, others))
    assert_close(replace(index(broken, 2), fault=torch.tensor(0)), index(states, 2), 0.0)
    [fault] = drain_faults()
    assert fault.code == code and ("motor" in fault.message) == (code == FAULT_ACTION)
    assert torch.equal(torch.from_numpy(fault.arrays["qpos"]), states.qpos[2])


def test_there_are_no_derivatives(engine):
    states = some_states(engine, 6)
    loss = lambda c: vmap(lambda s, c: engine.step({}, s, c, substeps=1).qpos.sum())(states, c).sum()  # noqa: E731
    with pytest.raises(RuntimeError, match="no derivatives"):
        grad(loss)(noise(6, 2))


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


@pytest.mark.parametrize("name", ["opt.timestep", "geom_size", "nonsense"])
def test_fields_that_cannot_differ_are_refused_by_name(engine, name):
    value = torch.zeros(()) if name != "geom_size" else engine._mujoco.nominal(name)[name]
    with pytest.raises(InputError, match=f"'{name}'"):
        engine.step({name: value}, index(some_states(engine, 1), 0), noise(2), substeps=1)


def test_gravity_is_one_for_all_robots(engine):
    states, ctrl = some_states(engine, 2), noise(2, 2)
    gravity = torch.tensor([[0.0, 0.0, -9.0], [0.0, 0.0, -8.0]]).double()
    with pytest.raises(InputError, match=r"'opt.gravity' is one for all robots"):
        vmap(lambda g, s, c: engine.step({"opt.gravity": g}, s, c, substeps=1))(gravity, states, ctrl)


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


@pytest.mark.parametrize(("fault", "words"), [("crash:1", "SIGABRT in a step"), ("hang:1", "within 3 s of a step")])
def test_a_crash_or_a_hang_is_one_line(python, monkeypatch, fault, words):
    monkeypatch.setenv("ISAACGYM_STANDIN_FAULT", fault)
    engine = cartpole(python, step_timeout=3.0)
    with pytest.raises(RuntimeError, match=words) as error:
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
        ("echo no such interpreter; exit 3\n", "exit code 3 in starting: no such interpreter"),
        ("sleep 60\n", "starting"),
    ],
)
def test_what_is_no_server_is_one_line(tmp_path, text, words):
    with pytest.raises(RuntimeError, match=words) as error:
        cartpole(script(tmp_path, text), start_timeout=2.0).simulator(1)
    assert "\n" not in str(error.value)


def test_a_server_of_another_version_is_refused(python, monkeypatch):
    monkeypatch.setattr(bridge, "PROTOCOL", 99)
    with pytest.raises(InputError, match="speaks version 1 and the engine 99"):
        cartpole(python).simulator(1)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, "set RLCORE_ISAACGYM_PYTHON"),
        ({PYTHON_VARIABLE: "/no/python3.8"}, "'/no/python3.8', which is no program"),
        ({PYTHON_VARIABLE: sys.executable, "RLCORE_ISAACGYM_GPU": "one"}, "RLCORE_ISAACGYM_GPU must be"),
        ({PYTHON_VARIABLE: sys.executable, "RLCORE_ISAACGYM_VELOCITY": "tip"}, "must be com or origin, got 'tip'"),
    ],
)
def test_settings_that_cannot_work_are_refused(environment, words):
    with pytest.raises(InputError, match=words):
        settings_from_environment(environment)


def test_the_engine_is_chosen_by_name(python, monkeypatch):
    monkeypatch.setenv(PYTHON_VARIABLE, python)
    engines.check_available("isaacgym")
    made = make_engine(mujoco.MjModel.from_xml_string(CARTPOLE), 1, physics="isaacgym")
    assert isinstance(made, IsaacGymEngine) and made.settings.python == python
    monkeypatch.delenv(PYTHON_VARIABLE)
    with pytest.raises(InputError, match=PYTHON_VARIABLE):
        engines.check_available("isaacgym")


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


# --- Rules of Isaac Gym, broken on purpose --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("from isaacgym import gymapi, gymtorch\n", "import torch\n        from isaacgym import gymapi, gymtorch\n",
         "torch was imported before"),
        ("dtype=self.torch.int32", "dtype=self.torch.int64", "indices are int32"),
        ("self.indices[rows].contiguous()", "self.indices.repeat(2)[::2]", "contiguous"),
        ("unwrap(self.chosen), written)", "unwrap(self.chosen.clone()), written)", "is gone"),
        ("            gym.simulate(sim)\n",
         "            gym.set_dof_actuation_force_tensor(sim, unwrap(shared[\"effort\"]))\n"
         "            gym.simulate(sim)\n",
         "set twice between"),
        ("        for i in range(substeps if simulate else 0):",
         "        self._refresh()\n        for i in range(substeps):",
         "may be stale"),
        ("        # Root states are not numbers if they are acquired before they were refreshed once.\n"
         "        self._refresh()\n", "", "before it was refreshed"),
        ("CC_LAST_SUBSTEP", "CC_NEVER", "touch"),
        ("            gym.fetch_results(sim, True)\n", "", "results must be fetched"),
        ("params.up_axis = self.gymapi.UP_AXIS_Z", "pass", "up axis is y"),
        ('"robot", i, ', '"robot", 0, ', "the group must be"),
        ("        self.gym.set_actor_rigid_body_properties", "        self.gym.prepare_sim(self.sim)\n"
         "        self.gym.set_actor_rigid_body_properties", "before prepare_sim"),
    ],
)  # fmt: skip
def test_a_rule_that_is_broken_is_noticed(python, tmp_path, monkeypatch, reference, old, new, words):
    source = bridge.SERVER.read_text()
    assert old in source
    mutant = tmp_path / "isaacgym_server.py"
    mutant.write_text(source.replace(old, new))
    monkeypatch.setattr(bridge, "SERVER", mutant)
    engine = IsaacGymEngine(mujoco.MjModel.from_xml_string(MODEL), Settings(python))
    states, ctrl = some_states(reference, 2), noise(2, 2)
    masses = some_params(reference, 2, "body_mass")

    def run():
        step = vmap(lambda p, s, c: engine.step(p, s, c, substeps=2))
        state = step(masses, states, ctrl)
        touch = engine.model.sensor("touch")
        assert (state.sensordata[0, touch] > 0).all(), "no touch"

    with pytest.raises((InputError, RuntimeError, AssertionError), match=words):
        run()
    engine.close()
    monkeypatch.undo()


def test_a_robot_on_the_floor_feels_it(engine, reference):
    """What the test above expects of a server that breaks no rule."""
    states, masses = some_states(reference, 2), some_params(reference, 2, "body_mass")
    after = vmap(lambda p, s, c: engine.step(p, s, c, substeps=2))(masses, states, noise(2, 2))
    assert (after.sensordata[0, engine.model.sensor("touch")] > 0).all()


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
    program = os.environ.get("RLCORE_STANDIN_PYTHON", sys.executable)
    path = script(tmp_path, f'export PYTHONPATH={shlex.quote(str(STANDIN))}\n{shlex.quote(program)} "$@"\nexit $?\n')
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
    assert "RLCORE_ISAACGYM_VELOCITY=com" in capsys.readouterr().out


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
