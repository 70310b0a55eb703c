"""Gymnasium's environments, step for step: the same model, observation, reward and end."""

import importlib.util

import numpy as np
import pytest
import torch

from rlcore import random, tree
from rlcore.env import auto_reset, batch
from rlcore.errors import InputError
from tasks.gym.ant import make_gym_ant
from tasks.gym.humanoid import make_gym_humanoid
from tasks.gym.model import gym_model
from tasks.gym.walker2d import make_gym_walker2d

gymnasium = pytest.importorskip("gymnasium")

STEPS = 1000
TASKS = {
    "Walker2d-v5": (make_gym_walker2d, 17, 0.008),
    "Ant-v5": (make_gym_ant, 105, 0.05),
    "Humanoid-v5": (make_gym_humanoid, 348, 0.015),
}


@pytest.fixture(scope="module", params=TASKS)
def pair(request):
    """An environment of Gymnasium's, ours, and ours for many."""
    env = TASKS[request.param][0](1)
    return gymnasium.make(request.param).unwrapped, env, batch(env)


def started_as(many, env, state, theirs):
    """`state` (of one robot, with a batch axis) at the beginning of the episode that Gymnasium is in."""
    qpos, qvel = (torch.from_numpy(x.copy()) for x in (theirs.data.qpos, theirs.data.qvel))
    physics = env.engine.forward({}, env.engine.initial(qpos, qvel))
    return tree.replace(state, physics=tree.map_leaves(lambda x: x.unsqueeze(0), physics))


def test_steps_equal_gymnasiums(pair):
    theirs, env, many = pair
    generator = np.random.default_rng(0)
    fresh, _ = many.reset(env.params, random.split(random.key(0), 1))
    theirs.reset(seed=0)
    state, ended = started_as(many, env, fresh, theirs), 0
    low, high = theirs.action_space.low, theirs.action_space.high
    for _ in range(STEPS):
        # A few actions beyond the bounds, which MuJoCo clips and the cost of control does not.
        action = 1.1 * generator.uniform(low, high)
        seen, reward, terminated, _, info = theirs.step(action)
        state, ours = many.step(env.params, state, torch.from_numpy(action[None]))
        # Observations of ours are float32: 6e-8 of each number.
        np.testing.assert_allclose(ours.next_obs["policy"][0], seen, rtol=1e-6, atol=1e-6)
        assert float(ours.reward[0]) == pytest.approx(float(reward), abs=1e-6)
        assert bool(ours.terminated[0]) == bool(terminated)
        np.testing.assert_array_equal(state.physics.qpos[0], theirs.data.qpos)
        for name, term in (("forward", "reward_forward"), ("healthy", "reward_survive"), ("control", "reward_ctrl")):
            assert float(ours.terms[name][0]) == pytest.approx(float(info[term]), abs=1e-6)
        if terminated:
            ended += 1
            theirs.reset()
            state = started_as(many, env, fresh, theirs)
    assert ended >= (1 if theirs.spec.id == "Ant-v5" else 20)


def test_specification_is_gymnasiums(pair):
    theirs, env, _ = pair
    spec, (_, size, dt) = env.spec, TASKS[theirs.spec.id]
    assert spec.observation_size("policy") == size == theirs.observation_space.shape[0]
    assert spec.control_dt == dt == pytest.approx(theirs.dt) and spec.substeps == theirs.frame_skip
    np.testing.assert_allclose(spec.action_low, theirs.action_space.low, rtol=1e-6)
    np.testing.assert_allclose(spec.action_high, theirs.action_space.high, rtol=1e-6)


def test_first_observations_equal_gymnasiums(pair):
    theirs, env, many = pair
    state, obs = many.reset(env.params, random.split(random.key(1), 4))
    for i in range(4):
        theirs.reset()
        theirs.set_state(state.physics.qpos[i].numpy(), state.physics.qvel[i].numpy())
        np.testing.assert_allclose(obs["policy"][i], theirs._get_obs(), rtol=1e-6, atol=1e-6)


