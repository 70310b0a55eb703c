import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from rlcore import random
from rlcore.checkpoint import Checkpointer
from rlcore.errors import EngineFailed, InputError
from rlcore.experiment import TrainingConfig
from rlcore.metrics import Console, read_metrics
from rlcore.training import RunRecord, TrainingFailed, train
from rlcore.tree import named_leaves
from tests.experiments import regression

RECORD = RunRecord("regression", "tests.experiments.regression", None, "python -m regression", 0, {"seed": 0})


@pytest.fixture(autouse=True)
def no_curves(request, monkeypatch):
    """Drawing takes longer than training here; test_metrics looks at the drawing."""
    if "laid_out" not in request.node.name:
        monkeypatch.setattr("rlcore.training.plot_learning_curves", lambda run_dir: None)


def training(run_dir, **kwargs):
    return TrainingConfig(run_dir=run_dir, **{"tensorboard": False, "checkpoint_every": 4, **kwargs})


def go(config, build_config=None, **kwargs):
    """Train the regression; returns the result and what the console showed."""
    stream = io.StringIO()
    console = Console("regression", config.iterations, 3600.0, stream)
    experiment = kwargs.pop("experiment", None) or regression.build(build_config or regression.Config())
    result = train(experiment, config, key=random.key(0), record=RECORD, console=console, **kwargs)
    return result, stream.getvalue()


def resumed(run_dir, **kwargs):
    return dataclasses.replace(training(None, **kwargs), resume=run_dir)


def records(run_dir):
    """The metrics without what the clock decides."""
    lines = read_metrics(run_dir / "metrics.jsonl")
    return [{name: value for name, value in line.items() if not name.startswith("time/")} for line in lines]


def assert_same_state(a, b):
    for (name, x), (_, y) in zip(named_leaves(a), named_leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8)), name


def stored_steps(run_dir):
    return sorted(int(path.name) for path in (run_dir / "checkpoints").iterdir())


@pytest.mark.parametrize("n", [1, 4, 7])
def test_n_plus_m_is_n_then_m(tmp_path, n):
    straight, _ = go(training(tmp_path / "straight", iterations=12))
    go(training(tmp_path / "parts", iterations=n))
    continued, shown = go(resumed(tmp_path / "parts", iterations=12))
    assert f"going on from iteration {n}" in shown
    assert_same_state(continued.state, straight.state)
    assert records(tmp_path / "parts") == records(tmp_path / "straight")
    assert [r["iteration"] for r in records(tmp_path / "parts")] == list(range(1, 13))
    elapsed = [r["time/elapsed_seconds"] for r in read_metrics(tmp_path / "parts" / "metrics.jsonl")]
    assert elapsed == sorted(elapsed)


def test_a_run_lost_after_its_checkpoint_repeats_the_same_iterations(tmp_path):
    straight, _ = go(training(tmp_path / "straight", iterations=12))
    go(training(tmp_path / "lost", iterations=12))
    for step in (12, 8):
        shutil.rmtree(tmp_path / "lost" / "checkpoints" / str(step))
    continued, _ = go(resumed(tmp_path / "lost", iterations=12))
    assert_same_state(continued.state, straight.state)
    assert records(tmp_path / "lost") == records(tmp_path / "straight")


def test_a_run_is_laid_out_as_described(tmp_path):
    result, shown = go(
        training(tmp_path / "run", iterations=6, keep_last=1, tensorboard=True),
        render=regression.build(regression.Config()).render,
    )
    run_dir = tmp_path / "run"
    assert result.run_dir == run_dir
    assert result.stopped == "iterations"
    names = {"config.json", "metrics.jsonl", "tensorboard", "checkpoints", "learning_curves.png", "video.mp4"}
    assert {path.name for path in run_dir.iterdir()} == names
    assert stored_steps(run_dir) == [6]
    saved = json.loads((run_dir / "config.json").read_text())
    assert saved["module"] == RECORD.module
    assert saved["config"] == {"seed": 0}
    assert saved["versions"]["torch"] == torch.__version__
    for name in (
        "done: 6 of 6 iterations, 96 environment steps",
        "best checkpoint: iteration 6",
        "video.mp4",
    ):
        assert name in shown


