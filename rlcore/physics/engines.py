"""Which engine runs a model: a choice that a user makes by name."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal

import mujoco
import torch

from rlcore.errors import InputError
from rlcore.physics.mujoco import ModelEngine, MujocoEngine

Physics = Literal["mujoco", "warp", "isaacgym"]


def make_engine(
    model: mujoco.MjModel, num_threads: int = 0, extra: Sequence[str] = (), *, physics: Physics = "mujoco"
) -> ModelEngine:
    """The engine of that name for a model.

    Args:
      model: a compiled model; it is copied.
      num_threads: physics threads of `mujoco` and `isaacgym`; 0 takes every CPU.
      extra: fields of `mjData` to read beside the sensors, see `ModelEngine`.
      physics: `mujoco`, on CPUs; `warp`, MuJoCo Warp on an NVIDIA GPU; or `isaacgym`, Isaac Gym in a Python of its own,
        which the environment variable RLCORE_ISAACGYM_PYTHON names.

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
        from rlcore.physics.isaacgym import IsaacGymEngine, settings_from_environment

        return IsaacGymEngine(model, settings_from_environment(num_threads=num_threads), extra)
    raise InputError(f"physics must be mujoco, warp or isaacgym, got {physics!r} (--physics)")


def check_available(physics: Physics) -> None:
    """Raise InputError, saying why and what to do, if this engine cannot run here."""
    if physics == "isaacgym":
        from rlcore.physics.isaacgym import settings_from_environment

        if settings_from_environment().device.type == "cuda" and not torch.cuda.is_available():
            raise InputError(
                "pipeline gpu of physics isaacgym needs an NVIDIA GPU and a torch built for it, and torch finds none; "
                "pipeline cpu needs neither (RLCORE_ISAACGYM_PIPELINE)"
            )
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


def device_of(physics: Physics) -> torch.device:
    """Where an engine's states are, and so where whatever computes with them belongs."""
    if physics == "isaacgym":
        from rlcore.physics.isaacgym import device_from_environment

        return device_from_environment()
    return torch.device("cuda" if physics == "warp" else "cpu")
