"""Check an installation of Isaac Gym: what it is told of a model, and what it makes of it, measured on itself.

    python -m experiments.verify_isaacgym --isaacgym.python /path/to/python3.8

Small mechanisms with known answers are simulated one after another. Each line says what was measured, what it should
be, and what to do if it is not. Nothing is trained, and nothing is written.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mujoco
import numpy as np
import torch
from torch import Tensor
from torch.func import vmap

from experiments.cli import parse
from rlcore.errors import InputError, check_field
from rlcore.physics.engines import check_available
from rlcore.physics.isaacgym import IsaacGymEngine
from rlcore.physics.isaacgym_settings import Settings
from rlcore.tree import map_leaves

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
  <option timestep="0.001"/>
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


# Its inertia is the same about every axis through the point in which its hinges meet.
GIMBAL = """
<mujoco>
  <compiler angle="radian"/>
  <option timestep="0.001" gravity="0 0 0"/>
  <worldbody>
    <body name="ball">
      <joint name="yaw" axis="0 0 1"/>
      <joint name="roll" axis="1 0 0"/>
      <joint name="pitch" axis="0 1 0"/>
      <inertial pos="0 0 0" mass="1" diaginertia="0.02 0.02 0.02"/>
    </body>
  </worldbody>
  <sensor><framequat name="orientation" objtype="xbody" objname="ball"/></sensor>
</mujoco>
"""
# Moments and axis of a top, which leans in the frame of its body by an eighth of a turn about y.
ACROSS, ALONG, AXIS = 0.05, 0.09, (math.sin(math.pi / 4), 0.0, math.cos(math.pi / 4))
TOP = f"""
<mujoco>
  <option timestep="0.001" gravity="0 0 0"/>
  <worldbody>
    <body name="top">
      <inertial pos="0 0 0" quat="{math.cos(math.pi / 8)} 0 {math.sin(math.pi / 8)} 0" mass="1"
        diaginertia="{ACROSS} {ACROSS} {ALONG}"/>
      <freejoint name="root"/>
    </body>
  </worldbody>
</mujoco>
"""
CART = """
<mujoco>
  <option timestep="0.005"/>
  <worldbody>
    <body name="cart">
      <joint name="rail" type="slide" axis="1 0 0"/>
      <inertial pos="0 0 0" mass="1" diaginertia="0.1 0.1 0.1"/>
    </body>
  </worldbody>
  <actuator><motor name="motor" joint="rail"/></actuator>
</mujoco>
"""
SLED = """
<mujoco>
  <option timestep="0.005"/>
  <worldbody>
    <geom name="floor" type="plane" size="5 5 1" friction="0.2 0 0"/>
    <body name="sled" pos="0 0 0.05">
      <inertial pos="0 0 0" mass="2" diaginertia="0.05 0.05 0.1"/>
      <freejoint name="root"/>
      <geom name="sled" type="box" size="0.3 0.3 0.05" friction="0.5 0 0"/>
    </body>
  </worldbody>
