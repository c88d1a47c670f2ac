"""What one forward is: where its prompts begin and end, and which tokens each unit edits.

A `Plan` belongs to one call of the model. It lies in thread-local storage while the call lasts, where every adapted
module finds it (torch.compile traces `threading.local`, but not a `ContextVar`). A `Generation` lasts as long as a
call of `generate` and holds the prompt that the call was given.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from .positions import Positions, Rows, Spans, to_rows

IGNORED_LABEL = -100

# The arguments of a model's forward that tell where prompts are. transformers renamed `past_key_values` to `cache`.
TELLING = (
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "cu_seq_lens_q",
    "labels",
    "prompt_lengths",
    "past_key_values",
    "cache",
)

_local = threading.local()
_remembered = WeakIdKeyDictionary()  # tensor -> Plan without arguments, or None where calls share the tensor


class Family:
    """Stands for the modules that are one model: an object of its own in every copy of the model."""


@dataclass(frozen=True)
class Role:
    """What a module that is called is to its model.

    Attributes:
        family (`Family`): the model that it belongs to.
        kind (`str`): `"causal"` for a model that continues its prompt; `"whole"` for one whose whole input is the
            prompt (encoders, classifiers); `"decoder"` for the decoder of an encoder-decoder model.
        argument_names (`tuple[str, ...]`): names of the positional arguments of the forward, in order.
    """

    family: Family
    kind: str
    argument_names: tuple[str, ...]


def current_plan() -> "Plan | None":
    """The plan of the call that runs in this thread."""
    return getattr(_local, "plan", None)


def set_plan(plan: "Plan | None") -> None:
    """Make `plan` the one that adapted modules find; None ends the call."""
    _local.plan = plan


def current_generation() -> "Generation | None":
    """The call of `generate` that runs in this thread."""
    return getattr(_local, "generation", None)


def set_generation(generation: "Generation | None") -> None:
    """Make `generation` the one that runs; None ends it."""
    _local.generation = generation


def tensors_among(args: tuple, kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensors among the arguments of a module, and in tuples among them."""
    found = []
    for value in (*args, *kwargs.values()):
        found += [item for item in (value if isinstance(value, tuple) else (value,)) if isinstance(item, torch.Tensor)]
    return found


def remember(plan: "Plan | None", tensors: list[torch.Tensor]) -> None:
    """Keep a plan for as long as tensors live that were given to a module in its call."""
    for tensor in tensors:
        if plan is not None and _remembered.setdefault(tensor, plan.kept) is not plan.kept:
            _remembered[tensor] = None


def recall(tensors: list[torch.Tensor]) -> "Plan | None":
    """The plan of the call in which a module was given these very tensors; None unless it is certain.

    Activation checkpointing runs modules a second time in the backward pass, when their call is over and others may
    have followed, but with the same masks and position embeddings.
    """
    plans = [plan for plan in map(_remembered.get, tensors) if plan is not None]
    return plans[0] if plans and all(plan is plans[0] for plan in plans) else None


def check(condition: torch.Tensor, message: str) -> None:
    """Raise a ValueError unless a condition on values holds, without waiting for the device.

    Args:
        condition (`torch.BoolTensor` []): what must be true.
        message (`str`): what was given, what is allowed and what to do.
    """
    if condition.device.type == "cpu" and not torch.compiler.is_compiling():
        if not condition:
            raise ValueError(message)
    else:
        torch._assert_async(condition, message)


# Reading the arguments


def find_cache(arguments: Mapping[str, Any]) -> Any:
    """The key-value cache among the arguments of a forward or of `generate`, or None."""
    cache = arguments.get("cache")
    return arguments.get("past_key_values") if cache is None else cache


def given_tokens(arguments: Mapping[str, Any]) -> int | None:
    """How many tokens a forward is given, or None if its arguments hold no text."""
    inputs = arguments.get("input_ids")
    inputs = arguments.get("inputs_embeds") if inputs is None else inputs
    return None if inputs is None else inputs.shape[1]


def cached_tokens(cache: Any) -> int | torch.Tensor:
    """How many tokens a cache holds; a static cache says it in a tensor."""
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return cache.get_seq_length()
    return cache[0][0].shape[-2] if cache else 0


