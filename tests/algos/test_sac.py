"""SAC: its losses by hand, its update as a pure function, and worlds whose values are known."""

import dataclasses
import math
import re
from typing import Any

import pytest
import torch

from algos.sac import (
    SACConfig,
    critic_loss,
    empty_replay,
    entropy_coefficient_loss,
    make_sac,
    policy_loss,
    project_distribution,
    soft_target,
)
from experiments.replay_memory import replay_note
from rlcore import random, tree
from rlcore.checkpoint import Checkpointer, tree_bytes
from rlcore.env import scale_actions
from rlcore.errors import InputError
from rlcore.randomize import Randomization, make_randomizer
from rlcore.rollout import evaluate
from tasks.cartpole import make_cartpole
from tests.algos.worlds import assert_same, cartpole, stream, tiny

SMALL = SACConfig(
    num_envs=4,
    num_steps=3,
    num_updates=2,
    batch_size=8,
    replay_steps=20,
    prefill=24,
    policy_layers=(8,),
    value_layers=(8,),
)


@pytest.fixture(scope="module")
def small():
    return make_sac(cartpole(), SMALL)


def after(algorithm, updates, seed=0):
    state, metrics = algorithm.init(random.key(seed)), {}
    for _ in range(updates):
        state, metrics = algorithm.update(state)
    return state, metrics


# --- Losses by hand ---


def test_target_by_hand():
    # 1 + 0.9 (10 - 0.5 (-2)) = 10.9; where the task ended, the reward alone, even if no value is there.
    target = soft_target(
        torch.tensor([1.0, 1.0]),
        torch.tensor([0.9, 0.0]),
        torch.tensor([10.0, math.nan]),
        torch.tensor([-2.0, 0.0]),
        0.5,
    )
    assert target.tolist() == pytest.approx([10.9, 1.0])


def test_losses_by_hand():
    # ((1 - 3)^2 + 0) / 2 / 2 = 1 and ((2 - 3)^2 + (1 - 5)^2) / 2 / 2 = 4.25.
    assert float(critic_loss(torch.tensor([[1.0, 5.0], [2.0, 1.0]]), torch.tensor([3.0, 5.0]))) == pytest.approx(5.25)
    # (0.5 (-1) - 2 + 0.5 (-3) - 4) / 2
    assert float(policy_loss(torch.tensor([2.0, 4.0]), torch.tensor([-1.0, -3.0]), 0.5)) == pytest.approx(-4.0)
    # The policy's entropy is 2 and 3 is wanted: -log alpha (-2 + 3), so the coefficient grows.
    log_alpha = torch.tensor(-0.7)
    slope = torch.func.grad(entropy_coefficient_loss)(log_alpha, torch.tensor([-1.0, -3.0]), 3.0)
    assert float(slope) == pytest.approx(-1.0)


def test_projection_by_hand():
    support = torch.linspace(-1.0, 1.0, 5)
    # 0.25 lies between 0 and 0.5; -3 and 1.5 beyond the ends.
    p, z = torch.tensor([[0.5, 0.2, 0.3, 0.0, 0.0]]), torch.tensor([[0.25, -3.0, 1.5, 0.0, 0.0]])
    assert project_distribution(p, z, support)[0].tolist() == pytest.approx([0.2, 0.0, 0.25, 0.25, 0.3])


def test_projection_keeps_mass_and_mean_within_the_range():
    key = random.split(random.key(0))
    p = torch.softmax(random.normal(key[0], (64, 11)), -1)
    z = random.uniform(key[1], (64, 11), -2.0, 2.0)
    support = torch.linspace(-2.0, 2.0, 11)
    projected = project_distribution(p, z, support)
    assert bool((projected >= 0).all())
    torch.testing.assert_close(projected.sum(-1), torch.ones(64))
    torch.testing.assert_close((projected * support).sum(-1), (p * z).sum(-1), rtol=1e-4, atol=1e-5)


# --- The update ---


def test_the_same_state_leads_to_the_same_state(small):
    state, _ = after(small, 3)
    first = small.update(state)
    kept = tree.map_leaves(torch.clone, first)
    assert_same(small.update(state), kept)


def test_nothing_is_learned_before_the_buffer_is_filled(small):
    start = small.init(random.key(0))
    begun, metrics = after(small, 1)  # 12 of 24 steps
    for name in ("params", "targets", "policy_optimizer", "critic_optimizer", "entropy_optimizer"):
        assert_same(getattr(begun, name), getattr(start, name))
    assert float(metrics["replay/filled"]) == pytest.approx(3 / 20)
    filled, _ = small.update(begun)  # 24 of 24
    for name in ("policy", "critics", "log_entropy_coefficient"):
        pairs = zip(
            tree.tree_leaves(getattr(filled.params, name)), tree.tree_leaves(getattr(begun.params, name)), strict=True
        )
        assert any(not torch.equal(x, y) for x, y in pairs), name
    assert int(filled.critic_optimizer.step) == 2 and int(filled.policy_optimizer.step) == 2


