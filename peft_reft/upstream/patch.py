"""Methods and functions of PEFT and transformers that are completed in memory, for ReFT adapters alone.

Each would serve the user well but for one thing, which ReFT has no other place to do.
"""

import functools
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderDispatcher
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import CONFIG_NAME, other
from safetensors import safe_open
from torch import nn
from transformers import GenerationMixin
from transformers.integrations import PeftAdapterMixin
from transformers.modeling_utils import load_state_dict

from ..base_adapters import (
    base_peft_model,
    load_base_adapter,
    load_base_adapters,
    method_of,
    save_base_adapters,
    saved_base_adapters,
)
from ..collator import PromptLengthsAdder
from ..config import ReftConfig
from ..edits.intervention import Intervention
from ..layer import LAYER, adapted_modules, base_modules, plain_name
from ..model import ReftModel
from ..quantized import keep_dtypes
from ..registration import REFT
from ..resume import STATE
from ..runtime import continuous_batching
from ..runtime.call import Role, note_labels
from ..runtime.generate import DecoderGeneration, current_generation
from ..saving.card import describe_use
from ..saving.compatibility import check_config
from ..saving.state_dict import check_keys, misfit_error, needed_tensors
from ..transaction import Snapshot, remember, transaction

if TYPE_CHECKING:
    from transformers import Trainer
    from transformers.trainer_callback import CallbackHandler


def complete_upstream() -> None:
    """Complete the methods, once."""
    complete(PeftModel, "_upload_modified_files", upload_with_card)
    complete(PeftModel, "__init__", undo_on_error)
    complete(PeftModel, "add_adapter", undo_on_error)
    complete(PeftModel, "from_pretrained", load_model_or_undo)
    complete(PeftModel, "load_adapter", load_or_undo)
    complete(PeftModel, "save_pretrained", save_both)
    complete(BaseTuner, "__init__", begin_tuner)
    complete(BaseTuner, "_get_adapter_state_dict", own_state_dict)
    complete(PeftAdapterMixin, "load_adapter", load_whole_adapter)
    complete(PeftAdapterMixin, "add_adapter", add_or_undo)
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
        complete(module.Trainer, "_get_dataloader", begin_data)
        complete(module.Trainer, "_prepare_inputs", note_labels_in_evaluation)
        complete(module.Trainer, "_save_checkpoint", begin_checkpoint)
        complete(module.Trainer, "save_model", save_sharded)
        complete(module.Trainer, "_load_optimizer_and_scheduler", load_sharded_optimizer)
        complete(module.Trainer, "_load_from_checkpoint", check_resumed)
        complete(module.Trainer, "_load_best_model", load_best_of_both)
        complete(module, "deepspeed_load_checkpoint", check_engine)


def complete(owner: Any, name: str, completed: Callable[..., Any]) -> None:
    """Replace a method of a class or a function of a module by `completed`, which is given it before its arguments."""
    static = inspect.getattr_static(owner, name)
    method = static.__func__ if isinstance(static, classmethod) else static
    if "completed_by_reft" in vars(method):
        return

    @functools.wraps(method)
    def replacement(self: Any, *args: Any, **kwargs: Any) -> Any:
        return completed(method, self, *args, **kwargs)

    vars(replacement)["completed_by_reft"] = True
    setattr(owner, name, classmethod(replacement) if isinstance(static, classmethod) else replacement)


def upload_with_card(method: Callable[..., Any], model: PeftModel, folder: str, *args: Any, **kwargs: Any) -> Any:
    """Part of `push_to_hub`: transformers has just written a blank card over the one that PEFT had saved."""
    configs = [config for config in model.peft_config.values() if config.peft_type == REFT]
    if configs:
        model.create_or_update_model_card(folder)
        describe_use(folder, configs[0])
    return method(model, folder, *args, **kwargs)


def undo_on_error(method: Callable[..., Any], owner: Any, *args: Any, **kwargs: Any) -> Any:
    """PEFT goes on after an adapter was added, casts it and prepares the model: if that fails, it would stay."""
    with transaction():
        return method(owner, *args, **kwargs)


def load_model_or_undo(
    method: Callable[..., PeftModel], cls: type[PeftModel], model: Any, *args: Any, **kwargs: Any
) -> PeftModel:
    """PEFT's `from_pretrained` adapts a model before it looks at the checkpoint, and would leave it so.

    Before that it takes accelerate's hooks off a model that is offloaded, which then cannot be called.
    """
    with transaction() as snapshots:
        before = Snapshot(model) if getattr(model, "hf_device_map", None) else None
        try:
            return method(cls, model, *args, **kwargs)
        finally:
            if before is not None and snapshots:  # a ReFT adapter was to be added
                snapshots.insert(0, before)


def save_both(method: Callable[..., Any], model: PeftModel, folder: Any, *args: Any, **kwargs: Any) -> None:
    """PEFT's `save_pretrained` leaves out the adapters of a base model that is a `PeftModel` itself."""
    method(model, folder, *args, **kwargs)
    save_base_adapters(model, folder, *args, **kwargs)


