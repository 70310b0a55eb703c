"""The directory of a run: who may write into it, and what says which run it is.

    config.json          the experiment, its full configuration, versions of what ran it
    metrics.jsonl        one line an iteration
    tensorboard/         the same for TensorBoard
    checkpoints/         the newest few and the best
    faults/              what environments looked like when they went wrong
    learning_curves.png  video.mp4

A population has its members' directories besides, members.png, and best, a link to the best one.

An existing run is never overwritten: a new run needs a new directory, and a resume says so.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlcore.errors import InputError
from rlcore.metrics import write_atomically

CONFIG_FILE = "config.json"
CHECKPOINTS = "checkpoints"
FAULTS = "faults"
FORMAT = 1

_MOST_FAULTS = 200
_MOST_NAMED = 5
_PACKAGES = ("rlcore", "torch", "mujoco", "mujoco-warp", "numpy", "orbax-checkpoint")


class RunRecord(NamedTuple):
    """What a run is: enough to build it again."""

    experiment: str
    """Short name, such as `g1_walk`."""
    module: str
    """Module with `Config` and `build`, such as `experiments.g1_walk`."""
    file: str | None
    """Its file, for a module that cannot be imported by name."""
    command: str
    """How to run it: `python -m experiments.g1_walk`."""
    seed: int
    config: Mapping[str, Any]
    """The configuration as JSON values."""


class HoldsRuns(InputError):
    """A folder in which there are runs, given in place of one of them.

    Attributes:
      path: the folder.
      newest: the run in it that was begun last.
    """

    def __init__(self, path: Path, runs: Sequence[Path]) -> None:
        names = [str(run.relative_to(path)) for run in runs]
        earlier = f"{len(names) - _MOST_NAMED} earlier ones, " if len(names) > _MOST_NAMED else ""
        count = "1 run" if len(names) == 1 else f"{len(names)} runs"
        super().__init__(
            f"{path} is not a run but holds {count}, newest last: {earlier}{', '.join(names[-_MOST_NAMED:])}"
        )
        self.path, self.newest = path, runs[-1]


@contextlib.contextmanager
def claimed(path: Path, resuming: bool) -> Iterator[None]:
    """Own a run's directory: make it if it is new, and keep other processes out until the end.

    If the block raises before anything was written, the directories made here are removed again.

    Raises:
      InputError: if a new run's directory is not empty, cannot be made or written, or is in use.
    """
    made: list[Path] = []
    descriptor = None
    try:
        descriptor = _claim(path, resuming, made)
        yield
    except BaseException:
        for directory in reversed(made):
            with contextlib.suppress(OSError):
                directory.rmdir()
        raise
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _claim(path: Path, resuming: bool, made: list[Path]) -> int:
    """Make and lock `path`, and return the lock's descriptor; `made` gets the directories made."""
    flag = "--training.resume" if resuming else "--training.run-dir"
    try:
        if not resuming and path.is_dir() and any(path.iterdir()):
            raise InputError(
                f"run_dir must be new or empty, but {path} has content ({flag}); "
                f"to go on with that run: --training.resume {path}"
            )
        for directory in reversed((path, *path.parents)):
            if not directory.is_dir():
                directory.mkdir()
                made.append(directory)
        probe = path / ".probe"
        try:
            probe.write_bytes(bytes(4096))
        finally:
            probe.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"run_dir {path} cannot be written: {error.strerror or error} ({flag})") from error
    try:
        _lock(descriptor)
    except BlockingIOError as error:
        os.close(descriptor)
        raise InputError(f"run_dir {path} is in use by another process ({flag})") from error
    return descriptor


def _lock(descriptor: int) -> None:
    """Lock a directory while the descriptor is open: the system unlocks it even if the process is killed."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return  # Some network file systems have no locks.


def default_run_dir(record: RunRecord) -> Path:
    """`runs/EXPERIMENT/TIME-seedN`, in UTC; a number follows if that is taken."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    path = Path("runs") / record.experiment / f"{stamp}-seed{record.seed}"
    number = 1
    while path.exists():
        number += 1
        path = path.with_name(f"{stamp}-seed{record.seed}-{number}")
    return path


