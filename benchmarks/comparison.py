"""Two ways of training compared, checkpoint by checkpoint: how well their policies do the whole task.

What training logs says little of it: a curriculum gives easy commands first, and exploration makes robots fall. So each
checkpoint's policy is measured on fresh episodes of the experiment's evaluation environment, without exploration.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS, header, machine_line, made
from rlcore.errors import InputError
from rlcore.metrics import write_json


@dataclass(frozen=True)
class Config:
    """Measure all checkpoints of two groups of finished runs, and draw them beside each other.

    Run i of the first group is compared with run i of the second, by the return of the whole task: give both the same
    seed, reward weights, number of environments and --training.checkpoint-every, and --training.keep-last enough to
    keep them all. Prints a table and writes NAME.json and NAME.png.

    Example:
      python -m benchmarks.comparison --first runs/a0 runs/a1 --second runs/b0 runs/b1 --labels curriculum none
    """

    first: tuple[Path, ...]
    """Runs of the first group."""
    second: tuple[Path, ...]
    """Runs of the second, as many and in the same order."""
    labels: tuple[str, str] = ("first", "second")
    """What to call the groups."""
    checkpoints: tuple[int, ...] = ()
    """Iterations whose checkpoints are measured; by default all that every run has."""
    episodes: int = 64
    """Fresh episodes of each checkpoint."""
    seconds: float | None = None
    """Their length; by default that of the runs."""
    metrics: tuple[str, ...] = ()
    """What to draw besides return and survival, such as velocity_error."""
    name: str = "comparison"
    """Name of the files."""
    output_dir: Path = RESULTS
    """Where table and picture go."""

    def __post_init__(self) -> None:
        if not self.first or len(self.first) != len(self.second):
            raise InputError(
                f"second must be as many runs as first, at least one each, got {len(self.second)} and "
                f"{len(self.first)} (--second)"
            )
        if self.episodes < 1:
            raise InputError(f"episodes must be at least 1, got {self.episodes} (--episodes)")
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise InputError(f"seconds must be more than 0, got {self.seconds} (--seconds)")
        if not self.name or "/" in self.name:
            raise InputError(f"name must be a file's name, got {self.name!r} (--name)")


def common_checkpoints(config: Config) -> list[int]:
    """The iterations to measure, in order.

    Raises:
      InputError: if a run has no checkpoints, lacks one that was asked for, or no iteration is in all of them.
    """
    from rlcore.run_directory import CHECKPOINTS

    kept = {}
    for run in (*config.first, *config.second):
        directory = run / CHECKPOINTS
        if not directory.is_dir():
            raise InputError(f"{run} is not a run: it has no {CHECKPOINTS}")
        kept[run] = {int(entry.name) for entry in directory.iterdir() if entry.name.isdecimal()}
    for run, iterations in kept.items():
        if lacking := set(config.checkpoints) - iterations:
            raise InputError(f"{run} has no checkpoint of iteration {min(lacking)} (--checkpoints)")
    found = set(config.checkpoints) or set.intersection(*kept.values())
    if not found:
        raise InputError("no iteration has a checkpoint in all runs: see --training.keep-last")
    return sorted(found)


def measured(config: Config, run: Path, checkpoint: int) -> dict[str, Any]:
    """The figures of one policy."""
    from experiments.evaluate import Config as Evaluation
    from experiments.evaluate import measure
    from rlcore.metrics import METRICS_FILE, read_metrics

    evaluation = Evaluation(run, episodes=config.episodes, seconds=config.seconds, checkpoint=str(checkpoint))
    figures = measure(evaluation)
    if lacking := [name for name in config.metrics if name not in figures["metrics"]]:
        raise InputError(f"metrics must be among {', '.join(figures['metrics'])}; got {lacking[0]} (--metrics)")
    records = [r for r in read_metrics(run / METRICS_FILE) if r.get("iteration", 0) <= checkpoint]
    return {
        "run": run.name,
        "task": figures["task"],
        "seconds": figures["seconds"],
        "seed": figures["seed"],
        "checkpoint": checkpoint,
        "env_steps": records[-1]["env_steps"] if checkpoint and records else 0,
        "survived": figures["survived"],
        "return": figures["return"],
        "metrics": {name: figures["metrics"][name] for name in config.metrics},
    }


def refuse_unlike(groups: Sequence[Sequence[Sequence[Mapping[str, Any]]]]) -> None:
    """Raise InputError unless all runs are of one task, in episodes of one length, after as many steps each time."""
    runs = [run for group in groups for run in group]
    for rows in zip(*runs, strict=True):
        for name in ("task", "seconds", "env_steps"):
            if len(found := {row[name] for row in rows}) > 1:
                told = ", ".join(f"{row['run']} {row[name]}" for row in rows)
                raise InputError(f"runs must be alike to be compared, but {name} differs among {len(found)}: {told}")


def verdicts(figures: Mapping[str, Any]) -> list[str]:
    """For each checkpoint, in how many pairs the first group's return is higher."""
    first, second = figures["labels"]
    lines = []
    for number, checkpoint in enumerate(figures["checkpoints"]):
        pairs = [
            (a[number]["return"]["mean"], b[number]["return"]["mean"])
            for a, b in zip(figures["first"], figures["second"], strict=True)
        ]
        wins = sum(a > b for a, b in pairs)
        steps = figures["first"][0][number]["env_steps"]
        means = [sum(values) / len(pairs) for values in zip(*pairs, strict=True)]
        lines.append(
            f"iteration {checkpoint} ({steps / 1e6:.2f}M steps): {first} is better in {wins} of {len(pairs)} "
            f"(mean return {means[0]:.1f}, {second} {means[1]:.1f})"
        )
    return lines


