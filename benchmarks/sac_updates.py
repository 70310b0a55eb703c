"""Gradient steps per second of SAC, beside Stable-Baselines3's SAC with the same networks and batches.

Both learn from full buffers of the same sizes, with the same hyperparameters: hidden layers of 256 and 256 with ReLU,
batches of 256, one policy step for each critic step, a learned entropy coefficient, no normalization. They take turns,
block by block in one process, and a ratio is that of two neighbouring blocks: a machine that slows down slows both. On
our side a block also contains the step of the environment that an update begins with.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from algos.sac import SACConfig, make_sac
from benchmarks.report import RESULTS, header, machine_line, made, spread
from rlcore import random, tree
from rlcore.env import Env, auto_reset, scale_actions
from rlcore.errors import InputError
from rlcore.metrics import write_json
from rlcore.physics.engines import check_available, device_of
from tasks.humanoid.balance import make_humanoid_balance

# Our update is recorded, and on a GPU captured after two calls more, before it is timed.
_BURN_IN_UPDATES = 4
# Steps of experience in the buffers, and the robots whose they are on our side.
_STORED, _ROBOTS = 80_000, 8


@dataclass(frozen=True)
class Config:
    """Measure SAC's gradient steps per second beside Stable-Baselines3's, on the humanoid's observations and actions.

    Prints a line for each and writes sac_updates_DEVICE.json. It needs Stable-Baselines3: make setup
    EXTRAS=dev,peers. Nothing else should run on the machine meanwhile.

    Examples:
      python -m benchmarks.sac_updates
      python -m benchmarks.sac_updates --physics warp
    """

    physics: Literal["mujoco", "warp"] = "mujoco"
    """What simulates, and so where both learn: mujoco on CPUs, warp on an NVIDIA GPU."""
    threads: int = 1
    """Threads of torch, for both."""
    batch_size: int = 256
    """Steps of experience in a gradient step."""
    layers: tuple[int, ...] = (256, 256)
    """Hidden layers of policy and critics."""
    updates: int = 100
    """Gradient steps in a block."""
    blocks: int = 9
    """Blocks of each, of which medians are taken."""
    output_dir: Path = RESULTS
    """Where the file goes."""

    def __post_init__(self) -> None:
        for name in ("threads", "batch_size", "updates", "blocks"):
            if getattr(self, name) < 1:
                flag = f"--{name.replace('_', '-')}"
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)} ({flag})")


def ours(env: Env, config: Config) -> Callable[[], None]:
    """A function that makes a block's gradient steps on a buffer with experience in it."""
    settings = SACConfig(
        num_envs=_ROBOTS,
        num_steps=1,
        num_updates=config.updates,
        batch_size=config.batch_size,
        prefill=16,
        replay_steps=_STORED // _ROBOTS,
        normalize_observations=False,
        policy_layers=config.layers,
        value_layers=config.layers,
    )
    algorithm = make_sac(env, settings)
    state = algorithm.init(random.key(0))
    full = {
        name: tree.map_leaves(lambda x: torch.rand_like(x) - 0.5, getattr(state.replay, name))
        for name in ("obs", "action", "reward")
    }
    steps = torch.tensor(settings.replay_steps)
    state = tree.replace(state, replay=tree.replace(state.replay, **full, num_steps=steps))

    def block() -> None:
        nonlocal state
        state, _ = algorithm.update(state)

    for _ in range(_BURN_IN_UPDATES):
        block()
    return block


def stable_baselines(env: Env, config: Config) -> Callable[[], None]:
    """The same for Stable-Baselines3, on an environment of the same sizes whose observations are random numbers."""
    import gymnasium
    import numpy as np
    from stable_baselines3 import SAC

    size, actions = env.spec.observation_size("policy"), env.spec.action_size

    class Noise(gymnasium.Env[Any, Any]):
        observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        action_space = gymnasium.spaces.Box(-1.0, 1.0, (actions,), np.float32)

        def reset(self, **kwargs: Any) -> Any:
            return np.random.default_rng(0).standard_normal(size, np.float32), {}

        def step(self, action: Any) -> Any:
            return np.random.default_rng(1).standard_normal(size, np.float32), 1.0, False, False, {}

    sizes = {"pi": list(config.layers), "qf": list(config.layers)}
    agent = SAC(
        "MlpPolicy",
        Noise(),
        learning_starts=_STORED,
        buffer_size=_STORED,
        device=str(device_of(config.physics)),
        policy_kwargs={"net_arch": sizes},
    )
    agent.learn(_STORED)

    def block() -> None:
        agent.train(gradient_steps=config.updates, batch_size=config.batch_size)

    block()
    return block


def measure(config: Config) -> dict[str, Any]:
    """The figures: gradient steps per second of both, and the ratio of neighbouring blocks."""
    torch.set_num_threads(config.threads)
    env = auto_reset(scale_actions(make_humanoid_balance(config.threads, physics=config.physics)))
    sides = {"rlcore": ours(env, config), "stable_baselines3": stable_baselines(env, config)}
    on_gpu = device_of(config.physics).type == "cuda"
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(config.blocks):
        for name, block in sides.items():
            if on_gpu:
                torch.cuda.synchronize()
            begin = time.perf_counter()
            block()
            if on_gpu:
                torch.cuda.synchronize()
            speeds[name].append(config.updates / (time.perf_counter() - begin))
    ratios = [a / b for a, b in zip(*speeds.values(), strict=True)]
    return {
        **header("benchmarks.sac_updates"),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "threads": config.threads,
        "batch_size": config.batch_size,
        "layers": list(config.layers),
        "updates_per_second": {name: {"median": statistics.median(x), "blocks": x} for name, x in speeds.items()},
        "ratio": spread(ratios),
    }


def main(config: Config) -> None:
    """Measure, print and write."""
    try:
        import stable_baselines3  # noqa: F401
    except ImportError as error:
        raise InputError("Stable-Baselines3 is missing; install it: make setup EXTRAS=dev,peers") from error
    check_available(config.physics)
    directory = made(config.output_dir)
    torch.set_default_device(device_of(config.physics))
    figures = measure(config)
    print(machine_line(figures["machine"]) + f"; learning on {figures['device']}, threads {config.threads}")
    for name, speed in figures["updates_per_second"].items():
        print(f"  {name:<18} {speed['median']:>8.1f} gradient steps per second")
    ratio = figures["ratio"]
    print(f"  ratio of neighbouring blocks: {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})")
    kind = device_of(config.physics).type
    write_json(directory / f"sac_updates_{kind}.json", figures)
    print(f"  written: {directory / f'sac_updates_{kind}.json'}")


if __name__ == "__main__":
    from experiments.cli import command

    command(Config, main)
