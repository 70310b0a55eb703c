"""An interpreter that finds the stand-in for Isaac Gym where it would find the real one."""

import atexit
import functools
import os
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

STANDIN = Path(__file__).resolve().parents[2] / "isaacgym_standin"


def program() -> str:
    """The Python that runs the stand-in.

    The environment variable RLCORE_STANDIN_PYTHON names another than this one, such as a Python 3.8 with mujoco, torch
    and numpy.
    """
    return os.environ.get("RLCORE_STANDIN_PYTHON", sys.executable)


@functools.cache
def interpreter() -> str:
    """Path of a program that is that Python with the stand-in installed, on one thread."""
    folder = tempfile.mkdtemp(prefix="rlcore-standin-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder, "python")
    environment = f"OMP_NUM_THREADS=1 PYTHONPATH={shlex.quote(str(STANDIN))}${{PYTHONPATH:+:$PYTHONPATH}}"
    path.write_text(f'#!/bin/sh\n{environment} exec {shlex.quote(program())} "$@"\n')
    path.chmod(0o755)
    return str(path)
