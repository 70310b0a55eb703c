"""Mirror maps: each is its own inverse, names are read right, and what was mirrored moves as a mirror image."""

from pathlib import Path

import gymnasium
import mujoco
import pytest
import torch

from rlcore import random, rotations, tree
from rlcore.env import EnvSpec
from rlcore.errors import InputError
from rlcore.jit import jit
from rlcore.physics.engine import ModelInfo
from rlcore.physics.mujoco import MujocoEngine
from rlcore.symmetry import (
    SignedPermutation,
    Symmetry,
    apply,
    axis_signs,
    check_symmetry,
    concatenate,
    make_symmetry,
    mirror_action,
    mirror_coordinates,
    mirror_joints,
    mirror_observation,
    mirror_state,
)

LEG = ("hip_pitch", "hip_roll", "hip_yaw", "knee", "ankle_pitch", "ankle_roll")
ARM = ("shoulder_pitch", "shoulder_roll", "shoulder_yaw", "elbow", "wrist_roll", "wrist_pitch", "wrist_yaw")
# The Unitree G1 with 29 joints, in the order of its model.
G1 = (
    *(f"{side}_{joint}_joint" for side in ("left", "right") for joint in LEG),
    *(f"waist_{axis}_joint" for axis in ("yaw", "roll", "pitch")),
    *(f"{side}_{joint}_joint" for side in ("left", "right") for joint in ARM),
)


def described(mirror, names):
    """`{name: (the name it comes from, sign)}`."""
    columns = zip(names, mirror.permutation.tolist(), mirror.sign.tolist(), strict=True)
    return {name: (names[place], sign) for name, place, sign in columns}


def assert_involution(mirror):
    x = random.normal(random.key(0), (5, len(mirror.sign)), torch.float64)
    assert torch.equal(apply(mirror, apply(mirror, x)), x)


def spec(parts, joints=("left_hip_roll", "right_hip_roll", "waist_pitch"), low=None, high=None, actions=None):
    """A description of an environment with groups of parts, of a robot with some joints, each with its actuator."""
    n = len(joints)
    model = ModelInfo(
        nq=n, nv=n, na=0, nu=n, nsensor=0, timestep=1.0, bodies=("world",), geoms=(), joints=(),
        actuators=tuple(f"{joint}_motor" for joint in joints), actuator_joints=joints,
        ctrl_lower=(-1.0,) * n, ctrl_upper=(1.0,) * n, sensors={}, keyframes={},
    )  # fmt: skip
    return EnvSpec(
        name="robot",
        observations={group: tuple(sizes.items()) for group, sizes in parts.items()},
        actions=actions or model.actuators,
        action_low=low or model.ctrl_lower,
        action_high=high or model.ctrl_upper,
        control_dt=1.0,
        substeps=1,
        terms=(),
        model=model,
    )


# --- Joints ---


def test_a_humanoid_of_29_joints_is_mirrored_by_its_names():
    mirror = mirror_joints(G1)
    found = described(mirror, G1)
    assert found["left_hip_roll_joint"] == ("right_hip_roll_joint", -1)
    assert found["right_shoulder_yaw_joint"] == ("left_shoulder_yaw_joint", -1)
    assert found["left_knee_joint"] == ("right_knee_joint", 1)
    assert found["right_wrist_pitch_joint"] == ("left_wrist_pitch_joint", 1)
    assert found["waist_yaw_joint"] == ("waist_yaw_joint", -1)
    assert found["waist_pitch_joint"] == ("waist_pitch_joint", 1)
    # Two of six joints in a leg turn about other axes than the lateral one less one: roll twice, yaw once; of seven in
    # an arm roll and yaw twice each; of three in the waist two.
    assert int((mirror.sign < 0).sum()) == 2 * 3 + 2 * 4 + 2
    assert_involution(mirror)


