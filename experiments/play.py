"""Watch a trained policy: as a film, or in a window where there is a screen."""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from experiments.conditions import command_text, given_command
from rlcore.errors import InputError


@dataclass(frozen=True)
class Config:
    """Let a trained policy act and film it: a few robots side by side, one whole episode each."""

    run_dir: Annotated[Path, tyro.conf.Positional]
    """Run directory, as training printed it."""
    robots: int = 4
    """How many robots to show (a window shows one)."""
    seconds: float | None = None
    """Length of an episode; by default that of the run."""
    seed: int = 2000
    """Seed of the episodes."""
    checkpoint: str = "best"
    """Which checkpoint: best, last, or an iteration."""
    vx: float | None = None
    """Forward speed that every robot is told all the time, m/s. Where only some of vx, vy and yaw_rate are given, the
    others are 0; a command that is too small for the task is 0 as in training. By default commands are drawn."""
    vy: float | None = None
    """Leftward speed that every robot is told, m/s."""
    yaw_rate: float | None = None
    """Yaw rate that every robot is told, rad/s, positive to the left."""
    camera: str = "track"
    """A camera of the model, such as track, side or front; -1 is the free camera."""
    window: bool = False
    """Show a window in real time instead of writing a film (needs a screen)."""
    output: Path | None = None
    """Film to write, .mp4 or .gif; by default play.mp4 in the run directory."""

    def __post_init__(self) -> None:
        if not 1 <= self.robots <= 64:
            raise InputError(f"robots must be 1 to 64, got {self.robots} (--robots)")
        if self.seconds is not None and not self.seconds > 0:
            raise InputError(f"seconds must be more than 0, got {self.seconds} (--seconds)")
        if self.seed < 0:
            raise InputError(f"seed must be 0 or more, got {self.seed} (--seed)")
        given_command(self.vx, self.vy, self.yaw_rate)
        if self.output is not None and self.output.suffix not in (".mp4", ".gif"):
            raise InputError(f"output must end in .mp4 or .gif, got {self.output} (--output)")


def main(config: Config) -> None:
    """Film or show a run's policy."""
    from experiments.cli import load_run, progress_line, restore_policy, writable
    from experiments.conditions import commanded
    from experiments.recording import film
    from rlcore import random

    command = given_command(config.vx, config.vy, config.yaw_rate)
    overrides = {} if config.seconds is None else {"episode_seconds": config.seconds}
    output = writable(config.output or config.run_dir / "play.mp4", config.run_dir)
    run = load_run(config.run_dir, overrides)
    try:
        policy = restore_policy(run, config.checkpoint, fresh=("env_state", "obs"))
        env = run.experiment.evaluation_env
        if command is not None:
            env = commanded(env, command)
            print(f"told all the time: {command_text(command)}")
        if policy.note is not None:
            print(f"note: {policy.note}")
        if config.window:
            show(env, policy.act, random.key(config.seed))
            return
        with progress_line() as tell:
            episodes = film(
                env,
                policy.act,
                output,
                key=random.key(config.seed),
                num_robots=config.robots,
                camera=-1 if config.camera == "-1" else config.camera,
                progress=lambda what, done, total: tell(f"{what}: {done} of {total} pictures"),
            )
    finally:
        if run.experiment.close is not None:
            run.experiment.close()
    stood = int((~episodes.terminated).sum())
    print(f"{output}: {stood} of {config.robots} robots lasted the whole episode")


def show(env, policy, key) -> None:  # type: ignore[no-untyped-def]
    """One robot in MuJoCo's viewer, in real time, episode after episode until the window is closed."""
    import mujoco.viewer

    from rlcore import random, tree
    from rlcore.env import batch

    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise InputError("no window can be opened: there is no display (leave out --window to write a film)")
    model = env.engine.mjmodel
    data = mujoco.MjData(model)
    batched = batch(env)
    try:
        viewer = mujoco.viewer.launch_passive(model, data)
    except Exception as error:
        raise InputError(f"no window can be opened: {error} (leave out --window to write a film)") from error
    with viewer:
        episode = 0
        while viewer.is_running():
            state, obs = batched.reset(env.params, random.split(random.fold_in(key, episode), 1))
            episode += 1
            done = False
            while viewer.is_running() and not done:
                began = time.perf_counter()
                state, transition = batched.step(env.params, state, policy(obs))
                obs = transition.next_obs
                done = bool((transition.terminated | transition.truncated)[0])
                physics = tree.index(state.physics, 0)
                data.qpos[:], data.qvel[:] = physics.qpos.numpy(), physics.qvel.numpy()
                mujoco.mj_forward(model, data)
                viewer.sync()
                time.sleep(max(0.0, env.spec.control_dt - (time.perf_counter() - began)))


if __name__ == "__main__":
    from experiments.cli import command

    command(Config, main)
