"""Pictures and films of a run: render joint positions, put robots side by side, write .mp4 and .gif.

A film is drawn from recorded generalized positions, so filming never touches a simulation, and a film can be
made long after its run. Nothing here steps physics, and nothing is kept between calls.

`mujoco`, `imageio_ffmpeg` and `PIL` are imported by the functions that use them, so `import rlcore.video` is cheap.
"""

from __future__ import annotations

import copy
import importlib
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from rlcore.errors import InputError

if TYPE_CHECKING:
    import mujoco

SUFFIXES = (".mp4", ".gif")
# A GIF counts time in hundredths of a second, and browsers slow down frames shorter than two of them.
GIF_MAX_FPS = 50
# Linux backends that need no display: EGL runs on the GPU or in Mesa's software, OSMesa is software only.
HEADLESS_BACKENDS = ("egl", "osmesa")


def render_frames(
    model: mujoco.MjModel,
    qpos: Any,
    *,
    camera: str | int = "track",
    width: int = 640,
    height: int = 480,
    overlay: Sequence[str | Sequence[str]] | None = None,
    caption: Sequence[str | Sequence[str]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Draw one picture for each recorded configuration of one robot.

    Args:
      model: the compiled model; it is not written to.
      qpos: `[T, nq]` generalized positions (metres, radians, quaternions w x y z), an array or a tensor.
      camera: a camera's name, its id, or -1 for the free camera.
      width: of a picture, pixels.
      height: of a picture, pixels.
      overlay: for each of the T pictures the text in its upper left corner: a string or a list of lines.
      caption: likewise the text in its lower left corner.
      progress: called as `progress(done, T)` after each picture.

    Returns:
      `[T, height, width, 3]` RGB pictures, uint8.

    Raises:
      InputError: the camera does not exist, a shape is wrong, or no OpenGL backend works.
    """
    qpos = _as_numpy(qpos).astype(np.float64)
    if qpos.ndim != 2 or qpos.shape[1] != model.nq:
        raise InputError(f"qpos must have shape [T, {model.nq}] for this model, got {list(qpos.shape)}")
    for name, texts in (("overlay", overlay), ("caption", caption)):
        if texts is not None and len(texts) != len(qpos):
            raise InputError(f"{name} must have one entry a picture ({len(qpos)}), got {len(texts)}")
    if width < 1 or height < 1:
        raise InputError(f"width and height must be at least 1 pixel, got {width} x {height}")
    camera_id = _camera_id(model, camera)
    if width > model.vis.global_.offwidth or height > model.vis.global_.offheight:
        # The off-screen buffer's size is part of the model; the caller's model stays as it is.
        model = copy.copy(model)
        model.vis.global_.offwidth = max(width, model.vis.global_.offwidth)
        model.vis.global_.offheight = max(height, model.vis.global_.offheight)

    import mujoco

    data = mujoco.MjData(model)
    frames = np.empty((len(qpos), height, width, 3), np.uint8)
    renderer = _make_renderer(model, width, height)
    try:
        for index, configuration in enumerate(qpos):
            data.qpos[:] = configuration
            mujoco.mj_kinematics(model, data)
            # Tracking cameras and lights follow the centre of mass, which comPos computes.
            mujoco.mj_comPos(model, data)
            mujoco.mj_camlight(model, data)
            renderer.update_scene(data, camera=camera_id)
            renderer.render(out=frames[index])
            if overlay is not None:
                frames[index] = draw_text(frames[index], overlay[index])
            if caption is not None:
                frames[index] = draw_text(frames[index], caption[index], bottom=True)
            if progress is not None:
                progress(index + 1, len(qpos))
    finally:
        renderer.close()
    return frames


def draw_text(frame: np.ndarray, text: str | Sequence[str], *, bottom: bool = False) -> np.ndarray:
    """Return a copy of one picture `[height, width, 3]` with lines of text on a dark box, upper or lower left."""
    from PIL import Image, ImageDraw, ImageFont

    lines = text.split("\n") if isinstance(text, str) else list(text)
    if not any(lines):
        return frame.copy()
    height, width = frame.shape[:2]
    size = max(10, min(height // 22, width // 30))
    font = ImageFont.load_default(size)
    line_height = size + size // 3
    margin = size // 2
    box_width = max(int(font.getlength(line)) for line in lines) + 2 * margin
    box_height = line_height * len(lines) + margin
    picture = Image.fromarray(frame).convert("RGBA")
    layer = Image.new("RGBA", picture.size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(layer)
    left = margin // 2
    top = height - 1 - left - box_height if bottom else left
    draw.rounded_rectangle((left, top, left + box_width, top + box_height), margin, fill=(16, 20, 26, 165))
    for row, line in enumerate(lines):
        draw.text((left + margin, top + margin // 2 + row * line_height), line, font=font, fill="white")
    return np.asarray(Image.alpha_composite(picture, layer).convert("RGB"))


def tile(frames_list: Sequence[Any], columns: int, *, gap: int = 2) -> np.ndarray:
    """Put several films side by side, row by row, into one.

    A film that ends earlier holds its last picture: an episode that ended stays visible. Cells without a film
    are dark.

    Args:
      frames_list: N films, each `[T_i, height, width, 3]` uint8, all of one height and width.
      columns: films in a row.
      gap: pixels between neighbours.

    Returns:
      `[max T_i, rows * height + (rows - 1) * gap, columns * width + (columns - 1) * gap, 3]`, uint8.
    """
    films = [_as_numpy(film) for film in frames_list]
    if not films:
        raise InputError("frames_list must hold at least one film, got none")
    if columns < 1:
        raise InputError(f"columns must be at least 1, got {columns}")
    if gap < 0:
        raise InputError(f"gap must be at least 0 pixels, got {gap}")
    for index, film in enumerate(films):
        if film.ndim != 4 or film.shape[0] < 1 or film.shape[3] != 3:
            raise InputError(f"film {index} must be [T >= 1, height, width, 3], got {list(film.shape)}")
        if film.shape[1:] != films[0].shape[1:]:
            raise InputError(
                f"all films must have one picture size: film 0 is {list(films[0].shape[1:])}, "
                f"film {index} is {list(film.shape[1:])}"
            )
    height, width = films[0].shape[1:3]
    columns = min(columns, len(films))
    rows = -(-len(films) // columns)
    duration = max(len(film) for film in films)
    shape = (duration, rows * (height + gap) - gap, columns * (width + gap) - gap, 3)
    tiled = np.full(shape, 24, np.uint8)
    for index, film in enumerate(films):
        top = (index // columns) * (height + gap)
        left = (index % columns) * (width + gap)
        tiled[: len(film), top : top + height, left : left + width] = film
        tiled[len(film) :, top : top + height, left : left + width] = film[-1]
    return tiled


def write_video(path: str | os.PathLike[str], frames: Iterable[Any], fps: float) -> pathlib.Path:
    """Write pictures to a film whose format the suffix names: `.mp4` (H.264, yuv420p) or `.gif`.

    The film is written under a temporary name beside `path` and renamed when it is whole, so an older film of
    that name is either still there or replaced, never half-written. Folders on the way are made.

    Args:
      path: where to, ending in .mp4 or .gif.
      frames: at least one picture `[height, width, 3]` uint8, all of one size. An odd height or width loses
        its last row or column in an .mp4, because yuv420p stores colour for squares of 2 x 2 pixels.
      fps: pictures a second; at most 50 for a .gif.

    Returns:
      The path.

    Raises:
      InputError: the suffix is another, there is no picture, sizes differ, fps is out of range, or there is no ffmpeg.
      OSError: the film cannot be written, or ffmpeg failed.
    """
    path = pathlib.Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"video path must end in {' or '.join(SUFFIXES)}, got {str(path)!r}")
    if not fps > 0:
        raise InputError(f"fps must be above 0, got {fps}")
    if suffix == ".gif" and fps > GIF_MAX_FPS:
        raise InputError(f"fps must be at most {GIF_MAX_FPS} for a .gif, got {fps}: keep every other picture")
    pictures = _checked_pictures(frames)

    path.parent.mkdir(parents=True, exist_ok=True)
    # The name begins with a dot and carries the process id: listings skip it, and two writers do not collide.
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{suffix}")
    try:
        if suffix == ".mp4":
            _write_mp4(partial, pictures, fps)
        else:
            _write_gif(partial, pictures, fps)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _as_numpy(values: Any) -> np.ndarray:
    if hasattr(values, "detach"):
        values = values.detach().cpu()
    return np.asarray(values)


def _checked_pictures(frames: Iterable[Any]) -> list[np.ndarray]:
    pictures = [_as_numpy(frame) for frame in frames]
    if not pictures:
        raise InputError("frames must hold at least one picture, got none")
    for index, picture in enumerate(pictures):
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
            raise InputError(
                f"frame {index} must be [height, width, 3] uint8, got {list(picture.shape)} {picture.dtype}"
            )
        if picture.shape != pictures[0].shape:
            raise InputError(
                f"all frames must have one size: frame 0 is {list(pictures[0].shape)}, "
                f"frame {index} is {list(picture.shape)}"
            )
    return pictures


def _write_mp4(path: pathlib.Path, pictures: list[np.ndarray], fps: float) -> None:
    from imageio_ffmpeg import get_ffmpeg_exe

    height, width = (size - size % 2 for size in pictures[0].shape[:2])
    if height < 2 or width < 2:
        raise InputError(f"an .mp4 needs frames of at least 2 x 2 pixels, got {list(pictures[0].shape[:2])}")
    try:
        encoder_path = get_ffmpeg_exe()
    except RuntimeError as error:
        raise InputError("no ffmpeg for an .mp4 is here: name one in IMAGEIO_FFMPEG_EXE, or write a .gif") from error
    command = [
        *(encoder_path, "-loglevel", "error", "-y"),
        *("-f", "rawvideo", "-pix_fmt", "rgb24", "-video_size", f"{width}x{height}", "-framerate", f"{fps:.10g}"),
        *("-i", "pipe:0", "-c:v", "libx264", "-pix_fmt", "yuv420p"),
        # Constant quality, and the index at the front so that a browser plays before it has the whole file.
        *("-crf", "20", "-movflags", "+faststart", os.fspath(path.absolute())),
    ]
    with tempfile.TemporaryFile() as told:
        # In a session of its own: Ctrl-C reaches this process alone, which ends the encoder and removes what there is
        # of the film. Python must not run between fork and exec, as in imageio's writer: libraries' threads are about.
        encoder = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=told, start_new_session=True
        )
        assert encoder.stdin is not None, "it was asked for"
        try:
            with suppress(BrokenPipeError), encoder.stdin as pipe:  # broken by an end that `told` gives the reason of
                for picture in pictures:
                    pipe.write(np.ascontiguousarray(picture[:height, :width]).data)
            status = encoder.wait()
        except BaseException:
            encoder.kill()
            encoder.wait()
            raise
        told.seek(0)
        why = " ".join(told.read().decode(errors="replace").split())
    if status:
        ended = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        raise OSError(
            f"the film's encoder {ended}: {why or 'it did not say why'} (IMAGEIO_FFMPEG_EXE names another; a "
            ".gif needs none)"
        )


def _write_gif(path: pathlib.Path, pictures: list[np.ndarray], fps: float) -> None:
    from PIL import Image

    # One palette for the film, from at most sixteen of its pictures: colours do not flicker between frames,
    # and no dithering leaves the still background unchanged, which the format then does not store again.
    chosen = np.unique(np.linspace(0, len(pictures) - 1, min(16, len(pictures))).round().astype(int))
    sample = np.concatenate([pictures[index][::2, ::2] for index in chosen])
    palette = Image.fromarray(np.ascontiguousarray(sample)).quantize(128, method=Image.Quantize.MEDIANCUT)
    images = [
        Image.fromarray(np.ascontiguousarray(picture)).quantize(palette=palette, dither=Image.Dither.NONE)
        for picture in pictures
    ]
    # Durations are whole hundredths of a second whose sum keeps up with the true time.
    ends = np.round(np.arange(1, len(pictures) + 1) * 100.0 / fps).astype(int)
    durations = [10 * int(duration) for duration in np.diff(ends, prepend=0)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0, optimize=True)


def _camera_id(model: mujoco.MjModel, camera: str | int) -> int:
    names = [model.camera(index).name for index in range(model.ncam)]
    if isinstance(camera, str):
        if camera not in names:
            raise InputError(f"camera {camera!r} is not in the model: choose from {names}, or -1 (free)")
        return names.index(camera)
    if not -1 <= camera < model.ncam:
        raise InputError(f"camera must be -1 (free) to {model.ncam - 1}, got {camera}; the model has {names}")
    return int(camera)


def _make_renderer(model: mujoco.MjModel, width: int, height: int) -> mujoco.Renderer:
    """Open an off-screen renderer, with a backend that needs no display where none was chosen.

    MuJoCo reads `MUJOCO_GL` when its gl_context module is imported, which `import mujoco` already does: by
    the time there is a model it is too late to set the variable. Its renderer looks the backend up in that
    module each time, so importing the module again under another value changes the backend.
    """
    import mujoco

    chosen = os.environ.get("MUJOCO_GL", "")
    has_display = bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    headless = sys.platform.startswith("linux") and not chosen and not has_display
    failures = []
    for backend in HEADLESS_BACKENDS if headless else (chosen,):
        try:
            if headless:
                os.environ["MUJOCO_GL"] = backend
                from mujoco.rendering.classic import gl_context

                importlib.reload(gl_context)
            return mujoco.Renderer(model, height, width)
        except Exception as error:  # Each backend fails with its own type; the reasons are told together.
            failures.append(f"{backend or 'default'}: {type(error).__name__}: {error}".replace("\n", " "))
            if headless:
                os.environ.pop("MUJOCO_GL", None)
    raise InputError(
        f"no OpenGL backend works for rendering (MUJOCO_GL={chosen!r}): {'; '.join(failures)}. Set MUJOCO_GL "
        "to egl (Linux without a display), osmesa (software) or glfw (with a display), and install libegl1"
    )
