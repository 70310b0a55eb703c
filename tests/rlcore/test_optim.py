"""Adam and clipping against torch.optim, finite differences, loops and the compiler."""

import math

import pytest
import torch

from rlcore import random
from rlcore.optim import AdamState, adam_init, adam_update, clip_by_global_norm, global_norm
from rlcore.tree import index, map_leaves, stack, tree_leaves, where


def _tree(seed: int, dtype: torch.dtype = torch.float64) -> dict:
    keys = random.split(random.key(seed), 3)
    return {
        "layers": [{"weight": random.normal(keys[0], (4, 3), dtype), "bias": random.normal(keys[1], (4,), dtype)}],
        "log_alpha": random.normal(keys[2], (), dtype),
    }


def _assert_same(a, b, **tolerance) -> None:
    for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True):
        torch.testing.assert_close(x, y, **tolerance)


def _assert_equal(a, b) -> None:
    _assert_same(a, b, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("b1", "b2", "eps"), [(0.9, 0.999, 1e-8), (0.5, 0.95, 1e-3), (0.0, 0.9, 1e-5)])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
def test_adam_follows_torch_optim(weight_decay, b1, b2, eps, dtype, rtol):
    params = _tree(0, dtype)
    reference = [p.clone().requires_grad_() for p in tree_leaves(params)]
    # Without weight decay the two are one algorithm, written twice.
    optimizer_class = torch.optim.AdamW if weight_decay else torch.optim.Adam
    optimizer = optimizer_class(reference, lr=0.01, betas=(b1, b2), eps=eps, weight_decay=weight_decay)
    state = adam_init(params)
    for step in range(30):
        learning_rate = 0.01 / (1 + step)
        grads = _tree(100 + step, dtype)
        for p, g in zip(reference, tree_leaves(grads), strict=True):
            p.grad = g.clone()
        optimizer.param_groups[0]["lr"] = learning_rate
        optimizer.step()
        params, state = adam_update(grads, state, params, learning_rate, b1, b2, eps, weight_decay)
        _assert_same(tree_leaves(params), [p.detach() for p in reference], rtol=rtol, atol=rtol)
    assert state.step.item() == 30
    assert state.step.dtype == torch.int64
    assert {leaf.dtype for leaf in tree_leaves((params, state.mu, state.nu))} == {dtype}


def test_first_step_by_hand():
    # After one step the corrected moments are g and g^2: the step is lr * g / (|g| + eps), lr times the sign.
    params = {"w": torch.tensor([1.0, -2.0], dtype=torch.float64)}
    grads = {"w": torch.tensor([1e-3, -5.0], dtype=torch.float64)}
    new, state = adam_update(grads, adam_init(params), params, 0.1)
    expected = torch.tensor([1.0 - 0.1 * 1e-3 / (1e-3 + 1e-8), -2.0 + 0.1 * 5 / (5 + 1e-8)], dtype=torch.float64)
    torch.testing.assert_close(new["w"], expected, rtol=1e-13, atol=0.0)
    torch.testing.assert_close(state.mu["w"], 0.1 * grads["w"])
    torch.testing.assert_close(state.nu["w"], 0.001 * grads["w"] ** 2)


def test_zero_gradients_move_nothing():
    params = _tree(1, torch.float32)
    new, _ = adam_update(map_leaves(torch.zeros_like, params), adam_init(params), params, 0.1)
    _assert_equal(new, params)


