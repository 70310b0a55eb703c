"""Unrolls and evaluations: their layout, and episodes that are what a plain loop makes of them."""

import pytest
import torch

from rlcore import random, tree
from rlcore.distributions import gaussian_sample
from rlcore.env import auto_reset, batch, observation_history, scale_actions
from rlcore.errors import InputError
from rlcore.measurement import Parts, Ratio
from rlcore.rollout import count_episodes, episode_metrics, evaluate, no_episodes, unroll
from tasks.cartpole import make_cartpole

STEPS, NUM = 30, 3


def assert_same(a, b):
    left, right = tree.named_leaves(a), tree.named_leaves(b)
    assert [name for name, _ in left] == [name for name, _ in right]
    for (name, x), (_, y) in zip(left, right, strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y), name


def act(actor, obs, key):
    """A noisy linear policy; what else it tells is its mean."""
    mean = (obs["policy"] * actor).sum(-1, keepdim=True)
    return gaussian_sample(key, mean, torch.zeros(1)), {"mean": mean}


@pytest.fixture(scope="module")
def env():
    return auto_reset(scale_actions(make_cartpole(1, seconds=0.4)))


@pytest.fixture(scope="module")
def arguments(env):
    actor = torch.tensor([0.5, -1.0, 0.3, 0.2])
    state, obs = batch(env).reset(env.params, random.split(random.key(0), NUM))
    return actor, env.params, state, obs, random.split(random.key(1), STEPS)


def test_layout_and_order(env, arguments):
    batched = batch(env)
    state, obs, trajectory = unroll(batched, act)(*arguments)
    for name, leaf in tree.named_leaves(trajectory):
        assert leaf.shape[:2] == (STEPS, NUM), name
    assert trajectory.action.shape == (STEPS, NUM, 1) and trajectory.obs["policy"].shape == (STEPS, NUM, 4)
    assert trajectory.transition.obs == {}
    # The same by a plain loop.
    actor, params, one, seen, keys = arguments
    ends = 0
    for t in range(STEPS):
        action, extras = act(actor, seen, keys[t])
        one, transition = batched.step(params, one, action)
        row = tree.index(trajectory, t)
        assert_same((row.obs, row.action, row.extras), (seen, action, extras))
        assert_same(row.transition, tree.replace(transition, obs={}))
        seen = transition.obs
        ends += int((transition.terminated | transition.truncated).sum())
        if t + 1 < STEPS:
            assert torch.equal(trajectory.obs["policy"][t + 1], transition.obs["policy"])
    assert_same((state, obs), (one, seen))
    assert ends >= NUM
    # Where no episode ended, what was seen next is what the step led to; where one did, it is not.
    done = trajectory.transition.terminated | trajectory.transition.truncated
    same = (trajectory.obs["policy"][1:] == trajectory.transition.next_obs["policy"][:-1]).all(-1)
    assert torch.equal(same, ~done[:-1])


def test_unroll_is_pure_and_can_be_cut(env, arguments):
    actor, params, state, obs, keys = arguments
    before = tree.map_leaves(torch.clone, arguments)
    run = unroll(batch(env), act)
    whole = run(*arguments)
    assert_same(whole, run(*arguments))
    assert_same(before, arguments)
    state, obs, first = run(actor, params, state, obs, keys[:11])
    state, obs, second = run(actor, params, state, obs, keys[11:])
    joined = tree.map_leaves(lambda a, b: torch.cat([a, b]), first, second)
    assert_same(whole, (state, obs, joined))


def nothing(obs):
    return obs["policy"].new_zeros((len(obs["policy"]), 1))


def test_episodes_are_those_of_a_plain_loop():
    env = scale_actions(make_cartpole(1, seconds=0.8))
    episodes = evaluate(env, nothing, random.key(3), 5, watched=2)
    lengths = []
    for i, key in enumerate(random.split(random.key(3), 5)):
        state, _ = env.reset(env.params, key)
        length, total, ended = 0, 0.0, False
        while not ended:
            state, transition = env.step(env.params, state, torch.zeros(1))
            length, total = length + 1, total + float(transition.reward)
            ended = bool(transition.terminated | transition.truncated)
            if i < 2:
                assert torch.equal(episodes.qpos[length, i], state.physics.qpos)
        # Without control the pole falls: one point per step, no effort.
        assert total == pytest.approx(length, abs=1e-9)
        assert episodes.lengths[i] == length
        assert float(episodes.returns[i]) == pytest.approx(total, abs=1e-12)
        assert bool(episodes.terminated[i]) == bool(transition.terminated)
        if i < 2:
            # A robot that is done stands still.
            assert torch.equal(episodes.qpos[length:, i], state.physics.qpos.expand_as(episodes.qpos[length:, i]))
        lengths.append(length)
    assert len(set(lengths)) > 1 and max(lengths) == len(episodes.qpos) - 1
    # Some fell, and some were cut short by the clock.
    assert episodes.terminated.any() and not episodes.terminated.all()
    assert not episodes.faults.any() and not episodes.metrics["fault"].any()


