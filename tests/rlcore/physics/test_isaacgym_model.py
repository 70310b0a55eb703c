"""What Isaac Gym is told of a model and what its tensors mean, against MuJoCo's own numbers and hand arithmetic."""

import ast
import re
import sys
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import pytest
import torch

from rlcore.errors import InputError
from rlcore.physics import isaacgym_model as layout
from rlcore.physics.isaacgym import SERVER
from rlcore.physics.mujoco import load_model
from tasks.ant import MODEL as ANT
from tasks.cartpole import MODEL as CARTPOLE
from tasks.humanoid.body import MODEL as HUMANOID
from tasks.humanoid.run import motor_model

STANDIN = Path(__file__).resolve().parents[2] / "isaacgym_standin" / "isaacgym"


def noise(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# --- The two halves agree -----------------------------------------------------------------------------------


def test_the_server_is_python_3_8_and_imports_nothing_of_ours():
    tree = ast.parse(SERVER.read_text(), feature_version=(3, 8))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module).split(".")[0])
    assert names - set(sys.stdlib_module_names) == {"isaacgym", "torch", "numpy"}


def test_python_3_8_would_be_told_from_newer_syntax():
    with pytest.raises(SyntaxError):
        ast.parse("match 1:\n    case 1:\n        pass", feature_version=(3, 8))


def stubs() -> Any:
    """The signatures of the real package, from its stubs: class to method to its first lines."""
    found = next((f for p in sys.path if (f := Path(p) / "isaacgym-stubs" / "gymapi.pyi").is_file()), None)
    if found is None:
        pytest.fail("the tests need isaacgym-stubs: pip install -e '.[dev]' -c constraints.txt")
    # One method of theirs is named as no method can be.
    return ast.parse(found.read_text().replace("def lambda(", "def lambda_("))


def standin() -> Any:
    """The stand-in's classes, read and not imported: it would refuse to be imported after torch."""
    return ast.parse((STANDIN / "gymapi.py").read_text())


def classes(tree) -> dict[str, Any]:
    return {node.name: node for node in inside(tree, ast.ClassDef)}


def inside(node, kind) -> list[Any]:
    return [n for n in node.body if isinstance(n, kind)]


def methods(node) -> dict[str, Any]:
    return {n.name: n for n in inside(node, ast.FunctionDef)}


def test_every_function_of_the_standin_is_one_of_isaac_gyms():
    real, ours = methods(classes(stubs())["Gym"]), methods(classes(standin())["Gym"])
    public = {name: node for name, node in ours.items() if not name.startswith("_")}
    assert len(public) > 25 and public.keys() <= real.keys()
    for name, node in public.items():
        names = [a.arg for a in node.args.args]
        # Defaults are told by the documentation, where the stubs have dots; and some arguments altogether.
        signature = str(ast.get_docstring(real[name])).splitlines()[0]
        if real[name].args.vararg is None:
            assert names == [a.arg for a in real[name].args.args], name
            assert len(node.args.defaults) == len(real[name].args.defaults), name
        else:
            assert names == ["self", *re.findall(r"\b(arg\d): ", signature)], name
        for arg, default in zip(names[len(names) - len(node.args.defaults) :], node.args.defaults, strict=True):
            told = re.search(rf"\b{arg}: [\w.]+ = ([^,)>]+)", signature)
            assert told is not None, (name, arg)
            documented = told[1].replace("- ", "-")
            if documented.startswith("<"):  # an object, which the stand-in makes when it is None
                assert ast.unparse(default) == "None", (name, arg)
            else:
                assert ast.unparse(default) == documented, (name, arg)


def test_every_field_of_the_standin_is_one_of_isaac_gyms():
    real, checked = classes(stubs()), 0
    for name, node in classes(standin()).items():
        assignment = next((n for n in inside(node, ast.Assign) if n.targets[0].id == "fields"), None)
        if name.startswith("_") or assignment is None or name == "Tensor":
            continue
        known = {n.target.id for n in inside(real[name], ast.AnnAssign)}
        fields = {key.value for key in assignment.value.keys}
        assert fields and fields <= known, name
        checked += 1
    assert checked >= 8


