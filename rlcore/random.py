"""Random numbers as functions of a key: the same bits as `jax.random`.

A key is an int64 tensor `[2]` that holds two 32-bit words. Every function here is pure: the same key gives
the same numbers, in a loop or under `torch.func.vmap`, for any number of environments, eager or compiled.
This module never reads or writes a global generator, and never keeps one of its own.

A key is consumed once: draw with it, or split it, and then forget it. Two draws with one key are the same
draw, not two independent ones.

The generator is Threefry-2x32 with 20 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2,
3"): number `i` of a draw is the cipher of the counter `i` under the key, so no number depends on another.
Words are combined as `jax.random` combines them with `jax_threefry_partitionable=True`, its default.

All functions take one key and are written without a batch axis: `torch.func.vmap` maps them over many keys,
at the price of one call. A draw whose range is given in Python numbers is a single operation; draw once for
all that a step needs.
"""

import functools
import importlib.util
import math
from collections.abc import Sequence
from typing import Any, no_type_check

import numba
import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from rlcore.errors import InputError
from rlcore.jit import DIRECT

Key = Int64[Tensor, "2"]
Number = float | int | Tensor

_MASK = 0xFFFFFFFF
_ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
_PARITY = 0x1BD11BDA

# The inverse error function as polynomials in w = -log(1 - x^2), highest power first (Giles 2010,
# "Approximating the erfinv function"). A branch is (the w below which it holds, the offset of its argument,
# coefficients); the argument is w in the first branch and sqrt(w) in the others.
_ERFINV_SINGLE: tuple[tuple[float, float, tuple[float, ...]], ...] = (
    (5.0, 2.5, (2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087,
                -0.00125372503, -0.00417768164, 0.246640727, 1.50140941)),
    (math.inf, 3.0, (-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773,
                     -0.0076224613, 0.00943887047, 1.00167406, 2.83297682)),
)  # fmt: skip
_ERFINV_DOUBLE: tuple[tuple[float, float, tuple[float, ...]], ...] = (
    (6.25, 3.125, (-3.6444120640178196996e-21, -1.685059138182016589e-19, 1.2858480715256400167e-18,
                   1.115787767802518096e-17, -1.333171662854620906e-16, 2.0972767875968561637e-17,
                   6.6376381343583238325e-15, -4.0545662729752068639e-14, -8.1519341976054721522e-14,
                   2.6335093153082322977e-12, -1.2975133253453532498e-11, -5.4154120542946279317e-11,
                   1.051212273321532285e-09, -4.1126339803469836976e-09, -2.9070369957882005086e-08,
                   4.2347877827932403518e-07, -1.3654692000834678645e-06, -1.3882523362786468719e-05,
                   0.0001867342080340571352, -0.00074070253416626697512, -0.0060336708714301490533,
                   0.24015818242558961693, 1.6536545626831027356)),
    (16.0, 3.25, (2.2137376921775787049e-09, 9.0756561938885390979e-08, -2.7517406297064545428e-07,
                  1.8239629214389227755e-08, 1.5027403968909827627e-06, -4.013867526981545969e-06,
                  2.9234449089955446044e-06, 1.2475304481671778723e-05, -4.7318229009055733981e-05,
                  6.8284851459573175448e-05, 2.4031110387097893999e-05, -0.0003550375203628474796,
                  0.00095328937973738049703, -0.0016882755560235047313, 0.0024914420961078508066,
                  -0.0037512085075692412107, 0.005370914553590063617, 1.0052589676941592334,
                  3.0838856104922207635)),
    (math.inf, 5.0, (-2.7109920616438573243e-11, -2.5556418169965252055e-10, 1.5076572693500548083e-09,
                     -3.7894654401267369937e-09, 7.6157012080783393804e-09, -1.4960026627149240478e-08,
                     2.9147953450901080826e-08, -6.7711997758452339498e-08, 2.2900482228026654717e-07,
                     -9.9298272942317002539e-07, 4.5260625972231537039e-06, -1.9681778105531670567e-05,
                     7.5995277030017761139e-05, -0.00021503011930044477347, -0.00013871931833623122026,
                     1.0103004648645343977, 4.8499064014085844221)),
)  # fmt: skip


