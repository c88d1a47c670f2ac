"""Quantized base models: the dtype of their adapters, and gradients that must pass through their layers."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .edits.intervention import Intervention

PROBE_STEP = 0.1  # of a probe's input, which is of size 1
MAX_SLOPE_ERROR = 0.5  # of a gradient, compared with the change of the output


def is_quantized(model: nn.Module) -> bool:
    """Whether a model, or a part of it, has been quantized, by transformers or by a library's own function."""
    return any(getattr(module, "is_quantized", False) for module in model.modules()) or any(
        hasattr(p, "__tensor_flatten__") and not isinstance(p, DTensor) for p in model.parameters()
    )


def keep_dtypes(model: nn.Module) -> None:
    """Have adapters of a quantized model remember their parameters, which TRL's trainers cast."""
    if getattr(model, "is_quantized", False):
        for module in model.modules():
            if isinstance(module, Intervention):
                module.keep_dtype()


def keep_unpacked(model: nn.Module) -> None:
    """Have bitsandbytes compute with 4-bit weights as they are.

    On CPUs with AVX512-BF16 it packs them in evaluation, rounded, for a kernel without a gradient, and leaves them so
    in training: gradients below are then zero, or those of the residual stream alone.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            module.state_dict()  # unpacks what has been packed
            state = getattr(module.weight, "quant_state", None)
            if state is not None and state.absmax.dim() == 2:  # left transposed by bitsandbytes 0.50
                state.absmax = state.absmax.T.reshape(-1).float()


def check_gradients_at_first(model: nn.Module) -> None:
    """Have the first call of a quantized model that is trained check that gradients pass through its linear layers.

    Not at once: the model may be moved before, and compressed-tensors unpacks weights in the first call.
    """
    if "_reft_gradient_check" not in vars(model) and is_quantized(model):
        model._reft_gradient_check = model.register_forward_pre_hook(check_gradients)  # type: ignore[assignment]


def forget_check(model: nn.Module) -> None:
    """Take the hook of `check_gradients_at_first` away."""
    handle: Any = vars(model).pop("_reft_gradient_check", None)
    if handle is not None:
        handle.remove()


def check_gradients(model: nn.Module, args: tuple) -> None:
    """Forward pre-hook: compare gradients of each kind of linear layer with what small steps of its input do.

    A kernel that has no gradient leaves that of the residual stream, with which training goes on, and wrongly.

    Raises:
        ValueError: if a layer passes no gradient, or another one.
    """
    if not model.training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    forget_check(model)
    for name, module in linear_layers(model):
        passed = passed_gradient(module)
        if abs(passed - 1) > MAX_SLOPE_ERROR:
            raise ValueError(
                f"{name} and layers like it are quantized so that they pass {'a wrong' if passed else 'no'} gradient "
                "to what is before them: their kernels are for inference. Training would go on, on what passes around "
                "them. Load the base model in a quantization of weights alone (bitsandbytes, for example), or have it "
                "dequantized (dequantize=True, where its quantization config has that)."
            )


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield a linear layer of each kind of a model, with its name, if it can be called on its own."""
    kinds = set()
    for name, module in model.named_modules():
        if width_of(module) is not None:
            kind = type(module), type(getattr(module, "weight", None)), frozenset(vars(module))
            if kind not in kinds and not is_sharded(module):
                kinds.add(kind)
                yield name, module


def is_sharded(module: nn.Module) -> bool:
    """Whether a linear layer has not all of its tensors here: offloaded, or sharded by FSDP or DeepSpeed."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.dim() != 2:  # FSDP1 flattens it
        return True
    tensors = [*module.parameters(), *module.buffers()]
    return not tensors or any(
        tensor.is_meta or isinstance(tensor, DTensor) or not tensor.numel() for tensor in tensors
    )


def width_of(module: nn.Module) -> int | None:
    """Return the input width of a linear layer, None for another module."""
    width = getattr(module, "in_features", getattr(module, "infeatures", None))  # of GPTQ's layers
    return width if isinstance(width, int) else None


def passed_gradient(module: nn.Module) -> float:
    """Return the ratio of a linear layer's gradient to the slope of its output. It is 1, up to rounding.

    0 where there is no gradient.
    """
    tensors = [*module.parameters(), *module.buffers()]
    dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.get_default_dtype())
    shape: Any = 2, 32, width_of(module)  # kernels may ask for some rows
    given = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(tensors[0].device, dtype)
    x, direction = given
    with torch.no_grad():
        change = module(x + PROBE_STEP * direction) - module(x - PROBE_STEP * direction)
    with torch.enable_grad():
        output = module(x.requires_grad_())
    if not output.requires_grad:
        return 0.0
    (gradient,) = torch.autograd.grad(output, x, change)
    return (2 * PROBE_STEP * (gradient * direction).float().sum() / change.float().square().sum()).item()