def valid_tokens(attention_mask: Any, past: int, tokens: int) -> torch.Tensor | None:
    """Which tokens are no padding, read off an attention mask.

    Args:
        attention_mask: a mask [batch, columns]; one that is prepared, [batch, heads, queries, columns] or [batch,
            queries, columns], boolean or additive; a dict of such masks, one for each kind of layer; or None.
        past (`int`): columns that a cache holds.
        tokens (`int`): columns of the forward.

    Returns:
        `torch.BoolTensor` [batch, past + tokens], or None if no mask tells.

    Raises:
        ValueError: if the mask does not fit.
    """
    if isinstance(attention_mask, Mapping):
        attention_mask = attention_mask.get("full_attention", next(iter(attention_mask.values()), None))
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, torch.Tensor):
        raise ValueError(
            f"attention_mask is a {type(attention_mask).__name__}, from which ReFT cannot tell padding: give a tensor "
            "[batch, tokens] with 1 for tokens and 0 for padding."
        )
    mask, columns = attention_mask, past + tokens
    if mask.dim() > 2:
        attended = mask if mask.dtype == torch.bool or not mask.is_floating_point() else mask > -1
        attended = attended.bool().flatten(1, -3).any(1) if mask.dim() == 4 else attended.bool()  # [batch, queries, k]
        # A token is no padding if it is attended to: by itself, or by all, where the mask is the same for all.
        queries = attended.shape[1]
        mask = attended[:, 0] if queries == 1 else attended[..., -queries:].diagonal(dim1=1, dim2=2)
    mask = mask.bool()
    if mask.shape[1] == tokens and past:
        mask = torch.cat([mask.new_ones(mask.shape[0], past), mask], dim=1)
    if mask.shape[1] < columns:
        raise ValueError(
            f"attention_mask has {attention_mask.shape[-1]} columns, but the model is given {tokens} tokens after "
            f"{past} in its cache: give one of {columns} columns."
        )
    return mask[:, :columns]


def valid_before(valid: torch.Tensor) -> torch.Tensor:
    """The column of the last token before each, padding left out; -1 for the first [batch, tokens]."""
    column = torch.arange(valid.shape[1], device=valid.device).expand_as(valid)
    last = column.masked_fill(~valid, -1).cummax(1).values
    return torch.cat([last.new_full((len(last), 1), -1), last[:, :-1]], dim=1)


def sequence_ids(arguments: Mapping[str, Any], valid: torch.Tensor) -> torch.Tensor | None:
    """Which of the sequences that are packed in a row a token belongs to.

    Args:
        arguments (`dict`): `cu_seq_lens_q`, the cumulative lengths over all rows, or `position_ids` [batch or 1,
            tokens] that do not rise where the next sequence starts.
        valid (`torch.BoolTensor` [batch, tokens]): False on padding.

    Returns:
        `torch.LongTensor` [batch, tokens], or None if a row is one sequence.
    """
    lengths, position_ids = arguments.get("cu_seq_lens_q"), arguments.get("position_ids")
    if lengths is not None:
        starts = torch.zeros(valid.numel() + 1, dtype=torch.bool, device=valid.device)
        starts = starts.index_fill(0, lengths.to(valid.device).long(), True)[:-1].view_as(valid)
    elif position_ids is not None and position_ids.dim() == 2 and position_ids.shape[1] == valid.shape[1] > 1:
        position_ids, before = position_ids.to(valid.device).expand_as(valid), valid_before(valid)
        starts = valid & (before >= 0) & (position_ids <= position_ids.gather(1, before.clamp(min=0)))
    else:
        return None
    return starts.long().cumsum(1)


# Finding the prompts


def per_sequence(values: torch.Tensor, sequences: torch.Tensor | None, reduce: str) -> torch.Tensor:
    """Reduce over the tokens of each sequence and give every token the result.

    Args:
        values (`torch.LongTensor` [batch, tokens]): what to reduce.
        sequences (`torch.LongTensor` [batch, tokens], *optional*): the ids of `sequence_ids`.
        reduce (`str`): "sum", "amin" or "amax".

    Returns:
        `torch.LongTensor` [batch, tokens], or [batch, 1] if a row is one sequence.
    """
    if sequences is None:
        return getattr(values, reduce)(1, keepdim=True)
    slots = values.new_zeros(values.shape[0], values.shape[1] + 1)  # ids are at most the number of tokens
    return slots.scatter_reduce(1, sequences, values, reduce, include_self=False).gather(1, sequences)


def ranks(valid: torch.Tensor, sequences: torch.Tensor | None) -> torch.Tensor:
    """The index of each token in its sequence [batch, tokens], padding not counted; of no meaning on padding."""
    count = valid.long().cumsum(1)
    return count - per_sequence(count.masked_fill(~valid, count.shape[1] + 1), sequences, "amin")


