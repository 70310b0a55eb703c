"""Populations: each member is the run it would be alone, and population-based training as a function."""

import dataclasses
import math

import pytest
import torch

from algos.population import PBTConfig, exploit, make_population, member, parents_of, perturbed
from algos.ppo import PPOConfig, make_ppo
from rlcore import random, tree
from rlcore.env import auto_reset, reweighted, scale_actions
from rlcore.errors import InputError
from rlcore.randomize import Randomization, make_randomizer
from tasks.cartpole import make_cartpole

SMALL = PPOConfig(num_envs=4, num_steps=6, num_epochs=2, num_minibatches=3, policy_layers=(8,), value_layers=(8,))


def cartpole(**weights):
    return auto_reset(reweighted(scale_actions(make_cartpole(1, seconds=0.3)), weights))


def close(state, other, fields=("params", "env_state", "obs", "observation_moments", "coefficients")):
    for name in fields:
        pairs = zip(tree.named_leaves(getattr(state, name)), tree.named_leaves(getattr(other, name)), strict=True)
        for (leaf, x), (_, y) in pairs:
            torch.testing.assert_close(x, y, rtol=1e-4, atol=2e-6, msg=f"{name}.{leaf}")


def test_members_are_the_runs_they_would_be_alone():
    """They differ in learning rate, discount, clip range, a reward weight, and in how their robots differ."""
    term = cartpole().spec.terms[0]
    algorithms = []
    for rate, discount, clip, weight, masses in [
        (1e-3, 0.99, 0.2, 1.0, (0.5, 2.0)),
        (1e-4, 0.9, 0.1, 3.0, (1.0, 1.0 + 1e-12)),
    ]:
        env = cartpole(**{term: weight})
        config = dataclasses.replace(SMALL, learning_rate=rate, discount=discount, clip=clip)
        algorithms.append(make_ppo(env, config, make_randomizer(env, Randomization(mass_scale=masses))))
    population = make_population(algorithms)
    state = population.init(random.split(random.key(3)))
    keys = random.split(random.key(3)).unbind(0)
    alone = [algorithm.init(key) for algorithm, key in zip(algorithms, keys, strict=True)]
    for _ in range(3):
        state, metrics = population.update(state)
        own = [algorithm.update(each) for algorithm, each in zip(algorithms, alone, strict=True)]
        alone = [each for each, _ in own]
    for i, each in enumerate(alone):
        close(member(state, i), each)
        assert float(metrics["loss/value"][i]) == pytest.approx(float(own[i][1]["loss/value"]), rel=1e-3)
    assert (int(state.iteration), int(state.env_steps)) == (3, 2 * 3 * SMALL.batch_size)
    obs = tree.map_leaves(lambda x: torch.stack([x, x]), alone[0].obs)
    actions = population.act(state, obs, None)
    for i, algorithm in enumerate(algorithms):
        torch.testing.assert_close(actions[i], algorithm.act(alone[i], alone[0].obs, None), rtol=1e-4, atol=1e-6)


def test_who_goes_on_from_whom():
    scores = torch.tensor([3.0, float("nan"), 9.0, 5.0, 8.0, 1.0, 4.0, 7.0])
    seen = set()
    for seed in range(40):
        parents = parents_of(random.key(seed), scores, 0.25).tolist()
        # The two worst, NaN and 1, go on from one of the two best; all others from themselves.
        assert {i for i, parent in enumerate(parents) if i != parent} == {1, 5}
        seen |= {parents[1], parents[5]}
    assert seen == {2, 4}
    assert parents_of(random.key(0), scores[:3], 0.25).tolist() == [0, 1, 2]  # a quarter of three is none
    # Nobody goes on from one who is no better, or of whom nothing is known.
    assert parents_of(random.key(0), torch.full((8,), float("nan")), 0.5).tolist() == list(range(8))
    assert parents_of(random.key(0), torch.ones(8), 0.5).tolist() == list(range(8))


def test_coefficients_change_by_a_factor_where_they_change():
    value = {"learning_rate": torch.full((200,), 1e-3), "discount": torch.full((200,), 0.9)}
    changes = torch.arange(200) % 2 == 0
    new = perturbed(random.key(0), value, changes, 1.25)
    assert torch.equal(new["learning_rate"][~changes], value["learning_rate"][~changes])
    up = (new["learning_rate"][changes] > 1e-3).float().mean()
    assert 0.3 < float(up) < 0.7
    assert sorted({round(x, 7) for x in new["learning_rate"][changes].tolist()}) == [0.0008, 0.00125]
    # Of a discount it is the distance from 1: 0.1 becomes 0.08 or 0.125.
    assert sorted({round(x, 5) for x in new["discount"][changes].tolist()}) == [0.875, 0.92]


