"""Measure a trained policy on fresh episodes: return, length and survival, each with its confidence interval."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from rlcore.errors import InputError


@dataclass(frozen=True)
class Config:
    """Run a trained policy, without exploration, for one whole episode of each of many robots.

    Prints a table and writes it to evaluation.json in the run directory.
    """

    run_dir: Annotated[Path, tyro.conf.Positional]
    """Run directory, as training printed it."""
    episodes: int = 256
    """How many episodes."""
    seconds: float | None = None
    """Length of an episode; by default that of the task."""
    seed: int = 1000
    """Seed of the episodes: another one than training's, so that they are fresh."""
    checkpoint: str = "best"
    """Which checkpoint: best, last, or an iteration."""
    output: Path | None = None
    """Where to write the figures as JSON; by default evaluation.json in the run directory."""

    def __post_init__(self) -> None:
        if self.episodes < 1:
            raise InputError(f"episodes must be at least 1, got {self.episodes} (--episodes)")
        if self.seconds is not None and not self.seconds > 0:
            raise InputError(f"seconds must be more than 0, got {self.seconds} (--seconds)")
        if self.seed < 0:
            raise InputError(f"seed must be 0 or more, got {self.seed} (--seed)")


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % confidence interval of a proportion (Wilson 1927), which stays in [0, 1] and is never empty."""
    p = successes / trials
    centre = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials)) / (1 + z * z / trials)
    # At 0 and 1 an end of the interval is the proportion itself, and rounding must not move it past.
    return min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half))


def mean_interval(values: Any, z: float = 1.96) -> tuple[float, float, float]:
    """The mean of `values` `[N]` and its 95 % confidence interval, by the normal approximation.

    One value says nothing of its spread: its interval is infinite. Episodes that have no value (NaN), as one has no
    cost of transport in which the robot stood, are left out; where none has one, all three are NaN.
    """
    values = values[~values.isnan()]
    if not len(values):
        return math.nan, math.nan, math.nan
    mean = float(values.double().mean())
    half = z * float(values.double().std()) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return mean, mean - half, mean + half


def measure(config: Config, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Evaluate a run's policy; the figures by name.

    Raises:
      InputError: if the run or its checkpoint cannot be used, or its episodes cannot be given another length.
    """
    from experiments.cli import load_run, restore_policy
    from rlcore import random
    from rlcore.rollout import evaluate

    overrides = {} if config.seconds is None else {"episode_seconds": config.seconds}
    run = load_run(config.run_dir, overrides)
    try:
        policy = restore_policy(run, config.checkpoint, fresh=("env_state", "obs"))
        env = run.experiment.evaluation_env
        episodes = evaluate(env, policy.act, random.key(config.seed), config.episodes, progress=progress)
    finally:
        if run.experiment.close is not None:
            run.experiment.close()
    survived = int((~episodes.terminated).sum())
    returned, length = mean_interval(episodes.returns), mean_interval(episodes.lengths)
    low, high = wilson(survived, config.episodes)
    minutes = float(episodes.lengths.sum()) * env.spec.control_dt / 60
    figures: dict[str, Any] = {
        "run": str(config.run_dir),
        "task": env.spec.name,
        "checkpoint": policy.iteration,
        "episodes": config.episodes,
        "seed": config.seed,
        "survived": {"count": survived, "share": survived / config.episodes, "low": low, "high": high},
        "return": dict(zip(("mean", "low", "high"), returned, strict=True)),
        "length_steps": dict(zip(("mean", "low", "high"), length, strict=True)),
        "length_seconds": {k: v * env.spec.control_dt for k, v in zip(("mean", "low", "high"), length, strict=True)},
        "falls_per_minute": (config.episodes - survived) / minutes,
        "full_length_episodes": int((episodes.lengths == episodes.lengths.max()).sum()),
        "longest_steps": int(episodes.lengths.max()),
        "faults": int(episodes.faults.sum()),
        "metrics": {
            name: dict(zip(("mean", "low", "high"), mean_interval(value), strict=True))
            for name, value in episodes.metrics.items()
            if name != "fault"
        },
    }
    return figures


def _finite(value: Any) -> Any:
    """`value` for JSON, which has no infinity and no NaN: null stands for them."""
    if isinstance(value, dict):
        return {name: _finite(x) for name, x in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(figures: dict[str, Any]) -> str:
    """The figures as lines for a person."""
    survived = figures["survived"]
    rows = {"return": figures["return"], "length, s": figures["length_seconds"], **figures["metrics"]}
    wide = max(16, *(len(name) + 1 for name in rows))
    lines = [
        f"{figures['task']}, checkpoint of iteration {figures['checkpoint']}, {figures['episodes']} fresh episodes",
        "",
        f"{'':<{wide}}{'mean':>10}   95 % confidence",
        f"{'survived':<{wide}}{100 * survived['share']:>8.1f} %   {100 * survived['low']:.1f} to "
        f"{100 * survived['high']:.1f} %   ({survived['count']} of {figures['episodes']})",
    ]
    lines.append(f"{'falls per minute':<{wide}}{figures['falls_per_minute']:>10.3f}")
    for name, x in rows.items():
        known = f"{x['mean']:>10.3f}   {x['low']:.3f} to {x['high']:.3f}"
        lines.append(f"{name:<{wide}}" + (f"{'-':>10}" if math.isnan(x["mean"]) else known))
    if figures["faults"]:
        lines.append(f"physics failed in {figures['faults']} episodes")
    return "\n".join(lines)


def main(config: Config) -> None:
    """Evaluate, print the table, write the JSON."""
    from experiments.cli import progress_line, writable
    from rlcore.metrics import write_atomically

    output = writable(config.output or config.run_dir / "evaluation.json", config.run_dir)
    with progress_line() as tell:
        figures = measure(config, lambda step, going: tell(f"step {step}: {going} of {config.episodes} episodes go on"))
    print(table(figures))
    write_atomically(output, json.dumps(_finite(figures), indent=2, allow_nan=False) + "\n")
    print(f"\nwritten to {output}")


if __name__ == "__main__":
    from experiments.cli import command

    command(Config, main)
