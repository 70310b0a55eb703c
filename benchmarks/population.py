"""How much faster learners train as one population than one after the other.

The same learners, with the same seeds and from the same states, make the same number of updates in both ways. The two
take turns, block by block in one process, and a ratio is that of two neighbouring blocks: a machine that slows down
slows both. Starting processes, which eight runs do eight times, is not counted there.

With --commands it is: whole command lines are timed, from their start to their exit with all that they write but films,
those of the population and of single runs by turns. What the members cost one after the other is the median of a single
run as often as there are members.
"""

import argparse
import importlib
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from algos.population import make_population
from benchmarks.report import RESULTS, header, machine_line, made, spread
from experiments.cli import flags_among, on_device_of, parse, progress_line
from experiments.side_by_side import config_class
from rlcore import random
from rlcore.errors import InputError
from rlcore.metrics import write_json

# Updates before anything is timed: recordings are made, and robots are of all ages.
_BURN_IN_UPDATES = 20


@dataclass(frozen=True)
class Config:
    """Measure how much faster a population trains than its members one after the other.

    Prints a line for each and writes population_EXPERIMENT.json. Nothing else should run on the machine meanwhile.
    Arguments after -- go to the experiment.

    Examples:
      python -m benchmarks.population --members 8 -- --ppo.num-envs 64
      python -m benchmarks.population -- --physics warp
    """

    arguments: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Further arguments of the experiment, after --."""
    experiment: str = "ppo_cartpole"
    """The experiment: a module of experiments."""
    members: int = 8
    """How many learners."""
    updates: int = 10
    """Updates of each in a block."""
    blocks: int = 7
    """Blocks of each way, of which medians are taken."""
    threads: int = 1
    """Threads of torch."""
    commands: int = 0
    """How many whole command lines of each way to time besides, with the experiment's own number of iterations."""
    output_dir: Path = RESULTS
    """Where the file goes."""

    def __post_init__(self) -> None:
        for name in ("members", "updates", "blocks", "threads"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)} (--{name})")
        if lost := flags_among(self.arguments, ("--training.", "--isaacgym.", "--seed")):
            raise InputError(f"arguments of members that are compared cannot have {', '.join(lost)}")
        if self.commands < 0:
            raise InputError(f"commands must be 0 or more, got {self.commands} (--commands)")


def measure(config: Config) -> dict[str, Any]:
    """The figures: updates per second of all members together in both ways, and the ratio of neighbouring blocks."""
    torch.set_num_threads(config.threads)
    module = f"experiments.{config.experiment}"
    own = parse(config_class(module), list(config.arguments), module)
    with on_device_of(own):
        return _measure(config, module, own)


def _measure(config: Config, module: str, own: Any) -> dict[str, Any]:
    algorithm = importlib.import_module(module).build(own).algorithm
    population = make_population([algorithm] * config.members)
    keys = [random.key(seed) for seed in range(config.members)]
    state = population.init(torch.stack(keys))
    states = [algorithm.init(key) for key in keys]

    def together(updates: int) -> None:
        nonlocal state
        for _ in range(updates):
            state, _ = population.update(state)

    def alone(updates: int) -> None:
        for i in range(config.members):
            for _ in range(updates):
                states[i], _ = algorithm.update(states[i])

    ways = {"population": together, "one after the other": alone}
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way(_BURN_IN_UPDATES)
    if keys[0].is_cuda:
        torch.cuda.synchronize()
    for _ in range(config.blocks):
        for name, way in ways.items():
            begin = time.perf_counter()
            way(config.updates)
            if keys[0].is_cuda:
                torch.cuda.synchronize()
            speeds[name].append(config.members * config.updates / (time.perf_counter() - begin))
    ratios = [a / b for a, b in zip(*speeds.values(), strict=True)]
    return {
        **header("benchmarks.population"),
        "experiment": config.experiment,
        "arguments": list(config.arguments),
        "members": config.members,
        "threads": config.threads,
        "device": torch.cuda.get_device_name() if keys[0].is_cuda else "cpu",
        "updates_per_second": {name: {"median": statistics.median(x), "blocks": x} for name, x in speeds.items()},
        "ratio": spread(ratios),
    }


def time_commands(config: Config) -> dict[str, Any]:
    """Seconds of whole command lines of both ways, and how many times as long the single runs take together.

    Raises:
      InputError: if one of them fails.
    """
    module = f"experiments.{config.experiment}"
    training = ["--training.no-video", "--training.torch-threads", str(config.threads)]
    # What simulates is for all members, and told beside them.
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--physics", default="mujoco")
    shared, rest = parser.parse_known_args(config.arguments)
    members = ["--seeds", str(config.members), "--members", f"member: {shlex.join(rest)}", "--physics", shared.physics]
    seconds: dict[str, list[float]] = {"population": [], "one run": []}
    with tempfile.TemporaryDirectory() as directory, progress_line() as tell:
        for number in range(config.commands):
            lines = {
                "population": ["experiments.population", module, *members],
                "one run": [module, *config.arguments, "--seed", str(number % config.members)],
            }
            for name, line in lines.items():
                tell(f"command lines: {name} {number + 1}/{config.commands}")
                place = ["--training.run-dir", f"{directory}/{name.replace(' ', '_')}-{number}"]
                begin = time.perf_counter()
                done = subprocess.run([sys.executable, "-m", *line, *training, *place], capture_output=True, text=True)
                seconds[name].append(time.perf_counter() - begin)
                if done.returncode:
                    raise InputError(f"python -m {shlex.join(line)} failed: {done.stderr.strip()}")
    ratios = [
        config.members * statistics.median(seconds["one run"]) / population for population in seconds["population"]
    ]
    return {"seconds": seconds, "ratio": spread(ratios)}


def main(config: Config) -> None:
    """Measure, print and write."""
    directory = made(config.output_dir)
    figures = measure(config)
    if config.commands:
        figures["commands"] = time_commands(config)
    print(f"{machine_line(figures['machine'])}; threads {config.threads}; learning on {figures['device']}")
    for name, speed in figures["updates_per_second"].items():
        print(f"  {name:<20} {speed['median']:>8.2f} updates per second of {config.members} members together")
    ratio = figures["ratio"]
    print(f"  ratio of neighbouring blocks: {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})")
    if commands := figures.get("commands"):
        for name, seconds in commands["seconds"].items():
            print(f"  {name:<20} {statistics.median(seconds):>8.1f} s from start to exit")
        ratio = commands["ratio"]
        print(f"  {config.members} runs take {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}) as long")
    where = "" if figures["device"] == "cpu" else "_cuda"
    path = directory / f"population_{config.experiment}{where}.json"
    write_json(path, figures)
    print(f"  written: {path}")


if __name__ == "__main__":
    from experiments.cli import command

    command(Config, main)
