"""Checkpoints of pyreft 0.1: `config.json`, and a file for each intervention."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from ..edits.variants import VARIANTS
from ..positions.language import Positions
from .edits import Edits, Tensors
from .files import check_shapes, fetch, read_config, read_tensors, take, take_orthogonal

# The classes of pyreft/interventions.py
INTERVENTIONS = {
    "LoreftIntervention": "loreft",
    "NoreftIntervention": "noreft",
    "NodireftIntervention": "direft",
    "DireftIntervention": "direft_orthogonal",
    "ConsreftIntervention": "consreft",
    "LobireftIntervention": "lobireft",
}
# What their state dicts hold, by how names begin
TENSORS = ("weight", "bias", "rotate_layer", "proj_layer", "learned_source", "embed_dim", "interchange_dim")


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
        if not path and not isinstance(self.layer, int):
            raise ValueError(f"layer={self.layer!r} of a representation in config.json is no index of a block.")
        return re.sub(r"\[(\d+)\]", r".\1", path) if path else self.layer


def read_pyreft(
    source: str | Path, positions: str, share_weights: bool | None, first_unit: str | None, act_fn: str | None
) -> Edits:
    """Read a checkpoint of pyreft; for the arguments see `convert_pyreft`."""
    folder = fetch(source, "config.json")
    if not (folder / "config.json").exists() and any(folder.glob("intkey_*")):
        raise ValueError(
            f"{source} has interventions (intkey_*) and no config.json, as pyreft's trainer writes its "
            "checkpoints. Put the config.json beside them that `save` writes for a model of the same ReftConfig."
        )
    config = read_config(folder, "config.json", "pyreft")
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
    order = [str(key).replace(".", "_") for key in config.get("sorted_keys") or interventions]  # of the locations
    chosen = Positions.parse(positions)
    names = chosen.units(is_shared(keys, positions, share_weights))
    if chosen.prefix and chosen.suffix and chosen.middle:
        positions += "-middle"  # which pyreft's `get_intervention_locations` gives to neither end
    units = {
        module: dict(zip(names, (interventions[key] for key in in_order(own, order, first_unit)), strict=True))
        for module, own in keys.items()
    }
    head = read_tensors(folder, "pytorch_model.bin") or {}
    return Edits(intervention, positions, share_weights=len(names) == 1, units=units, act_fn=act_fn, head=head)


def pyreft_intervention(types: list[Any]) -> str:
    """Return the intervention that classes of pyreft compute. They must all be the same."""
    classes = [re.sub(r".*[.']([^.']+)'>", r"\1", str(kind)) for kind in dict.fromkeys(types)]
    if len(classes) != 1 or classes[0] not in INTERVENTIONS:
        raise ValueError(
            f"The interventions are of {', '.join(classes) or 'no class'}: one class for all of them can be "
            f"converted, of pyreft's {', '.join(INTERVENTIONS)}."
        )
    return INTERVENTIONS[classes[0]]


def pyreft_unit(tensors: Tensors, intervention: str, act_fn: str | None, where: str) -> Tensors:
    """Return R, W and b of an intervention of pyreft, whose rotations are [d, r] and free projections [r, d]."""
    if unknown := sorted(name for name in tensors if not name.startswith(TENSORS)):
        raise ValueError(
            f"{where} holds {', '.join(unknown)}, which cannot be converted: ReFT here has no such parameters. (An "
            "activation, act_fn, can have its own.)"
        )
    variant = VARIANTS[intervention]
    if intervention == "loreft":  # the one class that saves tensors by names of its own
        R, source = take(tensors, "rotate_layer", where, dims=2).mT, ""
    elif variant.orthonormal:
        R, source = take_orthogonal(tensors, "rotate_layer", where).mT, "learned_source."
    else:
        R, source = take(tensors, "proj_layer.weight", where, dims=2), "learned_source."
    if not variant.linear:
        return check_shapes({"R": R, "b": take(tensors, "learned_source", where, dims=1)}, where)
    unit = {"R": R, "W": take(tensors, f"{source}weight", where, 2), "b": take(tensors, f"{source}bias", where, 1)}
    unit = check_shapes(unit, where)
    if intervention == "noreft" and "proj_layer.bias" in tensors:  # act(W h + b) - (R h + bias); direft ignores it
        shift = take(tensors, "proj_layer.bias", where, dims=1)
        check_shapes({"R": R, "b": shift}, f"{where} (b: proj_layer.bias)")
        if act_fn is not None and shift.any():
            raise ValueError(f"{where} has a bias of the projection (add_bias), which act_fn={act_fn!r} keeps from b.")
        unit["b"] = unit["b"] - shift
    return unit


def is_shared(keys: Mapping[int | str, list[str]], positions: str, share_weights: bool | None) -> bool:
    """Whether each module has one intervention for all positions.

    One where both ends are edited does not say so: for weights that are not shared, pyreft's
    `get_intervention_locations` has the first half of the interventions edit first tokens and the others last ones,
    in whatever modules they are.
    """
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
            "module: one if the first and the last tokens share their weights, else two. (If the first half of the "
            "modules edits first tokens and the others last ones, it cannot be converted.)"
        )
    if len(expected) == 2 and share_weights is None and number == 1 and len(keys) % 2 == 0:
        raise ValueError(
            f"Each of the {len(keys)} modules has one intervention. With positions={positions!r} it edits first and "
            "last tokens if pyreft was told share_weights=True: then say so (--share-weights). Else the first half "
            "of the modules edits first tokens and the others last ones, which cannot be converted."
        )
    return expected[number]


def in_order(keys: list[str], order: list[str], first_unit: str | None) -> list[str]:
    """Return the keys of a module's interventions, the prefix first.

    pyreft's `get_intervention_locations` gives the prefix to the first half of all interventions.
    """
    if len(keys) < 2:
        if first_unit is not None:
            raise ValueError(f"first_unit={first_unit!r} is for modules with two interventions; here each has one.")
        return keys
    if first_unit is not None:
        return keys[::-1] if first_unit == "suffix" else keys
    later = {*order[len(order) // 2 :]}
    if (keys[0] in later) == (keys[1] in later):
        raise ValueError(
            f"Which of {' and '.join(keys)} edits the first tokens is not saved. Locations by pyreft's "
            "get_intervention_locations, where all for first tokens precede those for last ones, would have both edit "
            "the same tokens, which cannot be converted. If the locations were made otherwise, say what the first of "
            "the two edits: first_unit='prefix' or first_unit='suffix' (--first-unit)."
        )
    return keys[::-1] if keys[0] in later else keys
