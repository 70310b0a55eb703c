"""A recorded function gives what the function gives, bit for bit, whatever happened before."""

import functools
import weakref

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, jacrev, vmap

from rlcore import random
from rlcore.jit import jit
from rlcore.tree import pytree, static


@pytree
class State:
    x: torch.Tensor
    y: dict[str, torch.Tensor]
    kind: str = static(default="plain")


def make(seed=0, num=4, dtype=torch.float32, kind="plain"):
    x = random.normal(random.key(seed), (num, 3), torch.float64).to(dtype)
    return State(x, {"a": x[:, 0] ** 2}, kind)


class Counted:
    """A function that knows how often it ran: a recording runs it once, a replay never."""

    def __init__(self, fn):
        self.fn, self.runs = fn, 0
        functools.update_wrapper(self, fn)

    def __call__(self, *args, **kwargs):
        self.runs += 1
        return self.fn(*args, **kwargs)


def update(state, scale, offset=None):
    x = torch.tanh(state.x @ state.x.T) @ state.x * scale
    y = state.x.sum(1) if offset is None else state.y["a"] + offset
    return State(torch.where(x > 0, x, -0.5 * x), {"a": y, "b": x.mean()}, state.kind), x.argmax()


def assert_same(a, b):
    (first, i), (second, j) = a, b
    assert first.kind == second.kind
    for x, y in ((first.x, second.x), (first.y["a"], second.y["a"]), (first.y["b"], second.y["b"]), (i, j)):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


def test_replays_have_the_bits_of_the_function():
    fn = Counted(update)
    fast = jit(fn)
    for seed in range(4):
        assert_same(fast(make(seed), 2.0), update(make(seed), 2.0))
        assert_same(
            fast(make(seed), 2.0, offset=torch.tensor(seed)), update(make(seed), 2.0, torch.tensor(seed))
        )
    assert fn.runs == 2
    assert fast.__name__ == "update"


def test_records_again_for_what_differs():
    fn = Counted(update)
    fast = jit(fn)
    calls = [
        (make(), 2.0),
        (make(num=5), 2.0),
        (make(dtype=torch.float64), 2.0),
        (make(kind="other"), 2.0),
        (make(), 3.0),
        (make(), 3),
        (make(), torch.tensor(3.0)),
        (make(), torch.tensor(3.0), torch.ones(4)),
        (make(), torch.tensor(3.0), torch.ones(())),
        (make(), torch.tensor(3.0), torch.ones(4, dtype=torch.int64)),
        (State(make().x.T.contiguous().T, make().y), 2.0),
    ]
    for repeat in range(2):
        for call in calls:
            assert_same(fast(*call), update(*call))
        assert fn.runs == len(calls), repeat
    moved = jit(lambda x: torch.zeros(2, device=x.device))
    for device in ("cpu", "meta", "cpu"):
        assert moved(torch.ones(2, device=device)).device.type == device


def test_equal_leaves_of_other_kinds_are_told_apart():
    fast = jit(lambda x, k: (x * k, torch.full((1,), k)))
    for k in (1, 1.0, True, 0.0, -0.0, False):
        for got, expected in zip(
            fast(torch.ones(2), k), (torch.ones(2) * k, torch.full((1,), k)), strict=True
        ):
            assert got.dtype == expected.dtype
            assert torch.equal(got.double().reciprocal(), expected.double().reciprocal())  # of -0.0 too
    counted = Counted(lambda x, k: x + k)
    nan = jit(counted)
    for _ in range(3):
        assert nan(torch.ones(1), float("nan")).isnan().all()
    assert counted.runs == 1


def test_leaves_that_cannot_be_a_key_are_refused():
    with pytest.raises(TypeError, match="tensor or hashable, got a ndarray"):
        jit(lambda x, k: x)(torch.ones(1), np.ones(1))


def test_views_of_other_strides():
    fast = jit(lambda x: (x.reshape(-1), x.flatten()[1:3] * 2, x.T.contiguous().view(-1)))
    base = torch.arange(24.0).reshape(4, 6)
    for x in (base[:, :4], base.T[:4, :4], base[::2, ::2][:, :2], base[:4, :4].contiguous(), base[:1, :4]):
        direct = (x.reshape(-1), x.flatten()[1:3] * 2, x.T.contiguous().view(-1))
        assert all(torch.equal(a, b) for a, b in zip(fast(x), direct, strict=True))


def test_nested_and_inside_transforms():
    inner = jit(lambda x: torch.sin(x) * x)
    outer = jit(lambda x: inner(inner(x)).sum(-1))
    once = lambda x: torch.sin(x) * x  # noqa: E731
    plain = lambda x: once(once(x))  # noqa: E731
    x = make().x
    for _ in range(2):
        assert torch.equal(outer(x), plain(x).sum(-1))
        assert torch.equal(vmap(outer)(x), vmap(lambda v: plain(v).sum(-1))(x))
        assert torch.equal(grad(lambda v: outer(v).sum())(x), grad(lambda v: plain(v).sum())(x))
        assert torch.equal(jacrev(outer)(x[0]), jacrev(lambda v: plain(v).sum(-1))(x[0]))
        assert torch.equal(jit(vmap(grad(outer)))(x), vmap(grad(outer))(x))
    tracked = x.clone().requires_grad_()
    outer(tracked).sum().backward()
    assert torch.equal(tracked.grad, grad(lambda v: plain(v).sum())(x))
    with torch.no_grad():
        assert torch.equal(outer(tracked), outer(x))