def test_every_name_of_the_standins_enums_has_isaac_gyms_number():
    real, checked = classes(stubs()), 0
    for name, node in classes(standin()).items():
        if [getattr(base, "id", "") for base in node.bases] != ["IntEnum"]:
            continue
        documented = str(ast.get_docstring(real[name]))
        for member in inside(node, ast.Assign):
            label, value = member.targets[0].id, member.value.value
            assert label in documented, label
            told = re.search(rf"{label} : [^\n]*\(value = (\d+)\)", documented)
            assert told is None or int(told[1]) == value, label
            checked += 1
    assert checked > 10


def test_the_server_uses_nothing_that_the_standin_lacks():
    """Else a call would go unchecked: what the server asks of gym and gymapi is in the stubs as well."""
    source = SERVER.read_text()
    called = set(re.findall(r"\bgym\.(\w+)\(", source))
    named = set(re.findall(r"\bgymapi\.(\w+)", source)) - {"acquire_gym"}
    real = stubs()
    constants = {n.target.id for n in inside(real, ast.AnnAssign)}
    assert len(called) > 20 and called <= methods(classes(real)["Gym"]).keys()
    assert named <= constants | classes(real).keys()


# --- States -------------------------------------------------------------------------------------------------


def humanoid():
    return load_model(HUMANOID)


def ant():
    return load_model(ANT)


def random_data(model, seed):
    data, generator = mujoco.MjData(model), np.random.default_rng(seed)
    data.qpos[:] = model.qpos0 + 0.3 * generator.standard_normal(model.nq)
    data.qvel[:] = generator.standard_normal(model.nv)
    if model.jnt_type[0] == 0:
        data.qpos[3:7] /= np.linalg.norm(data.qpos[3:7])
    mujoco.mj_forward(model, data)
    return data


@pytest.mark.parametrize("of_com", [True, False])
def test_root_state_is_mujocos_velocity_of_the_body(of_com):
    model = humanoid()
    com = torch.tensor(model.body_ipos[1]) if of_com else None
    for seed in range(4):
        data = random_data(model, seed)
        velocity, kind = np.zeros(6), mujoco.mjtObj.mjOBJ_BODY if of_com else mujoco.mjtObj.mjOBJ_XBODY
        mujoco.mj_objectVelocity(model, data, kind, 1, velocity, 0)
        qpos, qvel = torch.tensor(data.qpos[None]), torch.tensor(data.qvel[None])
        root = layout.root_from_qpos(qpos, qvel, com)
        w, x, y, z = data.xquat[1]
        expected = [*data.xpos[1], x, y, z, w, *velocity[3:], *velocity[:3]]
        np.testing.assert_allclose(root[0].numpy(), expected, atol=1e-12)
        back_qpos, back_qvel = layout.qpos_from_root(root, com)
        torch.testing.assert_close(back_qpos, qpos[:, :7], rtol=0, atol=1e-12)
        torch.testing.assert_close(back_qvel, qvel[:, :6], rtol=0, atol=1e-12)


def test_a_quaternion_of_single_precision_scales_no_velocity():
    root = torch.zeros(1, 13)
    root[0, 3:7] = torch.tensor([0.1, 0.2, 0.3, 0.93])  # of length 1.008
    root[0, 10:13] = torch.tensor([1.0, 2.0, 2.0])
    _, qvel = layout.qpos_from_root(root, None)
    assert qvel[0, 3:6].norm() == pytest.approx(3.0, abs=1e-12)


# --- Actuators ----------------------------------------------------------------------------------------------

