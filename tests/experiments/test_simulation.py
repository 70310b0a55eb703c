"""What simulates, from the command line through to the engine, the run's record and the way back."""

import dataclasses
import importlib
import json
import os

import pytest

from experiments import ppo_cartpole
from experiments.cli import load_run, parse, run
from experiments.population import Config as PopulationConfig
from experiments.population import settings as members_of
from rlcore.errors import InputError
from rlcore.experiment import TrainingConfig
from rlcore.physics.isaacgym_settings import PYTHON_VARIABLE, Settings
from rlcore.physics.mujoco import MujocoEngine
from tests.rlcore.physics.standin import interpreter

TINY = [
    *("--ppo.num-envs", "4", "--ppo.num-steps", "4", "--ppo.num-epochs", "1", "--num-threads", "1"),
    *("--ppo.policy-layers", "8", "--ppo.value-layers", "8", "--episode-seconds", "0.4"),
    *("--training.iterations", "1", "--training.no-tensorboard", "--training.no-video"),
]
ISAACGYM = ("--physics", "isaacgym")
EXPERIMENTS = (
    *("ppo_cartpole", "ppo_ant", "ppo_humanoid_balance", "ppo_humanoid_run", "ppo_humanoid_velocity"),
    *("sac_cartpole", "sac_ant", "sac_humanoid_balance", "sac_humanoid_velocity"),
)
# These have their robots from packages that need not be there.
OF_PACKAGES = ("ppo_g1_velocity", "ppo_gym", "sac_gym")


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """Run the cartpole's experiment with arguments; returns exit code and complaints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(PYTHON_VARIABLE, raising=False)
    monkeypatch.setattr("rlcore.training.plot_learning_curves", lambda run_dir: None)

    def train(*arguments):
        code: object = 0
        try:
            run(ppo_cartpole.Config, ppo_cartpole.build, [*arguments])
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().err

    return train


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_hands_the_settings_on(name):
    module = importlib.import_module(f"experiments.{name}")
    config = parse(module.Config, [*ISAACGYM, "--isaacgym.python", "/no/such/python"], name)
    with pytest.raises(InputError, match=r"--isaacgym\.python must name an interpreter, but '/no/such/python'"):
        module.build(config)


def test_no_experiment_that_chooses_its_physics_is_forgotten():
    folder = os.path.dirname(ppo_cartpole.__file__)
    found = set()
    for file in os.listdir(folder):
        if file.startswith(("ppo_", "sac_")):
            module = importlib.import_module(f"experiments.{file.removesuffix('.py')}")
            names = {field.name for field in dataclasses.fields(module.Config)}
            assert ("physics" in names) == ("isaacgym" in names), file
            if "physics" in names:
                found.add(file.removesuffix(".py"))
    assert found == {*EXPERIMENTS, *OF_PACKAGES}


@pytest.mark.parametrize("name", (*EXPERIMENTS, *OF_PACKAGES))
def test_every_experiment_weighs_its_rewards(name):
    experiment = importlib.import_module(f"experiments.{name}")
    built = experiment.build(experiment.Config(num_threads=1))
    term = built.env.spec.terms[0]
    other = experiment.build(experiment.Config(num_threads=1, reward_weights={term: 123.0}))
    for before, after in ((built.env, other.env), (built.evaluation_env, other.evaluation_env)):
        assert float(before.params.weights[term]) != 123.0 and float(after.params.weights[term]) == 123.0
    with pytest.raises(InputError, match=rf"no reward term 'nothing'; it has: .*{term}"):
        experiment.build(experiment.Config(num_threads=1, reward_weights={"nothing": 1.0}))


def test_a_missing_interpreter_is_told_before_anything_is_written(train, tmp_path):
    code, err = train(*ISAACGYM, "--training.run-dir", "run")
    assert code == 2 and err.startswith("error: physics isaacgym runs in a Python of its own") and err.count("\n") == 1
    code, err = train(*ISAACGYM, "--isaacgym.python", "./none", "--training.run-dir", "run")
    assert code == 2 and "'./none' is no program here" in err and err.count("\n") == 1
    code, err = train(*ISAACGYM, "--isaacgym.num-position-iterations", "0")
    assert code == 2 and "at least 1, got 0 (--isaacgym.num-position-iterations)" in err
    assert list(tmp_path.iterdir()) == []


def test_settings_are_in_the_record_and_a_run_goes_on_where_the_interpreter_is_another(train, tmp_path, monkeypatch):
    given = ["--isaacgym.python", interpreter(), "--isaacgym.contact-offset", "0.01", "--isaacgym.step-timeout", "90"]
    assert train(*TINY, *ISAACGYM, *given, "--training.run-dir", "run") == (0, "")
    path = tmp_path / "run" / "config.json"
    saved = json.loads(path.read_text())
    expected = Settings(python=interpreter(), contact_offset=0.01, step_timeout=90.0)
    assert saved["config"]["isaacgym"] == dataclasses.asdict(expected)
    # As if it came from another machine.
    saved["config"]["isaacgym"]["python"] = "/of/another/machine"
    path.write_text(json.dumps(saved))
    resume = ["--training.resume", "run", "--training.iterations"]
    code, err = train(*resume, "2")
    assert (
        code == 2 and "--isaacgym.python must name an interpreter, but '/of/another/machine' is no program here" in err
    )
    code, err = train(*resume, "2", "--isaacgym.python", interpreter(), "--isaacgym.contact-offset", "0.02")
    assert code == 2 and "isaacgym.contact_offset was 0.01 in the run to resume and cannot become 0.02" in err
    monkeypatch.setenv(PYTHON_VARIABLE, interpreter())
    assert train(*resume, "2", "--isaacgym.python", "", "--isaacgym.gpu", "1", "--isaacgym.step-timeout", "80") == (
        0,
        "",
    )
    # What is looked at is simulated by MuJoCo, which needs no interpreter.
    path.write_text(json.dumps(saved))
    monkeypatch.delenv(PYTHON_VARIABLE)
    loaded = load_run(tmp_path / "run")
    assert isinstance(loaded.experiment.env.engine, MujocoEngine)
    assert loaded.config.isaacgym.contact_offset == 0.01
    with pytest.raises(InputError, match="/of/another/machine"):
        load_run(tmp_path / "run", {"physics": "isaacgym"})


def test_a_run_from_before_the_settings_goes_on(train, tmp_path):
    assert train(*TINY, "--training.run-dir", "run") == (0, "")
    path = tmp_path / "run" / "config.json"
    saved = json.loads(path.read_text())
    del saved["config"]["isaacgym"]
    path.write_text(json.dumps(saved))
    assert load_run(tmp_path / "run").config.isaacgym == Settings()
    # On MuJoCo they mean nothing, and nothing is said of them.
    assert train("--training.resume", "run", "--training.iterations", "2") == (0, "")
    saved["config"]["physics"] = "isaacgym"
    path.write_text(json.dumps(saved))
    again = ["--training.resume", "run", "--training.iterations", "3", "--isaacgym.python", interpreter()]
    code, err = train(*again, "--isaacgym.contact-offset", "0.01")
    assert code == 0 and err.count("\n") == 1
    assert "--isaacgym.num-position-iterations 4" in err and "--isaacgym.contact-offset 0.01" in err
    assert "python" not in err and "timeout" not in err


def test_members_of_a_population_share_them():
    settings = Settings(gpu=1, contact_offset=0.01)
    config = PopulationConfig(
        "experiments.ppo_cartpole",
        members=("a:", "b: --ppo.learning-rate 1e-4"),
        physics="isaacgym",
        isaacgym=settings,
        training=TrainingConfig(iterations=1),
    )
    assert [own.engine for _, own in members_of(config)] == [settings, settings]


def test_a_simulator_that_does_not_start_is_one_line_and_nothing_is_left(train, tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no libpython; exit 3\n")
    broken.chmod(0o755)
    code, err = train(*TINY, *ISAACGYM, "--isaacgym.python", str(broken), "--training.run-dir", "runs/one")
    assert code == 1 and err.count("\n") == 1
    assert "ended with exit code 3 in starting; it printed last: no libpython" in err
    assert not (tmp_path / "runs").exists()


def test_settings_of_an_engine_that_was_not_chosen_are_told(train, tmp_path):
    code, err = train(*TINY, "--isaacgym.gpu", "1", "--training.run-dir", "runs/one")
    assert code == 0 and "--isaacgym.*) say nothing with physics mujoco (--physics isaacgym)" in err
