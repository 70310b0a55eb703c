"""Train the humanoid to keep its balance under pushes with PPO: minutes on two CPU cores."""

from dataclasses import dataclass, field

from algos.ppo import PPOConfig, make_ppo
from experiments.cli import run
from experiments.recording import filmed, recorded_faults
from experiments.search_space import PPO_KL_SEARCH
from experiments.simulation import SimulationConfig
from rlcore.env import auto_reset, reweighted
from rlcore.experiment import Experiment, TrainingConfig
from tasks.humanoid.balance import make_humanoid_balance
from tasks.humanoid.symmetry import balance_symmetry


@dataclass(frozen=True)
class Config(SimulationConfig):
    """Learn to stay on both feet from random postures, while being pushed, for 20 s."""

    seed: int = 0
    """Seed of every random number of the run."""
    push_speed: float = 0.5
    """Largest change of the pelvis's velocity by a push, m/s."""
    push_interval: float = 2.0
    """Mean time between pushes, s."""
    episode_seconds: float = 20.0
    """Length of an episode."""
    ppo: PPOConfig = field(
        default_factory=lambda: PPOConfig(
            num_envs=256,
            num_steps=16,
            learning_rate=1e-3,
            kl_target=0.04,
            initial_std=0.4,
            policy_average=0.97,
            policy_layers=(128, 128),
            value_layers=(128, 128),
        )
    )
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(iterations=860))


SEARCH = PPO_KL_SEARCH


def build(config: Config) -> Experiment:
    """The environment and the learner that a configuration describes."""
    settings = (config.num_threads, config.episode_seconds, config.push_interval, config.push_speed)
    env = reweighted(make_humanoid_balance(*settings, physics=config.engine), config.reward_weights)
    algorithm = make_ppo(auto_reset(env), config.ppo, symmetry=balance_symmetry(env))
    return Experiment(env, env, algorithm, filmed(env, algorithm), recorded_faults)


if __name__ == "__main__":
    run(Config, build)
