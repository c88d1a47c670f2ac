"""Activation checkpointing: blocks that run again in the backward pass are edited as in their call."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from ..layer import layer_of
from . import plan as plans
from .block_outputs import edited_output

_remembered = WeakIdKeyDictionary()  # tensor -> Plan of a call that has ended, or None where calls share the tensor


def checkpoint_edits(module: nn.Module, args: tuple) -> None:
    """Forward pre-hook of what transformers checkpoints around edits: have it run them again with their plan."""
    if module.training and getattr(module, "gradient_checkpointing", False) and not torch.compiler.is_compiling():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is not None and not isinstance(function, CheckpointEdits):
            module._gradient_checkpointing_func = CheckpointEdits(function)  # type: ignore[assignment]


class CheckpointEdits:
    """transformers' checkpointing function, for blocks with adapters in them.

    A block that is adapted itself is edited within: transformers checkpoints its `forward`, outside of which hooks
    are, and what its edit needs in the backward pass, perhaps all of the hidden states in float32, would be kept for
    all blocks.

    Args:
        function (`Callable`): what transformers has set.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function

    def __call__(self, forward: Any, *args: Any) -> Any:
        running = plans.current_plan()
        if running is None:
            return self.function(forward, *args)
        block: Any = next(iter(getattr(forward, "args", ())), None)  # None before transformers 5.23
        layer = layer_of(block) if isinstance(block, nn.Module) else None
        # With no gradient from before the block, reentrant checkpointing would give none to what is within.
        takes_part = torch.is_grad_enabled() and any(torch.is_tensor(arg) and arg.requires_grad for arg in args)
        is_edited = takes_part and layer is not None and plans.is_edited(layer, running)
        kept = running.for_recompute

        def forward_and_edit(*args: Any) -> Any:
            current = plans.current_plan()
            plan = current if current is not None and current.for_recompute is kept else kept  # in the backward pass
            try:
                plans.current.value = plan
                output = forward(*args)
            finally:
                plans.current.value = current
            return edited_output(block, plan, args, forward.keywords, output) if is_edited else output

        output = self.function(forward_and_edit, *args)
        running.checkpointed = block if is_edited else None
        return output


def tensors_among(args: tuple, kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """Return the tensors among the arguments of a module, and in tuples among them."""
    found = []
    for value in (*args, *kwargs.values()):
        found += [item for item in (value if isinstance(value, tuple) else (value,)) if isinstance(item, torch.Tensor)]
    return found


def save_for_recompute(plan: plans.Plan | None, tensors: list[torch.Tensor]) -> None:
    """Keep a plan for as long as tensors live that were given to a module in its call."""
    for tensor in tensors:
        if plan is not None and _remembered.setdefault(tensor, plan.for_recompute) is not plan.for_recompute:
            _remembered[tensor] = None


def find_for_recompute(tensors: list[torch.Tensor]) -> plans.Plan | None:
    """Return the plan of the call in which a module had these very tensors as input, None unless it is certain.

    Activation checkpointing runs modules a second time in the backward pass, when their call is over and others may
    have followed, but with the same masks and position embeddings.
    """
    plans = [plan for plan in map(_remembered.get, tensors) if plan is not None]
    return plans[0] if plans and all(plan is plans[0] for plan in plans) else None
