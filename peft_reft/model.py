"""`ReftModel`: the tuner that gives the modules of a model their `ReftLayer`s."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule, cast_adapter_dtype
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import PreTrainedModel

from .base_adapters import (
    active_base_adapters,
    are_trained,
    check_saved_modules,
    keep_in_place,
    let_go,
    note_base_adapters,
    others_kept,
    split_base,
)
from .config import ReftConfig
from .layer import (
    CANNOT_MERGE,
    LAYER,
    ReftLayer,
    adapted_modules,
    layer_of,
    plain_name,
    uncompiled,
)
from .quantized import check_gradients_at_first, forget_check, keep_dtypes, keep_unpacked
from .registration import REFT
from .runtime import adapter_names as mixed_batches
from .runtime.attach import family_of, hook_model, hook_module, unhook_model
from .runtime.block_outputs import architecture_of
from .runtime.mixing import mix
from .saving.state_dict import (
    PEFT_PREFIX,
    Key,
    check_checkpoint,
    check_keys,
    check_names,
    in_short,
    is_other_rank,
    needed_tensors,
    sharded_as,
    tensors_of,
    whole,
    wrong_shapes,
)
from .targets import find_targets, is_excluded
from .transaction import remember, transaction

TAG = "reft"
SHARDED = (FSDPModule, FullyShardedDataParallel)


class ReftModel(BaseTuner):
    """
    Adapts a pretrained model with ReFT: low-rank edits of its hidden states at a few tokens of the prompt.

    The method is described in https://huggingface.co/papers/2404.03592. The blocks of the model stay what they are;
    each that is adapted gets a child `reft`, a [`ReftLayer`], through which a forward hook passes its output.

    Args:
        model ([`torch.nn.Module`]): The model to be adapted.
        peft_config ([`ReftConfig`]): The configuration of the ReFT model.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.
        low_cpu_mem_usage (`bool`, `optional`, defaults to `False`):
            Create empty adapter weights on meta device. Useful to speed up the loading process.

    Returns:
        `torch.nn.Module`: The ReFT model.

    Example:

        ```py
        >>> from transformers import AutoModelForCausalLM
        >>> from peft import get_peft_model
        >>> from peft_reft import ReftConfig

        >>> config = ReftConfig(task_type="CAUSAL_LM", r=8, positions="f7+l7")
        >>> model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B")
        >>> model = get_peft_model(model, config)
        >>> model.print_trainable_parameters()
        ```

    **Attributes**:
        - **model** ([`~transformers.PreTrainedModel`]) -- The model to be adapted.
        - **peft_config** ([`ReftConfig`]): The configuration of the ReFT model.
    """

    prefix: str = "reft_"
    tuner_layer_cls = ReftLayer
    target_module_mapping: dict[str, list[str]] = {}  # the blocks are found, whatever the architecture
    is_loading = False  # whether the values of an adapter that is added now are overwritten by a checkpoint's at once

    # The base model's own adapters

    base_peft_model: PeftModel | None = None  # with them, if the base model is a `PeftModel`: no submodule of this one

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        *args: Any,
        **kwargs: Any,
    ):
        model, below = split_base(model)
        with transaction():
            remember(model if below is None else below)
            if below is not None:
                vars(self)["base_peft_model"] = below
                del model.peft_config  # those of ReFT are kept apart: both may have an adapter of one name
            super().__init__(model, peft_config, adapter_name, *args, **kwargs)
            if below is not None:
                keep_in_place(below)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        with others_kept(self.model, self.own_names()):
            super().set_adapter(adapter_name, inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        if self.base_peft_model is None:
            super().set_requires_grad(adapter_names, requires_grad)
            return
        for module in self.model.modules():  # an adapter of the base model may have the same name
            is_wrapper = isinstance(module, AuxiliaryTrainingWrapper)
            if isinstance(module, ReftLayer) or (is_wrapper and module._get_available_adapters() & self.own_names()):
                module.set_requires_grad(adapter_names, requires_grad)

    def own_names(self) -> set[str]:
        """The names of the ReFT adapters."""
        return {name for name, config in self.peft_config.items() if config.peft_type == REFT}

    # Injection

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Inject the adapter as PEFT does, and hook the model so that each of its calls has a plan."""
        with transaction():
            config = self.peft_config.pop(adapter_name)  # PEFT adds it before the adapter
            remember(self)
            self.peft_config[adapter_name] = config
            refuse_sharded(model)
            refuse_compiled(model)
            self._check_base_adapters(model, adapter_name)
            if state_dict is not None:  # PEFT reads from its keys which modules to adapt
                keys = {key: Key.read(key) for key in state_dict}
                state_dict = {
                    key if own is None else f"{own.module}.{self.prefix}{own.unit}.{own.tensor}": state_dict[key]
                    for key, own in keys.items()
                }
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            hook_model(model, self.peft_config[adapter_name])
            keep_dtypes(model)
            if not self.peft_config[adapter_name].inference_mode:
                keep_unpacked(model)
                check_gradients_at_first(model)
            if isinstance(model, PreTrainedModel):
                model.add_model_tags(TAG)

    def _check_base_adapters(self, model: nn.Module, adapter_name: str) -> None:
        """Have the config name the base model's own adapters, which the ReFT adapter is trained on.

        Raises:
            ValueError: if both would save the same modules, or they are trained and a ReFT adapter is there already.
        """
        below, config = self.base_peft_model, cast(ReftConfig, self.peft_config[adapter_name])
        configs = self.peft_config if below is None else below.peft_config
        note_base_adapters(config, active_base_adapters(model, configs))
        if below is not None:
            check_saved_modules(model, below, config, adapter_name)
        if below is not None and are_trained(model) and not config.inference_mode and adapted_modules(model):
            raise ValueError(
                "A second ReFT adapter cannot be trained on a base model whose own adapters are trained: the first "
                "one would then be on other weights than it was trained on. Freeze them before ReFT is added: "
                "PeftModel.from_pretrained(base, folder), or lora.set_requires_grad(name, False). (TRL's "
                "preference trainers add an adapter ref if they are given no ref_model.)"
            )

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        return peft_config

    def _prepare_model(self, peft_config: ReftConfig, model: nn.Module) -> None:  # type: ignore[override]
        self._targets = find_targets(model, peft_config)  # all that can be wrong is found here, before any change
        check_names(model, peft_config, self._targets, self.peft_config)

    def _check_target_module_exists(self, peft_config: ReftConfig, key: str) -> bool | _ExcludedModule:  # type: ignore[override]
        return _ExcludedModule() if is_excluded(peft_config, key) else key in self._targets

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: ReftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        d, r = self._targets[current_key]
        layer = layer_of(target)
        if layer is None:
            layer = ReftLayer(d, architecture_of(self.model, current_key))
            hook_module(target, layer)
        layer.update_layer(adapter_name, r, peft_config, is_drawn=not self.is_loading)
        move_adapter(layer, adapter_name, target)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        for module, layer in adapted_modules(self.model).values():
            if autocast_adapter_dtype:
                cast_adapter_dtype(layer, adapter_name)  # not in the model: its own adapter may have the same name
            else:
                move_adapter(layer, adapter_name, module, cast=True)

    # Calling

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names, outer = kwargs.get("adapter_names"), mixed_batches.current_mixed_batch()
        mixed_batch = None if names is None else mix(self.model, family_of(self.model), names)
        try:
            mixed_batches.current.value = mixed_batch
            yield
        finally:
            mixed_batches.current.value = outer

    # What cannot be done with ReFT

    def _unload_and_optionally_merge(  # type: ignore[override]
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            raise ValueError(CANNOT_MERGE)
        unhook_model(self.model)
        forget_check(self.model)
        below, names = self.base_peft_model, self.own_names()
        for name, module in list(self.model.named_modules()):
            if isinstance(module, AuxiliaryTrainingWrapper) and module._get_available_adapters() <= names:
                parent, _, child = name.rpartition(".")
                unwrapped = module.unload_and_optionally_merge_module(False, False, adapter_names)
                setattr(self.model.get_submodule(parent), child, unwrapped)
        others = {name: config for name, config in self.peft_config.items() if name not in names}
        if below is not None:
            self.model.peft_config = below.peft_config
            let_go(below)
        elif others:  # of another tuner that adapted the model
            self.model.peft_config = others
        else:
            del self.model.peft_config
        if isinstance(self.model, PreTrainedModel) and self.model.model_tags:
            self.model.model_tags = [tag for tag in self.model.model_tags if tag != TAG]
        return self.model if below is None else below

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        raise ValueError(CANNOT_MERGE)

    def unmerge_adapter(self) -> None:
        raise ValueError(CANNOT_MERGE)

    # Saving and loading: by names without wrappers, under which PEFT 0.21 finds nothing, and saves that

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        if not state_dict and is_other_rank():  # a whole state dict is gathered on rank 0, which saves it
            return {}
        needed = needed_tensors(model, adapter_name)
        # Every process has them, so they need not be gathered (ZeRO-3 gathers parameters alone).
        buffers = {key: unit.exponents for key, unit, name in tensors_of(model, adapter_name) if name == "exponents"}
        state_dict = buffers | state_dict  # type: ignore[assignment]
        problems = [f"{key} is missing" for key in needed.keys() - state_dict.keys()]
        problems += wrong_shapes(needed, state_dict)
        if problems:
            raise ValueError(
                f"The state dict of adapter {adapter_name!r} is not whole: {in_short(problems)}. Gather it before you "
                "save it. trainer.save_model does; else state_dict = accelerator.get_state_dict(model) everywhere, "
                "and accelerator.unwrap_model(model).save_pretrained(folder, state_dict=state_dict) on the main one."
            )
        return {plain_name(key): whole(state_dict[key]) for key in needed}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        tensors = list(tensors_of(model, adapter_name))
        needed = {key: unit.shapes()[name] for key, unit, name in tensors}
        keys = {cls._remove_adapter_name_from_key(plain_name(key), adapter_name): key for key in needed}
        keys |= {f"{PEFT_PREFIX}{key}": keys[key] for key in keys}  # of a PeftModel, into a model that is none
        state_dict = {keys.get(key, key): tensor for key, tensor in state_dict.items()}
        check_keys(model, adapter_name, state_dict)
        check_checkpoint(adapter_name, needed, state_dict)
        placed = {key: sharded_as(getattr(unit, name), state_dict[key]) for key, unit, name in tensors}
        state_dict = state_dict | placed
        if not any(name.startswith(PEFT_PREFIX) for name, _ in model.named_parameters()):
            # PEFT takes the prefix away for a model that is no PeftModel, and takes one that FSDP1 wraps for that.
            state_dict = {f"{PEFT_PREFIX}{key}": tensor for key, tensor in state_dict.items()}
        return state_dict


def move_adapter(layer: ReftLayer, adapter_name: str, module: nn.Module, cast: bool = False) -> None:
    """Put an adapter where the module is that it adapts, and in the module's dtype if `cast`."""
    own = (p for name, p in module.named_parameters() if not name.startswith(f"{LAYER}."))
    like = next((p for p in own if p.is_floating_point() or not cast), None)
    device, dtype = (None, None) if like is None else (like.device, like.dtype if cast else None)
    hooks = [vars(part)["_hf_hook"] for part in module.modules() if "_hf_hook" in vars(part)]
    if hooks:  # accelerate's: offloaded parameters lie on meta until the module, or its part, is called
        executing = (getattr(hook, "execution_device", None) for hook in hooks)
        device = next((device for device in executing if device is not None), torch.device("cpu"))
    for unit in layer.units(adapter_name).values():
        if not unit.b.is_meta and (dtype is not None or unit.b.device != device):
            unit.to(device=device, dtype=dtype)


def refuse_compiled(model: nn.Module) -> None:
    """Raise a ValueError if `torch.compile` made a model: its parts may be compiled, and so may what is adapted."""
    if uncompiled(model) is not model:
        raise ValueError(
            "The model was compiled by torch.compile(model). Add or load the adapter before you compile it, or give "
            "the model that was compiled (model._orig_mod) and compile what you get."
        )


def refuse_sharded(model: nn.Module) -> None:
    """Raise a ValueError if FSDP has sharded a model: what is added to it would be trained by each process apart."""
    if any(isinstance(module, SHARDED) for module in model.modules()):
        raise ValueError("Add adapters before FSDP shards the model: those added later are not kept the same.")
