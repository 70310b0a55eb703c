"""What Isaac Gym is told of a model and what its tensors mean, against MuJoCo's own numbers and hand arithmetic."""

import ast
import itertools
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

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


class Uses(ast.NodeVisitor):
    """What the server names of Isaac Gym, as `found`: (owner, name, call or None).

    An owner is gym, gymapi or gymtorch, or the class of gymapi that a local variable was made of; attributes of a
    structure that is a field of another are owned by its class.
    """

    def __init__(self, fields):
        self.fields, self.found = fields, []
        self.classes: dict[str, str] = {}

    def owner(self, node):
        """The owner of the attributes of an expression, or None."""
        path = ast.unparse(node).removeprefix("self.")
        if path in ("gym", "gymapi", "gymtorch"):
            return path
        if isinstance(node, ast.Name):
            return self.classes.get(node.id)
        if isinstance(node, ast.Attribute) and (above := self.owner(node.value)) in self.fields:
            return self.fields[above].get(node.attr)
        return None

    def visit_FunctionDef(self, node):
        self.classes = {}
        self.generic_visit(node)

    def visit_Assign(self, node):
        self.generic_visit(node)
        made = node.value
        if (
            isinstance(made, ast.Call)
            and isinstance(made.func, ast.Attribute)
            and self.owner(made.func.value) == "gymapi"
        ):
            self.classes.update({t.id: made.func.attr for t in node.targets if isinstance(t, ast.Name)})

    def visit_Call(self, node):
        if isinstance(node.func, ast.Attribute) and (owner := self.owner(node.func.value)) is not None:
            self.found.append((owner, node.func.attr, node))
            for child in (node.func.value, *node.args, *node.keywords):
                self.visit(child)
        else:
            self.generic_visit(node)

    def visit_Attribute(self, node):
        if (owner := self.owner(node.value)) is not None:
            self.found.append((owner, node.attr, None))
        self.generic_visit(node)


def fits(call, function):
    """Whether a function of the stand-in takes the arguments of a call."""
    names = [a.arg for a in function.args.args if a.arg != "self"]
    given = len(call.args) + len(call.keywords)
    needed = len(names) - len(function.args.defaults)
    keywords = {k.arg for k in call.keywords}
    starred = any(isinstance(a, ast.Starred) for a in call.args)
    return starred or (needed <= given <= len(names) and keywords <= set(names[len(call.args) :]))


def lacking(server: str) -> list[str]:
    """What a server names of Isaac Gym that the stand-in has not, or has with other parameters."""
    tree, torch_side = standin(), ast.parse((STANDIN / "gymtorch.py").read_text())
    fields: dict[str, dict[str, str | None]] = {}
    for name, node in classes(tree).items():
        assignment = next((n for n in inside(node, ast.Assign) if n.targets[0].id == "fields"), None)
        if assignment is not None and not name.startswith("_"):
            pairs = zip(assignment.value.keys, assignment.value.values, strict=True)
            fields[name] = {key.value: getattr(value, "id", None) for key, value in pairs}
        elif name in ("Vec3", "Quat", "Transform"):  # which have the fields that they are made with
            fields[name] = {a.arg: None for a in methods(node)["__init__"].args.args[1:]}
    members = {n.targets[0].id for node in classes(tree).values() for n in inside(node, ast.Assign)}
    functions = {
        "gym": methods(classes(tree)["Gym"]),
        "gymapi": methods(tree) | {name: methods(node).get("__init__") for name, node in classes(tree).items()},
        "gymtorch": methods(torch_side),
    }
    uses = Uses(fields)
    uses.visit(ast.parse(server))
    assert len(uses.found) > 100, "the server names little of Isaac Gym: this test reads it wrong"
    missing = []
    for owner, name, call in uses.found:
        if owner in fields:
            known = call is None and name in fields[owner]
        elif call is None:
            known = name in functions.get(owner, {}) or (owner == "gymapi" and name in members)
        else:
            function = functions.get(owner, {}).get(name)
            known = name in functions.get(owner, {}) and (function is None or fits(call, function))
        if not known:
            missing.append(f"{owner}.{name}")
    return missing


