"""The tokens to edit, in a form whose shape does not depend on the data."""

from typing import NamedTuple

import torch

from .prompts import Prompts


class Selection(NamedTuple):
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


def mark(
    spans: Prompts,
    prefix: int | torch.Tensor,
    suffix: int | torch.Tensor,
    middle: bool | torch.Tensor,
    units: tuple[str, ...],
) -> dict[str, torch.Tensor]:
    """Mark the first and the last tokens of prompts.

    A prefix and a suffix that would overlap are cut to half the prompt each, so that no token is edited twice. An odd
    token is the suffix's, so that a prompt of one token is edited.

    Args:
        spans (`Prompts`): where prompts are.
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


def to_rows(masks: dict[str, torch.Tensor], max_tokens: dict[str, int | None]) -> list[Selection]:
    """Turn masks into the rows to gather.

    Args:
        masks (`dict[str, torch.BoolTensor [batch, tokens]]`): the tokens that each unit edits, none twice.
        max_tokens (`dict[str, int | None]`): bounds on the number of them in a row, known without looking at values.
    """
    tokens = next(iter(masks.values())).shape[1]
    bounds = {unit: bound for unit, bound in max_tokens.items() if bound}
    n, bounded = max([0, *bounds.values()]), tuple(bounds)
    if n * len(bounded) >= tokens:
        bounded = ()
    whole = [unit for unit in masks if max_tokens[unit] != 0 and unit not in bounded]
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
        rows.append(Selection(bounded, (batch, torch.stack(columns)), mask))
    # The prefix before the suffix in any case: processes whose batches tell prompts otherwise gather units in step.
    return rows + [Selection((unit,), None, masks[unit].unsqueeze(0)) for unit in whole]
