"""A mixed batch: an adapter for each row, as PEFT's `adapter_names` asks for.

All rows are edited together: the weights of the adapters are stacked, and each row takes its own.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..edits.intervention import Intervention, Matrices, in_units_of_states, projections
from ..positions.language import Positions, PositionsOfRows
from .state import PerThread

if TYPE_CHECKING:
    from .generate import Family

BASE = "__base__"  # PEFT's name for no adapter

current = PerThread()  # the mixed batch that models find


class UnitsOfRows:
    """Units of several adapters, of any variant and rank, that edit each row by its own.

    Args:
        units (`Sequence[Intervention]`): the units, all of the same width.
        choices (`Sequence[int]`): for each row, or group of rows, the index of its unit.
    """

    training, dropout = False, nn.Dropout(0)  # a mixed batch is refused in training

    def __init__(self, units: Sequence[Intervention], choices: Sequence[int]):
        order, stacks = [], []
        rank = max(unit.r for unit in units)
        for members in _alike(units):
            order += members
            stacks.append(_stack([units[index] for index in members], rank))
        projection, weight, b = (torch.cat(p) if len(p) > 1 else p[0] for p in zip(*stacks, strict=True))
        device = b.device
        units = [units[index] for index in order]
        self.choices = torch.tensor([order.index(choice) for choice in choices], device=device)
        self.projection, self.b = projection, b.unsqueeze(1)  # [units, r, d], [units, 1, r]
        subtract = torch.tensor([unit.variant.subtract for unit in units], device=device).view(-1, 1, 1)
        self.activations = {
            name: torch.tensor([unit.activation == name for unit in units], device=device).view(-1, 1, 1)
            for name in {unit.activation for unit in units if unit.activation}
        }
        self.act_fns = {unit.activation: unit.act_fn for unit in units}
        self.act_fn = self._activate if self.activations else None
        self.subtracted = None
        if self.activations:
            activated = torch.stack(list(self.activations.values())).any(0)
            self.subtracted = projection * (subtract & activated)
            subtract = subtract & ~activated
        self.weight = weight - projection * subtract  # in one product, as in `Intervention`

    @staticmethod
    def stack(units: Sequence["UnitsOfRows"]) -> Matrices:
        """The matrices of all rows, or groups of rows, for the first of `units`, then for the next."""
        matrices = zip(*((unit.projection, unit.weight, unit.subtracted, unit.b) for unit in units), strict=True)
        choices = [unit.choices for unit in units]
        return tuple(  # type: ignore[return-value]
            None if parts[0] is None else torch.cat([part[own] for part, own in zip(parts, choices, strict=True)])
            for parts in matrices
        )

    def _activate(self, source: torch.Tensor) -> torch.Tensor:
        """Apply to each row [units * rows, n, r] its own activation."""
        for name, chosen in self.activations.items():
            rows = chosen[self.choices].repeat(len(source) // len(self.choices), 1, 1)
            source = torch.where(rows, self.act_fns[name](source), source)  # type: ignore[misc]
        return source


def _alike(units: Sequence[Intervention]) -> Iterable[list[int]]:
    """The indices of units that can be stacked as they are."""
    groups: dict[Any, list[int]] = {}
    for index, unit in enumerate(units):
        kind = unit.variant.orthonormal, unit.is_standardized, unit.R.shape, unit.R.dtype
        groups.setdefault(kind, []).append(index)
    return groups.values()


def _stack(units: Sequence[Intervention], rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Projections and weights [units, rank, d] and biases [units, rank], with zeros up to the rank."""
    rows = torch.stack([unit.R for unit in units])
    projection = projections(rows, units[0].variant.orthonormal)
    weight = torch.stack([torch.zeros_like(unit.R) if unit.W is None else unit.W for unit in units])
    b = torch.stack([unit.b for unit in units])
    weight, b, missing = weight.to(projection.dtype), b.to(projection.dtype), rank - rows.shape[1]
    if units[0].is_standardized:
        projection, weight = in_units_of_states(projection, weight, units)
    if missing:
        projection, weight = (nn.functional.pad(matrix, (0, 0, 0, missing)) for matrix in (projection, weight))
        b = nn.functional.pad(b, (0, missing))
    return projection, weight, b


@dataclass
class MixedBatch:
    """A batch with an adapter for each row.

    Attributes:
        family (`Family`): the model that the batch is for.
        names (`tuple[str, ...]`): the adapter of each row, `"__base__"` for none. In `generate`, where a prompt may
            become several rows (beams, returned sequences), one for each prompt.
    """

    family: "Family"
    names: tuple[str, ...]
    _edits: dict[nn.Module, tuple[PositionsOfRows, dict[str, UnitsOfRows]]] = field(default_factory=dict)

    def repeats(self, batch: int, expanded: bool) -> int:
        """How many rows of a batch belong to each name.

        Args:
            batch (`int`): rows of the batch.
            expanded (`bool`): whether a name may have several.

        Raises:
            ValueError: if the rows do not fit the names.
        """
        if batch % len(self.names) or (batch != len(self.names) and not expanded):
            raise ValueError(
                f"adapter_names names {len(self.names)} adapters, but the model is given {batch} rows: give one name "
                f"for each row, {BASE!r} for the base model."
            )
        return batch // len(self.names)

    def edits(
        self, layer: nn.Module, positions: Mapping[str, Positions], units_of: Callable[[str], dict[str, Intervention]]
    ) -> tuple[PositionsOfRows, dict[str, UnitsOfRows]]:
        """What the batch's adapters edit in a layer, made once for as long as the batch lasts.

        Args:
            layer (`nn.Module`): the layer.
            positions (`Mapping[str, Positions]`): the positions of each adapter that it has.
            units_of (`Callable`): gives the units of an adapter.
        """
        if layer not in self._edits:
            adapters = [name for name in dict.fromkeys(self.names) if name in positions]
            units = {name: units_of(name) for name in adapters}
            choices = [adapters.index(name) if name in adapters else 0 for name in self.names]
            slots = ("prefix", "suffix") if any(len(units[name]) == 2 for name in adapters) else ("unit",)
            stacked = {
                slot: UnitsOfRows([units[name].get(slot) or units[name]["unit"] for name in adapters], choices)
                for slot in slots
            }
            self._edits[layer] = PositionsOfRows(tuple(map(positions.get, self.names))), stacked
        return self._edits[layer]


def current_mixed_batch() -> MixedBatch | None:
    """The mixed batch that this thread has been given, or None."""
    return current.value
