"""Train the humanoid to walk where it is told with SAC, in the shape for thousands of robots."""

from dataclasses import dataclass, field
from functools import partial

from algos.sac import SACConfig, make_sac
from experiments.cli import run
from experiments.replay_memory import replay_note
from experiments.search_space import SAC_SEARCH
from experiments.walking import WalkingConfig, build_walking
from rlcore.experiment import Experiment, TrainingConfig
from tasks.humanoid.velocity import make_humanoid_velocity
from tasks.walking import walking_symmetry


@dataclass(frozen=True)
class Config(WalkingConfig):
    """Learn to follow velocity commands off-policy: large batches, and critics that predict distributions of returns.

    Meant for a GPU (--physics warp): a round of learning has eight gradient steps on thousands of samples each. Four
    million steps are enough, and no curriculum is needed.
    """

    curriculum: bool = False
    """Begin with balancing in place and go on to standing, walking, turning and varying speed, each robot at its own
    pace; otherwise all commands from the start."""
    sac: SACConfig = field(
        default_factory=lambda: SACConfig(
            num_envs=2048,
            num_steps=1,
            num_updates=8,
            batch_size=8192,
            replay_steps=500,
            prefill=8192,
            discount=0.97,
            target_rate=0.125,
            initial_entropy_coefficient=0.001,
            atoms=101,
            value_range=(-20.0, 20.0),
            layer_norm=True,
            policy_delay=2,
            log_std_range=(-5.0, 0.0),
            policy_layers=(512, 256, 128),
            value_layers=(768, 384, 192),
            activation="silu",
        )
    )
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(iterations=2500, checkpoint_every=250))


SEARCH = SAC_SEARCH


def build(config: Config) -> Experiment:
    """The environment and the learner that a configuration describes."""
    experiment = build_walking(
        config,
        make_humanoid_velocity,
        walking_symmetry,
        lambda env, randomize, symmetry: make_sac(env, config.sac, randomize),
    )
    return experiment._replace(note=partial(replay_note, experiment.env, config.sac))


if __name__ == "__main__":
    run(Config, build)
