"""Films: pictures of a small model, side by side, written and read back."""

import os
import pathlib
import signal
import subprocess
import sys
from typing import Any

import mujoco
import numpy as np
import pytest
import torch

from rlcore.errors import InputError
from rlcore.video import draw_text, render_frames, tile, write_video

ROOT = pathlib.Path(__file__).parents[2]
XML = """
<mujoco>
  <worldbody>
    <light pos="0 0 3"/>
    <camera name="track" pos="0 -2 0" xyaxes="1 0 0 0 0 1"/>
    <body><joint type="slide" axis="1 0 0"/><geom size="0.3" rgba="1 0.2 0.1 1"/></body>
  </worldbody>
</mujoco>
"""


@pytest.fixture
def model():
    return mujoco.MjModel.from_xml_string(XML)


@pytest.fixture
def frames(model):
    return render_frames(model, np.linspace(-0.5, 0.5, 6)[:, None], width=64, height=48)


def red_column(picture):
    """Mean column of the ball's pixels."""
    red = (picture[..., 0].astype(int) - picture[..., 2]) > 40
    return np.nonzero(red)[1].mean()


def test_rendered_pictures_show_the_ball_moving_right(frames):
    assert frames.shape == (6, 48, 64, 3) and frames.dtype == np.uint8
    columns = [red_column(frame) for frame in frames]
    assert np.all(np.diff(columns) > 1)
    # The camera looks along +y at the origin, so the path is symmetric about the middle column, 31.5.
    assert np.mean(columns) == pytest.approx(31.5, abs=1)


def test_a_tensor_renders_as_its_array_does_and_the_model_is_not_written_to(model):
    qpos = torch.linspace(-0.5, 0.5, 3)[:, None]
    width = model.vis.global_.offwidth + 2
    wide = render_frames(model, qpos[:1], width=width, height=16)
    assert wide.shape == (1, 16, width, 3)
    assert model.vis.global_.offwidth == width - 2
    a = render_frames(model, qpos, width=32, height=16)
    b = render_frames(model, qpos.numpy(), width=32, height=16, camera=0)
    np.testing.assert_array_equal(a, b)


def test_texts_change_only_their_corners_and_progress_counts(model):
    qpos = np.zeros((2, 1))
    calls = []
    plain = render_frames(model, qpos, width=160, height=120)
    text = render_frames(
        model,
        qpos,
        width=160,
        height=120,
        overlay=[["step 0", "0.5 m/s"], ""],
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(1, 2), (2, 2)]
    np.testing.assert_array_equal(plain[1], text[1])
    changed = np.nonzero((plain[0] != text[0]).any(axis=-1))
    assert len(changed[0]) > 50 and changed[0].max() < 60 and changed[1].max() < 120
    assert text[0][:60, :120].max() > 200
    captioned = render_frames(model, qpos, width=160, height=120, caption=[["told 0.5", "does 0.4"], ""])
    np.testing.assert_array_equal(plain[1], captioned[1])
    changed = np.nonzero((plain[0] != captioned[0]).any(axis=-1))
    assert len(changed[0]) > 50 and changed[0].min() > 60 and changed[0].max() < 120 and changed[1].max() < 120
    # The text is drawn on a copy.
    picture = np.zeros((40, 60, 3), np.uint8)
    draw_text(picture, "x")
    assert picture.max() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"camera": "nowhere"}, "track"),
        ({"camera": 3}, "camera"),
        ({"qpos": np.zeros((2, 4))}, "qpos"),
        ({"overlay": ["one"]}, "overlay"),
        ({"caption": ["one"]}, "caption"),
        ({"width": 0}, "width"),
    ],
)
def test_wrong_arguments_are_refused_by_name(model, arguments, message):
    with pytest.raises(InputError, match=message):
        render_frames(model, **({"qpos": np.zeros((2, 1))} | arguments))


def test_tile_places_films_row_by_row_and_holds_the_last_picture():
    films = [np.full((length, 4, 6, 3), value, np.uint8) for length, value in ((2, 50), (3, 100), (1, 200))]
    tiled = tile(films, 2, gap=1)
    assert tiled.shape == (3, 9, 13, 3)
    for time in range(3):
        assert (tiled[time, :4, :6] == 50).all()
        assert (tiled[time, :4, 7:] == 100).all()
        assert (tiled[time, 5:, :6] == 200).all()
    assert (tiled[:, 5:, 7:] == 24).all() and (tiled[:, 4] == 24).all()
    # One film in one column is itself.
    np.testing.assert_array_equal(tile(films[:1], 5), films[0])
    with pytest.raises(InputError, match="film 1"):
        tile([films[0], films[1][:, :2]], 2)
    with pytest.raises(InputError, match="columns"):
        tile(films, 0)
    with pytest.raises(InputError, match="none"):
        tile([], 1)


def test_mp4_reads_back(tmp_path, frames):
    import imageio.v2 as imageio

    path = tmp_path / "new" / "film.mp4"
    # An odd size, which yuv420p cannot hold, loses its last row and column.
    assert write_video(path, frames[:, :47, :63], fps=25) == path
    reader: Any
    with imageio.get_reader(path) as reader:
        metadata = reader.get_meta_data()
        back = np.stack(list(reader.iter_data()))
    assert back.shape == (6, 46, 62, 3)
    assert metadata["fps"] == pytest.approx(25) and metadata["codec"] == "h264"
    assert metadata["pix_fmt"].startswith("yuv420p")
    # Compression loses detail, not the picture: the ball is where it was, in the same order.
    assert np.abs([red_column(a) - red_column(b) for a, b in zip(back, frames, strict=True)]).max() < 2
    assert [entry.name for entry in path.parent.iterdir()] == ["film.mp4"]


