"""Cartpole: its motion against equations derived on paper, its limits, and that PPO solves it."""

import math

import numpy as np
import pytest
import torch

from algos.ppo import PPOConfig, make_ppo
from rlcore import random, tree
from rlcore.env import auto_reset, batch, scale_actions
from rlcore.rollout import evaluate
from tasks.cartpole import make_cartpole

GRAVITY, CART, POLE, FORCE = 9.81, 1.0, 0.1, 10.0
LEVER = 0.5  # m, from the hinge to the pole's centre


@pytest.fixture(scope="module")
def env():
    return make_cartpole(1)


def pole_inertia():
    """About the pole's centre: a cylinder of length 1 and radius 0.03 with a half sphere on each end.

    Cylinder of mass c: c (h^2 / 12 + r^2 / 4). Each half sphere of mass s: 2 s r^2 / 5 about the centre of
    its full sphere, moved to its own centre of mass (3 r / 8 beyond the face), then to the pole's centre.
    """
    h, r = 1.0, 0.03
    cylinder, half = math.pi * r**2 * h, 2 / 3 * math.pi * r**3
    density = POLE / (cylinder + 2 * half)
    c, s = density * cylinder, density * half
    own = 2 / 5 * s * r**2 - s * (3 * r / 8) ** 2
    return c * (h**2 / 12 + r**2 / 4) + 2 * (own + s * (h / 2 + 3 * r / 8) ** 2)


def accelerations(angle, rate, force):
    """Of cart and pole, from Lagrange's equations; the angle is from upright, positive towards the cart's +x.

    `(M + m) x'' + m l (a'' cos a - a'^2 sin a) = F` and `(I + m l^2) a'' + m l x'' cos a = m g l sin a`.
    """
    mass = np.array([
        [CART + POLE, POLE * LEVER * np.cos(angle)],
        [POLE * LEVER * np.cos(angle), pole_inertia() + POLE * LEVER**2],
    ])  # fmt: skip
    right = [force + POLE * LEVER * rate**2 * np.sin(angle), POLE * GRAVITY * LEVER * np.sin(angle)]
    return np.linalg.solve(mass, right)


def test_accelerations_are_those_of_the_equations(env):
    timestep = env.spec.model.timestep
    generator = np.random.default_rng(0)
    for _ in range(20):
        angle, rate = generator.uniform(-math.pi, math.pi), generator.uniform(-5, 5)
        position, speed, action = generator.uniform(-1, 1, 3)
        qpos, qvel = torch.tensor([position, angle]), torch.tensor([speed, rate])
        state = env.engine.initial(qpos.double(), qvel.double())
        after = env.engine.step({}, state, torch.tensor([action]).double(), substeps=1)
        measured = (after.qvel - state.qvel).numpy() / timestep
        expected = accelerations(float(state.qpos[1]), float(state.qvel[1]), FORCE * action)
        np.testing.assert_allclose(measured, expected, atol=1e-6)


def test_specification_and_rates(env):
    spec = env.spec
    assert spec.action_low == (-1.0,) and spec.action_high == (1.0,)
    assert spec.observations == {"policy": (("position", 2), ("velocity", 2))}
    assert spec.control_dt == 0.02 and spec.substeps * spec.model.timestep == pytest.approx(0.02)
    assert spec.wrappers == ("time_limit",)


def test_episodes_begin_near_rest(env):
    state, obs = batch(env).reset(env.params, random.split(random.key(0), 512))
    seen = torch.cat([state.physics.qpos, state.physics.qvel], dim=1)
    assert torch.equal(obs["policy"], seen.float())
    # Uniform on +-0.05: deviation 0.0289, in each of the four.
    assert float(seen.abs().max()) <= 0.05
    torch.testing.assert_close(seen.std(0), torch.full((4,), 0.0289).double(), rtol=0, atol=0.003)
    torch.testing.assert_close(torch.corrcoef(seen.T), torch.eye(4).double(), rtol=0, atol=0.2)


@pytest.mark.parametrize(
    ("position", "degrees", "over"),
    [(0.0, 0.0, False), (2.3, 11.5, False), (-2.3, -11.5, False), (2.45, 0.0, True), (-2.45, 0.0, True),
     (0.0, 12.5, True), (0.0, -12.5, True)],
)  # fmt: skip
def test_episodes_end_beyond_the_limits(env, position, degrees, over):
    state, _ = env.reset(env.params, random.key(0))
    qpos = torch.tensor([position, math.radians(degrees)], dtype=torch.float64)
    state = tree.replace(state, physics=env.engine.initial(qpos, torch.zeros(2).double()))
    _, transition = env.step(env.params, state, torch.zeros(1))
    assert bool(transition.terminated) == over


@pytest.mark.slow
def test_ppo_solves_it():
    env = scale_actions(make_cartpole())
    config = PPOConfig(
        num_envs=64,
        num_steps=32,
        num_epochs=8,
        num_minibatches=4,
        learning_rate=1e-3,
        policy_layers=(64, 64),
        value_layers=(64, 64),
        activation="tanh",
    )
    ppo = make_ppo(auto_reset(env), config)
    state = ppo.init(random.key(0))

    def policy(obs):
        return ppo.act(state, obs, None)

    untrained = evaluate(env, policy, random.key(99), 64)
    assert float(untrained.lengths.double().mean()) < 100
    for _ in range(30):
        state, _ = ppo.update(state)
    trained = evaluate(env, policy, random.key(99), 64)
    assert trained.lengths.tolist() == [500] * 64 and not trained.terminated.any()
