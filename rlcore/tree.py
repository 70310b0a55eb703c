"""State as trees of tensors.

Everything that a step needs is a leaf of such a tree, so that saving the tree saves the run. A state is a
frozen dataclass decorated with `pytree`: it passes through `torch.func` transforms and `torch.compile`, and
its static fields ride along unchanged. This module never copies a leaf to another device or dtype.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, dataclass_transform

import torch
import torch.utils._pytree as torch_pytree

T = TypeVar("T")

tree_map = torch_pytree.tree_map
tree_leaves = torch_pytree.tree_leaves
tree_flatten = torch_pytree.tree_flatten
tree_unflatten = torch_pytree.tree_unflatten


def static(**kwargs: Any) -> Any:
    """A dataclass field that is part of the tree's structure, not of its leaves.

    Its value must be hashable and comparable: two trees fit together only where their static fields agree.
    """
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclass_transform(frozen_default=True, field_specifiers=(static, dataclasses.field))
def pytree(cls: type[T]) -> type[T]:
    """Make `cls` a frozen dataclass whose non-static fields are children of a pytree."""
    data_cls: Any = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(data_cls)
    children = tuple(f.name for f in fields if not f.metadata.get("static"))
    statics = tuple(f.name for f in fields if f.metadata.get("static"))

    def flatten(value: Any) -> tuple[list[Any], tuple[Any, ...]]:
        return [getattr(value, name) for name in children], tuple(getattr(value, name) for name in statics)

    def unflatten(values: Any, context: tuple[Any, ...]) -> Any:
        # `__init__` would run validation on tracers and placeholders, so fields are set directly.
        new = object.__new__(data_cls)
        for name, value in zip(children, values, strict=True):
            object.__setattr__(new, name, value)
        for name, value in zip(statics, context, strict=True):
            object.__setattr__(new, name, value)
        return new

    def flatten_with_keys(value: Any) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        values, context = flatten(value)
        return [(torch_pytree.GetAttrKey(n), v) for n, v in zip(children, values, strict=True)], context

    torch_pytree.register_pytree_node(
        data_cls,
        flatten,
        unflatten,
        serialized_type_name=f"{data_cls.__module__}.{data_cls.__qualname__}",
        flatten_with_keys_fn=flatten_with_keys,
    )
    _known[data_cls] = children, statics
    return data_cls


_known: dict[type, tuple[tuple[str, ...], tuple[str, ...]]] = {}


def children_of(cls: type) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """The names of the children and of the static fields of a `pytree` class; None for another class."""
    return _known.get(cls)


def replace(tree: T, **changes: Any) -> T:
    """`tree` with some fields exchanged: `dataclasses.replace` under a shorter name."""
    return dataclasses.replace(tree, **changes)  # type: ignore[type-var]


def map_leaves(fn: Callable[..., Any], tree: T, *others: Any) -> T:
    """Apply `fn` to the leaves of trees of one structure.

    Raises:
      ValueError: if the trees' structures (static fields included) differ.
    """
    leaves, structure = tree_flatten(tree)
    columns = [leaves]
    for other in others:
        column = structure.flatten_up_to(other)
        # A leaf of the first tree may stand where another has a whole branch.
        if not all(torch_pytree.tree_is_leaf(leaf) for leaf in column):
            raise ValueError(f"trees of one structure are needed, got {structure} and {tree_flatten(other)[1]}")
        columns.append(column)
    return tree_unflatten([fn(*row) for row in zip(*columns, strict=True)], structure)


def where(condition: torch.Tensor, if_true: T, if_false: T) -> T:
    """Choose between two trees leaf by leaf.

    Args:
      condition: bool `[...]`; it is aligned with each leaf's leading axes, so a `[B]` condition chooses rows.
      if_true, if_false: trees of one structure, each leaf `[..., *any]`.

    Raises:
      ValueError: if a leaf has fewer axes than `condition`, or the structures differ.
    """

    def choose(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if a.ndim < condition.ndim:
            shapes = f"{tuple(condition.shape)}, got one of shape {tuple(a.shape)}"
            raise ValueError(f"every leaf needs the axes of the condition {shapes}")
        shaped = condition.reshape(condition.shape + (1,) * (a.ndim - condition.ndim))
        return torch.where(shaped, a, b)

    return map_leaves(choose, if_true, if_false)


def stack(trees: Sequence[T], dim: int = 0) -> T:
    """Stack trees of one structure: leaves `[...]` become `[len(trees), ...]`.

    Raises:
      ValueError: if `trees` is empty.
    """
    if not trees:
        raise ValueError("stack needs at least one tree, got none")
    return map_leaves(lambda *leaves: torch.stack(leaves, dim), trees[0], *trees[1:])


def index(tree: T, i: Any) -> T:
    """Index every leaf's leading axes: `index(stack(trees), i)` equals `trees[i]`."""
    return map_leaves(lambda leaf: leaf[i], tree)


def named_leaves(tree: Any) -> list[tuple[str, torch.Tensor]]:
    """The leaves with their paths, such as `("params.policy.0.weight", tensor)`, in flattening order."""

    def name(path: Sequence[Any]) -> str:
        parts = []
        for key in path:
            for attribute in ("name", "key", "idx"):
                if hasattr(key, attribute):
                    parts.append(str(getattr(key, attribute)))
                    break
        return ".".join(parts)

    leaves, _ = torch_pytree.tree_flatten_with_path(tree)
    return [(name(path), leaf) for path, leaf in leaves]
