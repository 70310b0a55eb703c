"""Which engine runs a model: a choice that a user makes by name."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal

import mujoco
import torch

from rlcore.errors import InputError
from rlcore.physics.isaacgym_settings import Settings, find_python
from rlcore.physics.mujoco import ModelEngine, MujocoEngine

Physics = Literal["mujoco", "warp", "isaacgym"]
PhysicsChoice = Physics | Settings
"""What simulates, as a task is told: an engine by its name, or Isaac Gym with other settings than its own."""


def make_engine(
    model: mujoco.MjModel, num_threads: int = 0, extra: Sequence[str] = (), *, physics: PhysicsChoice = "mujoco"
) -> ModelEngine:
    """The engine of that name for a model.

    Args:
      model: a compiled model; it is copied.
      num_threads: physics threads of `mujoco` and `isaacgym`; 0 takes every CPU.
      extra: fields of `mjData` to read beside the sensors, see `ModelEngine`.
      physics: `mujoco`, on CPUs; `warp`, MuJoCo Warp on an NVIDIA GPU; or `isaacgym`, Isaac Gym in a Python of its own,
        which the environment variable RLCORE_ISAACGYM_PYTHON names. Settings in place of a name are Isaac Gym's.

    Raises:
      InputError: if there is no such engine, the machine or the installation cannot run it, or it cannot run the model.
    """
    if physics == "mujoco":
        return MujocoEngine(model, num_threads, extra)
    if physics == "warp":
        check_available(physics)
        from rlcore.physics.warp import WarpEngine

        return WarpEngine(model, extra)
    if physics == "isaacgym":
        physics = Settings()
    if isinstance(physics, Settings):
        from rlcore.physics.isaacgym import IsaacGymEngine

        return IsaacGymEngine(model, physics, extra, num_threads)
    raise InputError(f"physics must be mujoco, warp or isaacgym, got {physics!r} (--physics)")


def choose(physics: Physics, isaacgym: Settings) -> PhysicsChoice:
    """An engine's name and the settings that Isaac Gym would have, as one choice."""
    return isaacgym if physics == "isaacgym" else physics


def check_available(physics: PhysicsChoice) -> None:
    """Raise InputError, saying why and what to do, if this engine cannot run here."""
    if physics == "isaacgym":
        physics = Settings()
    if isinstance(physics, Settings):
        find_python(physics)
        if physics.pipeline == "cpu":
            return
        if not torch.cuda.is_available():
            raise InputError(
                "pipeline gpu of physics isaacgym needs an NVIDIA GPU and a torch built for it, and torch finds none; "
                "pipeline cpu needs neither (--isaacgym.pipeline)"
            )
        if physics.gpu >= (count := torch.cuda.device_count()):
            raise InputError(f"gpu must be below the number of GPUs here, {count}, got {physics.gpu} (--isaacgym.gpu)")
    if physics != "warp":
        return
    missing = [name for name in ("warp", "mujoco_warp") if find_spec(name) is None]
    if missing:
        raise InputError(
            f"physics warp needs the packages mujoco-warp and warp-lang (no module {missing[0]}): "
            "pip install 'rlcore[warp]' (--physics)"
        )
    if not torch.cuda.is_available():
        raise InputError(
            "physics warp needs an NVIDIA GPU and a torch built for it, and torch finds none; mujoco runs on CPUs "
            "(--physics)"
        )


def device_of(physics: PhysicsChoice) -> torch.device:
    """Where an engine's states are, and so where whatever computes with them belongs."""
    if isinstance(physics, Settings) and physics.pipeline == "gpu":
        return torch.device("cuda", physics.gpu)
    return torch.device("cuda" if physics == "warp" else "cpu")
