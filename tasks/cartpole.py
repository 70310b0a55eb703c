"""Cartpole: a pole on a cart, to be kept upright by pushing the cart. The smallest complete task.

The mechanism is that of Barto, Sutton and Anderson 1983, "Neuronlike adaptive elements that can solve
difficult learning control problems": a cart of 1 kg, a pole of 0.1 kg and 1 m, forces up to 10 N, 50
decisions a second.
"""

import mujoco
import torch
from torch import Tensor

from rlcore import random
from rlcore.env import Env, EnvState, Params, make_env, time_limit
from rlcore.physics.engine import PhysicsState
from rlcore.physics.engines import PhysicsChoice, make_engine
from rlcore.rewards import Term, action_size, alive

MODEL = """
<mujoco model="cartpole">
  <option timestep="0.01" integrator="implicitfast"><flag contact="disable"/></option>
  <visual><global offwidth="1280" offheight="720"/><headlight ambient="0.5 0.5 0.5"/></visual>
  <asset>
    <texture name="sky" type="skybox" builtin="gradient" rgb1="0.9 0.95 1" rgb2="0.6 0.7 0.85"
             width="64" height="64"/>
  </asset>
  <worldbody>
    <light pos="0 -2 4" dir="0 0.4 -1"/>
    <camera name="track" pos="0 -4.5 0.7" xyaxes="1 0 0 0 0.1 1"/>
    <geom type="capsule" fromto="-3 0 0 3 0 0" size="0.02" rgba="0.4 0.4 0.45 1" mass="0"/>
    <body name="cart">
      <joint name="slider" type="slide" axis="1 0 0"/>
      <geom type="box" size="0.2 0.1 0.08" mass="1" rgba="0.15 0.35 0.6 1"/>
      <body name="pole">
        <joint name="hinge" axis="0 1 0"/>
        <geom type="capsule" fromto="0 0 0 0 0 1" size="0.03" mass="0.1" rgba="0.9 0.55 0.2 1"/>
      </body>
    </body>
  </worldbody>
  <actuator><motor name="push" joint="slider" gear="10" ctrlrange="-1 1"/></actuator>
</mujoco>
"""


def initial(params: Params, key: Tensor) -> tuple[Tensor, Tensor]:
    """Cart and pole within 0.05 (m, rad, and per second) of rest, as in Gymnasium's CartPole."""
    draw = random.uniform(key, (4,), -0.05, 0.05, dtype=torch.float64)
    return draw[:2], draw[2:]


def observe(params: Params, state: EnvState) -> dict[str, dict[str, Tensor]]:
    """Positions (m, rad) and velocities of cart and pole."""
    return {"policy": {"position": state.physics.qpos, "velocity": state.physics.qvel}}


def terminate(params: Params, physics: PhysicsState) -> Tensor:
    """The cart leaves +-2.4 m, or the pole leans more than 12 degrees."""
    return (physics.qpos[0].abs() > 2.4) | (physics.qpos[1].abs() > 0.2095)


def make_cartpole(num_threads: int = 0, seconds: float = 10.0, physics: PhysicsChoice = "mujoco") -> Env:
    """Cartpole with a time limit of 500 control steps by default, without automatic resets."""
    env = make_env(
        make_engine(mujoco.MjModel.from_xml_string(MODEL), num_threads, physics=physics),
        name="cartpole",
        control_dt=0.02,
        initial=initial,
        observe=observe,
        terms=[Term("alive", 50.0, alive), Term("effort", -0.5, action_size)],
        terminate=terminate,
    )
    return time_limit(env, seconds)
