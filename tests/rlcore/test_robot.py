"""A robot by its names: quantities are MuJoCo's own, in the frames they are said to be in."""

import dataclasses
import functools
import math

import mujoco
import numpy as np
import pytest
import torch
from torch.func import vmap

from rlcore import random
from rlcore.errors import InputError
from rlcore.physics.mujoco import MujocoEngine, load_model
from rlcore.robot import make_robot
from tasks.humanoid.body import MODEL


@functools.cache
def engine():
    return MujocoEngine(load_model(MODEL), 1)


@functools.cache
def robot():
    model = engine().model
    return make_robot(model, pose=model.keyframe("stand")[0][7:], angular_momentum="angular_momentum")


def tumbling(num):
    """Robots in any attitude and posture, moving; sensors current."""
    model = engine().model
    draw = random.normal(random.key(0), (num, model.nq + model.nv), dtype=torch.float64)
    qpos, qvel = draw[:, : model.nq], draw[:, model.nq :]
    quaternion = qpos[:, 3:7] / qpos[:, 3:7].norm(dim=1, keepdim=True)
    qpos = torch.cat([qpos[:, :3] + 3, quaternion, 0.3 * qpos[:, 7:] + robot().pose], dim=1)
    return engine().forward({}, engine().initial(qpos, qvel))


def test_quantities_are_those_of_mujoco():
    physics, model = tumbling(6), load_model(MODEL)
    data = mujoco.MjData(model)
    read = {
        name: vmap(getattr(robot(), name))(physics).numpy()
        for name in (
            "height", "orientation", "gravity", "linear_velocity", "heading_velocity", "angular_velocity", "yaw_rate",
            "joint_position", "joint_velocity", "joint_torque", "foot_position", "foot_velocity", "foot_contact",
            "foot_position_in_heading", "angular_momentum",
        )
    }  # fmt: skip
    joints = [model.joint(int(model.actuator_trnid[a, 0])) for a in range(model.nu)]
    assert robot().joints == tuple(joint.name for joint in joints)
    np.testing.assert_array_equal(robot().lower, [joint.range[0] for joint in joints])
    np.testing.assert_array_equal(robot().upper, [joint.range[1] for joint in joints])
    for i in range(6):
        data.qpos[:], data.qvel[:] = physics.qpos[i].numpy(), physics.qvel[i].numpy()
        mujoco.mj_forward(model, data)
        pelvis = data.body("pelvis")
        world, body = np.zeros(6), np.zeros(6)
        mujoco.mj_objectVelocity(model, data, mujoco.mjtObj.mjOBJ_XBODY, pelvis.id, body, 1)
        frame = pelvis.xmat.reshape(3, 3)
        world[:3], world[3:] = frame @ body[:3], frame @ body[3:]
        # The heading by its angle: the frame's x axis seen from above.
        yaw = math.atan2(frame[1, 0], frame[0, 0])
        turn = np.array([[math.cos(yaw), math.sin(yaw), 0], [-math.sin(yaw), math.cos(yaw), 0], [0, 0, 1]])
        feet = np.array([data.site(f"{side}_foot").xpos for side in ("left", "right")])
        velocities = []
        for side in ("left", "right"):
            velocity = np.zeros(6)
            site = data.site(f"{side}_foot").id
            mujoco.mj_objectVelocity(model, data, mujoco.mjtObj.mjOBJ_SITE, site, velocity, 0)
            velocities.append(velocity[3:])
        expected = {
            "height": pelvis.xpos[2],
            "orientation": pelvis.xquat,
            "gravity": frame.T @ [0, 0, -1],
            "linear_velocity": body[3:],
            "heading_velocity": turn @ world[3:],
            "angular_velocity": body[:3],
            "yaw_rate": world[2],
            "joint_position": [data.qpos[joint.qposadr[0]] for joint in joints],
            "joint_velocity": [data.qvel[joint.dofadr[0]] for joint in joints],
            "joint_torque": data.actuator_force,
            "foot_position": feet,
            "foot_velocity": velocities,
            "foot_contact": [data.sensor(f"{side}_foot_contact").data[0] for side in ("left", "right")],
            "foot_position_in_heading": (feet - pelvis.xpos) @ turn.T,
            "angular_momentum": data.subtree_angmom[pelvis.id],
        }
        assert expected.keys() == read.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(read[name][i], value, rtol=1e-9, atol=1e-9, err_msg=name)


