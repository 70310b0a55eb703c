"""What the host loop of training needs to know: an algorithm, an experiment, and how long to train.

This module holds descriptions only. It opens no file, starts nothing, and imports neither a task nor an
algorithm.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from rlcore.errors import InputError

MUST_BE_FINITE = ("loss/", "gradients/", "parameters/")
"""Prefixes of metrics that must be finite: training stops at the first one that is not."""


class Algorithm(NamedTuple):
    """A learner as three pure functions.

    Metrics are 0-d tensors under names with a slash. The host loop understands some prefixes:

    - `loss/`, `gradients/` and `parameters/` must be finite: training stops at the first one that is not.
    - `episode/return`, `episode/length` and `episode/fall_rate` appear in the console and the plots. They may
      be NaN in an iteration in which no episode ended.
    - `time/` is for wall-clock times: everything else must be the same bits when a run is repeated.
    """

    init: Callable[[Tensor], Any]
    """`key -> TrainState`: a pytree of tensors with leaves `iteration` and `env_steps`, each `[]` int64.

    Leaves under a field called `params` or `parameters` are what is learned: a checkpoint is never written
    while one of them is not finite.
    """
    update: Callable[[Any], tuple[Any, Mapping[str, Tensor]]]
    """`TrainState -> (TrainState, metrics)`: one iteration. It must not write into what the state it was given shows;
    the memory of a replay buffer has room for more than it shows (see `rlcore.replay`)."""
    act: Callable[[Any, Any, Tensor | None], Any]
    """`(TrainState, obs [B, ...], key or None) -> action [B, ...]`; without a key the action is the mode."""


Fault = tuple[str, Mapping[str, Any]]
"""A name and arrays: what an environment that went wrong looked like, for a replay."""


class Experiment(NamedTuple):
    """What an experiment module's `build(config)` returns."""

    env: Any
    evaluation_env: Any
    algorithm: Algorithm
    render: Callable[[Any, Path], None] | None = None
    """`(TrainState, path) -> None`: writes a video of the policy, once, at the end of training."""
    faults: Callable[[], Iterable[Fault]] | None = None
    """Hands over, and forgets, what went wrong since the last call; called after each update."""
    close: Callable[[], None] | None = None
    """Frees what the experiment holds (engines, processes)."""
    note: Callable[[], str] | None = None
    """What a person should know before training begins, such as how much memory it takes; may raise InputError."""
    summary: Callable[[], str] | None = None
    """What a person should see when training has stopped, such as how a population's members did; may be empty."""
    best_metric: str = "episode/return"
    """The metric whose highest value marks the best checkpoint, where a user asks for no other."""
    begin: Callable[[Path], None] | None = None
    """Told the run's directory, once it is there and before the first update."""


@dataclass(frozen=True)
class TrainingConfig:
    """How long to train and what to keep of it; of what is learned, nothing here changes more than last bits."""

    iterations: int = 1000
    """Iterations in all, those before a resume included."""
    time_limit: float | None = None
    """Stop after this many seconds, with a checkpoint to resume from; counted from this start."""
    run_dir: Path | None = None
    """Directory for everything that this run writes. By default runs/EXPERIMENT/TIME-seedN."""
    resume: Path | None = None
    """Directory of a run to go on with, from its newest checkpoint and with its saved configuration."""
    checkpoint_every: int = 50
    """Iterations between checkpoints; there is always one at the end."""
    keep_last: int = 3
    """How many of the newest checkpoints to keep; the best one is kept besides."""
    best_metric: str | None = None
    """The metric whose highest value marks the best checkpoint, by default the experiment's own; while none has a
    value, the newest is the best."""
    log_every: float = 10.0
    """Seconds between console lines where the output is not a terminal."""
    torch_threads: int = 0
    """Threads of torch for learning; 0 takes every CPU but one, and at least one. A thread that waits for a busy CPU
    costs far more than it adds. A run repeats, and resumes, bit for bit on the same machine with the same number."""
    tensorboard: bool = True
    """Write TensorBoard event files; metrics.jsonl is written always."""
    video: bool = True
    """Render a video of the policy once all iterations are done."""

    def __post_init__(self) -> None:
        for name in ("iterations", "checkpoint_every", "keep_last"):
            if (value := getattr(self, name)) < 1:
                raise InputError(f"{name} must be at least 1, got {value} ({_flag(name)})")
        if self.torch_threads < 0:
            raise InputError(f"torch_threads must be 0 or more, got {self.torch_threads} ({_flag('torch_threads')})")
        if self.time_limit is not None and not self.time_limit > 0:
            raise InputError(f"time_limit must be more than 0, got {self.time_limit} ({_flag('time_limit')})")
        if not (math.isfinite(self.log_every) and self.log_every > 0):
            raise InputError(f"log_every must be more than 0, got {self.log_every} ({_flag('log_every')})")
        if self.resume is not None and self.run_dir is not None:
            raise InputError(
                f"run_dir must be left out when resuming: the run stays in {self.resume}, got {self.run_dir} "
                f"({_flag('run_dir')})"
            )


def _flag(field: str) -> str:
    return "--training." + field.replace("_", "-")
