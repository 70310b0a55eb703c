"""A kernel gives the bits of the operations that it replaces, whatever their values, shapes and order."""

import gc
import math
import operator

import pytest
import torch
from torch.func import vmap

from rlcore import random
from rlcore.fusion import Kernel, fuse, square_root
from rlcore.jit import jit

SPECIAL = (
    0.0,
    -0.0,
    1.0,
    -1.0,
    math.inf,
    -math.inf,
    math.nan,
    5e-324,
    1e-310,
    1e-40,
    1.5e308,
    0.1,
    -2.5,
    3.0,
    7.25,
    -1e-3,
)


def traced(fn, *args):
    from torch.fx.experimental.proxy_tensor import make_fx

    module = make_fx(fn, tracing_mode="real")(*args)
    module.graph.eliminate_dead_code()
    return module


def fused(fn, *args):
    """The function's results through kernels, and which operations are left."""
    module = traced(fn, *args)
    module.graph = fuse(module.graph)
    module.recompile()
    left = [node.target for node in module.graph.nodes if node.op == "call_function"]
    return module(*args), [target for target in left if target is not operator.getitem]


def assert_bits(ours, theirs):
    ours, theirs = (x if isinstance(x, tuple | list) else [x] for x in (ours, theirs))
    for a, b in zip(ours, theirs, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        # The stride of an axis of one element means nothing.
        assert all(s == t for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True) if n != 1)
        kind = {torch.float64: torch.int64, torch.float32: torch.int32}.get(a.dtype)
        same = a == b
        if kind is not None:  # any NaN is as good as another, but 0.0 is not -0.0
            same = (a.view(kind) == b.view(kind)) | (a.isnan() & b.isnan())
        assert bool(same.all()), (a[~same][:5], b[~same][:5])


def pairs(dtype):
    """Every pair of the special values, as two tensors [N, 3]."""
    x = torch.tensor(SPECIAL, dtype=torch.float64).to(dtype)
    a, b = torch.cartesian_prod(x, x).unbind(1)
    return a[: len(a) // 3 * 3].reshape(-1, 3), b[: len(b) // 3 * 3].reshape(-1, 3)


FLOATS = {
    "sums": lambda x, y: (x + y, x - y, x + 0.1, x - 0.1, 2 - x, -x, x.abs(), 1.0 + y * x),
    "products": lambda x, y: (x * y, x * 0.02, x / y, x / 3.0, 1.0 / x, x**2, x.square(), x * x * y),
    "not contracted": lambda x, y: (x * y + x, x * y - y, (x + y) - x, (x - y) + y, x * 0.1 + y * 0.2),
    "bounds": lambda x, y: (
        x.clamp(-1.0, 1.0), x.clamp(min=0.0), x.clamp(max=0.0), x.clamp(0.0, 0.0),
        torch.nan_to_num(x, 0.0, 0.0, 0.0), torch.nan_to_num(x, 1.0, 2.0, -3.0),
    ),
    "activations": lambda x, y: (
        torch.relu(x), torch.relu(x) * y, torch.ops.aten.threshold_backward(x, y, 0),
        square_root(x), square_root(x * x + y),
    ),
    "comparisons": lambda x, y: (x < y, x <= y, x > y, x >= y, x == y, x != y, x < 1.0, x != 0, x == math.inf),
    "choices": lambda x, y: (
        torch.where(x > y, x, y), torch.where(x > 0, x, 0.0), torch.where(x > 0, 1.0, 0.0),
        torch.where((x > 0) & ~(y > 0), x, -1.0), torch.where((x > 0) | (y < x), x * 2, y / 2),
    ),
    "conversions": lambda x, y: (x.double() + y, x.float() * 2, (x > y).to(x.dtype), (x > y).double() - y, x.clone()),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", FLOATS)
def test_every_operation_has_its_bits_for_every_pair_of_values(name, dtype):
    # torch has one loop for numbers side by side and another for those that lie apart.
    for x, y in (pairs(dtype), [x.contiguous() for x in pairs(dtype)]):
        ours, left = fused(FLOATS[name], x, y)
        assert_bits(ours, FLOATS[name](x, y))
        assert [type(target) for target in left] == [Kernel]


def test_integers_and_truths():
    i = random.randint(random.key(0), (50, 4), -(2**40), 2**40)
    j = random.randint(random.key(1), (50, 4), -9, 9)
    m = j > 0

    def fn(i, j, m):
        return (
            i + j, i - j, i * j, i + 50331648, (i & j) | (i ^ j), ~i, ~m, m & (i > j), m | (j == 0), m ^ (i < 0),
            i.double() * 0.5, i.float() + 1, m.long() + i, torch.where(m, i, -1), torch.where(m, j, i), i.int().long(),
            i & 4294967295, (j + m).double(), m.float() - 0.5, m < ~m, m <= (i > 0), m > (i > 0), m >= True,
            m == (i > 0),
        )  # fmt: skip

    ours, left = fused(fn, i, j, m)
    assert_bits(ours, fn(i, j, m))
    assert [type(target) for target in left] == [Kernel]


PLACES = {
    "parts": lambda x, y: (x[:, 1:] + y[:, :-1], x[:, 0] * y[:, 2], x[:, ::2] - 1, x[:, -1] + 0.5, x.unbind(1)[1] * 2),
    "joined": lambda x, y: (
        torch.cat([x * 2, y[:, :1], x], 1), torch.stack([x[:, 0], y[:, 1] + 1], 1), torch.stack([x + y, y], 2),
        torch.cat([x[:, :0], y * 3], 1), torch.stack([x, y * 2], 1)[:, 1] + 1, torch.cat([x.new_zeros(0), y[:, 0] * 2]),
    ),
    "joined along rows": lambda x, y: (torch.cat([x * 2, y + 1]) * 2, torch.stack([x + 1, y]) - 1, x[:1] * 2 + y),
    "broadcast": lambda x, y: (
        x * y[:, :1], x[:, :1] + 1.0, (x[:, 0].unsqueeze(1) * 2 + y), x + y[0] * 2, x.sum(1, keepdim=True) * x,
        (x * 2).unsqueeze(1) + y.unsqueeze(2), x.expand(2, *x.shape) + 1, (x[:, 1] * 2).unsqueeze(1).expand(-1, 3) + y,
    ),
    "rows that meet": lambda x, y: (
        (x * 2)[1:] - (x * 2)[:-1], (x + 1).flip(0) * y, (x * 3).sum(0) + y, (x + y)[0] + x, (x[:3] * 2).T + 1,
    ),
    "between others": lambda x, y: (
        ((x * 2 + 1).exp() * y - x).sum(1) * 2 + 1, (x.square().sum(1) * -4.0).exp() + 1,
        torch.sin(x * y) + torch.cos(x * y),
        (x @ (y * 2).T) * 0.5, x.split([1, 2], 1)[1] * 2, (x * 2).split([1, 2], 1)[0].detach() + 1,
    ),
    "constants": lambda x, y: (
        torch.zeros_like(x) + 1, torch.ones_like(x), torch.full_like(y, 2.5) * x, x.new_zeros(3) + x,
        torch.zeros(()) + x, x.new_zeros(len(x), 2), torch.zeros_like(x), x * torch.tensor([1.0, 2.0, 3.0]),
        torch.ones_like(x[:, 0]) * y[:, 0],
    ),
    "same result twice": lambda x, y: (x + 1, x + 1, (x + 1)[:, 0], (x + 1) * (x + 1)),
    "transposed": lambda x, y: (x.T * 2, (x * 2).T, x.T.contiguous() + 1, (x + y).permute(1, 0) - 1, x.T + y.T),
}  # fmt: skip


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("name", PLACES)
def test_elements_come_from_where_they_are(name, rows):
    if name in ("parts", "rows that meet") and rows < 3:
        rows = 5
    x, y = (random.normal(random.key(seed), (rows, 3), torch.float64) for seed in (0, 1))
    ours, left = fused(PLACES[name], x, y)
    assert_bits(ours, PLACES[name](x, y))
    assert any(isinstance(target, Kernel) for target in left)


@pytest.mark.parametrize("rows", [3, 7])
def test_arguments_may_lie_in_any_way(rows):
    wide = random.normal(random.key(0), (rows, 6), torch.float64)
    shared = random.normal(random.key(1), (3,), torch.float64).expand(rows, 3)

    def fn(x, y):
        return x * y + 1, torch.cat([x, y], 1)

    for x, others in ((wide[:, ::2], 0), (wide[:, 3:], 0), (wide.T.contiguous().T[:, :3], 2)):
        ours, left = fused(fn, x, shared)
        assert_bits(ours, fn(x, shared))
        # A result that torch lays out in another way than row after row is left to torch.
        assert sum(not isinstance(target, Kernel) for target in left) == others


def test_square_roots_are_rounded_to_the_nearest_and_can_be_mapped_and_differentiated():
    x = random.uniform(random.key(0), (1000,), 1e-30, 4.0).to(torch.float32)
    exact = x.to(torch.float64).sqrt()  # wide enough that rounding it to float32 gives the nearest
    assert torch.equal(square_root(x), exact.to(torch.float32))
    rows = x.view(10, 100)
    assert torch.equal(torch.vmap(square_root, in_dims=1, out_dims=1)(rows), square_root(rows))
    y = x.to(torch.float64)[:20].clamp(min=0.1).requires_grad_()
    assert torch.autograd.gradcheck(square_root, (y,))


def test_what_has_no_exact_result_is_left_to_torch():
    x = random.normal(random.key(0), (33, 3), torch.float64)

    def fn(x):
        return torch.exp(x * 2) + 1, torch.sqrt(x.abs()), x.sum(0) * 2, torch.tanh(x), x**3

    _, left = fused(fn, x)
    aten = torch.ops.aten
    kept = {aten.exp.default, aten.sqrt.default, aten.tanh.default, aten.pow.Tensor_Scalar, aten.sum.dim_IntList}
    assert kept <= set(left)
    assert not {aten.mul.Tensor, aten.add.Tensor, aten.abs.default} & set(left)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sums_are_added_in_the_order_of_torch(dtype):
    for count in (2, 3, 4, 5, 8, 13, 16, 21, 35, 64):
        for lead in ((1,), (300,), (3, 2, 2)):
            x = random.normal(random.key(count), (*lead, count), dtype)
            x = x * (10.0 ** random.normal(random.key(1), (count,), dtype))

            def fn(x):
                return x.sum(-1), (x * 2 + 1).sum(-1, keepdim=True) - x, x.square().mean(-1), x.mean(-1) * 2

            ours, left = fused(fn, x)
            assert_bits(ours, fn(x))
            assert [type(target) for target in left] == [Kernel]


def test_sums_of_what_lies_apart_have_the_bits_of_torch():
    wide = random.normal(random.key(0), (9, 40), torch.float64)

    def fn(x):
        return x.sum(-1), (x + 1).sum(-1), x.mean(-1, keepdim=True) * x, (x * x).sum((0, 1)), x.sum(0) * 2

    for x in (wide[:, ::2], wide[:, 3:30], wide.T, wide[:, :1], wide[:1].expand(4, 40), wide[:, :1].expand(9, 30)):
        assert_bits(fused(fn, x)[0], fn(x))
        assert_bits(jit(fn)(x), fn(x))


def test_what_fills_with_a_bound_is_left_to_torch():
    x = random.normal(random.key(0), (4, 3))
    for fn in (lambda x: x.clamp(math.nan, 1.0) + 1, lambda x: torch.clamp(x, x * 0, x * 0 + 1) + 1):
        ours, left = fused(fn, x)
        assert_bits(ours, fn(x))
        assert {str(target) for target in left} & {"aten.clamp.default", "aten.clamp.Tensor"}


def test_long_chains_and_squares_of_squares():
    x = random.normal(random.key(0), (4, 5), torch.float64)

    def chain(x):
        for i in range(600):
            x = x * 1.0001 + i
        return x

    def powers(x):
        for _ in range(40):  # written out, the last one would be 2^40 products
            x = x * x
        return x

    for fn in (chain, powers):
        ours, left = fused(fn, x)
        assert_bits(ours, fn(x))
        assert [type(target) for target in left] == [Kernel]


def test_wide_results_are_not_kept_on_the_stack():
    x = random.normal(random.key(0), (1, 1 << 19), torch.float64)

    def fn(x):
        y = torch.cat([x * 2, x + 1], 1)
        return y * y + 1, torch.stack([x, x * 3], 1).sum(1)

    assert_bits(fused(fn, x)[0], fn(x))


def test_code_outlives_the_memory_of_what_was_compiled():
    from rlcore import fusion

    x = torch.ones(3, 2)
    fast = jit(lambda x: x * 1.25 + 0.125)
    assert_bits(fast(x), x * 1.25 + 0.125)
    fusion._compiled.cache_clear()
    gc.collect()
    fused(lambda x: x * 1.5 + 0.375, x)
    assert_bits(fast(x * 2), x * 2 * 1.25 + 0.125)


def test_kernels_write_to_the_cpu_whatever_the_default_device():
    x = torch.ones(3, 2)
    fast = jit(lambda x: x * 2 + 1)
    fast(x)
    with torch.device("meta"):
        assert_bits(fast(x), x * 2 + 1)


def test_large_tensors_are_left_to_torch():
    x = torch.ones(1 << 19, 4)
    _, left = fused(lambda x: x * 2 + 1, x)
    assert torch.ops.aten.mul.Tensor in left


def test_one_kernel_between_two_others():
    """What waits for nothing else is one kernel, and what is needed late is computed late."""
    x = random.normal(random.key(0), (16, 8), torch.float64)

    def fn(x):
        energy = (x * x).sum(1)
        reward = torch.exp(energy * -0.5) * 2 + 1
        return torch.cat([x - 1, reward.unsqueeze(1)], 1).float(), reward > 1

    ours, left = fused(fn, x)
    assert_bits(ours, fn(x))
    kinds = ["kernel" if isinstance(target, Kernel) else str(target) for target in left]
    assert kinds == ["kernel", "aten.exp.default", "kernel"]


def test_every_call_gives_new_memory():
    fast = jit(vmap(lambda x, y: (x * 2 + y, x - y)))
    x, y = torch.ones(4, 3), torch.ones(4, 3)
    first = fast(x, y)
    first[0].fill_(7.0)
    second = fast(x, y)
    assert_bits(second, (x * 2 + y, x - y))
    assert len({out.data_ptr() for out in (*first, *second)}) == 4


def test_code_serves_every_number_of_rows():
    from rlcore import fusion

    fast = jit(vmap(lambda x, y: torch.cat([x * 2 + y, x - y])))
    before = fusion._compiled.cache_info().misses
    for rows in (5, 6, 700):
        x, y = (random.normal(random.key(seed), (rows, 11)) for seed in (0, 1))
        assert_bits(fast(x, y), torch.cat([x * 2 + y, x - y], 1))
    assert fusion._compiled.cache_info().misses - before == 1


@pytest.mark.parametrize("seed", range(30))
def test_random_programs(seed):
    """Chains of operations, each on results of those before: levels, views and reuse in every combination."""
    key = random.key(seed)
    choices = [int(i) for i in random.randint(key, (60,), 0, 1 << 30)]
    rows = choices[0] % 7 + 2

    def program(*inputs):
        values, picks = list(inputs), iter(choices[1:])

        def pick():
            return values[next(picks) % len(values)]

        for _ in range(12):
            a, b, kind = pick(), pick(), next(picks) % 12
            if kind == 0:
                values.append(a + b)
            elif kind == 1:
                values.append(a * 0.5 - b)
            elif kind == 2:
                values.append(torch.where(a > b, a, -b))
            elif kind == 3:
                values.append(a[:, :1] * b)
            elif kind == 4:
                values.append(torch.cat([a[:, 1:], b[:, :1]], 1))
            elif kind == 5:
                values.append(torch.stack(b.unbind(1), 1) / 3.0)
            elif kind == 6:
                values.append(torch.exp(-a.abs()))
            elif kind == 7:
                values.append(a.sum(1, keepdim=True) + b)
            elif kind == 8:
                values.append(a - b.sum(0))
            elif kind == 9:
                values.append(a.clamp(-1.0, 1.0).float().double())
            elif kind == 10:
                values.append((a.unsqueeze(2) * b.unsqueeze(1)).sum(2))
            else:
                values.append(a.flip(0) - 1)
        return tuple(values[len(inputs) :])

    inputs = [random.normal(random.fold_in(key, i), (rows, 4), torch.float64) for i in range(3)]
    ours, left = fused(program, *inputs)
    assert_bits(ours, program(*inputs))
    assert any(isinstance(target, Kernel) for target in left)
    fast = jit(program)
    for _ in range(2):
        assert_bits(fast(*inputs), program(*inputs))
