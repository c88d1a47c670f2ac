"""A call of `generate`: the prompt that it was given, and the marks of the forwards that are its steps."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ..positions.prompts import Prompts, valid_tokens, whole_sequences
from .adapter_names import MixedBatch
from .state import ModelToken, PerThread

CACHES = ("cache", "past_key_values", "cache_params")  # what transformers calls it, now and before, and in Mamba
RECURRENT_STATES = ("state", "mems")  # of RWKV and XLNet, in place of a cache: their length is not known

STEP = "_reft_step"  # the keyword by which a forward is marked as a step of `generate`
AFTER_PROMPT = "after the prompt"
Step = tuple[int, int] | str  # first column and last + 1; a constant later, as torch.compile traces each column anew

current = PerThread()  # the call of `generate` that runs
_drafts = WeakIdKeyDictionary()  # cache of a draft model -> `valid` of the call that filled it


def current_generation() -> "Generation | None":
    """Return the call of `generate` that runs in this thread."""
    return current.value


def find_cache(arguments: Mapping[str, Any]) -> Any:
    """Return the cache among the arguments of a forward or of `generate`, or None."""
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
    """Return the number of tokens before a forward, None if its cache or its state does not tell."""
    if any(arguments.get(name) is not None for name in RECURRENT_STATES):
        return None
    return cached_tokens(find_cache(arguments))


def given_tokens(arguments: Mapping[str, Any]) -> int | None:
    """Return the number of input tokens of a forward, None if it has no text."""
    shape = given_shape(arguments)
    return None if shape is None else shape[1]


def given_shape(arguments: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Return the shape of a forward's input tokens, without the width of embeddings. None if it has no text."""
    ids, embeddings = arguments.get("input_ids"), arguments.get("inputs_embeds")
    if ids is not None:
        return tuple(ids.shape)
    return None if embeddings is None else tuple(embeddings.shape[:-1])


