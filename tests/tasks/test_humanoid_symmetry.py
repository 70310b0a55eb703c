"""The humanoid in the mirror: it moves, sees and is rewarded as the mirror image, contacts included."""

import mujoco
import pytest
import torch

from rlcore import random, tree
from rlcore.env import auto_reset, batch, observation_history, observation_noise, scale_actions
from rlcore.errors import InputError
from rlcore.physics.mujoco import load_model
from rlcore.symmetry import apply, axis_signs, make_symmetry, mirror_coordinates, mirror_joints, mirror_state
from tasks.humanoid.balance import make_humanoid_balance
from tasks.humanoid.body import MODEL
from tasks.humanoid.symmetry import PARTS, balance_symmetry

NUM = 16


@pytest.fixture(scope="module")
def env():
    # A kick in a random direction is mirrored in law only.
    return make_humanoid_balance(1, push_speed=0.0)


@pytest.fixture(scope="module")
def symmetry(env):
    return balance_symmetry(env)


def mirrored(env, symmetry, state):
    physics = mirror_state(env.spec.model)(state.physics)
    memory = {**state.memory, "last_action": apply(symmetry.action, state.memory["last_action"])}
    return tree.replace(state, physics=physics, memory=memory)


def test_names_say_what_the_axes_are():
    model = load_model(MODEL)
    data = mujoco.MjData(model)
    mujoco.mj_kinematics(model, data)
    hinges = [j for j in range(model.njnt) if model.jnt_type[j] == mujoco.mjtJoint.mjJNT_HINGE]
    names = [model.joint(j).name for j in hinges]
    signs = axis_signs(names, torch.from_numpy(data.xaxis[hinges].copy()))
    assert list(signs.values()) == mirror_joints(names).sign.tolist()


def test_standing_is_its_own_image_and_limits_are_mirrored(env, symmetry):
    model = env.spec.model
    qpos, ctrl = model.keyframe("stand")
    positions, _ = mirror_coordinates(model)
    assert torch.equal(apply(positions, qpos), qpos) and torch.equal(apply(symmetry.action, ctrl), ctrl)
    joints = [model.joint(name) for name in model.actuator_joints]
    for joint, place, sign in zip(joints, symmetry.action.permutation, symmetry.action.sign, strict=True):
        other = joints[int(place)]
        limits = (other.lower, other.upper) if sign > 0 else (-other.upper, -other.lower)
        assert (joint.lower, joint.upper) == limits, joint.name


def test_the_mirror_image_moves_sees_and_earns_as_the_mirror_image(env, symmetry):
    batched = batch(env)
    state, _ = batched.reset(env.params, random.split(random.key(0), NUM))
    touched, fallen = 0, 0
    for action in random.uniform(random.key(1), (40, NUM, env.spec.action_size), -1.5, 1.5):
        image, other = batched.step(env.params, mirrored(env, symmetry, state), apply(symmetry.action, action))
        state, transition = batched.step(env.params, state, action)
        expected = mirrored(env, symmetry, state)
        for name in ("qpos", "qvel", "act", "time"):
            found, wanted = getattr(image.physics, name), getattr(expected.physics, name)
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10, msg=name)
        assert torch.equal(image.memory["last_action"], expected.memory["last_action"])
        for group, obs in other.obs.items():
            seen = apply(symmetry.observations[group], transition.obs[group])
            # Rounding of the physics may tip a rounding to float32.
            torch.testing.assert_close(obs, seen, rtol=1e-6, atol=1e-6, msg=group)
        torch.testing.assert_close(other.reward, transition.reward, rtol=1e-9, atol=1e-11)
        assert torch.equal(other.terminated, transition.terminated)
        contact = transition.obs["critic"][:, -2:] > 0
        touched += int((contact[:, 0] != contact[:, 1]).sum())
        fallen += int(transition.terminated.sum())
    # Both feet, one, or none on the floor, and falls, were all among it.
    assert touched > NUM and 0 < fallen < 40 * NUM


def test_the_maps_fit_what_is_wrapped_around(env, symmetry):
    wrapped = observation_history(observation_noise(scale_actions(env), {"gravity": 0.05}), 3)
    maps = balance_symmetry(auto_reset(wrapped))
    assert torch.equal(maps.action.permutation, symmetry.action.permutation)
    x = random.normal(random.key(2), (3 * env.spec.observation_size("policy"),))
    frames = [apply(symmetry.observations["policy"], frame) for frame in x.chunk(3)]
    assert torch.equal(apply(maps.observations["policy"], x), torch.cat(frames))
    for mirror, y in ((maps.observations["policy"], x), (maps.observations["critic"], x[: 3 * 3 + 3 * 21 + 3])):
        assert torch.equal(apply(mirror, apply(mirror, y)), y)


def test_a_task_that_shows_more_adds_its_parts(env):
    policy = (*env.spec.parts("policy"), ("command", 3), ("gait_phase", 2))
    spec = tree.replace(env.spec, observations={**env.spec.observations, "policy": policy})
    with pytest.raises(InputError, match="missing are command, gait_phase"):
        make_symmetry(spec, PARTS)
    maps = make_symmetry(spec, {**PARTS, "command": "command", "gait_phase": "phase"})
    assert maps.observations["policy"].sign[-5:].tolist() == [1, -1, -1, -1, -1]
