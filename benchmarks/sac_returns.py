"""Returns of SAC on Gymnasium's robots, beside Stable-Baselines3's SAC with its own defaults.

Both learn with the same number of steps and seeds, one run after the other, and are measured alike: whole episodes
without exploration on MuJoCo's CPU engine, ours in the tasks that equal Gymnasium's step for step, theirs in Gymnasium
itself. Number of robots, networks and gradient steps are each side's own choice.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from benchmarks.report import RESULTS, header, machine_line, made
from rlcore.errors import InputError
from rlcore.metrics import write_json
from rlcore.physics.engines import Physics, check_available, device_of

_GYMNASIUM = {"gym_walker2d": "Walker2d-v5", "gym_ant": "Ant-v5", "gym_humanoid": "Humanoid-v5"}
_SIDES = ("rlcore", "stable_baselines3")


@dataclass(frozen=True)
class Config:
    """Train SAC and Stable-Baselines3's SAC on one of Gymnasium's robots, and compare their returns.

    Prints a table and writes sac_returns_TASK.json and sac_returns_TASK.png, anew after each run. It takes hours, most
    of them Stable-Baselines3's, which it needs: make setup EXTRAS=dev,peers. Arguments after -- go to
    experiments.sac_gym.

    Example:
      python -m benchmarks.sac_returns --steps 20000 --every 10000 --seeds 0
    """

    arguments: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Further arguments of the experiment, after --."""
    task: Literal["gym_walker2d", "gym_ant", "gym_humanoid"] = "gym_walker2d"
    """Which robot."""
    physics: Physics = "mujoco"
    """What simulates for ours, and so where both learn: mujoco on CPUs, warp on an NVIDIA GPU."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs of both."""
    steps: int = 300_000
    """Environment steps of a run."""
    every: int = 50_000
    """Environment steps between measurements."""
    episodes: int = 20
    """Episodes of a measurement."""
    runs_dir: Path = Path("runs")
    """Where our runs go."""
    output_dir: Path = RESULTS
    """Where table and curves go."""

    def __post_init__(self) -> None:
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) != len(self.seeds):
            raise InputError(f"seeds must be different numbers of 0 or more, got {list(self.seeds)} (--seeds)")
        for name in ("every", "episodes"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)} (--{name})")
        if self.steps < self.every:
            raise InputError(f"steps must be at least every, {self.every}, got {self.steps} (--steps)")
        if self.physics == "isaacgym":
            raise InputError("physics must be mujoco or warp, got 'isaacgym' (--physics)")


def ours(config: Config, seed: int, run_dir: Path) -> list[list[float]]:
    """Train a seed of ours: `[env steps, mean return]` of each measurement.

    Raises:
      InputError: if the training ends with an exit code other than 0; it has told why.
    """
    from experiments.cli import parse, progress_line
    from experiments.evaluate import Config as Evaluation
    from experiments.evaluate import measure
    from experiments.sac_gym import Config as Experiment

    settings = ["--task", config.task, "--physics", config.physics, "--seed", str(seed), *config.arguments]
    sac = parse(Experiment, settings, "python -m experiments.sac_gym").sac
    batch = sac.num_envs * sac.num_steps
    iterations, between = -(-config.steps // batch), max(1, config.every // batch)
    own = ["--training.iterations", iterations, "--training.checkpoint-every", between, "--training.run-dir", run_dir]
    own += ["--training.keep-last", iterations // between + 2, "--training.no-video"]
    words = [sys.executable, "-m", "experiments.sac_gym", *settings, *map(str, own)]
    code = subprocess.run(words, check=False).returncode
    if code != 0:
        raise InputError(f"experiments.sac_gym with seed {seed} ended with exit code {code}; see above")
    curve = []
    with progress_line() as tell:
        for iteration in sorted({*range(between, iterations - between // 2, between), iterations}):
            evaluation = Evaluation(run_dir, episodes=config.episodes, checkpoint=str(iteration))
            tell(f"seed {seed}: measuring the policy of {iteration * batch:,} steps")
            figures = measure(evaluation)
            curve.append([iteration * batch, figures["return"]["mean"]])
    return curve


def stable_baselines(config: Config, seed: int) -> list[list[float]]:
    """Train a seed of Stable-Baselines3's: `[env steps, mean return]` of each measurement."""
    import gymnasium
    from stable_baselines3 import SAC
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.monitor import Monitor

    from experiments.cli import progress_line

    name = _GYMNASIUM[config.task]
    # What the hyperparameters of their benchmarks set beside the defaults.
    agent = SAC(
        "MlpPolicy", gymnasium.make(name), seed=seed, learning_starts=10_000, device=str(device_of(config.physics))
    )
    fresh, curve = Monitor(gymnasium.make(name)), []
    with progress_line() as tell:

        def go_on(values: Any, all_values: Any) -> bool:
            tell(f"stable_baselines3 seed {seed}: {agent.num_timesteps:,} steps")
            return True

        while agent.num_timesteps < config.steps:
            wanted = min(config.every, config.steps - agent.num_timesteps)
            agent.learn(wanted, reset_num_timesteps=False, callback=go_on)
            mean: Any = evaluate_policy(agent, fresh, n_eval_episodes=config.episodes)[0]
            curve.append([agent.num_timesteps, float(mean)])
    return curve


def table(figures: Mapping[str, Any]) -> str:
    """The last returns as lines for a person."""
    lines = [
        f"{figures['task']}: return of {figures['episodes']} episodes without exploration",
        machine_line(figures["machine"]),
        "",
        f"{'':>20}{'steps':>10}{'median':>9}  of each seed",
    ]
    for side in _SIDES:
        curves = figures["curves"][side].values()
        if curves:
            last = [curve[-1][1] for curve in curves]
            steps = next(iter(curves))[-1][0]
            each = ", ".join(f"{value:.0f}" for value in last)
            lines.append(f"{side:>20}{steps:>10,}{statistics.median(last):>9.0f}  {each}")
    return "\n".join(lines)


def plot(figures: Mapping[str, Any], path: Path) -> None:
    """Draw all measurements against environment steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained", dpi=120)
    axes = figure.subplots()
    for number, side in enumerate(_SIDES):
        for i, curve in enumerate(figures["curves"][side].values()):
            steps, returns = zip(*curve, strict=True)
            axes.plot(steps, returns, marker="o", markersize=4, color=f"C{number}", label=None if i else side)
    axes.set_xlabel("environment steps")
    axes.set_ylabel(f"return of {figures['episodes']} episodes without exploration")
    axes.set_title(f"{figures['task']}, each line a seed", fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, format="png")


def main(config: Config) -> None:
    """Train and measure, and write table and curves after each run."""
    check_available(config.physics)
    path = made(config.output_dir) / f"sac_returns_{config.task}.json"
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    figures: dict[str, Any] = {
        **header("benchmarks.sac_returns"),
        "task": config.task,
        "episodes": config.episodes,
        "curves": {side: {} for side in _SIDES},
    }
    for side in _SIDES:
        for seed in config.seeds:
            if side == "rlcore":
                curve = ours(config, seed, config.runs_dir / "sac_returns" / f"{stamp}-seed{seed}")
            else:
                curve = stable_baselines(config, seed)
            figures["curves"][side][str(seed)] = curve
            write_json(path, figures)
            plot(figures, path.with_suffix(".png"))
    print(table(figures))
    print(f"\nwritten to {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    from experiments.cli import command

    command(Config, main)
