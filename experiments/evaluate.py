"""Measure a trained policy on fresh episodes: return, length and survival, each with its confidence interval."""

import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments.conditions import command_text, given_command
from rlcore.errors import InputError


@dataclass(frozen=True)
class Config:
    """Run a trained policy, without exploration, for one whole episode of each of many robots.

    Prints a table and writes it to evaluation.json in the run directory.

    Example:
      python -m experiments.evaluate runs/ppo_humanoid_velocity/20260101-120000-seed0 --vx 0.5 --randomized
    """

    run_dir: Annotated[Path, tyro.conf.Positional]
    """Run directory, as training printed it."""
    episodes: int = 256
    """How many episodes."""
    seconds: float | None = None
    """Length of an episode; by default that of the run."""
    seed: int = 1000
    """Seed of the episodes: another one than training's, so that they are fresh."""
    checkpoint: str = "best"
    """Which checkpoint: best, last, or an iteration."""
    vx: float | None = None
    """Forward speed that every robot is told all the time, m/s. Where only some of vx, vy and yaw_rate are given, the
    others are 0; a command that is too small for the task is 0 as in training. By default commands are drawn."""
    vy: float | None = None
    """Leftward speed that every robot is told, m/s."""
    yaw_rate: float | None = None
    """Yaw rate that every robot is told, rad/s, positive to the left."""
    randomized: bool = False
    """Run the same episodes besides with physics of each robot's own: masses and stiffness +-20 %, friction 0.4 to
    1.2 of the nominal, actions a step late."""
    output: Path | None = None
    """Where to write the figures as JSON; by default evaluation.json in the run directory."""

    def __post_init__(self) -> None:
        if self.episodes < 1:
            raise InputError(f"episodes must be at least 1, got {self.episodes} (--episodes)")
        if self.seconds is not None and not self.seconds > 0:
            raise InputError(f"seconds must be more than 0, got {self.seconds} (--seconds)")
        if self.seed < 0:
            raise InputError(f"seed must be 0 or more, got {self.seed} (--seed)")
        given_command(self.vx, self.vy, self.yaw_rate)


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % confidence interval of a proportion (Wilson 1927), which stays in [0, 1] and is never empty."""
    p = successes / trials
    centre = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials)) / (1 + z * z / trials)
    # At 0 and 1 an end of the interval is the proportion itself, and rounding must not move it past.
    return min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half))


def difference_interval(first: tuple[int, int], second: tuple[int, int]) -> tuple[float, float, float]:
    """The difference of two proportions, each (successes, trials), and its 95 % confidence interval.

    Newcombe 1998, "Interval estimation for the difference between independent proportions", method 10, made of both
    Wilson intervals. Where the trials come in pairs that are alike, as episodes of one seed are, it is too wide
    rather than too narrow.
    """
    p, q = first[0] / first[1], second[0] / second[1]
    p_low, p_high = wilson(*first)
    q_low, q_high = wilson(*second)
    return p - q, p - q - math.hypot(p - p_low, q_high - q), p - q + math.hypot(p_high - p, q - q_low)


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

    Args:
      config: what to measure.
      progress: called with (steps done, robots still going) after each step.

    Raises:
      InputError: if the run or its checkpoint cannot be used, its episodes cannot be given another length, or its
        robots no command.
    """
    from experiments.cli import load_run, restore_policy
    from experiments.conditions import commanded, unseen_physics
    from rlcore import random
    from rlcore.rollout import evaluate

    command = given_command(config.vx, config.vy, config.yaw_rate)
    key = random.key(config.seed)
    overrides = {} if config.seconds is None else {"episode_seconds": config.seconds}
    run = load_run(config.run_dir, overrides)
    try:
        policy = restore_policy(run, config.checkpoint, fresh=("env_state", "obs"))
        env = run.experiment.evaluation_env
        if command is not None:
            env = commanded(env, command)
        nominal = evaluate(env, policy.act, key, config.episodes, progress=progress)
        figures: dict[str, Any] = {
            "command": _again(config, policy.iteration),
            "run": str(config.run_dir),
            "task": env.spec.name,
            "checkpoint": policy.iteration,
            "note": policy.note,
            "episodes": config.episodes,
            "seconds": env.spec.episode_steps * env.spec.control_dt,
            "seed": config.seed,
            "velocity_command": command,
            **_summary(nominal, env.spec),
            "randomized": None,
        }
        if config.randomized:
            unseen = unseen_physics(env, key, config.episodes)
            own: dict[str, Any] = {"params": unseen.params, "shared_params": False, "progress": progress}
            randomized = evaluate(unseen.env, policy.act, key, config.episodes, **own)
            figures["randomized"] = {"physics": unseen.text, **_summary(randomized, env.spec)}
    finally:
        if run.experiment.close is not None:
            run.experiment.close()
    if config.randomized:
        counts = [(x["survived"]["count"], config.episodes) for x in (figures, figures["randomized"])]
        gap = difference_interval(*counts)
        figures["randomized"]["survival_gap"] = dict(zip(("difference", "low", "high"), gap, strict=True))
    return figures


