"""Patches of transformers' `Trainer`, and of what accelerate does for it.

A trainer whose model has a ReFT adapter gets methods of its own at the end of `Trainer.__init__`.
"""

import functools
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import DataLoaderDispatcher
from peft.utils import CONFIG_NAME
from torch import nn

from ..autoload import stop_watching, watch
from ..base_adapters import base_peft_model, load_base_adapters
from ..collator import PromptLengthsAdder
from ..edits.intervention import Intervention
from ..layer import adapted_modules, base_modules
from ..registration import REFT
from ..resume import STATE
from ..runtime.call import ModuleRole, note_labels
from .patch import NOT_REPORTED, Patch, patch_class, patch_object
from .peft import check_folder

if TYPE_CHECKING:
    from transformers import Trainer

SWITCH = "PEFT_REFT_PROMPT_LENGTHS"  # an environment variable; "0" keeps trainers from adding prompt_lengths
MODULE = "transformers.trainer"
TRAINER = f"{MODULE}.Trainer"


def patch_trainer() -> None:
    """Patch `Trainer` at the end of the import of its module.

    peft_reft does not import it: that takes longer than all else, since it imports datasets.
    """
    watch(MODULE, patch_imported_trainer)


def patch_imported_trainer() -> None:
    """Patch `Trainer` if its module has it: the import may have failed, or a finder may have made another spec."""
    if hasattr(sys.modules.get(MODULE), "Trainer"):
        stop_watching(MODULE)
        patch_class(INIT)


def init_trainer(method: Callable[..., None], trainer: "Trainer", *args: Any, **kwargs: Any) -> None:
    """Prepare a trainer whose model has a ReFT adapter.

    TRL's trainers have cast what is trained on a 4-bit or 8-bit base to bfloat16, which rounds most steps away.
    """
    method(trainer, *args, **kwargs)
    model = trainer.model
    if isinstance(model, nn.Module) and adapted_modules(model):
        for module in model.modules():
            if isinstance(module, Intervention):
                module.restore_dtype()
        patch_object(trainer, OF_TRAINERS)


def roles_of(model: Any) -> list[ModuleRole]:
    """Return the roles of an adapted model, the outermost first."""
    roles = (vars(module).get("_reft_role") for _, module in base_modules(model))
    return [role for role in roles if role is not None]


def begin_data(method: Callable[..., Any], trainer: "Trainer", *args: Any, **kwargs: Any) -> Any:
    """Make a data loader that adds prompt lengths. Before training, warn about frozen adapters."""
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
    if not any(role.continues for role in roles):
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


def takes_prompt_lengths(trainer: "Trainer", role: ModuleRole) -> bool:
    """Whether all that a trainer gives its batches to can take `prompt_lengths`, and its model has a use for them."""
    if role.kind != "causal":  # the labels of an encoder-decoder model are not those of its input_ids
        return False
    reference = getattr(trainer, "ref_model", None)  # TRL's, perhaps without an adapter
    layers = [layer for _, layer in adapted_modules(trainer.model).values()]  # type: ignore[arg-type]
    is_used = any(positions.span != "all" for layer in layers for positions in layer.positions.values())
    generates = getattr(trainer.args, "predict_with_generate", False)  # from the whole batch
    return is_used and not generates and (reference is None or bool(roles_of(reference)))


def note_labels_in_evaluation(method: Callable[..., Any], trainer: "Trainer", *args: Any, **kwargs: Any) -> Any:
    """Remember ids that came with labels, as a trainer may keep the labels for itself.

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
    """Remove an old trainer state before a checkpoint is written: it marks a complete checkpoint, and is written last.

    Training that goes on from an earlier checkpoint writes those after it anew, over files that are there.
    """
    if trainer.args.should_save and trainer.model is not None and adapted_modules(trainer.model):
        folder = Path(trainer._get_output_dir(trial=trial)) / f"checkpoint-{trainer.state.global_step}"
        (folder / STATE).unlink(missing_ok=True)
    method(trainer, model, trial, **kwargs)


def save_sharded(
    method: Callable[..., Any], trainer: "Trainer", output_dir: str | None = None, *args: Any, **kwargs: Any
) -> None:
    """Save the complete adapter. With sharded state dicts of FSDP, transformers' `save_model` saves nothing."""
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


def check_resumed(method: Callable[..., Any], trainer: "Trainer", checkpoint: str, *args: Any, **kwargs: Any) -> None:
    """Check the configs of a checkpoint. FSDP loads state dicts without PEFT's `load_adapter`."""
    refuse_sharded_base_adapters(trainer)
    check_checkpoint_folder(trainer.model, checkpoint)
    method(trainer, checkpoint, *args, **kwargs)


