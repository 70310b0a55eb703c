"""Null keys: they draw nothing, and the rows beside them draw what they always did."""

import pytest
import torch
from torch.func import vmap

from rlcore import random
from tests.rlcore.test_random import DRAWS

# These turn what they draw into something else; a permutation of nothing, the identity, is tested below.
SIMPLE = [name for name in DRAWS if name not in ("bernoulli", "categorical", "permutation", "permutation_twice")]
KEYS = random.split(random.key(9), 12)
LIVE = torch.tensor([True, False, False, True, True, False, True, True, False, True, False, True])


def nulls(live=LIVE):
    return vmap(random.null_unless)(live, KEYS)


def test_null_unless_and_is_null():
    keys = nulls()
    assert torch.equal(vmap(random.is_null)(keys), ~LIVE)
    assert torch.equal(keys[LIVE], KEYS[LIVE])
    assert (keys[~LIVE] == -1).all()
    # No seed makes a null key, the largest words included.
    assert not random.is_null(random.key(2**64 - 1)) and not vmap(random.is_null)(KEYS).any()


@pytest.mark.parametrize("draw", [DRAWS[name] for name in DRAWS], ids=list(DRAWS))
def test_rows_beside_null_keys_are_unchanged(draw):
    full = vmap(draw)(KEYS)
    mixed = vmap(draw)(nulls())
    assert mixed.dtype == full.dtype and torch.equal(mixed[LIVE], full[LIVE])
    assert torch.equal(vmap(draw)(nulls(torch.ones(12, dtype=torch.bool))), full)


@pytest.mark.parametrize("name", SIMPLE)
def test_null_keys_draw_zeros_or_null_keys(name):
    # Draws with bounds give what a zero gives there: the lower bound.
    empty = {"split": -1, "fold_in": -1, "fold_in_tensor": -1, "uniform_mixed": -1, "randint": -3}.get(name, 0)
    null = torch.tensor([-1, -1])
    alone = DRAWS[name](null)
    every = vmap(DRAWS[name])(null.expand(3, 2))
    mixed = vmap(DRAWS[name])(nulls())[~LIVE]
    for drawn in (alone, every, mixed):
        assert torch.equal(drawn, torch.full_like(drawn, empty))


def test_keys_made_from_a_null_key_are_null():
    null = torch.tensor([-1, -1])
    for key in (*random.split(null, 3), random.fold_in(null, 5), random.fold_in(random.split(null)[1], 2)):
        assert random.is_null(key) and torch.equal(key, null)
    assert torch.equal(random.permutation(null, 9), torch.arange(9))


@pytest.mark.parametrize("lead", [(), (6,), (2, 3)])
@pytest.mark.parametrize("shape", [(), (3,), (2, 5), (0,)])
@pytest.mark.parametrize("all_null", [True, False])
def test_cpu_kernel_equals_the_one_for_other_devices(lead, shape, all_null):
    keys = random.split(random.key(1), 6)[: 6 if lead else 1].reshape(*lead, 2).clone()
    keys.view(-1, 2)[:: 1 if all_null else 2] = -1
    cases = [("pairs", torch.int64, 0.0), ("bits", torch.int64, 0.0)]
    cases += [(kind, dtype, 0.0) for kind in ("uniform", "normal") for dtype in (torch.float32, torch.float64)]
    cases += [
        ("uniform", torch.float64, -0.7),
        ("uniform23", torch.float64, 0.0),
        ("gumbel", torch.float32, 1e-30),
    ]
    for kind, dtype, low in cases:
        cpu = random._draw(keys, shape, kind, dtype, 0, low, 1.0)
        other = random._draw._init_fn(keys, shape, kind, dtype, 0, low, 1.0)
        assert cpu.dtype == other.dtype and cpu.shape == other.shape
        # Only logarithms may round differently on another device.
        loose = {torch.float32: 2e-6, torch.float64: 1e-13}[dtype] if kind in ("normal", "gumbel") else 0.0
        torch.testing.assert_close(cpu, other, rtol=loose, atol=loose)
        null = keys[..., 0] < 0
        assert (cpu[null] == (-1 if kind == "pairs" else 0)).all()
