"""Mistakes in what the user gave, told apart from faults of the program."""

from collections.abc import Collection
from difflib import get_close_matches
from typing import Any


class InputError(ValueError):
    """A value from outside that cannot work.

    Its message is one line that names the field, the value and what would be valid. Command line programs
    print it and leave with exit code 2; no work has begun when it is raised.
    """


class EngineFailed(RuntimeError):
    """A simulator that works in another process, or with memory of its own, cannot go on. Its message is one line."""


def did_you_mean(name: str, known: Collection[str]) -> str:
    """Of names that are known those near this one, as the end of a message; empty if there are none."""
    near = get_close_matches(name, known, 3, 0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def check_field(prefix: str, config: Any, name: str, valid: bool, what: str) -> None:
    """Raise InputError unless the field `name` of `config` is `valid`; `prefix` is that of its flag, as `--ppo.`."""
    if not valid:
        raise InputError(f"{name} must be {what}, got {getattr(config, name)} ({prefix}{name.replace('_', '-')})")
