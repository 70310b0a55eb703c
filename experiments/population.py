"""Train many settings of one experiment side by side in one process, as a population."""

import dataclasses
import importlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from algos.population import PBTConfig, PopulationState, make_population, member
from experiments.cli import flags_among, parse, run, to_json
from experiments.side_by_side import Setting, config_class, read_lines
from rlcore import random
from rlcore.checkpoint import Checkpointer, CheckpointError
from rlcore.errors import InputError
from rlcore.experiment import Algorithm, Experiment, TrainingConfig
from rlcore.metrics import METRICS_FILE, TENSORBOARD, MetricsFile, TensorBoard, check_metric, plot_members, read_metrics
from rlcore.physics.engines import Physics
from rlcore.physics.isaacgym_settings import Settings
from rlcore.run_directory import BEST, CHECKPOINTS, CONFIG_FILE, FAULTS, RunRecord, write_record

# Settings that are numbers in a state, and not part of what is compiled for all members; of an algorithm's own
# settings those that its state has as coefficients.
_FREE = ("seed", "reward_weights", "randomization", "push_speed")
# Flags that cannot differ from member to member.
_OF_ALL = ("--training.", "--physics", "--isaacgym.")
# What is told of members that is no coefficient.
_NOT_SET = ("population/stuck", "population/parent")
# What a run has in its directory, where members have theirs.
_TAKEN = (BEST, CHECKPOINTS, FAULTS, TENSORBOARD)


@dataclass(frozen=True)
class Config:
    """Train members that differ in seed, coefficients of the algorithm, reward weights or randomization.

    Each member is the run that it would be alone, and has a directory of its own in that of the population, which
    plays and evaluates like any other once training stops; so does `best`, a link to the one with the highest score.

    Example:
      python -m experiments.population experiments.ppo_cartpole --training.run-dir runs/rates --seeds 4
        --members "slow: --ppo.learning-rate 1e-4" "fast: --ppo.learning-rate 1e-2"
    """

    experiment: Annotated[str, tyro.conf.Positional]
    """Module of the experiment, such as experiments.ppo_cartpole."""
    members: tuple[str, ...] = ("member:",)
    """Of each member a name, a colon and arguments of the experiment; the name * stands for all of them."""
    seeds: int = 1
    """How many members there are of each, with one seed after the other."""
    seed: int = 0
    """The first of these seeds."""
    physics: Physics = "mujoco"
    """What simulates, for all members: mujoco on CPUs, warp on an NVIDIA GPU, or isaacgym (docs/isaacgym.md)."""
    isaacgym: Settings = field(default_factory=Settings)
    """How Isaac Gym runs, with --physics isaacgym, for all members."""
    pbt: PBTConfig = field(default_factory=lambda: PBTConfig(interval=0))
    """Population-based training: with an interval, members that do badly go on from those that do well."""
    score: str | None = None
    """The metric that members are compared by; by default the one that the experiment ranks its checkpoints by. Where
    members differ in reward weights, choose one that does not count them, such as episode/length."""
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise InputError(f"seeds must be at least 1, got {self.seeds} (--seeds)")


def settings(config: Config) -> list[tuple[str, Any]]:
    """Name and configuration of each member.

    Raises:
      InputError: for a line of another form, a name that comes twice or is that of a file of every run, an experiment
        that is none, or arguments that it does not take.
    """
    own_class = config_class(config.experiment)
    made = []
    lines: list[Setting] = read_lines(config.members, "members")
    for line in lines:
        if line.name.startswith(".") or "." in line.name or line.name in _TAKEN:
            raise InputError(
                f"a member cannot be named {line.name}: names have no dots and are none of {', '.join(_TAKEN)}"
            )
        if lost := flags_among(line.arguments, _OF_ALL):
            raise InputError(f"{', '.join(lost)} is for all members: give it beside --members, not in {line.name}")
        seeded = "--seed" in flags_among(line.arguments, ("--seed",))
        if config.seeds > 1 and seeded:
            raise InputError(
                f"--seed of {line.name} cannot be beside --seeds {config.seeds}: give the first seed to the population"
            )
        own = parse(own_class, line.arguments, config.experiment)
        shared = {name: getattr(config, name) for name in ("physics", "isaacgym") if hasattr(own, name)}
        own = dataclasses.replace(own, **shared)
        for i in range(config.seeds):
            name = line.name if config.seeds == 1 else f"{line.name}-{i}"
            made.append((name, own if seeded else dataclasses.replace(own, seed=config.seed + i)))
    return made


