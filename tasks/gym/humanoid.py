"""Gymnasium's Humanoid-v5: 17 motors, to walk forward without falling.

Source: Gymnasium (Towers et al. 2024, https://arxiv.org/abs/2407.17032), Humanoid-v5 with its default arguments.
"""

import torch
from torch import Tensor

from rlcore import random
from rlcore.env import Env, EnvState, Params, make_env, time_limit
from rlcore.physics.engine import PhysicsState
from rlcore.physics.engines import PhysicsChoice, make_engine
from rlcore.rewards import Term, action_size
from tasks.gym.model import EPISODE_STEPS, gym_model

CONTROL_DT = 0.015  # s, five substeps
NOISE = 1e-2  # m, rad, and per second, around the state that the model begins in
CONTACT_WEIGHT, MOST_CONTACT = 5e-7, 10.0  # of the squared external forces, (N, N m)^2; and the most that it costs


def make_gym_humanoid(num_threads: int = 0, steps: int = EPISODE_STEPS, physics: PhysicsChoice = "mujoco") -> Env:
    """Humanoid-v5 with a limit of `steps` control steps, without automatic resets.

    Args:
      num_threads: physics threads; 0 takes every CPU.
      steps: length of an episode, control steps.
      physics: the engine, see `rlcore.physics.engines`.

    Raises:
      InputError: if Gymnasium is not installed; and as from `make_engine`.
    """
    extra = ("subtree_com", "cinert", "cvel", "qfrc_actuator", "cfrc_ext")
    engine = make_engine(gym_model("humanoid.xml"), num_threads, extra, physics=physics)
    model = engine.model
    start = torch.tensor(engine.mjmodel.qpos0)
    forces = model.sensor("cfrc_ext")
    # Rows of bodies begin with the world's, which is the centre of mass of all that is in it.
    centre_x = model.sensor("subtree_com").start
    inertias, velocities = _after(model.sensor("cinert"), 10), _after(model.sensor("cvel"), 6)
    torques = _after(model.sensor("qfrc_actuator"), 6)

    def initial(params: Params, key: Tensor) -> tuple[Tensor, Tensor]:
        noise = random.uniform(key, (model.nq + model.nv,), -NOISE, NOISE, dtype=torch.float64)
        return start + noise[: model.nq], noise[model.nq :]

    def observe(params: Params, state: EnvState) -> dict[str, dict[str, Tensor]]:
        """Positions but for how far it got, velocities, and of every body but the world what moves and acts on it."""
        physics = state.physics
        return {
            "policy": {
                "position": physics.qpos[2:],
                "velocity": physics.qvel,
                "inertia": physics.sensordata[inertias],
                "body_velocity": physics.sensordata[velocities],
                "joint_torque": physics.sensordata[torques],
                # Gymnasium computes these in steps only: an episode's first observation has none.
                "external_force": torch.where(state.steps > 0, physics.sensordata[forces][6:], 0.0),
            }
        }

    def forward(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
        """Mean velocity of the centre of mass along x during the step, m/s."""
        return (after.physics.sensordata[centre_x] - before.physics.sensordata[centre_x]) / CONTROL_DT

    def contact(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
        """`min(5e-7 ||f||^2, 10)`, f the external forces on all bodies."""
        return torch.clamp(CONTACT_WEIGHT * (after.physics.sensordata[forces] ** 2).sum(), max=MOST_CONTACT)

    env = make_env(
        engine,
        name="gym_humanoid",
        control_dt=CONTROL_DT,
        initial=initial,
        observe=observe,
        terminate=lambda params, physics: ~healthy(physics),
        # Gymnasium's weights are per control step.
        terms=[
            Term("forward", 1.25 / CONTROL_DT, forward),
            Term("healthy", 5.0 / CONTROL_DT, staying_healthy),
            Term("control", -0.1 / CONTROL_DT, action_size),
            Term("contact", -1.0 / CONTROL_DT, contact),
        ],
    )
    return time_limit(env, steps * CONTROL_DT)


def healthy(physics: PhysicsState) -> Tensor:
    """The torso is between 1 and 2 m high."""
    return (physics.qpos[2] > 1.0) & (physics.qpos[2] < 2.0)


def staying_healthy(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
    """1 unless the step ended the episode."""
    return healthy(after.physics).to(action.dtype)


def _after(places: slice, skipped: int) -> slice:
    return slice(places.start + skipped, places.stop)
