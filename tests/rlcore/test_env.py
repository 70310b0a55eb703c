"""Environments: the same bits for any number of robots beside, and each wrapper does what it says."""

import functools
import itertools
import math

import mujoco
import numpy as np
import pytest
import torch

from rlcore import env as env_module
from rlcore import random, tree
from rlcore.env import (
    Memory,
    action_delay,
    auto_reset,
    batch,
    encoder_offset,
    make_env,
    observation_delay,
    observation_history,
    observation_noise,
    random_pushes,
    scale_actions,
    time_limit,
)
from rlcore.errors import InputError
from rlcore.measurement import Parts
from rlcore.physics.engine import FAULT_ACTION, drain_faults
from rlcore.physics.mujoco import MujocoEngine
from rlcore.rewards import Term, action_rate, action_size, alive, termination

# A floating base without gravity that carries a driven arm: pushes, sensors and joints in few lines.
MODEL = """
<mujoco model="bug">
  <option timestep="0.01" gravity="0 0 0"><flag contact="disable"/></option>
  <worldbody>
    <body name="base">
      <freejoint name="root"/>
      <geom size="0.1" mass="1"/>
      <body name="arm" pos="0 0 0.1">
        <joint name="hinge" axis="0 1 0"/>
        <geom type="capsule" fromto="0 0 0 0 0 0.3" size="0.02" mass="0.2"/>
      </body>
    </body>
  </worldbody>
  <actuator><motor name="turn" joint="hinge" gear="0.05" ctrlrange="-2 3"/></actuator>
  <sensor><jointpos name="angle" joint="hinge"/><framepos name="tip" objtype="geom" objname="tip"/></sensor>
</mujoco>
""".replace('size="0.02"', 'name="tip" size="0.02"')
UNBOUNDED = MODEL.replace('ctrlrange="-2 3"', "")
DT = 0.02


@functools.cache
def engine(num_threads=1, model=MODEL):
    return MujocoEngine(mujoco.MjModel.from_xml_string(model), num_threads)


def initial(params, key):
    """The base at the origin and at rest; the arm anywhere within 0.3 rad, moving."""
    draw = random.uniform(key, (2,), -0.3, 0.3, dtype=torch.float64)
    zero = draw.new_zeros(6)
    return torch.cat([zero[:3], draw.new_ones(1), zero[:3], draw[:1]]), torch.cat([zero, 4 * draw[1:]])


def at_rest(params, key):
    draw = random.uniform(key, (2,), dtype=torch.float64)
    return torch.cat([0 * draw, 0 * draw[:1], 1 + 0 * draw[:1], 0 * draw, 0 * draw]), torch.zeros(7).double()


def observe(params, state):
    policy = {"angle": state.physics.qpos[7:8], "speed": state.physics.qvel[6:7]}
    return {"policy": policy, "critic": {**policy, "tip": state.physics.sensordata[1:4]}}


def fallen(params, physics):
    return physics.qpos[7].abs() > 0.5


TERMS = [Term("alive", 1.0, alive), Term("effort", -0.1, action_size), Term("rate", -0.01, action_rate)]


def bug(num_threads=1, start=initial, end=fallen, **kwargs):
    return make_env(
        kwargs.pop("engine", None) or engine(num_threads),
        name="bug",
        control_dt=DT,
        initial=start,
        observe=observe,
        terms=kwargs.pop("terms", TERMS),
        terminate=end,
        **kwargs,
    )


def dressed(num_threads=1):
    """Every wrapper at once."""
    env = time_limit(scale_actions(bug(num_threads)), 0.18)
    env = observation_history(action_delay(random_pushes(env, 0.06, 0.5), (0, 2)), 3)
    env = observation_delay(encoder_offset(env, 0.1, "angle[0]"), (0, 2))
    return auto_reset(observation_noise(env, {"tip": 0.05}, "critic"))


def actions(steps, num, seed=0, size=1):
    return random.uniform(random.key(1000 + seed), (steps, num, size), -1.0, 1.0)


def assert_same(a, b):
    left, right = tree.named_leaves(a), tree.named_leaves(b)
    assert [name for name, _ in left] == [name for name, _ in right]
    for (name, x), (_, y) in zip(left, right, strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y), name


def rollout(env, num, acts, params=None, key=7):
    """`[T, B]` states and transitions of a batched environment (the first state left out)."""
    params = env.params if params is None else params
    state, obs = env.reset(params, random.split(random.key(key), num))
    out = [(state, obs)]
    for action in acts:
        out.append(env.step(params, out[-1][0], action))
    return out[0], tree.stack(out[1:])


def rows(value, selection):
    return tree.map_leaves(lambda x: x[:, selection], value)


# --- The same for any company ---


def test_recorded_equals_vmap_equals_loop():
    env, acts = dressed(), actions(24, 4)
    first, recorded = rollout(batch(env), 4, acts)
    mapped = env._replace(
        reset=torch.func.vmap(env.reset, in_dims=(None, 0)),
        step=torch.func.vmap(env.step, in_dims=(None, 0, 0)),
    )
    assert_same((first, recorded), rollout(mapped, 4, acts))
    keys = random.split(random.key(7), 4)
    for i in range(4):
        state, obs = env.reset(env.params, keys[i])
        assert_same((state, obs), tree.index(first, i))
        for t in range(24):
            state, transition = env.step(env.params, state, acts[t, i])
            assert_same((state, transition), tree.index(recorded, (t, i)))
    # The trajectory held both kinds of ending, and went on after them.
    assert recorded[1].terminated[:-1].any() and recorded[1].truncated[:-1].any()


