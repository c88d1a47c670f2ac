"""Checkpoints of pyreft 0.1: `config.json`, and a file for each intervention."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from ..config import VARIANTS
from ..positions import Positions
from .edits import Edits, Tensors
from .files import fetch, read_config, read_tensors, take, take_orthogonal

# The classes of pyreft/interventions.py
INTERVENTIONS = {
    "LoreftIntervention": "loreft",
    "NoreftIntervention": "noreft",
    "NodireftIntervention": "direft",
    "DireftIntervention": "direft_orthogonal",
    "ConsreftIntervention": "consreft",
    "LobireftIntervention": "lobireft",
}


@dataclass(frozen=True)
class Representation:
    """Where pyvene puts an intervention: an entry of `representations` in its config."""

    layer: int
    component: str
    unit: str
    max_number_of_units: int

    @classmethod
    def parse(cls, entry: Any) -> "Representation":
        """Read what pyvene 0.1 writes: the fields in order, or by name."""
        names = ("layer", "component", "unit", "max_number_of_units")
        values = [entry.get(name) for name in names] if isinstance(entry, dict) else entry
        if not isinstance(values, list) or len(values) < len(names) or not isinstance(values[1], str):
            raise ValueError(f"{entry!r} is no representation of pyvene: a layer, a component, a unit and a number.")
        return cls(*values[: len(names)])

    @property
    def key(self) -> str:
        """The name of its intervention, but for the number that tells it from others at the same place."""
        component, unit = self.component.replace(".", "_"), str(self.unit).replace(".", "_")
        layer = "" if "." in self.component else f"layer_{self.layer}_"
        return f"{layer}comp_{component}_unit_{unit}_nunit_{self.max_number_of_units}"

    @property
    def module(self) -> int | str:
        """The module whose output is edited: the index of a block, or a path."""
        path, _, end = self.component.rpartition(".")
        if self.unit != "pos" or not (self.component == "block_output" or (path and end == "output")):
            raise ValueError(
                f"component={self.component!r}, unit={self.unit!r} cannot be converted: ReFT here edits tokens "
                "('pos') of what a block ('block_output') or another module ('path.of.module.output') puts out."
            )
        return re.sub(r"\[(\d+)\]", r".\1", path) if path else int(self.layer)


def read_pyreft(
    source: str | Path, positions: str, share_weights: bool | None, first_unit: str | None, act_fn: str | None
) -> Edits:
    """Read a checkpoint of pyreft; for the arguments see `convert_pyreft`."""
    config = read_config(fetch(source, "config.json"), "config.json", "pyreft")
    if not isinstance(config.get("representations"), list) or not isinstance(config.get("intervention_types"), list):
        found = ", ".join(sorted(config)[:8])
        raise ValueError(
            f"{source} is no checkpoint of pyreft: its config.json has no lists representations and "
            f"intervention_types (found: {found})."
        )
    intervention = pyreft_intervention(config["intervention_types"])
    folder = fetch(source, "config.json", "intkey_*", "pytorch_model.bin")
    # Earlier versions of pyvene have points in keys where there are underscores now.
    names_of_files = {path.stem.replace(".", "_"): path.name for path in sorted(folder.glob("intkey_*"))}
    keys: dict[int | str, list[str]] = {}  # of each module
    interventions: dict[str, Tensors] = {}
    for place in map(Representation.parse, config["representations"]):
        module = place.module
        key = next(key for key in map(f"{place.key}#{{}}".format, count()) if key not in interventions)
        tensors = read_tensors(folder, names_of_files.get(f"intkey_{key}", ""))
        if tensors is None:
            raise ValueError(f"{source} is not whole: intkey_{key}.bin, which its config.json asks for, is missing.")
        interventions[key] = pyreft_unit(tensors, intervention, act_fn, f"intkey_{key}")
        keys.setdefault(module, []).append(key)
    order = [key.replace(".", "_") for key in config.get("sorted_keys") or interventions]  # that of the locations
    names = Positions.parse(positions).units(is_shared(keys, positions, share_weights))
    units = {
        module: dict(zip(names, (interventions[key] for key in in_order(own, order, first_unit)), strict=True))
        for module, own in keys.items()
    }
    head = read_tensors(folder, "pytorch_model.bin") or {}
    return Edits(intervention, positions, len(names) == 1, units, act_fn, head=head)


def pyreft_intervention(types: list[Any]) -> str:
    """The intervention that classes of pyreft compute, which must all be the same."""
    classes = [re.sub(r".*[.']([^.']+)'>", r"\1", str(kind)) for kind in dict.fromkeys(types)]
    if len(classes) != 1 or classes[0] not in INTERVENTIONS:
        raise ValueError(
            f"The interventions are of {', '.join(classes) or 'no class'}: one class for all of them can be "
            f"converted, of pyreft's {', '.join(INTERVENTIONS)}."
        )
    return INTERVENTIONS[classes[0]]


def pyreft_unit(tensors: Tensors, intervention: str, act_fn: str | None, where: str) -> Tensors:
    """R, W and b of an intervention of pyreft, whose rotations are [d, r], and whose free projections [r, d]."""
    variant = VARIANTS[intervention]
    if intervention == "loreft":  # the one class that saves tensors by names of its own
        names = {"R": "rotate_layer", "W": "weight", "b": "bias"}
        unit = {name: take(tensors, own, where) for name, own in names.items()}
        return unit | {"R": unit["R"].mT}
    if not variant.linear:
        return {"R": take_orthogonal(tensors, "rotate_layer", where).mT, "b": take(tensors, "learned_source", where)}
    unit = {name: take(tensors, f"learned_source.{own}", where) for name, own in (("W", "weight"), ("b", "bias"))}
    if variant.orthonormal:
        return unit | {"R": take_orthogonal(tensors, "rotate_layer", where).mT}
    if variant.subtract and "proj_layer.bias" in tensors:  # act(W h + b) - (R h + bias); else pyreft ignores it
        shift = take(tensors, "proj_layer.bias", where)
        if act_fn is not None and shift.any():
            raise ValueError(f"{where} has a bias of the projection (add_bias), which act_fn={act_fn!r} keeps from b.")
        unit["b"] = unit["b"] - shift
    return unit | {"R": take(tensors, "proj_layer.weight", where)}


def is_shared(keys: Mapping[int | str, list[str]], positions: str, share_weights: bool | None) -> bool:
    """Whether each module has one intervention for all positions."""
    numbers = {len(own) for own in keys.values()}
    expected = {len(Positions.parse(positions).units(share)): share for share in (False, True)}
    if len(numbers) != 1 or numbers - expected.keys():
        raise ValueError(
            f"The modules have {' or '.join(map(str, sorted(numbers))) or 'no'} interventions each, but positions="
            f"{positions!r} need {' or '.join(map(str, sorted(expected)))}, the same number everywhere."
        )
    (number,) = numbers
    if len(expected) == 2 and share_weights not in (None, expected[number]):
        raise ValueError(
            f"share_weights={share_weights} does not fit the checkpoint, which has {number} intervention(s) for each "
            "module: one if the first and the last tokens share their weights, else two."
        )
    return expected[number]


def in_order(keys: list[str], order: list[str], first_unit: str | None) -> list[str]:
    """The keys of a module's interventions, that of the prefix first.

    pyreft's `get_intervention_locations` gives the prefix to the first half of all interventions.
    """
    if len(keys) < 2 or first_unit is not None:
        return keys[::-1] if first_unit == "suffix" else keys
    later = {*order[len(order) // 2 :]}
    if (keys[0] in later) == (keys[1] in later):
        raise ValueError(
            f"Which of {' and '.join(keys)} edits the first tokens is not saved, and the order of all interventions "
            "is not that of pyreft's get_intervention_locations, where those of prefixes come first. Say what the "
            "first of the two edits: first_unit='prefix' or first_unit='suffix' (--first-unit)."
        )
    return keys[::-1] if keys[0] in later else keys
