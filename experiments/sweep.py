"""Search for good settings of an experiment: learning rate, batch size, discount, entropy coefficient, or any other."""

import csv
import dataclasses
import importlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments.cli import command, flags_among, interpreter, on_device_of, parse, progress_line
from experiments.search_space import Space, flags, read_range
from experiments.side_by_side import config_class, launch, thread_flags
from rlcore.errors import InputError, did_you_mean
from rlcore.metrics import METRICS_FILE, read_metrics
from rlcore.run_directory import CHECKPOINTS

_LOOKS = 10  # times that a trial is compared with others while it trains


@dataclass(frozen=True)
class Config:
    """Let Optuna choose settings, train with each, and go on from what did well.

    What is searched is declared beside the experiment's dataclass (SEARCH), or given with --space. Trials that do worse
    than most did after as many iterations are stopped. The same command goes on with a sweep that was interrupted, its
    unfinished trials from their last checkpoints. With the --storage of a database server, many machines share one.

    Examples:
      python -m experiments.sweep experiments.ppo_cartpole --output runs/sweep --trials 12
      python -m experiments.sweep experiments.ppo_ant --output runs/ants --space "ppo.learning-rate 1e-4..1e-2 log"
        "ppo.num-steps 8|16|32" --arguments="--training.time-limit 600"
    """

    experiment: Annotated[str, tyro.conf.Positional]
    """Module of the experiment, such as experiments.ppo_cartpole."""
    output: Path
    """Directory for the trials' runs, the table and the pictures."""
    trials: int = 12
    """How many settings to try in all, those of before an interruption included."""
    at_once: int = 1
    """How many train at the same time; each gets its share of the CPUs."""
    space: tuple[str, ...] = ()
    """What to search in place of SEARCH, names as in the experiment's --help: "NAME LOW..HIGH", "NAME LOW..HIGH log" or
    "NAME ONE|OTHER" each, such as "ppo.learning-rate 1e-4..1e-2 log"."""
    arguments: str = ""
    """Further arguments of all trials, after an equals sign: --arguments="--flag VALUE"."""
    iterations: int | None = None
    """Iterations of a trial; by default the experiment's own."""
    seeds: int = 1
    """If more than 1, a trial is a population of as many seeds, and judged by their mean."""
    score: str | None = None
    """The metric to make large, by default the one that the experiment ranks its checkpoints by; what counts is its
    mean over the last tenth of a trial."""
    prune: bool = True
    """Stop trials that are below the median of others."""
    storage: str | None = None
    """Any storage URL of Optuna; by default a SQLite file in the output directory."""
    study: str = "sweep"
    """The study's name in that storage."""
    seed: int = 0
    """Seed of Optuna's choices, and of the trials' first runs."""

    def __post_init__(self) -> None:
        for name in ("trials", "at_once", "seeds"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)} (--{name.replace('_', '-')})")
        lost = flags_among(shlex.split(self.arguments), ("--training.", "--physics", "--isaacgym.", "--seed"))
        if self.seeds > 1 and lost:
            raise InputError(f"arguments of a population of seeds cannot have {', '.join(lost)} (--arguments)")
        if self.iterations is not None and self.iterations < 1:
            raise InputError(f"iterations must be at least 1, got {self.iterations} (--iterations)")


def search_space(config: Config) -> Space:
    """What is searched.

    Raises:
      InputError: for a range that is none, a setting that the experiment does not have, or nothing to search.
    """
    own_class = config_class(config.experiment)
    declared = getattr(importlib.import_module(config.experiment), "SEARCH", None)
    space = dict(read_range(text) for text in config.space) if config.space else declared
    if not space:
        raise InputError(f"{config.experiment} declares no SEARCH: give ranges (--space)")
    for name in space:
        value = own_class()
        for part in name.split("."):
            if not hasattr(value, part):
                meant = did_you_mean(name, _settings(own_class()))
                raise InputError(f"{config.experiment} has no setting {name} to search{meant} (--space)")
            value = getattr(value, part)
    return space


def _settings(config: Any, prefix: str = "") -> list[str]:
    """The names of all settings, such as `ppo.learning_rate`."""
    names = []
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        names += _settings(value, f"{name}.") if dataclasses.is_dataclass(value) else [name]
    return names


