"""Units of several adapters that edit the rows of one batch, each row by its own."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from .intervention import Intervention
from .variants import Matrices


class PerRowUnits:
    """Units of several adapters, of any variant and rank, that edit each row by its own.

    Args:
        units (`Sequence[Intervention]`): the units, all of the same width.
        choices (`Sequence[int]`): for each row, or group of rows, the index of its unit.
    """

    training, dropout = False, nn.Dropout(0)  # a mixed batch raises an error in training

    def __init__(self, units: Sequence[Intervention], choices: Sequence[int]):
        order: list[int] = []
        stacks: list[Matrices] = []
        rank = max(unit.r for unit in units)
        is_activated = any(unit.act_fn is not None for unit in units)
        for members in _alike(units):
            order += members
            stacks.append(_padded(Intervention.stack([units[index] for index in members]), rank, is_activated))
        dtype = max((stack.b.dtype for stack in stacks), key=lambda dtype: dtype.itemsize)
        parts = zip(*(stack.to(dtype) for stack in stacks), strict=True)
        self.matrices = Matrices(*(None if part[0] is None else torch.cat(part) for part in parts))  # type: ignore
        device = self.matrices.b.device
        units = [units[index] for index in order]
        self.choices = torch.tensor([order.index(choice) for choice in choices], device=device)
        self.activations = {
            act_fn: torch.tensor([unit.act_fn is act_fn for unit in units], device=device).view(-1, 1, 1)
            for act_fn in {unit.act_fn for unit in units if unit.act_fn is not None}
        }
        self.act_fn: Callable[[torch.Tensor], torch.Tensor] | None = self._activate if self.activations else None

    @staticmethod
    def stack(units: Sequence["PerRowUnits"]) -> Matrices:
        """Return the matrices of all rows, or groups of rows, for the first of `units`, then for the next."""
        choices = [unit.choices for unit in units]
        return Matrices(
            *(
                None if parts[0] is None else torch.cat([part[own] for part, own in zip(parts, choices, strict=True)])
                for parts in zip(*(unit.matrices for unit in units), strict=True)
            )  # type: ignore[arg-type]
        )

    def _activate(self, source: torch.Tensor) -> torch.Tensor:
        """Apply to each row [units * rows, n, r] its own activation."""
        for act_fn, chosen in self.activations.items():
            rows = chosen[self.choices].repeat(len(source) // len(self.choices), 1, 1)
            source = torch.where(rows, act_fn(source), source)
        return source


def _alike(units: Sequence[Intervention]) -> Iterable[list[int]]:
    """Return the indices of units that can be stacked as they are."""
    groups: dict[Any, list[int]] = {}
    for index, unit in enumerate(units):
        kind = unit.variant, unit.act_fn is None, unit.is_standardized, unit.R.shape, unit.R.dtype
        groups.setdefault(kind, []).append(index)
    return groups.values()


def _padded(matrices: Matrices, rank: int, is_activated: bool) -> Matrices:
    """Return matrices of a higher rank, with zeros for what is missing; with `subtracted` if any unit has it."""
    projection, weight, subtracted, b = matrices
    zeros = torch.zeros_like(projection)
    weight = zeros if weight is None else weight
    subtracted = zeros if subtracted is None and is_activated else subtracted
    missing = (0, rank - projection.shape[-2])
    wide = (
        None if matrix is None else nn.functional.pad(matrix, (0, 0, *missing))
        for matrix in (projection, weight, subtracted)
    )
    return Matrices(*wide, nn.functional.pad(b, missing))  # type: ignore[arg-type, call-arg]
