"""A call of `generate`: the prompt that it was given, and how much of it has been processed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ..positions.prompts import Prompts, valid_tokens, whole_sequences
from .adapter_names import MixedBatch
from .state import Family, PerThread

CACHES = ("cache", "past_key_values", "cache_params")  # what transformers calls it, now and before, and in Mamba
STATES = ("state", "mems")  # what RWKV and XLNet carry on in its place, which does not tell how much it has seen

current = PerThread()  # the call of `generate` that runs
_drafts = WeakIdKeyDictionary()  # cache of a draft model -> `valid` of the call that filled it


def current_generation() -> "Generation | None":
    """The call of `generate` that runs in this thread."""
    return current.value


def find_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a forward or of `generate`, or None."""
    return next((arguments[name] for name in CACHES if arguments.get(name) is not None), None)


def cached_tokens(cache: Any) -> int | torch.Tensor | None:
    """How many tokens a cache holds: a static cache says it in a tensor, one without attention layers (None) not at
    all.

    Raises:
        ValueError: if it is no cache that a prompt can be followed through.
    """
    if cache is None:
        return 0
    if not hasattr(cache, "get_seq_length"):
        raise ValueError(
            f"A cache of type {type(cache).__name__} does not tell how many tokens it holds, so ReFT cannot tell "
            "where the prompt is. Use one of transformers' caches, or none; begin continuous batching after the "
            "adapter was added."
        )
    try:
        return cache.get_seq_length()
    except ValueError:
        return None


def tokens_before(arguments: Mapping[str, Any]) -> int | torch.Tensor | None:
    """How many tokens a forward goes on from; None if its cache or its state does not tell."""
    if any(arguments.get(name) is not None for name in STATES):
        return None
    return cached_tokens(find_cache(arguments))


def given_tokens(arguments: Mapping[str, Any]) -> int | None:
    """How many tokens a forward is given, or None if its arguments hold no text."""
    shape = given_shape(arguments)
    return None if shape is None else shape[1]


