"""What every benchmark writes beside its figures: the machine, the command, and the files themselves."""

import importlib.metadata
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlcore.errors import InputError

RESULTS = Path("benchmarks/results")


def machine() -> dict[str, Any]:
    """The processor, the cores that this process may use, and the versions of what computes."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "mujoco", "numpy")},
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def header(module: str) -> dict[str, Any]:
    """Where the figures of a benchmark come from; `module` is its name for `python -m`."""
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine(),
    }


def machine_line(described: Mapping[str, Any]) -> str:
    """The machine in one line, for the top of a table."""
    versions = ", ".join(f"{name} {described[name]}" for name in ("python", "torch", "mujoco"))
    return f"{described['cpu']}, {described['cores']} cores, {versions}"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest of what blocks gave."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def made(directory: Path) -> Path:
    """`directory`, made if it is missing, once it is sure that files can be written there.

    Raises:
      InputError: if it cannot be made or refuses files.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise InputError(
            f"output_dir {directory} cannot be written: {error.strerror or error} (--output-dir)"
        ) from error
    return directory