# The coefficients of single precision as machine code takes them.
_SINGLE_EDGE = np.float32(_ERFINV_SINGLE[0][0])
_SINGLE_OFFSETS = tuple(np.float32(branch[1]) for branch in _ERFINV_SINGLE)
_SINGLE_NEAR, _SINGLE_TAIL = (tuple(np.float32(c) for c in branch[2]) for branch in _ERFINV_SINGLE)
_ROOT_2 = np.float32(math.sqrt(2.0))


# --- Threefry-2x32 on the CPU: machine code by numba, since torch has no 32-bit unsigned arithmetic there --------


@numba.njit(inline="always")
@no_type_check
def _rounds(x0, x1, first, r0, r1, r2, r3, k0, k1):
    """Four rounds with their rotations, then the key words of the schedule."""
    # numba widens the sum of two uint32 to 64 bits, so every step narrows it again.
    for r in (r0, r1, r2, r3):
        x0 = np.uint32(x0 + x1)
        x1 = np.uint32((x1 << np.uint32(r)) | (x1 >> np.uint32(32 - r))) ^ x0
    return np.uint32(x0 + k0), np.uint32(x1 + k1 + np.uint32(first))


@numba.njit(inline="always")
@no_type_check
def _words(k0, k1, high, low):
    """The two words of a counter (its high and low word) under a key."""
    k2 = k0 ^ k1 ^ np.uint32(_PARITY)
    a, b = np.uint32(high + k0), np.uint32(low + k1)
    a, b = _rounds(a, b, 1, 13, 15, 26, 6, k1, k2)
    a, b = _rounds(a, b, 2, 17, 29, 16, 24, k2, k0)
    a, b = _rounds(a, b, 3, 13, 15, 26, 6, k0, k1)
    a, b = _rounds(a, b, 4, 17, 29, 16, 24, k1, k2)
    return _rounds(a, b, 5, 13, 15, 26, 6, k2, k0)


@numba.njit(cache=True, nogil=True)
@no_type_check
def _encipher(keys, start, x0, x1):
    """Encipher the counters `start`, `start + 1`, ... under int64 keys `[K, 2]`, into uint32 words `[K, n]`."""
    for i in range(keys.shape[0]):
        k0, k1 = np.uint32(keys[i, 0]), np.uint32(keys[i, 1])
        for j in range(x0.shape[1]):
            counter = start + j
            x0[i, j], x1[i, j] = _words(k0, k1, np.uint32(counter >> 32), np.uint32(counter))


@numba.njit(cache=True, nogil=True)
@no_type_check
def _encipher_each(keys, counters, out):
    """Encipher int64 counters `[N]`, each under its key of `[N, 2]`, into `[N, 2]`; a null key gives a null key."""
    for i in range(keys.shape[0]):
        if keys[i, 0] < 0:
            out[i, 0] = out[i, 1] = -1
        else:
            high, low = np.uint32(counters[i] >> 32), np.uint32(counters[i])
            a, b = _words(np.uint32(keys[i, 0]), np.uint32(keys[i, 1]), high, low)
            out[i, 0], out[i, 1] = a, b


@numba.njit(cache=True, nogil=True)
@no_type_check
def _draw_pairs(keys, start, out):
    """Both words of n counters under each key, `[K, n, 2]`; null keys under a null key."""
    for i in range(keys.shape[0]):
        for j in range(out.shape[1]):
            if keys[i, 0] < 0:
                out[i, j, 0] = out[i, j, 1] = -1
            else:
                counter = start + j
                high, low = np.uint32(counter >> 32), np.uint32(counter)
                a, b = _words(np.uint32(keys[i, 0]), np.uint32(keys[i, 1]), high, low)
                out[i, j, 0], out[i, j, 1] = a, b


@numba.njit(cache=True, nogil=True)
@no_type_check
def _draw_uniform(keys, start, low, span, out):
    """n float64 numbers of 52 bits in [low, low + span) under each key, `[K, n]`; zeros under a null key."""
    for i in range(keys.shape[0]):
        for j in range(out.shape[1]):
            if keys[i, 0] < 0:
                out[i, j] = 0.0
            else:
                counter = start + j
                a, b = _words(
                    np.uint32(keys[i, 0]), np.uint32(keys[i, 1]), np.uint32(counter >> 32), np.uint32(counter)
                )
                out[i, j] = (np.float64(a) * 2.0**20 + np.float64(b >> np.uint32(12))) * 2.0**-52 * span + low