def _refuse_compiled(made: list[tuple[str, Any]], coefficients: set[str]) -> None:
    for name, path in _differences(made):
        top, _, rest = path.partition(".")
        if top in _FREE or rest in coefficients or top == "training":
            continue
        raise InputError(
            f"members may differ in {', '.join(_FREE)} and in {', '.join(sorted(coefficients))}, but {name} "
            f"differs from {made[0][0]} in {path} (--{path.replace('_', '-')}): run them side by side with "
            "experiments.side_by_side"
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting with its path."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _differences(made: list[tuple[str, Any]]) -> list[tuple[str, str]]:
    """The members that differ from the first one, and the path of each setting in which they do."""
    first = dict(_flat(to_json(made[0][1])))
    found = []
    for name, own in made[1:]:
        other = dict(_flat(to_json(own)))
        found += [(name, path) for path in {**first, **other} if first.get(path) != other.get(path)]
    return found


def _given(made: list[tuple[str, Any]], shown: set[str]) -> list[list[str]]:
    """What members were given that differs, but for what is shown already, as `NAME VALUE` for each."""
    paths = sorted({path for _, path in _differences(made) if path.rpartition(".")[2] not in shown})
    given = []
    for _, own in made:
        values = dict(_flat(to_json(own)))
        given.append([f"{path} {values.get(path, 'unchanged')}" for path in paths])
    return given


def _weighed_otherwise(made: list[tuple[str, Any]], score: str) -> bool:
    """Whether members are compared by rewards that they began to weigh in different ways."""
    return score == "episode/return" and any(path.startswith("reward_weights.") for _, path in _differences(made))


class _Members:
    """What members leave in their directories: config.json, metrics, TensorBoard, and a checkpoint at the end."""

    def __init__(self, config: Config, made: list[tuple[str, Any]], score: str) -> None:
        self.config, self.made, self.score = config, made, score
        self.run_dir: Path | None = None
        self.state: PopulationState | None = None
        self._newest: dict[str, list[float]] = {}
        self._files: list[tuple[MetricsFile, TensorBoard | None]] = []

    def begin(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def directory(self, name: str) -> Path:
        assert self.run_dir is not None, "the run has not begun"
        return self.run_dir / name

    def _open(self, after: int) -> None:
        for name, own in self.made:
            path = self.directory(name)
            path.mkdir(exist_ok=True)
            module = self.config.experiment
            record = RunRecord(module.rsplit(".", 1)[-1], module, None, f"python -m {module}", own.seed, to_json(own))
            before = after if after and (path / CONFIG_FILE).exists() else None
            write_record(path, record, torch.get_num_threads(), resumed_at=before)
            board = TensorBoard(path / TENSORBOARD, after) if self.config.training.tensorboard else None
            self._files.append((MetricsFile(path / METRICS_FILE, after), board))

    def write(self, state: PopulationState, metrics: Mapping[str, torch.Tensor]) -> None:
        iteration = int(state.iteration)
        if not self._files:
            self._open(iteration - 1)
        steps = state.members.env_steps.tolist()
        columns = {name: value.detach().to(torch.float64).tolist() for name, value in metrics.items()}
        for i, (file, board) in enumerate(self._files):
            own = {name: column[i] for name, column in columns.items()}
            file.write(iteration, steps[i], own)
            if board is not None:
                board.write(iteration, own)
        self.state, self._newest = state, columns

    def summary(self) -> str:
        """The members, the best first, with what they differ in; the best one's directory is linked as `best`."""
        if self.state is None:
            return ""
        stuck = self._newest["population/stuck"]
        scores = [math.nan if x else score for x, score in zip(stuck, self._newest[self.score], strict=True)]
        order = sorted(range(len(scores)), key=lambda i: (math.isnan(scores[i]), -scores[i]))
        # Coefficients as they are now, which population-based training may have changed.
        now = {
            name: values
            for name, values in self._newest.items()
            if name.startswith("population/") and name not in _NOT_SET and len(set(values)) > 1
        }
        given = _given(self.made, {name.removeprefix("population/") for name in now})
        if self.config.pbt.interval:  # of what a member was given it may have gone on with another's
            given = [[] for _ in given]
        names = [name for name, _ in self.made]
        width = max(map(len, names))
        lines = [f"members, by {self.score}:"]
        if _weighed_otherwise(self.made, self.score):
            lines[0] = f"members, by {self.score}, which does not compare them: their reward weights differed at first"
        for i in order:
            values = [f"{name.removeprefix('population/')} {x[i]:.3g}" for name, x in now.items()] + given[i]
            why = "  stuck: its losses are no numbers" if stuck[i] else ""
            lines.append(f"  {names[i]:<{width}}  {scores[i]:>10.4g}  {', '.join(values)}{why}".rstrip())
        lines += self._copies()
        best = self.directory(names[order[0]])
        link = best.parent / BEST
        try:
            link.unlink(missing_ok=True)
            link.symlink_to(best.name)
            lines.append(f"  the best is also {link}")
        except OSError as error:  # some file systems have no links
            lines.append(f"  the best is {best} ({link} cannot be made: {error.strerror})")
        try:
            if (curves := plot_members(best.parent, names)) is not None:
                lines.append(f"  their curves: {curves}")
        except Exception as error:
            lines.append(f"  warning: no curves: {error}")
        return "\n".join(lines)

    def _copies(self) -> list[str]:
        """Who went on from whom, a line for each comparison in which any did."""
        if not self.config.pbt.interval:
            return []
        names = [name for name, _ in self.made]
        copies: dict[int, list[str]] = {}
        for i, name in enumerate(names):
            for record in read_metrics(self.directory(name) / METRICS_FILE):
                if (parent := int(record.get("population/parent", i))) != i:
                    copies.setdefault(record["iteration"], []).append(f"{name} from {names[parent]}")
        return [f"  went on at iteration {iteration}: {', '.join(who)}" for iteration, who in sorted(copies.items())]

    def close(self) -> None:
        """Save a checkpoint of each member; those that cannot be written are told and the others are."""
        for file, board in self._files:
            with suppress(OSError):  # what was written was flushed
                file.close()
                if board is not None:
                    board.close()
        if self.state is None:
            return
        for i, (name, _) in enumerate(self.made):
            try:
                self._save(name, member(self.state, i), self._newest[self.score][i])
            except (OSError, CheckpointError) as error:
                print(f"warning: no checkpoint of member {name}: {error}", file=sys.stderr)

    def _save(self, name: str, own: Any, score: float) -> None:
        identity = {"experiment": self.config.experiment.rsplit(".", 1)[-1]}
        checkpoints = Checkpointer(self.directory(name) / CHECKPOINTS, identity, keep_last=1)
        try:
            checkpoints.save(int(own.iteration), own, score if math.isfinite(score) else None)
            checkpoints.wait()
        finally:
            checkpoints.close()


def build(config: Config) -> Experiment:
    """The population that a configuration describes, as one learner.

    Raises:
      InputError: if population-based training would compare returns of different reward weights, and as from
        `settings` and `make_population`.
    """
    made = settings(config)
    module = importlib.import_module(config.experiment)
    experiments = [module.build(made[0][1])]
    score = config.score or experiments[0].best_metric
    best_metric = config.training.best_metric or score
    # A run that began before this was refused goes on as it is.
    chosen = config.score is not None or config.training.resume is not None
    if config.pbt.interval and not chosen and _weighed_otherwise(made, score):
        if experiments[0].close is not None:
            experiments[0].close()
        raise InputError(
            f"members differ in reward_weights, so that {score} says nothing of which is better, and --pbt.interval "
            f"{config.pbt.interval} would copy by it: say what they are compared by, such as --score episode/length"
        )
    experiments += [module.build(own) for _, own in made[1:]]
    population = make_population([experiment.algorithm for experiment in experiments], config.pbt, score)
    keys = torch.stack([random.key(own.seed) for _, own in made])
    files = _Members(config, made, score)

    def init(key: torch.Tensor) -> PopulationState:
        _refuse_compiled(made, {*experiments[0].algorithm.init(keys[0]).coefficients})
        return population.init(keys)

    def update(state: PopulationState) -> tuple[PopulationState, dict[str, torch.Tensor]]:
        state, metrics = population.update(state)
        # Members that are stuck are told by how many they are, and do not count.
        going = metrics["population/stuck"] == 0
        means = {name: torch.where(going, value.to(torch.float64), torch.nan) for name, value in metrics.items()}
        summary = {name: value.nanmean() for name, value in means.items()}
        summary["population/stuck"] = (~going).sum()
        summary.pop("population/parent", None)
        known = torch.where(metrics[score].isnan() | ~going, -torch.inf, metrics[score])
        best = known.max()
        summary["population/best"] = torch.where(best.isfinite(), best, torch.nan)
        check_metric("best_metric", best_metric, summary, "--training.best-metric")
        files.write(state, metrics)
        return state, summary

    act: Callable[..., Any] = population.act
    closers = [experiment.close for experiment in experiments if experiment.close is not None]

    def close() -> None:
        with ExitStack() as stack:
            for closer in closers:
                stack.callback(closer)
            files.close()

    first = experiments[0]

    def note() -> str:
        text = first.note() if first.note is not None else ""
        return f"{text}; that of each of {len(made)} members"

    algorithm = Algorithm(init, update, act)
    return Experiment(
        first.env,
        first.evaluation_env,
        algorithm,
        None,
        first.faults,
        close,
        note if first.note is not None else None,
        files.summary,
        best_metric,
        files.begin,
    )


def config_of(arguments: Sequence[str]) -> type[Config]:
    """The configuration of a command line: how long to train and how often to save is the experiment's own by default.

    A name that is no experiment is left to `build` to refuse.
    """
    for word in arguments:
        if not word.startswith("-"):
            with suppress(InputError, ImportError, TypeError, AttributeError, ValueError):
                own = config_class(word)().training
                break
    else:
        return Config
    made = dataclasses.make_dataclass("Config", [("training", TrainingConfig, own)], bases=(Config,), frozen=True)
    made.__doc__ = Config.__doc__
    return made


if __name__ == "__main__":
    run(config_of(sys.argv[1:]), build)
