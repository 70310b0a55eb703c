"""Networks as pairs of functions: one makes parameters from a key, the other applies them.

Parameters are plain trees of tensors, so `torch.func` transforms reach them directly: mapping `init` over
keys makes a population, mapping `apply` over parameters runs it. This module holds no parameters, uses no
global random numbers, and never normalizes observations (`rlcore.normalize`) or makes distributions of
outputs (`rlcore.distributions`).
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from rlcore import random
from rlcore.errors import InputError

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": F.elu,
    "gelu": F.gelu,
    "relu": torch.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


class Network(NamedTuple):
    """A network: `params = init(key)`, `y = apply(params, x)`.

    `init` consumes an int64 key `[2]` and returns a tree of float32 tensors. `apply` is pure and takes
    `[..., in]` to `[..., out]`; `hidden(params, x)` gives what each hidden layer makes of `x`, `[..., units]`.
    """

    init: Callable[[Tensor], Any]
    apply: Callable[[Any, Tensor], Tensor]
    hidden: Callable[[Any, Tensor], list[Tensor]]


def orthogonal(key: random.Key, rows: int, columns: int, gain: float = 1.0) -> Float[Tensor, "rows columns"]:
    """A random matrix whose rows (or columns, whichever are fewer) are orthogonal, of length `gain`.

    It is the Q of the QR decomposition of a matrix of normal numbers, with the signs that make R's diagonal
    positive: otherwise its distribution would depend on the decomposition's choice of signs. Source: Saxe et
    al. 2013, "Exact solutions to the nonlinear dynamics of learning in deep linear neural networks"; Mezzadri
    2006, "How to generate random matrices from the classical compact groups".

    Args:
      key: random key, consumed here.
      rows, columns: the matrix's shape.
      gain: length of the orthogonal vectors.
    """
    normal = random.normal(key, (max(rows, columns), min(rows, columns)))
    # In float64, a difference in how a machine orders the sums is lost in the rounding to float32.
    q, r = torch.linalg.qr(normal.to(torch.float64))
    q = gain * q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    return (q if rows >= columns else q.mT).to(torch.float32).contiguous()


def mlp(sizes: Sequence[int], activation: str = "elu", final_scale: float = 1.0, layer_norm: bool = False) -> Network:
    """A multilayer perceptron: `x -> W x + b`, with an activation between layers and none after the last.

    Weights are orthogonal, with a gain of sqrt(2) in hidden layers and `final_scale` in the last; biases are
    zero. Parameters are a list with, for each layer, `{"weight": [out, in], "bias": [out]}`, and for a hidden
    layer with layer normalization also `"scale": [out]` and `"shift": [out]`.

    Args:
      sizes: width of the input, of each hidden layer and of the output.
      activation: one of `ACTIVATIONS`.
      final_scale: gain of the last layer. A small one (0.01) starts a policy near zero actions.
      layer_norm: normalize each hidden layer's output to mean 0 and variance 1 before the activation, then
        scale and shift it (Ba et al. 2016, https://arxiv.org/abs/1607.06450).

    Returns:
      The network. Its `apply` raises ValueError where the input's last axis is not `sizes[0]` wide or the
      parameters are of another number of layers.

    Raises:
      InputError: if there are fewer than two sizes, one is not a positive integer, the activation is not
        known, or `final_scale` is negative or not finite.
    """
    sizes = tuple(sizes)
    if len(sizes) < 2:
        raise InputError(f"sizes must give at least the width of the input and of the output, got {sizes}")
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sizes):
        raise InputError(f"sizes must be integers of at least 1, got {sizes}")
    if activation not in ACTIVATIONS:
        raise InputError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if not (math.isfinite(final_scale) and final_scale >= 0):
        raise InputError(f"final_scale must be finite and at least 0, got {final_scale}")
    activate = ACTIVATIONS[activation]
    num_layers = len(sizes) - 1

    def init(key: Tensor) -> list[dict[str, Tensor]]:
        params = []
        keys = random.split(key, num_layers)
        for i, (width_in, width_out) in enumerate(itertools.pairwise(sizes)):
            last = i == num_layers - 1
            weight = orthogonal(keys[i], width_out, width_in, final_scale if last else math.sqrt(2.0))
            layer = {"weight": weight, "bias": weight.new_zeros(width_out)}
            if layer_norm and not last:
                layer["scale"] = weight.new_ones(width_out)
                layer["shift"] = weight.new_zeros(width_out)
            params.append(layer)
        return params

    def hidden(params: list[dict[str, Tensor]], x: Tensor) -> list[Tensor]:
        if x.ndim < 1 or x.shape[-1] != sizes[0]:
            raise ValueError(f"the input must be [..., {sizes[0]}], got shape {tuple(x.shape)}")
        if len(params) != num_layers:
            raise ValueError(f"params must be of {num_layers} layers, got {len(params)}")
        outputs = []
        for layer in params[:-1]:
            x = linear(x, layer["weight"], layer["bias"])
            if layer_norm:
                x = F.layer_norm(x, x.shape[-1:], layer["scale"], layer["shift"])
            x = activate(x)
            outputs.append(x)
        return outputs

    def apply(params: list[dict[str, Tensor]], x: Tensor) -> Tensor:
        last = [x, *hidden(params, x)][-1]
        return linear(last, params[-1]["weight"], params[-1]["bias"])

    return Network(init, apply, hidden)


def linear(
    x: Float[Tensor, "*N in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"]
) -> Float[Tensor, "*N out"]:
    """`W x + b`, as `torch.nn.functional.linear`, made for many networks side by side.

    Where `torch.func.vmap` maps the parameters, torch's own rule adds the bias apart and lays gradients of the weights
    out column by column, which costs an optimizer more than the products themselves. Here both come out row by row.
    """
    if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is None:
        return F.linear(x, weight, bias)
    y: Tensor = _Linear.apply(x, weight, bias)
    return y


class _Linear(torch.autograd.Function):
    """`linear` with any number of axes S in front of all three arguments, along which networks are stacked."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if weight.ndim == 2:
            return F.linear(x, weight, bias)
        products = torch.baddbmm(_stacked(bias, 1).unsqueeze(-2), _rows(x, weight), _stacked(weight, 2).mT)
        return products.reshape(*x.shape[:-1], weight.shape[-2])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stacked, grads = _stacked(weight, 2), _rows(grad, weight)
        of_x = torch.bmm(grads, stacked).reshape(x.shape) if ctx.needs_input_grad[0] else None
        of_weight = torch.bmm(grads.mT, _rows(x, weight)).reshape(weight.shape)
        return of_x, of_weight, grads.sum(-2).reshape(weight.shape[:-1])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = tangents
        change = x.new_zeros(*x.shape[:-1], weight.shape[-2])
        shape = change.shape
        if of_x is not None:
            change = change + torch.bmm(_rows(of_x, weight), _stacked(weight, 2).mT).reshape(shape)
        if of_weight is not None:
            change = change + torch.bmm(_rows(x, weight), _stacked(of_weight, 2).mT).reshape(shape)
        if of_bias is not None:
            axes = x.ndim - weight.ndim + 1
            change = change + of_bias.reshape(*weight.shape[:-2], *(1 for _ in range(axes)), weight.shape[-2])
        return change

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, int]:
        if in_dims[0] is not None and in_dims[1] is None and in_dims[2] is None:
            place = weight.ndim - 2  # one more axis of x, behind those of the networks
            return _Linear.apply(x.movedim(in_dims[0], place), weight, bias), place
        mapped = [
            t.unsqueeze(0).expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in zip((x, weight, bias), in_dims, strict=True)
        ]
        return _Linear.apply(*mapped), 0


