"""Edits of another library, saved as a PEFT adapter of the base model."""

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import get_peft_model
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto import modeling_auto as auto

from ..config import ReftConfig
from ..edits.intervention import INIT_ROW_NORM
from ..edits.orthonormal import orthonormal_rows
from ..edits.variants import VARIANTS
from ..saving.state_dict import PEFT_PREFIX, Key, check_checkpoint, needed_tensors
from ..targets import find_blocks
from .edits import Edits, Tensors

# PEFT's task types, with transformers' classes for them by the type of the config
TASKS: dict[str, dict[str, Any]] = {
    "CAUSAL_LM": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "SEQ_2_SEQ_LM": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "SEQ_CLS": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "TOKEN_CLS": auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "QUESTION_ANS": auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "FEATURE_EXTRACTION": auto.MODEL_MAPPING_NAMES,
}
WITH_A_HEAD = {"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"}  # for which PEFT trains and saves the head
LARGEST_DEFECT = 0.05  # of R R^T from the identity: bfloat16 leaves less than 0.01


def with_orthonormal_rows(unit: Tensors, intervention: str, act_fn: str | None) -> Tensors:
    """Return the same edit with an R [r, d] whose rows are orthonormal, where the variant requires it.

    A saved R is so up to rounding, R = L Q with L near the identity. The edit R^T (W h + b - R h) is also
    Q^T (L^T W h + L^T b - L^T L Q h), of which what is not Q h goes into W. With an activation between, or no W, there
    is no such room, and what rounding took from R stays.

    Raises:
        ValueError: if the rows of R are far from orthonormal.
    """
    variant, given = VARIANTS[intervention], unit["R"].double()
    if not variant.orthonormal:
        return unit
    defect = (given @ given.mT - torch.eye(len(given), dtype=given.dtype)).abs().max()
    if not defect < LARGEST_DEFECT:
        raise ValueError(
            f"The projection of {intervention} has no orthonormal rows: R R^T is {defect:.2g} away from the identity. "
            "(Weight decay makes zeros of rows that torch's parametrizations.orthogonal keeps so.)"
        )
    rows = orthonormal_rows(given)
    factor_t = rows @ given.mT  # L^T
    found = unit | {"R": rows}
    if act_fn is None and (variant.linear or not variant.subtract):
        found["b"] = factor_t @ unit["b"].double()
        if variant.linear:
            found["W"] = factor_t @ unit["W"].double()
        if variant.subtract:
            found["W"] = found["W"] - factor_t @ given + rows
    return {name: tensor.float() for name, tensor in found.items()}


def make_base(base_model: str, task_type: str | None, num_labels: int | None) -> tuple[PreTrainedModel, str | None]:
    """Return the base model on the meta device, and its task type for PEFT, None if it has none."""
    config = AutoConfig.from_pretrained(base_model, **({} if num_labels is None else {"num_labels": num_labels}))
    if task_type is None:
        architecture = next(iter(config.architectures or []), "")
        task_type = next((task for task, classes in TASKS.items() if architecture in classes.values()), None)
    else:
        architecture = TASKS.get(task_type, {}).get(config.model_type, "")
    model_class = getattr(transformers, architecture, None) if isinstance(architecture, str) else None
    if model_class is None:
        raise ValueError(
            f"transformers has no class for {base_model} (model_type={config.model_type!r}, architectures="
            f"{config.architectures}) and task_type={task_type!r}: give another task_type (--task-type), one of "
            f"{', '.join(TASKS)}."
        )
    with torch.device("meta"):
        return model_class(config), task_type


def find_module(model: PreTrainedModel, blocks: list[str], module: int | str) -> str:
    """Return the model's name of a block or of another module. Another model class may name it differently."""
    if isinstance(module, int):
        if not -len(blocks) <= module < len(blocks):
            raise ValueError(f"The checkpoint edits layer {module}, but the base model has {len(blocks)}.")
        return blocks[module]
    names = [name for name, _ in model.named_modules() if name]
    found = [name for name in names if name == module]
    found = found or [name for name in names if f".{name}".endswith(f".{module}")]
    prefix = f"{model.base_model_prefix}."
    found = found or [name for name in names if f"{prefix}{name}" == module]
    if len(found) != 1:
        raise ValueError(
            f"The checkpoint edits {module!r}, which is {'no module' if not found else 'several modules'} of "
            f"{type(model).__name__}: {', '.join(found) or 'its blocks are ' + ', '.join(blocks[:3])}."
        )
    return found[0]