def test_neighbours_do_not_matter():
    env, acts = dressed(), actions(15, 512)
    _, few = rollout(batch(env), 8, acts[:, :8])
    _, many = rollout(batch(env), 512, acts)
    assert_same(few, rows(many, slice(0, 8)))


def test_physics_threads_do_not_matter():
    acts = actions(15, 32)
    assert_same(*(rollout(batch(dressed(num)), 32, acts) for num in (1, 2)))


def test_parameters_of_each_robot():
    env = dressed()
    acts = actions(12, 3)
    mass = env.engine.nominal("body_mass")["body_mass"]
    own = [
        tree.replace(
            env.params,
            physics={"body_mass": mass * (1 + i)},
            weights={name: w * (i - 1.0) for name, w in env.params.weights.items()},
            values={name: v * i for name, v in env.params.values.items()},
        )
        for i in range(3)
    ]
    _, together = rollout(batch(env, shared_params=False), 3, acts, tree.stack(own))
    for i, params in enumerate(own):
        # Beside others with its own parameters, a robot does what it does where all share them.
        _, alone = rollout(batch(env), 3, acts, params)
        assert_same(rows(together, i), rows(alone, i))
    angles = together[0].physics.qpos[:3, :, 7]
    assert not torch.equal(angles[:, 1], angles[:, 2])
    assert torch.equal(together[1].reward[:, 1], torch.zeros(12).double())


def test_compiled_equals_eager(run_python):
    source = """
import torch
from rlcore import random, tree
from rlcore.env import *
from tasks.cartpole import make_cartpole

env = observation_history(action_delay(scale_actions(make_cartpole(1, seconds=0.1)), (0, 2)), 2)
env = auto_reset(observation_noise(env, {"position[0]": 0.1}))
eager = torch.func.vmap(env.step, in_dims=(None, 0, 0))
compiled = torch.compile(eager, backend="aot_eager")
state, _ = batch(env).reset(env.params, random.split(random.key(0), 3))
acts = random.uniform(random.key(1), (12, 3, 1), -1.0, 1.0)
ends = 0
for action in acts:
    ours, theirs = eager(env.params, state, action), compiled(env.params, state, action)
    for (name, a), (_, b) in zip(tree.named_leaves(ours), tree.named_leaves(theirs), strict=True):
        assert torch.equal(a, b), name
    state, transition = ours
    ends += int(transition.truncated.sum())
print("same", ends)
"""
    # Three robots end twice each in twelve steps of at most five.
    assert run_python(source).split() == ["same", "6"]


# --- A task from its parts ---


def test_specification():
    spec = bug().spec
    assert spec.observations == {
        "policy": (("angle", 1), ("speed", 1)),
        "critic": (("angle", 1), ("speed", 1), ("tip", 3)),
    }
    assert spec.observation_size("critic") == 5 and spec.action_size == 1
    assert (spec.action_low, spec.action_high) == ((-2.0,), (3.0,))
    assert spec.actions == ("turn",) and spec.substeps == 2 and spec.terms == ("alive", "effort", "rate")
    wide = bug(action_bounds=([-1, -1], [1, 1]), control=lambda p, s, a: a[:1] + a[1:]).spec
    assert wide.action_size == 2 and len(set(wide.actions)) == 2


def test_sensors_are_current_after_a_reset():
    env = auto_reset(bug())
    (state, _), (states, transitions) = rollout(batch(env), 16, 3 * actions(30, 16))
    done = transitions.terminated
    assert 5 < int(done.sum()) < 400
    model = mujoco.MjModel.from_xml_string(MODEL)
    data = mujoco.MjData(model)

    def sensors(qpos):
        data.qpos[:] = qpos
        mujoco.mj_forward(model, data)
        return data.sensordata.copy()

    reset = tree.map_leaves(lambda x: x[done], states.physics)
    for physics in (state.physics, reset):
        for qpos, sensordata in zip(physics.qpos, physics.sensordata, strict=True):
            np.testing.assert_allclose(sensordata, sensors(qpos), atol=1e-14)
    # What the policy sees after a reset comes from these, not from before.
    seen = transitions.obs["critic"][done][:, 2:5]
    assert torch.equal(seen, reset.sensordata[:, 1:4].float())


def test_memory_and_metrics_of_a_task():
    count = Memory(
        init=lambda params, physics, key: torch.zeros_like(physics.time),
        update=lambda params, before, action, physics: before.memory["pushed"] + action.sum(),
    )
    env = bug(
        memory={"pushed": count},
        metrics=lambda params, before, action, after: {"twice": 2 * action.sum()},
        values={"level": 3},
    )
    assert env.params.values["level"] == 3.0
    state, _ = env.reset(env.params, random.key(0))
    for value in (0.25, -1.0, math.nan, 0.5):
        state, transition = env.step(env.params, state, torch.tensor([value]))
        assert transition.metrics["twice"] == (0 if math.isnan(value) else 2 * value)
    # 0.25 - 1 + 0.5: an action that is no number is remembered as none.
    assert state.memory["pushed"] == -0.25


