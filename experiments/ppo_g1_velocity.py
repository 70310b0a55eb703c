"""Train Unitree's G1 (or H1) to walk where it is told with PPO."""

import math
from dataclasses import dataclass, field
from typing import Literal

from algos.ppo import PPOConfig, make_ppo
from experiments.cli import run
from experiments.recording import filmed, recorded_faults
from rlcore.curriculum import Stage
from rlcore.env import Env, action_delay, auto_reset, encoder_offset, observation_noise, reweighted
from rlcore.errors import InputError
from rlcore.experiment import Experiment, TrainingConfig
from rlcore.physics.engines import Physics
from rlcore.randomize import Randomization, make_randomizer
from tasks.unitree.velocity import make_unitree_velocity, velocity_symmetry
from tasks.walking import STAGES

# Largest errors of a real robot's sensors: rad/s, part of a unit vector, rad, rad/s. Source: legged_gym.
SENSOR_NOISE = {"angular_velocity": 0.2, "gravity": 0.05, "joint_position": 0.01, "joint_velocity": 1.5}
ENCODER_OFFSET = 0.015  # rad. Source: mjlab.


@dataclass(frozen=True)
class Config:
    """Learn to follow velocity commands with a real robot's model: pip install rlcore[robots] has it."""

    robot: Literal["g1", "h1"] = "g1"
    """Which robot: G1 has 29 joints, H1 has 19."""
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
    """Length of an episode in evaluation and films."""
    training_episode_seconds: float = 4.0
    """Length of an episode in training: short ones show more beginnings, and the curriculum judges each."""
    curriculum: bool = True
    """Begin with balancing in place and go on to standing, walking, turning and varying speed, each robot at its own
    pace; otherwise all commands from the start."""
    reward_weights: dict[str, float] = field(default_factory=dict)
    """Weights of reward terms, per second, in place of the task's own: NAME WEIGHT NAME WEIGHT ..."""
    sensor_noise: bool = True
    """Show the policy what sensors as noisy as real ones would; evaluation too."""
    max_delay: int = 0
    """Actions arrive up to this many control steps of 20 ms late in training, drawn for each episode."""
    randomization: Randomization = field(
        default_factory=lambda: Randomization(
            mass_scale=(0.9, 1.1),
            com_offset=(-0.025, 0.025),
            com_body="torso_link",
            friction_scale=(0.5, 1.5),
            kp_scale=(0.9, 1.1),
            kd_scale=(0.9, 1.1),
        )
    )
    ppo: PPOConfig = field(
        default_factory=lambda: PPOConfig(
            num_envs=512,
            num_steps=32,
            num_epochs=3,
            num_minibatches=8,
            learning_rate=1e-3,
            kl_target=0.02,
            discount=0.98,
            entropy_coefficient=0.003,
            initial_std=0.4,
            policy_average=0.97,
            policy_layers=(256, 128),
            value_layers=(256, 128),
            symmetric_networks=True,
        )
    )
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(iterations=4000, best_metric="env/curriculum_progress")
    )

    def __post_init__(self) -> None:
        for name in ("push_interval", "episode_seconds", "training_episode_seconds"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise InputError(f"{name} must be more than 0 s, got {value} (--{name.replace('_', '-')})")
        if not 0 <= self.push_speed < math.inf:
            raise InputError(f"push_speed must be 0 m/s or more, got {self.push_speed} (--push-speed)")
        if self.max_delay < 0:
            raise InputError(f"max_delay must be 0 or more control steps, got {self.max_delay} (--max-delay)")


def build(config: Config) -> Experiment:
    """The environment and the learner that a configuration describes."""

    def task(seconds: float, stages: tuple[Stage, ...]) -> Env:
        settings = (config.num_threads, seconds, config.push_interval, config.push_speed)
        env = make_unitree_velocity(config.robot, *settings, stages=stages, physics=config.physics)
        env = reweighted(env, config.reward_weights)
        return encoder_offset(observation_noise(env, SENSOR_NOISE), ENCODER_OFFSET) if config.sensor_noise else env

    env = task(config.training_episode_seconds, STAGES if config.curriculum else ())
    if config.max_delay > 0:
        env = action_delay(env, (0, config.max_delay))
    whole = task(config.episode_seconds, ())
    changes = config.randomization != Randomization()
    algorithm = make_ppo(
        auto_reset(env),
        config.ppo,
        make_randomizer(env, config.randomization) if changes else None,
        velocity_symmetry(env, config.robot),
    )
    return Experiment(env, whole, algorithm, filmed(whole, algorithm), recorded_faults)


if __name__ == "__main__":
    run(Config, build)
