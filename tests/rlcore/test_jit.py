"""A recorded function gives what the function gives, bit for bit, whatever happened before."""

import functools
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, jacrev, vmap

from rlcore import jit as jit_module
from rlcore import random
from rlcore.jit import jit, one_thread
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
        assert_same(fast(make(seed), 2.0, offset=torch.tensor(seed)), update(make(seed), 2.0, torch.tensor(seed)))
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
        for got, expected in zip(fast(torch.ones(2), k), (torch.ones(2) * k, torch.full((1,), k)), strict=True):
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
        grad(lambda v: fast(v).sum())(x)
        assert fn.runs == calls  # called as it is
    with FakeTensorMode() as mode:
        fast(mode.from_tensor(x))
    assert fast(x).tolist() == [[1.0, 2.0]] * 3


def test_under_vmap_the_mapped_function_is_recorded():
    fn = Counted(lambda tree, y, k: {"a": tree["a"] * y + k, "b": tree["b"].sum(), "c": torch.ones(2)})
    fast = jit(fn)
    tree, y = {"a": make().x, "b": torch.arange(12.0).reshape(4, 3)}, torch.tensor([2.0, -1.0, 0.5])
    tree["a"] = tree["a"].reshape(-1)[:12].reshape(3, 4)
    dims = ({"a": 1, "b": 0}, None, None)
    expected = vmap(fn.fn, in_dims=dims)(tree, y[:3], 0.5)
    runs = []
    for _ in range(4):
        out = vmap(fast, in_dims=dims)(tree, y[:3], 0.5)
        runs.append(fn.runs)
        for name, value in expected.items():
            assert torch.equal(out[name], value), name
    assert len(set(runs)) == 1  # run to record it, and never again
    # Two of them, one inside the other, and a function of nothing that is mapped.
    x = torch.arange(24.0).reshape(2, 3, 4)
    twice = jit(lambda v, w: torch.sin(v) * w)
    w = torch.arange(4.0)
    for _ in range(2):
        nested = vmap(lambda rows: vmap(lambda v: twice(v, w))(rows))(x)
        assert torch.equal(nested, torch.sin(x) * w)
        assert torch.equal(vmap(lambda v: v + twice(w, w))(x), x + torch.sin(w) * w)
        # What differentiates it sees through it.
        slope = vmap(grad(lambda v: twice(v, w).sum()))(x[0])
        torch.testing.assert_close(slope, torch.cos(x[0]) * w)
        slope = grad(lambda v: vmap(lambda row: twice(row, w))(v).sum())(x[0])
        torch.testing.assert_close(slope, torch.cos(x[0]) * w)


def test_what_is_mapped_may_be_closed_over():
    x, y = torch.arange(6.0).reshape(3, 2), torch.arange(3.0)
    # Nothing that is given is mapped, what is held is: by the function itself, by one that it holds, as a default.
    for hold in (
        lambda a: lambda z: z * a,
        lambda a: (lambda inner: lambda z: inner(z))(lambda z: z * a),
        lambda a: functools.partial(lambda z, b: z * b, b=a),
        lambda a: lambda z, b=a: z * b,
        lambda a: lambda z, held={"a": (a, 1)}: z * held["a"][0],
    ):
        for _ in range(2):
            assert torch.equal(vmap(lambda v, a: jit(hold(a))(v))(x, y), x * y[:, None])  # noqa: B023
            assert torch.equal(vmap(lambda a: jit(hold(a))(y))(y), y[:, None] * y)  # noqa: B023


def test_what_is_no_tensor_comes_through_vmap():
    fast = jit(lambda x: (x + 1, "name", None, {"n": 3}))
    seen = []

    def look(x):
        seen.append(fast(x))
        return seen[-1][0]

    for _ in range(2):
        out = vmap(look)(torch.arange(3.0))
        assert out.tolist() == [1.0, 2.0, 3.0] and seen[-1][1:] == ("name", None, {"n": 3})