def test_metrics_of_a_wrong_shape_are_refused():
    for value, words in (
        (torch.zeros(2), r"metric 'speed' must be one number \[\], got shape \[2\]"),
        (Parts(torch.zeros(1), ("left", "right")), r"metric 'speed' must be \[2\] for left, right"),
    ):
        with pytest.raises(InputError, match=words):
            bug(metrics=lambda params, before, action, after, value=value: {"speed": value})


def test_terms_see_whether_the_step_ended_the_episode():
    terms = [Term("fall", -200.0, termination), Term("watched", 0.0, action_size)]
    env = time_limit(bug(terms=terms), 10 * DT)
    state, _ = env.reset(env.params, random.key(0))
    assert not state.memory["terminated"]
    seen = []
    for _ in range(10):
        state, transition = env.step(env.params, state, torch.tensor([3.0]))
        seen.append(bool(transition.terminated))
        assert bool(state.memory["terminated"]) == seen[-1] == bool(transition.raw_terms[0])
        # -200 per second times 0.02 s, once.
        assert float(transition.reward) == (-4.0 if seen[-1] else 0.0)
        # A term of no weight is told as it is: 3^2.
        assert float(transition.raw_terms[1]) == 9.0 and transition.terms["watched"] == 0.0
        if seen[-1]:
            break
    assert seen[-1] and len(seen) > 1
    # The clock ends an episode without termination, and a fault with it.
    still = time_limit(bug(terms=terms, end=lambda p, s: s.time < 0), DT)
    for action, ended in ((0.0, False), (math.nan, True)):
        state, _ = still.reset(still.params, random.key(0))
        _, transition = still.step(still.params, state, torch.tensor([action]))
        assert bool(transition.truncated) != ended and bool(transition.raw_terms[0]) == ended
    drain_faults()


# --- Actions that are no numbers ---


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_action_ends_one_episode_and_harms_no_other(value):
    env = batch(auto_reset(time_limit(bug(), 10.0)))
    acts = 0.2 * actions(8, 4)
    bad = acts.clone()
    bad[3, 2] = value
    drain_faults()
    _, (states, good) = rollout(env, 4, acts)
    assert not drain_faults()
    _, (bad_states, broken) = rollout(env, 4, bad)
    faults = drain_faults()
    assert [fault.code for fault in faults] == [FAULT_ACTION]
    # The record names the robot's key, so that the step can be found again.
    assert torch.equal(torch.from_numpy(faults[0].arrays["key"]), states.key[2, 2])
    others = torch.tensor([0, 1, 3])
    assert_same(rows((states, good), others), rows((bad_states, broken), others))
    expected = torch.zeros(8, 4, dtype=torch.bool)
    expected[3, 2] = True
    assert torch.equal(broken.terminated, expected)
    assert torch.equal(broken.metrics["fault"], expected.double())
    assert not broken.truncated.any()
    assert bad_states.steps[3:, 2].tolist() == [0, 1, 2, 3, 4]
    for name, leaf in tree.named_leaves((bad_states, broken)):
        assert torch.isfinite(leaf).all(), name


def test_bad_action_waits_for_its_time():
    env = action_delay(bug(), 2)
    state, _ = env.reset(env.params, random.key(0))
    ended = []
    for value in (0.0, math.nan, 0.0, 0.0, 0.0):
        state, transition = env.step(env.params, state, torch.tensor([value]))
        ended.append(bool(transition.terminated))
        assert torch.isfinite(transition.obs["policy"]).all() and torch.isfinite(transition.reward)
    assert ended == [False, False, False, True, False]


# --- Automatic resets ---


def test_auto_reset_begins_a_fresh_episode():
    plain = time_limit(bug(), 10.0)
    env = auto_reset(plain)
    params, start = env.params, random.key(5)
    state, _ = env.reset(params, start)
    bare, _ = plain.reset(params, start)
    total, length = 0.0, 0
    raw, weighted = torch.zeros(3).double(), torch.zeros(3).double()
    for _ in range(200):
        action = torch.tensor([3.0])
        state, transition = env.step(params, state, action)
        bare, expected = plain.step(params, bare, action)
        total, length = total + float(expected.reward), length + 1
        assert float(transition.metrics["episode_return"]) == pytest.approx(total, abs=1e-12)
        assert int(transition.metrics["episode_length"]) == length
        raw, weighted = raw + expected.raw_terms, weighted + torch.stack(list(expected.terms.values()))
        torch.testing.assert_close(transition.metrics["episode_terms"], torch.stack([raw, weighted]))
        assert_same(transition.next_obs, expected.next_obs)
        if expected.terminated:
            break
        assert_same(transition.obs, expected.obs)
    assert expected.terminated and transition.terminated and length > 1
    fresh, fresh_obs = env.reset(params, bare.key)
    assert_same(state, fresh)
    assert_same(transition.obs, fresh_obs)
    assert not torch.equal(transition.obs["policy"], transition.next_obs["policy"])
    # 1, 3^2 and the first action's change, of weights 1, -0.1 and -0.01.
    assert raw.tolist() == [length, 9.0 * length, 9.0]
    torch.testing.assert_close(weighted, DT * torch.tensor([1.0, -0.1, -0.01]).double() * raw)
    assert int(state.steps) == 0 and float(state.memory["episode_return"]) == 0.0
    assert not state.memory["episode_terms"].any()
    assert float(state.memory["last_action"].abs().sum()) == 0.0 and float(state.physics.time) == 0.0


