"""Environments as pure functions, and functions from environment to environment.

An `Env` describes one robot: `reset` and `step` take states and return states, without a batch axis, and hold
nothing. `batch` maps them over thousands. A wrapper is a function that takes an `Env` and returns one; what
it must remember between steps is an entry of `EnvState.memory`, so that a reset resets it and a checkpoint
keeps it.

Randomness comes from `EnvState.key`, the key of an episode. Whoever draws in a step folds the step counter and a
number of its own into it, so that no two draws meet, and a step without draws costs none.

`auto_reset` begins new episodes through `rlcore.masked`, which computes them for the robots that need one only.
Outside a recording every robot's reset is computed, but those that go on get a null key, which draws nothing and
which `Engine.forward` skips: resetting three of 4096 robots costs three.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rlcore import masked, random, tree
from rlcore.errors import InputError
from rlcore.jit import jit, one_thread
from rlcore.measurement import check_metrics
from rlcore.physics.engine import BatchEngine, ModelInfo, PhysicsState
from rlcore.rewards import Term, weighted_terms
from rlcore.tree import pytree

Obs = dict[str, Tensor]
"""Observation groups by name (`policy`, `critic`), each `[size]` float32."""

# What each consumer of randomness adds to the step counter before folding it into the state's key. A reset splits
# its key in two (0 and 1), so the counters of steps begin well above.
_DELAY, _FIRST_PUSH, _PUSH, COMMAND_SALT, LEVEL_SALT, _NOISE = (salt << 32 - 8 for salt in range(1, 7))
# Those who draw for each group of observations add its place, and have room for many.
_OBSERVATION_DELAY, _ENCODER = (salt << 32 - 8 for salt in (128, 192))


_DELAYED = "action_delay"  # in the memory, where actions arrive late


@pytree
class Params:
    """What may differ from robot to robot without changing the program.

    Attributes:
      physics: model fields by name that replace the nominal ones, such as `body_mass` `[nbody]`.
      weights: reward weight of each term, `[]`.
      values: the numbers that a task or wrapper reads by name, such as a push speed or a command range.
    """

    physics: dict[str, Tensor]
    weights: dict[str, Tensor]
    values: dict[str, Tensor]


@pytree
class EnvState:
    """Everything one environment needs to go on.

    Attributes:
      physics: the mechanical state.
      memory: what the task and each wrapper remember, by name. `last_action` `[action]`, the one that was given
        last, is always there, and so is `terminated`, `[]` bool: whether the step that led here ended the episode by
        the task or by a fault.
      key: `[2]` random key of the episode; with `steps` folded in, that of a step.
      steps: `[]` int64, control steps since the reset.
    """

    physics: PhysicsState
    memory: dict[str, Any]
    key: Tensor
    steps: Tensor


@pytree
class Transition:
    """What one control step gave.

    Attributes:
      obs: what the policy sees next: after an automatic reset, the first observation of the new episode.
      next_obs: what the step led to, before any reset. Bootstrap from this one.
      reward: `[]` sum of the weighted terms times the control interval.
      terms: each term, weighted and times the control interval, `[]`.
      raw_terms: `[terms]` each term as it is, in the order of `EnvSpec.terms`: a term of weight 0 can be watched.
      terminated: `[]` bool, the task ended the episode: nothing comes after.
      truncated: `[]` bool, the clock ended it: bootstrap.
      metrics: quantities worth logging, by name: tensors `[]` (but `episode_terms`, see `auto_reset`) and the other
        kinds of `rlcore.measurement`.
    """

    obs: Obs
    next_obs: Obs
    reward: Tensor
    terms: dict[str, Tensor]
    raw_terms: Tensor
    terminated: Tensor
    truncated: Tensor
    metrics: dict[str, Any]


@dataclass(frozen=True)
class EnvSpec:
    """The fixed description of an environment.

    Attributes:
      name: the task's name.
      observations: for each group, its parts in order, as (name, size).
      actions: the name of each action, in order (for a robot: its actuators).
      action_low, action_high: bounds of each action; infinite where there are none.
      control_dt: s between actions.
      substeps: physics steps between actions.
      terms: names of the reward terms.
      model: the robot.
      wrappers: what has been wrapped around the task, innermost first.
      episode_steps: control steps after which an episode is truncated; None where no clock ends it.
      holds_actions: whether its step holds actions back where `action_delay` asks for it, as `make_env` sees to.
    """

    name: str
    observations: dict[str, tuple[tuple[str, int], ...]]
    actions: tuple[str, ...]
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    control_dt: float
    substeps: int
    terms: tuple[str, ...]
    model: ModelInfo
    wrappers: tuple[str, ...] = ()
    episode_steps: int | None = None
    holds_actions: bool = False

    @property
    def action_size(self) -> int:
        return len(self.actions)

    @property
    def critic_group(self) -> str:
        """What a value function sees: the group `critic` where there is one, else `policy`."""
        return "critic" if "critic" in self.observations else "policy"

    @property
    def learned_groups(self) -> tuple[str, ...]:
        """The groups that a policy and a value function see, one or two."""
        return tuple(dict.fromkeys(("policy", self.critic_group)))

    def observation_size(self, group: str) -> int:
        """Numbers in an observation group. Raises InputError for an unknown group."""
        return sum(size for _, size in self.parts(group))

    def parts(self, group: str) -> tuple[tuple[str, int], ...]:
        """The parts of an observation group, in order. Raises InputError for an unknown group."""
        if group not in self.observations:
            raise InputError(f"no observation group {group!r}; there are: {', '.join(self.observations)}")
        return self.observations[group]


class Reset(Protocol):
    """How an episode begins."""

    def __call__(self, params: Params, key: Tensor, /) -> tuple[EnvState, Obs]: ...


class Step(Protocol):
    """One control step."""

    def __call__(self, params: Params, state: EnvState, action: Tensor, /) -> tuple[EnvState, Transition]: ...


def _unchanged(params: Params, state: EnvState) -> Params:
    return params


class Env(NamedTuple):
    """An environment of one robot: a description, nominal parameters and pure functions.

    Attributes:
      spec: what it looks like from outside.
      params: the nominal parameters.
      reset: `(params, key [2]) -> (state, obs)`. A null key gives a state of no meaning at no cost.
      step: `(params, state, action [action]) -> (state, transition)`.
      engine: what runs the physics.
      carry: `(params, state) -> params`, what an episode hands on to the next one: the parameters for the reset
        that follows an episode which ended in `state`. By default they stay the same. What is carried is small and
        computed for every robot at every step, so it may only move leaves about.
    """

    spec: EnvSpec
    params: Params
    reset: Reset
    step: Step
    engine: BatchEngine
    carry: Callable[[Params, EnvState], Params] = _unchanged


class Memory(NamedTuple):
    """Something a task remembers: a tree in `EnvState.memory`.

    Attributes:
      init: `(params, physics, key) -> tree`, at a reset. The key is the episode's, `EnvState.key`: who draws folds a
        number of its own into it, as `rlcore.commands` does.
      update: `(params, before, action, physics) -> tree`, after each step; `before` has the key and the step counter.
    """

    init: Callable[[Params, PhysicsState, Tensor], Any]
    update: Callable[[Params, EnvState, Tensor, PhysicsState], Any]


def make_env(
    engine: BatchEngine,
    *,
    name: str,
    control_dt: float,
    initial: Callable[[Params, Tensor], tuple[Tensor, Tensor]],
    observe: Callable[[Params, EnvState], Mapping[str, Mapping[str, Tensor]]],
    terms: Sequence[Term],
    terminate: Callable[[Params, PhysicsState], Tensor],
    control: Callable[[Params, EnvState, Tensor], Tensor] | None = None,
    action_bounds: tuple[Sequence[float], Sequence[float]] | None = None,
    metrics: Callable[[Params, EnvState, Tensor, EnvState], dict[str, Any]] | None = None,
    memory: Mapping[str, Memory] | None = None,
    values: Mapping[str, Tensor | float] | None = None,
) -> Env:
    """A task from its parts, each a pure function of one robot's state.

    Args:
      engine: the physics.
      name: the task's name.
      control_dt: s between actions; a multiple of the engine's timestep.
      initial: `(params, key) -> (qpos [nq], qvel [nv])`, where an episode begins.
      observe: `(params, state) -> {group: {part: [k]}}`; training, evaluation, export and the robot call it.
      terms: the reward terms.
      terminate: `(params, physics) -> [] bool`, whether the task has ended. A physics fault ends it too. Reward terms
        and metrics find both in `after.memory["terminated"]`.
      control: `(params, state, action) -> ctrl [nu]`; by default the action is the control.
      action_bounds: lowest and highest of each action; by default the actuators' control ranges.
      metrics: `(params, before, action, after) -> metrics`, quantities to log: numbers `[]` by name, or what else
        `rlcore.measurement` knows. `rlcore.monitoring.robot_metrics` measures any legged robot.
      memory: what the task remembers beyond `last_action` and `terminated`.
      values: initial `params.values`.

    Raises:
      InputError: if control_dt is no multiple of the timestep, two terms or metrics share a name, one of them is not
        of its shape, or the bounds are no pairs of a lower and a higher number.
    """
    model = engine.model
    substeps = round(control_dt / model.timestep) if 0 < control_dt < math.inf else 0
    if substeps < 1 or abs(substeps * model.timestep - control_dt) > 1e-9:
        raise InputError(f"control_dt must be a multiple of the model's timestep {model.timestep} s, got {control_dt}")
    names = tuple(term.name for term in terms)
    if len(set(names)) != len(names):
        raise InputError(f"reward terms need different names, got {', '.join(names)}")
    memories = dict(memory or {})
    low, high = action_bounds or (model.ctrl_lower, model.ctrl_upper)
    action_size = len(low)
    if len(high) != action_size or not all(a < b for a, b in zip(low, high, strict=True)):
        raise InputError(f"action_bounds must be a low and a higher number for each action, got {low}, {high}")
    # Actions that are one to one with the actuators carry their names.
    one_to_one = action_size == model.nu
    action_names = model.actuators if one_to_one else tuple(f"action_{i}" for i in range(action_size))

    def grouped(params: Params, state: EnvState) -> Obs:
        groups = observe(params, state)
        return {g: torch.cat(list(parts.values())).to(torch.float32) for g, parts in groups.items()}

    def reset(params: Params, key: Tensor, /) -> tuple[EnvState, Obs]:
        draw, episode = random.split(key)
        start = engine.initial(*initial(params, draw))
        physics = engine.forward(params.physics, start, mask=~random.is_null(key))
        remembered = {n: m.init(params, physics, episode) for n, m in memories.items()}
        remembered["last_action"] = physics.qpos.new_zeros((action_size,))
        remembered["terminated"] = torch.zeros_like(physics.fault, dtype=torch.bool)
        state = EnvState(physics, remembered, episode, torch.zeros_like(physics.fault))
        return state, grouped(params, state)

    def step(params: Params, state: EnvState, action: Tensor, /) -> tuple[EnvState, Transition]:
        _check_action(action, action_names)
        action = action.to(state.physics.qpos.dtype)
        arrived, delayed = _arrived(state, action)
        ctrl = arrived if control is None else control(params, state, arrived)
        physics = engine.step(params.physics, state.physics, ctrl, substeps=substeps, key=state.key)
        # The engine has told a fault of an action that is not a number; nothing else may see that action.
        action = torch.nan_to_num(action, 0.0, 0.0, 0.0)
        remembered = {n: m.update(params, state, action, physics) for n, m in memories.items()}
        remembered |= {"last_action": action, **delayed}
        fault = physics.fault != 0
        remembered["terminated"] = terminated = terminate(params, physics) | fault
        after = EnvState(physics, remembered, state.key, state.steps + 1)
        reward, weighted, raw = weighted_terms(terms, params, state, action, after, control_dt)
        obs = grouped(params, after)
        logged = {} if metrics is None else metrics(params, state, action, after)
        logged = {**logged, "fault": fault.to(reward.dtype)}
        return after, Transition(obs, obs, reward, weighted, raw, terminated, torch.zeros_like(terminated), logged)

    params = Params(
        physics={},
        weights={term.name: torch.tensor(float(term.weight), dtype=torch.float64) for term in terms},
        values={n: torch.as_tensor(v, dtype=torch.float64) for n, v in (values or {}).items()},
    )
    # The observation's parts are read off a reset, so that no task states a size twice.
    start = engine.forward({}, engine.initial(*initial(params, random.key(0))))
    remembered = {n: m.init(params, start, random.key(0)) for n, m in memories.items()}
    still = start.qpos.new_zeros(action_size)
    remembered |= {"last_action": still, "terminated": torch.zeros_like(start.fault, dtype=torch.bool)}
    state = EnvState(start, remembered, random.key(0), torch.zeros_like(start.fault))
    for group, parts in observe(params, state).items():
        for part, value in parts.items():
            if value.ndim != 1:
                raise InputError(f"observation part {part!r} of {group!r} must be [k], got {list(value.shape)}")
    for what, value in [
        *((f"reward term {term.name!r}", term.fn(params, state, still, state)) for term in terms),
        ("terminate", terminate(params, start)),
    ]:
        if value.ndim != 0:
            raise InputError(f"{what} must be one number [], got shape {list(value.shape)}")
    if metrics is not None:
        check_metrics(metrics(params, state, still, state))
    observations = {
        group: tuple((part, int(value.shape[0])) for part, value in parts.items())
        for group, parts in observe(params, state).items()
    }
    spec = EnvSpec(
        name=name,
        observations=observations,
        actions=action_names,
        action_low=tuple(map(float, low)),
        action_high=tuple(map(float, high)),
        control_dt=control_dt,
        substeps=substeps,
        terms=names,
        model=model,
        holds_actions=True,
    )
    return Env(spec, params, reset, step, engine)


def _check_action(action: Tensor, names: tuple[str, ...]) -> None:
    if action.shape != (len(names),):
        raise InputError(f"action must have shape ({len(names)},) for {', '.join(names)}, got {tuple(action.shape)}")


def batch(env: Env, *, shared_params: bool = True) -> Env:
    """The environment for many robots at once: tensors of state, key and action get a leading axis `[B]`.

    The mapped functions are recorded on their first call for each batch size (see `rlcore.jit`).

    Args:
      env: an environment of one robot.
      shared_params: whether one set of parameters serves all robots; otherwise each leaf is `[B, ...]`.
    """
    params_dim = None if shared_params else 0
    reset = jit(torch.func.vmap(env.reset, in_dims=(params_dim, 0)))
    step = jit(torch.func.vmap(env.step, in_dims=(params_dim, 0, 0)))

    def step_all(params: Params, state: EnvState, action: Tensor, /) -> tuple[EnvState, Transition]:
        with one_thread(action.shape[0]):
            return step(params, state, action)

    return env._replace(reset=reset, step=step_all)


# --- wrappers -----------------------------------------------------------------------------------------------


def wrapped_spec(env: Env, name: str, **changes: Any) -> EnvSpec:
    """The description of `env` with the wrapper `name` around it, and with other changes to its fields.

    Raises:
      InputError: if that wrapper, or `auto_reset`, is already around it.
    """
    if name in env.spec.wrappers:
        raise InputError(f"{name} is already applied to {env.spec.name}; its memory would be overwritten")
    if "auto_reset" in env.spec.wrappers:
        raise InputError(f"{name} must be applied before auto_reset, so that a reset resets it too")
    return tree.replace(env.spec, wrappers=(*env.spec.wrappers, name), **changes)


def _check_part(env: Env, group: str, part: str) -> None:
    parts = dict(env.spec.parts(group))
    if part not in parts:
        raise InputError(f"observation group {group!r} has no part {part!r}; it has: {', '.join(parts)}")


def _step_key(state: EnvState, salt: int) -> Tensor:
    """The key of one consumer of randomness in one step of an episode (of at most 2^24 steps)."""
    return random.fold_in(state.key, state.steps + salt)


def remember(state: EnvState, name: str, value: Any) -> EnvState:
    """`state` with one entry of its memory set."""
    return tree.replace(state, memory={**state.memory, name: value})


def reweighted(env: Env, weights: Mapping[str, float]) -> Env:
    """`env` with other weights of some reward terms, per second.

    Raises:
      InputError: for a term that the environment does not have, a weight that is not finite, or one that the stages
        of a curriculum set.
    """
    for name, weight in weights.items():
        if f"curriculum/weights/{name}" in env.params.values:
            raise InputError(f"the curriculum of {env.spec.name} sets the weight of {name!r}: change it before that")
        if name not in env.params.weights:
            raise InputError(f"{env.spec.name} has no reward term {name!r}; it has: {', '.join(env.params.weights)}")
        if not math.isfinite(weight):
            raise InputError(f"the weight of reward term {name!r} must be finite, got {weight}")
    new = {name: torch.tensor(float(weight), dtype=torch.float64) for name, weight in weights.items()}
    return env._replace(params=tree.replace(env.params, weights={**env.params.weights, **new}))


def auto_reset(env: Env) -> Env:
    """Begin a new episode where one ended; count each episode's return, length and terms.

    A new episode forgets the old one but for what `Env.carry` hands on, such as the level of a curriculum.
    `Transition.obs` is then the new episode's first observation while `next_obs` stays what the step led to.
    `metrics` gets those of the episode so far, this step included: `episode_return`, `episode_length`, and
    `episode_terms` `[2, terms]`, the sums over its steps of the raw terms and of the weighted ones.
    """
    spec = wrapped_spec(env, "auto_reset")
    num_terms = len(env.spec.terms)

    def reset(params: Params, key: Tensor, /) -> tuple[EnvState, Obs]:
        state, obs = env.reset(params, key)
        state = remember(state, "episode_return", torch.zeros_like(state.physics.time))
        return remember(state, "episode_terms", state.physics.qpos.new_zeros((2, num_terms))), obs

    def step(params: Params, state: EnvState, action: Tensor, /) -> tuple[EnvState, Transition]:
        after, transition = env.step(params, state, action)
        total = state.memory["episode_return"] + transition.reward
        raw, terms = transition.raw_terms, list(transition.terms.values())
        sums = state.memory["episode_terms"] + torch.stack([raw, torch.stack(terms) if terms else raw])
        after = remember(remember(after, "episode_return", total), "episode_terms", sums)
        done = transition.terminated | transition.truncated
        logged = {
            **transition.metrics,
            "episode_return": total,
            "episode_length": after.steps.to(total.dtype),
            "episode_terms": sums,
        }
        # The ended episode has no further use for its key, so the new one begins with it.
        key = random.null_unless(done, after.key)
        after, obs = masked.where(done, reset, (env.carry(params, after), key), (after, transition.obs))
        return after, tree.replace(transition, obs=obs, metrics=logged)

    return env._replace(spec=spec, reset=reset, step=step)


def time_limit(env: Env, seconds: float) -> Env:
    """Truncate episodes after `seconds` (rounded to control steps). Termination by the task comes first.

    Raises:
      InputError: if that is less than one control step.
    """
    steps = round(seconds / env.spec.control_dt) if 0 < seconds < math.inf else 0
    if steps < 1:
        raise InputError(
            f"time limit must be a number of seconds, at least one control step of {env.spec.control_dt} s, "
            f"got {seconds}"
        )
    spec = wrapped_spec(env, "time_limit", episode_steps=steps)

    def step(params: Params, state: EnvState, action: Tensor, /) -> tuple[EnvState, Transition]:
        after, transition = env.step(params, state, action)
        late = (after.steps >= steps) & ~transition.terminated
        return after, tree.replace(transition, truncated=transition.truncated | late)

    return env._replace(spec=spec, step=step)


def scale_actions(env: Env, low: float = -1.0, high: float = 1.0) -> Env:
    """Actions in [low, high], mapped onto the environment's own bounds; actions outside are clipped.

    Raises:
      InputError: if the environment's actions are unbounded, or low is not below high.
    """
    if not -math.inf < low < high < math.inf:
        raise InputError(f"low must be below high, and both finite, got {low} and {high}")
    unbounded = [
        n
        for n, a, b in zip(env.spec.actions, env.spec.action_low, env.spec.action_high, strict=True)
        if not (abs(a) < math.inf and abs(b) < math.inf)
    ]
    if unbounded:
        raise InputError(f"actions without bounds cannot be scaled: {', '.join(unbounded)} (give them a ctrlrange)")
    size = env.spec.action_size
    spec = wrapped_spec(env, "scale_actions", action_low=(low,) * size, action_high=(high,) * size)
    inner_low = torch.tensor(env.spec.action_low, dtype=torch.float64)
    inner_high = torch.tensor(env.spec.action_high, dtype=torch.float64)

    def step(params: Params, state: EnvState, action: Tensor, /) -> tuple[EnvState, Transition]:
        _check_action(action, spec.actions)
        start = inner_low.to(action.device)
        share = (torch.clamp(action.to(start.dtype), low, high) - low) / (high - low)
        return env.step(params, state, start + share * (inner_high.to(action.device) - start))

    return env._replace(spec=spec, step=step)


def action_delay(env: Env, delay: int | tuple[int, int]) -> Env:
    """Let each action arrive some control steps late, as over a real robot's bus.

    What is late is what reaches the actuators: `last_action` is the action that was given, which is all that a
    controller knows of, and reward terms judge that one. Until the first one arrives the robot gets the task's
    action 0.

    Args:
      env: an environment made by `make_env`.
      delay: control steps; a pair (lowest, highest) is drawn from anew for each episode.

    Raises:
      InputError: for a negative delay or an empty range, or if the environment is not by `make_env`.
    """
    least, most = delay if isinstance(delay, tuple) else (delay, delay)
    if not 0 <= least <= most:
        raise InputError(f"action delay must be 0 or more steps, lowest first, got {delay}")
    if not env.spec.holds_actions:
        raise InputError(f"{env.spec.name} is not made by make_env, whose step holds late actions back")
    spec = wrapped_spec(env, "action_delay")
    size = env.spec.action_size

    def reset(params: Params, key: Tensor, /) -> tuple[EnvState, Obs]:
        state, obs = env.reset(params, key)
        steps = torch.full_like(state.steps, least)
        if most > least:
            steps = random.randint(_step_key(state, _DELAY), (), least, most + 1)
        waiting = state.physics.qpos.new_zeros((most + 1, size))
        return remember(state, _DELAYED, {"steps": steps, "waiting": waiting}), obs

    def step(params: Params, state: EnvState, action: Tensor, /) -> tuple[EnvState, Transition]:
        after, transition = env.step(params, state, action)
        # Trees are alike only with their entries in one order, and a reset puts this one last.
        memory = {**after.memory}
        memory[_DELAYED] = memory.pop(_DELAYED)
        return tree.replace(after, memory=memory), transition

    return env._replace(spec=spec, reset=reset, step=step)


def _arrived(state: EnvState, action: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """What reaches the actuators `[action]` where `action` is given, and what `action_delay` remembers after that."""
    if _DELAYED not in state.memory:
        return action, {}
    memory = state.memory[_DELAYED]
    waiting = torch.cat([action.unsqueeze(0), memory["waiting"][:-1]])
    late = torch.arange(len(waiting), device=action.device) == memory["steps"]
    # `where` before the sum, so that a NaN still waiting does not reach the robot early.
    arrived = torch.where(late.unsqueeze(-1), waiting, 0.0).sum(0)
    return arrived, {_DELAYED: {"steps": memory["steps"], "waiting": waiting}}


def observation_noise(env: Env, scales: Mapping[str, float], group: str = "policy") -> Env:
    """Add uniform noise within +-scale to named parts of an observation group, anew at every observation.

    Args:
      env: the environment.
      scales: largest error of each named part, in the part's own unit; parts not named stay exact.
      group: the observation group.

    Raises:
      InputError: for an unknown part or group, or a negative scale.
    """
    parts = env.spec.parts(group)
    for name, scale in scales.items():
        _check_part(env, group, name)
        if not 0 <= scale < math.inf:
            raise InputError(f"noise scale of {name!r} must be 0 or more, got {scale}")
    spec = wrapped_spec(env, f"observation_noise({group})")
    width = torch.cat([torch.full((size,), float(scales.get(name, 0.0))) for name, size in parts])
    salt = _NOISE + (list(env.spec.observations).index(group) << 24)

    def noisy(state: EnvState, obs: Obs) -> Obs:
        noise = random.uniform(_step_key(state, salt), (len(width),), -1.0, 1.0)
        return {**obs, group: obs[group] + width.to(noise.device) * noise}

    def reset(params: Params, key: Tensor, /) -> tuple[EnvState, Obs]:
        state, obs = env.reset(params, key)
        return state, noisy(state, obs)

    def step(params: Params, state: EnvState, action: Tensor, /) -> tuple[EnvState, Transition]:
        after, transition = env.step(params, state, action)
        obs = noisy(after, transition.next_obs)
        return after, tree.replace(transition, obs=obs, next_obs=obs)

    return env._replace(spec=spec, reset=reset, step=step)


def encoder_offset(env: Env, offset: float, part: str = "joint_position", group: str = "policy") -> Env:
    """Let a part of an observation group be off by a constant: joint encoders whose zero is not quite zero.

    Each number of the part has an offset of its own, uniform within +-offset and drawn anew for each episode.

    Args:
      env: the environment.
      offset: largest error, in the part's own unit (rad for joints).
      part: the part of the observation.
      group: the observation group; others stay exact.

    Raises:
      InputError: for an unknown part or group, or a negative offset.
    """
    parts = env.spec.parts(group)
    _check_part(env, group, part)
    if not 0 <= offset < math.inf:
        raise InputError(f"encoder offset of {part!r} must be 0 or more, got {offset}")
    name = f"encoder_offset({group})"
    spec = wrapped_spec(env, name)
    salt = _ENCODER + (list(env.spec.observations).index(group) << 24)
    width = torch.cat([torch.full((size,), float(offset if other == part else 0.0)) for other, size in parts])

    def reset(params: Params, key: Tensor, /) -> tuple[EnvState, Obs]:
        state, obs = env.reset(params, key)
        error = width * random.uniform(_step_key(state, salt), (len(width),), -1.0, 1.0)
        return remember(state, name, error), {**obs, group: obs[group] + error}

    def step(params: Params, state: EnvState, action: Tensor, /) -> tuple[EnvState, Transition]:
        after, transition = env.step(params, state, action)
        error = state.memory[name]
        obs = {**transition.next_obs, group: transition.next_obs[group] + error}
        return remember(after, name, error), tree.replace(transition, obs=obs, next_obs=obs)

    return env._replace(spec=spec, reset=reset, step=step)


def observation_delay(env: Env, delay: int | tuple[int, int], group: str = "policy") -> Env:
    """Show an observation group some control steps late, as sensors and buses do.

    Until the first observation is that old, it is what is shown.

    Args:
      env: the environment.
      delay: control steps; a pair (lowest, highest) is drawn from anew for each episode.
      group: the observation group; others stay current.

    Raises:
      InputError: for a negative delay, an empty range or an unknown group.
    """
    least, most = delay if isinstance(delay, tuple) else (delay, delay)
    if not 0 <= least <= most:
        raise InputError(f"observation delay must be 0 or more steps, lowest first, got {delay}")
    env.spec.parts(group)
    name = f"observation_delay({group})"
    spec = wrapped_spec(env, name)
    salt = _OBSERVATION_DELAY + (list(env.spec.observations).index(group) << 24)

    def reset(params: Params, key: Tensor, /) -> tuple[EnvState, Obs]:
        state, obs = env.reset(params, key)
        steps = torch.full_like(state.steps, least)
        if most > least:
            steps = random.randint(_step_key(state, salt), (), least, most + 1)
        earlier = obs[group].unsqueeze(0).expand(most, -1)
        return remember(state, name, {"steps": steps, "earlier": earlier}), obs

    def step(params: Params, state: EnvState, action: Tensor, /) -> tuple[EnvState, Transition]:
        after, transition = env.step(params, state, action)
        steps, earlier = state.memory[name]["steps"], state.memory[name]["earlier"]
        newest_first = torch.cat([transition.next_obs[group].unsqueeze(0), earlier])
        shown = newest_first[least]
        # A choice for each delay: elementwise, so that a recording fuses it, as it would not a sum over the delays.
        for late in range(least + 1, most + 1):
            shown = torch.where(steps == late, newest_first[late], shown)
        obs = {**transition.next_obs, group: shown}
        memory = {"steps": steps, "earlier": newest_first[:-1]}
        return remember(after, name, memory), tree.replace(transition, obs=obs, next_obs=obs)

    return env._replace(spec=spec, reset=reset, step=step)


def observation_history(env: Env, length: int, group: str = "policy") -> Env:
    """Show the last `length` observations of a group, oldest first; the first one fills the whole history.

    Raises:
      InputError: for a length below 1 or an unknown group.
    """
    if length < 1:
        raise InputError(f"history length must be at least 1, got {length}")
    parts = env.spec.parts(group)
    name = f"observation_history({group})"
    repeated = tuple((f"{part}[{i - length + 1}]", size) for i in range(length) for part, size in parts)
    spec = wrapped_spec(env, name, observations={**env.spec.observations, group: repeated})

    def reset(params: Params, key: Tensor, /) -> tuple[EnvState, Obs]:
        state, obs = env.reset(params, key)
        history = obs[group].unsqueeze(0).expand(length, -1)
        return remember(state, name, history), {**obs, group: history.reshape(-1)}

    def step(params: Params, state: EnvState, action: Tensor, /) -> tuple[EnvState, Transition]:
        after, transition = env.step(params, state, action)
        history = torch.cat([state.memory[name][1:], transition.next_obs[group].unsqueeze(0)])
        obs = {**transition.next_obs, group: history.reshape(-1)}
        return remember(after, name, history), tree.replace(transition, obs=obs, next_obs=obs)

    return env._replace(spec=spec, reset=reset, step=step)


def random_pushes(env: Env, interval: float, speed: float, joint: str = "root") -> Env:
    """Kick the robot: at random times its free joint's horizontal velocity changes in a random direction.

    The times between kicks are exponential: a Poisson process. The size is uniform in [0, speed], read from
    `params.values["push_speed"]`, so that it can differ between robots.

    Args:
      env: the environment.
      interval: mean time between kicks, s.
      speed: largest change of velocity, m/s.
      joint: name of the free joint.

    Raises:
      InputError: for an interval below one control step, a negative speed, or a joint that is not free.
    """
    if not interval >= env.spec.control_dt:
        raise InputError(f"push interval must be at least one control step of {env.spec.control_dt} s, got {interval}")
    if not 0 <= speed < math.inf:
        raise InputError(f"push speed must be 0 m/s or more, got {speed}")
    free = env.spec.model.joint(joint)
    if free.kind != "free":
        raise InputError(f"pushes need a free joint; {joint!r} is a {free.kind}")
    spec = wrapped_spec(env, "random_pushes")
    first = free.qvel.start
    values = {**env.params.values, "push_speed": torch.tensor(float(speed), dtype=torch.float64)}

    def reset(params: Params, key: Tensor, /) -> tuple[EnvState, Obs]:
        state, obs = env.reset(params, key)
        draw = random.uniform(_step_key(state, _FIRST_PUSH), dtype=torch.float64)
        return remember(state, "next_push", -interval * torch.log1p(-draw)), obs

    def step(params: Params, state: EnvState, action: Tensor, /) -> tuple[EnvState, Transition]:
        physics, at = state.physics, state.memory["next_push"]
        due = physics.time >= at
        # Where no kick is due the key is null, so that size and waiting time are drawn as 0.
        draw = random.uniform(
            random.fold_in(random.null_unless(due, state.key), state.steps + _PUSH), (3,), dtype=torch.float64
        )
        size, angle = params.values["push_speed"] * draw[0], 2 * torch.pi * draw[1]
        kick = torch.stack([size * torch.cos(angle), size * torch.sin(angle)])
        qvel = torch.cat([physics.qvel[:first], physics.qvel[first : first + 2] + kick, physics.qvel[first + 2 :]])
        state = tree.replace(state, physics=tree.replace(physics, qvel=qvel))
        after, transition = env.step(params, state, action)
        return remember(after, "next_push", at - interval * torch.log1p(-draw[2])), transition

    params = tree.replace(env.params, values=values)
    return env._replace(spec=spec, params=params, reset=reset, step=step)
