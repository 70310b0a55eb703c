"""What policies are measured under: commands that are given, and physics drawn for each robot."""

import functools

import pytest
import torch

from experiments.conditions import UNSEEN_RANGES, commanded, given_command, unseen_physics
from rlcore import random, tree
from rlcore.errors import InputError
from tasks.cartpole import make_cartpole
from tasks.humanoid.velocity import make_humanoid_velocity


@functools.cache
def humanoid():
    return make_humanoid_velocity(1, 0.2, stages=())


def test_what_is_left_out_of_a_command_is_zero():
    assert given_command(None, None, None) is None
    assert given_command(None, 0.2, None) == {"vx": 0.0, "vy": 0.2, "yaw_rate": 0.0}
    assert given_command(0.0, None, None) == {"vx": 0.0, "vy": 0.0, "yaw_rate": 0.0}
    with pytest.raises(InputError, match=r"yaw_rate must be a finite number, got nan \(--yaw-rate\)"):
        given_command(1.0, None, float("nan"))


def test_every_episode_has_the_command():
    env = commanded(humanoid(), {"vx": 0.7, "vy": -0.2, "yaw_rate": 0.4})
    for seed in range(3):
        state, _ = env.reset(env.params, random.key(seed))
        expected = torch.tensor([0.7, -0.2, 0.4], dtype=torch.float64)
        torch.testing.assert_close(state.memory["command"]["velocity"], expected, rtol=0, atol=1e-12)


def test_a_command_that_would_not_be_followed_is_refused():
    command = {"vx": 0.5, "vy": 0.0, "yaw_rate": 0.0}
    with pytest.raises(InputError, match=r"cartpole follows no velocity commands \(--vx, --vy, --yaw-rate\)"):
        commanded(make_cartpole(1), command)
    # A stage puts its own range in place of the command.
    with pytest.raises(InputError, match="the curriculum of humanoid_velocity chooses the commands"):
        commanded(make_humanoid_velocity(1), command)


def test_unseen_physics_are_within_their_ranges_and_differ_from_robot_to_robot():
    env = humanoid()
    unseen = unseen_physics(env, random.key(0), 6)
    fields = {"mass_scale": "body_mass", "friction_scale": "geom_friction", "kp_scale": "actuator_gainprm"}
    for name, field in fields.items():
        nominal, drawn = env.engine.nominal(field)[field], unseen.params.physics[field]
        # The world has no mass; of friction the first number is that of sliding, of a servo's gains the stiffness.
        factors = drawn[:, 1:] / nominal[1:] if nominal.ndim == 1 else drawn[..., 0] / nominal[:, 0]
        low, high = UNSEEN_RANGES[name]
        assert low <= float(factors.min()) < float(factors.max()) <= high
        assert len(torch.unique(factors[:, 0])) == 6
    assert unseen.env.spec.wrappers == (*env.spec.wrappers, "action_delay")
    assert unseen.text.endswith("actions 20 ms late")


def test_a_robot_has_the_same_physics_whatever_their_number():
    three, six = (unseen_physics(humanoid(), random.key(1), n).params for n in (3, 6))
    for few, many in zip(tree.tree_leaves(three), tree.tree_leaves(six), strict=True):
        assert torch.equal(few, many[:3])


def test_physics_and_episodes_draw_with_keys_of_their_own(monkeypatch):
    given = []
    split = random.split

    def recorded(key, num=2):
        given.append(key.tolist())
        return split(key, num)

    monkeypatch.setattr("rlcore.random.split", recorded)
    unseen_physics(humanoid(), random.key(2), 4)
    # Robot i's physics are drawn with a child of the last key that was split, its episode with child i of the seed's.
    parent = given[-1]
    assert parent != random.key(2).tolist() and parent not in split(random.key(2), 4096).tolist()


def test_what_a_model_lacks_is_left_as_it_is():
    env = make_cartpole(1)
    unseen = unseen_physics(env, random.key(0), 2)
    assert set(unseen.params.physics) == {"body_mass", "body_inertia", "geom_friction"}
    assert unseen.text == f"masses x 0.8 to 1.2, friction x 0.4 to 1.2, actions {1000 * env.spec.control_dt:g} ms late"
