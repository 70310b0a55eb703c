"""Several trainings side by side: the file of their settings, and two real ones."""

import pytest

from experiments.side_by_side import Config, Setting, main, read_settings
from rlcore.errors import InputError


def write(path, text):
    file = path / "settings.txt"
    file.write_text(text)
    return file


def test_settings_are_names_with_arguments(tmp_path):
    file = write(tmp_path, "# two\n*: --seed 3\n\none:\ntwo: --reward-weights gait '3.0'\n")
    assert read_settings(file) == [
        Setting("one", ["--seed", "3"]),
        Setting("two", ["--seed", "3", "--reward-weights", "gait", "3.0"]),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no setting"),
        ("one --seed 3", "line 1 .* must be a name"),
        ("a/b: --seed 3", "line 1 .* must be a name"),
        ("one:\none: --seed 2", "more than once: one"),
        ("one: '", "line 1"),
    ],
)
def test_what_is_no_setting_is_refused(tmp_path, text, words):
    with pytest.raises(InputError, match=words):
        read_settings(write(tmp_path, text))


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_settings(tmp_path / "nothing")


def test_an_experiment_that_is_none_is_told(tmp_path):
    with pytest.raises(InputError, match=r"experiments\.nothing is no experiment"):
        main(Config("experiments.nothing", write(tmp_path, "one:\n"), tmp_path / "runs"))


@pytest.mark.slow
def test_trainings_run_side_by_side_and_one_that_fails_is_named(tmp_path, capsys):
    common = "*: --training.iterations 2 --ppo.num-envs 4 --ppo.num-steps 4 --training.no-video"
    file = write(tmp_path, f"{common}\ngood:\nbad: --ppo.num-steps 0\n")
    with pytest.raises(SystemExit) as stop:
        main(Config("experiments.ppo_cartpole", file, tmp_path / "runs"))
    told, errors = capsys.readouterr()
    assert stop.value.code == 1 and "trainings failed: bad;" in errors
    assert "iteration 2" in told and "exit code 2" in told
    assert (tmp_path / "runs" / "good" / "metrics.jsonl").exists()
    assert "num_steps" in (tmp_path / "runs" / "bad.log").read_text()
