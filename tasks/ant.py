"""Ant: a ball on four legs, to run to a target far away. Observation and reward are those of Isaac Gym's Ant.

The ant is our own (`ant.xml`), with that one's dimensions, density and torque; only the tips of its feet and its torso
touch the floor, and MuJoCo is not PhysX, so returns compare with published ones, but not to the last digit.
"""

from pathlib import Path

from torch import Tensor

from rlcore.env import Env
from rlcore.physics.engines import PhysicsChoice, make_engine
from rlcore.physics.mujoco import load_model
from tasks.running import EPISODE_STEPS, RunnerSettings, make_runner

MODEL = Path(__file__).parent / "ant.xml"
LEGS = ("front_left", "back_left", "back_right", "front_right")


def at_limit(position: Tensor, share: Tensor) -> Tensor:
    """0.1 for each joint within a two-hundredth of its range of its upper limit: `[nu]`, `[nu]` to `[]`."""
    return 0.1 * (position > 0.99).to(position.dtype).sum()


SETTINGS = RunnerSettings(
    start_height=0.44,
    fallen_height=0.31,
    alive=0.5,
    action_cost=0.005,
    energy_cost=0.05,
    limit_cost=at_limit,
    death=-2.0,
    foot_sensors=tuple(f"{leg}_foot_{what}" for leg in LEGS for what in ("force", "torque")),
    foot_scale=0.1,
    feet=LEGS,
    joint_velocity_scale=0.2,
)


def make_ant(num_threads: int = 0, steps: int = EPISODE_STEPS, physics: PhysicsChoice = "mujoco") -> Env:
    """The ant with a limit of `steps` control steps (of 0.0166 s), without automatic resets.

    Args:
      num_threads: physics threads; 0 takes every CPU.
      steps: length of an episode, control steps.
      physics: the engine, see `rlcore.physics.engines`.
    """
    return make_runner(make_engine(load_model(MODEL), num_threads, physics=physics), "ant", SETTINGS, steps)
