"""Returns against hand arithmetic, sums written out in numpy, and properties of episodes."""

import math

import numpy as np
import pytest
import torch

from rlcore.returns import discounted_returns, gae, lambda_returns, n_step_returns


def _rollout(seed: int, steps: int, *batch: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """A rollout with terminations and truncations, whose values are those of the states it visits."""
    rng = np.random.default_rng(seed)
    shape = (steps, *batch)
    terminated = rng.random(shape) < 0.15
    truncated = (rng.random(shape) < 0.15) & ~terminated
    ended = terminated | truncated
    v_tm1, v_t = rng.normal(size=shape), rng.normal(size=shape)
    v_t[:-1] = np.where(ended[:-1], v_t[:-1], v_tm1[1:])
    arrays = {
        "r_t": rng.normal(size=shape),
        "discount_t": 0.9 * ~terminated,
        "v_tm1": v_tm1,
        "v_t": v_t,
        "trace_t": 1.0 - ended,
    }
    return {name: torch.tensor(a, dtype=dtype) for name, a in arrays.items()}


def _without_v_tm1(rollout: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: a for name, a in rollout.items() if name != "v_tm1"}


def _all_functions(rollout: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    rest = _without_v_tm1(rollout)
    return [
        gae(**rollout, lambda_=0.95),
        lambda_returns(**rest, lambda_=0.8),
        discounted_returns(**rest),
        n_step_returns(**rest, n=3),
    ]


def test_gae_by_hand():
    # gamma = lambda = 1/2, three steps, the second truncated.
    # delta = r + discount v_t - v_tm1: 1 + 4/2 - 2 = 1;  2 + 6/2 - 4 = 1;  3 + 2/2 - 8 = -4.
    # A_2 = -4;  A_1 = 1 (an episode ended);  A_0 = 1 + 1/4 * 1 = 1.25.
    half = torch.full((3,), 0.5)
    r_t, v_tm1 = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 8.0])
    v_t, trace_t = torch.tensor([4.0, 6.0, 2.0]), torch.tensor([1.0, 0.0, 1.0])
    assert gae(r_t, half, v_tm1, v_t, trace_t, 0.5).tolist() == [1.25, 1.0, -4.0]
    # The second terminated instead: delta_1 = 2 + 0 - 4 = -2;  A_0 = 1 - 1/4 * 2 = 0.5.
    terminated = torch.tensor([0.5, 0.0, 0.5])
    assert gae(r_t, terminated, v_tm1, v_t, trace_t, 0.5).tolist() == [0.5, -2.0, -4.0]


def test_returns_by_hand():
    # gamma = 1/2; four steps, the third truncated with a value of 8, the rollout cut with a value of 4.
    discount_t = torch.full((4,), 0.5)
    r_t, v_t = torch.tensor([1.0, 2.0, 4.0, 1.0]), torch.tensor([2.0, 6.0, 8.0, 4.0])
    trace_t = torch.tensor([1.0, 1.0, 0.0, 1.0])
    args = (r_t, discount_t, v_t, trace_t)
    # G_3 = 1 + 4/2 = 3;  G_2 = 4 + 8/2 = 8;  G_1 = 2 + 8/2 = 6;  G_0 = 1 + 6/2 = 4.
    assert discounted_returns(*args).tolist() == [4.0, 6.0, 8.0, 3.0]
    # One step: r + v/2 = 2, 5, 8, 3.  Two: 1 + 5/2 = 3.5, 2 + 8/2 = 6, then the ends as before.
    assert n_step_returns(*args, 1).tolist() == [2.0, 5.0, 8.0, 3.0]
    assert n_step_returns(*args, 2).tolist() == [3.5, 6.0, 8.0, 3.0]
    # lambda = 1/2: G_1 = 2 + (6/2 + 8/2)/2 = 5.5;  G_0 = 1 + (2/2 + 5.5/2)/2 = 2.875.
    assert lambda_returns(*args, 0.5).tolist() == [2.875, 5.5, 8.0, 3.0]


def test_gae_equals_the_sum_over_all_later_errors():
    rollout = _rollout(0, 12, 3)
    r_t, discount_t, v_tm1, v_t, trace_t = (rollout[k].numpy() for k in rollout)
    delta = r_t + discount_t * v_t - v_tm1
    expected = np.zeros_like(delta)
    for t in range(12):
        for k in range(t, 12):
            expected[t] += np.prod((0.95 * discount_t * trace_t)[t:k], axis=0) * delta[k]
    np.testing.assert_allclose(gae(**rollout, lambda_=0.95).numpy(), expected, rtol=1e-12, atol=1e-12)


