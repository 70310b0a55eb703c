"""Record a tensor function once, replay it without the cost of the transforms.

Under `torch.func.vmap` every small operation pays for Python-side batching, which at a few hundred environments costs
more than the arithmetic. `jit` runs a function once through `make_fx`, which leaves a flat list of ATen operations on
batched tensors, and replays that list with the same bits. `rlcore.fusion` first gathers its elementwise operations into
kernels; on a GPU `rlcore.cudagraph` replays them as CUDA graphs. It is not `torch.compile`: it reorders nothing, needs
no compiler on the machine and starts within a second. What a function closes over (engines, configs, constant tensors
with their dtypes and layouts) is fixed when it is recorded, and so is what it computes outside of torch, as through
`.numpy()`.
"""

import functools
import operator
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import torch._functorch.pyfunctorch
from torch import Tensor

from rlcore.cudagraph import captured
from rlcore.fusion import Kernel, fuse
from rlcore.tree import tree_flatten, tree_leaves, tree_unflatten
from rlcore.treecode import flattener, unflattener

P = ParamSpec("P")
R = TypeVar("R")


def jit(fn: Callable[P, R]) -> Callable[P, R]:
    """A pure function of trees of tensors, recorded per structure, shape, strides, dtype and device.

    Leaves that are not tensors are part of the structure. Under `torch.func.vmap` the mapped function is recorded: a
    population that maps an update over its members costs few calls more than one of them. Inside another transform or
    a compile, and where arguments or tensors that it closed over require gradients or are mapped themselves, the
    function is called as it is, so that transforms compose. The first call with new shapes runs the function twice: to
    record it and to replay it.

    Returns:
      A function with the same results, bit for bit. The recording holds what `fn` closed over. As from `fn`
      itself, an output that is an argument or a view of one shares its memory; every other output is new, but
      that of a `rlcore.masked.where` that needed no row, which is its `otherwise`.

    Raises (when called):
      TypeError: if a leaf that is not a tensor cannot be hashed, such as a numpy array.
      RuntimeError: if what the function does depends on a tensor's value, as in `if x > 0` or `x.item()`.
    """
    recordings: dict[Any, _Recording] = {}
    latest: list[_Recording] = []
    mapped: dict[Any, Any] = {}
    held: list[bool] = []  # whether it holds a tensor that is mapped, once that is known

    def found(tree: Any) -> tuple[_Recording | None, list[Tensor]]:
        """The recording for such arguments, and the tensors to replay it on; None inside a transformation."""
        # What was called last is called again: its own code takes the arguments apart and compares them.
        for last in () if torch.compiler.is_compiling() else latest:
            if (known := last.flatten(tree)) is not None:
                return (None, []) if _transformed(known) else (last, known)
        leaves, structure = tree_flatten(tree)
        if _transformed(leaves):
            return None, []
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        signature = (structure, *(_signature(leaf) for leaf in leaves))
        recording = recordings.get(signature)
        if recording is None:
            recording = recordings[signature] = _record(fn, leaves, structure)
        latest[:] = [recording]
        return recording, tensors

    @functools.wraps(fn)
    def replay(*args: P.args, **kwargs: P.kwargs) -> R:
        recording, tensors = found((args, kwargs))
        if recording is None and (interpreter := _mapping()) is not None:
            if not held:
                held.append(_holds_mapped(fn))
            if not held[0]:
                under: R = _under_vmap(fn, mapped, interpreter, (args, kwargs))
                return under
        if recording is None or (recording.trains and torch.is_grad_enabled()):
            return fn(*args, **kwargs)
        with torch.no_grad():
            outputs = recording.graph(*tensors)
            for place in recording.copied:
                outputs[place] = outputs[place].clone()
        result: R = recording.unflatten(outputs)
        return result

    return replay


def _mapping() -> Any:
    """What maps this call, if it is `torch.func.vmap`; else None."""
    if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is None:
        return None
    if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
        return None
    interpreter = torch._functorch.pyfunctorch.retrieve_current_functorch_interpreter()
    return interpreter if interpreter.key() == torch._C._functorch.TransformType.Vmap else None


def _holds_mapped(fn: Any) -> bool:
    """Whether a function holds a tensor that is mapped: closed over, as a default, or by a function that it holds."""
    seen: set[int] = set()
    waiting: list[Any] = [fn]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            if torch._C._functorch.is_batchedtensor(thing):
                return True
            continue
        if isinstance(thing, type | types.ModuleType | str | bytes | int | float):
            continue
        if isinstance(thing, types.FunctionType):
            waiting += [*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values(), *vars(thing).values()]
            for cell in thing.__closure__ or ():
                with suppress(ValueError):  # of a name that has no value yet
                    waiting.append(cell.cell_contents)
        elif isinstance(thing, types.MethodType):
            waiting += [thing.__self__, thing.__func__]
        elif isinstance(thing, functools.partial):
            waiting += [thing.func, *thing.args, *thing.keywords.values()]
        else:
            leaves = tree_leaves(thing)
            if len(leaves) == 1 and leaves[0] is thing:
                # Something that can be called, but holds its tensors itself.
                waiting += vars(thing).values() if callable(thing) and hasattr(thing, "__dict__") else []
            else:
                waiting += leaves
    return False


