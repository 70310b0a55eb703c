"""Symmetric networks: their property for any parameters, the same numbers from the dense formula, and gradients."""

import math

import pytest
import torch
from torch.func import grad, vmap

from rlcore import random
from rlcore.errors import InputError
from rlcore.networks import mlp
from rlcore.symmetric_networks import symmetric_mlp
from rlcore.symmetry import SignedPermutation, apply
from rlcore.tree import map_leaves, stack, tree_leaves


def mirror(permutation, sign):
    return SignedPermutation(torch.tensor(permutation), torch.tensor(sign))


# Two pairs, one of which changes its sign, one number that stays and one that changes its sign.
SEEN = mirror([1, 0, 4, 3, 2, 5], [1.0, 1.0, -1.0, 1.0, -1.0, -1.0])
DONE = mirror([1, 0, 2], [1.0, 1.0, -1.0])
ALL_EVEN, ALL_ODD = mirror([0, 1], [1.0, 1.0]), mirror([0, 1], [-1.0, -1.0])


def some(network, seed=1):
    """Parameters with nothing at its initial zero, in float64."""
    params = network.init(random.key(0))
    keys = iter(random.split(random.key(seed), len(tree_leaves(params))))
    return map_leaves(lambda p: p.double() + 0.3 * random.normal(next(keys), p.shape, torch.float64), params)


@pytest.mark.parametrize(
    ("before", "after"), [(SEEN, DONE), (SEEN, None), (ALL_EVEN, DONE), (ALL_ODD, DONE), (ALL_ODD, ALL_ODD)]
)
def test_the_answer_to_a_mirror_image_is_the_mirror_image_of_the_answer(before, after):
    sizes = (len(before.sign), 8, 6, 1 if after is None else len(after.sign))
    network = symmetric_mlp(sizes, before, after, "tanh")
    params = some(network)
    x = random.normal(random.key(2), (4, 5, sizes[0]), torch.float64)
    answer, image = network.apply(params, x), network.apply(params, apply(before, x))
    assert answer.shape == (4, 5, sizes[-1])
    torch.testing.assert_close(image, answer if after is None else apply(after, answer), rtol=1e-12, atol=1e-14)
    # It is no constant.
    assert float(answer.std(0).max()) > 0.01


def test_layers_by_hand():
    """Without hidden layers: left, right and sideways to left, right and sideways."""
    network = symmetric_mlp((3, 3), DONE, DONE)
    params = [
        {
            "even": torch.tensor([[2.0]]),
            "odd": torch.tensor([[1.0, 3.0], [5.0, 7.0]]),
            "bias": torch.tensor([0.5]),
        }
    ]
    # The parts of (4, 2, 1): even (4 + 2) / sqrt 2; odd (4 - 2) / sqrt 2 and 1.
    even, odd = 6 / math.sqrt(2), (2 / math.sqrt(2), 1.0)
    even_out = 2 * even + 0.5
    odd_out = (odd[0] + 3 * odd[1], 5 * odd[0] + 7 * odd[1])
    expected = [(even_out + odd_out[0]) / math.sqrt(2), (even_out - odd_out[0]) / math.sqrt(2), odd_out[1]]
    torch.testing.assert_close(network.apply(params, torch.tensor([4.0, 2.0, 1.0])), torch.tensor(expected))


def test_it_begins_as_an_orthogonal_network():
    sizes = (6, 16, 16, 3)
    params = symmetric_mlp(sizes, SEEN, DONE, final_scale=0.01).init(random.key(0))
    for i, layer in enumerate(params):
        gain = 0.01 if i == 2 else math.sqrt(2)
        assert not layer["bias"].any()
        for block in (layer["even"], layer["odd"]):
            short = block if block.shape[0] <= block.shape[1] else block.mT
            torch.testing.assert_close(short @ short.mT, gain**2 * torch.eye(len(short)), rtol=1e-5, atol=1e-6)
    # Half the parameters of a network that is not symmetric.
    count = sum(x.numel() for x in tree_leaves(params))
    assert count < 0.55 * sum(x.numel() for x in tree_leaves(mlp(sizes).init(random.key(0))))


def test_gradients_are_finite_differences_and_vmap_is_a_loop():
    network = symmetric_mlp((6, 8, 3), SEEN, DONE, "tanh")
    params, x = some(network), random.normal(random.key(2), (6,), torch.float64)
    loss = lambda p: network.apply(p, x).square().sum()  # noqa: E731
    slope = grad(loss)(params)
    for i in range(3):
        direction = map_leaves(lambda p, i=i: random.normal(random.key(10 + i), p.shape, p.dtype), params)
        up, down = (float(loss(map_leaves(lambda p, d, s=s: p + s * d, params, direction))) for s in (1e-6, -1e-6))
        along = sum(float((g * d).sum()) for g, d in zip(tree_leaves(slope), tree_leaves(direction), strict=True))
        assert (up - down) / 2e-6 == pytest.approx(along, rel=1e-6)
    many = [some(network, seed) for seed in (1, 2, 3)]
    together = vmap(network.apply, in_dims=(0, None))(stack(many), x)
    for params, answer in zip(many, together, strict=True):
        torch.testing.assert_close(network.apply(params, x), answer, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: symmetric_mlp((6, 7, 3), SEEN, DONE), r"even sizes, got \(7,\)"),
        (lambda: symmetric_mlp((5, 8, 3), SEEN, DONE), "mirror_in must map 5 numbers, got 6"),
        (lambda: symmetric_mlp((6, 8, 2), SEEN, DONE), "mirror_out must map 2 numbers, got 3"),
        (lambda: symmetric_mlp((3, 3), mirror([1, 2, 0], [1.0, 1.0, 1.0]), DONE), "mirror_in must be its own inverse"),
        (lambda: symmetric_mlp((3, 3), mirror([1, 0, 2], [1.0, -1.0, 1.0]), DONE), "mirror_in must be its own"),
    ],
)
def test_mistakes_are_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()