def test_every_episode_begins_elsewhere():
    env = auto_reset(time_limit(bug(end=lambda p, s: s.time < 0), 2 * DT))
    (first, _), (states, transitions) = rollout(batch(env), 16, actions(20, 16))
    begins = torch.cat([first.physics.qpos[None, :, 7], states.physics.qpos[1::2, :, 7]])
    assert transitions.truncated[1::2].all() and not transitions.truncated[::2].any()
    assert begins.numel() == 16 * 11 and len(begins.unique()) == 16 * 11
    # They are spread as the task asks for: uniform on +-0.3, of deviation 0.3 / sqrt(3) = 0.173.
    assert float(begins.std()) == pytest.approx(0.173, abs=0.03)


def test_an_environment_without_terms():
    env = auto_reset(bug(terms=[]))
    _, (_, transitions) = rollout(batch(env), 2, 3 * actions(20, 2))
    assert not transitions.reward.any() and transitions.terms == {} and transitions.raw_terms.shape == (20, 2, 0)
    assert transitions.terminated.any() and transitions.metrics["episode_terms"].shape == (20, 2, 2, 0)


# --- Time limit ---


def test_time_limit_truncates_and_termination_wins():
    forever = time_limit(bug(end=lambda params, physics: physics.time < 0), 5 * DT)
    _, (_, late) = rollout(batch(forever), 2, torch.zeros(7, 2, 1))
    assert late.truncated[:, 0].tolist() == [False] * 4 + [True] * 3
    assert not late.terminated.any()
    both = time_limit(bug(end=lambda params, physics: physics.time > 4.5 * DT), 5 * DT)
    _, (_, over) = rollout(batch(both), 2, torch.zeros(5, 2, 1))
    assert over.terminated[:, 0].tolist() == [False] * 4 + [True]
    assert not over.truncated.any()


# --- Actions ---


@pytest.mark.parametrize(
    ("low", "high", "action", "expected"),
    [
        (-1.0, 1.0, -1.0, -2.0),
        (-1.0, 1.0, 1.0, 3.0),
        (-1.0, 1.0, 0.0, 0.5),
        (-1.0, 1.0, 0.5, 1.75),
        (-1.0, 1.0, -7.0, -2.0),
        (-1.0, 1.0, math.inf, 3.0),
        (0.0, 10.0, 0.0, -2.0),
        (0.0, 10.0, 4.0, 0.0),
        (0.0, 10.0, 11.0, 3.0),
    ],
)
def test_scale_actions_maps_onto_the_bounds(low, high, action, expected):
    env = scale_actions(bug(), low, high)
    assert (env.spec.action_low, env.spec.action_high) == ((low,), (high,))
    state, _ = env.reset(env.params, random.key(0))
    after, _ = env.step(env.params, state, torch.tensor([action]))
    assert float(after.memory["last_action"]) == pytest.approx(expected, abs=1e-12)
    plain = bug()
    other, _ = plain.step(plain.params, state, after.memory["last_action"])
    assert_same(after.physics, other.physics)


def test_no_delay_is_no_wrapper():
    acts = actions(10, 3)
    (_, _), (states, transitions) = rollout(batch(action_delay(bug(), 0)), 3, acts)
    _, (plain_states, plain) = rollout(batch(bug()), 3, acts)
    assert_same(transitions, plain)
    assert_same(states.physics, plain_states.physics)


@pytest.mark.parametrize("delay", [1, 3])
def test_delayed_actions_arrive_exactly_that_late(delay):
    acts = actions(10, 3)
    shifted = torch.cat([torch.zeros(delay, 3, 1), acts[:-delay]])
    _, (states, transitions) = rollout(batch(action_delay(bug(), delay)), 3, acts)
    _, (plain_states, plain) = rollout(batch(bug()), 3, shifted)
    assert_same(transitions.obs, plain.obs)
    assert_same(transitions.terminated, plain.terminated)
    assert_same(states.physics, plain_states.physics)


def test_late_actions_are_remembered_and_judged_as_they_were_given():
    """A controller knows what it commands, not what has arrived."""
    acts = actions(10, 3).double()
    _, (states, transitions) = rollout(batch(action_delay(bug(), 2)), 3, acts)
    assert torch.equal(states.memory["last_action"], acts)
    effort, rate = (transitions.raw_terms[..., 1 + i] for i in range(2))
    before = torch.cat([torch.zeros(1, 3, 1), acts[:-1]])
    torch.testing.assert_close(effort, acts[..., 0] ** 2)
    torch.testing.assert_close(rate, (acts - before)[..., 0] ** 2)


