"""Learning with several seeds: how long it takes, how well the policies do, and how much that varies.

The seeds are trained one after the other, each in a process of its own with the whole machine to itself, through
the experiment's own command line. Then each policy is measured on fresh episodes.
"""

import importlib.util
import math
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.report import RESULTS, header, machine_line, made
from rlcore.errors import InputError
from rlcore.metrics import write_json

PANELS = {"return": "episode/return", "episode length, steps": "episode/length", "fall rate": "episode/fall_rate"}


@dataclass(frozen=True)
class Config:
    """Train an experiment with several seeds, measure each policy on fresh episodes, and draw all curves.

    Prints a table and writes seeds_EXPERIMENT.json and seeds_EXPERIMENT.png. Arguments after -- go to the
    experiment.

    Example:
      python -m benchmarks.seeds --experiment ppo_cartpole --seeds 0 1 -- --training.iterations 30
    """

    arguments: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Further arguments of the experiment, after --."""
    experiment: str = "ppo_humanoid_balance"
    """The experiment: a module of experiments."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """The seeds."""
    episodes: int = 256
    """Fresh episodes to measure each policy on."""
    seconds: float = 10.0
    """Their length."""
    runs_dir: Path = Path("runs")
    """Where the runs go: EXPERIMENT-seeds/TIME-seedN in it."""
    output_dir: Path = RESULTS
    """Where table and curves go."""

    def __post_init__(self) -> None:
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) != len(self.seeds):
            raise InputError(f"seeds must be different numbers of 0 or more, got {list(self.seeds)} (--seeds)")
        if self.episodes < 1:
            raise InputError(f"episodes must be at least 1, got {self.episodes} (--episodes)")
        if not 0 < self.seconds < math.inf:
            raise InputError(f"seconds must be more than 0, got {self.seconds} (--seconds)")
        if not self.experiment.isidentifier() or importlib.util.find_spec(f"experiments.{self.experiment}") is None:
            raise InputError(f"there is no experiments.{self.experiment} (--experiment)")


def train(config: Config, seed: int, run_dir: Path) -> None:
    """Train one seed, with its progress on the console.

    Raises:
      InputError: if the training ends with an exit code other than 0; it has told why.
    """
    module = f"experiments.{config.experiment}"
    own = ["--seed", str(seed), "--training.run-dir", str(run_dir)]
    code = subprocess.run([sys.executable, "-m", module, *own, *config.arguments], check=False).returncode
    if code != 0:
        raise InputError(f"{module} with seed {seed} ended with exit code {code}; see above")


def figures_of(run_dir: Path, seed: int, config: Config) -> dict[str, Any]:
    """The figures of a finished run."""
    from experiments.cli import progress_line
    from experiments.evaluate import Config as Evaluation
    from experiments.evaluate import measure
    from rlcore.metrics import METRICS_FILE, read_metrics

    records = read_metrics(run_dir / METRICS_FILE)
    elapsed, env_steps = records[-1]["time/elapsed_seconds"], records[-1]["env_steps"]
    evaluation = Evaluation(run_dir, episodes=config.episodes, seconds=config.seconds)
    with progress_line() as tell:
        measured = measure(evaluation, lambda step, going: tell(f"seed {seed}: step {step}, {going} episodes go on"))
    return {
        "seed": seed,
        "training_seconds": elapsed,
        "env_steps": env_steps,
        "env_steps_per_second": env_steps / elapsed,
        "evaluation": measured,
        "curves": {
            "env_steps": [record["env_steps"] for record in records],
            "seconds": [record["time/elapsed_seconds"] for record in records],
            **{name: [record.get(name) for record in records] for name in PANELS.values()},
        },
    }


def table(figures: Mapping[str, Any]) -> str:
    """The figures as lines for a person."""
    lines = [
        f"{figures['experiment']}: {figures['episodes']} fresh episodes of {figures['seconds']:g} s, best checkpoint",
        machine_line(figures["machine"]),
        "",
        f"{'seed':>4}{'minutes':>9}{'env steps':>12}{'steps/s':>9}"
        f"{'survived (95 % conf.)':>27}{'return (95 % conf.)':>29}",
    ]
    for row in figures["rows"]:
        survived, returned = row["evaluation"]["survived"], row["evaluation"]["return"]
        survival = f"{survived['share']:.1%} ({survived['low']:.1%} .. {survived['high']:.1%})"
        value = f"{returned['mean']:.2f} ({returned['low']:.2f} .. {returned['high']:.2f})"
        lines.append(
            f"{row['seed']:>4}{row['training_seconds'] / 60:>9.2f}{row['env_steps']:>12,}"
            f"{row['env_steps_per_second']:>9,.0f}{survival:>27}{value:>29}"
        )
    return "\n".join(lines)


def plot(figures: Mapping[str, Any], path: Path) -> None:
    """Draw the learning curves of all seeds, against wall-clock time and against environment steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 9), layout="constrained", dpi=120)
    panels = figure.subplots(len(PANELS), 2, sharex="col", squeeze=False)
    for axes_of_row, (title, name) in zip(panels, PANELS.items(), strict=True):
        for number, row in enumerate(figures["rows"]):
            curves = row["curves"]
            values = smooth([math.nan if value is None else value for value in curves[name]])
            minutes = [seconds / 60 for seconds in curves["seconds"]]
            for axes, places in zip(axes_of_row, (minutes, curves["env_steps"]), strict=True):
                axes.plot(places, values, color=f"C{number}", linewidth=1.5, label=f"seed {row['seed']}")
        for axes in axes_of_row:
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        axes_of_row[0].set_ylabel(title)
    panels[0][0].legend(frameon=False)
    panels[-1][0].set_xlabel("minutes")
    panels[-1][1].set_xlabel("environment steps")
    figure.suptitle(f"{figures['experiment']}\n{machine_line(figures['machine'])}", fontsize=9, color="0.4")
    figure.savefig(path, format="png")


def smooth(values: Sequence[float]) -> list[float]:
    """The mean of each value and its neighbours within a hundredth of the run; gaps are skipped."""
    reach = len(values) // 100
    out = []
    for place in range(len(values)):
        near = [x for x in values[max(0, place - reach) : place + reach + 1] if math.isfinite(x)]
        out.append(sum(near) / len(near) if near else math.nan)
    return out


def main(config: Config) -> None:
    """Train, measure, print the table, write the files."""
    output = made(config.output_dir)
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    runs = [config.runs_dir / f"{config.experiment}-seeds" / f"{stamp}-seed{seed}" for seed in config.seeds]
    for seed, run_dir in zip(config.seeds, runs, strict=True):
        train(config, seed, run_dir)
    figures = {
        **header("benchmarks.seeds"),
        "experiment": config.experiment,
        "arguments": list(config.arguments),
        "episodes": config.episodes,
        "seconds": config.seconds,
        "rows": [figures_of(run_dir, seed, config) for seed, run_dir in zip(config.seeds, runs, strict=True)],
    }
    print(table(figures))
    path = output / f"seeds_{config.experiment}.json"
    write_json(path, figures)
    plot(figures, path.with_suffix(".png"))
    print(f"\nwritten to {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    from experiments.cli import command

    command(Config, main)
