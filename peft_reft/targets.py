"""Finding the modules that a config adapts: transformer blocks of any model, or the modules that it names."""

import functools
import inspect
import re
import warnings
from collections.abc import Mapping
from itertools import chain
from types import SimpleNamespace
from typing import Any

import torch
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from .config import ReftConfig
from .layer import COMPILED, ReftLayer, plain_name, uncompiled
from .runtime.call import reads_text

# Layers of attention and MLPs in transformers' models whose output is used within them. LoRA configs name these.
INNER = re.compile(
    r"(q|k|v|qkv|query|key|value|query_key|in|gate|up|gate_up|kv)(_a|_b)?(_proj|_lin)?|query_key_value|in_proj_\w+"
    r"|W?qkv|w[qkv]|c_attn|c_fc|fc1|fc_in|wi(_[01])?|w[13]|dense_h_to_4h|lin1"
)


def is_excluded(config: ReftConfig, key: str) -> bool:
    """Whether `exclude_modules` or `modules_to_save` take a module out, by PEFT's own rules."""
    key = plain_name(key)
    rules = {"exclude_modules": config.exclude_modules, "modules_to_save": config.modules_to_save}
    return isinstance(check_target_module_exists(SimpleNamespace(target_modules=[key], **rules), key), _ExcludedModule)


def find_blocks(model: nn.Module, layers_pattern: list[str] | str | None) -> list[str]:
    """Find the transformer blocks of a model, whatever its architecture: the elements of its list of layers.

    Of an encoder-decoder model these are the encoder's, of a vision-language model the language model's.

    Args:
        model (`nn.Module`): any model.
        layers_pattern (`list[str]` or `str`, *optional*): the last part of the name of the list of layers.

    Returns:
        `list[str]`: the names of the blocks in `model`, in order.

    Raises:
        ValueError: if there is no list of layers, or several.
    """
    root = model
    if isinstance(model, PreTrainedModel):
        if model.config.is_encoder_decoder:
            root = model.get_encoder()
        elif model.can_generate() and isinstance(model.get_decoder(), PreTrainedModel):
            root = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is root)
    lists: dict[str, nn.ModuleList] = {}
    for name, module in root.named_modules(prefix=prefix):
        if isinstance(module, nn.ModuleList) and len(module):
            if not any(name.startswith(f"{outer}.") for outer in lists):  # an outermost one
                lists[name] = module
    if layers_pattern is not None:
        patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
        found = [name for name in lists if any(name == p or name.endswith(f".{p}") for p in patterns)]
    else:
        depth = getattr(text_config(root), "num_hidden_layers", None)
        found = [name for name in lists if isinstance(uncompiled(lists[name][0]), GradientCheckpointingLayer)]
        found = found or [name for name in lists if len(lists[name]) == depth] or list(lists)
        if len(found) > 1 and isinstance(model, PreTrainedModel) and model.base_model is not model:
            # Below a head, towers of other modalities serve the language model; alone, no tower is the model.
            kind = type(text_config(root))
            found = [name for name in found if type(config_around(model, name)) is kind] or found
    if len(found) != 1:
        among = ", ".join(repr(name) for name in (found or lists)) or "none"
        raise ValueError(
            f"Cannot tell which list of {type(model).__name__} holds its layers"
            + (f" with layers_pattern={layers_pattern!r}" if layers_pattern is not None else "")
            + f" (lists of modules: {among}). Name it with layers_pattern, or name the modules to adapt with "
            "target_modules."
        )
    check_blocks(model, found[0])
    return [f"{found[0]}.{index}" for index in range(len(lists[found[0]]))]


def config_around(model: nn.Module, name: str) -> Any:
    """Return the config of the innermost transformers model around a module, or None."""
    parts = name.split(".")
    owners = (model.get_submodule(".".join(parts[:n])) for n in range(len(parts), -1, -1))
    return next((owner.config for owner in owners if isinstance(owner, PreTrainedModel)), None)


def check_blocks(model: nn.Module, name: str) -> None:
    """Raise a ValueError if what the blocks of a list put out cannot be edited, or no hook of theirs sees it."""
    problem = None
    parent = model.get_submodule(name.rpartition(".")[0])
    if hasattr(model.get_submodule(name)[0], "backward_pass"):  # type: ignore[index]
        problem = "they are reversible: their own backward pass would not see the edits"
    elif hasattr(getattr(model, "config", None), "num_latents"):
        problem = "it is of latents, which are no tokens"
    elif re.search(r"\b(?!self\b)\w+\.forward\(", source_of(type(parent).forward)):
        problem = f"{type(parent).__name__} calls their forward method itself, so no hook of theirs is called"
    if problem is not None:
        raise ValueError(
            f"ReFT cannot adapt {type(model).__name__}: the output of its blocks ({name!r}) cannot be edited, since "
            f"{problem}."
        )