def test_the_server_uses_nothing_that_the_standin_lacks():
    """Else a call would go unchecked."""
    assert lacking(SERVER.read_text()) == []


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("gym.simulate(sim)", "gym.step_graphics(sim)", "gym.step_graphics"),
        ("gym.simulate(sim)", "gym.simulate(sim, 1)", "gym.simulate"),
        ("gym.fetch_results(sim, True)", "gym.fetch_results(sim)", "gym.fetch_results"),
        ("self.gym.prepare_sim(self.sim)", "self.gym.prepare_sim(simulation=self.sim)", "gym.prepare_sim"),
        ("self.gymapi.DOMAIN_SIM", "self.gymapi.DOMAIN_WORLD", "gymapi.DOMAIN_WORLD"),
        ("self.gymapi.Mat33()", "self.gymapi.Mat44()", "gymapi.Mat44"),
        ("self.gymtorch.wrap_tensor", "self.gymtorch.wrap", "gymtorch.wrap"),
        ("params.physx.rest_offset", "params.physx.rest", "PhysXParams.rest"),
        ("params.substeps", "params.sub_steps", "SimParams.sub_steps"),
        ("options.armature", "options.armatures", "AssetOptions.armatures"),
        ("plane.distance", "plane.height", "PlaneParams.height"),
    ],
)
def test_what_the_standin_lacked_would_be_told(old, new, told):
    source = SERVER.read_text()
    assert old in source
    assert told in lacking(source.replace(old, new))


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
def test_the_asset_is_the_same_mechanism(make, monkeypatch):
    # Links between the joints of a body take next to nothing of it here, so that all else can be compared closely.
    monkeypatch.setattr(layout, "LINK_SHARE", 1e-9)
    model = make()
    told = layout.describe(model)
    asset = mujoco.MjModel.from_xml_string(told.xml)
    tolerance = 1e-6 if make is humanoid else 1e-9
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
        np.testing.assert_allclose(masses[1] + np.diag(model.dof_armature), masses[0], atol=tolerance)
        np.testing.assert_allclose(twin.qfrc_bias, data.qfrc_bias, atol=tolerance)


def with_servos(model):
    """The asset of a model in MuJoCo, with its floor, armatures and servos as Isaac Gym is told of them."""
    told = layout.describe(model)
    root = ElementTree.fromstring(told.xml)
    ElementTree.SubElement(root, "option", timestep=str(model.opt.timestep), integrator="implicitfast")
    for geom in root.iter("geom"):
        geom.set("contype", "0")
    plane = {"type": "plane", "size": "0 0 1", "conaffinity": "0", "friction": str(told.ground)}
    [world] = root.iter("worldbody")
    ElementTree.SubElement(world, "geom", plane)
    actuators, armature = ElementTree.SubElement(root, "actuator"), {}
    for name, drive in zip(told.dofs, layout.drives(model, layout.actuator_table(model), {}), strict=True):
        gains = {"kp": str(drive.stiffness), "kv": str(drive.damping), "forcerange": f"{-drive.effort} {drive.effort}"}
        ElementTree.SubElement(actuators, "position", {"joint": name, **gains})
        armature[name] = str(drive.armature)
    for joint in root.iter("joint"):
        joint.set("armature", armature[joint.attrib["name"]])
    return mujoco.MjModel.from_xml_string(ElementTree.tostring(root, encoding="unicode"))


def test_links_between_the_joints_of_a_body_hardly_change_how_it_moves():
    model = humanoid()
    twin, generator = with_servos(model), np.random.default_rng(0)
    assert twin.nbody == model.nbody + 10 and twin.body_mass.sum() == pytest.approx(model.body_mass.sum(), abs=1e-9)
    worst, way = [], []
    for _ in range(5):
        phase, rate = generator.uniform(0, 2 * np.pi, model.nu), 2 * np.pi * generator.uniform(0.3, 1.5, model.nu)
        states = []
        for each in (model, twin):
            data = mujoco.MjData(each)
            data.qpos[:] = model.key("stand").qpos
            for i in range(200):
                data.ctrl[:] = model.key("stand").ctrl + 0.1 * np.sin(rate * 0.005 * i + phase)
                mujoco.mj_step(each, data)
            states.append(data.qpos[7:].copy())
        worst.append(np.abs(states[1] - states[0]).max())
        way.append(np.abs(states[0] - model.key("stand").qpos[7:]).max())
    assert max(worst) < 2e-3 and min(way) > 0.05


