"""Check an installation of Isaac Gym: what it is told of a model, and what it makes of it, measured on itself.

    python -m experiments.verify_isaacgym --isaacgym.python /path/to/python3.8

Small mechanisms with known answers are simulated one after another. Each line says what was measured, what it should
be, and what to do if it is not. Nothing is trained, and nothing is written.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mujoco
import torch
from torch.func import vmap

from experiments.cli import parse
from rlcore.errors import InputError
from rlcore.physics.isaacgym import IsaacGymEngine
from rlcore.physics.isaacgym_settings import Settings

# A box whose centre of mass is beside its frame's origin, which tells the two points of a velocity apart.
BOX = """
<mujoco>
  <option timestep="0.005"/>
  <worldbody>
    <geom name="floor" type="plane" size="5 5 1"/>
    <body name="box" pos="0 0 2">
      <inertial pos="0.3 0 0" mass="2" diaginertia="0.1 0.1 0.1"/>
      <freejoint name="root"/>
      <geom name="box" type="box" size="0.2 0.2 0.2" pos="0.3 0 0"/>
      <site name="all" type="sphere" size="1"/>
    </body>
  </worldbody>
  <sensor><touch name="touch" site="all"/></sensor>
</mujoco>
"""
WHEEL = """
<mujoco>
  <compiler angle="radian"/>
  <option timestep="0.005"/>
  <worldbody>
    <body name="wheel">
      <joint name="axle" axis="0 0 1" damping="{damping}" armature="0.05"/>
      <inertial pos="0 0 0" mass="1" diaginertia="0.05 0.05 0.05"/>
    </body>
  </worldbody>
  <actuator>{actuator}</actuator>
</mujoco>
"""
MOTOR = '<motor name="motor" joint="axle" gear="2"/>'
SERVO = '<position name="servo" joint="axle" kp="20" kv="2" forcerange="-50 50" forcelimited="true"/>'


@dataclass(frozen=True)
class Config:
    """Measure what Isaac Gym does with mechanisms whose motion is known."""

    tolerance: float = 0.03
    """Share of the expected value by which a measured one may differ."""
    isaacgym: Settings = field(default_factory=Settings)
    """How Isaac Gym runs."""


class Check(NamedTuple):
    """One measurement: what it is of, the number, what it should be, and what to do if it is not."""

    name: str
    measured: float
    expected: float
    remedy: str


def _run(xml: str, settings: Settings, qpos: list[float], qvel: list[float], ctrl: list[float], steps: int) -> Any:
    """The state of one robot after some substeps."""
    engine = IsaacGymEngine(mujoco.MjModel.from_xml_string(xml), settings)
    try:
        row = lambda x: torch.tensor([x], dtype=torch.float64)  # noqa: E731
        state = vmap(engine.initial)(row(qpos), row(qvel))
        return vmap(lambda s, c: engine.step({}, s, c, substeps=steps))(state, row(ctrl))
    finally:
        engine.close()


def falling(settings: Settings) -> Check:
    """A box falls 0.2 s freely: its velocity is -g t."""
    state = _run(BOX, settings, [0, 0, 5, 1, 0, 0, 0], [0.0] * 6, [], 40)
    return Check(
        "velocity of a free fall after 0.2 s, m/s", float(state.qvel[0, 2]), -9.81 * 0.2, "gravity or time step"
    )


def spinning(settings: Settings) -> Check:
    """A box spins about its centre of mass, which then stays where it is: so the origin moves at w x r."""
    # The centre of mass, 0.3 m along x, at rest: the origin moves at -w x r.
    state = _run(BOX, settings, [0, 0, 5, 1, 0, 0, 0], [0, -0.6, 0, 0, 0, 2.0], [], 20)
    other = "origin" if settings.velocity_point == "com" else "com"
    x, yaw = float(state.qpos[0, 0]), 2.0 * 0.1
    expected = 0.3 * (1.0 - float(torch.cos(torch.tensor(yaw))))
    y_expected, y = -0.3 * float(torch.sin(torch.tensor(yaw))), float(state.qpos[0, 1])
    distance = ((x - expected) ** 2 + (y - y_expected) ** 2) ** 0.5
    return Check(
        "drift of a spinning box's centre of mass, plus 1, m",
        1.0 + distance,
        1.0,
        f"--isaacgym.velocity-point {other}",
    )


def resting(settings: Settings) -> Check:
    """A box that has come to rest presses on the floor with its weight."""
    state = _run(BOX, settings, [0, 0, 0.2, 1, 0, 0, 0], [0.0] * 6, [], 400)
    return Check("weight that a resting box is felt with, N", float(state.sensordata[0, 0]), 2 * 9.81, "contact forces")


def turning(settings: Settings) -> Check:
    """A motor of gear 2 accelerates an inertia of 0.05 and an armature of 0.05 for 0.5 s."""
    state = _run(WHEEL.format(damping=0, actuator=MOTOR), settings, [0], [0], [0.5], 100)
    return Check("speed that a motor reaches, rad/s", float(state.qvel[0, 0]), 5.0, "efforts, or armature is left out")


def slowing(settings: Settings) -> Check:
    """Damping of 0.2 slows the same wheel: after one time constant of 0.5 s it has 1/e of its speed."""
    state = _run(WHEEL.format(damping=0.2, actuator=MOTOR), settings, [0], [4], [0], 100)
    return Check("speed after a time constant, rad/s", float(state.qvel[0, 0]), 4 * 0.36788, "damping of driven joints")


def holding(settings: Settings) -> Check:
    """A servo brings the wheel to its target."""
    state = _run(WHEEL.format(damping=0, actuator=SERVO), settings, [0], [0], [0.5], 600)
    return Check("angle that a servo holds, rad", float(state.qpos[0, 0]), 0.5, "position targets")


CHECKS: tuple[Callable[[Settings], Check], ...] = (falling, spinning, resting, turning, slowing, holding)


def verify(settings: Settings, tolerance: float) -> bool:
    """Run all checks, print a line for each, and tell whether all are as they should be."""
    good = True
    for check in CHECKS:
        name, measured, expected, remedy = check(settings)
        right = abs(measured - expected) <= tolerance * abs(expected)
        advice = "" if right else f" - look at: {remedy}"
        print(f"{'ok  ' if right else 'FAIL'} {name}: {measured:.4g}, expected {expected:.4g}{advice}", flush=True)
        good &= right
    return good


def main(argv: list[str]) -> int:
    """Run from the command line; returns the exit code."""
    try:
        config = parse(Config, argv, "python -m experiments.verify_isaacgym")
        return 0 if verify(config.isaacgym, config.tolerance) else 1
    except (InputError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
