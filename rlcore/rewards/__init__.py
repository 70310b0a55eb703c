"""Rewards as sums of named terms.

A `Term` is a pure function of what was before a step, the action, and what is after it. What a term must
remember (the last action, time in the air) lives in `EnvState.memory`, never in the term. Weights come from
`params.weights`, so that robots side by side may carry different ones.

Here are the contract, kernels, and terms that fit any robot; `rlcore.rewards.locomotion` has those of robots that walk.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from rlcore.errors import InputError

if TYPE_CHECKING:
    from rlcore.env import EnvState, Params


TermFn = Callable[[Any, Any, Tensor, Any], Tensor]
"""`(params: Params, before: EnvState, action [action], after: EnvState) -> []`."""


class Term(NamedTuple):
    """One reward term.

    Attributes:
      name: how logs and `params.weights` call it.
      weight: its nominal weight, per second; costs have a negative one.
      fn: `(params, before, action, after) -> []`. `after` is the whole state that the step led to, before any
        reset: `after.memory["terminated"]` tells whether the task or a physics fault ended the episode there, and
        what the task's memories hold is as of after the step.
    """

    name: str
    weight: float
    fn: "Callable[[Params, EnvState, Tensor, EnvState], Tensor]"


def weighted_terms(
    terms: Sequence[Term], params: "Params", before: "EnvState", action: Tensor, after: "EnvState", dt: float
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """`reward = dt * sum_i weight_i term_i`, its summands by name, and the terms themselves, `[terms]`.

    Args:
      terms: the terms; none gives a reward of 0.
      params: carries the weights, `[]` each.
      before, action, after: the step.
      dt: control interval, s. Weights are per second, so that another control rate leaves the task the same.
    """
    if not terms:
        return torch.zeros_like(after.physics.time), {}, after.physics.qpos.new_zeros((0,))
    raw = torch.stack([term.fn(params, before, action, after) for term in terms])
    weights = torch.stack([params.weights[term.name] for term in terms])
    summands = raw * (weights * dt)
    named = {term.name: summand for term, summand in zip(terms, summands.unbind(0), strict=True)}
    return summands.sum(0), named, raw


def exponential(squared_error: Tensor, scale: float) -> Tensor:
    """`exp(-squared_error / scale^2)`: 1 where there is no error, 0.37 at an error of `scale`."""
    return torch.exp(squared_error * (-1.0 / scale**2))


def tolerance(x: Tensor, low: float, high: float, margin: float = 0.0) -> Tensor:
    """1 inside [low, high], falling as a Gaussian to 0.1 at `margin` outside (Tassa et al. 2018, dm_control).

    Args:
      x: any shape.
      low, high: the bounds; may be infinite.
      margin: distance at which the value is 0.1; 0 makes a step.

    Raises:
      InputError: if the bounds are crossed or the margin is negative.
    """
    if not low <= high:
        raise InputError(f"tolerance needs low <= high, got {low} and {high}")
    if not margin >= 0:
        raise InputError(f"tolerance margin must be 0 or more, got {margin}")
    outside = torch.clamp(low - x, min=0.0) + torch.clamp(x - high, min=0.0)
    if margin == 0:
        return (outside <= 0).to(x.dtype)
    # exp(-(d / margin)^2 ln 10) is 0.1 at d = margin.
    return torch.exp(-((outside / margin) ** 2) * 2.302585092994046)


# --- terms that fit any robot with actuators ----------------------------------------------------------------


def alive(params: Any, before: "EnvState", action: Tensor, after: "EnvState") -> Tensor:
    """1 for every step; with a positive weight it pays for not falling."""
    return torch.ones_like(after.physics.time)


def termination(params: Any, before: "EnvState", action: Tensor, after: "EnvState") -> Tensor:
    """1 where the step ended the episode by the task or by a physics fault, 0 elsewhere and at a time limit.

    It is paid once, times the control interval: at 50 Hz a weight of -200 takes 4 for a fall.
    Source: Isaac Lab and MuJoCo Playground, velocity tasks.
    """
    return after.memory["terminated"].to(after.physics.time.dtype)


def action_rate(params: Any, before: "EnvState", action: Tensor, after: "EnvState") -> Tensor:
    """`||a_t - a_tm1||^2`: smoothness of what is commanded.

    Source: Rudin et al. 2022, "Learning to walk in minutes using massively parallel deep RL".
    """
    return ((action - before.memory["last_action"]) ** 2).sum()


def action_size(params: Any, before: "EnvState", action: Tensor, after: "EnvState") -> Tensor:
    """`||a_t||^2`: effort of control."""
    return (action**2).sum()