def test_population_based_training_needs_members_to_replace():
    with pytest.raises(InputError, match="at least one of 3 members"):
        make_population([make_ppo(cartpole(), SMALL)] * 3, PBTConfig(interval=5))
    with pytest.raises(InputError, match="interval must be at least 0"):
        PBTConfig(interval=-1)
    make_population([make_ppo(cartpole(), SMALL)] * 3, PBTConfig(interval=0))


def test_a_member_that_is_stuck_is_the_worst_whatever_it_had():
    good = make_ppo(cartpole(), SMALL)

    def update(state):
        state, metrics = good.update(state)
        broken = state.coefficients["learning_rate"] > 1.0
        score = torch.where(broken, 100.0, 1.0)
        return state, {**metrics, "score": score, "loss/value": torch.where(broken, math.nan, metrics["loss/value"])}

    population = make_population([good._replace(update=update)] * 4, PBTConfig(interval=1), "score")
    state = population.init(random.split(random.key(0), 4))
    rates = torch.tensor([1e-3, 2.0, 1e-3, 1e-3])
    members = tree.replace(state.members, coefficients={**state.members.coefficients, "learning_rate": rates})
    state, metrics = population.update(tree.replace(state, members=members))
    assert metrics["population/stuck"].tolist() == [0, 1, 0, 0]
    assert int(state.parents[1]) != 1 and float(state.members.coefficients["learning_rate"][1]) < 1.0


def test_a_copy_is_its_parent_but_for_key_and_coefficients():
    population = make_population([make_ppo(cartpole(), SMALL)] * 4)
    state, _ = population.update(population.init(random.split(random.key(0), 4)))
    members, parents = exploit(random.key(1), state.members, torch.tensor([4.0, 1.0, 2.0, 3.0]), PBTConfig())
    assert parents.tolist() == [0, 0, 2, 3]
    old, new = (tree.index(x, i) for x, i in ((state.members, 0), (members, 1)))
    close(new, old, ("params", "optimizer", "obs", "observation_moments"))
    close(new.env_state, old.env_state, ("physics", "memory"))
    assert torch.equal(members.key, state.members.key)
    assert torch.equal(members.env_state.key, state.members.env_state.key)
    assert float(new.coefficients["learning_rate"]) != float(old.coefficients["learning_rate"])
    for i in (0, 2, 3):
        close(tree.index(members, i), tree.index(state.members, i))


def test_population_based_training_compares_now_and_then():
    algorithms = [make_ppo(cartpole(), SMALL)] * 4
    population = make_population(algorithms, PBTConfig(interval=2), score="value/mean")
    state = population.init(random.split(random.key(0), 4))
    moved = []
    for _ in range(4):
        state, _ = population.update(state)
        moved.append(state.parents.tolist() != [0, 1, 2, 3])
    assert moved == [False, True, False, True]


def test_a_member_that_breaks_stays_where_it_was():
    broken = dataclasses.replace(SMALL, learning_rate=1e38, max_gradient_norm=1e38)
    population = make_population([make_ppo(cartpole(), SMALL), make_ppo(cartpole(), broken)])
    state = population.init(random.split(random.key(0)))
    start = member(state, 1)
    for _ in range(2):
        state, metrics = population.update(state)
        assert metrics["population/stuck"].tolist() == [0.0, 1.0]
    close(member(state, 1), start)
    assert (int(state.iteration), int(member(state, 0).iteration), int(member(state, 1).iteration)) == (2, 2, 0)


def test_mistakes_are_told():
    with pytest.raises(InputError, match="at least one member"):
        make_population([])
    wide = make_ppo(cartpole(), dataclasses.replace(SMALL, policy_layers=(16,)))
    with pytest.raises(InputError, match=r"params.policy.0.weight is \[8, 4\] .* in the first, \[16, 4\] "):
        make_population([make_ppo(cartpole(), SMALL), wide]).init(random.split(random.key(0)))
    with pytest.raises(InputError, match=r"fraction must be more than 0 and at most 0.5, got 0.75 \(--pbt.fraction\)"):
        PBTConfig(fraction=0.75)
    scored = make_population([make_ppo(cartpole(), SMALL)], score="return")
    with pytest.raises(InputError, match=r"score must be a metric .*, got 'return'; did you mean"):
        scored.update(scored.init(random.split(random.key(0), 1)))
    population = make_population([make_ppo(cartpole(), SMALL)])
    with pytest.raises(InputError, match="member must be at least 0 and below 1, got 1"):
        member(population.init(random.split(random.key(0), 1)), 1)
    with pytest.raises(InputError, match="keys must be one for each of 1 members, got 2"):
        population.init(random.split(random.key(0)))