@pytest.mark.parametrize(
    ("names", "sides"),
    [
        (("left_hip_roll", "right_hip_roll", "head_yaw"), None),
        (("hip_roll_left", "hip_roll_right", "head_yaw"), None),
        (("Left_Hip_Roll", "Right_Hip_Roll", "AAHead_yaw"), None),
        (("LeftHipRoll", "RightHipRoll", "HeadYaw"), None),
        (("leftHipRoll", "rightHipRoll", "headYaw"), None),
        (("l_hip_roll", "r_hip_roll", "head_yaw"), (("l", "r"),)),
        (("l_hip_roll", "r_hip_roll", "head_yaw"), (("l_", "r_"),)),
        (("hip_roll_l", "hip_roll_r", "head_yaw"), (("_l", "_r"),)),
        (("LHipRoll", "RHipRoll", "LumbarYaw"), (("L", "R"),)),
        (("L_hip_roll", "R_hip_roll", "yaw_of_relay"), (("L", "R"),)),
        (("upright_left_roll", "upright_right_roll", "upright_yaw"), None),
    ],
)
def test_sides_are_words_of_a_name(names, sides):
    mirror = mirror_joints(names) if sides is None else mirror_joints(names, sides=sides)
    assert mirror.permutation.tolist() == [1, 0, 2] and mirror.sign.tolist() == [-1, -1, -1]


def test_four_legs():
    legs = ("FL", "FR", "RL", "RR")
    names = tuple(f"{leg}_{joint}_joint" for leg in legs for joint in ("hip", "thigh", "calf"))
    abduction = {f"{leg}_hip_joint": -1 for leg in legs}
    found = described(mirror_joints(names, sides=(("FL_", "FR_"), ("RL_", "RR_")), signs=abduction), names)
    assert found["FL_hip_joint"] == ("FR_hip_joint", -1) and found["RR_calf_joint"] == ("RL_calf_joint", 1)


def test_given_signs_hold_for_both_sides_and_over_names():
    names = ("left_hip_roll", "right_hip_roll", "torso")
    mirror = mirror_joints(names, signs={"right_hip_roll": 1, "torso": -1})
    assert mirror.sign.tolist() == [1, 1, -1]


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (("left_knee", "right_kne"), {}, r"nobody across: left_knee \(no right_knee\), right_kne \(no left_kne\)"),
        (("left_hip", "right_hip", "torso"), {}, "do not tell .* left_hip, right_hip, torso; give their signs"),
        (("roll_pitch", "waist_yaw"), {}, "do not tell .*: roll_pitch;"),
        (("l_knee", "r_knee", "waist_yaw"), {}, "look like one side of a pair: l_knee, r_knee; give their words"),
        (("FL_knee", "FR_knee"), {"sides": (("L", "R"),)}, "look like one side of a pair: FL_knee, FR_knee"),
        (("leftknee", "rightknee"), {}, "look like one side of a pair: leftknee, rightknee"),
        (("waist_yaw", "waist_yaw"), {}, "more than once: waist_yaw"),
        (("waist_yaw",), {"signs": {"waist": 1}}, "must name joints of waist_yaw; got waist"),
        (("waist_yaw",), {"signs": {"waist_yaw": 0.5}}, "must be 1 or -1, got waist_yaw: 0.5"),
        (("left_x", "right_x"), {"signs": {"left_x": 1, "right_x": -1}}, "must be equal, .* left_x, right_x"),
        (("waist_yaw",), {"sides": (("_", "r"),)}, r"pairs of different words, got \('', 'r'\)"),
        (("waist_yaw",), {"sides": (("l_", "_l"),)}, r"pairs of different words, got \('l', 'l'\)"),
    ],
)
def test_names_that_do_not_say_it_are_refused(names, options, message):
    with pytest.raises(InputError, match=message):
        mirror_joints(names, **options)