@dataclass
class Generation:
    """One call of `generate`.

    Attributes:
        family (`ModelToken`): the model that generates.
        model (`PreTrainedModel`, *optional*): the part of it whose `generate` was called.
        prompts (`int`, *optional*): how many prompts it was given.
        valid (`torch.BoolTensor` [batch, tokens], *optional*): the whole prompt, False on padding. None for what the
            first forward is given.
        seen (`int`): tokens that have been processed; at first those that the cache holds.
        is_draft (`bool`): whether the model drafts tokens for another, or for itself.
        cache: the cache of its steps, once they have one.
        mixed_batch (`MixedBatch`, *optional*): the adapters of its prompts, where they differ.
        is_in_own_generate (`bool`): whether the call has come to `generate` of the model's class, which another that
            was put on the model may call.
    """

    family: ModelToken
    model: Any = None
    prompts: int | None = None
    valid: torch.Tensor | None = None
    seen: int = 0
    is_draft: bool = False
    cache: Any = None
    mixed_batch: MixedBatch | None = None
    is_in_own_generate: bool = True

    @classmethod
    def of(cls, model: Any, family: ModelToken, args: tuple, kwargs: Mapping[str, Any]) -> "Generation":
        """Read the arguments of a call of `model.generate`.

        Args:
            model (`PreTrainedModel`): the model that generates.
            family (`ModelToken`): stands for it.
            args, kwargs: the arguments of `generate`.

        Raises:
            ValueError: if the call is one whose prompts cannot be followed.
        """
        given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
        configs = [kwargs, {} if given is None else vars(given), vars(model.generation_config)]
        cache = find_cache(kwargs)
        kind = DecoderGeneration if model.config.is_encoder_decoder else cls
        seen = int(cached_tokens(cache) or 0)
        generation = kind(family, model, seen=seen, is_draft=bool(_option(configs, "is_assistant")))
        possible = (args[0] if args else None, kwargs.get("inputs"), kwargs.get("input_ids"))
        inputs = next((given for given in possible if given is not None), None)
        rows = (inputs, *(kwargs.get(name) for name in ("inputs_embeds", "input_features", "pixel_values")))
        generation.prompts = next((len(given) for given in rows if given is not None), None)
        if isinstance(generation, DecoderGeneration):
            generation.chunk_size = _option(configs, "prefill_chunk_size")
            return generation
        if generation.is_draft and cache in _drafts:
            generation.valid = _drafts[cache]  # what was generated since is no prompt
        else:
            are_ids = inputs is not None and inputs.dim() == 2 and inputs.shape[1] > 0
            input_ids = inputs if are_ids and not inputs.is_floating_point() else None  # type: ignore[union-attr]
            generation.valid = _valid_prompt(input_ids, kwargs, configs)
        columns = generation.seen + 1 if generation.valid is None else generation.valid.shape[1]
        if columns <= generation.seen and not generation.is_draft:
            raise ValueError(
                f"generate was given {columns} tokens and a cache that holds {generation.seen}, so that none of the "
                "prompt is left to process. Give the whole history, or an attention_mask that counts the cached "
                "tokens, too."
            )
        return generation

    def begin(self, cache: Any) -> None:
        """Note the cache that `generate` has made for its steps, or was given."""
        if self.cache is None:  # a second one is for a prompt that a model adds by itself (VibeVoice)
            self.cache = cache

    def step(self, inputs: Mapping[str, Any]) -> Step | None:
        """Return which step a forward with these inputs is, or None if it is none of this call's.

        Columns decide, not whether a cache is empty, so a prompt that comes in chunks, or partly from a cache, is
        edited at the same tokens as one that comes whole.

        Args:
            inputs (`Mapping`): what `prepare_inputs_for_generation` has prepared for the forward.
        """
        tokens, cache = given_tokens(inputs), find_cache(inputs)
        if self.cache is None:
            self.cache = cache
        if tokens is None or (cache is not None and cache is not self.cache):
            return None
        if self.valid is None:
            self.valid = torch.ones(1, tokens, dtype=torch.bool)
        if self.is_draft and cache is not None:
            _drafts[cache] = self.valid
        prompt = self.valid.shape[1]
        if tokens > prompt or not self.seen:
            before = tokens_before(inputs)
            if isinstance(before, int) and before == 0:
                return 0, tokens  # nothing is kept, if a cache was made or not: every step is given all tokens so far
        return AFTER_PROMPT if self.seen >= prompt else (self.seen, self.seen + tokens)

    def window(self, arguments: Mapping[str, Any]) -> tuple[int, int] | None:
        """Take the step that a forward is marked as.

        Returns:
            Where in the sequence the forward's tokens are: first column and last + 1. None after the prompt.

        Raises:
            ValueError: if the forward is given another number of tokens.
        """
        step: Step = arguments[STEP]
        if isinstance(step, str):
            return None
        start, end = step
        if given_tokens(arguments) != end - start:
            raise ValueError(
                f"generate prepared {end - start} tokens, but the model was given {given_tokens(arguments)}: ReFT "
                "cannot tell which of them are the prompt's."
            )
        self.seen = end
        return step

    def spans(self, window: tuple[int, int], batch: int, device: torch.device) -> Prompts:
        """Return the prompts in the columns of a window, with a row for each beam or returned sequence."""
        start, end = window
        valid = self.valid
        assert valid is not None, "step comes before spans"
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
    """

    begins_with: int | None = None
    chunk_size: int | None = None

    def begin(self, cache: Any) -> None:
        """Have the next step begin a prompt, with this cache."""
        self.cache, self.seen, self.valid = cache, int(cached_tokens(cache) or 0), None

    def step(self, inputs: Mapping[str, Any]) -> Step | None:
        if inputs.get("encoder_outputs") is None:
            return None  # a call aside has the encoder run again, `generate` hands on what it has put out
        given = {name: inputs.get(f"decoder_{name}") for name in ("input_ids", "inputs_embeds", "attention_mask")}
        if self.valid is None:
            self._begin_prompt(given)
        return super().step({**inputs, **given})

    def _begin_prompt(self, given: Mapping[str, Any]) -> None:
        """Take the prompt from the first step of it.

        Raises:
            ValueError: if the prompt comes in chunks.
        """
        if self.chunk_size is not None:
            raise ValueError(
                f"prefill_chunk_size={self.chunk_size}: ReFT cannot tell where the prompt of a decoder ends that is "
                "given in chunks. Generate without it."
            )
        tokens = given_tokens(given) or 0
        # Drafts may follow the prompt in the same forward.
        columns, self.begins_with = self.begins_with or self.seen + tokens, None
        valid = valid_tokens(given.get("attention_mask"), self.seen, tokens, is_causal=True)
        self.valid = torch.ones(1, columns, dtype=torch.bool) if valid is None else valid[:, :columns]


def mark_step(model: Any, prepare: Callable[..., Any], args: tuple, kwargs: dict[str, Any], is_own: bool) -> Any:
    """Run `prepare_inputs_for_generation` of an adapted model, and mark the inputs with the step that they are for.

    `generate` hands the inputs on to the next forward as they are. A forward without the mark is no step: a logits
    processor has made it, or code that calls the model by itself.

    Args:
        model (`PreTrainedModel`): the model.
        prepare: the method, which is given the model first.
        args, kwargs: the other arguments.
        is_own (`bool`): whether it is that of the model's class, not one that was put on the model.
    """
    kwargs.pop(STEP, None)
    inputs = prepare(model, *args, **kwargs)
    generation = current_generation()
    if generation is not None and generation.model is model and "_reft_role" in vars(model):
        step = generation.step(inputs)
        if step is not None:
            inputs[STEP] = step
    return inputs


def note_cache(model: Any, prepare: Callable[..., Any], args: tuple, kwargs: dict[str, Any], is_own: bool) -> Any:
    """Run `_prepare_cache_for_generation` of an adapted model, which begins a prompt, and note the cache.

    Args:
        model (`PreTrainedModel`): the model.
        prepare: the method, which is given the model first, and puts the cache among the model's arguments.
        args, kwargs: the other arguments.
        is_own (`bool`): whether it is that of the model's class, not one that was put on the model.
    """
    prepared = prepare(model, *args, **kwargs)
    generation = current_generation()
    arguments = kwargs.get("model_kwargs", args[1] if len(args) > 1 else None)
    if generation is not None and generation.model is model and isinstance(arguments, dict):
        generation.begin(find_cache(arguments))
    return prepared


def _valid_prompt(
    input_ids: torch.Tensor | None, kwargs: Mapping[str, Any], configs: list[Mapping[str, Any]]
) -> torch.Tensor | None:
    """Mark the input tokens [batch, tokens] of `generate` that are not padding, as it decides. None without tokens."""
    if kwargs.get("attention_mask") is not None:
        return kwargs["attention_mask"].bool()
    if input_ids is not None:  # beside embeddings, too
        pad = padding_id(configs)
        return input_ids != (-1 if pad is None else pad)
    embeddings = kwargs.get("inputs_embeds")
    return None if embeddings is None else torch.ones(embeddings.shape[:2], dtype=torch.bool)


def padding_id(configs: list[Mapping[str, Any]], others: tuple[str, ...] = ("eos_token_id",)) -> int | None:
    """Return the id of padding without a mask, as `generate` decides.

    Args:
        configs: where the ids of special tokens are looked for, in this order.
        others: names of those that a padding token must not be, or it may be a token of the text.

    Returns:
        `int`, or None if there is no such id.
    """
    pad = _option(configs, "pad_token_id")
    ids = [_option(configs, name) for name in others]
    return None if any(pad in (own if isinstance(own, list) else [own]) for own in ids) else pad


def _option(configs: list[Mapping[str, Any]], name: str) -> Any:
    """Return the first value that is set, in the order of `generate`."""
    return next((config[name] for config in configs if config.get(name) is not None), None)
