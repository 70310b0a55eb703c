"""The report of a walking policy: a page that stands alone, figures beside it, and mistakes told before any work."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from experiments import ppo_cartpole
from experiments.cli import command, to_json
from experiments.report import Config
from rlcore.errors import InputError
from rlcore.run_directory import RunRecord, write_record

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    *("--ppo.num-envs", "4", "--ppo.num-steps", "2", "--ppo.num-minibatches", "1", "--ppo.num-epochs", "1"),
    *("--ppo.policy-layers", "8", "--ppo.value-layers", "8", "--num-threads", "1", "--training.iterations", "1"),
    "--training.no-video",
]


class Ended(NamedTuple):
    returncode: str | int | None
    stdout: str
    stderr: str


@pytest.fixture
def program(capsys):
    """A program of the experiments, run in this process: how it ended and what it printed."""

    def run(name, *arguments):
        module = importlib.import_module(f"experiments.{name}")
        code: str | int | None = 0
        capsys.readouterr()
        try:
            command(module.Config, module.main, [str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        return Ended(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The directory of a run and what its training printed."""
    path = tmp_path_factory.mktemp("runs") / "velocity"
    line = [sys.executable, "-m", "experiments.ppo_humanoid_velocity", *TINY, "--training.run-dir", str(path)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return path, done.stdout


@pytest.fixture(scope="module")
def run_dir(trained):
    return trained[0]


def test_training_names_the_report_of_a_task_with_commands(trained):
    run_dir, printed = trained
    python = sys.executable.removeprefix(f"{ROOT}/")
    assert f"  {python} -m experiments.report {run_dir}\n" in printed


def test_a_policy_is_measured_under_one_command(run_dir, program, tmp_path):
    output = tmp_path / "figures.json"
    few = ["--episodes", 3, "--seconds", 0.3, "--randomized", "--output", output]
    done = program("evaluate", run_dir, *few, "--vx", -0.5, "--yaw-rate", 1)
    assert done.returncode == 0, done.stderr
    figures = json.loads(output.read_text())
    assert figures["velocity_command"] == {"vx": -0.5, "vy": 0.0, "yaw_rate": 1.0}
    assert "told all the time: -0.5 m/s ahead, 0 m/s to the left, 1 rad/s\n" in done.stdout
    assert "note:" not in done.stdout  # the curriculum ranks checkpoints from the first iteration on
    # Robots that hardly learned stand still for a third of a second: they are off by what they are told.
    for physics in (figures, figures["randomized"]):
        assert physics["metrics"]["velocity_error"]["mean"] == pytest.approx(0.5, abs=0.2)
        assert physics["metrics"]["yaw_rate_error"]["mean"] == pytest.approx(1.0, abs=0.4)


def test_a_film_of_one_command(run_dir, program, tmp_path):
    output = tmp_path / "film.mp4"
    done = program("play", run_dir, "--robots", 1, "--seconds", 0.1, "--vx", 0.8, "--output", output)
    assert done.returncode == 0, done.stderr
    assert "told all the time: 0.8 m/s ahead, 0 m/s to the left, 0 rad/s\n" in done.stdout
    assert output.stat().st_size > 0


def test_a_page_that_stands_alone_and_its_figures(run_dir, program, tmp_path):
    few = ["--episodes", 2, "--seconds", 0.3, "--worlds", 2, "--vx", 0, 1, "--yaw-rate", -0.5, 0.5]
    done = program("report", run_dir, *few, "--push-speeds", 0, 1, "--output-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') >= 3 and "http" not in page
    for heading in ("Commands", "Pushes", "Feet", "Torques", "Other physics"):
        assert heading in page
    figures = json.loads((tmp_path / "report.json").read_text())
    grid = figures["commands"]
    assert [len(grid[name]) for name in ("survival", "velocity_error")] == [2, 2]
    # Robots that hardly learned stand still for a third of a second: one told to walk is off by its command.
    slow, fast = (sum(row) / 2 for row in grid["velocity_error"])
    assert slow < 0.5 < fast < 1.5
    assert len(figures["gait"]["joints"]) == len(figures["gait"]["torque_mean"]) == 21
    assert set(figures["worlds"]) == {"nominal", "unseen"} and len(figures["worlds"]["unseen"]["each"]) == 2
    assert "written to" in done.stdout
    # Extremes over the grid are told apart from confidence.
    assert done.stdout.count("best command") == done.stdout.count("worst command") == 3
    assert done.stdout.count("95 % confidence: ") == 2
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("velocity_error"))
    cells = [error for row in grid["velocity_error"] for error in row]
    assert f"best command {min(cells):.3f}, worst command {max(cells):.3f}" in line
    assert "actions 20 ms late" in figures["worlds"]["unseen"]["physics"] and "actions 20 ms late" in page


def test_a_run_without_commands_is_refused(program, tmp_path):
    path = tmp_path / "cartpole"
    path.mkdir()
    config = to_json(ppo_cartpole.Config(num_threads=1))
    write_record(path, RunRecord("ppo_cartpole", "experiments.ppo_cartpole", None, "", 0, config), 1)
    done = program("report", path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "cartpole follows no velocity commands" in done.stderr and "experiments.evaluate" in done.stderr
    assert not (path / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("episodes", 0), ("worlds", 0), ("seconds", 0.0), ("vx", ()), ("push_speeds", (-1.0,)), ("seed", -1)],
)
def test_settings_that_cannot_work_are_refused(name, value):
    with pytest.raises(InputError, match=name):
        Config(Path("run"), **{name: value})