def _again(config: Config, iteration: int) -> str:
    """The command line that measures the same once more, also when there are newer checkpoints."""
    words = ["python", "-m", "experiments.evaluate", str(config.run_dir)]
    given = {name: getattr(config, name) for name in ("episodes", "seconds", "seed", "vx", "vy", "yaw_rate")}
    for name, value in {**given, "checkpoint": iteration}.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join([*words, "--randomized"] if config.randomized else words)


def _summary(episodes: Any, spec: Any) -> dict[str, Any]:
    """What the episodes of as many robots came to."""
    count = len(episodes.lengths)
    survived = int((~episodes.terminated).sum())
    low, high = wilson(survived, count)
    names = ("mean", "low", "high")
    length = mean_interval(episodes.lengths)
    return {
        "survived": {"count": survived, "share": survived / count, "low": low, "high": high},
        "return": dict(zip(names, mean_interval(episodes.returns), strict=True)),
        "length_steps": dict(zip(names, length, strict=True)),
        "length_seconds": {name: value * spec.control_dt for name, value in zip(names, length, strict=True)},
        "falls_per_minute": (count - survived) / (float(episodes.lengths.sum()) * spec.control_dt / 60),
        "full_length_episodes": int((episodes.lengths == spec.episode_steps).sum()),
        "longest_steps": int(episodes.lengths.max()),
        "faults": int(episodes.faults.sum()),
        "metrics": {
            name: dict(zip(names, mean_interval(value), strict=True))
            for name, value in episodes.metrics.items()
            if name != "fault"
        },
    }


def table(figures: dict[str, Any]) -> str:
    """The figures as lines for a person, nominal and randomized physics side by side."""
    count, other = figures["episodes"], figures["randomized"]
    lines = [
        f"{figures['task']}, checkpoint of iteration {figures['checkpoint']}, {count} fresh episodes "
        f"of {figures['seconds']:g} s"
    ]
    if figures["note"]:
        lines.append(f"note: {figures['note']}")
    if figures["velocity_command"]:
        lines.append(f"told all the time: {command_text(figures['velocity_command'])}")
    columns = [("mean" if other is None else "nominal", _column(figures, count))]
    if other is not None:
        columns.append(("randomized", _column(other, count)))
    spread = max(len(interval) for _, interval in columns[0][1].values()) + 3
    wide = max(16, *(len(name) + 1 for name in columns[0][1]))
    lines += ["", "".join([f"{'':<{wide}}", *(f"{title:>10}   {'95 % confidence':<{spread}}" for title, _ in columns)])]
    for name in columns[0][1]:
        cells = [column[name] for _, column in columns]
        lines.append("".join([f"{name:<{wide}}", *(f"{mean:>10}   {interval:<{spread}}" for mean, interval in cells)]))
    for title, summary in (("", figures), (" randomized", other)):
        if summary is not None and summary["faults"]:
            lines.append(f"physics failed in {summary['faults']}{title} episodes")
    if other is not None:
        gap = {name: 100 * value for name, value in other["survival_gap"].items()}
        lines += [
            "",
            f"randomized, each robot its own: {other['physics']}",
            f"generalization gap: survival is {gap['difference']:.1f} percentage points lower "
            f"(95 % confidence: {gap['low']:.1f} to {gap['high']:.1f})",
        ]
    return "\n".join(line.rstrip() for line in lines)


def _column(summary: dict[str, Any], count: int) -> dict[str, tuple[str, str]]:
    """For each row of the table its mean and the interval of that."""
    survived = summary["survived"]
    interval = f"{100 * survived['low']:.1f} to {100 * survived['high']:.1f} %   ({survived['count']} of {count})"
    rows = {"return": summary["return"], "length, s": summary["length_seconds"], **summary["metrics"]}
    return {
        "survived": (f"{100 * survived['share']:.1f} %", interval),
        "falls per minute": (f"{summary['falls_per_minute']:.3f}", ""),
        **{
            name: ("-", "") if math.isnan(x["mean"]) else (f"{x['mean']:.3f}", f"{x['low']:.3f} to {x['high']:.3f}")
            for name, x in rows.items()
        },
    }


def main(config: Config) -> None:
    """Evaluate, print the table, write the JSON."""
    from experiments.cli import progress_line, writable
    from rlcore.metrics import write_json

    output = writable(config.output or config.run_dir / "evaluation.json", config.run_dir)
    with progress_line() as tell:
        figures = measure(config, lambda step, going: tell(f"step {step}: {going} of {config.episodes} episodes go on"))
    print(table(figures))
    write_json(output, figures)
    print(f"\nwritten to {output}")


if __name__ == "__main__":
    from experiments.cli import command

    command(Config, main)
