import io
import json
import math
import os

import pytest

from rlcore import metrics
from rlcore.errors import InputError
from rlcore.metrics import (
    CURVES_FILE,
    METRICS_FILE,
    Console,
    MetricsFile,
    Panel,
    TensorBoard,
    _draw,
    _smooth,
    learning_panels,
    plot_learning_curves,
    read_metrics,
    write_atomically,
)


def write(path, iterations, after=0):
    file = MetricsFile(path, after)
    for i in iterations:
        file.write(i, 10 * i, {"loss/policy": 1.0 / i, "episode/return": math.nan if i == 1 else float(i)})
    file.close()


def test_a_line_is_readable_as_soon_as_it_is_written(tmp_path):
    file = MetricsFile(tmp_path / METRICS_FILE)
    file.write(1, 8, {"a/b": 0.1, "a/nan": math.nan, "a/inf": -math.inf})
    line = (tmp_path / METRICS_FILE).read_text()
    # 0.1 comes back as the same double: JSON carries the shortest digits that do.
    expected = {"iteration": 1, "env_steps": 8, "a/b": 0.1, "a/nan": None, "a/inf": None}
    assert json.loads(line, parse_constant=pytest.fail) == expected
    file.close()


def test_resuming_drops_later_lines_and_a_torn_one(tmp_path):
    path = tmp_path / METRICS_FILE
    write(path, [1, 2, 3, 4])
    with path.open("a") as file:
        file.write('{"iteration": 5, "env_st')
    assert [r["iteration"] for r in read_metrics(path)] == [1, 2, 3, 4]
    resumed = MetricsFile(path, after=2)
    assert resumed.last is not None
    assert resumed.last["iteration"] == 2
    resumed.close()
    write(path, [3], after=2)
    straight = tmp_path / "straight"
    write(straight, [1, 2, 3])
    assert path.read_text() == straight.read_text()


