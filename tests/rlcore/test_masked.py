"""A function of some rows only gives the bits of the function of all rows, with the others thrown away."""

import itertools
import threading

import pytest
import torch
from torch.func import grad, vmap

from rlcore import masked, random, tree
from rlcore.env import action_delay, auto_reset, batch, observation_noise, scale_actions
from rlcore.jit import jit, recording
from rlcore.tree import tree_flatten
from tasks.cartpole import make_cartpole
from tasks.humanoid.balance import make_humanoid_balance


def begin(scale, key):
    """A new episode of a toy robot, in several dtypes; one output has no batch axis of its own."""
    draw = random.normal(key, (3,), torch.float64)
    x = torch.sin(draw * scale["a"]) + scale["b"]
    return {"x": x, "near": (x > 0).any(), "steps": torch.zeros((), dtype=torch.int64), "key": random.split(key)[1]}


def step(mask, scale, state):
    state = {**state, "x": state["x"] * 0.9, "steps": state["steps"] + 1}
    return masked.where(mask, begin, (scale, state["key"]), state)


def start(*lead, seed=0):
    count = max(1, torch.Size(lead).numel())
    keys = random.split(random.key(seed), count)
    x = torch.arange(3.0 * count, dtype=torch.float64).view(count, 3)
    state = {"x": x, "near": x[:, 0] > 1, "steps": torch.arange(count), "key": keys}
    return tree.map_leaves(lambda leaf: leaf.reshape(*lead, *leaf.shape[1:]), state)


SCALE = {"a": torch.tensor(1.5, dtype=torch.float64), "b": torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64)}


def assert_same(a, b):
    (ours, first), (theirs, second) = tree_flatten(a), tree_flatten(b)
    assert first == second
    for x, y in zip(ours, theirs, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


def choose(mask, scale, state):
    """What `step` means, without `masked`."""
    state = {**state, "x": state["x"] * 0.9, "steps": state["steps"] + 1}
    return tree.where(mask, begin(scale, state["key"]), state)


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 16, 17, 40])
def test_some_rows_have_the_bits_of_all(size):
    fast, plain = jit(vmap(step, (0, None, 0))), vmap(choose, (0, None, 0))
    state = start(size)
    for rows in sorted({0, 1, 2, 7, 8, 9, 15, 16, 17, size - 1, size} & set(range(size + 1))):
        for chosen in (range(rows), range(size - rows, size)):
            mask = torch.zeros(size, dtype=torch.bool)
            mask[list(chosen)] = True
            expected = plain(mask, SCALE, state)
            assert_same(fast(mask, SCALE, state), expected)
            assert_same(vmap(step, (0, None, 0))(mask, SCALE, state), expected)


def test_rows_not_asked_for_are_not_computed():
    counts = []

    @torch.library.custom_op("tests::counted_rows", mutates_args=())
    def counted(x: torch.Tensor) -> torch.Tensor:
        counts.append(len(x))
        return x + 1

    counted.register_fake(torch.empty_like)
    counted.register_vmap(lambda info, in_dims, x: (counted(x.movedim(in_dims[0], 0)), 0))
    fast = jit(vmap(lambda mask, x: masked.where(mask, counted, (x,), x)))
    x, mask = torch.arange(100.0), torch.zeros(100, dtype=torch.bool)
    assert torch.equal(fast(mask, x), x)
    counts.clear()
    assert torch.equal(fast(mask, x), x)
    assert counts == []
    for rows, computed in ((3, 8), (8, 8), (9, 16), (60, 64), (70, 100), (100, 100)):
        mask[:rows] = True
        fast(mask, x)  # the first call with a size records
        counts.clear()
        assert torch.equal(fast(mask, x), torch.where(mask, x + 1, x))
        assert counts == [computed]


@pytest.mark.parametrize("axes", list(itertools.product(["both", "outer", "inner", "neither"], repeat=2)), ids="-".join)
@pytest.mark.parametrize("mask_axes", ["both", "outer", "inner"])
def test_nested_vmap(axes, mask_axes):
    # The mask, `a` and `b` have, each for itself, both mapped axes, one, or none.
    lead = {"both": (3, 5), "outer": (3,), "inner": (5,), "neither": ()}
    outer = {"both": 0, "outer": 0, "inner": None, "neither": None}
    inner = {"both": 0, "outer": None, "inner": 0, "neither": None}
    a = random.uniform(random.key(1), lead[axes[0]], dtype=torch.float64)
    b = random.uniform(random.key(2), (*lead[axes[1]], 3), dtype=torch.float64)
    mask = torch.arange(len(torch.zeros(lead[mask_axes]).flatten())).reshape(lead[mask_axes]) % 3 == 0
    scale, state = {"a": a, "b": b}, start(3, 5)

    def nest(fn):
        dims = [
            (axis[mask_axes], {"a": axis[axes[0]], "b": axis[axes[1]]}, dict.fromkeys(state, 0))
            for axis in (inner, outer)
        ]
        return vmap(vmap(fn, dims[0]), dims[1])

    fast = jit(nest(step))
    for m in (mask, ~mask, mask & False, mask | True):
        expected = nest(choose)(m, scale, state)
        assert_same(fast(m, scale, state), expected)
        assert_same(nest(step)(m, scale, state), expected)


