"""Patches of transformers' models."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import CONFIG_NAME
from safetensors import safe_open
from transformers.modeling_utils import load_state_dict

from ..config import ReftConfig
from ..layer import LAYER
from ..registration import REFT
from ..runtime.checkpointing import CheckpointEdits
from ..saving.compatibility import check_config
from ..saving.state_dict import check_keys, misfit_error, needed_tensors
from ..transaction import remember, transaction
from .patch import NOT_REPORTED, Patch
from .peft import refuse_disk

MIXIN = "transformers.integrations.peft.PeftAdapterMixin"


def load_whole_adapter(method: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Raise an error for missing or foreign tensors. transformers' `load_adapter` only reports them.

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
    """Undo a failed `add_adapter`: transformers adds the adapter before it activates it, which can fail."""
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
    """Return the keys of the tensors in a file."""
    if file.endswith(".safetensors"):
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    return list(load_state_dict(file, map_location="meta"))


PATCHES = (
    Patch(
        MIXIN,
        "load_adapter",
        load_whole_adapter,
        why="transformers loads an adapter without the tensors that are missing, and keeps one that it failed to load",
        issue=NOT_REPORTED,
        parameters=("peft_model_id", "adapter_name"),
    ),
    Patch(
        MIXIN,
        "add_adapter",
        add_or_undo,
        why="transformers keeps an adapter that it cannot activate",
        issue=NOT_REPORTED,
        parameters=("adapter_config",),
    ),
    Patch(
        "transformers.modeling_layers.GradientCheckpointingLayer",
        "_gradient_checkpointing_func",
        CheckpointEdits,
        why="transformers checkpoints the forward of a block, which does not include the edit of its output",
        issue=NOT_REPORTED,
        scope="model",
    ),
)
