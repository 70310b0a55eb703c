"""Turn the small operations of a recording into a few kernels of machine code.

At a few hundred robots an operation of torch costs more to call than to compute. `fuse` gathers the elementwise
operations between two steps of physics, two draws or two exponentials into one kernel each, written as LLVM code for
the processor at hand. It takes only operations whose result IEEE 754 fixes to the last bit (sums of two, products,
quotients, comparisons, copies) and never reorders or contracts them, so a kernel has the bits of the operations that it
replaces. Short sums over the last axis are added in the order in which torch adds them. Exponentials, sines, roots
(which torch's libraries do not round exactly) and whatever else it does not know stay what they are. It compiles in
tens of milliseconds, needs no compiler on the machine, and serves tensors on the CPU only.
"""

import ctypes
import functools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_ATEN = torch.ops.aten
# Larger results are left to torch, which has threads for them and costs little to call by comparison.
_LARGEST = 1 << 20

# A kernel keeps no more numbers than this of one result on its stack, of a row or of what has no rows.
_MOST_ON_STACK = 256
# Operations that are computed inside of one another, at most: code is written by functions that call themselves.
_DEEPEST = 40

_TYPES = {torch.float64: "double", torch.float32: "float", torch.int64: "i64", torch.int32: "i32", torch.bool: "i1"}
_BYTES = {torch.float64: 8, torch.float32: 4, torch.int64: 8, torch.int32: 4, torch.bool: 1}


def fuse(graph: Any) -> Any:
    """A graph of ATen operations with its elementwise operations gathered into kernels.

    Args:
      graph: what `make_fx` made; every node has its value in `meta["val"]`.

    Returns:
      A new graph of the same inputs and outputs, in order; `graph` itself if nothing in it can be fused.
    """
    plan = _Plan(graph)
    return plan.rebuilt() if plan.levels else graph


# --- an operation for kernels ---------------------------------------------------------------------------------


@torch.library.custom_op("rlcore::square_root", mutates_args=())
def square_root(x: Tensor) -> Tensor:
    """The square root as IEEE 754 rounds it, in float32 and float64: that of torch is not everywhere, and so no kernel
    could compute it. Other types have torch's."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return x.contiguous().sqrt()
    root = torch.empty_like(x, memory_format=torch.contiguous_format)
    np.sqrt(x.detach().numpy(), out=root.numpy())
    return root


@square_root.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@square_root.register_vmap
def _(info: Any, in_dims: Any, x: Tensor) -> tuple[Tensor, int]:
    return square_root(x), in_dims[0]


square_root.register_autograd(
    lambda ctx, grad: grad / (2.0 * ctx.saved_tensors[0]),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output),
)


# --- what can be fused --------------------------------------------------------------------------------------


def _value(node: Any) -> Any:
    return node.meta.get("val")


def _is_tensor(node: Any) -> bool:
    return isinstance(_value(node), Tensor)


def _normal(i: int, size: int) -> int:
    return i + size if i < 0 else i


Index = tuple[Any, ...]
"""Where an element is: for each axis a number, or the name of an i64 in the code."""


class _View(NamedTuple):
    """A node that shows elements of another one: where in `base` its element at an index is."""

    base: Any
    place: "Callable[[_Code, Index], Index]"


def _axes_of_size_one_apart(old: Sequence[int], new: Sequence[int]) -> list[int | None] | None:
    """For each old axis the new axis that it became, None for one of size one; None if more than those changed."""
    if [n for n in old if n != 1] != [n for n in new if n != 1]:
        return None
    wide = iter([i for i, n in enumerate(new) if n != 1])
    return [next(wide) if n != 1 else None for n in old]


def _as_view(node: Any) -> _View | None:
    """How to read the node's elements from its argument, if it is a view that is understood."""
    target, args = node.target, node.args
    if target is operator.getitem:
        several, number = args
        if several.target not in _SEVERAL:
            return None
        source, *rest = several.args
        if several.target is _ATEN.unbind.int:
            axis = _normal(rest[0] if rest else 0, _value(source).ndim)
            return _View(source, lambda code, i: (*i[:axis], number, *i[axis:]))
        axis = _normal(rest[1] if len(rest) > 1 else 0, _value(source).ndim)
        begin = sum(rest[0][:number])
        return _View(source, lambda code, i: (*i[:axis], code.affine(i[axis], 1, begin), *i[axis + 1 :]))
    source = args[0] if args else None
    if not isinstance(source, torch.fx.Node) or not _is_tensor(source) or not _is_tensor(node):
        return None
    old, new = _value(source).shape, _value(node).shape
    if target is _ATEN.select.int:
        axis = _normal(args[1], len(old))
        number = _normal(args[2], old[axis])
        return _View(source, lambda code, i: (*i[:axis], number, *i[axis:]))
    if target is _ATEN.slice.Tensor:
        axis = _normal(args[1] if len(args) > 1 else 0, len(old))
        begin = args[2] if len(args) > 2 and args[2] is not None else 0
        begin = min(max(_normal(begin, old[axis]), 0), old[axis])
        stride = args[4] if len(args) > 4 else 1
        return _View(source, lambda code, i: (*i[:axis], code.affine(i[axis], stride, begin), *i[axis + 1 :]))
    if target is _ATEN.detach.default:
        return _View(source, lambda code, i: i)
    if target is _ATEN.permute.default:
        order = [_normal(axis, len(old)) for axis in args[1]]
        return _View(source, lambda code, i: tuple(i[order.index(axis)] for axis in range(len(old))))
    if target is _ATEN.expand.default:
        lead = len(new) - len(old)
        return _View(source, lambda code, i: _broadcast(i[lead:], old))
    if target in (_ATEN.view.default, _ATEN.unsqueeze.default, _ATEN.squeeze.dim, _ATEN._unsafe_view.default):
        became = _axes_of_size_one_apart(old, new)
        if became is None:
            return None
        return _View(source, lambda code, i: tuple(0 if axis is None else i[axis] for axis in became))
    return None


