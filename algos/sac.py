"""Soft actor-critic (Haarnoja et al. 2018, https://arxiv.org/abs/1812.05905), learning from a replay buffer.

One algorithm in two shapes. Few robots, many updates for each step, critics with layer normalization: few steps of
experience are needed. Thousands of robots, large batches, critics that predict the distribution of returns: little
time is needed (Seo et al. 2025, "Learning sim-to-real humanoid locomotion in 15 minutes", FastSAC).

The file reads top to bottom: the configuration, the losses (functions of arrays that anyone can call alone), the
state, and `make_sac`, whose `init` and `update` are pure but for the buffer's memory (see `rlcore.replay`). Nothing
here touches a file, a clock or a global random generator.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rlcore import random, tree
from rlcore.distributions import tanh_gaussian_mode, tanh_gaussian_sample
from rlcore.env import Env, EnvState, Obs, Params, batch
from rlcore.errors import InputError, check_field
from rlcore.experiment import MUST_BE_FINITE, Algorithm
from rlcore.jit import jit
from rlcore.networks import ACTIVATIONS, dead_units, mlp
from rlcore.normalize import Moments, drift, moments_init, moments_update, normalize
from rlcore.optim import AdamState, adam_init, adam_update, clip_by_global_norm
from rlcore.randomize import each_robots
from rlcore.replay import Replay, Sample, replay_add, replay_init, replay_sample
from rlcore.rollout import RecentEpisodes, count_episodes, episode_metrics, no_episodes, trajectory_metrics, unroll
from rlcore.tree import pytree

# --- configuration ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SACConfig:
    """Settings of SAC. The defaults are for few robots and few steps."""

    num_envs: int = 64
    """Environments that run side by side."""
    num_steps: int = 1
    """Control steps that each environment takes between two rounds of learning."""
    num_updates: int = 16
    """Gradient steps in a round."""
    batch_size: int = 256
    """Steps of experience in a gradient step."""
    replay_steps: int = 10_000
    """Newest control steps of each environment that are learned from."""
    prefill: int = 5_000
    """Environment steps with uniformly random actions before learning begins."""
    policy_learning_rate: float = 3e-4
    """Adam's step size of the policy."""
    value_learning_rate: float = 3e-4
    """Adam's step size of the critics."""
    entropy_learning_rate: float = 3e-4
    """Adam's step size of the entropy coefficient's logarithm."""
    discount: float = 0.99
    """Discount of the next step's value (gamma)."""
    n_steps: int = 1
    """Rewards that are summed before a value stands for the rest."""
    target_rate: float = 0.005
    """Share of the way that target critics go to the critics in each gradient step (tau)."""
    initial_entropy_coefficient: float = 1.0
    """Worth of a nat of entropy at the start (alpha)."""
    target_entropy: float = -1.0
    """Entropy of each action, in nats and for actions in [-1, 1], that the coefficient is learned for."""
    policy_delay: int = 1
    """Gradient steps of the critics for one of the policy."""
    pessimism: Literal["min", "mean"] = "min"
    """What stands for the value: the lower of two critics, or their mean."""
    atoms: int = 0
    """If not 0, critics predict the distribution of returns over this many values in value_range."""
    value_range: tuple[float, float] = (-20.0, 20.0)
    """Lowest and highest return of that distribution."""
    layer_norm: bool = False
    """Normalize the critics' hidden layers."""
    log_std_range: tuple[float, float] = (-5.0, 2.0)
    """Lowest and highest logarithm of the standard deviation, before the tanh."""
    max_gradient_norm: float | None = None
    """If set, gradients are scaled down to this norm."""
    normalize_observations: bool = True
    """Scale observations by their running mean and deviation."""
    policy_layers: tuple[int, ...] = (256, 256)
    """Hidden layers of the policy."""
    value_layers: tuple[int, ...] = (256, 256)
    """Hidden layers of each critic."""
    activation: str = "relu"
    """Activation between layers: elu, gelu, relu, silu, swish or tanh."""

    def __post_init__(self) -> None:
        for name in ("num_envs", "num_steps", "num_updates", "batch_size", "n_steps", "policy_delay"):
            _check(self, name, getattr(self, name) >= 1, "at least 1")
        rates = ("policy_learning_rate", "value_learning_rate", "entropy_learning_rate")
        for name in (*rates, "initial_entropy_coefficient"):
            _check(self, name, 0 < getattr(self, name) < math.inf, "more than 0")
        _check(self, "replay_steps", self.replay_steps > self.n_steps, f"more than n_steps, {self.n_steps}")
        least = self.num_envs * (self.n_steps + 1)
        what = f"at least num_envs x (n_steps + 1) = {least}, the first steps that can be learned from"
        _check(self, "prefill", self.prefill >= least, what)
        _check(self, "discount", 0 <= self.discount <= 1, "between 0 and 1")
        _check(self, "target_rate", 0 < self.target_rate <= 1, "more than 0 and at most 1")
        _check(self, "target_entropy", math.isfinite(self.target_entropy), "finite")
        _check(self, "policy_delay", self.num_updates % self.policy_delay == 0, "a divisor of num_updates")
        _check(self, "atoms", self.atoms == 0 or self.atoms >= 2, "0, or at least 2")
        for name in ("value_range", "log_std_range"):
            low, high = getattr(self, name)
            _check(self, name, -math.inf < low < high < math.inf, "a low and a higher finite number")
        norm = self.max_gradient_norm
        _check(self, "max_gradient_norm", norm is None or 0 < norm < math.inf, "more than 0, or None")
        for name in ("policy_layers", "value_layers"):
            _check(self, name, all(n >= 1 for n in getattr(self, name)), "sizes of at least 1")
        _check(self, "activation", self.activation in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}")

    @property
    def steps_per_round(self) -> int:
        """Environment steps between two rounds of learning."""
        return self.num_envs * self.num_steps


