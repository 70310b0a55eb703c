"""The velocity task of any robot on two legs with position servos: it walks where it is told.

`make_walker` reads from a model, by names, what such a robot is: how actions move its servos, and how episodes begin.
`make_walking` makes of it the task: what is seen and commanded, how steps are rewarded and episodes end, and the
curriculum. A robot's own files give the model and its numbers; nothing here knows a particular robot.

The policy sees what a real robot measures (angular velocity, the direction of gravity, joint angles and velocities),
the command, the clock of its stride, and its own last action. The value function also sees what only a simulation
knows: velocity, heights, forces, the robot's mass and the friction of its soles.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlcore import random, rewards, terminations
from rlcore.commands import VelocityCommands, command_values, velocity_commands
from rlcore.curriculum import Stage, curriculum
from rlcore.env import Env, EnvState, Params, Transition, make_env, random_pushes, time_limit
from rlcore.errors import InputError
from rlcore.monitoring import robot_metrics
from rlcore.physics.mujoco import ModelEngine
from rlcore.rewards import Term, locomotion
from rlcore.robot import Robot, make_robot
from rlcore.symmetry import Symmetry, make_symmetry

CONTROL_DT = 0.02  # s
ENDINGS = ("low", "tilted")

PARTS = {
    "angular_velocity": "axial",
    "gravity": "polar",
    "command": "command",
    "gait": "phase",
    "joint_position": "joints",
    "joint_velocity": "joints",
    "last_action": "action",
    "linear_velocity": "polar",
    "height": "scalar",
    "foot_force": "feet",
    "foot_height": "feet",
    "mass": "scalar",
    "friction": "feet",
}
"""What each part of the observation groups is in the mirror, as `rlcore.symmetry` calls it."""

# Robots that are only taught to stand do not begin to walk when they are told to, and robots that only learn to walk
# ahead fall when they are to step back or aside: so slow walks in every direction are there from the beginning, among
# pushes of full strength, and the range grows from stage to stage.
STAGES = (
    Stage(
        "balance in place",
        {
            "command_vx": (-0.2, 0.6),
            "command_vy": (-0.1, 0.1),
            "command_yaw_rate": (-0.2, 0.2),
            "standing_fraction": 0.2,
        },
    ),
    Stage(
        "stand",
        {
            "command_vx": (-0.2, 0.8),
            "command_vy": (-0.15, 0.15),
            "command_yaw_rate": (-0.3, 0.3),
            "standing_fraction": 0.2,
        },
    ),
    Stage("walk forward", {"command_vx": (-0.3, 1.0), "command_vy": (-0.2, 0.2), "command_yaw_rate": (-0.5, 0.5)}),
    Stage("turn", {"command_vx": (-0.4, 1.2), "command_vy": (-0.25, 0.25), "command_yaw_rate": (-0.7, 0.7)}),
    Stage("vary speed", {}),
)

WEIGHTS = {
    "track_velocity": 3.0,
    "track_yaw_rate": 1.5,
    "alive": 0.5,
    "upright": 1.0,
    "posture": 1.0,
    "gait": 0.5,
    "feet": 3.0,
    "foot_slip": -0.2,
    "height": -10.0,
    "vertical_velocity": -0.5,
    "roll_pitch_velocity": -0.05,
    "stand_still": -0.2,
    "torque": -1e-5,
    "joint_acceleration": -1e-7,
    "action_rate": -0.02,
    "joint_limits": -1.0,
    "termination": -100.0,
}
"""The reward terms and their weights, per second. What each measures is in `rlcore.rewards.locomotion`."""


class Walker(NamedTuple):
    """A robot, its engine, and the functions of a task that do not depend on what the robot is to do."""

    engine: ModelEngine
    robot: Robot
    action_bounds: tuple[list[float], list[float]]
    control: Callable[[Params, EnvState, Tensor], Tensor]
    """`(params, state, action [n]) -> servo targets [n]`, rad."""
    initial: Callable[[Params, Tensor], tuple[Tensor, Tensor]]
    """`(params, key) -> (qpos, qvel)`: the standing pose with joints off a little, leaning a little in any direction,
    and moving."""
    home: Tensor
    """`[feet, 2]` where the feet of the standing pose are, seen from the root, m: forward, left."""
    standing_height: float
    """Of the root above the floor in the standing pose, m."""


def make_walker(
    engine: ModelEngine,
    *,
    keyframe: str = "stand",
    action_share: float = 1.0,
    action_bound: float = 4.0,
    joint_noise: float = 0.12,
    lean: float = 0.05,
    speed: float = 0.1,
) -> Walker:
    """What a task needs of a robot whose model has position servos and a keyframe in which it stands.

    An action is an offset of the servos' targets from the standing pose: target = pose + action_share L / kp action,
    with L the torque limit of the servo and kp its stiffness. So an action of 1 / action_share moves a target as far as
    takes a servo at rest to its limit, and equal actions mean equal effort in an ankle and in a hip.

    Args:
      engine: the robot; its root, feet and torque sensors have the names that `make_robot` takes for granted.
      keyframe: the standing pose, soles on the floor, and its controls.
      action_share: share of the torque limit that an action of 1 asks for.
      action_bound: actions are clipped to this, either way.
      joint_noise: largest error of a joint in the posture that an episode begins with, rad.
      lean: largest rotation about each axis of the attitude that it begins with, rad.
      speed: largest of every velocity that it begins with, m/s and rad/s.

    Raises:
      InputError: for an actuator that is no position servo with a torque limit, a joint without a servo or in another
        order than the servos, a number that is not above 0 (not below 0 for noise, lean and speed), a missing name, or
        a standing pose below the floor.
    """
    for name, value in (("action_share", action_share), ("action_bound", action_bound)):
        if not 0 < value < math.inf:
            raise InputError(f"{name} must be above 0, got {value}")
    for name, value in (("joint_noise", joint_noise), ("lean", lean), ("speed", speed)):
        if not 0 <= value < math.inf:
            raise InputError(f"{name} must be 0 or more, got {value}")
    model, mjmodel = engine.model, engine.mjmodel
    stiffness, limit = mjmodel.actuator_gainprm[:, 0], mjmodel.actuator_forcerange[:, 1]
    servos = (stiffness > 0) & (mjmodel.actuator_biasprm[:, 1] == -stiffness) & (limit > 0)
    if loose := [name for name, is_servo in zip(model.actuators, servos, strict=True) if not is_servo]:
        raise InputError(f"actuators must be position servos with a torque limit, which is not so for {loose}")
    stand_qpos, stand_ctrl = model.keyframe(keyframe)
    actuated = model.actuated()[0]
    pose = stand_qpos[actuated]
    robot = make_robot(model, pose=pose)
    if (robot.root.qpos.start, actuated) != (0, slice(7, model.nq)):
        raise InputError("the root must be the first joint and every other joint have a servo, in the same order")
    root = robot.root.qpos
    scale = torch.as_tensor(action_share * limit / stiffness)  # rad per unit of action
    height = float(stand_qpos[root.start + 2])
    if not height > 0:
        raise InputError(f"the root must stand above the floor in keyframe {keyframe!r}, got {height} m")
    # Two centimetres up: where joints are off and the body leans, a toe may still begin below the floor.
    raised = stand_qpos[:3] + torch.tensor([0.0, 0.0, 0.02], dtype=torch.float64)

    def control(params: Params, state: EnvState, action: Tensor) -> Tensor:
        return stand_ctrl + scale * torch.clamp(action, -action_bound, action_bound)

    def initial(params: Params, key: Tensor) -> tuple[Tensor, Tensor]:
        draw = random.uniform(key, (3 + model.nu + model.nv,), -1.0, 1.0, dtype=torch.float64)
        axis, joints, velocity = torch.split(draw, [3, model.nu, model.nv])
        # A small rotation: half its vector beside a scalar of one, made a unit quaternion.
        turn = torch.cat([torch.ones_like(axis[:1]), lean / 2 * axis])
        turn = turn / torch.sqrt(turn.square().sum())
        posture = torch.clamp(pose + joint_noise * joints, robot.lower, robot.upper)
        return torch.cat([raised, turn, posture]), speed * velocity

    standing = engine.forward({}, engine.initial(stand_qpos, torch.zeros(model.nv, dtype=torch.float64)))
    home = robot.foot_position_in_heading(standing)[:, :2]
    bounds = [-action_bound] * model.nu, [action_bound] * model.nu
    return Walker(engine, robot, bounds, control, initial, home, height)


@dataclass(frozen=True)
class WalkingSettings:
    """What differs from robot to robot in the velocity task.

    Attributes:
      posture: how far joints may be from the standing pose, rad, by patterns as in `Robot.per_joint`: those that walk
        may move, those that carry are to stay.
      commands: which commands there are, m/s and rad/s.
      stride: time for a step of both feet, s.
      lift: how far a sole is lifted in a step, m.
      fallen_height: share of the standing height below which the root has fallen.
      fallen_tilt: degrees from upright.
      weights: weights of reward terms that are not those of `WEIGHTS`, per second.
    """

    posture: Mapping[str, float]
    commands: VelocityCommands = field(
        default_factory=lambda: VelocityCommands(
            vx=(-0.5, 1.5), vy=(-0.3, 0.3), yaw_rate=(-1.0, 1.0), standing_fraction=0.1
        )
    )
    stride: float = 0.8
    lift: float = 0.1
    fallen_height: float = 0.7
    fallen_tilt: float = 45.0
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.fallen_height < 1:
            raise InputError(f"fallen_height must be a share of the standing height, got {self.fallen_height}")
        if unknown := [name for name in self.weights if name not in WEIGHTS]:
            raise InputError(f"weights must be of reward terms {', '.join(WEIGHTS)}; got {', '.join(unknown)}")


def make_walking(
    walker: Walker,
    name: str,
    settings: WalkingSettings,
    *,
    seconds: float = 20.0,
    push_interval: float = 4.0,
    push_speed: float = 0.5,
    stages: Sequence[Stage] = STAGES,
) -> Env:
    """The velocity task with pushes and a time limit, without automatic resets.

    Args:
      walker: the robot.
      name: the task's name.
      settings: what is particular to this robot.
      seconds: length of an episode.
      push_interval: mean time between pushes, s.
      push_speed: largest change of the root's horizontal velocity by a push, m/s.
      stages: the curriculum; none for the whole range of commands from the beginning on.

    Raises:
      InputError: for a pattern of joints that fits none, or a number out of its range.
    """
    engine, robot, model = walker.engine, walker.robot, walker.engine.model
    s, dt = settings, CONTROL_DT
    nominal = engine.nominal("body_mass", "geom_friction")
    weight = nominal["body_mass"].sum()
    soles = _soles(engine, robot)

    def observe(params: Params, state: EnvState) -> dict[str, dict[str, Tensor]]:
        physics = state.physics
        angle = 2 * torch.pi * state.memory["gait"].unsqueeze(0)
        policy = {
            "angular_velocity": robot.angular_velocity(physics),
            "gravity": robot.gravity(physics),
            "command": state.memory["command"]["velocity"],
            "gait": torch.cat([torch.sin(angle), torch.cos(angle)]),
            "joint_position": robot.joint_position(physics) - robot.pose,
            "joint_velocity": robot.joint_velocity(physics),
            "last_action": state.memory["last_action"],
        }
        fields = {**nominal, **params.physics}
        privileged = {
            "linear_velocity": robot.linear_velocity(physics),
            "height": robot.height(physics).unsqueeze(0),
            "foot_force": robot.foot_contact(physics),
            "foot_height": robot.foot_position(physics)[:, 2],
            "mass": (fields["body_mass"].sum() / weight).unsqueeze(0),
            "friction": fields["geom_friction"][soles, 0],
        }
        return {"policy": policy, "critic": {**policy, **privileged}}

    watched = robot_metrics(engine, robot, dt)

    def metrics(params: Params, before: EnvState, action: Tensor, after: EnvState) -> dict[str, Any]:
        velocity = robot.heading_velocity(after.physics)
        command = before.memory["command"]["velocity"]
        error = velocity[:2] - command[:2]
        return {
            "velocity_error": torch.sqrt((error * error).sum()),
            "yaw_rate_error": (robot.yaw_rate(after.physics) - command[2]).abs(),
            "forward_velocity": velocity[0],
            **watched(params, before, action, after),
            **terminations.ended_by(rules, ENDINGS, params, after.physics),
        }

    rules = {
        "low": terminations.below_height(model, s.fallen_height * walker.standing_height),
        "tilted": terminations.tilted(model, s.fallen_tilt),
    }
    terms = {
        "track_velocity": locomotion.track_planar_velocity(robot, 0.5),
        "track_yaw_rate": locomotion.track_yaw_rate(robot, 0.5),
        "alive": rewards.alive,
        "upright": locomotion.upright(robot, 0.3),
        "posture": locomotion.keep_posture(robot, s.posture),
        "gait": locomotion.gait_contact(robot, still=0.1),
        "feet": locomotion.track_feet(robot, walker.home, s.stride, lift=s.lift),
        "foot_slip": locomotion.foot_slip(robot),
        "height": locomotion.height_error(robot, walker.standing_height),
        "vertical_velocity": locomotion.vertical_velocity(robot),
        "roll_pitch_velocity": locomotion.roll_pitch_velocity(robot),
        "stand_still": locomotion.stand_still(robot),
        "torque": locomotion.torque(robot),
        "joint_acceleration": locomotion.joint_acceleration(robot, dt),
        "action_rate": rewards.action_rate,
        "joint_limits": locomotion.joint_limits(robot),
        "termination": rewards.termination,
    }
    env = make_env(
        engine,
        name=name,
        control_dt=dt,
        initial=walker.initial,
        control=walker.control,
        action_bounds=walker.action_bounds,
        observe=observe,
        terminate=terminations.ends_if(rules, ENDINGS),
        metrics=metrics,
        memory={
            **velocity_commands(model, s.commands),
            "feet": locomotion.feet_memory(robot, dt),
            "gait": locomotion.gait_memory(s.stride),
        },
        values=command_values(s.commands),
        terms=[Term(term, {**WEIGHTS, **s.weights}[term], fn) for term, fn in terms.items()],
    )
    env = time_limit(random_pushes(env, push_interval, push_speed), seconds)
    return curriculum(env, stages, _followed(env), up=0.55, down=0.35, revisit=0.1) if stages else env


def walking_symmetry(env: Env, signs: Mapping[str, float] | None = None) -> Symmetry:
    """The mirror maps of a velocity task made by `make_walking`, or of an environment wrapped around it.

    Args:
      env: the environment.
      signs: signs of joints whose names do not tell them, as for `rlcore.symmetry.mirror_joints`.

    Raises:
      InputError: if the environment shows parts that are not this task's, or a joint has nobody across.
    """
    return make_symmetry(env.spec, PARTS, signs=signs)


def _followed(env: Env) -> Callable[[Params, dict[str, Any], Transition], Tensor]:
    """How well a step followed its command, in [0, 1]: three parts velocity and one part yaw rate.

    While it explores, a robot's yaw rate swings by half a radian per second however well it walks: it counts for less.
    """
    planar, yaw = (env.spec.terms.index(name) for name in ("track_velocity", "track_yaw_rate"))

    def score(params: Params, memory: dict[str, Any], transition: Transition) -> Tensor:
        return 0.75 * transition.raw_terms[planar] + 0.25 * transition.raw_terms[yaw]

    return score


def _soles(engine: ModelEngine, robot: Robot) -> list[int]:
    """The row of one geom of each foot in `geom_friction`: the first that is named like the foot."""
    geoms = engine.model.geoms
    found = [[i for i, geom in enumerate(geoms) if geom.startswith(foot.name)] for foot in robot.feet]
    for foot, rows in zip(robot.feet, found, strict=True):
        if not rows:
            raise InputError(f"a geom of each foot must be named like it, as {foot.name}_sole; there is none")
    return [rows[0] for rows in found]