def test_the_default_directory_names_experiment_time_and_seed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, _ = go(training(None, iterations=1))
    assert first.run_dir.parent == Path("runs/regression")
    assert first.run_dir.name.endswith("-seed0")


def test_a_run_is_never_overwritten(tmp_path):
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(InputError, match="must be new or empty") as caught:
        go(training(tmp_path, iterations=1))
    assert f"--training.resume {tmp_path}" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_a_directory_that_cannot_be_written_is_refused_and_nothing_stays(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written: .* \(--training.run-dir\)"):
        go(training(tmp_path / "file" / "run", iterations=1))
    with pytest.raises(InputError, match=r"cannot be written: .* \(--training.run-dir\)"):
        go(training(Path("/proc/rlcore/run"), iterations=1))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_too_little_space_is_told_before_work_begins(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 90, 10))
    with pytest.raises(InputError, match="are free"):
        go(training(tmp_path / "a" / "run", iterations=1))
    assert list(tmp_path.iterdir()) == []


def test_a_first_checkpoint_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("orbax.checkpoint.CheckpointManager.save", full)
    with pytest.raises(InputError, match="No space left"):
        go(training(tmp_path / "a" / "run", iterations=1))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_checkpoint_is_told_and_training_goes_on(tmp_path, monkeypatch):
    import orbax.checkpoint

    save = orbax.checkpoint.CheckpointManager.save

    def sometimes_full(self, step, *args, **kwargs):
        if step == 4:
            raise OSError(28, "No space left on device")
        return save(self, step, *args, **kwargs)

    monkeypatch.setattr("orbax.checkpoint.CheckpointManager.save", sometimes_full)
    result, shown = go(training(tmp_path / "run", iterations=9))
    assert result.stopped == "iterations"
    assert "warning: the checkpoint of iteration 4 could not be written" in shown
    assert stored_steps(tmp_path / "run") == [0, 8, 9]


def test_a_last_checkpoint_that_fails_is_an_error(tmp_path, monkeypatch):
    import orbax.checkpoint

    save = orbax.checkpoint.CheckpointManager.save

    def full_at_the_end(self, step, *args, **kwargs):
        if step == 9:
            raise OSError(28, "No space left on device")
        return save(self, step, *args, **kwargs)

    monkeypatch.setattr("orbax.checkpoint.CheckpointManager.save", full_at_the_end)
    with pytest.raises(TrainingFailed, match=r"last good checkpoint is iteration 8.* --training.resume"):
        go(training(tmp_path / "run", iterations=9))
    monkeypatch.undo()
    straight, _ = go(training(tmp_path / "straight", iterations=9))
    continued, _ = go(resumed(tmp_path / "run", iterations=9))
    assert_same_state(continued.state, straight.state)


def test_metrics_that_cannot_be_written_end_the_run_with_a_way_back(tmp_path, monkeypatch):
    from rlcore.metrics import MetricsFile

    write = MetricsFile.write

    def full(self, iteration, *args):
        if iteration == 6:
            raise OSError(28, "No space left on device")
        write(self, iteration, *args)

    monkeypatch.setattr(MetricsFile, "write", full)
    with pytest.raises(TrainingFailed, match="No space left on device; the last good checkpoint is iteration 4"):
        go(training(tmp_path / "run", iterations=9))


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_checkpoints(tmp_path):
    with pytest.raises(TrainingFailed, match=r"loss/value is nan at iteration 7; .* iteration 4") as caught:
        go(training(tmp_path / "run", iterations=20), regression.Config(nan_at=6))
    assert "\n" not in str(caught.value)
    assert stored_steps(tmp_path / "run") == [0, 4]
    assert records(tmp_path / "run")[-1]["loss/value"] is None