@numba.njit(cache=True, nogil=True)
@no_type_check
def _draw_normal_single(keys, start, low, span, out):
    """n standard normal float32 numbers under each key, `[K, n]`; zeros under a null key.

    Loops that do one thing each, which the compiler turns into vector instructions.
    """
    count = out.shape[1]
    x, w = np.empty(count, np.float32), np.empty(count, np.float32)
    for i in range(keys.shape[0]):
        if keys[i, 0] < 0:
            out[i] = np.float32(0.0)
            continue
        k0, k1 = np.uint32(keys[i, 0]), np.uint32(keys[i, 1])
        for j in range(count):
            counter = start + j
            a, b = _words(k0, k1, np.uint32(counter >> 32), np.uint32(counter))
            unit = np.float64((a ^ b) >> np.uint32(9)) * 2.0**-23 * span + low
            x[j] = np.float32(max(unit, low))
        for j in range(count):
            w[j] = -np.float32(math.log1p(-(x[j] * x[j])))
        for j in range(count):
            v = w[j] - _SINGLE_OFFSETS[0]
            p = _SINGLE_NEAR[0] * v
            for coefficient in _SINGLE_NEAR[1:-1]:
                p = (p + coefficient) * v
            out[i, j] = (p + _SINGLE_NEAR[-1]) * x[j] * _ROOT_2
        for j in range(count):
            if w[j] >= _SINGLE_EDGE:
                v = np.float32(math.sqrt(w[j])) - _SINGLE_OFFSETS[1]
                p = _SINGLE_TAIL[0] * v
                for coefficient in _SINGLE_TAIL[1:-1]:
                    p = (p + coefficient) * v
                out[i, j] = (p + _SINGLE_TAIL[-1]) * x[j] * _ROOT_2


def _polynomial_numpy(x: Any, offset: float, coefficients: Sequence[float]) -> Any:
    """Horner's rule at `x - offset`, in `x`, which it overwrites."""
    scalar = x.dtype.type
    np.subtract(x, scalar(offset), out=x)
    p = np.multiply(x, scalar(coefficients[0]))
    for coefficient in coefficients[1:-1]:
        np.add(p, scalar(coefficient), out=p)
        np.multiply(p, x, out=p)
    return np.add(p, scalar(coefficients[-1]), out=p)


def _erfinv_numpy(x: Any) -> Any:
    """The inverse error function of contiguous float64 values in (-1, 1).

    Each step rounds every element alike, whatever its place in the array, which a library's vectorized erfinv
    does not promise. The rare elements of the tails are gathered, computed and put back.
    """
    branches = _ERFINV_DOUBLE
    w = np.multiply(x, x)
    np.negative(w, out=w)
    np.log1p(w, out=w)
    np.negative(w, out=w)
    edge, offset, coefficients = branches[0]
    tail = np.flatnonzero(w >= edge)
    w_tail = w.ravel()[tail]
    p = _polynomial_numpy(w, offset, coefficients)
    for until, offset, coefficients in branches[1:]:
        if tail.size == 0:
            break
        p.ravel()[tail] = _polynomial_numpy(np.sqrt(w_tail), offset, coefficients)
        tail, w_tail = tail[w_tail >= until], w_tail[w_tail >= until]
    return np.multiply(p, x, out=p)


