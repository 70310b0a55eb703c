"""Proximal policy optimization (Schulman et al. 2017, https://arxiv.org/abs/1707.06347).

The file reads top to bottom: the configuration, the losses (functions of arrays that anyone can call alone),
the state, and `make_ppo`, whose `init` and `update` are pure. Nothing here touches a file, a clock or a
global random generator.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlcore import random, tree
from rlcore.distributions import gaussian_entropy, gaussian_kl, gaussian_log_prob, gaussian_sample
from rlcore.env import Env, EnvState, Obs, Params, batch
from rlcore.errors import InputError, check_field
from rlcore.experiment import Algorithm
from rlcore.jit import jit
from rlcore.networks import ACTIVATIONS, dead_units, mlp
from rlcore.normalize import Moments, denormalize, drift, moments_init, moments_update, normalize
from rlcore.optim import AdamState, adam_init, adam_update, clip_by_global_norm
from rlcore.randomize import each_robots
from rlcore.returns import gae
from rlcore.rollout import (
    RecentEpisodes,
    Trajectory,
    count_episodes,
    episode_metrics,
    no_episodes,
    trajectory_metrics,
    unroll,
)
from rlcore.symmetric_networks import symmetric_mlp
from rlcore.symmetry import SignedPermutation, Symmetry, check_symmetry
from rlcore.symmetry import apply as reflect
from rlcore.tree import pytree

# --- configuration ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PPOConfig:
    """Settings of PPO."""

    num_envs: int = 512
    """Environments that run side by side."""
    num_steps: int = 16
    """Control steps that each environment takes between two updates."""
    num_epochs: int = 4
    """Passes over each batch."""
    num_minibatches: int = 4
    """Gradient steps in a pass; divides num_envs x num_steps."""
    learning_rate: float = 3e-4
    """Adam's step size at the start."""
    kl_target: float | None = None
    """If set, the learning rate follows the policy's change: slower where an iteration's KL divergence
    exceeds twice this, faster where it stays below half of it."""
    learning_rate_bounds: tuple[float, float] = (1e-5, 1e-2)
    """Lowest and highest learning rate that kl_target may choose."""
    discount: float = 0.99
    """Discount of the next step's value (gamma)."""
    gae_lambda: float = 0.95
    """Decay of the advantage's trace: 0 trusts the value function, 1 the sampled return."""
    clip: float = 0.2
    """How far the probability ratio may move from 1 before its gradient stops."""
    value_clip: float | None = None
    """If set, how far a value may move from the old one, in normalized units, before its gradient stops."""
    value_coefficient: float = 1.0
    """Weight of the value loss."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus."""
    bounds_coefficient: float = 0.0
    """Weight of the loss on mean actions more than a tenth outside their bounds."""
    max_gradient_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    normalize_observations: bool = True
    """Scale observations by their running mean and deviation."""
    normalize_values: bool = True
    """Let the value network predict returns scaled by their running mean and deviation."""
    normalize_advantages: bool = True
    """Scale each batch's advantages to mean 0 and deviation 1."""
    initial_std: float = 1.0
    """Standard deviation of actions at the start."""
    policy_average: float = 0.0
    """Decay, per iteration, of the running mean of the policy's parameters that evaluation and films use: large
    steps leave the newest policy a little to one side or the other of where learning is. 0 takes the newest."""
    policy_layers: tuple[int, ...] = (256, 128, 64)
    """Hidden layers of the policy."""
    value_layers: tuple[int, ...] = (256, 128, 64)
    """Hidden layers of the value function."""
    activation: str = "elu"
    """Activation between layers: elu, gelu, relu, silu, swish or tanh."""
    symmetry_coefficient: float = 0.0
    """Weight of the loss on the difference between the policy and its mirror image."""
    symmetry_augmentation: bool = False
    """Learn from each transition and from its mirror image."""
    symmetric_networks: bool = False
    """Let policy and value function be symmetric by construction, with half the parameters: what is learnt of the
    left is known of the right. Hidden layers must be of even sizes."""

    def __post_init__(self) -> None:
        at_least_one = ("num_envs", "num_steps", "num_epochs", "num_minibatches")
        positive = ("learning_rate", "clip", "max_gradient_norm", "initial_std")
        not_negative = ("value_coefficient", "entropy_coefficient", "bounds_coefficient", "symmetry_coefficient")
        for name in at_least_one:
            _check(self, name, getattr(self, name) >= 1, "at least 1")
        _check(self, "num_steps", self.batch_size >= 2, "more than 1 where num_envs is 1")
        for name in positive:
            _check(self, name, 0 < getattr(self, name) < math.inf, "more than 0")
        for name in not_negative:
            _check(self, name, 0 <= getattr(self, name) < math.inf, "0 or more")
        for name in ("kl_target", "value_clip"):
            value = getattr(self, name)
            _check(self, name, value is None or 0 < value < math.inf, "more than 0, or None")
        for name in ("discount", "gae_lambda"):
            _check(self, name, 0 <= getattr(self, name) <= 1, "between 0 and 1")
        _check(self, "policy_average", 0 <= self.policy_average < 1, "at least 0 and below 1")
        low, high = self.learning_rate_bounds
        _check(self, "learning_rate_bounds", 0 < low <= high < math.inf, "a low and a high value above 0")
        if self.symmetric_networks:
            for name in ("policy_layers", "value_layers"):
                _check(self, name, all(n % 2 == 0 for n in getattr(self, name)), "even sizes for symmetric networks")
        redundant = self.symmetric_networks and (self.symmetry_augmentation or self.symmetry_coefficient > 0)
        _check(self, "symmetric_networks", not redundant, "left out where the loss or augmentation makes for symmetry")
        for name in ("policy_layers", "value_layers"):
            _check(self, name, all(n >= 1 for n in getattr(self, name)), "sizes of at least 1")
        _check(self, "activation", self.activation in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}")
        _check(
            self,
            "num_minibatches",
            self.batch_size % self.num_minibatches == 0,
            f"a divisor of num_envs x num_steps = {self.batch_size}",
        )

    @property
    def batch_size(self) -> int:
        """Environment steps between two updates."""
        return self.num_envs * self.num_steps

    @property
    def symmetric(self) -> bool:
        """Whether learning needs to know how the task looks in the mirror."""
        return self.symmetric_networks or self.mirrors

    @property
    def mirrors(self) -> bool:
        """Whether it learns from mirror images."""
        return self.symmetry_augmentation or self.symmetry_coefficient > 0


