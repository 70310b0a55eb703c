"""Where a legged robot's quantities are in a `PhysicsState`, found by the names of joints and sensors.

`make_robot` looks the names up once; the methods of `Robot` then read one robot's state, in any frame that rewards
and observations ask for. Nothing here knows an engine's layout or computes a reward. Positions and velocities are of
the end of a step; whatever comes from a sensor (feet, torques, momentum) is one physics substep older.
"""

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rlcore import rotations
from rlcore.errors import InputError
from rlcore.physics.engine import Joint, ModelInfo, PhysicsState


class Foot(NamedTuple):
    """A foot's slices of sensordata.

    Attributes:
      name: as given to `make_robot`.
      position: world frame, m.
      velocity: world frame, m/s.
      contact: normal force on the sole, N.
    """

    name: str
    position: slice
    velocity: slice
    contact: slice


@dataclass(frozen=True, eq=False)
class Robot:
    """A legged robot by its names. Every method reads the state of one robot; `n` joints are in actuator order.

    The heading frame has its origin at the root and is turned about the vertical as the root is: x is where the
    root's x axis points in the ground plane, y is left, z is up.

    Attributes:
      root: the free joint that carries the robot.
      joints: names of the actuated joints.
      feet: the feet, in the order of whatever is `[feet]`.
      joint_qpos, joint_qvel: places of the joints in qpos and qvel.
      torques: places of the actuators' torques in sensordata.
      lower, upper: `[n]` joint limits in rad (or m), infinite where there is none.
      pose: `[n]` the default pose.
      momentum: slice of sensordata with the angular momentum, if there is such a sensor.
      self_contacts: slices of sensordata of one number each that is above 0 where the robot touches itself.
    """

    root: Joint
    joints: tuple[str, ...]
    feet: tuple[Foot, ...]
    joint_qpos: slice | list[int]
    joint_qvel: slice | list[int]
    torques: slice | list[int]
    lower: Tensor
    upper: Tensor
    pose: Tensor
    momentum: slice | None
    self_contacts: tuple[slice, ...]

    # --- the root -------------------------------------------------------------------------------------------

    def height(self, physics: PhysicsState) -> Float[Tensor, ""]:
        """The root above the world's origin, m."""
        return physics.qpos[self.root.qpos.start + 2]

    def orientation(self, physics: PhysicsState) -> Float[Tensor, "4"]:
        """The root's quaternion w x y z."""
        return physics.qpos[self.root.qpos.start + 3 : self.root.qpos.start + 7]

    def gravity(self, physics: PhysicsState) -> Float[Tensor, "3"]:
        """The direction of gravity in the root's frame, a unit vector."""
        return rotations.projected_gravity(self.orientation(physics))

    def linear_velocity(self, physics: PhysicsState) -> Float[Tensor, "3"]:
        """The root's velocity in its own frame, m/s."""
        return rotations.rotate_inverse(self.orientation(physics), self._world_velocity(physics))

    def heading_velocity(self, physics: PhysicsState) -> Float[Tensor, "3"]:
        """The root's velocity in the heading frame, m/s: forward, left, up."""
        return rotations.to_heading(rotations.heading(self.orientation(physics)), self._world_velocity(physics))

    def angular_velocity(self, physics: PhysicsState) -> Float[Tensor, "3"]:
        """The root's angular velocity in its own frame, rad/s."""
        return physics.qvel[self.root.qvel.start + 3 : self.root.qvel.start + 6]

    def yaw_rate(self, physics: PhysicsState) -> Float[Tensor, ""]:
        """The root's angular velocity about the vertical, rad/s; left is positive."""
        down_x, down_y, down_z = self.gravity(physics).unbind(-1)
        x, y, z = self.angular_velocity(physics).unbind(-1)
        return -(down_x * x + down_y * y + down_z * z)

    def _world_velocity(self, physics: PhysicsState) -> Tensor:
        return physics.qvel[self.root.qvel.start : self.root.qvel.start + 3]

    # --- the joints -----------------------------------------------------------------------------------------

    def joint_position(self, physics: PhysicsState) -> Float[Tensor, " n"]:
        """Joint angles, rad."""
        return physics.qpos[self.joint_qpos]

    def joint_velocity(self, physics: PhysicsState) -> Float[Tensor, " n"]:
        """Joint velocities, rad/s."""
        return physics.qvel[self.joint_qvel]

    def joint_torque(self, physics: PhysicsState) -> Float[Tensor, " n"]:
        """Torques of the actuators, Nm."""
        return physics.sensordata[self.torques]

    def per_joint(self, values: float | Mapping[str, float]) -> Float[Tensor, " n"]:
        """A number for each joint: the same for all, or by patterns of joint names, of which the last one counts.

        `{"*": 0.1, "*_hip_*": 0.25}` gives hips 0.25 and every other joint 0.1.

        Raises:
          InputError: for a pattern that no joint has, a joint that no pattern has, or a number that is not finite.
        """
        patterns = values if isinstance(values, Mapping) else {"*": values}
        chosen: dict[str, float] = {}
        for pattern, value in patterns.items():
            found = fnmatch.filter(self.joints, pattern)
            if not found:
                raise InputError(f"no joint is named like {pattern!r}; there are: {', '.join(self.joints)}")
            chosen |= dict.fromkeys(found, float(value))
        if missing := [name for name in self.joints if name not in chosen]:
            raise InputError(f"every joint needs a number ('*' names all), got none for {', '.join(missing)}")
        tensor = torch.tensor([chosen[name] for name in self.joints], dtype=torch.float64)
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"numbers of joints must be finite, got {dict(patterns)}")
        return tensor

    def groups(self) -> dict[str, list[int]]:
        """Places of the joints by group, as `joint_group` names them: left and right, and all axes, together."""
        found: dict[str, list[int]] = {}
        for place, name in enumerate(self.joints):
            found.setdefault(joint_group(name), []).append(place)
        return found

    # --- the feet -------------------------------------------------------------------------------------------

    def foot_position(self, physics: PhysicsState) -> Float[Tensor, "feet 3"]:
        """Feet in the world frame, m."""
        return torch.stack([physics.sensordata[foot.position] for foot in self.feet])

    def foot_velocity(self, physics: PhysicsState) -> Float[Tensor, "feet 3"]:
        """Velocities of the feet in the world frame, m/s."""
        return torch.stack([physics.sensordata[foot.velocity] for foot in self.feet])

    def foot_contact(self, physics: PhysicsState) -> Float[Tensor, " feet"]:
        """Normal force on each foot, N."""
        return torch.cat([physics.sensordata[foot.contact] for foot in self.feet])

    def foot_position_in_heading(self, physics: PhysicsState) -> Float[Tensor, "feet 3"]:
        """Feet as seen from the root, in the heading frame, m: forward, left, up.

        The root is current and the feet are a substep older: at 1 m/s and 5 ms this shifts them by 5 mm.
        """
        start = self.root.qpos.start
        from_root = self.foot_position(physics) - physics.qpos[start : start + 3]
        return rotations.to_heading(rotations.heading(self.orientation(physics)), from_root)

    # --- the whole ------------------------------------------------------------------------------------------

    def angular_momentum(self, physics: PhysicsState) -> Float[Tensor, "3"]:
        """Of the whole robot about its centre of mass, world frame, kg m2/s. Raises InputError without a sensor."""
        if self.momentum is None:
            raise InputError("the robot was made without an angular momentum sensor: make_robot(angular_momentum=NAME)")
        return physics.sensordata[self.momentum]

    def self_contact(self, physics: PhysicsState) -> Float[Tensor, " contacts"]:
        """What the self-contact sensors read, above 0 where there is contact. Raises InputError without sensors."""
        if not self.self_contacts:
            raise InputError("the robot was made without self-contact sensors: make_robot(self_contacts=[NAME, ...])")
        return torch.cat([physics.sensordata[place] for place in self.self_contacts])


