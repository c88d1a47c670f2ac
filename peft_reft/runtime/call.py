"""One call of a model: what it is given, and where its prompts are."""

import inspect
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from ..positions.language import AnyPositions
from ..positions.prompts import (
    IGNORED_LABEL,
    Prompts,
    assert_without_sync,
    before_labels,
    given_lengths,
    sequence_ids,
    valid_tokens,
    whole_sequences,
    without_padding,
)
from . import messages
from .adapter_names import MixedBatch
from .continuous_batching import Requests
from .generate import (
    CACHES,
    RECURRENT_STATES,
    STEP,
    Generation,
    ModelToken,
    find_cache,
    given_shape,
    given_tokens,
    padding_id,
    tokens_before,
)

MEDIA_INPUT = "media"  # what a model of images or sound is given, whatever its forward calls it
SIGNAL_MASKS = ("attention_mask", "patch_attention_mask", "pixel_attention_mask")

PROMPT_ENDS = ("labels", "prompt_lengths")  # arguments that say where prompts end

# The arguments of a model's forward that tell where prompts are.
PROMPT_ARGUMENTS = (
    STEP,
    "input_ids",
    "inputs_embeds",
    "position_ids",
    "cu_seq_lens_q",
    "labels",
    "prompt_lengths",
    MEDIA_INPUT,
    *SIGNAL_MASKS,
    "logits_to_keep",
    *CACHES,
    *RECURRENT_STATES,
)

_labelled: "weakref.WeakKeyDictionary[ModelToken, WeakIdKeyDictionary]" = weakref.WeakKeyDictionary()  # ids as keys
_warned: "weakref.WeakSet[ModelToken]" = weakref.WeakSet()  # of a whole input that was taken for the prompt


def note_labels(family: ModelToken, input_ids: Any) -> None:
    """Keep in mind, for as long as they live, that ids came with labels, which say where their prompts end."""
    if isinstance(input_ids, torch.Tensor) and not torch.compiler.is_compiling():
        _labelled.setdefault(family, WeakIdKeyDictionary())[input_ids] = True


def had_labels(family: ModelToken, input_ids: Any) -> bool:
    """Whether these very ids came with labels before."""
    is_known = isinstance(input_ids, torch.Tensor) and not torch.compiler.is_compiling()
    return is_known and input_ids in _labelled.get(family, ())


@dataclass(frozen=True)
class ModuleRole:
    """What a module that is called is to its model.

    Attributes:
        family (`ModelToken`): the model that it belongs to.
        kind (`str`): `"causal"` for a model that continues its prompt; `"full_input"` for one whose whole input is the
            prompt (encoders, classifiers); `"media"` for such a model of images or sound, which makes its tokens
            itself; `"decoder"` for the decoder of an encoder-decoder model.
        depth (`int`): how deep in the model it lies.
        argument_names (`tuple[str, ...]`): names of the positional arguments of the forward, in order.
        has_own_tokens (`bool`): whether its tokens are not those of the model around it (an encoder and a decoder,
            a vision tower), so that its calls have plans of their own.
    """

    family: ModelToken
    kind: str
    depth: int
    argument_names: tuple[str, ...]
    has_own_tokens: bool = False

    @property
    def continues(self) -> bool:
        """Whether the model goes on with its prompt."""
        return self.kind in ("causal", "decoder")


def reads_text(module: nn.Module) -> bool:
    """Whether a model is given text, perhaps beside images or sound."""
    return "text" in getattr(module, "input_modalities", "text")


