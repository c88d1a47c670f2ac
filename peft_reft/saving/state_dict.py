"""The tensors of an adapter in a state dict: their keys, their shapes, and what does not belong to them."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from peft import PeftConfig
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..config import ReftConfig
from ..edits.intervention import TENSORS, Intervention
from ..layer import LAYER, SAVED_WITHOUT, SLOT, UNITS, adapted_modules, base_modules, plain_name
from .compatibility import trained_tokens

PEFT_PREFIX = "base_model.model."  # of all keys of a PeftModel


class Key(NamedTuple):
    """A key of an adapter's tensor in a state dict.

    Attributes:
        module (`str`): the name of the module that is adapted.
        unit (`str`): one of `UNITS`.
        tensor (`str`): one of `TENSORS`.
        adapter_name (`str`, *optional*): the adapter, in a model's state dict; None in a checkpoint.
    """

    module: str
    unit: str
    tensor: str
    adapter_name: str | None = None

    @classmethod
    def read(cls, key: str) -> "Key | None":
        """Return the parts of a key, or None if it is of no ReFT adapter."""
        module, found, rest = key.rpartition(f".{LAYER}.{SLOT}")
        unit, *adapter_name, tensor = rest.split(".") if rest.count(".") in (1, 2) else ("", "")
        if not found or unit not in UNITS:
            return None
        return cls(module, unit, tensor.removeprefix("_"), adapter_name[0] if adapter_name else None)

    def __str__(self) -> str:
        parts = (self.module, LAYER, f"{SLOT}{self.unit}", self.adapter_name, f"_{self.tensor}")
        return ".".join(part for part in parts if part is not None)


def check_names(
    model: nn.Module, peft_config: ReftConfig, targets: Iterable[str], adapter_names: Iterable[str]
) -> None:
    """Raise a ValueError if the name of an adapter is a part of the keys of what adapters save.

    PEFT leaves out of an adapter's state dict each key of which another adapter's name is a part, but for the first.

    Args:
        model (`torch.nn.Module`): the model.
        peft_config (`ReftConfig`): the config of the adapter that is added.
        targets (`Iterable[str]`): the names of the modules that it adapts.
        adapter_names (`Iterable[str]`): the names of all adapters, this one included.
    """
    modules = [plain_name(name) for name in (*targets, *adapted_modules(model))]
    keys = [str(Key(module, unit, tensor)) for module in modules for unit in UNITS for tensor in TENSORS]
    saved, embeddings = tuple(peft_config.modules_to_save or ()), tuple(trained_tokens(model, peft_config))
    for name, module in base_modules(model):
        if isinstance(module, ModulesToSaveWrapper) or (saved and name.endswith(saved)):
            own = getattr(module, "original_module", module).state_dict()
            keys += [f"{plain_name(name)}.modules_to_save.{key}" for key in own]
        if isinstance(module, TrainableTokensWrapper) or (embeddings and name.endswith(embeddings)):
            keys.append(f"{plain_name(name)}.token_adapter.trainable_tokens_delta")
    for name in adapter_names:
        # "base_model.model." precedes all keys of a PeftModel: where all have the name, PEFT leaves out none.
        key = next((key for key in keys if name in key.split(".")[name == "model" :]), None)
        if key is not None:
            raise ValueError(
                f"An adapter cannot be called {name!r} here: that is a part of {key!r}, and PEFT does not save a key "
                "that has the name of another adapter in it. Choose another adapter_name."
            )


def tensors_of(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Intervention, str]]:
    """Yield the tensors of an adapter: the key in the model's state dict, the unit, and the name within the unit."""
    for name, (_, layer) in adapted_modules(model).items():
        for unit, intervention in layer.units(adapter_name).items():
            for tensor in intervention.shapes():
                key = Key(plain_name(name, SAVED_WITHOUT), unit, tensor, adapter_name)
                yield str(key), intervention, tensor


def needed_tensors(model: nn.Module, adapter_name: str) -> dict[str, tuple[int, ...]]:
    """Return the full shapes of an adapter's tensors, by their keys in the model's state dict."""
    return {key: unit.shapes()[name] for key, unit, name in tensors_of(model, adapter_name)}


