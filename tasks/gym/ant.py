"""Gymnasium's Ant-v5: a ball on four legs, to run forward without jumping or falling over.

Source: Gymnasium (Towers et al. 2024, https://arxiv.org/abs/2407.17032), Ant-v5 with its default arguments.
"""

import torch
from torch import Tensor

from rlcore import random
from rlcore.env import Env, EnvState, Params, make_env, time_limit
from rlcore.physics.engine import PhysicsState
from rlcore.physics.engines import PhysicsChoice, make_engine
from rlcore.rewards import Term, action_size
from tasks.gym.model import EPISODE_STEPS, gym_model

CONTROL_DT = 0.05  # s, five substeps
NOISE = 0.1  # m and rad, uniform; m/s and rad/s, the deviation of a normal distribution
STRONGEST = 1.0  # N and N m, at which external forces are clipped


def make_gym_ant(num_threads: int = 0, steps: int = EPISODE_STEPS, physics: PhysicsChoice = "mujoco") -> Env:
    """Ant-v5 with a limit of `steps` control steps, without automatic resets.

    Args:
      num_threads: physics threads; 0 takes every CPU.
      steps: length of an episode, control steps.
      physics: the engine, see `rlcore.physics.engines`.

    Raises:
      InputError: if Gymnasium is not installed; and as from `make_engine`.
    """
    engine = make_engine(gym_model("ant.xml"), num_threads, ("xpos", "cfrc_ext"), physics=physics)
    model = engine.model
    start = torch.tensor(engine.mjmodel.qpos0)
    forces = model.sensor("cfrc_ext")
    # Gymnasium reads the torso's place where the last evaluation of the dynamics left it, not from qpos.
    torso_x = model.sensor("xpos").start + 3 * model.body("torso")

    def initial(params: Params, key: Tensor) -> tuple[Tensor, Tensor]:
        of_positions, of_velocities = random.split(key)
        positions = random.uniform(of_positions, (model.nq,), -NOISE, NOISE, dtype=torch.float64)
        return start + positions, NOISE * random.normal(of_velocities, (model.nv,), dtype=torch.float64)

    def observe(params: Params, state: EnvState) -> dict[str, dict[str, Tensor]]:
        """Positions but for how far it got, velocities, and the clipped forces on each body."""
        physics = state.physics
        force = torch.clamp(physics.sensordata[forces], -STRONGEST, STRONGEST)[6:]  # of every body but the world
        # Gymnasium computes them in steps only: an episode's first observation has none.
        force = torch.where(state.steps > 0, force, 0.0)
        return {"policy": {"position": physics.qpos[2:], "velocity": physics.qvel, "external_force": force}}

    def forward(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
        """Mean velocity of the torso along x during the step, m/s."""
        return (after.physics.sensordata[torso_x] - before.physics.sensordata[torso_x]) / CONTROL_DT

    def contact(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
        """Sum of the squares of the clipped external forces."""
        return (torch.clamp(after.physics.sensordata[forces], -STRONGEST, STRONGEST) ** 2).sum()

    env = make_env(
        engine,
        name="gym_ant",
        control_dt=CONTROL_DT,
        initial=initial,
        observe=observe,
        terminate=lambda params, physics: ~healthy(physics),
        # Gymnasium's weights are per control step.
        terms=[
            Term("forward", 1.0 / CONTROL_DT, forward),
            Term("healthy", 1.0 / CONTROL_DT, staying_healthy),
            Term("control", -0.5 / CONTROL_DT, action_size),
            Term("contact", -5e-4 / CONTROL_DT, contact),
        ],
    )
    return time_limit(env, steps * CONTROL_DT)


def healthy(physics: PhysicsState) -> Tensor:
    """The torso is from 0.2 to 1 m high. (A state that is not finite is a physics fault, which ends it too.)"""
    return (physics.qpos[2] >= 0.2) & (physics.qpos[2] <= 1.0)


def staying_healthy(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
    """1 unless the step ended the episode."""
    return healthy(after.physics).to(action.dtype)
