"""Walk where it is told: the humanoid follows a velocity command, through stages from walking ahead to turning.

The policy sees what a real robot measures (angular velocity, the direction of gravity, joint angles and velocities),
the command, the clock of its stride, and its own last action. The value function also sees what only a simulation
knows. A curriculum takes each robot from walking ahead to turning and changing speed; at evaluation there
is none, and the command is whatever `rlcore.commands.fixed_command` makes it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlcore import rewards, terminations
from rlcore.commands import VelocityCommands, command_values, velocity_commands
from rlcore.curriculum import Stage, curriculum
from rlcore.env import Env, EnvState, Params, Transition, make_env, random_pushes, time_limit
from rlcore.monitoring import robot_metrics
from rlcore.rewards import Term, locomotion
from tasks.humanoid import body

COMMANDS = VelocityCommands(vx=(-0.5, 1.5), vy=(-0.3, 0.3), yaw_rate=(-1.0, 1.0), standing_fraction=0.1)
ENDINGS = ("low", "tilted")
STRIDE = 0.8  # s for both feet
FALLEN_TILT = 45.0  # degrees from upright
SWING_HEIGHT = 0.08  # m, how far a sole is lifted

# Walking comes first, at speeds that nobody reaches by standing: robots that were taught to stand before did not begin
# to walk when they were told to. A tenth of all commands is to stand.
STAGES = (
    Stage(
        "walk",
        {"command_vx": (0.3, 1.0), "command_vy": (-0.1, 0.1), "command_yaw_rate": (-0.2, 0.2), "push_speed": 0.2},
    ),
    Stage("turn", {"command_vx": (-0.2, 1.2), "command_yaw_rate": (-0.5, 0.5), "push_speed": 0.4}),
    Stage("vary speed", {}),
)

# How far joints may be from the standing pose, rad: those that walk may move, those that carry are to stay.
POSTURE = {
    "*": 0.15,
    "*_shoulder_pitch": 0.3,
    "*_elbow": 0.3,
    "*_hip_pitch": 0.5,
    "*_knee": 0.6,
    "*_ankle_pitch": 0.3,
}


def make_humanoid_velocity(
    num_threads: int = 0,
    seconds: float = 20.0,
    push_interval: float = 4.0,
    push_speed: float = 0.5,
    stages: tuple[Stage, ...] = STAGES,
) -> Env:
    """The task with pushes and a time limit, without automatic resets.

    Args:
      num_threads: physics threads; 0 takes every CPU.
      seconds: length of an episode.
      push_interval: mean time between pushes, s.
      push_speed: largest change of the pelvis's horizontal velocity by a push, m/s.
      stages: the curriculum; none for the whole range of commands from the beginning on.
    """
    engine, robot, action_bounds, control, initial, home = body.make_humanoid(num_threads)
    model, dt = engine.model, 0.02

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
        privileged = {
            "linear_velocity": robot.linear_velocity(physics),
            "height": robot.height(physics).unsqueeze(0),
            "foot_contact": state.memory["feet"]["contact"].to(physics.qpos.dtype),
            "foot_height": robot.foot_position(physics)[:, 2],
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
        "low": terminations.below_height(model, body.FALLEN_HEIGHT),
        "tilted": terminations.tilted(model, FALLEN_TILT),
    }
    env = make_env(
        engine,
        name="humanoid_velocity",
        control_dt=dt,
        initial=initial,
        control=control,
        action_bounds=action_bounds,
        observe=observe,
        terminate=terminations.ends_if(rules, ENDINGS),
        metrics=metrics,
        memory={
            **velocity_commands(model, COMMANDS),
            "feet": locomotion.feet_memory(robot, dt),
            "gait": locomotion.gait_memory(STRIDE),
        },
        values=command_values(COMMANDS),
        terms=[
            Term("track_velocity", 3.0, locomotion.track_planar_velocity(robot, 0.5)),
            Term("track_yaw_rate", 1.5, locomotion.track_yaw_rate(robot, 0.5)),
            Term("alive", 0.5, rewards.alive),
            Term("upright", 1.0, locomotion.upright(robot, 0.3)),
            Term("posture", 1.0, locomotion.keep_posture(robot, POSTURE)),
            Term("gait", 0.5, locomotion.gait_contact(robot, still=0.1)),
            Term("feet", 2.0, locomotion.track_feet(robot, home, STRIDE)),
            Term("foot_slip", -0.2, locomotion.foot_slip(robot)),
            Term("height", -10.0, locomotion.height_error(robot, body.STANDING_HEIGHT)),
            Term("vertical_velocity", -0.5, locomotion.vertical_velocity(robot)),
            Term("roll_pitch_velocity", -0.05, locomotion.roll_pitch_velocity(robot)),
            Term("stand_still", -0.2, locomotion.stand_still(robot)),
            Term("torque", -1e-5, locomotion.torque(robot)),
            Term("joint_acceleration", -1e-7, locomotion.joint_acceleration(robot, dt)),
            Term("action_rate", -0.02, rewards.action_rate),
            Term("joint_limits", -1.0, locomotion.joint_limits(robot)),
            Term("termination", -100.0, rewards.termination),
        ],
    )
    env = time_limit(random_pushes(env, push_interval, push_speed), seconds)
    return curriculum(env, stages, _followed(env), up=0.65, down=0.35, revisit=0.1) if stages else env


def _followed(env: Env) -> Callable[[Params, dict[str, Any], Transition], Tensor]:
    """How well a step followed its command, in [0, 1]: three parts velocity and one part yaw rate.

    While it explores, a robot's yaw rate swings by half a radian per second however well it walks: it counts for less.
    """
    planar, yaw = (env.spec.terms.index(name) for name in ("track_velocity", "track_yaw_rate"))

    def score(params: Params, memory: dict[str, Any], transition: Transition) -> Tensor:
        return 0.75 * transition.raw_terms[planar] + 0.25 * transition.raw_terms[yaw]

    return score
