"""Many learners side by side in one process: an update mapped over its members.

Because an update is a pure function of its state, `torch.func.vmap` trains a population: members differ in their
random key and in whatever their states hold, such as learning rate, discount, entropy coefficient, reward weights, or
how their robots were randomized. What is compiled into an update (sizes of networks and batches, numbers of epochs) is
the same for all. Member i is the run that it would be alone, to rounding.

Population-based training (Jaderberg et al. 2017, https://arxiv.org/abs/1711.09846) is a function of the stacked state:
now and then the worst members go on from where the best ones are, with other settings nearby.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rlcore import random, tree
from rlcore.errors import InputError
from rlcore.experiment import MUST_BE_FINITE, Algorithm
from rlcore.metrics import check_metric
from rlcore.tree import named_leaves, pytree, tree_flatten, tree_leaves

_OWN = 1 << 31  # folded into the first member's key for what is drawn for the population
# Coefficients below 1 whose distance from 1 is what matters: 0.99 and 0.98 differ as 0.5 and 1 do.
_FROM_ONE = ("discount", "gae_lambda")


@dataclass(frozen=True)
class PBTConfig:
    """Settings of population-based training."""

    interval: int = 50
    """Iterations between two comparisons of the members; 0 for members that do not know of each other."""
    fraction: float = 0.25
    """Share of the members, the worst ones, that go on from as many of the best."""
    factor: float = 1.2
    """Their coefficients become this much larger or smaller (of discount and lambda, the distance from 1)."""

    def __post_init__(self) -> None:
        if self.interval < 0:
            raise InputError(f"interval must be at least 0, got {self.interval} (--pbt.interval)")
        if not 0 < self.fraction <= 0.5:
            raise InputError(f"fraction must be more than 0 and at most 0.5, got {self.fraction} (--pbt.fraction)")
        if not 1 < self.factor < math.inf:
            raise InputError(f"factor must be more than 1, got {self.factor} (--pbt.factor)")


@pytree
class PopulationState:
    """The whole population.

    Attributes:
      members: the members' states, each leaf `[M, ...]`.
      parents: `[M]` int64, which member each one went on from in the newest update; its own number where from itself.
      key: random key of what is drawn for the population.
      iteration, env_steps: `[]` counters; the steps of all members.
    """

    members: Any
    parents: Int64[Tensor, " M"]
    key: Tensor
    iteration: Tensor
    env_steps: Tensor


def parents_of(key: random.Key, scores: Float[Tensor, " M"], fraction: float) -> Int64[Tensor, " M"]:
    """Which member each one goes on from: the worst from any of the best, all others from themselves.

    Args:
      key: random key.
      scores: higher is better; NaN is the worst of all.
      fraction: share of the members that are replaced, rounded down, by as many; none by one that is no better.
    """
    size = scores.shape[0]
    replaced = int(fraction * size)
    own = torch.arange(size, device=scores.device)
    if replaced == 0:
        return own
    known = torch.where(scores.isnan(), -math.inf, scores)
    order = known.argsort(stable=True)
    worst, best = order[:replaced], order[size - replaced :]
    chosen = best[random.randint(key, (replaced,), 0, replaced)]
    return own.index_copy(0, worst, torch.where(known[chosen] > known[worst], chosen, worst))


def perturbed(
    key: random.Key, coefficients: Mapping[str, Float[Tensor, " M"]], changes: Tensor, factor: float
) -> dict[str, Tensor]:
    """The coefficients, each of the members that change by `factor` or by its inverse, at random.

    Of a discount or a lambda it is the distance from 1 that changes.

    Args:
      key: random key.
      coefficients: by name.
      changes: `[M]` bool, which members change.
      factor: above 1.
    """
    out = {}
    for i, (name, value) in enumerate(coefficients.items()):
        up = random.uniform(random.fold_in(key, i), tuple(value.shape)) < 0.5
        by = torch.where(up, factor, 1.0 / factor).to(value.dtype)
        new = 1.0 - (1.0 - value) * by if name in _FROM_ONE else value * by
        out[name] = torch.where(changes, new.clamp(0.0, 1.0) if name in (*_FROM_ONE, "target_rate") else new, value)
    return out


def exploit(
    key: random.Key, members: Any, scores: Float[Tensor, " M"], config: PBTConfig
) -> tuple[Any, Int64[Tensor, " M"]]:
    """One comparison: the worst members become copies of some of the best, with coefficients nearby.

    A copy has the parent's everything but random keys, so that the two go different ways.

    Args:
      key: random key.
      members: stacked states with the fields `coefficients`, `env_state` and `key`.
      scores: higher is better.
      config: the settings.

    Returns:
      The members, and which one each went on from.
    """
    choose, change = random.split(key).unbind(0)
    parents = parents_of(choose, scores, config.fraction)
    copied = tree.map_leaves(lambda x: x.index_select(0, parents), members)
    moved = parents != torch.arange(parents.shape[0], device=parents.device)
    coefficients = perturbed(change, copied.coefficients, moved, config.factor)
    env_state = tree.replace(copied.env_state, key=members.env_state.key)
    return tree.replace(copied, key=members.key, env_state=env_state, coefficients=coefficients), parents


class Population(NamedTuple):
    """Learners side by side as three functions, as those of `rlcore.experiment.Algorithm` but with an axis of members.

    Attributes:
      init: `keys [M, 2] -> PopulationState`, the key of each member.
      update: `PopulationState -> (PopulationState, metrics)`, one iteration of all; metrics are `[M]` each, with the
        members' coefficients as `population/NAME`, and as `population/stuck` whether a member's losses or parameters
        were not finite: it stays where it was before that, unless population-based training moves it. With it,
        `population/parent` is the number of the member that each goes on from.
      act: `(PopulationState, obs, key or None) -> action`, `[M, B, ...]` each.
    """

    init: Callable[[Tensor], PopulationState]
    update: Callable[[PopulationState], tuple[PopulationState, dict[str, Tensor]]]
    act: Callable[[PopulationState, Any, Tensor | None], Tensor]


def make_population(
    algorithms: Sequence[Algorithm], pbt: PBTConfig | None = None, score: str = "episode/return"
) -> Population:
    """Learners side by side as one.

    Args:
      algorithms: one for each member, alike in all that an update is compiled for; the first one's update is mapped.
      pbt: the settings of population-based training; None for members that do not know of each other.
      score: the metric that members are compared by.

    Raises:
      InputError: if there are no members, or fewer than population-based training can replace one of. What the
        functions raise: `init`, if two states differ in more than in numbers; `update`, if there is no such metric.
    """
    if not algorithms:
        raise InputError("a population needs at least one member, got none")
    size = len(algorithms)
    if pbt is not None and pbt.interval == 0:
        pbt = None
    if pbt is not None and int(pbt.fraction * size) == 0:
        raise InputError(
            f"fraction must be at least one of {size} members, got {pbt.fraction} (--pbt.fraction, --pbt.interval 0)"
        )
    update_all = torch.func.vmap(algorithms[0].update)
    act_all: Callable[..., Any] = algorithms[0].act

    def init(keys: Tensor) -> PopulationState:
        if keys.shape[0] != size:
            raise InputError(f"keys must be one for each of {size} members, got {keys.shape[0]}")
        states = [algorithm.init(key) for algorithm, key in zip(algorithms, keys.unbind(0), strict=True)]
        for i, state in enumerate(states[1:], 1):
            _refuse_unlike(states[0], state, i)
        members = tree.stack(states)
        counters = (members.iteration[0].clone(), members.env_steps.sum())
        return PopulationState(members, torch.arange(size), random.fold_in(keys[0], _OWN), *counters)

    def update(state: PopulationState) -> tuple[PopulationState, dict[str, Tensor]]:
        members, metrics = update_all(state.members)
        finite = [*tree_leaves(members.params), *(x for name, x in metrics.items() if name.startswith(MUST_BE_FINITE))]
        sound = torch.stack([x.reshape(size, -1).isfinite().all(-1) for x in finite]).all(0)
        members = tree.map_leaves(lambda new, old: _where(sound, new, old), members, state.members)
        metrics = {**metrics, "population/stuck": (~sound).to(torch.float32)}
        iteration, key, parents = state.iteration + 1, state.key, torch.arange(size)
        check_metric("score", score, metrics, "--score")
        if pbt is not None and int(iteration) % pbt.interval == 0:
            key, draw = random.split(key).unbind(0)
            members, parents = exploit(draw, members, torch.where(sound, metrics[score], math.nan), pbt)
        logged = {**metrics, **{f"population/{name}": value for name, value in members.coefficients.items()}}
        if pbt is not None:
            logged["population/parent"] = parents.to(torch.float32)
        return PopulationState(members, parents, key, iteration, members.env_steps.sum()), logged

    def act(state: PopulationState, obs: Any, key: Tensor | None = None) -> Tensor:
        if key is None:
            return torch.func.vmap(lambda member, o: act_all(member, o, None))(state.members, obs)
        return torch.func.vmap(act_all)(state.members, obs, random.split(key, size))

    return Population(init, update, act)


def _where(sound: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`new` of the members that are sound, `old` of others; memory that both share, as a replay buffer's, as it is."""
    if new.data_ptr() == old.data_ptr() and new.shape == old.shape and new.stride() == old.stride():
        return new
    return tree.where(sound, new, old)


def member(state: PopulationState, i: int) -> Any:
    """The state of member i, as of a run of its own.

    Raises:
      InputError: if there is no such member.
    """
    size = state.parents.shape[0]
    if not 0 <= i < size:
        raise InputError(f"member must be at least 0 and below {size}, got {i}")
    return tree.map_leaves(lambda x: x[i].clone(), state.members)


def _refuse_unlike(first: Any, other: Any, i: int) -> None:
    if tree_flatten(first)[1] == tree_flatten(other)[1]:
        for (name, x), (_, y) in zip(named_leaves(first), named_leaves(other), strict=True):
            if x.shape != y.shape or x.dtype != y.dtype:
                raise InputError(
                    f"members must be alike but for numbers; {name} is {list(x.shape)} {x.dtype} in the first, "
                    f"{list(y.shape)} {y.dtype} in member {i}"
                )
        return
    raise InputError(f"members must be alike but for numbers; member {i} has other parts than the first")
