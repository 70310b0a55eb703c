"""Worlds so small that what an algorithm must find in them is known."""

import torch

from rlcore import tree
from rlcore.env import auto_reset, make_env, scale_actions, time_limit
from rlcore.physics.engine import BatchEngine, ModelInfo
from rlcore.rewards import Term, alive
from tasks.cartpole import make_cartpole


def assert_same(a, b):
    left, right = tree.named_leaves(a), tree.named_leaves(b)
    assert [name for name, _ in left] == [name for name, _ in right]
    for (name, x), (_, y) in zip(left, right, strict=True):
        assert x.dtype == y.dtype and torch.equal(x.nan_to_num(7.5), y.nan_to_num(7.5)), name


def cartpole():
    return auto_reset(scale_actions(make_cartpole(1, seconds=0.3)))


class Stream(BatchEngine):
    """No physics: the state counts its steps in `qpos[0]` and keeps `qpos[1]`."""

    def __init__(self):
        super().__init__()
        self.model = ModelInfo(
            nq=2, nv=0, na=0, nu=1, nsensor=0, timestep=1.0, bodies=("world",), geoms=(), joints=(),
            actuators=("a",), actuator_joints=("",), ctrl_lower=(-2.0,), ctrl_upper=(2.0,),
            sensors={}, keyframes={},
        )  # fmt: skip

    def step(self, params, state, ctrl, wrench=None, *, substeps, key=None):
        count = torch.stack([state.qpos[0] + 1, state.qpos[1]])
        return tree.replace(state, qpos=count, time=state.time + 1, fault=torch.zeros_like(state.fault))

    def forward(self, params, state, mask=None):
        return state


def tiny(observe, reward, *, end="truncated", length=1, context=lambda key: torch.zeros((), dtype=torch.float64)):
    """A world of a reward `(context, count before, action) -> []` whose episodes end after `length` steps."""
    forever = lambda params, physics: physics.time < 0  # noqa: E731
    over = lambda params, physics: physics.qpos[0] >= length  # noqa: E731
    env = make_env(
        Stream(),
        name="tiny",
        control_dt=1.0,
        initial=lambda params, key: (
            torch.stack([torch.zeros((), dtype=torch.float64), context(key)]),
            torch.zeros(0),
        ),
        observe=lambda params, state: observe(state.physics.qpos),
        terms=[
            Term(
                "reward",
                1.0,
                lambda p, before, a, after: reward(before.physics.qpos[1], before.physics.qpos[0], a),
            )
        ],
        terminate=over if end == "terminated" else forever,
    )
    return auto_reset(time_limit(env, length) if end == "truncated" else env)


def stream(*, alive_only=False, critic=False, end="truncated", length=3, metrics=None):
    def observe(qpos):
        return {"policy": {"one": qpos[:1]}} | ({"critic": {"both": qpos}} if critic else {})

    env = tiny(observe, lambda context, count, action: 1 + 0 * action[0], end=end, length=length)
    if not alive_only:
        return env
    made = make_env(
        env.engine,
        name="alive",
        control_dt=1.0,
        initial=lambda params, key: (torch.zeros(2).double(), torch.zeros(0)),
        observe=lambda params, state: observe(state.physics.qpos),
        terms=[Term("alive", 1.0, alive)],
        terminate=(lambda p, s: s.qpos[0] >= length) if end == "terminated" else (lambda p, s: s.time < 0),
        metrics=metrics,
    )
    return auto_reset(time_limit(made, length) if end == "truncated" else made)
