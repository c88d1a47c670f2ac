"""Make mixed batches from `adapter_names`, and have modules that are saved with adapters follow them."""

from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..layer import adapted_modules, base_modules
from . import plan as plans
from .adapter_names import BASE, MixedBatch
from .state import ModelToken


def mix(model: nn.Module, family: ModelToken, names: Any) -> MixedBatch:
    """Make the mixed batch that `adapter_names` asks for.

    Raises:
        ValueError: if the model is being trained, or the names are not those of its adapters.
    """
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode: call model.eval() before.")
    if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"adapter_names={names!r} must be a list with the name of an adapter for each row.")
    known = {name for _, layer in adapted_modules(model).values() for name in layer.positions}
    unknown = sorted(set(names) - known - {BASE})
    if unknown:
        raise ValueError(
            f"adapter_names names adapters that are not there: {', '.join(unknown)}. There are "
            f"{', '.join(sorted(known))}, and {BASE} for none."
        )
    hook_wrappers(model)
    return MixedBatch(family, tuple(names))


def hook_wrappers(model: nn.Module) -> None:
    """Have the modules that adapters train and save apart (`modules_to_save`) follow mixed batches, too."""
    for _, module in base_modules(model):
        if isinstance(module, AuxiliaryTrainingWrapper) and not hasattr(module, "_reft_passes_adapter_names"):
            module.register_forward_pre_hook(pass_adapter_names, with_kwargs=True)
            module._reft_passes_adapter_names = True  # type: ignore[assignment]


def pass_adapter_names(
    wrapper: AuxiliaryTrainingWrapper, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook: tell PEFT's wrapper which of its modules each row is for."""
    plan = plans.current_plan()
    batch = None if plan is None else plan.mixed_batch
    if batch is None or wrapper.disable_adapters or not args:
        return None
    own, repeats = wrapper._get_available_adapters(), batch.repeats(len(args[0]), expanded=True)
    names = [name if name in own else BASE for name in batch.names for _ in range(repeats)]
    return args, kwargs | {"adapter_names": names}
