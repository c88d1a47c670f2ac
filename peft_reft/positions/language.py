"""The position language of ReFT: which tokens of a prompt are edited.

`"f7+l7"` names the first seven and the last seven tokens of the prompt, as in the paper (arXiv 2404.03592, section
4.1) and in pyreft; `"prompt"` is every prompt token, `"all"` every token, generated ones included.
"""

import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

EVERY = torch.iinfo(torch.int64).max
SYNTAX = re.compile(r"(?:f(?P<prefix>[1-9]\d*))?(?P<plus>\+)?(?:l(?P<suffix>[1-9]\d*))?(?P<middle>-middle)?")


@dataclass(frozen=True)
class Spans:
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


class Rows(NamedTuple):
    """The tokens that units edit, in a form whose shape does not depend on the data.

    Attributes:
        units (`tuple[str, ...]`): the names of the units.
        indices (tuple of `torch.LongTensor` [1, batch, 1] and [units, batch, n], *optional*): rows, and for each unit
            n columns that hold every token that it edits, all of them distinct; None if the one unit is given all.
        mask (`torch.BoolTensor` [units, batch, n], *optional*): which of these tokens are edited; None for all.
    """

    units: tuple[str, ...]
    indices: tuple[torch.Tensor, torch.Tensor] | None
    mask: torch.Tensor | None