def test_gif_reads_back_at_its_speed(tmp_path, frames):
    from PIL import Image

    path = write_video(tmp_path / "film.GIF", frames, fps=30)
    image: Any
    with Image.open(path) as image:
        assert image.n_frames == 6 and image.size == (64, 48)
        durations, pictures = [], []
        for index in range(image.n_frames):
            image.seek(index)
            durations.append(image.info["duration"])
            pictures.append(np.asarray(image.convert("RGB")))
    # 6 pictures at 30 a second take 0.2 s; each is 30 or 40 ms, as the format counts tens of milliseconds.
    assert sum(durations) == 200 and set(durations) == {30, 40}
    assert np.abs([red_column(a) - red_column(b) for a, b in zip(pictures, frames, strict=True)]).max() < 2


@pytest.mark.parametrize(
    ("name", "fps", "count", "message"),
    [
        ("film.avi", 25, 2, ".avi"),
        ("film", 25, 2, "film"),
        ("film.mp4", 0, 2, "fps"),
        ("film.gif", 60, 2, "fps"),
        ("film.mp4", 25, 0, "none"),
    ],
)
def test_a_film_that_cannot_be_written_is_refused(tmp_path, frames, name, fps, count, message):
    with pytest.raises(InputError, match=message):
        write_video(tmp_path / name, frames[:count], fps)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_an_older_film_survives_a_failure(tmp_path, frames, monkeypatch, suffix):
    path = tmp_path / f"film{suffix}"
    path.write_bytes(b"older")
    with pytest.raises(InputError, match="one size"):
        write_video(path, [frames[0], frames[1][:20]], 25)
    assert path.read_bytes() == b"older"

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_video(path, frames, 25)
    assert path.read_bytes() == b"older" and [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("last", "told"),
    [
        ("exit 3", "ended with status 3: no room for a film"),
        ("kill -9 $$", "ended by signal 9: no room for a film"),
    ],
)
def test_an_encoder_that_fails_says_why_and_leaves_nothing(tmp_path, frames, monkeypatch, last, told):
    encoder = tmp_path / "encoder"
    encoder.write_text(f"#!/bin/sh\necho 'no room' >&2\necho 'for a film' >&2\n{last}\n")
    encoder.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(encoder))
    with pytest.raises(OSError, match=told):
        write_video(tmp_path / "films" / "film.mp4", np.repeat(frames, 50, axis=0), 25)
    assert list((tmp_path / "films").iterdir()) == []


def test_an_interrupted_film_ends_its_encoder(tmp_path, frames, monkeypatch):
    encoder = tmp_path / "encoder"
    encoder.write_text("#!/bin/sh\nexec sleep 600\n")
    encoder.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(encoder))
    started = []

    class Interrupted(subprocess.Popen[bytes]):
        def wait(self, timeout=None):
            started.append(self)
            if len(started) == 1:
                assert os.getsid(self.pid) != os.getsid(0)  # or Ctrl-C would reach it as well
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_video(tmp_path / "films" / "film.mp4", frames, 25)
    assert started[0].returncode == -signal.SIGKILL
    assert list((tmp_path / "films").iterdir()) == []


def test_without_an_encoder_an_mp4_is_refused(tmp_path, frames, monkeypatch):
    def missing():
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", missing)
    with pytest.raises(InputError, match=r"no ffmpeg for an .mp4.*IMAGEIO_FFMPEG_EXE, or write a .gif"):
        write_video(tmp_path / "film.mp4", frames, 25)


def test_no_python_runs_in_a_fork_of_a_process_with_threads(tmp_path):
    code = f"""
import os
import numpy as np
import rlcore.video
forks = []
os.register_at_fork(before=lambda: forks.append(1))
rlcore.video.write_video({str(tmp_path / "film.mp4")!r}, np.zeros((3, 16, 16, 3), np.uint8), 25)
assert not forks
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "film.mp4").stat().st_size > 0


def run_python(code, **environment):
    clean = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY")}
    clean = {k: v for k, v in clean.items() if k != "PYOPENGL_PLATFORM"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=clean | environment, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="backends without a display: Linux only")
def test_without_a_display_a_backend_is_chosen_after_mujoco_was_imported():
    code = f"""
import mujoco, numpy as np
from rlcore.video import render_frames
model = mujoco.MjModel.from_xml_string({XML!r})
print(render_frames(model, np.zeros((1, 1)), width=16, height=16).max())
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


def test_no_backend_is_an_input_error_and_importing_is_cheap():
    code = f"""
import sys
import rlcore.video
assert not {{"mujoco", "imageio", "imageio_ffmpeg", "PIL", "torch"}} & set(sys.modules), "heavy import"
import mujoco, numpy as np
from rlcore.errors import InputError
model = mujoco.MjModel.from_xml_string({XML!r})
try:
    rlcore.video.render_frames(model, np.zeros((1, 1)), width=16, height=16)
except InputError as error:
    print(error)
"""
    done = run_python(code, MUJOCO_GL="off")
    assert done.returncode == 0, done.stderr
    assert "MUJOCO_GL='off'" in done.stdout and "egl" in done.stdout
