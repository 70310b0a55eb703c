"""Train a cartpole to stay upright with SAC: a first run that takes a minute."""

from dataclasses import dataclass, field
from functools import partial

from algos.sac import SACConfig, make_sac
from experiments.cli import run
from experiments.recording import filmed, recorded_faults
from experiments.replay_memory import replay_note
from experiments.search_space import SAC_SEARCH
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
    sac: SACConfig = field(
        default_factory=lambda: SACConfig(
            num_envs=16,
            num_steps=4,
            num_updates=16,
            replay_steps=2_000,
            prefill=1_000,
            discount=0.97,
            n_steps=3,
            target_rate=0.02,
            policy_learning_rate=1e-3,
            value_learning_rate=1e-3,
            entropy_learning_rate=1e-3,
            initial_entropy_coefficient=0.1,
            policy_layers=(64, 64),
            value_layers=(64, 64),
            activation="tanh",
        )
    )
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(iterations=500, checkpoint_every=100))


SEARCH = SAC_SEARCH


def build(config: Config) -> Experiment:
    """The environment and the learner that a configuration describes."""
    task = make_cartpole(config.num_threads, config.episode_seconds, config.engine)
    env = scale_actions(reweighted(task, config.reward_weights))
    algorithm = make_sac(auto_reset(env), config.sac)
    note = partial(replay_note, env, config.sac)
    return Experiment(env, env, algorithm, filmed(env, algorithm), recorded_faults, note=note)


if __name__ == "__main__":
    run(Config, build)
