"""Ranges of settings to search, as an experiment declares them beside its dataclass and `experiments.sweep` reads them.

SEARCH = {"ppo.learning_rate": Between(1e-5, 1e-2, log=True), "ppo.num_steps": OneOf(8, 16, 32)}
"""

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlcore.errors import InputError


@dataclass(frozen=True)
class Between:
    """Any number from `low` to `high`; a whole one where both are; evenly over the logarithm with `log`."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not -math.inf < self.low < self.high < math.inf:
            raise InputError(f"a range must go from a number to a higher one, got {self.low}..{self.high}")
        if self.log and not self.low > 0:
            raise InputError(f"a range over the logarithm must be above 0, got {self.low}..{self.high}")

    def suggest(self, trial: Any, name: str) -> list[str]:
        """The value that an Optuna trial is to try, as words of a command line."""
        if isinstance(self.low, int) and isinstance(self.high, int):
            return [str(trial.suggest_int(name, self.low, self.high, log=self.log))]
        return [repr(trial.suggest_float(name, self.low, self.high, log=self.log))]


@dataclass(frozen=True, init=False)
class OneOf:
    """One of these, each as it is typed on the command line: `OneOf(8, 16)`, `OneOf("64 64", "256 128")`."""

    options: tuple[str, ...]

    def __init__(self, *options: Any) -> None:
        if not options:
            raise InputError("there must be at least one option")
        object.__setattr__(self, "options", tuple(str(option) for option in options))

    def suggest(self, trial: Any, name: str) -> list[str]:
        """The option that an Optuna trial is to try, as words of a command line."""
        return shlex.split(trial.suggest_categorical(name, self.options))


Space = Mapping[str, Between | OneOf]

PPO_SEARCH: Space = {
    "ppo.learning_rate": Between(1e-5, 1e-1, log=True),
    "ppo.num_minibatches": OneOf(1, 2, 4, 8, 16),
    "ppo.discount": Between(0.8, 0.999),
    "ppo.entropy_coefficient": Between(1e-5, 1e-1, log=True),
}
"""What PPO's learning depends on most; minibatches are what divides a batch."""

PPO_KL_SEARCH: Space = {
    "ppo.kl_target": Between(0.002, 0.2, log=True),
    **{name: values for name, values in PPO_SEARCH.items() if name != "ppo.learning_rate"},
}
"""The same where a KL target chooses the learning rate, and so takes its place."""

SAC_SEARCH: Space = {
    "sac.policy_learning_rate": Between(1e-5, 1e-2, log=True),
    "sac.value_learning_rate": Between(1e-5, 1e-2, log=True),
    "sac.batch_size": OneOf(64, 128, 256, 512),
    "sac.discount": Between(0.9, 0.999),
    "sac.target_entropy": Between(-2.0, 0.0),
}
"""What SAC's learning depends on most."""


def read_range(text: str) -> tuple[str, Between | OneOf]:
    """A range as it is typed: `NAME LOW..HIGH`, `NAME LOW..HIGH log`, or `NAME ONE|OTHER`.

    Raises:
      InputError: for anything else.
    """
    name, _, rest = text.strip().partition(" ")
    rest = rest.strip()
    name = name.lstrip("-").replace("-", "_")
    ends, _, kind = rest.partition(" ")
    if not name or not rest:
        raise InputError(f"a range must be a name and LOW..HIGH or ONE|OTHER, got {text!r} (--space)")
    if ".." not in ends and "|" not in rest:
        raise InputError(f"a range must be a name and LOW..HIGH or ONE|OTHER, got {text!r} (--space)")
    if ".." not in ends:
        return name, OneOf(*(option.strip() for option in rest.split("|")))
    low, _, high = ends.partition("..")
    try:
        numbers = [int(x) if x.lstrip("-").isdecimal() else float(x) for x in (low, high)]
    except ValueError:
        raise InputError(f"a range must go from a number to a number, got {ends!r} (--space)") from None
    if kind not in ("", "log"):
        raise InputError(f"after a range may come log, got {kind!r} (--space)")
    return name, Between(numbers[0], numbers[1], log=kind == "log")


def flags(name: str, words: list[str]) -> list[str]:
    """The command line that gives a setting this value; a setting that is on or off is a flag of its own."""
    path = name.replace("_", "-")
    if words in (["True"], ["False"]):
        group, dot, last = path.rpartition(".")
        return [f"--{path}" if words == ["True"] else f"--{group}{dot}no-{last}"]
    return [f"--{path}", *words]
