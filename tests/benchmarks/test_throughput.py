import dataclasses
import json

import pytest
import torch

from algos.ppo import make_ppo
from benchmarks import throughput
from benchmarks.throughput import LEVELS, BareEngine, Bench, Block, Config, falling_due, shortfalls, subject, summary
from experiments.cli import command
from rlcore import random, tree
from rlcore.errors import InputError


def planted(engine, env, policy, ppo):
    """Blocks of 100 control steps that take so many seconds."""
    seconds = {"engine": engine, "env": env, "policy": policy, "ppo": ppo}
    return {level: [Block(100, s) for s in seconds[level]] for level in LEVELS}


def test_a_share_is_the_median_of_neighbouring_blocks():
    # The machine halves its speed in the last block: the shares do not notice. By hand, per block:
    # env 0.8, 0.5, 0.8; policy 0.5 each; ppo 0.25, 0.2, 0.25.
    blocks = planted([1.0, 1.0, 2.0], [1.25, 2.0, 2.5], [2.0, 2.0, 4.0], [4.0, 5.0, 8.0])
    row = summary(blocks, 16, substeps=10)
    assert row["num_envs"] == 16
    shares = {level: row["levels"][level]["share"] for level in LEVELS[1:]}
    assert shares["env"] == pytest.approx({"median": 0.8, "min": 0.5, "max": 0.8})
    assert shares["policy"] == pytest.approx({"median": 0.5, "min": 0.5, "max": 0.5})
    assert shares["ppo"] == pytest.approx({"median": 0.25, "min": 0.2, "max": 0.25})
    engine = row["levels"]["engine"]
    assert engine["control_steps_per_second"] == {"median": 100.0, "min": 50.0, "max": 100.0}
    assert engine["physics_steps_per_second"] == {"median": 1000.0, "min": 500.0, "max": 1000.0}
    assert "share" not in engine


@pytest.mark.parametrize(
    ("num_envs", "env", "ppo", "missed"),
    [
        (512, 1 / 0.91, 1 / 0.51, []),
        (512, 1 / 0.89, 1 / 0.51, ["env/engine is 0.890 at 512 environments, below 0.90"]),
        (8192, 1 / 0.91, 1 / 0.49, ["ppo/engine is 0.490 at 8192 environments, below 0.50"]),
        (511, 9.0, 9.0, []),  # few environments are not held to it
    ],
)
def test_the_gate_names_what_is_too_slow(num_envs, env, ppo, missed):
    assert shortfalls([summary(planted([1.0], [env], [1.5], [ppo]), num_envs, 10)]) == missed


