"""Train a cartpole to stay upright with PPO: a first run that takes seconds."""

from dataclasses import dataclass, field

from algos.ppo import PPOConfig, make_ppo
from experiments.cli import run
from experiments.recording import filmed, recorded_faults
from experiments.search_space import PPO_SEARCH
from experiments.simulation import SimulationConfig
from rlcore.env import auto_reset, reweighted, scale_actions
from rlcore.experiment import Experiment, TrainingConfig
from tasks.cartpole import make_cartpole


@dataclass(frozen=True)
class Config(SimulationConfig):
    """Learn to balance a pole on a cart (an episode is 10 s; the best return is close to 500)."""

    seed: int = 0
    """Seed of every random number of the run."""
    episode_seconds: float = 10.0
    """Length of an episode."""
    ppo: PPOConfig = field(
        default_factory=lambda: PPOConfig(
            num_envs=64,
            num_steps=32,
            num_epochs=8,
            learning_rate=1e-3,
            policy_layers=(64, 64),
            value_layers=(64, 64),
            activation="tanh",
        )
    )
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(iterations=60, checkpoint_every=20))


SEARCH = PPO_SEARCH


def build(config: Config) -> Experiment:
    """The environment and the learner that a configuration describes."""
    task = make_cartpole(config.num_threads, config.episode_seconds, config.engine)
    env = scale_actions(reweighted(task, config.reward_weights))
    algorithm = make_ppo(auto_reset(env), config.ppo)
    return Experiment(env, env, algorithm, filmed(env, algorithm), recorded_faults)


if __name__ == "__main__":
    run(Config, build)
