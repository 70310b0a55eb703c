"""Rules that end an episode: their edges by hand, what is switched on, and which rule it was."""

import functools
import math
from typing import Any

import mujoco
import pytest
import torch

from rlcore import random, rotations, tree
from rlcore.env import Params, batch, make_env
from rlcore.errors import InputError
from rlcore.physics.mujoco import MujocoEngine
from rlcore.rewards import Term, alive
from rlcore.terminations import below_height, beyond_limits, ended_by, ends_if, forbidden_contact, tilted

# A box with two limited arms, of which a slide lies between, and a touch sensor below it.
MODEL = """
<mujoco>
  <compiler angle="radian"/>
  <option timestep="0.01"/>
  <worldbody>
    <geom type="plane" size="0 0 1"/>
    <body name="base" pos="0 0 1">
      <freejoint name="root"/>
      <geom type="box" size="0.1 0.1 0.1" mass="1"/>
      <site name="below" type="box" size="0.2 0.2 0.05" pos="0 0 -0.1"/>
      <body name="a"><joint name="left" axis="0 1 0" range="-0.5 1" limited="true"/>
        <geom size="0.02" mass="0.1" contype="0" conaffinity="0"/></body>
      <body name="b"><joint name="rail" type="slide" axis="0 1 0"/>
        <geom size="0.02" mass="0.1" contype="0" conaffinity="0"/></body>
      <body name="c"><joint name="right" axis="0 1 0" range="-1 0.5" limited="true"/>
        <geom size="0.02" mass="0.1" contype="0" conaffinity="0"/></body>
    </body>
  </worldbody>
  <actuator><motor name="turn" joint="left" ctrlrange="-1 1"/></actuator>
  <sensor><framepos name="place" objtype="xbody" objname="base"/><touch name="floor" site="below"/></sensor>
</mujoco>
"""
PARAMS = Params({}, {}, {})


@functools.cache
def engine():
    return MujocoEngine(mujoco.MjModel.from_xml_string(MODEL), 1)


def state(height=1.0, rotation=(0.0, 0.0, 0.0), joints=(0.0, 0.0, 0.0), touch=0.0):
    """A state of the box, turned by a rotation vector (rad)."""
    turn = rotations.from_rotation_vector(torch.tensor(rotation, dtype=torch.float64))
    qpos = torch.cat([torch.tensor([0.0, 0.0, height]).double(), turn, torch.tensor(joints).double()])
    physics = engine().initial(qpos, torch.zeros(9, dtype=torch.float64))
    sensordata = torch.tensor([0.0, 0.0, 0.0, touch], dtype=torch.float64)
    return tree.replace(physics, sensordata=sensordata)


def rules():
    model = engine().model
    return {
        "height": below_height(model, 0.5),
        "tilt": tilted(model, 30.0),
        "contact": forbidden_contact(model, ["floor"], 2.0),
        "limits": beyond_limits(model, margin=0.1),
    }


EDGES: list[tuple[str, dict[str, Any], bool]] = [
    ("height", {"height": 0.501}, False),
    ("height", {"height": 0.499}, True),
    # 29.9 and 30.1 degrees about any horizontal axis; a turn about the vertical is no tilt.
    ("tilt", {"rotation": (math.radians(29.9), 0.0, 0.0)}, False),
    ("tilt", {"rotation": (0.0, -math.radians(30.1), 0.0)}, True),
    ("tilt", {"rotation": (0.0, 0.0, 3.0)}, False),
    ("tilt", {"rotation": (math.pi, 0.0, 0.0)}, True),
    ("contact", {"touch": 1.99}, False),
    ("contact", {"touch": 2.01}, True),
    # left is allowed [-0.6, 1.1], right [-1.1, 0.6], the rail everything.
    ("limits", {"joints": (1.09, 100.0, -1.09)}, False),
    ("limits", {"joints": (1.11, 0.0, 0.0)}, True),
    ("limits", {"joints": (-0.61, 0.0, 0.0)}, True),
    ("limits", {"joints": (0.0, 0.0, 0.61)}, True),
    ("limits", {"joints": (0.0, 0.0, -1.11)}, True),
]


@pytest.mark.parametrize(("name", "changes", "expected"), EDGES)
def test_rules_by_hand(name, changes, expected):
    ended = rules()[name](PARAMS, state(**changes))
    assert ended.shape == () and ended.dtype == torch.bool and bool(ended) == expected
    # No other rule minds.
    assert not any(bool(rule(PARAMS, state(**changes))) for other, rule in rules().items() if other != name)