_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_SIDES = {"left", "right", "front", "back", "rear", "hind", "middle"}
_SIDES |= {"l", "r", "fl", "fr", "rl", "rr", "hl", "hr", "bl", "br", "lf", "rf", "lh", "rh", "lb", "rb"}


def joint_group(name: str) -> str:
    """What a joint belongs to by its name: the first word that names no side, in small letters.

    `left_hip_yaw` and `RHipRoll` are of the group `hip`, `FL_calf_joint` of `calf`, `waist_pitch` of `waist`. A name
    that has no such word is a group of its own.
    """
    words = [word.lower() for word in _WORD.findall(name)]
    return next((word for word in words if word not in _SIDES), name)


def make_robot(
    model: ModelInfo,
    *,
    pose: Tensor,
    root: str = "root",
    feet: Sequence[str] = ("left_foot", "right_foot"),
    foot_position: str = "{}_position",
    foot_velocity: str = "{}_velocity",
    foot_contact: str = "{}_contact",
    torque: str = "{}_torque",
    angular_momentum: str | None = None,
    self_contacts: Sequence[str] = (),
) -> Robot:
    """Find a legged robot's quantities by name.

    Args:
      model: the model by its names.
      pose: `[n]` default joint angles in the order of the actuators, rad.
      root: the free joint.
      feet: names of the feet.
      foot_position, foot_velocity, foot_contact: names of a foot's sensors, with `{}` for the foot: its position and
        linear velocity in the world frame, and its normal force.
      torque: name of an actuator's torque sensor, with `{}` for the actuator.
      angular_momentum: sensor of the robot's angular momentum about its centre of mass, if there is one.
      self_contacts: sensors that read above 0 where the robot touches itself, one number each.

    Raises:
      InputError: for an unknown name, a sensor of a wrong size, a root that is not free, no feet or actuators, an
        actuator that drives no hinge or slide joint, or a pose that is not one finite number for each actuator.
    """
    free = model.joint(root)
    if free.kind != "free":
        raise InputError(f"the root must be a free joint; {root!r} is a {free.kind}")
    if not feet or not model.nu:
        raise InputError(f"a legged robot has feet and actuators, got {len(feet)} and {model.nu}")
    joint_qpos, joint_qvel = model.actuated()
    if pose.shape != (model.nu,) or not bool(torch.isfinite(pose).all()):
        raise InputError(f"pose must be {model.nu} finite joint angles, one for each actuator, got {pose.tolist()}")

    def sensor(name: str, size: int) -> slice:
        place = model.sensor(name)
        if place.stop - place.start != size:
            raise InputError(f"sensor {name!r} must have {size} numbers, got {place.stop - place.start}")
        return place

    joints = [model.joint(name) for name in model.actuator_joints]
    torques = [sensor(torque.format(actuator), 1).start for actuator in model.actuators]
    contiguous = torques == list(range(torques[0], torques[0] + model.nu))
    return Robot(
        root=free,
        joints=model.actuator_joints,
        feet=tuple(
            Foot(
                name=foot,
                position=sensor(foot_position.format(foot), 3),
                velocity=sensor(foot_velocity.format(foot), 3),
                contact=sensor(foot_contact.format(foot), 1),
            )
            for foot in feet
        ),
        joint_qpos=joint_qpos,
        joint_qvel=joint_qvel,
        # A slice costs no copy.
        torques=slice(torques[0], torques[-1] + 1) if contiguous else torques,
        lower=torch.tensor([joint.lower for joint in joints], dtype=torch.float64),
        upper=torch.tensor([joint.upper for joint in joints], dtype=torch.float64),
        pose=pose.to(torch.float64),
        momentum=None if angular_momentum is None else sensor(angular_momentum, 3),
        self_contacts=tuple(sensor(name, 1) for name in self_contacts),
    )
