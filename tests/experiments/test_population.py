"""Populations from the command line: what members may be, and what they leave behind."""

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from algos.population import PBTConfig
from experiments.cli import load_run, parse, restore_policy, run
from experiments.doctor import Config as DoctorConfig
from experiments.doctor import main as look
from experiments.population import Config, _given, _Members, build, config_of, settings
from experiments.ppo_cartpole import Config as CartpoleConfig
from experiments.ppo_cartpole import build as build_cartpole
from rlcore import random
from rlcore.errors import InputError
from rlcore.experiment import TrainingConfig
from rlcore.metrics import METRICS_FILE, read_metrics
from rlcore.run_directory import read_record


def test_members_are_named_settings_with_seeds_of_their_own():
    lines = ("*: --ppo.clip 0.1", "slow: --ppo.learning-rate 1e-4", "fast:")
    made = dict(settings(Config("experiments.ppo_cartpole", lines, seeds=2, seed=5)))
    assert list(made) == ["slow-0", "slow-1", "fast-0", "fast-1"]
    assert [own.seed for own in made.values()] == [5, 6, 5, 6]
    assert [own.ppo.learning_rate for own in made.values()] == [1e-4, 1e-4, 1e-3, 1e-3]
    assert {own.ppo.clip for own in made.values()} == {0.1}
    for text in ("one: --seed 7", "one: --seed=7"):
        ((name, own),) = settings(Config("experiments.ppo_cartpole", (text,)))
        assert (name, own.seed) == ("one", 7)


def test_what_is_compiled_must_be_the_same(tmp_path, key):
    lines = ("*: --num-threads 1 --ppo.num-envs 4", "small:", "wide: --ppo.policy-layers 8 8")
    population = build(Config("experiments.ppo_cartpole", lines, training=TrainingConfig(run_dir=tmp_path / "run")))
    with pytest.raises(InputError, match=r"wide differs from small in ppo.policy_layers \(--ppo.policy-layers\)"):
        population.algorithm.init(key())


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("a: --training.iterations 3", "--training.iterations is for all members"),
        ("a: --physics=warp --isaacgym.gpu 1", "--isaacgym.gpu, --physics is for all members"),
        ("a: --seed=5", "--seed of a cannot be beside --seeds 2"),
    ],
)
def test_what_members_cannot_have_is_refused(line, told):
    with pytest.raises(InputError, match=told):
        settings(Config("experiments.ppo_cartpole", (line,), seeds=2))


@pytest.mark.parametrize("name", ["best", "checkpoints", "tensorboard", ".", "..", "a.b"])
def test_a_member_cannot_have_the_name_of_what_every_run_has(name):
    with pytest.raises(InputError, match="cannot be named"):
        settings(Config("experiments.ppo_cartpole", (f"{name}:",)))


def test_members_are_told_the_best_first_and_those_that_are_stuck_last(tmp_path):
    lines = ("low: --ppo.clip 0.1", "unknown:", "high:", "stuck:")
    config = Config("experiments.ppo_cartpole", lines, training=TrainingConfig(run_dir=tmp_path))
    members = _Members(config, settings(config), "episode/return")
    members.begin(tmp_path)
    assert members.summary() == ""
    for name in ("low", "unknown", "high", "stuck"):
        (tmp_path / name).mkdir()
    members.state = cast(Any, object())  # something has been written
    members._newest = {
        "episode/return": [1.0, math.nan, 3.0, 9.0],
        "population/stuck": [0.0, 0.0, 0.0, 1.0],
        "population/clip": [0.1, 0.2, 0.2, 0.2],
        "population/discount": [0.9] * 4,
    }
    told = members.summary().splitlines()
    assert [line.split()[0] for line in told[1:5]] == ["high", "low", "unknown", "stuck"]
    assert "clip 0.1" in told[2] and "no numbers" in told[4] and "discount" not in told[2]
    assert (tmp_path / "best").readlink().name == "high"
    members._newest["episode/return"] = [5.0, 2.0, 3.0, 9.0]
    members.summary()
    assert (tmp_path / "best").readlink().name == "low"


def test_members_are_compared_by_what_the_experiment_is_judged_by(tmp_path):
    lines = ("*: --num-threads 1 --ppo.num-envs 2 --ppo.num-steps 1 --ppo.num-epochs 1 --ppo.num-minibatches 1", "one:")
    population = build(Config("experiments.ppo_cartpole", lines, score="episode/length"))
    assert population.begin is not None
    population.begin(tmp_path)  # as training does before the first update
    _, metrics = population.algorithm.update(population.algorithm.init(random.key(0)))
    assert population.summary is not None and population.summary().startswith("members, by episode/length:")
    assert torch.allclose(metrics["population/best"], metrics["episode/length"], equal_nan=True)
    wrong = build(Config("experiments.ppo_cartpole", lines, score="return"))
    with pytest.raises(InputError, match=r"score must be a metric .* did you mean episode/return\?"):
        wrong.algorithm.update(wrong.algorithm.init(random.key(0)))


def test_training_is_as_long_as_that_of_the_experiment_unless_told():
    own = CartpoleConfig().training
    assert config_of(["experiments.ppo_cartpole"])("experiments.ppo_cartpole").training == own
    assert config_of(["--seeds", "2", "experiments.nothing"]) is Config
    assert config_of(["experiments.doctor"]) is Config
    made = parse(config_of(["experiments.ppo_cartpole"]), ["experiments.ppo_cartpole", "--seeds", "2"], "population")
    flags_first = config_of(["--seeds", "2", "--members", "a:", "experiments.ppo_cartpole"])
    assert flags_first("experiments.ppo_cartpole").training == own
    assert isinstance(made, Config) and made.seeds == 2 and made.training.iterations == own.iterations