def test_a_best_metric_that_there_is_not_is_told_and_nothing_is_left(tmp_path):
    run_dir = tmp_path / "runs" / "one"
    with pytest.raises(InputError, match=r"best_metric must be .* got 'return'; did you mean episode/return\?"):
        go(training(run_dir, iterations=3, best_metric="return"))
    assert not run_dir.parent.exists()
    go(training(run_dir, iterations=3, best_metric="time/env_steps_per_second"))
    before = (run_dir / "config.json").read_bytes()
    with pytest.raises(InputError, match="did you mean episode/return"):
        go(resumed(run_dir, iterations=5, best_metric="return"))
    assert (run_dir / "config.json").read_bytes() == before
    result, _ = go(resumed(run_dir, iterations=5))
    assert int(result.state.iteration) == 5


def test_an_experiment_says_what_it_is_judged_by_and_is_told_where_it_runs(tmp_path):
    told: list[Path] = []
    experiment = regression.build(regression.Config())._replace(best_metric="episode/fall_rate", begin=told.append)
    _, shown = go(training(tmp_path / "run", iterations=3), experiment=experiment)
    assert "episode/fall_rate" in shown and told == [tmp_path / "run"]
    _, shown = go(training(tmp_path / "other", iterations=3, best_metric="loss/value"), experiment=experiment)
    assert "loss/value" in shown and "episode/fall_rate" not in shown.split("best checkpoint")[1]


def test_a_simulator_that_ends_is_told_with_the_way_back(tmp_path):
    experiment = regression.build(regression.Config())

    def update(state):
        if int(state.iteration) == 5:
            raise EngineFailed("the simulator ended by signal SIGABRT in a step")
        return experiment.algorithm.update(state)

    broken = experiment._replace(algorithm=experiment.algorithm._replace(update=update))
    with pytest.raises(TrainingFailed) as error:
        go(training(tmp_path, iterations=8), experiment=broken)
    assert str(error.value) == (
        "the simulator ended by signal SIGABRT in a step; the last good checkpoint is iteration 4. To go on: "
        f"python -m regression --training.resume {tmp_path}"
    )


def test_broken_parameters_are_never_saved(tmp_path):
    # At iteration 8, which is due for a checkpoint, the loss is still finite but the parameters are not.
    with pytest.raises(TrainingFailed, match=r"params\.weight is not finite after iteration 8"):
        go(training(tmp_path / "run", iterations=20), regression.Config(nan_at=8))
    assert stored_steps(tmp_path / "run") == [0, 4]


def test_the_time_limit_leaves_a_checkpoint_to_resume_from(tmp_path):
    result, shown = go(training(tmp_path / "run", iterations=1000, time_limit=0.2), regression.Config(pause=0.05))
    assert result.stopped == "time limit"
    done = int(result.state.iteration)
    # Each update takes at least 0.05 s, and the limit is looked at after each.
    assert 1 <= done <= 4
    assert stored_steps(tmp_path / "run")[-1] == done
    assert f"python -m regression --training.resume {tmp_path / 'run'}" in shown
    continued, _ = go(resumed(tmp_path / "run", iterations=6))
    straight, _ = go(training(tmp_path / "straight", iterations=6))
    assert_same_state(continued.state, straight.state)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_update_and_saves(tmp_path, number):
    experiment = regression.build(regression.Config())
    update = experiment.algorithm.update

    def interrupted(state):
        if int(state.iteration) == 5:
            os.kill(os.getpid(), number)
        return update(state)

    algorithm = experiment.algorithm._replace(update=interrupted)
    before = signal.getsignal(number)
    result, shown = go(training(tmp_path / "run", iterations=1000), experiment=experiment._replace(algorithm=algorithm))
    assert signal.getsignal(number) is before
    assert result.stopped == signal.Signals(number).name
    assert stored_steps(tmp_path / "run") == [0, 4, 6]
    assert "--training.resume" in shown
    continued, _ = go(resumed(tmp_path / "run", iterations=9))
    straight, _ = go(training(tmp_path / "straight", iterations=9))
    assert_same_state(continued.state, straight.state)
    assert records(tmp_path / "run") == records(tmp_path / "straight")


def test_outside_the_main_thread_training_runs_without_signals(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(go(training(tmp_path / "run", iterations=2))))
    thread.start()
    thread.join()
    assert results[0][0].stopped == "iterations"