def test_signs_from_axes_by_hand():
    names = ("left_a", "right_a", "left_b", "right_b", "left_c", "right_c", "middle", "rail")
    x, y, z = torch.eye(3).double().unbind(0)
    # The same axis on both sides, then axes that are mirrored already, then lateral ones of opposite directions.
    axes = torch.stack([x, x, z, -z, y, -y, y, y])
    signs = axis_signs(names, axes, kinds={"rail": "slide"})
    assert signs == {
        "left_a": -1, "right_a": -1, "left_b": 1, "right_b": 1, "left_c": -1, "right_c": -1, "middle": 1, "rail": -1,
    }  # fmt: skip
    with pytest.raises(InputError, match="mirror images of those across; not so for left_a, right_a"):
        axis_signs(("left_a", "right_a"), torch.stack([x, y]))
    with pytest.raises(InputError, match="not so for middle"):
        axis_signs(("middle",), 2 * y.unsqueeze(0))
    with pytest.raises(InputError, match=r"axes must be \[2, 3\], one for each joint, got \[3, 3\]"):
        axis_signs(("left_a", "right_a"), torch.eye(3))


# --- Vectors ---


def kinds(**parts):
    """The map of an observation with one part of each of some kinds."""
    described = spec({"policy": parts})
    return mirror_observation(described, "policy", {kind: kind for kind in parts})


def test_kinds_by_hand():
    def image(kind, *values):
        return apply(kinds(**{kind: len(values)}), torch.tensor(values, dtype=torch.float64)).tolist()

    assert image("scalar", 1, 2) == [1, 2]
    assert image("polar", 1, 2, 3) == [1, -2, 3]
    assert image("axial", 1, 2, 3) == [-1, 2, -3]
    assert image("command", 1, 2, 3) == [1, -2, -3]
    assert image("phase", 0.6, 0.8) == [-0.6, -0.8]
    assert image("feet", 1, 2, 3, 4) == [3, 4, 1, 2]
    assert image("feet_polar", 1, 2, 3, 4, 5, 6) == [4, -5, 6, 1, -2, 3]
    assert image("feet_axial", 1, 2, 3, 4, 5, 6) == [-4, 5, -6, -1, 2, -3]
    # Left and right hip roll, then waist pitch.
    assert image("joints", 1, 2, 3) == [-2, -1, 3]
    assert image("action", 1, 2, 3) == [-2, -1, 3]
    # Longer parts are several of these, one after the other.
    assert image("polar", 1, 2, 3, 4, 5, 6) == [1, -2, 3, 4, -5, 6]
    assert image("joints", 1, 2, 3, 4, 5, 6) == [-2, -1, 3, -5, -4, 6]


def test_every_map_is_its_own_inverse():
    mirror = kinds(
        scalar=2, polar=6, axial=3, command=3, phase=2, feet=4, feet_polar=12, feet_axial=6, joints=6, action=3
    )
    assert_involution(mirror)


def draw(i, *shape):
    return random.normal(random.key(i), shape, torch.float64)


def test_vectors_are_mirrored_as_geometry_has_it():
    polar, axial = kinds(polar=3), kinds(axial=3)
    a, b = draw(0, 16, 3), draw(1, 16, 3)
    # A cross product of two vectors is a vector of rotation.
    expected = torch.linalg.cross(apply(polar, a), apply(polar, b))
    torch.testing.assert_close(apply(axial, torch.linalg.cross(a, b)), expected)
    # A quaternion's vector is one too: a mirrored attitude turns mirrored vectors.
    quaternion = concatenate([kinds(scalar=1), axial])
    q = rotations.from_rotation_vector(draw(2, 16, 3))
    image = apply(quaternion, q)
    torch.testing.assert_close(rotations.rotate(image, apply(polar, a)), apply(polar, rotations.rotate(q, a)))
    gravity = apply(polar, rotations.projected_gravity(q))
    torch.testing.assert_close(rotations.projected_gravity(image), gravity)
    # Half a gait later, sine and cosine have changed their signs.
    phase = draw(3, 16)
    clock = lambda t: torch.stack([torch.sin(t), torch.cos(t)], -1)  # noqa: E731
    torch.testing.assert_close(apply(kinds(phase=2), clock(phase)), clock(phase + torch.pi))


