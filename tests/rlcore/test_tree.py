"""Trees of tensors: what passes through transforms, and what is refused."""

import dataclasses

import pytest
import torch
from torch.func import grad, vmap

from rlcore.tree import (
    index,
    map_leaves,
    named_leaves,
    pytree,
    replace,
    stack,
    static,
    tree_flatten,
    tree_unflatten,
    where,
)


@pytree
class Inner:
    x: torch.Tensor
    y: torch.Tensor


@pytree
class Outer:
    inner: Inner
    extra: dict[str, torch.Tensor]
    name: str = static(default="a")


def make(offset=0.0, name="a"):
    leaves = torch.arange(6.0).reshape(2, 3) + offset
    return Outer(Inner(leaves, leaves[:, 0] * 10), {"k": leaves[0] - offset * 3}, name)


def assert_same(a, b):
    leaves, structure = tree_flatten(a)
    others, other_structure = tree_flatten(b)
    assert structure == other_structure
    assert all(torch.equal(x, y) for x, y in zip(leaves, others, strict=True))


def test_flatten_and_unflatten_are_inverse():
    leaves, structure = tree_flatten(make(name="b"))
    assert [tuple(leaf.shape) for leaf in leaves] == [(2, 3), (2,), (3,)]
    again = tree_unflatten(leaves, structure)
    assert again.name == "b"
    assert_same(again, make(name="b"))


def test_is_frozen_and_replaceable():
    tree = make()
    with pytest.raises(dataclasses.FrozenInstanceError):
        tree.name = "c"
    changed = replace(tree, name="c")
    assert (changed.name, tree.name) == ("c", "a")
    assert changed.inner is tree.inner


def test_static_fields_ride_through_transforms():
    tree = make(name="ride")
    out = vmap(lambda t: replace(t, x=2 * t.x))(tree.inner)
    assert torch.equal(out.x, 2 * tree.inner.x)
    mapped = vmap(lambda t: map_leaves(torch.neg, t), in_dims=0)(replace(tree, extra={"k": torch.ones(2, 1)}))
    assert mapped.name == "ride"
    gradient = grad(lambda t: (t.inner.x**2).sum() + t.extra["k"].sum())(tree)
    assert gradient.name == "ride"
    assert torch.equal(gradient.inner.x, 2 * tree.inner.x)
    assert torch.equal(gradient.extra["k"], torch.ones(3))


def test_unflattening_runs_no_checks():
    @pytree
    class Positive:
        x: torch.Tensor

        def __post_init__(self):
            if not self.x.sum() > 0:  # which a batched tensor could not answer
                raise ValueError("not positive")

    with pytest.raises(ValueError, match="not positive"):
        Positive(torch.tensor([-1.0]))
    assert torch.equal(vmap(lambda t: t.x + 1)(Positive(torch.ones(2))), torch.full((2,), 2.0))


def test_index_undoes_stack():
    trees = [make(float(i)) for i in range(3)]
    stacked = stack(trees)
    assert stacked.inner.x.shape == (3, 2, 3)
    for i, tree in enumerate(trees):
        assert_same(index(stacked, i), tree)
    assert_same(index(stacked, torch.tensor([2, 0])), stack([trees[2], trees[0]]))
    assert stack(trees, dim=1).inner.y.tolist() == [[0.0, 10.0, 20.0], [30.0, 40.0, 50.0]]
    with pytest.raises(ValueError, match="at least one tree"):
        stack([])


def test_where_chooses_rows_and_equals_vmapped_where():
    a, b = stack([make(float(i)) for i in range(4)]), stack([make(float(-i - 1)) for i in range(4)])
    condition = torch.tensor([True, False, False, True])
    chosen = where(condition, a, b)
    expected = stack([index(a if c else b, i) for i, c in enumerate(condition.tolist())])
    assert_same(chosen, expected)
    assert_same(vmap(where)(condition, a, b), expected)
    assert_same(where(torch.tensor(False), a, b), b)


def test_where_refuses_leaves_with_too_few_axes():
    with pytest.raises(ValueError, match=r"condition \(2,\), got one of shape \(\)"):
        where(torch.tensor([True, False]), torch.tensor(1.0), torch.tensor(2.0))


@pytest.mark.parametrize(
    "other",
    [
        make(name="b"),
        replace(make(), extra={}),
        make().inner,
        replace(make(), extra={"k": {"deep": torch.ones(3)}}),
    ],
    ids=["static field", "missing key", "other class", "branch for a leaf"],
)
def test_structures_must_agree(other):
    for call in (lambda: map_leaves(lambda a, b: a, make(), other), lambda: stack([make(), other])):
        with pytest.raises(ValueError, match=r"."):
            call()


def test_map_leaves_goes_through_trees_side_by_side():
    total = map_leaves(lambda a, b, c: a + b - c, make(1.0), make(2.0), make(3.0))
    assert_same(total, make(0.0))


def test_leaves_are_named_by_their_paths():
    tree = {"params": make(), "list": [torch.ones(1), (torch.zeros(2),)]}
    names = dict(named_leaves(tree))
    assert set(names) == {"params.inner.x", "params.inner.y", "params.extra.k", "list.0", "list.1.0"}
    assert [name for name, _ in named_leaves(make())] == ["inner.x", "inner.y", "extra.k"]
    assert torch.equal(names["list.1.0"], torch.zeros(2))
    assert named_leaves(torch.ones(1))[0][0] == ""


COMPILED = """
import torch
from tests.rlcore.test_tree import assert_same, make
from rlcore.tree import map_leaves, replace, where
first = torch.tensor([True, False])
fn = lambda t: replace(where(first, t.inner, map_leaves(torch.neg, t.inner)), y=t.inner.y * 2)
assert_same(torch.compile(fn, backend="aot_eager", fullgraph=True)(make()), fn(make()))
print("done")
"""


def test_compiles(run_python):
    assert run_python(COMPILED) == "done\n"
