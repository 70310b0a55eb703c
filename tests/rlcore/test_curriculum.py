"""Curricula: who rises and who falls, that a level outlives its episode, and what a stage changes."""

import functools

import pytest
import torch

from rlcore import random, tree
from rlcore.commands import VelocityCommands, command_values, velocity_commands
from rlcore.curriculum import Stage, at_level, curriculum
from rlcore.env import auto_reset, batch, make_env, observation_history, random_pushes, time_limit
from rlcore.errors import InputError
from rlcore.measurement import scalars
from rlcore.rewards import Term, alive
from tests.rlcore.test_env import DT, actions, assert_same, at_rest, engine, initial, rollout, rows

STEPS = 4  # of a whole episode
STAGES = [
    Stage("stand", {"command_vx": (1.0, 1.0), "push_speed": 0.0}, {"alive": 1.0}),
    Stage("walk", {"command_vx": (2.0, 2.0), "push_speed": 0.5}, {"alive": 10.0}),
    Stage("turn", {"command_vx": (3.0, 3.0), "push_speed": 1.0}),
]
COMMANDS = VelocityCommands(resample_seconds=(0.03, 0.05), standing_fraction=0.0)


def never(params, physics):
    return physics.time < 0


def given(params, memory, transition):
    """A step is as good as its action says, which a test chooses."""
    return memory["last_action"][0]


def observe(params, state):
    return {"policy": {"command": state.memory["command"]["velocity"], "angle": state.physics.qpos[7:8]}}


def timed(end=never, begin=initial, limit=STEPS * DT):
    """A task with commands, pushes and a time limit."""
    env = make_env(
        engine(),
        name="pupil",
        control_dt=DT,
        initial=begin,
        observe=observe,
        terms=[Term("alive", 5.0, alive)],
        terminate=end,
        memory=velocity_commands(engine().model, COMMANDS),
        values=command_values(COMMANDS),
    )
    return time_limit(random_pushes(env, 0.02, 0.3), limit)


def pupil(end=never, begin=initial, **kwargs):
    return curriculum(timed(end, begin), STAGES, given, **{"up": 0.75, "down": 0.25, **kwargs})


def levels(env, scores, steps=STEPS):
    """The level after each episode, all of whose steps score so."""
    env = auto_reset(env)
    state, _ = env.reset(env.params, random.key(0))
    reached = []
    for score in scores:
        for _ in range(steps):
            state, transition = env.step(env.params, state, torch.tensor([score]))
        assert transition.truncated or transition.terminated
        reached.append(int(state.memory["curriculum"]["level"]))
    return reached


# --- Up and down ---


def test_levels_by_hand():
    # From 0.75 on up and below 0.25 down, one at a time, within 0 and 2; between them a level stays.
    scores = [0.75, 0.5, 0.25, 0.125, 0.0, 1.0, 1.0, 1.0, 0.5, 0.0, 0.75]
    assert levels(pupil(), scores) == [1, 1, 1, 0, 0, 1, 2, 2, 2, 1, 2]
    assert levels(pupil(start=2), [0.5, 0.0]) == [2, 1]


def test_steps_missed_by_a_fall_count_nothing():
    # Two steps of four: 1.0 each is a score of 0.5, which does not rise, and 0.25 each is 0.125, which falls.
    fallen = pupil(end=lambda params, physics: physics.time > 1.5 * DT, start=1)
    assert levels(fallen, [1.0, 0.25, 1.0], steps=2) == [1, 0, 0]


def test_scores_begin_anew_with_an_episode():
    env = auto_reset(pupil())
    state, _ = env.reset(env.params, random.key(0))
    sums = []
    for _ in range(6):
        state, _ = env.step(env.params, state, torch.tensor([0.5]))
        sums.append(float(state.memory["curriculum"]["score"]))
    assert sums == [0.5, 1.0, 1.5, 0.0, 0.5, 1.0]


# --- A level outlives its episode ---


