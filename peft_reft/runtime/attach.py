"""What runs in an adapted model: a plan for each call of it, edits of what adapted modules put out, `generate`.

Hooks and methods find what they need through the module that they are given, so that a copy of a model works with its
own parts.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import PeftConfig, TaskType
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from ..layer import LAYER, ReftLayer, adapted_modules, base_modules, layer_of, uncompiled
from . import adapter_names as mixed_batches
from . import generate as generations
from . import plan as plans
from .adapted_class import adapt_class, restore_class
from .adapter_names import BASE, MixedBatch, current_mixed_batch
from .block_outputs import edit_in_layout
from .call import PROMPT_ENDS, SIGNAL, TELLING, Call, Role, reads_text
from .continuous_batching import Requests
from .generate import STEP, Generation, current_generation, find_cache, given_tokens, mark_step, note_cache
from .generation_methods import run_generate_batch, run_init_continuous_batching, run_prepare_decoder_input_ids
from .guidance import guide_by_prompts
from .lengths import current_lengths
from .state import Family


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
    """The plan of the call that an adapted module is part of."""
    plan = plans.current_plan()
    if module.training and not torch.compiler.is_compiling():
        # Activation checkpointing may run the module again in the backward pass, when the call is over.
        others = plans.tensors_among(args[1:], kwargs)
        if plan is None:
            plan = plans.recall(others)
        else:
            plans.remember(plan, others)
    return plan


def edited_output(module: nn.Module, plan: plans.Plan, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """The output of an adapted module, edited."""
    layer: ReftLayer = layer_of(module)  # type: ignore[assignment]
    hidden_states = output[0] if isinstance(output, tuple | list) and output else output
    is_signal = plan.call.role.kind == "signal"
    if is_signal:
        plan.call.see_mask(module, args, kwargs)
    edited = None
    if isinstance(hidden_states, torch.Tensor) and not hidden_states.is_nested:
        how = (layer.architecture, hidden_states, layer.d, plan.call.tokens)
        edited = edit_in_layout(*how, edit=lambda h: layer(h, plan), in_one_row=is_signal)
    if edited is None:
        raise not_hidden_states(module, hidden_states, layer.d)
    return edited if output is hidden_states else with_first(output, edited)


def not_hidden_states(module: nn.Module, output: Any, d: int) -> ValueError:
    """The error for what a module put out in place of hidden states."""
    given = str(type(output))
    if isinstance(output, torch.Tensor):
        given = f"of shape {list(output.shape)}" if not output.is_nested else "a nested tensor"
    return ValueError(
        f"A module with a ReFT adapter ({type(module).__name__}) put out {given}, not hidden states [batch, tokens, "
        f"{d}]: name modules in target_modules that put out hidden states. (Nested tensors come from "
        "torch.nn.TransformerEncoder with enable_nested_tensor=True.)"
    )


def with_first(output: tuple | list, first: torch.Tensor) -> tuple | list:
    """The same outputs, of the same type, with another first one."""
    if hasattr(output, "_replace"):  # a named tuple
        return output._replace(**{output._fields[0]: first})  # type: ignore[union-attr]
    return type(output)((first, *output[1:]))


# Gradient checkpointing


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
        kept = running.kept

        def forward_and_edit(*args: Any) -> Any:
            current = plans.current_plan()
            plan = current if current is not None and current.kept is kept else kept  # in the backward pass
            try:
                plans.current.value = plan
                output = forward(*args)
            finally:
                plans.current.value = current
            return edited_output(block, plan, args, forward.keywords, output) if is_edited else output

        output = self.function(forward_and_edit, *args)
        running.checkpointed = block if is_edited else None
        return output


# Calls


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
    role: Role | None = vars(module).get("_reft_role")
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
    if role.kind == "signal":
        arguments[SIGNAL] = next(filter(torch.is_tensor, arguments.values()), None)
    arguments = {name: arguments[name] for name in TELLING if arguments.get(name) is not None}
    outer = plans.current_plan()
    while outer is not None and outer.call.role.family is role.family:
        if outer.call.contains(role, arguments):
            return
        if outer.call.is_around(role):
            arguments = outer.call.told_to(role) | arguments
            break
        outer = outer.outer
    else:
        lengths = current_lengths(role.family)
        if lengths is not None and (not role.apart or role.kind == "decoder"):
            arguments = {"prompt_lengths": lengths} | arguments
    generation = generation_of(role, arguments)
    training = module.training and generation_around(role.family) is None  # nothing is trained within `generate`
    call = Call(role, module, training, arguments, generation, skips_prepare(role, arguments))
    plans.current.value = plans.Plan(call, outer, mixed_batch_of(module, generation, kwargs), is_in_own_forward=is_own)
    if "prompt_lengths" not in role.argument_names:
        kwargs.pop("prompt_lengths", None)


def generation_around(family: Family) -> Generation | None:
    """The `generate` of a model that runs."""
    generation = current_generation()
    return generation if generation is not None and generation.family is family else None


def generation_of(role: Role, arguments: Mapping[str, Any]) -> Generation | Requests | None:
    """What knows the prompts of a call that generates.

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


def skips_prepare(role: Role, arguments: Mapping[str, Any]) -> bool:
    """Whether a call has the cache of the `generate` that runs, but is not marked as a step of it."""
    if STEP in arguments or is_told(role, arguments):
        return False
    generation, cache = generation_around(role.family), find_cache(arguments)
    return generation is not None and cache is not None and cache is generation.cache


