"""What is left of a run that is killed at random moments: everything, if resuming keeps its word.

A small training is run once without interruption. Then it is started again and again, killed with SIGKILL at a
moment drawn uniformly over the length of the first run, start-up and end included, and gone on with from its
newest checkpoint, until it is done. Every leaf of the last checkpoint and every metric of every iteration must
then be the same bits as those of the first run, except the metrics named time/..., which the clock decides.
"""

import json
import random as chance
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS, header, machine_line, made
from rlcore.errors import InputError
from rlcore.metrics import write_json

MODULE = "experiments.ppo_cartpole"


@dataclass(frozen=True)
class Config:
    """Kill a small training with SIGKILL at random moments, resume it until it is done, and compare all bits.

    Prints a line for each trial and writes recovery.json. The exit code is 1 if a trial ended differently
    from the run that was never killed; the runs are then kept to be looked at.
    """

    trials: int = 20
    """How many runs to kill, each as often as it happens."""
    seed: int = 0
    """Seed of the moments and of the trainings."""
    iterations: int = 80
    """Iterations of a training."""
    checkpoint_every: int = 4
    """Iterations between its checkpoints."""
    num_envs: int = 8
    """Its environments."""
    most_kills: int = 10
    """After so many kills a run is let through."""
    output_dir: Path = RESULTS
    """Where recovery.json goes."""

    def __post_init__(self) -> None:
        for name in ("trials", "iterations", "checkpoint_every", "num_envs", "most_kills"):
            if (value := getattr(self, name)) < 1:
                raise InputError(f"{name} must be at least 1, got {value} (--{name.replace('_', '-')})")
        if self.seed < 0:
            raise InputError(f"seed must be 0 or more, got {self.seed} (--seed)")

    @property
    def arguments(self) -> list[str]:
        """What a training is started with, apart from its directory."""
        settings = {
            "--seed": self.seed,
            "--num-threads": 1,
            "--ppo.num-envs": self.num_envs,
            "--ppo.num-steps": 16,
            "--ppo.num-epochs": 2,
            "--training.iterations": self.iterations,
            "--training.checkpoint-every": self.checkpoint_every,
        }
        flat = [str(word) for pair in settings.items() for word in pair]
        return [*flat, "--training.no-video", "--training.no-tensorboard"]


@dataclass
class Trial:
    """What happened to one run."""

    kills: list[float] = field(default_factory=list)
    """Seconds after each start at which it was killed."""
    checkpoints: list[int | None] = field(default_factory=list)
    """The newest complete checkpoint after each kill: None before the first one, else where it went on."""
    differences: list[str] = field(default_factory=list)
    """What is not as in the run that was never killed."""


def newest_checkpoint(run_dir: Path) -> int | None:
    """The last iteration with a complete checkpoint, if the run can be gone on with at all."""
    if not (run_dir / "config.json").is_file() or not (run_dir / "checkpoints").is_dir():
        return None
    # What is being written has a longer name until it is complete.
    return max((int(x.name) for x in (run_dir / "checkpoints").iterdir() if x.name.isdecimal()), default=None)


def start(arguments: Sequence[str], kill_after: float | None) -> bool:
    """Run the training; whether it came to its end before it was killed.

    Raises:
      RuntimeError: if it failed by itself.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", MODULE, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        _, complaints = process.communicate(timeout=kill_after)
    except BaseException as stop:
        process.kill()
        process.communicate()
        if isinstance(stop, subprocess.TimeoutExpired):
            return False
        raise
    if process.returncode != 0:
        last = next(reversed(complaints.strip().splitlines()), "it said nothing")
        raise RuntimeError(f"exit code {process.returncode}: {last}")
    return True


def kill_and_resume(config: Config, run_dir: Path, duration: float, moments: chance.Random) -> Trial:
    """Bring a run to its end through kills."""
    trial = Trial()
    newest: int | None = None
    while newest != config.iterations:
        if newest is not None:
            arguments = ["--training.resume", str(run_dir)]
        else:
            shutil.rmtree(run_dir, ignore_errors=True)
            arguments = [*config.arguments, "--training.run-dir", str(run_dir)]
        after = moments.uniform(0.0, duration) if len(trial.kills) < config.most_kills else None
        ended = start(arguments, after)
        newest = newest_checkpoint(run_dir)
        if not ended and after is not None:
            trial.kills.append(after)
            trial.checkpoints.append(newest)
        elif newest != config.iterations:
            raise RuntimeError(f"it ended without a checkpoint of iteration {config.iterations}")
    return trial


def outcome(run_dir: Path, iteration: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a run ended with: the arrays of its last checkpoint by name, and its metrics but for time/.

    Raises:
      InputError: if the checkpoint is missing or damaged.
    """
    from experiments.cli import restore_policy
    from rlcore.manifest import to_numpy
    from rlcore.metrics import METRICS_FILE, read_metrics
    from rlcore.tree import named_leaves

    state = restore_policy(run_dir, iteration).state
    leaves = {name: to_numpy(name, leaf) for name, leaf in named_leaves(state)}
    records = read_metrics(run_dir / METRICS_FILE)
    return leaves, [{k: v for k, v in record.items() if not k.startswith("time/")} for record in records]


