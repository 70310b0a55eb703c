"""Train on Gymnasium's Walker2d, Ant or Humanoid (version 5) with PPO: returns compare with published ones."""

from dataclasses import dataclass, field

from algos.ppo import PPOConfig, make_ppo
from experiments.cli import run
from experiments.gym_robots import GymConfig, build_gym
from experiments.search_space import PPO_SEARCH
from rlcore.experiment import Experiment, TrainingConfig


@dataclass(frozen=True)
class Config(GymConfig):
    """Learn to walk with one of Gymnasium's robots, whose models come with: pip install rlcore[robots]."""

    ppo: PPOConfig = field(
        default_factory=lambda: PPOConfig(num_envs=128, num_steps=32, num_epochs=8, max_gradient_norm=0.5)
    )
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(iterations=500))


SEARCH = PPO_SEARCH


def build(config: Config) -> Experiment:
    """The environment and the learner that a configuration describes."""
    return build_gym(config, lambda env: make_ppo(env, config.ppo))


if __name__ == "__main__":
    run(Config, build)