@pytest.mark.parametrize("scaled_first", [True, False])
def test_late_actions_are_scaled_wherever_the_delay_is(scaled_first):
    acts = actions(6, 3)
    env = action_delay(scale_actions(bug()), 1) if scaled_first else scale_actions(action_delay(bug(), 1))
    _, (states, _) = rollout(batch(env), 3, acts)
    # The task's own action 0 until the first one arrives.
    plain = scale_actions(bug())
    low, high = bug().spec.action_low[0], bug().spec.action_high[0]
    nothing = torch.full((1, 3, 1), -(high + low) / (high - low))
    _, (expected, _) = rollout(batch(plain), 3, torch.cat([nothing, acts[:-1]]))
    torch.testing.assert_close(states.physics.qpos, expected.physics.qpos)


def test_a_delay_needs_a_step_that_knows_of_it():
    foreign = bug()
    foreign = foreign._replace(spec=tree.replace(foreign.spec, holds_actions=False))
    with pytest.raises(InputError, match="bug is not made by make_env"):
        action_delay(foreign, 1)


def test_random_delays_cover_their_range_and_hold_for_an_episode():
    env = auto_reset(time_limit(action_delay(bug(end=lambda p, s: s.time < 0), (1, 3)), 2 * DT))
    (first, _), (states, _) = rollout(batch(env), 600, torch.zeros(4, 600, 1))
    begin, one, two, three, four = (
        s.memory["action_delay"]["steps"] for s in [first, *(tree.index(states, t) for t in range(4))]
    )
    # 600 draws of three values: 200 each, with a deviation of sqrt(600 * 2 / 9) = 11.5.
    for steps in (begin, two):
        counts = torch.bincount(steps, minlength=5).tolist()
        assert counts[0] == counts[4] == 0 and all(abs(n - 200) < 60 for n in counts[1:4])
    assert torch.equal(begin, one) and torch.equal(two, three)
    assert not torch.equal(begin, two) and not torch.equal(two, four)
    # Two robots' actions arrive as late as their own delays say.
    env = action_delay(bug(), (0, 3))
    state, _ = batch(env).reset(env.params, random.split(random.key(7), 8))
    late = state.memory["action_delay"]["steps"]
    acts = actions(6, 8)
    _, (states, _) = rollout(batch(env), 8, acts)
    assert len(late.unique()) > 1
    arriving = torch.zeros_like(acts)
    for i, k in enumerate(late.tolist()):
        arriving[k:, i] = acts[: 6 - k, i]
    _, (expected, _) = rollout(batch(bug()), 8, arriving)
    assert_same(states.physics, expected.physics)


# --- Observations ---


def test_noise_is_within_its_scale_and_never_the_same():
    env = observation_noise(bug(), {"angle": 0.2})
    acts = actions(20, 64)
    (_, first_plain), (_, plain) = rollout(batch(bug()), 64, acts)
    (_, first_noisy), (states, noisy) = rollout(batch(env), 64, acts)
    noise = torch.cat([
        (first_noisy["policy"] - first_plain["policy"])[None],
        noisy.next_obs["policy"] - plain.next_obs["policy"],
    ])  # fmt: skip
    angle, speed = noise.unbind(-1)
    assert not speed.any()
    # Another group is another observation, and stays exact.
    assert torch.equal(noisy.obs["critic"], plain.obs["critic"])
    assert_same(noisy.obs, noisy.next_obs)
    assert float(angle.abs().max()) <= 0.2 + 1e-6
    # Uniform on +-0.2: mean 0, deviation 0.2 / sqrt(3) = 0.1155; 1344 draws.
    assert float(angle.mean()) == pytest.approx(0.0, abs=5 * 0.1155 / math.sqrt(1344))
    assert float(angle.std()) == pytest.approx(0.1155, abs=0.006)
    # Rounding of observation + noise may make a few of 1344 equal.
    assert len(angle.flatten().unique()) > 1300
    _, (_, few) = rollout(batch(env), 3, acts[:, :3])
    assert torch.equal(few.obs["policy"], noisy.obs["policy"][:, :3])
    _, (plain_states, _) = rollout(batch(bug()), 64, acts)
    assert_same(states, plain_states)


def test_no_noise_is_no_wrapper():
    acts = actions(10, 3)
    assert_same(rollout(batch(observation_noise(bug(), {"angle": 0.0})), 3, acts), rollout(batch(bug()), 3, acts))


def test_two_groups_have_noise_of_their_own():
    env = observation_noise(observation_noise(bug(), {"angle": 0.1}), {"angle": 0.1}, "critic")
    _, obs = env.reset(env.params, random.key(1))
    _, exact = bug().reset(env.params, random.key(1))
    errors = [float(obs[g][0] - exact[g][0]) for g in ("policy", "critic")]
    assert errors[0] != 0.0 and errors[1] != 0.0 and errors[0] != pytest.approx(errors[1], abs=1e-4)


