"""Whether two configs are of the same adapter."""

from typing import Any

from peft import PeftConfig, PeftModel, TaskType
from peft.utils.other import _get_input_embeddings_name
from torch import nn
from transformers import PreTrainedModel

from ..config import ReftConfig
from ..edits.variants import VARIANTS, standardized_form
from ..layer import base_modules
from ..positions.language import Positions
from ..targets import find_targets

# The fields of a config that choose the modules and their ranks, together
TARGETS = ("r", "rank_pattern", "layers_to_transform", "layers_pattern", "target_modules", "exclude_modules")
# All that say what an adapter computes: not how it is trained (dropout) or was drawn (init_weights)
FIELDS = (
    *("intervention", "act_fn", "standardize", "positions", "share_weights", *TARGETS),
    *("modules_to_save", "trainable_token_indices", "task_type"),
)


def trained_tokens(model: nn.Module, config: ReftConfig) -> dict[str, list[int]]:
    """Return the indices of the trained tokens in their order, by the names of the embeddings."""
    indices: Any = config.trainable_token_indices or {}
    if isinstance(indices, list):
        return {_get_input_embeddings_name(model, "embed_tokens") or "embed_tokens": indices}
    return indices


def meaning(model: nn.Module, config: ReftConfig, field: str) -> Any:
    """Return the effect of a config's field in a model. Values with the same effect are equal.

    Raises:
        ValueError: if the config does not fit the model.
    """
    if field in TARGETS:
        return find_targets(model, config)
    names = [name for name, _ in base_modules(model)]
    if field == "modules_to_save":
        return {name for name in names if config.modules_to_save and name.endswith(tuple(config.modules_to_save))}
    if field == "trainable_token_indices":
        tokens = trained_tokens(model, config).items()
        return {name: list(indices) for key, indices in tokens for name in names if name.endswith(key)}
    if field == "standardize":
        return config.standardize and standardized_form(VARIANTS[config.intervention], config.act_fn is not None)
    if field == "act_fn":
        return config.act_fn if VARIANTS[config.intervention].linear else None
    if field == "share_weights":
        return Positions.parse(config.positions).units(config.share_weights)
    if field == "task_type":  # tells of other models alone whether they generate
        generates = isinstance(model, PreTrainedModel) and model.can_generate()
        return generates or config.task_type in (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM)
    return getattr(config, field)


def differences(model: nn.Module, own: PeftConfig, other: PeftConfig) -> list[str]:
    """Return the fields of two configs for a base model that make the adapters compute something else."""
    if not isinstance(own, ReftConfig) or not isinstance(other, ReftConfig):
        return [] if own.peft_type == other.peft_type else ["peft_type"]
    fields = [field for field in FIELDS if getattr(own, field) != getattr(other, field)]
    same = {}
    for field in fields:
        try:
            same[field] = meaning(model, own, field) == meaning(model, other, field)
        except ValueError:  # the other one is for another model
            same[field] = False
    return [field for field in fields if not same[field]]


def check_config(model: nn.Module, adapter_name: str, own: PeftConfig, other: PeftConfig, source: Any) -> None:
    """Raise a ValueError if a checkpoint's config differs from that of the adapter which it is loaded into.

    Args:
        model (`torch.nn.Module`): the model.
        adapter_name (`str`): the name of the adapter.
        own (`PeftConfig`): the adapter's config.
        other (`PeftConfig`): the checkpoint's config.
        source (`str` or `os.PathLike`): where the checkpoint lies.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    fields = differences(base, own, other)
    if fields:
        both = "; ".join(
            f"{f}={getattr(own, f)!r} in the model, {getattr(other, f)!r} in the checkpoint" for f in fields
        )
        raise ValueError(
            f"{source} was trained with another config than that of the model's adapter {adapter_name!r}: {both}. "
            "Load it under an adapter_name that is new, or make the adapter with its config: "
            f"ReftConfig.from_pretrained({str(source)!r}). To use its weights with the model's config, where the "
            f"shapes allow it: set_peft_model_state_dict(model, load_peft_weights({str(source)!r}), {adapter_name!r})."
        )
