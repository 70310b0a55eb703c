"""Isaac Gym's documented rules, each broken on purpose in a copy of the code, and noticed.

Either the stand-in refuses what the real package would get wrong in silence, or the motion is no longer MuJoCo's.
"""

import importlib.util
import sys
from pathlib import Path

import mujoco
import pytest
import torch
from torch.func import vmap

from rlcore.errors import InputError
from rlcore.physics import isaacgym as bridge
from rlcore.physics import isaacgym_model
from rlcore.physics.engine import drain_faults
from rlcore.physics.isaacgym_settings import Settings
from rlcore.physics.mujoco import MujocoEngine
from rlcore.tree import where
from tests.rlcore.physics import standin
from tests.rlcore.physics.test_engine import noise
from tests.rlcore.physics.test_isaacgym import MODEL, assert_close, some_params, some_states, without_sensors

SERVER, ENGINE, LAYOUT = bridge.SERVER, Path(bridge.__file__), Path(isaacgym_model.__file__)
# With armature, and with less friction than the floor.
ROBOT = MODEL.replace('damping="0.1"', 'damping="0.1" armature="0.02"').replace(
    '<geom name="box"', '<geom name="box" friction="0.6"'
)
# Of a robot without joints.
BALL = """
<mujoco>
  <option timestep="0.005"/>
  <worldbody>
    <body name="ball" pos="0 0 1">
      <freejoint name="root"/>
      <geom name="ball" size="0.1" contype="0" conaffinity="0"/>
    </body>
  </worldbody>
</mujoco>
"""
MOTION, SENSORS = "the motion is not MuJoCo's", "the sensors are not MuJoCo's"


def compare(engine, names=("geom_friction",)):
    """Step robots on the floor and above it, reset some of them in between, and compare with MuJoCo.

    Raises:
      AssertionError: saying what is not MuJoCo's.
    """
    reference = MujocoEngine(engine.mjmodel, 1)
    states, ctrl, wrench = some_states(reference, 4), noise(4, 2), noise(4, 4, 6, scale=5)
    params, state = some_params(reference, 4, *names), states
    for turn in range(3):
        if turn == 2:
            state = where(torch.tensor([True, False, False, True]), states, state)
        step = lambda e, s: vmap(lambda p, s, c, w: e.step(p, s, c, w, substeps=2))(params, s, ctrl, wrench)  # noqa: E731
        actual, expected = step(engine, state), step(reference, state)
        try:
            # Friction is rounded to thousandths.
            assert_close(without_sensors(actual), without_sensors(expected), 1e-3)
        except AssertionError as error:
            raise AssertionError(f"{MOTION}: {error}") from None
        current = vmap(lambda p, s: reference.forward(p, s))(params, actual)
        for name, there, tolerance in (
            ("position", current, 1e-4),
            ("gyro", current, 1e-4),
            ("speed", current, 1e-4),
            ("touch", expected, 2e-2),
        ):
            place = engine.model.sensor(name)
            told, right = actual.sensordata[:, place], there.sensordata[:, place]
            assert torch.allclose(told, right, rtol=tolerance, atol=tolerance), (
                f"{SENSORS}: {name} {told} is not {right}"
            )
        state = actual
    assert (expected.sensordata[:, engine.model.sensor("touch")] > 1.0).any()


def fall(engine):
    """The ball after 0.05 s."""
    state = engine.initial(torch.tensor(engine.mjmodel.qpos0), torch.zeros(6))
    return engine.step({}, state, torch.zeros(0), substeps=10)


@pytest.fixture(autouse=True)
def _no_faults_left():
    yield
    drain_faults()


@pytest.mark.parametrize("names", [("geom_friction",), ("body_mass",)])
def test_where_no_rule_is_broken_nothing_is_noticed(names):
    engine = bridge.IsaacGymEngine(mujoco.MjModel.from_xml_string(ROBOT), Settings(standin.interpreter()))
    compare(engine, names)
    engine.close()


