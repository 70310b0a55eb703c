"""Each illness in records made by hand, next to the same without it; real ones are in tests/experiments."""

import math

import numpy as np
import pytest

from rlcore.doctor import RULES, Watch, diagnose, judged_from

ITERATIONS = 100
RAMP = np.linspace(0.0, 1.0, ITERATIONS)
FLAT = 5 + 0.01 * np.random.default_rng(2).normal(size=ITERATIONS)


def records(**columns):
    """A healthy run of a walking robot, with other columns in place of its own; a double underscore is a slash."""
    noise = np.random.default_rng(0).normal(0.0, 1.0, (20, ITERATIONS))
    healthy = {
        "episode/return": 5 + 20 * RAMP + 0.5 * noise[0],
        "policy/kl": 0.03 + 0.003 * noise[1],
        "policy/clip_fraction": 0.3 + 0.02 * noise[2],
        "policy/std": 0.25 - 0.05 * RAMP,
        "policy/saturation": np.zeros(ITERATIONS),
        "env/torque_saturation": 0.003 + np.zeros(ITERATIONS),
        "env/velocity_error": 0.4 - 0.2 * RAMP,
        "env/faults": np.zeros(ITERATIONS),
        "contact/both": 0.4 + np.zeros(ITERATIONS),
        "contact/landings_per_second": 9 + 0.5 * noise[3],
        "loss/value": 0.01 + 0.001 * noise[4],
        "value/mean": 5 + 3 * RAMP,
        "value/explained_variance": 0.95 + 0.01 * noise[5],
        "advantage/share": 0.1 + 0.01 * noise[6],
        "observations/drift": 0.2 + 0.02 * noise[7],
        "network/dead_policy_units": np.zeros(ITERATIONS),
        "network/dead_value_units": np.zeros(ITERATIONS),
        "reward/track_velocity": 1 + RAMP + 0.1 * noise[8],
        "reward/upright": 0.9 + 0.01 * noise[9],
        "reward/action_rate": -0.05 - 0.03 * RAMP,
        "reward_raw/action_rate": 2.5 + 1.5 * RAMP,
        "time/physics_share": 0.5 + np.zeros(ITERATIONS),
        "time/learning_share": 0.36 + np.zeros(ITERATIONS),
    }
    healthy |= {name.replace("__", "/"): values for name, values in columns.items()}
    return [
        {
            "iteration": i + 1,
            "env_steps": 1000 * (i + 1),
            **{k: None if math.isnan(v[i]) else float(v[i]) for k, v in healthy.items()},
        }
        for i in range(ITERATIONS)
    ]


def evaluation(low, nominal=0.98, other=0.6):
    gap = {"difference": nominal - other, "low": low, "high": 0.5}
    randomized = {"survived": {"share": other}, "survival_gap": gap, "physics": "masses x 0.8 to 1.2"}
    return {"survived": {"share": nominal}, "randomized": randomized}


def test_a_healthy_run_has_nothing_and_no_run_neither():
    assert diagnose(records()) == []
    assert diagnose(records(), evaluation(low=0.02, other=0.9)) == []
    assert diagnose(records()[:3]) == []
    assert diagnose([]) == []


