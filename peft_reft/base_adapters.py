"""Adapters of another method, such as LoRA, in the base model of a ReFT adapter.

The base model of a `PeftModel` with ReFT may be a `PeftModel` itself. ReFT then adapts the model within it. All names
are those of a model with one adapter, and the files of both adapters are those that PEFT writes for each of them.
"""

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftMixedModel, PeftModel, PeftType, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .config import ReftConfig
from .layer import ReftLayer
from .registration import REFT

# Methods of a tuner that take modules away, on which ReFT may be, or go through all layers, and so through ReFT's.
TAKING_AWAY = ("_unload_and_optionally_merge", "merge_adapter", "unmerge_adapter")


def split_base(model: nn.Module) -> tuple[nn.Module, PeftModel | None]:
    """Return the model that ReFT adapts, and the `PeftModel` around it if there is one.

    Raises:
        ValueError: if ReFT cannot be put on a `PeftModel` of this kind.
    """
    if isinstance(model, PeftMixedModel):
        raise ValueError(
            "ReFT cannot be put on a PeftMixedModel, which PEFT cannot save. Put it on a PeftModel with adapters of "
            "one method."
        )
    if not isinstance(model, PeftModel):
        return model, None
    tuner, configs = model.base_model, model.peft_config.values()
    kinds = ", ".join(sorted(map(method_of, configs)))
    if any(config.peft_type == REFT for config in configs):
        raise ValueError(
            "The model has ReFT adapters already. Add another one with model.add_adapter(name, config), load one with "
            "model.load_adapter(folder, name), or call model.unload() first."
        )
    shared = getattr(tuner, "uses_shared_state", False)
    within = tuner.model if isinstance(tuner, BaseTuner) else None
    if within is None or shared or isinstance(within, PeftModel):
        raise ValueError(
            f"ReFT cannot be put on this PeftModel (of {kinds}). It goes on a PeftModel that adapts the layers of one "
            "model, as LoRA does."
        )
    if any(getattr(config, "alora_invocation_tokens", None) for config in configs):
        raise ValueError(
            "ReFT cannot be put on an activated LoRA (alora_invocation_tokens), which it would switch off. Use a LoRA "
            "without invocation tokens."
        )
    return within, model


def check_saved_modules(base: nn.Module, below: PeftModel, config: ReftConfig, adapter_name: str) -> None:
    """Raise a ValueError if an adapter of the base model and a ReFT adapter would train or save the same modules."""
    names, method = set(below.peft_config), method_of(next(iter(below.peft_config.values())))
    modules = [(key, module) for key, module in base.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    wrappers = [key for key, module in modules if module._get_available_adapters() & names]
    tokens = config.trainable_token_indices
    own = set(config.modules_to_save or ()) | set(tokens if isinstance(tokens, dict) else ())
    twice = sorted(key for key in wrappers if any(key.endswith(suffix) for suffix in own))
    if twice or (tokens and any(map(has_tokens, below.peft_config.values()))):
        raise ValueError(
            f"The base model's {method} adapter trains and saves {', '.join(twice) or 'tokens'} already, so the ReFT "
            "adapter cannot. Leave modules_to_save and trainable_token_indices out of the "
            "ReftConfig, and the task_type, too, where that adds a head (SEQ_CLS, TOKEN_CLS, QUESTION_ANS)."
        )
    if adapter_name in names and (wrappers or own or tokens):
        raise ValueError(
            f"Both adapters are called {adapter_name!r}, and one trains modules beside itself, which PEFT then saves "
            f"with both. Give the ReFT adapter another name, for example adapter_name='edits'."
        )


def has_tokens(config: PeftConfig) -> bool:
    """Whether an adapter trains embeddings of tokens."""
    return bool(getattr(config, "trainable_token_indices", None))


def method_of(config: PeftConfig) -> str:
    """Return PEFT's name of an adapter's method."""
    return PeftType(config.peft_type).value


def base_peft_model(model: Any) -> PeftModel | None:
    """Return the `PeftModel` with other adapters that is the base model of a `PeftModel` with ReFT."""
    return vars(model.base_model).get("base_peft_model") if isinstance(model, PeftModel) else None


def folder_name(config: PeftConfig, adapter_name: str) -> str:
    """Return the subfolder for an adapter of the base model. No ReFT adapter has that name."""
    return f"{method_of(config).lower()}-{adapter_name}"


def active_base_adapters(model: nn.Module, configs: Mapping[str, PeftConfig]) -> list[str]:
    """Return the active adapters of other methods, by the names of their subfolders."""
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and not isinstance(m, ReftLayer)]
    active = {name for layer in layers if not layer.disable_adapters for name in layer.active_adapters}
    others = {name: config for name, config in configs.items() if config.peft_type != REFT}
    return sorted(folder_name(config, name) for name, config in others.items() if name in active)


