"""The running task of Isaac Gym's Ant and Humanoid, for any robot of motors with a free torso: to a target far away.

Observation and reward are those that returns are published with, term for term; `tasks/ant.py` and
`tasks/humanoid/run.py` give the robots and the numbers that differ between them. Published returns are sums of rewards
per control step, so the weights here, which are per second, are theirs divided by the control interval.

Angles are in [-pi, pi], that to the target is measured in the ground plane, and forces are one physics substep old
(8 ms) except in an episode's first observation. A step whose physics fails is paid as one in the state that it keeps.

Source: Makoviychuk et al. 2021, "Isaac Gym", https://arxiv.org/abs/2108.10470, and its IsaacGymEnvs.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlcore import random, rotations
from rlcore.env import Env, EnvState, Params, make_env, scale_actions, time_limit
from rlcore.errors import InputError
from rlcore.monitoring import robot_metrics
from rlcore.physics.engine import ModelInfo, PhysicsState
from rlcore.physics.mujoco import MujocoEngine
from rlcore.rewards import Term, action_size, alive
from rlcore.robot import make_robot

CONTROL_DT = 0.0166  # s, two substeps
EPISODE_STEPS = 1000  # control steps
TARGET = 1000.0  # m along x
JOINT_NOISE, JOINT_SPEED = 0.2, 0.1  # rad and rad/s, of the posture that an episode begins in
UPRIGHT, UP_WEIGHT = 0.93, 0.1  # the up projection that is paid, and what it is paid
HEADING, HEADING_WEIGHT = 0.8, 0.5  # the heading projection that is paid in full, and what it is paid
CONTACT_FORCE = 0.1  # N, of a foot that metrics count as one on the ground: an ant weighs 9 N


@dataclass(frozen=True)
class RunnerSettings:
    """What differs from robot to robot. Rewards and costs are per control step.

    A joint's share is its motor's torque over that of the strongest motor.

    Attributes:
      start_height: of the torso where an episode begins, m.
      fallen_height: below which it has fallen, m.
      alive: reward of a step without a fall.
      action_cost: of `||a||^2`.
      energy_cost: of `sum |a_i qd_i| share_i`, with qd as it is observed.
      limit_cost: of joint positions `[nu]`, scaled to [-1, 1] by their limits, and shares `[nu]`.
      death: what the step that ends in a fall is paid instead of everything else.
      foot_sensors: names of force and torque sensors, whose values follow each other.
      feet: their names, by which `rlcore.robot.make_robot` finds what metrics are made of.
      joint_sensors: names of actuator force sensors likewise; none where joint forces are not observed.
      angular_velocity_scale, joint_velocity_scale, joint_force_scale, foot_scale: factors of those observations.
    """

    start_height: float
    fallen_height: float
    alive: float
    action_cost: float
    energy_cost: float
    limit_cost: Callable[[Tensor, Tensor], Tensor]
    death: float
    foot_sensors: Sequence[str]
    foot_scale: float
    feet: Sequence[str]
    joint_velocity_scale: float
    joint_sensors: Sequence[str] = ()
    joint_force_scale: float = 1.0
    angular_velocity_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.fallen_height < self.start_height < math.inf:
            heights = f"start_height {self.start_height} m, got {self.fallen_height}"
            raise InputError(f"fallen_height must be above 0 m and below {heights}")


def make_runner(engine: MujocoEngine, name: str, settings: RunnerSettings, steps: int = EPISODE_STEPS) -> Env:
    """The running task with a limit of `steps` control steps, without automatic resets.

    Actions are fractions of each motor's torque, clipped to [-1, 1]; the torque is action x gear x gain.

    Raises:
      InputError: if a joint that is driven has no limits, or sensors are missing or lie apart.
    """
    model, s = engine.model, settings
    joint_qpos, joint_qvel = model.actuated()
    joints = [model.joint(joint) for joint in model.actuator_joints]
    unlimited = [joint.name for joint in joints if not joint.upper - joint.lower < math.inf]
    if unlimited:
        raise InputError(f"joints without limits cannot be scaled by them: {', '.join(unlimited)}")
    lower = torch.tensor([joint.lower for joint in joints], dtype=torch.float64)
    upper = torch.tensor([joint.upper for joint in joints], dtype=torch.float64)
    # The torque of a full action: its gear, or its gain.
    torque = torch.from_numpy(engine.mjmodel.actuator_gear[:, 0] * engine.mjmodel.actuator_gainprm[:, 0])
    share = torque / torque.max()
    feet, forces = _place(model, s.foot_sensors), _place(model, s.joint_sensors)
    root = torch.tensor([0.0, 0.0, s.start_height, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    posture = torch.clamp(torch.zeros_like(lower), lower, upper)
    robot = make_robot(model, pose=posture, feet=s.feet)
    watched = robot_metrics(engine, robot, CONTROL_DT, contact_force=CONTACT_FORCE, torque_limits=torque)

    def initial(params: Params, key: Tensor) -> tuple[Tensor, Tensor]:
        """At the origin, at rest but for the joints, which are near zero or their limit that is nearest to it."""
        position, velocity = random.uniform(key, (2, model.nu), -1.0, 1.0, dtype=torch.float64).unbind(0)
        position = torch.clamp(posture + JOINT_NOISE * position, lower, upper)
        return torch.cat([root, position]), torch.cat([torch.zeros_like(root[:6]), JOINT_SPEED * velocity])

    def scaled_position(physics: PhysicsState) -> Tensor:
        return (2 * physics.qpos[joint_qpos] - (lower + upper)) / (upper - lower)

    def observe(params: Params, state: EnvState) -> dict[str, dict[str, Tensor]]:
        physics = state.physics
        up, heading = projections(physics)
        parts = {
            "height": physics.qpos[2:3],
            "linear_velocity": rotations.rotate_inverse(physics.qpos[3:7], physics.qvel[:3]),
            "angular_velocity": s.angular_velocity_scale * physics.qvel[3:6],
            "angles": angles(physics),
            "projections": torch.stack([up, heading]),
            "joint_position": scaled_position(physics),
            "joint_velocity": s.joint_velocity_scale * physics.qvel[joint_qvel],
            "joint_force": s.joint_force_scale * physics.sensordata[forces],
            "foot_force": s.foot_scale * physics.sensordata[feet],
            "last_action": state.memory["last_action"],
        }
        return {"policy": {name: part for name, part in parts.items() if name != "joint_force" or s.joint_sensors}}

    def fallen(physics: PhysicsState) -> Tensor:
        return physics.qpos[2] < s.fallen_height

    def energy(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
        return (action * (s.joint_velocity_scale * after.physics.qvel[joint_qvel]) * share).abs().sum()

    def limits(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
        return s.limit_cost(scaled_position(after.physics), share)

    def death(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
        return fallen(after.physics).to(action.dtype)

    def metrics(params: Params, before: EnvState, action: Tensor, after: EnvState) -> dict[str, Any]:
        return {"forward_velocity": after.physics.qvel[0], **watched(params, before, action, after)}

    def term(name: str, weight: float, fn: Callable[[Params, EnvState, Tensor, EnvState], Tensor]) -> Term:
        """A term of `weight` per control step that a fall leaves out."""

        def unless_fallen(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
            return torch.where(fallen(after.physics), 0.0, fn(params, before, action, after))

        return Term(name, weight / CONTROL_DT, unless_fallen)

    env = make_env(
        engine,
        name=name,
        control_dt=CONTROL_DT,
        initial=initial,
        observe=observe,
        terminate=lambda params, physics: fallen(physics),
        metrics=metrics,
        terms=[
            term("progress", 1.0, progress),
            term("alive", s.alive, alive),
            term("up", UP_WEIGHT, upright),
            term("heading", HEADING_WEIGHT, facing),
            term("action", -s.action_cost, action_size),
            term("energy", -s.energy_cost, energy),
            term("limits", -1.0, limits),
            Term("death", s.death / CONTROL_DT, death),
        ],
    )
    return time_limit(scale_actions(env), steps * CONTROL_DT)


def to_target(physics: PhysicsState) -> tuple[Tensor, Tensor]:
    """From the torso to the target in the ground plane, m: the components along x and y."""
    return TARGET - physics.qpos[0], -physics.qpos[1]


def distance(physics: PhysicsState) -> Tensor:
    """To the target in the ground plane, m."""
    x, y = to_target(physics)
    return torch.sqrt(x * x + y * y)


def projections(physics: PhysicsState) -> tuple[Tensor, Tensor]:
    """Of the torso's z axis on the vertical, and of its x axis on the direction to the target."""
    w, x, y, z = physics.qpos[3:7].unbind(-1)
    east, north = to_target(physics)
    forward = (1 - 2 * (y * y + z * z)) * east + 2 * (x * y + w * z) * north
    return 1 - 2 * (x * x + y * y), forward / distance(physics)


