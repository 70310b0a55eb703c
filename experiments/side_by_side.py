"""Train several settings of one experiment side by side on this machine: on one GPU, or on its CPUs."""

import dataclasses
import importlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from experiments.cli import command
from rlcore.errors import InputError
from rlcore.metrics import METRICS_FILE, read_metrics


@dataclass(frozen=True)
class Config:
    """Start one training for each line of a file, and wait for them.

    A line is a name, a colon and arguments of the experiment, such as

        strong_gait: --reward-weights gait 3.0 --ppo.learning-rate 3e-4

    The name * stands for all of them: its arguments come before their own. Each run is in the directory of its name,
    with what it printed beside it. Each gets its share of the CPUs as threads of physics and of learning.
    """

    experiment: Annotated[str, tyro.conf.Positional]
    """Module of the experiment, such as experiments.ppo_humanoid_velocity."""
    settings: Annotated[Path, tyro.conf.Positional]
    """File of the settings; empty lines and those that begin with # are left out."""
    output: Path
    """Directory for the runs."""
    at_once: int = 0
    """How many run at the same time; 0 starts all."""
    every: float = 30.0
    """Seconds between lines that tell how they are getting on."""

    def __post_init__(self) -> None:
        if self.at_once < 0:
            raise InputError(f"at_once must be 0 (all) or more, got {self.at_once} (--at-once)")
        if not self.every > 0:
            raise InputError(f"every must be more than 0, got {self.every} (--every)")


class Setting(NamedTuple):
    """One training: its name and its arguments."""

    name: str
    arguments: list[str]


def read_settings(path: Path) -> list[Setting]:
    """The settings in a file, each with the arguments of all in front.

    Raises:
      InputError: if the file cannot be read, has no setting, a line of another form, or a name that comes twice.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise InputError(f"settings {path} cannot be read: {error.strerror or error}") from error
    return read_lines(lines, str(path))


def read_lines(lines: Sequence[str], origin: str) -> list[Setting]:
    """The settings in lines, each with the arguments of all in front; `origin` is where they are from.

    Raises:
      InputError: if there is no setting, a line of another form, or a name that comes twice.
    """
    settings: list[Setting] = []
    common: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, colon, rest = line.partition(":")
        if not colon or not re.fullmatch(r"[A-Za-z0-9._-]+|\*", name.strip()):
            raise InputError(f"line {number} of {origin} must be a name, a colon and arguments, got {line.strip()!r}")
        try:
            arguments = shlex.split(rest)
        except ValueError as error:
            raise InputError(f"line {number} of {origin}: {error}") from error
        if name.strip() == "*":
            common += arguments
        else:
            settings.append(Setting(name.strip(), arguments))
    names = [setting.name for setting in settings]
    if not names:
        raise InputError(f"{origin} has no setting")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"settings in {origin} need different names, got more than once: {', '.join(twice)}")
    return [Setting(name, common + arguments) for name, arguments in settings]


def start(config: Config, setting: Setting, flags: Sequence[str], threads: int) -> "subprocess.Popen[bytes]":
    """Begin one training, in a process of its own; each of `flags` that it does not set gives it `threads` threads."""
    run_dir = config.output / setting.name
    line = [sys.executable, "-m", config.experiment, *setting.arguments, "--training.run-dir", str(run_dir)]
    given = {argument.partition("=")[0].replace("_", "-") for argument in setting.arguments}
    for flag in flags:
        line += [] if flag in given else [flag, str(threads)]
    return launch(line, config.output / f"{setting.name}.log", "wb")


def launch(line: Sequence[str], log: Path, mode: Literal["ab", "wb"]) -> "subprocess.Popen[bytes]":
    """Begin a training as a process that prints to a file, opened in this mode.

    It is in a session of its own: Ctrl-C reaches it once, from here, as at a second signal it would leave unsaved.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with log.open(mode) as file:
        return subprocess.Popen(line, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True)


def config_class(experiment: str) -> Any:
    """The `Config` of an experiment's module. Raises InputError if there is no such experiment."""
    try:
        return importlib.import_module(experiment).Config
    except (ImportError, AttributeError) as error:
        raise InputError(f"{experiment} is no experiment: {error}") from error


def thread_flags(experiment: str) -> list[str]:
    """The flags of an experiment that say how many threads it takes.

    Raises:
      InputError: if there is no such experiment.
    """
    config = config_class(experiment)
    own = ["--num-threads"] if any(field.name == "num_threads" for field in dataclasses.fields(config)) else []
    return ["--training.torch-threads", *own]


def progress(run_dir: Path) -> str:
    """A run's newest figures in one line."""
    records = read_metrics(run_dir / METRICS_FILE) if (run_dir / METRICS_FILE).exists() else []
    if not records:
        return "no iteration yet"
    last = records[-1]

    def told(name: str, label: str, form: str) -> str:
        value = last.get(name)
        return f"{label} -" if value is None else f"{label} {value:{form}}"

    return "  ".join(
        [
            f"iteration {last['iteration']}",
            f"{last['env_steps'] / 1e6:.2f}M steps",
            told("time/env_steps_per_second", "steps/s", ".0f"),
            told("time/elapsed_seconds", "s", ".0f"),
            told("episode/return", "return", ".4g"),
            told("episode/length", "length", ".4g"),
            told("episode/fall_rate", "falls", ".2f"),
        ]
    )


def main(config: Config) -> None:
    """Run them all; a signal to stop is handed on, so that each saves a checkpoint.

    Raises:
      InputError: if the settings cannot be read or there is no such experiment.
      SystemExit: with code 1, if a training failed.
    """
    settings = read_settings(config.settings)
    flags = thread_flags(config.experiment)
    config.output.mkdir(parents=True, exist_ok=True)
    waiting, running = list(settings), dict[str, Any]()
    at_once = min(config.at_once or len(settings), len(settings))
    threads = max(1, (os.cpu_count() or 1) // at_once)
    codes: dict[str, int] = {}

    def stop(number: int, frame: Any) -> None:
        waiting.clear()
        for process in running.values():
            process.send_signal(signal.SIGTERM)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    told = time.monotonic()
    while waiting or running:
        while waiting and len(running) < at_once:
            setting = waiting.pop(0)
            running[setting.name] = start(config, setting, flags, threads)
        time.sleep(0.5)
        for name, process in list(running.items()):
            if process.poll() is not None:
                codes[name] = running.pop(name).returncode
        if time.monotonic() - told >= config.every:
            told = time.monotonic()
            for name in running:
                print(f"{name:<20} {progress(config.output / name)}", flush=True)
    print("done:")
    for setting in settings:
        code = codes.get(setting.name)
        word = "not started" if code is None else "ok" if code == 0 else f"exit code {code}"
        print(f"{setting.name:<20} {word:<12} {progress(config.output / setting.name)}")
    failed = [name for name, code in codes.items() if code]
    if failed:
        print(f"error: trainings failed: {', '.join(failed)}; see their logs in {config.output}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    command(Config, main)