def test_targets_follow_the_critics_slowly():
    learner = make_sac(cartpole(), dataclasses.replace(SMALL, num_updates=1, target_rate=0.25))
    old, _ = after(learner, 3)
    new, _ = learner.update(old)
    leaves = (tree.tree_leaves(x) for x in (old.targets, new.targets, new.params.critics))
    for before, now, critic in zip(*leaves, strict=True):
        torch.testing.assert_close(now, before + 0.25 * (critic - before))


def test_the_policy_is_learned_less_often():
    learner = make_sac(cartpole(), dataclasses.replace(SMALL, num_updates=4, policy_delay=2))
    state, _ = after(learner, 3)
    assert (int(state.critic_optimizer.step), int(state.policy_optimizer.step)) == (8, 4)


def test_actions_are_within_their_bounds(small):
    state, _ = after(small, 4)
    env = cartpole()
    low, high = env.spec.action_low[0], env.spec.action_high[0]
    obs = {"policy": 50 * random.normal(random.key(3), (200, env.spec.observation_size("policy")))}
    for key in (None, random.key(4)):
        action = small.act(state, obs, key)
        assert action.shape == (200, 1) and bool(((action >= low) & (action <= high)).all())
    assert torch.equal(small.act(state, obs, None), small.act(state, obs, None))
    assert not torch.equal(small.act(state, obs, None), small.act(state, obs, random.key(4)))


def test_a_run_goes_on_from_its_checkpoint_with_its_buffer(small, tmp_path):
    state, _ = after(small, 4)
    checkpoints = Checkpointer(tmp_path, {"experiment": "x"})
    checkpoints.save(4, state)
    expected = [small.update(state)]
    expected.append(small.update(expected[0][0]))
    checkpoints.wait()
    restored, _ = checkpoints.restore_latest(small.init(random.key(9)))
    checkpoints.close()
    for _, metrics in expected:
        restored, own = small.update(restored)
        assert_same(own, metrics)
    assert_same(restored, expected[-1][0])


def test_members_side_by_side_are_the_runs_alone(small):
    seeds = (0, 1)
    alone = [small.init(random.key(seed)) for seed in seeds]
    together = tree.stack([small.init(random.key(seed)) for seed in seeds])
    update = torch.func.vmap(small.update)
    for _ in range(4):
        together, metrics = update(together)
        own = [small.update(state) for state in alone]
        alone = [state for state, _ in own]
    for i, state in enumerate(alone):
        for name in ("params", "targets", "env_state", "replay", "observation_moments"):
            theirs = tree.named_leaves(tree.index(getattr(together, name), i))
            for (leaf, x), (_, y) in zip(tree.named_leaves(getattr(state, name)), theirs, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-4, atol=2e-6, msg=f"{name}.{leaf}")
        torch.testing.assert_close(own[i][1]["loss/value"], metrics["loss/value"][i], rtol=1e-3, atol=1e-6)


def test_randomized_robots_differ(small):
    env = cartpole()
    learner = make_sac(env, SMALL, make_randomizer(env, Randomization(mass_scale=(0.5, 2.0))))
    state, _ = after(learner, 3)
    mass = state.env_params.physics["body_mass"]
    assert mass.shape == (4, 3) and len(mass[:, 1].unique()) == 4


def test_the_buffers_bytes_are_told(small):
    with torch.device("meta"):
        told = tree_bytes(empty_replay(cartpole(), SMALL))
    assert told == sum(x.nbytes for x in tree.tree_leaves(small.init(random.key(0)).replay))


# --- Worlds whose values are known ---

QUICK = SACConfig(
    num_envs=16,
    num_steps=2,
    num_updates=8,
    batch_size=64,
    replay_steps=100,
    prefill=64,
    value_learning_rate=1e-2,
    policy_learning_rate=1e-2,
    entropy_learning_rate=1e-2,
    target_rate=0.05,
    discount=0.9,
    initial_entropy_coefficient=1e-6,
    target_entropy=-20.0,
    policy_layers=(16,),
    value_layers=(16,),
    activation="tanh",
)


