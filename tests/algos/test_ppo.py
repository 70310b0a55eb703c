"""PPO: its losses by hand, its update as a pure function, and worlds so small that the answer is known."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from algos.ppo import (
    Batch,
    Networks,
    PPOConfig,
    _adapted,
    bounds_loss,
    clipped_surrogate,
    make_ppo,
    ppo_loss,
    value_loss,
)
from rlcore import random, tree
from rlcore.errors import InputError
from rlcore.measurement import Parts, Ratio
from rlcore.networks import mlp
from rlcore.normalize import denormalize, normalize
from rlcore.randomize import Randomization, make_randomizer
from tasks.cartpole import make_cartpole
from tests.algos.worlds import assert_same, cartpole, stream, tiny

SMALL = PPOConfig(
    num_envs=4,
    num_steps=6,
    num_epochs=2,
    num_minibatches=3,
    policy_layers=(8,),
    value_layers=(8,),
    kl_target=0.01,
)


@pytest.fixture(scope="module")
def small():
    return make_ppo(cartpole(), SMALL)


@pytest.fixture(scope="module")
def later(small):
    """The state after two updates, where no moment is zero any more."""
    state = small.init(random.key(0))
    for _ in range(2):
        state, _ = small.update(state)
    return state


# --- Losses by hand ---


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        # Inside the clip range: -r A, and d(-r A)/d log r = -r A.
        (1.1, 2.0, -2.2, -2.2),
        (0.9, -2.0, 1.8, 1.8),
        # Above it, with A > 0: min(1.5 * 2, 1.2 * 2) = 2.4, and no slope.
        (1.5, 2.0, -2.4, 0.0),
        # Above it, with A < 0: min(1.5 * -2, 1.2 * -2) = -3, with its slope.
        (1.5, -2.0, 3.0, 3.0),
        # Below it, with A > 0: min(0.5 * 2, 0.8 * 2) = 1, with its slope.
        (0.5, 2.0, -1.0, -1.0),
        # Below it, with A < 0: min(0.5 * -2, 0.8 * -2) = -1.6, and no slope.
        (0.5, -2.0, 1.6, 0.0),
    ],
)
def test_clipped_surrogate_by_hand(ratio, advantage, loss, slope):
    log_prob = torch.tensor([math.log(ratio)], dtype=torch.float64)
    args = torch.zeros(1).double(), torch.tensor([advantage]).double(), 0.2
    assert float(clipped_surrogate(log_prob, *args)) == pytest.approx(loss, rel=1e-12)
    assert float(torch.func.grad(clipped_surrogate)(log_prob, *args)) == pytest.approx(slope, rel=1e-12)


def test_losses_are_means():
    log_prob = torch.tensor([1.1, 1.5]).double().log()
    zero, two = torch.zeros(2).double(), torch.full((2,), 2.0).double()
    # (-2.2 - 2.4) / 2, and the same with the clip as a tensor.
    for clip in (0.2, torch.tensor(0.2, dtype=torch.float64)):
        assert float(clipped_surrogate(log_prob, zero, two, clip)) == pytest.approx(-2.3)
    # ((1 - 3)^2 + (5 - 4)^2) / 2 / 2
    values, targets = torch.tensor([1.0, 5.0]), torch.tensor([3.0, 4.0])
    assert float(value_loss(values, torch.zeros(2), targets)) == pytest.approx(1.25)


@pytest.mark.parametrize(
    ("value", "target", "loss", "slope"),
    [
        # The old value is 1 and the clip 0.5. Within it: (1.2 - 3)^2 / 2 = 1.62, slope 1.2 - 3.
        (1.2, 3.0, 1.62, -1.8),
        # Beyond it towards the target: kept at 1.5, (1.5 - 3)^2 / 2 = 1.125 is above (2 - 3)^2 / 2; no slope.
        (2.0, 3.0, 1.125, 0.0),
        # Beyond it away from the target: (2 + 1)^2 / 2 = 4.5 is above (1.5 + 1)^2 / 2, with its slope.
        (2.0, -1.0, 4.5, 3.0),
        # Below it, away from the target: (0 - 3)^2 / 2 = 4.5 is above (0.5 - 3)^2 / 2.
        (0.0, 3.0, 4.5, -3.0),
    ],
)
def test_clipped_value_loss_by_hand(value, target, loss, slope):
    value = torch.tensor([value], dtype=torch.float64)
    args = torch.ones(1).double(), torch.tensor([target]).double(), 0.5
    assert float(value_loss(value, *args)) == pytest.approx(loss, rel=1e-12)
    assert float(torch.func.grad(value_loss)(value, *args)) == pytest.approx(slope, rel=1e-12)


def test_bounds_loss_by_hand():
    low, high = torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 4.0])
    # Margins are a tenth of half the ranges: 0.1 and 0.2.
    mean = torch.tensor([[1.1, 4.2], [-1.1, -0.2], [1.6, -1.2], [-3.1, 5.2]])
    # Third row: 0.5^2 + 1^2; fourth: 2^2 + 1^2; the first two are on the edge. (1.25 + 5) / 4
    assert float(bounds_loss(mean, low, high)) == pytest.approx(1.5625, rel=1e-5)
    unbounded = torch.full((2,), math.inf)
    assert float(bounds_loss(mean, -unbounded, unbounded)) == 0.0
    # Bounded on one side only: (5.2 - 4)^2 + ... with no margin where the range is infinite.
    assert float(bounds_loss(mean[3:], -unbounded, high)) == pytest.approx(1.2**2, rel=1e-5)
    slope = torch.func.grad(bounds_loss)(mean, -unbounded, high)
    assert torch.isfinite(slope).all()


@pytest.mark.parametrize("value_clip", [None, 0.3])
def test_slope_of_the_loss_is_the_finite_difference(value_clip):
    config = PPOConfig(value_coefficient=0.7, bounds_coefficient=0.3, value_clip=value_clip)
    policy, value = mlp((3, 5, 2), "tanh"), mlp((4, 5, 1), "tanh")
    keys = random.split(random.key(0), 12).unbind(0)
    params = Networks(policy.init(keys[0]), value.init(keys[1]), torch.tensor([-0.3, 0.2]))
    params = tree.map_leaves(lambda x: x.double(), params)

    def draw(i, *shape):
        return random.normal(keys[i], shape, torch.float64)

    n = 16
    data = Batch(
        policy_obs=draw(2, n, 3),
        value_obs=draw(3, n, 4),
        action=draw(4, n, 2),
        log_prob=-2.5 + 0.3 * draw(5, n),
        mean=draw(6, n, 2),
        advantage=draw(7, n),
        value=draw(8, n),
        target=draw(9, n),
    )
    coefficients = {"clip": torch.tensor(0.2).double(), "entropy_coefficient": torch.tensor(0.05).double()}
    bounds = (torch.tensor([-0.2, -0.2]).double(), torch.tensor([0.2, 0.2]).double())

    def loss(params):
        apply = (policy.apply, value.apply)
        return ppo_loss(params, data, torch.zeros(2).double(), coefficients, config, bounds, apply)

    slope, (_, metrics) = torch.func.grad_and_value(loss, has_aux=True)(params)
    assert 0.0 < float(metrics["policy/clip_fraction"]) < 1.0 and float(metrics["loss/bounds"]) > 0.0
    for i in range(5):
        direction = tree.map_leaves(lambda x, i=i: random.normal(random.key(i), x.shape, x.dtype), params)
        up, down = (
            float(loss(tree.map_leaves(lambda p, d, s=s: p + s * d, params, direction))[0]) for s in (1e-6, -1e-6)
        )
        along = tree.map_leaves(lambda g, d: (g * d).sum(), slope, direction)
        expected = sum(float(x) for x in tree.tree_leaves(along))
        assert (up - down) / 2e-6 == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_total_is_the_weighted_sum_of_its_parts():
    config = PPOConfig(value_coefficient=0.7, bounds_coefficient=0.3)
    net = mlp((1, 1), "tanh")
    params = Networks(net.init(random.key(0)), net.init(random.key(1)), torch.zeros(1))
    one = torch.ones(3, 1)
    data = Batch(one, one, 2 * one, -one[:, 0], one, one[:, 0], one[:, 0], 2 * one[:, 0])
    coefficients = {"clip": torch.tensor(0.2), "entropy_coefficient": torch.tensor(0.1)}
    bounds = (-0.01 * torch.ones(1), 0.01 * torch.ones(1))
    total, m = ppo_loss(params, data, torch.zeros(1), coefficients, config, bounds, (net.apply, net.apply))
    # The entropy of a unit Gaussian is (1 + log(2 pi)) / 2 = 1.41894.
    assert float(m["policy/entropy"]) == pytest.approx(1.4189385)
    expected = m["loss/policy"] + 0.7 * m["loss/value"] - 0.1 * 1.4189385 + 0.3 * m["loss/bounds"]
    assert float(total) == pytest.approx(float(expected), rel=1e-6)


# --- The update ---


def test_update_is_pure(small, later):
    before = tree.map_leaves(torch.clone, later)
    first = small.update(later)
    assert_same(before, later)
    assert_same(first, small.update(later))
    state, _ = first
    assert int(state.iteration) == 3 and int(state.env_steps) == 3 * SMALL.batch_size
    for (name, new), (_, old) in zip(tree.named_leaves(state.params), tree.named_leaves(later.params), strict=True):
        assert not torch.equal(new, old), name
    assert not torch.equal(state.key, later.key)


def test_saved_and_loaded_goes_on_bit_for_bit(small, later):
    state, metrics = later, {}
    for _ in range(4):
        state, metrics = small.update(state)
    half, _ = small.update(later)
    half, _ = small.update(half)
    leaves, structure = tree.tree_flatten(half)
    saved = [np.array(leaf.numpy()) for leaf in leaves]
    # A new process: another engine, other recordings.
    again = make_ppo(cartpole(), SMALL)
    resumed = tree.tree_unflatten([torch.from_numpy(array) for array in saved], structure)
    for _ in range(2):
        resumed, resumed_metrics = again.update(resumed)
    assert_same((state, metrics), (resumed, resumed_metrics))


def test_population_is_what_each_would_be_alone(small):
    states = [small.init(random.key(seed)) for seed in (0, 1)]
    rates = [1e-3, 1e-4]
    states = [
        tree.replace(s, coefficients={**s.coefficients, "learning_rate": torch.tensor(rate)})
        for s, rate in zip(states, rates, strict=True)
    ]
    together = tree.stack(states)
    update = torch.func.vmap(small.update)
    for _ in range(3):
        together, metrics = update(together)
        alone = [small.update(s) for s in states]
        states = [s for s, _ in alone]
    for i, (state, own_metrics) in enumerate(alone):
        for name in ("params", "env_state", "obs", "observation_moments", "coefficients"):
            ours, theirs = tree.named_leaves(getattr(state, name)), getattr(together, name)
            for (leaf, x), (_, y) in zip(ours, tree.named_leaves(tree.index(theirs, i)), strict=True):
                torch.testing.assert_close(x, y, rtol=1e-4, atol=2e-6, msg=f"{name}.{leaf}")
        for name in ("loss/value", "policy/kl", "policy/std"):
            torch.testing.assert_close(own_metrics[name], metrics[name][i], rtol=1e-3, atol=1e-6)
    # The two have gone different ways, each as far as its learning rate takes it.
    far = []
    for i, seed in enumerate((0, 1)):
        start = tree.tree_leaves(small.init(random.key(seed)).params)
        end = tree.tree_leaves(tree.index(together.params, i))
        far.append(sum(float((a - b).square().sum()) for a, b in zip(start, end, strict=True)) ** 0.5)
    assert 5 < far[0] / far[1] < 20
    assert not torch.equal(together.env_state.physics.qpos[0], together.env_state.physics.qpos[1])


def test_randomized_robots_differ_and_learn(small):
    env = cartpole()
    learner = make_ppo(env, SMALL, make_randomizer(env, Randomization(mass_scale=(0.5, 2.0))))
    state, shared = learner.init(random.key(0)), small.init(random.key(0))
    mass, nominal = state.env_params.physics["body_mass"], env.engine.nominal("body_mass")["body_mass"]
    assert mass.shape == (4, 3) and len(mass[:, 1].unique()) == 4
    assert (mass >= 0.5 * nominal).all() and (mass <= 2.0 * nominal).all()
    assert all(leaf.shape[0] == 4 and leaf.is_contiguous() for _, leaf in tree.named_leaves(state.env_params))
    # All else begins as it does without.
    assert_same(tree.replace(state, env_params=shared.env_params), shared)
    before = tree.map_leaves(torch.clone, state)
    after, metrics = learner.update(state)
    assert_same(state, before)
    assert_same(after.env_params, state.env_params)
    assert_same((after, metrics), learner.update(state))
    assert not torch.equal(after.env_state.physics.qpos, small.update(shared)[0].env_state.physics.qpos)
    # Another run has other robots.
    assert not torch.equal(learner.init(random.key(1)).env_params.physics["body_mass"], mass)


def test_ranges_of_identity_learn_the_same_bits(small):
    env = cartpole()
    learner = make_ppo(env, SMALL, make_randomizer(env, Randomization()))
    (state, metrics), (plain, expected) = (
        algorithm.update(algorithm.init(random.key(0))) for algorithm in (learner, small)
    )
    assert_same((tree.replace(state, env_params=plain.env_params), metrics), (plain, expected))


def with_settings(**changes):
    return dataclasses.replace(SMALL, **changes)


def test_first_gradient_step_is_that_of_the_acting_policy():
    """Where the policy has not moved, every ratio is 1: the surrogate is the mean advantage, negated.

    With no discount and a reward of 1, an advantage is 1 less the value.
    """
    config = with_settings(
        num_epochs=1,
        num_minibatches=1,
        discount=0.0,
        normalize_advantages=False,
        learning_rate=1e-12,
        value_clip=0.1,
    )
    ppo = make_ppo(stream(alive_only=True), config)
    state = ppo.init(random.key(0))
    for _ in range(3):
        state, metrics = ppo.update(state)
        assert float(metrics["loss/policy"]) == pytest.approx(float(metrics["value/mean"]) - 1.0, abs=1e-6)
        assert float(metrics["policy/clip_fraction"]) == 0.0
        assert 0.0 <= float(metrics["policy/kl"]) < 1e-9
        # Nor has the value moved, so that its clip stops no gradient.
        assert float(metrics["gradients/norm"]) > 1e-3


def test_advantages_stop_at_the_end_of_an_episode():
    """Values of 0 and no discounting: an advantage is the sum of rewards up to the end, of either kind.

    Episodes of two steps give 2 and 1: 1.5 in the mean. Were rewards counted on into the next episodes of the
    six steps, it would be 3.5.
    """
    config = with_settings(
        num_epochs=1,
        num_minibatches=1,
        discount=1.0,
        gae_lambda=1.0,
        normalize_advantages=False,
        normalize_values=False,
    )
    for end in ("truncated", "terminated"):
        ppo = make_ppo(stream(alive_only=True, end=end, length=2), config)
        state = ppo.init(random.key(0))
        nothing = tree.map_leaves(torch.zeros_like, state.params.value)
        _, metrics = ppo.update(tree.replace(state, params=tree.replace(state.params, value=nothing)))
        assert float(metrics["loss/policy"]) == pytest.approx(-1.5, abs=1e-6)


def test_divergence_is_that_of_the_whole_iteration():
    # One gradient step: the policy had not moved before it, and has after it.
    ppo = make_ppo(cartpole(), with_settings(num_epochs=1, num_minibatches=1, learning_rate=1e-2))
    _, metrics = ppo.update(ppo.init(random.key(0)))
    assert float(metrics["policy/kl"]) > 1e-5


def adapted(kl, **changes):
    config = PPOConfig(learning_rate=1e-3, **changes)
    coefficients = {"learning_rate": torch.tensor(1e-3), "clip": torch.tensor(0.2)}
    after = _adapted(coefficients, torch.tensor(kl), config)
    assert torch.equal(after["clip"], coefficients["clip"])
    return float(after["learning_rate"])


def test_learning_rate_follows_the_divergence():
    assert adapted(1.0) == pytest.approx(1e-3)
    # Slower above twice the target, faster below half of it, by a fifth.
    assert adapted(0.021, kl_target=0.01) == pytest.approx(1e-3 / 1.2)
    assert adapted(0.019, kl_target=0.01) == pytest.approx(1e-3)
    assert adapted(0.0051, kl_target=0.01) == pytest.approx(1e-3)
    assert adapted(0.0049, kl_target=0.01) == pytest.approx(1e-3 * 1.2)
    assert adapted(1.0, kl_target=0.01, learning_rate_bounds=(9e-4, 1e-2)) == pytest.approx(9e-4)
    assert adapted(0.0, kl_target=0.01, learning_rate_bounds=(1e-5, 1.1e-3)) == pytest.approx(1.1e-3)


def test_the_average_forgets_its_beginning_and_acts():
    learner = make_ppo(cartpole(), dataclasses.replace(SMALL, policy_average=0.25))
    states = [learner.init(random.key(0))]
    for _ in range(3):
        states.append(learner.update(states[-1])[0])
    policies = [[leaf.double() for leaf in tree.tree_leaves(s.params.policy)] for s in states]
    for place, leaf in enumerate(tree.tree_leaves(states[-1].averaged)):
        first, *later = (policy[place] for policy in policies)
        mean = first
        # (1 + i) / (10 + i) is 1/10, 2/11, 3/12 = 0.25: the last one is where both are equal.
        for keep, policy in zip((1 / 10, 2 / 11, 1 / 4), later, strict=True):
            mean = keep * mean + (1 - keep) * policy
        torch.testing.assert_close(leaf.double(), mean, rtol=1e-5, atol=1e-7)
    # What is learned is the same with or without it; what acts is not.
    plain = make_ppo(cartpole(), SMALL)
    state = plain.init(random.key(0))
    assert_same(plain.act(state, state.obs, None), learner.act(states[0], state.obs, None))
    for _ in range(3):
        state, _ = plain.update(state)
    assert_same(state.params, states[-1].params)
    assert_same(state.averaged, state.params.policy)
    ours, newest = (make.act(s, state.obs, None) for make, s in ((learner, states[-1]), (plain, state)))
    assert not torch.equal(ours, newest)
    assert_same(ours, plain.act(tree.replace(state, averaged=states[-1].averaged), state.obs, None))


def test_update_adapts_the_learning_rate(small, later):
    state, metrics = small.update(later)
    assert torch.equal(metrics["policy/learning_rate"], later.coefficients["learning_rate"])
    factor = 1 / 1.2 if metrics["policy/kl"] > 0.02 else 1.2 if metrics["policy/kl"] < 0.005 else None
    assert factor is not None
    expected = float(later.coefficients["learning_rate"]) * factor
    assert float(state.coefficients["learning_rate"]) == pytest.approx(expected)


def test_value_function_sees_the_critic_group_where_there_is_one():
    with_critic, without = (make_ppo(stream(critic=critic), SMALL).init(random.key(0)) for critic in (True, False))
    assert set(with_critic.observation_moments) == {"policy", "critic"}
    assert set(without.observation_moments) == {"policy"}

    def inputs(params):
        return {leaf.shape[-1] for name, leaf in tree.named_leaves(params) if leaf.ndim == 2} - {8}

    # One number for the policy; the critic's group has two.
    assert inputs(with_critic.params.policy) == {1} and inputs(with_critic.params.value) == {2}
    assert inputs(without.params.value) == {1}


def test_metrics_of_a_trajectory():
    # Four robots, six steps of one second, episodes of two steps: three each.
    for end, fall_rate in (("truncated", 0.0), ("terminated", 1.0)):
        ppo = make_ppo(stream(alive_only=True, end=end, length=2), SMALL)
        _, metrics = ppo.update(ppo.init(random.key(0)))
        assert float(metrics["episode/ended"]) == 12
        assert float(metrics["episode/return"]) == pytest.approx(2.0)
        assert float(metrics["episode/length"]) == 2.0
        assert float(metrics["episode/fall_rate"]) == fall_rate
        # Four robots for six seconds are 0.4 minutes.
        assert float(metrics["episode/falls_per_minute"]) == pytest.approx(12 / 0.4 if end == "terminated" else 0.0)
        for name in ("reward", "reward_raw", "episode_reward", "episode_reward_raw"):
            assert float(metrics[f"{name}/alive"]) == pytest.approx(1.0), name
        assert float(metrics["env/faults"]) == 0.0
    endless = make_ppo(stream(alive_only=True, length=100), SMALL)
    _, metrics = endless.update(endless.init(random.key(0)))
    assert math.isnan(float(metrics["episode/return"])) and float(metrics["episode/ended"]) == 0
    assert math.isnan(float(metrics["episode_reward/alive"])) and float(metrics["reward_raw/alive"]) == 1.0


def test_metrics_of_the_environment_are_means_under_names_of_their_own():
    def count(params, before, action, after):
        # Steps 1, 2 and 3 of an episode: of the second one nothing can be said.
        t = after.physics.qpos[0]
        said = torch.where(t == 2, 0.0, t)
        return {
            "time": t,
            "group/time": 2 * t,
            "leg": Parts(torch.stack([t, -t]), ("left", "right")),
            "cost": Ratio(said, torch.where(t == 2, 0.0, 4.0)),
        }

    ppo = make_ppo(stream(alive_only=True, metrics=count), SMALL)
    _, metrics = ppo.update(ppo.init(random.key(0)))
    # Six steps are two episodes of three: 2 on average; (1 + 3) / (4 + 4).
    expected = {"env/time": 2.0, "group/time": 4.0, "leg/left": 2.0, "leg/right": -2.0, "env/cost": 0.5}
    assert {name: float(metrics[name]) for name in expected} == pytest.approx(expected)
    assert not {"env/leg", "cost", "env/fault"} & set(metrics)


# --- Tiny worlds ---


def learn(env, iterations, **changes):
    start = PPOConfig(
        num_envs=16,
        num_steps=8,
        num_minibatches=2,
        learning_rate=1e-2,
        policy_layers=(),
        value_layers=(),
        discount=0.9,
    )
    config = dataclasses.replace(start, **changes)
    ppo = make_ppo(env, config)
    state = ppo.init(random.key(0))
    for _ in range(iterations):
        state, _ = ppo.update(state)

    def value(*obs):
        network = mlp((len(obs), *config.value_layers, 1), config.activation)
        seen = normalize(state.observation_moments["policy"], torch.tensor(obs))
        return float(denormalize(state.value_moments, network.apply(state.params.value, seen).squeeze(-1)))

    def act(*obs):
        return float(ppo.act(state, {"policy": torch.tensor([obs])}, None))

    return state, value, act


def test_bandit_finds_the_best_action_of_each_context():
    """One step, a context of -1 or 1, and a reward that is largest at `0.5 context - 0.2`."""

    def coin(key):
        return torch.where(random.bernoulli(key), 1.0, -1.0).double()

    env = tiny(
        lambda qpos: {"policy": {"context": qpos[1:]}},
        lambda context, count, action: -((action[0] - (0.5 * context - 0.2)) ** 2),
        end="terminated",
        context=coin,
    )
    state, value, act = learn(env, 60, num_envs=64, initial_std=0.5, policy_layers=(8,), value_layers=(8,))
    assert act(1.0) == pytest.approx(0.3, abs=0.05)
    assert act(-1.0) == pytest.approx(-0.7, abs=0.05)
    # What is left of the reward is the noise's: -std^2, and noise does not pay.
    std = float(state.params.log_std.exp())
    assert std < 0.3
    assert value(1.0) == pytest.approx(-(std**2), abs=0.03)


def one_hot(size):
    def observe(qpos):
        return {"policy": {"place": (torch.arange(size) == qpos[0]).double()}}

    return observe


def test_chain_of_two_states_has_its_discounted_value():
    """Rewards 1, then 3, then the end, at a discount of 0.5: 1 + 0.5 * 3 = 2.5, and 3."""
    env = tiny(one_hot(2), lambda context, count, action: 1 + 2 * count + 0 * action[0], end="terminated", length=2)
    _, value, _ = learn(env, 60, discount=0.5)
    assert value(1.0, 0.0) == pytest.approx(2.5, abs=0.03)
    assert value(0.0, 1.0) == pytest.approx(3.0, abs=0.03)


def test_stream_that_ends_is_worth_what_is_left():
    """Five rewards of 1 and the end, at a discount of 0.9: 4.0951, 3.439, 2.71, 1.9, 1."""
    env = tiny(one_hot(5), lambda context, count, action: 1 + 0 * action[0], end="terminated", length=5)
    _, value, _ = learn(env, 80, num_steps=10)
    for place, expected in enumerate((4.0951, 3.439, 2.71, 1.9, 1.0)):
        assert value(*(float(i == place) for i in range(5))) == pytest.approx(expected, abs=0.05)


def test_stream_cut_by_the_clock_is_worth_an_endless_one():
    """A start that costs 10, then 1 for every step, cut after four steps; it sees whether it is at the start.

    Continued from the state it was cut in, the stream is worth 1 / (1 - 0.9) = 10 and the start
    -10 + 0.9 * 10 = -1. Were it taken to end there, the stream would be worth less than 2.71, which is what
    the first of its three places is worth then; were it continued from the new start, less than 6.
    """

    def observe(qpos):
        return {"policy": {"start": (qpos[:1] == 0).double()}}

    env = tiny(
        observe,
        lambda context, count, action: torch.where(count == 0, -10.0, 1.0) + 0 * action[0],
        length=4,
    )
    _, value, _ = learn(env, 160, num_epochs=2, learning_rate=3e-2)
    assert value(0.0) == pytest.approx(10.0, abs=0.2)
    assert value(1.0) == pytest.approx(-1.0, abs=0.3)


# --- Mistakes ---


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_envs", 0),
        ("num_steps", 0),
        ("num_epochs", 0),
        ("num_minibatches", 0),
        ("num_minibatches", 7),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("kl_target", 0.0),
        ("kl_target", math.nan),
        ("learning_rate_bounds", (1e-2, 1e-5)),
        ("learning_rate_bounds", (0.0, 1e-5)),
        ("discount", 1.5),
        ("discount", -0.1),
        ("gae_lambda", 1.5),
        ("clip", 0.0),
        ("value_clip", -1.0),
        ("value_coefficient", -1.0),
        ("entropy_coefficient", -1.0),
        ("bounds_coefficient", -1.0),
        ("symmetry_coefficient", -1.0),
        ("max_gradient_norm", 0.0),
        ("initial_std", 0.0),
        ("policy_layers", (8, 0)),
        ("value_layers", (0,)),
        ("activation", "sin"),
    ],
)
def test_settings_that_cannot_work_are_refused(name, value):
    with pytest.raises(InputError) as caught:
        PPOConfig(**{name: value})
    message = str(caught.value)
    flag = "--ppo." + name.replace("_", "-")
    assert message.startswith(f"{name} must be ") and f"got {value} ({flag})" in message and "\n" not in message


def test_a_batch_of_one_is_refused():
    with pytest.raises(InputError, match="num_steps must be more than 1 where num_envs is 1, got 1"):
        PPOConfig(num_envs=1, num_steps=1, num_minibatches=1)
    assert PPOConfig(num_envs=1, num_steps=2, num_minibatches=1).batch_size == 2


def test_an_environment_without_resets_is_refused():
    with pytest.raises(InputError, match="wrap cartpole in auto_reset"):
        make_ppo(make_cartpole(1), SMALL)
