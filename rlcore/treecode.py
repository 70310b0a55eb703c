"""Python code for one structure of trees: to take such a tree apart and to put it together.

`tree_flatten` looks up how each node of a tree is taken apart; for a tree seen before, code that knows its nodes does
the same in a tenth of the time. This module knows tuples, lists, dicts and what `rlcore.tree.pytree` made.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlcore.tree import children_of


class _Writer:
    """Lines of a function, and the constants that they name."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.constants: dict[str, Any] = {}
        self.count = 0

    def name(self) -> str:
        self.count += 1
        return f"v{self.count}"

    def constant(self, value: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def function(self, head: str) -> Any:
        scope = dict(self.constants)
        exec("\n".join([head, *(f"    {line}" for line in self.lines)]), scope)
        return scope[head.split("(")[0].removeprefix("def ")]


def flattener(structure: Any, leaves: list[Any]) -> Callable[[Any], list[Tensor] | None] | None:
    """A function that takes apart trees of this structure, their leaves like these in shape, layout and place.

    Returns:
      `tree -> leaves`, or None for a tree that differs in anything; None instead of a function if a leaf or a node is
      of a kind that it does not know.
    """
    if not all(type(x) is Tensor and (x.is_cpu or x.is_cuda) for x in leaves):
        return None
    code, rest, names = _Writer(), list(reversed(leaves)), []

    def need(condition: str) -> None:
        code.lines.append(f"if not ({condition}): return None")

    def visit(spec: Any, tree: str) -> bool:
        if spec.is_leaf():
            leaf, name = rest.pop(), code.name()
            # Asking for the kind of device is faster than comparing devices, and there is one CPU only.
            place = f"{name}.is_cpu" if leaf.is_cpu else f"{name}.device == {code.constant(leaf.device)}"
            code.lines.append(f"{name} = {tree}")
            shape, stride = code.constant(leaf.shape), code.constant(leaf.stride())
            need(
                f"type({name}) is c_tensor and {name}.shape == {shape} and {name}.dtype is {code.constant(leaf.dtype)} "
                f"and {name}.stride() == {stride} and {place}"
            )
            names.append(name)
            return True
        name = code.name()
        code.lines.append(f"{name} = {tree}")
        need(f"type({name}) is {code.constant(spec.type)}")
        if spec.type in (tuple, list):
            need(f"len({name}) == {len(spec.children())}")
            parts = [f"{name}[{i}]" for i in range(len(spec.children()))]
        elif spec.type is dict:
            need(f"[*{name}] == {code.constant(list(spec.context))}")
            parts = [f"{name}[{code.constant(key)}]" for key in spec.context]
        elif (known := children_of(spec.type)) is not None:
            children, statics = known
            for field, value in zip(statics, spec.context, strict=True):
                need(f"{name}.{field} == {code.constant(value)}")
            parts = [f"{name}.{field}" for field in children]
        else:
            return False
        return all(visit(child, part) for child, part in zip(spec.children(), parts, strict=True))

    code.constants["c_tensor"] = Tensor
    if not visit(structure, "tree"):
        return None
    code.lines.append(f"return [{', '.join(names)}]")
    function: Callable[[Any], list[Tensor] | None] = code.function("def flatten(tree):")
    return function


def unflattener(structure: Any) -> Callable[[list[Any]], Any]:
    """A function that puts leaves together to a tree of this structure, as `tree_unflatten` does."""
    code, place = _Writer(), 0

    def visit(spec: Any) -> str | None:
        nonlocal place
        if spec.is_leaf():
            place += 1
            return f"leaves[{place - 1}]"
        parts = [visit(child) for child in spec.children()]
        if None in parts:
            return None
        if spec.type is tuple:
            return f"({', '.join(map(str, parts))}{',' if len(parts) == 1 else ''})"
        if spec.type is list:
            return f"[{', '.join(map(str, parts))}]"
        if spec.type is dict:
            return (
                "{"
                + ", ".join(f"{code.constant(k)}: {part}" for k, part in zip(spec.context, parts, strict=True))
                + "}"
            )
        known = children_of(spec.type)
        if known is None:
            return None
        children, statics = known
        fields = [f"{field}={part}" for field, part in zip(children, parts, strict=True)]
        fields += [f"{field}={code.constant(value)}" for field, value in zip(statics, spec.context, strict=True)]
        return f"made({code.constant(spec.type)}, {', '.join(fields)})"

    expression = visit(structure)
    if expression is None:
        return lambda leaves: torch.utils._pytree.tree_unflatten(leaves, structure)
    code.constants["made"] = _made
    code.lines.append(f"return {expression}")
    function: Callable[[list[Any]], Any] = code.function("def unflatten(leaves):")
    return function


def _made(cls: type, /, **fields: Any) -> Any:
    """An instance without `__init__`, as `rlcore.tree` makes it."""
    new: Any = object.__new__(cls)
    new.__dict__.update(fields)
    return new
