"""A replay buffer as a tree of tensors: steps of many robots side by side, the oldest overwritten by the newest.

Observations are kept once. What a step led to is what the robot saw next, in the next slot; only where the clock ended
an episode, and the next slot begins another one, is the last observation kept besides. Where the task ended it, nothing
comes after.

A buffer is too large to be copied at each step. `replay_add` writes into the memory of the buffer that it is given,
but only to slots which that buffer does not show: it has a few more than it shows. So both the buffer before and the
buffer after are as a pure function would have them, as long as the one before is not used again after a second
`replay_add`. Nothing here learns or acts.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlcore import random
from rlcore.errors import InputError
from rlcore.jit import DIRECT, HOST, jit
from rlcore.tree import pytree, replace, static

_GOING, _TERMINATED, _TRUNCATED = range(3)


@pytree
class Replay:
    """Steps that robots made; slot `i` of a leaf `[slots, B, ...]` holds the steps `i`, `i + slots`, ...

    Attributes:
      obs: what was seen, by group, `[slots, B, size]`.
      action: what was done, `[slots, B, action]`.
      reward: what it gave, `[slots, B]`.
      ended: whether the step ended the episode: 0 no, 1 by the task, 2 by the clock; int8 `[slots, B]`.
      last: which row of `last_obs` a step that the clock ended led to, int64 `[slots, B]`.
      last_obs: the last observations of episodes that the clock ended, by group, `[episodes, B, size]`.
      num_last: how many episodes the clock has ended so far, int64 `[B]`.
      num_steps: how many steps each robot has made so far, int64 `[]`.
      capacity: how many of them are shown, the newest ones.
    """

    obs: dict[str, Tensor]
    action: Tensor
    reward: Tensor
    ended: Tensor
    last: Tensor
    last_obs: dict[str, Tensor]
    num_last: Tensor
    num_steps: Tensor
    capacity: int = static()


@pytree
class Sample:
    """Steps to learn from; every leaf is `[N, ...]`.

    Attributes:
      obs_tm1: what was seen, by group.
      a_tm1: what was done then.
      r_t: the discounted sum of the rewards of n steps, or of those until the episode ended.
      discount_t: what the value of `obs_t` counts: `discount^n`, or less steps where the clock ended the episode; 0
        where the task did.
      obs_t: what these steps led to, before any reset.
    """

    obs_tm1: dict[str, Tensor]
    a_tm1: Tensor
    r_t: Tensor
    discount_t: Tensor
    obs_t: dict[str, Tensor]


def replay_init(
    sizes: Mapping[str, int],
    action_size: int,
    num_envs: int,
    capacity: int,
    added: int = 1,
    episode_steps: int | None = None,
) -> Replay:
    """An empty buffer.

    Args:
      sizes: numbers in an observation, by group.
      action_size: numbers in an action.
      num_envs: robots side by side.
      capacity: steps of each robot that are shown.
      added: most steps that are added at once.
      episode_steps: control steps after which the clock ends an episode; None where no step is ever truncated.

    Raises:
      InputError: for a number below 1, or if more steps are added at once than an episode has.
    """
    for name, value in (("num_envs", num_envs), ("capacity", capacity), ("added", added)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    if episode_steps is not None and added > episode_steps:
        raise InputError(
            f"at most the {episode_steps} steps of an episode can be added at once, got {added}: the clock would end "
            "more than one episode of a robot"
        )
    slots = capacity + added
    # One robot's clock rings at most once in so many steps.
    episodes = 1 if episode_steps is None else slots // episode_steps + 2
    return Replay(
        obs={group: torch.zeros(slots, num_envs, size) for group, size in sizes.items()},
        action=torch.zeros(slots, num_envs, action_size),
        reward=torch.zeros(slots, num_envs),
        ended=torch.zeros(slots, num_envs, dtype=torch.int8),
        last=torch.zeros(slots, num_envs, dtype=torch.int64),
        last_obs={group: torch.zeros(episodes, num_envs, size) for group, size in sizes.items()},
        num_last=torch.zeros(num_envs, dtype=torch.int64),
        num_steps=torch.tensor(0),
        capacity=capacity,
    )


def replay_add(
    replay: Replay,
    obs: Mapping[str, Float[Tensor, "T B _"]],
    action: Float[Tensor, "T B action"],
    reward: Float[Tensor, "T B"],
    terminated: Bool[Tensor, "T B"],
    truncated: Bool[Tensor, "T B"],
    next_obs: Mapping[str, Float[Tensor, "T B _"]],
) -> Replay:
    """The buffer with T more steps of each robot. It writes into the memory of `replay`, see above.

    Args:
      replay: the buffer before.
      obs: what was seen before each step, by group.
      action: what was done.
      reward: what it gave.
      terminated: whether the task ended the episode.
      truncated: whether the clock did.
      next_obs: what each step led to, before any reset; the groups of `obs`.

    Raises:
      InputError: if there are more steps than the buffer was made for.
    """
    steps, (slots, num_envs) = reward.shape[0], replay.reward.shape
    if steps > slots - replay.capacity:
        raise InputError(f"at most {slots - replay.capacity} steps can be added at once, got {steps}")
    device = reward.device
    slot = (replay.num_steps + torch.arange(steps, device=device)) % slots
    ended = torch.where(terminated, _TERMINATED, torch.where(truncated, _TRUNCATED, _GOING)).to(torch.int8)
    # The clock ends an episode of a robot at most once in these steps.
    cut = truncated.any(0)
    row = replay.num_last % next(iter(replay.last_obs.values())).shape[0]
    when, robot = truncated.to(torch.int8).argmax(0), torch.arange(num_envs, device=device)
    for group, kept in replay.last_obs.items():
        final = torch.where(cut.unsqueeze(-1), next_obs[group][when, robot], kept[row, robot])
        kept[row, robot] = final
    written: list[tuple[Tensor, Tensor]] = [
        *((replay.obs[group], obs[group]) for group in replay.obs),
        (replay.action, action),
        (replay.reward, reward),
        (replay.ended, ended),
        (replay.last, row.expand(steps, num_envs)),
    ]
    for old, new in written:
        old[slot] = new.to(old.dtype)
    return replace(replay, num_last=replay.num_last + cut, num_steps=replay.num_steps + steps)


def replay_sample(replay: Replay, key: random.Key, size: int, discount: float | Tensor, n: int = 1) -> Sample:
    """Steps drawn at random, each alike and with replacement, with the returns of n steps from there.

    `r_t = r_1 + discount r_2 + ... + discount^(n-1) r_n`, cut short where an episode ends.

    The n newest steps are not drawn: what follows them is not there yet. Until n + 1 steps are there, what is drawn
    has no meaning.

    Args:
      replay: the buffer.
      key: random key.
      size: how many.
      discount: of the next step.
      n: rewards to sum.

    Raises:
      InputError: if n is below 1 or not below the capacity.
    """
    if not 1 <= n < replay.capacity:
        raise InputError(f"n must be at least 1 and below the capacity of {replay.capacity} steps, got {n}")
    return _drawn(replay, key, size, discount, n)


@jit
def _drawn(replay: Replay, key: random.Key, size: int, discount: float | Tensor, n: int) -> Sample:
    slots, num_envs = replay.reward.shape
    shown = replay.num_steps.clamp(max=replay.capacity)
    choices = torch.stack([(shown - n).clamp(min=1), torch.full_like(shown, num_envs)])
    chosen, robot = random.randint(key, (2, size), 0, choices.unsqueeze(-1)).unbind(0)
    first = replay.num_steps - shown + chosen

    def at(step: Tensor, *stored: Tensor) -> list[Tensor]:
        return _rows_of(list(stored), (step % slots) * num_envs + robot, 2)

    groups = list(replay.obs)
    a_tm1, *obs_tm1 = at(first, replay.action, *replay.obs.values())
    r_t = torch.zeros(size, device=first.device)
    discount_t = torch.ones_like(r_t)
    going = torch.ones_like(first, dtype=torch.bool)
    newest, how = first, torch.zeros_like(first)
    for k in range(n):
        step = first + k
        ended, reward = at(step, replay.ended, replay.reward)
        ended = ended.to(torch.int64)
        r_t = r_t + torch.where(going, discount_t * reward, 0.0)
        newest, how = torch.where(going, step, newest), torch.where(going, ended, how)
        discount_t = torch.where(going, discount_t * discount * (ended != _TERMINATED), discount_t)
        going = going & (ended == _GOING)
    cut = (how == _TRUNCATED).unsqueeze(-1)
    (last,) = at(newest, replay.last)
    last_obs = _rows_of(list(replay.last_obs.values()), last * num_envs + robot, 2)
    next_obs = at(newest + 1, *replay.obs.values())
    return Sample(
        obs_tm1=dict(zip(groups, obs_tm1, strict=True)),
        a_tm1=a_tm1,
        r_t=r_t,
        discount_t=discount_t,
        obs_t={g: torch.where(cut, a, b) for g, a, b in zip(groups, last_obs, next_obs, strict=True)},
    )


def _select(stored: list[Tensor], index: Tensor, lead: int) -> list[Tensor]:
    """Rows `index` `[N]` of tensors, counted through their `lead` first axes: `[N, ...]` each."""
    return [x.flatten(0, lead - 1).index_select(0, index) for x in stored]


# One operation for a recording: on a GPU its sources, the buffer, must not be copied to where a CUDA graph reads.
_rows_of = torch.library.custom_op("rlcore::replay_rows", _select, mutates_args=())
HOST[torch.ops.rlcore.replay_rows.default] = _select
DIRECT[torch.ops.rlcore.replay_rows.default] = _select


@_rows_of.register_fake
def _(stored: list[Tensor], index: Tensor, lead: int) -> list[Tensor]:
    return [x.new_empty(*index.shape, *x.shape[lead:]) for x in stored]


@_rows_of.register_vmap
def _(info: Any, in_dims: Any, stored: list[Tensor], index: Tensor, lead: int) -> tuple[list[Tensor], list[int]]:
    """Members' rows behind one another: a buffer each, or one for all. The buffers themselves are left as they are."""
    dims, index_dim, _ = in_dims
    members = torch.arange(info.batch_size, device=index.device).unsqueeze(-1)
    index = index.movedim(index_dim, 0) if index_dim is not None else index.expand(info.batch_size, *index.shape)
    rows = []
    for x, dim in zip(stored, dims, strict=True):
        if dim is None:
            (found,) = _rows_of([x], index.flatten(), lead)
        else:
            x = x.movedim(dim, 0) if dim else x
            own = index + members * math.prod(x.shape[1 : lead + 1])
            (found,) = _rows_of([x], own.flatten(), lead + 1)
        rows.append(found.unflatten(0, index.shape))
    return rows, [0] * len(rows)
