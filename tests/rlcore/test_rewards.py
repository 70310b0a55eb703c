"""Reward terms: hand-computed values, weights from the parameters, and slopes that are finite."""

import math

import pytest
import torch
from torch.func import grad, vmap

from rlcore import random, tree
from rlcore.env import batch
from rlcore.errors import InputError
from rlcore.rewards import exponential, tolerance, weighted_terms
from tasks.cartpole import make_cartpole

CONTROL_DT = 0.02


@pytest.fixture(scope="module")
def env():
    return make_cartpole(1)


def step(env, params, action, num=3):
    batched = batch(env)
    state, _ = batched.reset(params, random.split(random.key(0), num))
    return batched.step(params, state, action)[1]


def test_reward_is_the_sum_of_its_terms(env):
    action = torch.tensor([[0.5], [-1.0], [0.0]])
    transition = step(env, env.params, action)
    assert set(transition.terms) == {"alive", "effort"} == set(env.spec.terms)
    # Weights 50 and -0.5 per second, and a control step of 0.02 s.
    torch.testing.assert_close(transition.terms["alive"], torch.ones(3).double())
    torch.testing.assert_close(transition.terms["effort"], -0.5 * 0.02 * action[:, 0].double() ** 2)
    total = transition.terms["alive"] + transition.terms["effort"]
    torch.testing.assert_close(transition.reward, total, rtol=1e-15, atol=0)


def test_weights_come_from_the_parameters(env):
    action = torch.full((3, 1), 0.5)
    weights = {"alive": torch.tensor(0.0).double(), "effort": torch.tensor(100.0).double()}
    transition = step(env, tree.replace(env.params, weights=weights), action)
    # 100 * 0.5^2 * 0.02 = 0.5
    torch.testing.assert_close(transition.reward, torch.full((3,), 0.5).double())


def test_no_terms_are_no_reward(env):
    state, _ = env.reset(env.params, random.key(0))
    reward, terms, raw = weighted_terms([], env.params, state, torch.zeros(1), state, CONTROL_DT)
    assert float(reward) == 0.0 and reward.shape == () and terms == {} and raw.shape == (0,)


def test_slope_of_the_reward_by_the_action(env):
    state, _ = env.reset(env.params, random.key(0))
    slope = grad(lambda action: env.step(env.params, state, action)[1].reward)
    for value in (-0.7, 0.0, 0.4):
        # d/da (-0.5 a^2 0.02) = -0.02 a
        got = slope(torch.tensor([value], dtype=torch.float64))
        assert float(got) == pytest.approx(-0.02 * value, abs=1e-12)


@pytest.mark.parametrize(
    ("x", "low", "high", "margin", "expected"),
    [
        (0.5, 0.0, 1.0, 0.0, 1.0),
        (0.0, 0.0, 1.0, 0.0, 1.0),
        (1.0, 0.0, 1.0, 0.0, 1.0),
        (1.001, 0.0, 1.0, 0.0, 0.0),
        (-0.001, 0.0, 1.0, 0.0, 0.0),
        (0.5, 0.0, 1.0, 2.0, 1.0),
        (3.0, 0.0, 1.0, 2.0, 0.1),
        (-2.0, 0.0, 1.0, 2.0, 0.1),
        # Half the margin outside: 0.1^(1/4).
        (2.0, 0.0, 1.0, 2.0, 0.5623413251903491),
        # Twice the margin: 0.1^4.
        (5.0, 0.0, 1.0, 2.0, 1e-4),
        (1e9, 0.0, math.inf, 1.0, 1.0),
        (-1.0, 0.0, math.inf, 1.0, 0.1),
        (-1e9, -math.inf, 0.0, 1.0, 1.0),
    ],
)
def test_tolerance_by_hand(x, low, high, margin, expected):
    got = tolerance(torch.tensor(x, dtype=torch.float64), low, high, margin)
    assert float(got) == pytest.approx(expected, rel=1e-12)


def test_exponential_by_hand():
    squares = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    # exp(0), exp(-1), exp(-4) for a scale of 0.5
    expected = torch.tensor([1.0, 0.36787944117144233, 0.01831563888873418]).double()
    torch.testing.assert_close(exponential(squares, 0.5), expected)


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_slopes_are_finite_everywhere(margin):
    points = torch.tensor([-1e6, -1.0, 0.0, 0.5, 1.0, 1.2, 1e6]).double()
    for bounds in ((0.0, 1.0), (-math.inf, 1.0), (0.0, 0.0)):
        slope = vmap(grad(lambda x, b=bounds: x * tolerance(x, b[0], b[1], margin)))(points)
        assert torch.isfinite(slope).all()
    assert torch.isfinite(vmap(grad(lambda x: exponential(x * x, 0.1)))(points)).all()
    # exp(-(d/m)^2 ln 10)' = -2 ln 10 d / m^2 times it: at x = 1.2, d = 0.2 and m = 0.5.
    if margin:
        expected = -2 * math.log(10) * 0.2 / 0.25 * 10 ** -(0.4**2)
        got = grad(lambda x: tolerance(x, 0.0, 1.0, margin))(torch.tensor(1.2).double())
        assert float(got) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((1.0, 0.0), "low <= high, got 1.0 and 0.0"),
        ((math.nan, 0.0), "low <= high, got nan"),
        ((0.0, 1.0, -0.5), "margin must be 0 or more, got -0.5"),
        ((0.0, 1.0, math.nan), "margin must be 0 or more, got nan"),
    ],
)
def test_mistakes_are_refused(args, words):
    with pytest.raises(InputError, match=words):
        tolerance(torch.zeros(()), *args)
