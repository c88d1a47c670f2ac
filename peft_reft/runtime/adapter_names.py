"""A mixed batch: an adapter for each row, as PEFT's `adapter_names` names them.

All rows are edited together: the weights of the adapters are stacked, and each row takes its own.
"""

from dataclasses import dataclass, field

from ..edits.per_row import PerRowUnits
from ..layer import ReftLayer
from ..positions.language import PerRowPositions
from .state import ModelToken, PerThread

BASE = "__base__"  # PEFT's name for no adapter

current = PerThread()  # the mixed batch that models find


@dataclass
class MixedBatch:
    """A batch with an adapter for each row.

    Attributes:
        family (`ModelToken`): the model that the batch is for.
        names (`tuple[str, ...]`): the adapter of each row, `"__base__"` for none. In `generate`, where a prompt may
            become several rows (beams, returned sequences), one for each prompt.
    """

    family: ModelToken
    names: tuple[str, ...]
    _edits: dict[ReftLayer, tuple[PerRowPositions, dict[str, PerRowUnits]]] = field(default_factory=dict)

    def repeats(self, batch: int, expanded: bool) -> int:
        """Return the number of rows for each name.

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

    def edits(self, layer: ReftLayer) -> tuple[PerRowPositions, dict[str, PerRowUnits]]:
        """Return what the batch's adapters edit in a layer, made once for the batch."""
        if layer not in self._edits:
            adapters = [name for name in dict.fromkeys(self.names) if name in layer.positions]
            units = {name: layer.units(name) for name in adapters}
            choices = [adapters.index(name) if name in adapters else 0 for name in self.names]
            slots = ("prefix", "suffix") if any(len(units[name]) == 2 for name in adapters) else ("unit",)
            stacked = {
                slot: PerRowUnits([units[name].get(slot) or units[name]["unit"] for name in adapters], choices)
                for slot in slots
            }
            self._edits[layer] = PerRowPositions(tuple(map(layer.positions.get, self.names))), stacked
        return self._edits[layer]


def current_mixed_batch() -> MixedBatch | None:
    """Return this thread's mixed batch, or None."""
    return current.value
