"""`ReftConfig`: what to edit, where, and by how much."""

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn
from transformers.activations import ACT2FN

from .edits.variants import VARIANTS
from .positions.language import Positions
from .registration import REFT
from .saving.card import add_usage_section

# Of what is saved: raised when an older version would read an adapter as another one.
FORMAT = 1

# What a LoRA config says with another name. Nothing in ReFT corresponds to LoraConfig's other arguments.
LORA_NAMES = {
    "lora_r": "r",
    "lora_dropout": "dropout",
    "lora_target_modules": "target_modules",
    "init_lora_weights": "init_weights",
}


def explain_unknown_arguments(config_cls: type["ReftConfig"]) -> type["ReftConfig"]:
    """Make the error for an unknown argument of a config class say which argument to use instead, if any."""
    init = config_cls.__init__

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        known = [f.name for f in fields(config_cls) if f.init]
        unknown = [name for name in kwargs if name not in known]
        if unknown:
            # PEFT, which drops arguments of later versions from files, knows the error by these words.
            raise TypeError(
                f"{config_cls.__name__} got an unexpected keyword argument {unknown[0]!r}. "
                + " ".join(hint(name, known) for name in unknown)
            )
        init(self, *args, **kwargs)

    config_cls.__init__ = __init__  # type: ignore[method-assign]
    return config_cls


def hint(name: str, known: list[str]) -> str:
    """Say what to use instead of an unknown argument of a config."""
    if name in LORA_NAMES:
        return f"LoRA's {name} corresponds to {LORA_NAMES[name]}."
    if name in {f.name for f in fields(LoraConfig)}:
        return f"Nothing in ReFT corresponds to LoRA's {name}: leave it out."
    close = get_close_matches(name, known, n=1)
    return f"{name} is unknown: " + (f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}.")


