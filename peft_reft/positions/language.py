"""The position language of ReFT: which tokens of a prompt are edited.

`"f7+l7"` names the first seven and the last seven tokens of the prompt, as in the paper (arXiv 2404.03592, section
4.1) and in pyreft; `"prompt"` is every prompt token, `"all"` every token, generated ones included.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import torch

from .prompts import Prompts
from .select import Selection, mark

EVERY = torch.iinfo(torch.int64).max
SYNTAX = re.compile(r"(?:f(?P<prefix>[1-9]\d*))?(?P<plus>\+)?(?:l(?P<suffix>[1-9]\d*))?(?P<middle>-middle)?")


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
    def needs_end(self) -> bool:
        """Whether the prompt's end must be known to find them."""
        return bool(self.suffix) or self.span == "prompt"

    def needs(self, batch: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows that need the end of their prompt, and those that count from its start as well.

        Returns:
            Two `torch.BoolTensor` [batch or 1, 1].
        """
        needs_end, prefix = (torch.full((1, 1), flag, device=device) for flag in (self.needs_end, bool(self.prefix)))
        return needs_end, prefix

    def units(self, share_weights: bool) -> tuple[str, ...]:
        """Return the names of the units that edit these positions: one each for prefix and suffix, or one for all."""
        return ("prefix", "suffix") if self.prefix and self.suffix and not share_weights else ("unit",)

    def max_tokens(self, unit: str, spans: Prompts) -> int | None:
        """Return the largest number of a row's tokens that a unit edits. None if only values bound it."""
        if self.span:
            return 0 if unit == "prefix" else None
        suffix = 0 if unit == "prefix" else self.suffix
        if spans.one_prompt or (spans.one_sequence and not suffix):  # whose prompts share the first tokens
            return suffix + (0 if unit == "suffix" else self.prefix)
        return None

    def select(self, spans: Prompts, units: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """Mark the tokens to edit.

        Returns:
            `dict[str, torch.BoolTensor [batch, tokens]]`: a mask for each of `units`.
        """
        return {"unit": spans.valid} if self.span == "all" else mark(spans, *self.counts, units)

    @property
    def counts(self) -> tuple[int, int, bool]:
        """How many first and last tokens of the prompt are edited, at most, and whether one in the middle is."""
        return (0, EVERY, True) if self.span == "prompt" else (self.prefix, self.suffix, self.middle)

    def outside_prompts(
        self, units: tuple[str, ...], batch: int, tokens: int, device: torch.device
    ) -> list[Selection]:
        """Return the selection where no token is in a prompt."""
        return [Selection(("unit",), None, None)] if self.span == "all" else []


@dataclass(frozen=True)
class PerRowPositions:
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
    def needs_end(self) -> bool:
        return any(choice.needs_end for choice in self.choices if choice)

    def needs(self, batch: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        flags = [(choice is not None and choice.needs_end, bool(choice and choice.prefix)) for choice in self.choices]
        needs_end, prefix = self._by_row("needs", flags, batch, device).unbind(-1)
        return needs_end, prefix

    def max_tokens(self, unit: str, spans: Prompts) -> int | None:
        bounds = [choice.max_tokens(unit, spans) for choice in self.choices if choice]
        return None if None in bounds else max([0, *(bound for bound in bounds if bound is not None)])

    def select(self, spans: Prompts, units: tuple[str, ...]) -> dict[str, torch.Tensor]:
        batch, device = len(spans.valid), spans.valid.device
        none = (0, 0, True)
        counts = [none if choice is None or choice.span == "all" else choice.counts for choice in self.choices]
        prefix, suffix, middle = self._by_row("counts", counts, batch, device).unbind(-1)
        masks, everywhere = mark(spans, prefix, suffix, middle, units), self._everywhere(batch, device)
        return masks if everywhere is None else masks | {units[-1]: masks[units[-1]] | (spans.valid & everywhere)}

    def outside_prompts(
        self, units: tuple[str, ...], batch: int, tokens: int, device: torch.device
    ) -> list[Selection]:
        everywhere = self._everywhere(batch, device)
        return [] if everywhere is None else [Selection(units[-1:], None, everywhere.expand(1, -1, tokens))]

    def _everywhere(self, batch: int, device: torch.device) -> torch.Tensor | None:
        """Return the rows whose every token is edited [batch, 1], or None if there is no such row."""
        chosen = [choice is not None and choice.span == "all" for choice in self.choices]
        return self._by_row("everywhere", chosen, batch, device) if any(chosen) else None

    def _by_row(self, name: str, values: list, batch: int, device: torch.device) -> torch.Tensor:
        """Return a value of each choice as a tensor [batch, 1, ...]. Decoding needs it at every step."""
        key = (name, batch, device)
        if key not in self._tensors:
            tensor = torch.tensor(values, device=device)
            self._tensors[key] = tensor.repeat_interleave(batch // len(values), dim=0).unsqueeze(1)
        return self._tensors[key]


AnyPositions = Positions | PerRowPositions
