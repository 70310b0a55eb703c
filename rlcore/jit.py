"""Record a tensor function once, replay it without the cost of the transforms.

Under `torch.func.vmap` every small operation pays for Python-side batching, which at a few hundred environments
costs more than the arithmetic. `jit` runs a function once through `make_fx`, which leaves a flat list of ATen
operations on batched tensors, and replays that list: the same operations and the same bits, with no compiler, no
code generation and a fraction of a second of start-up. It is not `torch.compile`: it fuses nothing. What a
function closes over (engines, configs, constant tensors) is fixed when it is recorded.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from rlcore.tree import tree_flatten, tree_unflatten

P = ParamSpec("P")
R = TypeVar("R")


def jit(fn: Callable[P, R]) -> Callable[P, R]:
    """A pure function of trees of tensors, recorded per structure, shape, dtype and device of its arguments.

    Leaves that are not tensors are part of the structure. Inside another transform or a compile, and for
    arguments that require gradients, the function is called as it is, so that transforms compose.

    Returns:
      A function with the same results, bit for bit. The recording holds what `fn` closed over.
    """
    recordings: dict[Any, tuple[Callable[..., list[Any]], Any]] = {}

    @functools.wraps(fn)
    def replay(*args: P.args, **kwargs: P.kwargs) -> R:
        leaves, structure = tree_flatten((args, kwargs))
        if _transformed(leaves):
            return fn(*args, **kwargs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        signature = (structure, *(_signature(leaf) for leaf in leaves))
        if signature not in recordings:
            recordings[signature] = _record(fn, leaves, structure)
        graph, out_structure = recordings[signature]
        with torch.no_grad():
            return tree_unflatten(graph(*tensors), out_structure)

    return replay


def _signature(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.dtype, leaf.device
    return leaf


def _transformed(leaves: list[Any]) -> bool:
    if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
        return True
    # A recording inside a recording must see through to the operations.
    if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
        return True
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in leaves)


def _record(fn: Callable[..., Any], leaves: list[Any], structure: Any) -> tuple[Callable[..., list[Any]], Any]:
    # Tracing machinery takes a second to import, and only what runs needs it.
    from torch.fx.experimental.proxy_tensor import make_fx

    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    out_structure: list[Any] = []

    def flat(*tensors: Tensor) -> list[Any]:
        filled = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        args, kwargs = tree_unflatten(filled, structure)
        outputs, spec = tree_flatten(fn(*args, **kwargs))
        out_structure[:] = [spec]
        return outputs

    with torch.no_grad():
        graph = make_fx(flat, tracing_mode="real")(*(leaves[place] for place in places))
    graph.graph.eliminate_dead_code()
    graph.recompile()
    # An fx module's __call__ goes through hooks; the generated function itself does not.
    return graph.forward, out_structure[0]