@explain_unknown_arguments
@dataclass
class ReftConfig(PeftConfig):
    """
    This is the configuration class to store the configuration of a [`ReftModel`].

    A model that is not of transformers, or has no `generate`, is taken for one whose whole input is the prompt, unless
    `task_type="CAUSAL_LM"`.

    Args:
        intervention (`str`):
            How a hidden state is edited. `"loreft"` (default) and its relatives `"noreft"`, `"direft"` (the paper's
            DiReFT), `"direft_orthogonal"`, `"consreft"` and `"lobireft"`.
        r (`int`):
            Rank of each edit.
        rank_pattern (`dict`):
            Ranks that differ from `r`: a mapping from layer names, or regular expressions of them, to ranks.
        positions (`str`):
            Which tokens are edited. `"f7+l7"` (default) for the first seven and the last seven tokens of the prompt,
            `"f1"` or `"l3"` for one end alone, `"prompt"` for every prompt token, `"all"` for every token, generated
            ones included.
        share_weights (`bool`):
            Whether the first and the last tokens are edited by the same weights. Otherwise each layer has two edits.
        layers_to_transform (`list[int]` or `int`, *optional*):
            Indices of the layers to edit; negative ones count from the end. All layers if None.
        layers_pattern (`list[str]` or `str`, *optional*):
            The name of the list of layers, if it cannot be found: for example `"layers"` or `"h"`.
        target_modules (`list[str]` or `str`, *optional*):
            The modules whose output is edited: names, or a regular expression of them. If None, the output of every
            transformer block.
        exclude_modules (`list[str]` or `str`, *optional*):
            Modules that are left as they are: names, or a regular expression of them.
        dropout (`float`):
            Dropout on the edited hidden states.
        act_fn (`str`, *optional*):
            Activation of the edit's source, a name from `transformers.activations.ACT2FN`: one without parameters.
            None for the identity.
        init_weights (`bool` or `str`):
            True (default) for an edit that is zero at the start where the intervention allows it. `"reference"` for
            the draws of the paper's code. False for a random edit, to test with.
        standardize (`bool`):
            Whether the edit is trained in units of each dimension's root mean square (default), which the first
            training call measures. False for the paper's own parameters.
        modules_to_save (`list[str]`, *optional*):
            Modules apart from the adapter that are trained and saved, such as a classification head.
        trainable_token_indices (`list[int]` or `dict[str, list[int]]`, *optional*):
            Indices of tokens whose embeddings are trained and saved, or a mapping from the names of embedding modules
            to such indices.
        format (`int`):
            What the fields and the tensors of a saved adapter mean. A later format raises an error. Not to be set.
        base_adapters (`list[str]`, *optional*):
            Not to be given: the adapters of another method, such as LoRA, that the base model had when the adapter was
            made, by the subfolders in which they are saved.

    Raises:
        ValueError: if a value is not allowed; the message names it and what is.
    """

    intervention: str = field(
        default="loreft",
        metadata={"help": "How a hidden state is edited: " + ", ".join(VARIANTS) + "."},
    )
    r: int = field(default=8, metadata={"help": "Rank of each edit."})
    rank_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={"help": "Layer names, or regular expressions of them, whose rank differs from `r`, and that rank."},
    )
    positions: str = field(
        default="f7+l7",
        metadata={
            "help": "Which tokens are edited: 'f7+l7' for the first and last seven of the prompt, 'f1' or 'l3' for "
            "one end alone, 'prompt' for every prompt token, 'all' for every token, generated ones included."
        },
    )
    share_weights: bool = field(
        default=False,
        metadata={"help": "Whether the first and the last tokens are edited by the same weights."},
    )
    layers_to_transform: list[int] | int | None = field(
        default=None,
        metadata={"help": "Indices of the layers to edit, negative ones from the end. All layers if None."},
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={"help": "The name of the list of layers, if it cannot be found: for example 'layers' or 'h'."},
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "The modules whose output is edited: names, or a regular expression of them. If None, the output "
            "of every transformer block."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Modules that are left as they are: names, or a regular expression of them."},
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the edited hidden states."})
    act_fn: str | None = field(
        default=None,
        metadata={
            "help": "Activation of the edit's source, a name from transformers' ACT2FN: one without parameters. None: "
            "the identity."
        },
    )
    init_weights: bool | str = field(
        default=True,
        metadata={
            "help": "True: an edit that is zero at the start where the intervention allows it. 'reference': the draws "
            "of the paper's code. False: a random edit, to test with."
        },
    )
    standardize: bool = field(
        default=True,
        metadata={
            "help": "Whether the edit is trained in units of each dimension's root mean square, which the first "
            "training call measures."
        },
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules apart from the adapter that are trained and saved, such as a classification head."},
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None,
        metadata={
            "help": "Indices of tokens whose embeddings are trained and saved, or a mapping from the names of "
            "embedding modules to such indices."
        },
    )
    base_adapters: list[str] | None = field(
        default=None,
        metadata={"help": "Set when the adapter is made: the base model's own adapters, such as LoRA's."},
    )
    format: int = field(
        default=FORMAT,
        metadata={"help": "What the fields and the tensors of a saved adapter mean. Not to be set."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = REFT
        if not isinstance(self.format, int) or not 1 <= self.format <= FORMAT:
            raise ValueError(
                f"format={self.format!r}: this version of peft_reft reads adapters of format 1 to {FORMAT}. A later "
                "version saved this one: pip install --upgrade peft_reft."
            )
        self.rank_pattern = self.rank_pattern or {}
        if isinstance(self.layers_to_transform, range | tuple | set):
            self.layers_to_transform = list(self.layers_to_transform)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, set | tuple):
                setattr(self, name, sorted(value))
        if not isinstance(self.intervention, str) or self.intervention not in VARIANTS:
            raise ValueError(f"intervention={self.intervention!r} is unknown. Choose one of {', '.join(VARIANTS)}.")
        Positions.parse(self.positions)
        self._check_ranks()
        self._check_layers()
        if not (_is_number(self.dropout) and 0 <= self.dropout < 1):
            raise ValueError(f"dropout={self.dropout!r} is not a probability: give a number from 0 up to, but not, 1.")
        if not isinstance(self.share_weights, bool):
            raise ValueError(f"share_weights={self.share_weights!r} is neither True nor False.")
        find_activation(self.act_fn)
        if not isinstance(self.init_weights, bool) and self.init_weights != "reference":
            raise ValueError(f"init_weights={self.init_weights!r} is unknown. Choose True, 'reference' or False.")
        if not isinstance(self.standardize, bool):
            raise ValueError(f"standardize={self.standardize!r} is neither True nor False.")
        if self.standardize and self.init_weights == "reference":
            raise ValueError(
                "init_weights='reference' draws the parameters of the paper's code, which have the units of the "
                "hidden states. Pass standardize=False as well."
            )

    def _check_ranks(self) -> None:
        ranks = {"r": self.r} | {f"rank_pattern[{key!r}]": r for key, r in self.rank_pattern.items()}
        for name, rank in ranks.items():
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise ValueError(
                    f"{name}={rank!r} is not a rank: give a whole number from 1 to the width of the hidden states."
                )

    def _check_layers(self) -> None:
        layers = self.layers_to_transform
        if layers is not None:
            indices = layers if isinstance(layers, list) else [layers]
            if not indices or not all(isinstance(i, int) and not isinstance(i, bool) for i in indices):
                raise ValueError(
                    f"layers_to_transform={layers!r} names no layers: give a list of indices, or None for every layer."
                )
            if len(set(indices)) < len(indices):
                raise ValueError(f"layers_to_transform={layers!r} names a layer twice: give each index once.")
        for name in ("target_modules", "exclude_modules"):
            try:
                re.compile(getattr(self, name) if isinstance(getattr(self, name), str) else "")
            except re.error as error:
                raise ValueError(f"{name}={getattr(self, name)!r} is no regular expression: {error}.") from error
        if isinstance(self.target_modules, str):
            if self.target_modules == INCLUDE_LINEAR_LAYERS_SHORTHAND:
                raise ValueError(
                    f"target_modules={self.target_modules!r} is a shorthand for linear layers, whose outputs are "
                    "mostly no hidden states. Leave target_modules at None to edit the output of every block, or name "
                    "modules such as ['mlp']."
                )
            if layers is not None or self.layers_pattern is not None:
                raise ValueError(
                    "layers_to_transform and layers_pattern cannot be used with "
                    f"target_modules={self.target_modules!r}, a regular expression: name the layers in the "
                    "expression, or give target_modules as a list."
                )
        if self.target_modules == []:
            raise ValueError("target_modules=[] names no module: leave it at None to edit the output of every block.")

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save as PEFT does; a model card that lies in the folder is told how to load the adapter."""
        super().save_pretrained(save_directory, **kwargs)
        add_usage_section(save_directory, self)


def find_activation(name: str | None) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return the activation of a name, None for the identity.

    Raises:
        ValueError: if transformers has none of that name, or it holds tensors, which no adapter has a place for.
    """
    if name is None:
        return None
    if not isinstance(name, str) or name not in ACT2FN:
        raise ValueError(
            f"act_fn={name!r} is unknown. Choose a name from transformers.activations.ACT2FN "
            f"({', '.join(sorted(ACT2FN))}) whose activation has no parameters, or None for the identity."
        )
    activation = _activation(name)
    if isinstance(activation, nn.Module) and (held := ", ".join(activation.state_dict())):
        raise ValueError(
            f"act_fn={name!r} has parameters or buffers of its own ({held}). An adapter holds R, W and b alone, so "
            "they would be lost when it is saved. Choose an activation without any, such as 'relu', 'gelu' or "
            "'silu', or None for the identity."
        )
    return activation


@functools.cache
def _activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the same activation for each unit, so that those of a mixed batch are applied together."""
    return ACT2FN[name]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
