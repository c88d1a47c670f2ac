"""What blocks return, unpacked, edited and repacked.

What a shape means cannot be read off it (a batch may have as many rows as tokens), so the families with layouts other
than [batch, tokens, d] are named.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..layer import ReftLayer, layer_of
from .plan import Plan

# By the name of the folder in transformers.models.
TOKENS_FIRST = ("fsmt", "xlnet")  # [tokens, batch, d]
STREAMS = {"deepseek_v4": 2, "gemma3n": 0, "hy_v4": 2}  # four dimensions, with residual streams as the named one
FLAT_STREAMS = ("qwen4_exp",)  # [batch, tokens, streams * d]
MORE_AFTER = (  # padding to a multiple of a window, or streams that predict later tokens
    "big_bird",
    "bigbird_pegasus",
    "led",
    "longformer",
    "pegasus_x",
    "prophetnet",
)
MORE_BEFORE = ("cpmant",)  # tokens of a soft prompt

Edit = Callable[[torch.Tensor], torch.Tensor]  # of hidden states [batch, tokens, d]


def architecture_of(model: nn.Module, name: str) -> str:
    """Return the folder in transformers.models that a module of a model comes from, or an empty string."""
    if isinstance(model.get_submodule(name), nn.Embedding):
        return ""  # [batch, tokens, d] in any architecture
    names = name.split(".")
    owners = (type(model.get_submodule(".".join(names[:n]))).__module__ for n in range(len(names), -1, -1))
    return next((path.split(".")[2] for path in owners if path.startswith("transformers.models.")), "")


def edit_in_layout(
    architecture: str, hidden_states: torch.Tensor, d: int, tokens: int | None, edit: Edit, in_one_row: bool = False
) -> torch.Tensor | None:
    """Edit what a module put out, whatever its layout: every stream alike, and no token that the model added.

    Args:
        architecture (`str`): the folder in transformers.models that the module comes from.
        hidden_states (`torch.Tensor`): what it put out.
        d (`int`): width of the hidden states.
        tokens (`int`, *optional*): how many tokens the model was given, None if not known.
        edit: edits hidden states [batch, tokens, d].
        in_one_row (`bool`): whether the model may lay its whole batch in one row, [tokens, d].

    Returns:
        `torch.Tensor` of the same shape, or None if these are no hidden states.
    """
    shape = hidden_states.shape
    if architecture in FLAT_STREAMS and len(shape) == 3 and shape[-1] > d and shape[-1] % d == 0:
        return torch.cat([edit(stream) for stream in hidden_states.split(d, dim=-1)], dim=-1)
    if architecture in STREAMS and len(shape) == 4 and shape[-1] == d:
        dim = STREAMS[architecture]
        return torch.stack([edit(stream) for stream in hidden_states.unbind(dim)], dim)
    if in_one_row and len(shape) == 2 and shape[-1] == d:
        return edit(hidden_states.unsqueeze(0)).squeeze(0)
    if len(shape) != 3 or shape[-1] != d:
        return None
    if architecture in TOKENS_FIRST:
        return edit(hidden_states.transpose(0, 1)).transpose(0, 1)
    if tokens is not None and shape[1] > tokens:
        if architecture in MORE_AFTER:
            return torch.cat([edit(hidden_states[:, :tokens]), hidden_states[:, tokens:]], dim=1)
        if architecture in MORE_BEFORE:
            return torch.cat([hidden_states[:, :-tokens], edit(hidden_states[:, -tokens:])], dim=1)
    return edit(hidden_states)


def edited_output(module: nn.Module, plan: Plan, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """Return the edited output of an adapted module."""
    layer: ReftLayer = layer_of(module)  # type: ignore[assignment]
    hidden_states = output[0] if isinstance(output, tuple | list) and output else output
    is_media = plan.call.role.kind == "media"
    if is_media:
        plan.call.record_block_mask(module, args, kwargs)
    edited = None
    if isinstance(hidden_states, torch.Tensor) and not hidden_states.is_nested:
        how = (layer.architecture, hidden_states, layer.d, plan.call.tokens)
        edited = edit_in_layout(*how, edit=lambda h: layer(h, plan), in_one_row=is_media)
    if edited is None:
        raise not_hidden_states_error(module, hidden_states, layer.d)
    return edited if output is hidden_states else replace_first(output, edited)


def not_hidden_states_error(module: nn.Module, output: Any, d: int) -> ValueError:
    """Return the error for an output that is not hidden states."""
    given = str(type(output))
    if isinstance(output, torch.Tensor):
        given = f"of shape {list(output.shape)}" if not output.is_nested else "a nested tensor"
    return ValueError(
        f"A module with a ReFT adapter ({type(module).__name__}) put out {given}, not hidden states [batch, tokens, "
        f"{d}]: name modules in target_modules that put out hidden states. (Nested tensors come from "
        "torch.nn.TransformerEncoder with enable_nested_tensor=True.)"
    )


def replace_first(output: tuple | list, first: torch.Tensor) -> tuple | list:
    """Return the same outputs, of the same type, with another first one."""
    if hasattr(output, "_replace"):  # a named tuple
        return output._replace(**{output._fields[0]: first})  # type: ignore[union-attr]
    return type(output)((first, *output[1:]))