def whole_sequences(valid: torch.Tensor, sequences: torch.Tensor | None = None) -> Spans:
    """Every sequence is a prompt from its first token to its last."""
    length = per_sequence(valid.long(), sequences, "sum")
    return Spans(valid, ranks(valid, sequences), length, length, one_prompt=sequences is None)


def given_lengths(valid: torch.Tensor, sequences: torch.Tensor | None, lengths: torch.Tensor) -> Spans:
    """Each row's prompt has the length that the caller gave.

    Args:
        valid (`torch.BoolTensor` [batch, tokens]): False on padding.
        sequences (`torch.LongTensor` [batch, tokens], *optional*): the ids of `sequence_ids`.
        lengths (`torch.LongTensor` [batch]): tokens of each prompt, padding not counted.

    Raises:
        ValueError: if the lengths do not fit the rows, or a row holds several sequences.
    """
    batch = valid.shape[0]
    if not isinstance(lengths, torch.Tensor) or lengths.is_floating_point() or tuple(lengths.shape) != (batch,):
        given = f"{lengths.dtype} {list(lengths.shape)}" if isinstance(lengths, torch.Tensor) else repr(lengths)
        raise ValueError(
            f"prompt_lengths is {given}, but must be a LongTensor [{batch}]: for each row of the batch the number of "
            "its prompt's tokens, padding not counted."
        )
    lengths = lengths.to(valid.device).long().unsqueeze(1)
    tokens = valid.sum(1, keepdim=True)
    check(
        ((lengths >= 0) & (lengths <= tokens)).all(),
        f"prompt_lengths {_values(lengths)} must lie between 0 and the number of tokens in the row, padding not "
        f"counted: {_values(tokens)}.",
    )
    if sequences is not None:
        check(
            (sequences.masked_fill(~valid, 0).amax(1) <= sequences.masked_fill(~valid, valid.shape[1]).amin(1)).all(),
            "prompt_lengths gives one length a row, but rows hold several sequences: pass labels instead, with -100 "
            "on the prompts, or one sequence a row.",
        )
    return Spans(valid, ranks(valid, None), lengths, lengths, one_prompt=True)


def before_labels(
    valid: torch.Tensor, sequences: torch.Tensor | None, labels: torch.Tensor, positions: Positions, packed: bool
) -> Spans:
    """Each run of labels that are not -100 is an answer, and ends a prompt that began with its sequence.

    Args:
        valid (`torch.BoolTensor` [batch, tokens]): False on padding.
        sequences (`torch.LongTensor` [batch, tokens], *optional*): the ids of `sequence_ids`.
        labels (`torch.LongTensor` [batch, tokens]): next-token targets, -100 where there is none.
        positions (`Positions`): the choice of positions, which says whether a prompt must end somewhere.
        packed (`bool`): whether the first label of every sequence is -100, prompt or not, as packing needs it.

    Raises:
        ValueError: if a sequence has labels everywhere and the positions need the prompt's end.
    """
    columns = valid.shape[1]
    rank = ranks(valid, sequences)
    answer = (labels.to(valid.device) != IGNORED_LABEL) & valid
    if sequences is not None:
        # The mask of a sequence's first label tells nothing where it must be there, to keep packed sequences apart.
        first = sequences.masked_fill(~valid, columns).amin(1, keepdim=True)
        several = (sequences.amax(1, keepdim=True) > first) | packed
        answer = answer | ((rank == 0) & valid & several & answer.roll(-1, dims=1))
    before = valid_before(valid)
    after_answer = answer.gather(1, before.clamp(min=0)) & (before >= 0)
    ends = answer & (rank > 0) & ~after_answer

    length = per_sequence(valid.long(), sequences, "sum")
    answered = per_sequence(answer.long(), sequences, "amax").bool()
    ended = per_sequence(ends.long(), sequences, "amax").bool()
    if positions.need_end:
        check(
            (ended | ~answered | ~valid).all(),
            f"positions='{positions.text}' need a prompt to end before the answer, but a sequence has labels from its "
            "first token on. Give labels of -100 to the prompt (TRL: prompt-completion data with "
            "completion_only_loss, or conversations with assistant_only_loss), or choose positions that need no end: "
            "'f<n>' or 'all'.",
        )
    prefix_length = per_sequence(rank.masked_fill(~ends, columns), sequences, "amin").where(ended, length)

    column = torch.arange(columns, device=valid.device).expand_as(rank)
    next_end = column.masked_fill(~ends, columns).flip(1).cummin(1).values.flip(1)  # at the token or after it
    next_end = torch.cat([next_end[:, 1:], next_end.new_full((len(valid), 1), columns)], dim=1)
    follows = next_end < columns
    next_end = next_end.clamp(max=columns - 1)
    if sequences is not None:
        follows = follows & (sequences.gather(1, next_end) == sequences)
    suffix_length = rank.gather(1, next_end).where(follows, length.where(~answered, -1))
    return Spans(valid, rank, prefix_length, suffix_length, answer)


