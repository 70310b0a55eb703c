"""What a run tells while it trains: a file of metrics, TensorBoard, the console, and a picture at the end.

`metrics.jsonl` has one line an iteration and is the record that everything else is drawn from. Numbers that
are not finite are null in it, for JSON has no other word for them. This module never computes a metric.
"""

import io
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlcore.errors import InputError, did_you_mean

METRICS_FILE = "metrics.jsonl"
TENSORBOARD = "tensorboard"
CURVES_FILE = "learning_curves.png"
MEMBERS_FILE = "members.png"

Metrics = Mapping[str, float]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, oldest first; lines that are no record (cut off, damaged) are left out."""
    records = []
    for line in path.read_text(errors="replace").splitlines():
        with suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and {"iteration", "env_steps"} <= record.keys():
                records.append(record)
    return records


def column(records: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """A metric of all records; NaN where it had no value."""
    return [math.nan if (v := record.get(name)) is None else v for record in records]


def check_metric(field: str, name: str, known: Collection[str], flag: str) -> None:
    """Raise InputError unless `name`, given for a field with a flag, is one of the metrics that are known."""
    if name not in known:
        valid = did_you_mean(name, known) or f": there are {', '.join(sorted(known))}"
        raise InputError(f"{field} must be a metric of what is trained, got {name!r}{valid} ({flag})")


class MetricsFile:
    """Appends one line an iteration to `metrics.jsonl`.

    Args:
      path: the file; it is made if it is missing.
      after: keep only the records up to this iteration, as after a resume. The shortened file replaces the
        old one in one step.
    """

    def __init__(self, path: Path, after: int = 0) -> None:
        kept = [r for r in read_metrics(path) if r["iteration"] <= after] if path.exists() else []
        self.last: dict[str, Any] | None = kept[-1] if kept else None
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = path.open("a")

    def write(self, iteration: int, env_steps: int, metrics: Metrics) -> None:
        """Append a record, and hand it to the operating system before returning."""
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        record = {"iteration": iteration, "env_steps": env_steps, **values}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        self.last = record

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Writes event files, one event an iteration, and in this thread, so that a full disk is an OSError here.

    Args:
      directory: of the event files; each start adds one.
      after: TensorBoard hides what earlier files say about later iterations than this one.
    """

    def __init__(self, directory: Path, after: int = 0) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        directory.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(directory / "events"), f".{os.getpid()}")
        if after:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._writer.write_event(self._event(wall_time=time.time(), step=after + 1, session_log=start))

    def write(self, iteration: int, metrics: Metrics) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._writer.write_event(
            self._event(wall_time=time.time(), step=iteration, summary=self._summary(value=values))
        )
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Console:
    """Progress for a person: a block redrawn in place on a terminal, elsewhere a line now and then.

    Args:
      title: what is trained.
      iterations: the goal.
      log_every: seconds between lines where the stream is not a terminal.
      stream: standard output by default.
    """

    def __init__(self, title: str, iterations: int, log_every: float = 10.0, stream: io.TextIOBase | None = None):
        self._title = title
        self._iterations = iterations
        self._log_every = log_every
        self._stream: Any = stream if stream is not None else sys.stdout
        self._live = self._stream.isatty() and os.environ.get("TERM", "") != "dumb"
        self._drawn = 0
        self._next = 0.0

    def update(self, iteration: int, env_steps: int, metrics: Metrics, elapsed: float, left: float) -> None:
        """Show the state of training; `elapsed` and `left` in seconds, `left` NaN while unknown."""
        last = iteration >= self._iterations
        if time.monotonic() < self._next and not last:
            return
        self._next = time.monotonic() + (0.1 if self._live else self._log_every)
        facts = _facts(metrics)
        rate = metrics.get("time/env_steps_per_second", math.nan)
        clock = f"{_duration(elapsed)} elapsed, {_duration(left)} left"
        work = f"{_count(env_steps)} env steps, {_count(rate)}/s"
        if not self._live:
            self._stream.write(f"{iteration}/{self._iterations}  {work}  {clock}  {'  '.join(facts)}\n")
            self._stream.flush()
            return
        width = shutil.get_terminal_size().columns - 1
        part = min(iteration / self._iterations, 1.0)
        done = round(part * 30)
        losses = [f for f in facts if f.startswith("loss/")]
        lines = [
            f"{self._title}  {'━' * done}{'╌' * (30 - done)}  {iteration}/{self._iterations}  {part:.0%}",
            f"  {work}  {clock}",
            "  " + "  ".join(f for f in facts if f not in losses),
            "  " + "  ".join(losses),
        ]
        self._erase()
        self._stream.write("".join(line[:width] + "\n" for line in lines))
        self._stream.flush()
        self._drawn = len(lines)

    def message(self, text: str) -> None:
        """Print a line above the progress block."""
        self._erase()
        self._stream.write(text + "\n")
        self._stream.flush()
        self._next = 0.0 if self._live else self._next

    def _erase(self) -> None:
        if self._drawn:
            self._stream.write(f"\x1b[{self._drawn}F\x1b[J")
            self._drawn = 0

    def close(self) -> None:
        """Leave the last block where it is."""
        self._drawn = 0