@functools.cache
def source_of(function: Any) -> str:
    """Return the source of a function, empty if there is none."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return ""


def find_targets(model: nn.Module, config: ReftConfig) -> dict[str, tuple[int, int]]:
    """Find the modules that a config adapts.

    Args:
        model (`nn.Module`): the model.
        config (`ReftConfig`): the config.

    Returns:
        `dict[str, tuple[int, int]]`: name of each module, with the width of its output and the rank of its edits.

    Raises:
        ValueError: if the config matches nothing, names what is not there, or what puts out no hidden state.
    """
    if config.target_modules is None:
        layers = dict(enumerate(find_blocks(model, config.layers_pattern)))
        names = choose_layers(config, {name: index for index, name in layers.items()})
    else:
        names = find_named(model, config)
    names = [name for name in names if not is_excluded(config, name)]
    if not names:
        raise ValueError(
            f"exclude_modules={config.exclude_modules!r} and modules_to_save={config.modules_to_save!r} leave no "
            "module to adapt."
        )
    targets = {}
    for name in names:
        d = output_width(model, name)
        r = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), plain_name(name)), config.r)
        if r > d:
            raise ValueError(
                f"r={r} is above the width of the hidden states that {name!r} puts out: give a rank from 1 to {d}."
            )
        targets[name] = (d, r)
    if config.target_modules is not None and not config.inference_mode:
        warn_of_inner_layers(model, names)
    return targets


def find_named(model: nn.Module, config: ReftConfig) -> list[str]:
    """Return the modules that `target_modules` names, in the chosen layers."""
    modules = dict(model.named_modules())
    adapters = [name for name, module in modules.items() if isinstance(module, ReftLayer)]
    candidates = [name for name in modules if name and not any(f"{name}.".startswith(f"{a}.") for a in adapters)]
    candidates = [name for name in candidates if not name.endswith(f".{COMPILED}")]  # the compiled module is called
    found: set[str] = set()
    for target in config.target_modules if isinstance(config.target_modules, list) else [config.target_modules]:
        rule = SimpleNamespace(target_modules=[target] if isinstance(config.target_modules, list) else target)
        matched = {name for name in candidates if check_target_module_exists(rule, plain_name(name))}
        if not matched:
            raise ValueError(
                f"target_modules={config.target_modules!r}: {target!r} matches no module of {type(model).__name__}. "
                + (
                    f"A string is a regular expression of complete names; a list, [{target!r}], matches the ends of "
                    "names. "
                    if isinstance(config.target_modules, str)
                    else ""
                )
                + "Leave them at None to edit the output of every block, or name modules that model.named_modules() "
                "lists."
            )
        found |= matched
    names = [name for name in candidates if name in found]
    if config.layers_to_transform is None and config.layers_pattern is None:
        return names
    patterns = (
        config.layers_pattern if isinstance(config.layers_pattern, list) else [config.layers_pattern or r"[^.]*"]
    )
    layers = {}
    for name in names:
        match = next(filter(None, (re.match(rf"(?:.*?\.)?{p}\.(\d+)(?:\.|$)", name) for p in patterns)), None)
        if match:
            layers[name] = int(match[1])
    if not layers:
        raise ValueError(
            f"layers_to_transform={config.layers_to_transform!r} and layers_pattern={config.layers_pattern!r} choose "
            f"among layers, but the names that target_modules match have no such part: {', '.join(names[:3])}."
        )
    return choose_layers(config, layers)


def warn_of_inner_layers(model: nn.Module, names: list[str]) -> None:
    """Warn if modules are linear layers whose output is no hidden state of the residual stream."""
    inner = []
    for name in names:
        parts, width = name.split("."), linear_width(model.get_submodule(name))
        owners = (model.get_submodule(".".join(parts[:n])) for n in range(len(parts) - 1, -1, -1))
        config = next((text_config(owner) for owner in owners if isinstance(owner, PreTrainedModel)), None)
        is_inner = INNER.fullmatch(parts[-1]) or width != getattr(config, "hidden_size", width)
        if width is not None and is_inner and (short := ".".join(parts[-2:])) not in inner:
            inner.append(short)
    if inner:
        warnings.warn(
            f"target_modules: the outputs of {', '.join(inner)} are queries, keys, values or activations inside an "
            "MLP. ReFT will edit these. It is meant for hidden states: leave target_modules at None for the output of "
            "every block, or name modules that write to the residual stream, such as ['o_proj', 'down_proj'].",
            stacklevel=2,
        )


def linear_width(module: nn.Module) -> int | None:
    """Return the width of a linear layer's output, or None for another module."""
    width = getattr(module, "nf" if isinstance(module, Conv1D) else "out_features", None)
    return width if isinstance(width, int) and next(module.children(), None) is None else None


