"""Train the humanoid to walk where it is told with PPO."""

from dataclasses import dataclass, field

from algos.ppo import PPOConfig
from experiments.cli import run
from experiments.search_space import PPO_KL_SEARCH
from experiments.walking import WalkingConfig, build_walking, ppo_learner, walking_ppo
from rlcore.experiment import Experiment, TrainingConfig
from tasks.humanoid.velocity import make_humanoid_velocity
from tasks.walking import walking_symmetry


@dataclass(frozen=True)
class Config(WalkingConfig):
    """Learn to follow velocity commands: stand, walk forward, turn and vary speed, while being pushed."""

    ppo: PPOConfig = field(default_factory=lambda: walking_ppo(initial_std=0.25))
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(iterations=1900))


SEARCH = PPO_KL_SEARCH


def build(config: Config) -> Experiment:
    """The environment and the learner that a configuration describes."""
    return build_walking(config, make_humanoid_velocity, walking_symmetry, ppo_learner(config.ppo))


if __name__ == "__main__":
    run(Config, build)
