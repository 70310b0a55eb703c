"""How Isaac Gym runs: settings that an experiment has as flags, read without importing the engine itself."""

import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlcore.errors import InputError, check_field

PYTHON_VARIABLE = "RLCORE_ISAACGYM_PYTHON"
_PREFIX = "--isaacgym."


@dataclass(frozen=True)
class Settings:
    """How Isaac Gym runs.

    Raises:
      InputError: for a value that a field cannot have.
    """

    python: str = ""
    """Interpreter that has Isaac Gym; left out, the one that the environment variable RLCORE_ISAACGYM_PYTHON names, as
    a path belongs to a machine and not to a run."""
    gpu: int = 0
    """GPU that PhysX runs on; -1 for CPUs, as many as there are physics threads."""
    pipeline: Literal["cpu", "gpu"] = "cpu"
    """Where Isaac Gym has its tensors, and so where states are and learning runs: gpu needs physics on a GPU."""
    max_gpu_contacts: int = 0
    """Contacts of all robots that PhysX has memory for on a GPU; 0 takes 64 for each shape of each robot."""
    spacing: float = 4.0
    """Distance at which robots stand beside each other, m; none touches another. In one place (0), all would be pairs
    that PhysX looks at; far off, its single precision is coarser."""
    num_position_iterations: int = 4
    """Position iterations of PhysX's solver."""
    num_velocity_iterations: int = 1
    """Velocity iterations of PhysX's solver."""
    contact_offset: float = 0.02
    """Distance at which contacts are looked for, m."""
    velocity_point: Literal["com", "origin"] = "com"
    """What Isaac Gym's linear velocities of bodies are of: com, the centre of mass, or origin, that of the body's
    frame. `python -m experiments.verify_isaacgym` measures it."""
    start_timeout: float = 600.0
    """Isaac Gym is taken to hang if it starts for longer, s."""
    step_timeout: float = 60.0
    """Isaac Gym is taken to hang if a control step takes longer, s."""

    def __post_init__(self) -> None:
        check_field(_PREFIX, self, "gpu", self.gpu >= -1, "a GPU's number, or -1 for CPUs")
        on_gpu = self.pipeline == "cpu" or self.gpu >= 0
        check_field(_PREFIX, self, "pipeline", on_gpu, f"cpu where PhysX runs on CPUs ({_PREFIX}gpu {self.gpu})")
        check_field(_PREFIX, self, "max_gpu_contacts", self.max_gpu_contacts >= 0, "0 (by rule) or more")
        check_field(_PREFIX, self, "spacing", 0.0 <= self.spacing < math.inf, "0 or more, and finite")
        for name in ("start_timeout", "step_timeout", "contact_offset"):
            check_field(_PREFIX, self, name, 0.0 < getattr(self, name) < math.inf, "more than 0 and finite")
        check_field(_PREFIX, self, "num_position_iterations", self.num_position_iterations >= 1, "at least 1")
        check_field(_PREFIX, self, "num_velocity_iterations", self.num_velocity_iterations >= 0, "at least 0")


def find_python(settings: Settings, environment: Mapping[str, str] = os.environ) -> str:
    """The absolute path of the interpreter that has Isaac Gym.

    Args:
      settings: may name it.
      environment: names it in the variable RLCORE_ISAACGYM_PYTHON otherwise.

    Raises:
      InputError: if none is named, or what is named is no program.
    """
    named = settings.python or environment.get(PYTHON_VARIABLE, "")
    if not named:
        raise InputError(
            "physics isaacgym runs in a Python of its own: name the interpreter that has Isaac Gym, as in "
            f"docs/isaacgym.md ({_PREFIX}python, or the environment variable {PYTHON_VARIABLE})"
        )
    found = shutil.which(named)
    if found is None:
        path = Path(named)
        why = "is a directory" if path.is_dir() else "may not be executed" if path.exists() else "is no program here"
        given = f"{_PREFIX}python" if settings.python else PYTHON_VARIABLE
        raise InputError(f"{given} must name an interpreter, but {named!r} {why} (--physics isaacgym)")
    # The server starts in another working directory; links stay, since a virtual environment is found by its own.
    return os.path.abspath(found)