def test_history_is_filled_by_the_first_and_ordered():
    env = observation_history(bug(), 3)
    acts = actions(6, 2)
    (_, first), (_, plain) = rollout(batch(bug()), 2, acts)
    (_, first_seen), (_, seen) = rollout(batch(env), 2, acts)
    assert env.spec.observation_size("policy") == 6
    assert [part for part, _ in env.spec.parts("policy")] == [
        "angle[-2]", "speed[-2]", "angle[-1]", "speed[-1]", "angle[0]", "speed[0]",
    ]  # fmt: skip
    frames = [first["policy"]] * 3 + list(plain.next_obs["policy"])
    assert torch.equal(first_seen["policy"], torch.cat(frames[:3], dim=1))
    for t in range(6):
        assert torch.equal(seen.obs["policy"][t], torch.cat(frames[t + 1 : t + 4], dim=1))
    assert torch.equal(seen.obs["critic"], plain.obs["critic"])
    assert_same(seen.obs, seen.next_obs)


def test_history_begins_anew_with_an_episode():
    env = auto_reset(time_limit(observation_history(bug(), 2), 2 * DT))
    _, (_, seen) = rollout(batch(env), 3, actions(4, 3))
    begin = seen.obs["policy"][1]
    assert torch.equal(begin[:, :2], begin[:, 2:])
    ended = seen.next_obs["policy"][1]
    assert not torch.equal(ended[:, :2], ended[:, 2:])


def test_encoders_are_off_by_a_constant_of_the_episode():
    env = auto_reset(time_limit(encoder_offset(bug(end=lambda p, s: s.time < 0), 0.02, "angle"), 3 * DT))
    bare = auto_reset(time_limit(bug(end=lambda p, s: s.time < 0), 3 * DT))
    acts = actions(6, 400)
    (first, first_seen), (states, seen) = rollout(batch(env), 400, acts)
    (_, first_plain), (plain_states, plain) = rollout(batch(bare), 400, acts)
    errors = torch.cat([(first_seen["policy"] - first_plain["policy"])[None], seen.obs["policy"] - plain.obs["policy"]])
    angle, speed = errors.unbind(-1)
    assert not speed.any() and torch.equal(seen.obs["critic"], plain.obs["critic"])
    assert_same(states.physics, plain_states.physics)
    # Frames 0 to 2 are of the first episode, 3 to 5 of the second. A float32 of size 0.5 is exact to 6e-8.
    for episode in (angle[0:3], angle[3:6]):
        assert float((episode - episode[0]).abs().max()) < 2e-7
        # Uniform on +-0.02: mean 0, deviation 0.02 / sqrt(3) = 0.01155.
        assert float(episode[0].abs().max()) <= 0.02 + 1e-7
        assert float(episode[0].mean()) == pytest.approx(0.0, abs=5 * 0.01155 / math.sqrt(400))
        assert float(episode[0].std()) == pytest.approx(0.01155, abs=0.0015)
    assert abs(float(torch.corrcoef(angle[[0, 3]])[0, 1])) < 0.25
    # What an episode ends with has that episode's offset, and the offset is what the state says.
    assert torch.allclose((seen.next_obs["policy"] - plain.next_obs["policy"])[2, :, 0], angle[0], rtol=0, atol=2e-7)
    offset = first.memory["encoder_offset(policy)"]
    assert torch.equal(first_seen["policy"], first_plain["policy"] + offset) and not offset[:, 1].any()


def test_exact_encoders_and_prompt_observations_are_no_wrappers():
    acts = actions(10, 3)
    _, (_, plain) = rollout(batch(bug()), 3, acts)
    for env in (encoder_offset(bug(), 0.0, "angle"), observation_delay(bug(), 0)):
        assert_same(rollout(batch(env), 3, acts)[1][1], plain)


@pytest.mark.parametrize("delay", [1, 3])
def test_observations_are_exactly_that_late(delay):
    env = observation_delay(bug(), delay)
    acts = actions(8, 3)
    (_, first), (plain_states, plain) = rollout(batch(bug()), 3, acts)
    (_, first_seen), (states, seen) = rollout(batch(env), 3, acts)
    frames = [first["policy"]] * delay + [first["policy"], *plain.next_obs["policy"]]
    assert torch.equal(first_seen["policy"], frames[0])
    assert torch.equal(seen.obs["policy"], torch.stack(frames[1:9]))
    assert torch.equal(seen.obs["critic"], plain.obs["critic"])
    assert_same(seen.obs, seen.next_obs)
    assert_same(states.physics, plain_states.physics)


def test_each_episode_has_a_delay_and_forgets_the_last():
    name = "observation_delay(policy)"
    env = auto_reset(time_limit(observation_delay(bug(end=lambda p, s: s.time < 0), (0, 2)), 3 * DT))
    bare = auto_reset(time_limit(bug(end=lambda p, s: s.time < 0), 3 * DT))
    acts = actions(6, 600)
    (start, first_seen), (states, seen) = rollout(batch(env), 600, acts)
    (_, first), (_, plain) = rollout(batch(bare), 600, acts)
    frames = torch.cat([first["policy"][None], plain.obs["policy"]])
    shown = torch.cat([first_seen["policy"][None], seen.obs["policy"]])
    late = torch.cat([start.memory[name]["steps"][None], states.memory[name]["steps"]])
    assert torch.equal(late[0:3], late[0].expand(3, -1)) and torch.equal(late[3:6], late[3].expand(3, -1))
    # 600 draws of three values: 200 each, with a deviation of sqrt(600 * 2 / 9) = 11.5.
    for steps in (late[0], late[3]):
        assert all(abs(n - 200) < 60 for n in torch.bincount(steps, minlength=3).tolist()) and int(steps.max()) == 2
    assert not torch.equal(late[0], late[3])
    # Each robot sees the frame that is as old as its delay says, but none older than its episode.
    for begin in (0, 3):
        for t in range(3):
            place = begin + torch.clamp(t - late[begin], min=0)
            assert torch.equal(shown[begin + t], frames[place, torch.arange(600)]), (begin, t)
    # The last observation of an episode is late too.
    both = torch.cat([frames[:3], plain.next_obs["policy"][2:3]])
    assert torch.equal(seen.next_obs["policy"][2], both[3 - late[0], torch.arange(600)])