def choose_layers(config: ReftConfig, layers: Mapping[str, int]) -> list[str]:
    """Return the modules whose layer is among `layers_to_transform`.

    Args:
        config (`ReftConfig`): the config.
        layers (`dict[str, int]`): index of the layer of each module.
    """
    if config.layers_to_transform is None:
        return list(layers)
    depth = max(layers.values(), default=-1) + 1
    chosen = config.layers_to_transform
    chosen = [chosen] if isinstance(chosen, int) else chosen
    indices = {index: index % depth for index in chosen if -depth <= index < depth}
    if len(indices) < len(chosen):
        raise ValueError(
            f"layers_to_transform={chosen} names layers that are not there: "
            f"{[i for i in chosen if i not in indices]}. The model has {depth}: give indices from {-depth} to "
            f"{depth - 1}."
        )
    if len(set(indices.values())) < len(indices):
        raise ValueError(f"layers_to_transform={chosen} names a layer twice: of {depth} layers, -1 is {depth - 1}.")
    names = [name for name, index in layers.items() if index in indices.values()]
    if not names:
        raise ValueError(f"layers_to_transform={chosen} matches none of {list(layers)}.")
    return names


def text_config(module: nn.Module) -> Any:
    """Return the config of a transformers model's language model, or None."""
    return module.config.get_text_config() if isinstance(module, PreTrainedModel) else getattr(module, "config", None)


def lies_between(model: nn.Module, name: str) -> bool:
    """Whether a module is part of an encoder-decoder model, but of neither its encoder nor its decoder, or of both."""
    names = name.split(".")
    owners = (model.get_submodule(".".join(names[:n])) for n in range(len(names) - 1, -1, -1))
    nearest = next((owner for owner in owners if isinstance(owner, PreTrainedModel)), None)
    if nearest is None or not nearest.config.is_encoder_decoder:
        return False
    halves = (nearest.get_encoder(), nearest.get_decoder())
    return nearest not in halves and sum(model.get_submodule(name) in set(half.modules()) for half in halves) != 1


def norm_width(module: nn.Module) -> int | None:
    """Return the width of a norm, None for another module."""
    weight = getattr(module, "weight", None)
    return weight.shape[0] if isinstance(weight, torch.Tensor) and weight.dim() == 1 else None


def sharded_dimension(model: Any, name: str) -> str | None:
    """Return the dimension of a module's output that tensor parallelism shards, None if it shards none."""
    if (getattr(model, "_tp_size", None) or 1) == 1:
        return None
    plan = model.tp_plan
    if "sequence_parallel" in plan.values():
        return "tokens"
    return "features" if plan.get(re.sub(r"\d+", "*", name)) in ("colwise", "packed_colwise") else None


def output_width(model: nn.Module, name: str) -> int:
    """Return the width of a module's output.

    Raises:
        ValueError: if it puts out no hidden state, or its width cannot be told.
    """
    module = uncompiled(model.get_submodule(name))
    problem = None
    if type(module).forward in (nn.Module.forward, nn.ModuleList.forward):
        problem = "is a container that is never called"
    elif isinstance(module, PreTrainedModel):
        problem = "is a whole model"
    elif isinstance(model, PreTrainedModel) and module is model.get_output_embeddings():
        problem = "puts out logits"
    elif lies_between(model, name):
        problem = "lies in neither the encoder nor the decoder, each of which has tokens of its own"
    elif next(module.parameters(), None) is None:
        problem = "has no weights, so the width of its output is not known"
    elif (sharded := sharded_dimension(model, name)) is not None:
        problem = f"puts out a part of the {sharded} on each process, by the model's plan of tensor parallelism"
    if problem is None:
        for attribute in ("out_features", "embedding_dim") + (("nf",) if isinstance(module, Conv1D) else ()):
            if isinstance(width := getattr(module, attribute, None), int):
                return width
        if next(module.children(), None) is None and (width := norm_width(module)) is not None:
            return width
        names = name.split(".")
        owners = [model.get_submodule(".".join(names[:n])) for n in range(len(names), -1, -1)]
        by_config = (getattr(text_config(owner), "hidden_size", None) for owner in owners)
        by_norm = (norm_width(child) for owner in owners for child in owner.children())
        nearest = next((owner for owner in owners if isinstance(owner, PreTrainedModel)), model)
        # The config of a vision tower may give the width of its end alone.
        for width in chain(by_config, by_norm) if reads_text(nearest) else chain(by_norm, by_config):
            if isinstance(width, int):
                return width
        problem = (
            "belongs to no model whose config has a hidden_size, and to no block with a norm, so the width of its "
            "output is not known"
        )
    raise ValueError(
        f"{name!r} cannot be adapted: it {problem}. Name modules in target_modules that put out hidden states, such "
        "as a block, its attention or its MLP, or leave target_modules at None."
    )