def _n_step_reference(r_t, discount_t, v_t, trace_t, n):
    steps = len(r_t)
    expected = np.zeros(steps)
    for t in range(steps):
        weight = 1.0
        for k in range(t, steps):
            expected[t] += weight * r_t[k]
            weight *= discount_t[k]
            if trace_t[k] == 0 or k == steps - 1 or k == t + n - 1:
                expected[t] += weight * v_t[k]
                break
    return expected


@pytest.mark.parametrize("n", [1, 2, 5, 11, 12, 100])
def test_n_step_returns_equal_the_sum_written_out(n):
    rollout = _without_v_tm1(_rollout(1, 12, 4))
    columns = [_n_step_reference(**{k: a[:, i].numpy() for k, a in rollout.items()}, n=n) for i in range(4)]
    actual = n_step_returns(**rollout, n=n).numpy()
    np.testing.assert_allclose(actual, np.stack(columns, axis=1), rtol=1e-12, atol=1e-12)
    if n >= 12:
        np.testing.assert_allclose(actual, discounted_returns(**rollout).numpy(), rtol=1e-12, atol=1e-12)


def test_lambda_returns_are_the_weighted_mean_of_n_step_returns():
    # In one unbroken stretch, (1 - l) sum_n l^(n-1) G^(n), with the rest of the weight on the longest.
    steps, lambda_ = 6, 0.7
    rollout = _without_v_tm1(_rollout(2, steps, 2))
    rollout["trace_t"] = torch.ones(steps, 2, dtype=torch.float64)
    mixed = lambda_ ** (steps - 1) * n_step_returns(**rollout, n=steps)
    for n in range(1, steps):
        mixed = mixed + (1 - lambda_) * lambda_ ** (n - 1) * n_step_returns(**rollout, n=n)
    torch.testing.assert_close(lambda_returns(**rollout, lambda_=lambda_)[0], mixed[0])


@pytest.mark.parametrize("lambda_", [0.0, 0.3, 0.95, 1.0])
def test_gae_is_the_lambda_return_less_the_value(lambda_):
    rollout = _rollout(3, 16, 5)
    returns = lambda_returns(**_without_v_tm1(rollout), lambda_=lambda_)
    torch.testing.assert_close(gae(**rollout, lambda_=lambda_), returns - rollout["v_tm1"])


def test_gae_between_one_step_and_the_whole_return():
    rollout = _rollout(4, 16, 5)
    td_error = rollout["r_t"] + rollout["discount_t"] * rollout["v_t"] - rollout["v_tm1"]
    assert torch.equal(gae(**rollout, lambda_=0.0), td_error)
    whole = discounted_returns(**_without_v_tm1(rollout))
    torch.testing.assert_close(gae(**rollout, lambda_=1.0), whole - rollout["v_tm1"])


@pytest.mark.parametrize("terminated", [False, True])
def test_nothing_crosses_the_end_of_an_episode(terminated):
    end = 4
    rollout = _rollout(5, 10)
    rollout["trace_t"] = torch.ones(10, dtype=torch.float64)
    rollout["trace_t"][end] = 0.0
    rollout["discount_t"] = torch.full((10,), 0.9, dtype=torch.float64)
    if terminated:
        rollout["discount_t"][end] = 0.0
    before = _all_functions(rollout)
    for value in (1e9, -3.0, math.inf, math.nan):
        changed = {name: a.clone() for name, a in rollout.items()}
        for a in changed.values():
            a[end + 1 :] = value
        for old, new in zip(before, _all_functions(changed), strict=True):
            assert torch.equal(old[: end + 1], new[: end + 1])
            assert not torch.equal(old[end + 1 :], new[end + 1 :])


