"""Replay a recording on an NVIDIA GPU with a few launches.

A small operation costs a GPU less than it costs the processor to ask for it. A CUDA graph is a list of operations that
is launched as one, always on the same memory. `captured` cuts a recording (`rlcore.jit`) where the processor must see
what goes on, as at a step of physics, and captures what lies between. What comes in is copied to where the graphs read,
and what goes out is copied from where they wrote: for its caller a replay is as pure as the function that was recorded.
No operation is changed, so a replay has the bits of the operations called one by one.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

# Before the capture everything runs as it is, this often: libraries make their handles, kernels are loaded, and a
# function that is not called again costs no capture.
_CALLS_BEFORE_CAPTURE = 2

Run = Callable[[], list[Tensor]]


@runtime_checkable
class Recorder(Protocol):
    """Something that makes a run repeatable."""

    def record(self, run: Run) -> tuple[list[Tensor], Callable[[], None]]:
        """The results of `run`, and a function that computes them anew into the same memory."""
        ...


class CudaRecorder:
    """CUDA graphs that share their memory: they are replayed in the order in which they were captured."""

    def __init__(self) -> None:
        self._pool: Any = None

    def record(self, run: Run) -> tuple[list[Tensor], Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        # Another thread may copy a checkpoint meanwhile, and this one may free memory: both is allowed when relaxed.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="relaxed"):
            results = run()
        self._pool = graph.pool()
        graph.replay()  # a capture computes nothing
        return results, graph.replay


def captured(
    module: Any, host: Mapping[Any, Callable[..., Any]], recorder: Recorder | None = None
) -> Callable[..., list[Any]]:
    """A function that replays a recording.

    Args:
      module: what `make_fx` made: a graph of ATen operations with its constants.
      host: operations that the processor must see each time, and what to call for them. Their results are new memory.
      recorder: what captures; by default CUDA graphs.

    Returns:
      `(*tensors) -> outputs`, for tensors of the shapes, strides and dtypes that were recorded. All outputs are new
      memory, but for one that is an argument or the result of an operation of `host`.
    """
    return _Replay(module, host, recorder or CudaRecorder())


class _Part(NamedTuple):
    """Operations that run together: one of `host` with what picks its results, or any number of others."""

    nodes: list[Any]
    on_host: bool
    results: list[Any]  # the nodes whose values later parts or the caller need


class _Layout(NamedTuple):
    """How a tensor lies in memory, to make others like it."""

    shape: torch.Size
    memory_shape: torch.Size  # the same without the axes along which the tensor repeats itself
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    place: tuple[slice, ...] | None  # where the memory's values are in such a tensor, if not everywhere

    def new(self) -> tuple[Tensor, Tensor]:
        """A tensor of this layout, not filled, and its memory, to copy to."""
        memory = torch.empty_strided(self.memory_shape, self.strides, dtype=self.dtype, device=self.device)
        return (memory if self.place is None else memory.expand(self.shape)), memory

    def source(self, tensor: Tensor) -> Tensor:
        """What of a tensor of this layout is to be copied."""
        return tensor if self.place is None else tensor[self.place]


def _layout(tensor: Tensor) -> _Layout:
    repeats = [n > 1 and s == 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
    index = tuple(slice(0, 1) if r else slice(None) for r in repeats) if any(repeats) else None
    base = tensor if index is None else tensor[index]
    return _Layout(tensor.shape, base.shape, base.stride(), tensor.dtype, tensor.device, index)


class _Twin:
    """A tensor that graphs read, and how to fill it from others of its layout."""

    def __init__(self, like: Tensor):
        self.layout = _layout(like)
        self.tensor, self.memory = self.layout.new()


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy many tensors; those of one dtype in few launches."""
    kinds: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        into, of = kinds.setdefault(target.dtype, ([], []))
        into.append(target)
        of.append(source)
    for into, of in kinds.values():
        torch._foreach_copy_(into, of)