def is_told(role: Role, arguments: Mapping[str, Any]) -> bool:
    """Whether a call's own arguments say where its prompts end, or it is given no text that continues prompts."""
    continues = role.kind in ("causal", "decoder") and given_tokens(arguments) is not None
    return not continues or any(name in arguments for name in PROMPT_ENDS)


def mixed_batch_of(
    module: nn.Module, generation: Generation | Requests | None, kwargs: dict[str, Any]
) -> MixedBatch | None:
    """The adapters of the rows of a call, where they differ; the model itself takes no `adapter_names`."""
    role: Role = module._reft_role  # type: ignore[assignment]
    names = kwargs.pop("adapter_names", None)  # a PeftModel around the model would have kept them
    if names is not None:
        return mix(module, role.family, names)
    mixed_batch, running = current_mixed_batch(), current_generation()
    if mixed_batch is None or mixed_batch.family is not role.family:
        return None
    if running is None or generation is running or mixed_batch is not running.mixed_batch:
        return mixed_batch
    return None if role.kind in ("causal", "decoder") else mixed_batch  # None for a call of its own within generate


def run_generate(model: Any, generate: Callable[..., Any], args: tuple, kwargs: dict[str, Any], is_own: bool) -> Any:
    """Run `generate` of an adapted model, whose prompt is remembered for as long as the call lasts.

    Args:
        model (`PreTrainedModel`): the model.
        generate: its `generate`, which is given the model first.
        args, kwargs: the other arguments.
        is_own (`bool`): whether it is that of the model's class, not one that was put on the model.
    """
    family: Family | None = vars(model).get("_reft_family")
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


def mix(model: nn.Module, family: Family, names: Any) -> MixedBatch:
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
        if isinstance(module, AuxiliaryTrainingWrapper) and not hasattr(module, "_reft_names_rows"):
            module.register_forward_pre_hook(name_rows, with_kwargs=True)
            module._reft_names_rows = True  # type: ignore[assignment]


def name_rows(
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


def family_of(model: nn.Module) -> Family:
    """What stands for a model, new if it has not been adapted before."""
    families = (vars(module).get("_reft_family") for _, module in base_modules(model))
    return next((family for family in families if family is not None), None) or Family()


def hook_module(module: nn.Module, layer: ReftLayer) -> None:
    """Make `layer` a child of `module` and pass the module's output through it."""
    module.add_module(LAYER, layer)
    # First of the module's hooks, so that others (transformers' records of hidden states) see the edit.
    handle = module.register_forward_hook(edit_output, with_kwargs=True, prepend=True)
    vars(module)["_reft_layer_handle"] = handle  # a compiled module would set it on what it compiles


def kind_of(module: nn.Module) -> str | None:
    """The kind of the role that a module has from adapters that were added before."""
    role = vars(module).get("_reft_role")
    return None if role is None else role.kind


def paths_to(name: str) -> list[str]:
    """The names of the modules around a module, outermost first, and its own."""
    parts = name.split(".") if name else []
    return [".".join(parts[:n]) for n in range(len(parts) + 1)]


def roles_around(modules: Mapping[str, nn.Module], name: str, config: PeftConfig) -> dict[str, tuple[str, bool]]:
    """The models around a module whose calls have plans: by path, the kind of their role and whether it is apart."""
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
        kind = "whole" if reads_text(nearest) else "signal"
        if any(modules[p] is halves[1] for p in paths_to(path)) and (generates or kind_of(nearest) == "decoder"):
            kind = "decoder"
        return {around[0]: ("whole", False)} | {path: (kind, nearest is not outermost)}
    generates = generates or any(kind_of(modules[path]) == "causal" for path in around)
    kind = "causal" if generates else "whole" if reads_text(outermost) else "signal"
    if reads_text(outermost) and not reads_text(nearest):  # a tower of images or sound
        return {around[0]: (kind, False), around[-1]: ("signal", True)}
    return dict.fromkeys(around, (kind, False))


def hook_model(model: nn.Module, config: PeftConfig) -> None:
    """Have each call of the models around adapted modules make a plan, and each `generate` remember its prompt."""
    modules: dict[str, Any] = dict(model.named_modules())
    adapted = [name for name, module in modules.items() if layer_of(module) is not None]
    callers: dict[str, tuple[str, bool]] = {}
    for name in adapted:
        callers = roles_around(modules, name, config) | callers
    family = family_of(model)
    for path, (kind, apart) in callers.items():
        module = modules[path]
        adapt_class(module, METHODS)
        names = tuple(inspect.signature(type(module).forward).parameters)[1:]
        depth = len(path.split(".")) if path else 0
        module._reft_role = Role(family, kind, depth, names, apart)
        module._reft_family = family
    for module in modules.values():
        if isinstance(module, GenerationMixin):
            adapt_class(module, METHODS)
            vars(module)["_reft_family"] = family
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
        if "_reft_family" in vars(module):
            vars(module).pop("_reft_role", None)
            del module._reft_family
            restore_class(module)
    forget_graphs(model)


def forget_graphs(model: nn.Module) -> None:
    """Have torch.compile trace again what it has compiled of a model: it does not notice hooks that come and go."""
    if any(uncompiled(m) is not m or m._compiled_call_impl is not None for m in model.modules()):
        torch.compiler.reset()