def test_bodies_at_joints_of_zero_have_all_of_their_mass_where_it_was():
    model, asset = humanoid(), mujoco.MjModel.from_xml_string(layout.describe(humanoid()).xml)
    masses = np.zeros((2, model.nv, model.nv))
    for each, found in zip((model, asset), masses, strict=True):
        data = mujoco.MjData(each)
        data.qpos[:] = 0.0
        data.qpos[3] = 1.0
        mujoco.mj_forward(each, data)
        mujoco.mj_fullM(each, data, found)
    # Of all as one body, which the joints that are the first of their bodies move as they did.
    first = [*range(6), *(int(model.jnt_dofadr[model.body_jntadr[b]]) for b in range(2, model.nbody))]
    np.testing.assert_allclose(masses[1][:6, first], masses[0][:6, first], atol=1e-12)
    assert np.abs(masses[1] - masses[0]).max() > 1e-5  # as the others do not


TWIN_NAMES = """
<mujoco>
  <worldbody>
    <body name="a_link"><inertial pos="0 0 0" mass="2" diaginertia="1 1 1"/>
      <joint name="a" axis="1 0 0"/><joint name="a_link_" axis="0 1 0"/><joint name="b" axis="0 0 1"/>
      <body name="fixed_base_"><inertial pos="0 0 0" mass="3" diaginertia="1 1 1"/><joint name="c"/></body>
    </body>
  </worldbody>
</mujoco>
"""


def test_names_of_links_are_of_no_body():
    told = layout.describe(arm(TWIN_NAMES))
    assert told.bodies == ("fixed_base", "a_link_", "a_link__link", "a_link", "fixed_base_")
    assert told.dofs == ("a", "a_link_", "b", "c")
    assert told.body_ids == (-1, -1, -1, 1, 2) and told.mass_ids == (-1, 1, 1, 1, 2)


def test_masses_of_a_body_are_shared_with_its_links():
    model, generator = humanoid(), np.random.default_rng(0)
    told = layout.describe(model)
    factors = [generator.uniform(0.5, 2.0, (3, *shape)) for shape in ((13,), (13, 1))]
    mass, inertia = model.body_mass * factors[0], model.body_inertia * factors[1]
    centre = model.body_ipos + 0.1 * generator.standard_normal((3, 13, 3))
    found = layout.body_masses(model, told, mass, inertia, centre)
    assert found.keys() == set(told.bodies)
    torso = [found[name] for name in ("waist_yaw_link", "waist_roll_link", "torso")]
    b = model.body("torso").id
    np.testing.assert_allclose(sum(rows[:, 0] for rows in torso), mass[:, b])
    # Its axes are those of its frame.
    whole = np.sum([rows[:, 4:] for rows in torso], axis=0).reshape(3, 3, 3)
    np.testing.assert_allclose(whole, [np.diag(row) for row in inertia[:, b]], atol=1e-12)
    for rows in torso:
        np.testing.assert_allclose(rows[:, 1:4], centre[:, b])
        np.testing.assert_allclose(rows[:, 4], rows[:, 0] / mass[:, b] * inertia[:, b, 0])
    alike = layout.body_masses(model, told, *(np.stack([x[0]] * 3) for x in (mass, inertia, centre)))
    assert all(rows.shape == (1, 13) for rows in alike.values())
    assert all(rows.shape == (3, 13) for rows in found.values())


def test_inertia_is_told_in_the_axes_of_the_frame():
    model = arm('<mujoco><worldbody><body><joint/><inertial pos="0 0 0" mass="1" quat="0.5 0.5 0.5 0.5" '
                'diaginertia="3 2 1.5"/></body></worldbody></mujoco>')  # fmt: skip
    rows = lambda x: np.array(x)[None]  # noqa: E731
    [told] = layout.body_masses(
        model, layout.describe(model), rows(model.body_mass), rows(model.body_inertia), rows(model.body_ipos)
    ).values()
    # This quaternion turns x to y, y to z and z to x.
    np.testing.assert_allclose(told[0, 4:].reshape(3, 3), np.diag([1.5, 3, 2]), atol=1e-12)


def task_model(name):
    if name in ("g1", "h1"):
        from tasks.unitree.body import PACKAGE, unitree_model

        try:
            return unitree_model(name)
        except InputError:
            pytest.skip(f"needs the package {PACKAGE}")
    return {"cartpole": lambda: arm(CARTPOLE), "humanoid": humanoid, "humanoid_run": motor_model, "ant": ant}[name]()


