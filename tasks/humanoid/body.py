"""The humanoid as a robot on an engine, and the heights that its tasks go by."""

from pathlib import Path

from rlcore.physics.engines import PhysicsChoice, make_engine
from rlcore.physics.mujoco import load_model
from tasks.walking import Walker, make_walker

MODEL = Path(__file__).parent / "humanoid.xml"
STANDING_HEIGHT = 0.83  # m, pelvis above the floor
FALLEN_HEIGHT = 0.6  # m


def make_humanoid(num_threads: int = 0, physics: PhysicsChoice = "mujoco") -> Walker:
    """The humanoid and the engine that runs it.

    Args:
      num_threads: physics threads; 0 takes every CPU.
      physics: the engine, see `rlcore.physics.engines`.

    Raises:
      InputError: for a negative num_threads, or an engine that cannot run here.
    """
    return make_walker(make_engine(load_model(MODEL), num_threads, physics=physics))
