"""Running moments against numpy, exact fractions and hand arithmetic."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from rlcore.errors import InputError
from rlcore.normalize import (
    Moments,
    denormalize,
    drift,
    moments_init,
    moments_merge,
    moments_update,
    normalize,
    variance,
)
from rlcore.tree import index, stack, tree_leaves


def _samples(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(3.0, 2.0, shape)


def _assert_same(a: Moments, b: Moments, rtol: float = 1e-12) -> None:
    for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=1e-12)


def test_moments_equal_numpys():
    x = _samples(0, 7, 11, 5)
    moments = moments_update(moments_init(5), torch.from_numpy(x))
    assert moments.count.item() == 77
    np.testing.assert_allclose(moments.mean.numpy(), x.reshape(-1, 5).mean(0), rtol=1e-13)
    np.testing.assert_allclose(variance(moments).numpy(), x.reshape(-1, 5).var(0), rtol=1e-13)
    assert {leaf.dtype for leaf in tree_leaves(moments)} == {torch.float64}


def test_chunks_and_their_order_do_not_matter():
    x = torch.from_numpy(_samples(1, 60, 3))
    whole = moments_update(moments_init(3), x)
    for sizes in ([1] * 60, [59, 1], [20, 20, 20], [7, 0, 53]):
        moments = moments_init(3)
        for chunk in x.split(sizes):
            moments = moments_update(moments, chunk)
        _assert_same(moments, whole)
    a, b = moments_update(moments_init(3), x[:13]), moments_update(moments_init(3), x[13:])
    _assert_same(moments_merge(a, b), whole)
    _assert_same(moments_merge(b, a), whole)


def test_merging_by_hand():
    # {1, 3}: mean 2, m2 2. {5, 7, 9}: mean 7, m2 8. Together {1, 3, 5, 7, 9}: mean 5, m2 40.
    a = moments_update(moments_init(), torch.tensor([1.0, 3.0]))
    b = moments_update(moments_init(), torch.tensor([5.0, 7.0, 9.0]))
    merged = moments_merge(a, b)
    assert [leaf.item() for leaf in tree_leaves(merged)] == [5.0, 5.0, 40.0]
    assert variance(merged).item() == 8.0


def test_no_samples_change_nothing():
    empty = moments_init(2)
    some = moments_update(empty, torch.tensor([[1.0, 2.0], [3.0, 5.0]]))
    for same in (
        moments_merge(some, empty),
        moments_merge(empty, some),
        moments_update(some, torch.zeros(0, 2)),
    ):
        _assert_same(same, some, rtol=0.0)
    _assert_same(moments_merge(empty, empty), empty, rtol=0.0)


def test_a_billion_samples_keep_their_precision():
    # Doubling a set keeps its mean and variance: 30 doublings of 4 samples are 4.3e9 samples.
    x = torch.tensor([1e6 + 0.25, 1e6 - 0.25, 1e6 + 0.125, 1e6 - 0.125], dtype=torch.float64)
    moments = moments_update(moments_init(), x)
    expected = (2 * 0.25**2 + 2 * 0.125**2) / 4
    for _ in range(30):
        moments = moments_merge(moments, moments)
    assert moments.count.item() == 2**32
    assert moments.mean.item() == 1e6
    assert variance(moments).item() == pytest.approx(expected, rel=1e-12)


def test_small_batches_still_count_after_a_billion_samples():
    # A thousand batches of 16 samples at 5, on top of 1e9 samples of mean 1 and variance 4, exactly:
    n_a, n_b, delta = 10**9, 16_000, 4
    mean = Fraction(n_a * 1 + n_b * 5, n_a + n_b)
    var = Fraction(4 * n_a, n_a + n_b) + Fraction(delta**2 * n_a * n_b, (n_a + n_b) ** 2)
    double = lambda value: torch.tensor(value, dtype=torch.float64)  # noqa: E731
    moments = Moments(count=double(1e9), mean=double(1.0), m2=double(4e9))
    batch = torch.full((16,), 5.0)
    for _ in range(1000):
        moments = moments_update(moments, batch)
    assert moments.count.item() == n_a + n_b
    assert moments.mean.item() - 1.0 == pytest.approx(float(mean - 1), rel=1e-9)
    assert variance(moments).item() - 4.0 == pytest.approx(float(var - 4), rel=1e-6)


def test_a_large_offset_does_not_swallow_a_small_variance():
    # Multiples of 2^-10 around 1e6 are exact in float64, so the variance is known exactly.
    steps = np.random.default_rng(2).integers(-8, 9, 4096)
    x = torch.from_numpy(1e6 + steps / 1024)
    moments = moments_init()
    for chunk in x.split(64):
        moments = moments_update(moments, chunk)
    expected = (steps / 1024).var()  # About 2e-5: mean of squares less squared mean loses all of it.
    assert variance(moments).item() == pytest.approx(expected, rel=1e-9)
    normalized = normalize(moments, x, clip=None)
    assert normalized.dtype == torch.float32
    assert normalized.double().mean().item() == pytest.approx(0.0, abs=1e-5)
    assert normalized.double().var(correction=0).item() == pytest.approx(1.0, rel=1e-5)


def test_before_any_sample_normalization_is_the_identity():
    x = torch.tensor([[-3.0, 0.5, 9.0]])
    moments = moments_init(3)
    assert torch.equal(normalize(moments, x), x)
    assert torch.equal(denormalize(moments, x), x)
    assert torch.equal(variance(moments), torch.ones(3, dtype=torch.float64))


def test_normalized_samples_by_hand():
    # {0, 4}: mean 2, standard deviation 2.
    moments = moments_update(moments_init(1), torch.tensor([[0.0], [4.0]]))
    assert normalize(moments, torch.tensor([6.0])).item() == 2.0
    assert normalize(moments, torch.tensor([6.0]), clip=1.5).item() == 1.5
    assert normalize(moments, torch.tensor([-1000.0])).item() == -10.0
    assert normalize(moments, torch.tensor([-1000.0]), clip=None).item() == -501.0
    assert normalize(moments, torch.tensor([6]), epsilon=8.0).item() == 0.5
    assert denormalize(moments, torch.tensor([2.0])).item() == 6.0


def test_a_constant_component_stays_finite():
    x = torch.stack([torch.full((100,), 0.1), torch.arange(100.0)], dim=-1)
    moments = moments_update(moments_init(2), x)
    assert torch.equal(normalize(moments, x)[:, 0], torch.zeros(100))
    assert normalize(moments, x + 1.0)[0, 0].item() == 10.0


@pytest.mark.parametrize("size", [3, (3,), (2, 3), ()])
def test_denormalize_undoes_normalize(size):
    moments = moments_init(size)
    x = torch.from_numpy(_samples(3, 50, *moments.mean.shape)).float()
    moments = moments_update(moments, x)
    torch.testing.assert_close(denormalize(moments, normalize(moments, x)), x)


def test_scalars_with_and_without_an_axis_agree():
    x = torch.from_numpy(_samples(4, 6, 8)).float()
    plain = moments_update(moments_init(), x)
    sized = moments_update(moments_init(1), x.unsqueeze(-1))
    assert plain.mean.shape == ()
    assert torch.equal(plain.mean, sized.mean.squeeze())
    assert torch.equal(normalize(plain, x), normalize(sized, x.unsqueeze(-1)).squeeze(-1))


def test_a_single_sample_is_a_batch_of_one():
    x = torch.tensor([1.0, 2.0])
    _assert_same(moments_update(moments_init(2), x), moments_update(moments_init(2), x.unsqueeze(0)), rtol=0.0)
    assert variance(moments_update(moments_init(), torch.tensor(3.0))).item() == 0.0


def test_a_nan_stays_in_its_component():
    x = torch.tensor([[1.0, math.nan], [3.0, 1.0]])
    moments = moments_update(moments_init(2), x)
    assert moments.mean[0].item() == 2.0
    assert moments.mean[1].isnan()


def test_vmap_equals_loop():
    x = torch.from_numpy(_samples(5, 4, 10, 3)).float()
    start = stack([moments_update(moments_init(3), 2 * x[i]) for i in range(4)])

    def update_and_normalize(moments: Moments, x: torch.Tensor) -> tuple[Moments, torch.Tensor, torch.Tensor]:
        moments = moments_update(moments, x)
        normalized = normalize(moments, x)
        return moments, normalized, denormalize(moments, normalized)

    mapped = torch.vmap(update_and_normalize)(start, x)
    loop = stack([update_and_normalize(index(start, i), x[i]) for i in range(4)])
    for a, b in zip(tree_leaves(mapped), tree_leaves(loop), strict=True):
        torch.testing.assert_close(a, b)

    # From inside of vmap, the first moments belong to each member of the population.
    fresh = torch.vmap(lambda x: moments_update(moments_init(3), x))(x)
    assert fresh.mean.shape == (4, 3)
    torch.testing.assert_close(fresh.mean, x.double().mean(1))


def test_gradient_is_one_over_the_standard_deviation_and_zero_beyond_the_clip():
    moments = moments_update(moments_init(2), torch.tensor([[0.0, 0.0], [4.0, 1.0]]))
    grad = torch.func.grad(lambda x: normalize(moments, x).sum())(torch.tensor([3.0, 100.0]))
    assert torch.equal(grad, torch.tensor([0.5, 0.0]))


def test_wrong_shapes_are_refused():
    moments = moments_init(3)
    for fn in (moments_update, normalize):
        with pytest.raises(ValueError, match=r"x must end with the shape of a sample, \(3,\), got \(3, 2\)"):
            fn(moments, torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"y must end with the shape of a sample, \(3,\), got \(\)"):
        denormalize(moments, torch.zeros(()))
    with pytest.raises(InputError, match="size must be at least 1"):
        moments_init(0)


def test_drift_is_the_largest_distance_of_means_in_running_deviations():
    seen = torch.tensor([[0.0, 10.0, 1.0], [2.0, 14.0, 1.0]])  # means 1, 12, 1; deviations 1, 2, 0
    moments = moments_update(moments_init(3), seen)
    batch = torch.tensor([[[1.0, 9.0, 1.0]], [[3.0, 9.0, 1.0]]])  # means 2, 9, 1
    assert float(drift(moments, batch)) == pytest.approx(1.5)
    assert float(drift(moments_init(3), batch)) == 0.0
    # An observation that grows evenly stays sqrt(3) deviations ahead of what was seen.
    grown = moments_init(1)
    for t in range(2000):
        moved = float(drift(grown, torch.full((1, 1), float(t))))
        grown = moments_update(grown, torch.full((1, 1), float(t)))
    assert moved == pytest.approx(3**0.5, rel=2e-3)
