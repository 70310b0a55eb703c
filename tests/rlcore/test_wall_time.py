"""Seconds by name on a clock that a test winds."""

import pytest

from rlcore import wall_time
from rlcore.wall_time import PHYSICS, ROLLOUT, drain_seconds, shares, timed


@pytest.fixture
def clock(monkeypatch):
    """`clock[0]` is the time now, s."""
    now = [100.0]
    monkeypatch.setattr(wall_time.time, "perf_counter", lambda: now[0])
    drain_seconds()
    return now


def test_seconds_add_up_until_they_are_asked_for(clock):
    with timed(ROLLOUT):
        clock[0] += 1.0
        for _ in range(2):
            with timed(PHYSICS):
                clock[0] += 0.25
    with pytest.raises(ValueError, match="broken"), timed(PHYSICS):
        clock[0] += 4.0
        raise ValueError("broken")
    assert drain_seconds() == {ROLLOUT: 1.5, PHYSICS: 4.5}
    assert drain_seconds() == {}


def test_shares_by_hand():
    # 2 s of 8 in the engine, 3 s more of the rollout, and 3 s after it.
    assert shares({PHYSICS: 2.0, ROLLOUT: 5.0}, 8.0) == {
        "time/physics_share": 0.25,
        "time/policy_and_env_share": 0.375,
        "time/learning_share": 0.375,
    }
    # Physics beside the rollout, or clocks that differ, make no share negative.
    assert shares({PHYSICS: 9.0, ROLLOUT: 5.0}, 4.0) == {
        "time/physics_share": 1.0,
        "time/policy_and_env_share": 0.0,
        "time/learning_share": 0.0,
    }
    # An engine on a GPU is not timed apart.
    assert shares({ROLLOUT: 6.0}, 8.0) == {"time/rollout_share": 0.75, "time/learning_share": 0.25}
    assert shares({PHYSICS: 2.0}, 8.0) == {}


def test_engines_and_rollouts_are_timed():
    import torch

    from rlcore import random
    from rlcore.env import auto_reset, batch
    from rlcore.rollout import unroll
    from tasks.cartpole import make_cartpole

    env = auto_reset(make_cartpole(1))
    batched = batch(env)
    drain_seconds()
    state, obs = batched.reset(env.params, random.split(random.key(0), 3))
    assert drain_seconds().keys() == {PHYSICS}

    def act(actor, obs, key):
        return torch.zeros(3, 1), {}

    unroll(batched, act)(None, env.params, state, obs, random.split(random.key(1), 4))
    seconds = drain_seconds()
    assert 0 < seconds[PHYSICS] < seconds[ROLLOUT]
