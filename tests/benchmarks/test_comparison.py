import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import comparison
from benchmarks.comparison import Config, common_checkpoints, drawing, refuse_unlike, table, verdicts
from rlcore.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    *("--ppo.num-envs", "4", "--ppo.num-steps", "2", "--ppo.num-minibatches", "1", "--ppo.num-epochs", "1"),
    *("--ppo.policy-layers", "8", "--ppo.value-layers", "8", "--num-threads", "1", "--training.iterations", "2"),
    *("--training.checkpoint-every", "1", "--training.no-video"),
]


def runs(tmp_path, kept):
    """Directories that look like runs with checkpoints of these iterations."""
    for name, iterations in kept.items():
        for iteration in iterations:
            (tmp_path / name / "checkpoints" / str(iteration)).mkdir(parents=True)
    return tuple(tmp_path / name for name in kept)


def row(run, checkpoint, value, survived):
    interval = {"mean": value, "low": value - 0.5, "high": value + 0.5}
    share = {"count": 0, "share": survived, "low": 0.0, "high": 1.0}
    figures = {
        "run": run,
        "task": "x",
        "seconds": 20.0,
        "checkpoint": checkpoint,
        "env_steps": 100_000 * checkpoint,
        "survived": share,
    }
    return {**figures, "return": interval, "metrics": {"velocity_error": {**interval, "mean": 0.25}}}


def planted():
    return {
        "labels": ["with", "without"],
        "machine": {"cpu": "a", "cores": 2, "python": "3", "torch": "2", "mujoco": "4"},
        "checkpoints": [5, 10],
        "episodes": 64,
        "metrics": ["velocity_error"],
        "first": [[row("a0", 5, 2.0, 0.5), row("a0", 10, 4.0, 1.0)], [row("a1", 5, 1.0, 0.5), row("a1", 10, 6.0, 0.9)]],
        "second": [
            [row("b0", 5, 1.0, 0.1), row("b0", 10, 3.0, 0.2)],
            [row("b1", 5, 2.0, 0.1), row("b1", 10, 5.0, 0.3)],
        ],
    }


def test_pairs_of_runs_decide_at_each_checkpoint():
    assert verdicts(planted()) == [
        "iteration 5 (0.50M steps): with is better in 1 of 2 (mean return 1.5, without 1.5)",
        "iteration 10 (1.00M steps): with is better in 2 of 2 (mean return 5.0, without 4.0)",
    ]
    lines = table(planted()).splitlines()
    assert lines[0].startswith("64 fresh episodes each")
    assert lines[4].split() == ["with", "a0", "10", "100.0%", "4.000", "+-", "0.500", "0.250", "+-", "4.250"]


def test_a_picture_has_a_panel_for_each_figure():
    panels = drawing(planted()).axes
    assert [panel.get_title() for panel in panels] == ["return", "survived", "velocity error"]
    a0, _, mean, *without = panels[0].lines
    assert a0.get_xydata().tolist() == [[0.5, 2.0], [1.0, 4.0]]
    assert mean.get_xydata().tolist() == [[0.5, 1.5], [1.0, 5.0]]
    assert (mean.get_label(), len(without)) == ("with", 3)


def test_runs_that_are_not_alike_are_told():
    figures = planted()
    figures["second"][1][0]["env_steps"] = 7
    with pytest.raises(InputError, match="but env_steps differs among 2: a0 500000, a1 500000, b0 500000, b1 7"):
        refuse_unlike([figures["first"], figures["second"]])


def test_checkpoints_are_those_that_all_runs_have(tmp_path):
    a, b = runs(tmp_path, {"a": (0, 5, 10), "b": (5, 10, 12)})
    assert common_checkpoints(Config((a,), (b,))) == [5, 10]
    assert common_checkpoints(Config((a,), (b,), checkpoints=(10,))) == [10]


@pytest.mark.parametrize(
    ("kept", "asked", "match"),
    [
        ({"a": (1,), "b": (2,)}, (), "no iteration has a checkpoint in all runs"),
        ({"a": (1, 2), "b": (2,)}, (1,), r"b has no checkpoint of iteration 1 \(--checkpoints\)"),
    ],
)
def test_checkpoints_that_are_not_there_are_told(tmp_path, kept, asked, match):
    a, b = runs(tmp_path, kept)
    with pytest.raises(InputError, match=match):
        common_checkpoints(Config((a,), (b,), checkpoints=asked))


def test_what_is_no_run_is_told(tmp_path):
    with pytest.raises(InputError, match="nowhere is not a run"):
        common_checkpoints(Config((tmp_path / "nowhere",), (tmp_path / "nowhere",)))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"second": ()}, "second must be as many runs as first"),
        ({"episodes": 0}, "episodes must be at least 1, got 0"),
        ({"seconds": 0.0}, "seconds must be more than 0"),
        ({"name": "a/b"}, "name must be a file's name"),
    ],
)
def test_input_that_cannot_work_is_told(arguments, match):
    with pytest.raises(InputError, match=match):
        Config(**{"first": (Path("a"),), "second": (Path("b"),), **arguments})


def test_a_run_compared_with_itself_is_no_better(tmp_path, capsys):
    run = tmp_path / "run"
    line = [sys.executable, "-m", "experiments.ppo_cartpole", *TINY, "--training.run-dir", str(run)]
    subprocess.run(line, cwd=ROOT, check=True, capture_output=True, timeout=300)
    comparison.main(Config((run,), (run,), checkpoints=(2,), episodes=3, name="same", output_dir=tmp_path / "out"))
    written = json.loads((tmp_path / "out" / "same.json").read_text())
    (ours,), (theirs,) = written["first"], written["second"]
    assert ours == theirs
    assert (ours[0]["env_steps"], ours[0]["checkpoint"]) == (16, 2)
    assert "is better in 0 of 1" in capsys.readouterr().out
    assert (tmp_path / "out" / "same.png").exists()
