"""What the memory of a replay buffer comes to, told before it is taken and refused where there is less."""

import os

import torch

from algos.sac import SACConfig, empty_replay
from rlcore.checkpoint import tree_bytes
from rlcore.env import Env
from rlcore.errors import InputError


def replay_note(env: Env, config: SACConfig) -> str:
    """A line for a person: how much memory the replay buffer takes.

    Raises:
      InputError: if the machine, or the GPU that new tensors are put on, has not that much.
    """
    with torch.device("meta"):
        size = tree_bytes(empty_replay(env, config))
    device = torch.get_default_device()
    if device.type == "cuda":
        available = torch.cuda.get_device_properties(device).total_memory
    else:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > available:
        raise InputError(
            f"replay_steps must fit into memory, got {config.replay_steps}: with {config.num_envs} environments that "
            f"is {_gib(size)}, of {_gib(available)} in all (--sac.replay-steps)"
        )
    what = f"{config.replay_steps} steps of {config.num_envs} environments"
    return f"replay buffer: {what}, {_gib(size)} of memory, and of disk in each checkpoint"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