def test_adam_writes_into_nothing_and_repeats_itself():
    params, grads = _tree(2), _tree(3)
    state = adam_update(_tree(4), adam_init(params), params, 0.01)[1]
    kept = map_leaves(torch.clone, (params, grads, state))
    first = adam_update(grads, state, params, 0.01, weight_decay=0.1)
    _assert_equal((params, grads, state), kept)
    _assert_equal(adam_update(grads, state, params, 0.01, weight_decay=0.1), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tensor_learning_rate_equals_a_number_and_keeps_dtypes(dtype):
    params, grads = _tree(5, torch.float32), _tree(6, torch.float32)
    state = adam_init(params)
    by_number = adam_update(grads, state, params, 0.25, weight_decay=0.5)
    as_tensors = torch.tensor(0.25, dtype=dtype), torch.tensor(0.5, dtype=dtype)
    by_tensor = adam_update(grads, state, params, as_tensors[0], weight_decay=as_tensors[1])
    _assert_same(by_tensor, by_number, rtol=1e-6, atol=1e-7)
    assert {leaf.dtype for leaf in tree_leaves(by_tensor[0])} == {torch.float32}


def test_a_population_with_its_own_learning_rates_equals_loop():
    members = [_tree(seed) for seed in range(3)]
    learning_rates = torch.tensor([1e-3, 1e-2, 0.1], dtype=torch.float64)

    def update(params, grads, learning_rate):
        grads, norm = clip_by_global_norm(grads, 1.0)
        state = adam_init(params)
        for _ in range(3):
            params, state = adam_update(grads, state, params, learning_rate, weight_decay=0.01)
        return params, state, norm

    grads = stack([_tree(10 + i) for i in range(3)])
    mapped = torch.vmap(update)(stack(members), grads, learning_rates)
    loop = stack([update(members[i], index(grads, i), learning_rates[i]) for i in range(3)])
    _assert_same(mapped, loop, rtol=1e-12, atol=1e-12)
    assert mapped[1].step.tolist() == [3, 3, 3]

    # One start and one gradient, many learning rates; then the population goes on from its own states.
    start = members[0]
    fan = torch.vmap(update, in_dims=(None, None, 0))(start, index(grads, 0), learning_rates)
    alone = [update(start, index(grads, 0), x) for x in learning_rates]
    _assert_same(fan, stack(alone), rtol=1e-12, atol=1e-12)
    params, state, _ = fan
    on = torch.vmap(lambda p, g, s, x: adam_update(g, s, p, x))(params, grads, state, learning_rates)
    expected = [adam_update(index(grads, i), alone[i][1], alone[i][0], learning_rates[i]) for i in range(3)]
    _assert_same(on, stack(expected), rtol=1e-12, atol=1e-12)


def test_gradient_through_an_update_equals_finite_differences():
    params, state = _tree(7), adam_init(_tree(7))
    state = adam_update(_tree(8), state, params, 0.1)[1]

    def after(grad: torch.Tensor, learning_rate: torch.Tensor) -> torch.Tensor:
        grads = _tree(9)
        grads["layers"][0]["bias"] = grad
        grads, _ = clip_by_global_norm(grads, 0.5)
        new, _ = adam_update(grads, state, params, learning_rate, weight_decay=0.1)
        return torch.cat([leaf.reshape(-1) for leaf in tree_leaves(new)])

    grad = _tree(9)["layers"][0]["bias"].requires_grad_()
    learning_rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(after, (grad, learning_rate))


def test_adam_finds_the_bottom_of_a_valley():
    # (x - 3)^2 + 100 (y + 1)^2, with its minimum at (3, -1).
    params = {"x": torch.zeros(()), "y": torch.zeros(())}
    state = adam_init(params)
    loss = torch.func.grad(lambda p: (p["x"] - 3) ** 2 + 100 * (p["y"] + 1) ** 2)
    for step in range(400):
        params, state = adam_update(loss(params), state, params, 0.1 * 0.99**step)
    assert [params["x"].item(), params["y"].item()] == pytest.approx([3.0, -1.0], abs=1e-2)


def test_what_does_not_fit_is_refused():
    params = {"w": torch.zeros(3)}
    state = adam_init(params)
    with pytest.raises(ValueError, match="grads must have the structure of params"):
        adam_update({"v": torch.zeros(3)}, state, params, 0.1)
    # A gradient of another shape would broadcast without a word.
    with pytest.raises(ValueError, match=r"grads must have the shapes of params, got \(1,\) for \(3,\)"):
        adam_update({"w": torch.zeros(1)}, state, params, 0.1)
    with pytest.raises(ValueError, match=r"state\.mu must have the structure of params"):
        adam_update(params, AdamState(state.step, {}, state.nu), params, 0.1)
    for name, value in (("b1", 1.0), ("b2", -0.1), ("eps", -1e-8), ("eps", math.nan)):
        with pytest.raises(ValueError, match=f"{name} must be at least 0"):
            adam_update(params, state, params, 0.1, **{name: value})
    for fn in (adam_init, global_norm):
        with pytest.raises(ValueError, match="must have at least one leaf, got none"):
            fn({})
    for max_norm in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="max_norm must be above 0"):
            clip_by_global_norm(params, max_norm)


def test_global_norm_by_hand():
    tree = {"a": torch.tensor([[2.0, 3.0]]), "b": torch.tensor(6.0)}  # 4 + 9 + 36 = 49
    assert global_norm(tree).item() == 7.0
    assert global_norm(tree).dtype == torch.float32
    assert global_norm({"a": torch.tensor([3e30, 4e30])}).item() == pytest.approx(5e30)
    assert global_norm({"a": torch.zeros(3)}).item() == 0.0


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 1e3])
def test_clipping_agrees_with_torch(max_norm):
    grads = _tree(11)
    leaves = [g.clone().requires_grad_() for g in tree_leaves(grads)]
    for leaf in leaves:
        leaf.grad = leaf.detach().clone()
    expected_norm = torch.nn.utils.clip_grad_norm_(leaves, max_norm)
    clipped, norm = clip_by_global_norm(grads, max_norm)
    torch.testing.assert_close(norm, expected_norm)
    # torch divides by the norm plus 1e-6.
    _assert_same(tree_leaves(clipped), [leaf.grad for leaf in leaves], rtol=1e-5, atol=0.0)
    assert global_norm(clipped).item() == pytest.approx(min(max_norm, norm.item()), rel=1e-12)
    _assert_equal(clip_by_global_norm(grads, torch.tensor(max_norm, dtype=torch.float64)), (clipped, norm))