def _finish_numpy(x0: Any, x1: Any, kind: str, dtype: torch.dtype, low: float, span: float) -> Any:
    """Turn enciphered words (which it may overwrite) into the numbers of a draw other than pairs."""
    if dtype == torch.float64 and kind != "uniform23":
        unit = x0.astype(np.float64)
        unit *= 2.0**20
        unit += np.right_shift(x1, np.uint32(12), out=x1)
        unit *= 2.0**-52
    else:
        np.bitwise_xor(x0, x1, out=x0)
        if kind == "bits":
            return x0
        unit = np.right_shift(x0, np.uint32(9), out=x0).astype(np.float64)
        unit *= 2.0**-23
    if (low, span) != (0.0, 1.0):
        unit *= span
        unit += low
        if span < 0.0 or kind == "gumbel":
            np.maximum(unit, low, out=unit)
    if kind in ("uniform", "uniform23"):
        return unit
    if kind == "gumbel":
        value = unit.astype(np.float32) if dtype == torch.float32 else unit
        for _ in range(2):
            np.log(value, out=value)
            np.negative(value, out=value)
        return value
    value = _erfinv_numpy(unit)
    return np.multiply(value, value.dtype.type(math.sqrt(2.0)), out=value)


def _low_and_span(dtype: torch.dtype, low: float, high: float) -> tuple[float, float]:
    """The lower bound and the width of a range whose bounds are rounded to `dtype`."""
    if dtype == torch.float32:
        return float(np.float32(low)), float(np.float32(high) - np.float32(low))
    return low, high - low


def _draw_numpy(
    key: Tensor,
    shape: Sequence[int],
    kind: str,
    dtype: torch.dtype,
    start: int = 0,
    low: float = 0.0,
    high: float = 1.0,
) -> Tensor:
    """The CPU kernel of `_draw`."""
    low, span = _low_and_span(dtype, low, high)
    count = math.prod(shape)
    pairs = (2,) if kind == "pairs" else ()
    keys = np.ascontiguousarray(key.numpy().reshape(-1, 2))
    out = torch.empty((*key.shape[:-1], *shape, *pairs), dtype=dtype)
    flat = out.numpy().reshape(len(keys), count, *pairs)
    if kind == "pairs":
        _draw_pairs(keys, start, flat)
        return out
    if kind == "uniform" and dtype == torch.float64 and span >= 0.0:
        _draw_uniform(keys, start, low, span, flat)
        return out
    if kind == "normal" and dtype == torch.float32:
        _draw_normal_single(keys, start, low, span, flat)
        return out
    live = keys[:, 0] >= 0
    every = bool(live.all())
    rows = len(keys) if every else int(live.sum())
    if not every:
        flat[...] = _null_value(kind)
        keys = keys[live]
    if rows:
        words = np.empty((2, rows, count), np.uint32)
        _encipher(keys, start, words[0], words[1])
        flat[... if every else live] = _finish_numpy(words[0], words[1], kind, dtype, low, span)
    return out


# --- The same in plain torch operations, for every other device -----------------------------------


def _encipher_torch(key: Tensor, counter: Tensor) -> tuple[Tensor, Tensor]:
    """The enciphered words of int64 counters; they broadcast against the key's leading axes."""
    k0, k1 = key[..., 0], key[..., 1]
    schedule = (k0, k1, k0 ^ k1 ^ _PARITY)
    x0 = ((counter >> 32) + k0) & _MASK
    x1 = (counter + k1) & _MASK
    for group in range(5):
        for i in range(4 * (group % 2), 4 * (group % 2) + 4):
            x0 = (x0 + x1) & _MASK
            x1 = (((x1 << _ROTATIONS[i]) & _MASK) | (x1 >> (32 - _ROTATIONS[i]))) ^ x0
        x0 = (x0 + schedule[(group + 1) % 3]) & _MASK
        x1 = (x1 + schedule[(group + 2) % 3] + (group + 1)) & _MASK
    return x0, x1


@functools.cache
def _on_gpu() -> Any:
    """The cipher as one kernel for NVIDIA GPUs; None where Warp is not installed."""
    if importlib.util.find_spec("warp") is None:
        return None
    from rlcore import threefry_warp

    return threefry_warp


def _polynomial(w: Tensor, coefficients: Sequence[float]) -> Tensor:
    p = torch.full_like(w, coefficients[0])
    for coefficient in coefficients[1:]:
        p = p * w + coefficient
    return p


def _erfinv_torch(x: Tensor) -> Tensor:
    """`_erfinv_numpy` in torch operations."""
    branches = _ERFINV_SINGLE if x.dtype == torch.float32 else _ERFINV_DOUBLE
    w = -torch.log1p(-(x * x))
    edge, offset, coefficients = branches[0]
    p = _polynomial(w - offset, coefficients)
    for until, offset, coefficients in branches[1:]:
        p = torch.where(w < edge, p, _polynomial(torch.sqrt(w) - offset, coefficients))
        edge = until
    return p * x