_check = partial(check_field, "--sac.")


# --- losses -------------------------------------------------------------------------------------------------


def soft_target(
    r_t: Float[Tensor, "*N"],
    discount_t: Float[Tensor, "*N"],
    q_t: Float[Tensor, "*N"],
    log_prob_t: Float[Tensor, "*N"],
    entropy_coefficient: float | Tensor,
) -> Float[Tensor, "*N"]:
    """`r + discount (Q(s', a') - alpha log pi(a'|s'))`, with a' drawn by the policy; equations 2 and 3 of the paper.

    Args:
      r_t: rewards, or the sum of those of n steps.
      discount_t: what the value of s' counts; 0 where the task ended. A value behind it is never looked at then.
      q_t: the target critics' value of s' and a'.
      log_prob_t: of a'.
      entropy_coefficient: alpha.
    """
    soft = q_t - entropy_coefficient * log_prob_t
    return r_t + discount_t * torch.where(discount_t == 0, 0.0, soft)


def critic_loss(q_tm1: Float[Tensor, "critics N"], target_tm1: Float[Tensor, " N"]) -> Float[Tensor, ""]:
    """`sum over critics of mean((Q(s, a) - y)^2) / 2`; equation 5."""
    return 0.5 * (q_tm1 - target_tm1).square().mean(-1).sum()


def policy_loss(
    q: Float[Tensor, " N"], log_prob: Float[Tensor, " N"], entropy_coefficient: float | Tensor
) -> Float[Tensor, ""]:
    """`mean(alpha log pi(a|s) - Q(s, a))`, with a drawn by the policy, along which gradients go; equation 9."""
    return (entropy_coefficient * log_prob - q).mean()


def entropy_coefficient_loss(
    log_coefficient: Float[Tensor, ""], log_prob: Float[Tensor, " N"], target_entropy: float | Tensor
) -> Float[Tensor, ""]:
    """`-log alpha mean(log pi + H)`: the coefficient grows while the policy's entropy is below H.

    As in the authors' code; equation 18 has alpha itself in place of its logarithm.
    """
    return -log_coefficient * (log_prob + target_entropy).mean().detach()