def note_base_adapters(config: ReftConfig, active: list[str]) -> None:
    """Have a config name the adapters that its own is trained on; warn if there are none of those that it was."""
    if config.base_adapters and not active:
        names = ", ".join(config.base_adapters)
        warnings.warn(
            f"This ReFT adapter was trained on a base model with other adapters, which are not there: {names}. Load "
            "them first: model = PeftModel.from_pretrained(base, folder, subfolder="
            f"{config.base_adapters[0]!r}), then PeftModel.from_pretrained(model, folder). Without them, the outputs "
            "are not those of training, unless they were merged into the base model.",
            stacklevel=2,
        )
    else:
        config.base_adapters = active or None


def are_trained(model: nn.Module) -> bool:
    """Whether adapters of other methods are trained in a model."""
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and not isinstance(m, ReftLayer)]
    parts = [getattr(layer, name) for layer in layers for name in layer.adapter_layer_names]
    return any(p.requires_grad for part in parts if isinstance(part, nn.Module) for p in part.parameters())


@contextmanager
def others_kept(model: nn.Module, own: set[str]) -> Iterator[None]:
    """Keep modules that adapters of other methods train beside themselves as they are, active and trainable or not.

    PEFT makes each that has no adapter of a given name inactive, whatever the method.

    Args:
        model: the model in which adapters are set.
        own: the names of the ReFT adapters.
    """
    wrappers = [m for m in model.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    others = [wrapper for wrapper in wrappers if not wrapper._get_available_adapters() & own]
    before = [(wrapper, wrapper._active_adapter) for wrapper in others]
    trained = [(p, p.requires_grad) for wrapper in others for p in wrapper.parameters()]
    yield
    for wrapper, active in before:
        wrapper._active_adapter = active
    for parameter, requires_grad in trained:
        parameter.requires_grad_(requires_grad)


def keep_in_place(below: PeftModel) -> None:
    """Have the adapters of a base model not be merged or unloaded below ReFT."""
    vars(below.base_model).update(dict.fromkeys(TAKING_AWAY, refuse_to_take_away))


def let_go(below: PeftModel) -> None:
    """Undo `keep_in_place`."""
    for name in TAKING_AWAY:
        vars(below.base_model).pop(name, None)


def refuse_to_take_away(*args: Any, **kwargs: Any) -> nn.Module:
    """Raise an error in place of the methods that merge or unload."""
    raise ValueError(
        "The adapters of this model cannot be merged, unmerged or unloaded while it is the base model of a ReFT "
        "adapter. Save both, then load and merge this one, and load the ReFT adapter into what that gives: "
        "PeftModel.from_pretrained(lora.merge_and_unload(), folder). Or call unload() on the model with ReFT first."
    )


def save_base_adapters(model: PeftModel, folder: Any, *args: Any, **kwargs: Any) -> None:
    """Save each adapter of the base model in a subfolder, as PEFT saves it alone, with the options of a call.

    Raises:
        ValueError: if PEFT finds none of its tensors in the state dict that it is given.
    """
    below = base_peft_model(model)
    if below is None:
        return
    given = inspect.signature(PeftModel.save_pretrained).bind(model, folder, *args, **kwargs).arguments
    options: dict[str, Any] = dict(given.pop("kwargs", {}))
    names = ("safe_serialization", "save_embedding_layers", "is_main_process")
    options |= {name: given[name] for name in names if name in given}
    is_main_process = options.get("is_main_process", True)
    for name, config in below.peft_config.items():
        if is_main_process and not get_peft_model_state_dict(
            below, options.get("state_dict"), name, save_embedding_layers=False
        ):
            raise ValueError(
                f"PEFT finds no tensors of the {method_of(config)} adapter {name!r} in this state dict, perhaps "
                "because FSDP1 has wrapped its modules. Use FSDP2, or save it before it is wrapped."
            )
        target = Path(folder) / folder_name(config, name)
        below.save_pretrained(str(target), selected_adapters=[name], **options)
        if name != "default" and is_main_process:  # PEFT has made a folder within, as it does for all other names
            for path in (target / name).iterdir():
                path.replace(target / path.name)
            (target / name).rmdir()


def saved_base_adapters(model: PeftModel) -> dict[str, str]:
    """Return the names of the base model's adapters, by the subfolders in which they are saved."""
    below = base_peft_model(model)
    return {} if below is None else {folder_name(config, name): name for name, config in below.peft_config.items()}


def load_base_adapter(model: PeftModel, folder: Any, subfolder: str, *args: Any, **options: Any) -> Any:
    """Put saved weights into an adapter of the base model, in the dtype that it has: TRL may have chosen another."""
    below: Any = base_peft_model(model)
    name, options = saved_base_adapters(model)[subfolder], {"autocast_adapter_dtype": False} | options
    return below.load_adapter(folder, name, *args, **options)


def load_base_adapters(model: PeftModel, folder: str | Path) -> None:
    """Put saved weights into all adapters of the base model."""
    for subfolder in saved_base_adapters(model):
        load_base_adapter(model, str(Path(folder) / subfolder), subfolder)
