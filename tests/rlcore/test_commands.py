"""Velocity commands: how they are spread, when they change, and that they do not know their neighbours."""

import functools
import math

import pytest
import torch

from rlcore import random, rotations, tree
from rlcore.commands import VelocityCommands, command_values, fixed_command, true_velocity, velocity_commands
from rlcore.env import auto_reset, batch, make_env, time_limit
from rlcore.errors import InputError
from rlcore.rewards import Term
from tests.rlcore.test_env import DT, actions, assert_same, engine, initial, rollout, rows

WIDE = VelocityCommands(
    vx=(-0.5, 1.5),
    vy=(-0.4, 0.4),
    yaw_rate=(-1.0, 2.0),
    resample_seconds=(0.1, 0.1),
    standing_fraction=0.2,
    smallest=0.0,
)
HEADINGS = VelocityCommands(
    vx=(-1.0, 1.0), vy=(-1.0, 1.0), yaw_rate=(-0.5, 0.8), resample_seconds=(0.04, 0.1), heading_fraction=0.5
)  # fmt: skip


def exact(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def observe(params, state):
    return {"policy": {"angle": state.physics.qpos[7:8], "command": state.memory["command"]["velocity"]}}


def forward(params, before, action, after):
    return before.memory["command"]["velocity"][0]


def told(commands, end=lambda params, physics: physics.time < 0, **kwargs):
    return make_env(
        engine(),
        name="told",
        control_dt=DT,
        initial=initial,
        observe=observe,
        terms=[Term("forward", 1.0, forward)],
        terminate=end,
        memory=velocity_commands(engine().model, commands),
        values=command_values(commands),
        **kwargs,
    )


def turned(yaw, time=0.0):
    """A state whose base faces `yaw`."""
    zero = torch.zeros(3, dtype=torch.float64)
    quaternion = rotations.from_yaw(exact(yaw))
    state = engine().initial(torch.cat([zero, quaternion, zero[:1]]), torch.zeros(7, dtype=torch.float64))
    return tree.replace(state, time=exact(time))


@functools.cache
def drawn(num=4000):
    """What robots are told at a reset: `[num, 3]`."""
    env = told(WIDE)
    state, obs = torch.func.vmap(env.reset, in_dims=(None, 0))(env.params, random.split(random.key(0), num))
    assert torch.equal(obs["policy"][:, 1:], state.memory["command"]["velocity"].float())
    return state.memory["command"]["velocity"]


# --- How they are spread ---


def test_commands_fill_their_ranges_evenly():
    velocity = drawn()
    walking = velocity[(velocity != 0).any(1)]
    # 4000 draws, a fifth standing: 3200, with a deviation of sqrt(4000 * 0.2 * 0.8) = 25.
    assert abs(len(walking) - 3200) < 5 * 25
    for i, (low, high) in enumerate((WIDE.vx, WIDE.vy, WIDE.yaw_rate)):
        x, width = walking[:, i], high - low
        assert float(x.min()) >= low and float(x.max()) <= high
        # Uniform: the deviation is width / sqrt(12), and that of the mean of 3200 is that / 56.6.
        assert float(x.mean()) == pytest.approx((low + high) / 2, abs=5 * width / math.sqrt(12) / 56.6)
        assert float(x.std()) == pytest.approx(width / math.sqrt(12), rel=0.05)
    # The three are drawn apart: correlations of 3200 pairs deviate by 1 / 56.6.
    assert float((torch.corrcoef(walking.T) - torch.eye(3)).abs().max()) < 5 / 56.6


def test_small_commands_are_zero():
    env = told(tree.replace(WIDE, smallest=0.6, standing_fraction=0.0))
    state, _ = torch.func.vmap(env.reset, in_dims=(None, 0))(env.params, random.split(random.key(0), 1000))
    size = state.memory["command"]["velocity"].norm(dim=1)
    assert float(size[size > 0].min()) >= 0.6
    # The same draws without the threshold: those below it, and no others, are zero.
    plain = told(tree.replace(WIDE, standing_fraction=0.0))
    state, _ = torch.func.vmap(plain.reset, in_dims=(None, 0))(plain.params, random.split(random.key(0), 1000))
    assert torch.equal(state.memory["command"]["velocity"].norm(dim=1) < 0.6, size == 0)
    assert 20 < int((size == 0).sum()) < 500


def test_the_true_velocity_is_what_a_command_means():
    # It faces north and leans: a world velocity of (-0.2, 1, 0.3) is 1 forward and 0.2 left. Rolled by 30 degrees, 2
    # rad/s about the base's own axis are 2 cos 30 about the vertical.
    roll = exact([math.cos(math.pi / 12), math.sin(math.pi / 12), 0.0, 0.0])
    quaternion = rotations.multiply(rotations.from_yaw(exact(math.pi / 2)), roll)
    qpos = torch.cat([exact([5.0, 6.0, 7.0]), quaternion, exact([0.3])])
    state = engine().initial(qpos, exact([-0.2, 1.0, 0.3, 0.0, 0.0, 2.0, 9.0]))
    velocity = true_velocity(engine().model)
    expected = exact([1.0, 0.2, math.sqrt(3)])
    torch.testing.assert_close(velocity(state), expected)
    torch.testing.assert_close(velocity(tree.stack([state, turned(0.4), state]))[[0, 2]], expected.expand(2, 3))
    with pytest.raises(InputError, match="needs a free joint"):
        true_velocity(engine().model, engine().model.actuator_joints[0])


def test_a_fixed_command_is_exactly_that():
    env = told(HEADINGS)
    params = fixed_command(env.params, 0.3, -0.1, 0.7)
    (first, obs), (states, _) = rollout(batch(env), 8, torch.zeros(12, 8, 1), params)
    expected = exact([0.3, -0.1, 0.7])
    for state in (first, states):
        assert (state.memory["command"]["velocity"] == expected).all()
    assert (obs["policy"][:, 1:] == expected.float()).all()
    (first, _), (states, _) = rollout(batch(env), 8, torch.zeros(12, 8, 1), fixed_command(env.params))
    assert not first.memory["command"]["velocity"].any() and not states.memory["command"]["velocity"].any()


def test_robots_may_have_ranges_of_their_own():
    env = told(WIDE)
    params = tree.stack([fixed_command(env.params, vx) for vx in (0.25, 0.5, 1.0)])
    state, _ = batch(env, shared_params=False).reset(params, random.split(random.key(0), 3))
    assert state.memory["command"]["velocity"][:, 0].tolist() == [0.25, 0.5, 1.0]


# --- When they change ---


def test_a_command_holds_for_its_time():
    env = told(tree.replace(WIDE, standing_fraction=0.0))
    (first, _), (states, _) = rollout(batch(env), 16, torch.zeros(40, 16, 1))
    velocity = torch.cat([first.memory["command"]["velocity"][None], states.memory["command"]["velocity"]])
    changed = (velocity[1:] != velocity[:-1]).all(-1)
    # 0.1 s are five steps: the fifth, tenth, ... step ends with a new command, for every robot, on and on.
    expected = torch.tensor([(t + 1) % 5 == 0 for t in range(40)])
    assert torch.equal(changed, expected[:, None].expand(40, 16))
    assert len(velocity[::5].flatten(0, 1).unique(dim=0)) == 16 * 9


def test_random_times_are_within_their_range():
    env = told(tree.replace(WIDE, resample_seconds=(0.04, 0.2), standing_fraction=0.0))
    (first, _), (states, _) = rollout(batch(env), 64, torch.zeros(40, 64, 1))
    until = torch.cat([first.memory["command"]["until"][None], states.memory["command"]["until"]])
    assert float(until[0].min()) >= 0.04 and float(until[0].max()) <= 0.2
    due = until[1:] != until[:-1]
    lasts = (until[1:] - states.physics.time)[due]
    assert float(lasts.min()) >= 0.04 and float(lasts.max()) <= 0.2
    # Uniform: mean 0.12 s, deviation 0.046 s.
    assert float(lasts.mean()) == pytest.approx(0.12, abs=5 * 0.046 / math.sqrt(len(lasts)))
    assert torch.equal(due, states.physics.time > until[:-1] - 1e-6)


def test_a_reward_sees_the_command_that_the_policy_saw():
    env = told(WIDE)
    (_, obs), (_, transitions) = rollout(batch(env), 4, torch.zeros(12, 4, 1))
    seen = torch.cat([obs["policy"][None], transitions.obs["policy"]])[:-1, :, 1]
    torch.testing.assert_close(transitions.reward, seen.double() * DT, rtol=1e-6, atol=0)


# --- Headings ---


def test_the_yaw_rate_turns_to_the_heading_and_is_zero_there():
    commands = tree.replace(HEADINGS, heading_fraction=1.0, heading_gain=0.5, standing_fraction=0.0, smallest=0.05)
    env = told(commands)
    update = velocity_commands(engine().model, commands)["command"].update
    state, _ = env.reset(env.params, random.key(0))
    memory = {
        **state.memory["command"],
        "heading": exact(3.0),
        "drawn": exact([0.4, 0.0, 0.3]),
        "until": exact(9.0),
    }
    before = tree.replace(state, memory={**state.memory, "command": memory})
    # yaw and the rate by hand: half the way that is left, the short way round, clipped to [-0.5, 0.8].
    for yaw, rate in [
        (3.0, 0.0),
        (2.0, 0.5),
        (3.1, -0.05),
        (0.5, 0.8),  # 1.25, clipped
        (-3.0, -0.5 * (2 * math.pi - 6.0)),  # -0.1416: past pi and back would be the long way
        (-1.0, -0.5),  # a way of 4 rad left or 2.283 rad right: -1.14, clipped
    ]:
        now = update(env.params, before, torch.zeros(1), turned(yaw))
        expected = exact([0.4, 0.0, rate])
        torch.testing.assert_close(now["velocity"], expected, rtol=0, atol=1e-12)
    # Without a way to walk the command is small there, so exactly zero; as soon as it must turn again it does.
    memory = {**memory, "drawn": torch.zeros(3).double()}
    before = tree.replace(state, memory={**state.memory, "command": memory})
    arrived = update(env.params, before, torch.zeros(1), turned(2.95))
    assert arrived["velocity"].tolist() == [0.0, 0.0, 0.0]
    before = tree.replace(before, memory={**before.memory, "command": arrived})
    again = update(env.params, before, torch.zeros(1), turned(2.0))
    torch.testing.assert_close(again["velocity"], exact([0.0, 0.0, 0.5]), rtol=0, atol=1e-12)


def test_shares_of_headings_and_of_standing():
    env = told(tree.replace(HEADINGS, standing_fraction=0.25, heading_fraction=0.4, smallest=0.0))
    state, _ = torch.func.vmap(env.reset, in_dims=(None, 0))(env.params, random.split(random.key(2), 2000))
    command = state.memory["command"]
    standing = (command["velocity"] == 0).all(1)
    # 2000 * 0.25 = 500 (deviation 19.4); 2000 * 0.75 * 0.4 = 600 (20.5). A robot told to stand has no heading.
    assert abs(int(standing.sum()) - 500) < 97
    assert abs(int(command["turning"].sum()) - 600) < 103
    assert not (standing & command["turning"]).any()
    # Uniform on +-pi: deviation 1.814.
    assert float(command["heading"].mean()) == pytest.approx(0.0, abs=5 * 1.814 / math.sqrt(2000))
    assert float(command["heading"].abs().max()) <= math.pi


# --- The same for any company ---


@functools.cache
def restless():
    env = told(HEADINGS, end=lambda params, physics: physics.qpos[7].abs() > 0.5)
    return auto_reset(time_limit(env, 0.3))


def test_recorded_equals_vmap_equals_loop():
    env, acts = restless(), 3 * actions(40, 3)
    first, recorded = rollout(batch(env), 3, acts)
    mapped = env._replace(
        reset=torch.func.vmap(env.reset, in_dims=(None, 0)), step=torch.func.vmap(env.step, in_dims=(None, 0, 0))
    )
    assert_same((first, recorded), rollout(mapped, 3, acts))
    state, obs = env.reset(env.params, random.split(random.key(7), 3)[1])
    assert_same((state, obs), tree.index(first, 1))
    for t in range(20):
        state, transition = env.step(env.params, state, acts[t, 1])
        assert_same((state, transition), tree.index(recorded, (t, 1)))
    assert recorded[1].terminated.any() and recorded[1].truncated.any()


def test_neighbours_do_not_matter():
    env, acts = restless(), 3 * actions(25, 64)
    _, few = rollout(batch(env), 4, acts[:, :4])
    _, many = rollout(batch(env), 64, acts)
    assert_same(few, rows(many, slice(0, 4)))


# --- Mistakes ---


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (lambda: VelocityCommands(vx=(1.0, 0.0)), "vx must be two finite .* got 1.0 and 0.0"),
        (lambda: VelocityCommands(yaw_rate=(0.0, math.inf)), "yaw_rate must be two finite .* got 0.0 and inf"),
        (lambda: VelocityCommands(vy=(math.nan, 0.0)), "vy must be two finite .* got nan"),
        (lambda: VelocityCommands(resample_seconds=(0.0, 1.0)), "resample_seconds must be above 0 s, got 0.0"),
        (lambda: VelocityCommands(standing_fraction=1.5), r"standing_fraction must be in \[0, 1\], got 1.5"),
        (lambda: VelocityCommands(heading_fraction=math.nan), r"heading_fraction must be in \[0, 1\], got nan"),
        (lambda: VelocityCommands(heading_gain=-1.0), "heading_gain must be 0 or more, got -1.0"),
        (lambda: VelocityCommands(smallest=math.nan), "smallest must be 0 or more, got nan"),
        (lambda: velocity_commands(engine().model, WIDE, "hinge"), "free joint; 'hinge' is a hinge"),
        (lambda: velocity_commands(engine().model, WIDE, "pelvis"), "no joint 'pelvis'"),
        (lambda: fixed_command(tree.replace(told(WIDE).params, values={})), "no velocity commands: .* command_vx"),
    ],
)
def test_mistakes_are_told_in_one_line(mistake, words):
    with pytest.raises(InputError, match=words) as caught:
        mistake()
    assert "\n" not in str(caught.value)