_check = partial(check_field, "--ppo.")


def _check_no_symmetry(config: PPOConfig) -> None:
    for name in ("symmetry_coefficient", "symmetry_augmentation", "symmetric_networks"):
        _check(config, name, not getattr(config, name), "left out where no symmetry is given")


# --- losses -------------------------------------------------------------------------------------------------


def clipped_surrogate(
    log_prob: Float[Tensor, " N"],
    old_log_prob: Float[Tensor, " N"],
    advantage: Float[Tensor, " N"],
    clip: float | Tensor,
) -> Float[Tensor, ""]:
    """The clipped objective, negated: `-mean(min(r A, clip(r, 1 - clip, 1 + clip) A))`.

    `r = pi(a|s) / pi_old(a|s)`; equation 7 of the paper.

    Args:
      log_prob: of the actions taken, under the policy being learned.
      old_log_prob: the same under the policy that took them.
      advantage: of those actions.
      clip: how far r may move from 1.
    """
    ratio = torch.exp(log_prob - old_log_prob)
    limit: Any = clip  # torch's annotations know no clamp between sums of numbers and tensors
    clipped = torch.clamp(ratio, 1.0 - limit, 1.0 + limit)
    return -torch.minimum(ratio * advantage, clipped * advantage).mean()


def value_loss(
    value: Float[Tensor, " N"],
    old_value: Float[Tensor, " N"],
    target: Float[Tensor, " N"],
    clip: float | None = None,
) -> Float[Tensor, ""]:
    """`mean((v - target)^2) / 2`; with `clip`, the larger of that and the same with v kept near the old one.

    Clipping is from the reference implementation (see Engstrom et al. 2020,
    https://arxiv.org/abs/2005.12729).

    Args:
      value: predicted now.
      old_value: predicted when the batch was collected.
      target: the return to predict.
      clip: how far the value may move from the old one; None for no limit.
    """
    error = (value - target).square()
    if clip is not None:
        near = old_value + torch.clamp(value - old_value, -clip, clip)
        error = torch.maximum(error, (near - target).square())
    return 0.5 * error.mean()


