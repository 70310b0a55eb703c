"""Balance: where episodes begin and end, and what the policy and the value function are shown."""

import math

import mujoco
import numpy as np
import pytest
import torch

from rlcore import random, tree
from rlcore.env import auto_reset, batch
from rlcore.physics.engine import drain_faults
from rlcore.physics.mujoco import load_model
from tasks.humanoid import balance, body
from tasks.humanoid.balance import make_humanoid_balance

NUM = 64


@pytest.fixture(scope="module")
def env():
    return make_humanoid_balance(1)


@pytest.fixture(scope="module")
def begin(env):
    return batch(env).reset(env.params, random.split(random.key(0), NUM))


@pytest.fixture(scope="module")
def model():
    return load_model(body.MODEL)


def parts(env, obs, group):
    """The observation's parts by name."""
    names, sizes = zip(*env.spec.parts(group), strict=True)
    return dict(zip(names, torch.split(obs[group], list(sizes), dim=-1), strict=True))


def test_observations_by_name_and_size(env, begin):
    model = env.spec.model
    policy = env.spec.parts("policy")
    assert dict(policy) == {
        "angular_velocity": 3,
        "gravity": 3,
        "joint_position": model.nu,
        "joint_velocity": model.nu,
        "last_action": model.nu,
    }
    extra = dict(env.spec.parts("critic")[len(policy) :])
    # What only a simulation knows is the value function's alone.
    assert env.spec.parts("critic")[: len(policy)] == policy
    assert extra == {"linear_velocity": 3, "height": 1, "foot_contact": 2}
    assert not set(extra) & set(dict(policy))
    for group, obs in begin[1].items():
        assert obs.shape == (NUM, env.spec.observation_size(group)) and obs.dtype == torch.float32
    size = env.spec.observation_size("policy")
    assert torch.equal(begin[1]["critic"][:, :size], begin[1]["policy"])


def test_privileged_observations_do_not_reach_the_policy(env, begin):
    state = tree.index(begin[0], 0)
    moved = tree.replace(
        state.physics,
        qpos=torch.cat([state.physics.qpos[:3] + 0.1, state.physics.qpos[3:]]),
        qvel=torch.cat([state.physics.qvel[:3] + 0.5, state.physics.qvel[3:]]),
    )
    # The robot is weightless for one step, in which a moving frame changes nothing that it can feel.
    params = tree.replace(env.params, physics={"opt.gravity": torch.zeros(3).double()})
    still, other = (
        env.step(params, tree.replace(state, physics=physics), torch.zeros(env.spec.action_size))[1].obs
        for physics in (tree.replace(state.physics, qpos=state.physics.qpos + lift(0.5)), lifted(moved))
    )
    torch.testing.assert_close(still["policy"], other["policy"], rtol=0, atol=1e-4)
    assert float((still["critic"] - other["critic"]).abs().max()) > 0.05


def lift(height):
    up = torch.zeros(28, dtype=torch.float64)
    up[2] = height
    return up


def lifted(physics):
    return tree.replace(physics, qpos=physics.qpos + lift(0.5))


def test_episodes_begin_within_the_limits_and_above_the_floor(env, begin, model):
    data = mujoco.MjData(model)
    floor = {i for i in range(model.ngeom) if model.geom_type[i] == mujoco.mjtGeom.mjGEOM_PLANE}
    qpos = begin[0].physics.qpos.numpy()
    assert len(np.unique(qpos[:, 7:], axis=0)) == NUM
    np.testing.assert_allclose(np.linalg.norm(qpos[:, 3:7], axis=1), 1.0, atol=1e-12)
    hinges = [j for j in range(model.njnt) if model.jnt_limited[j]]
    assert len(hinges) == model.nu
    for row in qpos:
        for j in hinges:
            low, high = model.jnt_range[j]
            assert low <= row[model.jnt_qposadr[j]] <= high
        data.qpos[:] = row
        mujoco.mj_forward(model, data)
        into = [c.dist for c in data.contact if {int(c.geom1), int(c.geom2)} & floor]
        # A leaning robot's foot may touch, but no deeper than a soft contact gives.
        assert min(into, default=0.0) > -0.02
        assert data.qpos[2] > balance.FALLEN_HEIGHT