def table(figures: Mapping[str, Any]) -> str:
    """The figures as lines for a person."""
    names = figures["metrics"]
    lines = [
        f"{figures['episodes']} fresh episodes each, 95 % confidence; {machine_line(figures['machine'])}",
        "",
        f"{'':<14}{'run':<14}{'iteration':>10}{'survived':>10}{'return':>18}" + "".join(f"{n:>24}" for n in names),
    ]
    for label, group in zip(figures["labels"], ("first", "second"), strict=True):
        for run in figures[group]:
            for row in run:
                cells = [row["return"], *(row["metrics"][name] for name in names)]
                shown = [f"{x['mean']:.3f} +- {x['high'] - x['mean']:.3f}" for x in cells]
                lines.append(
                    f"{label:<14}{row['run']:<14}{row['checkpoint']:>10}{row['survived']['share']:>10.1%}"
                    f"{shown[0]:>18}" + "".join(f"{cell:>24}" for cell in shown[1:])
                )
    return "\n".join([*lines, "", *verdicts(figures)])


def drawing(figures: Mapping[str, Any]) -> Any:
    """Each run as a thin line and each group's mean as a thick one, against environment steps."""
    from matplotlib.figure import Figure

    def values(run: Sequence[Mapping[str, Any]], panel: str) -> list[float]:
        if panel == "survived":
            return [row["survived"]["share"] for row in run]
        return [(row["return"] if panel == "return" else row["metrics"][panel])["mean"] for row in run]

    panels = ["return", "survived", *figures["metrics"]]
    figure = Figure(figsize=(4.2 * len(panels), 4.2), layout="constrained", dpi=110)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, (label, group) in enumerate(zip(figures["labels"], ("first", "second"), strict=True)):
            runs = figures[group]
            curves = [values(run, panel) for run in runs]
            steps = [[row["env_steps"] / 1e6 for row in run] for run in runs]
            for x, y in zip(steps, curves, strict=True):
                axes.plot(x, y, color=f"C{number}", linewidth=0.8, alpha=0.6, marker=".")
            mean = [sum(at) / len(at) for at in zip(*curves, strict=True)]
            axes.plot(steps[0], mean, color=f"C{number}", linewidth=2.5, label=label)
        axes.set_title(panel.replace("_", " "), fontsize=10)
        axes.set_xlabel("million environment steps")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    return figure


def main(config: Config) -> None:
    """Measure, print the table, write the files."""
    from experiments.cli import progress_line

    output = made(config.output_dir)
    checkpoints = common_checkpoints(config)
    count, done = 2 * len(config.first) * len(checkpoints), 0
    groups: list[list[list[dict[str, Any]]]] = []
    with progress_line() as tell:
        for runs in (config.first, config.second):
            groups.append([])
            for run in runs:
                rows = []
                for checkpoint in checkpoints:
                    done += 1
                    tell(f"{done} of {count}: {run}, iteration {checkpoint}")
                    rows.append(measured(config, run, checkpoint))
                groups[-1].append(rows)
                refuse_unlike(groups)
    figures = {
        **header("benchmarks.comparison"),
        "labels": list(config.labels),
        "checkpoints": checkpoints,
        "episodes": config.episodes,
        "metrics": list(config.metrics),
        "first": groups[0],
        "second": groups[1],
    }
    print(table(figures))
    path = output / f"{config.name}.json"
    write_json(path, figures)
    drawing(figures).savefig(path.with_suffix(".png"), format="png")
    print(f"\nwritten to {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    from experiments.cli import command

    command(Config, main)
