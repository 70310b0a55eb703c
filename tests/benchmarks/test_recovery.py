import json
from typing import Any

import numpy as np
import pytest

from benchmarks import recovery
from benchmarks.recovery import Config, Trial, differences, line, newest_checkpoint
from experiments.cli import command

LEAVES = {"a": np.array([1.0, np.nan]), "b": np.array([0, 1])}
RECORDS: list[dict[str, Any]] = [{"iteration": 1, "loss": 0.5}, {"iteration": 2, "loss": None}]


def test_the_same_bits_are_no_difference():
    assert differences((LEAVES, RECORDS), ({k: v.copy() for k, v in LEAVES.items()}, [dict(r) for r in RECORDS])) == []


@pytest.mark.parametrize(
    ("leaves", "records", "expected"),
    [
        ({**LEAVES, "a": np.array([1.0 + 2**-52, np.nan])}, RECORDS, ["a"]),
        ({**LEAVES, "a": np.array([1.0, np.nan], np.float32)}, RECORDS, ["a"]),
        ({"a": LEAVES["a"]}, RECORDS, ["b"]),
        ({**LEAVES, "b": np.array([[0, 1]])}, RECORDS, ["b"]),
        (LEAVES, RECORDS[:1], ["metrics of 1 iterations instead of 2"]),
        (LEAVES, [{"iteration": 1, "loss": 0.5000000000000001}, RECORDS[1]], ["loss at iteration 1"]),
        (LEAVES, [RECORDS[0], {"iteration": 2}], ["loss at iteration 2"]),
    ],
)
def test_each_difference_is_named(leaves, records, expected):
    assert differences((LEAVES, RECORDS), (leaves, records)) == expected


def test_minus_zero_is_not_zero():
    ours, theirs = {"x": np.array([0.0])}, {"x": np.array([-0.0])}
    assert differences((ours, [{"m": 0.0}]), (theirs, [{"m": -0.0}])) == ["x", "m at iteration None"]


def test_a_checkpoint_that_is_being_written_is_none(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    (tmp_path / "checkpoints" / "8.orbax-checkpoint-tmp").mkdir(parents=True)
    (tmp_path / "config.json").write_text("{}")
    assert newest_checkpoint(tmp_path) is None
    for step in (4, 12, 8):
        (tmp_path / "checkpoints" / str(step)).mkdir()
    assert newest_checkpoint(tmp_path) == 12


def test_a_trial_is_one_line():
    told = line(3, Trial(kills=[1.234, 5.0, 6.0], checkpoints=[None, 0, 8]))
    assert told == "trial 3: killed at 1.23 s (-), 5.00 s (0), 6.00 s (8); identical"
    assert line(4, Trial()) == "trial 4: done before it was killed; identical"
    assert "DIFFERENT in 1 places: a" in line(1, Trial(differences=["a"]))


def call(*arguments):
    try:
        command(Config, recovery.main, arguments)
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trials", "0"], "error: trials must be at least 1, got 0 (--trials)"),
        (["--num-envs", "-1"], "error: num_envs must be at least 1, got -1 (--num-envs)"),
        (["--output-dir", "/proc/none"], "error: output_dir /proc/none cannot be written"),
    ],
)
def test_input_that_cannot_work_is_one_line(capsys, arguments, message):
    assert call(*arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith(message)
    assert err.count("\n") == 1
    assert out == ""


@pytest.mark.slow
def test_a_killed_run_ends_as_if_nothing_had_been(tmp_path, capsys):
    arguments = ["--trials", "1", "--iterations", "4", "--checkpoint-every", "1", "--most-kills", "1"]
    assert call(*arguments, "--output-dir", str(tmp_path)) == 0
    out, _ = capsys.readouterr()
    assert out.strip().endswith("1 of 1 identical")
    figures = json.loads((tmp_path / "recovery.json").read_text())
    assert figures["identical"] == 1
    assert figures["leaves"] > 20
    assert figures["trials"][0]["differences"] == []
