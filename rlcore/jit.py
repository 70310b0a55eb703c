"""Record a tensor function once, replay it without the cost of the transforms.

Under `torch.func.vmap` every small operation pays for Python-side batching, which at a few hundred
environments costs more than the arithmetic. `jit` runs a function once through `make_fx`, which leaves a flat
list of ATen operations on batched tensors, and replays that list: the same operations and the same bits, with
no compiler, no code generation and a fraction of a second of start-up. It is not `torch.compile`: it fuses
nothing. What a function closes over (engines, configs, constant tensors) is fixed when it is recorded, and so
is what it computes outside of torch, as through `.numpy()`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from rlcore.tree import tree_flatten, tree_unflatten

P = ParamSpec("P")
R = TypeVar("R")


def jit(fn: Callable[P, R]) -> Callable[P, R]:
    """A pure function of trees of tensors, recorded per structure, shape, strides, dtype and device.

    Leaves that are not tensors are part of the structure. Inside another transform or a compile, and where
    arguments or tensors that it closed over require gradients, the function is called as it is, so that
    transforms compose. The first call with new shapes runs the function twice: to record it and to replay it.

    Returns:
      A function with the same results, bit for bit. The recording holds what `fn` closed over. As from `fn`
      itself, an output that is an argument or a view of one shares its memory; every other output is new.

    Raises (when called):
      TypeError: if a leaf that is not a tensor cannot be hashed, such as a numpy array.
      RuntimeError: if what the function does depends on a tensor's value, as in `if x > 0` or `x.item()`.
    """
    recordings: dict[Any, _Recording] = {}

    @functools.wraps(fn)
    def replay(*args: P.args, **kwargs: P.kwargs) -> R:
        leaves, structure = tree_flatten((args, kwargs))
        if _transformed(leaves):
            return fn(*args, **kwargs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        signature = (structure, *(_signature(leaf) for leaf in leaves))
        recording = recordings.get(signature)
        if recording is None:
            recording = recordings[signature] = _record(fn, leaves, structure)
        if recording.trains and torch.is_grad_enabled():
            return fn(*args, **kwargs)
        with torch.no_grad():
            outputs = recording.graph(*tensors)
            for place in recording.constants:
                outputs[place] = outputs[place].clone()
        return tree_unflatten(outputs, recording.structure)

    return replay


class _Recording(NamedTuple):
    graph: Callable[..., list[Any]]
    structure: Any
    constants: tuple[int, ...]  # the outputs in the memory of a constant: a caller may write into its copy
    trains: bool  # whether a constant requires gradients, as a module's parameters do


def _signature(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        # Views are recorded for these strides; the stride of an axis of one element means nothing.
        strides = tuple(s if n > 1 else 0 for n, s in zip(leaf.shape, leaf.stride(), strict=True))
        return tuple(leaf.shape), strides, leaf.dtype, leaf.device
    if isinstance(leaf, float):
        return float, leaf.hex()  # tells 0.0 from -0.0, and knows nan again
    try:
        hash(leaf)
    except TypeError as error:
        kind = type(leaf).__name__
        raise TypeError(f"an argument of a jit function is a tensor or hashable, got a {kind}") from error
    return type(leaf), leaf  # 1, 1.0 and True are equal but compute different things


def _transformed(leaves: list[Any]) -> bool:
    if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
        return True
    # A recording inside a recording must see through to the operations.
    if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
        return True
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in leaves)


def _record(fn: Callable[..., Any], leaves: list[Any], structure: Any) -> _Recording:
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
        # Tracing tells tensors apart by identity: one tensor given for two arguments would be recorded as one
        # argument, and replayed so when they differ.
        graph = make_fx(flat, tracing_mode="real")(*(leaves[place].detach() for place in places))
    graph.graph.eliminate_dead_code()
    graph.recompile()
    constants = [*graph.buffers(), *graph.parameters()]
    # An fx module's __call__ goes through hooks; the generated function itself does not.
    return _Recording(
        graph.forward,
        out_structure[0],
        _places_from_constants(graph.graph),
        any(constant.requires_grad for constant in constants),
    )


def _places_from_constants(graph: Any) -> tuple[int, ...]:
    """The outputs that are a constant of the graph, or a view of one."""
    memory: set[Any] = set()
    for node in graph.nodes:
        if node.op == "output":
            return tuple(i for i, output in enumerate(node.args[0]) if output in memory)
        view = node.op == "call_function" and _is_view(node.target)
        if node.op == "get_attr" or (view and memory.intersection(node.all_input_nodes)):
            memory.add(node)
    return ()


def _is_view(operation: Any) -> bool:
    schema = getattr(operation, "_schema", None)
    # `operator.getitem` takes one of several views.
    return schema is None or any(argument.alias_info is not None for argument in schema.arguments)
