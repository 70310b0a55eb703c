"""Train the humanoid to keep its balance under pushes with SAC, from few steps of experience."""

from dataclasses import dataclass, field
from functools import partial

from algos.sac import SACConfig, make_sac
from experiments.cli import run
from experiments.recording import filmed, recorded_faults
from experiments.replay_memory import replay_note
from experiments.search_space import SAC_SEARCH
from experiments.simulation import SimulationConfig
from rlcore.env import auto_reset, reweighted
from rlcore.experiment import Experiment, TrainingConfig
from tasks.humanoid.balance import make_humanoid_balance


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
    sac: SACConfig = field(
        default_factory=lambda: SACConfig(
            num_envs=64,
            num_steps=4,
            num_updates=16,
            batch_size=512,
            replay_steps=14_000,
            prefill=8192,
            discount=0.97,
            target_rate=0.02,
            initial_entropy_coefficient=0.001,
            policy_delay=2,
            atoms=101,
            value_range=(-5.0, 5.0),
            layer_norm=True,
            log_std_range=(-5.0, 0.0),
            activation="silu",
        )
    )
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(iterations=3440, checkpoint_every=215))


SEARCH = SAC_SEARCH


def build(config: Config) -> Experiment:
    """The environment and the learner that a configuration describes."""
    settings = (config.num_threads, config.episode_seconds, config.push_interval, config.push_speed)
    env = reweighted(make_humanoid_balance(*settings, physics=config.engine), config.reward_weights)
    algorithm = make_sac(auto_reset(env), config.sac)
    note = partial(replay_note, env, config.sac)
    return Experiment(env, env, algorithm, filmed(env, algorithm), recorded_faults, note=note)


if __name__ == "__main__":
    run(Config, build)