_SEVERAL = (_ATEN.unbind.int, _ATEN.split_with_sizes.default)
"""Operations that return a list of views."""


def _broadcast(i: Index, shape: Sequence[int]) -> Index:
    """The index into a tensor of `shape` that is broadcast to where `i` points."""
    i = i[len(i) - len(shape) :]
    return tuple(0 if n == 1 else at for at, n in zip(i, shape, strict=True))


def _as_constant(node: Any) -> bool | int | float | None:
    """The number that every element of the node is, whatever its arguments; None if there is no such."""
    target, args = node.target, node.args
    if target is _ATEN.scalar_tensor.default or (
        target is _ATEN._to_copy.default and isinstance(args[0], bool | int | float)
    ):
        return args[0]
    if target in (_ATEN.zeros_like.default, _ATEN.zeros.default, _ATEN.new_zeros.default):
        return 0
    if target in (_ATEN.ones_like.default, _ATEN.ones.default, _ATEN.new_ones.default):
        return 1
    if target in (_ATEN.full_like.default, _ATEN.full.default, _ATEN.new_full.default):
        number = args[2] if target is _ATEN.new_full.default else args[1]
        return number if isinstance(number, bool | int | float) else None
    return None


def _float_only(emit: Callable[..., str]) -> Callable[..., str]:
    emit.float_only = True  # type: ignore[attr-defined]
    return emit


def _arithmetic(of_floats: str, of_integers: str | None) -> Callable[..., str]:
    def emit(code: "_Code", kind: str, a: str, b: str) -> str:
        operation = of_floats if kind in ("double", "float") else of_integers
        return code.let(f"{operation} {kind} {a}, {b}")

    return emit if of_integers else _float_only(emit)


def _bitwise(operation: str) -> Callable[..., str]:
    return lambda code, kind, a, b: code.let(f"{operation} {kind} {a}, {b}")


def _comparison(of_floats: str, of_integers: str) -> Callable[..., str]:
    def emit(code: "_Code", kind: str, a: str, b: str) -> str:
        # A bool has one bit, which is a sign if it is taken as signed.
        of_this = of_integers.replace("s", "u") if kind == "i1" else of_integers
        operation = f"fcmp {of_floats}" if kind in ("double", "float") else f"icmp {of_this}"
        return code.let(f"{operation} {kind} {a}, {b}")

    return emit


@_float_only
def _clamp(code: "_Code", kind: str, x: str, low: str | None = None, high: str | None = None) -> str:
    # The comparisons are those of std::max and std::min: a NaN stays, and so does a zero's sign.
    if low is not None:
        x = code.let(f"select i1 {code.let(f'fcmp olt {kind} {x}, {low}')}, {kind} {low}, {kind} {x}")
    if high is not None:
        x = code.let(f"select i1 {code.let(f'fcmp olt {kind} {high}, {x}')}, {kind} {high}, {kind} {x}")
    return x


@_float_only
def _absolute(code: "_Code", kind: str, x: str) -> str:
    return code.let(f"call {kind} @llvm.fabs.{'f64' if kind == 'double' else 'f32'}({kind} {x})")


@_float_only
def _square_root(code: "_Code", kind: str, x: str) -> str:
    return code.let(f"call {kind} @llvm.sqrt.{'f64' if kind == 'double' else 'f32'}({kind} {x})")


@_float_only
def _threshold_backward(code: "_Code", kind: str, grad: str, x: str, threshold: str) -> str:
    below = code.let(f"fcmp ole {kind} {x}, {threshold}")
    return code.let(f"select i1 {below}, {kind} {code.number(0.0, kind)}, {kind} {grad}")


@_float_only
def _nan_to_num(code: "_Code", kind: str, x: str, nan: str, above: str, below: str) -> str:
    infinity = code.number(math.inf, kind), code.number(-math.inf, kind)
    for test, then in (
        (f"fcmp uno {kind} {x}, {x}", nan),
        (f"fcmp oeq {kind} {x}, {infinity[0]}", above),
        (f"fcmp oeq {kind} {x}, {infinity[1]}", below),
    ):
        x = code.let(f"select i1 {code.let(test)}, {kind} {then}, {kind} {x}")
    return x


def _not(code: "_Code", kind: str, x: str) -> str:
    return code.let(f"xor {kind} {x}, {'true' if kind == 'i1' else '-1'}")