TINY = "*: --num-threads 1 --ppo.num-envs 2 --ppo.num-steps 1 --ppo.num-epochs 1 --ppo.num-minibatches 1"


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (("--score", "returns"), "score must be"),
        (("--training.best-metric", "episode/returns"), "best_metric must be"),
    ],
)
def test_a_metric_that_there_is_not_ends_the_run_at_once_and_nothing_is_left(wrong, told, tmp_path, capsys):
    run_dir = tmp_path / "runs" / "one"
    quiet = ("--training.no-video", "--training.torch-threads", "1", "--training.run-dir", str(run_dir))
    with pytest.raises(SystemExit) as stop:
        run(Config, build, ["experiments.ppo_cartpole", "--members", TINY, "one:", *quiet, *wrong])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and told in error and "did you mean episode/return" in error
    assert not run_dir.parent.exists()


def test_who_went_on_from_whom_is_told(tmp_path, capsys):
    run_dir = tmp_path / "run"
    members = [TINY.replace("num-envs 2", "num-envs 4").replace("num-steps 1", "num-steps 64"), "a:"]
    line = ["experiments.ppo_cartpole", "--members", *members, "--seeds", "2", "--training.torch-threads", "1"]
    line += ["--pbt.interval", "2", "--pbt.fraction", "0.5", "--training.iterations", "2", "--training.no-video"]
    run(Config, build, [*line, "--training.run-dir", str(run_dir)])
    told = capsys.readouterr().out
    parents = [int(read_metrics(run_dir / name / METRICS_FILE)[-1]["population/parent"]) for name in ("a-0", "a-1")]
    assert parents in ([0, 0], [1, 1])
    assert f"went on at iteration 2: {'a-1 from a-0' if parents == [0, 0] else 'a-0 from a-1'}" in told


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
    assert told.count("from iteration 40 on") == 1 and "fast, slow" in told and str(run_dir / "best") not in told
    for name, rate in (("slow", 1e-5), ("fast", 1e-3)):
        records = read_metrics(run_dir / name / METRICS_FILE)
        assert [record["iteration"] for record in records] == [1, 2, 3, 4, 5]
        assert records[-1]["policy/learning_rate"] == pytest.approx(rate)
        policy = restore_policy(load_run(run_dir / name), "last")
        assert policy.iteration == 5
    assert read_metrics(run_dir / METRICS_FILE)[-1]["population/stuck"] == 0
    assert (run_dir / "members.png").read_bytes().startswith(b"\x89PNG")
    # A member goes on with its population, or as a copy, which is a run like any other.
    for place in (run_dir / "best", run_dir / "slow"):
        with pytest.raises(SystemExit):
            run(CartpoleConfig, build_cartpole, ["--training.resume", str(place), "--training.iterations", "6"])
        assert "is a member of the population" in capsys.readouterr().err
    assert len(read_record(run_dir / "slow")["resumed"]) == 1
    shutil.copytree(run_dir / "slow", tmp_path / "alone")
    run(CartpoleConfig, build_cartpole, ["--training.resume", str(tmp_path / "alone"), "--training.iterations", "6"])
    assert read_metrics(tmp_path / "alone" / METRICS_FILE)[-1]["iteration"] == 6
    with pytest.raises(InputError, match=r"is a population of 2 runs: name one of them, as .*best"):
        load_run(run_dir)


def test_what_a_member_was_not_given_is_told_as_unchanged():
    made = [("still", CartpoleConfig(reward_weights={"alive": 3.0})), ("plain", CartpoleConfig())]
    assert _given(made, set()) == [["reward_weights.alive 3.0"], ["reward_weights.alive unchanged"]]


WEIGHED = ("still: --reward-weights alive 3.0", "plain:")


def test_members_are_not_copied_by_returns_of_different_weights():
    config = Config("experiments.ppo_cartpole", WEIGHED, pbt=PBTConfig(interval=2, fraction=0.5))
    with pytest.raises(InputError, match=r"members differ in reward_weights.*--pbt.interval 2.*--score episode/length"):
        build(config)
    build(dataclasses.replace(config, score="episode/length"))
    build(dataclasses.replace(config, score="episode/return"))  # the user's own word
    build(dataclasses.replace(config, training=TrainingConfig(resume=Path("run"))))  # which cannot say another


@pytest.mark.parametrize(
    ("score", "lines", "warned"),
    [("episode/return", WEIGHED, True), ("episode/length", WEIGHED, False), ("episode/return", ("a:", "b:"), False)],
)
def test_a_table_by_returns_of_different_weights_says_so(tmp_path, score, lines, warned):
    config = Config("experiments.ppo_cartpole", (TINY, *lines), training=TrainingConfig(tensorboard=False))
    check_table(config, score, warned, tmp_path)


def test_an_experiment_needs_no_reward_weights(tmp_path):
    check_table(Config("tests.experiments.regression", ("a:", "b:")), "episode/return", False, tmp_path)


def check_table(config, score, warned, tmp_path):
    members = _Members(config, settings(config), score)
    members.begin(tmp_path)
    members.state = cast(Any, object())  # something has been written
    members._newest = {score: [5.0, 1.0], "population/stuck": [0.0, 0.0]}
    assert ("which does not compare them" in members.summary().splitlines()[0]) == warned
