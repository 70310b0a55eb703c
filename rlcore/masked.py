"""Compute a function for some rows of a batch only.

`where` means `fn(*args)` where a mask is true and `otherwise` elsewhere. Under `torch.func.vmap` alone that computes
`fn` for every row and throws most of it away. In a recording (`rlcore.jit`) it is one operation that gathers the rows
of the mask, computes those, and puts them in place: the same bits, since a pure function of one robot does not know its
neighbours. Beginning a new episode for three of 4096 robots then costs three. On a GPU all rows are computed, recorded
or not: there a few rows cost as much as all, and to count them the processor would have to wait.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rlcore import tree
from rlcore.jit import REPLAYED, jit, recording
from rlcore.tree import tree_flatten, tree_unflatten

T = TypeVar("T")


class _Function(NamedTuple):
    """A function on flat lists of tensors, for one row."""

    flat: Callable[..., list[Tensor]]
    ranks: tuple[int, ...]  # of its inputs
    batched: dict[tuple[bool, ...], Callable[..., list[Tensor]]]  # by which inputs all rows share


# Functions by number, while a recording is made; the finished recording then owns its functions.
_functions: dict[int, _Function] = {}
_numbers = itertools.count()


def where(mask: Tensor, fn: Callable[..., T], args: tuple[Any, ...], otherwise: T) -> T:
    """`fn(*args)` where `mask`, else `otherwise`.

    Args:
      mask: bool `[]`.
      fn: a pure function of tensors for one robot. Whatever it computes with that is mapped or recorded comes
        in through `args`: it may close over constants only.
      args: trees of tensors.
      otherwise: a tree of the structure, shapes and dtypes of what `fn` returns.

    Raises:
      ValueError: if `fn` returns another tree than `otherwise`, or, in a recording, closes over a tensor of the
        function that is recorded.
    """
    if not recording() or not mask.is_cpu:
        result = fn(*args)
        _check_equal(result, otherwise)
        return tree.where(mask, result, otherwise)
    inputs, structure = tree_flatten(args)
    others, out_structure = tree_flatten(otherwise)
    _try(fn, args, otherwise)

    def flat(*leaves: Tensor) -> list[Tensor]:
        return tree_flatten(fn(*tree_unflatten(list(leaves), structure)))[0]

    number = next(_numbers)
    _functions[number] = _Function(flat, tuple(x.ndim for x in inputs), {})
    chosen = torch.ops.rlcore.masked(number, mask, inputs, others)
    return tree_unflatten(list(chosen), out_structure)


def _try(fn: Callable[..., T], args: tuple[Any, ...], otherwise: T) -> None:
    """Run `fn` once, unrecorded, so that what is wrong with it is told now and not at the first true mask."""
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, has_proxy_slot

    mode = get_proxy_mode()
    assert mode is not None  # `recording` has told so
    given = [_bare(x) for x in tree_flatten(args)[0]]
    known = {id(x) for x in given}

    def check(used: Any) -> None:
        for x in tree_flatten(used)[0]:
            if isinstance(x, Tensor) and id(_bare(x)) not in known and has_proxy_slot(_bare(x), mode.tracer):
                raise ValueError(
                    f"fn uses a tensor of shape {list(x.shape)} that the recorded function was given or computed: "
                    "pass it in args"
                )

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            check((args, kwargs))
            return function(*args, **(kwargs or {}))

    with disable_proxy_modes_tracing():
        with Watch():
            result = fn(*args)
        check(result)
        _check_equal(result, otherwise)


def _bare(x: Tensor) -> Tensor:
    """The tensor inside the wrappers of `torch.func.vmap`."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def _check_equal(result: Any, otherwise: Any) -> None:
    """Raise ValueError unless two trees agree in structure, shapes and dtypes."""
    (ours, structure), (others, wanted) = tree_flatten(result), tree_flatten(otherwise)
    if structure != wanted:
        raise ValueError(f"fn must return a tree like otherwise, got {structure} for {wanted}")
    for place, (a, b) in enumerate(zip(ours, others, strict=True)):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            raise ValueError(
                f"fn must return a tree like otherwise, but leaf {place} is {a.dtype} {list(a.shape)} for "
                f"{b.dtype} {list(b.shape)}"
            )


