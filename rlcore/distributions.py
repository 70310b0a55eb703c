"""Action distributions as plain functions: the diagonal Gaussian and its tanh-squashed form.

Every function takes arrays `[..., action]` and reduces the last axis, since the dimensions of an action are
independent of each other. Leading axes broadcast, so one `log_std [action]` serves a batch of means. This
module never clips `log_std`, never rescales an action to a joint's range and holds no parameters: those are
the business of the network, of the environment's specification and of the algorithm.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from rlcore import random

_HALF_LOG_TWO_PI = 0.5 * math.log(2.0 * math.pi)
_LOG_TWO = math.log(2.0)


def _noise(key: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    return random.normal(key, torch.broadcast_shapes(mean.shape, log_std.shape), mean.dtype)


def gaussian_sample(
    key: random.Key, mean: Float[Tensor, "... action"], log_std: Float[Tensor, "... action"]
) -> Float[Tensor, "... action"]:
    """Draw `mean + exp(log_std) * noise`, with standard normal `noise`.

    The sample is differentiable in `mean` and `log_std`. All of its numbers are drawn from the one key: for a
    draw that does not depend on the batch size, map this function over a key for each environment.

    Args:
      key: random key, consumed here.
      mean: mean, in the units of the action.
      log_std: natural logarithm of the standard deviation; broadcasts against `mean`.

    Returns:
      One sample for each mean, in `mean`'s dtype.
    """
    return mean + log_std.exp() * _noise(key, mean, log_std)


def gaussian_log_prob(
    mean: Float[Tensor, "... action"],
    log_std: Float[Tensor, "... action"],
    action: Float[Tensor, "... action"],
) -> Float[Tensor, "..."]:
    """Logarithm of the density of a diagonal Gaussian.

    `sum_i -(a_i - mean_i)^2 / (2 std_i^2) - log std_i - log(2 pi) / 2`

    Args:
      mean: mean, in the units of the action.
      log_std: natural logarithm of the standard deviation; broadcasts against `mean`.
      action: where the density is evaluated.

    Returns:
      Log density in nats, one number for each action.
    """
    standardized = (action - mean) * (-log_std).exp()
    return (-0.5 * standardized.square() - log_std - _HALF_LOG_TWO_PI).sum(-1)


def gaussian_entropy(log_std: Float[Tensor, "... action"]) -> Float[Tensor, "..."]:
    """Differential entropy of a diagonal Gaussian: `sum_i log std_i + (1 + log(2 pi)) / 2`.

    Args:
      log_std: natural logarithm of the standard deviation, in its full shape: nothing broadcasts it here.

    Returns:
      Entropy in nats; it may be negative.
    """
    return (log_std + (0.5 + _HALF_LOG_TWO_PI)).sum(-1)


def gaussian_kl(
    mean_p: Float[Tensor, "... action"],
    log_std_p: Float[Tensor, "... action"],
    mean_q: Float[Tensor, "... action"],
    log_std_q: Float[Tensor, "... action"],
) -> Float[Tensor, "..."]:
    """Kullback-Leibler divergence `KL(p || q)` of two diagonal Gaussians.

    `sum_i (s_i - 1 - log s_i) / 2 + (mean_p_i - mean_q_i)^2 / (2 std_q_i^2)`, with `s = (std_p / std_q)^2`

    It is written with `expm1(log s) - log s`, which stays at zero, and does not go below it by rounding, when
    a policy is compared with itself.

    Returns:
      Divergence in nats, one number for each pair of distributions.
    """
    log_ratio = 2.0 * (log_std_p - log_std_q)
    distance = (mean_p - mean_q) * (-log_std_q).exp()
    return 0.5 * (torch.expm1(log_ratio) - log_ratio + distance.square()).sum(-1)


def tanh_gaussian_sample(
    key: random.Key, mean: Float[Tensor, "... action"], log_std: Float[Tensor, "... action"]
) -> tuple[Float[Tensor, "... action"], Float[Tensor, "..."]]:
    """Draw `tanh(u)`, `u ~ Normal(mean, exp(log_std))`, and its log density.

    The change of variables subtracts `log(1 - tanh(u)^2)`, which loses everything to rounding where the tanh
    saturates. Its equal `2 (log 2 - u - softplus(-2 u))` does not, and is what is computed here, from `u`
    itself. Both results are differentiable in `mean` and `log_std` along the path of the sample. Source:
    Haarnoja et al. 2018, "Soft Actor-Critic Algorithms and Applications", appendix C.

    Args:
      key: random key, consumed here; one key draws for all of `mean`.
      mean: mean of `u`, before the tanh.
      log_std: natural logarithm of the standard deviation of `u`; broadcasts against `mean`.

    Returns:
      action: `[..., action]` within [-1, 1]; a saturated one may round to a bound, with a log density that is
        still finite.
      log_prob: log density of the action in nats, `[...]`.
    """
    noise = _noise(key, mean, log_std)
    unsquashed = mean + log_std.exp() * noise
    log_det = 2.0 * (_LOG_TWO - unsquashed - softplus(-2.0 * unsquashed))
    log_prob = -0.5 * noise.square() - log_std - _HALF_LOG_TWO_PI - log_det
    return unsquashed.tanh(), log_prob.sum(-1)


def tanh_gaussian_log_prob(
    mean: Float[Tensor, "... action"],
    log_std: Float[Tensor, "... action"],
    action: Float[Tensor, "... action"],
) -> Float[Tensor, "..."]:
    """Log density of an action already squashed, `log N(atanh(a)) - sum_i log(1 - a_i^2)`.

    Rounding puts saturated actions exactly on a bound, where `atanh` is infinite. Such an action is read as
    the nearest number inside of the bound, so the result is finite, and its derivative with respect to the
    action is zero. Outside of [-1, 1] the density is zero and the result is `-inf`. Close to a bound an
    action has forgotten most of `u`: where the log density of a fresh sample is wanted, take the one that
    `tanh_gaussian_sample` returns.

    Args:
      mean: mean before the tanh.
      log_std: natural logarithm of the standard deviation before the tanh; broadcasts against `mean`.
      action: actions in [-1, 1].

    Returns:
      Log density in nats, one number for each action.
    """
    limit = 1.0 - 0.5 * torch.finfo(action.dtype).eps
    inside = action.clamp(-limit, limit)
    log_det = (torch.log1p(-inside) + torch.log1p(inside)).sum(-1)
    log_prob = gaussian_log_prob(mean, log_std, torch.atanh(inside)) - log_det
    return torch.where((action.abs() > 1.0).any(-1), -math.inf, log_prob)


def tanh_gaussian_mode(mean: Float[Tensor, "... action"]) -> Float[Tensor, "... action"]:
    """The action to take when not exploring: `tanh(mean)`.

    It is the median of the squashed distribution and the image of the Gaussian's mode. The squashed density's
    own peak may lie elsewhere, since squashing moves mass towards the bounds.
    """
    return mean.tanh()
