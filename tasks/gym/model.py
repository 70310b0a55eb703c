"""The models of Gymnasium's MuJoCo environments, read from its installed package without importing it.

The tasks beside this file are those environments at version 5, step for step: same model, observation, reward and
end. They are for comparing with published returns; nothing here is tuned for speed.
"""

import importlib.util
from pathlib import Path

import mujoco

from rlcore.errors import InputError
from rlcore.physics.mujoco import load_model

EPISODE_STEPS = 1000  # control steps, after which Gymnasium truncates


def gym_model(file: str) -> mujoco.MjModel:
    """The model of that file name among those in Gymnasium's package.

    Raises:
      InputError: if Gymnasium is not installed, or has no such file.
    """
    # Finding a package runs none of its code, which would take seconds.
    spec = importlib.util.find_spec("gymnasium")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            "the models of the gym tasks are in gymnasium, which is not installed: pip install rlcore[robots]"
        )
    return load_model(Path(spec.submodule_search_locations[0]) / "envs" / "mujoco" / "assets" / file)