def test_an_episode_does_not_depend_on_how_many_there_are():
    env = observation_history(scale_actions(make_cartpole(1, seconds=0.8)), 2)

    def policy(obs):
        return (4 * obs["policy"][:, 5:6]).sin()

    few = evaluate(env, policy, random.key(3), 3, watched=1)
    many = evaluate(env, policy, random.key(3), 40, watched=3)
    for name in ("returns", "lengths", "terminated", "faults"):
        assert torch.equal(getattr(few, name), getattr(many, name)[:3]), name
    assert torch.equal(few.metrics["fault"], many.metrics["fault"][:3])
    steps = min(len(few.qpos), len(many.qpos))
    assert torch.equal(few.qpos[:steps], many.qpos[:steps, :1])
    assert len(many.returns.unique()) > 1


def test_metrics_are_means_and_faults_are_told():
    env = scale_actions(make_cartpole(1, seconds=0.2))
    calls: list[None] = []

    def broken(obs):
        calls.append(None)
        action = nothing(obs)
        if len(calls) == 4:
            action[1] = float("nan")
        return action

    told = []
    episodes = evaluate(env, broken, random.key(0), 3, progress=lambda step, going: told.append((step, going)))
    assert episodes.faults.tolist() == [False, True, False] == episodes.terminated.tolist()
    assert episodes.lengths.tolist() == [10, 4, 10]
    # One faulty step of four.
    assert episodes.metrics["fault"].tolist() == [0.0, 0.25, 0.0]
    assert told == [(i, 3 if i < 4 else 2 if i < 10 else 0) for i in range(1, 11)]
    assert torch.isfinite(episodes.returns).all()


def test_measurements_are_averaged_over_each_episode():
    env = scale_actions(make_cartpole(1, seconds=0.8))

    def step(params, state, action):
        after, transition = env.step(params, state, action)
        time = after.steps.double()
        late = torch.where(time > 3, 1.0, 0.0)
        measured = {"t": Parts(torch.stack([time, -time]), ("on", "back")), "late": Ratio(late * time, late)}
        return after, tree.replace(transition, metrics={**transition.metrics, **measured})

    episodes = evaluate(env._replace(step=step), nothing, random.key(3), 5)
    assert episodes.metrics.keys() == {"fault", "t/on", "t/back", "late"}
    n = episodes.lengths.double()
    assert len(n.unique()) > 1 and float(n.min()) > 3
    # 1 to n is (n + 1) / 2 on average, and 4 to n is (n + 4) / 2.
    torch.testing.assert_close(episodes.metrics["t/on"], (n + 1) / 2)
    torch.testing.assert_close(episodes.metrics["t/back"], -(n + 1) / 2)
    torch.testing.assert_close(episodes.metrics["late"], (n + 4) / 2)


def test_parameters_are_those_given():
    env = scale_actions(make_cartpole(1, seconds=0.2))
    weights = {**env.params.weights, "alive": torch.tensor(100.0).double()}
    episodes = evaluate(env, nothing, random.key(0), 2, params=tree.replace(env.params, weights=weights))
    # Ten steps of 0.02 s at 100 per second.
    torch.testing.assert_close(episodes.returns, torch.full((2,), 20.0).double())


def test_mistakes_are_refused(env):
    with pytest.raises(InputError, match="num_envs must be at least 1, got 0"):
        evaluate(make_cartpole(1), nothing, random.key(0), 0)
    with pytest.raises(InputError, match="time limit and no automatic reset"):
        evaluate(env, nothing, random.key(0), 1)


def test_terms_are_averaged_over_the_length_that_an_episode_had(env, arguments):
    actor, params, *rest = arguments
    params = tree.replace(params, weights={**params.weights, "effort": torch.tensor(0.0).double()})
    _, _, trajectory = unroll(batch(env), act)(actor, params, *rest)
    transition = trajectory.transition
    got = episode_metrics(count_episodes(no_episodes(env.spec), transition), env.spec)
    means = []
    for i in range(NUM):
        ends = [t for t in range(STEPS) if transition.terminated[t, i] | transition.truncated[t, i]]
        for begin, end in zip([0, *(t + 1 for t in ends)], ends, strict=False):
            action = trajectory.action[begin : end + 1, i, 0].clamp(-1, 1).double()
            means.append(float(action.square().mean()))
    assert len(means) >= NUM
    # The effort is told though it has no weight; being alive is worth 50 per second in episodes of any length.
    assert float(got["episode_reward_raw/effort"]) == pytest.approx(sum(means) / len(means), rel=1e-6)
    assert float(got["episode_reward/effort"]) == 0.0
    assert float(got["episode_reward/alive"]) == pytest.approx(50.0, rel=1e-9)
    assert float(got["episode_reward_raw/alive"]) == pytest.approx(1.0, rel=1e-9)
    assert len(transition.metrics["episode_length"].unique()) > 3
