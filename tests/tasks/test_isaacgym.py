"""Every task through the Isaac Gym engine, with the stand-in that MuJoCo simulates, against the same on MuJoCo."""

from typing import Any

import pytest
import torch

from rlcore import random
from rlcore.env import batch
from rlcore.physics.isaacgym_settings import Settings
from tasks.ant import make_ant
from tasks.cartpole import make_cartpole
from tasks.humanoid.balance import make_humanoid_balance
from tasks.humanoid.run import make_humanoid_run
from tasks.humanoid.velocity import make_humanoid_velocity
from tasks.unitree.velocity import make_unitree_velocity
from tests.rlcore.physics.test_isaacgym import _one_thread, python  # noqa: F401
from tests.rlcore.physics.test_isaacgym_model import task_model

NUM, WARM_UP, STEPS = 3, 2, 3

# What a control step is paid may differ by so much: nothing but rounding where rewards are of positions and velocities,
# and up to 4 % where they are of sensors of the feet, which are one substep newer than MuJoCo's. And of what is seen
# each part, in its own units or of its largest number: nothing but rounding, or what the links of bodies with several
# joints take, which hold a thousandth of each such body.
ROUNDING, LINKS = (2e-5, 0.0), (1e-3, 1e-2)
TASKS: dict[str, tuple[Any, float, tuple[float, float]]] = {
    "cartpole": (make_cartpole, 1e-5, ROUNDING),
    "ant": (make_ant, 1e-5, ROUNDING),
    "humanoid_run": (make_humanoid_run, 2e-3, LINKS),
    "humanoid_balance": (make_humanoid_balance, 5e-3, LINKS),
    "humanoid_velocity": (make_humanoid_velocity, 5e-3, LINKS),
    "g1_velocity": (make_unitree_velocity, 5e-3, ROUNDING),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_that_of_mujoco(name, python):  # noqa: F811
    make, tolerance, (absolute, relative) = TASKS[name]
    if name == "g1_velocity":
        task_model("g1")  # skips where the package of its model is not installed
    env, mujocos = make(num_threads=1, physics=Settings(python, spacing=0.0)), make(num_threads=1)
    # Some models stop MuJoCo's solver early; what simulates behind the stand-in lets it converge.
    mujocos.engine.mjmodel.opt.iterations, mujocos.engine.mjmodel.opt.ls_iterations = 100, 50
    keys = random.split(random.key(3), NUM)
    state, first = batch(env).reset(env.params, keys)
    # Recording what the other is compared with would take longer than running it so few times.
    expected, expected_first = torch.func.vmap(mujocos.reset, in_dims=(None, 0))(mujocos.params, keys)
    mujocos_step = torch.func.vmap(mujocos.step, in_dims=(None, 0, 0))
    assert all(torch.equal(first[group], expected_first[group]) for group in first)
    generator = torch.Generator().manual_seed(0)
    actions = torch.rand(WARM_UP + STEPS, NUM, env.spec.model.nu, generator=generator) - 0.5
    parts, sizes = zip(*env.spec.parts("policy"), strict=True)
    for k, action in enumerate(actions):
        # Some robots begin with joints that are exactly at a limit, which rounding may put beyond it.
        if k < WARM_UP:
            expected, _ = mujocos_step(mujocos.params, expected, action)
            continue
        state, transition = batch(env).step(env.params, expected, action)
        expected, wanted = mujocos_step(mujocos.params, expected, action)
        assert all(torch.isfinite(obs).all() for obs in transition.next_obs.values())
        assert (state.physics.fault == 0).all() and torch.equal(transition.terminated, wanted.terminated)
        torch.testing.assert_close(transition.reward, wanted.reward, rtol=0, atol=tolerance)
        seen, told = (t.next_obs["policy"].split(list(sizes), dim=1) for t in (transition, wanted))
        for part, actual, value in zip(parts, seen, told, strict=True):
            # MuJoCo's forces are of the accelerations before joints are damped implicitly.
            share = 0.25 if part == "foot_force" else relative
            limit = absolute + share * float(value.abs().max())
            torch.testing.assert_close(actual, value, rtol=0, atol=limit, msg=f"{part}: {actual} is not {value}")
    env.engine.close()