def test_each_robot_keeps_its_level_across_resets():
    env = auto_reset(observation_history(pupil(), 2))
    # Robots score 0, 0.5 and 1 for three episodes, from level 1 on: they end at 0, 1 and 2.
    acts = torch.tensor([0.0, 0.5, 1.0]).reshape(1, 3, 1).expand(3 * STEPS, 3, 1)
    params = at_level(env.params, 1)
    (first, _), (states, transitions) = rollout(batch(env), 3, acts, params)
    assert "memory.curriculum.level" in dict(tree.named_leaves(first))
    level = states.memory["curriculum"]["level"]
    assert first.memory["curriculum"]["level"].tolist() == [1, 1, 1] and level.dtype == torch.int64
    assert level[STEPS - 2].tolist() == [1, 1, 1]
    assert level[STEPS - 1 :].unique(dim=0).tolist() == [[0, 1, 2]]
    # The level that is logged is that of the step's episode, not of the next one.
    assert transitions.metrics["curriculum_level"][STEPS - 1 : STEPS + 1].tolist() == [[1, 1, 1], [0, 1, 2]]
    assert torch.equal(transitions.metrics["curriculum_score"], acts[:, :, 0].double())
    progress = transitions.metrics["curriculum_level"] + transitions.metrics["curriculum_score"]
    assert torch.equal(transitions.metrics["curriculum_progress"], progress)
    # The share of the three robots at each stage: all at the second, then one at each.
    stages = scalars(tree.map_leaves(lambda x: x.mean(1), {"at": transitions.metrics["curriculum_stage"]}))
    assert stages.keys() == {"at/stand", "at/walk", "at/turn"}
    assert [stages[f"at/{name}"][STEPS - 1].item() for name in ("stand", "walk", "turn")] == [0.0, 1.0, 0.0]
    assert [stages[f"at/{name}"][STEPS].item() for name in ("stand", "walk", "turn")] == pytest.approx([1 / 3] * 3)
    # All else begins anew.
    assert states.steps[STEPS - 1].tolist() == [0, 0, 0] and not states.memory["last_action"][STEPS - 1].any()


def test_a_stage_rules_reset_and_step():
    env = auto_reset(pupil())
    acts = torch.tensor([0.0, 0.5, 1.0]).reshape(1, 3, 1).expand(3 * STEPS, 3, 1)
    (_, obs), (_, transitions) = rollout(batch(env), 3, acts, at_level(env.params, 1))
    # Commands are 1, 2, 3 m/s at the three levels, seen from a reset on and after each resampling.
    assert obs["policy"][:, 0].tolist() == [2, 2, 2]
    assert (transitions.next_obs["policy"][:STEPS, :, 0] == 2).all()
    seen = transitions.obs["policy"][STEPS - 1 :, :, 0]
    assert seen.unique(dim=0).tolist() == [[1, 2, 3]]
    # Weights are 1, 10 and the nominal 5 a second, for steps of 0.02 s.
    torch.testing.assert_close(transitions.reward[:STEPS], torch.full((STEPS, 3), 0.2).double())
    torch.testing.assert_close(transitions.reward[STEPS:], torch.tensor([[0.02, 0.2, 0.1]]).double().expand(8, 3))


def test_pushes_are_as_strong_as_the_stage_says():
    env = pupil(begin=at_rest)
    params = tree.stack([at_level(env.params, level) for level in (0, 1, 2)] * 64)
    (first, _), (states, _) = rollout(batch(env, shared_params=False), 192, torch.zeros(STEPS, 192, 1), params)
    velocity = torch.cat([first.physics.qvel[None], states.physics.qvel])[..., :2]
    size = (velocity[1:] - velocity[:-1]).norm(dim=-1).unflatten(1, (64, 3))
    still, half, full = size.unbind(-1)
    assert not still.any()
    # At 50 pushes a second some 200 of each, uniform up to 0.5 and 1 m/s: the largest come close.
    assert 0.45 < float(half.max()) <= 0.5 + 1e-9 and 0.9 < float(full.max()) <= 1 + 1e-9


# --- Lower levels are played again ---


def test_lower_levels_are_revisited_alike_and_change_nothing():
    env = auto_reset(pupil(start=2, revisit=0.5))
    # All robots score 0: those that play their own level fall, those that revisit a lower one stay.
    (first, obs), (states, _) = rollout(batch(env), 400, torch.zeros(STEPS, 400, 1))
    stage = first.memory["curriculum"]["stage"]
    assert first.memory["curriculum"]["level"].tolist() == [2] * 400
    # 400 draws: 200 of stage 2 (deviation 10), 100 each of stages 0 and 1 (8.7).
    counts = torch.bincount(stage, minlength=3)
    assert all(abs(int(n) - expected) < 50 for n, expected in zip(counts, (100, 100, 200), strict=True))
    assert torch.equal(obs["policy"][:, 0], stage + 1.0)
    assert torch.equal(states.memory["curriculum"]["level"][-1], torch.where(stage == 2, 1, 2))
    # Each episode draws for itself: robots that now have level 2 play all stages again.
    again = states.memory["curriculum"]["stage"][-1][stage < 2]
    assert len(again.unique()) == 3


