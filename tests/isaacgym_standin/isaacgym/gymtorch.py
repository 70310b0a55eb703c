"""Tensors of torch and of the simulator, over the same memory."""

import os
import weakref

import torch

from isaacgym.gymapi import RuleBroken, Tensor

# Whether the GPU is one that is none, where all tensors are on the CPU.
_TWIN = os.environ.get("ISAACGYM_STANDIN_DEVICE") == "twin"


def wrap_tensor(gym_tensor):
    """The simulator's tensor as one of torch: the same memory, or with the GPU pipeline that on the GPU."""
    source = torch.from_numpy(gym_tensor.array)
    if gym_tensor.gpu is None:
        return source
    mirror = source.clone() if _TWIN else source.to(torch.device("cuda", gym_tensor.gpu))
    gym_tensor.mirrors.append(lambda: mirror.copy_(source))
    return mirror


def unwrap_tensor(torch_tensor):
    """A tensor of torch for the simulator, which keeps nothing but its address."""
    if not torch_tensor.is_contiguous():
        raise RuleBroken("a tensor for the simulator must be contiguous")
    tensor, memory = Tensor(), torch_tensor.detach()
    # This holds the memory and not the tensor, so the tensor's end can be seen.
    tensor.read = lambda: memory.cpu().numpy()
    tensor.shape, tensor.dtype = tuple(torch_tensor.shape), str(torch_tensor.dtype).rpartition(".")[2]
    tensor.source = weakref.ref(torch_tensor)
    tensor.gpu = "any" if _TWIN else torch_tensor.device.index
    return tensor