@pytest.mark.parametrize("name", ["cartpole", "humanoid", "g1"])
def test_tasks_that_have_counterparts_are_taken(name):
    model = task_model(name)
    told = layout.describe(model)
    assert len(told.dofs) == model.nv - 6 * told.floating and told.floating == (name != "cartpole")
    assert (told.ground is None, len(told.geoms) > 0) == ((True, False) if name == "cartpole" else (False, True))


def test_the_mechanism_of_h1_is_taken():
    told = layout.describe(task_model("h1"))
    assert told.floating and len(told.dofs) == 19 and len(told.geoms) == 6 and not told.self_collision


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
        ("damping=\"0.2\"", 'damping="0.2 0.1"', "joint 'wrist' has damping that is not linear"),
        ("damping=\"0.2\"", 'stiffness="0 1"', "joint 'wrist' has a spring"),
        ('name="hand"', 'name="hand" gravcomp="1"', "body 'hand' has a gravcomp of 1"),
        ("<worldbody>", '<option density="1.2"/><worldbody>', "option density is 1.2"),
        ("<worldbody>", '<option viscosity="0.1"/><worldbody>', "option viscosity is 0.1"),
        ("<worldbody>", '<option actuatorgroupdisable="0"/><worldbody>', "option disableactuator is 1"),
        ('forcerange="-4 4"', 'forcerange="-4 5"', "servo 'elbow' has limits of force that differ by direction"),
        ('axis="0 1 0" range', 'axis="0 1 0" actuatorfrcrange="-1 2" range', "servo 'elbow' has limits of force"),
        ('name="shoulder" joint', 'name="shoulder" damping="1" joint', "actuator 'shoulder' has damping"),
        ('name="shoulder" joint', 'name="shoulder" armature="1" joint', "actuator 'shoulder' has armature"),
        ('name="shoulder" joint', 'name="shoulder" delay="0.01" nsample="5" joint', "actuator 'shoulder' has delay"),
        ("<worldbody>", '<worldbody><geom name="floor" type="plane" size="1 1 1" pos="0 0 1"/>', "level and at"),
    ],
)  # fmt: skip
def test_what_isaac_gym_cannot_simulate_is_refused_by_name(old, new, words):
    xml = edited(old, new)
    if "ball" in new:  # which has no position that is one number
        xml = re.sub(r"<joint(pos|vel) name=\"wrist[^>]*>", "", xml)
    if "floor" in new:  # something must touch it
        xml = xml.replace('size="0.05" contype="0" conaffinity="0"/></body>', 'size="0.05"/></body>')
    with pytest.raises(InputError, match=re.escape(words)) as error:
        layout.describe(arm(xml))
    assert "--physics isaacgym" in str(error.value) and "\n" not in str(error.value)


def test_servos_with_negative_gains_are_refused_by_name():
    model = arm()
    bias = model.actuator_biasprm.copy()
    bias[0, 2] = 3.0
    with pytest.raises(InputError, match="servo 'elbow' has a negative gain"):
        layout.drives(model, layout.actuator_table(model), {"actuator_biasprm": bias})


def test_every_flag_of_mujoco_is_decided():
    refused = []
    for kind, prefix, field in (
        (mujoco.mjtDisableBit, "mjDSBL_", "disableflags"),
        (mujoco.mjtEnableBit, "mjENBL_", "enableflags"),
    ):
        flags = {name.removeprefix(prefix): int(bit) for name, bit in kind.__members__.items() if prefix in name}
        assert len(flags) > 7
        for name, bit in flags.items():
            model = arm()
            setattr(model.opt, field, bit)
            try:
                layout.describe(model)
            except InputError as error:
                assert f"ables {name.lower()} (" in str(error)
                refused.append(name)
    assert refused == ["DAMPER", "GRAVITY", "ACTUATION", "SENSOR", "OVERRIDE"]


def test_flags_that_are_followed():
    model = arm()
    assert 'range="' in layout.describe(model).xml
    assert np.isfinite(layout.actuator_table(model).upper).any()
    for flag in ("LIMIT", "CONSTRAINT"):
        model.opt.disableflags = int(getattr(mujoco.mjtDisableBit, f"mjDSBL_{flag}"))
        assert 'range="' not in layout.describe(model).xml
    model.opt.disableflags = int(mujoco.mjtDisableBit.mjDSBL_CLAMPCTRL)
    assert np.isinf(layout.actuator_table(model).upper).all()
    ant_model = ant()
    for flag in ("CONTACT", "CONSTRAINT"):
        ant_model.opt.disableflags = int(getattr(mujoco.mjtDisableBit, f"mjDSBL_{flag}"))
        told = layout.describe(ant_model)
        assert told.geoms == () and told.ground is None