def test_termination_ignores_the_value_and_truncation_continues_with_it():
    end = 4
    rollout = _rollout(6, 8)
    rollout["trace_t"] = torch.ones(8, dtype=torch.float64)
    rollout["trace_t"][end] = 0.0
    rollout["discount_t"] = torch.full((8,), 0.9, dtype=torch.float64)
    raised = dict(rollout, v_t=rollout["v_t"].clone())
    raised["v_t"][end] += 1.0
    # Of GAE, lambda returns, whole returns, n-step returns: the last step's estimate rises by the discount.
    for old, new in zip(_all_functions(rollout), _all_functions(raised), strict=True):
        assert (new - old)[end].item() == pytest.approx(0.9)
        assert (new - old)[end - 1].item() > 0.1
        assert torch.equal(old[end + 1 :], new[end + 1 :])
    terminated = rollout["discount_t"].clone()
    terminated[end] = 0.0
    for value in (1e9, math.nan):
        raised["v_t"][end] = value
        without = _all_functions(dict(rollout, discount_t=terminated))
        changed = _all_functions(dict(raised, discount_t=terminated))
        assert all(torch.equal(a, b) for a, b in zip(without, changed, strict=True))


def test_a_constant_reward_of_an_endless_task_is_worth_its_geometric_sum():
    # With v = r / (1 - gamma) everywhere, all returns are v and all advantages are zero.
    shape = (24, 3)
    value = torch.full(shape, 2.0 / (1 - 0.9), dtype=torch.float64)
    rollout = {
        "r_t": torch.full_like(value, 2.0),
        "discount_t": torch.full_like(value, 0.9),
        "v_tm1": value,
        "v_t": value,
        "trace_t": torch.ones_like(value),
    }
    advantages, *returns = _all_functions(rollout)
    torch.testing.assert_close(advantages, torch.zeros_like(value), rtol=0.0, atol=1e-12)
    for g in returns:
        torch.testing.assert_close(g, value)


def test_batch_axes_are_independent():
    rollout = _rollout(7, 9, 2, 3, dtype=torch.float32)
    whole = _all_functions(rollout)
    for i in range(2):
        for j in range(3):
            alone = _all_functions({name: a[:, i, j] for name, a in rollout.items()})
            for a, b in zip(whole, alone, strict=True):
                assert a.shape == (9, 2, 3)
                assert torch.equal(a[:, i, j], b)


def test_vmap_equals_loop():
    rollout = _rollout(8, 9, 6)
    mapped = torch.vmap(lambda r: tuple(_all_functions(r)), in_dims=1, out_dims=1)(rollout)
    for a, b in zip(mapped, _all_functions(rollout), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    # A population with a lambda each.
    lambdas = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    population = torch.vmap(lambda x: gae(**rollout, lambda_=x))(lambdas)
    for a, x in zip(population, lambdas, strict=True):
        torch.testing.assert_close(a, gae(**rollout, lambda_=x.item()))


def test_one_step_is_enough():
    rollout = _rollout(9, 1, 4)
    one_step = rollout["r_t"] + rollout["discount_t"] * rollout["v_t"]
    advantages, *returns = _all_functions(rollout)
    assert torch.equal(advantages, one_step - rollout["v_tm1"])
    for g in returns:
        torch.testing.assert_close(g, one_step)


def test_gradients_equal_finite_differences():
    rollout = _rollout(10, 5, 2)
    r_t, v_tm1, v_t = (rollout[k].requires_grad_() for k in ("r_t", "v_tm1", "v_t"))

    def all_of(r_t: torch.Tensor, v_tm1: torch.Tensor, v_t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(_all_functions(dict(rollout, r_t=r_t, v_tm1=v_tm1, v_t=v_t)))

    assert torch.autograd.gradcheck(all_of, (r_t, v_tm1, v_t))


# Where the test run checks annotations, a wrong shape is refused before the function's own check: either way
# the message names the argument.
REFUSED = (ValueError, TypeError)


@pytest.mark.parametrize("name", ["discount_t", "v_tm1", "v_t", "trace_t"])
@pytest.mark.parametrize("change", [lambda a: a[:-1], lambda a: a.unsqueeze(-1), lambda a: a.long()])
def test_arrays_that_do_not_fit_are_refused(name, change):
    rollout = _rollout(11, 4, 2)
    rollout[name] = change(rollout[name])
    with pytest.raises(REFUSED, match=name):
        gae(**rollout, lambda_=0.9)


def test_other_refusals():
    rollout = _without_v_tm1(_rollout(12, 4, 2))
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        n_step_returns(**rollout, n=0)
    with pytest.raises(REFUSED, match="r_t"):
        discounted_returns(**{name: a[:0] for name, a in rollout.items()})
    with pytest.raises(REFUSED, match="r_t"):
        discounted_returns(**{name: a[0, 0] for name, a in rollout.items()})
