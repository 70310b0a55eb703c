"""Code for one structure does what tree_flatten and tree_unflatten do, and knows what it was not written for."""

import pytest
import torch

from rlcore.tree import pytree, static, tree_flatten, tree_unflatten
from rlcore.treecode import flattener, unflattener


@pytree
class Inner:
    x: torch.Tensor
    more: dict[str, torch.Tensor]


@pytree
class Outer:
    inner: Inner
    pair: tuple[torch.Tensor, list[torch.Tensor]]
    kind: str = static(default="plain")


def make(kind="plain", rows=3, dtype=torch.float32, names=("a", "b"), extra=0):
    x = torch.arange(rows * 2, dtype=dtype).reshape(rows, 2)
    return Outer(Inner(x, dict.fromkeys(names, x[:, 0])), (x + 1, [x * 2] * (1 + extra)), kind)


def test_takes_apart_and_puts_together_as_the_general_functions_do():
    tree = ((make(), torch.ones(3)), {"y": make()})
    leaves, structure = tree_flatten(tree)
    flatten, unflatten = flattener(structure, leaves), unflattener(structure)
    assert flatten is not None
    other = ((make(), torch.zeros(3)), {"y": make()})
    got, wanted = flatten(other), tree_flatten(other)[0]
    assert got is not None and len(got) == len(wanted)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    rebuilt = unflatten(got)
    assert tree_flatten(rebuilt)[1] == structure
    assert type(rebuilt[0][0]) is Outer and rebuilt[0][0].kind == "plain"
    assert all(a is b for a, b in zip(tree_flatten(rebuilt)[0], got, strict=True))


@pytest.mark.parametrize(
    "other",
    [
        make(kind="other"),
        make(rows=4),
        make(dtype=torch.float64),
        make(names=("a", "c")),
        make(names=("b", "a")),
        make(names=("a",)),
        make(extra=1),
        make().inner,
        None,
        torch.ones(3),
        Outer(make().inner, [*make().pair], "plain"),  # type: ignore[arg-type]
        Outer(make().inner, (make().pair[0].T.contiguous().T, make().pair[1]), "plain"),
        Outer(make().inner, (torch.nn.Parameter(make().pair[0]), make().pair[1]), "plain"),
        Outer(make().inner, (make().pair[0].to("meta"), make().pair[1]), "plain"),
        Outer(make().inner, (1.0, make().pair[1]), "plain"),  # type: ignore[arg-type]
    ],
)
def test_a_tree_that_differs_is_refused(other):
    leaves, structure = tree_flatten(make())
    flatten = flattener(structure, leaves)
    assert flatten is not None and flatten(make()) is not None
    assert flatten(other) is None


def test_no_code_for_leaves_and_nodes_that_it_does_not_know():
    for tree in ((torch.ones(2), 3.0), torch.nn.Parameter(torch.ones(2)), torch.ones(2, device="meta")):
        leaves, structure = tree_flatten(tree)
        assert flattener(structure, leaves) is None
    unknown = torch.return_types.max((torch.ones(2), torch.ones(2)))  # a node of another kind
    leaves, structure = tree_flatten(unknown)
    assert flattener(structure, leaves) is None
    again = unflattener(structure)(leaves)
    assert tree_flatten(again)[1] == tree_flatten(tree_unflatten(leaves, structure))[1]


def test_keys_of_any_kind():
    tree = {torch.float32: torch.ones(2), float("inf"): torch.zeros(2), ("a", 1): torch.ones(1)}
    leaves, structure = tree_flatten(tree)
    flatten = flattener(structure, leaves)
    assert flatten is not None and len(flatten(tree) or []) == 3
    assert unflattener(structure)(leaves).keys() == tree.keys()
