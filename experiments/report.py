"""What a walking policy can do, as one page with pictures: where it follows its commands and where it falls."""

import base64
import html
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from rlcore.errors import InputError


@dataclass(frozen=True)
class Config:
    """Measure a trained walking policy, without exploration, and write report.html and report.json.

    The page shows tracking errors and survival over a grid of commands, survival against the size of pushes, which feet
    carry at 1 m/s, the torques of all joints, and survival under physics that training has not seen.

    Example:
      python -m experiments.report runs/ppo_humanoid_velocity/20260101-120000-seed0
    """

    run_dir: Annotated[Path, tyro.conf.Positional]
    """Run directory, as training printed it."""
    episodes: int = 16
    """Episodes of each command, size of push and physics."""
    seconds: float = 10.0
    """Length of an episode."""
    vx: tuple[float, ...] = (-0.5, 0.0, 0.5, 1.0, 1.5)
    """Forward speeds of the grid, m/s."""
    yaw_rate: tuple[float, ...] = (-1.0, -0.5, 0.0, 0.5, 1.0)
    """Yaw rates of the grid, rad/s."""
    push_speeds: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
    """Sizes of pushes: the largest change of the pelvis's velocity, m/s."""
    worlds: int = 10
    """Physics that differ from the nominal: masses and stiffness +-20 %, friction 0.4 to 1.2, actions a step late."""
    seed: int = 3000
    """Seed of the episodes."""
    checkpoint: str = "best"
    """Which checkpoint: best, last, or an iteration."""
    output_dir: Path | None = None
    """Where the files go; by default the run directory."""

    def __post_init__(self) -> None:
        for name in ("episodes", "worlds"):
            if (value := getattr(self, name)) < 1:
                raise InputError(f"{name} must be at least 1, got {value} (--{name})")
        if not self.seconds > 0:
            raise InputError(f"seconds must be more than 0, got {self.seconds} (--seconds)")
        for name in ("vx", "yaw_rate", "push_speeds"):
            if not getattr(self, name):
                raise InputError(f"{name} must be at least one number (--{name.replace('_', '-')})")
            if not all(map(math.isfinite, getattr(self, name))):
                raise InputError(
                    f"{name} must be finite numbers, got {getattr(self, name)} (--{name.replace('_', '-')})"
                )
        if min(self.push_speeds) < 0:
            raise InputError(f"push_speeds must be 0 m/s or more, got {min(self.push_speeds)} (--push-speeds)")
        if self.seed < 0:
            raise InputError(f"seed must be 0 or more, got {self.seed} (--seed)")


Tell = Callable[[str], None]


def lacking(env: Any) -> list[str]:
    """What the report is made of and a task does not have; empty if it can be measured."""
    import torch

    from experiments.conditions import why_no_command
    from rlcore import random

    if (reason := why_no_command(env)) is not None:
        return [f"velocity commands ({reason})"]
    state, _ = env.reset(env.params, random.key(0))
    _, transition = env.step(env.params, state, torch.zeros(env.spec.action_size))
    needs = {
        "metric 'velocity_error'": "velocity_error" in transition.metrics,
        "metric 'yaw_rate_error'": "yaw_rate_error" in transition.metrics,
        "memory 'feet' (locomotion.feet_memory)": "feet" in state.memory,
        "params.values['push_speed'] (random_pushes)": "push_speed" in env.params.values,
    }
    return [name for name, there in needs.items() if not there]


class Subject:
    """The policy and its task, and how many episodes of how long to run."""

    def __init__(self, config: Config) -> None:
        from experiments.cli import load_run, restore_policy

        self.config = config
        self.run = load_run(config.run_dir, {"episode_seconds": config.seconds})
        self.env: Any = self.run.experiment.evaluation_env
        if missing := lacking(self.env):
            raise InputError(
                f"{config.run_dir} cannot be reported: the report needs of its task {', '.join(missing)}; "
                "experiments.evaluate measures any task"
            )
        policy = restore_policy(self.run, config.checkpoint, fresh=("env_state", "obs"))
        self.act, self.iteration, self.note = policy.act, policy.iteration, policy.note

    def feet(self) -> list[str]:
        """The feet by the names of their sensors, in the model's order."""
        sensors = self.env.spec.model.sensors
        names = [name.removesuffix("_contact") for name in sensors if name.endswith("_contact")]
        return [name.replace("_", " ") for name in names if f"{name}_velocity" in sensors]

    def repeated(self, params: list[Any]) -> Any:
        """Parameters `[B, ...]` of as many robots for each of these as there are episodes."""
        import torch

        from rlcore import tree

        stacked = tree.stack(params)
        return tree.map_leaves(lambda x: torch.repeat_interleave(x, self.config.episodes, dim=0), stacked)

    def episodes(self, params: list[Any], tell: Tell, what: str, env: Any = None, record: Any = None) -> Any:
        """Episodes of robots with these parameters, those of one after those of another."""
        from rlcore import random
        from rlcore.rollout import evaluate

        count = len(params) * self.config.episodes
        return evaluate(
            env or self.env,
            self.act,
            random.key(self.config.seed),
            count,
            params=self.repeated(params),
            shared_params=False,
            record=record,
            progress=lambda step, going: tell(f"{what}: step {step}, {going} of {count} robots go on"),
        )