def test_apply_is_the_same_mapped_recorded_and_alone():
    mirror = mirror_joints(G1)
    for dtype in (torch.float32, torch.float64):
        x = random.normal(random.key(1), (7, len(G1)), dtype)
        expected = torch.stack([apply(mirror, row) for row in x])
        assert expected.dtype == dtype
        # By hand, from the definition.
        assert torch.equal(expected, x[:, mirror.permutation] * mirror.sign.to(dtype))
        for mapped in (apply(mirror, x), torch.func.vmap(lambda row: apply(mirror, row))(x)):
            assert torch.equal(mapped, expected)
        recorded = jit(lambda x: apply(mirror, x))
        assert torch.equal(recorded(x), expected) and torch.equal(recorded(x + 1), apply(mirror, x + 1))
    slope = torch.func.grad(lambda x: (apply(mirror, x) * expected[0]).sum())(x[0])
    # The inverse, and so the transpose, of the map is the map.
    assert torch.equal(slope, apply(mirror, expected[0]))


# --- Observations ---

PARTS = {"gravity": "polar", "joint_position": "joints", "height": "scalar"}
SIZES = {"policy": {"gravity": 3, "joint_position": 3}, "critic": {"gravity": 3, "height": 1}}


def test_a_symmetry_has_every_group():
    symmetry = make_symmetry(spec(SIZES), PARTS)
    assert symmetry.observations.keys() == {"policy", "critic"}
    x = torch.arange(1.0, 7.0)
    assert apply(symmetry.observations["policy"], x).tolist() == [1, -2, 3, -5, -4, 6]
    assert apply(symmetry.observations["critic"], x[:4]).tolist() == [1, -2, 3, 4]
    assert apply(symmetry.action, x[:3]).tolist() == [-2, -1, 3]


def test_repeated_parts_are_what_they_repeat():
    repeated = {f"{part}[{i}]": size for i in (-1, 0) for part, size in SIZES["policy"].items()}
    symmetry = make_symmetry(spec({**SIZES, "policy": repeated}), PARTS)
    one = make_symmetry(spec(SIZES), PARTS).observations["policy"]
    x = draw(0, 12)
    expected = torch.cat([apply(one, x[:6]), apply(one, x[6:])])
    assert torch.equal(apply(symmetry.observations["policy"], x), expected)
    # One of them may be something else.
    own = {"gravity": "polar", "gravity[-1]": "scalar", "joint_position": "joints"}
    mirror = mirror_observation(spec({"policy": repeated}), "policy", own)
    assert mirror.sign[:3].tolist() == [1, 1, 1] and mirror.sign[6:9].tolist() == [1, -1, 1]


def test_a_map_may_be_given_for_a_part():
    swap = SignedPermutation(torch.tensor([2, 1, 0]), torch.tensor([1.0, -1.0, 1.0]))
    mirror = mirror_observation(spec({"policy": {"scan": 3}}), "policy", {"scan": swap})
    assert apply(mirror, torch.tensor([1.0, 2.0, 3.0])).tolist() == [3, -2, 1]


def test_parts_must_be_covered():
    robot = spec(SIZES)
    with pytest.raises(InputError, match="'policy': missing are gravity; unknown are speed"):
        mirror_observation(robot, "policy", {"joint_position": "joints", "speed": "polar"})
    with pytest.raises(InputError, match="missing are joint_position; unknown are none"):
        make_symmetry(robot, {"gravity": "polar", "height": "scalar"})
    with pytest.raises(InputError, match="speed, torque are in none"):
        make_symmetry(robot, {**PARTS, "speed": "polar", "torque": "joints"})
    with pytest.raises(InputError, match="no observation group 'state'"):
        mirror_observation(robot, "state", {})


def given_map(permutation, sign):
    return SignedPermutation(torch.tensor(permutation), torch.tensor(sign))


