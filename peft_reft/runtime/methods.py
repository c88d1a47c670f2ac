"""The methods of adapted models that run in functions of ours: `forward`, `generate` and what `generate` calls.

Each function takes the model, its method, the arguments of the method, and whether the method is that of the class.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..layer import adapted_modules
from . import adapter_names as mixed_batches
from . import continuous_batching
from . import generate as generations
from . import plan as plans
from .adapter_names import MixedBatch, current_mixed_batch
from .call import MEDIA_INPUT, PROMPT_ARGUMENTS, PROMPT_ENDS, Call, ModuleRole
from .checkpointing import checkpoint_edits
from .continuous_batching import Requests
from .generate import (
    STEP,
    DecoderGeneration,
    Generation,
    current_generation,
    find_cache,
    given_tokens,
    mark_step,
    note_cache,
)
from .guidance import guide_by_prompts
from .lengths import current_lengths
from .mixing import mix
from .state import ModelToken


def run_forward(module: Any, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any], is_own: bool) -> Any:
    """Run the forward of a model in a plan of its own, or in that of the call which it is part of.

    Args:
        module (`nn.Module`): the model.
        forward: its forward, which is given the model first.
        args, kwargs: the other arguments.
        is_own (`bool`): whether it is the forward of the model's class, not one that was put on the model.
    """
    outer = plans.current_plan()
    try:
        begin_call(module, args, kwargs, is_own)
        return forward(module, *args, **kwargs)
    finally:
        plans.current.value = outer  # no call of a function, in which an interrupt could come first


def begin_call(module: nn.Module, args: tuple, kwargs: dict[str, Any], is_own: bool = True) -> None:
    """Make the plan of a call of a model, and keep `prompt_lengths` and the mark of a step from the model."""
    role: ModuleRole | None = vars(module).get("_reft_role")
    if role is None:
        return
    running = plans.current_plan()
    if running is not None and running.call.owner is module and not running.is_in_own_forward:
        running.is_in_own_forward = is_own  # what was put on the model has called what was there before
        if not any(kwargs.get(name) is not None for name in PROMPT_ENDS if name not in running.call.arguments):
            return
    checkpoint_edits(module, args)
    arguments = dict(zip(role.argument_names, args, strict=False)) | kwargs
    kwargs.pop(STEP, None)
    if role.kind == "media":
        arguments[MEDIA_INPUT] = next(filter(torch.is_tensor, arguments.values()), None)
    arguments = {name: arguments[name] for name in PROMPT_ARGUMENTS if arguments.get(name) is not None}
    outer = plans.current_plan()
    while outer is not None and outer.call.role.family is role.family:
        if outer.call.contains(role, arguments):
            return
        if outer.call.is_around(role):
            arguments = outer.call.arguments_for(role) | arguments
            break
        outer = outer.outer
    else:
        lengths = current_lengths(role.family)
        if lengths is not None and (not role.has_own_tokens or role.kind == "decoder"):
            arguments = {"prompt_lengths": lengths} | arguments
    generation = generation_of(role, arguments)
    training = module.training and generation_around(role.family) is None  # nothing is trained within `generate`
    call = Call(role, module, training, arguments, generation, skips_prepare(role, arguments))
    plans.current.value = plans.Plan(call, outer, mixed_batch_of(module, generation, kwargs), is_in_own_forward=is_own)
    if "prompt_lengths" not in role.argument_names:
        kwargs.pop("prompt_lengths", None)


def generation_around(family: ModelToken) -> Generation | None:
    """Return the running call of a model's `generate`, or None."""
    generation = current_generation()
    return generation if generation is not None and generation.family is family else None


def generation_of(role: ModuleRole, arguments: Mapping[str, Any]) -> Generation | Requests | None:
    """Return the object that knows the prompts of a generating call, or None.

    Raises:
        RuntimeError: if the call is a step of a `generate` that does not run.
    """
    if STEP not in arguments or is_told(role, arguments):
        return Requests.of(find_cache(arguments))
    generation = generation_around(role.family)
    if generation is None:
        raise RuntimeError(
            "The model was called with inputs that were prepared within `generate`, but outside of that call or in "
            "another thread. Prepare them where you call the model."
        )
    return generation


def skips_prepare(role: ModuleRole, arguments: Mapping[str, Any]) -> bool:
    """Whether a call has the cache of the `generate` that runs, but is not marked as a step of it."""
    if STEP in arguments or is_told(role, arguments):
        return False
    generation, cache = generation_around(role.family), find_cache(arguments)
    return generation is not None and cache is not None and cache is generation.cache


