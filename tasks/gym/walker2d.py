"""Gymnasium's Walker2d-v5: two legs in a vertical plane, to walk forward without falling.

Source: Gymnasium (Towers et al. 2024, https://arxiv.org/abs/2407.17032), Walker2d-v5 with its default arguments.
"""

import torch
from torch import Tensor

from rlcore import random
from rlcore.env import Env, EnvState, Params, make_env, time_limit
from rlcore.physics.engine import PhysicsState
from rlcore.physics.engines import PhysicsChoice, make_engine
from rlcore.rewards import Term, action_size
from tasks.gym.model import EPISODE_STEPS, gym_model

CONTROL_DT = 0.008  # s, four substeps
NOISE = 5e-3  # m, rad, and per second, around the state that the model begins in
FASTEST = 10.0  # m/s and rad/s, at which observed velocities are clipped


def make_gym_walker2d(num_threads: int = 0, steps: int = EPISODE_STEPS, physics: PhysicsChoice = "mujoco") -> Env:
    """Walker2d-v5 with a limit of `steps` control steps, without automatic resets.

    Args:
      num_threads: physics threads; 0 takes every CPU.
      steps: length of an episode, control steps.
      physics: the engine, see `rlcore.physics.engines`.

    Raises:
      InputError: if Gymnasium is not installed; and as from `make_engine`.
    """
    engine = make_engine(gym_model("walker2d_v5.xml"), num_threads, physics=physics)
    model = engine.model
    start = torch.tensor(engine.mjmodel.qpos0)

    def initial(params: Params, key: Tensor) -> tuple[Tensor, Tensor]:
        noise = random.uniform(key, (model.nq + model.nv,), -NOISE, NOISE, dtype=torch.float64)
        return start + noise[: model.nq], noise[model.nq :]

    env = make_env(
        engine,
        name="gym_walker2d",
        control_dt=CONTROL_DT,
        initial=initial,
        observe=observe,
        terminate=lambda params, physics: ~healthy(physics),
        # Gymnasium's weights are per control step.
        terms=[
            Term("forward", 1.0 / CONTROL_DT, forward),
            Term("healthy", 1.0 / CONTROL_DT, staying_healthy),
            Term("control", -1e-3 / CONTROL_DT, action_size),
        ],
    )
    return time_limit(env, steps * CONTROL_DT)


def observe(params: Params, state: EnvState) -> dict[str, dict[str, Tensor]]:
    """Positions but for how far it got, and velocities."""
    physics = state.physics
    return {"policy": {"position": physics.qpos[1:], "velocity": torch.clamp(physics.qvel, -FASTEST, FASTEST)}}


def healthy(physics: PhysicsState) -> Tensor:
    """The torso is between 0.8 and 2 m high and leans less than 1 rad."""
    height, lean = physics.qpos[1], physics.qpos[2]
    return (height > 0.8) & (height < 2.0) & (lean > -1.0) & (lean < 1.0)


def forward(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
    """Mean velocity of the torso along x during the step, m/s."""
    return (after.physics.qpos[0] - before.physics.qpos[0]) / CONTROL_DT


def staying_healthy(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
    """1 unless the step ended the episode."""
    return healthy(after.physics).to(action.dtype)