def test_a_second_process_is_kept_out(tmp_path):
    go(training(tmp_path / "run", iterations=2))
    experiment = regression.build(regression.Config())

    def render(state, path):
        with pytest.raises(InputError, match="in use by another process"):
            go(resumed(tmp_path / "run", iterations=9))
        path.write_text("looked")

    go(resumed(tmp_path / "run", iterations=4), experiment=experiment, render=render)
    assert (tmp_path / "run" / "video.mp4").read_text() == "looked"


def test_faults_are_written_even_when_the_update_raises(tmp_path):
    experiment = regression.build(regression.Config())
    pending = []

    def update(state):
        pending.append(("nan", {"qpos": torch.tensor([1.0, float("nan")])}))
        if int(state.iteration) == 2:
            raise RuntimeError("the engine gave up")
        return experiment.algorithm.update(state)

    def drain():
        found = list(pending)
        pending.clear()
        return found

    broken = experiment._replace(algorithm=experiment.algorithm._replace(update=update))
    with pytest.raises(RuntimeError, match="the engine gave up"):
        go(training(tmp_path / "run", iterations=9), experiment=broken, faults=drain)
    files = sorted((tmp_path / "run" / "faults").iterdir())
    assert [file.name for file in files] == ["000001-nan-0.npz", "000002-nan-0.npz", "000003-nan-0.npz"]
    import numpy as np

    np.testing.assert_array_equal(np.load(files[0])["qpos"], np.array([1.0, np.nan], np.float32))


def test_a_video_that_fails_does_not_fail_the_run(tmp_path):
    def render(state, path):
        raise RuntimeError("no display")

    result, shown = go(training(tmp_path / "run", iterations=1), render=render)
    assert result.stopped == "iterations"
    assert "warning: no video: no display" in shown


def test_resuming_needs_a_run_with_a_checkpoint_and_work_left(tmp_path):
    with pytest.raises(InputError, match=r"is not a run: .*config\.json cannot be read"):
        go(resumed(tmp_path / "none", iterations=3))
    assert not (tmp_path / "none").exists()
    go(training(tmp_path / "run", iterations=3))
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match="iterations must be more than the 3 already done, got 3"):
        go(resumed(tmp_path / "run", iterations=3))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(InputError, match="has no checkpoint"):
        go(resumed(tmp_path / "run", iterations=9))


def test_resuming_on_another_number_of_threads_is_told(tmp_path):
    before = torch.get_num_threads()
    try:
        _, shown = go(training(tmp_path / "run", iterations=1, torch_threads=1))
        assert "note:" not in shown
        assert json.loads((tmp_path / "run" / "config.json").read_text())["torch_threads"] == 1
        _, shown = go(resumed(tmp_path / "run", iterations=2, torch_threads=1))
        assert "note:" not in shown
        _, shown = go(resumed(tmp_path / "run", iterations=3, torch_threads=2))
        assert (
            "note: torch learned on 1 threads when this run was saved and does on 2 now (--training.torch-threads); "
            "numbers may differ in their last bits\n"
        ) in shown
    finally:
        torch.set_num_threads(before)


def test_resuming_passes_over_a_damaged_checkpoint(tmp_path):
    go(training(tmp_path / "run", iterations=8))
    (tmp_path / "run" / "checkpoints" / "8" / "manifest" / "metadata").write_text("{}")
    continued, shown = go(resumed(tmp_path / "run", iterations=9))
    assert "8 is damaged" in shown
    assert "going back to iteration 4" in shown
    straight, _ = go(training(tmp_path / "straight", iterations=9))
    assert_same_state(continued.state, straight.state)
    assert records(tmp_path / "run") == records(tmp_path / "straight")


