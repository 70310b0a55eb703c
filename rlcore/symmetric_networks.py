"""Networks that are symmetric by construction: the answer to a mirror image is the mirror image of the answer.

A map that mirrors, a signed permutation that is its own inverse, splits what it maps into an even part, which it
leaves as it is, and an odd part, whose sign it changes. A linear layer commutes with the mirror if and only if it
takes even to even and odd to odd. Hidden units come in pairs that the mirror exchanges, so that any activation commutes
with it too. Nothing here observes, acts or learns.

Source: Shawe-Taylor 1989, "Building symmetries into feedforward networks"; van der Pol et al. 2020, "MDP homomorphic
networks", https://arxiv.org/abs/2006.16908.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlcore import random
from rlcore.errors import InputError
from rlcore.networks import Network, mlp, orthogonal
from rlcore.symmetry import SignedPermutation


class _Parts(NamedTuple):
    """Orthonormal bases of the even and of the odd part of `[n]` numbers: `[n, even]` and `[n, odd]`.

    None of both stands for pairs that are exchanged, the first half of the numbers with the second.
    """

    even: int
    odd: int
    bases: tuple[Tensor, Tensor] | None = None


def symmetric_mlp(
    sizes: Sequence[int],
    mirror_in: SignedPermutation,
    mirror_out: SignedPermutation | None,
    activation: str = "elu",
    final_scale: float = 1.0,
) -> Network:
    """A multilayer perceptron f with `f(M_in x) = M_out f(x)`, for any parameters, to rounding.

    It is an `rlcore.networks.mlp` whose weights are made of half as many parameters, and costs what that costs.
    Parameters are a list with, for each layer, `{"even": [even_out, even_in], "odd": [odd_out, odd_in], "bias":
    [even_out]}`, the layer as the bases of even and odd numbers see it. Both blocks are orthogonal at first, with
    gains as in `mlp`.

    Args:
      sizes: width of the input, of each hidden layer (even) and of the output.
      mirror_in: the map of the input, M_in, its own inverse.
      mirror_out: the map of the output, M_out, its own inverse; None for what is the same in the mirror.
      activation: as of `mlp`.
      final_scale: gain of the last layer.

    Returns:
      The network.

    Raises:
      InputError: for what `mlp` refuses, a hidden layer of odd size, or a map that does not fit or is not its own
        inverse.
    """
    plain = mlp(sizes, activation, final_scale)
    sizes = tuple(sizes)
    if any(n % 2 for n in sizes[1:-1]):
        raise InputError(f"hidden layers of a symmetric network must be of even sizes, got {sizes[1:-1]}")
    ends = (_parts(mirror_in, sizes[0], "mirror_in"), _parts(mirror_out, sizes[-1], "mirror_out"))
    parts = (ends[0], *(_Parts(n // 2, n // 2) for n in sizes[1:-1]), ends[1])
    pairs = list(itertools.pairwise(parts))

    def init(key: Tensor) -> list[dict[str, Tensor]]:
        params = []
        for i, ((before, after), layer_key) in enumerate(zip(pairs, random.split(key, len(pairs)), strict=True)):
            gain = final_scale if i == len(pairs) - 1 else math.sqrt(2.0)
            even_key, odd_key = random.split(layer_key).unbind(0)
            even = _orthogonal(even_key, after.even, before.even, gain)
            odd = _orthogonal(odd_key, after.odd, before.odd, gain)
            params.append({"even": even, "odd": odd, "bias": even.new_zeros(after.even)})
        return params

    def whole(params: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        if len(params) != len(pairs):
            raise ValueError(f"params must be of {len(pairs)} layers, got {len(params)}")
        return [_whole(*pair, layer) for pair, layer in zip(pairs, params, strict=True)]

    return Network(
        init, lambda params, x: plain.apply(whole(params), x), lambda params, x: plain.hidden(whole(params), x)
    )


def _orthogonal(key: Tensor, rows: int, columns: int, gain: float) -> Tensor:
    if rows == 0 or columns == 0:
        return torch.zeros(rows, columns)
    return orthogonal(key, rows, columns, gain)


def _whole(before: _Parts, after: _Parts, layer: dict[str, Tensor]) -> dict[str, Tensor]:
    """The layer as numbers see it: `weight = E_out even E_in^T + O_out odd O_in^T`, `bias = E_out bias`."""
    # First the rows, then the columns.
    even, odd = _spread(after, layer["even"], None), _spread(after, None, layer["odd"])
    weight = _spread(before, even.mT, odd.mT).mT
    return {"weight": weight, "bias": _spread(after, layer["bias"].unsqueeze(-1), None).squeeze(-1)}


def _spread(parts: _Parts, even: Tensor | None, odd: Tensor | None) -> Tensor:
    """`E even + O odd`: from `[even, k]` and `[odd, k]` to `[n, k]`; None stands for zero."""
    if parts.bases is None:
        half = math.sqrt(0.5)
        first = second = torch.zeros(())
        if even is not None:
            first = second = half * even
        if odd is not None:
            odd = half * odd
            first, second = (odd, -odd) if even is None else (first + odd, second - odd)
        return torch.cat([first, second])
    products = [basis.to(x.dtype) @ x for basis, x in zip(parts.bases, (even, odd), strict=True) if x is not None]
    return products[0] if len(products) == 1 else products[0] + products[1]


def _parts(mirror: SignedPermutation | None, size: int, name: str) -> _Parts:
    """The bases of a map's parts: x_i where it is left alone, else `(x_i +- s x_j) / sqrt(2)`."""
    identity = torch.eye(size, dtype=torch.float64)
    if mirror is None:
        return _Parts(size, 0, (identity, identity[:, :0]))
    if mirror.permutation.shape != (size,):
        raise InputError(f"{name} must map {size} numbers, got {mirror.permutation.shape[0]}")
    places, signs = mirror.permutation.tolist(), mirror.sign.tolist()
    if any(places[j] != i or signs[i] != signs[j] for i, j in enumerate(places)):
        raise InputError(f"{name} must be its own inverse, as a mirror is")
    even: list[Tensor] = []
    odd: list[Tensor] = []
    for i, (j, sign) in enumerate(zip(places, signs, strict=True)):
        if i == j:
            (even if sign > 0 else odd).append(identity[i])
        elif i < j:
            even.append(math.sqrt(0.5) * (identity[i] + sign * identity[j]))
            odd.append(math.sqrt(0.5) * (identity[i] - sign * identity[j]))
    bases = [torch.stack(columns, -1) if columns else identity[:, :0] for columns in (even, odd)]
    return _Parts(len(even), len(odd), (bases[0], bases[1]))