def angles(physics: PhysicsState) -> Tensor:
    """Yaw, roll and the angle to the target (its bearing less the yaw), rad: `[3]`."""
    w, x, y, z = physics.qpos[3:7].unbind(-1)
    east, north = to_target(physics)
    # The torso's x axis in the ground plane is (ahead, aside).
    ahead, aside = 1 - 2 * (y * y + z * z), 2 * (x * y + w * z)
    sines = torch.stack([aside, 2 * (w * x + y * z), ahead * north - aside * east])
    cosines = torch.stack([ahead, 1 - 2 * (x * x + y * y), ahead * east + aside * north])
    return torch.atan2(sines, cosines)


def progress(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
    """How fast the distance to the target shrank, m/s."""
    return (distance(before.physics) - distance(after.physics)) / CONTROL_DT


def upright(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
    """1 if the up projection is above 0.93."""
    return (projections(after.physics)[0] > UPRIGHT).to(action.dtype)


def facing(params: Params, before: EnvState, action: Tensor, after: EnvState) -> Tensor:
    """`min(heading projection / 0.8, 1)`."""
    return torch.clamp(projections(after.physics)[1] / HEADING, max=1.0)


def _place(model: ModelInfo, names: Sequence[str]) -> slice:
    """The slice of sensordata that sensors fill whose values follow each other."""
    places = [model.sensor(name) for name in names] or [slice(0, 0)]
    if any(a.stop != b.start for a, b in itertools.pairwise(places)):
        raise InputError(f"the values of these sensors must follow each other: {', '.join(names)}")
    return slice(places[0].start, places[-1].stop)