def test_gradients_within_the_limit_come_back_bit_for_bit():
    grads = _tree(12, torch.float32)
    limit = global_norm(grads).item()
    _assert_equal(clip_by_global_norm(grads, limit)[0], grads)
    _assert_equal(clip_by_global_norm(grads, 10 * limit)[0], grads)
    zeros = map_leaves(torch.zeros_like, grads)
    clipped, norm = clip_by_global_norm(zeros, 1.0)
    _assert_equal(clipped, zeros)
    assert norm.item() == 0.0
    slope = torch.func.grad(lambda g: global_norm(clip_by_global_norm(g, 1.0)[0]))(zeros)
    assert all(leaf.isfinite().all() for leaf in tree_leaves(slope))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_gradients_that_are_not_finite_become_zero_and_are_told(bad):
    grads = _tree(13, torch.float32)
    grads["layers"][0]["bias"] = grads["layers"][0]["bias"].clone()
    grads["layers"][0]["bias"][2] = bad
    clipped, norm = clip_by_global_norm(grads, 1.0)
    assert not norm.isfinite()
    _assert_equal(clipped, map_leaves(torch.zeros_like, grads))

    # The recipe of the docstring: nothing moves, not even by momentum.
    params = _tree(14, torch.float32)
    state = adam_update(_tree(15, torch.float32), adam_init(params), params, 0.1)[1]
    new = adam_update(clipped, state, params, 0.1)
    assert not torch.equal(new[0]["layers"][0]["weight"], params["layers"][0]["weight"])
    _assert_equal(where(norm.isfinite(), new, (params, state)), (params, state))


# A whole update as an algorithm makes it, compiled as one graph. It runs in a process of its own, where no
# annotations are checked: those checks cannot be compiled.
COMPILED = """
import torch
from rlcore import distributions, networks, normalize, optim, random, returns, tree

network = networks.mlp([3, 16, 2], "elu", layer_norm=True)
critic = networks.mlp([3, 16, 1], "silu")
keys = random.split(random.key(0), 6)
params = {"policy": network.init(keys[0]), "log_std": torch.zeros(2), "critic": critic.init(keys[1])}
obs = random.normal(keys[2], (9, 5, 3))
action = random.normal(keys[3], (8, 5, 2)).tanh()
reward, ended = random.normal(keys[4], (8, 5)), random.normal(keys[5], (8, 5)) > 1.0

def loss(params, obs):
    value = critic.apply(params["critic"], obs).squeeze(-1)
    mean = network.apply(params["policy"], obs[:-1])
    rest = 0.9 * torch.where(ended, 0.0, 1.0), value[1:], torch.where(ended, 0.0, 1.0)
    advantage = returns.gae(reward, rest[0], value[:-1], *rest[1:], 0.95)
    target = (
        returns.lambda_returns(reward, *rest, 0.9)
        + returns.n_step_returns(reward, *rest, 3)
        + returns.discounted_returns(reward, *rest)
    )
    log_prob = distributions.gaussian_log_prob(mean, params["log_std"], action)
    log_prob = log_prob + distributions.tanh_gaussian_log_prob(mean, params["log_std"], action)
    kl = distributions.gaussian_kl(mean, params["log_std"], mean.detach() + 0.1, params["log_std"])
    entropy = distributions.gaussian_entropy(params["log_std"])
    return (kl - log_prob * advantage.detach() + (value[:-1] - target).square()).mean() - 0.01 * entropy

def update(params, state, moments, learning_rate):
    moments = normalize.moments_update(moments, obs)
    grads, value = torch.func.grad_and_value(loss)(params, normalize.normalize(moments, obs))
    grads, norm = optim.clip_by_global_norm(grads, 0.5)
    params, state = optim.adam_update(grads, state, params, learning_rate, weight_decay=0.01)
    return params, state, moments, value, norm

def population(params, state, moments, learning_rates):
    return torch.vmap(update, in_dims=(None, None, None, 0))(params, state, moments, learning_rates)

torch.set_num_threads(1)
start = params, optim.adam_init(params), normalize.moments_init(3)
for fn, learning_rate in ((update, torch.tensor(0.01)), (population, torch.tensor([0.001, 0.01, 0.1]))):
    compiled = torch.compile(fn, backend="aot_eager", fullgraph=True)(*start, learning_rate)
    eager = fn(*start, learning_rate)
    for a, b in zip(tree.tree_leaves(compiled), tree.tree_leaves(eager), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert len(tree.tree_leaves(eager)) > 30
print("compiled equals eager")
"""


def test_compiled_update_equals_eager(run_python):
    assert run_python(COMPILED).strip() == "compiled equals eager"
