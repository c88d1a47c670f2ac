"""Which tokens each unit edits in a call of a model, found once.

A `Plan` belongs to one call, for as long as that lasts, and every adapted module of the thread finds it.
"""

import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from ..edits.apply import Unit
from ..layer import ReftLayer
from ..positions.language import AnyPositions, Positions
from ..positions.select import Selection, to_rows
from .adapter_names import MixedBatch
from .call import Call
from .state import ModelToken, PerThread

EVERYWHERE = Positions.parse("all")

current = PerThread()  # the plan of the call that runs; None between calls
_looked_at: "weakref.WeakSet[ModelToken]" = weakref.WeakSet()  # models with no more to warn of


@dataclass
class Plan:
    """Which tokens are edited in a call.

    Attributes:
        call (`Call`): the call.
        outer (`Plan`, *optional*): the plan that was current when the call began.
        mixed_batch (`MixedBatch`, *optional*): the adapters of its rows, where they differ.
        is_in_own_forward (`bool`): whether the call has come to the forward of the model's class, which another that
            was put on the model may call.
        checkpointed (`nn.Module`, *optional*): the module whose forward has just been checkpointed with its edits.
    """

    call: Call
    outer: "Plan | None" = None
    mixed_batch: MixedBatch | None = None
    is_in_own_forward: bool = True
    checkpointed: torch.nn.Module | None = None
    _rows: dict[Any, list[tuple[int, int, list[Selection]]]] = field(default_factory=dict)

    @cached_property
    def for_recompute(self) -> "Plan":
        """The plan without what only its call needs; what was found in the call stays."""
        return replace(self, call=self.call.ended(), outer=None, checkpointed=None)

    def edits(self, layer: ReftLayer) -> Iterator[tuple[AnyPositions, Mapping[str, Unit]]]:
        """Yield the choices of positions that are edited in a layer, each with its units by name."""
        if self.mixed_batch is None:
            yield from ((layer.positions[name], layer.units(name)) for name in layer.adapters_in_use)
        else:
            yield self.mixed_batch.edits(layer)

    def rows(
        self, positions: AnyPositions, units: tuple[str, ...], batch: int, tokens: int, device: torch.device
    ) -> list[Selection]:
        """Return the tokens that each unit edits. They are found once a call.

        Args:
            positions (`Positions` or `PerRowPositions`): the choice of positions.
            units (`tuple[str, ...]`): the names of the units.
            batch, tokens (`int`): shape of the hidden states.
            device (`torch.device`): device of the hidden states.

        Returns:
            `list[Selection]`: what is edited, one after the other, each with the columns of some of the units.

        Raises:
            ValueError: if the arguments do not tell where prompts end, or contradict themselves.
        """
        # Sizes are compared, not hashed, which would have torch.compile trace anew for every length.
        found = self._rows.setdefault((positions, units, device), [])
        for known_batch, known_tokens, rows in found:
            if known_batch == batch and known_tokens == tokens:
                return rows
        rows = self._find_rows(positions, units, batch, tokens, device)
        found.append((batch, tokens, rows))
        return rows

    def counted(self, batch: int, tokens: int, device: torch.device) -> torch.Tensor:
        """Mark the tokens [batch, tokens] that tell the size of hidden states.

        Padding does not, nor does the first token of a sequence, whose hidden states may be a hundred times larger.
        """
        spans = self.call.prompts(EVERYWHERE, batch, tokens, device)
        if spans is None:
            return torch.ones(batch, tokens, dtype=torch.bool, device=device)
        later = spans.valid & (spans.rank > 0)
        return torch.where(later.any(), later, spans.valid)

    def _find_rows(
        self, positions: AnyPositions, units: tuple[str, ...], batch: int, tokens: int, device: torch.device
    ) -> list[Selection]:
        if self.call.owner is None:
            raise RuntimeError(
                "A module was recomputed in the backward pass with adapters that its forward did not use. Adapters "
                "were switched, enabled or disabled in between, and gradient checkpointing runs the module again. "
                "Call backward() before you switch adapters, switch back before you call it, or turn gradient "
                "checkpointing off (model.gradient_checkpointing_disable())."
            )
        if self.mixed_batch is not None:
            self.call.check_mixed(self.mixed_batch, batch)
        spans = self.call.prompts(positions, batch, tokens, device)
        if spans is None:
            return positions.outside_prompts(units, batch, tokens, device)
        masks = positions.select(spans, units)
        if self.call.training:
            warn_if_empty(masks.values(), positions, self.call.role.family)
        return to_rows(masks, {unit: positions.max_tokens(unit, spans) for unit in masks})


def warn_if_empty(masks: Iterable[torch.Tensor], positions: AnyPositions, family: ModelToken) -> None:
    """Warn, once for each model, of a training batch no token of which is edited: it trains nothing.

    Elsewhere than on a CPU to look at values would make the device wait, so there the first batch alone is looked at.
    """
    masks = list(masks)
    device = masks[0].device.type
    if torch.compiler.is_compiling() or device == "meta" or family in _looked_at:
        return
    is_empty = not any(mask.any() for mask in masks)
    if is_empty or device != "cpu":
        _looked_at.add(family)
    if is_empty:
        warnings.warn(
            f"No token of a training batch is edited: positions='{positions.text}' name tokens of prompts, and its "
            "prompts are empty (prompt_lengths of 0, or nothing but padding). Such a batch trains nothing. Once for "
            "each model.",
            stacklevel=2,
        )


def is_edited(layer: ReftLayer, plan: Plan | None) -> bool:
    """Return whether a call has adapters to run in a layer. A call whose plan is not known has the active ones."""
    if plan is not None and plan.call.is_answering and not layer.edits_answers:
        return False
    if plan is None or plan.mixed_batch is None:
        return bool(layer.adapters_in_use)
    return not layer.disable_adapters and any(name in layer.positions for name in plan.mixed_batch.names)


def current_plan() -> "Plan | None":
    """Return the plan of the call that runs in this thread."""
    return current.value
