"""The host loop of training: `update` again and again, and all that a person wants around it.

It reports metrics, writes checkpoints, stops when asked and goes on where it stopped. It knows nothing of
robots or losses, evaluates no policy, and draws no random number: the state and `update` decide every bit,
and what the clock decides is named `time/...`.
"""

import math
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlcore import run_directory
from rlcore.checkpoint import Checkpointer, CheckpointError, tree_bytes
from rlcore.doctor import Watch
from rlcore.errors import EngineFailed, InputError
from rlcore.experiment import MUST_BE_FINITE, Algorithm, Experiment, Fault, TrainingConfig
from rlcore.interrupt import stop_requests
from rlcore.metrics import (
    METRICS_FILE,
    TENSORBOARD,
    Console,
    MetricsFile,
    TensorBoard,
    check_metric,
    plot_learning_curves,
    read_metrics,
)
from rlcore.run_directory import RunRecord
from rlcore.tree import named_leaves
from rlcore.wall_time import drain_seconds, shares

__all__ = [
    "Algorithm",
    "Experiment",
    "RunRecord",
    "TrainingConfig",
    "TrainingFailed",
    "TrainingResult",
    "train",
    "use_threads",
]


class TrainingFailed(RuntimeError):
    """Training cannot go on. The message says what happened, where, what is saved and what to do."""


class TrainingResult(NamedTuple):
    """What `train` hands back."""

    state: Any
    """The last TrainState."""
    run_dir: Path
    stopped: str
    """Why it ended: `iterations`, `time limit`, `SIGINT` or `SIGTERM`."""


def use_threads(requested: int) -> None:
    """Let torch learn on `requested` threads; 0 takes every CPU but one.

    Threads meet after each operation, a thousand times an iteration. Where another program holds the last CPU, every
    meeting waits for the operating system to share it: measured on two CPUs with one busy, two threads learned at a
    fifteenth of the speed of one.
    """
    torch.set_num_threads(requested or max(1, (os.cpu_count() or 1) - 1))


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
      TrainingFailed: if a loss or parameter is not finite, the disk refuses, or a simulator in another process ends or
        hangs. Checkpoints are kept.
      EngineFailed: if that simulator does so before the first iteration is done; nothing is left then.
    """
    use_threads(config.torch_threads)
    resuming = config.resume is not None
    best_metric = config.best_metric or experiment.best_metric
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
        state, checkpoints = _begin(run_dir, state, config, best_metric, record, console.message)
        stack.callback(_quietly, checkpoints.close)
        try:
            with _writing(run_dir):
                outputs = _Outputs.open(run_dir, config, int(state.iteration), best_metric, checkpoints, console)
            stack.callback(_quietly, outputs.close)
            if experiment.begin is not None:
                experiment.begin(run_dir)
            with stop_requests() as asked:
                state, stopped = _loop(experiment.algorithm, state, config, outputs, faults, asked)
                _save(outputs, state)
                checkpoints.wait()
                if (last := int(state.iteration)) not in checkpoints.steps():
                    raise _NotWritten(f"the checkpoint of iteration {last} could not be written")
        except _NotFinite as error:
            raise TrainingFailed(
                f"{error}; the last good checkpoint is iteration {_newest(checkpoints)} of {run_dir}. This "
                "run would fail in the same way again: start one with a smaller learning rate, and see "
                f"whether environments went wrong ({run_dir / run_directory.FAULTS})"
            ) from None
        except (InputError, EngineFailed) as error:
            # Some mistakes, such as the name of a metric that there is none of, show in the first update only.
            began = resuming or outputs.metrics.last is not None
            if not began:
                _forget(run_dir)
            if not began or isinstance(error, InputError):
                raise
            raise TrainingFailed(
                f"{error}; the last good checkpoint is iteration {_newest(checkpoints)}. To go on: "
                f"{_resume(record, run_dir)}"
            ) from error
        except (_NotWritten, CheckpointError) as error:
            raise TrainingFailed(
                f"{error}; the last good checkpoint is iteration {_newest(checkpoints)}. Free space, then go "
                f"on with: {_resume(record, run_dir)}"
            ) from error
        console.close()
        _finish(outputs, state, stopped, config, record, render)
    return TrainingResult(state, run_dir, stopped)


def _begin(
    run_dir: Path,
    state: Any,
    config: TrainingConfig,
    best_metric: str,
    record: RunRecord,
    say: Callable[[str], None],
) -> tuple[Any, Checkpointer]:
    """The state to begin with, and the run's checkpoints: config.json and a first checkpoint are on disk."""
    identity = {"experiment": record.experiment}
    directory = run_dir / run_directory.CHECKPOINTS
    if config.resume is not None:
        with ExitStack() as stack:
            if not directory.is_dir():
                raise InputError(f"{run_dir} has no checkpoint: start a new run (--training.resume)")
            checkpoints = Checkpointer(directory, identity, keep_last=config.keep_last, warn=say)
            stack.callback(checkpoints.close)
            state, iteration = checkpoints.restore_latest(state)
            if iteration >= config.iterations:
                raise InputError(
                    f"iterations must be more than the {iteration} already done, got {config.iterations} "
                    "(--training.iterations); to train as long again: "
                    f"{_resume(record, run_dir)} --training.iterations {2 * iteration}"
                )
            metrics = run_dir / METRICS_FILE
            if known := read_metrics(metrics)[-1:] if metrics.exists() else []:
                _check_best_metric(best_metric, known[0])
            threads = torch.get_num_threads()
            for change in run_directory.write_record(run_dir, record, threads, resumed_at=iteration):
                say(f"note: {change}; numbers may differ in their last bits")
            say(f"going on from iteration {iteration} of {run_dir}")
            stack.pop_all()
        return state, checkpoints
    try:
        run_directory.write_record(run_dir, record, torch.get_num_threads())
        checkpoints = Checkpointer(directory, identity, keep_last=config.keep_last, warn=say)
        # The first one is waited for: a disk that refuses shows before any work is done.
        checkpoints.save(int(state.iteration), state)
        checkpoints.wait()
    except BaseException as error:
        _forget(run_dir)
        if isinstance(error, OSError | CheckpointError):
            reason = error.strerror if isinstance(error, OSError) else error
            raise InputError(f"run_dir {run_dir} cannot be written: {reason} (--training.run-dir)") from error
        raise
    say(f"training {record.experiment} in {run_dir}")
    return state, checkpoints


