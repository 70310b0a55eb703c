"""Replays of recordings as graphs on fixed memory; where there is no CUDA, plain Python stands in for it."""

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from rlcore.cudagraph import CudaRecorder, captured

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class FixedMemory:
    """Does what a CUDA graph does: runs again, on the inputs' memory, into the memory of the first results."""

    def record(self, run):
        results = run()

        def launch():
            for old, new in zip(results, run(), strict=True):
                # A result may be a view of an input, which is up to date by itself.
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)

        return results, launch


def recorder(device):
    return CudaRecorder() if device == "cuda" else FixedMemory()


@torch.library.custom_op("rlcore_test::seen", mutates_args=())
def seen(x: Tensor) -> list[Tensor]:
    return [x + 1, x * 2]


@seen.register_fake
def _(x):
    return [torch.empty_like(x), torch.empty_like(x)]


def replayed(fn, examples, device, calls=None):
    def host(x):
        if calls is not None:
            calls.append(x)
        return [x + 1, x * 2]

    module = make_fx(lambda *xs: list(fn(*xs)))(*examples)
    return captured(module, {torch.ops.rlcore_test.seen.default: host}, recorder(device))


@pytest.mark.parametrize("device", DEVICES)
def test_replays_equal_the_function_and_keep_no_memory(device):
    constant = torch.arange(3.0, device=device)

    def fn(x, y):
        a = torch.sin(x) * constant
        b, c = torch.ops.rlcore_test.seen(a + y)
        d = (b * c + x).cumsum(0)
        e, _ = torch.ops.rlcore_test.seen(d)
        return d, e + 1, c, y.expand(3, 3) * 1, x.T, torch.ones(2, device=device), constant.expand(2, 3)

    draws = torch.Generator().manual_seed(0)
    draw = lambda: (torch.rand(3, 3, generator=draws).to(device), torch.rand(3, generator=draws).to(device))  # noqa: E731
    calls: list[Tensor] = []
    run = replayed(fn, draw(), device, calls)
    results, expected = [], []
    for _ in range(6):
        x, y = draw()
        results.append(run(x, y))
        expected.append(list(fn(x, y)))
    # All results of all calls together: a later replay must not have written into an earlier one's.
    for got, wanted in zip(results, expected, strict=True):
        for a, b in zip(got, wanted, strict=True):
            assert torch.equal(a, b)
            assert a.shape == b.shape and a.stride() == b.stride()
    assert len(calls) == 12  # the processor saw each call of the operation


@pytest.mark.parametrize("device", DEVICES)
def test_a_changed_argument_is_read_anew_and_an_unchanged_one_is_not_copied(device):
    run = replayed(lambda x, y: [x + y], (torch.zeros(2, device=device), torch.zeros(2, device=device)), device)
    x, y = torch.ones(2, device=device), torch.ones(2, device=device)
    for _ in range(4):
        assert run(x, y)[0].tolist() == [2, 2]
    y.add_(1)  # the same tensor with other values
    assert run(x, y)[0].tolist() == [3, 3]
    assert run(torch.full_like(x, 5), y)[0].tolist() == [7, 7]


@pytest.mark.parametrize("device", DEVICES)
def test_arguments_that_repeat_themselves(device):
    base = torch.rand(1, 4, device=device)
    run = replayed(lambda x: [x.sum(0), x * 2], (base.expand(3, 4),), device)
    for i in range(5):
        x = (base + i).expand(3, 4)
        total, double = run(x)
        assert torch.equal(total, x.sum(0)) and torch.equal(double, x * 2)


@pytest.mark.parametrize("device", DEVICES)
def test_an_argument_handed_out_is_itself(device):
    run = replayed(lambda x: [x, x + 1], (torch.zeros(2, device=device),), device)
    for _ in range(4):
        x = torch.rand(2, device=device)
        assert run(x)[0] is x