def mutant(tmp_path, monkeypatch, path, changes):
    """The engine's class with a change in the text of one of its files."""
    source = path.read_text()
    for old, new in changes:
        assert old in source, f"{path.name} no longer has {old!r}"
        source = source.replace(old, new)
    changed = tmp_path / path.name
    changed.write_text(source)
    if path == SERVER:
        monkeypatch.setattr(bridge, "SERVER", changed)
        return bridge.IsaacGymEngine
    spec = importlib.util.spec_from_file_location(f"mutant_{path.stem}", changed)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    if path == LAYOUT:
        monkeypatch.setattr(bridge, "layout", module)
        return bridge.IsaacGymEngine
    monkeypatch.setattr(module, "SERVER", SERVER)
    return module.IsaacGymEngine


SIMULATE = "            gym.simulate(sim)\n"
SET_ROOT = "gym.set_actor_root_state_tensor_indexed(sim, unwrap(self.root_set), unwrap(self.chosen), written)"
RULES = {
    # The order of things.
    "isaacgym is imported before torch": (
        SERVER,
        [("from isaacgym import gymapi, gymtorch\n", "import torch\n        from isaacgym import gymapi, gymtorch\n")],
        "torch was imported before",
    ),
    "z is up": (SERVER, [("params.up_axis = self.gymapi.UP_AXIS_Z", "pass")], "up axis is y"),
    "the ground's normal is z": (SERVER, [("Vec3(0.0, 0.0, 1.0)", "Vec3(0.0, 1.0, 0.0)")], "normal must be the up"),
    "robots collide with their own only": (SERVER, [('"robot", i, ', '"robot", 0, ')], "the group must be"),
    "tensors are refreshed before they are acquired": (
        SERVER,
        [
            (
                "        # Root states are not numbers if they are acquired before they were refreshed once.\n"
                "        self._refresh()\n",
                "",
            )
        ],
        "before it was refreshed",
    ),
    "masses are set before prepare_sim": (
        SERVER,
        [
            (
                "        self.gym.set_actor_rigid_body_properties",
                "        self.gym.prepare_sim(self.sim)\n        self.gym.set_actor_rigid_body_properties",
            )
        ],
        "before prepare_sim",
    ),
    "contact forces are collected": (SERVER, [("CC_LAST_SUBSTEP", "CC_NEVER")], f"{SENSORS}: touch"),
    # An option of an asset that has another default than none.
    "nothing is damped": (SERVER, [("options.angular_damping = 0.0", "pass")], MOTION),
    # Setters.
    "each setter once between two simulates": (
        SERVER,
        [(SIMULATE, '            gym.set_dof_actuation_force_tensor(sim, unwrap(shared["effort"]))\n' + SIMULATE)],
        "effort is set twice between",
    ),
    "indices are merged": (
        SERVER,
        [
            (
                SET_ROOT,
                "[gym.set_actor_root_state_tensor_indexed(sim, unwrap(self.root_set), unwrap(one), 1) "
                "for one in self.chosen.split(1)]",
            )
        ],
        "root is set twice between",
    ),
    "indices are int32": (SERVER, [("dtype=self.torch.int32", "dtype=self.torch.int64")], "indices are int32"),
    "indices are of the simulation": (SERVER, [("DOMAIN_SIM", "DOMAIN_ENV")], "indices of DOMAIN_SIM"),
    "tensors are contiguous": (
        SERVER,
        [("self.indices[rows].contiguous()", "self.indices.repeat(2)[::2]")],
        "must be contiguous",
    ),
    "tensors are kept alive": (
        SERVER,
        [("unwrap(self.chosen), written)", "unwrap(self.chosen.clone()), written)")],
        "is gone",
    ),
    "the whole buffer is given": (
        SERVER,
        [
            ('root_set[rows] = shared["root_in"][:written]', 'root_set = shared["root_in"][:written].clone()'),
            ("root_set[rows, 0:3] +=", "root_set[:, 0:3] +="),
        ],
        "the whole buffer",
    ),
    "only actors with joints have them set": (
        SERVER,
        [(" if dofs else None", ""), ("if self.dofs:", "if True:")],
        "actors without joints must not be passed",
    ),
    # A step.
    "a refresh comes before a setter": (
        SERVER,
        [
            (
                "        for i in range(substeps if simulate else 0):",
                "        self._refresh()\n        for i in range(substeps):",
            )
        ],
        "may be stale",
    ),
    "a refresh comes after simulate": (
        SERVER,
        [("        if simulate:\n            self._refresh()\n", "")],
        MOTION,
    ),
    "results are fetched": (
        SERVER,
        [("                gym.fetch_results(sim, True)\n", "                pass\n")],
        "results must be fetched",
    ),
    "efforts last for one simulate": (
        SERVER,
        [('if self.setup["efforts"]:', 'if self.setup["efforts"] and i == 0:')],
        MOTION,
    ),
    "wrenches last for one simulate": (SERVER, [("if wrench:", "if wrench and i == 0:")], MOTION),
    # Drives.
    "forces act in effort mode": (SERVER, [("self.gymapi.DOF_MODE_EFFORT", "self.gymapi.DOF_MODE_NONE")], MOTION),
    "targets act in position mode": (SERVER, [("self.gymapi.DOF_MODE_POS", "self.gymapi.DOF_MODE_NONE")], MOTION),
    "stiffness is a property of joints": (
        SERVER,
        [('"stiffness", "damping", "effort"', '"damping", "effort"')],
        MOTION,
    ),
    "damping is a property of joints": (
        SERVER,
        [('"stiffness", "damping", "effort"', '"stiffness", "effort"')],
        MOTION,
    ),
    "armature is a property of joints": (SERVER, [('"effort", "armature"', '"effort"')], MOTION),
    # Layouts.
    "joints are mapped by name": (
        ENGINE,
        [
            ("[d.dofs.index(name) for name in dofs]", "range(len(dofs))"),
            ("[dofs.index(name) for name in d.dofs]", "range(len(dofs))"),
        ],
        MOTION,
    ),
    "bodies are mapped by name": (
        ENGINE,
        [("[d.body_ids[d.bodies.index(name)] for name in bodies]", "list(d.body_ids)")],
        MOTION,
    ),
    "quaternions are x y z w where they are written": (
        LAYOUT,
        [("qpos[:, 4:7], qpos[:, 3:4], linear", "qpos[:, 3:7], linear")],
        MOTION,
    ),
    "quaternions are x y z w where they are read": (
        LAYOUT,
        [("torch.cat([root[:, 6:7], root[:, 3:6]], dim=1)", "root[:, 3:7]")],
        MOTION,
    ),
    "angular velocity is the world's where it is written": (
        LAYOUT,
        [("angular = rotations.rotate(quaternion, qvel[:, 3:6])", "angular = qvel[:, 3:6]")],
        MOTION,
    ),
    "angular velocity is the world's where it is read": (
        LAYOUT,
        [("rotations.rotate_inverse(unit, angular)", "angular")],
        MOTION,
    ),
    "friction of a pair is the mean": (
        LAYOUT,
        [("np.maximum(2.0 * np.maximum(own, now) - ground, 0.0)", "np.maximum(own, now)")],
        MOTION,
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_that_is_broken_is_noticed(tmp_path, monkeypatch, rule):
    path, changes, words = RULES[rule]
    made = mutant(tmp_path, monkeypatch, path, changes)
    xml = BALL if rule == "only actors with joints have them set" else ROBOT
    engine = made(mujoco.MjModel.from_xml_string(xml), Settings(standin.interpreter()))
    with pytest.raises((InputError, RuntimeError, AssertionError), match=words):
        if xml == BALL:
            engine.step(
                {}, engine.initial(torch.tensor(engine.mjmodel.qpos0), torch.zeros(6)), torch.zeros(0), substeps=1
            )
        else:
            compare(engine, ("body_mass",) if "prepare_sim" in rule else ("geom_friction",))
    engine.close()


def test_a_robot_without_joints_moves():
    engine = bridge.IsaacGymEngine(mujoco.MjModel.from_xml_string(BALL), Settings(standin.interpreter()))
    torch.testing.assert_close(float(fall(engine).qvel[2]), -9.81 * 0.05, rtol=1e-5, atol=0.0)
    engine.close()
