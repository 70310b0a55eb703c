"""Real trainings that are made ill on purpose, and healthy ones: what the doctor says of each."""

import json

import pytest

from experiments import doctor, ppo_cartpole, ppo_humanoid_velocity
from experiments.cli import command, run
from rlcore.doctor import diagnose
from rlcore.metrics import METRICS_FILE, read_metrics


def train(tmp_path, module, *arguments):
    run_dir = tmp_path / "run"
    quiet = ("--training.no-video", "--training.no-tensorboard", "--training.torch-threads", "1")
    run(module.Config, module.build, [*arguments, *quiet, "--training.run-dir", str(run_dir)])
    return run_dir


def found(run_dir):
    return {finding.name: finding for finding in diagnose(read_metrics(run_dir / METRICS_FILE))}


@pytest.mark.slow
def test_a_learning_rate_of_one_collapses_and_is_told_while_training(tmp_path, capsys):
    run_dir = train(tmp_path, ppo_cartpole, "--training.iterations", "40", "--ppo.learning-rate", "1.0")
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: policy collapse")]
    assert len(warnings) == 1
    assert "learning-rate smaller" in found(run_dir)["policy collapse"].advice


@pytest.mark.slow
def test_a_cost_that_is_paid_for_makes_walking_unstable(tmp_path):
    small = ("--ppo.num-envs", "64", "--ppo.policy-layers", "64", "64", "--ppo.value-layers", "64", "64")
    arguments = ("--training.iterations", "60", *small, "--reward-weights", "action_rate", "1.0")
    told = found(train(tmp_path, ppo_humanoid_velocity, *arguments))
    assert list(told) == ["unstable walking"]
    assert "--reward-weights action_rate -WEIGHT" in told["unstable walking"].advice


@pytest.mark.slow
def test_without_exploration_it_is_exploration_that_is_advised(tmp_path):
    told = found(train(tmp_path, ppo_cartpole, "--training.iterations", "40", "--ppo.initial-std", "0.001"))
    worst, *signs = told.values()
    assert "initial-std" in worst.advice
    assert all("initial-std" in sign.advice or sign.advice == f"mend the {worst.name} first" for sign in signs)


@pytest.mark.slow
def test_steps_that_are_too_small_converge_slowly(tmp_path):
    told = found(train(tmp_path, ppo_cartpole, "--training.iterations", "50", "--ppo.learning-rate", "1e-7"))
    assert list(told) == ["slow convergence"]
    assert "--ppo.learning-rate larger" in told["slow convergence"].advice


@pytest.mark.slow
def test_a_healthy_run_has_nothing_and_overfitting_is_read_from_its_evaluation(tmp_path, capsys):
    run_dir = train(tmp_path, ppo_cartpole, "--training.iterations", "50")
    assert "warning" not in capsys.readouterr().out
    command(doctor.Config, doctor.main, [str(run_dir)])
    told = capsys.readouterr().out
    assert "nothing found wrong" in told and "not looked at: overfitting" in told
    gap = {"difference": 0.36, "low": 0.28, "high": 0.43}
    randomized = {"survived": {"share": 0.52}, "survival_gap": gap, "physics": "masses x 0.8 to 1.2"}
    (run_dir / "evaluation.json").write_text(json.dumps({"survived": {"share": 0.88}, "randomized": randomized}))
    command(doctor.Config, doctor.main, [str(run_dir)])
    told = capsys.readouterr().out
    assert "overfitting: the policy knows one robot only" in told and "--randomization.mass-scale" in told


def test_curves_are_drawn_of_what_was_logged(tmp_path):
    records = [{"iteration": i, "env_steps": 10 * i, "env/faults": float(i > 30)} for i in range(60)]
    path = doctor.draw(tmp_path, records, diagnose(records))
    assert path is not None and path.read_bytes().startswith(b"\x89PNG")
    assert doctor.draw(tmp_path, records[:20], diagnose(records[:20])) is None


def test_a_run_that_is_none_is_told(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        command(doctor.Config, doctor.main, [str(tmp_path)])
    assert stop.value.code == 2 and "is not a run" in capsys.readouterr().err