def commands(subject: Subject, tell: Tell) -> dict[str, Any]:
    """Errors and survival for each pair of a forward speed and a yaw rate: `[vx][yaw rate]`."""
    from rlcore.commands import fixed_command

    config, nominal = subject.config, subject.env.params
    grid = [fixed_command(nominal, vx, 0.0, rate) for vx in config.vx for rate in config.yaw_rate]
    done = subject.episodes(grid, tell, "commands")
    shape = (len(config.vx), len(config.yaw_rate), config.episodes)
    mean = lambda x: x.double().reshape(shape).mean(-1).tolist()  # noqa: E731
    return {
        "vx": config.vx,
        "yaw_rate": config.yaw_rate,
        "survival": mean(~done.terminated),
        "velocity_error": mean(done.metrics["velocity_error"]),
        "yaw_rate_error": mean(done.metrics["yaw_rate_error"]),
    }


def pushes(subject: Subject, tell: Tell) -> dict[str, Any]:
    """Survival at 0.5 m/s for each size of pushes, with its confidence interval."""
    import torch

    from experiments.evaluate import wilson
    from rlcore import tree
    from rlcore.commands import fixed_command

    config, walking = subject.config, fixed_command(subject.env.params, 0.5)
    worlds = [
        tree.replace(walking, values={**walking.values, "push_speed": torch.full_like(walking.values["push_speed"], x)})
        for x in config.push_speeds
    ]
    done = subject.episodes(worlds, tell, "pushes")
    survived = (~done.terminated).reshape(len(worlds), config.episodes).sum(-1).tolist()
    intervals = [wilson(n, config.episodes) for n in survived]
    return {
        "push_speed": config.push_speeds,
        "survival": [n / config.episodes for n in survived],
        "low": [low for low, _ in intervals],
        "high": [high for _, high in intervals],
    }


