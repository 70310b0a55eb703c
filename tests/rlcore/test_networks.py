"""Networks against numpy, torch.nn, finite differences and loops."""

import math

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from rlcore import random
from rlcore.errors import InputError
from rlcore.networks import ACTIVATIONS, dead_units, linear, mlp, orthogonal
from rlcore.tree import index, map_leaves, named_leaves, tree_leaves

_erf = np.vectorize(math.erf)

# From their definitions, one by one.
NUMPY_ACTIVATIONS = {
    "elu": lambda x: np.where(x > 0, x, np.exp(x) - 1),
    "gelu": lambda x: x * (1 + _erf(x / math.sqrt(2))) / 2,
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "swish": lambda x: x / (1 + np.exp(-x)),
    "tanh": lambda x: (np.exp(x) - np.exp(-x)) / (np.exp(x) + np.exp(-x)),
}


def _perturbed(params, seed: int):
    """Parameters with nothing at its initial zero or one."""
    keys = iter(random.split(random.key(seed), len(tree_leaves(params))))
    return map_leaves(lambda p: p + 0.3 * random.normal(next(keys), p.shape), params)


def test_every_activation_has_a_reference():
    assert set(NUMPY_ACTIVATIONS) == set(ACTIVATIONS)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_mlp_equals_numpy(activation):
    network = mlp([3, 8, 8, 2], activation)
    params = map_leaves(torch.Tensor.double, _perturbed(network.init(random.key(0)), 1))
    x = random.normal(random.key(2), (5, 3), torch.float64)
    y = x.numpy()
    for i, layer in enumerate(params):
        y = y @ layer["weight"].numpy().T + layer["bias"].numpy()
        if i < 2:
            y = NUMPY_ACTIVATIONS[activation](y)
    np.testing.assert_allclose(network.apply(params, x).numpy(), y, rtol=1e-10, atol=1e-12)


def test_layer_norm_equals_torch_modules():
    network = mlp([3, 8, 6, 2], "elu", layer_norm=True)
    params = _perturbed(network.init(random.key(0)), 1)
    modules: list[torch.nn.Module] = []
    for i, layer in enumerate(params):
        linear = torch.nn.Linear(*reversed(layer["weight"].shape))
        linear.load_state_dict({"weight": layer["weight"], "bias": layer["bias"]})
        modules.append(linear)
        if i < 2:
            norm = torch.nn.LayerNorm(layer["scale"].shape[0])
            norm.load_state_dict({"weight": layer["scale"], "bias": layer["shift"]})
            modules += [norm, torch.nn.ELU()]
    x = random.normal(random.key(2), (4, 5, 3))
    with torch.no_grad():
        torch.testing.assert_close(network.apply(params, x), torch.nn.Sequential(*modules)(x))


def test_parameters_are_a_plain_tree_of_float32():
    params = mlp([3, 8, 2], layer_norm=True).init(random.key(0))
    shapes = {name: tuple(leaf.shape) for name, leaf in named_leaves(params)}
    assert shapes == {
        "0.weight": (8, 3),
        "0.bias": (8,),
        "0.scale": (8,),
        "0.shift": (8,),
        "1.weight": (2, 8),
        "1.bias": (2,),
    }
    assert {leaf.dtype for leaf in tree_leaves(params)} == {torch.float32}
    assert not params[0]["bias"].any()
    assert not params[1]["bias"].any()
    assert set(mlp([3, 8, 2]).init(random.key(0))[0]) == {"weight", "bias"}


@pytest.mark.parametrize(("rows", "columns"), [(64, 16), (16, 64), (16, 16), (5, 1), (1, 5), (1, 1)])
def test_orthogonal_vectors_have_the_length_of_the_gain(rows, columns):
    w = orthogonal(random.key(3), rows, columns, gain=1.5).double()
    assert w.shape == (rows, columns)
    gram = w.T @ w if rows >= columns else w @ w.T
    torch.testing.assert_close(gram, 2.25 * torch.eye(len(gram), dtype=torch.float64), rtol=0.0, atol=1e-6)


def test_orthogonal_matrices_prefer_no_direction():
    # An orthogonal matrix drawn uniformly has entries of mean 0 and variance 1/3 in three dimensions. Without
    # the correction of signs, a QR decomposition leaves the first entry with one sign only.
    n = 600
    draw = lambda key: orthogonal(key, 3, 3)  # noqa: E731
    entries = torch.vmap(draw)(random.split(random.key(4), n))
    assert (entries.mean(0).abs() < 5 * math.sqrt(1 / 3 / n)).all()
    torch.testing.assert_close(entries.square().mean(0), torch.full((3, 3), 1 / 3), rtol=0.0, atol=0.06)


def test_gains_of_hidden_and_last_layers():
    params = mlp([4, 16, 16, 3], final_scale=0.01).init(random.key(5))
    gains = [torch.linalg.matrix_norm(layer["weight"], 2).item() for layer in params]
    assert gains == pytest.approx([math.sqrt(2), math.sqrt(2), 0.01], rel=1e-5)
    assert not mlp([4, 3], final_scale=0.0).init(random.key(5))[0]["weight"].any()