def _stacked(parameter: Tensor, own: int) -> Tensor:
    """A parameter with one axis in front of its `own`, for all the networks."""
    return parameter.reshape(-1, *parameter.shape[parameter.ndim - own :])


def _rows(x: Tensor, weight: Tensor) -> Tensor:
    """Inputs or gradients as `[networks, N, size]`."""
    return x.reshape(math.prod(weight.shape[:-2]), -1, x.shape[-1])


def dead_units(hidden: Sequence[Float[Tensor, "..."]]) -> Float[Tensor, ""]:
    """Share of hidden units that tell inputs apart no more: that vary over a batch by less than a hundredth of what
    their layer's units do on average.

    After Sokar et al. 2023, "The dormant neuron phenomenon in deep reinforcement learning",
    https://arxiv.org/abs/2302.12902, with the deviation in place of the mean magnitude, so that it serves activations
    that are not zero where they are saturated.

    Args:
      hidden: what `Network.hidden` gave of a batch, `[..., units]` each; of a single input nothing can be said, and the
        share is NaN.
    """
    if not hidden:
        return torch.zeros(())
    if hidden[0][..., 0].numel() < 2:
        return hidden[0].new_full((), math.nan)
    dead = []
    for layer in hidden:
        spread = layer.reshape(-1, layer.shape[-1]).std(0, correction=0)
        dead.append(spread <= (0.01 * spread.mean()).clamp(min=1e-6))
    return torch.cat(dead).to(torch.float32).mean()