def test_weight_rests_on_the_feet():
    model = engine().model
    qpos, ctrl = model.keyframe("stand")
    state = engine().initial(qpos, torch.zeros(model.nv))
    state = engine().step({}, state, ctrl, substeps=100)
    # 50 kg at 9.81 m/s2, half on each foot.
    force = robot().foot_contact(state)
    torch.testing.assert_close(force, torch.full((2,), 0.5 * 50 * 9.81).double(), rtol=0.05, atol=0)


def test_places_that_are_not_contiguous():
    info = engine().model
    backwards = dataclasses.replace(info, actuators=info.actuators[::-1], actuator_joints=info.actuator_joints[::-1])
    other = make_robot(backwards, pose=robot().pose.flip(0))
    physics = tumbling(3)
    for name in ("joint_position", "joint_velocity", "joint_torque"):
        forwards = vmap(getattr(robot(), name))(physics)
        assert torch.equal(vmap(getattr(other, name))(physics), forwards.flip(1)), name


def test_numbers_of_joints_by_pattern():
    numbers = robot().per_joint({"*": 0.5, "left_*": 1.0, "*_hip_*": 2.0})
    by_name = dict(zip(robot().joints, numbers.tolist(), strict=True))
    assert by_name["waist_yaw"] == 0.5 and by_name["right_knee"] == 0.5
    assert by_name["left_knee"] == 1.0 and by_name["left_elbow"] == 1.0
    assert by_name["left_hip_roll"] == 2.0 == by_name["right_hip_pitch"]
    assert robot().per_joint(3).tolist() == [3.0] * 21


def make(**changes):
    return make_robot(engine().model, **{"pose": robot().pose, **changes})


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (lambda: make(root="base"), "no joint 'base'"),
        (lambda: make(root="left_knee"), "root must be a free joint; 'left_knee' is a hinge"),
        (lambda: make(feet=("left_foot", "right_hand")), "no sensor 'right_hand_position'"),
        (lambda: make(feet=()), "feet and actuators, got 0 and 21"),
        (lambda: make(foot_contact="{}_touch"), "no sensor 'left_foot_touch'"),
        (lambda: make(foot_contact="{}_position"), "'left_foot_position' must have 1 numbers, got 3"),
        (lambda: make(foot_velocity="{}_contact"), "'left_foot_contact' must have 3 numbers, got 1"),
        (lambda: make(torque="{}_force"), "no sensor 'waist_yaw_force'"),
        (lambda: make(angular_momentum="momentum"), "no sensor 'momentum'; near it are: angular_momentum"),
        (lambda: make(self_contacts=["imu_gyro"]), "'imu_gyro' must have 1 numbers, got 3"),
        (lambda: make(pose=torch.zeros(20)), "pose must be 21 finite joint angles"),
        (lambda: make(pose=torch.full((21,), math.nan)), "pose must be 21 finite joint angles"),
        (lambda: robot().per_joint({"*_tail": 1.0}), "no joint is named like '.*_tail'; there are: waist_yaw"),
        (lambda: robot().per_joint({"left_*": 1.0}), "every joint needs a number .* for waist_yaw"),
        (lambda: robot().per_joint(math.nan), "numbers of joints must be finite"),
        (lambda: make().angular_momentum(tumbling(1)), "without an angular momentum sensor"),
        (lambda: robot().self_contact(tumbling(1)), "without self-contact sensors"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_one_line(mistake, words):
    with pytest.raises(InputError, match=words) as caught:
        mistake()
    assert "\n" not in str(caught.value)