def gait(subject: Subject, tell: Tell) -> dict[str, Any]:
    """At 1 m/s without pushes: which feet carry, and the torques of all joints."""
    import torch

    from rlcore import tree
    from rlcore.commands import fixed_command

    env = subject.env
    model = env.spec.model
    walking = fixed_command(env.params, 1.0)
    still = torch.zeros_like(walking.values["push_speed"])
    walking = tree.replace(walking, values={**walking.values, "push_speed": still})
    places = [model.sensor(f"{name}_torque").start for name in model.actuators]

    def record(state: Any) -> dict[str, Any]:
        return {"contact": state.memory["feet"]["contact"], "torque": state.physics.sensordata[:, places]}

    done = subject.episodes([walking], tell, "gait", record=record)
    longest = int(done.lengths.argmax())
    # From here on it walks.
    settled = min(round(2.0 / env.spec.control_dt), int(done.lengths[longest]) // 2)
    contact = done.recorded["contact"][settled : int(done.lengths[longest]), longest]
    whole = done.recorded["torque"][settled:, done.lengths == done.lengths.max()].reshape(-1, len(places)).abs()
    return {
        "dt": env.spec.control_dt,
        "contact": contact.int().tolist(),
        "stance_share": contact.double().mean(0).tolist() if len(contact) else [],
        "flight_share": float((~contact.any(-1)).double().mean()) if len(contact) else None,
        "joints": list(model.actuators),
        "torque_mean": whole.mean(0).tolist(),
        "torque_95": torch.quantile(whole, 0.95, dim=0).tolist(),
        "torque_limit": env.engine.mjmodel.actuator_forcerange[:, 1].tolist(),
        "torques": whole[:: max(1, len(whole) // 2000)],
    }


def worlds(subject: Subject, tell: Tell) -> dict[str, Any]:
    """Survival under the nominal physics and under others, at commands drawn as in training."""
    from experiments.conditions import unseen_physics
    from experiments.evaluate import wilson
    from rlcore import random, tree

    config = subject.config
    unseen = unseen_physics(subject.env, random.key(config.seed), config.worlds)
    result = {}
    for name, text, env, params in (
        ("nominal", "as the model says", subject.env, [subject.env.params] * config.worlds),
        ("unseen", unseen.text, unseen.env, [tree.index(unseen.params, i) for i in range(config.worlds)]),
    ):
        done = subject.episodes(params, tell, name, env=env)
        survived, count = int((~done.terminated).sum()), len(done.lengths)
        low, high = wilson(survived, count)
        each = (~done.terminated).double().reshape(config.worlds, -1).mean(-1).tolist()
        error = float(done.metrics["velocity_error"].mean())
        result[name] = {"physics": text, "survival": survived / count, "low": low, "high": high}
        result[name] |= {"each": each, "velocity_error": error}
    return result


# --- pictures -----------------------------------------------------------------------------------------------


def _picture(draw: Callable[[Any], None], size: tuple[float, float]) -> str:
    """A figure as an HTML image that needs no file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", dpi=110)
    draw(figure)
    memory = io.BytesIO()
    figure.savefig(memory, format="png")
    return f'<img src="data:image/png;base64,{base64.b64encode(memory.getvalue()).decode()}">'


def _heat(figures: dict[str, Any]) -> str:
    panels = {
        "survival": ("share of episodes without a fall", "viridis", (0.0, 1.0)),
        "velocity_error": ("error of velocity, m/s", "magma_r", (0.0, 0.6)),
        "yaw_rate_error": ("error of yaw rate, rad/s", "magma_r", (0.0, 0.6)),
    }

    def draw(figure: Any) -> None:
        for axes, (name, (title, colours, limits)) in zip(figure.subplots(1, 3), panels.items(), strict=True):
            image = axes.imshow(figures[name], origin="lower", cmap=colours, vmin=limits[0], vmax=limits[1])
            axes.set_xticks(range(len(figures["yaw_rate"])), [f"{x:g}" for x in figures["yaw_rate"]])
            axes.set_yticks(range(len(figures["vx"])), [f"{x:g}" for x in figures["vx"]])
            axes.set_xlabel("yaw rate, rad/s")
            axes.set_ylabel("forward speed, m/s")
            axes.set_title(title, fontsize=10)
            for i, row in enumerate(figures[name]):
                for j, value in enumerate(row):
                    dark = (value > 0.5) != (name == "survival")
                    axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color="w" if dark else "0.1")
            figure.colorbar(image, ax=axes, shrink=0.7)

    return _picture(draw, (13.0, 4.0))


def _push_curve(figures: dict[str, Any]) -> str:
    def draw(figure: Any) -> None:
        axes = figure.subplots()
        interval = {"alpha": 0.2, "linewidth": 0, "label": "95 % confidence"}
        axes.fill_between(figures["push_speed"], figures["low"], figures["high"], **interval)
        axes.plot(figures["push_speed"], figures["survival"], marker="o")
        axes.legend(frameon=False, loc="lower left")
        axes.set_ylim(0.0, 1.03)
        axes.set_xlabel("largest push, m/s")
        axes.set_ylabel("episodes without a fall")
        axes.grid(alpha=0.25)

    return _picture(draw, (6.5, 3.5))


def _gait_diagram(figures: dict[str, Any], names: list[str], seconds: float = 4.0) -> str:
    steps = figures["contact"][: round(seconds / figures["dt"])]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for foot in range(len(names)):
            spans, begin = [], None
            for t, row in enumerate([*steps, [0] * len(names)]):
                if row[foot] and begin is None:
                    begin = t
                elif not row[foot] and begin is not None:
                    spans.append((begin * figures["dt"], (t - begin) * figures["dt"]))
                    begin = None
            axes.broken_barh(spans, (foot - 0.35, 0.7), color=f"C{foot}")
        axes.set_yticks(range(len(names)), names)
        axes.set_xlim(0.0, len(steps) * figures["dt"])
        axes.set_xlabel("s; a bar where the foot carries")

    return _picture(draw, (10.0, 1.8))


def _torques(figures: dict[str, Any]) -> str:
    def draw(figure: Any) -> None:
        axes = figure.subplots()
        places = list(range(len(figures["joints"])))
        shares = figures["torques"] / figures["torques"].new_tensor(figures["torque_limit"])
        axes.violinplot(shares.numpy(), positions=places, widths=0.85, showextrema=False)
        axes.plot(places, shares.mean(0).tolist(), "k_", markersize=9)
        axes.axhline(1.0, color="C3", linewidth=1.0)
        axes.set_xticks(places, figures["joints"], rotation=60, ha="right", fontsize=8)
        axes.set_ylabel("torque / its limit")
        axes.set_ylim(0.0, 1.08)

    return _picture(draw, (10.0, 3.8))


def page(figures: dict[str, Any]) -> str:
    """The report as one HTML file."""
    step, world = figures["gait"], figures["worlds"]
    feet = figures["feet"]
    shares = ", ".join(f"{name} {100 * x:.0f} %" for name, x in zip(feet, step["stance_share"], strict=False))
    flight = "" if step["flight_share"] is None else f" Neither foot carries for {100 * step['flight_share']:.0f} %."
    rows = "".join(
        f"<tr><td>{name}</td><td>{100 * x['survival']:.1f} % ({100 * x['low']:.1f} to {100 * x['high']:.1f})</td>"
        f"<td>{x['velocity_error']:.3f}</td><td>{100 * min(x['each']):.0f} %</td></tr>"
        for name, x in world.items()
    )
    walk = f"{figures['episodes']} episodes of {figures['seconds']:g} s each"
    note = f"<p>{html.escape(figures['note'])}</p>" if figures["note"] else ""
    diagram = _gait_diagram(step, feet) if step["contact"] else "<p>It falls before it walks.</p>"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(figures["task"])}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222 }}
img {{ max-width: 100% }} td, th {{ padding: .2em 1.2em .2em 0; text-align: left }} h2 {{ margin-top: 2em }}
</style></head><body>
<h1>{html.escape(figures["task"])}</h1>
<p>{html.escape(figures["run"])}, checkpoint of iteration {figures["checkpoint"]}, without exploration, pushed as in
training unless said otherwise; {walk}.</p>{note}
<h2>Commands</h2>{_heat(figures["commands"])}
<h2>Pushes at 0.5 m/s</h2>{_push_curve(figures["pushes"])}
<h2>Feet at 1 m/s</h2>{diagram}
<p>Share of time that a foot carries: {shares or "none"}.{flight}</p>
<h2>Torques at 1 m/s</h2>{_torques(step)}
<h2>Other physics</h2>
<p>Unseen: {html.escape(world["unseen"]["physics"])}; commands as in training.</p>
<table><tr><th>physics</th><th>episodes without a fall (95 % confidence)</th><th>error of velocity, m/s</th>
<th>worst world</th></tr>
{rows}</table></body></html>
"""


def main(config: Config) -> None:
    """Measure, print a summary, write the page and the figures."""
    from experiments.cli import progress_line, writable
    from rlcore.metrics import write_atomically, write_json

    folder = config.output_dir or config.run_dir
    path = writable(folder / "report.html", config.run_dir)
    subject = Subject(config)
    try:
        with progress_line() as tell:
            figures: dict[str, Any] = {
                "run": str(config.run_dir),
                "task": subject.env.spec.name,
                "checkpoint": subject.iteration,
                "note": subject.note,
                "episodes": config.episodes,
                "seconds": config.seconds,
                "seed": config.seed,
                "feet": subject.feet(),
                "commands": commands(subject, tell),
                "pushes": pushes(subject, tell),
                "gait": gait(subject, tell),
                "worlds": worlds(subject, tell),
            }
            tell("drawing")
            text = page(figures)
    finally:
        if subject.run.experiment.close is not None:
            subject.run.experiment.close()
    del figures["gait"]["torques"]  # samples, for the picture only
    write_atomically(path, text)
    write_json(path.with_suffix(".json"), figures)
    grid = figures["commands"]
    cells = [x for row in grid["survival"] for x in row]
    print(f"{figures['task']}, checkpoint of iteration {figures['checkpoint']}, {len(cells)} commands")
    if figures["note"]:
        print(f"note: {figures['note']}")
    for name, unit, best, worst in (
        ("survival", "", max, min),
        ("velocity_error", " m/s", min, max),
        ("yaw_rate_error", " rad/s", min, max),
    ):
        values = [x for row in grid[name] for x in row]
        extremes = f"best command {best(values):.3f}, worst command {worst(values):.3f}"
        print(f"{name:<16} mean {sum(values) / len(values):.3f}{unit}; {extremes}")
    for name, x in figures["worlds"].items():
        interval = f"95 % confidence: {100 * x['low']:.1f} to {100 * x['high']:.1f} %"
        print(f"{name + ' physics':<16} {100 * x['survival']:.1f} % survive ({interval})")
    print(f"\nwritten to {path} and {path.with_suffix('.json')}")


if __name__ == "__main__":
    from experiments.cli import command

    command(Config, main)