def test_two_groups_have_offsets_and_delays_of_their_own():
    env = encoder_offset(encoder_offset(bug(), 0.1, "angle"), 0.1, "angle", "critic")
    _, obs = env.reset(env.params, random.key(1))
    _, exact = bug().reset(env.params, random.key(1))
    errors = [float(obs[g][0] - exact[g][0]) for g in ("policy", "critic")]
    assert errors[0] != 0.0 and errors[1] != 0.0 and errors[0] != pytest.approx(errors[1], abs=1e-4)
    env = observation_delay(observation_delay(bug(), (0, 9)), (0, 9), "critic")
    state, _ = batch(env).reset(env.params, random.split(random.key(0), 50))
    steps = [state.memory[f"observation_delay({group})"]["steps"] for group in ("policy", "critic")]
    assert not torch.equal(*steps)


# --- Pushes ---


def test_pushes_come_at_their_rate_and_size():
    speed, steps, num = 0.8, 20, 256
    env = random_pushes(bug(start=at_rest), interval=0.1, speed=speed)
    (first, _), (states, _) = rollout(batch(env), num, torch.zeros(steps, num, 1))
    # Nothing else acts on the base, so that a change of its velocity is a push.
    velocity = torch.cat([first.physics.qvel[None], states.physics.qvel])
    kick = (velocity[1:] - velocity[:-1])[..., :2]
    assert float(velocity[..., 2:].abs().max()) < 1e-9
    size = kick.norm(dim=-1)
    pushed = size > 1e-9
    # The last of 20 steps begins at 0.38 s: at 10 pushes a second 3.8 for each of 256 robots, 973 in all, with a
    # deviation of 31. The few that meet in one step wait for the next.
    count = int(pushed.sum())
    assert abs(count - 973) < 5 * 31
    # Exponential waiting times: mean and deviation 0.1 s.
    waiting = first.memory["next_push"]
    assert float(waiting.min()) >= 0
    assert float(waiting.mean()) == pytest.approx(0.1, abs=5 * 0.1 / 16)
    assert float(waiting.std()) == pytest.approx(0.1, abs=0.03)
    assert float(size.max()) <= speed + 1e-9
    # Sizes are uniform: mean 0.4, deviation 0.231. Directions are even: cos and sin of deviation 0.707.
    assert float(size[pushed].mean()) == pytest.approx(0.4, abs=5 * 0.231 / math.sqrt(count))
    assert float(size[pushed].std()) == pytest.approx(0.231, abs=0.02)
    direction = kick[pushed] / size[pushed, None]
    assert float(direction.mean(0).abs().max()) < 5 * 0.707 / math.sqrt(count)
    # Each robot's count is a Poisson number: its variance is its mean, so robots are pushed independently.
    assert float(pushed.sum(0).double().var()) == pytest.approx(3.8, abs=1.4)


def test_the_time_of_a_push_is_kept_in_the_state_and_drawn_anew_after_it():
    env = random_pushes(bug(start=at_rest), interval=0.1, speed=0.8)
    (first, _), (states, _) = rollout(batch(env), 64, torch.zeros(20, 64, 1))
    at = torch.cat([first.memory["next_push"][None], states.memory["next_push"]])
    began = torch.cat([first.physics.time[None], states.physics.time])[:-1]
    due = began >= at[:-1]
    assert torch.equal(at[1:] != at[:-1], due)
    assert (at[1:] >= at[:-1]).all()
    gaps = (at[1:] - at[:-1])[due]
    assert float(gaps.mean()) == pytest.approx(0.1, abs=5 * 0.1 / math.sqrt(len(gaps)))


def test_pushes_of_no_speed_are_no_wrapper():
    acts = actions(10, 3)
    env = random_pushes(bug(), 0.1, 0.0)
    assert env.params.values["push_speed"] == 0.0
    for (state, out), (plain, expected) in zip(
        rollout(batch(env), 3, acts), rollout(batch(bug()), 3, acts, env.params), strict=True
    ):
        # The time of the next push is all that it remembers besides.
        memory = {name: value for name, value in state.memory.items() if name != "next_push"}
        assert_same((tree.replace(state, memory=memory), out), (plain, expected))


# --- Mistakes ---


