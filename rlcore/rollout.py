"""Run a policy in an environment: for learning (`unroll`) and for measuring (`evaluate`).

Both take a batched environment (`rlcore.env.batch`) and a policy as a function of its own state, so that one
recording of a control step serves however often the policy changes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from rlcore import random, tree
from rlcore.env import Env, EnvSpec, EnvState, Obs, Params, Transition, batch
from rlcore.errors import InputError
from rlcore.jit import jit, one_thread
from rlcore.measurement import scalars
from rlcore.tree import pytree
from rlcore.wall_time import ROLLOUT, timed

Act = Callable[[Any, Obs, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""`(actor, obs [B, ...], key) -> (action [B, action], what else the learner wants of this step)`."""


@pytree
class Trajectory:
    """What an unroll collected; every leaf is `[T, B, ...]`, time first.

    Attributes:
      obs: what the policy saw.
      action: what it did.
      extras: what it said of it, such as the log probability.
      transition: what came of it. `transition.obs[t]` is `obs[t + 1]` and is left out: an empty dict.
    """

    obs: Obs
    action: Tensor
    extras: dict[str, Tensor]
    transition: Transition


def unroll(env: Env, act: Act) -> Callable[[Any, Params, EnvState, Obs, Tensor], tuple[EnvState, Obs, Trajectory]]:
    """A function that lets a policy act for as many control steps as it is given keys.

    Args:
      env: a batched environment, with automatic resets if the policy is to go on after an episode.
      act: the policy.

    Returns:
      `run(actor, params, state, obs, keys [T, 2]) -> (state, obs, trajectory)`, pure.
    """

    @jit
    def control_step(
        actor: Any, params: Params, state: EnvState, obs: Obs, key: Tensor
    ) -> tuple[EnvState, Obs, Trajectory]:
        action, extras = act(actor, obs, key)
        state, transition = env.step(params, state, action)
        kept = tree.replace(transition, obs={})
        return state, transition.obs, Trajectory(obs, action, extras, kept)

    def run(actor: Any, params: Params, state: EnvState, obs: Obs, keys: Tensor) -> tuple[EnvState, Obs, Trajectory]:
        steps = []
        with timed(ROLLOUT):
            with one_thread(state.steps.shape[-1]):
                for key in keys.unbind(0):
                    state, obs, step = control_step(actor, params, state, obs, key)
                    steps.append(step)
            trajectory = tree.stack(steps)
            if trajectory.action.is_cuda:
                torch.cuda.synchronize(trajectory.action.device)  # or the time would be that of giving orders
        return state, obs, trajectory

    return run


@pytree
class RecentEpisodes:
    """Sums over about the last `RECENT` episodes that ended, float64: older ones fade away.

    A single iteration sees few episodes end, and long ones are rarer than short ones; means over a fixed number of
    episodes are steadier, and rank checkpoints better.

    Attributes:
      count, returns, lengths, falls: `[]` episodes, their returns, control steps, and how many the task ended.
      terms: `[2, terms]` raw and weighted reward terms, of each episode the mean over its own steps.
    """

    count: Tensor
    returns: Tensor
    lengths: Tensor
    falls: Tensor
    terms: Tensor


RECENT = 100


def no_episodes(spec: EnvSpec) -> RecentEpisodes:
    """Before any episode of that environment has ended."""
    shapes = ((), (), (), (), (2, len(spec.terms)))
    return RecentEpisodes(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))


def count_episodes(recent: RecentEpisodes, transition: Transition) -> RecentEpisodes:
    """Add the episodes that ended in a trajectory `[T, B]` of an environment with automatic resets."""
    ended = transition.terminated | transition.truncated
    new = ended.sum()
    keep = torch.clamp(1.0 - new / RECENT, min=0.0)

    def added(old: Tensor, x: Tensor) -> Tensor:
        return keep * old + torch.where(ended, x.to(torch.float64), 0.0).sum()

    length = transition.metrics["episode_length"]
    mean = transition.metrics["episode_terms"] / length[..., None, None]
    return RecentEpisodes(
        count=added(recent.count, ended),
        returns=added(recent.returns, transition.metrics["episode_return"]),
        lengths=added(recent.lengths, length),
        falls=added(recent.falls, transition.terminated),
        terms=keep * recent.terms + torch.where(ended[..., None, None], mean, 0.0).sum((0, 1)),
    )


def episode_metrics(recent: RecentEpisodes, spec: EnvSpec) -> dict[str, Tensor]:
    """What the episodes of late came to; NaN before any has ended.

    Returns:
      `episode/return`, `episode/length` (control steps) and `episode/fall_rate`; for each reward term
      `episode_reward/NAME`, weighted and per second, and `episode_reward_raw/NAME`, as it is. Both are averaged over
      the steps that an episode had, then over episodes.
    """
    raw, weighted = (recent.terms / recent.count).unbind(0)
    return {
        "episode/return": recent.returns / recent.count,
        "episode/length": recent.lengths / recent.count,
        "episode/fall_rate": recent.falls / recent.count,
        **{f"episode_reward/{name}": weighted[i] / spec.control_dt for i, name in enumerate(spec.terms)},
        **{f"episode_reward_raw/{name}": raw[i] for i, name in enumerate(spec.terms)},
    }