@dataclass
class Call:
    """One call of a model.

    Attributes:
        role (`ModuleRole`): what the called module is.
        owner (`nn.Module`, *optional*): that module; None once the call is over.
        training (`bool`): whether it is in training mode, and not within `generate`.
        arguments (`dict`): those of its arguments that are in `PROMPT_ARGUMENTS`.
        generation (`Generation` or `Requests`, *optional*): the call of `generate` that it is part of, or the requests
            that it serves.
        tokens (`int`, *optional*): how many tokens the module is given, None if it is given no text.
        skips_prepare (`bool`): whether it has the cache of a running `generate`, but is not marked as its step.
        is_answering (`bool`): whether all of them come after the prompts.
    """

    role: ModuleRole
    owner: nn.Module | None
    training: bool
    arguments: Mapping[str, Any]
    generation: Generation | Requests | None = None
    skips_prepare: bool = False
    tokens: int | None = None
    is_answering: bool = False
    _window: tuple[int, int] | None = None
    _past: int | torch.Tensor | None = 0
    _block_mask: tuple[torch.Tensor | None] | None = None

    def __post_init__(self) -> None:
        if self.owner is None:
            return  # over; what was found stays
        # Before the call goes on: blocks add to the cache.
        self.tokens = given_tokens(self.arguments) if self.tokens is None else self.tokens
        if self.generation is not None:
            self._window = self.generation.window(self.arguments)
        elif self.role.continues:
            past = tokens_before(self.arguments)
            self._past = past.clone() if isinstance(past, torch.Tensor) else past
        self.is_answering = self._is_past_prompt(self.tokens) and not self.skips_prepare

    def _is_past_prompt(self, tokens: int | None) -> bool:
        """Whether so many tokens are known to come after the prompts, none of which need be looked for."""
        if self.generation is not None:
            return self._window is None
        begins = isinstance(self._past, int) and self._past == 0
        return self.role.continues and tokens == 1 and not begins and "prompt_lengths" not in self.arguments

    def contains(self, role: ModuleRole, arguments: Mapping[str, Any]) -> bool:
        """Whether a module that is called now is part of this call.

        An interrupt can leave the plan of a call behind that has ended, so it is not enough that the module lies
        deeper in the same model, on the same sequence: it must be given no other ids. (Embeddings cannot tell. A step
        of `generate` may give its ids on in another tensor, but as many.)
        """
        ids, own_ids = arguments.get("input_ids"), self.arguments.get("input_ids")
        is_within = role.family is self.role.family and role.depth > self.role.depth
        if role.has_own_tokens or not is_within or STEP in arguments:
            return False
        if ids is None or ids is own_ids:
            return True
        return STEP in self.arguments and own_ids is not None and ids.shape == own_ids.shape

    def is_around(self, role: ModuleRole) -> bool:
        """Whether a module that is called now has tokens of its own within this call's model."""
        return role.has_own_tokens and not self.role.has_own_tokens and role.depth > self.role.depth

    def arguments_for(self, role: ModuleRole) -> dict[str, Any]:
        """Return the arguments of this call's model that describe the tokens of a module within it."""
        told = (*PROMPT_ENDS, STEP) if role.kind == "decoder" else ()
        return {name: self.arguments[name] for name in told if name in self.arguments}

    def check_mixed(self, mixed_batch: MixedBatch, batch: int) -> None:
        """Raise a ValueError unless it is known which rows of the call belong to which adapter."""
        config = getattr(self.owner, "config", None)
        is_tower = (
            self.role.kind == "media" and self.role.has_own_tokens and not getattr(config, "is_encoder_decoder", False)
        )
        if is_tower and len(set(mixed_batch.names)) > 1:
            raise ValueError(
                f"adapter_names={list(mixed_batch.names)}: {type(self.owner).__name__} is given images or sounds, and "
                "ReFT cannot tell to which row of the text each belongs. Run one batch an adapter, or edit the "
                "language model alone."
            )
        mixed_batch.repeats(batch, expanded=self.generation is not None)

    def ended(self) -> "Call":
        """Return the call without its arguments."""
        return replace(self, owner=None, arguments={}, generation=None)

    def prompts(self, positions: AnyPositions, batch: int, tokens: int, device: torch.device) -> Prompts | None:
        """Find the prompts.

        Args:
            positions (`Positions` or `PerRowPositions`): the choice of positions, which says what must be known.
            batch, tokens (`int`): shape of the hidden states.
            device (`torch.device`): device of the hidden states.

        Returns:
            `Prompts`, or None where the tokens are in no prompt.

        Raises:
            ValueError: if the arguments do not tell where prompts end, or contradict themselves.
        """
        if self.role.kind == "media":
            return self._prompts_of_media(positions, batch, tokens, device)
        if self.skips_prepare:
            raise ValueError(messages.SKIPS_PREPARE)
        arguments, given = self.arguments, self.tokens
        keep = arguments.get("logits_to_keep")
        if given is not None and tokens < given and isinstance(keep, int) and tokens == keep:
            # Layers that write no cache may be given only the tokens whose logits are asked for (Gemma 4).
            spans = self.prompts(positions, batch, given, device)
            return None if spans is None else spans.after(given - tokens)
        self._check_tokens(batch, tokens)
        if self._is_past_prompt(tokens):
            return None
        if self.generation is not None:
            assert self._window is not None
            return self.generation.spans(self._window, batch, device)
        lengths, past = arguments.get("prompt_lengths"), int(self._past or 0)
        valid = self._valid(arguments.get("attention_mask"), past, batch, tokens, device)
        sequences = sequence_ids(arguments, valid) if not past else None
        labels = self._labels_of_tokens(batch, tokens)
        if lengths is not None:
            spans = given_lengths(valid, sequences, lengths)
        elif labels is not None:
            packed = arguments.get("cu_seq_lens_q") is not None
            # what the cache holds is no answer
            labels = torch.nn.functional.pad(labels, (past, 0), value=IGNORED_LABEL)
            spans = before_labels(valid, sequences, labels, positions, packed)
            note_labels(self.role.family, arguments.get("input_ids"))
        else:
            if positions.needs_end and self.role.continues:
                if self.training:
                    raise ValueError(messages.no_end(positions.text, self.role.kind == "decoder"))
                if had_labels(self.role.family, arguments.get("input_ids")):
                    raise ValueError(messages.labels_withheld(positions.text))
                self._warn_of_guess(positions, tokens)
            spans = whole_sequences(valid, sequences)
        return spans.after(past)

    def _check_tokens(self, batch: int, tokens: int) -> None:
        """Raise a ValueError if hidden states are not those of the model's tokens."""
        shape, given = given_shape(self.arguments), self.tokens
        if shape is not None and len(shape) > 2 and shape[:2] != (batch, tokens):
            raise ValueError(
                f"{type(self.owner).__name__} was given input of shape {list(shape)}, several sequences a row, which "
                f"it lays out anew as {batch} rows of {tokens} tokens. ReFT does not follow that. Give it one "
                "sequence a row, [batch, tokens]."
            )
        if given is not None and given != tokens:
            raise ValueError(
                f"An adapted module put out {tokens} tokens where the model was given {given}. These are not the "
                "hidden states of the model's tokens: name other modules in target_modules."
            )

    def _labels_of_tokens(self, batch: int, tokens: int) -> torch.Tensor | None:
        """Return the labels that are next tokens, each at the token that it is. None where there are none."""
        labels = self.arguments.get("labels")
        if not self.role.continues or labels is None or tuple(labels.shape) != (batch, tokens):
            return None  # of another kind: classes or spans
        if self.role.kind == "decoder":  # whose labels lie at the token before the one that they are
            return torch.nn.functional.pad(labels[:, :-1], (1, 0), value=IGNORED_LABEL)
        return labels

    def record_block_mask(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Look at the mask that an adapted module was given: only it counts the tokens of images or sound."""
        if self._block_mask is None:
            names = tuple(inspect.signature(type(module).forward).parameters)[1:]
            if "attention_mask" in names:
                given = {**dict(zip(names, args, strict=False)), **kwargs}
                self._block_mask = (given.get("attention_mask"),)

    def _prompts_of_media(self, positions: AnyPositions, batch: int, tokens: int, device: torch.device) -> Prompts:
        """Return the prompts of a model of images or sound: its complete input."""
        media = self.arguments.get(MEDIA_INPUT)
        if (positions.prefix or positions.suffix) and media is not None and len(media) != batch:
            raise ValueError(
                f"positions='{positions.text}': {type(self.owner).__name__} lays its input {list(media.shape)} into "
                f"{batch} rows of {tokens} tokens, so ReFT cannot tell where each image begins and ends. Choose "
                "'prompt' or 'all' there."
            )
        if self._block_mask is not None:
            mask = self._block_mask[0]
        else:
            given = [self.arguments[name] for name in SIGNAL_MASKS if name in self.arguments]
            mask = given[0].flatten(1) if given else None
            if mask is not None and tuple(mask.shape) != (batch, tokens):
                assert_without_sync(
                    (mask != 0).all(),
                    f"The mask {list(given[0].shape)} does not count the {tokens} tokens that are made of the input, "
                    "so ReFT cannot tell which are padding: adapt blocks, which are given a mask of their own.",
                )
                mask = None
        return whole_sequences(self._valid(mask, 0, batch, tokens, device))

    def _valid(self, mask: Any, past: int, batch: int, tokens: int, device: torch.device) -> torch.Tensor:
        """Mark the tokens [batch, past + tokens] that are not padding: all tokens without a mask and ids."""
        valid = valid_tokens(mask, past, tokens, self.role.continues)
        if valid is None and not past:
            valid = self._valid_by_ids(batch, tokens)
        if valid is None:
            valid = torch.ones(batch, past + tokens, dtype=torch.bool, device=device)
        return valid.to(device).expand(batch, -1)

    def _valid_by_ids(self, batch: int, tokens: int) -> torch.Tensor | None:
        """Mark the tokens [batch, tokens] that are not padding, by the pad token of the model's config.

        None where it names none, or one that rows can begin or end with; a decoder may begin with its padding token.
        """
        ids, config = self.arguments.get("input_ids"), getattr(self.owner, "config", None)
        if self.role.kind not in ("causal", "full_input") or ids is None or tuple(ids.shape) != (batch, tokens):
            return None
        sources = (getattr(self.owner, "generation_config", None), config, getattr(config, "text_config", None))
        names = ("pad_token_id", "eos_token_id", "bos_token_id")
        pad = padding_id([{name: getattr(source, name, None) for name in names} for source in sources], names[1:])
        return None if pad is None else without_padding(ids, pad)

    def _warn_of_guess(self, positions: AnyPositions, tokens: int) -> None:
        """Warn, once for each model, that a whole input is taken for the prompt, which may hold an answer."""
        if torch.compiler.is_compiling() or tokens == 1 or self.role.family in _warned:
            return
        if find_cache(self.arguments) is not None or any(name in self.arguments for name in RECURRENT_STATES):
            return
        _warned.add(self.role.family)
        warnings.warn(messages.whole_input(positions.text), stacklevel=2)