def test_nothing_comes_after_automatic_resets():
    env = auto_reset(bug())
    for wrapper in (
        lambda e: time_limit(e, 1.0),
        scale_actions,
        lambda e: action_delay(e, 1),
        lambda e: observation_noise(e, {}),
        lambda e: observation_history(e, 2),
        lambda e: random_pushes(e, 1.0, 1.0),
        lambda e: encoder_offset(e, 0.1, "angle"),
        lambda e: observation_delay(e, 1),
        auto_reset,
    ):
        with pytest.raises(InputError, match="auto_reset"):
            wrapper(env)


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (lambda: time_limit(bug(), 0.001), "time limit .* 0.02 s, got 0.001"),
        (lambda: time_limit(bug(), math.nan), "time limit .* got nan"),
        (lambda: time_limit(bug(), math.inf), "time limit .* got inf"),
        (lambda: time_limit(time_limit(bug(), 1.0), 1.0), "time_limit is already applied to bug"),
        (lambda: scale_actions(bug(), 1.0, 1.0), "low must be below high.* got 1.0 and 1.0"),
        (lambda: scale_actions(bug(), -math.inf, 1.0), "low must be below high.* got -inf"),
        (lambda: scale_actions(bug(engine=engine(1, UNBOUNDED))), "without bounds .*: turn"),
        (lambda: action_delay(bug(), -1), "action delay must be 0 or more.* got -1"),
        (lambda: action_delay(bug(), (2, 1)), r"action delay .* got \(2, 1\)"),
        (lambda: observation_noise(bug(), {"heat": 1.0}), "no part 'heat'; it has: angle, speed"),
        (lambda: observation_noise(bug(), {"angle": -1.0}), "noise scale of 'angle' must be 0 or .* got -1"),
        (lambda: observation_noise(bug(), {"angle": math.nan}), "noise scale of 'angle' .* got nan"),
        (lambda: observation_noise(bug(), {}, "actor"), "no .* group 'actor'; there are: policy, critic"),
        (lambda: encoder_offset(bug(), 0.1), "no part 'joint_position'; it has: angle, speed"),
        (lambda: encoder_offset(bug(), 0.1, "angle", "actor"), "no observation group 'actor'"),
        (lambda: encoder_offset(bug(), -0.1, "angle"), "encoder offset of 'angle' must be 0 or more, got -0.1"),
        (lambda: encoder_offset(bug(), math.nan, "angle"), "encoder offset .* got nan"),
        (lambda: observation_delay(bug(), -1), "observation delay must be 0 or more.* got -1"),
        (lambda: observation_delay(bug(), (2, 1)), r"observation delay .* got \(2, 1\)"),
        (lambda: observation_delay(bug(), 1, "actor"), "no observation group 'actor'"),
        (lambda: observation_history(bug(), 0), "history length must be at least 1, got 0"),
        (lambda: observation_history(bug(), 2, "actor"), "no observation group 'actor'"),
        (lambda: random_pushes(bug(), 0.01, 1.0), "push interval .* 0.02 s, got 0.01"),
        (lambda: random_pushes(bug(), math.nan, 1.0), "push interval .* got nan"),
        (lambda: random_pushes(bug(), 1.0, -1.0), "push speed must be 0 m/s or more, got -1"),
        (lambda: random_pushes(bug(), 1.0, 1.0, "hinge"), "free joint; 'hinge' is a hinge"),
        (lambda: random_pushes(bug(), 1.0, 1.0, "foot"), "no joint 'foot'"),
        (lambda: bug(action_bounds=([0.0], [0.0])), "action_bounds .* higher"),
        (lambda: bug(action_bounds=([0.0, 1.0], [1.0])), "action_bounds"),
        (lambda: bug().spec.observation_size("actor"), "no observation group 'actor'"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_one_line(mistake, words):
    with pytest.raises(InputError, match=words) as caught:
        mistake()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("control_dt", [0.0, -0.02, 0.015, 0.001, math.nan, math.inf])
def test_control_interval_must_be_whole_steps(control_dt):
    with pytest.raises(InputError, match=f"control_dt .* 0.01 s, got {control_dt}"):
        make_env(
            engine(),
            name="x",
            control_dt=control_dt,
            initial=initial,
            observe=observe,
            terms=[],
            terminate=fallen,
        )


def test_terms_need_names_of_their_own():
    with pytest.raises(InputError, match="different names, got a, a"):
        make_env(
            engine(),
            name="x",
            control_dt=DT,
            initial=initial,
            observe=observe,
            terms=[Term("a", 1.0, alive), Term("a", 1.0, alive)],
            terminate=fallen,
        )


def test_draws_of_wrappers_never_meet():
    # A consumer folds its salt and the step into the episode's key, which a reset split in two (0 and 1). Groups of
    # observations add their places to some salts, so those need room for many.
    names = ["_DELAY", "_FIRST_PUSH", "_PUSH", "COMMAND_SALT", "LEVEL_SALT"]
    salts = [getattr(env_module, name) for name in names]
    by_group = [env_module._NOISE, env_module._OBSERVATION_DELAY, env_module._ENCODER]
    assert [*salts, *by_group] == sorted([*salts, *by_group])
    assert min(b - a for a, b in itertools.pairwise([0, *salts, *by_group])) >= 2**24
    assert min(b - a for a, b in itertools.pairwise([*by_group, 2**32])) >= 32 * 2**24