def trajectory_metrics(trajectory: Trajectory, env: Env, bounds: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """What to log of a trajectory `[T, B]`.

    Returns:
      `policy/saturation`: share of actions at a bound; `episode/ended`: how many episodes ended in it;
      `episode/falls_per_minute`: how often the task ended one, per minute of one robot's simulated time; `reward/*`:
      each term's mean per second, weighted; `reward_raw/*`: each term's mean as it is; `env/faults`: how many steps
      failed; the means of the environment's metrics over steps and robots, `env/*` where a name has no group of its
      own.
    """
    transition = trajectory.transition
    logged = {k: v for k, v in transition.metrics.items() if not k.startswith("episode_")}
    faults = logged.pop("fault").sum()
    means = scalars(tree.map_leaves(lambda x: x.mean((0, 1)), logged))
    low, high = bounds
    saturated = (trajectory.action <= low) | (trajectory.action >= high)
    dt = env.spec.control_dt
    raw = transition.raw_terms.mean((0, 1))
    minutes = transition.terminated.numel() * dt / 60
    return {
        "episode/ended": (transition.terminated | transition.truncated).sum(),
        "episode/falls_per_minute": transition.terminated.sum() / minutes,
        "env/faults": faults,
        "policy/saturation": saturated.to(torch.float32).mean(),
        **{f"reward/{name}": term.mean() / dt for name, term in transition.terms.items()},
        **{f"reward_raw/{name}": raw[i] for i, name in enumerate(env.spec.terms)},
        **{name if "/" in name else f"env/{name}": value for name, value in means.items()},
    }


class Episodes(NamedTuple):
    """One episode of each of B robots.

    Attributes:
      returns: `[B]` sum of rewards.
      lengths: `[B]` control steps.
      terminated: `[B]` whether the task ended it (a fall); otherwise the clock did.
      faults: `[B]` whether the physics failed in it.
      metrics: `[B]` each of the environment's metrics under the name that `rlcore.measurement.scalars` gives it: the
        mean over the episode's steps, or the quotient of two means.
      qpos: positions of the first robots, `[T, watched, nq]`, for a video; a robot whose episode is over
        stands still in it.
      recorded: what `record` gave, `[T, B, ...]`, beginning with the reset.
    """

    returns: Float[Tensor, " B"]
    lengths: Int64[Tensor, " B"]
    terminated: Bool[Tensor, " B"]
    faults: Bool[Tensor, " B"]
    metrics: dict[str, Tensor]
    qpos: Float[Tensor, "T watched nq"]
    recorded: dict[str, Tensor]


def evaluate(
    env: Env,
    policy: Callable[[Obs], Tensor],
    key: Tensor,
    num_envs: int,
    *,
    params: Params | None = None,
    shared_params: bool = True,
    watched: int = 0,
    record: Callable[[EnvState], dict[str, Tensor]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Episodes:
    """Run one whole episode of each of `num_envs` robots.

    Args:
      env: an environment of one robot with a time limit and without automatic resets.
      policy: obs `[B, ...]` to action `[B, action]`.
      key: random key; robot i's episode depends on it and on i alone.
      num_envs: how many episodes.
      params: parameters; the nominal ones by default.
      shared_params: whether one set of parameters serves all robots; otherwise each leaf is `[B, ...]`.
      watched: of how many robots to keep the positions.
      record: `state of B robots -> {name: [B, ...]}`, what else to keep of every step.
      progress: called with (steps done, robots still going) after each step.

    Raises:
      InputError: if num_envs is below 1, or the environment resets itself or has no time limit.
    """
    if num_envs < 1:
        raise InputError(f"num_envs must be at least 1, got {num_envs}")
    if "auto_reset" in env.spec.wrappers or "time_limit" not in env.spec.wrappers:
        raise InputError(f"evaluation needs a time limit and no automatic reset, got {env.spec.wrappers}")
    batched = batch(env, shared_params=shared_params)
    params = env.params if params is None else params
    state, obs = batched.reset(params, random.split(key, num_envs))
    going = torch.ones(num_envs, dtype=torch.bool)
    returns = torch.zeros(num_envs, dtype=torch.float64)
    lengths = torch.zeros(num_envs, dtype=torch.int64)
    terminated, faults = torch.zeros_like(going), torch.zeros_like(going)
    sums: dict[str, Any] = {}
    qpos = [state.physics.qpos[:watched]]
    kept = [] if record is None else [record(state)]
    steps = 0
    while bool(going.any()):
        after, transition = batched.step(params, state, policy(obs))
        returns = returns + torch.where(going, transition.reward, 0.0)
        lengths = lengths + going
        terminated = terminated | (going & transition.terminated)
        faults = faults | (going & (transition.metrics["fault"] > 0))
        counted = tree.where(going, transition.metrics, tree.map_leaves(torch.zeros_like, transition.metrics))
        sums = tree.map_leaves(torch.add, sums, counted) if sums else counted
        # Robots that are done stand still, so that a fallen one neither costs contacts nor explodes.
        state, obs = tree.where(going, after, state), tree.where(going, transition.next_obs, obs)
        going = going & ~(transition.terminated | transition.truncated)
        qpos.append(state.physics.qpos[:watched])
        if record is not None:
            kept.append(record(state))
        steps += 1
        if progress is not None:
            progress(steps, int(going.sum()))
    metrics = scalars(tree.map_leaves(lambda x: x / lengths.reshape(-1, *(1 for _ in x.shape[1:])), sums))
    recorded = {name: torch.stack([now[name] for now in kept]) for name in (kept[0] if kept else {})}
    return Episodes(returns, lengths, terminated, faults, metrics, torch.stack(qpos), recorded)
