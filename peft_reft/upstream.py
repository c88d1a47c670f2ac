"""Methods and functions of PEFT and transformers that are completed in memory, for ReFT adapters alone.

Each would serve the user well but for one thing, which ReFT has no other place to do.
"""

import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderDispatcher
from peft import PeftModel
from peft.utils import other
from transformers import GenerationMixin
from transformers.integrations import PeftAdapterMixin

from . import continuous_batching
from .call import Role, note_labels
from .card import describe_use
from .checkpoints import STATE
from .collator import PromptLengthsAdder
from .generation import DecoderGeneration, current_generation
from .intervention import Intervention
from .layer import adapted_modules, base_modules
from .model import ReftModel, misfit
from .quantized import keep_dtypes
from .registration import REFT

if TYPE_CHECKING:
    from transformers import Trainer
    from transformers.trainer_callback import CallbackHandler


def complete_upstream() -> None:
    """Complete the methods, once."""
    complete(PeftModel, "_upload_modified_files", upload_with_card)
    complete(PeftModel, "load_adapter", load_or_take_back)
    complete(PeftAdapterMixin, "load_adapter", load_whole_adapter)
    complete(GenerationMixin, "init_continuous_batching", begin_continuous_batching)
    complete(GenerationMixin, "generate_batch", refuse_adapter_names)
    complete(GenerationMixin, "_prepare_decoder_input_ids_for_generation", note_decoder_prompt)
    complete(other, "fsdp_auto_wrap_policy", wrap_units)
    complete(Accelerator, "__init__", begin_accelerator)
    complete_trainer()


SWITCH = "PEFT_REFT_PROMPT_LENGTHS"  # an environment variable; "0" keeps trainers from adding prompt_lengths


def complete_trainer() -> None:
    """Complete `Trainer` if its module is there. To import it would take longer than all else: it brings datasets."""
    module: Any = sys.modules.get("transformers.trainer")
    if hasattr(module, "Trainer"):
        complete(module.CallbackHandler, "on_init_end", restore_dtypes)
        complete(module.Trainer, "_get_dataloader", add_prompt_lengths)
        complete(module.Trainer, "_prepare_inputs", note_labels_in_evaluation)
        complete(module.Trainer, "_save_checkpoint", begin_checkpoint)
        complete(module.Trainer, "save_model", save_sharded)
        complete(module.Trainer, "_load_optimizer_and_scheduler", load_sharded_optimizer)


def complete(owner: Any, name: str, completed: Callable[..., Any]) -> None:
    """Replace a method of a class or a function of a module by `completed`, which is given it before its arguments."""
    method = getattr(owner, name)
    if "completed_by_reft" in vars(method):
        return

    @functools.wraps(method)
    def replacement(self: Any, *args: Any, **kwargs: Any) -> Any:
        return completed(method, self, *args, **kwargs)

    vars(replacement)["completed_by_reft"] = True
    setattr(owner, name, replacement)


def upload_with_card(method: Callable[..., Any], model: PeftModel, folder: str, *args: Any, **kwargs: Any) -> Any:
    """Part of `push_to_hub`: transformers has just written a blank card over the one that PEFT had saved."""
    configs = [config for config in model.peft_config.values() if config.peft_type == REFT]
    if configs:
        model.create_or_update_model_card(folder)
        describe_use(folder, configs[0])
    return method(model, folder, *args, **kwargs)


def load_or_take_back(
    method: Callable[..., Any], model: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any
) -> Any:
    """PEFT's `load_adapter` adds an adapter before it looks at the checkpoint, and would leave it if that is unfit.

    Raises:
        ValueError: if the adapter cannot be loaded into a model whose parts lie where they do.
    """
    before = set(model.peft_config)
    in_place = is_in_place(model, adapter_name)  # as when training is resumed
    if not in_place:
        refuse_disk(model, before & {adapter_name})  # which `from_pretrained` has added, and would place anew
    try:
        with placed_for_good(model) if in_place else overwritten(model):
            result = method(model, model_id, adapter_name, *args, **kwargs)
    except BaseException:  # an interrupt, too, would leave it, of zeros
        for name in set(model.peft_config) - before:
            if model.peft_config[name].peft_type == REFT:
                model.delete_adapter(name)
        raise
    keep_dtypes(model)  # of tensors that may be other ones than those that were made
    return result


def is_in_place(model: PeftModel, adapter_name: str) -> bool:
    """Whether an adapter lies where its blocks are executed, in a model to which accelerate has given its hooks."""
    if adapter_name not in model.peft_config or not any("_hf_hook" in vars(module) for module in model.modules()):
        return False
    units = [unit for _, layer in adapted_modules(model).values() for unit in layer.units(adapter_name).values()]
    return bool(units) and not any(unit.b.is_meta for unit in units)