def given_shape(arguments: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The shape of the tokens that a forward is given, embeddings without their width, or None if there are none."""
    ids, embeddings = arguments.get("input_ids"), arguments.get("inputs_embeds")
    if ids is not None:
        return tuple(ids.shape)
    return None if embeddings is None else tuple(embeddings.shape[:-1])


@dataclass
class Generation:
    """One call of `generate`.

    Attributes:
        family (`Family`): the model that generates.
        model (`PreTrainedModel`, *optional*): the part of it whose `generate` was called.
        prompts (`int`, *optional*): how many prompts it was given.
        input_ids (`torch.LongTensor` [batch, tokens], *optional*): the prompt, where it was given as ids; without a
            cache, as the first forward was given it.
        valid (`torch.BoolTensor` [batch, tokens], *optional*): the whole prompt, False on padding. None for what the
            first forward is given.
        seen (`int`): tokens that have been processed; at first those that the cache holds.
        is_answering (`bool`): whether the whole prompt has been. (torch.compile would trace anew for every `seen`.)
        is_cached (`bool`): whether forwards are given what follows a cache, rather than all tokens so far.
        is_draft (`bool`): whether the model drafts tokens for another, or for itself.
        cache: the cache of the forwards, once they have one.
        mixed_batch (`MixedBatch`, *optional*): the adapters of its prompts, where they differ.
        is_in_own_generate (`bool`): whether the call has come to `generate` of the model's class, which another that
            was put on the model may call.
    """

    family: Family
    model: Any = None
    prompts: int | None = None
    input_ids: torch.Tensor | None = None
    valid: torch.Tensor | None = None
    seen: int = 0
    is_answering: bool = False
    is_cached: bool = True
    is_draft: bool = False
    cache: Any = None
    mixed_batch: MixedBatch | None = None
    is_in_own_generate: bool = True

    @classmethod
    def of(cls, model: Any, family: Family, args: tuple, kwargs: Mapping[str, Any]) -> "Generation":
        """Read the arguments of a call of `model.generate`.

        Args:
            model (`PreTrainedModel`): the model that generates.
            family (`Family`): stands for it.
            args, kwargs: the arguments of `generate`.

        Raises:
            ValueError: if the call is one whose prompts cannot be followed.
        """
        given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
        configs = [kwargs, {} if given is None else vars(given), vars(model.generation_config)]
        guidance = _option(configs, "guidance_scale")
        if guidance is not None and guidance != 1:
            raise ValueError(
                f"guidance_scale={guidance}: classifier-free guidance runs the model on a second prompt in the same "
                "call, which ReFT does not tell from the first. Generate without it, or with the adapter disabled."
            )
        cache = find_cache(kwargs)
        kind = DecoderGeneration if model.config.is_encoder_decoder else cls
        generation = kind(
            family,
            model,
            seen=int(cached_tokens(cache) or 0),
            is_cached=_option(configs, "use_cache") is not False,
            is_draft=bool(_option(configs, "is_assistant")),
        )
        possible = (args[0] if args else None, kwargs.get("inputs"), kwargs.get("input_ids"))
        inputs = next((given for given in possible if given is not None), None)
        rows = (inputs, *(kwargs.get(name) for name in ("inputs_embeds", "input_features", "pixel_values")))
        generation.prompts = next((len(given) for given in rows if given is not None), None)
        if isinstance(generation, DecoderGeneration):
            generation.chunk_size = _option(configs, "prefill_chunk_size")
            return generation
        if inputs is not None and inputs.dim() == 2 and inputs.shape[1] > 0 and not inputs.is_floating_point():
            generation.input_ids = inputs
        if generation.is_draft and cache in _drafts:
            generation.valid = _drafts[cache]  # what was generated since is no prompt
        else:
            generation.valid = _valid_prompt(generation.input_ids, kwargs, configs)
        columns = generation.seen + 1 if generation.valid is None else generation.valid.shape[1]
        if columns <= generation.seen and not generation.is_draft:
            raise ValueError(
                f"generate was given {columns} tokens and a cache that holds {generation.seen}, so that none of the "
                "prompt is left to process. Give the whole history, or an attention_mask that counts the cached "
                "tokens, too."
            )
        return generation

    def is_of(self, arguments: Mapping[str, Any]) -> bool:
        """Whether a forward with these arguments goes on with this call's sequences, not with others of its own."""
        if _is_no_step(arguments):
            return False
        cache = find_cache(arguments)
        if self.cache is not None:
            return cache is self.cache
        if cache is None:
            return self._is_begun_by(arguments.get("input_ids"))
        self.cache = cache
        if self.is_draft:
            _drafts[cache] = self.valid
        return True

    def _is_begun_by(self, input_ids: torch.Tensor | None) -> bool:
        """Whether ids that are given without a cache are those of this call, as far as they tell."""
        if not self.seen:
            self.input_ids = input_ids  # as the model is given them, which Musicgen's generate changes
        own = self.input_ids
        if own is None or input_ids is None:
            return True
        if self.is_cached and input_ids.shape[1] < own.shape[1]:
            return True  # of a model that keeps its state elsewhere
        return torch.equal(input_ids[:, : own.shape[1]], own)

    def window(self, arguments: Mapping[str, Any]) -> tuple[int, int] | None:
        """Where in the sequence the tokens of the next forward lie: first column and last + 1.

        None if the whole prompt has been processed before. Columns decide, not whether a cache is empty, so a prompt
        that comes in chunks, or partly from a cache, is edited at the same tokens as one that comes whole.
        """
        tokens = given_tokens(arguments) or 0
        if self.is_answering and tokens == 1:
            return None
        if self.valid is None:
            self.valid = torch.ones(1, tokens, dtype=torch.bool)
        prompt = self.valid.shape[1]
        if tokens > prompt or not self.seen:
            before = tokens_before(arguments)
            if isinstance(before, int) and before == 0:
                self._see(tokens)
                return 0, tokens  # nothing is kept, if a cache was made or not: every step is given all tokens so far
        if self.seen >= prompt:
            return None  # and `seen` stays
        start = self.seen
        self._see(start + tokens)
        return start, start + tokens

    def _see(self, seen: int) -> None:
        self.seen, self.is_answering = seen, self.valid is not None and seen >= self.valid.shape[1]

    def spans(self, window: tuple[int, int], batch: int, device: torch.device) -> Prompts:
        """The prompts, as the forward of a window sees them: a row for each beam or returned sequence."""
        start, end = window
        valid = self.valid
        assert valid is not None, "window comes before spans"
        if batch % len(valid):
            raise ValueError(
                f"generate was given {len(valid)} prompts, but the model {batch} rows: ReFT cannot tell whose they "
                "are."
            )
        whole = whole_sequences(valid)
        beyond = (0, max(0, end - valid.shape[1]))  # tokens that were generated: in no prompt
        rank = torch.nn.functional.pad(whole.rank, beyond, value=valid.shape[1] + 1)
        valid = torch.nn.functional.pad(valid, beyond, value=True)
        parts = (valid[:, start:end], rank[:, start:end], whole.prefix_length)
        valid, rank, length = (part.to(device).repeat_interleave(batch // len(part), dim=0) for part in parts)
        return Prompts(valid, rank, length, length, one_prompt=True)


@dataclass
class DecoderGeneration(Generation):
    """One call of `generate` of an encoder-decoder model, whose decoder begins with tokens that `generate` chooses.

    One call may begin several prompts: Whisper's asks for the language first, and then goes from segment to segment.

    Attributes:
        begins_with (`int`, *optional*): how many tokens `generate` has just made the decoder begin with.
        chunk_size (`int`, *optional*): of a prompt that comes in chunks.
        encoded: what the encoder put out for a decoder without a cache.
    """

    begins_with: int | None = None
    chunk_size: int | None = None
    encoded: Any = None

    def is_of(self, arguments: Mapping[str, Any]) -> bool:
        if _is_no_step(arguments):
            return False
        # A call aside has the encoder run again, generate hands on what it has put out.
        return self.valid is None or arguments.get("encoder_outputs") is not None

    def window(self, arguments: Mapping[str, Any]) -> tuple[int, int] | None:
        self._begin(arguments)
        return super().window(arguments)

    def _begin(self, arguments: Mapping[str, Any]) -> None:
        """Take the prompt from a forward that begins one.

        Raises:
            ValueError: if the prompt comes in chunks.
        """
        cache, tokens = find_cache(arguments), given_tokens(arguments) or 0
        cached = cached_tokens(cache)  # in a static cache that is in use a tensor, at which looking would wait
        is_new = isinstance(cached, int) and cached == 0
        if cache is None:
            encoded, self.encoded = self.encoded, arguments.get("encoder_outputs")
            is_new = tokens != self.seen + 1 or encoded is not self.encoded
        self.cache = cache
        if self.valid is not None and not is_new:
            return
        if self.chunk_size is not None:
            raise ValueError(
                f"prefill_chunk_size={self.chunk_size}: ReFT cannot tell where the prompt of a decoder ends that is "
                "given in chunks. Generate without it."
            )
        self.seen, self.is_answering = self.seen if self.valid is None and cache is not None else 0, False
        # Drafts may follow the prompt in the same forward.
        columns, self.begins_with = self.begins_with or self.seen + tokens, None
        valid = valid_tokens(arguments.get("attention_mask"), self.seen, tokens, is_causal=True)
        self.valid = torch.ones(1, columns, dtype=torch.bool) if valid is None else valid[:, :columns]


def _valid_prompt(
    input_ids: torch.Tensor | None, kwargs: Mapping[str, Any], configs: list[Mapping[str, Any]]
) -> torch.Tensor | None:
    """Which tokens that `generate` was given are no padding [batch, tokens], as it decides; None without any."""
    if kwargs.get("attention_mask") is not None:
        return kwargs["attention_mask"].bool()
    if input_ids is not None:  # beside embeddings, too
        pad = padding_id(configs)
        return input_ids != (-1 if pad is None else pad)
    embeddings = kwargs.get("inputs_embeds")
    return None if embeddings is None else torch.ones(embeddings.shape[:2], dtype=torch.bool)


def padding_id(configs: list[Mapping[str, Any]], others: tuple[str, ...] = ("eos_token_id",)) -> int | None:
    """The id by which padding is known where no mask tells it, as `generate` decides.

    Args:
        configs: where the ids of special tokens are looked for, in this order.
        others: names of those that a padding token must not be, or it may be a token of the text.

    Returns:
        `int`, or None if there is no such id.
    """
    pad = _option(configs, "pad_token_id")
    ids = [_option(configs, name) for name in others]
    return None if any(pad in (own if isinstance(own, list) else [own]) for own in ids) else pad


def _is_no_step(arguments: Mapping[str, Any]) -> bool:
    """Whether a forward is no step of a generation: it is given no text, or told where its prompts end."""
    return given_tokens(arguments) is None or "prompt_lengths" in arguments or "labels" in arguments


def _option(configs: list[Mapping[str, Any]], name: str) -> Any:
    """The first value that is set, in the order in which `generate` looks."""
    return next((config[name] for config in configs if config.get(name) is not None), None)