def make_config(edits: Edits, ranks: dict[str, int], blocks: list[str], task_type: str | None) -> ReftConfig:
    """Return the config for edits of these ranks, by the names of their modules."""
    r = Counter(ranks.values()).most_common(1)[0][0]
    where: dict[str, Any] = {}
    if not ranks.keys() <= {*blocks}:
        where = {"target_modules": sorted(ranks)}
    elif len(ranks) < len(blocks):
        where = {"layers_to_transform": sorted(blocks.index(name) for name in ranks)}
    return ReftConfig(
        task_type=task_type,
        intervention=edits.intervention,
        r=r,
        rank_pattern={name: rank for name, rank in ranks.items() if rank != r},
        positions=edits.positions,
        share_weights=edits.share_weights,
        dropout=edits.dropout,
        act_fn=edits.act_fn,
        standardize=False,
        modules_to_save=sorted({name.partition(".")[0] for name in edits.head}) or None,
        **where,
    )


def head_of(edits: Edits, model: PreTrainedModel) -> Tensors:
    """Return the tensors of the base model's head that were trained with the edits.

    Raises:
        ValueError: if any of it is no parameter of the model's head.
    """
    output = model.get_output_embeddings()
    frozen = set() if output is None or edits.trains_output_embeddings else set(output.parameters())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    head = {name: tensor for name, tensor in edits.head.items() if parameters.get(name) not in frozen}
    for name, tensor in head.items():
        is_of_head = name in parameters and not name.startswith(f"{model.base_model_prefix}.")
        if not is_of_head or parameters[name].shape != tensor.shape:
            raise ValueError(
                f"{name!r} {list(tensor.shape)}, which was trained with the edits, is no parameter of the head of "
                f"{type(model).__name__} as the base model's config makes it. Give the task_type (--task-type) and, "
                "of a classifier, its num_labels (--num-labels), or leave the head out: head=False (--no-head)."
            )
    modules = tuple(f"{name.partition('.')[0]}." for name in head)
    if missing := [name for name in parameters if name.startswith(modules) and name not in head]:
        raise ValueError(
            f"{missing[0]!r} is not saved with the rest of the head: PEFT saves whole modules. Leave the head out: "
            "head=False (--no-head)."
        )
    return head


def save_adapter(
    edits: Edits, base_model: str, destination: str | Path, task_type: str | None, num_labels: int | None, head: bool
) -> None:
    """Write a PEFT adapter: adapter_config.json, adapter_model.safetensors and README.md."""
    if Path(destination).is_dir() and any(Path(destination).iterdir()):
        raise ValueError(f"{destination} is not empty: nothing there is written over. Give a folder that is new.")
    model, task_type = make_base(base_model, task_type, num_labels)
    blocks = find_blocks(model, None)
    units = {find_module(model, blocks, module): found for module, found in edits.units.items()}
    if edits.every_block and (missing := [block for block in blocks if block not in units]):
        raise ValueError(f"The checkpoint is not whole: it edits all layers, and has no tensors of {missing[0]}.")
    edits = replace(edits, head=head_of(edits, model) if head else {})
    if task_type in WITH_A_HEAD and not edits.head:
        warnings.warn("No trained head is converted: the adapter uses that of the base model.", stacklevel=3)
        task_type = None  # or PEFT would save one
    ranks = {name: next(iter(found.values()))["R"].shape[0] for name, found in units.items()}
    adapted = get_peft_model(model, make_config(edits, ranks, blocks, task_type))
    state = dict(state_of(units, edits))
    own = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in state.items()}
    check_checkpoint("default", needed_tensors(model, "default"), own)
    adapted.load_state_dict(state, strict=False, assign=True)
    adapted.save_pretrained(str(destination), save_embedding_layers=False)


def state_of(units: dict[str, dict[str, Tensors]], edits: Edits) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of the adapter with their keys in the state dict of a `PeftModel`."""
    for module, found in units.items():
        for unit, tensors in found.items():
            saved = with_orthonormal_rows(tensors, edits.intervention, edits.act_fn)
            if VARIANTS[edits.intervention].orthonormal:
                saved["R"] = INIT_ROW_NORM * saved["R"]  # as new ones are drawn: it trains on as it did
            for name, tensor in saved.items():
                yield f"{PEFT_PREFIX}{Key(module, unit, name, 'default')}", tensor.contiguous()
    for key, tensor in edits.head.items():
        module, _, name = key.partition(".")
        yield f"{PEFT_PREFIX}{module}.modules_to_save.default.{name}", tensor
