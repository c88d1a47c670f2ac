"""Patches of PEFT."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import CONFIG_NAME
from torch import nn

from ..base_adapters import load_base_adapter, method_of, save_base_adapters, saved_base_adapters
from ..edits.intervention import Intervention
from ..layer import LAYER, adapted_modules, plain_name
from ..model import ReftModel
from ..quantized import keep_dtypes
from ..registration import REFT
from ..saving.card import add_usage_section
from ..saving.compatibility import check_config
from ..transaction import Snapshot, remember, transaction
from .patch import NOT_REPORTED, Patch, patch_object

PEFT_MODEL = "peft.peft_model.PeftModel"
BASE_TUNER = "peft.tuners.tuners_utils.BaseTuner"
NOT_UNDONE = "https://github.com/huggingface/peft/issues/3707"


def init_peft_model(method: Callable[..., None], model: PeftModel, *args: Any, **kwargs: Any) -> None:
    """Undo a `PeftModel` that fails, and give one with a ReFT adapter methods of its own.

    PEFT goes on after an adapter was added, casts it and prepares the model. If that fails, the adapter would stay.
    """
    with transaction():
        method(model, *args, **kwargs)
        if any(config.peft_type == REFT for config in model.peft_config.values()):
            patch_object(model, OF_REFT_MODELS)


def undo_on_error(method: Callable[..., Any], owner: Any, *args: Any, **kwargs: Any) -> Any:
    """Undo a failed attempt to add an adapter. PEFT casts it and prepares the model later, which can fail."""
    with transaction():
        return method(owner, *args, **kwargs)


def load_model_or_undo(
    method: Callable[..., PeftModel], cls: type[PeftModel], model: Any, *args: Any, **kwargs: Any
) -> PeftModel:
    """Undo a failed `from_pretrained`. PEFT adapts the model before it reads the checkpoint.

    Before that it takes accelerate's hooks off a model that is offloaded, which then cannot be called.
    """
    with transaction() as snapshots:
        before = Snapshot(model) if getattr(model, "hf_device_map", None) else None
        try:
            return method(cls, model, *args, **kwargs)
        finally:
            if before is not None and snapshots:  # a ReFT adapter was to be added
                snapshots.insert(0, before)


def begin_tuner(
    method: Callable[..., Any],
    tuner: BaseTuner,
    model: Any,
    peft_config: PeftConfig | dict[str, PeftConfig],
    adapter_name: str,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Refuse another method on top of ReFT, and an adapter that would replace another of its name.

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
    """Leave ReFT's tensors out of other methods' adapters. PEFT saves those of all methods under one name."""
    reft = tuple(f"{plain_name(name)}.{LAYER}." for name in adapted_modules(model))
    tensors = method(cls, model, *args, **kwargs)
    return {key: tensor for key, tensor in tensors.items() if not key.startswith(reft)} if reft else tensors


def load_or_undo(
    method: Callable[..., Any], model: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any
) -> Any:
    """Undo a failed `load_adapter`. PEFT adds the adapter before it reads the checkpoint.

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


def save_both(method: Callable[..., Any], model: PeftModel, folder: Any, *args: Any, **kwargs: Any) -> None:
    """Save the adapters of the base model as well, if it is a `PeftModel` itself."""
    method(model, folder, *args, **kwargs)
    save_base_adapters(model, folder, *args, **kwargs)


def upload_with_card(method: Callable[..., Any], model: PeftModel, folder: str, *args: Any, **kwargs: Any) -> Any:
    """Write the card again before `push_to_hub` uploads: transformers has replaced it by a blank one."""
    configs = [config for config in model.peft_config.values() if config.peft_type == REFT]
    if configs:
        model.create_or_update_model_card(folder)
        add_usage_section(folder, configs[0])
    return method(model, folder, *args, **kwargs)


def wrap_units(method: Callable[..., Any], model: Any) -> Callable[..., bool]:
    """Return a policy that has FSDP1 wrap trained units. PEFT's policy wraps only what LoRA trains.

    FSDP1 flattens what it wraps into one parameter: of one dtype, and with a gradient for all of it.
    """
    policy = method(model)
    if not adapted_modules(model):
        return policy

    def policy_of_units(module: Any, recurse: bool, **kwargs: Any) -> bool:
        return recurse or isinstance(module, Intervention) or policy(module=module, recurse=recurse, **kwargs)

    return policy_of_units


# Methods of a `PeftModel` with a ReFT adapter
OF_REFT_MODELS = (
    Patch(
        PEFT_MODEL,
        "add_adapter",
        undo_on_error,
        why="PEFT keeps a part of an adapter that it failed to add",
        issue=NOT_UNDONE,
        scope="object",
    ),
    Patch(
        PEFT_MODEL,
        "save_pretrained",
        save_both,
        why="PEFT does not save the adapters of a base model that is a PeftModel itself",
        issue=NOT_REPORTED,
        parameters=("save_directory",),
        scope="object",
    ),
    Patch(
        PEFT_MODEL,
        "_upload_modified_files",
        upload_with_card,
        why="push_to_hub of transformers overwrites the model card that PEFT has saved",
        issue=NOT_REPORTED,
        parameters=("working_dir",),
        scope="object",
    ),
)
PATCHES = (
    Patch(
        PEFT_MODEL,
        "__init__",
        init_peft_model,
        why="PEFT keeps a part of an adapter that it failed to add, and has no hook for methods of a PeftModel",
        issue=NOT_UNDONE,
    ),
    Patch(
        PEFT_MODEL,
        "from_pretrained",
        load_model_or_undo,
        why="PEFT leaves the base model adapted, and without its offload hooks, if the checkpoint does not fit",
        issue=NOT_UNDONE,
        parameters=("model",),
    ),
    Patch(
        PEFT_MODEL,
        "load_adapter",
        load_or_undo,
        why="PEFT loads a checkpoint into an adapter that has another config or method, and keeps what it failed to "
        "load",
        issue=NOT_UNDONE,
        parameters=("model_id", "adapter_name"),
    ),
    Patch(
        BASE_TUNER,
        "__init__",
        begin_tuner,
        why="PEFT puts another method on a ReFT adapter, and replaces an adapter of the same name",
        issue=NOT_REPORTED,
        parameters=("model", "peft_config", "adapter_name"),
    ),
    Patch(
        BASE_TUNER,
        "_get_adapter_state_dict",
        own_state_dict,
        why="PEFT saves with an adapter the tensors of another method's adapter of the same name",
        issue=NOT_REPORTED,
        parameters=("model",),
    ),
    Patch(
        "peft.utils.other",
        "fsdp_auto_wrap_policy",
        wrap_units,
        why="PEFT has FSDP1 wrap apart only trained modules with a weight and no child, but ReFT's have a dropout "
        "that TRL must find",
        issue=NOT_REPORTED,
    ),
)
