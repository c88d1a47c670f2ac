"""Find prompts from masks, position ids, labels and lengths. No shape depends on their values."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from ..transforms import for_all_samples

IGNORED_LABEL = -100


class Choice(Protocol):
    """A choice of positions, for all rows or for each row."""

    @property
    def text(self) -> str:
        """What the user wrote."""

    @property
    def needs_end(self) -> bool:
        """Whether the end of a prompt must be known."""

    def needs(self, batch: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows that need the end of their prompt, and those that count from its start as well."""


@dataclass(frozen=True)
class Prompts:
    """Where the prompts of a batch are, token by token. A row may hold several sequences, a sequence several prompts.

    Attributes:
        valid (`torch.BoolTensor` [batch, tokens]): False on padding.
        rank (`torch.LongTensor` [batch, tokens]): index of a token in its sequence, padding not counted.
        prefix_length (`torch.LongTensor` [batch, tokens] or [batch, 1]): length of the first prompt of the token's
            sequence.
        suffix_length (`torch.LongTensor` [batch, tokens] or [batch, 1]): length of the prompt that ends next after the
            token; tokens whose rank is not below it belong to no prompt.
        answer (`torch.BoolTensor` [batch, tokens], *optional*): True on tokens that are an answer, though a later
            prompt of the same conversation holds them.
        one_prompt (`bool`): whether a row is known to hold at most one prompt, whatever its values.
        one_sequence (`bool`): whether a row is known to hold at most one sequence, perhaps with several prompts.
    """

    valid: torch.Tensor
    rank: torch.Tensor
    prefix_length: torch.Tensor
    suffix_length: torch.Tensor
    answer: torch.Tensor | None = None
    one_prompt: bool = False
    one_sequence: bool = False

    def after(self, past: int) -> "Prompts":
        """Return the prompts as seen from the tokens after the first `past` ones, which a cache holds."""

        def cut(tensor: torch.Tensor) -> torch.Tensor:
            return tensor if tensor.shape[1] == 1 else tensor[:, past:]

        if not past:
            return self
        return replace(
            self,
            valid=cut(self.valid),
            rank=cut(self.rank),
            prefix_length=cut(self.prefix_length),
            suffix_length=cut(self.suffix_length),
            answer=None if self.answer is None else cut(self.answer),
        )


def assert_without_sync(condition: torch.Tensor, message: str) -> None:
    """Raise a ValueError unless a condition on values holds, without waiting for the device.

    Args:
        condition (`torch.BoolTensor` []): what must be true.
        message (`str`): what was given, what is allowed and what to do.
    """
    if condition.device.type == "cpu" and not torch.compiler.is_compiling():
        if not for_all_samples(condition).all():
            raise ValueError(message)
    else:
        torch._assert_async(condition, message)


# Tokens and sequences


def valid_tokens(attention_mask: Any, past: int, tokens: int, is_causal: bool) -> torch.Tensor | None:
    """Mark the tokens that are not padding, from an attention mask.

    Args:
        attention_mask: a mask [batch, columns]; one that is prepared, [batch, heads, queries, columns] or [batch,
            queries, columns], boolean or additive; a dict of such masks, one for each kind of layer; or None.
        past (`int`): columns that a cache holds.
        tokens (`int`): columns of the forward.
        is_causal (`bool`): whether tokens attend to earlier ones alone.

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
        if attended.shape[1] == 1:
            mask = attended[:, 0]  # the same for all tokens
        else:
            attended = attended[..., :columns]
            mask = attended[..., -tokens:].diagonal(dim1=1, dim2=2)  # a token attends to itself, padding does not
            if is_causal:  # but where a prepared mask lets it attend to everything, lest it attend to nothing
                attends_to_all = attended.all(-1)
                mask = torch.cat([mask[:, :-1] & ~attends_to_all[:, :-1], mask[:, -1:]], dim=1)
    mask = mask.bool()
    if mask.shape[1] == tokens and past:
        mask = torch.cat([mask.new_ones(mask.shape[0], past), mask], dim=1)
    if mask.shape[1] < columns:
        raise ValueError(
            f"attention_mask has {attention_mask.shape[-1]} columns, but the model is given {tokens} tokens after "
            f"{past} in its cache: give one of {columns} columns."
        )
    return mask[:, :columns]


def without_padding(input_ids: torch.Tensor, pad_token_id: int) -> torch.Tensor:
    """Mark the tokens that are not padding, from their ids. Padding is at the ends of a row.

    Args:
        input_ids (`torch.LongTensor` [batch, tokens]): the ids.
        pad_token_id (`int`): the id of padding, which text may hold as well.

    Returns:
        `torch.BoolTensor` [batch, tokens].
    """
    is_text = (input_ids != pad_token_id).long()
    return (is_text.cumsum(1) > 0) & (is_text.flip(1).cumsum(1).flip(1) > 0)


def valid_before(valid: torch.Tensor) -> torch.Tensor:
    """Return the column [batch, tokens] of the previous token that is not padding, -1 for the first."""
    column = torch.arange(valid.shape[1], device=valid.device).expand_as(valid)
    last = column.masked_fill(~valid, -1).cummax(1).values
    return torch.cat([last.new_full((len(last), 1), -1), last[:, :-1]], dim=1)


def answer_starts(answer: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Mark the first token [batch, tokens] of each run of an answer. Padding is ignored."""
    before = valid_before(valid)
    return answer & ~(answer.gather(1, before.clamp(min=0)) & (before >= 0))