def _replay(number: int) -> Callable[..., list[Tensor]]:
    """What a finished recording calls for the operation of that number."""
    function = _functions.pop(number)

    def masked_rows(
        mask: Tensor, inputs: Sequence[tuple[Tensor, bool]], others: Sequence[tuple[Tensor, bool]]
    ) -> list[Tensor]:
        return _masked_rows(function, mask, [x for x, _ in inputs], others)

    return masked_rows


def _masked_rows(
    function: _Function, mask: Tensor, inputs: Sequence[Tensor], others: Sequence[tuple[Tensor, bool]]
) -> list[Tensor]:
    """The operation, for any leading axes; each of `others` comes with whether it may be written into.

    Where no row is asked for, it returns `others` themselves.
    """
    lead = mask.shape
    rows = mask.reshape(-1).nonzero().squeeze(-1)
    if len(rows) == 0:
        return [other for other, _ in others]
    count = math.prod(lead)
    # Sizes are rounded up to powers of two from 8 on, repeating the last row, so that few recordings serve them all.
    size = min(count, max(8, 1 << (len(rows) - 1).bit_length()))
    padded = torch.cat([rows, rows[-1:].expand(size - len(rows))])
    shared = tuple(x.ndim == rank for x, rank in zip(inputs, function.ranks, strict=True))
    if shared not in function.batched:
        in_dims = tuple(None if s else 0 for s in shared)
        batched = function.flat if all(shared) else torch.func.vmap(function.flat, in_dims=in_dims)
        function.batched[shared] = jit(batched)
    gathered = [
        x if s else x.reshape(count, *x.shape[len(lead) :])[padded] for x, s in zip(inputs, shared, strict=True)
    ]
    outputs = function.batched[shared](*gathered)
    if all(shared):  # one result for all
        outputs = [output.expand(size, *output.shape) for output in outputs]
    chosen = []
    for (other, ours), output in zip(others, outputs, strict=True):
        to = other if ours and other.is_contiguous() else other.clone(memory_format=torch.contiguous_format)
        to.view(count, *output.shape[1:]).index_copy_(0, rows, output[: len(rows)])
        chosen.append(to)
    return chosen


@torch.library.custom_op("rlcore::masked", mutates_args=())
def _masked(handle: int, mask: Tensor, inputs: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    # Runs only while a recording is made, of which no value is used: a replay calls `_masked_rows`.
    return [x.clone() for x in others]


REPLAYED[torch.ops.rlcore.masked.default] = _replay


@_masked.register_fake
def _(handle, mask, inputs, others):  # type: ignore[no-untyped-def]
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in others]


@_masked.register_vmap
def _(info, in_dims, handle, mask, inputs, others):  # type: ignore[no-untyped-def]
    def front(x: Tensor, dim: int | None) -> Tensor:
        return x.unsqueeze(0).expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)

    _, mask_dim, input_dims, other_dims = in_dims
    mask = front(mask, mask_dim)
    lifted = []
    for x, dim, rank in zip(inputs, input_dims, _functions[handle].ranks, strict=True):
        everywhere = x.ndim - (dim is not None) == rank  # no axis is mapped over it yet
        if dim is not None or not everywhere:
            x = front(x, dim)
            if everywhere:  # the axes that the mask already has lie between
                x = x.reshape(x.shape[0], *(1 for _ in mask.shape[1:]), *x.shape[1:])
                x = x.expand(*mask.shape, *x.shape[mask.ndim :])
        lifted.append(x)
    others = [front(x, dim) for x, dim in zip(others, other_dims, strict=True)]
    return _masked(handle, mask, lifted, others), [0] * len(others)
