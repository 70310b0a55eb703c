"""Populations from the command line: what members may be, and what they leave behind."""

import math

import pytest

from experiments.cli import load_run, parse, restore_policy, run
from experiments.doctor import Config as DoctorConfig
from experiments.doctor import main as look
from experiments.population import Config, build, config_of, settings
from experiments.ppo_cartpole import Config as CartpoleConfig
from rlcore.errors import InputError
from rlcore.experiment import TrainingConfig
from rlcore.metrics import METRICS_FILE, read_metrics


def test_members_are_named_settings_with_seeds_of_their_own():
    lines = ("*: --ppo.clip 0.1", "slow: --ppo.learning-rate 1e-4", "fast:")
    made = dict(settings(Config("experiments.ppo_cartpole", lines, seeds=2, seed=5)))
    assert list(made) == ["slow-0", "slow-1", "fast-0", "fast-1"]
    assert [own.seed for own in made.values()] == [5, 6, 5, 6]
    assert [own.ppo.learning_rate for own in made.values()] == [1e-4, 1e-4, 1e-3, 1e-3]
    assert {own.ppo.clip for own in made.values()} == {0.1}
    ((name, own),) = settings(Config("experiments.ppo_cartpole", ("one: --seed 7",)))
    assert (name, own.seed) == ("one", 7)


def test_what_is_compiled_must_be_the_same(tmp_path, key):
    lines = ("*: --num-threads 1 --ppo.num-envs 4", "small:", "wide: --ppo.policy-layers 8 8")
    population = build(Config("experiments.ppo_cartpole", lines, training=TrainingConfig(run_dir=tmp_path / "run")))
    with pytest.raises((InputError, ValueError), match=r"policy_layers|same|alike|shape"):
        population.algorithm.init(key())
    with pytest.raises(InputError, match="run_dir must be given"):
        build(Config("experiments.ppo_cartpole"))


def test_training_is_as_long_as_that_of_the_experiment_unless_told():
    own = CartpoleConfig().training
    assert config_of(["experiments.ppo_cartpole"])("experiments.ppo_cartpole").training == own
    assert config_of(["--seeds", "2", "experiments.nothing"]) is Config
    made = parse(config_of(["experiments.ppo_cartpole"]), ["experiments.ppo_cartpole", "--seeds", "2"], "population")
    assert isinstance(made, Config) and made.seeds == 2 and made.training.iterations == own.iterations


@pytest.mark.slow
def test_members_are_runs_to_look_at_and_the_population_goes_on(tmp_path, capsys):
    run_dir = tmp_path / "run"
    small = "--ppo.num-epochs 1 --ppo.num-minibatches 1 --ppo.policy-layers 8 --ppo.value-layers 8"
    members = [
        f"*: --num-threads 1 --ppo.num-envs 4 --ppo.num-steps 8 {small}",
        "slow: --ppo.learning-rate 1e-5",
        "fast:",
    ]
    start = ["experiments.ppo_cartpole", "--members", *members, "--training.no-video", "--training.torch-threads", "1"]
    run(Config, build, [*start, "--training.iterations", "3", "--training.run-dir", str(run_dir)])
    run(Config, build, [*start, "--training.iterations", "5", "--training.resume", str(run_dir)])
    told = capsys.readouterr().out
    scores = {name: read_metrics(run_dir / name / METRICS_FILE)[-1]["episode/return"] for name in ("slow", "fast")}
    best = max(scores, key=lambda name: -math.inf if scores[name] is None else scores[name])
    assert (run_dir / "best").resolve() == (run_dir / best).resolve()
    assert "learning_rate 1e-05" in told and f"experiments.play {run_dir / 'best'}" in told
    look(DoctorConfig(run_dir))
    told = capsys.readouterr().out
    assert told.count("too early to tell") == 2 and str(run_dir / "slow") in told and str(run_dir / "best") not in told
    for name, rate in (("slow", 1e-5), ("fast", 1e-3)):
        records = read_metrics(run_dir / name / METRICS_FILE)
        assert [record["iteration"] for record in records] == [1, 2, 3, 4, 5]
        assert records[-1]["policy/learning_rate"] == pytest.approx(rate)
        policy = restore_policy(load_run(run_dir / name), "last")
        assert policy.iteration == 5
    assert read_metrics(run_dir / METRICS_FILE)[-1]["population/stuck"] == 0
