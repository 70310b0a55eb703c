"""Train the humanoid to walk where it is told with PPO."""

from dataclasses import dataclass, field

from algos.ppo import PPOConfig, make_ppo
from experiments.cli import run
from experiments.recording import filmed, recorded_faults
from rlcore.env import auto_reset, reweighted
from rlcore.experiment import Experiment, TrainingConfig
from rlcore.physics.engines import Physics
from tasks.humanoid.velocity import make_humanoid_velocity
from tasks.walking import STAGES, walking_symmetry


@dataclass(frozen=True)
class Config:
    """Learn to follow velocity commands: stand, walk forward, turn and vary speed, while being pushed."""

    seed: int = 0
    """Seed of every random number of the run."""
    physics: Physics = "mujoco"
    """What simulates: mujoco on CPUs, or warp on an NVIDIA GPU, where learning runs then too."""
    num_threads: int = 0
    """Physics threads on CPUs; 0 takes every CPU. The result does not depend on it."""
    push_speed: float = 0.5
    """Largest change of the pelvis's velocity by a push in the last stage, m/s."""
    push_interval: float = 4.0
    """Mean time between pushes, s."""
    episode_seconds: float = 20.0
    """Length of an episode."""
    curriculum: bool = True
    """Begin with balancing in place and go on to standing, walking, turning and varying speed, each robot at its own
    pace; otherwise all commands from the start."""
    reward_weights: dict[str, float] = field(default_factory=dict)
    """Weights of reward terms, per second, in place of the task's own: NAME WEIGHT NAME WEIGHT ..."""
    ppo: PPOConfig = field(
        default_factory=lambda: PPOConfig(
            num_envs=1024,
            num_steps=16,
            num_minibatches=8,
            learning_rate=1e-3,
            kl_target=0.02,
            discount=0.98,
            entropy_coefficient=0.003,
            initial_std=0.25,
            policy_average=0.97,
            policy_layers=(256, 128),
            value_layers=(256, 128),
            symmetric_networks=True,
        )
    )
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(iterations=1900))


def build(config: Config) -> Experiment:
    """The environment and the learner that a configuration describes."""
    settings = (config.num_threads, config.episode_seconds, config.push_interval, config.push_speed)
    env = make_humanoid_velocity(*settings, stages=STAGES if config.curriculum else (), physics=config.physics)
    env = reweighted(env, config.reward_weights)
    algorithm = make_ppo(auto_reset(env), config.ppo, symmetry=walking_symmetry(env))
    whole = reweighted(make_humanoid_velocity(*settings, stages=(), physics=config.physics), config.reward_weights)
    return Experiment(env, whole, algorithm, filmed(whole, algorithm), recorded_faults)


if __name__ == "__main__":
    run(Config, build)