def test_episodes_begin_as_gymnasiums(pair):
    """Each number's mean and spread over many beginnings, against Gymnasium's own."""
    theirs, env, many = pair
    num = 1500
    state, _ = many.reset(env.params, random.split(random.key(2), num))
    ours = torch.cat([state.physics.qpos, state.physics.qvel], dim=1).numpy()
    golden = np.stack([_beginning(theirs, seed) for seed in range(200)])
    nq = env.spec.model.nq
    noise = theirs._reset_noise_scale
    np.testing.assert_allclose(ours.mean(0), golden.mean(0), atol=0.35 * noise)
    # Uniform numbers on +-a deviate by a / sqrt(3).
    uniform = noise / np.sqrt(3)
    spread = np.full(ours.shape[1], uniform)
    if theirs.spec.id == "Ant-v5":
        spread[nq:] = noise
        assert np.abs(ours[:, nq:]).max() > 3 * noise
    else:
        assert np.abs(ours[:, nq:]).max() <= noise
    assert np.abs(ours[:, :nq] - theirs.init_qpos).max() <= noise
    np.testing.assert_allclose(ours.std(0), spread, rtol=0.1)
    np.testing.assert_allclose(golden.std(0), spread, rtol=0.25)
    off = np.corrcoef(ours.T) - np.eye(ours.shape[1])
    assert np.abs(off).max() < 0.15


def _beginning(theirs, seed):
    theirs.reset(seed=seed)
    return np.concatenate([theirs.data.qpos, theirs.data.qvel])


def test_vmap_equals_a_loop(pair):
    _, env, _ = pair
    env = auto_reset(env)
    keys = random.split(random.key(3), 3)
    many = batch(env)
    state, _ = many.reset(env.params, keys)
    alone = [env.reset(env.params, key)[0] for key in keys]
    low, high = env.spec.action_low[0], env.spec.action_high[0]
    for action in random.uniform(random.key(4), (5, 3, env.spec.action_size), low, high):
        state, transition = many.step(env.params, state, action)
        for i in range(3):
            alone[i], single = env.step(env.params, alone[i], action[i])
            for (name, a), (_, b) in zip(
                tree.named_leaves((tree.index(state, i), tree.index(transition, i))),
                tree.named_leaves((alone[i], single)),
                strict=True,
            ):
                assert torch.equal(a, b), name


@pytest.mark.gpu
@pytest.mark.parametrize("make", [make_gym_walker2d, make_gym_ant])
def test_a_gpu_simulates_the_same(make):
    on_cpu = make(1)
    with torch.device("cuda"):
        on_gpu = make(physics="warp")
    keys = random.split(random.key(5), 4)
    low, high = on_cpu.spec.action_low[0], on_cpu.spec.action_high[0]
    action = random.uniform(random.key(6), (4, on_cpu.spec.action_size), low, high)
    seen = []
    for env, device in ((on_cpu, "cpu"), (on_gpu, "cuda")):
        many = batch(env)
        state, _ = many.reset(env.params, keys.to(device))
        _, transition = many.step(env.params, state, action.to(device))
        seen.append({"obs": transition.next_obs["policy"].cpu(), "reward": transition.reward.cpu()})
    for part, values in seen[0].items():
        # One step in single precision: a foot that lands a substep later, as some do in the next, is another motion.
        torch.testing.assert_close(seen[1][part], values, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_what_a_gpu_cannot_simulate_is_told():
    with torch.device("cuda"), pytest.raises(InputError, match=r"MuJoCo Warp cannot run this model: .*PGS"):
        make_gym_humanoid(physics="warp")


def test_episodes_are_cut_after_their_steps():
    env = make_gym_walker2d(1, steps=3)
    state, _ = env.reset(env.params, random.key(0))
    cut = []
    for _ in range(3):
        state, transition = env.step(env.params, state, torch.zeros(6))
        cut.append(bool(transition.truncated))
    assert cut == [False, False, True]


def test_without_gymnasium_it_tells_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for make in (make_gym_ant, make_gym_humanoid, make_gym_walker2d):
        with pytest.raises(InputError, match=r"gymnasium, which is not installed: pip install rlcore\[robots\]"):
            make()
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"ants\.xml does not exist"):
        gym_model("ants.xml")