def call(*arguments):
    """The exit code of the program."""
    try:
        command(Config, throughput.main, arguments)
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--env-counts", "4", "0"], "error: env_counts must be numbers of at least 1, got [0] (--env-counts)"),
        (["--blocks", "0"], "error: blocks must be at least 1, got 0 (--blocks)"),
        (["--block-seconds", "nan"], "error: block_seconds must be more than 0"),
        (["--num-threads", "-1"], "error: num_threads must be 0 (every CPU) or more, got -1 (--num-threads)"),
        (["--output-dir", "/proc/none"], "error: output_dir /proc/none cannot be written"),
        (["--run", "nowhere"], "error: nowhere is not a run"),
    ],
)
def test_input_that_cannot_work_is_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert call(*arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith(message)
    assert err.count("\n") == 1
    assert out == ""


def test_quick_is_a_choice_of_defaults():
    assert Config().counts == tuple(2**i for i in range(14))
    assert (Config(quick=True).counts, Config(quick=True).num_blocks) == ((1, 64, 512, 2048), 5)
    assert Config(quick=True, env_counts=(8, 2, 8), blocks=9).counts == (2, 8)
    assert Config(quick=True, blocks=9).num_blocks == 9


@pytest.fixture
def few_steps(monkeypatch):
    """A short way to the first states, and small updates."""
    plain = throughput.subject

    def small(config):
        full = plain(config)
        ppo = dataclasses.replace(full.ppo, num_steps=4, num_epochs=1, policy_layers=(8,), value_layers=(8,))
        learner = make_ppo(full.env, dataclasses.replace(ppo, num_envs=4))
        return full._replace(ppo=ppo, state=learner.init(random.key(0)))

    monkeypatch.setattr(throughput, "_BURN_IN_STEPS", 20)
    monkeypatch.setattr(throughput, "subject", small)


def test_table_files_and_gate(tmp_path, capsys, few_steps, monkeypatch):
    arguments = ["--task", "cartpole", "--env-counts", "1", "4", "--blocks", "2", "--block-seconds", "0.004"]
    monkeypatch.setattr(throughput, "GATE_ENVS", 4)
    monkeypatch.setattr(throughput, "GATE", {"env": 0.0, "ppo": 1e9})
    assert call(*arguments, "--num-threads", "1", "--gate", "--output-dir", str(tmp_path / "new")) == 1
    out, _ = capsys.readouterr()
    assert "cartpole, actions sampled from an untrained policy" in out
    assert "gate: ppo/engine is" in out
    assert "at 4 environments" in out
    assert "env/engine is" not in out
    figures = json.loads((tmp_path / "new" / "throughput_cartpole.json").read_text())
    assert [row["num_envs"] for row in figures["rows"]] == [1, 4]
    assert figures["machine"]["cores"] >= 1
    assert figures["command"].startswith("python -m benchmarks.throughput")
    for row in figures["rows"]:
        for level in LEVELS:
            measured = row["levels"][level]
            assert len(measured["blocks"]) == 2
            for block in measured["blocks"]:
                assert block["steps"] % row["num_envs"] == 0
                assert block["seconds"] > 0
            speed = measured["control_steps_per_second"]
            assert 0 < speed["min"] <= speed["median"] <= speed["max"]
            assert measured["physics_steps_per_second"]["median"] == pytest.approx(2 * speed["median"])
    assert (tmp_path / "new" / "throughput_cartpole.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def bench():
    return Bench(subject(Config(task="cartpole", num_threads=1)), 0)


def test_the_bare_engine_does_what_the_environment_does(bench):
    state, obs = bench.subject.state.env_state, bench.subject.state.obs
    bench.env_block(state, obs, random.split(random.key(0), 3))  # making a recording runs the engine once more
    with throughput.watched(bench.subject.env.engine) as kept:
        _, after, obs = bench.env_block(state, obs, random.split(random.key(0), 1))
        bench.env_block(after, obs, random.split(random.key(1), 2))
    assert len(kept) == 3
    bare = BareEngine(bench.subject.env.engine, len(state.steps), bench.substeps)
    assert bare.step(kept[0]) > 0
    # No cartpole falls in its first step, so none was reset.
    assert torch.equal(torch.from_numpy(bare.qpos.copy()), after.physics.qpos)
    # What was kept is what went in, not what came of it.
    assert torch.equal(torch.from_numpy(kept[0][1].copy()), state.physics.qpos)
    assert torch.equal(torch.from_numpy(kept[1][1].copy()), after.physics.qpos)
    assert "step_rows" not in vars(bench.subject.env.engine)


def test_the_bare_engine_has_the_robots_of_the_environment():
    """Heavier poles: with the nominal ones the positions would be others."""
    whole = subject(Config(task="cartpole", num_threads=1))
    mass = whole.env.engine.nominal("body_mass")["body_mass"]
    drawn = torch.stack([mass, 3 * mass])
    params = tree.map_leaves(lambda x: x.expand(2, *x.shape).contiguous(), whole.env.params)
    own = Bench(whole._replace(robots=tree.replace(params, physics={"body_mass": drawn})), 0)
    state, obs = (tree.index(x, slice(4)) for x in (whole.state.env_state, whole.state.obs))
    own.env_block(state, obs, random.split(random.key(0), 3))
    fields = own.subject.params(4).physics
    assert torch.equal(fields["body_mass"], torch.cat([drawn, drawn]))
    with throughput.watched(whole.env.engine, fields) as kept:
        _, after, _ = own.env_block(state, obs, random.split(random.key(0), 1))
    bare = BareEngine(whole.env.engine, 4, own.substeps)
    bare.step(kept[0])
    assert not torch.equal(torch.from_numpy(bare.qpos.copy()), after.physics.qpos)
    bare.give(fields)
    bare.step(kept[0])
    assert torch.equal(torch.from_numpy(bare.qpos.copy()), after.physics.qpos)
    with pytest.raises(InputError, match="fields change"), throughput.watched(whole.env.engine):
        own.env_block(state, obs, random.split(random.key(0), 1))


def test_actions_are_those_of_training(bench):
    whole, key = bench.subject, random.key(7)
    algorithm = make_ppo(whole.env, dataclasses.replace(whole.ppo, num_envs=64))
    act = throughput.sampling(whole.env, whole.ppo)
    action, extras = act((whole.state.params, whole.state.observation_moments), whole.state.obs, key)
    assert torch.equal(action, algorithm.act(whole.state, whole.state.obs, key))
    assert extras.keys() == {"mean", "log_prob"}


def test_resets_of_every_size_fall_due(bench):
    state = bench.subject.state.env_state
    passes = [due.steps for due in falling_due(state, 500)]
    # 64 robots: 6 of 8 in the first step, 12 of 16 in the second; then all at once.
    assert [int((passes[0] == 500 - t).sum()) for t in (1, 2, 3)] == [6, 12, 0]
    assert bool((passes[1] == 499).all())
    assert len(passes) == 2


def test_states_are_of_all_ages_and_each_once(bench):
    state, obs = bench.states(96, 32)
    assert state.steps.shape == (96,)
    assert obs["policy"].shape == (96, 4)
    ages = state.steps.double()
    assert float(ages.std()) > 0
    assert len(torch.unique(state.physics.qpos, dim=0)) == 96
    assert all(torch.isfinite(x).all() for x in tree.tree_flatten(state)[0] if x.is_floating_point())
