"""What experiments record besides metrics: a film of the policy, and environments that went wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlcore import random
from rlcore.commands import true_velocity
from rlcore.env import Env, EnvState, Obs
from rlcore.experiment import Algorithm, Fault
from rlcore.physics.engine import FAULT_NAMES, drain_faults
from rlcore.rollout import Episodes, evaluate

FILM_FPS = 25
_FILM_KEY = 20
SMOOTHED = 0.5  # s, over which a film averages the true velocity that it shows


def film(
    env: Env,
    policy: Callable[[Obs], Tensor],
    path: Path,
    *,
    key: Tensor,
    num_robots: int = 4,
    camera: str | int = "track",
    size: tuple[int, int] = (400, 300),
    seconds: float | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Episodes:
    """Film one episode of a few robots side by side, with the time and each robot's fate written into it.

    Where robots follow velocity commands, so are the command and the true velocity, averaged over the last half second:
    forward and to the left in m/s, and the yaw rate, positive to the left.

    Args:
      env: an environment of one robot with a time limit, without automatic resets, on the MuJoCo engine.
      policy: obs `[B, ...]` to action `[B, action]`.
      path: where to, .mp4 or .gif.
      key: random key of the episodes.
      num_robots: how many.
      camera: a camera of the model; -1 is the free camera, which also stands in for a missing `track`.
      size: width and height of each robot's picture, pixels.
      seconds: how much of the episodes to show; all by default.
      progress: called with (what, done, total).

    Returns:
      The episodes that are shown.

    Raises:
      InputError: if the model has no such camera, or nothing can be rendered or encoded here.
      OSError: if the film cannot be written, or its encoder failed.
    """
    from rlcore.video import render_frames, tile, write_video

    tell = progress or (lambda *_: None)
    model = env.engine.mjmodel  # type: ignore[attr-defined]
    if camera == "track" and camera not in [model.camera(i).name for i in range(model.ncam)]:
        camera = -1  # the default camera of a model without that one
    # One picture first, so that a camera or a renderer that is not there is told before the episodes are run.
    render_frames(model, model.qpos0[None], camera=camera, width=size[0], height=size[1])
    episodes = evaluate(env, policy, key, num_robots, watched=num_robots, record=_velocities(env))
    dt = env.spec.control_dt
    every = max(1, round(1.0 / (FILM_FPS * dt)))
    pictures = episodes.qpos.shape[0] if seconds is None else min(episodes.qpos.shape[0], round(seconds / dt) + 1)
    shown = torch.arange(0, pictures, every)
    overlay, caption = [], []
    for robot in range(num_robots):
        length = int(episodes.lengths[robot])
        ended = "fell" if bool(episodes.terminated[robot]) else "done"
        overlay += [f"{min(t, length) * dt:5.2f} s" + (f"  {ended}" if t >= length else "") for t in shown.tolist()]
        caption += [_told_and_done(episodes.recorded, robot, min(t, length), dt) for t in shown.tolist()]
    # All robots with one renderer, which takes longer to make than many pictures.
    frames = render_frames(
        model,
        episodes.qpos[shown].transpose(0, 1).flatten(0, 1),
        camera=camera,
        width=size[0],
        height=size[1],
        overlay=overlay,
        caption=caption,
        progress=lambda done, total: tell("filming", done, total),
    )
    columns = max(1, round(num_robots**0.5 + 0.25))
    write_video(path, tile(np.split(frames, num_robots), columns), fps=1.0 / (every * dt))
    return episodes


def _velocities(env: Env) -> Callable[[EnvState], dict[str, Tensor]]:
    """What `evaluate` is to record: of robots that follow commands the command and the true velocity, `[B, 3]`."""
    free = next((joint.name for joint in env.spec.model.joints if joint.kind == "free"), None)
    velocity = None if free is None else true_velocity(env.spec.model, free)

    def record(state: EnvState) -> dict[str, Tensor]:
        if velocity is None or "command" not in state.memory:
            return {}
        return {"told": state.memory["command"]["velocity"], "true": velocity(state.physics)}

    return record


def _told_and_done(recorded: dict[str, Tensor], robot: int, step: int, dt: float) -> list[str]:
    """Two lines: a robot's command at a step, and its mean velocity over the last half second of its episode."""
    if not recorded:
        return []
    told = recorded["told"][step, robot]
    true = recorded["true"][max(0, step + 1 - round(SMOOTHED / dt)) : step + 1, robot].mean(0)
    return [f"told {_in_words(told)}", f"does {_in_words(true)}  ({SMOOTHED:g} s mean)"]


def _in_words(velocity: Tensor) -> str:
    forward, left, turn = (round(x, 2) + 0.0 for x in velocity.tolist())  # no minus before a zero
    text = f"{forward:+.2f} m/s  {left:+.2f} left  {turn:+.2f} rad/s"
    return text.replace("-", " -")  # nearly as wide as a plus, so that numbers stay where they are


def filmed(env: Env, algorithm: Algorithm) -> Callable[[Any, Path], None]:
    """`render(state, path)` for `Experiment`: ten seconds of the deterministic policy of a TrainState."""

    def render(state: Any, path: Path) -> None:
        from experiments.cli import progress_line

        with progress_line() as tell:
            film(
                env,
                lambda obs: algorithm.act(state, obs, None),
                path,
                key=random.key(_FILM_KEY),
                seconds=10.0,
                progress=lambda what, done, total: tell(f"{what}: {done} of {total} pictures"),
            )

    return render


def recorded_faults() -> list[Fault]:
    """The physics faults since the last call, as `Experiment.faults` wants them: a name and arrays."""
    return [
        (
            FAULT_NAMES[fault.code].replace(" ", "-"),
            {**fault.arrays, "code": np.asarray(fault.code), "message": np.asarray(fault.message)},
        )
        for fault in drain_faults()
    ]