_ARITHMETIC: dict[Any, Callable[..., str]] = {
    _ATEN.add.Tensor: _arithmetic("fadd", "add"),
    _ATEN.add.Scalar: _arithmetic("fadd", "add"),
    _ATEN.sub.Tensor: _arithmetic("fsub", "sub"),
    _ATEN.sub.Scalar: _arithmetic("fsub", "sub"),
    _ATEN.rsub.Scalar: lambda code, kind, a, b: _arithmetic("fsub", "sub")(code, kind, b, a),
    _ATEN.mul.Tensor: _arithmetic("fmul", "mul"),
    _ATEN.mul.Scalar: _arithmetic("fmul", "mul"),
    _ATEN.div.Tensor: _arithmetic("fdiv", None),
    _ATEN.reciprocal.default: _float_only(lambda code, kind, x: code.let(f"fdiv {kind} {code.number(1.0, kind)}, {x}")),
    _ATEN.neg.default: _float_only(lambda code, kind, x: code.let(f"fneg {kind} {x}")),
    _ATEN.abs.default: _absolute,
    torch.ops.rlcore.square_root.default: _square_root,
    _ATEN.relu.default: _float_only(lambda code, kind, x: _clamp(code, kind, x, code.number(0.0, kind))),
    _ATEN.threshold_backward.default: _threshold_backward,
    _ATEN.clamp.default: _clamp,
    _ATEN.clamp_min.default: _clamp,
    _ATEN.clamp_max.default: _float_only(lambda code, kind, x, high: _clamp(code, kind, x, None, high)),
    _ATEN.nan_to_num.default: _nan_to_num,
    _ATEN.bitwise_and.Tensor: _bitwise("and"),
    _ATEN.bitwise_and.Scalar: _bitwise("and"),
    _ATEN.bitwise_or.Tensor: _bitwise("or"),
    _ATEN.bitwise_xor.Tensor: _bitwise("xor"),
    _ATEN.bitwise_not.default: _not,
    _ATEN._to_copy.default: lambda code, kind, x: x,
    _ATEN.clone.default: lambda code, kind, x: x,
}
"""Operations on values of the result's own type."""

_COMPARISONS: dict[Any, Callable[..., str]] = {
    getattr(getattr(_ATEN, name), overload): _comparison(of_floats, of_integers)
    for name, of_floats, of_integers in (
        ("lt", "olt", "slt"),
        ("le", "ole", "sle"),
        ("gt", "ogt", "sgt"),
        ("ge", "oge", "sge"),
        ("eq", "oeq", "eq"),
        ("ne", "une", "ne"),
    )
    for overload in ("Tensor", "Scalar")
}
"""Operations on values of the arguments' common type, with a bool for a result."""

_JOINED = (_ATEN.cat.default, _ATEN.stack.default)
_CLAMPS = (_ATEN.clamp.default, _ATEN.clamp_min.default, _ATEN.clamp_max.default)


def _numbers_and_tensors(node: Any) -> list[Any]:
    """What the operation takes: of joined tensors those that have elements."""
    if node.target in _JOINED:
        return [x for x in node.args[0] if _value(x).numel()]
    return [x for x in node.args if x is not None]


def _joining_axis(node: Any) -> int:
    return _normal(node.args[1] if len(node.args) > 1 else 0, _value(node).ndim)


def _fusable(node: Any) -> bool:
    """Whether the operation is one that a kernel computes to the last bit."""
    value, target = _value(node), node.target
    if node.op != "call_function" or not isinstance(value, Tensor):
        return False
    if value.device.type != "cpu" or value.dtype not in _TYPES or not 0 < value.numel() <= _LARGEST:
        return False
    if not value.is_contiguous():
        return False  # what torch is given next must lie in memory as it did
    inputs = [x for x in _numbers_and_tensors(node) if isinstance(x, torch.fx.Node)]
    dtypes = [_value(x).dtype if _is_tensor(x) else None for x in inputs]
    if not inputs or not all(dtype in _TYPES for dtype in dtypes):
        return False
    if any(_value(x).device.type != "cpu" for x in inputs):
        return False
    floats = value.dtype.is_floating_point
    if target in _JOINED:
        return all(dtype == value.dtype for dtype in dtypes)
    if target in _REDUCING:
        return _reduced(node) is not None
    if target is _ATEN.pow.Tensor_Scalar:
        return bool(node.args[1] == 2) and floats and dtypes[0] == value.dtype
    if target is _ATEN.where.self:
        return dtypes[0] == torch.bool and len(inputs) == 3 and all(_converts(d, value.dtype) for d in dtypes[1:])
    if target in _COMPARISONS:
        return _common(node) in _TYPES
    emit = _ARITHMETIC.get(target)
    if emit is None:
        return False
    if target is _ATEN._to_copy.default:
        if set(node.kwargs) - {"dtype"}:
            return False
    elif target is _ATEN.clone.default:
        if node.kwargs.get("memory_format") not in (None, torch.preserve_format, torch.contiguous_format):
            return False
    elif node.kwargs:
        return False
    if target in (_ATEN.add.Scalar, _ATEN.sub.Scalar, _ATEN.rsub.Scalar) and len(node.args) > 2:
        return False  # a factor of the second argument
    if target in _CLAMPS and any(x != x for x in node.args[1:] if x is not None):
        return False  # torch fills with a bound that is not a number
    if target is _ATEN.nan_to_num.default and (len(node.args) != 4 or None in node.args):
        return False
    if value.dtype == torch.bool and emit not in (_not, *map(_ARITHMETIC.get, _LOGICAL)):
        return False
    if not floats and getattr(emit, "float_only", False):
        return False
    return all(_converts(dtype, value.dtype) for dtype in dtypes)


