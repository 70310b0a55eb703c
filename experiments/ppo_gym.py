"""Train on Gymnasium's Walker2d, Ant or Humanoid (version 5) with PPO: returns compare with published ones."""

from dataclasses import dataclass, field
from typing import Literal

from algos.ppo import PPOConfig, make_ppo
from experiments.cli import run
from experiments.recording import filmed, recorded_faults
from experiments.search_space import PPO_SEARCH
from rlcore.env import auto_reset, scale_actions
from rlcore.experiment import Experiment, TrainingConfig
from tasks.gym.ant import make_gym_ant
from tasks.gym.humanoid import make_gym_humanoid
from tasks.gym.walker2d import make_gym_walker2d

TASKS = {"gym_walker2d": make_gym_walker2d, "gym_ant": make_gym_ant, "gym_humanoid": make_gym_humanoid}


@dataclass(frozen=True)
class Config:
    """Learn to walk with one of Gymnasium's robots, whose models come with: pip install rlcore[robots]."""

    task: Literal["gym_walker2d", "gym_ant", "gym_humanoid"] = "gym_walker2d"
    """Which robot."""
    seed: int = 0
    """Seed of every random number of the run."""
    num_threads: int = 0
    """Physics threads; 0 takes every CPU. The result does not depend on it."""
    episode_steps: int = 1000
    """Length of an episode, control steps. Published returns are of 1000."""
    ppo: PPOConfig = field(
        default_factory=lambda: PPOConfig(num_envs=128, num_steps=32, num_epochs=8, max_gradient_norm=0.5)
    )
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(iterations=500))


SEARCH = PPO_SEARCH


def build(config: Config) -> Experiment:
    """The environment and the learner that a configuration describes."""
    env = scale_actions(TASKS[config.task](config.num_threads, config.episode_steps))
    algorithm = make_ppo(auto_reset(env), config.ppo)
    return Experiment(env, env, algorithm, filmed(env, algorithm), recorded_faults)


if __name__ == "__main__":
    run(Config, build)
