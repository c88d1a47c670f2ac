"""Which tokens each unit edits in a call of a model, found once.

A `Plan` belongs to one call, for as long as that lasts, and every adapted module of the thread finds it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from .call import Call
from .mixed_batch import MixedBatch
from .per_thread import PerThread
from .positions import AnyPositions, Rows, to_rows

_current = PerThread()
_remembered = WeakIdKeyDictionary()  # tensor -> Plan of a call that has ended, or None where calls share the tensor


@dataclass
class Plan:
    """Which tokens are edited in a call.

    Attributes:
        call (`Call`): the call.
        outer (`Plan`, *optional*): the plan that was current when the call began.
        mixed_batch (`MixedBatch`, *optional*): the adapters of its rows, where they differ.
    """

    call: Call
    outer: "Plan | None" = None
    mixed_batch: MixedBatch | None = None
    _rows: dict[Any, list[tuple[int, int, list[Rows]]]] = field(default_factory=dict)

    @cached_property
    def kept(self) -> "Plan":
        """The plan without what only its call needs; what was found in the call stays."""
        return replace(self, call=self.call.ended(), outer=None)

    def rows(
        self, positions: AnyPositions, units: tuple[str, ...], batch: int, tokens: int, device: torch.device
    ) -> list[Rows]:
        """The tokens that each unit edits, found once a call.

        Args:
            positions (`Positions` or `PositionsOfRows`): the choice of positions.
            units (`tuple[str, ...]`): the names of the units.
            batch, tokens (`int`): shape of the hidden states.
            device (`torch.device`): device of the hidden states.

        Returns:
            `list[Rows]`: what is edited, one after the other, each with the columns of some of the units.

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

    def _find_rows(
        self, positions: AnyPositions, units: tuple[str, ...], batch: int, tokens: int, device: torch.device
    ) -> list[Rows]:
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
        return to_rows(masks, {unit: positions.most(unit, spans) for unit in masks})


def current_plan() -> "Plan | None":
    """The plan of the call that runs in this thread."""
    return _current.value


def set_plan(plan: "Plan | None") -> None:
    """Make `plan` the one that adapted modules find; None ends the call."""
    _current.value = plan


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