def _reduced(node: Any) -> Any:
    """What a sum or mean over the last axis adds up, where a kernel knows the order in which torch does."""
    if node.target not in _REDUCING or len(node.args) < 2 or not node.args[1] or node.kwargs:
        return None
    x = node.args[0]
    value = _value(x)
    if value.ndim < 2 or [_normal(axis, value.ndim) for axis in node.args[1]] != [value.ndim - 1]:
        return None
    count = value.shape[-1]
    if value.dtype not in (torch.float64, torch.float32) or not 2 <= count <= _MOST_ADDED:
        return None
    # Row after row, each in one piece: elsewhere torch adds in another order.
    if value.stride(-1) != 1 or any(
        s < count for s, n in zip(value.stride()[:-1], value.shape[:-1], strict=True) if n > 1
    ):
        return None
    return x if _summands(count, value.dtype) else None


_MOST_ADDED = 64
_REDUCING = (_ATEN.sum.dim_IntList, _ATEN.mean.dim)


@functools.cache
def _summands(count: int, dtype: torch.dtype) -> Any:
    """The order in which torch adds `count` numbers that lie side by side, as nested pairs of their places.

    torch adds vectors of the processor's width, four at a time, then what is left over, then the vector's parts. How
    wide they are here is found by trying, on numbers whose sum depends on it; None if torch does something else.
    """
    numbers = np.random.default_rng(0).uniform(-0.5, 0.5, (64, count)) * 10.0 ** (np.arange(count) % 7)
    x = torch.from_numpy(numbers).to(dtype)
    for width in (2, 4, 8, 16):
        tree = _vector_sum(count, width)
        if torch.equal(_added(tree, x), x.sum(-1)):
            return tree
    return None


def _vector_sum(count: int, width: int) -> Any:
    """The order of additions of `count` numbers in vectors of `width`; None stands for the zero at a beginning."""

    def row(places: list[Any], add: Callable[[Any, Any], Any], zero: Any) -> Any:
        """Four sums side by side, then the rest, then the four."""
        parts = [zero] * 4
        whole = len(places) // 4 * 4
        for i, place in enumerate(places):
            lane = i % 4 if i < whole else 0
            parts[lane] = add(parts[lane], place)
        total = parts[0]
        for part in parts[1:]:
            total = add(total, part)
        return total

    pair = lambda a, b: (a, b)  # noqa: E731
    if count < width:
        return row(list(range(count)), pair, None)
    whole = count // width
    vectors = [[i * width + lane for lane in range(width)] for i in range(whole)]
    lanes = row(vectors, lambda a, b: [(x, y) for x, y in zip(a, b, strict=True)], [None] * width)
    total: Any = None
    for place in range(whole * width, count):
        total = (total, place)
    for lane in lanes:
        total = (total, lane)
    return total


def _added(tree: Any, x: Tensor) -> Tensor:
    """The sum of `x` `[N, count]` over its last axis in that order."""
    if tree is None:
        return torch.zeros_like(x[:, 0])
    return x[:, tree] if isinstance(tree, int) else _added(tree[0], x) + _added(tree[1], x)


_LOGICAL = (_ATEN.bitwise_and.Tensor, _ATEN.bitwise_or.Tensor, _ATEN.bitwise_xor.Tensor)


def _converts(old: Any, new: Any) -> bool:
    """Whether a conversion is defined for every value: one from a float to an integer is not."""
    return bool(old == new or new.is_floating_point or not old.is_floating_point) and (new != torch.bool or old == new)


def _common(node: Any) -> torch.dtype:
    a, b = (_value(x) if isinstance(x, torch.fx.Node) else x for x in node.args)
    return torch.result_type(a, b)


# --- which kernel computes what -----------------------------------------------------------------------------


