"""Train an ant to run with SAC: large batches from many robots, for a GPU (--physics warp)."""

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
from tasks.ant import make_ant
from tasks.running import CONTROL_DT


@dataclass(frozen=True)
class Config(SimulationConfig):
    """Learn to run to a far target on four legs, off-policy (published returns of 1000 steps: 5500 to 11800)."""

    seed: int = 0
    """Seed of every random number of the run."""
    episode_steps: int = 1000
    """Length of an episode, control steps of 0.0166 s."""
    sac: SACConfig = field(
        default_factory=lambda: SACConfig(
            num_envs=256,
            num_steps=1,
            num_updates=8,
            batch_size=2048,
            replay_steps=4000,
            prefill=8192,
            n_steps=3,
            target_rate=0.05,
            layer_norm=True,
            policy_delay=2,
            log_std_range=(-5.0, 0.0),
            policy_layers=(256, 128, 64),
            value_layers=(512, 256, 128),
            activation="silu",
        )
    )
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(iterations=8000, checkpoint_every=500))

    @property
    def episode_seconds(self) -> float:
        """Length of an episode, s."""
        return self.episode_steps * CONTROL_DT


SEARCH = SAC_SEARCH


def build(config: Config) -> Experiment:
    """The environment and the learner that a configuration describes."""
    env = reweighted(make_ant(config.num_threads, config.episode_steps, config.engine), config.reward_weights)
    algorithm = make_sac(auto_reset(env), config.sac)
    note = partial(replay_note, env, config.sac)
    return Experiment(env, env, algorithm, filmed(env, algorithm), recorded_faults, note=note)


if __name__ == "__main__":
    run(Config, build)