def _values(tensor: torch.Tensor) -> str:
    """The values for a message that a CPU raises; elsewhere looking at them would make the device wait."""
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return ""
    return str(tensor.flatten().tolist())


# The calls


@dataclass
class Generation:
    """One call of `generate`: the prompt that it was given, and how much of the sequence has been processed.

    Attributes:
        family (`Family`): the model that generates.
        valid (`torch.BoolTensor` [batch, tokens]): the whole prompt, False on padding.
        seen (`int`): tokens that have been processed; at first those that the cache holds.
    """

    family: Family
    valid: torch.Tensor
    seen: int = 0

    @classmethod
    def of(
        cls, model: Any, family: Family, args: tuple, kwargs: Mapping[str, Any], outer: "Generation | None"
    ) -> "Generation":
        """Read the arguments of a call of `model.generate`; `outer` is the call that it is made in, if any."""
        seen = int(cached_tokens(find_cache(kwargs)))
        if outer is not None and outer.family is family:
            return cls(family, outer.valid, seen)  # the model drafts for itself: the prompt is still the same
        if model.config.is_encoder_decoder:
            given = kwargs.get("decoder_input_ids")
            return cls(family, torch.ones(1, 1 if given is None else given.shape[1], dtype=torch.bool), seen)
        possible = (args[0] if args else None, kwargs.get("inputs"), kwargs.get("input_ids"))
        inputs = next((given for given in possible if given is not None), None)
        if kwargs.get("attention_mask") is not None:
            valid = kwargs["attention_mask"].bool()
        elif kwargs.get("inputs_embeds") is not None:
            valid = torch.ones(kwargs["inputs_embeds"].shape[:2], dtype=torch.bool)
        elif inputs is not None and inputs.dim() == 2 and inputs.shape[1]:
            valid = inputs != _padding_token(model, kwargs)
        else:
            valid = torch.ones(1, 1, dtype=torch.bool)  # generate begins with a token of its own
        return cls(family, valid, seen)

    def window(self, tokens: int, cached: bool) -> tuple[int, int] | None:
        """Where in the sequence the tokens of the next forward lie: first column and last + 1.

        None if the whole prompt has been processed before. Columns decide, not whether a cache is empty, so a prompt
        that comes in chunks, or partly from a cache, is edited at the same tokens as one that comes whole.
        """
        if cached and self.seen >= self.valid.shape[1]:
            return None  # and `seen` stays: a change at every token would have torch.compile trace anew
        whole = not cached and tokens > self.seen  # without a cache every step is given all tokens so far
        start = 0 if whole else self.seen
        self.seen = max(self.seen, start + tokens)
        return (start, start + tokens) if start < self.valid.shape[1] else None

    def spans(self, window: tuple[int, int], batch: int, device: torch.device) -> Spans:
        """The prompts, as the forward of a window sees them: a row for each beam or returned sequence."""
        start, end = window
        valid = self.valid
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
        return Spans(valid, rank, length, length, one_prompt=True)


def _padding_token(model: Any, kwargs: Mapping[str, Any]) -> int:
    """The id that `generate` takes for padding when it is given no attention mask; -1 if it takes none."""
    config = kwargs.get("generation_config") or model.generation_config
    pad = kwargs.get("pad_token_id", config.pad_token_id)
    eos = kwargs.get("eos_token_id", config.eos_token_id)
    return -1 if pad is None or pad in (eos if isinstance(eos, list) else [eos]) else pad