class _Plan:
    """The levels of a graph: each is a kernel, then the operations of torch that wait for it.

    Attributes:
      views, constants: nodes of which a kernel reads elements in place, without a memory of their own.
      levels: for each level that has one, the nodes its kernel computes, in order.
    """

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.views: dict[Any, _View] = {}
        self.constants: dict[Any, bool | int | float] = {}
        self.computed: dict[Any, int] = {}  # by node, its level
        self.calls: dict[Any, int] = {}  # operations of torch, likewise
        self.rows = self._row_count()
        self._assign()
        self._delay()
        self.inlined = self._find_inlined()
        self.levels: dict[int, list[Any]] = {}
        for node in self.graph.nodes:
            if node in self.computed:
                self.levels.setdefault(self.computed[node], []).append(node)

    def _row_count(self) -> int:
        """The batch size: the first axis that most results have."""
        counts: dict[int, int] = {}
        for node in self.graph.nodes:
            if _fusable(node) and _value(node).ndim:
                size = _value(node).shape[0]
                counts[size] = counts.get(size, 0) + 1
        return max(counts, key=lambda size: (counts[size], size), default=0)

    def by_rows(self, node: Any) -> bool:
        """Whether the node is computed row by row; otherwise it is computed before the rows."""
        value = _value(node)
        return bool(value.ndim and value.shape[0] == self.rows)

    def _assign(self) -> None:
        """Give each node the first level at which it can be computed."""
        ready: dict[Any, int] = {}  # the first level whose kernel can read it
        for node in self.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                ready[node] = 0
            elif node.op == "call_function":
                level = max((ready[x] for x in node.all_input_nodes), default=0)
                number, view = _as_constant(node), _as_view(node)
                if number is not None and self._is_readable(node) and _value(node).is_contiguous():
                    self.constants[node] = number
                    ready[node] = 0
                elif view is not None and self._is_readable(view.base) and self._keeps_rows(node, view):
                    self.views[node] = view
                    ready[node] = ready[view.base]
                elif node.target is operator.getitem and node.args[0] in self.calls:
                    self.calls[node], ready[node] = self.calls[node.args[0]], ready[node.args[0]]
                elif _fusable(node) and self._is_in_order(node):
                    self.computed[node] = level
                    ready[node] = level
                else:
                    self.calls[node] = level
                    ready[node] = level + 1

    def _is_readable(self, node: Any) -> bool:
        value = _value(node)
        return isinstance(value, Tensor) and value.device.type == "cpu" and value.dtype in _TYPES

    def _keeps_rows(self, node: Any, view: _View) -> bool:
        """Whether row i of a view is in row i of what it shows, where that is computed row by row."""
        base = self.source(view.base)
        if base not in self.computed or not self.by_rows(base):
            return True
        marks = tuple(f"{axis}" for axis in range(_value(node).ndim))
        place = view.place(_Code(), marks)
        return self.by_rows(node) and self.by_rows(view.base) and place[0] == "0"

    def _is_in_order(self, node: Any) -> bool:
        """Whether each row needs that row only of what is computed row by row."""
        value = _value(node)
        by_rows = self.by_rows(node)
        if by_rows and node.target in _JOINED and _joining_axis(node) == 0:
            return False
        for x in node.all_input_nodes:
            if self.source(x) in self.constants:
                continue
            base = self.source(x)
            if base in self.computed and self.by_rows(base):
                if not by_rows or not self.by_rows(x):
                    return False
                if node.target not in (*_JOINED, *_REDUCING) and _value(x).ndim != value.ndim:
                    return False  # broadcast from the right: its rows are another axis
        return True

    def source(self, node: Any) -> Any:
        """What a chain of views shows."""
        while node in self.views:
            node = self.views[node].base
        return node

    def _delay(self) -> None:
        """Move computations to the kernel that first needs them: fewer results pass from kernel to kernel."""
        needed: dict[Any, int] = {}
        last = max(self.computed.values(), default=0)
        for node in reversed(list(self.graph.nodes)):
            if node in self.computed:
                self.computed[node] = max(self.computed[node], needed.get(node, last))
                at = self.computed[node]
            elif node in self.views:
                at = needed.get(node, last)
            elif node in self.calls:
                at = self.calls[node]
            else:
                at = last
            for x in node.all_input_nodes:
                needed[x] = min(needed.get(x, last), at)

    def readers(self, node: Any) -> list[Any]:
        """Who uses the node's elements, as often as it does, through views too.

        A view that torch itself needs counts as a user.
        """
        found = []
        for user in node.users:
            if user in self.views:
                found += self._readers_of_view(user)
            elif user.target in _SEVERAL and all(u in self.views for u in user.users):
                for u in user.users:
                    found += self._readers_of_view(u)
            elif user not in self.constants:
                given: list[Any] = []
                torch.fx.map_arg((user.args, user.kwargs), given.append)
                found += [user] * given.count(node)
        return found

    def _readers_of_view(self, view: Any) -> list[Any]:
        wanted = any(user not in self.computed and user not in self.views for user in view.users)
        return self.readers(view) + ([view] if wanted else [])

    def _find_inlined(self) -> set[Any]:
        """The results of several numbers that their one user computes on the way, element by element."""
        inlined: set[Any] = set()
        depth: dict[Any, int] = {}
        for node in self.graph.nodes:
            if node not in self.computed:
                continue
            inputs = [self.source(x) for x in node.all_input_nodes]
            depth[node] = 1 + max((depth[x] for x in inputs if x in inlined), default=0)
            readers = self.readers(node)
            # What is added up is computed in a loop of its own, since the additions are written out.
            if (
                len(readers) == 1
                and self.computed.get(readers[0]) == self.computed[node]
                and node.target not in _JOINED
                and readers[0].target not in _REDUCING
                and depth[node] < _DEEPEST
            ):
                inlined.add(node)
        return inlined

    def rebuilt(self) -> Any:
        """The graph in which each level is one call of its kernel, then the calls of torch."""
        new: Any = torch.fx.Graph()
        twins: dict[Any, Any] = {}

        def twin(node: Any) -> Any:
            """The node in the new graph; views and constants are copied when torch asks for them."""
            if node in self.constants and node not in twins:
                value = _value(node)
                how = {"dtype": value.dtype, "device": value.device}
                twins[node] = new.call_function(_ATEN.full.default, (list(value.shape), self.constants[node]), how)
                twins[node].meta.update(node.meta)
            elif node not in twins:
                twins[node] = new.node_copy(node, twin)
            return twins[node]

        for node in self.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                twin(node)
        waiting: dict[int, list[Any]] = {}
        for node, level in self.calls.items():
            waiting.setdefault(level, []).append(node)
        for level in sorted({*self.levels, *waiting}):
            if level in self.levels:
                self._emit(new, level, twin, twins)
            for node in waiting.get(level, []):
                if node.target in _SEVERAL and all(user in self.views for user in node.users):
                    continue  # copied when a part of it is asked for
                twin(node)
        output = next(node for node in self.graph.nodes if node.op == "output")
        new.output(torch.fx.map_arg(output.args[0], twin))
        new.eliminate_dead_code()
        return new

    def _is_kept(self, node: Any, level: int) -> bool:
        """Whether a result needs memory that outlives its kernel, or is too large for the kernel's own."""
        if any(user not in self.computed or self.computed[user] != level for user in self.readers(node)):
            return True
        shape = _value(node).shape
        return node not in self.inlined and math.prod(shape[self.by_rows(node) :]) > _MOST_ON_STACK

    def _emit(self, new: Any, level: int, twin: Callable[[Any], Any], twins: dict[Any, Any]) -> None:
        nodes = self.levels[level]
        outputs = [n for n in nodes if self._is_kept(n, level)]
        if not outputs:
            return
        kernel = Kernel(self, nodes, outputs)
        call = new.call_function(kernel, tuple(twin(x) for x in kernel.released()))
        call.meta["val"] = None
        for place, node in enumerate(outputs):
            twins[node] = new.call_function(operator.getitem, (call, place))
            twins[node].meta.update(node.meta)