@dataclass(frozen=True)
class Positions:
    """A parsed choice of positions: `prefix` first tokens and `suffix` last tokens, or one of the two whole spans.

    Of a prompt with an odd number of tokens, too short for both ends, the suffix gets the token in the middle, or
    without `middle` neither end.
    """

    text: str
    prefix: int = 0
    suffix: int = 0
    span: str | None = None
    middle: bool = True

    @classmethod
    def parse(cls, text: str) -> "Positions":
        """Read `"f<n>"`, `"l<n>"`, `"f<n>+l<m>"`, `"f<n>+l<m>-middle"`, `"prompt"` or `"all"`.

        Raises:
            ValueError: if `text` is none of these.
        """
        if text in ("prompt", "all"):
            return cls(text, span=text)
        match = SYNTAX.fullmatch(text) if isinstance(text, str) else None
        prefix, suffix = (int(match["prefix"] or 0), int(match["suffix"] or 0)) if match else (0, 0)
        has_both = bool(prefix and suffix)
        is_whole = match is not None and bool(match["plus"]) == has_both and (has_both or not match["middle"])
        if match is None or not is_whole or not (prefix or suffix):
            raise ValueError(
                f"positions={text!r} cannot be read. Write 'f<n>' for the first n tokens of the prompt, 'l<n>' for "
                "the last n, 'f<n>+l<m>' for both (in this order, n and m at least 1), 'prompt' for every prompt "
                "token or 'all' for every token: for example positions='f7+l7'."
            )
        return cls(text, prefix, suffix, middle=not match["middle"])

    @property
    def need_end(self) -> bool:
        """Whether the prompt's end must be known to find them."""
        return bool(self.suffix) or self.span == "prompt"

    def needs(self, batch: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows whose positions need the prompt's end, and rows whose positions count from its start as well.

        Returns:
            Two `torch.BoolTensor` [batch or 1, 1].
        """
        need_end, prefix = (torch.full((1, 1), flag, device=device) for flag in (self.need_end, bool(self.prefix)))
        return need_end, prefix

    def units(self, share_weights: bool) -> tuple[str, ...]:
        """The names of the units that edit these positions: one each for prefix and suffix, or one for all."""
        return ("prefix", "suffix") if self.prefix and self.suffix and not share_weights else ("unit",)

    def most(self, unit: str, spans: Spans) -> int | None:
        """The most tokens of a row that a unit edits; None if only values bound them."""
        if self.span:
            return 0 if unit == "prefix" else None
        suffix = 0 if unit == "prefix" else self.suffix
        if spans.one_prompt or (spans.one_sequence and not suffix):  # whose prompts share the first tokens
            return suffix + (0 if unit == "suffix" else self.prefix)
        return None

    def select(self, spans: Spans, units: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """Mark the tokens to edit.

        Returns:
            `dict[str, torch.BoolTensor [batch, tokens]]`: a mask for each of `units`.
        """
        return {"unit": spans.valid} if self.span == "all" else mark(spans, *self.counts, units)

    @property
    def counts(self) -> tuple[int, int, bool]:
        """How many first and last tokens of the prompt are edited, at most, and whether one in the middle is."""
        return (0, EVERY, True) if self.span == "prompt" else (self.prefix, self.suffix, self.middle)

    def outside_prompts(self, units: tuple[str, ...], batch: int, tokens: int, device: torch.device) -> list[Rows]:
        """What is edited where no token is in a prompt."""
        return [Rows(("unit",), None, None)] if self.span == "all" else []


@dataclass(frozen=True)
class PositionsOfRows:
    """A choice of positions for each row of a batch, with the methods of `Positions`.

    Attributes:
        choices (`tuple[Positions | None, ...]`): one for each row, or for each group of rows that a prompt was
            expanded to; None for rows that are not edited.
    """

    choices: tuple[Positions | None, ...]
    _tensors: dict[Any, torch.Tensor] = field(default_factory=dict, init=False, compare=False, repr=False)

    @property
    def text(self) -> str:
        return ", ".join(dict.fromkeys(choice.text for choice in self.choices if choice))

    @property
    def prefix(self) -> int:
        return max([0, *(choice.prefix for choice in self.choices if choice)])

    @property
    def suffix(self) -> int:
        return max([0, *(choice.suffix for choice in self.choices if choice)])

    @property
    def need_end(self) -> bool:
        return any(choice.need_end for choice in self.choices if choice)

    def needs(self, batch: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        flags = [(choice is not None and choice.need_end, bool(choice and choice.prefix)) for choice in self.choices]
        need_end, prefix = self._by_row("needs", flags, batch, device).unbind(-1)
        return need_end, prefix

    def most(self, unit: str, spans: Spans) -> int | None:
        bounds = [choice.most(unit, spans) for choice in self.choices if choice]
        return None if None in bounds else max([0, *(bound for bound in bounds if bound is not None)])

    def select(self, spans: Spans, units: tuple[str, ...]) -> dict[str, torch.Tensor]:
        batch, device = len(spans.valid), spans.valid.device
        none = (0, 0, True)
        counts = [none if choice is None or choice.span == "all" else choice.counts for choice in self.choices]
        prefix, suffix, middle = self._by_row("counts", counts, batch, device).unbind(-1)
        masks, everywhere = mark(spans, prefix, suffix, middle, units), self._everywhere(batch, device)
        return masks if everywhere is None else masks | {units[-1]: masks[units[-1]] | (spans.valid & everywhere)}

    def outside_prompts(self, units: tuple[str, ...], batch: int, tokens: int, device: torch.device) -> list[Rows]:
        everywhere = self._everywhere(batch, device)
        return [] if everywhere is None else [Rows(units[-1:], None, everywhere.expand(1, -1, tokens))]

    def _everywhere(self, batch: int, device: torch.device) -> torch.Tensor | None:
        """The rows whose every token is edited [batch, 1]; None if there is no such row."""
        chosen = [choice is not None and choice.span == "all" for choice in self.choices]
        return self._by_row("everywhere", chosen, batch, device) if any(chosen) else None

    def _by_row(self, name: str, values: list, batch: int, device: torch.device) -> torch.Tensor:
        """A value of each choice, as a tensor [batch, 1, ...] that is made once: decoding asks at every step."""
        key = (name, batch, device)
        if key not in self._tensors:
            tensor = torch.tensor(values, device=device)
            self._tensors[key] = tensor.repeat_interleave(batch // len(values), dim=0).unsqueeze(1)
        return self._tensors[key]


AnyPositions = Positions | PositionsOfRows


def mark(
    spans: Spans,
    prefix: int | torch.Tensor,
    suffix: int | torch.Tensor,
    middle: bool | torch.Tensor,
    units: tuple[str, ...],
) -> dict[str, torch.Tensor]:
    """Mark the first and the last tokens of prompts.

    A prefix and a suffix that would overlap are cut to half the prompt each, so that no token is edited twice. An odd
    token is the suffix's, so that a prompt of one token is edited.

    Args:
        spans (`Spans`): where prompts are.
        prefix, suffix (`int` or `torch.LongTensor` [batch, 1]): how many tokens.
        middle (`bool` or `torch.LongTensor` [batch, 1]): whether the suffix gets an odd token. If not, neither end
            does, as in pyreft's `get_intervention_locations`.
        units (`tuple[str, ...]`): the names of the units.

    Returns:
        `dict[str, torch.BoolTensor [batch, tokens]]`: a mask for each of `units`.
    """
    given = spans.valid if spans.answer is None else spans.valid & ~spans.answer
    both = (prefix > 0) * (suffix > 0)
    prefix_end = (spans.prefix_length // (1 + both)).clamp(max=prefix)
    suffix_start = spans.suffix_length - ((spans.suffix_length + both * middle) // (1 + both)).clamp(max=suffix)
    first = spans.valid & (spans.rank < prefix_end)
    last = given & (spans.rank >= suffix_start) & (spans.rank < spans.suffix_length)
    return {"prefix": first, "suffix": last} if len(units) == 2 else {"unit": first | last}


def to_rows(masks: dict[str, torch.Tensor], most: dict[str, int | None]) -> list[Rows]:
    """Turn masks into the rows to gather.

    Args:
        masks (`dict[str, torch.BoolTensor [batch, tokens]]`): the tokens that each unit edits, none twice.
        most (`dict[str, int | None]`): bounds on the number of them in a row, known without looking at values.
    """
    tokens = next(iter(masks.values())).shape[1]
    bounds = {unit: bound for unit, bound in most.items() if bound}
    n, bounded = max([0, *bounds.values()]), tuple(bounds)
    if n * len(bounded) >= tokens:
        bounded = ()
    whole = [unit for unit in masks if most[unit] != 0 and unit not in bounded]
    rows = []
    if bounded:
        # Each unit's tokens first, then those of no unit: columns stay distinct, so the put-back writes none twice.
        free, columns = ~torch.stack([masks[unit] for unit in bounded]).any(0), []
        for unit in bounded:
            rank = 2 * masks[unit].to(torch.uint8) + free
            columns.append(torch.argsort(rank, dim=1, descending=True, stable=True)[:, :n])
            free = free.scatter(1, columns[-1], 0)  # torch.jit.trace takes no False here
        mask = torch.stack([masks[unit].gather(1, own) for unit, own in zip(bounded, columns, strict=True)])
        batch = torch.arange(mask.shape[1], device=mask.device).view(1, -1, 1)
        rows.append(Rows(bounded, (batch, torch.stack(columns)), mask))
    # The prefix before the suffix in any case: processes whose batches tell prompts otherwise gather units in step.
    return rows + [Rows((unit,), None, masks[unit].unsqueeze(0)) for unit in whole]
