"""What every test runs under: checked shapes, a headless renderer, few threads, and keys."""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

from tests import typecheck

# Before anything imports the packages: shapes and types in annotations are checked at each call. In the test
# run only, since torch.compile cannot trace through the check: test compiled code with `run_python`.
install_import_hook(["rlcore", "tasks", "algos"], f"{typecheck.__name__}.typecheck")

ROOT = Path(__file__).resolve().parent.parent

if sys.platform == "linux" and not os.environ.get("DISPLAY"):
    os.environ.setdefault("MUJOCO_GL", "egl")

# More threads than this only get in the way of tensors as small as the tests' own, and of other workers.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU; torch.cuda finds none"))


@pytest.fixture
def key() -> Callable[[], torch.Tensor]:
    """A source of random keys: every call hands out another one, and every run of a test the same ones."""
    from rlcore import random

    seeds: Iterator[int] = itertools.count()
    return lambda: random.key(next(seeds))


@pytest.fixture
def run_python() -> Callable[..., str]:
    """Run Python source in a process of its own, without the checks on annotations; returns what it printed.

    If that process fails, the test does, and shows what was written to the standard error.
    """

    def run(source: str, *, timeout: float = 300.0) -> str:
        result = subprocess.run(
            [sys.executable, "-c", source],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if result.returncode != 0:
            pytest.fail(f"exit code {result.returncode}\n{result.stderr}")
        return result.stdout

    return run