@dataclass
class Plan:
    """What one call of a model is.

    Attributes:
        role (`Role`): what the called module is.
        owner (`nn.Module`, *optional*): that module.
        training (`bool`): whether it is in training mode.
        arguments (`dict`): those of its arguments that are in `TELLING`.
        generation (`Generation`, *optional*): the call of `generate` that it is part of.
        outer (`Plan`, *optional*): the plan that was current when the call began.
    """

    role: Role
    owner: nn.Module | None
    training: bool
    arguments: Mapping[str, Any]
    generation: Generation | None = None
    outer: "Plan | None" = None
    _window: tuple[int, int] | None = None
    _past: int | torch.Tensor = 0
    _rows: dict[Any, dict[str, Rows] | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Before the call goes on: blocks add to the cache.
        if self.generation is None:
            past = cached_tokens(find_cache(self.arguments)) if self.role.kind != "whole" else 0
            self._past = past.clone() if isinstance(past, torch.Tensor) else past
        else:
            tokens = given_tokens(self.arguments)
            if tokens is None:
                raise ValueError(
                    f"In generate the model was given neither input_ids nor inputs_embeds: {list(self.arguments)}."
                )
            self._window = self.generation.window(tokens, find_cache(self.arguments) is not None)

    @cached_property
    def kept(self) -> "Plan":
        """The plan without what only its call needs; what was found in the call stays."""
        return replace(self, owner=None, arguments={}, generation=None, outer=None)

    def rows(
        self, positions: Positions, units: tuple[str, ...], batch: int, tokens: int, device: torch.device
    ) -> dict[str, Rows] | None:
        """The tokens that each unit edits, found once a call.

        Args:
            positions (`Positions`): the choice of positions.
            units (`tuple[str, ...]`): the names of the units.
            batch, tokens (`int`): shape of the hidden states.
            device (`torch.device`): device of the hidden states.

        Returns:
            `dict[str, Rows]`, or None if nothing is edited.

        Raises:
            ValueError: if the arguments do not tell where prompts end, or contradict themselves.
        """
        key = (positions, units, batch, tokens, device)
        if key not in self._rows:
            if self.owner is None:
                raise RuntimeError(
                    "A module was recomputed in the backward pass with adapters that its forward did not use."
                )
            spans = self._find_spans(positions, batch, tokens, device)
            if spans is None:
                everything = {"unit": Rows(None, None)} if positions.span == "all" else None
                self._rows[key] = everything
            else:
                masks = positions.select(spans, units)
                most = {unit: positions.most(unit) if spans.one_prompt else None for unit in masks}
                self._rows[key] = {unit: to_rows(mask, most[unit]) for unit, mask in masks.items()}
        return self._rows[key]

    def _find_spans(self, positions: Positions, batch: int, tokens: int, device: torch.device) -> Spans | None:
        """The prompts of the call; None where its tokens are in no prompt."""
        arguments = self.arguments
        given = given_tokens(arguments)
        if given is not None and given != tokens:
            raise ValueError(
                f"An adapted module put out {tokens} tokens where the model was given {given}, so these are no hidden "
                "states of the model's tokens: choose other target_modules, or None for the blocks."
            )
        if self.generation is not None:
            return None if self._window is None else self.generation.spans(self._window, batch, device)
        lengths = arguments.get("prompt_lengths")
        past = self._past
        if tokens == 1 and lengths is None and (isinstance(past, torch.Tensor) or past > 0):
            return None  # one token after others goes on with an answer
        past = int(past)
        valid = valid_tokens(arguments.get("attention_mask"), past, tokens)
        if valid is None:
            valid = torch.ones(batch, past + tokens, dtype=torch.bool, device=device)
        valid = valid.to(device).expand(batch, -1)
        sequences = sequence_ids(arguments, valid) if not past else None
        labels = arguments.get("labels")
        if self.role.kind != "causal" or past or labels is None or tuple(labels.shape) != (batch, tokens):
            labels = None  # of another kind: classes, spans, or the decoder's
        if lengths is not None:
            spans = given_lengths(valid, sequences, lengths)
        elif labels is not None:
            packed = arguments.get("cu_seq_lens_q") is not None
            spans = before_labels(valid, sequences, labels, positions, packed)
        else:
            if self.training and positions.need_end and self.role.kind != "whole":
                raise ValueError(self._no_end(positions))
            spans = whole_sequences(valid, sequences)
        return _after(spans, past)

    def _no_end(self, positions: Positions) -> str:
        message = f"In training, positions='{positions.text}' need to know where each prompt ends, and nothing tells. "
        if self.role.kind == "decoder":
            return message + "For the decoder of an encoder-decoder model choose 'f<n>' or 'all', or edit its encoder."
        return message + (
            "Pass `labels` to the model's forward, with -100 on the prompt, or `prompt_lengths`, a LongTensor [batch] "
            "with the number of tokens in each prompt, padding not counted: a data collator can add it to the batch. "
            "Without training (model.eval()) the whole input is taken for the prompt."
        )


def _after(spans: Spans, past: int) -> Spans:
    """The tokens that come after those in the cache."""
    if not past:
        return spans
    return Spans(
        spans.valid[:, past:], spans.rank[:, past:], spans.prefix_length, spans.suffix_length, one_prompt=True
    )