@pytest.mark.parametrize("changes", [{}, {"n_steps": 3, "atoms": 41, "value_range": (0.0, 12.0)}])
@pytest.mark.parametrize("end", ["truncated", "terminated"])
def test_values_go_on_past_the_clock_and_not_past_the_end(end, changes):
    """A reward of 1 for each of three steps, gamma 0.9: 10 for ever where the clock ends it, 2.71 where the task does.

    Where the clock ends it every state looks alike, or the last one would be a state that no step begins from.
    """
    alike = tiny(
        lambda qpos: {"policy": {"one": 0 * qpos[:1]}}, lambda context, count, action: 1 + 0 * action[0], length=3
    )
    learner = make_sac(alike if end == "truncated" else stream(end=end), dataclasses.replace(QUICK, **changes))
    _, metrics = after(learner, 100 if end == "truncated" else 50)
    expected = 10.0 if end == "truncated" else (2.71 + 1.9 + 1.0) / 3
    assert float(metrics["value/mean"]) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("changes", [{}, {"pessimism": "mean", "atoms": 41, "value_range": (-4.0, 1.0)}])
def test_the_best_action_is_found(changes):
    """A reward of -(a - 0.8)^2, of actions in [-2, 2]."""
    reward = lambda context, count, action: -((action[0] - 0.8) ** 2)  # noqa: E731
    env = tiny(lambda qpos: {"policy": {"one": qpos[:1]}}, reward, end="terminated")
    explore: dict[str, Any] = {"initial_entropy_coefficient": 0.1, "target_entropy": -1.0, "replay_steps": 400}
    learner = make_sac(env, dataclasses.replace(QUICK, value_layers=(64, 64), **explore, **changes))
    state, _ = after(learner, 130)
    assert float(learner.act(state, state.obs, None).mean()) == pytest.approx(0.8, abs=0.1)


def test_the_entropy_that_is_wanted_is_found():
    """Where every action is as good, the policy stays near the entropy that was asked for, -1 nat."""
    learner = make_sac(
        stream(end="terminated"), dataclasses.replace(QUICK, initial_entropy_coefficient=0.1, target_entropy=-1.0)
    )
    state, _ = after(learner, 50)
    entropies = []
    for _ in range(100):
        state, metrics = learner.update(state)
        entropies.append(float(metrics["policy/entropy"]))
    # Alone, without a coefficient that grows where it falls short, it would go on to -2.4, where deviations end.
    assert sum(entropies) / len(entropies) == pytest.approx(-1.0, abs=0.35)


# --- Mistakes ---


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_envs": 0}, r"num_envs must be at least 1, got 0 \(--sac.num-envs\)"),
        ({"policy_learning_rate": 0.0}, r"policy_learning_rate must be more than 0, got 0.0"),
        ({"prefill": 7}, r"prefill must be at least num_envs x \(n_steps \+ 1\) = 8"),
        ({"replay_steps": 1}, r"replay_steps must be more than n_steps, 1, got 1"),
        ({"policy_delay": 3}, r"policy_delay must be a divisor of num_updates, got 3"),
        ({"atoms": 1}, r"atoms must be 0, or at least 2, got 1"),
        ({"value_range": (1.0, 1.0)}, r"value_range must be a low and a higher finite number"),
        ({"activation": "step"}, r"activation must be one of elu"),
        ({"target_rate": 0.0}, r"target_rate must be more than 0 and at most 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, match):
    with pytest.raises(InputError, match=match):
        dataclasses.replace(SMALL, **changes)


def test_environments_that_cannot_work_are_refused():
    with pytest.raises(InputError, match="wrap cartpole in auto_reset"):
        make_sac(scale_actions(make_cartpole(1)), SMALL)
    endless = cartpole()
    spec = dataclasses.replace(endless.spec, action_high=(math.inf,))
    with pytest.raises(InputError, match="cartpole has none for"):
        make_sac(endless._replace(spec=spec), SMALL)
    with pytest.raises(InputError, match=r"num_steps must be at most the 15 steps of an episode .* got 16 \(--sac"):
        make_sac(cartpole(), dataclasses.replace(SMALL, num_steps=16))


def test_a_buffer_larger_than_the_machine_is_refused():
    assert re.fullmatch(r"replay buffer: 20 steps of 4 environments, 0.00 GiB .*", replay_note(cartpole(), SMALL))
    with pytest.raises(InputError, match=r"replay_steps must fit into memory, got 1000000000000: .*--sac.replay-steps"):
        replay_note(cartpole(), dataclasses.replace(SMALL, replay_steps=10**12))


@pytest.mark.slow
def test_it_learns_to_balance_a_pole():
    from experiments.sac_cartpole import Config, build

    experiment = build(Config(num_threads=1))
    learner = experiment.algorithm
    state = learner.init(random.key(0))
    for _ in range(130):
        state, _ = learner.update(state)
    episodes = evaluate(experiment.evaluation_env, lambda obs: learner.act(state, obs, None), random.key(1), 32)
    assert float(episodes.returns.mean()) > 450
