"""A tiny experiment for tests of what surrounds one: linear regression on data drawn from a key."""

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from experiments.cli import run
from rlcore import random
from rlcore.errors import InputError
from rlcore.experiment import Algorithm, Experiment, TrainingConfig
from rlcore.tree import pytree


@dataclass(frozen=True)
class Data:
    """Where the numbers come from."""

    batch: int = 16
    """Rows a step."""
    noise: tuple[float, float] = (0.0, 0.1)
    """Smallest and largest noise."""


@dataclass(frozen=True)
class Config:
    """Learn a line from noisy points.

    A few milliseconds of work.
    """

    seed: int = 0
    """Of all randomness."""
    learning_rate: float = 0.1
    """Step size."""
    data: Data = Data()
    pause: float = 0.0
    """Seconds that an update sleeps."""
    nan_at: int | None = None
    """Iteration whose gradient step is not a number."""
    labels: dict[str, float] = field(default_factory=dict)
    """A table, which changes nothing."""
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(iterations=20, checkpoint_every=5))

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise InputError(f"learning_rate must be more than 0, got {self.learning_rate} (--learning-rate)")


@pytree
class TrainState:
    params: dict[str, Tensor]
    momentum: dict[str, Tensor]
    mean: Tensor
    seen: Tensor
    key: Tensor
    iteration: Tensor
    env_steps: Tensor


def build(config: Config) -> Experiment:
    def init(key: Tensor) -> TrainState:
        params = {"weight": random.normal(key, (3,)), "bias": torch.zeros(())}
        zero = torch.zeros((), dtype=torch.int64)
        return TrainState(
            params=params,
            momentum={name: torch.zeros_like(p) for name, p in params.items()},
            mean=torch.zeros((), dtype=torch.float64),
            seen=torch.zeros(3, dtype=torch.bool),
            key=random.fold_in(key, 1),
            iteration=zero,
            env_steps=zero,
        )

    def update(state: TrainState) -> tuple[TrainState, dict[str, Tensor]]:
        time.sleep(config.pause)
        key, carry = random.split(state.key)
        x = random.normal(key, (config.data.batch, 3))
        y = x @ torch.tensor([1.0, -2.0, 0.5]) + 0.3

        def loss_of(params: dict[str, Tensor]) -> Tensor:
            return (x @ params["weight"] + params["bias"] - y).square().mean()

        gradient, loss = torch.func.grad_and_value(loss_of)(state.params)
        iteration = state.iteration + 1
        bad = iteration == (config.nan_at if config.nan_at is not None else -1)
        momentum = {n: 0.5 * m + gradient[n] for n, m in state.momentum.items()}
        step = torch.where(bad, torch.nan, config.learning_rate)
        new = dataclasses.replace(
            state,
            params={n: p - step * momentum[n] for n, p in state.params.items()},
            momentum=momentum,
            mean=state.mean + loss.double(),
            seen=state.seen | (x[0] > 0),
            key=carry,
            iteration=iteration,
            env_steps=state.env_steps + config.data.batch,
        )
        metrics = {
            "episode/return": torch.where(iteration == 1, torch.nan, -loss),
            "episode/length": torch.tensor(100.0),
            "episode/fall_rate": loss / (1 + loss),
            "loss/value": loss,
            "loss/policy": -loss,
            "policy/entropy": loss,
        }
        return new, metrics

    def act(state: TrainState, obs: Tensor, key: Tensor | None) -> Tensor:
        return obs @ state.params["weight"] + state.params["bias"]

    def render(state: TrainState, path: Path) -> None:
        path.write_bytes(b"a film")

    return Experiment(None, None, Algorithm(init, update, act), render=render)


if __name__ == "__main__":
    run(Config, build)
