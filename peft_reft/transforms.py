"""Transforms of what torch computes: `torch.func`, forward-mode derivatives and `torch.jit.trace`."""

import torch
from torch.autograd import forward_ad


def sees_operations() -> bool:
    """Whether a transform is at work that must see each operation.

    An `autograd.Function` tells them only its derivative for the backward pass, and cannot be saved by `torch.jit`.
    """
    if torch.compiler.is_compiling():
        return False
    in_forward_mode = forward_ad._current_level >= 0
    return in_forward_mode or torch._C._are_functorch_transforms_active() or torch.jit.is_tracing()


def for_all_samples(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor whose values can be read. Within `torch.func.vmap` it has all samples."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor
