"""ReFT checkpoints of adapters 1.3 (AdapterHub): `adapter_config.json`, and one file of tensors."""

import re
from pathlib import Path
from typing import Any

from ..edits.variants import VARIANTS
from ..positions.language import Positions
from .edits import Edits, Tensors
from .files import check_shapes, fetch, read_config, read_tensors, take, take_orthogonal

WEIGHTS = ("adapter.safetensors", "pytorch_adapter.bin")
HEADS = ("model_head.safetensors", "pytorch_model_head.bin")
FIELDS = (
    "dropout",
    "layers",
    "non_linearity",
    "orthogonality",
    "prefix_positions",
    "suffix_positions",
    "tied_weights",
)


def read_adapters(source: str | Path, intervention: str | None) -> Edits:
    """Read a checkpoint of adapters; for the arguments see `convert_adapters`."""
    config = adapters_config(source)
    folder = fetch(source, "adapter_config.json", *WEIGHTS, *HEADS)
    tensors = read_tensors(folder, *WEIGHTS)
    if not tensors:
        raise ValueError(f"{source} is not whole: it has no tensors in {' or '.join(WEIGHTS)}.")
    intervention = adapters_intervention(config["orthogonality"], intervention)
    prefix, suffix, tied = config["prefix_positions"], config["suffix_positions"], config["tied_weights"]
    positions = "+".join([f"f{prefix}"] * bool(prefix) + [f"l{suffix}"] * bool(suffix))
    names = Positions.parse(positions).units(tied)
    numbers = (0, 1) if len(names) == 2 else (0 if tied or prefix else 1,)  # the other of two is never run
    modules = by_module(tensors)
    if (layers := config["layers"]) != "all" and (not isinstance(layers, list) or len(modules) != len(layers)):
        found = ", ".join(modules)
        raise ValueError(f"{source} is not whole: its config has layers={layers}, and there are tensors of {found}.")
    if tied and (other := next((module for module, found in modules.items() if len(found) > 1), None)):
        raise ValueError(f"{source} contradicts itself: tied_weights is true, and {other} has several units.")
    units: dict[int | str, dict[str, Tensors]] = {
        module: {
            name: adapters_unit(found.get(number, {}), intervention, f"{module}, unit {number}")
            for name, number in zip(names, numbers, strict=True)
        }
        for module, found in modules.items()
    }
    return Edits(
        intervention,
        positions,
        share_weights=len(names) == 1,
        units=units,
        every_block=layers == "all",
        act_fn=adapters_activation(config["non_linearity"]),
        dropout=config["dropout"],
        head=read_tensors(folder, *HEADS) or {},
        trains_output_embeddings=False,  # train_adapter freezes them
    )


def adapters_config(source: str | Path) -> dict[str, Any]:
    """Return the config of a ReFT adapter of adapters."""
    config = read_config(fetch(source, "adapter_config.json"), "adapter_config.json", "adapters").get("config")
    kind = config.get("architecture") if isinstance(config, dict) else None
    if not isinstance(config, dict) or kind != "reft":
        raise ValueError(
            f"{source} is no ReFT checkpoint of adapters: the architecture in its adapter_config.json is {kind!r}."
        )
    if missing := {*FIELDS} - config.keys():
        names = ", ".join(sorted(missing))
        raise ValueError(f"{source} is no ReFT checkpoint of adapters: its adapter_config.json has no {names}.")
    return config


def by_module(tensors: Tensors) -> dict[str, dict[int, Tensors]]:
    """Return the tensors of each module's units, by the unit's number."""
    modules: dict[str, dict[int, Tensors]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(.+)\.reft_layer\.refts\.[^.]+\.units\.(\d+)\.(.+)", key)
        if match is None:
            raise ValueError(f"{key!r} is no tensor of a ReFT of adapters.")
        modules.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = tensor
    return modules


def adapters_intervention(is_orthogonal: bool, intervention: str | None) -> str:
    """Return the intervention of a checkpoint. Its config names the orthogonality of the projection only."""
    possible = [
        name for name, variant in VARIANTS.items() if variant.linear and variant.orthonormal == bool(is_orthogonal)
    ]
    if intervention is None and is_orthogonal:
        return "loreft"
    if intervention not in possible:
        given = "" if intervention is None else f"intervention={intervention!r} is not possible for this checkpoint. "
        raise ValueError(
            f"{given}adapters does not save whether the projection is subtracted. Say what was trained: "
            f"intervention={' or '.join(map(repr, possible))} (--intervention)."
        )
    return intervention


def adapters_unit(tensors: Tensors, intervention: str, where: str) -> Tensors:
    """Return R, W and b of a unit of adapters, whose projections are [r, d]."""
    if VARIANTS[intervention].orthonormal:
        projection = take_orthogonal(tensors, "projection", where)
    else:
        projection = take(tensors, "projection.weight", where, dims=2)
    weight, bias = (take(tensors, f"learned_source.{n}", where, dims) for n, dims in (("weight", 2), ("bias", 1)))
    return check_shapes({"R": projection, "W": weight, "b": bias}, where)


def adapters_activation(non_linearity: str | None) -> str | None:
    """Return the name of an activation in `transformers.activations.ACT2FN`. adapters has one name of its own."""
    if non_linearity is None:
        return None
    if not isinstance(non_linearity, str):
        raise ValueError(f"non_linearity={non_linearity!r} in adapter_config.json is no name of an activation.")
    return {"leakyrelu": "leaky_relu"}.get(non_linearity.lower(), non_linearity.lower())
