"""Train the humanoid to run with PPO, with the settings and rewards that Isaac Gym's returns are published with."""

from dataclasses import dataclass, field

from algos.ppo import PPOConfig, make_ppo
from experiments.cli import run
from experiments.recording import filmed, recorded_faults
from experiments.search_space import PPO_KL_SEARCH
from experiments.simulation import SimulationConfig
from rlcore.env import auto_reset, reweighted
from rlcore.experiment import Experiment, TrainingConfig
from tasks.humanoid.run import make_humanoid_run
from tasks.running import CONTROL_DT


@dataclass(frozen=True)
class Config(SimulationConfig):
    """Learn to run to a far target on two legs (published returns of 1000 steps: 6500 to 8800).

    The published settings, but 1024 robots instead of 4096 and batches a quarter as large. They scale rewards by
    0.01, which changes nothing where values and advantages are normalized.
    """

    seed: int = 0
    """Seed of every random number of the run."""
    episode_steps: int = 1000
    """Length of an episode, control steps of 0.0166 s."""
    ppo: PPOConfig = field(
        default_factory=lambda: PPOConfig(
            num_envs=1024,
            num_steps=32,
            num_epochs=5,
            num_minibatches=4,
            learning_rate=5e-4,
            kl_target=0.008,
            value_coefficient=4.0,
            bounds_coefficient=1e-4,
            policy_layers=(400, 200, 100),
            value_layers=(400, 200, 100),
        )
    )
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(iterations=1000))

    @property
    def episode_seconds(self) -> float:
        """Length of an episode, s."""
        return self.episode_steps * CONTROL_DT


SEARCH = PPO_KL_SEARCH


def build(config: Config) -> Experiment:
    """The environment and the learner that a configuration describes."""
    task = make_humanoid_run(config.num_threads, config.episode_steps, config.engine)
    env = reweighted(task, config.reward_weights)
    algorithm = make_ppo(auto_reset(env), config.ppo)
    return Experiment(env, env, algorithm, filmed(env, algorithm), recorded_faults)


if __name__ == "__main__":
    run(Config, build)