def bounds_loss(
    mean: Float[Tensor, "N action"], low: Float[Tensor, " action"], high: Float[Tensor, " action"]
) -> Float[Tensor, ""]:
    """`mean(sum_i max(low_i - 0.1 w_i - m_i, 0)^2 + max(m_i - high_i - 0.1 w_i, 0)^2)`.

    Here `w = (high - low) / 2`.
    Keeps mean actions from drifting far outside their bounds, where no gradient of the task reaches them.
    Infinite bounds cost nothing.
    """
    margin = torch.nan_to_num(0.05 * (high - low), posinf=0.0)
    outside = torch.clamp(low - margin - mean, min=0.0) + torch.clamp(mean - high - margin, min=0.0)
    return outside.square().sum(-1).mean()


def symmetry_loss(
    mean: Float[Tensor, "N action"], mirrored_mean: Float[Tensor, "N action"], mirror: SignedPermutation
) -> Float[Tensor, ""]:
    """`mean(||mu(o) - M_a mu(M_o o)||^2)`: zero where the policy does in the mirror the mirror image of what it does.

    Source: Yu et al. 2018, "Learning symmetric and low-energy locomotion".

    Args:
      mean: mean actions for observations.
      mirrored_mean: mean actions for the mirror images of these observations.
      mirror: the map of actions, M_a.
    """
    return (mean - reflect(mirror, mirrored_mean)).square().sum(-1).mean()


@pytree
class Batch:
    """What a minibatch holds; every leaf is `[N, ...]`.

    Attributes:
      policy_obs, value_obs: normalized observations of the policy and of the value function.
      action: what was done.
      log_prob, mean: of that action, and the mean action, under the policy that did it.
      advantage: `[N]`.
      value, target: `[N]` the network's old output, and the return to predict in the network's units.
      mirrored: where learning needs them, `policy_obs` and `value_obs` of the mirror images. They were mirrored before
        they were normalized: the other way round, another observation would come out.
    """

    policy_obs: Tensor
    value_obs: Tensor
    action: Tensor
    log_prob: Tensor
    mean: Tensor
    advantage: Tensor
    value: Tensor
    target: Tensor
    mirrored: dict[str, Tensor] = field(default_factory=dict)


def augmented(data: Batch, mirror: SignedPermutation) -> Batch:
    """A minibatch and then its mirror image: `[N, ...]` to `[2N, ...]`.

    What the acting policy knew of an action is taken over to the mirrored one: its log probability, the value and the
    advantage. The acting policy itself would have done the mirrored action with another probability, as far as it is
    not symmetric, and one that is tiny would make the ratio explode.

    Source: Mittal et al. 2024, "Symmetry considerations for learning task symmetric robot policies",
    https://arxiv.org/abs/2403.04359.

    Args:
      data: the minibatch, with `mirrored` observations.
      mirror: the map of actions.
    """
    actions = {"action": reflect(mirror, data.action), "mean": reflect(mirror, data.mean)}
    observations = {name: data.mirrored[name] for name in ("policy_obs", "value_obs")}
    image = tree.replace(data, **observations, **actions, mirrored={})
    return tree.map_leaves(lambda x, y: torch.cat([x, y]), tree.replace(data, mirrored={}), image)


@pytree
class Networks:
    """What is learned: the parameters of two networks, and the log deviation of actions, `[action]`."""

    policy: Any
    value: Any
    log_std: Tensor


