"""What the experiments of walking robots share: their settings, and how training differs from evaluation."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from algos.ppo import PPOConfig, make_ppo
from experiments.recording import filmed, recorded_faults
from experiments.simulation import SimulationConfig
from rlcore.curriculum import Stage
from rlcore.env import Env, Params, action_delay, auto_reset, reweighted
from rlcore.errors import InputError
from rlcore.experiment import Algorithm, Experiment, TrainingConfig
from rlcore.randomize import Randomization, make_randomizer
from rlcore.symmetry import Symmetry
from tasks.walking import STAGES

Learner = Callable[[Env, Callable[[Params, Tensor], Params] | None, Symmetry], Algorithm]


@dataclass(frozen=True)
class WalkingConfig(SimulationConfig):
    """Settings of every experiment with velocity commands; each has its own robot and numbers."""

    seed: int = 0
    """Seed of every random number of the run."""
    push_speed: float = 0.5
    """Largest change of the pelvis's velocity by a push, m/s."""
    push_interval: float = 4.0
    """Mean time between pushes in evaluation and films, s."""
    training_push_interval: float = 3.0
    """Mean time between pushes in training, s: robots that are pushed more often fall less, but learn
    to keep a speed later."""
    episode_seconds: float = 20.0
    """Length of an episode in evaluation and films."""
    training_episode_seconds: float = 4.0
    """Length of an episode in training: short ones show more beginnings, and the curriculum judges each."""
    curriculum: bool = True
    """Begin with balancing in place and go on to standing, walking, turning and varying speed, each robot at its own
    pace; otherwise all commands from the start."""
    randomization: Randomization = field(default_factory=Randomization)
    """How robots differ from the nominal one in training; evaluation shows the nominal one."""
    max_delay: int = 0
    """Actions arrive up to this many control steps of 20 ms late in training, drawn for each episode."""
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        for name in ("push_interval", "training_push_interval", "episode_seconds", "training_episode_seconds"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise InputError(f"{name} must be more than 0 s, got {value} (--{name.replace('_', '-')})")
        if not 0 <= self.push_speed < math.inf:
            raise InputError(f"push_speed must be 0 m/s or more, got {self.push_speed} (--push-speed)")
        if self.max_delay < 0:
            raise InputError(f"max_delay must be 0 or more control steps, got {self.max_delay} (--max-delay)")


def walking_ppo(initial_std: float) -> PPOConfig:
    """What PPO learns to walk with in an hour on two CPU cores.

    Args:
      initial_std: standard deviation of actions at the start.
    """
    return PPOConfig(
        num_envs=512,
        num_steps=32,
        num_epochs=3,
        num_minibatches=8,
        learning_rate=1e-3,
        kl_target=0.02,
        discount=0.98,
        entropy_coefficient=0.003,
        initial_std=initial_std,
        policy_average=0.97,
        policy_layers=(256, 128),
        value_layers=(256, 128),
        symmetric_networks=True,
    )


def ppo_learner(settings: PPOConfig) -> Learner:
    """PPO with these settings, for `build_walking`."""
    return lambda env, randomize, symmetry: make_ppo(env, settings, randomize, symmetry)


def build_walking(
    config: WalkingConfig,
    make_task: Callable[..., Env],
    symmetry: Callable[[Env], Symmetry],
    learner: Learner,
    sensors: Callable[[Env], Env] = lambda env: env,
) -> Experiment:
    """The environment and the learner that a configuration describes.

    Training has short episodes, more pushes, the curriculum, late actions and robots that differ; evaluation has none
    of these.

    Args:
      config: the settings.
      make_task: called as `make_task(num_threads, seconds, push_interval, push_speed, stages=..., physics=...)`.
      symmetry: gives the mirror maps of that task, however it is wrapped.
      learner: called as `learner(env, randomize, symmetry)` with the training environment, which resets itself, and
        how its robots differ, as the algorithms take them.
      sensors: wraps the task, in training and in evaluation, into what the robot's sensors show of it.
    """

    def task(seconds: float, push_interval: float, stages: tuple[Stage, ...]) -> Env:
        settings = (config.num_threads, seconds, push_interval, config.push_speed)
        return sensors(reweighted(make_task(*settings, stages=stages, physics=config.engine), config.reward_weights))

    stages = STAGES if config.curriculum else ()
    env = task(config.training_episode_seconds, config.training_push_interval, stages)
    if config.max_delay > 0:
        env = action_delay(env, (0, config.max_delay))
    changes = config.randomization != Randomization()
    randomize = make_randomizer(env, config.randomization) if changes else None
    algorithm = learner(auto_reset(env), randomize, symmetry(env))
    whole = task(config.episode_seconds, config.push_interval, ())
    # A return starts anew with each stage of a curriculum.
    best = "env/curriculum_progress" if config.curriculum else "episode/return"
    return Experiment(env, whole, algorithm, filmed(whole, algorithm), recorded_faults, best_metric=best)
