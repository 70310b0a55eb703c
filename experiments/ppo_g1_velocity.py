"""Train Unitree's G1 (or H1) to walk where it is told with PPO."""

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from algos.ppo import PPOConfig
from experiments.cli import run
from experiments.search_space import PPO_KL_SEARCH
from experiments.walking import WalkingConfig, build_walking, ppo_learner, walking_ppo
from rlcore.env import Env, encoder_offset, observation_noise
from rlcore.experiment import Experiment, TrainingConfig
from rlcore.randomize import Randomization
from tasks.unitree.velocity import make_unitree_velocity, velocity_symmetry

# Largest errors of a real robot's sensors: rad/s, part of a unit vector, rad, rad/s. Source: legged_gym.
SENSOR_NOISE = {"angular_velocity": 0.2, "gravity": 0.05, "joint_position": 0.01, "joint_velocity": 1.5}
ENCODER_OFFSET = 0.015  # rad. Source: mjlab.


@dataclass(frozen=True)
class Config(WalkingConfig):
    """Learn to follow velocity commands with a real robot's model: pip install rlcore[robots] has it."""

    robot: Literal["g1", "h1"] = "g1"
    """Which robot: G1 has 29 joints, H1 has 19."""
    sensor_noise: bool = True
    """Show the policy what sensors as noisy as real ones would; evaluation too."""
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
    ppo: PPOConfig = field(default_factory=lambda: walking_ppo(initial_std=0.8))
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(iterations=4000))


SEARCH = PPO_KL_SEARCH


def build(config: Config) -> Experiment:
    """The environment and the learner that a configuration describes."""

    def sensors(env: Env) -> Env:
        return encoder_offset(observation_noise(env, SENSOR_NOISE), ENCODER_OFFSET) if config.sensor_noise else env

    task = partial(make_unitree_velocity, config.robot)
    symmetry = partial(velocity_symmetry, robot=config.robot)
    return build_walking(config, task, symmetry, ppo_learner(config.ppo), sensors)


if __name__ == "__main__":
    run(Config, build)