def _forget(run_dir: Path) -> None:
    """Take away what a run that never began has written."""
    for directory in (run_directory.CHECKPOINTS, TENSORBOARD):
        shutil.rmtree(run_dir / directory, ignore_errors=True)
    for file in (run_directory.CONFIG_FILE, METRICS_FILE):
        (run_dir / file).unlink(missing_ok=True)


class _NotFinite(ArithmeticError):
    pass


class _NotWritten(RuntimeError):
    pass


class _Outputs(NamedTuple):
    """What the loop writes to."""

    run_dir: Path
    best_metric: str
    checkpoints: Checkpointer
    metrics: MetricsFile
    board: TensorBoard | None
    console: Console

    @classmethod
    def open(
        cls,
        run_dir: Path,
        config: TrainingConfig,
        after: int,
        best_metric: str,
        checkpoints: Checkpointer,
        console: Console,
    ) -> "_Outputs":
        metrics = MetricsFile(run_dir / METRICS_FILE, after)
        board = TensorBoard(run_dir / TENSORBOARD, after) if config.tensorboard else None
        return cls(run_dir, best_metric, checkpoints, metrics, board, console)

    def close(self) -> None:
        for file in (self.metrics, self.board):
            if file is not None:
                file.close()


def _loop(
    algorithm: Algorithm,
    state: Any,
    config: TrainingConfig,
    outputs: _Outputs,
    faults: Callable[[], Iterable[Fault]] | None,
    asked: list[str],
) -> tuple[Any, str]:
    """Update until there is a reason to stop; the last state and the reason."""
    console = outputs.console
    iteration, env_steps = int(state.iteration), int(state.env_steps)
    first, began = iteration, time.monotonic()
    earlier = (outputs.metrics.last or {}).get("time/elapsed_seconds") or 0.0
    watch = Watch(read_metrics(outputs.run_dir / METRICS_FILE))
    drain_seconds()  # what it took to begin is no iteration's
    while True:
        tick = time.monotonic()
        try:
            state, metrics = algorithm.update(state)
        finally:
            # Also when the update raised: then above all somebody will want to see why.
            if faults is not None:
                with _writing(outputs.run_dir):
                    files = run_directory.write_faults(outputs.run_dir, iteration + 1, faults())
                for file in files:
                    console.message(f"an environment went wrong in iteration {iteration + 1}: see {file}")
        before, steps_before = iteration, env_steps
        iteration, env_steps, values = _read(state, metrics)
        if iteration != before + 1:
            raise ValueError(f"update must add 1 to iteration, but it went from {before} to {iteration}")
        now = time.monotonic()
        elapsed = now - began
        values["time/iteration_seconds"] = now - tick
        values["time/env_steps_per_second"] = (env_steps - steps_before) / max(now - tick, 1e-9)
        values["time/elapsed_seconds"] = earlier + elapsed
        values |= shares(drain_seconds(), now - tick)
        if before == first:
            _check_best_metric(outputs.best_metric, values)
        with _writing(outputs.run_dir):
            outputs.metrics.write(iteration, env_steps, values)
            if outputs.board is not None:
                outputs.board.write(iteration, values)
        left = (config.iterations - iteration) * elapsed / (iteration - first)
        if config.time_limit is not None:
            left = min(left, config.time_limit - elapsed)
        console.update(iteration, env_steps, values, earlier + elapsed, max(left, 0.0))
        for line in _look(watch, outputs.metrics.last or {}):
            console.message(f"warning: {line}")
        for name, value in values.items():
            if name.startswith(MUST_BE_FINITE) and not math.isfinite(value):
                raise _NotFinite(f"{name} is {value} at iteration {iteration}")
        if iteration >= config.iterations:
            return state, "iterations"
        if asked:
            return state, asked[0]
        if config.time_limit is not None and elapsed >= config.time_limit:
            return state, "time limit"
        if iteration % config.checkpoint_every == 0:
            _save(outputs, state)


