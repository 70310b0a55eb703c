"""Velocity: what is seen and commanded, how episodes end, and that the curriculum changes what it says."""

import pytest
import torch

from algos.ppo import PPOConfig, make_ppo
from experiments.ppo_humanoid_velocity import Config, build
from rlcore import random, symmetry, tree
from rlcore.commands import fixed_command
from rlcore.curriculum import at_level
from rlcore.env import auto_reset, batch
from rlcore.errors import InputError
from rlcore.physics.engine import drain_faults
from rlcore.randomize import Randomization
from tasks.humanoid.velocity import SETTINGS, make_humanoid_velocity
from tasks.walking import STAGES, walking_symmetry

NUM = 16


@pytest.fixture(scope="module")
def env():
    return make_humanoid_velocity(1)


@pytest.fixture(scope="module")
def whole():
    """Without a curriculum, as it is evaluated."""
    return make_humanoid_velocity(1, stages=())


def part(env, obs, name, group="policy"):
    names, sizes = zip(*env.spec.parts(group), strict=True)
    return dict(zip(names, torch.split(obs[group], list(sizes), dim=-1), strict=True))[name]


def test_the_policy_sees_its_command_and_nothing_that_only_a_simulation_knows(env):
    policy = dict(env.spec.parts("policy"))
    assert policy.keys().isdisjoint({"linear_velocity", "height", "foot_force", "foot_height", "mass"})
    assert (policy["command"], policy["gait"], policy["joint_position"]) == (3, 2, env.spec.model.nu)
    params = fixed_command(make_humanoid_velocity(1, stages=()).params, 0.7, -0.2, 0.4)
    state, obs = make_humanoid_velocity(1, stages=()).reset(params, random.key(0))
    wanted = torch.tensor([0.7, -0.2, 0.4])
    torch.testing.assert_close(part(env, obs, "command"), wanted)
    torch.testing.assert_close(state.memory["command"]["velocity"].float(), wanted)
    # The clock begins at 0: sine 0 and cosine 1.
    torch.testing.assert_close(part(env, obs, "gait"), torch.tensor([0.0, 1.0]))


def test_both_forms_show_the_same_groups(env, whole):
    assert env.spec.observations == whole.spec.observations and env.spec.terms == whole.spec.terms


@pytest.mark.parametrize("level", range(len(STAGES)))
def test_a_stage_draws_from_its_own_ranges(env, level):
    params = at_level(env.params, level)
    state, _ = batch(env).reset(params, random.split(random.key(level), 200))
    assert state.memory["curriculum"]["stage"].tolist() == [level] * 200
    velocity = state.memory["command"]["velocity"]
    ranges = [STAGES[level].values.get(f"command_{n}", getattr(SETTINGS.commands, n)) for n in ("vx", "vy", "yaw_rate")]
    for i, (low, high) in enumerate(ranges):
        values = velocity[:, i]
        assert bool(((values >= low) & (values <= high) | (values == 0)).all())
        # Two hundred draws come near both ends of a range.
        assert float(values.max() - values[values != 0].min()) >= 0.9 * (high - low)


def test_who_stands_as_told_is_promoted(env):
    """Robots held upright by no gravity and no action score near 1 where every stage commands them to stand."""
    limited = make_humanoid_velocity(1, seconds=0.4)
    many = batch(auto_reset(limited))
    table = "curriculum/values/command_vx"
    values = {**limited.params.values, table: torch.zeros_like(limited.params.values[table])}
    params = tree.replace(limited.params, physics={"opt.gravity": torch.zeros(3).double()}, values=values)
    state, _ = many.reset(params, random.split(random.key(0), NUM))
    assert state.memory["curriculum"]["level"].tolist() == [0] * NUM
    for _ in range(20):
        state, transition = many.step(params, state, torch.zeros(NUM, env.spec.action_size))
    assert bool(transition.truncated.all())
    assert int((state.memory["curriculum"]["level"] == 1).sum()) > NUM / 2
    assert float(transition.metrics["curriculum_level"].max()) == 0  # of the episode that ended


