"""Isaac Gym's GPU pipeline, against the stand-in: on a GPU, and without one on memory that stands for a GPU's.

On the latter all tensors are the CPU's, and two processes map a file where they would map the GPU's memory; the rest is
the same code. The stand-in then still reads what it is given when it simulates, and not before, as a GPU does.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from types import SimpleNamespace

import mujoco
import pytest
import torch
from torch.func import vmap

from rlcore.errors import InputError
from rlcore.metrics import read_metrics
from rlcore.physics import isaacgym as bridge
from rlcore.physics.engine import FAULT_ACTION, FAULT_UNSTABLE, drain_faults
from rlcore.physics.engines import check_available, device_of
from rlcore.physics.isaacgym import IsaacGymEngine, contact_memory
from rlcore.physics.isaacgym_server import CudaMemory, Refused
from rlcore.physics.isaacgym_settings import Settings
from rlcore.physics.mujoco import MujocoEngine
from rlcore.tree import index, map_leaves, named_leaves, replace
from tasks.cartpole import MODEL as CARTPOLE
from tests.isaacgym_standin.device_twin import DeviceTwin
from tests.rlcore.physics.standin import interpreter
from tests.rlcore.physics.test_engine import noise
from tests.rlcore.physics.test_isaacgym import (
    MODEL,
    _one_thread,  # noqa: F401
    assert_close,
    some_params,
    some_states,
    without_sensors,
)

DEVICES = ["twin", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def python():
    return interpreter()


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    """Where states are, with the memory of the GPU pipeline there."""
    if request.param == "cuda":
        return torch.device("cuda", 0)
    monkeypatch.setenv("ISAACGYM_STANDIN_DEVICE", "twin")
    monkeypatch.setattr(bridge, "CudaMemory", DeviceTwin)
    return torch.device("cpu")


@pytest.fixture(scope="module")
def engines():
    made: dict[torch.device, IsaacGymEngine] = {}
    yield made
    for engine in made.values():
        engine.close()


@pytest.fixture
def engine(python, device, engines):
    """One for all tests, since a server takes a moment to start."""
    if device not in engines:
        engines[device] = box(python)
    return engines[device]


@pytest.fixture(scope="module")
def reference():
    return MujocoEngine(mujoco.MjModel.from_xml_string(MODEL), 1)


def box(python, **settings):
    return IsaacGymEngine(mujoco.MjModel.from_xml_string(MODEL), Settings(python, pipeline="gpu", **settings))


def moved(tree, device):
    return map_leaves(lambda x: x.to(device), tree)


# --- The engine -----------------------------------------------------------------------------------------------


def test_states_stay_where_the_pipeline_has_its_tensors(engine, device):
    states, ctrl = moved((some_states(engine._mujoco, 6), noise(6, 2)), device)
    after = vmap(lambda s, c: engine.step({}, s, c, substeps=2))(states, ctrl)
    assert engine.device == device
    for name, leaf in named_leaves(after):
        assert leaf.device == device and leaf.dtype in (torch.float64, torch.int64), name
    assert all(tensor.device == device for tensor in engine.simulator(6).server.tensors.values())
    # What is the CPU's is moved there.
    assert_close(vmap(lambda s, c: engine.step({}, s, c, substeps=2))(moved(states, "cpu"), ctrl.cpu()), after)


def test_a_step_is_mujocos_and_that_of_the_cpu_pipeline(engine, reference, python, device):
    states, ctrl, wrench = some_states(reference, 6), noise(6, 2), noise(6, 4, 6, scale=5)
    step = lambda e, place: vmap(lambda s, c, w: e.step({}, s, c, w, substeps=3))(  # noqa: E731
        *moved((states, ctrl, wrench), place)
    )
    actual = step(engine, device)
    assert_close(without_sensors(actual), without_sensors(moved(step(reference, "cpu"), device)))
    on_cpu = IsaacGymEngine(mujoco.MjModel.from_xml_string(MODEL), Settings(python))
    other = step(on_cpu, "cpu")
    assert_close(without_sensors(actual), without_sensors(other))
    # A force of contact answers to the last bit of a position; on the CPU there is no other last bit.
    torch.testing.assert_close(actual.sensordata.cpu(), other.sensordata, rtol=1e-3, atol=1e-4)
    assert device.type == "cuda" or torch.equal(actual.sensordata, other.sensordata)
    on_cpu.close()
    # Without the wrench it is another step: forces do not stay.
    plain = vmap(lambda s, c: engine.step({}, s, c, substeps=3))(*moved((states, ctrl), device))
    expected = vmap(lambda s, c: reference.step({}, s, c, substeps=3))(states, ctrl)
    assert_close(without_sensors(plain), without_sensors(moved(expected, device)))
    assert (plain.qvel - actual.qvel).abs().max() > 0.01


def test_an_ordinary_step_writes_nothing_and_a_reset_the_reset_rows(engine, reference, device):
    states, ctrl = moved((some_states(reference, 6), noise(6, 2)), device)
    step = vmap(lambda s, c: engine.step({}, s, c, substeps=2))
    state = step(states, ctrl)
    for _ in range(3):
        state = step(map_leaves(torch.clone, state), ctrl)
        assert engine.simulator(6).written == 0
    reset = torch.tensor([False, True, False, False, True, False], device=device)
    fresh = map_leaves(lambda a, b: torch.where(reset.reshape(-1, *[1] * (a.ndim - 1)), a, b), states, state)
    after = step(fresh, ctrl)
    assert engine.simulator(6).written == 2
    expected = vmap(lambda s, c: reference.step({}, s, c, substeps=2))(*moved((fresh, ctrl), "cpu"))
    assert_close(without_sensors(after), without_sensors(expected))


def test_results_share_no_memory(engine, reference, device):
    states, ctrl = moved((some_states(reference, 6), noise(6, 2)), device)
    step = vmap(lambda s, c: engine.step({}, s, c, substeps=1))
    first = step(states, ctrl)
    copy = map_leaves(torch.clone, first)
    map_leaves(lambda x: x.fill_(7), step(states, 2 * ctrl))
    assert_close(first, copy, 0.0)


@pytest.mark.parametrize("names", [(), ("body_mass", "body_inertia")])
def test_masked_forward_is_mujocos_and_leaves_the_rest_alone(engine, reference, device, names):
    states = replace(some_states(reference, 6), sensordata=noise(6, engine.model.nsensor))
    mask = torch.tensor([True, False, False, True, True, False])
    params = some_params(reference, 6, *names)
    forward = lambda e, p, s, m: vmap(lambda p, s, m: e.forward(p, s, m))(p, s, m)  # noqa: E731
    expected = forward(reference, params, states, mask).sensordata
    actual = forward(engine, *moved((params, states, mask), device)).sensordata
    assert actual.device == device and torch.equal(actual.cpu(), expected)
    assert torch.equal(actual[~mask].cpu(), states.sensordata[~mask])
    nobody = forward(engine, *moved((params, states, torch.zeros(6, dtype=torch.bool)), device)).sensordata
    assert torch.equal(nobody.cpu(), states.sensordata)


@pytest.mark.parametrize("names", [("body_mass", "body_inertia"), ("dof_damping", "dof_armature")])
def test_a_step_with_fields_is_mujocos(engine, reference, device, names):
    states, ctrl, params = some_states(reference, 6), noise(6, 2), some_params(reference, 6, *names)
    step = lambda e, *x: vmap(lambda p, s, c: e.step(p, s, c, substeps=2))(*x)  # noqa: E731
    there = map_leaves(torch.clone, moved((params, states, ctrl), device))
    changed = step(engine, *there)
    assert_close(without_sensors(changed), without_sensors(step(reference, params, states, ctrl)))
    assert not torch.equal(changed.qvel, step(engine, {}, *there[1:]).qvel)
    # The same fields again start nothing again.
    step(engine, *there)
    server = engine.simulator(6, engine._fields_on_cpu(there[0])).server
    step(engine, *there)
    assert engine.simulator(6, engine._fields_on_cpu(there[0])).server is server
    # What is written into them is noticed.
    name = names[0]
    there[0][name].mul_(1.5)
    expected = step(reference, {**params, name: 1.5 * params[name]}, states, ctrl)
    assert_close(without_sensors(step(engine, *there)), without_sensors(expected))


def test_centres_of_mass_are_the_models(engine, reference, device):
    states, ctrl, params = moved(
        (some_states(reference, 2), noise(2, 2), some_params(reference, 2, "body_ipos")), device
    )
    with pytest.raises(InputError, match="'body_ipos' cannot differ between robots on Isaac Gym"):
        vmap(lambda p, s, c: engine.step(p, s, c, substeps=1))(params, states, ctrl)


@pytest.mark.parametrize("breakage", ["ctrl", "wrench", "state"])
def test_fault_of_one_robot(engine, reference, device, breakage):
    states, ctrl, wrench = some_states(reference, 6), noise(6, 2), noise(6, 4, 6)
    step = lambda: vmap(lambda s, c, w: engine.step({}, s, c, w, substeps=2))(  # noqa: E731
        *moved((states, ctrl, wrench), device)
    )
    healthy = step()
    assert not drain_faults()
    broken = {"ctrl": ctrl[2], "wrench": wrench[2], "state": states.qvel[2]}[breakage]
    broken.view(-1)[1] = 1e8 if breakage == "state" else float("nan")
    after = step()
    code = FAULT_ACTION if breakage == "ctrl" else FAULT_UNSTABLE
    assert after.fault.tolist() == [0, 0, code, 0, 0, 0]
    others = torch.tensor([0, 1, 3, 4, 5], device=device)
    assert_close(index(after, others), index(healthy, others))
    assert torch.equal(after.qvel[2].cpu(), states.qvel[2])
    [fault] = drain_faults()
    assert fault.code == code
    assert torch.equal(torch.from_numpy(fault.arrays["qpos"]), states.qpos[2])


# --- What is asked of Isaac Gym -------------------------------------------------------------------------------


def test_each_setter_is_called_once_between_two_simulates(python, device, reference, tmp_path, monkeypatch):
    calls = tmp_path / "calls"
    monkeypatch.setenv("ISAACGYM_STANDIN_CALLS", str(calls))
    engine = box(python)
    states, ctrl, wrench = moved((some_states(reference, 2), noise(2, 2), noise(2, 4, 6)), device)
    vmap(lambda s, c, w: engine.step({}, s, c, w, substeps=2))(states, ctrl, wrench)
    engine.close()
    commands = ["target", "effort", "wrench", "simulate"]
    made = calls.read_text().split("\n")[:-1]
    asked = ["pipeline gpu", f"contacts {1 << 20} 5", "root", "dof", *commands, *commands]
    assert [call for call in made if not call.endswith(("allocated", "opened"))] == asked
    if device.type == "cpu":
        # Each process waits for its GPU before it tells the other, and the one that opened the memory closes it first.
        asked[2:2], asked[len(asked) :] = ["synchronize allocated"], ["synchronize opened"]
        assert made == [*asked, "close opened", "close allocated"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        # What a setter was given is written over before the GPU reads it.
        ("        for i in range(substeps if simulate else 0):",
         "        self.root_set[:] = self.root\n        for i in range(substeps if simulate else 0):", "is not tensor"),
        ("        for i in range(substeps if simulate else 0):",
         "        self.chosen.zero_()\n        for i in range(substeps if simulate else 0):", "is not tensor"),
        ("unwrap(self.chosen), written)", "unwrap(self.chosen.clone()), written)", "is gone"),
        ("            if not self.setup[\"fixed_base\"]:\n",
         "            gym.set_dof_state_tensor_indexed(sim, unwrap(self.dof_set), unwrap(self.chosen), written)\n"
         "            if not self.setup[\"fixed_base\"]:\n", "dof is set twice"),
        ("            if self.setup[\"efforts\"]:\n", "            if self.setup[\"efforts\"] and not i:\n",
         "is not tensor"),
        # Results are not refreshed, or not copied to where the other process has them.
        ("self.size, len(self.dofs), len(self.bodies)\n", "self.size, len(self.dofs), len(self.bodies)\n"
         "        self._refresh = lambda: None\n", "is not tensor"),
        ("        shared[\"root\"].copy_(self.root)\n", "", "is not tensor"),
        ("params.physx.use_gpu = setup[\"gpu\"] >= 0", "params.physx.use_gpu = False", "needs physics on the GPU"),
    ],
)  # fmt: skip
def test_a_rule_that_is_broken_is_noticed(python, device, reference, tmp_path, monkeypatch, old, new, words):
    source = bridge.SERVER.read_text()
    assert old in source
    mutant = tmp_path / "isaacgym_server.py"
    mutant.write_text(source.replace(old, new))
    monkeypatch.setattr(bridge, "SERVER", mutant)
    engine = box(python)
    states, ctrl = some_states(reference, 3), noise(3, 2)
    step = lambda e, s: vmap(lambda s, c: e.step({}, s, c, substeps=2))(s, ctrl.to(s.qpos.device))  # noqa: E731

    def run():
        after = step(engine, moved(states, device))
        assert_close(without_sensors(after), without_sensors(step(reference, states)))

    with pytest.raises((InputError, RuntimeError, AssertionError), match=words):
        run()
    engine.close()


# --- The memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["close", "collect", "kill", "refuse"])
def test_memory_is_given_back_when_nobody_has_it_open(python, device, reference, monkeypatch, tmp_path, end):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    closed: list[CudaMemory] = []
    monkeypatch.setattr(bridge.CudaMemory, "close", recorded(bridge.CudaMemory.close, closed))
    engine = box(python)
    states, ctrl = moved((some_states(reference, 2), noise(2, 2)), device)
    step = vmap(lambda s, c: engine.step({}, s, c, substeps=1))
    if end == "refuse":
        monkeypatch.setattr(bridge.Server, "_ask", refuse_mapping(bridge.Server._ask))
        with pytest.raises(InputError, match="refused"):
            step(states, ctrl)
    else:
        first = step(states, ctrl)
        process = engine.simulator(2).server.process
        if end == "kill":
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            # The next step starts another server with memory of its own.
            assert_close(step(states, ctrl), first)
            assert len(closed) == 1
        if end == "collect":
            engine._simulators.clear()
    engine.close()
    assert len(closed) == (2 if end == "kill" else 1)
    assert list(tmp_path.glob("rlcore-*")) == []


def recorded(close, closed):
    def closes(memory):
        closed.append(memory)
        close(memory)

    return closes


def refuse_mapping(ask):
    def asks(server, message, timeout, what):
        if "places" in message:
            raise InputError("refused")
        return ask(server, message, timeout, what)

    return asks


def test_a_server_that_cannot_open_the_memory_says_so_in_one_line(python, device, reference, monkeypatch, tmp_path):
    source = bridge.SERVER.read_text()
    old = '            handle = bytes.fromhex(mapping["handle"])\n'
    assert old in source
    mutant = tmp_path / "isaacgym_server.py"
    mutant.write_text(source.replace(old, '            raise Refused("cudaIpcOpenMemHandle: no")\n'))
    monkeypatch.setattr(bridge, "SERVER", mutant)
    engine = box(python)
    with pytest.raises(InputError, match="cudaIpcOpenMemHandle: no") as error:
        engine.simulator(2)
    assert "\n" not in str(error.value)


class Runtime:
    """A CUDA runtime that refuses what it is told to."""

    def __init__(self, refused):
        self.refused, self.calls = refused, []
        self.cudaGetErrorString = lambda code: b"operation not supported"

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append(name)
            return 801 if name == self.refused else 0

        return call


@pytest.mark.parametrize(
    ("refused", "handle", "words", "calls"),
    [
        ("cudaMalloc", b"", "no memory .*cudaMalloc: error 801, operation not", ["cudaMalloc", "cudaGetLastError"]),
        ("cudaIpcGetMemHandle", b"", "cannot share .*containers .*cudaIpcGetMemHandle",
         ["cudaMalloc", "cudaIpcGetMemHandle", "cudaGetLastError", "cudaFree"]),
        ("cudaIpcOpenMemHandle", bytes(64), "cannot share .*containers .*cudaIpcOpenMemHandle",
         ["cudaIpcOpenMemHandle", "cudaGetLastError"]),
    ],
)  # fmt: skip
def test_what_cuda_refuses_is_one_line_and_leaves_nothing(monkeypatch, refused, handle, words, calls):
    runtime, cuda = Runtime(refused), SimpleNamespace(is_available=lambda: True, synchronize=lambda device: None)
    cuda.device, cuda.device_count = contextlib.nullcontext, lambda: 1
    fake = SimpleNamespace(cuda=cuda, device=torch.device, empty=lambda n, device: None)

    def allocated(*arguments):
        runtime.calls.append("cudaMalloc")
        ctypes.cast(arguments[0], ctypes.POINTER(ctypes.c_void_p))[0] = 4096
        return 0

    if refused != "cudaMalloc":
        monkeypatch.setattr(runtime, "cudaMalloc", allocated)
    monkeypatch.setattr("rlcore.physics.isaacgym_server._cuda_runtime", lambda: "libcudart")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: runtime)
    with pytest.raises(Refused, match=words) as error:
        CudaMemory(fake, 0, 100, handle)
    assert "\n" not in str(error.value) and runtime.calls == calls


def test_without_a_gpu_it_is_refused_in_one_line(python, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("ISAACGYM_STANDIN_DEVICE", "twin")
    made = IsaacGymEngine(mujoco.MjModel.from_xml_string(CARTPOLE), Settings(python, pipeline="gpu"))
    with pytest.raises(InputError, match=r"torch of .* finds none .--isaacgym\.pipeline") as error:
        made.simulator(1)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"torch finds none; .*--isaacgym\.pipeline"):
        check_available(Settings(python, pipeline="gpu"))


# --- Settings and memory for contacts -------------------------------------------------------------------------


def test_states_are_where_the_pipeline_has_its_tensors():
    assert device_of(Settings(gpu=1)) == torch.device("cpu")
    assert device_of(Settings(gpu=1, pipeline="gpu")) == torch.device("cuda", 1)
    with pytest.raises(InputError, match=r"pipeline must be cpu where PhysX runs on CPUs .*got gpu"):
        Settings(gpu=-1, pipeline="gpu")
    with pytest.raises(InputError, match=r"spacing must be 0 or more, and finite, got -1"):
        Settings(spacing=-1.0)
    with pytest.raises(InputError, match=r"max_gpu_contacts must be 0 .by rule. or more, got -1"):
        Settings(max_gpu_contacts=-1)


@pytest.mark.parametrize(
    ("num_envs", "shapes", "contacts", "multiplier"),
    # 4096 robots of 19 shapes: 64 x 19 x 4096 is 4,980,736, and the next power of two 2^23.
    [(1, 0, 1 << 20, 2.0), (1, 19, 1 << 20, 5.0), (4096, 19, 1 << 23, 5.0), (8192, 19, 1 << 24, 5.0),
     (4096, 4, 1 << 20, 5.0), (4097, 4, 1 << 21, 5.0)],
)  # fmt: skip
def test_memory_for_contacts_grows_with_the_robots_and_their_shapes(num_envs, shapes, contacts, multiplier):
    assert contact_memory(num_envs, shapes) == (contacts, multiplier)


def test_a_contact_that_finds_no_memory_is_warned_of_once(python, reference, tmp_path, monkeypatch):
    monkeypatch.setenv("ISAACGYM_STANDIN_FAULT", "overflow:4")
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    calls = tmp_path / "calls"
    monkeypatch.setenv("ISAACGYM_STANDIN_CALLS", str(calls))
    engine = IsaacGymEngine(reference.mjmodel, Settings(python, max_gpu_contacts=5000))
    states, ctrl = some_states(reference, 2), noise(2, 2)
    step = vmap(lambda s, c: engine.step({}, s, c, substeps=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(step(states, ctrl), ctrl)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pread", None)  # nothing new is in the log, so nothing is read
            step(states, ctrl)
    words = (
        "max-gpu-contacts more than 5000 .* of pairs; it printed: .*overflow detected, .* at least 10000 in the scene"
    )
    with pytest.warns(RuntimeWarning, match=words) as told:
        step(states, ctrl)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(states, ctrl)
    engine.close()
    assert "contacts 5000 5" in calls.read_text()


# --- On a GPU -------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_another_process_opens_the_memory_and_writes_into_it():
    memory = CudaMemory(torch, 0, 4096)
    ours = memory.tensor(64, (3, 5), "float32")
    number = memory.tensor(0, (2,), "int32")
    ours.copy_(torch.arange(15.0).reshape(3, 5))
    number.fill_(7)
    memory.synchronize()
    program = f"""
import torch
from rlcore.physics.isaacgym_server import CudaMemory
memory = CudaMemory(torch, 0, 4096, bytes.fromhex({memory.handle.hex()!r}))
tensor, number = memory.tensor(64, (3, 5), "float32"), memory.tensor(0, (2,), "int32")
assert tensor.tolist() == [[5.0 * i + j for j in range(5)] for i in range(3)], tensor
assert number.tolist() == [7, 7], number
tensor.mul_(2.0)
memory.synchronize()
memory.close()
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert torch.equal(ours.cpu(), 2.0 * torch.arange(15.0).reshape(3, 5))
    memory.close()


@pytest.mark.gpu
def test_ppo_trains_wholly_on_the_gpu_through_it(python, tmp_path):
    command = [sys.executable, "-m", "experiments.ppo_cartpole", "--physics", "isaacgym", "--training.iterations", "4"]
    command += ["--training.run-dir", str(tmp_path / "run"), "--num-threads", "1", "--episode-seconds", "2"]
    command += ["--training.no-tensorboard", "--training.no-video"]
    command += ["--isaacgym.python", python, "--isaacgym.pipeline", "gpu"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    returns = [r.get("episode/return") for r in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert any(x is not None and 5.0 < x < 101.0 for x in returns), returns