def _under_vmap(fn: Callable[..., Any], mapped: dict[Any, Any], interpreter: Any, call: Any) -> Any:
    """Call `fn` where `vmap` maps it: one level down, with the mapped function, recorded as any other.

    Args:
      fn: what is mapped.
      mapped: the mapped functions so far, by what of the call is mapped.
      interpreter: of the vmap.
      call: its arguments as of a member, `(args, kwargs)`.
    """
    functorch, level = torch._C._functorch, interpreter.level()
    leaves, structure = tree_flatten(call)
    values: list[Any] = []
    dims: list[int | None] = []
    for leaf in leaves:
        inside = isinstance(leaf, Tensor) and functorch.is_batchedtensor(leaf)
        if inside and functorch.maybe_get_level(leaf) == level:
            values.append(functorch.get_unwrapped(leaf).movedim(functorch.maybe_get_bdim(leaf), 0))
            dims.append(0)
        else:
            values.append(leaf)
            dims.append(None)
    signature = (structure, tuple(dims))
    if signature not in mapped:
        shape: list[Any] = []  # the result's structure, and what of it is no tensor

        def member(given: list[Any]) -> list[Tensor]:
            args, kwargs = tree_unflatten(given, structure)
            outputs, spec = tree_flatten(fn(*args, **kwargs))
            shape[:] = [spec, [(isinstance(x, Tensor), None if isinstance(x, Tensor) else x) for x in outputs]]
            return [x for x in outputs if isinstance(x, Tensor)]

        in_dims = (list(dims),)
        mapped[signature] = jit(torch.func.vmap(member, in_dims=in_dims) if 0 in dims else member), shape
    recorded, shape = mapped[signature]
    with interpreter.lower():
        tensors = recorded(values)
    results = iter([functorch._add_batch_dim(x, 0, level) for x in tensors] if 0 in dims else tensors)
    spec, outputs = shape
    return tree_unflatten([next(results) if is_tensor else x for is_tensor, x in outputs], spec)


class _Recording(NamedTuple):
    graph: Callable[..., list[Any]]
    flatten: Callable[[Any], list[Tensor] | None]  # the arguments' leaves, if they are like those recorded
    unflatten: Callable[[list[Any]], Any]
    copied: tuple[int, ...]  # the outputs in the memory of a constant or of another output: a caller may write
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
    from torch._guards import TracingContext
    from torch._guards import tracing as fx_tracing
    from torch._subclasses.fake_tensor import FakeTensorMode
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

    # What every node's value looks like is noted as a fake tensor. Where no mode for these is in force, torch makes one
    # for each, which takes as long as the rest of tracing.
    noted = fx_tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True)))
    with torch.no_grad(), _recording(), noted:
        # Tracing tells tensors apart by identity: one tensor given for two arguments would be recorded as one
        # argument, and replayed so when they differ.
        graph = make_fx(flat, tracing_mode="real")(*(leaves[place].detach() for place in places))
    _write_elsewhere(graph.graph)
    apart = _memory_of_outputs(graph.graph)
    _drop_idle_views(graph.graph)
    _share_equal_operations(graph.graph)
    graph.graph.eliminate_dead_code()
    copied = {*_places_from_constants(graph.graph), *_places_now_shared(graph.graph, apart)}
    constants = [*graph.buffers(), *graph.parameters()]
    replay: Callable[..., list[Any]]
    if any(leaves[place].is_cuda for place in places):
        replay = captured(graph, HOST)
    else:
        if _all_pure(graph.graph):
            graph.graph = fuse(graph.graph)
        _call_directly(graph.graph)
        graph.recompile()
        # An fx module's __call__ goes through hooks; the generated function itself does not.
        replay = graph.forward
    return _Recording(
        replay,
        flattener(structure, leaves) or (lambda tree: None),
        unflattener(out_structure[0]),
        tuple(sorted(copied)),
        any(constant.requires_grad for constant in constants),
    )


# Whether this thread records: another one, which runs an environment meanwhile, does not.
_thread = threading.local()


@contextmanager
def _recording() -> Iterator[None]:
    before = getattr(_thread, "records", False)
    _thread.records = True
    try:
        yield
    finally:
        _thread.records = before