@pytest.mark.parametrize(
    ("size", "what", "message"),
    [
        (3, "vector", "kind of 'part' must be one of scalar, polar, .*, got 'vector'"),
        (4, "polar", "part 'part' of kind 'polar' must be a multiple of 3, got 4"),
        (4, "joints", "part 'part' of kind 'joints' must be a multiple of 3, got 4"),
        (3, "feet", "part 'part' of kind 'feet' must be a multiple of 2, got 3"),
        (9, "feet_polar", "part 'part' of kind 'feet_polar' must be a multiple of 6, got 9"),
        (2, given_map([0], [1.0]), r"the map of 'part' must be of size 2, got \[1\] and \[1\]"),
        (2, given_map([0, 0], [1.0, 1.0]), "must be a permutation of 0 to 1 and signs of 1 or -1"),
        (2, given_map([1, 0], [1.0, 2.0]), "must be a permutation of 0 to 1 and signs of 1 or -1"),
        (2, given_map([1, 0], [1.0, -1.0]), "the map of 'part' must be its own inverse"),
        (3, given_map([1, 2, 0], [1.0, 1.0, 1.0]), "the map of 'part' must be its own inverse"),
    ],
)
def test_parts_that_do_not_fit_are_refused(size, what, message):
    with pytest.raises(InputError, match=message):
        mirror_observation(spec({"policy": {"part": size}}), "policy", {"part": what})


def test_actions_need_actuators_and_mirrored_bounds():
    one_sided = {"low": (-0.3, -2.6, -1.0), "high": (2.6, 0.3, 1.5)}
    assert mirror_action(spec({}, **one_sided)).sign.tolist() == [-1, -1, 1]
    with pytest.raises(InputError, match="not so for left_hip_roll_motor, right_hip_roll_motor"):
        mirror_action(spec({}, **{**one_sided, "low": (-0.3, -2.5, -1.0)}))
    with pytest.raises(InputError, match="not so for left_hip_roll_motor, right_hip_roll_motor"):
        mirror_action(spec({}, **one_sided), signs={"left_hip_roll": 1})
    with pytest.raises(InputError, match=r"one to one with actuators .*, got action_0, action_1"):
        mirror_action(spec({}, actions=("action_0", "action_1")))
    with pytest.raises(InputError, match="must drive joints to be mirrored, which is not so for _motor"):
        mirror_action(spec({}, joints=("", "waist_yaw")))


def test_a_symmetry_must_fit_the_environment():
    robot = spec(SIZES)
    symmetry = make_symmetry(robot, PARTS)
    check_symmetry(symmetry, robot, ("policy", "critic"))
    with pytest.raises(InputError, match="missing are critic, there are policy"):
        check_symmetry(Symmetry({"policy": symmetry.observations["policy"]}, symmetry.action), robot, ("critic",))
    with pytest.raises(InputError, match="symmetry of 'policy' must be of size 6"):
        check_symmetry(Symmetry({"policy": symmetry.action}, symmetry.action), robot, ("policy",))
    wrong = Symmetry(symmetry.observations, symmetry.observations["critic"])
    with pytest.raises(InputError, match="symmetry of actions must be of size 3"):
        check_symmetry(wrong, robot, ("policy",))
    with pytest.raises(InputError, match="must be at least one map"):
        concatenate([])


# --- States ---