def _facts(metrics: Metrics) -> list[str]:
    named = (
        ("return", "episode/return", ".4g"),
        ("length", "episode/length", ".4g"),
        ("falls", "episode/fall_rate", ".1%"),
    )
    facts = [
        f"{label} {metrics[name]:{form}}" if math.isfinite(metrics[name]) else f"{label} -"
        for label, name, form in named
        if name in metrics
    ]
    return facts + [f"{name} {value:.3g}" for name, value in metrics.items() if name.startswith("loss/")]


def _count(number: float) -> str:
    if not math.isfinite(number):
        return "-"
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.3g}"


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's content in one step: a reader, or a kill, sees the old or the new, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write figures as JSON, all at once or not at all; null stands for infinity and NaN, which JSON has not."""
    write_atomically(path, json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Panel(NamedTuple):
    """One picture of `learning_curves.png`.

    Attributes:
      title: what it shows, with its unit.
      names: the metrics. Without `labels` these are one, or two with a scale each, since they may differ by orders of
        magnitude.
      labels: where all have one scale, how each is called.
      limits: of that scale or of the first metric's; by default where the curves lie.
      empty: why there may be no number yet.
      legend: whether labels are told in this picture.
    """

    title: str
    names: Sequence[str]
    labels: Sequence[str] = ()
    limits: tuple[float, float] | None = None
    empty: str = "no number yet"
    legend: bool = True


def plot_learning_curves(run_dir: Path) -> Path | None:
    """Draw `learning_curves.png` from a run's metrics, over environment steps; None if there is nothing yet.

    Each curve is faint as it was measured and strong as a moving average. Panels of which the
    run has no metric are left out; one whose metrics have had no value so far says why.
    """
    records = read_metrics(run_dir / METRICS_FILE)
    if not records:
        return None
    names = list(dict.fromkeys(name for record in records for name in record if "/" in name))
    steps = [record["env_steps"] for record in records]
    panels = [panel for panel in learning_panels(names) if panel.names]
    curves = [[column(records, name) for name in panel.names] for panel in panels]
    return _picture(run_dir / CURVES_FILE, panels, steps, curves)


def plot_members(run_dir: Path, members: Sequence[str]) -> Path | None:
    """Draw `members.png` of a population: the members' curves in one panel a metric; None if there is nothing yet.

    The coefficients that members differ in, or that change, have panels, too.
    """
    files = [run_dir / name / METRICS_FILE for name in members]
    records = [read_metrics(file) if file.exists() else [] for file in files]
    count = min(map(len, records), default=0)
    if not count:
        return None
    records = [one[:count] for one in records]
    steps = [record["env_steps"] for record in records[0]]
    names = list(dict.fromkeys(name for record in records[0] for name in record if "/" in name))
    shown = [name for panel in learning_panels(names) for name in panel.names if name.startswith(_OF_MEMBERS)]
    shown += [name for name in names if name.startswith("population/") and name != "population/parent"]
    panels, curves = list[Panel](), list[list[list[float]]]()
    for name in shown:
        columns = [column(one, name) for one in records]
        known = {value for column in columns for value in column if math.isfinite(value)}
        if len(known) > 1:
            title = name.removeprefix("population/").replace("_", " ")
            panels.append(Panel(title, [name] * len(members), members, legend=not panels))
            curves.append(columns)
    return _picture(run_dir / MEMBERS_FILE, panels, steps, curves) if panels else None


_OF_MEMBERS = ("episode/", "env/", "loss/", "policy/")


def _picture(
    path: Path, panels: Sequence["Panel"], steps: Sequence[int], curves: Sequence[Sequence[Sequence[float]]]
) -> Path:
    # A Figure made without pyplot draws with Agg: it needs no display and no global state.
    from matplotlib.figure import Figure

    columns = min(4 if len(panels) > 9 else 3, max(1, len(panels)))
    rows = max(1, math.ceil(len(panels) / columns))
    figure = Figure(figsize=(4.6 * columns, 3.2 * rows), layout="constrained", dpi=120)
    for place, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, place)
        axes.set_title(panel.title, fontsize=11, loc="left")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("environment steps", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.ticklabel_format(axis="x", style="sci", scilimits=(-3, 4))
        _draw(axes, panel, steps, curves[place - 1])
    figure.suptitle(path.parent.name, fontsize=9, color="0.4")
    temporary = path.with_suffix(".tmp")
    figure.savefig(temporary, format="png")
    temporary.replace(path)
    return path


def _draw(axes: Any, panel: Panel, steps: Sequence[int], curves: Sequence[Sequence[float]]) -> None:
    """The curves of one panel: on one scale with a legend, or on two."""
    if not any(math.isfinite(value) for curve in curves for value in curve):
        axes.text(0.5, 0.5, panel.empty, transform=axes.transAxes, ha="center", va="center", color="0.45", fontsize=10)
        axes.set_xlim(0, max(steps[-1], 1))
        axes.set_yticks([])
        return
    for number, (name, values) in enumerate(zip(panel.names, curves, strict=True)):
        side = axes if panel.labels or not number else axes.twinx()
        side.tick_params(labelsize=8)
        label = panel.labels[number] if panel.labels else None
        side.plot(steps, values, color=f"C{number}", alpha=0.12 if panel.labels else 0.25, linewidth=0.8)
        side.plot(steps, _smooth(values), color=f"C{number}", linewidth=1.8, label=label)
        if panel.labels:
            continue
        limits = panel.limits if panel.limits is not None and not number else _limits(values)
        side.set_ylim(*limits)
        if len(curves) > 1:
            unknown = not any(map(math.isfinite, values))
            text = f"{name} ({panel.empty})" if unknown else name
            side.set_ylabel(text, color=f"C{number}", fontsize=8)
    if panel.labels:
        low, high = panel.limits or _limits([value for curve in curves for value in curve])
        if panel.limits is None and panel.legend and low is not None and high is not None:
            high += 0.3 * (high - low)  # room for the legend
        axes.set_ylim(low, high)
        place = "best" if panel.limits else "upper center"
        if not panel.legend:
            return
        axes.legend(fontsize=7, ncols=3 if len(curves) > 4 else 1, framealpha=0.6, loc=place)


def learning_panels(names: Sequence[str]) -> list[Panel]:
    """What to draw of metrics with these names; a panel without `names` has nothing to show."""

    def last(*words: str) -> list[str]:
        return [name for word in words for name in names if name.split("/")[-1] in word.split()][:2]

    def given(*wanted: str) -> list[str]:
        return [name for name in wanted if name in names]

    def group(title: str, prefix: str, limits: tuple[float, float] | None = None, of: str = "") -> Panel:
        """All metrics of a group that end in `of`, but for landings, on one scale."""
        found = [n for n in names if n.startswith(prefix) and n.endswith(of) and n not in landings]
        labels = [name.removeprefix(prefix).removesuffix(of).replace("_", " ") for name in found]
        return Panel(title, found, labels, limits)

    landings = ("contact/landings_per_second", "contact/air_time")
    spread = last("entropy", "kl approx_kl")
    losses = [name for name in names if name.startswith("loss/") and name not in spread]
    losses.sort(key=lambda name: name.split("/")[-1] not in ("policy", "value", "critic"))
    share = (-0.03, 1.03)
    ended = "no episode has ended yet"
    return [
        Panel("return", given("episode/return"), empty=ended),
        Panel("episode length, steps", given("episode/length"), empty=ended),
        Panel("share of episodes with a fall", given("episode/fall_rate"), limits=share, empty=ended),
        Panel("falls per minute of a robot's time", given("episode/falls_per_minute")),
        Panel("errors of velocity (m/s) and yaw rate (rad/s)", given("env/velocity_error", "env/yaw_rate_error")),
        Panel("curriculum level", given("env/curriculum_level")),
        group("share of robots at each stage", "curriculum_stage/", share),
        group("torque by group of joints, Nm", "torque_group/"),
        Panel("power (W), cost of transport", given("env/power", "env/cost_of_transport"), empty="no robot moved"),
        group("feet on the ground, share of time", "contact/", share),
        Panel("landings (1/s) and air time (s)", given(*landings), empty="no foot has landed yet"),
        Panel("share of torques and of actions at a limit", given("env/torque_saturation", "policy/saturation")),
        Panel("losses", losses[:2]),
        Panel("entropy and KL", spread),
        Panel("environment steps per second", given("time/env_steps_per_second")),
        group("share of wall time", "time/", share, of="_share"),
    ]


def _limits(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Where a curve lies but for its most extreme hundredth: the first updates may be off by orders of magnitude."""
    finite = sorted(value for value in values if math.isfinite(value))
    cut = len(finite) // 100
    if not finite or finite[cut] == finite[-1 - cut]:
        return None, None
    low, high = finite[cut], finite[-1 - cut]
    return low - 0.06 * (high - low), high + 0.06 * (high - low)


def _smooth(values: Sequence[float]) -> Sequence[float]:
    """The mean over a centred window of a thirtieth of the run, which shrinks at the ends and skips gaps."""
    count = len(values)
    reach = count // 60
    known = np.isfinite(values)
    kept = np.where(known, values, 0.0)
    smooth = np.full(count, math.nan)
    for i in range(count):
        side = min(reach, i, count - 1 - i)
        window = slice(i - side, i + side + 1)
        if n := int(known[window].sum()):
            smooth[i] = kept[window].sum() / n
    return smooth.tolist()
