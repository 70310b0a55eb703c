"""Adam as a function of gradients, state and parameters.

The moments are a tree like the parameters and the learning rate is an argument, so a schedule is a function
of the caller's counters, and a population with a learning rate each is one `torch.func.vmap`. This module
never writes into its arguments, never waits for the device, and holds no hyperparameters between calls.
"""

from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlcore.fusion import square_root
from rlcore.tree import map_leaves, pytree, tree_flatten, tree_leaves, tree_unflatten

Params = TypeVar("Params")


@pytree
class AdamState:
    """What Adam remembers; a population puts its axis in front of every leaf."""

    step: Int[Tensor, "..."]  # Number of updates made, int64.
    mu: Any  # Tree like the parameters: running mean of the gradients.
    nu: Any  # Tree like the parameters: running mean of the squared gradients.


def adam_init(params: Any) -> AdamState:
    """State before the first update: step 0 and zero moments, in the parameters' dtypes.

    Raises:
      ValueError: if `params` has no leaves.
    """
    leaves = _leaves("params", params)
    step = torch.zeros((), dtype=torch.int64, device=leaves[0].device)
    return AdamState(step, map_leaves(torch.zeros_like, params), map_leaves(torch.zeros_like, params))


def adam_update(
    grads: Params,
    state: AdamState,
    params: Params,
    learning_rate: float | Float[Tensor, ""],
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float | Float[Tensor, ""] = 0.0,
) -> tuple[Params, AdamState]:
    """One step of Adam, or of AdamW where `weight_decay` is not zero.

    `mu = b1 mu + (1 - b1) g`, `nu = b2 nu + (1 - b2) g^2`,
    `p = p (1 - learning_rate weight_decay) - learning_rate mu_hat / (sqrt(nu_hat) + eps)`,
    with `mu_hat = mu / (1 - b1^step)` and `nu_hat = nu / (1 - b2^step)`.

    Sources: Kingma and Ba 2014, "Adam", https://arxiv.org/abs/1412.6980; Loshchilov and Hutter 2017,
    "Decoupled Weight Decay Regularization", https://arxiv.org/abs/1711.05101.

    Args:
      grads: tree like `params`.
      state: from `adam_init` or the update before.
      params: tree of floating point tensors.
      learning_rate: number, or tensor `[]`.
      b1, b2: decays of the two moments, in [0, 1).
      eps: added to the root of the second moment, at least 0.
      weight_decay: shrinks every parameter, biases included, apart from the gradient; number, or tensor `[]`.

    Returns:
      The new parameters and the new state.

    Raises:
      ValueError: if the trees differ in structure or in the shape of a leaf, there are no leaves, or `b1`,
        `b2` or `eps` is out of its range.
    """
    for name, value in (("b1", b1), ("b2", b2)):
        if not 0.0 <= value < 1.0:
            raise ValueError(f"{name} must be at least 0 and below 1, got {value}")
    if not eps >= 0.0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    leaves, structure = tree_flatten(params)
    if not leaves:
        raise ValueError("params must have at least one leaf, got none")
    others = []
    for name, tree in (("grads", grads), ("state.mu", state.mu), ("state.nu", state.nu)):
        other, other_structure = tree_flatten(tree)
        if other_structure != structure:
            raise ValueError(f"{name} must have the structure of params, {structure}, got {other_structure}")
        for p, x in zip(leaves, other, strict=True):
            if x.shape != p.shape:
                raise ValueError(f"{name} must have the shapes of params, got {tuple(x.shape)} for {tuple(p.shape)}")
        others.append(other)

    # The bias corrections are taken out of the loop over the leaves, and in float64: for b2 = 0.999 the first
    # one is 1 - 0.999, of which float32 would lose four digits.
    step = state.step + 1
    exponent = step.to(torch.float64)
    root_correction = (1.0 - b2**exponent).sqrt()
    step_size = learning_rate * root_correction / (1.0 - b1**exponent)
    scaled_eps = eps * root_correction
    keep = None
    if isinstance(weight_decay, Tensor) or weight_decay != 0.0:
        keep = 1.0 - learning_rate * weight_decay

    # Scalars are cast to each leaf's dtype, since a leaf without axes would be promoted by them.
    # Plain products and sums, which a recording (`rlcore.jit`) gathers for all leaves.
    new_mu = [b1 * mu + (1.0 - b1) * g for g, mu in zip(others[0], others[1], strict=True)]
    new_nu = [b2 * nu + (1.0 - b2) * g * g for g, nu in zip(others[0], others[2], strict=True)]
    new_params = []
    for p, mu, nu in zip(leaves, new_mu, new_nu, strict=True):
        if keep is not None:
            p = p * (keep.to(p.dtype) if isinstance(keep, Tensor) else keep)
        new_params.append(p - step_size.to(p.dtype) * (mu / (square_root(nu) + scaled_eps.to(p.dtype))))
    moments = tree_unflatten(new_mu, structure), tree_unflatten(new_nu, structure)
    return tree_unflatten(new_params, structure), AdamState(step, *moments)


def global_norm(tree: Any) -> Float[Tensor, ""]:
    """Euclidean norm of all leaves together, `sqrt(sum x^2)`, in the first leaf's dtype.

    It is summed in float64: squares of float32 numbers above 1e19 do not overflow on the way.

    Raises:
      ValueError: if `tree` has no leaves.
    """
    leaves = _leaves("tree", tree)
    if len({leaf.dtype for leaf in leaves}) == 1:
        numbers = torch.cat([leaf.reshape(-1) for leaf in leaves])
        return torch.linalg.vector_norm(numbers, dtype=torch.float64).to(leaves[0].dtype)
    norms = [torch.linalg.vector_norm(leaf, dtype=torch.float64) for leaf in leaves]
    return torch.linalg.vector_norm(torch.stack(norms)).to(leaves[0].dtype)


def clip_by_global_norm(grads: Params, max_norm: float | Float[Tensor, ""]) -> tuple[Params, Float[Tensor, ""]]:
    """Scale gradients down to a global norm of at most `max_norm`, and give the norm they had.

    Gradients within the limit, zeros included, come back bit for bit. Where the norm is not finite (a NaN or
    an infinity among the gradients), no scaling repairs them and all of them become zero. Adam still moves by
    its momentum then: to leave parameters and optimizer untouched, choose the old ones with
    `rlcore.tree.where(norm.isfinite(), new, old)`.

    Args:
      grads: tree of tensors.
      max_norm: above 0, a number or a tensor `[]`.

    Returns:
      The clipped gradients, and their global norm before clipping (not finite where they were not).

    Raises:
      ValueError: if `max_norm` is a number that is not above 0, or `grads` has no leaves.
    """
    if not isinstance(max_norm, Tensor) and not max_norm > 0.0:
        raise ValueError(f"max_norm must be above 0, got {max_norm}")
    norm = global_norm(grads)
    # A number becomes a tensor by a fill, which CUDA graphs can capture, and not by a copy from the host.
    limit = max_norm.to(norm) if isinstance(max_norm, Tensor) else norm.new_full((), max_norm)
    # Below the limit this is limit / limit, exactly 1, so there is no division by a zero norm.
    scale = limit / torch.maximum(norm, limit)
    finite = norm.isfinite()
    return map_leaves(lambda g: torch.where(finite, g * scale.to(g.dtype), 0.0), grads), norm


def _leaves(name: str, tree: Any) -> list[Tensor]:
    leaves = tree_leaves(tree)
    if not leaves:
        raise ValueError(f"{name} must have at least one leaf, got none")
    return leaves