def tracing() -> bool:
    """Whether a recording is being made: what runs now runs again, as its first replay."""
    return getattr(_thread, "records", False)


def recording() -> bool:
    """Whether this call is being recorded by `jit`, and nothing differentiates it."""
    if not tracing() or torch.compiler.is_compiling():
        return False
    # What an operation's own kernel calls is run, not recorded.
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is None:
        return False
    stack = torch._C._functorch.get_interpreter_stack() or []
    return all(level.key() == torch._C._functorch.TransformType.Vmap for level in stack)


@contextmanager
def one_thread(rows: int) -> Iterator[None]:
    """Run torch on one thread where a batch of `rows` robots is too small to share.

    A second thread saves little there, and its spinning takes a core from the physics that comes next.
    """
    threads = torch.get_num_threads()
    if rows > _SHARED_ROWS or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


_SHARED_ROWS = 2048


def _write_elsewhere(graph: Any) -> None:
    """Replace the writes in place of torch's own derivatives by operations with a result of their own.

    Only where what is written was made here, and nobody looks at the same memory in another way.
    """
    for node in list(graph.nodes):
        pure = _OUT_OF_PLACE.get(node.target)
        written = node.args[0] if pure else None
        if written is None or written.op != "call_function" or _is_view(written.target):
            continue
        if any(user.op == "call_function" and user is not node and _is_view(user.target) for user in written.users):
            continue
        node.target = pure
        before = True  # users that read what was there before the write
        for other in list(graph.nodes):
            if other is node:
                before = False
            elif not before:
                other.replace_input_with(written, node)


_OUT_OF_PLACE: dict[Any, Any] = {
    torch.ops.aten.masked_fill_.Scalar: torch.ops.aten.masked_fill.Scalar,
    torch.ops.aten.masked_fill_.Tensor: torch.ops.aten.masked_fill.Tensor,
}


def _drop_idle_views(graph: Any) -> None:
    """Batching rules leave many views that change nothing."""
    permute, view = torch.ops.aten.permute.default, torch.ops.aten.view.default
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in (permute, view):
            continue
        source, shape = node.args
        same = shape == list(range(len(shape)))
        if node.target is view:
            same = list(source.meta["val"].shape) == list(shape) if "val" in source.meta else False
        if same:
            node.replace_all_uses_with(source)
            graph.erase_node(node)


DIRECT: dict[Any, Callable[..., Any]] = {}
"""Custom operations whose CPU kernel may be called as a plain function in a recording, past the dispatcher. Its results
are always new memory, each its own."""

HOST: dict[Any, Callable[..., Any]] = {}
"""Custom operations that the processor must see at each replay on a GPU too, such as a step of physics, and what to
call for them. Everything else there may become part of a CUDA graph."""

REPLAYED: dict[Any, Callable[..., Any]] = {}
"""Operations that exist while a recording is made only; their first argument, a number, gives what a replay calls
for them with the others. In lists of tensors each comes with whether the call may write into it."""


_BINDINGS: dict[Any, Callable[..., Any]] = {
    getattr(torch.ops.aten, name): getattr(torch, function)
    for name, function in {
        "abs": "abs", "add": "add", "bitwise_and": "bitwise_and", "bitwise_not": "bitwise_not",
        "bitwise_or": "bitwise_or", "cat": "cat", "clamp": "clamp", "cos": "cos", "div": "div", "eq": "eq",
        "exp": "exp", "ge": "ge", "gt": "gt", "le": "le", "log1p": "log1p", "lt": "lt", "mul": "mul", "ne": "ne",
        "neg": "neg", "pow": "pow", "select": "select", "sin": "sin", "sqrt": "sqrt", "stack": "stack",
        "sub": "sub", "sum": "sum", "unbind": "unbind", "where": "where",
    }.items()
}  # fmt: skip
"""Operations whose ordinary Python binding does the same with less dispatch than `torch.ops` has."""