def test_evaluation_plays_the_level_that_it_asks_for():
    env = pupil(revisit=0.9)
    state, obs = batch(env).reset(at_level(env.params, 2), random.split(random.key(0), 32))
    assert state.memory["curriculum"]["stage"].tolist() == [2] * 32 and (obs["policy"][:, 0] == 3).all()


# --- The same for any company ---


@functools.cache
def stumbling():
    return auto_reset(pupil(end=lambda params, physics: physics.qpos[7].abs() > 0.35, revisit=0.3))


def test_recorded_equals_vmap_equals_loop():
    env, acts = stumbling(), 3 * actions(40, 3)
    first, recorded = rollout(batch(env), 3, acts)
    mapped = env._replace(
        reset=torch.func.vmap(env.reset, in_dims=(None, 0)), step=torch.func.vmap(env.step, in_dims=(None, 0, 0))
    )
    assert_same((first, recorded), rollout(mapped, 3, acts))
    state, obs = env.reset(env.params, random.split(random.key(7), 3)[1])
    assert_same((state, obs), tree.index(first, 1))
    for t in range(40):
        state, transition = env.step(env.params, state, acts[t, 1])
        assert_same((state, transition), tree.index(recorded, (t, 1)))
    assert recorded[1].terminated.any() and recorded[1].truncated.any()
    assert len(recorded[0].memory["curriculum"]["level"].unique()) == 3


def test_neighbours_do_not_matter():
    env, acts = stumbling(), 3 * actions(25, 64)
    _, few = rollout(batch(env), 4, acts[:, :4])
    _, many = rollout(batch(env), 64, acts)
    assert_same(few, rows(many, slice(0, 4)))


def test_stages_of_nothing_new_are_no_curriculum():
    same = [Stage("a", {"push_speed": 0.3}), Stage("b", {"push_speed": 0.3}, {"alive": 5.0})]
    env, acts = auto_reset(curriculum(timed(), same, given, up=0.1, down=0.0)), actions(10, 4)
    for (state, out), (plain_state, plain) in zip(
        rollout(batch(env), 4, acts), rollout(batch(auto_reset(timed())), 4, acts), strict=True
    ):
        memory = {name: value for name, value in state.memory.items() if name != "curriculum"}
        assert_same(tree.replace(state, memory=memory), plain_state)
        if hasattr(out, "metrics"):
            metrics = {name: v for name, v in out.metrics.items() if not name.startswith("curriculum")}
            out = tree.replace(out, metrics=metrics)
        assert_same(out, plain)


# --- Mistakes ---


def taught(stages=STAGES, env=timed, **kwargs):
    return curriculum(env(), stages, given, **{"up": 0.75, "down": 0.25, **kwargs})


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (lambda: taught([]), "stages with different names, got none"),
        (lambda: taught([STAGES[0], STAGES[0]]), "stages with different names, got stand, stand"),
        (lambda: taught([Stage("a"), Stage("b")]), "stages a, b are all alike"),
        (lambda: taught([Stage("a", {"heat": 1.0})]), r"stage 'a' sets params.values\['heat'\].* it has: command_vx"),
        (lambda: taught([Stage("a", {}, {"heat": 1.0})]), r"sets params.weights\['heat'\].* it has: alive"),
        (lambda: taught([Stage("a", {"command_vx": 1.0})]), r"\['command_vx'\] the shape \[2\], got \[\]"),
        (lambda: taught(up=0.1), "down must be at most up.* got 0.25 and 0.1"),
        (lambda: taught(up=float("nan")), "down must be at most up.* got 0.25 and nan"),
        (lambda: taught(revisit=1.0), "revisit must be a probability below 1, got 1.0"),
        (lambda: taught(revisit=-0.1), "revisit .* got -0.1"),
        (lambda: taught(start=3), "level must be at least 0 and below the number of stages, 3, got 3"),
        (lambda: taught(env=lambda: auto_reset(timed())), "before auto_reset"),
        (lambda: taught(env=pupil), "curriculum is already applied"),
        (lambda: time_limit(pupil(), 1.0), "time_limit is already applied"),
        (lambda: at_level(timed().params, 0), "no curriculum"),
        (lambda: at_level(pupil().params, -1), "number of stages, 3, got -1"),
    ],
)
def test_mistakes_are_told_in_one_line(mistake, words):
    with pytest.raises(InputError, match=words) as caught:
        mistake()
    assert "\n" not in str(caught.value)


def test_a_curriculum_needs_a_time_limit():
    env = timed()
    endless = env._replace(spec=tree.replace(env.spec, episode_steps=None))
    with pytest.raises(InputError, match="apply time_limit to pupil before it"):
        curriculum(endless, STAGES, given, up=0.75, down=0.25)