def test_other_mapped_axes_than_the_first():
    mask = torch.tensor([True, False, True, False])
    x, y = torch.arange(12.0).view(3, 4), torch.arange(8.0).view(4, 2)
    fn = lambda m, x, y: masked.where(m, lambda x, y: x.sum() * y, (x, y), y - 1)  # noqa: E731
    mapped = vmap(fn, (0, 1, 0), 1)
    assert torch.equal(jit(mapped)(mask, x, y), mapped(mask, x, y))
    assert torch.equal(mapped(mask, x, y), torch.where(mask, x.sum(0) * y.T, y.T - 1))


def test_without_a_batch_and_with_nothing_but_shared_arguments():
    state = tree.index(start(1), 0)
    fast = jit(step)
    for mask in (torch.tensor(True), torch.tensor(False)):
        assert_same(fast(mask, SCALE, state), choose(mask, SCALE, state))
    masks, x = torch.tensor([True, False, True]), torch.arange(6.0).view(3, 2)
    shared = vmap(lambda m, c, x: masked.where(m, lambda c: c * 2, (c,), x), (0, None, 0))
    c = torch.tensor([5.0, 7.0])
    assert torch.equal(jit(shared)(masks, c, x), torch.where(masks[:, None], c * 2, x))
    nothing = vmap(lambda m, x: masked.where(m, lambda: torch.ones(2), (), x))
    assert torch.equal(jit(nothing)(masks, x), torch.where(masks[:, None], torch.ones(2), x))


def test_inside_itself():
    def inner(x):
        return masked.where(x > 2, lambda x: x * 10, (x,), -x)

    fn = vmap(lambda mask, x: masked.where(mask, inner, (x,), x))
    mask, x = torch.arange(20) % 2 == 0, torch.arange(20.0) / 3
    expected = torch.where(mask, torch.where(x > 2, x * 10, -x), x)
    for _ in range(2):
        assert torch.equal(jit(fn)(mask, x), expected)
    assert torch.equal(fn(mask, x), expected)


def test_it_is_differentiated_the_plain_way():
    seen = []

    def loss(x, mask):
        seen.append(recording())
        return masked.where(mask, lambda x: torch.sin(x) * x, (x,), x * 3).sum()

    x, mask = torch.linspace(0.1, 2.0, 6), torch.arange(6) % 2 == 0
    expected = torch.where(mask, torch.cos(x) * x + torch.sin(x), torch.full_like(x, 3.0))
    for fn in (vmap(grad(loss)), jit(vmap(grad(loss)))):
        torch.testing.assert_close(fn(x, mask), expected)
    total = lambda x: vmap(loss)(x, mask).sum()  # noqa: E731
    for whole in (grad(total), jit(grad(total))):
        torch.testing.assert_close(whole(x), expected)
    assert not any(seen)
    tracked = x.clone().requires_grad_()
    jit(total)(tracked).backward()
    torch.testing.assert_close(tracked.grad, expected)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda x: {"x": x, "more": x}, "must return a tree like otherwise, got"),
        (lambda x: [x], "must return a tree like otherwise, got"),
        (lambda x: {"x": x.to(torch.int64)}, r"leaf 0 is torch.int64 \[2\] for torch.float32 \[2\]"),
        (lambda x: {"x": x[:1]}, r"leaf 0 is torch.float32 \[1\] for torch.float32 \[2\]"),
    ],
)
@pytest.mark.parametrize("recorded", [True, False])
def test_another_tree_is_refused_at_once(result, message, recorded):
    fn = vmap(lambda mask, x: masked.where(mask, result, (x,), {"x": x}))
    fn = jit(fn) if recorded else fn
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            fn(torch.zeros(3, dtype=torch.bool), torch.ones(3, 2))