class _Trial:
    """One training with settings that Optuna chose, as a process.

    Attributes:
      iterations: how many it is to have.
      limited: whether its time is limited, so that it may have fewer.
      score: the metric it is judged by.
    """

    def __init__(self, config: Config, trial: Any, arguments: list[str], own: Any, threads: int, score: str) -> None:
        self.config, self.trial = config, trial
        self.iterations = config.iterations or own.training.iterations
        self.limited = own.training.time_limit is not None
        self.score = score
        self.run_dir = config.output / f"trial-{trial.number:03}"
        self._log = config.output / f"{self.run_dir.name}.log"
        self.pruned = False
        self.process: subprocess.Popen[bytes] | None = None
        self._told, self._size = 0, -1
        self._scores: list[tuple[int, float]] = []
        # One that came to an end while nobody looked is not begun again.
        if self.reached() < self.iterations:
            self._start(arguments, threads)
        trial.set_user_attr("arguments", shlex.join(arguments))

    def _start(self, arguments: list[str], threads: int) -> None:
        self.process = launch(self._line(arguments, threads), self._log, "ab")
        self.trial.set_user_attr("pid", self.process.pid)

    def _line(self, arguments: list[str], threads: int) -> list[str]:
        config = self.config
        training = ["--training.no-video", "--training.iterations", str(self.iterations)]
        training += ["--training.best-metric" if config.seeds == 1 else "--score", self.score]
        place = ["--training.run-dir", str(self.run_dir)]
        # What has a checkpoint goes on from it; a run without one begins anew.
        checkpoints = self.run_dir / CHECKPOINTS
        if checkpoints.is_dir() and any(entry.name.isdecimal() for entry in checkpoints.iterdir()):
            place = ["--training.resume", str(self.run_dir)]
        else:
            shutil.rmtree(self.run_dir, ignore_errors=True)
        given = {argument.partition("=")[0].replace("_", "-") for argument in arguments}
        shares = [(flag, str(threads)) for flag in thread_flags(config.experiment) if flag not in given]
        if config.seeds == 1:
            every = [word for share in shares for word in share]
            return [sys.executable, "-m", config.experiment, *arguments, *training, *every, *place]
        own = [word for flag, count in shares if flag == "--num-threads" for word in (flag, count)]
        line = ["experiments.population", config.experiment, "--seeds", str(config.seeds), "--seed", str(config.seed)]
        line += ["--members", f"seed: {shlex.join([*arguments, *own])}", "--training.torch-threads", str(threads)]
        return [sys.executable, "-m", *line, *training, *place]

    def scores(self) -> list[tuple[int, float]]:
        """Iteration and score, the mean over seeds, as far as all have come."""
        names = [f"seed-{i}/{METRICS_FILE}" for i in range(self.config.seeds)]
        files = [self.run_dir / name for name in (names if self.config.seeds > 1 else [METRICS_FILE])]
        if not all(file.exists() for file in files):
            return []
        size = sum(file.stat().st_size for file in files)
        if size == self._size:
            return self._scores
        columns = [
            {r["iteration"]: r[self.score] for r in read_metrics(file) if r.get(self.score) is not None}
            for file in files
        ]
        common = sorted(set.intersection(*(set(column) for column in columns)))
        self._size = size
        self._scores = [(i, sum(column[i] for column in columns) / len(columns)) for i in common]
        return self._scores

    def reached(self) -> int:
        """The newest iteration that has a score."""
        scores = self.scores()
        return scores[-1][0] if scores else 0

    def value(self, until: int) -> float | None:
        """The mean score over the tenth of the trial that ends with this iteration."""
        width = max(1, self.iterations // _LOOKS)
        values = [score for i, score in self.scores() if until - width < i <= until]
        return sum(values) / len(values) if values else None

    def look(self) -> bool:
        """Tell Optuna how it is getting on; whether it is to be stopped."""
        width = max(1, self.iterations // _LOOKS)
        reached, prune = self.reached(), False
        while self._told + width <= reached:
            self._told += width
            value = self.value(self._told)
            if value is None:
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # after an interruption it has been told already
                self.trial.report(value, self._told)
            prune = self.config.prune and reached < self.iterations and bool(self.trial.should_prune())
        return prune

    def progress(self) -> str:
        """How far it is, in a few words."""
        scores = self.scores()
        newest = f" {self.score} {scores[-1][1]:.4g}" if scores else ""
        return f"trial {self.trial.number}: {self.reached()}/{self.iterations}{newest}"

    def stop(self) -> None:
        """Let it save a checkpoint and end."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)

    def ended(self) -> int | None:
        """The exit code, or None while it trains."""
        return 0 if self.process is None else self.process.poll()

    def error(self) -> str:
        """The last line of what it printed."""
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no output"


def _study(config: Config) -> Any:
    try:
        import optuna
    except ImportError:
        raise InputError("a sweep needs Optuna: pip install -c constraints.txt -e '.[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = config.storage or f"sqlite:///{(config.output / 'sweep.db').resolve()}"
    own_class = config_class(config.experiment)
    fixed = parse(own_class, shlex.split(config.arguments), config.experiment)
    iterations = config.iterations or fixed.training.iterations
    try:
        study = optuna.create_study(
            storage=storage,
            study_name=config.study,
            direction="maximize",
            load_if_exists=True,
            # What looks slow in the first third may be the one that solves it.
            pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=iterations // 3),
        )
        # Not the choices of before once more: neither after an interruption nor on another machine.
        before = len(study.get_trials(deepcopy=False))
        seed = zlib.crc32(f"{config.seed} {before} {socket.gethostname() if config.storage else ''}".encode())
        study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True, n_startup_trials=5)
        return study
    except Exception as error:  # each database has errors of its own
        raise InputError(f"storage {storage} cannot be used: {error} (--storage)") from error


def _orphans(study: Any) -> list[Any]:
    """Trials of this machine that nobody looks after: what still trains is told to save, and waited for."""
    from optuna.trial import Trial, TrialState

    found = []
    for frozen in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        sweep = frozen.user_attrs.get("sweep")
        if frozen.user_attrs.get("host") != socket.gethostname():
            continue
        if sweep is not None and "experiments.sweep" in _words(sweep):
            continue  # another sweep of the same study looks after it
        pid = frozen.user_attrs.get("pid")
        if pid is not None and f"trial-{frozen.number:03}" in _words(pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            while f"trial-{frozen.number:03}" in _words(pid):
                time.sleep(0.2)
        found.append(Trial(study, frozen._trial_id))
    return found


def _words(pid: int) -> str:
    """The command line of a process; empty if there is none, or it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def run_trials(
    config: Config, study: Any, space: Space, score: str, tell: Callable[[str], None], progress: Callable[[str], None]
) -> bool:
    """Train until there are as many trials as were asked for; False if it was told to stop before.

    Args:
      config: the sweep.
      study: Optuna's.
      space: what is searched.
      score: the metric that trials are judged by.
      tell: takes a line when something has happened.
      progress: takes what is going on now, many times a second.
    """
    from optuna.trial import TrialState

    own_class = config_class(config.experiment)
    fixed = shlex.split(config.arguments)
    threads = max(1, (os.cpu_count() or 1) // config.at_once)
    running: list[_Trial] = []
    waiting = _orphans(study)
    if before := len(study.get_trials(deepcopy=False)):
        unfinished = f", of which {len(waiting)} go on where they stopped" if waiting else ""
        tell(f"going on with {before} trials of before{unfinished}")
    asked = False

    def stop(number: int, frame: Any) -> None:
        nonlocal asked
        asked = True
        for one in running:
            one.stop()

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while True:
            while not asked and len(running) < config.at_once:
                if not waiting and len(study.get_trials(deepcopy=False)) >= config.trials:
                    break
                trial = waiting.pop(0) if waiting else study.ask()
                trial.set_user_attr("host", socket.gethostname())
                trial.set_user_attr("sweep", os.getpid())
                arguments = [*fixed]
                try:
                    for name, choice in space.items():
                        arguments += flags(name, choice.suggest(trial, name))
                except ValueError as error:
                    raise InputError(f"study {config.study} searched something else: {error} (--study)") from error
                if not any(word.partition("=")[0] == "--seed" for word in fixed) and config.seeds == 1:
                    arguments += ["--seed", str(config.seed)]
                try:
                    own = parse(own_class, arguments, config.experiment)
                except InputError as error:
                    _end(study, trial, TrialState.FAIL, error=str(error))
                    tell(f"trial {trial.number} cannot be: {error}")
                    continue
                if asked:
                    break
                running.append(_Trial(config, trial, arguments, own, threads, score))
                if asked:
                    running[-1].stop()
                tell(f"trial {trial.number}: {shlex.join(arguments)}")
            if not running:
                return not asked
            progress("  ".join(one.progress() for one in running))
            time.sleep(0.3)
            for one in list(running):
                if not one.pruned and not asked and one.look():
                    one.pruned = True
                    one.stop()
                code = one.ended()
                if code is None:
                    continue
                running.remove(one)
                if asked:
                    continue  # it goes on when the sweep does
                one.look()
                value = one.value(one.reached() if one.limited else one.iterations)
                if one.pruned:
                    _end(study, one.trial, TrialState.PRUNED)
                    tell(f"trial {one.trial.number}: stopped, as it did worse than the median")
                elif code or value is None:
                    why = one.error() if code else f"it has no {one.score}"
                    _end(study, one.trial, TrialState.FAIL, error=why)
                    if "must be a metric of what is trained" in why:  # as it would be in all other trials
                        raise InputError(f"score cannot be {score!r} (--score): {why.removeprefix('error: ')}")
                    tell(f"trial {one.trial.number} failed: {why}")
                else:
                    _end(study, one.trial, TrialState.COMPLETE, value)
                    tell(f"trial {one.trial.number}: {one.score} {value:.4g}; best {study.best_value:.4g}")
    finally:
        for one in running:
            one.stop()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _end(study: Any, trial: Any, state: Any, value: float | None = None, error: str | None = None) -> None:
    if error is not None:
        trial.set_user_attr("error", error)
    study.tell(trial, value, state=state)


def _own_score(config: Config) -> str:
    """The metric that the experiment ranks its checkpoints by."""
    own = parse(config_class(config.experiment), shlex.split(config.arguments), config.experiment)
    if own.training.best_metric is not None:
        return str(own.training.best_metric)
    with on_device_of(own):
        experiment = importlib.import_module(config.experiment).build(own)
    if experiment.close is not None:
        experiment.close()
    return str(experiment.best_metric)


def table(study: Any, space: Space) -> list[dict[str, Any]]:
    """A row for each trial, the best first."""
    rows = []
    for trial in study.get_trials(deepcopy=False):
        value = trial.value if trial.state.name == "COMPLETE" else None
        last = max(trial.intermediate_values, default=None)
        score = value if value is not None else None if last is None else trial.intermediate_values[last]
        here = trial.user_attrs.get("host") == socket.gethostname()
        state = "interrupted" if here and trial.state.name == "RUNNING" else trial.state.name.lower()
        row = {"trial": trial.number, "state": state, "score": score}
        rows.append({**row, **{name: trial.params.get(name) for name in space}})
    order = {"complete": 0, "pruned": 1}
    return sorted(rows, key=lambda r: (order.get(r["state"], 2), -(r["score"] if r["score"] is not None else -1e300)))


def _lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    def cell(value: Any) -> str:
        return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    names = list(rows[0])
    cells = [names, *([cell(row[name]) for name in names] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
    return ["  ".join(x.rjust(w) for x, w in zip(row, widths, strict=True)) for row in cells]


def _pictures(study: Any, output: Path) -> list[Path]:
    """Optuna's own plots, as PNG, and as HTML where plotly is installed."""
    import matplotlib
    import optuna.visualization as interactive
    import optuna.visualization.matplotlib as still
    from matplotlib.figure import Figure

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    written = []
    for name in ("optimization_history", "intermediate_values", "slice", "parallel_coordinate", "param_importances"):
        with warnings.catch_warnings(), suppress(Exception):  # some need more trials than there are
            warnings.simplefilter("ignore")
            axes = getattr(still, f"plot_{name}")(study)
            figure: Figure = (axes.flat[0] if hasattr(axes, "flat") else axes).figure
            path = output / f"{name}.png"
            figure.savefig(path, bbox_inches="tight")
            plt.close(figure)
            written.append(path)
            if interactive.is_available():
                getattr(interactive, f"plot_{name}")(study).write_html(path.with_suffix(".html"))
                written.append(path.with_suffix(".html"))
    return written


def main(config: Config) -> None:
    """Run the sweep, print the table and the winner's command, draw the pictures.

    Raises:
      InputError: if there is nothing to search, or the storage cannot be used.
      SystemExit: with code 1, if no trial came to an end; with 130, if it was interrupted.
    """
    space = search_space(config)
    config.output.mkdir(parents=True, exist_ok=True)
    study = _study(config)
    with progress_line() as progress:

        def tell(text: str) -> None:
            progress("")
            print(text, flush=True)

        whole = run_trials(config, study, space, config.score or _own_score(config), tell, progress)
    rows = table(study, space)
    if rows:
        print("\n" + "\n".join(_lines(rows)))
        with (config.output / "sweep.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    if not whole:
        print("\ninterrupted: the same command goes on")
        raise SystemExit(130)
    done = [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
    if not done:
        raise SystemExit(f"error: no trial came to an end: see above, and the trials' logs, if any, in {config.output}")
    print(f"\nthe winner, trial {study.best_trial.number}, {study.best_value:.4g}:")
    print(f"  {interpreter()} -m {config.experiment} {study.best_trial.user_attrs['arguments']}")
    if config.iterations:
        print(f"  (trains as long as the experiment says; as the trial did: --training.iterations {config.iterations})")
    for path in _pictures(study, config.output):
        print(f"written {path}")


if __name__ == "__main__":
    command(Config, main)
