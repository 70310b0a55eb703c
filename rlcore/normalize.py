"""Running mean and variance of observations, values or returns, and normalization by them.

The moments are state: a tree of float64 tensors that an update returns anew and a checkpoint saves, so that
a resumed run normalizes as before. This module never updates moments while it normalizes: a policy being
evaluated or exported calls `normalize` and nothing else.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Num
from torch import Tensor

from rlcore.errors import InputError
from rlcore.tree import pytree


@pytree
class Moments:
    """Count, mean and squared deviations of the samples seen so far, in float64.

    A sample has the shape of `mean`: `[n]` for an observation, `[]` for a value or a return. A population
    puts its axis in front of all three.
    """

    count: Float[Tensor, "..."]  # Number of samples, exact up to 2^53.
    mean: Float[Tensor, "..."]  # In the units of the samples.
    m2: Float[Tensor, "..."]  # Sum of squared deviations from the mean.


def moments_init(size: int | Sequence[int] = (), device: torch.device | str | None = None) -> Moments:
    """Moments of no samples: until the first update, normalization subtracts 0 and divides by 1.

    Args:
      size: a sample's size `n`, or its shape: `()` for scalars.
      device: where the moments live.

    Raises:
      InputError: if a size is below 1.
    """
    shape = (size,) if isinstance(size, int) else tuple(size)
    if any(n < 1 for n in shape):
        raise InputError(f"size must be at least 1 along each axis of a sample, got {size}")
    mean = torch.zeros(shape, dtype=torch.float64, device=device)
    return Moments(count=mean.new_zeros(()), mean=mean, m2=torch.zeros_like(mean))


def moments_merge(a: Moments, b: Moments) -> Moments:
    """Moments of the samples of both, in either order.

    With `delta = mean_b - mean_a` and `n = n_a + n_b`:
    `mean = mean_a + delta n_b / n`, `m2 = m2_a + m2_b + delta^2 n_a n_b / n`.

    Source: Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample
    variances".
    """
    count = a.count + b.count
    # Two empty sets have no samples between them: any share keeps their moments at zero.
    share = b.count / count.clamp(min=1.0)
    delta = b.mean - a.mean
    return Moments(
        count=count,
        mean=a.mean + delta * share,
        m2=a.m2 + b.m2 + delta.square() * (a.count * share),
    )


def moments_update(moments: Moments, x: Num[Tensor, "..."]) -> Moments:
    """Add samples.

    The batch's own moments take two passes in float64 (the mean, then deviations from it), and are merged
    into the running ones, so that neither a large offset nor a long run costs precision. A sample that is
    not finite makes the moments of its component NaN for good: keep such samples out.

    Args:
      moments: of samples shaped `[*sample]`.
      x: `[..., *sample]`; all leading axes are batch. A batch of no samples changes nothing.

    Raises:
      ValueError: if `x` does not end with the shape of a sample.
    """
    batch_ndim = x.ndim - moments.mean.ndim
    _check_sample("x", x, moments)
    axes = tuple(range(batch_ndim))
    count = math.prod(x.shape[:batch_ndim])
    if count == 0:
        return moments
    x = x.to(torch.float64)
    if not axes:
        # An empty tuple of axes would reduce all of them.
        mean, m2 = x, torch.zeros_like(x)
    else:
        mean = x.mean(axes)
        m2 = (x - mean).square().sum(axes)
    return moments_merge(moments, Moments(count=torch.full_like(moments.count, count), mean=mean, m2=m2))


def variance(moments: Moments) -> Float[Tensor, "*sample"]:
    """Variance of the samples seen, `m2 / count` (not the estimate with `count - 1`); 1 before any sample."""
    return torch.where(moments.count > 0, moments.m2 / moments.count.clamp(min=1.0), 1.0)


def _std(moments: Moments, epsilon: float) -> Tensor:
    return variance(moments).sqrt().clamp(min=epsilon)


def normalize(
    moments: Moments, x: Num[Tensor, "..."], clip: float | None = 10.0, epsilon: float = 1e-4
) -> Float[Tensor, "..."]:
    """`clip((x - mean) / max(std, epsilon), -clip, clip)`, computed in float64 and returned in float32.

    Args:
      moments: of samples shaped `[*sample]`.
      x: `[..., *sample]`.
      clip: largest magnitude of a result, in standard deviations; None for no limit.
      epsilon: least standard deviation that is divided by, in the units of `x`. A component that has been
        constant so far normalizes to 0, and to `clip` once it moves by more than `clip * epsilon`.

    Raises:
      ValueError: if `x` does not end with the shape of a sample.
    """
    _check_sample("x", x, moments)
    normalized = (x.to(torch.float64) - moments.mean) / _std(moments, epsilon)
    if clip is not None:
        normalized = normalized.clamp(-clip, clip)
    return normalized.to(torch.float32)


def denormalize(moments: Moments, y: Num[Tensor, "..."], epsilon: float = 1e-4) -> Float[Tensor, "..."]:
    """`y max(std, epsilon) + mean`, the inverse of `normalize` within its clip; float32.

    Args:
      moments: of samples shaped `[*sample]`.
      y: normalized samples, `[..., *sample]`.
      epsilon: as given to `normalize`.

    Raises:
      ValueError: if `y` does not end with the shape of a sample.
    """
    _check_sample("y", y, moments)
    return (y.to(torch.float64) * _std(moments, epsilon) + moments.mean).to(torch.float32)


def drift(moments: Moments, x: Num[Tensor, "..."], epsilon: float = 1e-4) -> Float[Tensor, ""]:
    """How far a batch has moved from what was seen before: of the component that moved most, the distance of the
    batch's mean from the running mean, in running deviations. 0 before any sample.

    Args:
      moments: of samples shaped `[n]`, of before this batch.
      x: `[..., n]`.
      epsilon: as given to `normalize`.

    Raises:
      ValueError: if `x` does not end with the shape of a sample.
    """
    _check_sample("x", x, moments)
    mean = x.to(torch.float64).reshape(-1, x.shape[-1]).mean(0)
    moved = ((mean - moments.mean).abs() / _std(moments, epsilon)).max()
    return torch.where(moments.count > 0, moved, 0.0).to(torch.float32)


def _check_sample(name: str, x: Tensor, moments: Moments) -> None:
    sample = tuple(moments.mean.shape)
    if x.ndim < len(sample) or tuple(x.shape[x.ndim - len(sample) :]) != sample:
        raise ValueError(f"{name} must end with the shape of a sample, {sample}, got {tuple(x.shape)}")
