"""Imports go one way, and what is slow to import is imported where it is used."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

PACKAGES = {"rlcore", "tasks", "algos", "experiments", "benchmarks", "tests"}

# Which of the packages each may import, beside itself.
ALLOWED = {
    "rlcore": set(),
    "tasks": {"rlcore"},
    "algos": {"rlcore"},
    "experiments": PACKAGES - {"tests"},
    "benchmarks": PACKAGES - {"tests"},
    "tests": PACKAGES,
}

# Seconds to import, or needed by few: a program that does not use one should not wait for it.
HEAVY = {
    "gymnasium",
    "imageio",
    "imageio_ffmpeg",
    "jax",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "orbax",
    "tensorboardX",
}
LIGHT_PACKAGES = {"rlcore", "tasks", "algos", "experiments"}

# Names that say nothing about what a module holds.
EMPTY_WORDS = {"util", "utils", "helper", "helpers", "misc", "manager", "managers"}


def imported_modules(node: ast.AST, package: str) -> list[str]:
    """The absolute names of the modules that one statement or call imports, in a module of `package`."""
    match node:
        case ast.Import():
            return [alias.name for alias in node.names]
        case ast.ImportFrom(level=0):
            return [node.module or ""]
        case ast.ImportFrom():
            parents = package.split(".")
            above = parents[: len(parents) - node.level + 1]
            # `from .. import tasks` may name a module, so the names count too.
            return [".".join([*above, *filter(None, [node.module]), alias.name]) for alias in node.names]
        case ast.Call(
            func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
            args=[ast.Constant(value=str(name)), *_],
        ):
            return [name]
    return []


def runs_at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that are executed when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                continue
            case ast.If(test=ast.Name(id="TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
                for statement in node.orelse:
                    yield statement
                    yield from runs_at_import(statement)
            case _:
                yield node
                yield from runs_at_import(node)


def violations(path: str, source: str) -> list[str]:
    """What a module at `path`, relative to the repository root, does against the rules: one line each."""
    parts = Path(path).with_suffix("").parts
    top, package = parts[0], ".".join(parts[:-1])
    tree = ast.parse(source, path)
    found = []
    for word in {word for part in parts for word in part.split("_")} & EMPTY_WORDS:
        found.append(f"{path}: '{word}' in a name does not say what the module holds")
    for node in ast.walk(tree):
        for module in imported_modules(node, package):
            target = module.split(".")[0]
            if target in PACKAGES - ALLOWED[top] - {top}:
                found.append(f"{path}:{node.lineno}: {top} must not import {target}")  # type: ignore[attr-defined]
    if top in LIGHT_PACKAGES:
        for node in runs_at_import(tree):
            for module in imported_modules(node, package):
                if module.split(".")[0] in HEAVY:
                    line = node.lineno  # type: ignore[attr-defined]
                    found.append(f"{path}:{line}: import {module} in the function that uses it")
    return found


def test_every_module_keeps_the_rules() -> None:
    paths = [path for package in sorted(PACKAGES) for path in sorted((ROOT / package).rglob("*.py"))]
    assert {path.relative_to(ROOT).parts[0] for path in paths} == PACKAGES
    found = []
    for path in paths:
        found += violations(str(path.relative_to(ROOT)), path.read_text())
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("rlcore/env.py", "import tasks"),
        ("rlcore/env.py", "from tasks.humanoid import walk"),
        ("rlcore/env.py", "def f():\n    from algos import ppo"),
        ("rlcore/env.py", "import importlib\nimportlib.import_module('tasks.humanoid')"),
        ("tasks/humanoid/walk.py", "from algos import ppo"),
        ("tasks/humanoid/walk.py", "from experiments import play"),
        ("algos/ppo.py", "import rlcore.env, tasks.ant"),
        ("experiments/play.py", "import tests.conftest"),
        ("rlcore/video.py", "import imageio_ffmpeg"),
        ("rlcore/metrics.py", "try:\n    import matplotlib.pyplot\nexcept ImportError:\n    pass"),
        ("rlcore/checkpoint.py", "class Store:\n    from orbax import checkpoint"),
        ("experiments/side_by_side.py", "if __name__:\n    import jax.numpy as jnp"),
        ("rlcore/utils.py", ""),
        ("tests/rlcore/test_misc.py", ""),
        ("tasks/state_manager/walk.py", ""),
    ],
)
def test_a_module_that_breaks_a_rule_is_found(path: str, source: str) -> None:
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("rlcore/env.py", "import torch\nfrom rlcore import tree\nfrom . import random"),
        ("rlcore/physics/warp.py", "from .. import tree"),
        ("rlcore/checkpoint.py", "def save():\n    import orbax.checkpoint"),
        ("rlcore/checkpoint.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import orbax"),
        ("tasks/humanoid/walk.py", "from rlcore import rewards\nfrom tasks.humanoid import robot"),
        ("experiments/play.py", "from algos import ppo\nfrom tasks import humanoid"),
        ("benchmarks/peers.py", "import gymnasium"),
        ("tests/rlcore/test_random.py", "import jax\nfrom tests import typecheck"),
        ("rlcore/rewards.py", "tasks = ['a']\nmatplotlib = 'a name, not an import'"),
    ],
)
def test_a_module_that_keeps_the_rules_passes(path: str, source: str) -> None:
    assert violations(path, source) == []
