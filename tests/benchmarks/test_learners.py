"""The benchmarks of learners: what they measure is what they say."""

import itertools
import json
import subprocess
import sys

import pytest
import torch

from benchmarks import population, sac_updates
from rlcore import random
from rlcore.env import auto_reset, scale_actions
from rlcore.errors import InputError
from tasks.humanoid.balance import make_humanoid_balance

TINY = (
    *("--ppo.num-envs", "4", "--ppo.num-steps", "4", "--ppo.num-minibatches", "1", "--ppo.num-epochs", "1"),
    *("--ppo.policy-layers", "8", "--ppo.value-layers", "8", "--num-threads", "1"),
)


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_both_ways_of_training_make_the_same_updates(tmp_path, monkeypatch, capsys):
    calls = {"population": 0, "alone": 0}
    make = population.make_population

    def counted(algorithms):
        whole = make(algorithms)

        def update(state):
            calls["population"] += 1
            return whole.update(state)

        return whole._replace(update=update)

    experiment = population.importlib.import_module("experiments.ppo_cartpole")
    build = experiment.build

    def built(config):
        made = build(config)
        inner = made.algorithm.update

        def update(state):
            # Under vmap it is called once for all; that call is the population's.
            calls["alone"] += not torch._C._functorch.maybe_current_level()
            return inner(state)

        return made._replace(algorithm=made.algorithm._replace(update=update))

    monkeypatch.setattr(experiment, "build", built)
    monkeypatch.setattr(population, "make_population", counted)
    population.main(population.Config(TINY, members=3, updates=2, blocks=2, output_dir=tmp_path))
    assert calls["population"] == population._BURN_IN_UPDATES + 4
    assert calls["alone"] == 3 * calls["population"]
    figures = json.loads((tmp_path / "population_ppo_cartpole.json").read_text())
    speeds = [way["blocks"] for way in figures["updates_per_second"].values()]
    ratios = sorted(a / b for a, b in zip(*speeds, strict=True))
    assert figures["ratio"]["median"] == pytest.approx(sum(ratios) / 2) and len(ratios) == 2
    assert "of 3 members together" in capsys.readouterr().out


def test_a_block_of_ours_makes_its_gradient_steps():
    env = auto_reset(scale_actions(make_humanoid_balance(1)))
    config = sac_updates.Config(updates=3, batch_size=8, layers=(8,))
    states = []
    made = sac_updates.make_sac

    def remembered(env, settings):
        algorithm = made(env, settings)

        def update(state):
            new, metrics = algorithm.update(state)
            states.append(new)
            return new, metrics

        return algorithm._replace(update=update)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sac_updates, "make_sac", remembered)
        block = sac_updates.ours(env, config)
        before = int(states[-1].critic_optimizer.step)
        block()
    assert int(states[-1].critic_optimizer.step) - before == 3
    assert int(states[-1].policy_optimizer.step) - before == 3
    assert not random.key(0).equal(states[-1].key)


def test_mistakes_are_told_before_work_starts(monkeypatch):
    with pytest.raises(InputError, match="batch_size must be at least 1, got 0"):
        sac_updates.Config(batch_size=0)
    with pytest.raises(InputError, match="members must be at least 1, got 0"):
        population.Config(members=0)
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    with pytest.raises(InputError, match="EXTRAS=dev,peers"):
        sac_updates.main(sac_updates.Config())


def test_whole_commands_are_compared_member_for_member(monkeypatch):
    ran, clock = [], itertools.count()

    def run(line, **_):
        ran.append(line[2:])
        for _i in range(5 if "experiments.population" in line else 1):
            next(clock)
        return subprocess.CompletedProcess(line, 0, "", "")

    monkeypatch.setattr(population.subprocess, "run", run)
    monkeypatch.setattr(population.time, "perf_counter", lambda: float(next(clock)))
    config = population.Config(("--ppo.clip", "0.1", "--physics=warp"), members=4, commands=3)
    timed = population.time_commands(config)
    assert timed["seconds"] == {"population": [6.0] * 3, "one run": [2.0] * 3}
    assert timed["ratio"]["median"] == pytest.approx(4 * 2 / 6)
    whole, single = ran[-2:]
    assert whole[:2] == ["experiments.population", "experiments.ppo_cartpole"]
    assert whole[2:6] == ["--seeds", "4", "--members", "member: --ppo.clip 0.1"]
    assert whole[6:8] == ["--physics", "warp"]
    assert single[:6] == ["experiments.ppo_cartpole", "--ppo.clip", "0.1", "--physics=warp", "--seed", "2"]
    monkeypatch.setattr(population.subprocess, "run", lambda line, **_: subprocess.CompletedProcess(line, 2, "", "no"))
    with pytest.raises(InputError, match="failed: no"):
        population.time_commands(config)
    with pytest.raises(InputError, match=r"cannot have --seed, --training\.iterations"):
        population.Config(("--training.iterations=3", "--seed", "1"))