def _draw_torch(
    key: Tensor, shape: Sequence[int], kind: str, dtype: torch.dtype, start: int, low: float, high: float
) -> Tensor:
    """The kernel of `_draw` for any device."""
    low, span = _low_and_span(dtype, low, high)
    shape = tuple(shape)
    if key.is_cuda and _on_gpu() is not None:
        x0, x1 = _on_gpu().words_of_range(key, shape, start)
    else:
        counter = torch.arange(start, start + math.prod(shape), device=key.device).view(shape)
        x0, x1 = _encipher_torch(key.view(*key.shape[:-1], *(1 for _ in shape), 2), counter)
    if kind == "pairs":
        return torch.stack((x0, x1), dim=-1)
    if kind == "bits":
        return x0 ^ x1
    if dtype == torch.float64 and kind != "uniform23":
        unit = ((x0 << 20) | (x1 >> 12)).double() * 2.0**-52
    else:
        unit = ((x0 ^ x1) >> 9).double() * 2.0**-23
    if (low, span) != (0.0, 1.0):
        unit = unit * span + low
        if span < 0.0 or kind == "gumbel":
            unit = unit.clamp(min=low)
    value = unit.to(dtype)
    if kind == "gumbel":
        return -torch.log(-torch.log(value))
    if kind == "normal":
        return _erfinv_torch(value) * math.sqrt(2.0)
    return value


def _null_value(kind: str) -> int:
    """What a null key draws: null keys, or zeros."""
    return -1 if kind == "pairs" else 0


# --- The two operations ---------------------------------------------------------------------------


@torch.library.custom_op("rlcore::threefry2x32", mutates_args=())
def _threefry2x32(key: Tensor, counter: Tensor) -> Tensor:
    """The block cipher. Key `[*k, 2]`, int64 counter `[*c]` (64 bits: high and low word) to `[*kc, 2]`."""
    encipher = _on_gpu().words_of_each if key.is_cuda and _on_gpu() is not None else _encipher_torch
    words = torch.stack(encipher(key, counter), dim=-1)
    return torch.where(key[..., :1] < 0, -1, words)


@_threefry2x32.register_kernel("cpu")
def _threefry2x32_cpu(key: Tensor, counter: Tensor) -> Tensor:
    lead = key.shape[:-1]
    if lead != counter.shape:
        lead = torch.broadcast_shapes(lead, counter.shape)
        key, counter = key.expand(*lead, 2), counter.expand(lead)
    keys = np.ascontiguousarray(key.numpy().reshape(-1, 2))
    counters = np.ascontiguousarray(counter.numpy().reshape(-1))
    out = torch.empty((*lead, 2), dtype=torch.int64)
    _encipher_each(keys, counters, out.numpy().reshape(-1, 2))
    return out


@_threefry2x32.register_fake
def _(key: Tensor, counter: Tensor) -> Tensor:
    return key.new_empty((*torch.broadcast_shapes(key.shape[:-1], counter.shape), 2))


@_threefry2x32.register_vmap
def _(info: Any, in_dims: Any, key: Tensor, counter: Tensor) -> tuple[Tensor, int]:
    # The mapped axis goes first, and the others must still line up from the right.
    key_dim, counter_dim = in_dims[0], in_dims[1]
    axes = max(key.ndim - 1 - (key_dim is not None), counter.ndim - (counter_dim is not None))
    if key_dim is not None:
        key = key.movedim(key_dim, 0)
        key = key.reshape(key.shape[0], *(1 for _ in range(axes + 2 - key.ndim)), *key.shape[1:])
    if counter_dim is not None:
        counter = counter.movedim(counter_dim, 0)
        counter = counter.reshape(counter.shape[0], *(1 for _ in range(axes + 1 - counter.ndim)), *counter.shape[1:])
    return _threefry2x32(key, counter), 0


