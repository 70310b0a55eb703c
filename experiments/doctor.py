"""Say what is wrong with a training run, why, and which flag mends it."""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from numpy.typing import NDArray

from experiments.cli import command, interpreter
from rlcore.doctor import Finding, diagnose, judged_from
from rlcore.errors import InputError
from rlcore.metrics import METRICS_FILE, column, read_metrics
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
    """The curves behind each finding, a row each and each curve once; None where no finding has any."""
    from matplotlib.figure import Figure

    known = {name for record in records for name, value in record.items() if value is not None}
    rows, drawn = [], set[str]()
    for finding in findings:
        if names := [name for name in finding.metrics if name in known - drawn]:
            rows.append((finding, names))
            drawn |= {*names}
    if not rows:
        return None
    columns = max(len(names) for _, names in rows)
    steps = [record["env_steps"] / 1e6 for record in records]
    figure = Figure(figsize=(4.2 * columns, 2.8 * len(rows)), layout="constrained", dpi=110)
    for number, (finding, names) in enumerate(rows):
        since = next((r["env_steps"] for r in records if r["iteration"] >= finding.since), records[-1]["env_steps"])
        for place, name in enumerate(names):
            axes = figure.add_subplot(len(rows), columns, number * columns + place + 1)
            values = np.array(column(records, name))
            axes.plot(steps, values, linewidth=1.0)
            if _spiky(values):
                axes.set_yscale("log")
            axes.axvline(since / 1e6, color="C3", linewidth=1.0, linestyle="--", label=f"iteration {finding.since}")
            if place == 0:
                axes.legend(fontsize=7, framealpha=0.6)
            axes.set_title(f"{finding.name}: {name}" if place == 0 else name, fontsize=9, loc="left")
            axes.set_xlabel("million environment steps", fontsize=8)
            axes.tick_params(labelsize=8)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
    path = run_dir / PICTURE
    figure.savefig(path, format="png")
    return path


def _spiky(values: NDArray[np.float64]) -> bool:
    """Whether a peak would flatten all else on an even scale."""
    values = values[np.isfinite(values)]
    return bool(values.size) and bool(values.min() > 0) and float(values.max()) > 30 * float(np.median(values))


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
    """Print the findings, and draw them; of a population, those of each member that has any.

    Raises:
      InputError: if there is no such run, or it has logged nothing.
    """
    members = sorted(run for run in runs_inside(config.run) if run.parent == config.run)
    population = bool(members) and (config.run / METRICS_FILE).exists()
    sound: list[tuple[str, list[dict[str, Any]]]] = []
    lacking: list[Path] = []
    for run in members if population else [config.run]:
        record, records, evaluation = read_record(run), _records(run), evaluation_of(run)
        findings = diagnose(records, evaluation)
        (run / PICTURE).unlink(missing_ok=True)
        if findings or not population:
            _tell(run, record["config"], records, findings)
            if population:
                print()
        else:
            sound.append((run.name, records))
        if (evaluation or {}).get("randomized") is None:
            lacking.append(run)
    if sound:
        names, (records, *_) = zip(*sound, strict=True)
        iterations = records[-1]["iteration"]
        print(f"{config.run}: {iterations} iterations\n{_verdict(records)}: {', '.join(names)}")
    if lacking:
        measure = f"{interpreter()} -m experiments.evaluate {shlex.quote(str(lacking[0]))} --randomized"
        of = f" of {len(lacking)} members" if population else ""
        print(f"\nnot looked at: overfitting{of}, which needs an evaluation: {measure}")


def _records(run: Path) -> list[dict[str, Any]]:
    path = run / METRICS_FILE
    records = read_metrics(path) if path.exists() else []
    if not records:
        raise InputError(f"{run} has logged nothing yet ({METRICS_FILE})")
    return records


def _verdict(records: list[dict[str, Any]]) -> str:
    """What to say where nothing is found wrong."""
    long = judged_from(records)
    if long is None:
        return "too early to tell, as it has not begun to learn"
    if records[-1]["iteration"] < long:
        return f"nothing found wrong so far, but some illnesses can be told from iteration {long} on only"
    return "nothing found wrong"


def _tell(run: Path, config: Mapping[str, Any], records: list[dict[str, Any]], findings: list[Finding]) -> None:
    """Print the findings of one run, and draw them."""
    last = records[-1]
    print(f"{run}: {last['iteration']} iterations, {last['env_steps'] / 1e6:.2f}M environment steps")
    if not findings:
        print(_verdict(records))
    for finding in findings:
        print(f"\n{finding.name}: {finding.what}")
        print(f"  evidence  {finding.evidence} (from iteration {finding.since} on)")
        print(f"  cause     {finding.cause}")
        print(f"  advice    {finding.advice}")
        if foreign := _foreign(finding.advice, config):
            print(f"            (this experiment has no {', '.join(foreign)}: change its task or its code instead)")
    if picture := draw(run, records, findings):
        print(f"\ncurves: {picture}")


if __name__ == "__main__":
    command(Config, main)
