"""Returns and advantages along a rollout.

All arrays are time first, `[T, ...]`, and describe the step from `s_{t-1}` to `s_t`, with the suffixes of
rlax:

- `r_t`: reward of the step.
- `discount_t`: `gamma * (1 - terminated)`, so 0 where the task ended: nothing is worth anything after.
- `v_tm1`: value of `s_{t-1}`, the state that the step began from.
- `v_t`: value of the state that the step led to *before any reset*, so that an episode cut short by the clock
  is continued by its value.
- `trace_t`: 0 where the episode ended, terminated or truncated, and else 1. The next row then belongs to
  another episode, and nothing of it, not even a NaN, reaches this one.

The last row is continued by its `v_t`, whether or not its episode ended there. These functions never stop
gradients (the caller detaches what a loss must not differentiate) and never normalize advantages.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def gae(
    r_t: Float[Tensor, "T *batch"],
    discount_t: Float[Tensor, "T *batch"],
    v_tm1: Float[Tensor, "T *batch"],
    v_t: Float[Tensor, "T *batch"],
    trace_t: Float[Tensor, "T *batch"],
    lambda_: float | Float[Tensor, ""],
) -> Float[Tensor, "T *batch"]:
    """Generalized advantage estimates.

    `delta_t = r_t + discount_t v_t - v_tm1`, `A_t = delta_t + discount_t trace_t lambda A_{t+1}`

    The target of the value function is `A_t + v_tm1`. Source: Schulman et al. 2015, "High-Dimensional
    Continuous Control Using Generalized Advantage Estimation", https://arxiv.org/abs/1506.02438.

    Args:
      r_t: rewards.
      discount_t: discounts, 0 where the task ended. A `v_t` behind a discount of 0 is never looked at.
      v_tm1: values of the states that the steps began from.
      v_t: values of the states that the steps led to, before any reset.
      trace_t: 0 where an episode ended, else 1.
      lambda_: decay of the trace, from 0 (the error of one step) to 1 (the whole return less the value).

    Returns:
      Advantages, in the units of the reward.

    Raises:
      ValueError: if shapes or dtypes differ, or there are no steps.
    """
    _check(r_t=r_t, discount_t=discount_t, v_tm1=v_tm1, v_t=v_t, trace_t=trace_t)
    delta_t = r_t + _discounted(discount_t, v_t) - v_tm1
    return _accumulate(delta_t, discount_t * lambda_, trace_t)


def lambda_returns(
    r_t: Float[Tensor, "T *batch"],
    discount_t: Float[Tensor, "T *batch"],
    v_t: Float[Tensor, "T *batch"],
    trace_t: Float[Tensor, "T *batch"],
    lambda_: float | Float[Tensor, ""],
) -> Float[Tensor, "T *batch"]:
    """Returns that mix those of all numbers of steps.

    `G_t = r_t + discount_t ((1 - lambda) v_t + lambda G_{t+1})` within an episode, and
    `G_t = r_t + discount_t v_t` at its last step. Source: Sutton and Barto 2018, "Reinforcement Learning",
    chapter 12.1.

    Where each `v_t` is the next row's `v_tm1` within an episode, this is `gae(...) + v_tm1`.

    Args:
      r_t: rewards.
      discount_t: discounts, 0 where the task ended. A `v_t` behind a discount of 0 is never looked at.
      v_t: values of the states that the steps led to, before any reset.
      trace_t: 0 where an episode ended, else 1.
      lambda_: from 0 (one step, then the value) to 1 (the whole return).

    Returns:
      Returns, in the units of the reward.

    Raises:
      ValueError: if shapes or dtypes differ, or there are no steps.
    """
    _check(r_t=r_t, discount_t=discount_t, v_t=v_t, trace_t=trace_t)
    next_value = _discounted(discount_t, v_t)
    # The last step of an episode, or of the rollout, is continued by its value alone.
    ended = (trace_t == 0) | _is_last_row(trace_t)
    now_t = r_t + torch.where(ended, next_value, (1.0 - lambda_) * next_value)
    return _accumulate(now_t, discount_t * lambda_, trace_t)


def discounted_returns(
    r_t: Float[Tensor, "T *batch"],
    discount_t: Float[Tensor, "T *batch"],
    v_t: Float[Tensor, "T *batch"],
    trace_t: Float[Tensor, "T *batch"],
) -> Float[Tensor, "T *batch"]:
    """Discounted sum of the rewards to the end of the episode or of the rollout.

    `G_t = r_t + discount_t G_{t+1}` within an episode, and `G_t = r_t + discount_t v_t` at its last step and
    in the last row. Zeros for `v_t` leave out what lies beyond the rollout.

    Args:
      r_t: rewards.
      discount_t: discounts, 0 where the task ended.
      v_t: values of the states that the steps led to, before any reset; used only where an episode was
        truncated and in the last row.
      trace_t: 0 where an episode ended, else 1.

    Returns:
      Returns, in the units of the reward.

    Raises:
      ValueError: if shapes or dtypes differ, or there are no steps.
    """
    _check(r_t=r_t, discount_t=discount_t, v_t=v_t, trace_t=trace_t)
    ended = (trace_t == 0) | _is_last_row(trace_t)
    now_t = r_t + torch.where(ended, _discounted(discount_t, v_t), 0.0)
    return _accumulate(now_t, discount_t, trace_t)


def n_step_returns(
    r_t: Float[Tensor, "T *batch"],
    discount_t: Float[Tensor, "T *batch"],
    v_t: Float[Tensor, "T *batch"],
    trace_t: Float[Tensor, "T *batch"],
    n: int,
) -> Float[Tensor, "T *batch"]:
    """Returns of `n` steps, then the value.

    `G_t = r_t + discount_t (r_{t+1} + discount_{t+1} (... + discount_{t+n-1} v_{t+n-1}))`. An episode or a
    rollout that ends sooner cuts it short there: its last step is continued by its own `v_t`.

    Args:
      r_t: rewards.
      discount_t: discounts, 0 where the task ended. A `v_t` behind a discount of 0 is never looked at.
      v_t: values of the states that the steps led to, before any reset.
      trace_t: 0 where an episode ended, else 1.
      n: number of rewards, at least 1.

    Returns:
      Returns, in the units of the reward.

    Raises:
      ValueError: if shapes or dtypes differ, there are no steps, or `n` is below 1.
    """
    _check(r_t=r_t, discount_t=discount_t, v_t=v_t, trace_t=trace_t)
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    one_step = r_t + _discounted(discount_t, v_t)
    ended = (trace_t == 0) | _is_last_row(trace_t)
    returns = one_step
    # Each round reaches one step further; after T rounds every return has met the end of the rollout.
    for _ in range(min(n, r_t.shape[0]) - 1):
        following = r_t + _discounted(discount_t, returns.roll(-1, 0))
        returns = torch.where(ended, one_step, following)
    return returns


def _discounted(discount_t: Tensor, value: Tensor) -> Tensor:
    # A state that ended the task may have no meaningful value: 0 * NaN would carry it into the return.
    return discount_t * torch.where(discount_t == 0, 0.0, value)


def _is_last_row(x: Tensor) -> Tensor:
    last = torch.arange(x.shape[0], device=x.device) == x.shape[0] - 1
    return last.reshape((-1,) + (1,) * (x.ndim - 1))


def _accumulate(now_t: Tensor, decay_t: Tensor, trace_t: Tensor) -> Tensor:
    """`y_t = now_t + decay_t y_{t+1}`, begun anew where `trace_t` is 0; `y` after the last row is 0."""
    now, decay, ended = now_t.unbind(0), decay_t.unbind(0), (trace_t == 0).unbind(0)
    total = now[-1]
    totals = [total]
    for t in range(len(now) - 2, -1, -1):
        total = torch.where(ended[t], now[t], torch.addcmul(now[t], decay[t], total))
        totals.append(total)
    return torch.stack(totals[::-1])


def _check(**arrays: Tensor) -> None:
    reference_name, reference = next(iter(arrays.items()))
    if reference.ndim < 1 or reference.shape[0] < 1:
        raise ValueError(
            f"{reference_name} must be [T, ...] with at least one step, got shape {tuple(reference.shape)}"
        )
    for name, array in arrays.items():
        if array.shape != reference.shape:
            raise ValueError(
                f"{name} must have the shape of {reference_name}, {tuple(reference.shape)}, got {tuple(array.shape)}"
            )
        if not array.is_floating_point() or array.dtype != reference.dtype:
            raise ValueError(
                f"{name} must be floating point, of one dtype with {reference_name} ({reference.dtype}), "
                f"got {array.dtype}"
            )