@torch.library.custom_op("rlcore::threefry2x32_draw", mutates_args=())
def _draw(
    key: Tensor,
    shape: Sequence[int],
    kind: str,
    dtype: torch.dtype,
    start: int = 0,
    low: float = 0.0,
    high: float = 1.0,
) -> Tensor:
    """Numbers of `shape` for each key `[*k, 2]`: `[*k, *shape]`, from the counters `start`, `start + 1`, ...

    Args:
      kind: "pairs" (both words, `[*k, *shape, 2]`), "bits" (one xor the other), "uniform", "uniform23" (the
        float32 uniform, kept in float64), "normal" or "gumbel".
      dtype: int64 for pairs and bits, else float32 or float64. Float32 numbers come from 32 bits and are
        computed in float64 and rounded once, so a fused multiply-add changes nothing.
      low, high: a uniform number u in [0, 1) becomes `low + u * (high - low)`, the bounds in `dtype`.
    """
    numbers = _draw_torch(key, shape, kind, dtype, start, low, high)
    null = (key[..., 0] < 0).reshape((*key.shape[:-1], *(1 for _ in numbers.shape[key.ndim - 1 :])))
    return torch.where(null, torch.full_like(numbers, _null_value(kind)), numbers)


_draw.register_kernel("cpu")(_draw_numpy)


@_draw.register_fake
def _(
    key: Tensor,
    shape: Sequence[int],
    kind: str,
    dtype: torch.dtype,
    start: int = 0,
    low: float = 0.0,
    high: float = 1.0,
) -> Tensor:
    pairs = (2,) if kind == "pairs" else ()
    return key.new_empty((*key.shape[:-1], *shape, *pairs), dtype=dtype)


@_draw.register_vmap
def _(info: Any, in_dims: Any, key: Tensor, *args: Any) -> tuple[Tensor, int]:
    return _draw(key.movedim(in_dims[0], 0), *args), 0


DIRECT[torch.ops.rlcore.threefry2x32.default] = _threefry2x32_cpu
DIRECT[torch.ops.rlcore.threefry2x32_draw.default] = _draw_numpy


# --- Keys -----------------------------------------------------------------------------------------


def _check(key: Tensor, shape: Sequence[int] = ()) -> None:
    if key.dtype != torch.int64 or key.shape != (2,):
        raise InputError(
            f"key must be one int64 key of shape [2], got {key.dtype} {list(key.shape)}; "
            "torch.func.vmap maps a function over many keys"
        )
    if math.prod(shape) > _MASK:
        raise InputError(f"shape must have fewer than 2**32 numbers, got {tuple(shape)}")


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.float64):
        raise InputError(f"dtype must be torch.float32 or torch.float64, got {dtype}")


