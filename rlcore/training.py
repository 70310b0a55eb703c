"""The host loop of training: `update` again and again, and all that a person wants around it.

It reports metrics, writes checkpoints, stops when asked and goes on where it stopped. It knows nothing of
robots or losses, evaluates no policy, and draws no random number: the state and `update` decide every bit, and
what the clock decides is named `time/...`.
"""

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlcore import run_directory
from rlcore.checkpoint import Checkpointer, CheckpointError, tree_bytes
from rlcore.errors import InputError
from rlcore.experiment import Algorithm, Experiment, Fault, TrainingConfig
from rlcore.metrics import METRICS_FILE, Console, MetricsFile, TensorBoard, plot_learning_curves
from rlcore.run_directory import RunRecord
from rlcore.tree import named_leaves

__all__ = [
    "Algorithm",
    "Experiment",
    "RunRecord",
    "TrainingConfig",
    "TrainingFailed",
    "TrainingResult",
    "train",
]

_MUST_BE_FINITE = ("loss/", "gradients/", "parameters/")


class TrainingFailed(RuntimeError):
    """Training cannot go on. The message says what happened, where, what is saved and what to do."""


class TrainingResult(NamedTuple):
    state: Any
    """The last TrainState."""
    run_dir: Path
    stopped: str
    """Why it ended: `iterations`, `time limit`, `SIGINT` or `SIGTERM`."""


def train(
    experiment: Experiment,
    config: TrainingConfig,
    *,
    key: Tensor,
    record: RunRecord,
    render: Callable[[Any, Path], None] | None = None,
    faults: Callable[[], Iterable[Fault]] | None = None,
    console: Console | None = None,
) -> TrainingResult:
    """Train until `config.iterations`, its time limit, or a signal.

    Ctrl-C and SIGTERM let the update in progress finish, save a checkpoint and return; a second one leaves at
    once, with exit code 130 or 143.

    Args:
      experiment: what to train.
      config: how long, and where to.
      key: for `algorithm.init`; a resumed run goes on with the key in its state.
      record: what the run is, for `config.json`.
      render: writes a video of a TrainState's policy to a path; called once after a complete run.
      faults: returns, and forgets, what went wrong in environments since the last call.
      console: where progress goes; standard output by default.

    Raises:
      InputError: if the run cannot begin; nothing was written then.
      TrainingFailed: if a loss or parameter is not finite, or the disk refuses. Checkpoints are kept.
    """
    resuming = config.resume is not None
    run_dir = config.resume or config.run_dir or run_directory.default_run_dir(record)
    console = console or Console(record.experiment, config.iterations, config.log_every)
    with ExitStack() as stack:
        if resuming:
            run_directory.read_record(run_dir)
        stack.enter_context(run_directory.claimed(run_dir, resuming))
        stack.callback(console.close)
        state = experiment.algorithm.init(key)
        # The newest ones, the best one, and one that is being written before another is deleted.
        run_directory.check_space(run_dir, (1 if resuming else config.keep_last + 2) * tree_bytes(state))
        state, checkpoints = _begin(run_dir, state, config, record, console.message)
        stack.callback(_close_quietly, checkpoints)
        start = int(state.iteration)
        try:
            metrics_file = MetricsFile(run_dir / METRICS_FILE, after=start)
            stack.callback(_suppressed, metrics_file.close)
            board = TensorBoard(run_dir / "tensorboard", after=start) if config.tensorboard else None
            if board:
                stack.callback(_suppressed, board.close)
            with _signals(console.message) as asked:
                state, stopped = _loop(
                    experiment.algorithm,
                    state,
                    config,
                    run_dir,
                    checkpoints=checkpoints,
                    metrics_file=metrics_file,
                    board=board,
                    console=console,
                    faults=faults,
                    asked=asked,
                )
                _save(checkpoints, state, metrics_file.last, config.best_metric)
                checkpoints.wait()
        except _NotFinite as error:
            raise TrainingFailed(f"{error}; {_how_to_go_on(checkpoints, record, run_dir)}") from None
        except CheckpointError as error:
            raise TrainingFailed(f"{error}; free space, then {_resume(record, run_dir)}") from error
        except OSError as error:
            name = error.filename or run_dir
            raise TrainingFailed(
                f"{name} cannot be written: {error.strerror or error}; {_how_to_go_on(checkpoints, record, run_dir)}"
            ) from error
        console.close()
        _finish(run_dir, state, stopped, config, record, checkpoints, console.message, render)
    return TrainingResult(state, run_dir, stopped)


def _begin(
    run_dir: Path, state: Any, config: TrainingConfig, record: RunRecord, say: Callable[[str], None]
) -> tuple[Any, Checkpointer]:
    """The state to begin with, and the run's checkpoints: config.json and a first checkpoint are on disk."""
    identity = {"experiment": record.experiment}
    directory = run_dir / run_directory.CHECKPOINTS
    if config.resume is not None:
        with ExitStack() as stack:
            if not directory.is_dir():
                raise InputError(f"{run_dir} has no checkpoint to go on from; start a new run (--training.resume)")
            checkpoints = Checkpointer(directory, identity, keep_last=config.keep_last, warn=say)
            stack.callback(checkpoints.close)
            state, iteration = checkpoints.restore_latest(state)
            if iteration >= config.iterations:
                raise InputError(
                    f"iterations must be more than the {iteration} already done, got {config.iterations} "
                    "(--training.iterations)"
                )
            for change in run_directory.write_record(run_dir, record, resumed_at=iteration):
                say(f"note: {change}; numbers may differ in their last bits")
            say(f"going on from iteration {iteration} of {run_dir}")
            stack.pop_all()
        return state, checkpoints
    checkpoints = None
    try:
        run_directory.write_record(run_dir, record)
        checkpoints = Checkpointer(directory, identity, keep_last=config.keep_last, warn=say)
        # The first one is waited for: a disk that refuses shows before any work is done.
        checkpoints.save(int(state.iteration), state)
        checkpoints.wait()
        if not checkpoints.steps():
            raise CheckpointError(f"the first checkpoint could not be written to {directory}")
    except (OSError, CheckpointError) as error:
        _remove_beginning(run_dir)
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"run_dir {run_dir} cannot be written: {reason} (--training.run-dir)") from error
    say(f"training {record.experiment} in {run_dir}")
    return state, checkpoints