# --- machine code -------------------------------------------------------------------------------------------


class _Code:
    """Lines of LLVM code, in static single assignment."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.entry: list[str] = []  # what is allocated once
        self.count = 0
        self.block = "entry"

    def name(self) -> str:
        self.count += 1
        return f"%v{self.count}"

    def let(self, operation: str) -> str:
        name = self.name()
        self.lines.append(f"  {name} = {operation}")
        return name

    def affine(self, i: Any, scale: int, offset: int) -> Any:
        """`i * scale + offset`, as a number where i is one."""
        if isinstance(i, int):
            return i * scale + offset
        if scale != 1:
            i = self.let(f"mul nsw i64 {i}, {scale}")
        return self.let(f"add nsw i64 {i}, {offset}") if offset else i

    def total(self, terms: Iterable[Any]) -> Any:
        """The sum of numbers and names."""
        number, name = 0, None
        for term in terms:
            if isinstance(term, int):
                number += term
            else:
                name = term if name is None else self.let(f"add nsw i64 {name}, {term}")
        if name is None:
            return number
        return self.affine(name, 1, number)

    def label(self, block: str) -> None:
        self.lines.append(f"{block}:")
        self.block = block

    def loop(self, begin: Any, end: Any, body: Callable[[str], None]) -> None:
        """`for (i = begin; i < end; i++) body(i)`, with begin below end."""
        self.count += 1
        head, tail, i, step = f"loop{self.count}", f"done{self.count}", self.name(), self.name()
        before = self.block
        self.lines.append(f"  br label %{head}")
        self.label(head)
        place = len(self.lines)
        body(i)
        self.lines.insert(place, f"  {i} = phi i64 [ {begin}, %{before} ], [ {step}, %{self.block} ]")
        self.lines.append(f"  {step} = add nuw nsw i64 {i}, 1")
        more = self.let(f"icmp slt i64 {step}, {end}")
        self.lines.append(f"  br i1 {more}, label %{head}, label %{tail}")
        self.label(tail)

    @staticmethod
    def number(x: bool | int | float, kind: str) -> str:
        """A number of a type, exactly; a float32 is written as the double that it is."""
        if kind == "i1":
            return "true" if x else "false"
        if kind.startswith("i"):
            return str(int(x))
        value = np.float64(np.float32(x) if kind == "float" else x)
        return f"0x{int(value.view(np.uint64)):016X}"

    def converted(self, x: str, old: torch.dtype, new: torch.dtype) -> str:
        if old == new:
            return x
        a, b = _TYPES[old], _TYPES[new]
        if new.is_floating_point and old.is_floating_point:
            operation = "fpext" if new == torch.float64 else "fptrunc"
        elif new.is_floating_point:
            operation = "uitofp" if old == torch.bool else "sitofp"
        else:
            operation = "trunc" if _BYTES[new] < _BYTES[old] else "zext" if old == torch.bool else "sext"
        return self.let(f"{operation} {a} {x} to {b}")


class Kernel:
    """The code of one level, as a function from its inputs to a list of new tensors."""

    def __init__(self, plan: _Plan, nodes: list[Any], outputs: list[Any]) -> None:
        self.plan, self.outputs = plan, outputs
        self.__name__ = f"kernel_{len(nodes)}"  # what a recording shows for it
        self.inputs: list[Any] = []
        self._inside = set(nodes)
        self._code = _Code()
        self._memory: dict[Any, str] = {}  # of inputs, outputs and vectors that are used more than once
        self._scalars: dict[Any, str] = {}
        for place, node in enumerate(outputs):
            self._memory[node] = f"%out{place}"
        shared = [n for n in nodes if not plan.by_rows(n)]
        rowed = [n for n in nodes if plan.by_rows(n)]
        self._store_all(shared, None)
        if rowed:
            self._code.loop(0, "%rows", lambda i: self._store_all(rowed, i))
        self._rows = plan.rows
        self._compiled = _compiled(self._source())  # held, since its engine owns the code
        self._made = [(tuple(_value(n).shape), _value(n).dtype) for n in outputs]
        # Strides of arguments and constants are those of the recording; others are made contiguous if they are not.
        self._made_by_torch = [i for i, n in enumerate(self.inputs) if n.op not in ("placeholder", "get_attr")]
        self._pointers = ctypes.c_int64 * (len(outputs) + len(self.inputs))

    def released(self) -> list[Any]:
        """The nodes of its inputs; what only the writing of the code needed is let go, the old graph with it."""
        inputs = self.inputs
        del self.plan, self.inputs, self.outputs, self._code, self._inside, self._scalars, self._memory
        return inputs

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        made = [torch.empty(shape, dtype=dtype, device="cpu") for shape, dtype in self._made]
        given = list(inputs)
        for i in self._made_by_torch:
            given[i] = given[i].contiguous()
        self._compiled.call(self._rows, self._pointers(*[x.data_ptr() for x in made], *[x.data_ptr() for x in given]))
        return made

    def _source(self) -> str:
        """The whole module: an entry that takes an array of pointers, and the body to which none may alias."""
        names = [f"%out{i}" for i in range(len(self.outputs))] + [f"%in{i}" for i in range(len(self.inputs))]
        parameters = ", ".join(["i64 %rows", *(f"ptr noalias {name}" for name in names)])
        loads = []
        for i in range(len(names)):
            loads.append(f"  %a{i} = getelementptr i64, ptr %pointers, i64 {i}")
            loads.append(f"  %p{i} = load ptr, ptr %a{i}")
        arguments = ", ".join(["i64 %rows", *(f"ptr %p{i}" for i in range(len(names)))])
        return "\n".join(
            [
                "declare double @llvm.fabs.f64(double)",
                "declare float @llvm.fabs.f32(float)",
                "declare double @llvm.sqrt.f64(double)",
                "declare float @llvm.sqrt.f32(float)",
                f"define internal void @body({parameters}) alwaysinline {{",
                "entry:",
                *self._code.entry,
                *self._code.lines,
                "  ret void",
                "}",
                "define void @kernel(i64 %rows, ptr %pointers) {",
                "entry:",
                *loads,
                f"  call void @body({arguments})",
                "  ret void",
                "}",
            ]
        )

    def _strides(self, node: Any) -> tuple[int, ...]:
        value = _value(node)
        if node.op in ("placeholder", "get_attr"):
            return tuple(value.stride())
        strides, size = [], 1
        for n in reversed(value.shape):
            strides.append(size)
            size *= n
        return tuple(reversed(strides))

    def _pointer(self, node: Any, index: Index) -> str:
        """Where an element of something in memory is."""
        if node not in self._memory:
            self._memory[node] = f"%in{len(self.inputs)}"
            self.inputs.append(node)
        code, strides = self._code, self._strides(node)
        if node in self._inside and node not in self.outputs and self.plan.by_rows(node):
            index, strides = index[1:], strides[1:]  # only the row at hand is kept
        offset = code.total(code.affine(i, s, 0) if s else 0 for i, s in zip(index, strides, strict=True))
        kind = "i8" if _value(node).dtype == torch.bool else _TYPES[_value(node).dtype]
        return code.let(f"getelementptr {kind}, ptr {self._memory[node]}, i64 {offset}")

    def _load(self, node: Any, index: Index) -> str:
        code, pointer = self._code, self._pointer(node, index)
        if _value(node).dtype == torch.bool:
            return code.let(f"icmp ne i8 {code.let(f'load i8, ptr {pointer}')}, 0")
        return code.let(f"load {_TYPES[_value(node).dtype]}, ptr {pointer}")

    def _write(self, node: Any, index: Index, x: str) -> None:
        code, pointer = self._code, self._pointer(node, index)
        kind = _TYPES[_value(node).dtype]
        if kind == "i1":
            kind, x = "i8", code.let(f"zext i1 {x} to i8")
        code.lines.append(f"  store {kind} {x}, ptr {pointer}")

    def _store_all(self, nodes: Iterable[Any], row: str | None) -> None:
        for node in nodes:
            self._store(node, row)

    def _store(self, node: Any, row: str | None) -> None:
        """Compute a node where it stands, unless its one user computes it on the way."""
        code, shape = self._code, tuple(_value(node).shape)
        lead: Index = () if row is None else (row,)
        rest = shape[len(lead) :]
        if math.prod(rest) == 1:
            index = (*lead, *(0 for _ in rest))
            x = self._compute(node, index)
            self._scalars[node] = x
            if node in self._memory:
                self._write(node, index, x)
            return
        if node in self.plan.inlined:
            return
        joined = node.target in _JOINED
        if node not in self._memory:
            self._memory[node] = code.name()
            kind = "i8" if _value(node).dtype == torch.bool else _TYPES[_value(node).dtype]
            code.entry.append(f"  {self._memory[node]} = alloca [{math.prod(rest)} x {kind}]")
        if joined:
            axis, begin = _joining_axis(node), 0
            for part in _numbers_and_tensors(node):
                self._store_part(node, part, lead, rest, axis, begin)
                begin += 1 if node.target is _ATEN.stack.default else _value(part).shape[axis]
        else:
            self._for_each(rest, lambda i: self._write(node, (*lead, *i), self._compute(node, (*lead, *i))))

    def _store_part(self, node: Any, part: Any, lead: Index, rest: Sequence[int], axis: int, begin: int) -> None:
        """One of the tensors that are joined; axis counts the axes of the result."""
        stacked, inner = node.target is _ATEN.stack.default, axis - len(lead)
        size = 1 if stacked else _value(part).shape[axis]
        sizes = (*rest[:inner], size, *rest[inner + 1 :])

        def write(i: Index) -> None:
            there = (*lead, *i[:inner], self._code.affine(i[inner], 1, begin), *i[inner + 1 :])
            here = (*lead, *i[:inner], *(() if stacked else (i[inner],)), *i[inner + 1 :])
            self._write(node, there, self._element(part, here))

        self._for_each(sizes, write)

    def _for_each(self, sizes: Sequence[int], body: Callable[[Index], None], index: Index = ()) -> None:
        """Nested loops; an axis of one element takes none."""
        if len(index) == len(sizes):
            body(index)
        elif sizes[len(index)] == 1:
            self._for_each(sizes, body, (*index, 0))
        else:
            self._code.loop(0, sizes[len(index)], lambda i: self._for_each(sizes, body, (*index, i)))

    def _element(self, node: Any, index: Index) -> str:
        """An element of any node, from wherever it is."""
        if node in self.plan.constants:
            return self._code.number(self.plan.constants[node], _TYPES[_value(node).dtype])
        if node in self._scalars:
            return self._scalars[node]
        if node in self.plan.views:
            view = self.plan.views[node]
            return self._element(view.base, view.place(self._code, index))
        if node in self._memory or node not in self._inside:
            return self._load(node, index)
        return self._compute(node, index)

    def _operand(self, x: Any, index: Index, dtype: torch.dtype) -> str:
        """A tensor's element under broadcasting, or a number, in the type that is computed in."""
        if not isinstance(x, torch.fx.Node):
            return self._code.number(x, _TYPES[dtype])
        value = _value(x)
        return self._code.converted(self._element(x, _broadcast(index, value.shape)), value.dtype, dtype)

    def _compute(self, node: Any, index: Index) -> str:
        """One element of an operation's result."""
        code, target, dtype = self._code, node.target, _value(node).dtype
        if target in _JOINED:  # of one element in all
            part = _numbers_and_tensors(node)[0]
            return self._element(
                part, tuple(0 if n == 1 else i for i, n in zip(index, _value(part).shape, strict=False))
            )
        if target in _REDUCING:
            return self._sum(node, index)
        if target is _ATEN.pow.Tensor_Scalar:
            x = self._operand(node.args[0], index, dtype)
            return code.let(f"fmul {_TYPES[dtype]} {x}, {x}")
        if target is _ATEN.where.self:
            condition = self._operand(node.args[0], index, torch.bool)
            a, b = (self._operand(x, index, dtype) for x in node.args[1:])
            kind = _TYPES[dtype]
            return code.let(f"select i1 {condition}, {kind} {a}, {kind} {b}")
        if target in _COMPARISONS:
            common = _common(node)
            return _COMPARISONS[target](code, _TYPES[common], *(self._operand(x, index, common) for x in node.args))
        operands = [None if x is None else self._operand(x, index, dtype) for x in node.args]
        return _ARITHMETIC[target](code, _TYPES[dtype], *operands)

    def _sum(self, node: Any, index: Index) -> str:
        """A sum or mean over the last axis, added in torch's order."""
        code, x, kind = self._code, node.args[0], _TYPES[_value(node).dtype]
        value = _value(x)
        index = index[: value.ndim - 1]  # without the axis that keepdim leaves
        zero = code.number(0.0, kind)
        elements = [self._element(x, (*index, i)) for i in range(value.shape[-1])]

        def added(tree: Any) -> str:
            if tree is None:
                return zero
            if isinstance(tree, int):
                return elements[tree]
            return code.let(f"fadd {kind} {added(tree[0])}, {added(tree[1])}")

        total = added(_summands(value.shape[-1], value.dtype))
        if node.target is _ATEN.mean.dim:
            total = code.let(f"fdiv {kind} {total}, {code.number(value.shape[-1], kind)}")
        return total


class _Compiled(NamedTuple):
    call: Callable[[int, Any], None]
    engine: Any  # owns the code


@functools.lru_cache(maxsize=1024)
def _compiled(source: str) -> _Compiled:
    """The function in a module of LLVM code. The code knows no batch size, so that one serves all."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features().flatten()
    target = llvm.Target.from_default_triple()
    machine = target.create_target_machine(cpu=llvm.get_host_cpu_name(), features=features, opt=2)
    module = llvm.parse_assembly(source)
    module.verify()
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=2))
    builder.getModulePassManager().run(module, builder)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_void_p)
    return _Compiled(kind(engine.get_function_address("kernel")), engine)