def differences(
    expected: tuple[dict[str, Any], list[dict[str, Any]]], found: tuple[dict[str, Any], list[dict[str, Any]]]
) -> list[str]:
    """The names of leaves and metrics that are not the same bits."""
    (leaves, records), (other_leaves, other_records) = expected, found
    names = [
        name
        for name in sorted(leaves.keys() | other_leaves.keys())
        if name not in leaves or name not in other_leaves or _bits(leaves[name]) != _bits(other_leaves[name])
    ]
    if len(records) != len(other_records):
        names.append(f"metrics of {len(other_records)} iterations instead of {len(records)}")
    for record, other in zip(records, other_records, strict=False):
        # JSON writes the shortest number that reads back as the same bits; -0.0 and 0.0 differ as text.
        keys = [key for key in record.keys() | other.keys() if _text(record, key) != _text(other, key)]
        names += [f"{key} at iteration {record.get('iteration')}" for key in sorted(keys)]
    return names


def _bits(array: Any) -> tuple[Any, ...]:
    return array.shape, array.dtype.str, array.tobytes()


def _text(record: dict[str, Any], key: str) -> str | None:
    return json.dumps(record[key]) if key in record else None


def line(number: int, trial: Trial) -> str:
    """A trial in words; after each kill the newest checkpoint then, - for none."""
    moments = zip(trial.kills, trial.checkpoints, strict=True)
    killed = ", ".join(f"{seconds:.2f} s ({'-' if newest is None else newest})" for seconds, newest in moments)
    parts = [f"killed at {killed}" if killed else "done before it was killed"]
    if trial.differences:
        shown = ", ".join(trial.differences[:3])
        parts.append(f"DIFFERENT in {len(trial.differences)} places: {shown}")
    else:
        parts.append("identical")
    return f"trial {number}: " + "; ".join(parts)


def main(config: Config) -> None:
    """Train once, kill many, compare, write the JSON."""
    output = made(config.output_dir)
    work = Path(tempfile.mkdtemp(prefix="recovery-"))
    identical = False
    try:
        reference = work / "reference"
        begin = time.perf_counter()
        try:
            start([*config.arguments, "--training.run-dir", str(reference)], None)
        except RuntimeError as error:
            raise InputError(f"the training to be killed fails by itself: {error}") from error
        duration = time.perf_counter() - begin
        expected = outcome(reference, config.iterations)
        print(f"never killed: {duration:.1f} s, {config.iterations} iterations", flush=True)
        print("kills: seconds after the start, and the newest checkpoint then", flush=True)
        moments = chance.Random(config.seed)
        trials = []
        for number in range(1, config.trials + 1):
            run_dir = work / f"trial-{number}"
            try:
                trial = kill_and_resume(config, run_dir, duration, moments)
                trial.differences += differences(expected, outcome(run_dir, config.iterations))
            except (RuntimeError, InputError) as error:
                trial = Trial(differences=[str(error)])
            trials.append(trial)
            print(line(number, trial), flush=True)
            if not trial.differences:
                shutil.rmtree(run_dir)
        good = sum(not trial.differences for trial in trials)
        identical = good == config.trials
    finally:
        if identical or sys.exc_info()[0] is not None:
            shutil.rmtree(work, ignore_errors=True)
    described = header("benchmarks.recovery")
    figures = {
        **described,
        "training": ["python", "-m", MODULE, *config.arguments],
        "seconds_never_killed": duration,
        "leaves": len(expected[0]),
        "metrics": len(expected[1]) * len(expected[1][0]),
        "identical": good,
        "trials": [vars(trial) for trial in trials],
    }
    write_json(output / "recovery.json", figures)
    stages = [newest for trial in trials for newest in trial.checkpoints]
    early, late = stages.count(None), stages.count(config.iterations)
    print(machine_line(described["machine"]))
    print(
        f"{len(stages)} kills: {early} before the first checkpoint, {stages.count(0)} before the second, "
        f"{len(stages) - early - stages.count(0) - late} later, {late} after the last"
    )
    print(f"{figures['leaves']} leaves and {figures['metrics']} metrics compared in each trial")
    print(f"written to {output / 'recovery.json'}")
    if not identical:
        print(f"the runs that differ, and the one never killed, are kept in {work}")
    print(f"{good} of {config.trials} identical")
    if not identical:
        raise SystemExit(1)


if __name__ == "__main__":
    from experiments.cli import command

    command(Config, main)
