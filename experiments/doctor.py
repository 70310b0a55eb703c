"""Say what is wrong with a training run, why, and which flag mends it."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments.cli import command, interpreter
from rlcore.doctor import Finding, diagnose, learned_long
from rlcore.errors import InputError
from rlcore.metrics import METRICS_FILE, read_metrics
from rlcore.run_directory import read_record, runs_inside

PICTURE = "doctor.png"


@dataclass(frozen=True)
class Config:
    """Read what a run has logged, while it trains or afterwards, and tell what is wrong with it.

    For each finding: what is wrong, the numbers that show it, the likely cause, and what to change. If anything is
    found, its curves are in doctor.png in the run's directory. Whether a policy knows one robot only shows in an
    evaluation on robots that differ: python -m experiments.evaluate RUN --randomized.

    Example:
      python -m experiments.doctor runs/ppo_humanoid_velocity/20260101-120000-seed0
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Directory of the run, or of a population, whose members are looked at one by one."""


def evaluation_of(run_dir: Path) -> dict[str, Any] | None:
    """What `experiments.evaluate` wrote there, or None."""
    path = run_dir / "evaluation.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def draw(run_dir: Path, records: list[dict[str, Any]], findings: list[Finding]) -> Path | None:
    """The curves behind each finding, a row each; None where no finding has any."""
    from matplotlib.figure import Figure

    known = {name for record in records for name, value in record.items() if value is not None}
    rows = [(f, [name for name in f.metrics if name in known]) for f in findings]
    rows = [(f, names) for f, names in rows if names]
    if not rows:
        return None
    columns = max(len(names) for _, names in rows)
    steps = [record["env_steps"] / 1e6 for record in records]
    figure = Figure(figsize=(4.2 * columns, 2.8 * len(rows)), layout="constrained", dpi=110)
    for number, (finding, names) in enumerate(rows):
        since = next((r["env_steps"] for r in records if r["iteration"] >= finding.since), records[-1]["env_steps"])
        for column, name in enumerate(names):
            axes = figure.add_subplot(len(rows), columns, number * columns + column + 1)
            axes.plot(steps, [float("nan") if (v := r.get(name)) is None else v for r in records], linewidth=1.0)
            axes.axvline(since / 1e6, color="C3", linewidth=1.0, linestyle="--")
            axes.set_title(f"{finding.name}: {name}" if column == 0 else name, fontsize=9, loc="left")
            axes.set_xlabel("million environment steps", fontsize=8)
            axes.tick_params(labelsize=8)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
    path = run_dir / PICTURE
    figure.savefig(path, format="png")
    return path


def _foreign(advice: str, settings: Mapping[str, Any]) -> list[str]:
    """The flags in an advice that a run's experiment does not have."""
    found = []
    for flag in re.findall(r"--[a-z][a-z.-]*[a-z]", advice):
        value: Any = settings
        for part in flag.removeprefix("--").replace("-", "_").split("."):
            value = value.get(part, ...) if isinstance(value, Mapping) else ...
        if value is ... and flag != "--randomized":
            found.append(flag)
    return found


def main(config: Config) -> None:
    """Print the findings, and draw them; of a population, those of each member.

    Raises:
      InputError: if there is no such run, or it has logged nothing.
    """
    members = [run for run in runs_inside(config.run) if run.parent == config.run]
    if not members or not (config.run / METRICS_FILE).exists():
        look(config.run)
        return
    for number, run in enumerate(sorted(members)):
        print(end="\n" if number else "")
        look(run)


def look(run: Path) -> None:
    """Print the findings of one run, and draw them.

    Raises:
      InputError: if there is no such run, or it has logged nothing.
    """
    record = read_record(run)
    path = run / METRICS_FILE
    records = read_metrics(path) if path.exists() else []
    if not records:
        raise InputError(f"{run} has logged nothing yet ({METRICS_FILE})")
    evaluation = evaluation_of(run)
    findings = diagnose(records, evaluation)
    last = records[-1]
    print(f"{run}: {last['iteration']} iterations, {last['env_steps'] / 1e6:.2f}M environment steps")
    if not learned_long(records):
        print("too early to tell all: a policy is judged once it has learned for a while")
    elif not findings:
        print("nothing found wrong")
    for finding in findings:
        print(f"\n{finding.name}: {finding.what}")
        print(f"  evidence  {finding.evidence} (from iteration {finding.since} on)")
        print(f"  cause     {finding.cause}")
        print(f"  advice    {finding.advice}")
        if foreign := _foreign(finding.advice, record["config"]):
            print(f"            (this experiment has no {', '.join(foreign)}: change its task or its code instead)")
    if evaluation is None or evaluation.get("randomized") is None:
        measure = f"{interpreter()} -m experiments.evaluate {run} --randomized"
        print(f"\nnot looked at: overfitting, which needs an evaluation: {measure}")
    (run / PICTURE).unlink(missing_ok=True)
    if picture := draw(run, records, findings):
        print(f"\ncurves: {picture}")


if __name__ == "__main__":
    command(Config, main)