# Two arms on ball joints, a sliding mass on each side, a rail across and a loose ball, in the words L and R. The hooks'
# axes are mirrored already, so that names alone would be wrong; the actuators have states of their own.
ODD = """
<mujoco>
  <option timestep="0.005" integrator="implicitfast"/>
  <worldbody>
    <geom type="plane" size="3 3 1"/>
    <body name="trunk" pos="0 0 1">
      <freejoint name="trunk"/>
      <geom type="box" size="0.1 0.2 0.3"/>
      {arms}
      <body name="weight"><joint name="rail" type="slide" axis="0 1 0" stiffness="50"/><geom size="0.05"/></body>
    </body>
    <body name="ball" pos="1 0 0.05"><freejoint name="ball"/><geom size="0.1"/></body>
  </worldbody>
  <actuator>
    <general name="L" joint="L_hook_roll" dyntype="filter" dynprm="0.05" gainprm="2"/>
    <general name="M" joint="rail" dyntype="filter" dynprm="0.05" gainprm="3"/>
    <general name="R" joint="R_hook_roll" dyntype="filter" dynprm="0.05" gainprm="2"/>
  </actuator>
</mujoco>
"""
ODD_ARM = """
<body pos="0 {y} 0.2">
  <joint name="{side}_shoulder" type="ball" damping="0.1"/>
  <geom type="capsule" fromto="0 0 0 0.1 {y} -0.3" size="0.03"/>
  <body pos="0.1 {y} -0.3">
    <joint name="{side}_hook_roll" axis="{x} 0 0" damping="0.1"/>
    <joint name="{side}_reach" type="slide" axis="0 0 1" stiffness="100" damping="1"/>
    <geom type="capsule" fromto="0 0 0 0 0 -0.3" size="0.03"/>
  </body>
</body>
"""
ODD_SIGNS = {"L_hook_roll": 1, "L_reach": 1, "rail": -1}
LR = (("L", "R"),)


def odd():
    arms = [ODD_ARM.format(side=side, y=y, x=x) for side, y, x in (("L", 0.25, 1), ("R", -0.25, -1))]
    return MujocoEngine(mujoco.MjModel.from_xml_string(ODD.format(arms="".join(arms))), 1)


def test_a_mirrored_state_of_an_odd_robot_moves_as_the_mirror_image():
    engine = odd()
    model = engine.model
    assert model.na == model.nu == 3
    mirrored = mirror_state(model, sides=LR, signs=ODD_SIGNS)
    control = mirror_joints(model.actuator_joints, sides=LR, signs={"L_hook_roll": 1, "rail": -1})
    qpos, _ = mirror_coordinates(model, sides=LR, signs=ODD_SIGNS)
    for i, key in enumerate(random.split(random.key(0), 4).unbind(0)):
        noise = random.normal(key, (model.nv,), torch.float64)
        start = torch.zeros(model.nq, dtype=torch.float64)
        for joint in model.joints:
            turn = rotations.from_rotation_vector(0.3 * noise[joint.qvel][-3:])
            place = torch.cat([0.1 * noise[joint.qvel][:3], turn])
            start[joint.qpos] = {"free": place, "ball": turn}.get(joint.kind, 0.1 * noise[joint.qvel])
        start[model.joint("trunk").qpos.start + 2] += 1.0
        # The ball, in reach of the arms or rolling on the floor.
        start[model.joint("ball").qpos.start : model.joint("ball").qpos.start + 3] += torch.tensor([0.2, 0.1, 0.11 + i])
        state = engine.forward({}, engine.initial(start, noise))
        image = mirrored(state)
        assert_involution(qpos)
        for step in range(60):
            action = random.normal(random.fold_in(key, step), (3,), torch.float64)
            state = engine.step({}, state, action, substeps=1)
            image = engine.step({}, image, apply(control, action), substeps=1)
            expected = mirrored(state)
            assert not int(state.fault) and not int(image.fault)
            for name in ("qpos", "qvel", "act"):
                torch.testing.assert_close(getattr(image, name), getattr(expected, name), rtol=1e-9, atol=1e-9)
            # Chaos would take rounding further with each collision.
            image = tree.replace(expected, sensordata=image.sensordata)
    # The test would notice: the wrong sign gives another motion.
    wrong = mirror_state(model, sides=LR, signs={**ODD_SIGNS, "L_hook_roll": -1})(state)
    after = engine.step({}, wrong, apply(control, action), substeps=1)
    expected = mirrored(engine.step({}, state, action, substeps=1))
    assert float((after.qvel - expected.qvel).abs().max()) > 1e-3


