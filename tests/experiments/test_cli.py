import importlib.util
import json
import shlex
import shutil
import subprocess
import sys

import pytest
import torch

from experiments.cli import interpreter, load_run, restore_policy, run
from rlcore.errors import InputError
from tests.experiments import regression


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run the regression with arguments, in an empty directory; returns exit code, output, complaints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rlcore.training.plot_learning_curves", lambda run_dir: None)

    def call(*arguments):
        code: object = 0
        try:
            run(regression.Config, regression.build, [*arguments])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return call


FAST = ("--training.no-tensorboard", "--training.iterations", "3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--training.iterations", "0"],
            "error: iterations must be at least 1, got 0 (--training.iterations)",
        ),
        (["--learning-rate", "-1"], "error: learning_rate must be more than 0, got -1.0 (--learning-rate)"),
        (["--training.resume", "nowhere"], "error: nowhere is not a run: nowhere/config.json cannot be read"),
        (["--training.resume=nowhere"], "error: nowhere is not a run: nowhere/config.json cannot be read"),
        (["--training.resume", "a", "--training.run-dir", "b"], "error: a is not a run"),
        (["--training.run-dir", "/proc/none"], "error: run_dir /proc/none cannot be written"),
    ],
)
def test_input_that_cannot_work_is_one_line_and_leaves_nothing(command, tmp_path, arguments, message):
    code, out, err = command(*arguments)
    assert code == 2
    assert err.startswith(message)
    assert err.count("\n") == 1
    assert "Traceback" not in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning-rat", "1"], "Unrecognized options: --learning-rat"),
        (["--data.batch", "many"], "Error parsing --data.batch"),
        (["--seed"], "--seed"),
    ],
)
def test_unknown_fields_and_wrong_types_are_named(command, tmp_path, arguments, message):
    code, _, err = command(*arguments)
    assert code == 2
    assert message in err
    assert err.startswith("error: ") and err.count("\n") == 1 and "│" not in err
    assert list(tmp_path.iterdir()) == []


def test_help_is_the_docstring(command):
    code, out, _ = command("--help")
    assert code == 0
    assert "Learn a line from noisy points." in out
    assert "Iterations in all" in out


def test_a_run_tells_what_can_be_done_next(command, tmp_path):
    code, out, err = command(*FAST, "--training.run-dir", "here")
    assert (code, err) == (0, "")
    # The interpreter is outside of the working directory; a task without commands has no report.
    python = shlex.quote(sys.executable)
    assert out.endswith(f"next:\n  {python} -m experiments.play here\n  {python} -m experiments.evaluate here\n")
    assert (tmp_path / "here" / "config.json").exists()


@pytest.mark.parametrize(
    ("place", "typed"),
    [
        (".venv/bin/python", ".venv/bin/python"),
        ("my env/bin/python3", "'my env/bin/python3'"),
        ("python", "./python"),
    ],
)
def test_an_interpreter_inside_the_working_directory_is_named_from_there(tmp_path, monkeypatch, place, typed):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / place))
    assert interpreter() == typed
    monkeypatch.setattr(sys, "executable", "/opt/python/bin/python3")
    assert interpreter() == "/opt/python/bin/python3"


@pytest.mark.parametrize("installed", [True, False])
def test_tensorboard_is_named_with_how_to_install_it(command, monkeypatch, installed):
    find = importlib.util.find_spec
    looked = lambda name: installed or None if name == "tensorboard" else find(name)  # noqa: E731
    monkeypatch.setattr("importlib.util.find_spec", looked)
    _, out, _ = command("--training.iterations", "1", "--training.run-dir", "a b")
    python = shlex.quote(sys.executable)
    show = f"{python} -m tensorboard.main --logdir 'a b/tensorboard'"
    assert out.splitlines()[-1].strip() == (show if installed else f"{python} -m pip install tensorboard && {show}")


def test_a_finished_run_tells_how_to_go_on(command):
    command(*FAST, "--training.run-dir", "my run")
    code, _, err = command("--training.resume", "my run")
    assert code == 2 and err.count("\n") == 1
    python, given = shlex.split(err.split("to train as long again: ")[1])[0], shlex.split(err)[-4:]
    assert python == sys.executable
    assert given == ["--training.resume", "my run", "--training.iterations", "6"]
    code, out, _ = command(*given)
    assert code == 0 and "done: 6 of 6 iterations" in out