def test_random_actions_make_no_faults_and_falls_are_told_by_their_rule(env):
    drain_faults()
    many = batch(auto_reset(env))
    state, _ = many.reset(env.params, random.split(random.key(1), NUM))
    low, high = env.spec.action_low[0], env.spec.action_high[0]
    fallen = 0
    for action in random.uniform(random.key(2), (80, NUM, env.spec.action_size), low, high):
        state, transition = many.step(env.params, state, action)
        for name, leaf in tree.named_leaves(transition):
            assert torch.isfinite(leaf).all(), name
        ended = (transition.metrics["ended/low"] + transition.metrics["ended/tilted"]) > 0
        assert torch.equal(ended, transition.terminated)
        fallen += int(ended.sum())
        # A fall costs the weight of termination times the control interval.
        penalty = transition.terms["termination"]
        assert torch.equal(penalty, torch.where(ended, 0.02 * env.params.weights["termination"], 0.0))
    assert fallen > NUM and not drain_faults()


def test_what_is_watched_changes_no_bit_of_what_is_learned(env):
    def unwatched(params, state, action):
        after, transition = env.step(params, state, action)
        return after, tree.replace(transition, metrics={"fault": transition.metrics["fault"]})

    config = PPOConfig(num_envs=8, num_steps=6, num_minibatches=2, policy_layers=(8,), value_layers=(8,))
    states = []
    for task in (env, env._replace(step=unwatched)):
        learner = make_ppo(auto_reset(task), config)
        state = learner.init(random.key(0))
        for _ in range(2):
            state, metrics = learner.update(state)
        states.append((state, metrics))
    (watched, more), (plain, few) = states
    assert {"torque/left_knee", "contact/both", "env/cost_of_transport"} <= more.keys() - few.keys()
    for (name, x), (_, y) in zip(tree.named_leaves(watched), tree.named_leaves(plain), strict=True):
        assert torch.equal(x, y), name


def test_observations_and_commands_have_a_mirror_image(whole):
    maps = walking_symmetry(whole)
    state, obs = whole.reset(fixed_command(whole.params, 0.5, 0.2, 0.3), random.key(3))
    for group, mirror in maps.observations.items():
        image = symmetry.apply(mirror, obs[group])
        assert torch.equal(symmetry.apply(mirror, image), obs[group])
        torch.testing.assert_close(part(whole, {group: image}, "command", group), torch.tensor([0.5, -0.2, -0.3]))
    assert state.steps == 0


def test_training_differs_from_evaluation_as_the_experiment_says():
    small = PPOConfig(num_envs=4, num_steps=2, num_minibatches=1, num_epochs=1, policy_layers=(8,), value_layers=(8,))
    experiment = build(
        Config(
            num_threads=1,
            training_episode_seconds=1.0,
            max_delay=2,
            randomization=Randomization(mass_scale=(0.8, 1.2)),
            reward_weights={"gait": 0.75},
            ppo=small,
        )
    )
    # What ranks checkpoints is among what training tells, with a curriculum and without.
    assert experiment.best_metric == "env/curriculum_progress"
    assert build(Config(num_threads=1, curriculum=False, ppo=small)).best_metric == "episode/return"
    trained, evaluated = experiment.env.spec, experiment.evaluation_env.spec
    assert (trained.episode_steps, evaluated.episode_steps) == (50, 1000)
    assert {"action_delay", "curriculum"} <= set(trained.wrappers) and not {"action_delay", "curriculum"} & set(
        evaluated.wrappers
    )
    assert (
        float(experiment.env.params.weights["gait"]) == float(experiment.evaluation_env.params.weights["gait"]) == 0.75
    )
    assert "body_mass" not in experiment.evaluation_env.params.physics
    state = experiment.algorithm.init(random.key(0))
    mass = state.env_params.physics["body_mass"].sum(-1)
    assert mass.shape == (4,) and len(set(mass.tolist())) == 4
    state, metrics = experiment.algorithm.update(state)
    assert all(bool(torch.isfinite(x).all()) for _, x in tree.named_leaves(state.params))
    assert "env/curriculum_progress" in metrics  # ranks checkpoints


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"max_delay": -1}, r"max_delay must be 0 or more control steps, got -1 \(--max-delay\)"),
        ({"training_episode_seconds": 0.0}, r"must be more than 0 s, got 0.0 \(--training-episode-seconds\)"),
        ({"push_speed": float("nan")}, r"push_speed must be 0 m/s or more, got nan"),
    ],
)
def test_settings_that_cannot_work_are_told_with_their_flag(arguments, match):
    with pytest.raises(InputError, match=match):
        Config(**arguments)