COMPILED = """
import torch
from rlcore import jit as jit_module
from rlcore.jit import jit, one_thread
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


aten = torch.ops.aten
X = torch.tensor([[0.3, -1.7, 2.5], [-0.0, 0.9, -3.1]])
Y = torch.tensor([[1.5, 2.0, -0.5], [3.0, -2.0, 0.7]])
K = torch.tensor([[3, -5, 7], [0, 12, -1]])
J = torch.tensor([[2, 3, 1], [6, 5, 4]])
M = torch.tensor([[True, False, True], [False, False, True]])

# Every overload of every operation that a replay calls by its Python binding, with positional and keyword arguments.
OVERLOADS: dict[str, list[Callable[..., Any]]] = {
    **{
        f"{name}.default": [lambda op, x=x: op(x) for x in (X.abs(), X.abs().double())]
        for name in ("abs", "cos", "exp", "log1p", "neg", "sin", "sqrt")
    },
    "bitwise_not.default": [lambda op: op(K), lambda op: op(M)],
    **{
        f"{name}.Tensor": [
            lambda op: op(X, Y),
            lambda op: op(K, J),
            lambda op: op(X, K),


            lambda op: op(X, Y[:, :1].double()),
            lambda op: op(K, torch.tensor(2.0)),
        ]
        for name in ("add", "sub", "mul", "div", "eq", "ne", "lt", "le", "gt", "ge")
    },
    **{
        f"{name}.Scalar": [
            lambda op: op(X, 2),
            lambda op: op(K, 2),
            lambda op: op(K, 2.5),
            lambda op: op(X, -0.0),
            lambda op: op(X, True),
        ]
        for name in ("add", "mul", "div", "eq", "ne", "lt", "le", "gt", "ge")
    },
    "sub.Scalar": [lambda op: op(X, 2), lambda op: op(K, 2.5), lambda op: op(X, 2, 3), lambda op: op(K, 2, 3)],
    "bitwise_and.Tensor": [lambda op: op(K, J), lambda op: op(M, ~M), lambda op: op(K, M)],
    "bitwise_or.Tensor": [lambda op: op(K, J), lambda op: op(M, ~M), lambda op: op(K, M)],
    "bitwise_and.Scalar": [lambda op: op(K, 6), lambda op: op(M, True)],
    "bitwise_or.Scalar": [lambda op: op(K, 6), lambda op: op(M, True)],
    "bitwise_and.Scalar_Tensor": [lambda op: op(6, K)],
    "bitwise_or.Scalar_Tensor": [lambda op: op(6, K)],
    "cat.default": [
        lambda op: op([X, Y]),
        lambda op: op([X, Y], 1),
        lambda op: op([X, K], -1),
        lambda op: op([X, Y], dim=1),
        lambda op: op([X]),
    ],
    "stack.default": [lambda op: op([X, Y]), lambda op: op([X, Y], -1), lambda op: op([X, Y], dim=1)],
    "clamp.default": [
        lambda op: op(X, -1.0),
        lambda op: op(X, None, 1),
        lambda op: op(K, 0, 5),
        lambda op: op(X, min=0.5),
        lambda op: op(X, max=0.5),
    ],
    "clamp.Tensor": [
        lambda op: op(X, -Y.abs(), Y.abs()),
        lambda op: op(X, None, Y),
        lambda op: op(X, Y),
        lambda op: op(X, max=Y),
    ],
    "div.Tensor_mode": [
        lambda op: op(X, Y, rounding_mode="floor"),
        lambda op: op(K, J, rounding_mode="trunc"),
        lambda op: op(K, 2, rounding_mode="floor"),
        lambda op: op(X, Y, rounding_mode=None),
    ],
    "div.Scalar_mode": [
        lambda op: op(X, 0.7, rounding_mode="floor"),
        lambda op: op(K, 2, rounding_mode="trunc"),
        lambda op: op(K, 2, rounding_mode=None),
    ],
    "pow.Tensor_Tensor": [lambda op: op(X.abs(), Y), lambda op: op(K, J)],
    "pow.Tensor_Scalar": [lambda op: op(X, 2), lambda op: op(X, 3.0), lambda op: op(K, 2), lambda op: op(X.abs(), 0.5)],
    "pow.Scalar": [lambda op: op(2, X), lambda op: op(2.5, K), lambda op: op(2, J)],
    "select.int": [lambda op: op(X, 1, 2), lambda op: op(X, -1, -2), lambda op: op(X, dim=0, index=1)],
    "sum.default": [lambda op: op(X), lambda op: op(K), lambda op: op(M), lambda op: op(X, dtype=torch.float64)],
    "sum.dim_IntList": [
        lambda op: op(X, [1]),
        lambda op: op(X, [0, 1], True),
        lambda op: op(X, None),
        lambda op: op(X, []),
        lambda op: op(X, [-1], keepdim=True),
        lambda op: op(M, [0], dtype=torch.float32),
        lambda op: op(X, None, True, dtype=torch.float64),
    ],
    "unbind.int": [lambda op: op(X), lambda op: op(X, 1), lambda op: op(X, dim=-1)],
    "where.self": [
        lambda op: op(M, X, Y),
        lambda op: op(M, X, K),
        lambda op: op(M[:, :1], X, torch.tensor(1.0, dtype=torch.float64)),
    ],
    "where.ScalarOther": [lambda op: op(M, X, 2), lambda op: op(M, K, 2.5), lambda op: op(M, X, -0.0)],
    "where.ScalarSelf": [lambda op: op(M, 2, X), lambda op: op(M, 2.5, K)],
    "where.Scalar": [lambda op: op(M, 2, 3), lambda op: op(M, 2.5, 3), lambda op: op(M, True, False)],
}  # fmt: skip
FACTORS = [
    lambda op: op(X, 2),
    lambda op: op(K, 2.5),
    lambda op: op(X, Y, alpha=2.5),
    lambda op: op(K, J, alpha=-3),
]
OVERLOADS["add.Tensor"] += FACTORS
OVERLOADS["sub.Tensor"] += FACTORS
OVERLOADS["add.Scalar"] += [lambda op: op(X, 2, 3), lambda op: op(K, 2, alpha=3)]


def leaves_of(outputs):
    return list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]


def _bytes(x):
    return x.contiguous().reshape(-1).view(torch.uint8).tolist()


def assert_bits(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        # The bits: -0.0 is another number than 0.0 here, and a NaN the same.
        assert _bytes(a) == _bytes(b)


def test_every_overload_that_is_called_by_its_binding_is_tested():
    skipped = ("out", "Dimname", "str ", "complex", "t[]", " -> bool", " -> int", " -> float", " -> Scalar")
    packets = {p._qualified_op_name.removeprefix("aten::"): p for p in jit_module._BINDINGS}
    overloads = {
        f"{name}.{overload}"
        for name, packet in packets.items()
        for overload in packet.overloads()
        if not any(word in str(getattr(packet, overload)._schema) for word in skipped)
    }
    # Of a data-dependent size, so never recorded; and of lists.
    assert set(OVERLOADS) == overloads - {"where.default", "select.t"}


@pytest.mark.parametrize("name", OVERLOADS)
def test_bindings_have_the_bits_of_the_overloads(name):
    packet, overload = name.split(".")
    operation = getattr(getattr(aten, packet), overload)
    for call in OVERLOADS[name]:
        expected = leaves_of(call(operation))
        fast = jit(lambda x, call=call: call(lambda *args, **kwargs: operation(*args, **kwargs)))
        for _ in range(2):
            assert_bits(leaves_of(fast(X)), expected)


FUNCTIONS = {
    "arithmetic": lambda x, y, i, m: (2 - x, 2.0 / y, x / 3, -x + y, x * 2 - y * 0.5, 1 - i, i // 2, i % 3, i / 2),
    "powers": lambda x, y, i, m: (x**2, x**3, 2**x, x.abs() ** y, x.square(), x.abs().sqrt(), x.abs().rsqrt()),
    "comparisons": lambda x, y, i, m: (x > 0, x >= y, i > 0, i <= 3, x == 0, i != 7, x.isnan(), x.isfinite()),
    "logic": lambda x, y, i, m: (m & (x > 0), m | (i == 0), ~m, m ^ (y > 0), i & 6, i | 1, 6 & i, i << 2, i >> 1),
    "choices": lambda x, y, i, m: (
        torch.where(m, x, y), torch.where(m, x, 0.0), torch.where(m, 1, i), torch.where(m, 1.0, 0.0),
        x.clamp(-1, 1), x.clamp(min=0), torch.clamp(x, max=y), torch.maximum(x, y), x.masked_fill(m, 7.0),
    ),
    "reductions": lambda x, y, i, m: (
        x.sum(), x.sum(-1), x.sum(0, keepdim=True), m.sum(), m.sum(-1), x.mean(), x.amax(-1), m.any(), m.all(-1),
        x.norm(dim=-1), x.argmax(-1), *x.max(-1), x.cumsum(-1), x.var(), x.logsumexp(-1),
    ),
    "places": lambda x, y, i, m: (
        x[0], x[..., 1], x[:, 1:], x.T, x.reshape(-1), x.flip(0), torch.cat([x, y], -1), torch.stack([x, y]),
        *x.unbind(-1), x.unsqueeze(0), x[:, [2, 0]], x.roll(1), torch.cat([x[:1] * 2, y[1:], x.new_zeros(1, 3)]),
        x.view(x.shape), x.permute(0, 1), x.expand(2, 2, 3), x.repeat(2, 1), *x.split(2, -1), x.movedim(0, 1),
    ),
    "functions": lambda x, y, i, m: (
        x.sin(), x.cos(), x.exp(), x.abs().log1p(), x.tanh(), torch.atan2(x, y), x.sigmoid(), x.erf(), x.floor(),
        torch.nan_to_num(x / 0, 0.0, 0.0, 0.0), torch.nn.functional.elu(x), torch.nn.functional.softplus(x),
        torch.linalg.cross(x, y), x @ y.T, x.sign(), x.to(torch.float64), i.to(torch.float32), x.double() * y,
    ),
    "twice": lambda x, y, i, m: (
        x.sin() + x.sin(), x * 1, x * 1.0, i * 1, i * True, x + 0.0, x - 0.0, x + -0.0, x * y, x * y, x.T @ y,
        *x.max(-1), *x.max(-1), x.sum(-1), x.sum(-1, keepdim=True), x.to(torch.float64), x.to(torch.float64),
        torch.zeros(2), torch.zeros(2), torch.zeros(2, dtype=torch.int64), torch.full((2,), 1), torch.full((2,), 1.0),
    ),
    "in place": lambda x, y, i, m: in_place(x.clone(), y),
}  # fmt: skip


def in_place(x, y):
    flat, z = x.view(x.shape), x * 1
    flat[0] = 5.0
    x[..., 1].mul_(2)
    w = x * 1
    flat.add_(y)
    return x, z, w, x * 1, flat.permute(0, 1)


@pytest.mark.parametrize("mapped", [0, 1, 2])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_recorded_functions_have_the_bits_of_the_functions(name, mapped):
    if name == "in place" and mapped:
        # A write through a view of a mapped tensor is not what is tested here.
        mapped = 0
    fn, lead = FUNCTIONS[name], (4, 3)[:mapped]
    for _ in range(mapped):
        fn = vmap(fn)
    fast = jit(fn)
    for seed in range(3):
        keys = random.split(random.key(seed), 3)
        args = [
            random.normal(keys[0], (*lead, 2, 3)),
            random.normal(keys[1], (*lead, 2, 3)),
            random.randint(keys[2], (*lead, 2, 3), -9, 9),
            random.normal(keys[2], (*lead, 2, 3)) > 0,
        ]
        before = [x.clone() for x in args]
        expected = [x.clone() for x in fn(*args)]
        got = fast(*args)
        assert_bits(got, expected)
        # Each output that is no view of an argument or of another output is its own: writing into it harms none.
        plain = fn(*args)
        for place, mine in enumerate(got):
            if any(mine.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for x in args):
                continue
            for other in range(place):
                apart = plain[place].untyped_storage().data_ptr() != plain[other].untyped_storage().data_ptr()
                if apart:
                    assert mine.untyped_storage().data_ptr() != got[other].untyped_storage().data_ptr(), (place, other)
        assert_bits(args, before)


def test_equal_operations_are_computed_once():
    calls = []

    @torch.library.custom_op("tests::told", mutates_args=())
    def told(x: torch.Tensor, k: float) -> torch.Tensor:
        calls.append(k)
        return x * k

    told.register_fake(lambda x, k: torch.empty_like(x))
    fast = jit(lambda x: (told(x, 2.0) + told(x, 2.0), told(x + 0, 2.0), told(x, 3.0), told(x, 2.0)))
    fast(torch.ones(2))
    calls.clear()
    outputs = fast(torch.ones(2))
    assert sorted(calls) == [2.0, 2.0, 3.0]
    assert [x.tolist() for x in outputs] == [[4, 4], [2, 2], [3, 3], [2, 2]]


def test_numbers_drawn_from_a_generator_are_not_shared():
    fast = jit(lambda x: (torch.rand_like(x), torch.rand_like(x)))
    for _ in range(2):
        first, second = fast(torch.ones(8))
        assert not torch.equal(first, second)


def test_one_thread_is_undone():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with one_thread(10):
            assert torch.get_num_threads() == 1
            with one_thread(10):
                pass
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        with one_thread(100_000):
            assert torch.get_num_threads() == 2
        with pytest.raises(KeyError), one_thread(1):
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