def test_a_folder_of_runs_is_told_with_its_runs_and_the_newest(command, tmp_path):
    begun = {"b": "2026-01-01T00:00:00Z", "c": "2026-03-01T00:00:00Z", "a": "2026-02-01T00:00:00Z"}
    for name, created in begun.items():
        command(*FAST, "--training.run-dir", f"runs/line/{name}")
        path = tmp_path / "runs" / "line" / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"created": created}))
    for given in (["--training.resume", "runs/line"], ["--training.resume=runs/line"]):
        code, out, err = command(*given, "--training.iterations", "5")
        again = given[0].replace("runs/line", "runs/line/c") if len(given) == 1 else "--training.resume runs/line/c"
        program = f"{shlex.quote(sys.executable)} -m tests.experiments.regression"
        assert (code, out) == (2, "")
        assert err == (
            "error: runs/line is not a run but holds 3 runs, newest last: b, a, c; "
            f"for the newest: {program} {again} --training.iterations 5\n"
        )
    assert (
        "runs is not a run but holds 3 runs, newest last: line/b, line/a, line/c"
        in command("--training.resume", "runs")[2]
    )
    assert command("--training.resume", "runs/line/c", "--training.iterations", "5")[0] == 0


def test_of_many_runs_the_newest_are_named(command, tmp_path):
    command(*FAST, "--training.run-dir", "runs/0")
    for number in range(1, 7):
        shutil.copytree(tmp_path / "runs" / "0", tmp_path / "runs" / str(number))
    _, _, err = command("--training.resume", "runs")
    assert "holds 7 runs, newest last: 2 earlier ones, 2, 3, 4, 5, 6; " in err


def test_a_best_checkpoint_that_is_merely_the_newest_is_told(command, tmp_path):
    # The regression has no return before its second iteration.
    first = ("--training.no-tensorboard", "--training.run-dir", "run", "--training.iterations")
    _, out, _ = command(*first, "1")
    why = "has a value of episode/return"
    assert f"best checkpoint: iteration 1, merely the newest: none {why}" in out
    note = restore_policy(tmp_path / "run").note
    assert note == f"no checkpoint {why}: the best is merely the newest"
    assert restore_policy(tmp_path / "run", "last").note is None
    _, out, _ = command("--training.resume", "run", "--training.iterations", "2")
    assert "best checkpoint: iteration 2, episode/return -" in out
    assert restore_policy(tmp_path / "run").note is None


def test_resume_takes_the_saved_configuration(command, tmp_path):
    command(*FAST, "--training.run-dir", "run", "--learning-rate", "0.05", "--data.noise", "0.0", "inf")
    code, out, _ = command("--training.resume", "run", "--training.iterations", "5")
    assert code == 0
    assert "going on from iteration 3" in out
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["config"]["learning_rate"] == 0.05
    # JSON has no infinity.
    assert saved["config"]["data"]["noise"] == [0.0, "inf"]
    assert saved["config"]["training"]["tensorboard"] is False
    assert saved["config"]["training"]["iterations"] == 5
    # The same value given again changes nothing, so it may be given.
    assert command("--training.resume", "run", "--training.iterations", "6", "--learning-rate", "5e-2")[0] == 0


def test_resume_tells_which_settings_are_newer_than_the_run(command, tmp_path):
    command(*FAST, "--training.run-dir", "run")
    record = tmp_path / "run" / "config.json"
    saved = json.loads(record.read_text())
    del saved["config"]["data"]["batch"], saved["config"]["training"]["keep_last"], saved["config"]["labels"]
    record.write_text(json.dumps(saved))
    code, _, err = command("--training.resume", "run", "--training.iterations", "4")
    assert (code, err) == (
        0,
        "warning: run is from before these settings were there, and goes on with --data.batch 16\n",
    )
    # From then on it is recorded.
    code, _, err = command("--training.resume", "run", "--training.iterations", "5")
    assert (code, err) == (0, "")
    record.write_text(json.dumps(saved))
    given = ("--data.batch", "8", "--labels", "one", "1.0")
    code, _, err = command("--training.resume", "run", "--training.iterations", "6", *given)
    assert code == 0 and err.splitlines()[0].endswith("goes on with --data.batch 8, --labels one 1.0")
    code, _, err = command("--training.resume", "run", "--training.iterations", "7", "--learning-rate", "1")
    assert code == 2 and "learning_rate was" in err


