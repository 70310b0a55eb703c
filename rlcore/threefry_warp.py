"""Threefry-2x32 on NVIDIA GPUs: a thread for each number, where torch launches a kernel for each of a hundred steps.

Gives what `rlcore.random` computes in torch operations, bit for bit. It is used where `warp-lang` is installed, as it
is with MuJoCo Warp.
"""

import math
from collections.abc import Sequence
from typing import Any, no_type_check

import torch
import warp
from torch import Tensor


@warp.func
@no_type_check
def _rotated(x: warp.uint32, by: warp.uint32) -> warp.uint32:
    return (x << by) | (x >> (warp.uint32(32) - by))


@warp.func
@no_type_check
def _mixed(
    x: warp.vec2ui, r0: warp.uint32, r1: warp.uint32, r2: warp.uint32, r3: warp.uint32, k0: warp.uint32, k1: warp.uint32
) -> warp.vec2ui:
    """Four rounds, then the key words of the schedule."""
    a = x[0] + x[1]
    b = _rotated(x[1], r0) ^ a
    a = a + b
    b = _rotated(b, r1) ^ a
    a = a + b
    b = _rotated(b, r2) ^ a
    a = a + b
    b = _rotated(b, r3) ^ a
    return warp.vec2ui(a + k0, b + k1)


@warp.func
@no_type_check
def _words(key0: warp.int64, key1: warp.int64, counter: warp.int64) -> warp.vec2ui:
    k0 = warp.uint32(key0)
    k1 = warp.uint32(key1)
    k2 = k0 ^ k1 ^ warp.uint32(0x1BD11BDA)
    r0 = warp.uint32(13)
    r1 = warp.uint32(15)
    r2 = warp.uint32(26)
    r3 = warp.uint32(6)
    s0 = warp.uint32(17)
    s1 = warp.uint32(29)
    s2 = warp.uint32(16)
    s3 = warp.uint32(24)
    high = warp.uint32(counter >> warp.int64(32))
    x = warp.vec2ui(high + k0, warp.uint32(counter) + k1)
    x = _mixed(x, r0, r1, r2, r3, k1, k2 + warp.uint32(1))
    x = _mixed(x, s0, s1, s2, s3, k2, k0 + warp.uint32(2))
    x = _mixed(x, r0, r1, r2, r3, k0, k1 + warp.uint32(3))
    x = _mixed(x, s0, s1, s2, s3, k1, k2 + warp.uint32(4))
    return _mixed(x, r0, r1, r2, r3, k2, k0 + warp.uint32(5))


@warp.kernel(enable_backward=False)
@no_type_check
def _encipher_counters(keys: warp.array2d[warp.int64], start: warp.int64, out: warp.array3d[warp.int64]):
    """The counters `start`, `start + 1`, ... under each key."""
    i, j = warp.tid()
    words = _words(keys[i, 0], keys[i, 1], start + warp.int64(j))
    out[0, i, j] = warp.int64(words[0])
    out[1, i, j] = warp.int64(words[1])


@warp.kernel(enable_backward=False)
@no_type_check
def _encipher_each(keys: warp.array2d[warp.int64], counters: warp.array[warp.int64], out: warp.array2d[warp.int64]):
    """One counter under each key."""
    i = warp.tid()
    words = _words(keys[i, 0], keys[i, 1], counters[i])
    out[0, i] = warp.int64(words[0])
    out[1, i] = warp.int64(words[1])


def words_of_range(key: Tensor, shape: Sequence[int], start: int) -> tuple[Tensor, Tensor]:
    """Both words of the counters from `start` on, as many as `shape` holds, under keys `[*k, 2]`: `[*k, *shape]`."""
    keys = key.reshape(-1, 2).contiguous()
    count = math.prod(shape)
    out = torch.empty((2, len(keys), count), dtype=torch.int64, device=key.device)
    if out.numel():
        _launch(_encipher_counters, (len(keys), count), [keys, start, out])
    x0, x1 = out.view(2, *key.shape[:-1], *shape).unbind(0)
    return x0, x1


def words_of_each(key: Tensor, counter: Tensor) -> tuple[Tensor, Tensor]:
    """Both words of int64 counters `[*c]` under keys `[*k, 2]`, broadcast against each other: `[*kc]` int64."""
    lead = torch.broadcast_shapes(key.shape[:-1], counter.shape)
    keys = key.expand(*lead, 2).reshape(-1, 2).contiguous()
    counters = counter.expand(lead).reshape(-1).contiguous()
    out = torch.empty((2, len(keys)), dtype=torch.int64, device=key.device)
    if out.numel():
        _launch(_encipher_each, (len(keys),), [keys, counters, out])
    x0, x1 = out.view(2, *lead).unbind(0)
    return x0, x1


warp.config.log_level = warp.LOG_WARNING  # it tells of each kernel that it loads
warp.init()


def _launch(kernel: Any, dim: tuple[int, ...], arguments: list[Any]) -> None:
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    device = tensors[0].device
    inputs = [warp.from_torch(x, requires_grad=False) if isinstance(x, Tensor) else x for x in arguments]
    stream = warp.stream_from_torch(torch.cuda.current_stream(device)) if device.type == "cuda" else None
    warp.launch(kernel, dim=dim, inputs=inputs, device=warp.device_from_torch(device), stream=stream)