def begin_tuner(
    method: Callable[..., Any],
    tuner: BaseTuner,
    model: Any,
    peft_config: PeftConfig | dict[str, PeftConfig],
    adapter_name: str,
    *args: Any,
    **kwargs: Any,
) -> None:
    """PEFT puts one method on another in any order, and an adapter in the place of another of its name.

    Raises:
        ValueError: if another method is put on ReFT, or one of two adapters of a name would be lost.
    """
    if isinstance(model, PeftModel) and isinstance(model.base_model, ReftModel):
        raise ValueError(
            f"{type(tuner).__name__} cannot be put on a model with ReFT adapters: ReFT comes last. Add or load the "
            "other adapter first and ReFT on top: model = PeftModel.from_pretrained(base, lora_folder), then "
            "PeftModel.from_pretrained(model, reft_folder). model.unload() gives the model without ReFT."
        )
    config = peft_config if isinstance(peft_config, PeftConfig) else peft_config[adapter_name]
    there = (getattr(model, "peft_config", None) or {}).get(adapter_name)
    if there is not None and there.peft_type != config.peft_type and REFT in (there.peft_type, config.peft_type):
        raise ValueError(
            f"The model has an adapter {adapter_name!r} already, of type {method_of(there)}, which one of type "
            f"{method_of(config)} would replace. Give the new one another adapter_name."
        )
    method(tuner, model, peft_config, adapter_name, *args, **kwargs)


def own_state_dict(method: Callable[..., Any], cls: type[BaseTuner], model: Any, *args: Any, **kwargs: Any) -> Any:
    """PEFT saves with an adapter the tensors of every method that has one of its name in the model."""
    reft = tuple(f"{plain_name(name)}.{LAYER}." for name in adapted_modules(model))
    tensors = method(cls, model, *args, **kwargs)
    return {key: tensor for key, tensor in tensors.items() if not key.startswith(reft)} if reft else tensors


def load_or_undo(
    method: Callable[..., Any], model: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any
) -> Any:
    """PEFT's `load_adapter` adds an adapter before it looks at the checkpoint, and would leave it if that is unfit.

    Into an adapter that is there it loads tensors alone, whatever they were trained for.

    Raises:
        ValueError: if the adapter cannot be loaded into a model whose parts lie where they do, or has another config
            than the one that is there.
    """
    if adapter_name in saved_base_adapters(model) and adapter_name not in model.peft_config:
        return load_base_adapter(model, model_id, adapter_name, *args, **kwargs)  # for a `Trainer` that resumes
    with transaction():
        is_reft = isinstance(model.base_model, ReftModel)
        if is_reft:
            remember(model, adapter_name)
        if adapter_name in model.peft_config:
            check_folder(model, adapter_name, model_id, **model._split_kwargs(kwargs)[0])
        if not is_reft:
            return method(model, model_id, adapter_name, *args, **kwargs)
        in_place = is_in_place(model, adapter_name)  # as when training is resumed
        if not in_place:  # but placed anew, if `from_pretrained` has added it
            refuse_disk(model, {adapter_name} & set(model.peft_config))
        with placed_for_good(model) if in_place else overwritten(model):
            result = method(model, model_id, adapter_name, *args, **kwargs)
        keep_dtypes(model)  # of tensors that may be other ones than those that were made
    return result


def check_folder(model: nn.Module, adapter_name: str, source: Any, **kwargs: Any) -> None:
    """Raise a ValueError if an adapter's config is not that of the checkpoint in a folder, or on the Hub."""
    folder = Path(source, kwargs.get("subfolder") or "")
    own: PeftConfig = model.peft_config[adapter_name]  # type: ignore[index, assignment]
    if folder.is_dir() and not (folder / CONFIG_NAME).exists():
        return  # it is not known
    other = PeftConfig.from_pretrained(str(source), **kwargs)
    if REFT in (own.peft_type, other.peft_type):
        check_config(model, adapter_name, own, other, source)


def check_resumed(method: Callable[..., Any], trainer: "Trainer", checkpoint: str, *args: Any, **kwargs: Any) -> None:
    """FSDP's state dicts are loaded past PEFT's `load_adapter`."""
    refuse_sharded_base_adapters(trainer)
    check_checkpoint_folder(trainer.model, checkpoint)
    method(trainer, checkpoint, *args, **kwargs)


def check_engine(method: Callable[..., Any], engine: Any, checkpoint: str, *args: Any, **kwargs: Any) -> None:
    """And so are DeepSpeed's."""
    check_checkpoint_folder(engine.module, checkpoint)
    method(engine, checkpoint, *args, **kwargs)