def test_init_is_a_function_of_the_key():
    init = mlp([4, 16, 16, 3]).init
    first, again, other = init(random.key(0)), init(random.key(0)), init(random.key(1))
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a["weight"], b["weight"])
        assert not torch.equal(a["weight"], c["weight"])
    # The two hidden layers of one shape are draws of their own.
    square = mlp([16, 16, 16, 16]).init(random.key(0))
    assert not torch.equal(square[0]["weight"], square[1]["weight"])


@pytest.mark.parametrize("layer_norm", [False, True])
def test_population_init_equals_loop_for_any_size(layer_norm):
    init = mlp([12, 64, 32, 5], layer_norm=layer_norm).init
    keys = random.split(random.key(6), 7)
    population = torch.vmap(init)(keys)
    for i in range(7):
        for a, b in zip(tree_leaves(index(population, i)), tree_leaves(init(keys[i])), strict=True):
            assert torch.equal(a, b)
    for a, b in zip(tree_leaves(torch.vmap(init)(keys[:3])), tree_leaves(population), strict=True):
        assert torch.equal(a, b[:3])


def test_init_does_not_depend_on_the_number_of_threads():
    init = mlp([100, 128, 64]).init
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = init(random.key(7))
        torch.set_num_threads(2)
        two = init(random.key(7))
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(tree_leaves(one), tree_leaves(two), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_vmap_of_apply_equals_loop(layer_norm):
    network = mlp([3, 16, 2], "swish", layer_norm=layer_norm)
    params = torch.vmap(network.init)(random.split(random.key(8), 4))
    params = _perturbed(params, 9)
    x = random.normal(random.key(10), (4, 6, 3))
    torch.testing.assert_close(
        torch.vmap(network.apply)(params, x),
        torch.stack([network.apply(index(params, i), x[i]) for i in range(4)]),
    )
    one = index(params, 0)
    torch.testing.assert_close(torch.vmap(network.apply, (None, 0))(one, x[0]), network.apply(one, x[0]))
    torch.testing.assert_close(
        torch.vmap(network.apply, (0, None))(params, x[0]),
        torch.stack([network.apply(index(params, i), x[0]) for i in range(4)]),
    )
    nested = torch.vmap(torch.vmap(network.apply, (None, 0)))(params, x)
    torch.testing.assert_close(nested, torch.vmap(network.apply)(params, x))


def test_leading_axes_are_batch():
    network = mlp([3, 16, 2])
    params = network.init(random.key(11))
    x = random.normal(random.key(12), (5, 4, 3))
    y = network.apply(params, x)
    assert y.shape == (5, 4, 2)
    torch.testing.assert_close(network.apply(params, x[2, 1]), y[2, 1])


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("layer_norm", [False, True])
def test_gradients_equal_finite_differences(activation, layer_norm):
    network = mlp([3, 4, 2], activation, layer_norm=layer_norm)
    params = map_leaves(torch.Tensor.double, _perturbed(network.init(random.key(13)), 14))
    x = random.normal(random.key(15), (2, 3), torch.float64).requires_grad_()
    leaves, structure = torch.utils._pytree.tree_flatten(params)
    for leaf in leaves:
        leaf.requires_grad_()

    def apply(x, *leaves):
        return network.apply(torch.utils._pytree.tree_unflatten(list(leaves), structure), x)

    assert torch.autograd.gradcheck(apply, (x, *leaves))


def test_gradient_of_a_population_equals_loop():
    network = mlp([3, 8, 1], "tanh")
    params = torch.vmap(network.init)(random.split(random.key(16), 3))
    x = random.normal(random.key(17), (5, 3))
    loss = torch.func.grad(lambda params: network.apply(params, x).square().mean())
    mapped = torch.vmap(loss)(params)
    for i in range(3):
        for a, b in zip(tree_leaves(index(mapped, i)), tree_leaves(loss(index(params, i))), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dims", [(None, 0, 0), (0, 0, 0), (1, 1, 1), (0, None, None), (0, 0, None), (None, 0, None)])
@pytest.mark.parametrize("batch", [(), (5,), (2, 5)])
def test_layers_side_by_side_equal_a_loop_in_value_gradient_and_tangent(dims, batch):
    keys = iter(random.split(random.key(20), 9))
    sizes = [(*batch, 3), (4, 3), (4,)]
    if dims[0] == 1 and not batch:
        pytest.skip("the axis of members is behind one of a batch")
    given, tangents = [], []
    for size, dim in zip(sizes, dims, strict=True):
        shape = list(size)
        if dim is not None:
            shape.insert(dim, 6)
        given.append(random.normal(next(keys), tuple(shape), torch.float64))
        tangents.append(random.normal(next(keys), tuple(shape), torch.float64))

    def value(x, weight, bias):
        return linear(x, weight, bias).sin().sum()

    def at(tensors, i):
        return [t if dim is None else t.select(dim, i) for t, dim in zip(tensors, dims, strict=True)]

    def plain(x, weight, bias):
        return torch.nn.functional.linear(x, weight, bias).sin().sum()

    grads = torch.vmap(torch.func.grad(value, argnums=(0, 1, 2)), in_dims=dims)(*given)
    change = torch.func.jvp(lambda *t: torch.vmap(value, in_dims=dims)(*t), tuple(given), tuple(tangents))[1]
    outputs = torch.vmap(linear, in_dims=dims)(*given)
    for i in range(6):
        own = at(given, i)
        torch.testing.assert_close(outputs[i], torch.nn.functional.linear(*own))
        expected = torch.func.grad(plain, argnums=(0, 1, 2))(*own)
        for ours, theirs in zip(grads, expected, strict=True):
            torch.testing.assert_close(ours[i], theirs)
        moved = torch.func.jvp(plain, tuple(own), tuple(at(tangents, i)))[1]
        torch.testing.assert_close(change[i], moved)


def test_populations_of_stacked_networks_equal_loops():
    network = mlp([3, 8, 1], "tanh")
    params = torch.vmap(torch.vmap(network.init))(random.split(random.key(21), 6).reshape(2, 3, 2))
    x = random.normal(random.key(22), (2, 5, 3))

    def loss(critics, x):
        return torch.vmap(network.apply, in_dims=(0, None))(critics, x).square().mean()

    mapped = torch.vmap(torch.func.grad(loss))(params, x)
    for i in range(2):
        alone = torch.func.grad(loss)(index(params, i), x[i])
        for a, b in zip(tree_leaves(index(mapped, i)), tree_leaves(alone), strict=True):
            torch.testing.assert_close(a, b)


def test_gradients_of_networks_side_by_side_lie_row_by_row():
    weight, bias = torch.ones(2, 4, 3), torch.zeros(2, 4)
    x = random.normal(random.key(23), (5, 3))

    def loss(weight):
        return torch.vmap(linear, in_dims=(None, 0, 0))(x, weight, bias).square().sum()

    graph = make_fx(torch.func.grad(loss))(weight)
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    assert output.args[0].meta["val"].is_contiguous()


def test_a_traced_graph_equals_the_network():
    network = mlp([3, 8, 2], "gelu", layer_norm=True)
    params = network.init(random.key(18))
    x = random.normal(random.key(19), (5, 3))
    graph = make_fx(network.apply)(params, x)
    assert torch.equal(graph(params, x), network.apply(params, x))
    other = network.init(random.key(20))
    assert torch.equal(graph(other, 2 * x), network.apply(other, 2 * x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": [3]}, "sizes must give at least"),
        ({"sizes": [3, 0, 2]}, r"sizes must be integers of at least 1, got \(3, 0, 2\)"),
        ({"sizes": [3, True]}, "sizes must be integers"),
        ({"sizes": [3, 2], "activation": "mish"}, "activation must be one of elu, gelu, relu, .* got 'mish'"),
        ({"sizes": [3, 2], "final_scale": -1.0}, "final_scale must be finite and at least 0, got -1.0"),
        ({"sizes": [3, 2], "final_scale": math.nan}, "final_scale must be finite"),
    ],
)
def test_what_cannot_work_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        mlp(**arguments)


def test_inputs_and_parameters_that_do_not_fit_are_refused():
    network = mlp([3, 8, 2])
    params = network.init(random.key(0))
    with pytest.raises(ValueError, match=r"the input must be \[..., 3\], got shape \(5, 4\)"):
        network.apply(params, torch.zeros(5, 4))
    with pytest.raises(ValueError, match=r"the input must be \[..., 3\], got shape \(\)"):
        network.apply(params, torch.zeros(()))
    with pytest.raises(ValueError, match="params must be of 2 layers, got 1"):
        network.apply(params[:1], torch.zeros(3))


def test_dead_units_are_those_that_vary_no_more():
    network = mlp((3, 8, 6, 2), "elu")
    params = network.init(random.key(0))
    x = random.normal(random.key(1), (5, 40, 3))
    layers = network.hidden(params, x)
    assert [layer.shape for layer in layers] == [(5, 40, 8), (5, 40, 6)]
    assert torch.equal(torch.nn.functional.elu(x @ params[0]["weight"].mT + params[0]["bias"]), layers[0])
    last = layers[-1] @ params[-1]["weight"].mT + params[-1]["bias"]
    torch.testing.assert_close(last, network.apply(params, x))
    assert float(dead_units(layers)) == 0.0
    # Two of eight units far below zero, and one that is far above it but hardly moves.
    params[0]["bias"] = torch.tensor([-100.0, -100.0, 0, 0, 0, 0, 0, 0])
    params[1]["weight"][0] *= 1e-4
    params[1]["bias"] = torch.tensor([5.0, 0, 0, 0, 0, 0])
    assert float(dead_units(network.hidden(params, x))) == pytest.approx(3 / 14)
    assert float(dead_units([torch.ones(4, 6)])) == 1.0  # all of them
    assert float(dead_units([])) == 0.0