ILL = {
    "not finite": [{"loss__value": np.where(RAMP < 0.99, 0.01, np.nan)}],
    "policy collapse": [
        {"policy__kl": np.full(ITERATIONS, 2.0)},
        {"policy__kl": np.where(np.arange(ITERATIONS) == 80, 60.0, 0.03)},
        {
            "episode__return": np.where(RAMP < 0.5, 5 + 40 * RAMP, 8.0),
            "policy__std": np.where(RAMP < 0.5, 0.25, 0.01),
        },
    ],
    "value divergence": [
        {"value__explained_variance": np.where(RAMP < 0.5, 0.9, -5.0)},
        {"loss__value": 0.01 * 10 ** (6 * np.maximum(RAMP - 0.6, 0)), "value__mean": 5 * 10 ** (6 * RAMP)},
    ],
    "physics faults": [{"env__faults": np.where(np.arange(ITERATIONS) == 7, 2.0, 0.0)}],
    "unstable walking": [
        {"reward__action_rate": 0.5 + RAMP},
        {"reward_raw__action_rate": 2.5 + 20 * RAMP},
        {"env__torque_saturation": 0.3 * RAMP},
        {"contact__landings_per_second": 9 + 12 * RAMP},
    ],
    "reward hacking": [
        {"reward__upright": 0.1 + 20 * RAMP, "env__velocity_error": 0.4 + 0.3 * RAMP},
        {"reward__upright": 0.5 + 20 * RAMP, "reward__track_velocity": 1.0 - 0.9 * RAMP},
    ],
    "no signal": [{"advantage__share": np.full(ITERATIONS, 1e-4), "episode__return": FLAT}],
    "slow convergence": [
        {"episode__return": FLAT},
        {"episode__return": 5 + RAMP, "policy__kl": np.full(ITERATIONS, 1e-6), "policy__clip_fraction": 0 * RAMP},
        {"episode__return": FLAT, "policy__std": np.full(ITERATIONS, 0.03)},
    ],
    "action saturation": [{"policy__saturation": 0.9 * RAMP, "episode__return": FLAT}],
    "dead units": [{"network__dead_policy_units": 0.6 * RAMP}, {"network__dead_value_units": 0.6 * RAMP}],
    "normalizer drift": [{"observations__drift": np.full(ITERATIONS, 1.7)}],
    "time lost": [{"time__physics_share": np.full(ITERATIONS, 0.05)}],
}


@pytest.mark.parametrize(("name", "changes"), [(name, c) for name, cases in ILL.items() for c in cases])
def test_an_illness_is_named(name, changes):
    found = {finding.name: finding for finding in diagnose(records(**changes))}
    assert name in found
    # A flat return is what is seen of a reward without a signal, too.
    assert set(found) <= {name, "slow convergence"}
    told = found[name]
    assert all((told.what, told.evidence, told.cause, told.advice))
    assert 1 <= told.since <= ITERATIONS
    assert "\n" not in told.line


def test_control_that_is_best_at_its_bounds_is_no_illness():
    assert diagnose(records(policy__saturation=0.9 * RAMP)) == []
    full = records(policy__saturation=np.full(ITERATIONS, 0.9))
    assert [diagnose(full[:count]) for count in (20, 30, 39, 60)] == [[]] * 4


def test_values_of_returns_that_are_all_alike_explain_nothing_and_are_right():
    solved = {"value__explained_variance": np.where(RAMP < 0.5, 0.9, -5.0), "advantage__share": 0.1 - 0.098 * RAMP}
    assert diagnose(records(**solved)) == []


def test_new_observations_of_a_policy_that_learns_fast_are_no_drift():
    young = records(observations__drift=np.where(np.arange(ITERATIONS) < 35, 2.0, 0.2))
    assert [diagnose(young[:count]) for count in (40, 50, 60, 80)] == [[]] * 4


def test_signs_of_a_collapse_get_no_advice_of_their_own():
    wild = {"policy__kl": np.full(ITERATIONS, 9.0), "policy__std": 0.05 + 50 * RAMP, "policy__saturation": 0.9 * RAMP}
    found = {f.name: f for f in diagnose(records(episode__return=FLAT, **wild))}
    assert list(found) == ["policy collapse", "slow convergence", "action saturation"]
    assert "learning-rate smaller" in found["policy collapse"].advice
    assert {f.advice for name, f in found.items() if name != "policy collapse"} == {"mend the policy collapse first"}


def test_a_deviation_that_has_grown_is_no_lack_of_exploration():
    std = np.where(np.arange(ITERATIONS) < 10, 0.05, 50 * RAMP)
    (found,) = diagnose(records(episode__return=FLAT, policy__std=std))
    assert found.name == "slow convergence" and "explore" not in found.cause


def test_it_is_told_from_when_on_a_run_is_judged():
    assert judged_from(records()[:3]) == 40
    lines = [{k: v for k, v in r.items() if k not in ("policy/kl", "policy/clip_fraction")} for r in records()]
    assert judged_from(lines) is None
    begun = [{**line, "policy/entropy": None if i < 30 else -1.0} for i, line in enumerate(lines)]
    assert judged_from(begun) == 430