def project_distribution(
    probabilities: Float[Tensor, "N atoms"], values: Float[Tensor, "N atoms"], support: Float[Tensor, " atoms"]
) -> Float[Tensor, "N atoms"]:
    """Move a distribution onto evenly spaced values: each one's probability goes to its two neighbours, by nearness.

    Values outside go to the nearest end. Source: Bellemare et al. 2017, https://arxiv.org/abs/1707.06887, equation 7.

    Args:
      probabilities: of each value.
      values: where they are.
      support: where they are to be, rising.
    """
    last = support.shape[0] - 1
    place = (values - support[0]) / (support[-1] - support[0]) * last
    place = place.clamp(0, last)
    below = place.floor().clamp(max=last - 1)
    above_share = place - below
    index = below.to(torch.int64)
    projected = torch.zeros_like(probabilities)
    projected = projected.scatter_add(-1, index, probabilities * (1.0 - above_share))
    return projected.scatter_add(-1, index + 1, probabilities * above_share)


# --- state --------------------------------------------------------------------------------------------------


@pytree
class Learned:
    """What is learned: the policy, two critics stacked along the first axis of each leaf, and log alpha, `[]`."""

    policy: Any
    critics: Any
    log_entropy_coefficient: Tensor


@pytree
class TrainState:
    """The whole run: saving this tree, its replay buffer included, and loading it goes on bit for bit.

    Attributes:
      params: what is learned.
      targets: the critics that targets are made with; they follow the learned ones slowly.
      policy_optimizer, critic_optimizer, entropy_optimizer: Adam's moments.
      observation_moments: of each observation group that is used.
      coefficients: the learning rates, discount, target_entropy and target_rate as tensors `[]`, so that runs side by
        side under vmap can differ in them.
      env_params, env_state, obs: the environments; every leaf of env_params is `[B, ...]` where robots differ.
      replay: what has been seen.
      episodes: what the last hundred or so episodes came to.
      key: random key of the run.
      iteration, env_steps: `[]` counters.
    """

    params: Learned
    targets: Any
    policy_optimizer: AdamState
    critic_optimizer: AdamState
    entropy_optimizer: AdamState
    observation_moments: dict[str, Moments]
    coefficients: dict[str, Tensor]
    env_params: Params
    env_state: EnvState
    obs: Obs
    replay: Replay
    episodes: RecentEpisodes
    key: Tensor
    iteration: Tensor
    env_steps: Tensor


_Learning = tuple[Learned, Any, AdamState, AdamState, AdamState]
"""What a gradient step changes: what is learned, the targets, and Adam's moments of policy, critics and coefficient."""


class _Networks(NamedTuple):
    """The networks as functions.

    Attributes:
      policy: `(params, obs [N, size]) -> (mean, log_std)`, `[N, action]` each, before the tanh.
      values: `(critics, obs, action) -> [2, N]`, the values of both.
      logits: the same, `[2, N, atoms]`, where critics predict distributions.
      support: `[atoms]` the values of such a distribution.
    """

    policy: Callable[[Any, Tensor], tuple[Tensor, Tensor]]
    values: Callable[[Any, Tensor, Tensor], Tensor]
    logits: Callable[[Any, Tensor, Tensor], Tensor]
    support: Tensor


# --- the algorithm ------------------------------------------------------------------------------------------


def empty_replay(env: Env, config: SACConfig) -> Replay:
    """The replay buffer that a run of `make_sac(env, config)` begins with."""
    spec = env.spec
    sizes = {group: spec.observation_size(group) for group in spec.learned_groups}
    steps = (config.replay_steps, config.num_steps, spec.episode_steps)
    return replay_init(sizes, spec.action_size, config.num_envs, *steps)