def ppo_loss(
    params: Networks,
    data: Batch,
    old_log_std: Tensor,
    coefficients: dict[str, Tensor],
    config: PPOConfig,
    bounds: tuple[Tensor, Tensor],
    apply: tuple[Callable[[Any, Tensor], Tensor], Callable[[Any, Tensor], Tensor]],
    mirror: SignedPermutation | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """PPO's objective on a minibatch.

    `L = L_surrogate + c_v L_value - c_e H + c_b L_bounds + c_s L_symmetry`

    Args:
      params: the parameters to differentiate by.
      data: the minibatch.
      old_log_std: `[action]` log deviation of the policy that collected it.
      coefficients: `clip` and `entropy_coefficient`, `[]` each (tensors, so that a population may vary them).
      config: the coefficients that are fixed.
      bounds: lowest and highest action, `[action]` each.
      apply: the policy's and the value function's network.
      mirror: the map of actions, where the config asks for symmetry; `data.mirrored` is needed then too.

    Returns:
      The loss and its parts.

    Raises:
      InputError: if the config asks for symmetry and there is no map.
    """
    if mirror is None:
        _check_no_symmetry(config)
    size, mirrored = data.advantage.shape[0], data.mirrored
    if mirror is not None and config.symmetry_augmentation:
        data = augmented(data, mirror)
    mean = apply[0](params.policy, data.policy_obs)
    value = apply[1](params.value, data.value_obs).squeeze(-1)
    log_prob = gaussian_log_prob(mean, params.log_std, data.action)
    surrogate = clipped_surrogate(log_prob, data.log_prob, data.advantage, coefficients["clip"])
    critic = value_loss(value, data.value, data.target, config.value_clip)
    entropy = gaussian_entropy(params.log_std)
    outside = bounds_loss(mean, *bounds)
    loss = (
        surrogate
        + config.value_coefficient * critic
        - coefficients["entropy_coefficient"] * entropy
        + config.bounds_coefficient * outside
    )
    extra: dict[str, Tensor] = {}
    if mirror is not None and config.symmetry_coefficient > 0:
        # An augmented minibatch has its mirror image for its second half.
        image = mean[size:] if config.symmetry_augmentation else apply[0](params.policy, mirrored["policy_obs"])
        extra["loss/symmetry"] = symmetry_loss(mean[:size], image, mirror)
        loss = loss + config.symmetry_coefficient * extra["loss/symmetry"]
    ratio = torch.exp(log_prob - data.log_prob)
    metrics = {
        "loss/policy": surrogate,
        "loss/value": critic,
        "loss/bounds": outside,
        "policy/entropy": entropy,
        "policy/kl": gaussian_kl(data.mean[:size], old_log_std, mean[:size], params.log_std).mean(),
        "policy/clip_fraction": ((ratio - 1.0).abs() > coefficients["clip"]).to(torch.float32).mean(),
        **extra,
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


# --- state --------------------------------------------------------------------------------------------------


@pytree
class TrainState:
    """The whole run: saving this tree and loading it goes on bit for bit.

    Attributes:
      params: what is learned.
      averaged: the policy network that acts when learning is over: a running mean of `params.policy`.
      optimizer: Adam's moments.
      observation_moments: of each observation group that is used.
      value_moments: of returns.
      coefficients: learning_rate, discount, gae_lambda, clip and entropy_coefficient as tensors `[]`, so that
        runs side by side under vmap can differ in them.
      env_params, env_state, obs: the environments; every leaf of env_params is `[B, ...]` where robots differ.
      episodes: what the last hundred or so episodes came to.
      key: random key of the run.
      iteration, env_steps: `[]` counters.
    """

    params: Networks
    averaged: Any
    optimizer: AdamState
    observation_moments: dict[str, Moments]
    value_moments: Moments
    coefficients: dict[str, Tensor]
    env_params: Params
    env_state: EnvState
    obs: Obs
    episodes: RecentEpisodes
    key: Tensor
    iteration: Tensor
    env_steps: Tensor


# --- the algorithm ------------------------------------------------------------------------------------------


def make_ppo(
    env: Env,
    config: PPOConfig,
    randomize: Callable[[Params, Tensor], Params] | None = None,
    symmetry: Symmetry | None = None,
) -> Algorithm:
    """PPO on an environment of one robot.

    The value function sees the observation group `critic` where the environment has one, else `policy`.

    Args:
      env: an environment with automatic resets.
      config: the settings.
      randomize: `(params, key) -> params`, drawn once for each robot of a run (see `rlcore.randomize`); by default all
        robots share the environment's own parameters.
      symmetry: how the task looks in the mirror. Then `policy/symmetry_error` tells how far the policy is from doing
        in the mirror the mirror image of what it does: the root of the mean squared difference of mean actions.

    Returns:
      `init(key)`, `update(state)` and `act(state, obs, key)`, all pure.

    Raises:
      InputError: if the environment does not reset itself, the config asks for symmetry where none is given, or the
        symmetry does not fit the environment.
    """
    if "auto_reset" not in env.spec.wrappers:
        raise InputError(f"PPO needs an environment with automatic resets; wrap {env.spec.name} in auto_reset")
    critic_group, groups = env.spec.critic_group, env.spec.learned_groups
    action_size = env.spec.action_size
    policy_sizes = (env.spec.observation_size("policy"), *config.policy_layers, action_size)
    value_sizes = (env.spec.observation_size(critic_group), *config.value_layers, 1)
    if symmetry is None:
        _check_no_symmetry(config)
    else:
        check_symmetry(symmetry, env.spec, groups)
    if symmetry is not None and config.symmetric_networks:
        observations = symmetry.observations
        policy_net = symmetric_mlp(policy_sizes, observations["policy"], symmetry.action, config.activation, 0.01)
        value_net = symmetric_mlp(value_sizes, observations[critic_group], None, config.activation)
    else:
        policy_net = mlp(policy_sizes, config.activation, final_scale=0.01)
        value_net = mlp(value_sizes, config.activation)
    mirrors = {} if symmetry is None else symmetry.observations
    mirror_action = None if symmetry is None else symmetry.action
    apply = (policy_net.apply, value_net.apply)
    bounds = (torch.tensor(env.spec.action_low), torch.tensor(env.spec.action_high))
    batched = batch(env, shared_params=randomize is None)

    def scaled(moments: dict[str, Moments], group: str, obs: Tensor) -> Tensor:
        return normalize(moments[group], obs) if config.normalize_observations else obs

    def image(moments: dict[str, Moments], group: str, obs: Tensor) -> Tensor:
        """The mirror image of observations, then scaled."""
        return scaled(moments, group, reflect(mirrors[group], obs))

    def sample(group: str, obs: Tensor) -> Tensor:
        """What moments are updated with: for a symmetric policy as much of the left as of the right."""
        return torch.cat([obs, reflect(mirrors[group], obs)]) if config.symmetric else obs

    def act(actor: Any, obs: Obs, key: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        params, moments = actor
        mean = policy_net.apply(params.policy, scaled(moments, "policy", obs["policy"]))
        action = gaussian_sample(key, mean, params.log_std)
        return action, {"mean": mean, "log_prob": gaussian_log_prob(mean, params.log_std, action)}

    run = unroll(batched, act)

    def values(state: TrainState, obs: Tensor) -> Tensor:
        """Values of observations `[..., size]`, in the network's units."""
        return value_net.apply(state.params.value, scaled(state.observation_moments, critic_group, obs)).squeeze(-1)

    def in_reward_units(state: TrainState, value: Tensor) -> Tensor:
        return denormalize(state.value_moments, value) if config.normalize_values else value

    @jit
    def prepare(state: TrainState, trajectory: Trajectory) -> tuple[Batch, dict[str, Moments], Moments, dict[str, Any]]:
        """The batch to learn from, `[T * B, ...]`, the moments that come after it, and what to log of it."""
        transition = trajectory.transition
        value_tm1 = values(state, trajectory.obs[critic_group])
        value_t = values(state, transition.next_obs[critic_group])
        v_tm1, v_t = in_reward_units(state, value_tm1), in_reward_units(state, value_t)
        terminated, truncated = transition.terminated, transition.truncated
        discount_t = state.coefficients["discount"] * (~terminated)
        trace_t = (~(terminated | truncated)).to(torch.float32)
        advantage = gae(
            transition.reward.to(torch.float32),
            discount_t,
            v_tm1,
            v_t,
            trace_t,
            state.coefficients["gae_lambda"],
        )
        target = advantage + v_tm1
        value_moments = state.value_moments
        if config.normalize_values:
            value_moments = moments_update(value_moments, target)
            goal = normalize(value_moments, target, clip=None)
        else:
            goal = target
        explained = 1.0 - (target - v_tm1).var() / target.var().clamp(min=1e-8)
        # Where no action is better than another, advantages are nothing beside the returns.
        share = advantage.std() / target.square().mean().sqrt().clamp(min=1e-8)
        if config.normalize_advantages:
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        data = Batch(
            policy_obs=scaled(state.observation_moments, "policy", trajectory.obs["policy"]),
            value_obs=scaled(state.observation_moments, critic_group, trajectory.obs[critic_group]),
            action=trajectory.action,
            log_prob=trajectory.extras["log_prob"],
            mean=trajectory.extras["mean"],
            advantage=advantage,
            # As the network told it: what value_clip limits is how far the network moves.
            value=value_tm1,
            target=goal,
            mirrored={
                "policy_obs": image(state.observation_moments, "policy", trajectory.obs["policy"]),
                "value_obs": image(state.observation_moments, critic_group, trajectory.obs[critic_group]),
            }
            if config.mirrors
            else {},
        )
        data = tree.map_leaves(lambda x: x.reshape(-1, *x.shape[2:]), data)
        moments = {g: moments_update(m, sample(g, trajectory.obs[g])) for g, m in state.observation_moments.items()}
        metrics = {
            "value/explained_variance": explained,
            "value/mean": v_tm1.mean(),
            "advantage/share": share,
        }
        if config.normalize_observations:
            seen = sample("policy", trajectory.obs["policy"])
            metrics["observations/drift"] = drift(state.observation_moments["policy"], seen)
        metrics |= trajectory_metrics(trajectory, env, bounds)
        return data, moments, value_moments, metrics

    @jit
    def gradient_step(
        params: Networks,
        optimizer: AdamState,
        old_log_std: Tensor,
        coefficients: dict[str, Tensor],
        data: Batch,
    ) -> tuple[Networks, AdamState, dict[str, Tensor]]:
        grads, (_, metrics) = torch.func.grad_and_value(ppo_loss, has_aux=True)(
            params, data, old_log_std, coefficients, config, bounds, apply, mirror_action
        )
        if mirror_action is not None and config.symmetric_networks:
            spread = 0.5 * (grads.log_std + grads.log_std[mirror_action.permutation])
            grads = tree.replace(grads, log_std=spread)
        grads, norm = clip_by_global_norm(grads, config.max_gradient_norm)
        params, optimizer = adam_update(grads, optimizer, params, coefficients["learning_rate"])
        return params, optimizer, {**metrics, "gradients/norm": norm}

    @jit
    def divergence(params: Networks, old_log_std: Tensor, data: Batch) -> Tensor:
        mean = policy_net.apply(params.policy, data.policy_obs)
        return gaussian_kl(data.mean, old_log_std, mean, params.log_std).mean()

    @jit
    def dead(params: Networks, moments: dict[str, Moments], obs: Obs) -> dict[str, Tensor]:
        policy = policy_net.hidden(params.policy, scaled(moments, "policy", obs["policy"]))
        value = value_net.hidden(params.value, scaled(moments, critic_group, obs[critic_group]))
        return {"network/dead_policy_units": dead_units(policy), "network/dead_value_units": dead_units(value)}

    @jit
    def symmetry_error(params: Networks, moments: dict[str, Moments], obs: Tensor) -> Tensor:
        mean = policy_net.apply(params.policy, scaled(moments, "policy", obs))
        mirrored_mean = policy_net.apply(params.policy, image(moments, "policy", obs))
        assert mirror_action is not None
        return torch.sqrt(symmetry_loss(mean, mirrored_mean, mirror_action) / action_size)

    def learn(state: TrainState, data: Batch, key: Tensor) -> tuple[Networks, AdamState, dict[str, Tensor]]:
        """All gradient steps of an iteration; the metrics but the divergence are means over them."""
        params, optimizer, old_log_std = state.params, state.optimizer, state.params.log_std
        logged = []
        for epoch_key in random.split(key, config.num_epochs).unbind(0):
            order = random.permutation(epoch_key, config.batch_size)
            for rows in order.reshape(config.num_minibatches, -1).unbind(0):
                minibatch = tree.map_leaves(lambda x, rows=rows: x.index_select(0, rows), data)
                params, optimizer, metrics = gradient_step(
                    params, optimizer, old_log_std, state.coefficients, minibatch
                )
                logged.append(metrics)
        metrics = tree.map_leaves(torch.mean, tree.stack(logged))
        # The divergence that counts is that of the whole step from policy to policy.
        return params, optimizer, {**metrics, "policy/kl": divergence(params, old_log_std, data)}

    def init(key: Tensor) -> TrainState:
        policy_key, value_key, env_key, run_key = random.split(key, 4).unbind(0)
        params = Networks(
            policy=policy_net.init(policy_key),
            value=value_net.init(value_key),
            log_std=torch.full((action_size,), math.log(config.initial_std)),
        )
        env_params = env.params
        if randomize is not None:
            env_params = each_robots(env.params, randomize, random.fold_in(key, 4), config.num_envs)
        env_state, obs = batched.reset(env_params, random.split(env_key, config.num_envs))
        names = ("learning_rate", "discount", "gae_lambda", "clip", "entropy_coefficient")
        return TrainState(
            params=params,
            averaged=params.policy,
            optimizer=adam_init(params),
            # Reset states alone have parts that never vary; until the first trajectory nothing is scaled.
            observation_moments={g: moments_init(obs[g].shape[-1]) for g in groups},
            value_moments=moments_init(()),
            coefficients={name: torch.tensor(float(getattr(config, name))) for name in names},
            env_params=env_params,
            env_state=env_state,
            obs=obs,
            episodes=no_episodes(env.spec),
            key=run_key,
            iteration=torch.tensor(0),
            env_steps=torch.tensor(0),
        )

    def update(state: TrainState) -> tuple[TrainState, dict[str, Tensor]]:
        key, act_key, learn_key = random.split(state.key, 3).unbind(0)
        actor = (state.params, state.observation_moments)
        env_state, obs, trajectory = run(
            actor, state.env_params, state.env_state, state.obs, random.split(act_key, config.num_steps)
        )
        data, observation_moments, value_moments, metrics = prepare(state, trajectory)
        params, optimizer, learned = learn(state, data, learn_key)
        metrics = {**metrics, **learned, "policy/learning_rate": state.coefficients["learning_rate"]}
        metrics["policy/std"] = params.log_std.exp().mean()
        # The last step's observations are enough for a metric.
        last = {group: trajectory.obs[group][-1] for group in groups}
        metrics |= dead(params, state.observation_moments, last)
        if symmetry is not None:
            metrics["policy/symmetry_error"] = symmetry_error(params, state.observation_moments, last["policy"])
        episodes = count_episodes(state.episodes, trajectory.transition)
        metrics |= episode_metrics(episodes, env.spec)
        state = TrainState(
            params=params,
            averaged=_averaged(state, params.policy, config.policy_average),
            optimizer=optimizer,
            observation_moments=observation_moments,
            value_moments=value_moments,
            coefficients=_adapted(state.coefficients, metrics["policy/kl"], config),
            env_params=state.env_params,
            env_state=env_state,
            obs=obs,
            episodes=episodes,
            key=key,
            iteration=state.iteration + 1,
            env_steps=state.env_steps + config.batch_size,
        )
        return state, metrics

    def policy(state: TrainState, obs: Obs, key: Tensor | None = None) -> Tensor:
        mean = policy_net.apply(state.averaged, scaled(state.observation_moments, "policy", obs["policy"]))
        return mean if key is None else gaussian_sample(key, mean, state.params.log_std)

    return Algorithm(init, update, jit(policy))


def _averaged(state: TrainState, policy: Any, decay: float) -> Any:
    """The running mean after one more policy (Polyak and Juditsky 1992).

    In the first iterations it forgets faster, so that what it began with does not stay.
    """
    if decay == 0.0:
        return policy
    seen = state.iteration.to(torch.float32)
    keep = torch.clamp((1.0 + seen) / (10.0 + seen), max=decay)
    return tree.map_leaves(lambda old, new: keep * old + (1.0 - keep) * new, state.averaged, policy)


def _adapted(coefficients: dict[str, Tensor], kl: Tensor, config: PPOConfig) -> dict[str, Tensor]:
    """The learning rate for the next iteration, if it follows the divergence.

    It changes by a fifth once an iteration: changing it at every gradient step lets a few noisy minibatches
    shrink it to nothing.
    """
    if config.kl_target is None:
        return coefficients
    rate = coefficients["learning_rate"]
    factor = torch.where(kl > 2.0 * config.kl_target, 1 / 1.2, torch.where(kl < 0.5 * config.kl_target, 1.2, 1.0))
    return {**coefficients, "learning_rate": torch.clamp(rate * factor, *config.learning_rate_bounds)}