def test_tensors_closed_over():
    constant = torch.tensor([1.0, 2.0])
    mask, x = torch.tensor([True, False]), torch.ones(2, 2)
    fast = jit(vmap(lambda mask, x: masked.where(mask, lambda x: x + constant, (x,), x)))
    assert fast(mask, x).tolist() == [[2, 3], [1, 1]]

    def computed(mask, x, shared):
        y = x * 2
        return (
            masked.where(mask, lambda x: x + y, (x,), x),
            masked.where(mask, lambda x: x + shared, (x,), x),
        )

    # Fixed in the recording, it would be wrong in every later call.
    assert [y.shape for y in vmap(computed, (0, 0, None))(mask, x, constant)] == [(2, 2), (2, 2)]
    given = lambda mask, x, shared: masked.where(mask, lambda x: x + shared, (x,), x)  # noqa: E731
    returned = lambda mask, x, shared: masked.where(mask, lambda: shared, (), x)  # noqa: E731
    for fn in (vmap(f, (0, 0, None)) for f in (computed, given, returned)):
        with pytest.raises(
            ValueError, match=r"uses a tensor of shape \[2\] that the recorded function was given or computed"
        ):
            jit(fn)(mask, x, constant)


def test_a_failure_leaves_no_recording():
    failing = [True]

    def begin(x):
        if failing:
            raise KeyError("broken")
        return x * 2

    fast = jit(vmap(lambda mask, x: masked.where(mask, begin, (x,), x)))
    mask, x = torch.tensor([True, False]), torch.ones(2)
    for _ in range(2):
        with pytest.raises(KeyError, match="broken"):
            fast(mask, x)
    assert not recording()
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    failing.clear()
    assert fast(mask, x).tolist() == [2, 1]
    assert fast(~mask, x).tolist() == [1, 2]


def test_another_thread_does_not_record():
    told = []

    def fn(x):
        other = threading.Thread(target=lambda: told.append(recording()))
        other.start()
        other.join()
        told.append(recording())
        return x

    jit(fn)(torch.ones(1))
    assert told == [False, True]
    assert not recording()


def rollout(env, num, steps, recorded, seed=3):
    reset, advance = vmap(env.reset, (None, 0)), vmap(env.step, (None, 0, 0))
    if recorded:
        batched = batch(env)
        reset, advance = batched.reset, batched.step
    state, _ = reset(env.params, random.split(random.key(seed), num))
    history = []
    for i in range(steps):
        action = random.uniform(random.key(i), (num, env.spec.action_size), -1.0, 1.0)
        state, transition = advance(env.params, state, action)
        history.append(transition)
    return state, tree.stack(history)


def stumbling_cartpole():
    env = observation_noise(make_cartpole(2, 0.6), {"position": 0.1})
    return auto_reset(action_delay(scale_actions(env), (0, 2)))


@pytest.mark.parametrize(("num", "steps"), [(8, 120), (512, 60)])
def test_recorded_episodes_are_the_unrecorded_ones(num, steps):
    env = stumbling_cartpole()
    ours, theirs = rollout(env, num, steps, True), rollout(env, num, steps, False)
    assert_same(ours, theirs)
    ended = theirs[1].terminated | theirs[1].truncated
    assert ended.sum() > 3 * num / 2
    assert ended.any(1).sum() > 3


def test_recorded_humanoids_are_the_unrecorded_ones():
    env = auto_reset(make_humanoid_balance(2, 0.5, 0.2, 3.0))
    ours, theirs = rollout(env, 9, 60, True), rollout(env, 9, 60, False)
    assert_same(ours, theirs)
    assert (theirs[1].terminated | theirs[1].truncated).sum() >= 9


def test_a_robot_does_not_know_how_many_begin_beside_it():
    env = stumbling_cartpole()
    many, few = rollout(env, 40, 50, True)[0], None
    keys = random.split(random.key(3), 40)[:3]
    batched = batch(env)
    state, _ = batched.reset(env.params, keys)
    for i in range(50):
        action = random.uniform(random.key(i), (40, env.spec.action_size), -1.0, 1.0)[:3]
        state, few = batched.step(env.params, state, action)
    assert few is not None
    assert_same(state, tree.index(many, slice(0, 3)))


def test_one_result_for_two_choices_is_written_for_one_only():
    """Where the first choice needs no row it returns what the second one is given, which may not be written into."""

    def fn(m, n, x):
        y = x * 2 + 1
        double = lambda x: x * 100  # noqa: E731
        return masked.where(m, double, (x,), y), masked.where(n, double, (x,), y)

    x = torch.arange(12.0).reshape(4, 3)
    none, some = torch.zeros(4, dtype=torch.bool), torch.tensor([True, False, True, False])
    for m, n in ((none, some), (some, none), (some, ~some), (none, none)):
        first, second = jit(torch.func.vmap(fn))(m, n, x)
        for mask, ours in ((m, first), (n, second)):
            assert torch.equal(ours, torch.where(mask.unsqueeze(1), x * 100, x * 2 + 1))