def make_sac(env: Env, config: SACConfig, randomize: Callable[[Params, Tensor], Params] | None = None) -> Algorithm:
    """SAC on an environment of one robot.

    The critics see the observation group `critic` where the environment has one, else `policy`.

    Args:
      env: an environment with automatic resets whose actions have bounds.
      config: the settings.
      randomize: `(params, key) -> params`, drawn once for each robot of a run (see `rlcore.randomize`); by default all
        robots share the environment's own parameters.

    Returns:
      `init(key)`, `update(state)` and `act(state, obs, key)`.

    Raises:
      InputError: if the environment does not reset itself, an action has no bounds, or a round has more steps than an
        episode.
    """
    spec = env.spec
    if spec.episode_steps is not None:
        least = config.num_steps <= spec.episode_steps
        _check(config, "num_steps", least, f"at most the {spec.episode_steps} steps of an episode of {spec.name}")
    if "auto_reset" not in spec.wrappers:
        raise InputError(f"SAC needs an environment with automatic resets; wrap {spec.name} in auto_reset")
    if unbounded := [
        name
        for name, low, high in zip(spec.actions, spec.action_low, spec.action_high, strict=True)
        if not math.isfinite(high - low)
    ]:
        raise InputError(f"SAC needs bounds of every action; {spec.name} has none for {', '.join(unbounded)}")
    critic_group, groups = spec.critic_group, spec.learned_groups
    action_size = spec.action_size
    bounds = low, high = torch.tensor(spec.action_low), torch.tensor(spec.action_high)
    middle, half = 0.5 * (low + high), 0.5 * (high - low)
    sizes = {group: spec.observation_size(group) for group in groups}
    policy_net = mlp((sizes["policy"], *config.policy_layers, 2 * action_size), config.activation, final_scale=0.01)
    outputs = config.atoms or 1
    critic_sizes = (sizes[critic_group] + action_size, *config.value_layers, outputs)
    critic_net = mlp(critic_sizes, config.activation, layer_norm=config.layer_norm)
    nets = _networks(config, policy_net.apply, critic_net.apply)
    batched = batch(env, shared_params=randomize is None)

    def scaled(moments: dict[str, Moments], group: str, obs: Tensor) -> Tensor:
        return normalize(moments[group], obs) if config.normalize_observations else obs

    def act(actor: Any, obs: Obs, key: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        policy, moments, ready = actor
        draw_key, uniform_key = random.split(key).unbind(0)
        mean, log_std = nets.policy(policy, scaled(moments, "policy", obs["policy"]))
        action, _ = tanh_gaussian_sample(draw_key, mean, log_std)
        anything = random.uniform(uniform_key, tuple(action.shape), -1.0, 1.0)
        action = torch.where(ready, action, anything)
        return middle + half * action, {"squashed": action}

    run = unroll(batched, act)

    def critic_step(
        params: Learned,
        targets: Any,
        optimizer: AdamState,
        sample: Sample,
        coefficients: dict[str, Tensor],
        key: Tensor,
    ) -> tuple[Learned, Any, AdamState, dict[str, Tensor]]:
        alpha = params.log_entropy_coefficient.exp()
        mean, log_std = nets.policy(params.policy, sample.obs_t["policy"])
        a_t, log_prob_t = tanh_gaussian_sample(key, mean, log_std)
        goal, y = _goal(config, nets, targets, sample, critic_group, a_t, log_prob_t, alpha)

        def loss(critics: Any) -> tuple[Tensor, Tensor]:
            if config.atoms:
                logits = nets.logits(critics, sample.obs_tm1[critic_group], sample.a_tm1)
                log_p = torch.log_softmax(logits, -1)
                return -(goal * log_p).sum(-1).mean(-1).sum(), (log_p.exp() * nets.support).sum(-1).mean()
            q_tm1 = nets.values(critics, sample.obs_tm1[critic_group], sample.a_tm1)
            return critic_loss(q_tm1, goal), q_tm1.mean()

        grads, (error, q) = torch.func.grad_and_value(loss, has_aux=True)(params.critics)
        grads, norm = _clipped(grads, config)
        critics, optimizer = adam_update(grads, optimizer, params.critics, coefficients["value_learning_rate"])
        rate = coefficients["target_rate"]
        targets = tree.map_leaves(lambda old, new: old + rate * (new - old), targets, critics)
        logged = {"loss/value": error, "value/mean": q, "value/target": y.mean(), "gradients/value_norm": norm}
        return tree.replace(params, critics=critics), targets, optimizer, logged

    def policy_step(
        params: Learned,
        optimizers: tuple[AdamState, AdamState],
        sample: Sample,
        coefficients: dict[str, Tensor],
        key: Tensor,
    ) -> tuple[Learned, tuple[AdamState, AdamState], dict[str, Tensor]]:
        alpha = params.log_entropy_coefficient.exp()

        def loss(policy: Any) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            mean, log_std = nets.policy(policy, sample.obs_tm1["policy"])
            action, log_prob = tanh_gaussian_sample(key, mean, log_std)
            both = nets.values(params.critics, sample.obs_tm1[critic_group], action)
            return policy_loss(_pessimistic(config, both), log_prob, alpha), (log_prob, log_std)

        grads, (error, (log_prob, log_std)) = torch.func.grad_and_value(loss, has_aux=True)(params.policy)
        grads, norm = _clipped(grads, config)
        policy, first = adam_update(grads, optimizers[0], params.policy, coefficients["policy_learning_rate"])
        wanted = action_size * coefficients["target_entropy"]
        slope, entropy_error = torch.func.grad_and_value(entropy_coefficient_loss)(
            params.log_entropy_coefficient, log_prob, wanted
        )
        log_alpha, second = adam_update(
            {"log": slope},
            optimizers[1],
            {"log": params.log_entropy_coefficient},
            coefficients["entropy_learning_rate"],
        )
        logged = {
            "loss/policy": error,
            "loss/entropy_coefficient": entropy_error,
            "policy/entropy": -log_prob.mean(),
            "policy/entropy_coefficient": alpha,
            "policy/std": log_std.exp().mean(),
            "gradients/policy_norm": norm,
        }
        params = tree.replace(params, policy=policy, log_entropy_coefficient=log_alpha["log"])
        return params, (first, second), logged

    def prepared(moments: dict[str, Moments], sample: Sample) -> Sample:
        return tree.replace(
            sample,
            obs_tm1={group: scaled(moments, group, x) for group, x in sample.obs_tm1.items()},
            obs_t={group: scaled(moments, group, x) for group, x in sample.obs_t.items()},
        )

    def gradient_step(with_policy: bool) -> Callable[..., tuple[_Learning, dict[str, Tensor]]]:
        # One recording for the whole step: to take the arguments of four apart costs as much as a product of matrices.
        @jit
        def step(
            learned: _Learning,
            replay: Replay,
            moments: dict[str, Moments],
            coefficients: dict[str, Tensor],
            keys: Tensor,
        ) -> tuple[_Learning, dict[str, Tensor]]:
            params, targets, policy_optimizer, critic_optimizer, entropy_optimizer = learned
            sample_key, critic_key, policy_key = keys.unbind(0)
            drawn = replay_sample(replay, sample_key, config.batch_size, coefficients["discount"], config.n_steps)
            sample = prepared(moments, drawn)
            params, targets, critic_optimizer, logged = critic_step(
                params, targets, critic_optimizer, sample, coefficients, critic_key
            )
            if with_policy:
                params, (policy_optimizer, entropy_optimizer), more = policy_step(
                    params, (policy_optimizer, entropy_optimizer), sample, coefficients, policy_key
                )
                logged = {**logged, **more}
            return (params, targets, policy_optimizer, critic_optimizer, entropy_optimizer), logged

        return step

    critics_alone, critics_and_policy = gradient_step(with_policy=False), gradient_step(with_policy=True)

    def learn(
        learned: _Learning, replay: Replay, moments: dict[str, Moments], coefficients: dict[str, Tensor], key: Tensor
    ) -> tuple[_Learning, dict[str, Tensor]]:
        """All gradient steps of a round; metrics are means over those that have them."""
        logged: dict[str, list[Tensor]] = {}
        for i, keys in enumerate(random.split(key, 3 * config.num_updates).reshape(-1, 3, 2).unbind(0)):
            step = critics_alone if (i + 1) % config.policy_delay else critics_and_policy
            learned, metrics = step(learned, replay, moments, coefficients, keys)
            for name, value in metrics.items():
                logged.setdefault(name, []).append(value)
        return learned, {name: torch.stack(values).mean() for name, values in logged.items()}

    @jit
    def observed(moments: dict[str, Moments], obs: Obs) -> dict[str, Moments]:
        return {group: moments_update(moments[group], obs[group]) for group in groups}

    @jit
    def watched(params: Learned, moments: dict[str, Moments], trajectory: Any) -> dict[str, Tensor]:
        # The last step is enough for what is told of the networks.
        policy = policy_net.hidden(params.policy, scaled(moments, "policy", trajectory.obs["policy"][-1]))
        seen = scaled(moments, critic_group, trajectory.obs[critic_group][-1])
        first = tree.map_leaves(lambda x: x[0], params.critics)
        critic = critic_net.hidden(first, torch.cat([seen, trajectory.extras["squashed"][-1]], -1))
        moved = {"observations/drift": drift(moments["policy"], trajectory.obs["policy"])}
        return {
            **(moved if config.normalize_observations else {}),
            "network/dead_policy_units": dead_units(policy),
            "network/dead_value_units": dead_units(critic),
            **trajectory_metrics(trajectory, env, bounds),
        }

    def init(key: Tensor) -> TrainState:
        policy_key, critic_key, env_key, run_key = random.split(key, 4).unbind(0)
        params = Learned(
            policy=policy_net.init(policy_key),
            critics=tree.stack([critic_net.init(k) for k in random.split(critic_key).unbind(0)]),
            log_entropy_coefficient=torch.tensor(math.log(config.initial_entropy_coefficient)),
        )
        env_params = env.params
        if randomize is not None:
            env_params = each_robots(env.params, randomize, random.fold_in(key, 4), config.num_envs)
        env_state, obs = batched.reset(env_params, random.split(env_key, config.num_envs))
        names = (
            *("policy_learning_rate", "value_learning_rate", "entropy_learning_rate"),
            *("discount", "target_entropy", "target_rate"),
        )
        return TrainState(
            params=params,
            targets=tree.map_leaves(torch.clone, params.critics),
            policy_optimizer=adam_init(params.policy),
            critic_optimizer=adam_init(params.critics),
            entropy_optimizer=adam_init({"log": params.log_entropy_coefficient}),
            observation_moments={group: moments_init(size) for group, size in sizes.items()},
            coefficients={name: torch.tensor(float(getattr(config, name))) for name in names},
            env_params=env_params,
            env_state=env_state,
            obs=obs,
            replay=empty_replay(env, config),
            episodes=no_episodes(spec),
            key=run_key,
            iteration=torch.tensor(0),
            env_steps=torch.tensor(0),
        )

    def update(state: TrainState) -> tuple[TrainState, dict[str, Tensor]]:
        key, act_key, learn_key = random.split(state.key, 3).unbind(0)
        actor = (state.params.policy, state.observation_moments, state.env_steps >= config.prefill)
        env_state, obs, trajectory = run(
            actor, state.env_params, state.env_state, state.obs, random.split(act_key, config.num_steps)
        )
        transition = trajectory.transition
        replay = replay_add(
            state.replay,
            {group: trajectory.obs[group] for group in groups},
            trajectory.extras["squashed"],
            transition.reward.to(torch.float32),
            transition.terminated,
            transition.truncated,
            {group: transition.next_obs[group] for group in groups},
        )
        moments = observed(state.observation_moments, trajectory.obs)
        env_steps = state.env_steps + config.steps_per_round
        before = (
            *(state.params, state.targets),
            *(state.policy_optimizer, state.critic_optimizer, state.entropy_optimizer),
        )
        after, learned = learn(before, replay, moments, state.coefficients, learn_key)
        # Until the buffer is filled, what was learned from what little there is does not count.
        ready = env_steps >= config.prefill
        params, targets, policy_optimizer, critic_optimizer, entropy_optimizer = tree.where(ready, after, before)
        learned = {
            name: torch.where(ready, value, 0.0 if name.startswith(MUST_BE_FINITE) else math.nan)
            for name, value in learned.items()
        }
        episodes = count_episodes(state.episodes, transition)
        metrics = {**watched(state.params, state.observation_moments, trajectory), **learned}
        state = TrainState(
            params=params,
            targets=targets,
            policy_optimizer=policy_optimizer,
            critic_optimizer=critic_optimizer,
            entropy_optimizer=entropy_optimizer,
            observation_moments=moments,
            coefficients=state.coefficients,
            env_params=state.env_params,
            env_state=env_state,
            obs=obs,
            replay=replay,
            episodes=episodes,
            key=key,
            iteration=state.iteration + 1,
            env_steps=env_steps,
        )
        filled = replay.num_steps.clamp(max=replay.capacity) / replay.capacity
        return state, {**metrics, **episode_metrics(episodes, spec), "replay/filled": filled}

    def policy(state: TrainState, obs: Obs, key: Tensor | None = None) -> Tensor:
        mean, log_std = nets.policy(state.params.policy, scaled(state.observation_moments, "policy", obs["policy"]))
        action = tanh_gaussian_mode(mean) if key is None else tanh_gaussian_sample(key, mean, log_std)[0]
        return middle + half * action

    return Algorithm(init, update, policy)


def _networks(config: SACConfig, policy_apply: Any, critic_apply: Any) -> _Networks:
    low, high = config.log_std_range
    support = torch.linspace(*config.value_range, config.atoms or 1)
    stacked = torch.func.vmap(critic_apply, in_dims=(0, None))

    def policy(params: Any, obs: Tensor) -> tuple[Tensor, Tensor]:
        mean, raw = policy_apply(params, obs).chunk(2, -1)
        return mean, low + 0.5 * (high - low) * (1.0 + torch.tanh(raw))

    def logits(critics: Any, obs: Tensor, action: Tensor) -> Tensor:
        return stacked(critics, torch.cat([obs, action], -1))

    def values(critics: Any, obs: Tensor, action: Tensor) -> Tensor:
        out = logits(critics, obs, action)
        return (torch.softmax(out, -1) * support).sum(-1) if config.atoms else out.squeeze(-1)

    return _Networks(policy, values, logits, support)


def _pessimistic(config: SACConfig, both: Tensor) -> Tensor:
    """One value `[N]` of two critics' `[2, N]`."""
    return both.amin(0) if config.pessimism == "min" else both.mean(0)


def _goal(
    config: SACConfig,
    nets: _Networks,
    targets: Any,
    sample: Sample,
    group: str,
    a_t: Tensor,
    log_prob_t: Tensor,
    entropy_coefficient: Tensor,
) -> tuple[Tensor, Tensor]:
    """What critics are to predict, `[N]` or distributions `[N, atoms]`, and its mean `[N]`."""
    if not config.atoms:
        q_t = _pessimistic(config, nets.values(targets, sample.obs_t[group], a_t))
        y = soft_target(sample.r_t, sample.discount_t, q_t, log_prob_t, entropy_coefficient)
        return y, y
    p = torch.softmax(nets.logits(targets, sample.obs_t[group], a_t), -1)
    if config.pessimism == "min":
        q = (p * nets.support).sum(-1)
        p = torch.where((q[0] <= q[1]).unsqueeze(-1), p[0], p[1])
    else:
        p = p.mean(0)
    columns = (sample.r_t, sample.discount_t, log_prob_t)
    r_t, discount_t, log_prob = (x.unsqueeze(-1).expand_as(p) for x in columns)
    moved = soft_target(r_t, discount_t, nets.support.expand_as(p), log_prob, entropy_coefficient)
    goal = project_distribution(p, moved, nets.support)
    return goal, (goal * nets.support).sum(-1)


def _clipped(grads: Any, config: SACConfig) -> tuple[Any, Tensor]:
    if config.max_gradient_norm is not None:
        return clip_by_global_norm(grads, config.max_gradient_norm)
    # Only to be looked at: sums of squares in float32 will do.
    norms = [torch.linalg.vector_norm(leaf) for leaf in tree.tree_leaves(grads)]
    return grads, torch.linalg.vector_norm(torch.stack(norms))
