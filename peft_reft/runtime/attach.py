"""Attach and detach: what makes a model an adapted one, and the forward hook of its adapted modules.

Hooks and methods find what they need through the module that they are given, so that a copy of a model works with its
own parts.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftConfig, TaskType
from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from ..layer import LAYER, ReftLayer, adapted_modules, base_modules, layer_of, uncompiled
from . import plan as plans
from .adapted_class import adapt_class, restore_class
from .block_outputs import edited_output
from .call import ModuleRole, reads_text
from .checkpointing import (
    CheckpointEdits,
    checkpoint_edits,
    find_for_recompute,
    save_for_recompute,
    tensors_among,
)
from .methods import METHODS
from .state import ModelToken


def edit_output(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of an adapted module: pass its output, a tensor or the first of several, through the child."""
    layer, plan = layer_of(module), plans.current_plan()
    if plan is not None and plan.checkpointed is module:
        plan.checkpointed = None
        return None
    if layer is None or not plans.is_edited(layer, plan):
        return None
    plan = find_plan(module, args, kwargs)
    if plan is None:
        raise RuntimeError(
            f"A module with a ReFT adapter ({type(module).__name__}) ran outside a call of its model, so which of its "
            "tokens are to be edited is not known. Call the model, or disable the adapter before you call parts of it."
        )
    return edited_output(module, plan, args, kwargs, output)


def find_plan(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> plans.Plan | None:
    """Return the plan of the call that an adapted module is part of."""
    plan = plans.current_plan()
    if module.training and not torch.compiler.is_compiling():
        # Activation checkpointing may run the module again in the backward pass, when the call is over.
        others = tensors_among(args[1:], kwargs)
        if plan is None:
            plan = find_for_recompute(others)
        else:
            save_for_recompute(plan, others)
    return plan


def family_of(model: nn.Module) -> ModelToken:
    """Return the token that stands for a model, a new one if the model has none."""
    families = (vars(module).get("_reft_token") for _, module in base_modules(model))
    return next((family for family in families if family is not None), None) or ModelToken()


def hook_module(module: nn.Module, layer: ReftLayer) -> None:
    """Make `layer` a child of `module` and pass the module's output through it."""
    module.add_module(LAYER, layer)
    # First of the module's hooks, so that others (transformers' records of hidden states) see the edit.
    handle = module.register_forward_hook(edit_output, with_kwargs=True, prepend=True)
    vars(module)["_reft_layer_handle"] = handle  # a compiled module would set it on what it compiles


def kind_of(module: nn.Module) -> str | None:
    """Return the kind of a module's role, None if it has none yet."""
    role = vars(module).get("_reft_role")
    return None if role is None else role.kind


def paths_to(name: str) -> list[str]:
    """Return the names of the modules around a module, outermost first, and its own."""
    parts = name.split(".") if name else []
    return [".".join(parts[:n]) for n in range(len(parts) + 1)]


def roles_around(modules: Mapping[str, nn.Module], name: str, config: PeftConfig) -> dict[str, tuple[str, bool]]:
    """Return the models around a module whose calls have plans: by path, their kind and if they have own tokens."""
    paths = paths_to(name)
    around = [path for path in paths if isinstance(modules[path], PreTrainedModel)] or [""]
    outermost: Any = modules[around[0]]
    nearest = modules[around[-1]]
    generates = isinstance(outermost, PreTrainedModel) and outermost.can_generate()
    generates = generates or config.task_type in (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM)
    if isinstance(outermost, PreTrainedModel) and outermost.config.is_encoder_decoder:
        # Encoder and decoder have sequences of their own; what is told of them is told to the model around them.
        halves = (outermost.get_encoder(), outermost.get_decoder())
        path = max([around[-1], *(p for p in paths if modules[p] in halves)], key=len)
        nearest = modules[path]  # perhaps no model of transformers' kind (FSMT)
        kind = "full_input" if reads_text(nearest) else "media"
        if any(modules[p] is halves[1] for p in paths_to(path)) and (generates or kind_of(nearest) == "decoder"):
            kind = "decoder"
        return {around[0]: ("full_input", False)} | {path: (kind, nearest is not outermost)}
    generates = generates or any(kind_of(modules[path]) == "causal" for path in around)
    kind = "causal" if generates else "full_input" if reads_text(outermost) else "media"
    if reads_text(outermost) and not reads_text(nearest):  # a tower of images or sound
        return {around[0]: (kind, False), around[-1]: ("media", True)}
    return dict.fromkeys(around, (kind, False))


def hook_model(model: nn.Module, config: PeftConfig) -> None:
    """Have each call of the models around adapted modules make a plan, and each `generate` remember its prompt."""
    modules: dict[str, Any] = dict(model.named_modules())
    adapted = [name for name, module in modules.items() if layer_of(module) is not None]
    callers: dict[str, tuple[str, bool]] = {}
    for name in adapted:
        callers = roles_around(modules, name, config) | callers
    family = family_of(model)
    for path, (kind, has_own_tokens) in callers.items():
        module = modules[path]
        adapt_class(module, METHODS)
        names = tuple(inspect.signature(type(module).forward).parameters)[1:]
        depth = len(path.split(".")) if path else 0
        module._reft_role = ModuleRole(family, kind, depth, names, has_own_tokens)
        module._reft_token = family
    for module in modules.values():
        if isinstance(module, GenerationMixin):
            adapt_class(module, METHODS)
            vars(module)["_reft_token"] = family
    for name in adapted:
        hook_checkpoints(modules, name)
    forget_graphs(model)


def hook_checkpoints(modules: Mapping[str, nn.Module], name: str) -> None:
    """Hook all that transformers may checkpoint around an adapted module but models, and the module itself."""
    for path in paths_to(name):
        module = modules[path]
        is_hooked = "_reft_checkpoint_handle" in vars(module) or "_reft_role" in vars(module)
        if hasattr(module, "gradient_checkpointing") and not is_hooked:
            vars(module)["_reft_checkpoint_handle"] = module.register_forward_pre_hook(checkpoint_edits)


def unhook_model(model: nn.Module) -> None:
    """Take every `ReftLayer` and every hook away again."""
    for module, _ in adapted_modules(model).values():
        del module._modules[LAYER]
        vars(module).pop("_reft_layer_handle").remove()
    for module in model.modules():
        function: Any = getattr(module, "_gradient_checkpointing_func", None)
        if isinstance(function, CheckpointEdits):
            module._gradient_checkpointing_func = function.function  # type: ignore[assignment]
        if "_reft_checkpoint_handle" in vars(module):
            vars(module).pop("_reft_checkpoint_handle").remove()
        if "_reft_token" in vars(module):
            vars(module).pop("_reft_role", None)
            del module._reft_token
            restore_class(module)
    forget_graphs(model)


def forget_graphs(model: nn.Module) -> None:
    """Have torch.compile trace again what it has compiled of a model: it does not notice hooks that come and go."""
    if any(uncompiled(m) is not m or m._compiled_call_impl is not None for m in model.modules()):
        torch.compiler.reset()