def test_an_update_that_does_not_count_is_a_mistake(tmp_path):
    experiment = regression.build(regression.Config())
    still = experiment.algorithm._replace(update=lambda state: (state, {}))
    with pytest.raises(ValueError, match="update must add 1 to iteration"):
        go(training(tmp_path / "run", iterations=2), experiment=experiment._replace(algorithm=still))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"iterations": 0}, "iterations must be at least 1, got 0 (--training.iterations)"),
        ({"keep_last": 0}, "keep_last must be at least 1, got 0 (--training.keep-last)"),
        (
            {"checkpoint_every": -1},
            "checkpoint_every must be at least 1, got -1 (--training.checkpoint-every)",
        ),
        ({"time_limit": 0.0}, "time_limit must be more than 0, got 0.0 (--training.time-limit)"),
        ({"time_limit": float("nan")}, "time_limit must be more than 0, got nan (--training.time-limit)"),
        ({"log_every": 0.0}, "log_every must be more than 0, got 0.0 (--training.log-every)"),
        ({"run_dir": Path("a"), "resume": Path("b")}, "run_dir must be left out when resuming"),
    ],
)
def test_a_config_that_cannot_work_is_refused(fields, message):
    with pytest.raises(InputError) as caught:
        TrainingConfig(**fields)
    assert message in str(caught.value)


def test_a_run_killed_at_any_moment_goes_on_to_the_same_bits(tmp_path):
    straight, _ = go(training(tmp_path / "straight", iterations=30))
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "tests.experiments.regression", "--training.no-tensorboard"]
    command += ["--training.checkpoint-every", "1", "--training.iterations", "30", "--pause", "0.01"]
    place = ["--training.run-dir", str(run_dir)]
    metrics = run_dir / "metrics.jsonl"
    killed = 0
    # Killed as soon as so many iterations are on disk: somewhere in the writing of one checkpoint or another.
    for lines in (2, 16):
        process = subprocess.Popen([*command, *place], stdout=subprocess.DEVNULL)
        while process.poll() is None:
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= lines and resumed_past(run_dir, killed):
                process.kill()
                killed += 1
                break
            time.sleep(0.002)  # busy waiting would take a core from what is waited for
        process.wait()
        place = ["--training.resume", str(run_dir)]
    assert killed == 2
    subprocess.run([*command, *place], stdout=subprocess.DEVNULL, check=True)
    checkpoints = Checkpointer(run_dir / "checkpoints", {"experiment": "regression"}, read_only=True)
    final, step = checkpoints.restore_latest(straight.state)
    assert step == 30
    assert_same_state(final, straight.state)
    assert records(run_dir) == records(tmp_path / "straight")


def resumed_past(run_dir, times):
    """Whether the run has been resumed so often: until then its metrics are those of the process before."""
    return len(json.loads((run_dir / "config.json").read_text())["resumed"]) == times


def test_ctrl_c_saves_and_a_second_one_leaves_at_once(tmp_path):
    command = [sys.executable, "-m", "tests.experiments.regression", "--training.iterations", "100000"]
    runs = []
    for name, pause in (("once", "0.05"), ("twice", "2.0")):
        arguments = [
            "--training.run-dir",
            str(tmp_path / name),
            "--pause",
            pause,
            "--training.no-tensorboard",
        ]
        runs.append(subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    once, twice = runs
    for process, name in zip(runs, ("once", "twice"), strict=True):
        while not (tmp_path / name / "metrics.jsonl").exists():
            assert process.poll() is None
            time.sleep(0.02)
    # The file is opened a moment before the handlers are set; an update takes longer than that moment.
    while not (tmp_path / "twice" / "metrics.jsonl").read_text():
        assert twice.poll() is None
        time.sleep(0.02)
    once.send_signal(signal.SIGINT)
    twice.send_signal(signal.SIGINT)
    assert twice.stderr is not None
    assert "once more leaves at once" in twice.stderr.readline() + twice.stderr.readline()
    twice.send_signal(signal.SIGINT)
    shown, complaint = once.communicate(timeout=30)
    assert once.returncode == 0
    assert "stopping after this iteration" in complaint
    assert "stopped (SIGINT)" in shown
    assert "go on with:" in shown
    assert twice.wait(timeout=30) == 130
    assert stored_steps(tmp_path / "twice") == [0]
    assert stored_steps(tmp_path / "once")[-1] == len(records(tmp_path / "once"))
