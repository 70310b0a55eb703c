"""What experiments on Gymnasium's robots share: which robot, and how its experiment is put together."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from experiments.recording import filmed, recorded_faults
from experiments.simulation import SimulationConfig
from rlcore.env import Env, auto_reset, reweighted, scale_actions
from rlcore.experiment import Algorithm, Experiment
from tasks.gym.ant import make_gym_ant
from tasks.gym.humanoid import make_gym_humanoid
from tasks.gym.walker2d import make_gym_walker2d

TASKS = {"gym_walker2d": make_gym_walker2d, "gym_ant": make_gym_ant, "gym_humanoid": make_gym_humanoid}


@dataclass(frozen=True)
class GymConfig(SimulationConfig):
    """Learn to walk with one of Gymnasium's robots, whose models come with: pip install rlcore[robots]."""

    task: Literal["gym_walker2d", "gym_ant", "gym_humanoid"] = "gym_walker2d"
    """Which robot."""
    seed: int = 0
    """Seed of every random number of the run."""
    episode_steps: int = 1000
    """Length of an episode, control steps. Published returns are of 1000."""


def build_gym(config: GymConfig, learner: Callable[[Env], Algorithm]) -> Experiment:
    """The environment, with automatic resets and actions in [-1, 1], and what learns in it."""
    task = TASKS[config.task](config.num_threads, config.episode_steps, config.engine)
    env = scale_actions(reweighted(task, config.reward_weights))
    algorithm = learner(auto_reset(env))
    return Experiment(env, env, algorithm, filmed(env, algorithm), recorded_faults)