def check_engine(
    method: Callable[..., Any],
    trainer: "Trainer",
    batch_size: int | None = None,
    args: Any = None,
    checkpoint: str | None = None,
    *others: Any,
    **kwargs: Any,
) -> Any:
    """Check the checkpoint that training resumes from: DeepSpeed loads it past PEFT's `load_adapter`, too."""
    checkpoint = kwargs.pop("resume_from_checkpoint", checkpoint)
    if checkpoint is not None and trainer.is_deepspeed_enabled:
        check_checkpoint_folder(trainer.model, checkpoint)
    return method(trainer, batch_size, args, checkpoint, *others, **kwargs)


def check_checkpoint_folder(model: Any, checkpoint: str) -> None:
    """Raise a ValueError if the adapters of a trainer's checkpoint have other configs than the model's."""
    for name, config in getattr(model, "peft_config", {}).items():
        folder = Path(checkpoint) if name == "default" else Path(checkpoint, name)  # where PEFT saves them
        if config.peft_type == REFT and (folder / CONFIG_NAME).exists():
            check_folder(model, name, folder)


def load_best_of_both(method: Callable[..., Any], trainer: "Trainer") -> None:
    """Load the best weights of the base model's adapters as well. transformers loads one adapter."""
    checkpoint: Any = trainer.state.best_model_checkpoint
    if trainer.is_deepspeed_enabled:
        check_checkpoint_folder(trainer.model, checkpoint)
    if base_peft_model(trainer.model) is not None:
        refuse_sharded_base_adapters(trainer)
        load_base_adapters(trainer.model, checkpoint)  # type: ignore[arg-type]
    method(trainer)


def load_sharded_optimizer(method: Callable[..., Any], trainer: "Trainer", checkpoint: str | None) -> None:
    """Create the state of FSDP1's optimizer before a sharded one is loaded into it."""
    plugin, model = getattr(trainer.accelerator.state, "fsdp_plugin", None), trainer.model
    is_sharded = bool(checkpoint) and any(Path(str(checkpoint)).glob("optimizer_*/"))
    if is_sharded and plugin is not None and plugin.fsdp_version == 1 and model and adapted_modules(model):
        from torch.distributed.checkpoint.state_dict import _init_optim_state  # private, and needed here alone

        _init_optim_state(trainer.optimizer)  # type: ignore[arg-type]
    method(trainer, checkpoint)


of_trainers = functools.partial(Patch, TRAINER, scope="object")
# Methods of a trainer whose model has a ReFT adapter
OF_TRAINERS = (
    of_trainers(
        "_get_dataloader",
        begin_data,
        why="a trainer tells the model where prompts end by the labels only, and does not warn of a frozen adapter",
        issue=NOT_REPORTED,
    ),
    of_trainers(
        "_prepare_inputs",
        note_labels_in_evaluation,
        why="a trainer that computes the loss itself evaluates the model without the labels",
        issue=NOT_REPORTED,
        parameters=("inputs",),
    ),
    of_trainers(
        "_save_checkpoint",
        begin_checkpoint,
        why="a checkpoint that is written again, and not completed, looks complete",
        issue="https://github.com/huggingface/transformers/issues/35782",
        parameters=("model", "trial"),
    ),
    of_trainers(
        "save_model",
        save_sharded,
        why="transformers saves no adapter where FSDP's state dicts are sharded",
        issue="https://github.com/huggingface/transformers/issues/30491",
        parameters=("output_dir",),
    ),
    of_trainers(
        "_load_from_checkpoint",
        check_resumed,
        why="transformers resumes from a checkpoint whose adapter has another config",
        issue=NOT_REPORTED,
        parameters=("resume_from_checkpoint",),
    ),
    of_trainers(
        "_inner_training_loop",
        check_engine,
        why="transformers resumes from a checkpoint whose adapter has another config, with DeepSpeed as well",
        issue=NOT_REPORTED,
        parameters=("batch_size", "args", "resume_from_checkpoint"),
    ),
    of_trainers(
        "_load_best_model",
        load_best_of_both,
        why="transformers loads the best weights of one adapter, and not those of the base model's own adapters",
        issue=NOT_REPORTED,
    ),
    of_trainers(
        "_load_optimizer_and_scheduler",
        load_sharded_optimizer,
        why="accelerate loads a sharded optimizer state of FSDP1 into an optimizer that has none yet",
        issue=NOT_REPORTED,
        parameters=("checkpoint",),
    ),
)
INIT = Patch(
    TRAINER,
    "__init__",
    init_trainer,
    why="TRL casts the adapter of a quantized model to bfloat16, and a Trainer has no hook for its methods",
    issue="https://github.com/huggingface/trl/issues/7268",
)