def sequence_ids(arguments: Mapping[str, Any], valid: torch.Tensor) -> torch.Tensor | None:
    """Return the sequence that each token of a packed row belongs to.

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
        starts = starts.index_fill(0, lengths.to(valid.device).long(), 1)[:-1].view_as(valid)
    elif position_ids is not None and position_ids.dim() == 2 and position_ids.shape[1] == valid.shape[1] > 1:
        position_ids, before = position_ids.to(valid.device).expand_as(valid), valid_before(valid)
        starts = valid & (before >= 0) & (position_ids <= position_ids.gather(1, before.clamp(min=0)))
    else:
        return None
    return starts.long().cumsum(1)


# Prompts


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
    """Return the index [batch, tokens] of each token in its sequence. Padding is not counted."""
    count = valid.long().cumsum(1)
    return count - per_sequence(count.masked_fill(~valid, count.shape[1] + 1), sequences, "amin")


def whole_sequences(valid: torch.Tensor, sequences: torch.Tensor | None = None) -> Prompts:
    """Return prompts that are complete sequences."""
    length = per_sequence(valid.long(), sequences, "sum")
    return Prompts(valid, ranks(valid, sequences), length, length, one_prompt=sequences is None)


def given_lengths(valid: torch.Tensor, sequences: torch.Tensor | None, lengths: torch.Tensor) -> Prompts:
    """Return prompts of the lengths that the caller gave.

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
    assert_without_sync(
        ((lengths >= 0) & (lengths <= tokens)).all(),
        f"prompt_lengths {_values(lengths)} must lie between 0 and the number of tokens in the row, padding not "
        f"counted: {_values(tokens)}.",
    )
    if sequences is not None:
        assert_without_sync(
            (sequences.masked_fill(~valid, 0).amax(1) <= sequences.masked_fill(~valid, valid.shape[1]).amin(1)).all(),
            "prompt_lengths gives one length a row, but rows hold several sequences: pass labels instead, with -100 "
            "on the prompts, or one sequence a row.",
        )
    return Prompts(valid, ranks(valid, None), lengths, lengths, one_prompt=True)


def before_labels(
    valid: torch.Tensor,
    sequences: torch.Tensor | None,
    labels: torch.Tensor,
    positions: Choice,
    packed: bool,
) -> Prompts:
    """Return the prompts before each run of labels that are not -100. A prompt begins with its sequence.

    Args:
        valid (`torch.BoolTensor` [batch, tokens]): False on padding.
        sequences (`torch.LongTensor` [batch, tokens], *optional*): the ids of `sequence_ids`.
        labels (`torch.LongTensor` [batch, tokens]): next-token targets, -100 where there is none.
        positions (`Positions` or `PerRowPositions`): the choice of positions, which says whether a prompt must end
            somewhere.
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
    ends = answer_starts(answer, valid) & (rank > 0)

    length = per_sequence(valid.long(), sequences, "sum")
    answered = per_sequence(answer.long(), sequences, "amax").bool()
    ended = per_sequence(ends.long(), sequences, "amax").bool()
    if positions.needs_end:
        begins = answer & (rank == 0)  # with an answer: a row cut out of a longer text, or text without a prompt
        needs_end, prefix = positions.needs(len(valid), valid.device)
        assert_without_sync(
            ~(needs_end & torch.where(prefix, begins, ~ended & answered & valid)).any(),
            f"positions='{positions.text}' need a prompt to end before the answer, but a sequence has labels from its "
            "first token on. Give labels of -100 to the prompt (TRL: prompt-completion data with "
            "completion_only_loss, or conversations with assistant_only_loss), cut no sequence before or in its "
            "answer (TRL: packing_strategy='bfd', truncation_mode='keep_start'), or choose positions that need no "
            "end: 'f<n>' or 'all'.",
        )
    prefix_length = per_sequence(rank.masked_fill(~ends, columns), sequences, "amin").where(ended, length)

    column = torch.arange(columns, device=valid.device).expand_as(rank)
    next_end = column.masked_fill(~ends, columns).flip(1).cummin(1).values.flip(1)  # at the token or after it
    follows = next_end < columns
    next_end = next_end.clamp(max=columns - 1)
    if sequences is not None:
        follows = follows & (sequences.gather(1, next_end) == sequences)
    suffix_length = rank.gather(1, next_end).where(follows, length.where(~answered, -1))
    return Prompts(valid, rank, prefix_length, suffix_length, answer, one_sequence=sequences is None)


def _values(tensor: torch.Tensor) -> str:
    """Return the values of a CPU tensor for a message. On other devices this would force a sync."""
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return ""
    return str(for_all_samples(tensor).flatten().tolist())