def test_rules_of_many_are_those_of_each():
    physics = tree.stack([state(**changes) for _, changes, _ in EDGES])
    for rule in rules().values():
        mapped = torch.func.vmap(lambda p, rule=rule: rule(PARAMS, p))(physics)
        assert mapped.tolist() == [bool(rule(PARAMS, state(**changes))) for _, changes, _ in EDGES]


def test_joints_by_name():
    rule = beyond_limits(engine().model, ["right"])
    assert not rule(PARAMS, state(joints=(9.0, 0.0, 0.0))) and rule(PARAMS, state(joints=(0.0, 0.0, 0.51)))


def test_only_what_is_switched_on_ends_an_episode():
    fallen = state(height=0.1, touch=9.0)
    assert ends_if(rules(), ("tilt", "height"))(PARAMS, fallen)
    assert not ends_if(rules(), ("tilt", "limits"))(PARAMS, fallen)
    nothing = ends_if(rules(), ())(PARAMS, fallen)
    assert nothing.shape == () and nothing.dtype == torch.bool and not nothing
    metrics = ended_by(rules(), ("tilt", "height", "contact"), PARAMS, fallen)
    assert {name: float(value) for name, value in metrics.items()} == {
        "ended/tilt": 0.0, "ended/height": 1.0, "ended/contact": 1.0,
    }  # fmt: skip


def test_a_falling_box_ends_by_height_and_tells_so():
    on = ("height", "tilt")
    env = make_env(
        engine(),
        name="box",
        control_dt=0.02,
        initial=lambda params, key: (state(height=0.7).qpos, torch.zeros(9).double()),
        observe=lambda params, s: {"policy": {"height": s.physics.qpos[2:3]}},
        terms=[Term("alive", 1.0, alive)],
        terminate=ends_if(rules(), on),
        metrics=lambda params, before, action, after: ended_by(rules(), on, params, after.physics),
    )
    many = batch(env)
    now, _ = many.reset(env.params, random.split(random.key(0), 2))
    ended = []
    for _ in range(12):
        now, transition = many.step(env.params, now, torch.zeros(2, 1))
        ended.append(bool(transition.terminated[0]))
        assert torch.equal(transition.terminated, now.physics.qpos[:, 2] < 0.5)
        assert torch.equal(transition.metrics["ended/height"], transition.terminated.double())
        assert not transition.metrics["ended/tilt"].any()
    # 0.2 m of free fall take sqrt(0.4 / 9.81) = 0.202 s: steps of 0.02 s, and an integrator that is a half step ahead.
    assert ended.index(True) in (9, 10)


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (lambda m: below_height(m, math.nan), "height must be a finite number of m, got nan"),
        (lambda m: below_height(m, 1.0, "rail"), "free joint; 'rail' is a slide"),
        (lambda m: tilted(m, 0.0), "tilt must be between 0 and 180 degrees, got 0.0"),
        (lambda m: tilted(m, math.nan), "tilt .* got nan"),
        (lambda m: tilted(m, 30.0, "hip"), "no joint 'hip'"),
        (lambda m: forbidden_contact(m, []), "at least one touch sensor, got none"),
        (lambda m: forbidden_contact(m, ["wall"]), "no sensor 'wall'"),
        (lambda m: forbidden_contact(m, ["place"]), "'place' is no touch sensor: it has 3 numbers"),
        (lambda m: forbidden_contact(m, ["floor"], -1.0), "force must be 0 N or more, got -1.0"),
        (lambda m: beyond_limits(m, ["left", "rail"]), "joints without limits .*: rail"),
        (lambda m: beyond_limits(m, ["root"]), "joints without limits .*: root"),
        (lambda m: beyond_limits(m, []), "at least one joint that has limits, got none"),
        (lambda m: beyond_limits(m, margin=-0.1), "margin must be 0 or more, got -0.1"),
        (lambda m: ends_if(rules(), ("fall",)), "no termination rule 'fall'; there are: height, tilt, contact, limits"),
        (lambda m: ends_if(rules(), ("tilt", "tilt")), "once each, got tilt, tilt"),
        (lambda m: ended_by(rules(), ("fall",), PARAMS, state()), "no termination rule 'fall'"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_one_line(mistake, words):
    with pytest.raises(InputError, match=words) as caught:
        mistake(engine().model)
    assert "\n" not in str(caught.value)