</mujoco>
"""


@dataclass(frozen=True)
class Config:
    """Measure what Isaac Gym does with mechanisms whose motion is known."""

    tolerance: float = 0.03
    """Share of the expected value by which a measured one may differ."""
    isaacgym: Settings = field(default_factory=Settings)
    """How Isaac Gym runs."""

    def __post_init__(self) -> None:
        check_field("--", self, "tolerance", 0 < self.tolerance < 1, "more than 0 and less than 1")


class Check(NamedTuple):
    """One measurement: what it is of, the number, what it should be, and what to do if it is not."""

    name: str
    measured: float
    expected: float
    remedy: str


def _run(
    xml: str,
    settings: Settings,
    qpos: Sequence[float],
    qvel: Sequence[float],
    ctrl: Sequence[float],
    steps: int,
    fields: dict[str, Tensor] | None = None,
    wrench: Tensor | None = None,
) -> Any:
    """The state of one robot after some substeps, with model fields and wrenches on its bodies if they are given."""
    engine = IsaacGymEngine(mujoco.MjModel.from_xml_string(xml), settings)
    try:
        row = lambda x: torch.tensor([x], dtype=torch.float64)  # noqa: E731
        state = vmap(engine.initial)(row(qpos), row(qvel))
        step = lambda s, c: engine.step(fields or {}, s, c, wrench, substeps=steps)  # noqa: E731
        return map_leaves(Tensor.cpu, vmap(step)(state, row(ctrl)))
    finally:
        engine.close()


def _turn(axis: np.ndarray, angle: float) -> np.ndarray:
    """The rotation matrix of an angle about an axis of length 1."""
    x, y, z = axis
    across = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + math.sin(angle) * across + (1 - math.cos(angle)) * across @ across


def _matrix(quaternion: Any) -> np.ndarray:
    flat = np.zeros(9)
    mujoco.mju_quat2Mat(flat, np.asarray(quaternion, dtype=np.float64))
    return flat.reshape(3, 3)


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
    state = _run(WHEEL.format(damping=0, actuator=MOTOR), settings, [0], [0], [0.5], 500)
    return Check("speed that a motor reaches, rad/s", float(state.qvel[0, 0]), 5.0, "efforts, or armature is left out")


def slowing(settings: Settings) -> Check:
    """Damping of 0.2 slows the same wheel: after one time constant of 0.5 s it has 1/e of its speed."""
    state = _run(WHEEL.format(damping=0.2, actuator=MOTOR), settings, [0], [4], [0], 500)
    return Check("speed after a time constant, rad/s", float(state.qvel[0, 0]), 4 * 0.36788, "damping of driven joints")


def following(settings: Settings) -> Check:
    """A servo on its way: with an inertia of 0.1, kp 20 and kv 2 it is damped by 1/sqrt(2), at w = 10 sqrt(2) rad/s.

    So it has gone 1 - exp(-10 t) (cos 10 t + sin 10 t) of its way after t, which tells wrong gains, unlike its end.
    """
    state = _run(WHEEL.format(damping=0, actuator=SERVO), settings, [0], [0], [0.5], 100)
    expected = 0.5 * (1.0 - math.exp(-1.0) * (math.cos(1.0) + math.sin(1.0)))
    return Check("angle of a servo after 0.1 s, rad", float(state.qpos[0, 0]), expected, "stiffness and damping")


def gimbal(settings: Settings) -> Check:
    """A ball on three hinges that meet in its centre turns on as it was turned, about one axis of the world."""
    model = mujoco.MjModel.from_xml_string(GIMBAL)
    data = mujoco.MjData(model)
    data.qpos[:], data.qvel[:] = (0.3, 0.4, -0.5), (1.5, -1.0, 0.5)
    mujoco.mj_forward(model, data)
    start = data.body("ball").xmat.reshape(3, 3).copy()
    velocity = data.body("ball").cvel[:3].copy()
    state = _run(GIMBAL, settings, list(data.qpos), list(data.qvel), [], 400)
    speed = float(np.linalg.norm(velocity))
    expected = _turn(velocity / speed, 0.4 * speed) @ start
    data.qpos[:] = state.qpos[0]
    mujoco.mj_kinematics(model, data)
    # As the joints tell it, and as the body tells it.
    found = (data.body("ball").xmat.reshape(3, 3), _matrix(state.sensordata[0]))
    error = max(math.acos(min(1.0, (np.trace(m.T @ expected) - 1.0) / 2.0)) for m in found)
    return Check("error of a body on three hinges, plus 1, rad", 1.0 + error, 1.0, "joints of a body, and their order")


def leaning(settings: Settings) -> Check:
    """A top without torque: its axis goes around its angular momentum L at |L| / (moment across its axis)."""
    spin, axis, seconds = np.array([0.0, 1.0, 4.0]), np.array(AXIS), 0.4
    momentum = ACROSS * spin + (ALONG - ACROSS) * (axis @ spin) * axis
    state = _run(TOP, settings, [0, 0, 0, 1, 0, 0, 0], [0, 0, 0, *spin], [], 400)
    length = float(np.linalg.norm(momentum))
    expected = _turn(momentum / length, length / ACROSS * seconds) @ axis
    error = math.acos(min(1.0, float(_matrix(state.qpos[0, 3:7]) @ axis @ expected)))
    return Check("error of a top's axis, plus 1, rad", 1.0 + error, 1.0, "inertia, its axes, or gyroscopic forces")


def heavier(settings: Settings) -> Check:
    """A cart of 1 kg that is given 4 kg is pushed with 8 N for 0.5 s."""
    fields = {"body_mass": torch.tensor([0.0, 4.0], dtype=torch.float64)}
    state = _run(CART, settings, [0], [0], [8], 100, fields=fields)
    return Check("speed of a cart that was given another mass, m/s", float(state.qvel[0, 0]), 1.0, "setting masses")


def sliding(settings: Settings) -> Check:
    """A sled with a friction of 0.5 on a floor of 0.2, of which the larger counts, goes v^2 / (2 mu g)."""
    state = _run(SLED, settings, [0, 0, 0.05, 1, 0, 0, 0], [2.0, 0, 0, 0, 0, 0], [], 120)
    return Check("way that a sled slides, m", float(state.qpos[0, 0]), 4.0 / (2 * 0.5 * 9.81), "friction of shapes")


def pushing(settings: Settings) -> Check:
    """A force of 20 N at the centre of mass of a box of 2 kg moves it for 0.1 s and does not turn it."""
    wrench = torch.zeros(2, 6, dtype=torch.float64)
    wrench[1, 1] = 20.0
    state = _run(BOX, settings, [0, 0, 5, 1, 0, 0, 0], [0.0] * 6, [], 20, wrench=wrench)
    return Check("speed that a force gives, m/s", float(state.qvel[0, 1]), 1.0, "forces on bodies, or where they act")


CHECKS: tuple[Callable[[Settings], Check], ...] = (
    falling, spinning, resting, turning, slowing, following, gimbal, leaning, heavier, sliding, pushing,
)  # fmt: skip


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
        check_available(config.isaacgym)
        return 0 if verify(config.isaacgym, config.tolerance) else 1
    except (InputError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