def test_other_transforms_leave_no_recording():
    fn = Counted(lambda x: x * torch.tensor([1.0, 2.0]))
    fast, x = jit(fn), torch.ones(3, 2)
    for calls in range(1, 4):
        vmap(fast)(x)
        assert fn.runs == calls  # called as it is
    with FakeTensorMode() as mode:
        fast(mode.from_tensor(x))
    assert fast(x).tolist() == [[1.0, 2.0]] * 3


COMPILED = """
import torch
from rlcore.jit import jit
fast = jit(lambda x: torch.sin(x) * x)
x = torch.arange(4.0)
assert torch.equal(torch.compile(lambda x: fast(x) + 1, backend="aot_eager", fullgraph=True)(x), fast(x) + 1)
print("done")
"""


def test_inside_a_compile(run_python):
    assert run_python(COMPILED) == "done\n"


def test_keyed_random_numbers():
    draw = jit(vmap(lambda key: random.normal(random.fold_in(key, 3), (5,))))
    for seed in range(3):
        keys = random.split(random.key(seed), 6)
        assert torch.equal(draw(keys), vmap(lambda key: random.normal(random.fold_in(key, 3), (5,)))(keys))


def test_writing_into_results_harms_nothing():
    constant = torch.tensor([5.0, 6.0])

    def fn(x):
        made = torch.tensor([1.0, 2.0])
        gathered = torch.zeros(2)
        gathered += x  # writing into what the function made itself is pure
        first, _ = constant.split(1)
        return [x + 1, made, gathered, constant, constant[1:], constant.view(2, 1).T, first, constant + 0]

    fast, x = jit(fn), torch.tensor([1.0, 3.0])
    expected = [t.clone() for t in fn(x)]
    for _ in range(3):
        outputs = fast(x)
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
        for output in outputs:
            output.fill_(-7.0)
        assert constant.tolist() == [5.0, 6.0]
        assert x.tolist() == [1.0, 3.0]
    kept = fast(x)
    fast(x + 1)
    assert torch.equal(kept[0], expected[0])  # a later replay writes into nothing that was handed out


def test_an_argument_returned_is_that_argument():
    fast, x = jit(lambda x: (x, x[0], x + 0)), torch.ones(2)
    for _ in range(2):
        same, view, new = fast(x)
        assert same.data_ptr() == view.data_ptr() == x.data_ptr()
        assert new.data_ptr() != x.data_ptr()


def test_what_is_closed_over_is_fixed_when_recorded():
    settings = {"scale": 2.0}
    fast = jit(lambda x: x * settings["scale"])
    assert fast(torch.ones(1)) == 2
    settings["scale"] = 3.0
    assert fast(torch.ones(1)) == 2
    assert fast(torch.ones(2)).tolist() == [3, 3]


def test_parameters_closed_over_keep_their_gradients():
    layer = torch.nn.Linear(3, 2)
    fast, x = jit(lambda x: layer(x)), make().x
    with torch.no_grad():
        assert torch.equal(fast(x), layer(x))
    for _ in range(2):
        layer.zero_grad()
        fast(x).sum().backward()
        gradient = layer.bias.grad
        assert gradient is not None
        assert torch.equal(gradient, torch.full((2,), 4.0))


def test_other_outputs_than_tensors():
    fast = jit(lambda x: {"x": x * 2, "n": 3, "none": None, "list": [x + 1, ()]})
    for _ in range(2):
        out = fast(torch.ones(1))
        assert (out["n"], out["none"], out["list"][1]) == (3, None, ())
        assert (out["x"], out["list"][0]) == (2, 2)


def test_a_failure_leaves_no_recording():
    failing = [True]

    def fn(x):
        y = x + 1
        if failing:
            raise KeyError("broken")
        return y * 2

    fast = jit(fn)
    for _ in range(2):
        with pytest.raises(KeyError, match="broken"):
            fast(torch.ones(2))
    failing.clear()
    assert fast(torch.ones(2)).tolist() == [4, 4]
    assert fast(torch.zeros(2)).tolist() == [2, 2]
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


@pytest.mark.parametrize(
    "fn", [lambda x: x if x.sum() > 0 else -x, lambda x: x * x.sum().item()], ids=["branch", "item"]
)
def test_what_depends_on_a_value_is_refused(fn):
    fast = jit(fn)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="value out of a tracing tensor"):
            fast(torch.ones(3))


def test_arguments_that_went_by_are_not_held():
    fast = jit(lambda x: x + 1)
    x = torch.ones(1000)

    gone = weakref.ref(x)
    fast(x)
    del x
    assert gone() is None


def test_one_tensor_for_two_arguments_is_not_recorded_as_one():
    fn = jit(lambda a, b: a - 2 * b)
    one, zero = torch.ones(2), torch.zeros(2)
    assert torch.equal(fn(one, one), -one)
    assert torch.equal(fn(one, zero), one)
    assert torch.equal(fn(zero, one), -2 * one)