def test_limits_of_a_joint_and_of_its_actuator_count_both():
    model = arm(edited('axis="0 1 0" range', 'axis="0 1 0" actuatorfrcrange="-6 6" range').replace(
        '<joint name="shoulder"', '<joint name="shoulder" actuatorfrcrange="-3 2"'
    ))  # fmt: skip
    table = layout.actuator_table(model)
    low, high = layout.force_limits(model, table, model.actuator_forcerange)
    # The elbow's servo gives 4 times its gear of 3, and its joint takes 6; the shoulder's motor has a gear of 5.
    np.testing.assert_allclose([low, high], [[-2.0, -0.6], [2.0, 0.4]])
    assert layout.drives(model, table, {})[1].effort == pytest.approx(6.0)
    data, as_tensor = mujoco.MjData(model), lambda x: torch.tensor(np.array(x))[None]
    for ctrl in ([-0.9, -1.0], [0.9, 1.0], [0.05, 0.05]):
        data.ctrl[:] = ctrl
        mujoco.mj_forward(model, data)
        gain = torch.tensor(model.actuator_gainprm[:, 0])
        _, efforts = layout.commands(table, as_tensor(ctrl), gain, torch.tensor(low), torch.tensor(high), 3)
        assert float(efforts[0, 0]) == pytest.approx(data.qfrc_actuator[0])


# --- Contacts -----------------------------------------------------------------------------------------------

# Big balls, all of which overlap, on a torso, on arms of one, two and no joints, and on hands.
BALLS = """
<mujoco>
  <default><geom type="sphere" size="1"/></default>
  <worldbody>
    <geom name="floor" type="plane" size="5 5 1"/>
    <body name="torso"><freejoint/><geom name="torso"/>
      <body name="left"><joint axis="1 0 0"/><geom name="left"/>
        <body name="palm"><geom name="palm"/>
          <body name="finger"><joint axis="1 0 0"/><geom name="finger"/></body></body></body>
      <body name="right"><joint axis="1 0 0"/><joint axis="0 1 0"/><geom name="right" {right}/></body>
      <body name="pack"><geom name="pack"/></body>
      <body name="lamp"><geom name="lamp"/></body>
    </body>
  </worldbody>
  <contact>{contact}</contact>
</mujoco>
"""
# Which shapes PhysX never brings together: those of linked bodies.
LINKED = [("torso", "left"), ("left", "palm"), ("palm", "finger"), ("torso", "pack"), ("torso", "lamp")]


@pytest.mark.parametrize(
    ("contact", "right"),
    [
        ("", ""),
        ('<exclude body1="finger" body2="torso"/><exclude body1="right" body2="pack"/>', ""),
        ('<exclude body1="left" body2="right"/>', 'contype="2" conaffinity="1"'),
        ("", 'contype="0" conaffinity="1"'),
    ],
)
def test_filters_let_those_shapes_touch_that_mujoco_does(contact, right):
    model = arm(BALLS.format(contact=contact, right=right))
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    names = lambda *geoms: frozenset(model.geom(g).name for g in geoms)  # noqa: E731
    expected = {pair for c in data.contact if "floor" not in (pair := names(c.geom1, c.geom2))}
    told = layout.describe(model)
    found = {
        names(a, b)
        for (a, f), (b, g) in itertools.combinations(zip(told.geoms, told.filters, strict=True), 2)
        if not f & g and not any(names(a, b) == set(pair) for pair in LINKED)
    }
    assert told.self_collision and len(expected) > 3
    assert found == expected
    # Welded siblings, a body and one beyond a chain: PhysX would let these touch without filters.
    for apart in (("pack", "lamp"), ("torso", "right")):
        assert frozenset(apart) not in found