class _Replay:
    def __init__(self, module: Any, host: Mapping[Any, Callable[..., Any]], recorder: Recorder):
        self._host, self._recorder = host, recorder
        graph = module.graph
        self._arguments = [node for node in graph.nodes if node.op == "placeholder"]
        self._outputs = next(list(node.args[0]) for node in graph.nodes if node.op == "output")
        self._constants = _constants(module, host)
        self._parts = _parts(graph, host, self._constants, self._outputs)
        # What is used for the last time by a node, for each node; what leaves its part stays.
        leaving = {node for part in self._parts for node in part.results}
        last = {used: node for part in self._parts for node in part.nodes for used in node.all_input_nodes}
        self._done: dict[Any, list[Any]] = {}
        for used, node in last.items():
            if used.op == "call_function" and used not in self._constants and used not in leaving:
                self._done.setdefault(node, []).append(used)
        self._calls = 0
        self._launches: list[Callable[[], None] | None] = []  # for each part; None for one on the host
        self._static: dict[Any, Tensor] = {}
        self._twins: dict[Any, _Twin] = {}
        self._copied: dict[Any, tuple[Tensor, int] | None] = {}
        self._written: list[tuple[_Layout, Tensor] | None] | None = None  # for each output that graphs write

    def __call__(self, *tensors: Tensor) -> list[Any]:
        given = dict(zip(self._arguments, tensors, strict=True))
        if self._launches:
            return self._replay(given)
        self._calls += 1
        if self._calls <= _CALLS_BEFORE_CAPTURE:
            return self._as_it_is(given)
        return self._capture(given)

    def _as_it_is(self, given: dict[Any, Tensor]) -> list[Any]:
        values = {**self._constants, **given}
        for part in self._parts:
            self._run(part, values)
        return [values[x] if isinstance(x, torch.fx.Node) else x for x in self._outputs]

    def _run(self, part: _Part, values: dict[Any, Any]) -> None:
        """Run a part's operations, whose arguments and results are in `values`; what is needed no more is let go."""
        for node in part.nodes:
            call = self._host.get(node.target, node.target)
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = call(*args, **kwargs)
            for used in self._done.get(node, ()):
                del values[used]

    def _capture(self, given: dict[Any, Tensor]) -> list[Any]:
        by_graphs = {x for part in self._parts if not part.on_host for n in part.nodes for x in n.all_input_nodes}
        inputs = [x for x in self._arguments if x in by_graphs]
        self._twins = {x: _Twin(given[x]) for x in inputs}
        self._copied = dict.fromkeys(inputs)
        self._take_in(given)
        self._static = {**self._constants, **{x: self._twins[x].tensor for x in inputs}}
        values = {**self._constants, **given}
        launches: list[Callable[[], None] | None] = []
        for part in self._parts:
            if part.on_host:
                self._run(part, values)
                for node in part.results:
                    if node in by_graphs:
                        self._twins[node] = _Twin(values[node])
                        self._static[node] = self._twins[node].tensor
                self._take_results(part, values)
                launches.append(None)
                continue

            def run(part: _Part = part) -> list[Tensor]:
                inner = dict(self._static)
                self._run(part, inner)
                return [inner[node] for node in part.results]

            results, launch = self._recorder.record(run)
            self._static.update(zip(part.results, results, strict=True))
            values.update(zip(part.results, results, strict=True))
            launches.append(launch)
        self._launches = launches
        return self._hand_out(values)

    def _replay(self, given: dict[Any, Tensor]) -> list[Any]:
        self._take_in(given)
        values = {**self._static, **given}
        for part, launch in zip(self._parts, self._launches, strict=True):
            if launch is not None:
                launch()
            else:
                self._run(part, values)
                self._take_results(part, values)
        return self._hand_out(values)

    def _take_in(self, given: dict[Any, Tensor]) -> None:
        """Copy the arguments to where graphs read them; those that are there from the last time are left out."""
        targets, sources = [], []
        for node, before in self._copied.items():
            tensor, twin = given[node], self._twins[node]
            if before is not None and tensor is before[0] and tensor._version == before[1]:
                continue
            targets.append(twin.memory)
            sources.append(twin.layout.source(tensor))
            # Inference tensors do not count their writes. A tensor that is held cannot become another one.
            self._copied[node] = None if tensor.is_inference() else (tensor, tensor._version)
        _copy(targets, sources)

    def _take_results(self, part: _Part, values: dict[Any, Any]) -> None:
        """Copy what the host computed to where graphs read it."""
        read = [(self._twins[node], values[node]) for node in part.results if node in self._twins]
        _copy([twin.memory for twin, _ in read], [twin.layout.source(value) for twin, value in read])

    def _hand_out(self, values: dict[Any, Any]) -> list[Any]:
        """The outputs; what graphs wrote is copied, since their next replay writes it again."""
        if self._written is None:
            on_host = {node for part in self._parts if part.on_host for node in part.results}
            self._written = [
                None
                if not isinstance(x, torch.fx.Node) or x in on_host or x.op == "placeholder"
                else (layout := _layout(values[x]), layout.source(values[x]))
                for x in self._outputs
            ]
        outputs, targets, sources = [], [], []
        for x, written in zip(self._outputs, self._written, strict=True):
            if written is None:
                outputs.append(values[x] if isinstance(x, torch.fx.Node) else x)
            else:
                tensor, memory = written[0].new()
                outputs.append(tensor)
                targets.append(memory)
                sources.append(written[1])
        _copy(targets, sources)
        return outputs


def _constants(module: Any, host: Mapping[Any, Callable[..., Any]]) -> dict[Any, Any]:
    """The values that are the same at each replay: constants, and what is computed from nothing else."""
    known: dict[Any, Any] = {}
    calls = [node for node in module.graph.nodes if node.op == "call_function"]
    # What writes into its arguments could write into a constant.
    pure = all(_is_pure(node.target) for node in calls)
    for node in module.graph.nodes:
        if node.op == "get_attr":
            known[node] = operator.attrgetter(node.target)(module)
        elif (
            pure and node.op == "call_function" and node.target not in host and known.keys() >= {*node.all_input_nodes}
        ):
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
            with torch.no_grad():
                known[node] = node.target(*args, **kwargs)
    return known


def _is_pure(operation: Any) -> bool:
    if operation is operator.getitem:
        return True
    schema = getattr(operation, "_schema", None)
    drawn = torch.Tag.nondeterministic_seeded in getattr(operation, "tags", ())
    return schema is not None and not schema.is_mutable and not drawn


def _parts(
    graph: Any, host: Mapping[Any, Callable[..., Any]], constants: Mapping[Any, Any], outputs: Sequence[Any]
) -> list[_Part]:
    """The operations in order, cut at those of the host."""
    groups: list[tuple[list[Any], bool]] = []
    place: dict[Any, int] = {}
    for node in graph.nodes:
        if node.op != "call_function" or node in constants:
            continue
        source = node.args[0] if node.target is operator.getitem else None
        if source is not None and source.target in host:
            group = place[source]  # picks a result of the host's
        elif node.target in host:
            groups.append(([], True))
            group = len(groups) - 1
        else:
            if not groups or groups[-1][1]:
                groups.append(([], False))
            group = len(groups) - 1
        groups[group][0].append(node)
        place[node] = group
    needed = {x for x in outputs if isinstance(x, torch.fx.Node)}
    for node, group in place.items():
        needed |= {used for used in node.all_input_nodes if place.get(used, group) != group}
    return [_Part(nodes, on_host, [n for n in nodes if n in needed]) for nodes, on_host in groups]