def is_other_rank() -> bool:
    """Whether this is one of several processes, and not the first."""
    return torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() > 0


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor, gathered from all processes if FSDP2 has sharded it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_as(parameter: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor sharded like a parameter, if FSDP2 has sharded that."""
    if not isinstance(parameter, DTensor) or isinstance(tensor, DTensor):
        return tensor
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(tensor.to(parameter.device), mesh, placements, src_data_rank=None)  # all have it


def wrong_shapes(needed: dict[str, tuple[int, ...]], given: dict[str, torch.Tensor]) -> list[str]:
    """Return the errors in the shapes of given tensors."""
    return [
        f"{key} is {list(given[key].size())}, not {list(needed[key])}"
        for key in needed.keys() & given.keys()
        if tuple(given[key].size()) != needed[key]
    ]


def check_checkpoint(
    adapter_name: str, needed: dict[str, tuple[int, ...]], state_dict: dict[str, torch.Tensor]
) -> None:
    """Raise a ValueError unless a checkpoint has just the tensors that the adapter needs."""
    given = {key: tensor for key, tensor in state_dict.items() if Key.read(key) is not None}
    problems = [f"{key} is missing" for key in needed.keys() - given.keys()]
    problems += [f"{key} has no place" for key in given.keys() - needed.keys()]
    problems += wrong_shapes(needed, given)
    if problems:
        raise misfit_error(adapter_name, problems)


def wrapped_keys(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield what is saved with adapters besides edits: an adapter's name and a key, in files and in the model."""
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            for adapter_name in module._adapters:
                for key, own in module.adapter_state_dict_load_map(adapter_name).items():
                    yield adapter_name, f"{plain_name(name)}.{key}"
                    yield adapter_name, f"{plain_name(name)}.{own}"


def is_resized(model: nn.Module, config: PeftConfig) -> bool:
    """Whether a model's vocabulary is not that of the base model, so that PEFT saves embeddings with adapters."""
    own = getattr(model, "config", None)
    for source in (config.base_model_name_or_path, getattr(own, "_name_or_path", None)):
        try:
            if source and type(own).from_pretrained(source).vocab_size != own.vocab_size:  # type: ignore[union-attr]
                return True
        except (AttributeError, OSError, ValueError):  # not there, or of another kind
            continue
    return False


def embedding_prefixes(model: nn.Module) -> list[str]:
    """Return the prefixes of the keys of a model's input and output embeddings."""
    getters = (getattr(model, name, None) for name in ("get_input_embeddings", "get_output_embeddings"))
    layers = [layer for getter in getters if getter is not None and (layer := getter()) is not None]
    return [f"{plain_name(name)}." for name, module in model.named_modules() if any(module is one for one in layers)]


def check_keys(model: nn.Module, adapter_name: str, keys: Iterable[str]) -> None:
    """Raise a ValueError if a checkpoint has tensors that its adapter does not need: they would be written for good.

    An adapter needs its own tensors, the modules and tokens that its config has trained, and embeddings of a
    vocabulary that was resized.

    Args:
        model (`torch.nn.Module`): the model, to which the adapter has been added.
        adapter_name (`str`): the name of the adapter.
        keys (`Iterable[str]`): the keys of the checkpoint, with or without the prefix of a `PeftModel`.
    """
    config: PeftConfig = model.peft_config[adapter_name]  # type: ignore[index, assignment]
    prefix = f"{getattr(model, 'base_model_prefix', '')}."

    def short(key: str) -> str:  # transformers loads a model into one that has a head, and the other way round
        return key.removeprefix(PEFT_PREFIX).removeprefix(prefix)

    wrapped = [(name, short(key)) for name, key in wrapped_keys(model)]
    needed = {key for name, key in wrapped if name == adapter_name}
    foreign = [key for key in keys if Key.read(key) is None and short(key) not in needed]
    if foreign and is_resized(model, config):
        embeddings = tuple(short(prefix) for prefix in embedding_prefixes(model))
        others = {key for _, key in wrapped} - needed
        foreign = [key for key in foreign if not short(key).startswith(embeddings) or short(key) in others]
    if foreign:
        raise ValueError(
            f"The checkpoint of adapter {adapter_name!r} has tensors that the adapter does not need: "
            f"{in_short(foreign)}. They would be written into the base model or another adapter: take them out of the "
            "file. Modules that were trained with the adapter must be named in its modules_to_save. Embeddings may be "
            "there if the vocabulary was resized, in this model too; else save with save_embedding_layers=False."
        )


def in_short(problems: list[str]) -> str:
    """Return the first three of some problems or keys, and the number of the others."""
    more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
    return f"{'; '.join(sorted(problems)[:3])}{more}"


def misfit_error(adapter_name: str, problems: list[str]) -> ValueError:
    """Return the error for a checkpoint that does not fit its config. It names the first problems."""
    return ValueError(
        f"The checkpoint of adapter {adapter_name!r} does not fit its config: "
        f"{in_short(problems)}. Its r, rank_pattern, positions, share_weights, intervention "
        "and layers must be those that it was trained with, and so must the base model's shape."
    )