def _check_best_metric(name: str, metrics: Iterable[str]) -> None:
    check_metric("best_metric", name, [m for m in metrics if "/" in m], "--training.best-metric")


def _look(watch: Watch, record: Mapping[str, Any]) -> list[str]:
    """What the doctor says; a mistake of its own is told and ends no training."""
    try:
        return watch.add(record)
    except Exception as error:
        return [f"the doctor could not read this iteration: {error}"]


def _read(state: Any, metrics: Mapping[str, Tensor]) -> tuple[int, int, dict[str, float]]:
    """Counters and metrics as numbers, in one transfer from the device."""
    tensors = [state.iteration, state.env_steps, *metrics.values()]
    iteration, env_steps, *values = torch.stack([t.detach().to(torch.float64) for t in tensors]).tolist()
    return int(iteration), int(env_steps), dict(zip(metrics, values, strict=True))


def _save(outputs: _Outputs, state: Any) -> None:
    """Begin a checkpoint, unless what was learned is broken; a failure to write is told, not raised."""
    iteration = int(state.iteration)
    for name, leaf in named_leaves(state):
        learned = not {"params", "parameters"}.isdisjoint(name.split("."))
        if learned and leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
            raise _NotFinite(f"{name} is not finite after iteration {iteration}")
    try:
        outputs.checkpoints.save(iteration, state, (outputs.metrics.last or {}).get(outputs.best_metric))
    except CheckpointError as error:
        outputs.console.message(f"warning: {error}")


def _finish(
    outputs: _Outputs,
    state: Any,
    stopped: str,
    config: TrainingConfig,
    record: RunRecord,
    render: Callable[[Any, Path], None] | None,
) -> None:
    """Pictures and a summary. The run is complete on disk: what fails here is told and changes nothing."""
    run_dir, checkpoints, say = outputs.run_dir, outputs.checkpoints, outputs.console.message
    lines = []
    best = checkpoints.best_step()
    if best is not None:
        score = checkpoints.score(best)
        unknown = f"merely the newest: none has a value of {outputs.best_metric}"
        reason = unknown if score is None else f"{outputs.best_metric} {score:.4g}"
        lines.append(f"best checkpoint: iteration {best}, {reason}")
    try:
        if curves := plot_learning_curves(run_dir):
            lines.append(f"learning curves: {curves}")
    except Exception as error:
        lines.append(f"warning: no learning curves: {error}")
    if config.video and render is not None and stopped == "iterations":
        say("filming the policy")
        try:
            render(state, run_dir / "video.mp4")
            lines.append(f"video:           {run_dir / 'video.mp4'}")
        except Exception as error:
            lines.append(f"warning: no video: {error}")
    word = "done" if stopped == "iterations" else f"stopped ({stopped})"
    done = f"{int(state.iteration)} of {config.iterations} iterations"
    say(f"{word}: {done}, {int(state.env_steps)} environment steps")
    for line in [f"run:             {run_dir}", *lines]:
        say("  " + line)
    if stopped != "iterations":
        say(f"  go on with:      {_resume(record, run_dir)}")


def _resume(record: RunRecord, run_dir: Path) -> str:
    return f"{record.command} --training.resume {shlex.quote(str(run_dir))}"


def _newest(checkpoints: Checkpointer) -> int:
    """The newest checkpoint that is complete; there is one since the run began."""
    with suppress(CheckpointError):
        checkpoints.wait()
    return max(checkpoints.steps())


@contextmanager
def _writing(run_dir: Path) -> Iterator[None]:
    """Tell a disk that refuses apart from whatever else an OSError may be."""
    try:
        yield
    except OSError as error:
        where = error.filename or run_dir
        raise _NotWritten(f"{where} cannot be written: {error.strerror or error}") from error


def _quietly(close: Callable[[], None]) -> None:
    """Close at the end: what mattered was flushed and checked before, and a failure was told."""
    with suppress(OSError, CheckpointError):
        close()