def _call_directly(graph: Any) -> None:
    """A custom operation in Python costs tens of microseconds in dispatch, of which a recording needs nothing."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    for node in reversed(list(graph.nodes)):  # users first, as long as their operations can be told
        if node.op != "call_function":
            continue
        if node.target in REPLAYED:
            replayed = REPLAYED[node.target](node.args[0])
            node.args = tuple(_hand_over(node, x, order) if isinstance(x, list) else x for x in node.args[1:])
            node.target = replayed
        elif node.target in DIRECT and _on_cpu(node):
            node.target = DIRECT[node.target]
        elif (packet := getattr(node.target, "overloadpacket", None)) in _BINDINGS and not (
            # A third argument by position is the factor of `add` and `sub`, which a binding takes by name.
            packet in (torch.ops.aten.add, torch.ops.aten.sub) and len(node.args) > 2
        ):
            node.target = _BINDINGS[packet]


def _hand_over(node: Any, tensors: list[Any], order: dict[Any, int]) -> list[tuple[Any, bool]]:
    """Each of the tensors given to `node`, and whether nobody needs it any more after that."""

    def is_last(user: Any) -> bool:
        return user is node or (order[user] < order[node] and _keeps_nothing(user))

    return [(x, tensors.count(x) == 1 and _is_new(x) and all(map(is_last, x.users))) for x in tensors]


def _is_new(node: Any) -> bool:
    """Whether the node is one of several results of a kernel or a custom operation, which are always new memory."""
    return node.target is operator.getitem and _makes_new(node.args[0].target)


def _makes_new(operation: Any) -> bool:
    return isinstance(operation, Kernel) or operation in DIRECT or operation in DIRECT.values()


def _keeps_nothing(node: Any) -> bool:
    """Whether the operation's result shares no memory with its arguments, as that of a `masked.where` may."""
    if node.target in REPLAYED:
        return False
    return node.op == "call_function" and (_makes_new(node.target) or not _is_view(node.target))


def _on_cpu(node: Any) -> bool:
    values = [n.meta.get("val") for n in node.all_input_nodes]
    return all(isinstance(v, Tensor) and v.device.type == "cpu" for v in values)


def _share_equal_operations(graph: Any) -> None:
    """Compute once what the function computes twice: operations with equal arguments become one.

    Nothing recorded here writes into its arguments or draws from a generator; a graph in which something does is
    left as it is.
    """
    if not _all_pure(graph):
        return
    calls = [node for node in graph.nodes if node.op == "call_function"]
    seen: dict[Any, Any] = {}
    for node in calls:
        signature = (node.target, _hashable(node.args), _hashable(node.kwargs))
        first = seen.setdefault(signature, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _all_pure(graph: Any) -> bool:
    return all(_is_pure(node.target) for node in graph.nodes if node.op == "call_function")


def _is_pure(operation: Any) -> bool:
    if operation is operator.getitem:
        return True
    schema = getattr(operation, "_schema", None)
    drawn = torch.Tag.nondeterministic_seeded in getattr(operation, "tags", ())
    return schema is not None and not schema.is_mutable and not drawn


def _hashable(x: Any) -> Any:
    if isinstance(x, (list, tuple)):
        return tuple(_hashable(y) for y in x)
    if isinstance(x, dict):
        return tuple((k, _hashable(v)) for k, v in x.items())
    # 1, 1.0 and True are equal but compute different things.
    return (type(x), repr(x)) if isinstance(x, (bool, int, float, complex)) else x


def _memory(graph: Any) -> dict[Any, Any]:
    """For each node whose result is a view, the node that made the memory; for another, the node itself."""
    origins: dict[Any, Any] = {}
    for node in graph.nodes:
        origins[node] = node
        if node.op == "call_function" and _is_view(node.target) and node.all_input_nodes:
            origins[node] = origins[node.all_input_nodes[0]]
    return origins


def _outputs(graph: Any) -> list[Any]:
    return next(list(node.args[0]) for node in graph.nodes if node.op == "output")


def _memory_of_outputs(graph: Any) -> list[Any]:
    origins = _memory(graph)
    return [origins.get(output) if isinstance(output, torch.fx.Node) else None for output in _outputs(graph)]


def _places_now_shared(graph: Any, before: list[Any]) -> list[int]:
    """The outputs that share memory with an earlier one now, and did not when the function ran."""
    places = []
    first: dict[Any, Any] = {}  # for each memory, whose it was before
    for place, (old, new) in enumerate(zip(before, _memory_of_outputs(graph), strict=True)):
        if new is not None and first.setdefault(new, old) is not old:
            places.append(place)
    return places


def _places_from_constants(graph: Any) -> list[int]:
    """The outputs that are a constant of the graph, or a view of one."""
    memory: set[Any] = set()
    for node in graph.nodes:
        # What a replay calls in place of an operation may return its arguments.
        view = node.op == "call_function" and (_is_view(node.target) or node.target in REPLAYED)
        if node.op == "get_attr" or (view and memory.intersection(node.all_input_nodes)):
            memory.add(node)
    return [place for place, output in enumerate(_outputs(graph)) if output in memory]


def _is_view(operation: Any) -> bool:
    schema = getattr(operation, "_schema", None)
    if operation is torch.ops.aten._unsafe_view.default:
        return True  # its schema does not say so
    # `operator.getitem` takes one of several views.
    return schema is None or any(argument.alias_info is not None for argument in schema.arguments)