@contextmanager
def placed_for_good(model: PeftModel) -> Iterator[None]:
    """Keep PEFT from placing a model anew, by a device map of its own, when it loads the model's only adapter."""
    own = {name: places for name, places in vars(model).items() if name == "hf_device_map"}
    vars(model)["hf_device_map"] = None
    try:
        yield
    finally:
        del vars(model)["hf_device_map"]
        vars(model).update(own)


@contextmanager
def overwritten(model: PeftModel) -> Iterator[None]:
    """Have an adapter that is added not be initialised: that takes longer than to load it, and is lost at once."""
    tuner: Any = model.base_model
    if not isinstance(tuner, ReftModel):
        yield
        return
    tuner.is_loading = True
    try:
        yield
    finally:
        tuner.is_loading = False


def refuse_adapter_names(method: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """transformers' `generate_batch` ignores arguments that it does not know.

    Raises:
        ValueError: if an adapter for each row is asked for.
    """
    if kwargs.get("adapter_names") is not None and adapted_modules(model):
        raise ValueError("generate_batch takes no adapter_names: its rows hold several requests. Use generate.")
    return method(model, *args, **kwargs)


def note_decoder_prompt(method: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Only here `generate` knows what the decoder of an encoder-decoder model begins with, apart from drafts."""
    input_ids, model_kwargs = method(model, *args, **kwargs)
    generation = current_generation()
    if isinstance(generation, DecoderGeneration) and generation.model is model:
        generation.begins_with = input_ids.shape[1]
    return input_ids, model_kwargs


def refuse_disk(model: Any, names: Iterable[str]) -> None:
    """Raise a ValueError if a ReFT adapter is to be loaded into a model that has been put on disk in part.

    Neither PEFT nor transformers writes its tensors there, from where they would be read when the model is called.
    """
    is_reft = any(model.peft_config[name].peft_type == REFT for name in names)
    if is_reft and "disk" in (getattr(model, "hf_device_map", None) or {}).values():
        raise ValueError(
            "A ReFT adapter cannot be loaded into a model that is offloaded to disk in part (hf_device_map). Load the "
            "base model on the CPU and the adapter into it, and place both with accelerate.dispatch_model."
        )


def load_whole_adapter(method: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """transformers' `load_adapter` reports tensors that are missing or too many, and goes on without them.

    Raises:
        ValueError: if the checkpoint does not fit its config; the adapter is deleted again.
    """
    before = set(getattr(model, "peft_config", {}))
    info = method(model, *args, **kwargs)
    added = [name for name in model.peft_config if name not in before]
    if not any(model.peft_config[name].peft_type == REFT for name in added):
        return info
    problems = [f"{key} is missing" for key in info.missing_keys if ".reft_" in key]
    problems += [f"{key} has no place" for key in info.unexpected_keys if ".reft_" in key]
    try:
        refuse_disk(model, added)
        if problems:
            raise misfit(added[0], problems)
    except ValueError:
        model.delete_adapter(added)
        raise
    return info


def begin_continuous_batching(method: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """All of transformers' continuous batching begins here (`generate_batch`, too), and runs in another thread."""
    return (
        continuous_batching.init_manager(method, model, *args, **kwargs)
        if adapted_modules(model)
        else method(model, *args, **kwargs)
    )


def begin_accelerator(method: Callable[..., Any], accelerator: Accelerator, *args: Any, **kwargs: Any) -> None:
    """Each `Trainer` makes an accelerator when it is made itself: whenever its module came, it is complete from here.

    Before that nothing is called but `__init__`.
    """
    complete_trainer()
    method(accelerator, *args, **kwargs)


def restore_dtypes(method: Callable[..., Any], handler: "CallbackHandler", *args: Any, **kwargs: Any) -> Any:
    """TRL's trainers have cast what is trained on a 4-bit or 8-bit base to bfloat16, which rounds most steps away.

    Called at the end of `Trainer.__init__`, which may have begun before it could be completed itself.
    """
    if handler.model is not None:
        for module in handler.model.modules():
            if isinstance(module, Intervention):
                module.restore_dtype()
    return method(handler, *args, **kwargs)


def roles_of(model: Any) -> list[Role]:
    """The roles of an adapted model, the outermost first; none of a model without adapters."""
    roles = (vars(module).get("_reft_role") for _, module in base_modules(model))
    return [role for role in roles if role is not None]


def add_prompt_lengths(method: Callable[..., Any], trainer: "Trainer", *args: Any, **kwargs: Any) -> Any:
    """Have a trainer's batches hold `prompt_lengths`, where one length a row says where the prompt ends.

    With them a suffix takes its few tokens through its edit, and not all that the labels may end a prompt at, and
    where a trainer keeps the labels for itself the model knows. The trainer's own collator stays where it is: TRL's
    look at its class.
    """
    model, collator = trainer.model, trainer.data_collator
    roles = [] if model is None else roles_of(model)
    if not any(role.kind in ("causal", "decoder") for role in roles):
        return method(trainer, *args, **kwargs)
    adder = PromptLengthsAdder(collator, os.environ.get(SWITCH) != "0" and takes_prompt_lengths(trainer, roles[0]))
    if trainer.args.remove_unused_columns:
        trainer._set_signature_columns_if_needed()
        columns: Any = trainer._signature_columns
        if "prompt_lengths" not in columns:
            columns.append("prompt_lengths")
    trainer.data_collator = adder
    try:
        dataloader = method(trainer, *args, **kwargs)
    finally:
        trainer.data_collator = collator
    is_dispatched = isinstance(dataloader, DataLoaderDispatcher) and not dataloader.split_batches
    if is_dispatched and dataloader.state.num_processes > 1:
        adder.is_finding = False  # one process joins the batches of all, which must have the same keys
    return dataloader


def takes_prompt_lengths(trainer: "Trainer", role: Role) -> bool:
    """Whether all that a trainer gives its batches to can take `prompt_lengths`, and its model has a use for them."""
    if role.kind != "causal":  # the labels of an encoder-decoder model are not those of its input_ids
        return False
    reference = getattr(trainer, "ref_model", None)  # TRL's, perhaps without an adapter
    layers = [layer for _, layer in adapted_modules(trainer.model).values()]  # type: ignore[arg-type]
    is_used = any(positions.span != "all" for layer in layers for positions in layer.positions.values())
    generates = getattr(trainer.args, "predict_with_generate", False)  # from the whole batch
    return is_used and not generates and (reference is None or bool(roles_of(reference)))


def note_labels_in_evaluation(method: Callable[..., Any], trainer: "Trainer", *args: Any, **kwargs: Any) -> Any:
    """A trainer that keeps the labels for itself calls the model with ids that came with labels all the same.

    In training a call without labels is refused in any case.
    """
    inputs = method(trainer, *args, **kwargs)
    labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
    if trainer.model is None or trainer.model.training or not isinstance(labels, torch.Tensor):
        return inputs
    for family in {role.family for role in roles_of(trainer.model)}:
        for name in ("input_ids", "decoder_input_ids"):
            ids = inputs.get(name)
            if isinstance(ids, torch.Tensor) and ids.shape == labels.shape:
                note_labels(family, ids)
    return inputs


def begin_checkpoint(method: Callable[..., Any], trainer: "Trainer", model: Any, trial: Any, **kwargs: Any) -> None:
    """A checkpoint is whole when the trainer's state is there, which is written last: not one that was left there.

    Training that goes on from an earlier checkpoint writes those after it anew, over files that are there.
    """
    if trainer.args.should_save and trainer.model is not None and adapted_modules(trainer.model):
        folder = Path(trainer._get_output_dir(trial=trial)) / f"checkpoint-{trainer.state.global_step}"
        (folder / STATE).unlink(missing_ok=True)
    method(trainer, model, trial, **kwargs)


def save_sharded(
    method: Callable[..., Any], trainer: "Trainer", output_dir: str | None = None, *args: Any, **kwargs: Any
) -> None:
    """transformers' `save_model` saves nothing where FSDP's state dicts are to be sharded: save the adapter, whole."""
    plugin, model = getattr(trainer.accelerator.state, "fsdp_plugin", None), trainer.model
    if plugin is not None and "SHARDED" in str(plugin.state_dict_type) and model and adapted_modules(model):
        state_dict = trainer.accelerator.get_state_dict(model)
        if trainer.args.should_save:
            trainer._save(output_dir or trainer.args.output_dir, state_dict=state_dict)
    method(trainer, output_dir, *args, **kwargs)


def load_sharded_optimizer(method: Callable[..., Any], trainer: "Trainer", checkpoint: str | None) -> None:
    """accelerate reads into what state an optimizer of FSDP1 has, where it is sharded: into none before a step."""
    plugin, model = getattr(trainer.accelerator.state, "fsdp_plugin", None), trainer.model
    is_sharded = bool(checkpoint) and any(Path(str(checkpoint)).glob("optimizer_*/"))
    if is_sharded and plugin is not None and plugin.fsdp_version == 1 and model and adapted_modules(model):
        from torch.distributed.checkpoint.state_dict import _init_optim_state  # private, and needed here alone

        _init_optim_state(trainer.optimizer)  # type: ignore[arg-type]
    method(trainer, checkpoint)


def wrap_units(method: Callable[..., Any], model: Any) -> Callable[..., bool]:
    """PEFT's policy has FSDP1 wrap what LoRA trains apart from the frozen block around it, but not what ReFT trains.

    FSDP1 flattens what it wraps into one parameter: of one dtype, and with a gradient for all of it.
    """
    policy = method(model)
    if not adapted_modules(model):
        return policy

    def policy_of_units(module: Any, recurse: bool, **kwargs: Any) -> bool:
        return recurse or isinstance(module, Intervention) or policy(module=module, recurse=recurse, **kwargs)

    return policy_of_units
