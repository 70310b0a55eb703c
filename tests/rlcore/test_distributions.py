"""Distributions against torch.distributions, quadrature, finite differences and loops."""

import math
from collections.abc import Callable

import pytest
import torch

from rlcore import random
from rlcore.distributions import (
    gaussian_entropy,
    gaussian_kl,
    gaussian_log_prob,
    gaussian_sample,
    tanh_gaussian_log_prob,
    tanh_gaussian_mode,
    tanh_gaussian_sample,
)


def _parameters(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    mean, log_std = random.normal(random.key(seed), (2, *shape), dtype)
    return mean, 0.5 * log_std - 0.5


def _torch_gaussian(mean: torch.Tensor, log_std: torch.Tensor) -> torch.distributions.Distribution:
    return torch.distributions.Independent(torch.distributions.Normal(mean, log_std.exp()), 1)


def test_gaussian_agrees_with_torch_distributions():
    mean_p, log_std_p = _parameters(0, 5, 3)
    mean_q, log_std_q = _parameters(1, 5, 3)
    action = random.normal(random.key(2), (5, 3), torch.float64)
    p, q = _torch_gaussian(mean_p, log_std_p), _torch_gaussian(mean_q, log_std_q)
    torch.testing.assert_close(gaussian_log_prob(mean_p, log_std_p, action), p.log_prob(action))
    torch.testing.assert_close(gaussian_entropy(log_std_p), p.entropy())
    expected = torch.distributions.kl_divergence(p, q)
    torch.testing.assert_close(gaussian_kl(mean_p, log_std_p, mean_q, log_std_q), expected)


def test_gaussian_by_hand():
    # Standard normal at 0 in two dimensions: -2 * log(2 pi) / 2; its entropy: 2 * (1 + log(2 pi)) / 2.
    zero = torch.zeros(2)
    assert gaussian_log_prob(zero, zero, zero).item() == pytest.approx(-math.log(2 * math.pi))
    assert gaussian_entropy(zero).item() == pytest.approx(1 + math.log(2 * math.pi))
    # KL of N(1, 1) from N(0, 2^2): log 2 + (1 + 1) / 8 - 1/2.
    one, log_two = torch.ones(1), torch.full((1,), math.log(2.0))
    kl = gaussian_kl(one, torch.zeros(1), torch.zeros(1), log_two)
    assert kl.item() == pytest.approx(math.log(2.0) + 0.25 - 0.5)


def test_kl_is_zero_only_between_equals_and_never_negative():
    mean, log_std = _parameters(3, 1000, 8, dtype=torch.float32)
    assert torch.equal(gaussian_kl(mean, log_std, mean, log_std), torch.zeros(1000))
    for size in (1e-4, 1e-2, 1.0):
        assert (gaussian_kl(mean, log_std, mean + size, log_std) > 0).all()
        assert (gaussian_kl(mean, log_std, mean, log_std + size) >= 0).all()


def test_one_log_std_serves_a_batch_of_means():
    mean, _ = _parameters(4, 6, 3)
    log_std = torch.tensor([-1.0, 0.0, 0.5], dtype=torch.float64)
    action = mean + 0.3
    full = log_std.expand(6, 3)
    torch.testing.assert_close(gaussian_log_prob(mean, log_std, action), gaussian_log_prob(mean, full, action))
    key = random.key(0)
    assert torch.equal(gaussian_sample(key, mean, log_std), gaussian_sample(key, mean, full))
    shared_mean = gaussian_sample(key, mean[0], full)
    assert shared_mean.shape == (6, 3)
    assert shared_mean.unique().numel() == 18  # Each row has noise of its own.


def test_gaussian_sample_has_its_mean_and_standard_deviation():
    n = 20000
    mean = torch.tensor([1.0, -2.0]).expand(n, 2)
    log_std = torch.tensor([0.0, -1.0])
    sample = gaussian_sample(random.key(5), mean, log_std)
    assert sample.dtype == torch.float32
    # Five standard errors: of the mean, std / sqrt(n); of the standard deviation, std / sqrt(2 n).
    std = log_std.exp()
    assert ((sample.mean(0) - mean[0]).abs() < 5 * std / n**0.5).all()
    assert ((sample.std(0) - std).abs() < 5 * std / (2 * n) ** 0.5).all()


def test_samples_are_functions_of_the_key():
    mean, log_std = _parameters(6, 4, 3, dtype=torch.float32)
    for sample in (gaussian_sample, lambda *a: tanh_gaussian_sample(*a)[0]):
        first = sample(random.key(0), mean, log_std)
        assert torch.equal(first, sample(random.key(0), mean, log_std))
        assert not torch.equal(first, sample(random.key(1), mean, log_std))


def test_tanh_gaussian_agrees_with_torch_distributions():
    mean, log_std = _parameters(7, 50, 3)
    base = torch.distributions.Normal(mean, log_std.exp())
    squashed = torch.distributions.Independent(
        torch.distributions.TransformedDistribution(base, torch.distributions.TanhTransform()), 1
    )
    action, log_prob = tanh_gaussian_sample(random.key(8), mean, log_std)
    assert (action.abs() < 1).all()
    torch.testing.assert_close(log_prob, squashed.log_prob(action), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(tanh_gaussian_log_prob(mean, log_std, action), squashed.log_prob(action))


@pytest.mark.parametrize(("mean", "log_std"), [(0.0, -1.0), (0.5, 0.3), (-1.5, 0.0)])
def test_tanh_gaussian_density_integrates_to_one(mean, log_std):
    # The midpoint rule on 200000 cells of (-1, 1).
    n = 200_000
    action = (torch.arange(n, dtype=torch.float64).unsqueeze(-1) + 0.5) * (2 / n) - 1
    as_tensor = lambda x: torch.full((1,), x, dtype=torch.float64)  # noqa: E731
    density = tanh_gaussian_log_prob(as_tensor(mean), as_tensor(log_std), action).exp()
    assert density.sum().item() * 2 / n == pytest.approx(1.0, abs=1e-5)


def test_saturated_samples_keep_their_log_density():
    # Far out, log(1 - tanh(u)^2) is log 4 - 2 |u| to rounding, so with std 1 and noise e = u - mean
    # the log density is -e^2 / 2 - log(2 pi) / 2 - log 4 + 2 |u|.
    key = random.key(9)
    noise = random.normal(key, (4, 1), torch.float32)
    for sign in (-1.0, 1.0):
        mean = torch.full((4, 1), sign * 50.0)
        action, log_prob = tanh_gaussian_sample(key, mean, torch.zeros(1))
        assert torch.equal(action, torch.full((4, 1), sign))
        u = (mean + noise).double()
        expected = -0.5 * noise.double() ** 2 - 0.5 * math.log(2 * math.pi) - math.log(4) + 2 * u.abs()
        torch.testing.assert_close(log_prob.double(), expected.squeeze(-1), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tanh_gaussian_log_prob_at_and_beyond_the_bounds(dtype):
    mean, log_std = torch.zeros(2, dtype=dtype), torch.zeros(2, dtype=dtype)

    def log_prob(a: float, b: float) -> torch.Tensor:
        return tanh_gaussian_log_prob(mean, log_std, torch.tensor([a, b], dtype=dtype))

    inside = torch.nextafter(torch.ones((), dtype=dtype), torch.zeros((), dtype=dtype)).item()
    assert log_prob(1.0, 0.5).isfinite()
    assert torch.equal(log_prob(1.0, 0.5), log_prob(inside, 0.5))
    assert torch.equal(log_prob(-1.0, 0.5), log_prob(-inside, 0.5))
    # The number beside it is still told apart: only the bound itself is moved.
    beside = math.nextafter(inside, 0.0) if dtype == torch.float64 else inside - 2.0**-24
    assert not torch.equal(log_prob(inside, 0.5), log_prob(beside, 0.5))
    assert log_prob(1.01, 0.5).item() == -math.inf
    assert log_prob(0.5, -1.01).item() == -math.inf
    assert log_prob(math.nan, 0.0).isnan()
    at_bound = torch.tensor([1.0, 0.5], dtype=dtype)
    grad = torch.func.grad(lambda a: tanh_gaussian_log_prob(mean, log_std, a))(at_bound)
    assert grad.isfinite().all()
    assert grad[0] == 0


def test_sample_and_log_prob_agree_in_float32():
    mean, log_std = _parameters(10, 2000, 2, dtype=torch.float32)
    action, log_prob = tanh_gaussian_sample(random.key(0), mean, log_std)
    # Away from the bounds, where float32 still tells the pre-image.
    well_inside = (action.abs() < 0.99).all(-1)
    assert well_inside.float().mean() > 0.5
    again = tanh_gaussian_log_prob(mean, log_std, action)
    torch.testing.assert_close(again[well_inside], log_prob[well_inside], rtol=1e-4, atol=1e-4)


def test_tanh_gaussian_mode_is_where_samples_of_no_spread_land():
    mean, _ = _parameters(11, 7, 3)
    action, _ = tanh_gaussian_sample(random.key(0), mean, torch.full((3,), -40.0, dtype=torch.float64))
    torch.testing.assert_close(tanh_gaussian_mode(mean), action)
    assert tanh_gaussian_mode(torch.tensor([0.5])).item() == pytest.approx(math.tanh(0.5))


def test_gradients_equal_finite_differences():
    mean, log_std = _parameters(12, 2, 3)
    mean_q, log_std_q = _parameters(13, 2, 3)
    action = (0.5 * mean_q).tanh()
    for x in (mean, log_std, mean_q, log_std_q, action):
        x.requires_grad_()
    action = action.detach().requires_grad_()
    key = random.key(14)
    assert torch.autograd.gradcheck(gaussian_log_prob, (mean, log_std, action))
    assert torch.autograd.gradcheck(gaussian_kl, (mean, log_std, mean_q, log_std_q))
    assert torch.autograd.gradcheck(gaussian_entropy, (log_std,))
    assert torch.autograd.gradcheck(tanh_gaussian_log_prob, (mean, log_std, action))
    assert torch.autograd.gradcheck(lambda m, s: gaussian_sample(key, m, s), (mean, log_std))
    assert torch.autograd.gradcheck(lambda m, s: tanh_gaussian_sample(key, m, s), (mean, log_std))


def test_vmap_equals_loop():
    mean, log_std = _parameters(15, 6, 3, dtype=torch.float32)
    mean_q, log_std_q = _parameters(16, 6, 3, dtype=torch.float32)
    keys = random.split(random.key(17), 6)
    action = mean_q.tanh()
    cases: list[tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]] = [
        (gaussian_sample, (keys, mean, log_std)),
        (lambda *a: tanh_gaussian_sample(*a)[0], (keys, mean, log_std)),
        (lambda *a: tanh_gaussian_sample(*a)[1], (keys, mean, log_std)),
        (gaussian_log_prob, (mean, log_std, action)),
        (gaussian_entropy, (log_std,)),
        (gaussian_kl, (mean, log_std, mean_q, log_std_q)),
        (tanh_gaussian_log_prob, (mean, log_std, action)),
        (tanh_gaussian_mode, (mean,)),
    ]
    for fn, args in cases:
        loop = torch.stack([fn(*(a[i] for a in args)) for i in range(6)])
        torch.testing.assert_close(torch.vmap(fn)(*args), loop)


def test_an_environment_draws_the_same_whatever_the_batch():
    keys = random.split(random.key(18), 64)
    mean, log_std = torch.zeros(64, 3), torch.zeros(3)
    draw = torch.vmap(gaussian_sample, in_dims=(0, 0, None))
    assert torch.equal(draw(keys[:8], mean[:8], log_std), draw(keys, mean, log_std)[:8])