def test_first_observation_is_what_mujoco_computes(env, begin, model):
    data = mujoco.MjData(model)
    state, obs = begin
    seen = parts(env, obs, "critic")
    pelvis = next(i for i in range(model.nbody) if model.body_jntadr[i] == 0)
    stand = model.key("stand").qpos
    joints = [model.joint(int(model.actuator_trnid[a, 0])) for a in range(model.nu)]
    for i in range(0, NUM, 7):
        data.qpos[:], data.qvel[:] = state.physics.qpos[i].numpy(), state.physics.qvel[i].numpy()
        mujoco.mj_forward(model, data)
        velocity = np.zeros(6)
        mujoco.mj_objectVelocity(model, data, mujoco.mjtObj.mjOBJ_XBODY, pelvis, velocity, 1)
        expected = {
            "angular_velocity": velocity[:3],
            "linear_velocity": velocity[3:],
            "gravity": data.xmat[pelvis].reshape(3, 3).T @ [0.0, 0.0, -1.0],
            "height": data.xpos[pelvis][2:],
            "joint_position": [(data.qpos - stand)[joint.qposadr[0]] for joint in joints],
            "joint_velocity": [data.qvel[joint.dofadr[0]] for joint in joints],
            "last_action": np.zeros(model.nu),
            "foot_contact": [data.sensor(f"{side}_foot_contact").data[0] for side in ("left", "right")],
        }
        assert expected.keys() == seen.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(seen[name][i], value, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("height", "tilt", "over"),
    [
        (1.5, 0.0, False),
        (balance.FALLEN_HEIGHT + 0.02, 0.0, False),
        (balance.FALLEN_HEIGHT - 0.02, 0.0, True),
        (1.5, math.acos(-balance.FALLEN_TILT) - 0.2, False),
        (1.5, math.acos(-balance.FALLEN_TILT) + 0.2, True),
        (1.5, math.pi, True),
    ],
)
def test_low_or_tilted_is_over(env, begin, height, tilt, over):
    state = tree.index(begin[0], 0)
    qpos = env.spec.model.keyframe("stand")[0].clone()
    qpos[2] = height
    # The legs are drawn up, so that at the lower heights no foot is under the floor.
    for side in ("left", "right"):
        for joint, angle in (("hip_pitch", -1.5), ("knee", 2.0)):
            qpos[env.spec.model.joint(f"{side}_{joint}").qpos] = angle
    axis = torch.tensor([0.6, 0.8, 0.0]).double()
    qpos[3:7] = torch.cat([torch.tensor([math.cos(tilt / 2)]).double(), math.sin(tilt / 2) * axis])
    params = tree.replace(env.params, values={**env.params.values, "push_speed": torch.tensor(0.0).double()})
    state = tree.replace(state, physics=env.engine.initial(qpos, torch.zeros(env.spec.model.nv).double()))
    _, transition = env.step(params, state, torch.zeros(env.spec.action_size))
    assert not transition.metrics["fault"]
    assert bool(transition.terminated) == over


def test_random_actions_make_no_faults(env):
    drain_faults()
    batched = batch(auto_reset(env))
    state, _ = batched.reset(env.params, random.split(random.key(1), 16))
    low, high = env.spec.action_low[0], env.spec.action_high[0]
    fallen = 0
    for action in random.uniform(random.key(2), (200, 16, env.spec.action_size), low, high):
        state, transition = batched.step(env.params, state, action)
        fallen += int(transition.terminated.sum())
        for name, leaf in tree.named_leaves(transition):
            assert torch.isfinite(leaf).all(), name
        assert not transition.metrics["fault"].any()
    assert not drain_faults()
    # Robots that are shaken fall, and go on.
    assert fallen > 16


def test_standing_still_pays_and_costs_are_small(env):
    """Upright and quiet, a second of balancing is worth close to the sum of the positive weights."""
    model = env.spec.model
    qpos, _ = model.keyframe("stand")
    state, _ = env.reset(env.params, random.key(0))
    params = tree.replace(env.params, values={**env.params.values, "push_speed": torch.tensor(0.0).double()})
    state = tree.replace(state, physics=env.engine.initial(qpos, torch.zeros(model.nv).double()))
    total = 0.0
    for _ in range(25):
        state, transition = env.step(params, state, torch.zeros(env.spec.action_size))
        total += float(transition.reward)
    most = 0.5 * sum(float(w) for w in env.params.weights.values() if w > 0)
    assert 0.75 * most < total <= most