def is_told(role: ModuleRole, arguments: Mapping[str, Any]) -> bool:
    """Whether a call's own arguments say where its prompts end, or it is given no text that continues prompts."""
    continues = role.continues and given_tokens(arguments) is not None
    return not continues or any(name in arguments for name in PROMPT_ENDS)


def mixed_batch_of(
    module: nn.Module, generation: Generation | Requests | None, kwargs: dict[str, Any]
) -> MixedBatch | None:
    """Return the adapters of a call's rows, if they differ. The model itself takes no `adapter_names`."""
    role: ModuleRole = module._reft_role  # type: ignore[assignment]
    names = kwargs.pop("adapter_names", None)  # a PeftModel around the model would have kept them
    if names is not None:
        return mix(module, role.family, names)
    mixed_batch, running = current_mixed_batch(), current_generation()
    if mixed_batch is None or mixed_batch.family is not role.family:
        return None
    if running is None or generation is running or mixed_batch is not running.mixed_batch:
        return mixed_batch
    return None if role.continues else mixed_batch  # None for a call of its own within generate


def run_generate(model: Any, generate: Callable[..., Any], args: tuple, kwargs: dict[str, Any], is_own: bool) -> Any:
    """Run `generate` of an adapted model, whose prompt is remembered for as long as the call lasts.

    Args:
        model (`PreTrainedModel`): the model.
        generate: its `generate`, which is given the model first.
        args, kwargs: the other arguments.
        is_own (`bool`): whether it is that of the model's class, not one that was put on the model.
    """
    family: ModelToken | None = vars(model).get("_reft_token")
    plan, outer, outer_mixed_batch = plans.current_plan(), current_generation(), current_mixed_batch()
    is_within = outer is not None and outer.model is model and not outer.is_in_own_generate
    if family is None or is_within:
        if is_within:
            outer.is_in_own_generate = is_own  # type: ignore[union-attr]
        return generate(model, *args, **kwargs)
    names = kwargs.pop("adapter_names", None)
    mixed_batch = outer_mixed_batch if names is None else mix(model, family, names)
    generation = Generation.of(model, family, args, kwargs)
    if outer is not None and outer.model is model and outer.mixed_batch is mixed_batch and not generation.is_draft:
        mixed_batch = None  # its rows are not those of this call
    if mixed_batch is not None and mixed_batch.family is family and generation.prompts is not None:
        mixed_batch.repeats(generation.prompts, expanded=False)
    generation.mixed_batch, generation.is_in_own_generate = mixed_batch, is_own
    try:
        generations.current.value, mixed_batches.current.value = generation, mixed_batch
        return generate(model, *args, **kwargs)
    finally:
        values = outer, outer_mixed_batch, plan
        generations.current.value, mixed_batches.current.value, plans.current.value = values


def run_init_continuous_batching(
    model: Any, method: Callable[..., Any], args: tuple, kwargs: dict[str, Any], is_own: bool
) -> Any:
    """Begin continuous batching: all of it begins here (`generate_batch`, too), and runs in another thread."""
    if adapted_modules(model):
        return continuous_batching.init_manager(method, model, *args, **kwargs)
    return method(model, *args, **kwargs)


def run_generate_batch(
    model: Any, method: Callable[..., Any], args: tuple, kwargs: dict[str, Any], is_own: bool
) -> Any:
    """Run `generate_batch`, which ignores arguments that it does not know.

    Raises:
        ValueError: if an adapter for each row is asked for.
    """
    if kwargs.get("adapter_names") is not None and adapted_modules(model):
        raise ValueError("generate_batch takes no adapter_names: its rows hold several requests. Use generate.")
    return method(model, *args, **kwargs)


def run_prepare_decoder_input_ids(
    model: Any, method: Callable[..., Any], args: tuple, kwargs: dict[str, Any], is_own: bool
) -> Any:
    """Remember the prompt of a decoder: `generate` knows it only here, apart from drafts."""
    input_ids, model_kwargs = method(model, *args, **kwargs)
    generation = current_generation()
    if isinstance(generation, DecoderGeneration) and generation.model is model:
        generation.begins_with = input_ids.shape[1]
    return input_ids, model_kwargs


METHODS = {
    "forward": run_forward,
    "generate": run_generate,
    "prepare_inputs_for_generation": mark_step,
    "_prepare_cache_for_generation": note_cache,
    "_get_logits_processor": guide_by_prompts,
    "init_continuous_batching": run_init_continuous_batching,
    "generate_batch": run_generate_batch,
    "_prepare_decoder_input_ids_for_generation": run_prepare_decoder_input_ids,
}
