"""Train on Gymnasium's Walker2d, Ant or Humanoid (version 5) with SAC: returns compare with published ones."""

from dataclasses import dataclass, field
from functools import partial

from algos.sac import SACConfig, make_sac
from experiments.cli import run
from experiments.gym_robots import GymConfig, build_gym
from experiments.replay_memory import replay_note
from experiments.search_space import SAC_SEARCH
from rlcore.experiment import Experiment, TrainingConfig


@dataclass(frozen=True)
class Config(GymConfig):
    """Learn to walk from 300,000 steps with one of Gymnasium's robots (models: pip install rlcore[robots])."""

    sac: SACConfig = field(
        default_factory=lambda: SACConfig(
            num_envs=16,
            num_steps=2,
            num_updates=16,
            replay_steps=20_000,
            prefill=5_000,
            value_learning_rate=1e-3,
            target_rate=0.01,
            layer_norm=True,
        )
    )
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(iterations=9400, checkpoint_every=500))


SEARCH = SAC_SEARCH


def build(config: Config) -> Experiment:
    """The environment and the learner that a configuration describes."""
    experiment = build_gym(config, lambda env: make_sac(env, config.sac))
    return experiment._replace(note=partial(replay_note, experiment.env, config.sac))


if __name__ == "__main__":
    run(Config, build)