def test_resume_refuses_to_change_what_is_trained(command, tmp_path):
    command(*FAST, "--training.run-dir", "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    code, _, err = command("--training.resume", "run", "--training.iterations", "9", "--data.batch", "8")
    assert code == 2
    assert err.startswith("error: data.batch was 16 in the run to resume and cannot become 8 (--data.batch)")
    code, _, err = command("--training.resume", "run", "--training.run-dir", "other")
    assert code == 2
    assert err.startswith("error: run_dir must be left out when resuming")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": "zero"}, "'zero' is not of type int"),
        ({"rate": 1.0}, "rate"),
        ({"learning_rate": True}, "True is not of type float"),
        ({"learning_rate": -1.0}, "learning_rate must be more than 0"),
    ],
)
def test_a_saved_configuration_that_no_longer_fits_is_refused(command, tmp_path, change, message):
    command(*FAST, "--training.run-dir", "run")
    path = tmp_path / "run" / "config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps(saved | {"config": saved["config"] | change}))
    code, _, err = command("--training.resume", "run", "--training.iterations", "9")
    assert code == 2
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    with pytest.raises(InputError):
        load_run(tmp_path / "run")


def test_another_experiments_run_is_not_resumed(command, tmp_path):
    command(*FAST, "--training.run-dir", "run")
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace("tests.experiments.regression", "experiments.g1_walk"))
    code, _, err = command("--training.resume", "run")
    assert code == 2
    expected = "run is a run of experiments.g1_walk, not of tests.experiments.regression (--training.resume)"
    assert err == f"error: {expected}\n"


def test_training_that_fails_is_one_line_and_code_1(command):
    code, _, err = command("--training.run-dir", "run", "--nan-at", "2", "--training.no-tensorboard")
    assert code == 1
    assert err.startswith("error: loss/value is nan at iteration 3")
    assert err.count("\n") == 1


def test_a_run_can_be_loaded_and_its_policy_restored(command, tmp_path):
    command(*FAST, "--training.run-dir", "run", "--seed", "4", "--training.checkpoint-every", "1")
    run_dir = tmp_path / "run"
    loaded = load_run(run_dir)
    assert loaded.module is regression
    assert loaded.config.seed == 4
    obs = torch.ones(2, 3)
    policies = {which: restore_policy(run_dir, which) for which in ("best", "last", 1, "2")}
    assert [policy.iteration for policy in policies.values()] == [3, 3, 1, 2]
    assert torch.equal(policies["best"].act(obs), policies["last"].act(obs))
    assert not torch.equal(policies[1].act(obs), policies["last"].act(obs))
    weight = policies["last"].state.params["weight"]
    expected = weight.sum() + policies["last"].state.params["bias"]
    torch.testing.assert_close(policies["last"].act(obs), expected.expand(2))


def test_loading_can_override_fields(command, tmp_path):
    command(*FAST, "--training.run-dir", "run")
    loaded = load_run(tmp_path / "run", {"data.batch": 3, "pause": 0.5})
    assert (loaded.config.data.batch, loaded.config.pause) == (3, 0.5)
    assert restore_policy(loaded, "last", fresh=("key",)).iteration == 3
    with pytest.raises(InputError, match=r"no field data\.rows"):
        load_run(tmp_path / "run", {"data.rows": 3})


def test_what_is_not_a_run_or_a_checkpoint_is_told(command, tmp_path):
    with pytest.raises(InputError, match="is not a run"):
        load_run(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        load_run(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match="lacks"):
        load_run(tmp_path)
    command(*FAST, "--training.run-dir", "run")
    for which, message in (
        (7, "no checkpoint of iteration 7"),
        ("newest", "must be best, last or an iteration"),
    ):
        with pytest.raises(InputError, match=message):
            restore_policy(tmp_path / "run", which)
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace("tests.experiments.regression", "tests.experiments.gone"))
    with pytest.raises(InputError, match="which cannot be imported"):
        load_run(tmp_path / "run")


def test_an_experiment_may_be_a_file_outside_any_package(tmp_path, monkeypatch):
    script = tmp_path / "my_walk.py"
    script.write_text(
        "from tests.experiments.regression import Config, build as regression\n"
        "from experiments.cli import run\n"
        "def build(config):\n"
        "    return regression(config)\n"
        "if __name__ == '__main__':\n"
        "    run(Config, build)\n"
    )
    arguments = [sys.executable, str(script), *FAST, "--training.run-dir", str(tmp_path / "run")]
    root = str(regression.Path(regression.__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", root)
    subprocess.run(arguments, check=True, capture_output=True)
    policy = restore_policy(tmp_path / "run")
    assert policy.run.module.__name__ == "my_walk"
    assert policy.iteration == 3


def test_importing_is_light():
    heavy = "{'jax', 'orbax', 'matplotlib', 'tensorboardX', 'imageio', 'imageio_ffmpeg', 'mujoco', 'google.protobuf'}"
    code = f"import sys, experiments.cli; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