@pytest.mark.parametrize("joints", [1, 2])
def test_a_body_that_hangs_on_several_joints_is_kept_from_its_parent(joints):
    chain = "".join(f'<joint axis="{axis}"/>' for axis in ("1 0 0", "0 1 0")[:joints])
    xml = f"""<mujoco><default><geom type="sphere" size="1"/></default><worldbody><body name="a"><freejoint/><geom/>
      <body name="b">{chain}<geom/><body name="c"><joint/><geom/><body name="d"><joint/><geom/>
      </body></body></body></body></worldbody></mujoco>"""
    a, b, c, d = layout.describe(arm(xml)).filters
    # PhysX keeps bodies that one joint links apart by itself.
    assert not (a & c or a & d or b & d) and bool(a & b) == (joints == 2)


def test_filters_of_any_pattern():
    generator = np.random.default_rng(0)
    for size, share in itertools.product((2, 5, 9), (0.1, 0.5, 0.9)):
        shapes = list(range(10, 10 + size))
        pairs = list(itertools.combinations(shapes, 2))
        kinds = dict(zip(pairs, generator.random(len(pairs)), strict=True))
        together = {pair for pair in pairs if kinds[pair] < share}
        needless = {pair for pair in pairs if kinds[pair] > 0.95}
        found = dict(zip(shapes, layout._filters(shapes, together, needless), strict=True))
        for a, b in pairs:
            if (a, b) not in needless:
                assert bool(found[a] & found[b]) == ((a, b) not in together)
    # All touch, or none: no filter, or one.
    assert layout._filters([1, 2, 3], {(1, 2), (1, 3), (2, 3)}, set()) == [0, 0, 0]
    assert layout._filters([1, 2, 3], set(), set()) == [1, 1, 1]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('name="left"/>', 'name="left" condim="4"/>', "'left' touch with a condim of 4, not 3"),
        ('size="1"/></default>', 'size="1" condim="1"/></default>', "touch with a condim of 1, not 3"),
        ('name="left"/>', 'name="left" priority="1"/>', "'left' touch, and their priorities differ"),
        ('name="left"/>', 'name="left" adhesion="1"/>', "'left' has adhesion"),
        ('name="left"/>', 'name="left" surfacevel="1 0 0 0 0 0"/>', "'left' has adhesion or a velocity"),
        ('name="left"/>', 'name="left" type="ellipsoid" size="1 1 1"/>', "'left' is a ellipsoid"),
        ('name="finger"/>', 'name="finger" contype="3"/>', "'right' touches other geoms but not the floor"),
        ("<worldbody>", '<option><flag filterparent="disable"/></option><worldbody>', "of bodies that a joint links"),
        ("<worldbody>", '<worldbody><geom name="wall" type="box" size="1 1 1"/>', "'wall' stands in the world"),
    ],
)
def test_contacts_that_isaac_gym_cannot_make_are_refused_by_name(old, new, words):
    right = 'contype="2" conaffinity="2"' if "floor" in words else ""
    xml = BALLS.format(contact="", right=right).replace(old, new)
    assert old in BALLS
    with pytest.raises(InputError, match=re.escape(words)) as error:
        layout.describe(arm(xml))
    assert "--physics isaacgym" in str(error.value) and "\n" not in str(error.value)


def test_geoms_that_touch_nothing_may_be_anything():
    xml = BALLS.format(contact="", right="").replace(
        'name="left"/>',
        'name="left"/><geom type="ellipsoid" size="1 1 1" condim="1" priority="1" contype="0" conaffinity="0"/>',
    )
    assert layout.describe(arm(xml)) is not None and len(layout.describe(arm(xml)).geoms) == 7


def test_patterns_that_need_too_many_filters_are_refused():
    # Of 2 n balls in n pairs each touches all but the other of its pair, which takes a bit a pair.
    balls = "".join(
        f'<body name="{k}_{i}"><joint/><joint axis="1 0 0"/><geom/></body>' for i in range(32) for k in ("a", "b")
    )
    excludes = "".join(f'<exclude body1="a_{i}" body2="b_{i}"/>' for i in range(32))
    xml = f"""<mujoco><default><geom type="sphere" size="1"/></default><worldbody><body name="root"><freejoint/>
      <inertial pos="0 0 0" mass="1" diaginertia="1 1 1"/>{balls}</body></worldbody><contact>{{}}</contact></mujoco>"""
    with pytest.raises(InputError, match="cannot be told with 31 filters"):
        layout.describe(arm(xml.format(excludes)))
    fewer = excludes.replace('<exclude body1="a_31" body2="b_31"/>', "")
    assert max(layout.describe(arm(xml.format(fewer))).filters) < 2**31
