"""A curriculum: stages of growing difficulty, through which each robot goes at its own pace.

A `Stage` is a row of tables: command ranges, push speeds, reward weights. The wrapper `curriculum` puts the row of a
robot's stage into the parameters of each reset and step, so that commands, pushes and reward terms need not know of it.
At an episode's end a robot's level rises or falls by how it did. The level is an entry of `EnvState.memory` that
`Env.carry` hands on from episode to episode, so a checkpoint keeps it; no counter lives outside of the state.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlcore import random, tree
from rlcore.env import LEVEL_SALT, Env, EnvState, Obs, Params, Transition, remember, wrapped_spec
from rlcore.errors import InputError
from rlcore.measurement import Parts

_LEVEL, _REVISIT = "curriculum_level", "curriculum_revisit"
_VALUES, _WEIGHTS = "curriculum/values/", "curriculum/weights/"


@dataclass(frozen=True)
class Stage:
    """One level of a curriculum. What it does not name has its nominal value.

    Attributes:
      name: such as balance, stand, walk or turn.
      values: entries of `params.values`, such as `command_vx` or `push_speed`.
      weights: entries of `params.weights`, per second.
    """

    name: str
    values: Mapping[str, float | Sequence[float] | Tensor] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)


def _table(kind: str, stages: Sequence[Stage], nominal: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """For each entry that a stage names its values at all stages, `[stages, ...]`."""
    rows: list[Mapping[str, Any]] = [getattr(stage, kind) for stage in stages]
    tables = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        if name not in nominal:
            owner = next(stage.name for stage, row in zip(stages, rows, strict=True) if name in row)
            known = ", ".join(nominal) or "none"
            raise InputError(
                f"stage {owner!r} sets params.{kind}[{name!r}], which the environment lacks; it has: {known}"
            )
        entries = []
        for stage, row in zip(stages, rows, strict=True):
            entry = torch.as_tensor(row.get(name, nominal[name]), dtype=nominal[name].dtype)
            if entry.shape != nominal[name].shape:
                raise InputError(
                    f"stage {stage.name!r} must give params.{kind}[{name!r}] the shape {list(nominal[name].shape)}, "
                    f"got {list(entry.shape)}"
                )
            entries.append(entry)
        tables[name] = torch.stack(entries)
    return tables


def _row(table: Tensor, stage: Tensor) -> Tensor:
    """`table[stage]` in elementwise operations, which a recording fuses; an index would be a call for each table."""
    row = table[0]
    for i in range(1, table.shape[0]):
        row = torch.where(stage >= i, table[i], row)
    return row


def _at(params: Params, stage: Tensor) -> Params:
    """The parameters with the row of `stage` in place of the nominal entries."""
    values, weights = dict(params.values), dict(params.weights)
    for name, table in params.values.items():
        if name.startswith(_VALUES):
            values[name.removeprefix(_VALUES)] = _row(table, stage)
        elif name.startswith(_WEIGHTS):
            weights[name.removeprefix(_WEIGHTS)] = _row(table, stage)
    return tree.replace(params, values=values, weights=weights)


def curriculum(
    env: Env,
    stages: Sequence[Stage],
    score: Callable[[Params, dict[str, Any], Transition], Tensor],
    *,
    up: float,
    down: float,
    revisit: float = 0.0,
    start: int = 0,
) -> Env:
    """Let each robot's episodes grow harder as it masters them.

    An episode's score is the sum of its steps' scores over the number of steps of a whole episode, so that steps
    missed by a fall count 0. From `up` on the robot's level rises by one, below `down` it falls by one. With
    probability `revisit` an episode is played at a lower level, any of them alike, so that no skill is forgotten; such
    an episode leaves the level as it is.

    `EnvState.memory["curriculum"]` is `{"level", "stage", "score"}`: the level that was reached and the stage that
    this episode is played at (int64 `[]`), and the sum of scores so far. `metrics` gets `curriculum_level` and
    `curriculum_score`, those of the step, `curriculum_progress`, their sum, which grows as stages do where a return
    starts anew with each, and `curriculum_stage`, whose mean is the share of robots at each level, by
    the stages' names. The tables are in `params.values`, as `curriculum/values/<name>` and
    `curriculum/weights/<name>` `[stages, ...]`, with `curriculum_level`, the level at a first reset, and
    `curriculum_revisit`.

    Args:
      env: an environment with a time limit; whatever reads what stages change is already in it.
      stages: the levels, easiest first.
      score: `(params, memory, transition) -> []`, how well a step was done, best in [0, 1]: `params` are those of the
        stage, `memory` is that after the step.
      up, down: the scores from which on, and below which, the level changes.
      revisit: probability that an episode is played at a lower level.
      start: level at a first reset.

    Raises:
      InputError: if there is no stage, two share a name or none sets anything, a stage names what the environment
        lacks or gives it a wrong shape, `down` is above `up`, a number is out of its range, or the environment has no
        time limit.
    """
    names = [stage.name for stage in stages]
    if not names or len(set(names)) != len(names):
        raise InputError(f"a curriculum needs stages with different names, got {', '.join(names) or 'none'}")
    if not -math.inf < down <= up < math.inf:
        raise InputError(f"down must be at most up, and both finite, got {down} and {up}")
    if not 0 <= revisit < 1:
        raise InputError(f"revisit must be a probability below 1, got {revisit}")
    if env.spec.episode_steps is None:
        raise InputError(f"a curriculum judges whole episodes: apply time_limit to {env.spec.name} before it")
    steps = env.spec.episode_steps
    spec = wrapped_spec(env, "curriculum")
    tables = {
        **{_VALUES + name: table for name, table in _table("values", stages, env.params.values).items()},
        **{_WEIGHTS + name: table for name, table in _table("weights", stages, env.params.weights).items()},
    }
    if not tables:
        raise InputError(f"the stages {', '.join(names)} are all alike: give them values or weights")
    params = tree.replace(
        env.params,
        values={
            **env.params.values,
            **tables,
            _LEVEL: torch.tensor(_checked_level(start, len(names))),
            _REVISIT: torch.tensor(float(revisit), dtype=torch.float64),
        },
    )

    def reset(params: Params, key: Tensor, /) -> tuple[EnvState, Obs]:
        level = params.values[_LEVEL]
        # A reset splits its key, and no step folds this number in, so that the draw meets no other.
        draw = random.uniform(random.fold_in(key, LEVEL_SALT), (2,), dtype=torch.float64)
        lower = (draw[1] * level).to(torch.int64)
        stage = torch.where(draw[0] < params.values[_REVISIT], lower, level)
        state, obs = env.reset(_at(params, stage), key)
        # The level is shared by robots that are reset for the first time, and what a robot remembers is its own.
        memory = {
            "level": level + torch.zeros_like(stage),
            "stage": stage,
            "score": torch.zeros_like(state.physics.time),
        }
        return remember(state, "curriculum", memory), obs

    def step(params: Params, state: EnvState, action: Tensor, /) -> tuple[EnvState, Transition]:
        level, stage, total = (state.memory["curriculum"][name] for name in ("level", "stage", "score"))
        staged = _at(params, stage)
        after, transition = env.step(staged, state, action)
        now = score(staged, {**after.memory, "curriculum": state.memory["curriculum"]}, transition)
        total = total + now
        judged = (transition.terminated | transition.truncated) & (stage == level)
        rises = judged & (total >= up * steps) & (level < len(names) - 1)
        falls = judged & (total < down * steps) & (level > 0)
        reached = level + rises.to(level.dtype) - falls.to(level.dtype)
        after = remember(after, "curriculum", {"level": reached, "stage": stage, "score": total})
        at_stage = torch.stack([level == i for i in range(len(names))]).to(total.dtype)
        logged = {
            "curriculum_level": level.to(total.dtype),
            "curriculum_score": now,
            "curriculum_progress": level.to(total.dtype) + now,
            "curriculum_stage": Parts(at_stage, tuple(name.replace(" ", "_") for name in names)),
        }
        return after, tree.replace(transition, metrics={**transition.metrics, **logged})

    def carry(params: Params, state: EnvState) -> Params:
        params = env.carry(params, state)
        return tree.replace(params, values={**params.values, _LEVEL: state.memory["curriculum"]["level"]})

    return env._replace(spec=spec, params=params, reset=reset, step=step, carry=carry)


def _checked_level(level: int, count: int) -> int:
    if not 0 <= level < count:
        raise InputError(f"level must be at least 0 and below the number of stages, {count}, got {level}")
    return level


def at_level(params: Params, level: int) -> Params:
    """Parameters under which a first reset begins at `level` and plays no other: for evaluation and films.

    Raises:
      InputError: if the environment of these parameters has no curriculum, or no such level.
    """
    tables = [value for name, value in params.values.items() if name.startswith((_VALUES, _WEIGHTS))]
    if _LEVEL not in params.values:
        raise InputError("these parameters have no curriculum; wrap the environment in rlcore.curriculum.curriculum")
    _checked_level(level, tables[0].shape[0])
    changes = {
        _LEVEL: torch.full_like(params.values[_LEVEL], level),
        _REVISIT: torch.zeros_like(params.values[_REVISIT]),
    }
    return tree.replace(params, values={**params.values, **changes})