def test_replacing_a_file_fails_whole(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_tensorboard_events_can_be_read_back(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    for after, iterations in ((0, [1, 2, 3]), (2, [3])):
        board = TensorBoard(tmp_path / str(after), after)
        for i in iterations:
            board.write(i, {"loss/policy": i / 2})
        board.close()

    def events(directory):
        data = next(directory.iterdir()).read_bytes()
        # A record is its length (8 bytes), a checksum (4), the message, a checksum (4).
        while data:
            size = int.from_bytes(data[:8], "little")
            yield Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]

    first = list(events(tmp_path / "0"))
    assert [(e.step, e.summary.value[0].tag, e.summary.value[0].simple_value) for e in first[1:]] == [
        (1, "loss/policy", 0.5),
        (2, "loss/policy", 1.0),
        (3, "loss/policy", 1.5),
    ]
    second = list(events(tmp_path / "2"))
    assert second[1].step == 3
    assert second[1].session_log.status == second[1].session_log.START


METRICS = {
    "time/env_steps_per_second": 123456.0,
    "episode/return": 12.5,
    "episode/length": 800.0,
    "episode/fall_rate": 0.25,
    "loss/policy": -0.01,
}


def test_console_writes_a_line_now_and_then_and_at_the_end():
    stream = io.StringIO()
    console = Console("walk", 100, log_every=3600.0, stream=stream)
    for i in range(1, 101):
        console.update(i, i * 1000, METRICS, elapsed=i, left=100.0 - i)
    first, last = stream.getvalue().splitlines()
    assert first.startswith("1/100  1k env steps, 123k/s  0:01 elapsed, 1:39 left")
    assert last == (
        "100/100  100k env steps, 123k/s  1:40 elapsed, 0:00 left  return 12.5  length 800  falls 25.0%  "
        "loss/policy -0.01"
    )
    assert "\x1b" not in stream.getvalue()


def test_console_redraws_a_block_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    stream = Terminal()
    console = Console("walk", 2, stream=stream)
    console.update(1, 1000, METRICS | {"episode/return": math.nan}, elapsed=1.0, left=math.nan)
    console.message("note: something")
    console.update(2, 2000, METRICS, elapsed=3725.0, left=0.0)
    console.close()
    shown = stream.getvalue()
    assert shown.count("\x1b[4F\x1b[J") == 1
    assert "return -" in shown
    assert "1:02:05 elapsed" in shown
    assert max(len(line) for line in shown.replace("\x1b[4F\x1b[J", "").splitlines()) < 60


def test_learning_curves_skip_what_is_absent(tmp_path):
    assert plot_learning_curves_of(tmp_path / "few", ["loss/policy"]) < plot_learning_curves_of(
        tmp_path / "many",
        [
            "episode/return",
            "episode/length",
            "episode/fall_rate",
            "loss/policy",
            "loss/value",
            "policy/entropy",
        ],
    )


def plot_learning_curves_of(run_dir, names):
    """The picture's area in pixels, from its header."""
    run_dir.mkdir()
    file = MetricsFile(run_dir / METRICS_FILE)
    for i in range(1, 50):
        file.write(i, i * 4096, {name: math.nan if i < 3 else math.sin(i / 9) for name in names})
    file.close()
    path = plot_learning_curves(run_dir)
    assert path is not None
    assert path == run_dir / CURVES_FILE
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(header[16:20]) * int.from_bytes(header[20:24])


def test_no_curves_without_metrics(tmp_path):
    (tmp_path / METRICS_FILE).write_text("")
    assert plot_learning_curves(tmp_path) is None


def test_panels_by_the_names_that_a_run_has():
    names = [
        "episode/return", "torque/left_knee", "torque_group/knee", "torque_group/all", "contact/none", "contact/both",
        "contact/landings_per_second", "env/power", "time/iteration_seconds", "time/physics_share",
        "time/learning_share", "curriculum_stage/walk", "curriculum_stage/vary_speed",
    ]  # fmt: skip
    shown = {panel.title: panel for panel in learning_panels(names) if panel.names}
    assert shown["torque by group of joints, Nm"].names == ["torque_group/knee", "torque_group/all"]
    assert shown["feet on the ground, share of time"].names == ["contact/none", "contact/both"]
    assert shown["landings (1/s) and air time (s)"].names == ["contact/landings_per_second"]
    assert shown["power (W), cost of transport"].names == ["env/power"]
    assert shown["share of wall time"].labels == ["physics", "learning"]
    assert shown["share of robots at each stage"].labels == ["walk", "vary speed"]
    assert len(shown) == 7 and "losses" not in shown
    assert not [panel for panel in learning_panels([]) if panel.names]


def drawn(panel, curves):
    """The axes of one panel, the second scale last, drawn over 10, 20, ... steps."""
    from matplotlib.figure import Figure

    figure = Figure()
    _draw(figure.add_subplot(), panel, [10 * (i + 1) for i in range(len(curves[0]))], curves)
    return figure.axes


def test_a_panel_without_a_number_says_why():
    nothing = [math.nan] * 3
    (axes,) = drawn(Panel("return", ["episode/return"], empty="no episode has ended yet"), [nothing])
    assert [text.get_text() for text in axes.texts] == ["no episode has ended yet"] and not axes.lines
    first, second = drawn(Panel("both", ["a/b", "c/d"], empty="no robot moved"), [[1.0, 2.0, 4.0], nothing])
    assert not first.texts and first.get_ylabel() == "a/b" and second.get_ylabel() == "c/d (no robot moved)"


def test_one_scale_has_a_legend_and_two_have_labels():
    curves = [[1.0, 2.0, 3.0], [10.0, math.nan, 30.0]]
    (axes,) = drawn(Panel("torque", ["t/knee", "t/hip"], ["knee", "hip"]), curves)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["knee", "hip"]
    low, high = axes.get_ylim()
    assert low < 1.0 and high > 30.0
    (axes,) = drawn(Panel("share", ["t/a", "t/b"], ["a", "b"], (0.0, 1.0)), [[0.2, 0.3], [0.4, 0.5]])
    assert axes.get_ylim() == (0.0, 1.0)
    assert [axes.get_ylabel() for axes in drawn(Panel("two", ["t/a", "t/b"]), curves)] == ["t/a", "t/b"]


def test_moving_averages_skip_gaps_and_shrink_at_the_ends():
    assert _smooth([1.0, math.nan, 3.0])[::2] == [1.0, 3.0]
    values = [float(i * i) for i in range(121)]  # a window of two on either side
    values[60] = math.nan
    smooth = _smooth(values)
    assert smooth[:3] == pytest.approx([0.0, (0 + 1 + 4) / 3, (0 + 1 + 4 + 9 + 16) / 5])
    assert smooth[60] == pytest.approx((58**2 + 59**2 + 61**2 + 62**2) / 4)
    assert smooth[-1] == 120**2 and all(map(math.isnan, _smooth([math.nan] * 3)))


def test_members_are_drawn_side_by_side_as_far_as_all_have_come(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        metrics, "_draw", lambda axes, panel, steps, curves: drawn.update({panel.title: (panel, curves)})
    )
    assert metrics.plot_members(tmp_path, ["a", "b"]) is None
    for name, count in (("a", 3), ("b", 2)):
        (tmp_path / name).mkdir()
        file = MetricsFile(tmp_path / name / METRICS_FILE)
        for i in range(count):
            values = {"episode/return": float(i), "loss/value": 1.0, "population/clip": 0.1 if name == "a" else 0.2}
            file.write(i + 1, 10 * i, {**values, "population/parent": 0.0})
        file.close()
    path = metrics.plot_members(tmp_path, ["a", "b"])
    assert path is not None and path.read_bytes().startswith(b"\x89PNG")
    assert list(drawn) == ["episode/return", "clip"]  # what is the same for all has no picture, nor have parents
    assert drawn["clip"][1] == [[0.1, 0.1], [0.2, 0.2]]
    assert [panel.legend for panel, _ in drawn.values()] == [True, False]


def test_a_metric_that_there_is_not_is_told_with_those_near_it():
    metrics.check_metric("score", "loss/value", ["loss/value"], "--score")
    with pytest.raises(InputError, match=r"got 'value'; did you mean loss/value\? \(--score\)"):
        metrics.check_metric("score", "value", ["loss/value", "episode/return"], "--score")
    with pytest.raises(InputError, match=r"got 'x': there are a/b, c/d \(--score\)"):
        metrics.check_metric("score", "x", ["c/d", "a/b"], "--score")