ARM = """
<mujoco>
  <compiler angle="radian"/>
  <worldbody>
    <body name="upper"><joint name="shoulder" axis="0 1 0" damping="0.3" armature="0.1"/>
      <geom type="capsule" fromto="0 0 0 0 0 0.5" size="0.05" contype="0" conaffinity="0"/>
      <body name="lower" pos="0 0 0.5"><joint name="elbow" axis="0 1 0" range="-1 1" limited="true"/>
        <geom type="capsule" fromto="0 0 0 0 0 0.4" size="0.04" contype="0" conaffinity="0"/>
        <body name="hand" pos="0 0 0.4"><joint name="wrist" type="slide" axis="0 0 1" damping="0.2"/>
          <geom type="sphere" size="0.05" contype="0" conaffinity="0"/></body></body></body>
  </worldbody>
  <actuator>
    <position name="elbow" joint="elbow" kp="20" kv="2" gear="3" forcerange="-4 4" forcelimited="true"/>
    <motor name="shoulder" joint="shoulder" gear="5" ctrlrange="-1 1" ctrllimited="true"/>
  </actuator>
  <sensor>
    <actuatorfrc name="elbow_force" actuator="elbow"/>
    <jointactuatorfrc name="shoulder_torque" joint="shoulder"/>
    <jointpos name="wrist_position" joint="wrist"/>
    <jointvel name="wrist_velocity" joint="wrist"/>
  </sensor>
</mujoco>
"""


def arm(xml=ARM):
    return mujoco.MjModel.from_xml_string(xml)


def test_drives_are_the_actuators_seen_from_the_joints():
    model = arm()
    assert layout.describe(model).dofs == ("shoulder", "elbow", "wrist")
    shoulder, elbow, wrist = layout.drives(model, layout.actuator_table(model), {})
    assert (shoulder.mode, shoulder.stiffness, shoulder.damping, shoulder.armature) == ("effort", 0.0, 0.3, 0.1)
    # kp g^2 = 20 9, kv g^2 = 2 9, g forcerange = 3 4.
    assert (elbow.mode, elbow.stiffness, elbow.damping, elbow.effort) == ("position", 180.0, 18.0, 12.0)
    assert (wrist.mode, wrist.stiffness, wrist.damping) == ("effort", 0.0, 0.2)


def test_drives_of_many_robots_are_each_ones():
    model = arm()
    damping = np.stack([model.dof_damping, model.dof_damping * 2])
    shoulder, _, wrist = layout.drives(model, layout.actuator_table(model), {"dof_damping": damping})
    np.testing.assert_allclose(shoulder.damping, [0.3, 0.6])
    np.testing.assert_allclose(wrist.damping, [0.2, 0.4])


def test_commands_give_mujocos_joint_torques():
    model, table = arm(), layout.actuator_table(arm())
    ctrl, qpos, qvel = 2 * noise(32, 2), noise(32, 3, seed=1), noise(32, 3, seed=2)
    inf = float("inf")
    low, high = torch.tensor([-4.0, -inf]).double(), torch.tensor([4.0, inf]).double()
    gain, kv = torch.tensor([20.0, 1.0]).double(), torch.tensor([2.0, 0.0]).double()
    targets, efforts = layout.commands(table, ctrl, gain, low, high, 3)
    force = layout.actuator_force(table, ctrl, qpos, qvel, gain, kv, low, high)
    data, drives = mujoco.MjData(model), layout.drives(model, table, {})
    for i in range(32):
        data.ctrl[:], data.qpos[:], data.qvel[:] = ctrl[i], qpos[i], qvel[i]
        mujoco.mj_forward(model, data)
        np.testing.assert_allclose(force[i], data.actuator_force, atol=1e-9)
        # What Isaac Gym's drives make of the targets and efforts, without the joints' own damping.
        elbow = drives[1].stiffness * (targets[i, 1] - qpos[i, 1]) - drives[1].damping * qvel[i, 1]
        torques = [efforts[i, 0], np.clip(elbow, -drives[1].effort, drives[1].effort), efforts[i, 2]]
        np.testing.assert_allclose(torques, data.qfrc_actuator, atol=1e-9)


def test_friction_of_a_shape_on_the_floor_is_mujocos():
    own, floor = np.array([[0.2, 0.9, 1.4]]), 0.8
    shapes = layout.shape_friction(own, [0, 1, 2], floor, floor)
    np.testing.assert_allclose((shapes + floor) / 2, np.maximum(own, floor))
    assert layout.shape_friction(own, [2], None, 0.0).tolist() == [[1.4]]