def key(seed: int, device: torch.device | str | None = None) -> Key:
    """The key of a seed: its high and low 32 bits.

    Equal to `jax.random.PRNGKey` in 64-bit mode; in its default mode, JAX drops the high 32 bits.

    Raises:
      InputError: if `seed` is not an integer in [0, 2**64).
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise InputError(f"seed must be an integer of at least 0 and below 2**64, got {seed!r}")
    return torch.tensor([seed >> 32, seed & _MASK], dtype=torch.int64, device=device)


def split(key: Key, num: int = 2) -> Int64[Tensor, "num 2"]:
    """`num` new keys `[num, 2]`: the two words of the ciphers of 0 ... num - 1.

    Raises:
      InputError: if `key` is not one key, or `num` is negative.
    """
    if num < 0:
        raise InputError(f"num must be at least 0, got {num}")
    _check(key, (num,))
    return _draw(key, (num,), "pairs", torch.int64)


def fold_in(key: Key, data: int | Tensor) -> Key:
    """A new key from a key and a number, such as a step counter: the cipher of `data`.

    Note that `fold_in(key, i)` equals `split(key, n)[i]`: use one or the other on a key.

    Args:
      data: an integer in [0, 2**32), or an integer tensor `[]`, of which the low 32 bits count.

    Raises:
      InputError: if `key` is not one key, or `data` is out of range, not an integer or not a scalar.
    """
    _check(key)
    if isinstance(data, Tensor):
        if data.ndim != 0 or data.dtype.is_floating_point or data.dtype in (torch.bool, torch.complex64):
            raise InputError(f"data must be an integer tensor of shape [], got {data.dtype} {list(data.shape)}")
        return _threefry2x32(key, data.to(torch.int64) & _MASK)
    if not 0 <= data <= _MASK:
        raise InputError(f"data must be at least 0 and below 2**32, got {data}")
    return _draw(key, (), "pairs", torch.int64, data)


def is_null(key: Key) -> Bool[Tensor, ""]:
    """Whether `key` is a null key, which stands for "no draw is needed".

    A null key is `[-1, -1]`. It costs nothing to draw with: numbers drawn are all zero, and the keys made
    from it by `split` and `fold_in` are null too.
    """
    return key[0] < 0


def null_unless(condition: Bool[Tensor, ""], key: Key) -> Key:
    """`key` where `condition`, else a null key: the rows of a batch that need no draw then cost none."""
    return torch.where(condition, key, -1)


# --- Draws ----------------------------------------------------------------------------------------


def bits(key: Key, shape: Sequence[int] = ()) -> Int64[Tensor, "*shape"]:
    """Random 32-bit words of `shape`, as int64 in [0, 2**32): the two words of each cipher, xor-ed.

    Raises:
      InputError: if `key` is not one key, or `shape` has 2**32 numbers or more.
    """
    _check(key, shape)
    return _draw(key, tuple(shape), "bits", torch.int64)


def _check_bound(name: str, value: Number, shape: tuple[int, ...]) -> None:
    if not isinstance(value, Tensor):
        return
    ends = zip(reversed(value.shape), reversed(shape), strict=False)
    if value.ndim > len(shape) or any(size not in (1, wanted) for size, wanted in ends):
        raise InputError(f"{name} must broadcast to {shape}, got {tuple(value.shape)}")


def _bound(value: Number, key: Tensor, dtype: torch.dtype) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(dtype)
    return torch.full((), value, dtype=dtype, device=key.device)


def uniform(
    key: Key,
    shape: Sequence[int] = (),
    minval: Number = 0.0,
    maxval: Number = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "*shape"]:
    """`minval + u (maxval - minval)`, where u is uniform on [0, 1) in steps of 2**-23 (float64: 2**-52).

    Rounding may give `maxval` itself where the range is not [0, 1). Where `maxval < minval`, the result is
    `minval`.

    Args:
      minval, maxval: numbers, or tensors that broadcast to `shape`; the result is differentiable in them.

    Raises:
      InputError: if `key` is not one key, `dtype` is no float32 or float64, or a bound does not fit `shape`.
    """
    shape = tuple(shape)
    _check(key, shape)
    _check_dtype(dtype)
    if not isinstance(minval, Tensor) and not isinstance(maxval, Tensor):
        return _draw(key, shape, "uniform", dtype, 0, float(minval), float(maxval))
    _check_bound("minval", minval, shape)
    _check_bound("maxval", maxval, shape)
    low, high = _bound(minval, key, dtype), _bound(maxval, key, dtype)
    unit = _draw(key, shape, "uniform23" if dtype == torch.float32 else "uniform", torch.float64)
    return torch.maximum((unit * (high - low) + low).to(dtype), low)


def normal(key: Key, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> Float[Tensor, "*shape"]:
    """Standard normal numbers of `shape`: `sqrt(2) erfinv(u)` with u uniform on (-1, 1).

    Equal to `jax.random.normal` up to the rounding inside erfinv, and bit for bit the same for any number of
    keys beside it.

    Raises:
      InputError: if `key` is not one key, or `dtype` is no float32 or float64.
    """
    _check(key, shape)
    _check_dtype(dtype)
    # The number after -1, so that -1 itself, where erfinv is infinite, is never drawn.
    low = -1.0 + 2.0 ** (-24 if dtype == torch.float32 else -53)
    return _draw(key, tuple(shape), "normal", dtype, 0, low, 1.0)


def gumbel(key: Key, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> Float[Tensor, "*shape"]:
    """Standard Gumbel numbers of `shape`: `-log(-log(u))` with u uniform on (0, 1).

    Raises:
      InputError: if `key` is not one key, or `dtype` is no float32 or float64.
    """
    _check(key, shape)
    _check_dtype(dtype)
    return _draw(key, tuple(shape), "gumbel", dtype, 0, torch.finfo(dtype).tiny, 1.0)


def bernoulli(key: Key, p: Number = 0.5, shape: Sequence[int] | None = None) -> Bool[Tensor, "*shape"]:
    """True with probability `p`: `uniform < p`.

    Args:
      p: a number, or a floating tensor that broadcasts to `shape`; numbers of its dtype are drawn.
      shape: the result's shape; by default that of `p`.

    Raises:
      InputError: if `key` is not one key, `p` does not fit `shape`, or `p` is a tensor of no floating dtype.
    """
    dtype = p.dtype if isinstance(p, Tensor) else torch.float32
    if shape is None:
        shape = p.shape if isinstance(p, Tensor) else ()
    _check_bound("p", p, tuple(shape))
    return uniform(key, shape, dtype=dtype) < p


def categorical(key: Key, logits: Float[Tensor, "..."], axis: int = -1) -> Int64[Tensor, "..."]:
    """Indices along `axis`, drawn with probabilities `softmax(logits, axis)`: the largest `gumbel + logits`.

    Args:
      logits: unnormalized log probabilities; the result has their shape without `axis`.

    Raises:
      InputError: if `key` is not one key, or `logits` is no float32 or float64.
    """
    return torch.argmax(gumbel(key, logits.shape, logits.dtype) + logits, dim=axis)


def randint(key: Key, shape: Sequence[int], minval: int | Tensor, maxval: int | Tensor) -> Int64[Tensor, "*shape"]:
    """Integers in [minval, maxval), as `jax.random.randint` draws them for int32.

    Two words a number, high and low, are reduced modulo `maxval - minval`, which leaves a bias of at most one
    part in 2**32 for the ranges of up to 2**16 values. Bounds are clipped to the int32 range (2**31 is a
    valid `maxval`); where `maxval <= minval`, the result is `minval`.

    Args:
      minval, maxval: integers, or integer tensors that broadcast to `shape`.

    Raises:
      InputError: if `key` is not one key, or a bound does not fit `shape` or is a tensor of floats.
    """
    shape = tuple(shape)
    _check(key, shape)
    tensors = False
    for name, value in (("minval", minval), ("maxval", maxval)):
        _check_bound(name, value, shape)
        if isinstance(value, Tensor):
            tensors = True
            if value.dtype.is_floating_point:
                raise InputError(f"{name} must be an integer, got a tensor of {value.dtype}")
    low: Any
    span: Any
    if tensors:
        low = torch.as_tensor(minval, device=key.device).to(torch.int64).clamp(-(2**31), 2**31 - 1)
        high = torch.as_tensor(maxval, device=key.device).to(torch.int64).clamp(-(2**31), 2**31)
        span = (high - low).clamp(min=1)
    else:
        low = max(-(2**31), min(minval, 2**31 - 1))
        span = max(max(-(2**31), min(maxval, 2**31)) - low, 1)
    # 2**32 modulo span, by a square that wraps in 32 bits, as in the original: it is 0 for spans above 2**16.
    factor = 2**16 % span
    factor = ((factor * factor) & _MASK) % span
    both = _draw(_draw(key, (2,), "pairs", torch.int64), shape, "bits", torch.int64)
    return (both[0] % span * factor + both[1] % span) % span + low


def permutation(key: Key, n: int) -> Int64[Tensor, "{n}"]:
    """The numbers 0 ... n - 1 in random order, as `jax.random.permutation(key, n)`.

    Sorts by random words; from 1626 numbers on more than once, because words may then coincide.

    Raises:
      InputError: if `key` is not one key, or `n` is negative.
    """
    if n < 0:
        raise InputError(f"n must be at least 0, got {n}")
    _check(key, (n,))
    order = torch.arange(n, device=key.device)
    for _ in range(math.ceil(3 * math.log(max(1, n)) / math.log(_MASK))):
        key, subkey = _draw(key, (2,), "pairs", torch.int64).unbind()
        ranks = torch.sort(_draw(subkey, (n,), "bits", torch.int64), stable=True).indices
        order = order.gather(0, ranks)
    return order
