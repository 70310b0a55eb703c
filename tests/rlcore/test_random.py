"""Keyed random numbers: equal to JAX, and equal under every transform and for every number of keys."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jaxtyping
import numpy as np
import pytest
import torch
from torch.func import grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from rlcore import random
from rlcore.errors import InputError

# Under the test run's shape checks, a wrong shape is caught before the function's own check sees it.
REFUSED = (InputError, jaxtyping.TypeCheckError)

SEEDS = (0, 2**32 - 1, 2**40 + 5)
SHAPES = ((), (0,), (1,), (3, 5), (1001,))
FLOATS = (torch.float32, torch.float64)

# One function for each kind of draw, from a key to a tensor.
DRAWS = {
    "split": lambda key: random.split(key, 3),
    "fold_in": lambda key: random.fold_in(key, 11),
    "fold_in_tensor": lambda key: random.fold_in(key, key[1]),
    "bits": lambda key: random.bits(key, (5,)),
    "uniform": lambda key: random.uniform(key, (2, 3)),
    "uniform_double": lambda key: random.uniform(key, (5,), -1.0, 2.0, dtype=torch.float64),
    "uniform_tensor": lambda key: random.uniform(key, (3,), torch.zeros(3), torch.arange(3.0)),
    "uniform_mixed": lambda key: random.uniform(key, (3,), -1.0, torch.arange(3.0)),
    "normal": lambda key: random.normal(key, (5,)),
    "normal_double": lambda key: random.normal(key, (5,), torch.float64),
    "gumbel": lambda key: random.gumbel(key, (5,)),
    "bernoulli": lambda key: random.bernoulli(key, 0.3, (9,)),
    "categorical": lambda key: random.categorical(key, torch.arange(6.0)),
    "randint": lambda key: random.randint(key, (5,), -3, 1000),
    "randint_tensor": lambda key: random.randint(key, (2,), 0, torch.tensor([5, 10**6])),
    "permutation": lambda key: random.permutation(key, 9),
    "permutation_twice": lambda key: random.permutation(key, 2000),
}
each_draw = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())


@pytest.fixture(autouse=True)
def _jax_in_64_bits():
    with jax.enable_x64(True):
        yield


def jax_key(seed):
    return jax.random.PRNGKey(seed)


def assert_same(ours, theirs):
    np.testing.assert_array_equal(ours.numpy(), np.asarray(theirs))


def many_keys(num, seed=3):
    return random.split(random.key(seed), num)


# --- Golden values ---


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        # The known-answer tests of Random123 for threefry2x32, 20 rounds.
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_cipher_gives_the_published_words(counter, key, expected):
    packed = torch.from_numpy(np.array((counter[0] << 32) | counter[1], np.uint64).view(np.int64))
    key = torch.tensor(key)
    assert torch.ops.rlcore.threefry2x32(key, packed).tolist() == list(expected)
    assert [int(word) for word in random._encipher_torch(key, packed)] == list(expected)


# --- Equal to JAX ---


@pytest.mark.parametrize("seed", SEEDS)
def test_keys_equal_jax(seed):
    key, theirs = random.key(seed), jax_key(seed)
    assert_same(key, theirs)
    for num in (0, 1, 2, 3, 64):
        assert_same(random.split(key, num), jax.random.split(theirs, num))
    for data in (0, 1, 77, 2**32 - 1):
        assert_same(random.fold_in(key, data), jax.random.fold_in(theirs, data))
        assert_same(random.fold_in(key, torch.tensor(data)), jax.random.fold_in(theirs, data))


@pytest.mark.parametrize("shape", SHAPES)
def test_bits_equal_jax(shape):
    for seed in SEEDS:
        assert_same(random.bits(random.key(seed), shape), jax.random.bits(jax_key(seed), shape, "uint32"))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_uniform_equals_jax(shape, dtype):
    name = str(dtype).removeprefix("torch.")
    for seed in SEEDS:
        ours = random.uniform(random.key(seed), shape, dtype=dtype)
        assert_same(ours, jax.random.uniform(jax_key(seed), shape, name))


@pytest.mark.parametrize(("low", "high"), [(-1.3, 2.7), (0.1, 0.7), (2, 3), (1.0, -1.0), (5.0, 5.0)])
def test_uniform_between_bounds_equals_jax(low, high):
    shape = (1001,)
    theirs = np.asarray(jax.random.uniform(jax_key(1), shape, "float32", np.float32(low), np.float32(high)))
    for bounds in (
        (low, high),
        (torch.tensor(low), high),
        (torch.tensor(low), torch.full(shape, float(high))),
    ):
        ours = random.uniform(random.key(1), shape, *bounds)
        # JAX may or may not fuse the multiplication and the addition, as the machine allows.
        np.testing.assert_array_max_ulp(ours.numpy(), theirs, maxulp=4)
        np.testing.assert_array_equal(ours.numpy(), random.uniform(random.key(1), shape, low, high).numpy())
    ours = random.uniform(random.key(1), shape, low, high, torch.float64)
    theirs = np.asarray(jax.random.uniform(jax_key(1), shape, "float64", low, high))
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("shape", SHAPES)
def test_normal_and_gumbel_equal_jax(shape):
    for seed in SEEDS:
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
            name = str(dtype).removeprefix("torch.")
            ours = random.normal(random.key(seed), shape, dtype)
            theirs = jax.random.normal(jax_key(seed), shape, name)
            assert ours.dtype == dtype
            np.testing.assert_allclose(ours.numpy(), theirs, rtol=tolerance, atol=tolerance)
            ours = random.gumbel(random.key(seed), shape, dtype)
            theirs = jax.random.gumbel(jax_key(seed), shape, name)
            assert ours.dtype == dtype
            np.testing.assert_allclose(ours.numpy(), theirs, rtol=tolerance, atol=tolerance)


def test_normal_tails_equal_jax():
    shape = (200_000,)  # enough to reach every branch of erfinv
    ours, theirs = random.normal(random.key(5), shape), jax.random.normal(jax_key(5), shape, "float32")
    assert ours.abs().max() > 4.2
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-6, atol=1e-6)
    ours = random.normal(random.key(5), shape, torch.float64)
    np.testing.assert_allclose(ours.numpy(), jax.random.normal(jax_key(5), shape, "float64"), rtol=1e-13)


@pytest.mark.parametrize("erfinv", [lambda x: torch.from_numpy(random._erfinv_numpy(x.numpy())), random._erfinv_torch])
def test_erfinv_in_all_its_branches(erfinv):
    x = torch.tensor([0.0, 1e-9, 0.1, -0.5, 0.99, 0.9999, -0.999999, 1 - 1e-9, 1 - 1e-12], dtype=torch.float64)
    torch.testing.assert_close(torch.erf(erfinv(x)), x, rtol=0.0, atol=1e-15)


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (0, 10), (-5, 5), (0, 1), (3, 3), (7, 2), (0, 65536), (0, 65537), (-(2**31), 2**31 - 1),
        (0, 2**31 - 1), (-(2**31), 2**31), (5, 2**40), (2**31 - 1, 2**31), (-(2**40), 0),
    ],
)  # fmt: skip
def test_randint_equals_jax(low, high):
    theirs = jax.random.randint(jax_key(9), (333,), np.int64(low), np.int64(high), "int32")
    for bounds in ((low, high), (torch.tensor(low), high), (low, torch.full((333,), high))):
        assert_same(random.randint(random.key(9), (333,), *bounds), theirs)


@pytest.mark.parametrize("n", [0, 1, 2, 5, 100, 1625, 1626, 5000])
def test_permutation_equals_jax(n):
    ours = random.permutation(random.key(4), n)
    assert_same(ours, jax.random.permutation(jax_key(4), n))
    assert torch.equal(ours.sort().values, torch.arange(n))


@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_categorical_and_bernoulli_equal_jax(axis):
    logits = np.random.default_rng(0).normal(size=(50, 40)).astype(np.float32)
    for seed in SEEDS:
        ours = random.categorical(random.key(seed), torch.from_numpy(logits), axis)
        assert_same(ours, jax.random.categorical(jax_key(seed), logits, axis))
        assert_same(
            random.bernoulli(random.key(seed), torch.from_numpy(logits)),
            jax.random.bernoulli(jax_key(seed), logits),
        )
        theirs = jax.random.bernoulli(jax_key(seed), np.float32(0.3), (99,))
        assert_same(random.bernoulli(random.key(seed), 0.3, (99,)), theirs)


def test_categorical_never_draws_the_impossible():
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 1.0])
    drawn = vmap(lambda key: random.categorical(key, logits))(many_keys(500))
    assert sorted(set(drawn.tolist())) == [1, 3]


# --- Equal under every transform ---


@each_draw
def test_vmap_equals_loop(draw):
    keys = many_keys(12)
    loop = torch.stack([draw(key) for key in keys])
    assert torch.equal(vmap(draw)(keys), loop)
    assert torch.equal(vmap(draw, in_dims=1)(keys.T), loop)
    assert torch.equal(vmap(draw, out_dims=-1)(keys).movedim(-1, 0), loop)
    assert torch.equal(vmap(vmap(draw))(keys.view(3, 4, 2)).flatten(0, 1), loop)
    assert torch.equal(vmap(vmap(draw), in_dims=1)(keys.view(3, 4, 2)).transpose(0, 1).flatten(0, 1), loop)


@each_draw
def test_one_key_for_all(draw):
    key = random.key(8)
    drawn = vmap(lambda key, x: (draw(key), x), in_dims=(None, 0))(key, torch.arange(3))[0]
    assert torch.equal(drawn, draw(key).expand_as(drawn))


def test_vmap_over_what_the_draw_depends_on():
    key, keys = random.key(8), many_keys(4)
    low, high = torch.tensor([0.1, 0.2, -0.7, 5.0]), torch.tensor([0.3, 1.7, 2.1, 9.0])

    def loop(fn, *args):
        return torch.stack([fn(*row) for row in zip(*args, strict=True)])

    for shape in ((), (3,)):

        def draw(key, low, high, shape=shape):
            return random.uniform(key, shape, low, high)

        for k, dim in ((key, None), (keys, 0)):
            rows = [key] * 4 if dim is None else keys
            assert torch.equal(vmap(draw, in_dims=(dim, 0, 0))(k, low, high), loop(draw, rows, low, high))
            one = vmap(draw, in_dims=(dim, None, 0))(k, low[1], high)
            assert torch.equal(one, loop(draw, rows, [low[1]] * 4, high))
    steps = torch.arange(4)
    assert torch.equal(vmap(random.fold_in, in_dims=(None, 0))(key, steps), loop(random.fold_in, [key] * 4, steps))
    grid = vmap(vmap(random.fold_in, in_dims=(None, 0)), in_dims=(0, None))(keys, steps[:3])
    assert torch.equal(grid, torch.stack([loop(random.fold_in, [k] * 3, steps[:3]) for k in keys]))
    grid = vmap(vmap(random.fold_in, in_dims=(0, None)), in_dims=(None, 0))(keys, steps[:3])
    assert torch.equal(grid, torch.stack([loop(random.fold_in, keys, [s] * 4) for s in steps[:3]]))


@each_draw
def test_traced_graph_draws_for_other_keys(draw):
    graph = make_fx(vmap(draw))(many_keys(6))
    assert "rlcore.threefry2x32" in graph.code
    others = many_keys(6, seed=99)
    assert torch.equal(graph(others), vmap(draw)(others))


def test_gradient_passes_through_the_bounds():
    key = random.key(2)
    u = random.uniform(key, (5,))

    def total(low, high):
        return random.uniform(key, (5,), low, high).sum()

    low, high = torch.tensor(-1.0), torch.tensor(3.0)
    by_low, by_high = grad(total, argnums=(0, 1))(low, high)
    torch.testing.assert_close(by_low, (1 - u).sum())
    torch.testing.assert_close(by_high, u.sum())
    keys = many_keys(3)
    scaled = vmap(grad(lambda scale, key: (scale * random.normal(key, (4,))).sum()), in_dims=(None, 0))
    torch.testing.assert_close(scaled(low, keys), vmap(lambda k: random.normal(k, (4,)).sum())(keys))
    constant = grad(lambda x: x * random.fold_in(random.split(key)[0], 3).sum())(low)
    assert constant == random.fold_in(random.split(key)[0], 3).sum()


_COMPILED = """
import torch
from tests.rlcore.test_random import DRAWS, many_keys
def draws(key):
    return {name: draw(key) for name, draw in DRAWS.items()}
