"""Tensors of torch and of the simulator, over the same memory."""

import weakref

import torch

from isaacgym.gymapi import RuleBroken, Tensor


def wrap_tensor(gym_tensor):
    """The simulator's tensor as one of torch."""
    return torch.from_numpy(gym_tensor.array)


def unwrap_tensor(torch_tensor):
    """A tensor of torch for the simulator, which keeps nothing but its address."""
    if not torch_tensor.is_contiguous():
        raise RuleBroken("a tensor for the simulator must be contiguous")
    tensor = Tensor()
    tensor.array = torch_tensor.detach().numpy()
    tensor.shape, tensor.dtype = tuple(torch_tensor.shape), tensor.array.dtype.name
    # The array holds the memory and not the tensor, so the tensor's end can be seen.
    tensor.source = weakref.ref(torch_tensor)
    return tensor
