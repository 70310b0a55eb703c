"""Reward terms of robots that walk.

Each factory takes a `Robot` and constants and returns a term's function `(params, before, action, after) -> []`, for
one robot. Terms say what they measure, with its unit; whether it pays or costs is its weight's sign. What a name calls
an error, a rate or a velocity is squared and meant as a cost; what it says to track or to keep is between 0 and 1.

A term that follows a command reads `before.memory["command"]["velocity"]`, the one that the policy was shown: `[3]`,
forward and left in m/s and yaw rate in rad/s, in the heading frame. Terms with a `still` apart take a command whose
norm is below it for an order to stand; `still=0` reads no command. What feet and gait were doing is in
`memory["feet"]` and `memory["gait"]`; `feet_memory` and `gait_memory` keep it, and a term never remembers anything.

Every gradient is finite: no root is taken at 0, and flags and times have no gradient.

Sources are named by project: legged_gym (Rudin et al. 2022, "Learning to walk in minutes using massively parallel deep
RL"), unitree_rl_gym, Isaac Lab, mjlab, MuJoCo Playground.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rlcore.env import EnvState, Memory, Params
from rlcore.errors import InputError
from rlcore.physics.engine import PhysicsState
from rlcore.rewards import TermFn, exponential
from rlcore.robot import Robot

# --- what terms remember ------------------------------------------------------------------------------------


def feet_memory(robot: Robot, dt: float, threshold: float = 1.0) -> Memory:
    """What the feet were doing, as `memory["feet"]`; times count control steps.

    It is a dict of `[feet]` tensors:
      `contact`: bool, the foot carries more than `threshold`.
      `landed`: bool, it does so since this step.
      `air_time`: s off the ground in the present swing; in the step of landing, in the swing that ended; else 0.
      `contact_time`: s on the ground so far; 0 in the air.
      `peak_height`: m, the highest of the present swing; in the step of landing, of the swing that ended; on the
        ground, where the foot is.

    Args:
      robot: its feet are the ones.
      dt: control interval, s.
      threshold: normal force of a contact, N.

    Raises:
      InputError: for an interval that is not above 0, or a negative threshold.
    """
    _positive("dt", dt)
    _not_negative("threshold", threshold)

    def init(params: Params, physics: PhysicsState, key: Tensor) -> dict[str, Tensor]:
        contact = robot.foot_contact(physics) > threshold
        height = robot.foot_position(physics)[:, 2]
        zero = torch.zeros_like(height)
        return {
            "contact": contact,
            "landed": torch.zeros_like(contact),
            "air_time": zero,
            "contact_time": zero,
            "peak_height": height,
        }

    def update(params: Params, before: EnvState, action: Tensor, physics: PhysicsState) -> dict[str, Tensor]:
        old = _remembered(before, "feet")
        contact, stood = robot.foot_contact(physics) > threshold, old["contact"]
        height = robot.foot_position(physics)[:, 2]
        # A swing's time and height outlast it by the step of landing, in which they are paid for.
        swing = torch.where(stood, 0.0, old["air_time"])
        return {
            "contact": contact,
            "landed": contact & ~stood,
            "air_time": torch.where(contact, swing, swing + dt),
            "contact_time": torch.where(contact, old["contact_time"] + dt, 0.0),
            "peak_height": torch.where(stood | (height > old["peak_height"]), height, old["peak_height"]),
        }

    return Memory(init, update)


def gait_memory(period: float) -> Memory:
    """A clock of strides, as `memory["gait"]`: phase `[]` in [0, 1), 0 at a reset.

    Args:
      period: s that a stride of all feet takes.

    Raises:
      InputError: for a period that is not above 0.
    """
    _positive("period", period)

    def update(params: Params, before: EnvState, action: Tensor, physics: PhysicsState) -> Tensor:
        phase = _remembered(before, "gait") + (physics.time - before.physics.time) / period
        return phase - torch.floor(phase)

    return Memory(lambda params, physics, key: torch.zeros_like(physics.time), update)


def previous_action_memory(size: int) -> Memory:
    """The action before the last one, as `memory["previous_action"]` `[size]`; 0 at a reset, as the last one is.

    Raises:
      InputError: for a size below 1.
    """
    if size < 1:
        raise InputError(f"size must be at least 1 action, got {size}")
    return Memory(
        lambda params, physics, key: physics.qpos.new_zeros((size,)),
        lambda params, before, action, physics: before.memory["last_action"],
    )


# --- following a command ------------------------------------------------------------------------------------


def track_planar_velocity(robot: Robot, scale: float = 0.5, vertical: float = 0.0) -> TermFn:
    """`exp(-(||v_xy - c_xy||^2 + vertical v_z^2) / scale^2)`, velocities in the heading frame, m/s.

    Source: legged_gym; the heading frame, in which leaning is no error: Isaac Lab; `vertical=1`: mjlab.
    """
    _positive("scale", scale)
    _not_negative("vertical", vertical)

    def fn(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
        forward, left, up = robot.heading_velocity(after.physics).unbind(-1)
        ahead, aside, _ = _command(before)
        return exponential((forward - ahead) ** 2 + (left - aside) ** 2 + vertical * up**2, scale)

    return fn


def track_yaw_rate(robot: Robot, scale: float = 0.5, roll_pitch: float = 0.0) -> TermFn:
    """`exp(-((w_z - c_yaw)^2 + roll_pitch ||w_xy||^2) / scale^2)`, rad/s.

    w_z is about the vertical, w_xy in the root's frame.
    Source: legged_gym; about the vertical: Isaac Lab; `roll_pitch=1`: mjlab.
    """
    _positive("scale", scale)
    _not_negative("roll_pitch", roll_pitch)

    def fn(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
        error = (robot.yaw_rate(after.physics) - _command(before)[2]) ** 2
        roll, pitch, _ = robot.angular_velocity(after.physics).unbind(-1)
        return exponential(error + roll_pitch * (roll**2 + pitch**2), scale)

    return fn


def stand_still(robot: Robot, still: float = 0.1, position: float = 1.0, velocity: float = 0.0) -> TermFn:
    """`sum_i position |q_i - q0_i| + velocity |qd_i|` where the command's norm is below `still`, else 0; rad, rad/s.

    Source: legged_gym, which has the part of positions.
    """
    _positive("still", still)
    _not_negative("position", position)
    _not_negative("velocity", velocity)

    def fn(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
        away = (robot.joint_position(after.physics) - robot.pose).abs()
        moved = position * away + velocity * robot.joint_velocity(after.physics).abs()
        return torch.where(_is_moving(before, still), 0.0, moved.sum())

    return fn


# --- the root -----------------------------------------------------------------------------------------------


def tilt(robot: Robot) -> TermFn:
    """`||g_xy||^2`, with g the unit vector of gravity in the root's frame: the squared sine of the lean.

    Source: legged_gym.
    """

    def fn(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
        return _total(robot.gravity(after.physics)[:2] ** 2)

    return fn


def upright(robot: Robot, scale: float = 0.45) -> TermFn:
    """`exp(-||g_xy||^2 / scale^2)`, see `tilt`; 1 when upright. Source: mjlab, of scale^2 = 0.2."""
    _positive("scale", scale)
    lean = tilt(robot)

    def fn(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
        return exponential(lean(params, before, action, after), scale)

    return fn


def height_error(robot: Robot, target: float) -> TermFn:
    """`(z - target)^2`, m^2: the root off its height above a level floor. Source: legged_gym."""
    _positive("target", target)

    def fn(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
        return (robot.height(after.physics) - target) ** 2

    return fn


def keep_height(robot: Robot, target: float, scale: float = 0.1) -> TermFn:
    """`exp(-(z - target)^2 / scale^2)`, m; 1 at the height. Source: `height_error` as a bounded reward."""
    _positive("scale", scale)
    error = height_error(robot, target)

    def fn(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
        return exponential(error(params, before, action, after), scale)

    return fn


def vertical_velocity(robot: Robot) -> TermFn:
    """`v_z^2`, (m/s)^2: bobbing, along the vertical. Source: legged_gym."""

    def fn(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
        return robot.heading_velocity(after.physics)[2] ** 2

    return fn


def roll_pitch_velocity(robot: Robot) -> TermFn:
    """`w_x^2 + w_y^2`, (rad/s)^2: swaying, in the root's frame. Source: legged_gym."""

    def fn(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
        return _total(robot.angular_velocity(after.physics)[:2] ** 2)

    return fn


def angular_momentum(robot: Robot) -> TermFn:
    """`||L||^2`, (kg m2/s)^2, about the centre of mass: arms that do not swing with the legs. Source: mjlab.

    Raises:
      InputError: for a robot without that sensor.
    """
    if robot.momentum is None:
        raise InputError("angular_momentum needs a robot with that sensor: make_robot(angular_momentum=NAME)")

    def fn(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
        return _total(robot.angular_momentum(after.physics) ** 2)

    return fn


# --- the joints ---------------------------------------------------------------------------------------------


def torque(robot: Robot) -> TermFn:
    """`||tau||^2`, (Nm)^2, as applied in the last physics substep. Source: legged_gym."""

    def fn(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
        return (robot.joint_torque(after.physics) ** 2).sum()

    return fn


def power(robot: Robot) -> TermFn:
    """`sum_i |tau_i qd_i|`, W: mechanical work of every servo, given or taken. Source: MuJoCo Playground ("energy")."""

    def fn(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
        return (robot.joint_torque(after.physics) * robot.joint_velocity(after.physics)).abs().sum()

    return fn


def joint_acceleration(robot: Robot, dt: float) -> TermFn:
    """`||(qd_t - qd_tm1) / dt||^2`, (rad/s^2)^2, over a control interval of `dt` s. Source: legged_gym."""
    _positive("dt", dt)
    rate = 1.0 / dt

    def fn(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
        change = robot.joint_velocity(after.physics) - robot.joint_velocity(before.physics)
        return ((rate * change) ** 2).sum()

    return fn


def action_acceleration(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
    """`||a_t - 2 a_tm1 + a_tm2||^2`: jerky commands; needs `previous_action_memory`. Needs no robot, so no factory.

    Source: the second-order smoothness of legged_gym's successors; mjlab ("action_acc").
    """
    last, previous = before.memory["last_action"], _remembered(before, "previous_action")
    return ((action - 2 * last + previous) ** 2).sum()


def joint_limits(robot: Robot, soft: float = 0.9) -> TermFn:
    """`sum_i max(l_i - q_i, 0) + max(q_i - u_i, 0)`, rad, where [l, u] is the middle `soft` of each joint's range.

    Joints without limits cost nothing. Source: legged_gym.

    Raises:
      InputError: unless 0 < soft <= 1.
    """
    if not 0 < soft <= 1:
        raise InputError(f"soft must be a share of the joint's range above 0, at most 1, got {soft}")
    cut = 0.5 * (1 - soft) * (robot.upper - robot.lower)
    cut = torch.where(torch.isfinite(cut), cut, 0.0)
    lower, upper = robot.lower + cut, robot.upper - cut

    def fn(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
        position = robot.joint_position(after.physics)
        return (torch.clamp(lower - position, min=0.0) + torch.clamp(position - upper, min=0.0)).sum()

    return fn


def posture_error(robot: Robot, weights: float | Mapping[str, float] = 1.0) -> TermFn:
    """`sum_i w_i (q_i - q0_i)^2`, rad^2, from the default pose; `weights` as in `Robot.per_joint`.

    Source: MuJoCo Playground.
    """
    share = robot.per_joint(weights)

    def fn(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
        return (share * (robot.joint_position(after.physics) - robot.pose) ** 2).sum()

    return fn


def posture_deviation(robot: Robot, weights: float | Mapping[str, float] = 1.0) -> TermFn:
    """`sum_i w_i |q_i - q0_i|`, rad: as `posture_error`, but small deviations count too. Source: Isaac Lab."""
    share = robot.per_joint(weights)

    def fn(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
        return (share * (robot.joint_position(after.physics) - robot.pose).abs()).sum()

    return fn


def keep_posture(robot: Robot, scales: float | Mapping[str, float] = 0.3) -> TermFn:
    """`exp(-mean_i (q_i - q0_i)^2 / scale_i^2)`, rad; `scales` as in `Robot.per_joint`. Source: mjlab.

    Raises:
      InputError: for a scale that is not above 0.
    """
    scale = robot.per_joint(scales)
    for name, value in zip(robot.joints, scale.tolist(), strict=True):
        _positive(f"scale of {name}", value)
    share = -1.0 / (len(scale) * scale**2)

    def fn(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
        return torch.exp((share * (robot.joint_position(after.physics) - robot.pose) ** 2).sum())

    return fn


# --- the feet -----------------------------------------------------------------------------------------------


def foot_air_time(robot: Robot, target: float = 0.5, still: float = 0.1) -> TermFn:
    """`sum over feet that land of (t_air - target)`, s: long steps pay, short ones cost. Source: legged_gym.

    0 where the command's norm is below `still`. It is paid once a landing, so its weight is per landing times 1/dt.
    """
    _positive("target", target)
    _not_negative("still", still)

    def fn(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
        feet = _remembered(after, "feet")
        return _while_moving(before, still, _total(torch.where(feet["landed"], feet["air_time"] - target, 0.0)))

    return fn


def single_stance(robot: Robot, cap: float = 0.4, still: float = 0.1) -> TermFn:
    """`min(time since any foot landed or left, cap)`, s, where exactly one foot is on the ground, else 0.

    A walk of even steps gets the most; neither hopping nor standing gets any. 0 where the command's norm is below
    `still`. Source: Isaac Lab ("feet air time", biped).
    """
    _positive("cap", cap)
    _not_negative("still", still)

    def fn(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
        feet = _remembered(after, "feet")
        contact = feet["contact"]
        time = torch.where(contact, feet["contact_time"], feet["air_time"]).amin(-1)
        alone = _total(contact.to(time.dtype)) == 1
        return _while_moving(before, still, torch.where(alone, torch.clamp(time, max=cap), 0.0))

    return fn


def gait_contact(
    robot: Robot, offsets: tuple[float, ...] = (0.0, 0.5), stance: float = 0.55, still: float = 0.0
) -> TermFn:
    """How many feet are on the ground when the clock says so, and off it when not.

    Foot i is to stand while `(phase + offset_i) mod 1 < stance`, the phase that of `gait_memory`. 0 where the
    command's norm is below `still`. Source: unitree_rl_gym.

    Raises:
      InputError: unless there is an offset in [0, 1) for each foot, and 0 < stance < 1.
    """
    _check_gait(robot, offsets, stance)
    _not_negative("still", still)
    shift = torch.tensor(offsets, dtype=torch.float64)

    def fn(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
        phase = _remembered(after, "gait") + shift
        stands = torch.where(phase >= 1, phase - 1, phase) < stance
        agree = (stands == _remembered(after, "feet")["contact"]).to(phase.dtype)
        return _while_moving(before, still, _total(agree))

    return fn


def track_feet(
    robot: Robot,
    home: Tensor,
    period: float,
    *,
    offsets: tuple[float, ...] = (0.0, 0.5),
    stance: float = 0.55,
    lift: float = 0.1,
    scale: float = 0.15,
    vertical: float = 4.0,
    still: float = 0.1,
) -> TermFn:
    """`mean_feet exp(-(||p_xy - r_xy||^2 + vertical (p_z - r_z)^2) / scale^2)`: feet on the path of an even walk, m.

    The path of foot i, in the heading frame and in the phase of `gait_memory` plus its offset: while it stands it goes
    back evenly by the way that the commanded body makes in a stance, `(v + w x home_i) stance period`, half of it in
    front of `home_i` and half behind; while it swings it returns, slow at both ends, and its height goes up to `lift`
    and back as a squared sine. Where the command's norm is below `still` the feet are to stand at home.

    Source: Raibert 1986, "Legged robots that balance" (where feet land: half a stance's way ahead); as a reward,
    Margolis and Agrawal 2022, "Walk these ways".

    Args:
      robot: its feet are the ones.
      home: `[feet, 2]` where the feet stand, seen from the root in the heading frame, m.
      period: s that a stride of all feet takes, as of `gait_memory`.
      offsets: phase of each foot, in [0, 1).
      stance: share of the period that a foot stands.
      lift: highest point of a swing above the ground, m.
      scale: error at which a foot gets 0.37, m.
      vertical: how much more a squared error of height counts.
      still: commands below this are an order to stand.

    Raises:
      InputError: for a `home` or `offsets` that do not fit the feet, or a number out of its range.
    """
    _check_gait(robot, offsets, stance)
    if home.shape != (len(robot.feet), 2):
        raise InputError(f"home must be x and y of each of {len(robot.feet)} feet, got shape {list(home.shape)}")
    for name, value in (("period", period), ("lift", lift), ("scale", scale)):
        _positive(name, value)
    _not_negative("vertical", vertical)
    _not_negative("still", still)
    shift = torch.tensor(offsets, dtype=torch.float64)
    home_x, home_y = home.to(torch.float64).unbind(-1)
    way = stance * period

    def fn(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
        x, y, z = robot.foot_position_in_heading(after.physics).unbind(-1)
        ahead, aside, turn = _command(before)
        phase = _remembered(after, "gait") + shift
        phase = torch.where(phase >= 1, phase - 1, phase)
        swing = torch.clamp((phase - stance) / (1 - stance), min=0.0)  # 0 all through the stance
        # From half a way ahead to half a way behind, and back.
        along = torch.where(phase < stance, 0.5 - phase / stance, -0.5 * torch.cos(math.pi * swing))
        rise = _while_moving(before, still, lift * torch.sin(math.pi * swing) ** 2)
        off_x = x - home_x - along * way * (ahead - turn * home_y)
        off_y = y - home_y - along * way * (aside + turn * home_x)
        off_z = z + robot.height(after.physics) - rise
        return _total(exponential(off_x**2 + off_y**2 + vertical * off_z**2, scale)) / len(robot.feet)

    return fn


def swing_height(robot: Robot, target: float = 0.08) -> TermFn:
    """`sum over feet in the air of (z - target)^2`, m^2, at every step of a swing. Source: unitree_rl_gym."""
    _positive("target", target)

    def fn(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
        error = (robot.foot_position(after.physics)[:, 2] - target) ** 2
        return _total(torch.where(_remembered(after, "feet")["contact"], 0.0, error))

    return fn


def swing_peak(robot: Robot, target: float = 0.1, still: float = 0.1) -> TermFn:
    """`sum over feet that land of (z_peak / target - 1)^2`: how high the swing that ended was, m. Source: mjlab.

    0 where the command's norm is below `still`.
    """
    _positive("target", target)
    _not_negative("still", still)

    def fn(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
        feet = _remembered(after, "feet")
        error = (feet["peak_height"] / target - 1) ** 2
        return _while_moving(before, still, _total(torch.where(feet["landed"], error, 0.0)))

    return fn


def foot_clearance(robot: Robot, target: float = 0.1, still: float = 0.1) -> TermFn:
    """`sum_feet |z - target| ||v_xy||`, m2/s: a foot that moves over the floor is to be at its height. Source: mjlab.

    0 where the command's norm is below `still`.
    """
    _positive("target", target)
    _not_negative("still", still)

    def fn(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
        x, y, _ = robot.foot_velocity(after.physics).unbind(-1)
        off = (robot.foot_position(after.physics)[:, 2] - target).abs()
        return _while_moving(before, still, _total(off * _root(x**2 + y**2)))

    return fn


def foot_slip(robot: Robot) -> TermFn:
    """`sum over feet in contact of ||v_xy||^2`, (m/s)^2, of the feet's own velocities. Source: MuJoCo Playground."""

    def fn(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
        x, y, _ = robot.foot_velocity(after.physics).unbind(-1)
        return _total(torch.where(_remembered(after, "feet")["contact"], x**2 + y**2, 0.0))

    return fn


def landing_impact(robot: Robot) -> TermFn:
    """`sum over feet that land of F`, N, the normal force at the end of the step of landing. Source: mjlab."""

    def fn(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
        return _total(torch.where(_remembered(after, "feet")["landed"], robot.foot_contact(after.physics), 0.0))

    return fn


def self_collision(robot: Robot) -> TermFn:
    """How many of the robot's self-contact sensors read contact. Source: mjlab.

    Raises:
      InputError: for a robot without such sensors.
    """
    if not robot.self_contacts:
        raise InputError("self_collision needs a robot with such sensors: make_robot(self_contacts=[NAME, ...])")

    def fn(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
        force = robot.self_contact(after.physics)
        return _total((force > 0).to(force.dtype))

    return fn


# --- parts --------------------------------------------------------------------------------------------------


def _check_gait(robot: Robot, offsets: tuple[float, ...], stance: float) -> None:
    if len(offsets) != len(robot.feet) or not all(0 <= offset < 1 for offset in offsets):
        raise InputError(f"offsets must be a number in [0, 1) for each of {len(robot.feet)} feet, got {offsets}")
    if not 0 < stance < 1:
        raise InputError(f"stance must be a share of the period between 0 and 1, got {stance}")


def _remembered(state: EnvState, name: str) -> Any:
    if name not in state.memory:
        raise InputError(
            f"a reward term needs memory {name!r}, which the task does not keep: make_env(memory={{{name!r}: ...}})"
        )
    return state.memory[name]


def _command(before: EnvState) -> tuple[Tensor, Tensor, Tensor]:
    """What was commanded: forward and left in m/s, yaw rate in rad/s, each `[]`."""
    forward, left, yaw_rate = _remembered(before, "command")["velocity"].unbind(-1)
    return forward, left, yaw_rate


def _is_moving(before: EnvState, still: float) -> Tensor:
    """Whether the command's norm (m/s and rad/s alike) is at least `still`, `[]` bool."""
    forward, left, yaw_rate = _command(before)
    return forward**2 + left**2 + yaw_rate**2 >= still**2


def _while_moving(before: EnvState, still: float, value: Tensor) -> Tensor:
    return torch.where(_is_moving(before, still), value, 0.0) if still > 0 else value


def _total(x: Tensor) -> Tensor:
    """The sum over a short axis, written out: additions are fused with what is around them, a reduction is not."""
    first, *rest = x.unbind(-1)
    for part in rest:
        first = first + part
    return first


def _root(square: Tensor) -> Tensor:
    """The square root, with a gradient of 0 at 0."""
    zero = square <= 0
    return torch.where(zero, 0.0, torch.sqrt(torch.where(zero, 1.0, square)))


def _positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise InputError(f"{name} must be more than 0, got {value}")


def _not_negative(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise InputError(f"{name} must be 0 or more, got {value}")
