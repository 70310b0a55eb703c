"""What is wrong with a training run, in plain words: read from what it logged, and nothing else.

`diagnose` is a function of the records of `metrics.jsonl`, and of an evaluation if there is one. Each rule looks for
one illness and returns a `Finding`, or None: what is wrong, the numbers that show it, the likely cause, and the flag
that mends it. A rule stays silent where a metric that it needs was not logged, or as long as there is too little to
judge.

What a rule advises names flags of the algorithms and experiments here, as text alone: nothing of them is imported.

Thresholds are set so that healthy runs of all tasks here stay silent; what healthy runs look like stands beside each.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlcore.experiment import MUST_BE_FINITE
from rlcore.metrics import column

MIN_ITERATIONS = 20  # before these a run is not judged

_NEWEST = 1000  # records that are kept as they are
_NOT_READ = ("torque", "episode_", "ended/", "curriculum_stage/")  # groups of metrics that no rule asks for


class Finding(NamedTuple):
    """One thing that is wrong.

    Attributes:
      name: of the illness, in a word or two.
      what: what is wrong.
      evidence: the numbers.
      cause: what is likely behind it.
      advice: what to do, with the flag.
      metrics: what to draw of it.
      since: the iteration that it shows from.
    """

    name: str
    what: str
    evidence: str
    cause: str
    advice: str
    metrics: tuple[str, ...]
    since: int

    @property
    def line(self) -> str:
        """All in one line, as a warning while training goes on."""
        return f"{self.name}: {self.what} ({self.evidence}); {self.advice}"


@dataclass(frozen=True)
class History:
    """A run's records as columns.

    Attributes:
      records: of `metrics.jsonl`, oldest first.
      evaluation: what `experiments.evaluate --randomized` measured, if it did.
    """

    records: Sequence[Mapping[str, Any]]
    evaluation: Mapping[str, Any] | None = None
    _columns: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    _smooth: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    @property
    def iterations(self) -> int:
        """How many records there are."""
        return len(self.records)

    def names(self, prefix: str) -> list[str]:
        """The metrics that the newest record has under this prefix."""
        return [name for name in self.records[-1] if name.startswith(prefix)]

    def get(self, name: str) -> NDArray[np.float64]:
        """A metric, `[iterations]`; NaN where it had no value. All NaN if it was never logged."""
        if name not in self._columns:
            self._columns[name] = np.array(column(self.records, name), np.float64)
        return self._columns[name]

    def has(self, name: str) -> bool:
        """Whether the metric has enough values to be judged."""
        return len(self.known(name)) >= MIN_ITERATIONS // 2

    def known(self, name: str) -> NDArray[np.float64]:
        """The metric's finite values: `[known]`."""
        return self.get(name)[np.isfinite(self.get(name))]

    def smooth(self, name: str) -> NDArray[np.float64]:
        """The metric's known values as medians over a twentieth of the run, at least five: `[known]`."""
        if name not in self._smooth:
            known = self.known(name)
            width = max(5, len(known) // 20)
            if len(known) >= width:
                known = np.median(np.lib.stride_tricks.sliding_window_view(known, width), axis=-1)
            self._smooth[name] = known
        return self._smooth[name]

    def early(self, name: str) -> float:
        """The metric's median over the first values that it had."""
        return float(self.smooth(name)[0])

    def late(self, name: str) -> float:
        """Its median over the newest ones."""
        return float(self.smooth(name)[-1])

    def iteration(self, place: int) -> int:
        """The iteration of a record."""
        return int(self.records[min(place, self.iterations - 1)]["iteration"])

    @property
    def algorithm(self) -> str:
        """The flag's prefix of the algorithm's settings."""
        return "--ppo" if "policy/kl" in self.records[-1] else "--sac"

    @property
    def step_size(self) -> str:
        """The flag of the policy's step size."""
        return "--ppo.learning-rate" if self.algorithm == "--ppo" else "--sac.policy-learning-rate"


def judged_from(records: Sequence[Mapping[str, Any]]) -> int | None:
    """The iteration from which all rules judge a run; None if it has not begun to learn.

    Args:
      records: of its `metrics.jsonl`, oldest first, at least one.
    """
    history = History(records)
    if history.algorithm == "--sac" and not len(history.known("policy/entropy")):
        return None
    return _learned_from(history)


def diagnose(records: Sequence[Mapping[str, Any]], evaluation: Mapping[str, Any] | None = None) -> list[Finding]:
    """Everything that is found wrong with a run, the gravest first.

    Args:
      records: of its `metrics.jsonl`, oldest first.
      evaluation: its `evaluation.json`.
    """
    if not records:
        return []
    history = History(records, evaluation)
    findings: list[Finding] = []
    for rule in RULES:
        if (finding := rule(history)) is None:
            continue
        cause = next((other.name for other in findings if finding.name in _FOLLOWS.get(other.name, ())), None)
        if cause is not None:
            finding = finding._replace(cause=f"it may follow from the {cause}", advice=f"mend the {cause} first")
        findings.append(finding)
    return findings


class Watch:
    """Looks at a run while it trains, and tells of each illness once.

    Of a long run it keeps the newest records, and of older ones ever fewer.

    Args:
      records: what it logged before, if it goes on.
      every: iterations between two looks.
    """

    def __init__(self, records: Sequence[Mapping[str, Any]] = (), every: int = 20) -> None:
        self._records: list[Mapping[str, Any]] = []
        self._every, self._next = every, 0
        for record in records:
            self._keep(record)
        self._told = {finding.name for finding in diagnose(self._records)}

    def add(self, record: Mapping[str, Any]) -> list[str]:
        """Take one more record; what is newly wrong, a line each."""
        self._keep(record)
        if record["iteration"] < self._next:
            return []
        self._next = record["iteration"] + self._every
        new = [finding for finding in diagnose(self._records) if finding.name not in self._told]
        self._told |= {finding.name for finding in new}
        return [finding.line for finding in new]

    def _keep(self, record: Mapping[str, Any]) -> None:
        self._records.append({k: v for k, v in record.items() if not k.startswith(_NOT_READ)})
        if len(self._records) > 2 * _NEWEST:
            self._records = self._records[:-_NEWEST:2] + self._records[-_NEWEST:]


# --- what several rules ask -----------------------------------------------------------------------------------


def _progress(h: History) -> str:
    """The metric that tells how far a run has come: returns begin anew with each stage of a curriculum."""
    return "env/curriculum_progress" if h.has("env/curriculum_progress") else "episode/return"


def _noise(values: NDArray[np.float64]) -> float:
    """How much neighbouring values differ by chance: the median step, as a standard deviation."""
    return float(np.median(np.abs(np.diff(values)))) * 1.05 if len(values) > 1 else 0.0


def _flat(h: History) -> bool:
    """Whether a run has not learned anything since it began."""
    name = _progress(h)
    known = h.known(name)
    # Where all episodes end together, many iterations repeat one value.
    if len(known) < 2 * MIN_ITERATIONS or not _learning_long(h) or len(np.unique(known)) < MIN_ITERATIONS // 2:
        return False
    start, best = h.early(name), float(h.smooth(name).max())
    return best - start < max(3 * _noise(known) / math.sqrt(5), 0.05 * abs(start))


def _learning_long(h: History) -> bool:
    """Whether there was time to learn: an off-policy learner takes a few steps for each gradient, and so hundreds of
    iterations, of which the first only fill its buffer."""
    return h.iterations >= _learned_from(h)


def _learned_from(h: History) -> int:
    if h.algorithm == "--ppo":
        return 2 * MIN_ITERATIONS
    # The first policy of critics that know nothing yet is often worse than chance.
    waited = h.iterations - len(h.known("policy/entropy"))
    return waited + max(20 * MIN_ITERATIONS, 4 * waited)


def _rising(h: History) -> bool:
    """Whether a run has learned something, and has not lost it nor come to a halt below it."""
    name = _progress(h)
    if not h.has(name) or not _learning_long(h) or _flat(h):
        return False
    curve = h.smooth(name)
    return bool(curve[-1] > (curve[0] + curve.max()) / 2)


def _positive_terms(h: History) -> dict[str, tuple[float, float]]:
    """Early and late pay of each reward term, weighted, for those that were ever paid for."""
    found = {}
    for name in h.names("reward/"):
        if h.has(name) and max(h.early(name), h.late(name)) > 0:
            found[name.removeprefix("reward/")] = (h.early(name), h.late(name))
    return found


# --- the rules ------------------------------------------------------------------------------------------------


def policy_collapse(h: History) -> Finding | None:
    """Steps so large that what was learned is lost: a divergence above 0.5 (healthy: 0.01 to 0.04), or a return that
    fell by half of what it had gained, and stayed there, with a cause that shows."""
    if h.iterations < MIN_ITERATIONS:
        return None
    size = f"{h.step_size} smaller" + (", or --ppo.kl-target 0.02" if h.algorithm == "--ppo" else "")
    if h.has("policy/kl"):
        recent = h.get("policy/kl")[-max(MIN_ITERATIONS // 2, h.iterations // 2) :]
        newest = h.get("policy/kl")[-MIN_ITERATIONS // 2 :]
        known = recent[np.isfinite(recent)]
        if known.size and (np.nanmedian(newest) > 0.5 or known.max() > 5.0):
            since = h.iteration(int(np.nanargmax(h.get("policy/kl") > 0.5)))
            still = h.has("policy/std") and h.early("policy/std") < 0.02
            start = "--ppo.initial-std larger, and --ppo.entropy-coefficient above 0"
            return Finding(
                "policy collapse",
                "the policy jumps from iteration to iteration instead of improving",
                f"KL divergence of an iteration {float(np.median(known)):.2g}, at most {known.max():.2g}; "
                "0.01 to 0.04 is healthy",
                f"actions vary by {h.early('policy/std'):.2g} alone, and every other mean is a jump"
                if still
                else "gradient steps are too large",
                f"make {start if still else size + ', or --ppo.max-gradient-norm smaller'}",
                ("policy/kl", "policy/clip_fraction", "episode/return"),
                since,
            )
    name = _progress(h)
    if not h.has(name) or not _learning_long(h):
        return None
    curve = h.smooth(name)
    peak = int(curve.argmax())
    gained, lost = curve[peak] - curve[: peak + 1].min(), curve[peak] - curve[-max(5, len(curve) // 10) :].max()
    if lost <= max(0.5 * gained, 10 * _noise(h.known(name))):
        return None
    signs, cause = [], "not seen in divergence or entropy: look at the reward terms"
    if h.has("policy/std") and h.late("policy/std") < 0.2 * h.early("policy/std"):
        signs.append(f"deviation of actions {h.early('policy/std'):.2g} to {h.late('policy/std'):.2g}")
        more = "--ppo.entropy-coefficient" if h.algorithm == "--ppo" else "--sac.target-entropy"
        cause, size = "exploration has died", f"make {more} larger"
    if h.has("policy/kl") and np.nanmax(h.get("policy/kl")) > 10 * np.nanmedian(h.get("policy/kl")):
        signs.append(f"KL divergence up to {np.nanmax(h.get('policy/kl')):.2g}")
        cause = "some gradient steps were too large"
    return Finding(
        "policy collapse",
        f"{name} fell from {curve[peak]:.3g} to {curve[-1]:.3g} and has not come back",
        ", ".join(signs) or f"it had risen by {gained:.3g}",
        cause,
        size if size.startswith("make") else f"make {size}",
        (name, "policy/kl", "policy/std", "policy/entropy"),
        h.iteration(int(np.flatnonzero(np.isfinite(h.get(name)))[peak]) + max(5, len(curve) // 20) // 2),
    )


def not_finite(h: History) -> Finding | None:
    """A loss or gradient that is no number any more, with which training ends."""
    broken = [n for n, v in h.records[-1].items() if n.startswith(MUST_BE_FINITE) and v is None]
    if not broken:
        return None
    return Finding(
        "not finite",
        "training broke down",
        f"{broken[0]} is not a finite number",
        "gradient steps so large that numbers overflow, or a reward or observation that is not finite",
        f"make {h.step_size} smaller; see whether environments went wrong (faults/ of the run)",
        (broken[0], "gradients/norm", "policy/kl"),
        h.iteration(h.iterations - 1),
    )


def value_divergence(h: History) -> Finding | None:
    """Values that run away: what the value function explains below -1 for long (healthy: above 0.5 soon), or a loss
    that grew a hundredfold, with values ten times as large."""
    if h.iterations < 2 * MIN_ITERATIONS or not h.has("loss/value"):
        return None
    explained, loss = h.get("value/explained_variance"), h.smooth("loss/value")
    recent = explained[-MIN_ITERATIONS:]
    # Where all returns are alike, as of a task that is solved, there is nothing to explain.
    alike = h.has("advantage/share") and h.late("advantage/share") < 0.05
    worthless = h.has("value/explained_variance") and float(np.nanmedian(recent)) < -1.0 and not alike
    # Losses near zero, as before learning begins, are nothing to grow from.
    usual = float(np.median(loss[loss > 0])) if (loss > 0).any() else math.inf
    value = np.abs(h.smooth("value/mean"))
    grown = value.size > 0 and value[-1] > 10 * max(float(np.median(value)), 1e-3)
    if not worthless and not (loss[-1] > 100 * usual and grown):
        return None
    rate = "--ppo.learning-rate" if h.algorithm == "--ppo" else "--sac.value-learning-rate or --sac.target-rate"
    shown = f"explained variance {float(np.nanmedian(recent)):.2g}, " if worthless else ""
    return Finding(
        "value divergence",
        "the value function moves away from the returns that it should predict",
        f"{shown}value loss {usual:.2g} at its middle and {loss[-1]:.2g} now",
        "its steps are too large, or rewards have outliers",
        f"make {rate} smaller, or clip outliers in the reward",
        ("loss/value", "value/explained_variance", "value/mean"),
        h.iteration(h.iterations // 2),
    )


def physics_faults(h: History) -> Finding | None:
    """Simulations that became unstable (healthy: none)."""
    faults = h.get("env/faults")
    if not np.nansum(faults) > 0:
        return None
    first = int(np.nanargmax(faults > 0))
    return Finding(
        "physics faults",
        "simulations became unstable, and their episodes were ended",
        f"{int(np.nansum(faults))} times, in {int((faults > 0).sum())} of {h.iterations} iterations",
        "actions, gains or masses that the time step is too long for",
        "look at the states in faults/ of the run; narrow ranges of randomization or actions, or shorten the time step",
        ("env/faults", "policy/saturation"),
        h.iteration(first),
    )


def unstable_walking(h: History) -> Finding | None:
    """Robots that shake: actions that change more and more, servos at their limits, or feet that chatter.

    Healthy walkers end with at most twice the action rate that exploration begins with, 0.3 % of torques at a limit,
    and 11 landings a second.
    """
    rate = "reward_raw/action_rate"
    if h.iterations < MIN_ITERATIONS or not h.has(rate):
        return None
    signs = []
    gains = {name: late - early for name, (early, late) in _positive_terms(h).items()}
    paid = [name for name in gains if _is_cost(name) and gains[name] > 0.25 * max(_positive_terms(h)[name][0], 0.0)]
    term = max(paid, key=lambda name: gains[name], default=None)
    if term is not None:
        before, now = _positive_terms(h)[term]
        signs.append(f"{term} is paid {before:.3g} a second at first and {now:.3g} now")
    if h.late(rate) > 5 * h.early(rate) > 0:
        signs.append(f"squared change of actions {h.early(rate):.3g} to {h.late(rate):.3g}")
    if h.has("env/torque_saturation") and h.late("env/torque_saturation") > 0.15:
        signs.append(f"{h.late('env/torque_saturation'):.0%} of torques at their limit")
    if h.has("contact/both") and h.has("contact/landings_per_second") and h.late("contact/landings_per_second") > 16:
        signs.append(f"{h.late('contact/landings_per_second'):.0f} landings a second")
    if not signs:
        return None
    cause, advice = "jerky actions are not worth avoiding", "raise the cost: --reward-weights action_rate -0.1"
    if term is not None:
        cause = f"{term} measures a cost, but its weight is positive"
        advice = f"make the weight of {term} negative: --reward-weights {term} -WEIGHT"
    elif fight := _fighting(h):
        cause = f"{fight[0]} and {fight[1]} fight: what one gains the other loses"
        advice = f"redesign one of them, or weigh it less: --reward-weights {fight[1]} WEIGHT"
    return Finding(
        "unstable walking",
        "the robot is learning to shake",
        ", ".join(signs),
        cause,
        advice,
        (rate, "env/torque_saturation", "contact/landings_per_second", *([f"reward/{term}"] if term else [])),
        h.iteration(h.iterations // 2),
    )


def _is_cost(term: str) -> bool:
    """Whether a reward term of this name measures what is to be avoided."""
    costs = (
        *("action_rate", "action_jerk", "action_size", "torque", "acceleration", "slip", "joint_limits", "momentum"),
        *("vertical_velocity", "roll_pitch_velocity", "mechanical_power", "impact", "collision"),
    )
    return any(cost in term for cost in costs)


def _fighting(h: History) -> tuple[str, str] | None:
    """The two reward terms whose changes from iteration to iteration are most opposed, if they are strongly so."""
    names = [name for name in h.names("reward/") if h.has(name) and np.nanstd(np.diff(h.get(name))) > 1e-6]
    if len(names) < 2:
        return None
    changes = np.nan_to_num(np.array([np.diff(h.get(name)) for name in names]))
    opposed = np.corrcoef(changes)
    i, j = np.unravel_index(int(opposed.argmin()), opposed.shape)
    if not opposed[i, j] < -0.8:
        return None
    return names[int(i)].removeprefix("reward/"), names[int(j)].removeprefix("reward/")


def reward_hacking(h: History) -> Finding | None:
    """One term takes over: the reward rises by it alone, while another that was paid before loses more than half, or
    the robot follows its command no better."""
    terms = _positive_terms(h)
    if h.iterations < 2 * MIN_ITERATIONS or len(terms) < 2:
        return None
    gains = {name: late - early for name, (early, late) in terms.items()}
    term = max(gains, key=lambda name: gains[name])
    risen = sum(gain for gain in gains.values() if gain > 0)
    whole = sum(late for _, late in terms.values())
    if gains[term] < 0.7 * risen or terms[term][1] < 0.5 * whole or gains[term] < 0.25 * whole:
        return None
    worth = sum(early for early, _ in terms.values())
    lost = [name for name, (early, late) in terms.items() if early > 0.2 * worth and late < 0.5 * early]
    error = "env/velocity_error"
    astray = h.has(error) and h.late(error) > h.early(error)
    if not lost and not astray:
        return None
    losers = f"{', '.join(lost)} lost more than half" if lost else ""
    apart = f"the velocity error went from {h.early(error):.2g} to {h.late(error):.2g} m/s" if astray else ""
    return Finding(
        "reward hacking",
        f"the reward rises by {term} alone",
        f"{term} {terms[term][0]:.3g} to {terms[term][1]:.3g} a second of {whole:.3g}; "
        + ", and ".join(x for x in (losers, apart) if x),
        f"{term} can be had without doing the task",
        f"bound the term or weigh it less: --reward-weights {term} WEIGHT",
        (f"reward/{term}", *(f"reward/{name}" for name in lost), error),
        h.iteration(h.iterations // 2),
    )


def no_signal(h: History) -> Finding | None:
    """Advantages that hardly differ, so that learning follows noise, in a run that has not learned anything."""
    name = "advantage/share"
    if not h.has(name) or h.late(name) > 0.02 or not _flat(h):
        return None
    return Finding(
        "no signal",
        "no action is better than another",
        f"advantages vary by {h.late(name):.2g} of what returns are worth",
        "the reward does not depend on what the robot does, or only where it never gets",
        "give a reward on the way there (a term by distance or error), or explore more: --ppo.initial-std larger",
        (name, "episode/return", "value/explained_variance"),
        h.iteration(0),
    )


def slow_convergence(h: History) -> Finding | None:
    """A return that has been flat since the beginning, by steps that are too small or actions that hardly vary."""
    name = _progress(h)
    if h.iterations < 2 * MIN_ITERATIONS or not h.has(name):
        return None
    kl = clipped = math.inf
    if h.has("policy/kl") and h.has("policy/clip_fraction"):
        kl, clipped = (float(np.nanmedian(h.get(f"policy/{what}"))) for what in ("kl", "clip_fraction"))
    small = kl < 5e-4 and clipped < 0.005
    start, best = h.early(name), float(h.smooth(name).max())
    # Steps that hardly change the policy are known by themselves, unless it was good when it began.
    still = h.has("policy/std") and h.late("policy/std") < 0.02
    if not _flat(h) and not ((small or still) and best - start < 0.5 * abs(start)):
        return None
    evidence = f"{name} {start:.3g} at the start and at best {best:.3g}"
    cause, advice = "nothing that the metrics show", "try another reward, or a simpler task first"
    # A deviation that has grown is no lack of exploration, whatever it began with.
    if still or (h.has("policy/std") and max(h.early("policy/std"), h.late("policy/std")) < 0.1):
        evidence += f", deviation of actions {h.late('policy/std'):.2g}"
        cause = "it hardly explores"
        std = "--ppo.initial-std larger, and " if h.algorithm == "--ppo" else ""
        advice = f"make {std}{h.algorithm}.{'' if std else 'initial-'}entropy-coefficient larger"
    elif small:
        evidence += f", clip fraction {clipped:.2g}, KL divergence of an iteration {kl:.2g}"
        cause = "steps are too small"
        advice = f"make {h.step_size} larger, or let it follow the divergence: --ppo.kl-target 0.02"
    return Finding(
        "slow convergence",
        "it hardly learns",
        evidence,
        cause,
        advice,
        (name, "policy/clip_fraction", "policy/std", "policy/entropy"),
        h.iteration(0),
    )


def overfitting(h: History) -> Finding | None:
    """Survival among robots that differ more than 10 points below that of the nominal robot, beyond chance."""
    gap = ((h.evaluation or {}).get("randomized") or {}).get("survival_gap")
    if gap is None or gap["low"] < 0.1:
        return None
    assert h.evaluation is not None
    nominal, other = (100 * x["survived"]["share"] for x in (h.evaluation, h.evaluation["randomized"]))
    return Finding(
        "overfitting",
        "the policy knows one robot only",
        f"{nominal:.0f} % of nominal robots survive, and {other:.0f} % of those that differ "
        f"({h.evaluation['randomized']['physics']})",
        "robots in training differ less than these, or not at all",
        "let robots differ: --randomization.mass-scale 0.8 1.2 --randomization.friction-scale 0.4 1.2 --max-delay 1",
        (),
        h.iteration(h.iterations - 1),
    )


def action_saturation(h: History) -> Finding | None:
    """More than 45 % of actions at their bounds (healthy: up to 15 %, of motors that run as fast as they can), in a run
    that does not get better by it: where it does, the best control may be bang-bang."""
    name = "policy/saturation"
    if not _learning_long(h) or not h.has(name) or h.late(name) < 0.45 or _rising(h):
        return None
    return Finding(
        "action saturation",
        "actions are at their bounds",
        f"{h.late(name):.0%} of them",
        "mean actions drift outside, where no gradient of the task reaches them, or bounds are too tight",
        "make --ppo.bounds-coefficient or the cost of actions larger, or --ppo.initial-std smaller"
        if h.algorithm == "--ppo"
        else "make the cost of actions larger, or bounds wider",
        (name, "policy/std", "loss/bounds"),
        h.iteration(int(np.nanargmax(h.get(name) > 0.45))),
    )


def dead_units(h: History) -> Finding | None:
    """A network most of whose hidden units tell one observation from another no more (healthy: under 10 %)."""
    value_step = "--ppo.learning-rate" if h.algorithm == "--ppo" else "--sac.value-learning-rate"
    for part in ("policy", "value"):
        flag = f"{h.algorithm}.{part}-layers"
        name = f"network/dead_{part}_units"
        if h.iterations < MIN_ITERATIONS or not h.has(name) or h.late(name) < 0.4:
            continue
        return Finding(
            "dead units",
            f"most of the {part} network does nothing",
            f"{h.late(name):.0%} of its hidden units give the same for all observations",
            "steps so large that units never became active again, or observations that are not normalized",
            f"make {h.step_size if part == 'policy' else value_step} smaller, use {h.algorithm}.activation elu, or "
            f"keep {h.algorithm}.normalize-observations; if it learns all the same, {flag} is larger than needed",
            (name, "gradients/norm", "policy/kl"),
            h.iteration(int(np.nanargmax(h.get(name) > 0.4))),
        )
    return None


def normalizer_drift(h: History) -> Finding | None:
    """An observation whose mean stays more than 1.2 running deviations away from its running mean: one that grows
    evenly is 1.7 away for ever (healthy: below 0.5 soon)."""
    name = "observations/drift"
    if h.iterations < 3 * MIN_ITERATIONS or not h.has(name):
        return None
    # A policy that learns fast sees new observations for a while, which its running mean catches up with.
    if float(np.nanmedian(h.get(name)[-max(MIN_ITERATIONS, 2 * h.iterations // 3) :])) < 1.2:
        return None
    return Finding(
        "normalizer drift",
        "observations move away from what they are normalized by",
        f"the batch's mean is {h.late(name):.2g} deviations from the running one",
        "an observation that grows without bound, such as a position or a time",
        "show it relative to something (to the target, to the period), or leave it out",
        (name,),
        h.iteration(int(np.nanargmax(h.get(name) > 1.2))),
    )


def time_lost(h: History) -> Finding | None:
    """More than 45 % of the wall time outside physics and learning (healthy: 12 to 15 %)."""
    parts = ("time/physics_share", "time/learning_share")
    if h.iterations < 2 * MIN_ITERATIONS or not all(h.has(name) for name in parts):
        return None
    # The first iterations record what is run.
    lost = 1.0 - sum(float(np.nanmedian(h.get(name)[MIN_ITERATIONS // 2 :])) for name in parts)
    if lost < 0.45:
        return None
    return Finding(
        "time lost",
        "most of the time is spent outside physics and learning",
        f"{lost:.0%} of it",
        "too few environments for one call, or slow observations, rewards or metrics of the task's own",
        f"make {h.algorithm}.num-envs larger; python -m benchmarks.throughput shows where it goes",
        ("time/physics_share", "time/policy_and_env_share", "time/learning_share"),
        h.iteration(0),
    )


_FOLLOWS = {
    "not finite": ("policy collapse", "value divergence", "slow convergence", "dead units", "action saturation"),
    "policy collapse": ("value divergence", "no signal", "slow convergence", "action saturation", "dead units"),
    "no signal": ("slow convergence",),
}
"""Illnesses that others may be mere signs of: advice on those would pull the other way."""

RULES: tuple[Callable[[History], Finding | None], ...] = (
    not_finite,
    policy_collapse,
    value_divergence,
    physics_faults,
    unstable_walking,
    reward_hacking,
    no_signal,
    slow_convergence,
    overfitting,
    action_saturation,
    dead_units,
    normalizer_drift,
    time_lost,
)
