"""Prompt lengths for all calls of a model in a block of code, where the calls themselves cannot be changed."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..layer import base_modules
from .generate import current_generation
from .state import ModelToken, PerThread

_current = PerThread()  # the families, the lengths and the call of `generate` around the innermost block, and so on


@contextmanager
def prompt_lengths(model: nn.Module, lengths: torch.Tensor) -> Iterator[None]:
    """Tell where prompts end in code that calls a model without saying so.

    ```py
    >>> with peft_reft.prompt_lengths(model, torch.tensor([5, 8])):
    ...     scores = harness.score(model, input_ids)
    ```

    Every call of the model in the block and in this thread takes the lengths, unless it is given `prompt_lengths` of
    its own. `generate` in the block takes all that it is given for the prompt, as it does elsewhere.

    Args:
        model (`nn.Module`): a model with a ReFT adapter, a `PeftModel` or not, wrapped (DDP, `torch.compile`) or not.
        lengths (`torch.LongTensor` [batch]): for each row of the batches the number of its prompt's tokens, padding
            not counted.

    Raises:
        ValueError: if the model has no ReFT adapter, or the lengths are no such tensor.
    """
    roles = [vars(module).get("_reft_role") for _, module in base_modules(model)]
    families = tuple({role.family for role in roles if role is not None})
    if not families:
        raise ValueError(f"{type(model).__name__} has no ReFT adapter, so there is nothing to tell where prompts end.")
    if not isinstance(lengths, torch.Tensor) or lengths.dim() != 1 or lengths.dtype not in (torch.int64, torch.int32):
        given = f"{lengths.dtype} {list(lengths.shape)}" if isinstance(lengths, torch.Tensor) else repr(lengths)
        raise ValueError(
            f"lengths is {given}, but must be a LongTensor [batch]: for each row of the batches the number of its "
            "prompt's tokens, padding not counted."
        )
    outer = _current.value
    _current.value = (families, lengths, current_generation(), outer)
    try:
        yield
    finally:
        _current.value = outer


def current_lengths(family: ModelToken) -> torch.Tensor | None:
    """Return the prompt lengths that this thread has for a model, None within a later `generate`."""
    block = _current.value
    while block is not None:
        families, lengths, generation, block = block
        if any(own is family for own in families):
            return lengths if generation is current_generation() else None
    return None