def same(fn, *several):
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for keys in several:
        ours, theirs = fn(keys), compiled(keys)
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), name
same(torch.func.vmap(draws), many_keys(6), many_keys(6, seed=99))
same(draws, many_keys(6)[0])
print("same")
"""


def test_compiled_equals_eager():
    # In a process of its own: run-time shape checks, if this one has them, do not compile.
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", _COMPILED], cwd=root, capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "same", run.stderr


def test_operations_satisfy_torch_library():
    key, keys = random.key(1), many_keys(3)
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    for k in (key, keys):
        torch.library.opcheck(random._threefry2x32, (k, torch.tensor(5)), test_utils=utils)
        for kind, dtype in (("pairs", torch.int64), ("bits", torch.int64), ("normal", torch.float32)):
            torch.library.opcheck(random._draw, (k, (2, 3), kind, dtype), test_utils=utils)


# --- Nothing depends on what else is drawn ---


@each_draw
def test_number_of_keys_does_not_matter(draw):
    keys = many_keys(513)
    every = vmap(draw)(keys)
    for num in (1, 2, 7, 8, 31, 512):
        assert torch.equal(vmap(draw)(keys[:num]), every[:num])
        assert torch.equal(vmap(draw)(keys[-num:]), every[-num:])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("draw", [random.normal, random.gumbel, random.uniform])
def test_place_in_a_batch_does_not_matter(draw, dtype):
    keys = many_keys(3001)

    def one(key):
        return draw(key, (37,), dtype=dtype)

    every = vmap(one)(keys)
    generator = np.random.default_rng(0)
    for num in (1, 3, 5, 9, 17, 33, 100, 1023, 2000):
        start = int(generator.integers(0, 3001 - num))
        assert torch.equal(vmap(one)(keys[start : start + num]), every[start : start + num])
    # A longer draw begins with the shorter one, across the pieces into which the kernel cuts the work.
    long = draw(keys[0], (70_001,), dtype=dtype)
    for num in (1, 2, 15, 37, 1000, 32_769):
        assert torch.equal(draw(keys[0], (num,), dtype=dtype), long[:num])


def test_number_of_threads_does_not_matter():
    keys = many_keys(2048)
    threads = torch.get_num_threads()
    drawn = []
    try:
        for num in (1, 2):
            torch.set_num_threads(num)
            drawn.append(vmap(lambda key: random.normal(key, (33,)))(keys))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*drawn)


def test_global_generator_is_neither_read_nor_written():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = random.normal(random.key(1), (5,))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(random.normal(random.key(1), (5,)), first)


# --- The kernel for other devices ---


@pytest.mark.parametrize("shape", [(), (5,), (3, 7), (0,), (4001,)])
@pytest.mark.parametrize("lead", [(), (6,), (2, 3)])
def test_torch_kernel_equals_the_cpu_kernel(lead, shape):
    keys = torch.from_numpy(np.random.default_rng(1).integers(0, 2**32, (*lead, 2)))
    cases: list[Any] = [("pairs", torch.int64, 5, 0.0, 1.0), ("bits", torch.int64, 2**31, 0.0, 1.0)]
    for dtype in FLOATS:
        cases.append(("uniform", dtype, 0, 0.0, 1.0))
        cases.append(("uniform", dtype, 0, -0.3, 0.7))
        cases.append(("uniform", dtype, 0, 0.3, -0.7))
        cases.append(("normal", dtype, 0, -0.999, 1.0))
        cases.append(("gumbel", dtype, 0, 1e-30, 1.0))
    cases.append(("uniform23", torch.float64, 0, 0.0, 1.0))
    for kind, dtype, *rest in cases:
        ours, theirs = (kernel(keys, shape, kind, dtype, *rest) for kernel in (random._draw_numpy, random._draw_torch))
        # Only logarithms may round differently on another device.
        loose = {torch.float32: 2e-6, torch.float64: 1e-13}.get(dtype, 0.0) if kind in ("normal", "gumbel") else 0.0
        torch.testing.assert_close(ours, theirs, rtol=loose, atol=loose)
    counter = torch.arange(3).view(3, *(1 for _ in lead))
    words = torch.stack(random._encipher_torch(keys, counter), dim=-1)
    assert torch.equal(torch.ops.rlcore.threefry2x32(keys, counter), words)


# --- Mistakes ---


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, True, "1", None])
def test_seed_is_refused(seed):
    with pytest.raises(REFUSED):
        random.key(seed)


def test_mistakes_are_refused():
    key = random.key(0)
    mistakes = [
        lambda: random.split(many_keys(3)),
        lambda: random.bits(key.float(), (3,)),
        lambda: random.split(key, -1),
        lambda: random.permutation(key, -1),
        lambda: random.fold_in(key, -1),
        lambda: random.fold_in(key, 2**32),
        lambda: random.fold_in(key, torch.tensor([1])),
        lambda: random.fold_in(key, torch.tensor(1.0)),
        lambda: random.uniform(key, (3,), dtype=torch.float16),
        lambda: random.uniform(key, (3,), torch.zeros(2, 3)),
        lambda: random.uniform(key, (3,), 0.0, torch.zeros(2)),
        lambda: random.normal(key, (3,), torch.int64),
        lambda: random.gumbel(key, (3,), torch.bfloat16),
        lambda: random.randint(key, (3,), 0, torch.tensor(2.0)),
        lambda: random.bernoulli(key, torch.tensor([1])),
        lambda: random.bernoulli(key, torch.zeros(3), (2,)),
        lambda: random.bits(key, (2**16, 2**16)),
    ]
    for mistake in mistakes:
        with pytest.raises(REFUSED):
            mistake()