# --- The asset ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [humanoid, arm, ant])
def test_the_asset_is_the_same_mechanism(make):
    model = make()
    told = layout.describe(model)
    asset = mujoco.MjModel.from_xml_string(told.xml)
    assert (asset.nq, asset.nv, asset.ngeom) == (model.nq, model.nv, len(told.geoms))
    for seed in range(3):
        data = random_data(model, seed)
        twin = mujoco.MjData(asset)
        twin.qpos[:], twin.qvel[:] = data.qpos, data.qvel
        mujoco.mj_forward(asset, twin)
        # Inertia and bias say that masses, inertias, frames and axes are the same.
        masses = np.zeros((2, model.nv, model.nv))
        mujoco.mj_fullM(model, data, masses[0])
        mujoco.mj_fullM(asset, twin, masses[1])
        np.testing.assert_allclose(masses[1] + np.diag(model.dof_armature), masses[0], atol=1e-9)
        np.testing.assert_allclose(twin.qfrc_bias, data.qfrc_bias, atol=1e-9)


def task_model(name):
    if name == "g1":
        from tasks.unitree.body import PACKAGE, unitree_model

        try:
            return unitree_model("g1")
        except InputError:
            pytest.skip(f"needs the package {PACKAGE}")
    return {"cartpole": lambda: arm(CARTPOLE), "humanoid": humanoid, "humanoid_run": motor_model, "ant": ant}[name]()


@pytest.mark.parametrize("name", ["cartpole", "humanoid", "g1"])
def test_tasks_that_have_counterparts_are_taken(name):
    model = task_model(name)
    told = layout.describe(model)
    assert len(told.dofs) == model.nv - 6 * told.floating and told.floating == (name != "cartpole")
    assert (told.ground is None, len(told.geoms) > 0) == ((True, False) if name == "cartpole" else (False, True))


def edited(old, new):
    xml = ARM.replace(old, new)
    assert xml != ARM
    return xml


BALL = '<joint name="wrist" type="slide" axis="0 0 1" damping="0.2"/>'


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (BALL, '<joint name="wrist" type="ball"/>', "joint 'wrist'"),
        ("damping=\"0.2\"", 'stiffness="1"', "joint 'wrist' has a spring"),
        ("damping=\"0.2\"", 'frictionloss="1"', "joint 'wrist' has a spring or friction"),
        ("damping=\"0.2\"", 'ref="1"', "joint 'wrist' has a reference of 1"),
        ("<worldbody>", '<worldbody><body name="other"><geom size="1"/></body>', "one root body, got other, upper"),
        ('<motor name="shoulder"', '<velocity name="shoulder"', "actuator 'shoulder' is neither"),
        ('<motor name="shoulder"', '<motor name="twin" joint="elbow"/><motor name="shoulder"', "'elbow' has two"),
        ("<sensor>", '<equality><joint joint1="elbow" joint2="wrist"/></equality><sensor>', "equality constraints"),
        ("<worldbody>", '<worldbody><geom name="wall" type="box" size="1 1 1"/>', "'wall' stands in the world"),
        ("<worldbody>", '<worldbody><geom name="floor" type="plane" size="1 1 1" pos="0 0 1"/>', "level and at"),
    ],
)  # fmt: skip
def test_what_isaac_gym_cannot_simulate_is_refused_by_name(old, new, words):
    xml = edited(old, new)
    if "ball" in new:  # which has no position that is one number
        xml = re.sub(r"<joint(pos|vel) name=\"wrist[^>]*>", "", xml)
    if "wall" in new or "floor" in new:  # something must touch it
        xml = xml.replace('size="0.05" contype="0" conaffinity="0"/></body>', 'size="0.05"/></body>')
    with pytest.raises(InputError, match=re.escape(words)) as error:
        layout.describe(arm(xml))
    assert "--physics isaacgym" in str(error.value) and "\n" not in str(error.value)