def test_every_rule_has_an_illness_here():
    assert len(ILL) + 1 == len(RULES)  # overfitting is below


def test_the_advice_fits_the_cause():
    def advice(**changes):
        return diagnose(records(**changes))[0].advice

    flat = {"episode__return": FLAT}
    assert "initial-std" in advice(**flat, policy__std=np.full(ITERATIONS, 0.03))
    assert "learning-rate larger" in advice(**flat, policy__kl=0 * RAMP + 1e-6, policy__clip_fraction=0 * RAMP)
    assert "learning-rate smaller" in advice(policy__kl=np.full(ITERATIONS, 2.0))
    assert "--reward-weights action_rate -WEIGHT" in advice(reward__action_rate=0.5 + RAMP)
    noise = np.random.default_rng(1).normal(0.0, 0.3, ITERATIONS)
    fight = {"reward__track_velocity": 2 + noise, "reward__upright": 2 - noise, "env__torque_saturation": 0.3 * RAMP}
    assert "fight" in diagnose(records(**fight))[0].cause


def test_overfitting_is_a_gap_beyond_chance():
    (found,) = diagnose(records(), evaluation(low=0.3))
    assert found.name == "overfitting"
    assert "98 %" in found.evidence and "60 %" in found.evidence and "--randomization" in found.advice


def test_a_return_that_never_moved_is_not_one_that_is_as_good_as_it_gets():
    solved = np.minimum(20 + 2000 * RAMP, 500.0)
    assert diagnose(records(episode__return=solved, advantage__share=np.full(ITERATIONS, 1e-4))) == []


def test_sac_gets_advice_with_its_own_flags():
    columns = {"episode__return": FLAT, "policy__std": np.full(ITERATIONS, 0.03), "policy__entropy": FLAT}
    lines = [{k: v for k, v in r.items() if k not in ("policy/kl", "policy/clip_fraction")} for r in records(**columns)]
    assert diagnose(lines) == []  # off-policy, a hundred iterations are few
    later = [{**record, "iteration": i + 1} for i, record in enumerate(5 * lines)]
    (found,) = diagnose(later)
    assert "--sac.initial-entropy-coefficient" in found.advice


def test_a_dip_of_the_first_policy_that_critics_without_knowledge_make_is_no_collapse():
    ends = np.concatenate([np.linspace(1.0, 3.0, 150), np.full(150, 0.1)])
    lines = [
        {**records()[i % ITERATIONS], "iteration": i + 1, "episode/return": ends[i], "policy/entropy": entropy}
        for i, entropy in enumerate([None] * 150 + [-1.0] * 150)
    ]
    off_policy = [{k: v for k, v in r.items() if k not in ("policy/kl", "policy/clip_fraction")} for r in lines]
    assert "policy collapse" not in [finding.name for finding in diagnose(off_policy)]
    later = [*off_policy, *({**off_policy[-1], "iteration": 301 + i} for i in range(600))]
    assert "policy collapse" in [finding.name for finding in diagnose(later)]


def test_a_watch_tells_once_and_not_again_after_a_resume():
    lines = records(env__faults=np.where(np.arange(ITERATIONS) >= 30, 1.0, 0.0))
    watch = Watch(every=10)
    told = [line for record in lines for line in watch.add(record)]
    assert len(told) == 1 and told[0].startswith("physics faults")
    again = Watch(lines[:60], every=10)
    assert [line for record in lines[60:] for line in again.add(record)] == []


def test_a_watch_of_a_long_run_keeps_the_first_and_the_newest(monkeypatch):
    monkeypatch.setattr("rlcore.doctor._NEWEST", 10)
    watch = Watch(every=1000)
    for record in records():
        watch.add({**record, "torque/knee": 1.0})
    kept = [record["iteration"] for record in watch._records]
    assert kept[0] == 1 and kept[-10:] == list(range(91, 101)) and len(kept) <= 20
    assert "torque/knee" not in watch._records[0]
