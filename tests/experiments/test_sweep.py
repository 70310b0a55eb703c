"""Searching for settings: what a range may be, and a real sweep that is killed and goes on."""

import csv
import importlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.cli import command
from experiments.search_space import Between, OneOf, flags, read_range
from experiments.sweep import Config, main, search_space
from rlcore.errors import InputError

PPO = sorted(path.stem for path in (Path(__file__).parents[2] / "experiments").glob("ppo_*.py"))


@pytest.mark.parametrize("name", PPO)
def test_a_learning_rate_is_searched_only_where_nothing_else_chooses_it(name):
    module = importlib.import_module(f"experiments.{name}")
    assert ("ppo.learning_rate" in module.SEARCH) == (module.Config().ppo.kl_target is None)


def test_ranges_as_they_are_typed():
    assert read_range("ppo.learning-rate 1e-4..1e-2 log") == ("ppo.learning_rate", Between(1e-4, 1e-2, log=True))
    assert read_range("--ppo.num-steps 8..32") == ("ppo.num_steps", Between(8, 32))
    assert read_range("ppo.policy-layers 64 64|256 128") == ("ppo.policy_layers", OneOf("64 64", "256 128"))
    assert read_range("x -2..-1") == ("x", Between(-2, -1))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ppo.learning-rate", "a name and LOW..HIGH"),
        ("x 1e-4-1e-2", "a name and LOW..HIGH"),
        ("x 2..1", "to a higher one, got 2..1"),
        ("x a..b", "from a number"),
        ("x 1..2 lin", "may come log, got 'lin'"),
        ("x 0..2 log", "must be above 0"),
    ],
)
def test_what_is_no_range_is_refused(text, words):
    with pytest.raises(InputError, match=words):
        read_range(text)


def test_values_as_they_are_given_to_an_experiment():
    assert flags("ppo.learning_rate", ["0.001"]) == ["--ppo.learning-rate", "0.001"]
    assert flags("ppo.policy_layers", ["64", "64"]) == ["--ppo.policy-layers", "64", "64"]
    assert flags("ppo.normalize_values", ["False"]) == ["--ppo.no-normalize-values"]
    assert flags("curriculum", ["False"]) == ["--no-curriculum"]
    assert flags("curriculum", ["True"]) == ["--curriculum"]


def test_what_is_searched_is_declared_beside_the_experiment_or_given(tmp_path):
    declared = search_space(Config("experiments.ppo_cartpole", tmp_path))
    assert {"ppo.learning_rate", "ppo.num_minibatches", "ppo.discount", "ppo.entropy_coefficient"} == set(declared)
    given = search_space(Config("experiments.ppo_cartpole", tmp_path, space=("ppo.clip 0.1..0.3",)))
    assert given == {"ppo.clip": Between(0.1, 0.3)}
    with pytest.raises(InputError, match=r"no setting ppo\.clap to search; did you mean ppo\.clip"):
        search_space(Config("experiments.ppo_cartpole", tmp_path, space=("ppo.clap 0.1..0.3",)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--trials", "0"], "trials must be at least 1"),
        (["--iterations", "0"], "iterations must be at least 1"),
        (["--storage", "nosuch://x"], "storage nosuch://x cannot be used"),
        (["--seeds", "2", "--arguments=--physics warp"], "a population of seeds cannot have --physics"),
    ],
)
def test_input_that_cannot_work_is_one_line(tmp_path, capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        command(Config, main, ["experiments.ppo_cartpole", "--output", str(tmp_path), *arguments])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and words in err and err.count("\n") == 1


def test_a_score_that_there_is_not_ends_the_sweep_at_its_first_trial(tmp_path, capsys):
    arguments = ["--score", "episode/retrun", "--trials", "3", "--arguments=--ppo.num-envs 2 --ppo.num-steps 32"]
    with pytest.raises(SystemExit) as stop:
        command(Config, main, ["experiments.ppo_cartpole", "--output", str(tmp_path), *arguments])
    told = capsys.readouterr()
    assert stop.value.code == 2 and "did you mean episode/return" in told.err and told.err.count("\n") == 1
    assert told.out.count("trial") == 1 and not (tmp_path / "trial-000").exists()


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on_and_one_setting_that_cannot_be_is_told(tmp_path):
    arguments = ["experiments.ppo_cartpole", "--output", str(tmp_path), "--trials", "3", "--iterations", "6"]
    arguments += ["--space", "ppo.learning-rate 1e-4..1e-2 log", "ppo.num-minibatches 4|5", "--no-prune"]
    arguments += ["--arguments=--ppo.num-envs 16 --ppo.num-steps 16 --training.checkpoint-every 1"]
    line = [sys.executable, "-m", "experiments.sweep", *arguments]
    first = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not any(tmp_path.glob("trial-*/metrics.jsonl")):
        assert first.poll() is None
        time.sleep(0.1)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    ended = subprocess.run(line, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    assert re.search(r"going on with \d trials of before, of which 1 go on where they stopped", ended.stdout)
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    for row in rows:
        # 256 steps are no five minibatches.
        assert (row["state"] == "fail") == (row["ppo.num_minibatches"] == "5")
    assert len({row["ppo.learning_rate"] for row in rows}) == 3
    best = max((r for r in rows if r["state"] == "complete"), key=lambda r: float(r["score"]))
    assert f"the winner, trial {best['trial']}" in ended.stdout
    assert f"--ppo.learning-rate {float(best['ppo.learning_rate'])!r}" in ended.stdout
    for name in ("optimization_history.png", "optimization_history.html", "sweep.db"):
        assert (tmp_path / name).exists()