def check_space(path: Path, needed: int) -> None:
    """Raise InputError unless `needed` bytes are free on the file system of the existing directory `path`."""
    free = shutil.disk_usage(path).free
    if free < needed:
        raise InputError(
            f"run_dir {path} needs about {needed / 1e6:.0f} MB for checkpoints, but {free / 1e6:.0f} MB are "
            "free (--training.run-dir, or a smaller --training.keep-last)"
        )


def write_record(path: Path, record: RunRecord, torch_threads: int, resumed_at: int | None = None) -> list[str]:
    """Write `config.json`; on a resume, note it there and return a line for each change that may change bits.

    Args:
      path: the run's directory.
      record: what the run is.
      torch_threads: on how many threads torch learns.
      resumed_at: the iteration that a resume goes on from.
    """
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    content: dict[str, Any] = {"format": FORMAT, **record._asdict(), "versions": versions}
    content |= {"torch_threads": torch_threads, "platform": platform.platform(), "created": now, "resumed": []}
    changes = []
    if resumed_at is not None:
        old = read_record(path)
        changes = [
            f"{name} was {version} when this run was saved and is {versions.get(name, 'absent')} now"
            for name, version in old["versions"].items()
            if versions.get(name) != version
        ]
        # Runs from before it was written down do not say.
        if (threads := old.get("torch_threads", torch_threads)) != torch_threads:
            changes.append(
                f"torch learned on {threads} threads when this run was saved and does on {torch_threads} now "
                "(--training.torch-threads)"
            )
        content["created"] = old["created"]
        content["resumed"] = [*old["resumed"], {"iteration": resumed_at, "time": now}]
    write_atomically(path / CONFIG_FILE, json.dumps(content, indent=2) + "\n")
    return changes


def read_record(path: Path) -> dict[str, Any]:
    """The content of a run's `config.json`.

    Raises:
      HoldsRuns: if `path` is a folder of runs.
      InputError: if it is not the directory of a run either.
    """
    file = path / CONFIG_FILE
    try:
        content = json.loads(file.read_text())
    except OSError as error:
        if not file.exists() and (runs := runs_inside(path)):
            raise HoldsRuns(path, runs) from error
        raise InputError(f"{path} is not a run: {file} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"{path} is not a run: {file} is not JSON ({str(error).splitlines()[0]})") from error
    needed = (*RunRecord._fields, "format", "versions", "created", "resumed")
    missing = [name for name in needed if not isinstance(content, dict) or name not in content]
    if missing:
        raise InputError(f"{path} is not a run: {file} lacks {', '.join(missing)}")
    kinds = {"experiment": str, "module": str, "command": str, "config": dict, "versions": dict, "resumed": list}
    for name, kind in kinds.items():
        if not isinstance(content[name], kind):
            raise InputError(f"{path} is not a run: {name} in {file} must be a {kind.__name__}, got {content[name]!r}")
    if content["format"] != FORMAT:
        raise InputError(f"{file} has format {content['format']}, this rlcore reads {FORMAT}")
    return content


BEST = "best"
"""In a population's directory, a link to the directory of its best member."""


def runs_inside(path: Path) -> list[Path]:
    """The runs in a folder and in the folders in it, links left out, the one that was begun last at the end."""
    found = []
    for pattern in ("*", "*/*"):
        for file in path.glob(f"{pattern}/{CONFIG_FILE}"):
            if file.parent.is_symlink():
                continue
            with contextlib.suppress(InputError):
                found.append((str(read_record(file.parent)["created"]), file.parent))
    return [run for _, run in sorted(found)]


def write_faults(path: Path, iteration: int, faults: Iterable[tuple[str, Mapping[str, Any]]]) -> list[Path]:
    """Write each fault's arrays to `faults/ITERATION-NAME.npz`, up to 200 in a run; returns the new files."""
    written = []
    directory = path / FAULTS
    for name, arrays in faults:
        directory.mkdir(exist_ok=True)
        if sum(1 for _ in directory.iterdir()) >= _MOST_FAULTS:
            break
        number, stem = 0, f"{iteration:06d}-{name}"
        while (file := directory / f"{stem}-{number}.npz").exists():
            number += 1
        temporary = file.with_suffix(".tmp")
        with temporary.open("wb") as stream:
            # Arrays may be tensors on any device.
            np.savez(stream, **{k: v.cpu().numpy() if hasattr(v, "cpu") else v for k, v in arrays.items()})
        temporary.replace(file)
        written.append(file)
    return written