def check_checkpoint_folder(model: Any, checkpoint: str) -> None:
    """Raise a ValueError if the adapters of a trainer's checkpoint have other configs than the model's."""
    for name, config in getattr(model, "peft_config", {}).items():
        folder = Path(checkpoint) if name == "default" else Path(checkpoint, name)  # where PEFT saves them
        if config.peft_type == REFT and (folder / CONFIG_NAME).exists():
            check_folder(model, name, folder)


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
        ValueError: if the checkpoint does not fit its config, or has tensors that the adapter does not need; the model
            is then what it was before.
    """
    before = set(getattr(model, "peft_config", {}))
    check_given_config(inspect.signature(method).bind(model, *args, **kwargs).arguments)
    with keys_checked(model, before), transaction():
        info = method(model, *args, **kwargs)
        added = [name for name in model.peft_config if name not in before]
        if any(model.peft_config[name].peft_type == REFT for name in added):
            refuse_disk(model, added)
            # The tensors of other adapters are missing from the checkpoint as well.
            problems = [f"{key} is missing" for key in info.missing_keys & needed_tensors(model, added[0]).keys()]
            problems += [f"{key} has no place" for key in info.unexpected_keys if f".{LAYER}." in key]
            if problems:
                raise misfit_error(added[0], problems)
    return info


def add_or_undo(method: Callable[..., None], model: Any, adapter_config: Any, *args: Any, **kwargs: Any) -> None:
    """transformers' `add_adapter` adds an adapter and then activates it, which other adapters may not allow."""
    with transaction():
        if isinstance(adapter_config, ReftConfig):
            remember(model)
        method(model, adapter_config, *args, **kwargs)


def check_given_config(arguments: dict[str, Any]) -> None:
    """Raise a ValueError if transformers' `load_adapter` is given a config that is not the one beside the tensors."""
    model, source, config = arguments["self"], arguments.get("peft_model_id"), arguments.get("peft_config")
    folder = Path(source or "", (arguments.get("adapter_kwargs") or {}).get("subfolder") or "")
    is_known = source is not None and arguments.get("adapter_state_dict") is None and (folder / CONFIG_NAME).exists()
    if is_known and isinstance(config, PeftConfig) and config.peft_type == REFT:
        name = arguments.get("adapter_name") or "default"
        check_config(model, name, config, PeftConfig.from_pretrained(str(folder)), folder)


@contextmanager
def keys_checked(model: Any, before: set[str]) -> Iterator[None]:
    """Have transformers look at the keys of a ReFT adapter's checkpoint before it writes any of its tensors."""
    load = model._load_pretrained_model

    def check_and_load(*, state_dict: Any, checkpoint_files: Any, **kwargs: Any) -> Any:
        for name in model.peft_config.keys() - before:
            if model.peft_config[name].peft_type == REFT:
                keys = [key for file in checkpoint_files or () for key in keys_of(file)]
                check_keys(model, name, keys if state_dict is None else state_dict)
        return load(state_dict=state_dict, checkpoint_files=checkpoint_files, **kwargs)

    vars(model)["_load_pretrained_model"] = check_and_load
    try:
        yield
    finally:
        vars(model).pop("_load_pretrained_model", None)


def keys_of(file: str) -> list[str]:
    """The keys of the tensors in a file."""
    if file.endswith(".safetensors"):
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    return list(load_state_dict(file, map_location="meta"))


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


def begin_data(method: Callable[..., Any], trainer: "Trainer", *args: Any, **kwargs: Any) -> Any:
    """A trainer makes its data loaders here, that of training before its first step."""
    if kwargs.get("is_training") and trainer.model is not None and roles_of(trainer.model):
        warn_if_frozen(trainer.model)
    return add_prompt_lengths(method, trainer, *args, **kwargs)


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


def warn_if_frozen(model: Any) -> None:
    """Warn that training would change nothing."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        warnings.warn(
            "Nothing of this model is trained: its ReFT adapter is frozen, as PEFT loads adapters. Load it with "
            "PeftModel.from_pretrained(..., is_trainable=True) to train it.",
            stacklevel=2,
        )


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


def refuse_sharded_base_adapters(trainer: "Trainer") -> None:
    """Raise a ValueError if FSDP shards a base model with adapters: accelerate saves and loads one adapter there."""
    if base_peft_model(trainer.model) is not None and trainer.is_fsdp_enabled:
        raise ValueError(
            "Training cannot be resumed under FSDP where the base model of ReFT has adapters of its own. Load both "
            "from the checkpoint with PeftModel.from_pretrained(..., is_trainable=True), and start anew."
        )


def load_best_of_both(method: Callable[..., Any], trainer: "Trainer") -> None:
    """transformers loads the best weights of one adapter: those of the base model's own belong to them."""
    checkpoint: Any = trainer.state.best_model_checkpoint
    if base_peft_model(trainer.model) is not None:
        refuse_sharded_base_adapters(trainer)
        load_base_adapters(trainer.model, checkpoint)  # type: ignore[arg-type]
    method(trainer)


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
