"""The experiments as a user meets them: tiny runs through the command line, and every mistake told in one line."""

import inspect
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import imageio.v3 as imageio
import numpy as np
import pytest
import torch

from experiments import evaluate, play, ppo_cartpole, ppo_humanoid_balance, replay
from experiments.cli import command, load_run, restore_policy, run
from experiments.recording import film, recorded_faults
from rlcore import random, rotations
from rlcore.commands import fixed_command
from rlcore.errors import InputError
from rlcore.physics.engine import drain_faults
from rlcore.rollout import evaluate as run_episodes
from rlcore.run_directory import write_faults
from tasks.humanoid.velocity import make_humanoid_velocity

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    *("--ppo.num-envs", "4", "--ppo.num-steps", "8", "--ppo.num-epochs", "1", "--num-threads", "1", "--seed", "5"),
    *("--ppo.policy-layers", "8", "--ppo.value-layers", "8", "--episode-seconds", "0.4"),
    *("--training.iterations", "2", "--training.checkpoint-every", "1", "--training.keep-last", "9"),
]


def start(module, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", f"experiments.{module}", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


class Runs(NamedTuple):
    cartpole: Path
    humanoid: Path
    printed: str


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One run of each experiment, never written to by a test."""
    root = tmp_path_factory.mktemp("runs")
    cartpole, humanoid = root / "cartpole", root / "humanoid"
    first = start("ppo_cartpole", *TINY, "--training.run-dir", cartpole)
    second = start("ppo_humanoid_balance", *TINY, "--training.run-dir", humanoid, "--training.no-video")
    code, printed, err = end(first)
    assert (code, err) == (0, "")
    assert end(second)[0] == 0
    return Runs(cartpole, humanoid, printed)


@pytest.fixture
def run_dir(runs, tmp_path):
    """A copy of the cartpole's run, to be written to."""
    return Path(shutil.copytree(runs.cartpole, tmp_path / "run"))


@pytest.fixture
def call(capsys):
    """A program's command line in this process: what `python -m` does, without its seconds of imports."""

    def call(module, *arguments):
        code: object = 0
        try:
            command(module.Config, module.main, [str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


def test_training_leaves_what_it_says(runs):
    lines = [json.loads(line) for line in (runs.cartpole / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "iteration" in line][-1] == 2
    for line in lines:
        shares = [line[f"time/{what}_share"] for what in ("physics", "policy_and_env", "learning")]
        assert min(shares) > 0 and sum(shares) == pytest.approx(1.0)
    watched = json.loads((runs.humanoid / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"torque/left_knee", "torque_group/knee", "contact/both", "env/power", "env/cost_of_transport"} <= set(
        watched
    )
    for directory in (runs.cartpole, runs.humanoid):
        names = {path.name for path in directory.iterdir()}
        assert {"config.json", "metrics.jsonl", "checkpoints", "tensorboard", "learning_curves.png"} <= names
        assert {path.name for path in (directory / "checkpoints").iterdir() if path.name.isdecimal()} == {"0", "1", "2"}
        assert next((directory / "tensorboard").iterdir()).stat().st_size > 0
        assert not list(directory.rglob("*.tmp")) + list(directory.rglob("*partial*"))
    assert (runs.cartpole / "video.mp4").stat().st_size > 0
    assert not (runs.humanoid / "video.mp4").exists()
    python = sys.executable.removeprefix(f"{ROOT}/")
    for name in ("play", "evaluate"):
        assert f"  {python} -m experiments.{name} {runs.cartpole}\n" in runs.printed
    assert "experiments.report" not in runs.printed


@pytest.mark.parametrize(
    ("name", "module", "task"),
    [("cartpole", ppo_cartpole, "cartpole"), ("humanoid", ppo_humanoid_balance, "humanoid_balance")],
)
def test_a_run_is_built_again_as_it_was(runs, name, module, task):
    loaded = load_run(getattr(runs, name))
    assert loaded.module.__name__ == module.__name__
    assert (loaded.config.seed, loaded.config.ppo.num_envs, loaded.config.training.iterations) == (5, 4, 2)
    assert loaded.experiment.env.spec.name == task
    assert "auto_reset" not in loaded.experiment.evaluation_env.spec.wrappers
    policy = restore_policy(loaded, "last")
    assert policy.iteration == int(policy.state.iteration) == 2
    assert int(policy.state.env_steps) == 2 * 4 * 8
    env = loaded.experiment.evaluation_env
    action = policy.act({"policy": torch.zeros(3, env.spec.observation_size("policy"))})
    assert action.shape == (3, env.spec.action_size)
    assert torch.isfinite(action).all()


def test_a_run_goes_on(run_dir, capsys):
    arguments = ["--training.resume", str(run_dir), "--training.iterations", "3", "--training.no-video"]
    run(ppo_cartpole.Config, ppo_cartpole.build, [*arguments, "--training.no-tensorboard"])
    assert "going on from iteration 2" in capsys.readouterr().out
    assert restore_policy(run_dir, "last").iteration == 3


# --- Measuring ---


def test_evaluation_prints_a_table_and_writes_its_figures(runs, tmp_path):
    output = tmp_path / "figures.json"
    arguments = (runs.cartpole, "--episodes", 9, "--checkpoint", 1, "--seconds", 0.6, "--output", output)
    code, out, err = end(start("evaluate", *arguments))
    assert (code, err) == (0, "")
    figures = json.loads(output.read_text())
    assert (figures["episodes"], figures["checkpoint"], figures["task"]) == (9, 1, "cartpole")
    loaded = load_run(runs.cartpole, {"episode_seconds": 0.6})
    policy = restore_policy(loaded, 1, fresh=("env_state", "obs"))
    episodes = run_episodes(loaded.experiment.evaluation_env, policy.act, random.key(1000), 9)
    survived = int((~episodes.terminated).sum())
    assert figures["survived"]["count"] == survived
    assert figures["survived"]["share"] == survived / 9
    assert (figures["survived"]["low"], figures["survived"]["high"]) == evaluate.wilson(survived, 9)
    assert figures["return"]["mean"] == pytest.approx(float(episodes.returns.mean()), abs=1e-12)
    assert figures["length_steps"]["mean"] == float(episodes.lengths.double().mean())
    assert figures["longest_steps"] == int(episodes.lengths.max()) == 30
    assert figures["full_length_episodes"] == int((episodes.lengths == 30).sum())
    assert figures["seconds"] == pytest.approx(0.6)
    assert figures["velocity_command"] is figures["randomized"] is None
    assert figures["faults"] == 0
    assert f"({survived} of 9)" in out
    assert f"{100 * survived / 9:.1f} %" in out
    assert f"written to {output}" in out


def test_evaluation_of_the_humanoid_tells_its_metrics(runs, call, tmp_path):
    code, out, _ = call(evaluate, runs.humanoid, "--episodes", 3, "--output", tmp_path / "figures.json")
    assert code == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["task"] == "humanoid_balance"
    assert 0 < figures["longest_steps"] <= 0.4 / load_run(runs.humanoid).experiment.env.spec.control_dt + 1e-9
    assert {"torque/left_knee", "cost_of_transport", "contact/both"} <= set(figures["metrics"])
    assert all(name in out for name in figures["metrics"])
    minutes = 3 * figures["length_seconds"]["mean"] / 60
    assert figures["falls_per_minute"] == pytest.approx((3 - figures["survived"]["count"]) / minutes)


def test_the_figures_have_the_command_line_that_repeats_them(run_dir, call):
    given = ("--episodes", 3, "--seed", 8, "--seconds", 0.3, "--randomized")
    assert call(evaluate, run_dir, *given)[0] == 0
    text = (run_dir / "evaluation.json").read_text()
    (run_dir / "evaluation.json").unlink()
    python, m, module, *arguments = shlex.split(json.loads(text)["command"])
    assert [python, m, module] == ["python", "-m", "experiments.evaluate"]
    assert call(evaluate, *arguments)[0] == 0
    assert (run_dir / "evaluation.json").read_text() == text


def test_randomized_physics_stand_beside_the_nominal(runs, call, tmp_path):
    output = tmp_path / "figures.json"
    code, out, _ = call(evaluate, runs.humanoid, "--episodes", 5, "--randomized", "--output", output)
    assert code == 0
    figures = json.loads(output.read_text())
    other = figures["randomized"]
    alone = tmp_path / "alone.json"
    assert call(evaluate, runs.humanoid, "--episodes", 5, "--output", alone)[0] == 0
    nominal = json.loads(alone.read_text())
    assert all(figures[name] == nominal[name] for name in ("survived", "return", "length_steps", "metrics"))
    # The same starts under other physics: close, and not the same.
    assert other["return"]["mean"] != nominal["return"]["mean"]
    counts = [(x["survived"]["count"], 5) for x in (nominal, other)]
    assert tuple(other["survival_gap"].values()) == evaluate.difference_interval(*counts)
    assert other["physics"] == (
        "masses x 0.8 to 1.2, friction x 0.4 to 1.2, stiffness of servos x 0.8 to 1.2, actions 20 ms late"
    )
    title, survived = (line for line in out.splitlines() if "randomized  " in line or line.startswith("survived"))
    assert title.split() == ["nominal", "95", "%", "confidence", "randomized", "95", "%", "confidence"]
    assert survived.count("(") == 2 and f"({counts[1][0]} of 5)" in survived
    assert other["physics"] in out and "generalization gap: survival is" in out


def test_one_episode_has_no_confidence_in_its_mean(run_dir, call):
    assert call(evaluate, run_dir, "--episodes", 1)[0] == 0
    text = (run_dir / "evaluation.json").read_text()
    assert "Infinity" not in text and "NaN" not in text
    assert json.loads(text)["return"]["low"] is None


def test_the_same_seed_gives_the_same_figures(run_dir, call):
    texts = []
    for seed in (3, 3, 4):
        assert call(evaluate, run_dir, "--episodes", 4, "--seed", seed)[0] == 0
        texts.append((run_dir / "evaluation.json").read_text())
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_is_the_published_one(successes, trials, low, high):
    assert evaluate.wilson(successes, trials) == pytest.approx((low, high), abs=6e-5)


@pytest.mark.parametrize("trials", [1, 2, 7, 100, 4096])
def test_wilson_interval_is_scipys(trials):
    stats = pytest.importorskip("scipy.stats")
    for successes in {0, 1, trials // 3, trials - 1, trials}:
        low, high = evaluate.wilson(successes, trials)
        expected = stats.binomtest(successes, trials).proportion_ci(0.95, "wilson")
        assert (low, high) == pytest.approx((expected.low, expected.high), abs=2e-5)
        assert 0 <= low <= successes / trials <= high <= 1 and low < high


@pytest.mark.parametrize(
    ("first", "second", "low", "high"),
    # Newcombe 1998, "Interval estimation for the difference between independent proportions", table II, method 10.
    [((56, 70), (48, 80), 0.0524, 0.3339), ((9, 10), (3, 10), 0.1705, 0.8090), ((10, 10), (0, 20), 0.6791, 1.0)],
)
def test_difference_interval_is_the_published_one(first, second, low, high):
    p, q = first[0] / first[1], second[0] / second[1]
    assert evaluate.difference_interval(first, second) == pytest.approx((p - q, low, high), abs=6e-5)
    assert evaluate.difference_interval(second, first) == pytest.approx((q - p, -high, -low), abs=6e-5)


def test_mean_interval():
    # Mean 3; deviation sqrt((4 + 1 + 1 + 4) / 3) = 1.8257 over sqrt(4), times 1.96.
    mean, low, high = evaluate.mean_interval(torch.tensor([1, 2, 4, 5]))
    assert (mean, low, high) == pytest.approx((3.0, 3 - 1.7892, 3 + 1.7892), abs=1e-4)
    assert evaluate.mean_interval(torch.tensor([2.0])) == (2.0, -math.inf, math.inf)
    # Episodes without a value count for nothing.
    assert evaluate.mean_interval(torch.tensor([1.0, math.nan, 2.0, 4.0, 5.0])) == pytest.approx(
        (3.0, 3 - 1.7892, 3 + 1.7892), abs=1e-4
    )
    assert all(map(math.isnan, evaluate.mean_interval(torch.tensor([math.nan]))))


# --- Watching ---


def test_a_film_has_a_picture_each_25th_of_a_second(runs, tmp_path):
    output = tmp_path / "film.mp4"
    code, out, err = end(start("play", runs.cartpole, "--robots", 3, "--output", output))
    assert (code, err) == (0, "")
    assert f"{output}: " in out and "of 3 robots lasted the whole episode" in out
    pictures = imageio.imread(output)
    # 0.4 s of 0.02 s steps are 21 states; every second one is shown. Three robots, two in a row.
    width, height = inspect.signature(film).parameters["size"].default
    assert pictures.shape == (11, 2 * height + 2, 2 * width + 2, 3)
    assert imageio.immeta(output)["fps"] == 25
    # The robots differ, and the fourth cell is dark.
    assert not np.array_equal(pictures[:, :height, :width], pictures[:, :height, width + 2 :])
    assert pictures[:, height + 10 :, width + 10 :].max() < 60


def test_a_film_holds_still_after_a_fall(runs, tmp_path):
    env = load_run(runs.cartpole, {"episode_seconds": 2.0}).experiment.evaluation_env
    push = lambda obs: torch.ones(len(obs["policy"]), 1)  # noqa: E731
    path, told = tmp_path / "film.gif", []
    episodes = film(
        env, push, path, key=random.key(0), num_robots=1, size=(96, 64), progress=lambda *news: told.append(news)
    )
    length = int(episodes.lengths)
    assert bool(episodes.terminated) and 0 < length < 99
    pictures = imageio.imread(path)
    assert len(episodes.qpos) == length + 1
    shown = len(range(0, length + 1, 2))
    assert told[-1] == ("filming", shown, shown)
    assert len(pictures) == shown


def test_a_film_tells_the_command_and_the_true_velocity(tmp_path, monkeypatch):
    texts = []

    def blank(model, qpos, **settings):
        texts.append(settings.get("caption", []))
        return np.zeros((len(qpos), 8, 8, 3), np.uint8)

    monkeypatch.setattr("rlcore.video.render_frames", blank)
    env = make_humanoid_velocity(1, seconds=2.0, stages=())
    env = env._replace(params=fixed_command(env.params, 0.8, -0.05, 0.3))
    still = lambda obs: torch.zeros(len(obs["policy"]), 21)  # noqa: E731
    episodes = film(env, still, tmp_path / "film.mp4", key=random.key(3), num_robots=2)
    first, both = texts  # the first picture only tries the renderer
    assert not first and len(both) == 2 * len(range(0, len(episodes.qpos), 2))
    captions = both[: len(both) // 2], both[len(both) // 2 :]
    for robot, caption in enumerate(captions):
        assert {lines[0] for lines in caption} == {"told +0.80 m/s   -0.05 left  +0.30 rad/s"}
        length = int(episodes.lengths[robot])
        for place, lines in enumerate(caption):
            found = re.fullmatch(r"does ([ +-]+[0-9.]+) m/s +([ +-]+[0-9.]+) left .* rad/s  [(]0.5 s mean[)]", lines[1])
            assert found is not None, lines[1]
            step = min(2 * place, length)
            if step < 26:
                continue
            # What it went in each step, seen in the heading that it had by then, over half a second.
            qpos = episodes.qpos[step - 25 : step + 1, robot]
            (x, y), (c, s) = ((qpos[1:, :2] - qpos[:-1, :2]) / 0.02).T, rotations.heading(qpos[1:, 3:7]).T
            expected = [float((c * x + s * y).mean()), float((c * y - s * x).mean())]
            shown = [float(number.replace(" ", "")) for number in found.groups()]
            assert shown == pytest.approx(expected, abs=0.05), step
    assert env.spec.control_dt == 0.02


def test_a_camera_that_is_not_there_is_told_before_an_episode_is_run(runs, call, monkeypatch, tmp_path):
    monkeypatch.setattr("experiments.recording.evaluate", lambda *_, **__: pytest.fail("an episode was run"))
    output = tmp_path / "film.mp4"
    code, _, err = call(play, runs.cartpole, "--camera", "moon", "--output", output)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("error: camera 'moon' is not in the model: choose from ['track']")
    assert not output.exists()


# --- Faults ---


def faults_of(run_dir, *, action=None, speed=0.0, mass=None):
    """Step the run's robot once so that it goes wrong, and write down what happened as training does."""
    engine = load_run(run_dir).experiment.env.engine
    m = engine.model
    qpos, qvel = torch.linspace(0.1, 0.2, m.nq).double(), torch.full((m.nv,), speed).double()
    state = engine.initial(qpos, qvel)
    ctrl = torch.full((m.nu,), 0.1 if action is None else action).double()
    params = {} if mass is None else {"body_mass": engine.nominal("body_mass")["body_mass"] * mass}
    drain_faults()
    after = engine.step(params, state, ctrl, substeps=2, key=random.key(7))
    assert int(after.fault) != 0
    return write_faults(run_dir, 3, recorded_faults())


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ({"action": math.nan}, "action not finite"),
        ({"speed": 1e12}, "unstable"),
        ({"speed": 1e12, "mass": 2.0}, "unstable"),
    ],
)
def test_a_fault_happens_again(run_dir, call, what, name):
    (file,) = faults_of(run_dir, **what)
    assert file.name == f"000003-{name.replace(' ', '-')}-0.npz"
    picture = run_dir / "before.png"
    code, out, err = call(replay, file, "--output", picture)
    assert (code, err) == (0, "")
    assert out.startswith(f"recorded: {name}: ")
    recorded, replayed = (line.split(": ", 1)[1] for line in out.splitlines()[:2])
    assert recorded == replayed
    assert "key [0, 7]" in out
    assert out.endswith("the same fault happens again\n")
    assert imageio.imread(picture).std() > 1


def test_a_fault_that_was_cured_is_told(run_dir, call):
    (file,) = faults_of(run_dir, action=math.nan)
    with np.load(file) as archive:
        arrays = dict(archive)
    np.savez(file, **(arrays | {"ctrl": np.zeros_like(arrays["ctrl"])}))
    code, out, _ = call(replay, file)
    assert code == 0
    assert "replayed: none\n" in out
    assert out.endswith("the fault does not happen again\n")


def test_replay_from_a_shell(run_dir):
    (file,) = faults_of(run_dir, action=math.inf)
    code, out, err = end(start("replay", file))
    assert (code, err) == (0, "")
    assert "the same fault happens again" in out


# --- Mistakes ---


def one_line(result, *words):
    code, out, err = result
    assert code == 2
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert "Traceback" not in err
    for word in words:
        assert str(word) in err


@pytest.mark.parametrize("module", [evaluate, play])
def test_runs_and_checkpoints_that_cannot_be_used(module, runs, run_dir, call, tmp_path):
    before = sorted(run_dir.rglob("*"))
    one_line(call(module, tmp_path / "gone"), f"{tmp_path / 'gone'} is not a run")
    one_line(call(module, tmp_path), f"{tmp_path} is not a run but holds 1 run, newest last: run; ", f"{run_dir}")
    one_line(call(module, run_dir / "config.json"), f"{run_dir / 'config.json'} is not a run")
    one_line(call(module, run_dir, "--checkpoint", "newest"), "best, last or an iteration, got 'newest'")
    one_line(call(module, run_dir, "--checkpoint", 7), "no checkpoint of iteration 7", "0, 1, 2")
    assert sorted(run_dir.rglob("*")) == before
    largest = max((run_dir / "checkpoints" / "1").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    content = largest.read_bytes()
    largest.write_bytes(content[: len(content) // 2] + b"\x00" * (len(content) - len(content) // 2))
    one_line(call(module, run_dir, "--checkpoint", 1), "checkpoint", "1", "damaged")
    shutil.rmtree(run_dir / "checkpoints")
    one_line(call(module, run_dir), "checkpoints")
    record = json.loads((runs.cartpole / "config.json").read_text())
    (run_dir / "config.json").write_text(json.dumps(record | {"module": "experiments.ppo_unicycle"}))
    one_line(call(module, run_dir), "experiments.ppo_unicycle, which cannot be imported")


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (evaluate, ["--episodes", "0"], "episodes must be at least 1, got 0 (--episodes)"),
        (evaluate, ["--seconds", "0"], "seconds must be more than 0, got 0.0 (--seconds)"),
        (evaluate, ["--seconds", "nan"], "seconds must be more than 0, got nan (--seconds)"),
        (evaluate, ["--seconds", "inf"], "time limit must be a number of seconds"),
        (evaluate, ["--seed", "-1"], "seed must be 0 or more, got -1 (--seed)"),
        (evaluate, ["--seed", str(2**64)], "seed must be an integer of at least 0 and below 2**64"),
        (evaluate, ["--vx", "0.5"], "cartpole follows no velocity commands (--vx, --vy, --yaw-rate)"),
        (evaluate, ["--yaw-rate", "inf"], "yaw_rate must be a finite number, got inf (--yaw-rate)"),
        (evaluate, ["--output", "/proc/figures.json"], "/proc/figures.json cannot be written"),
        (evaluate, ["--output", "/gone/figures.json"], "/gone/figures.json cannot be written"),
        (evaluate, ["--output", "/tmp"], "/tmp is a directory, not a file to write (--output)"),
        (play, ["--robots", "0"], "robots must be 1 to 64, got 0 (--robots)"),
        (play, ["--seconds", "-1"], "seconds must be more than 0, got -1.0 (--seconds)"),
        (play, ["--seed", "-1"], "seed must be 0 or more, got -1 (--seed)"),
        (play, ["--vy", "-0.1"], "cartpole follows no velocity commands (--vx, --vy, --yaw-rate)"),
        (play, ["--vx", "nan"], "vx must be a finite number, got nan (--vx)"),
        (play, ["--output", "film.avi"], "output must end in .mp4 or .gif, got film.avi (--output)"),
        (play, ["--output", "/gone/film.mp4"], "/gone/film.mp4 cannot be written"),
    ],
)
def test_arguments_that_cannot_work(module, arguments, message, runs, call):
    one_line(call(module, runs.cartpole, *arguments), message)


@pytest.mark.parametrize("module", [evaluate, play, replay])
def test_unknown_flags_are_named(module, call, tmp_path):
    code, out, err = call(module, tmp_path, "--epsiodes", "3")
    assert (code, out) == (2, "")
    assert "Unrecognized options: --epsiodes" in err


def test_fault_files_that_cannot_be_used(runs, run_dir, call, tmp_path):
    (file,) = faults_of(run_dir, action=math.nan)
    one_line(call(replay, run_dir / "faults" / "gone.npz"), "gone.npz does not exist")
    one_line(call(replay, file, "--output", "before.jpg"), "output must end in .png, got before.jpg (--output)")
    one_line(call(replay, file, "--output", "/gone/before.png"), "/gone/before.png cannot be written")
    content = file.read_bytes()
    with np.load(file) as archive:
        arrays = dict(archive)

    def changed(**changes):
        np.savez(file, **{k: v for k, v in (arrays | changes).items() if v is not None})
        return call(replay, file)

    for damaged in (content[: len(content) // 2], b"", b"text", content.replace(b"qpos", b"qpox")):
        file.write_bytes(damaged)
        one_line(call(replay, file), file)
    with file.open("wb") as stream:
        np.save(stream, np.zeros(3))
    one_line(call(replay, file), "cannot be read")
    one_line(changed(qvel=None, code=None), "no fault file: it lacks qvel, code")
    one_line(changed(code=np.asarray(9)), "has the code 9")
    one_line(changed(code=np.zeros(2)), "substeps or code is no integer")
    one_line(changed(substeps=np.asarray(0)), "substeps must be at least 1, got 0")
    one_line(changed(qpos=np.asarray(["a", "b"])), "not of float64 numbers")
    one_line(changed(key=np.zeros(3, np.int64)), "is not of the model of", "key has shape (3,) there and (2,)")
    one_line(changed(**{"params.body_weight": np.zeros(3)}), "body_weight")
    one_line(changed(**{"params.body_mass": np.zeros(4)}), "body_mass")
    (other,) = faults_of(Path(shutil.copytree(runs.humanoid, tmp_path / "humanoid")), action=math.nan)
    moved = shutil.copy(other, run_dir / "faults" / "000009-other.npz")
    one_line(call(replay, moved), f"{moved} is not of the model of {run_dir}: qpos has shape")
    alone = shutil.copy(other, tmp_path / "alone.npz")
    one_line(call(replay, alone), "is not a run")


def test_episodes_cannot_be_given_another_length_where_the_experiment_has_none(run_dir, call):
    with pytest.raises(InputError, match="no field episode_minutes"):
        load_run(run_dir, {"episode_minutes": 1.0})


# --- Help ---

HELP = """
import contextlib, io, runpy, sys
sys.argv = ["experiment", "--help"]
text = io.StringIO()
try:
    with contextlib.redirect_stdout(text):
        runpy.run_module("experiments.MODULE", run_name="__main__", alter_sys=True)
except SystemExit as stop:
    assert not stop.code
heavy = {"jax", "orbax", "matplotlib", "tensorboardX", "imageio", "imageio_ffmpeg", "PIL"}
print(sorted(heavy & set(sys.modules)))
print(" ".join(text.getvalue().split()))
"""


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("ppo_cartpole", ("Learn to balance a pole on a cart", "--ppo.num-envs", "--training.iterations")),
        ("ppo_humanoid_balance", ("Learn to stay on both feet", "--push-speed", "--training.no-video")),
        ("ppo_ant", ("Learn to run to a far target on four legs", "--episode-steps", "--ppo.kl-target")),
        ("ppo_humanoid_run", ("Learn to run to a far target on two legs", "--episode-steps")),
        ("ppo_gym", ("one of Gymnasium's robots", "--task", "{gym_walker2d,gym_ant,gym_humanoid}")),
        ("sac_gym", ("from 300,000 steps", "--task", "--sac.batch-size")),
        ("sac_ant", ("off-policy", "--episode-steps", "--sac.n-steps")),
        ("sac_humanoid_balance", ("while being pushed", "--push-speed", "--sac.atoms")),
        ("evaluate", ("Run a trained policy", "--episodes", "--checkpoint", "--yaw-rate", "--randomized")),
        ("play", ("Let a trained policy act and film it", "--robots", "--window", "--vx")),
        ("replay", ("Step once from the state", "RUN/faults/*.npz", "--output")),
    ],
)
def test_help_tells_what_it_does_and_loads_little(run_python, module, words):
    heavy, text = run_python(HELP.replace("MODULE", module)).splitlines()
    assert heavy == "[]"
    for word in words:
        assert word in text