def test_mirroring_twice_changes_nothing_but_the_sensors():
    engine = odd()
    mirrored = mirror_state(engine.model, sides=LR, signs=ODD_SIGNS)
    sizes = {"time": (), "qpos": (engine.model.nq,), "act": (3,), "sensordata": (0,), "fault": ()}
    leaves = {n: draw(1, 5, *sizes.get(n, (engine.model.nv,))) for n in ("time", "qpos", "qvel", "act", "warmstart")}
    state = tree.replace(
        engine.initial(leaves["qpos"], leaves["qvel"]), **leaves, sensordata=torch.ones(5, 2, dtype=torch.float64)
    )
    again = mirrored(mirrored(state))
    for (name, x), (_, y) in zip(tree.named_leaves(again), tree.named_leaves(state), strict=True):
        assert torch.equal(x, torch.zeros_like(y) if name == "sensordata" else y), name
    mapped = torch.func.vmap(mirrored)(state)
    for x, y in zip(tree.tree_leaves(mapped), tree.tree_leaves(mirrored(state)), strict=True):
        assert torch.equal(x, y)


def test_axes_say_what_names_do_not():
    """Gymnasium's humanoid: its left hips' axes are mirrored, its shoulders' oblique, and its names say neither."""
    path = Path(gymnasium.__file__).parent / "envs/mujoco/assets/humanoid.xml"
    mjmodel = mujoco.MjModel.from_xml_path(str(path))
    data = mujoco.MjData(mjmodel)
    mujoco.mj_kinematics(mjmodel, data)
    model = MujocoEngine(mjmodel, 1).model
    names = [joint.name for joint in model.joints if joint.kind == "hinge"]
    with pytest.raises(InputError, match=r"do not tell .*abdomen_z"):
        mirror_coordinates(model)
    signs = axis_signs(names, torch.from_numpy(data.xaxis[1:].copy()))
    assert signs["abdomen_z"] == signs["abdomen_x"] == -1 and signs["abdomen_y"] == 1
    assert signs["left_hip_x"] == signs["left_hip_z"] == signs["left_hip_y"] == 1
    # Axes (2, 1, 1) on the right and (2, -1, 1) on the left: the image of the first is (-2, 1, -1).
    assert signs["right_shoulder1"] == -1
    qpos, qvel = mirror_coordinates(model, signs=signs)
    assert_involution(qpos)
    assert_involution(qvel)
    # Both feet are where they should be, for joints anywhere.
    for i in range(3):
        data.qpos[:] = torch.cat([draw(i, 3), rotations.from_rotation_vector(draw(i + 3, 3)), draw(i + 6, 17)]).numpy()
        mujoco.mj_kinematics(mjmodel, data)
        feet = data.body("left_foot").xpos.copy(), data.body("right_foot").xpos.copy()
        data.qpos[:] = apply(qpos, torch.from_numpy(data.qpos.copy())).numpy()
        mujoco.mj_kinematics(mjmodel, data)
        polar = torch.tensor([1.0, -1.0, 1.0]).double()
        for foot, other in zip(("right_foot", "left_foot"), feet, strict=True):
            found = torch.from_numpy(data.body(foot).xpos.copy())
            torch.testing.assert_close(found, polar * torch.from_numpy(other), rtol=0, atol=1e-9)


def test_states_that_have_no_image_are_refused():
    arms = '<body><joint name="left_knee" type="{}"/><geom size="1"/></body><body><joint name="right_knee"/>{}</body>'
    xml = "<mujoco><worldbody>" + arms + "</worldbody></mujoco>"
    model = MujocoEngine(mujoco.MjModel.from_xml_string(xml.format("ball", '<geom size="1"/>')), 1).model
    with pytest.raises(InputError, match="must be of the kind of those across, which is not so for left_knee, right"):
        mirror_state(model)
    model = tree.replace(odd().model, na=2)
    with pytest.raises(InputError, match="none or one for each of 3 actuators, got 2"):
        mirror_state(model, sides=LR, signs=ODD_SIGNS)
