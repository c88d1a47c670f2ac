"""The files of checkpoints, and the tensors in them."""

import json
import pickle
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils.parametrizations import orthogonal

from .edits import Tensors


def fetch(source: str | Path, *patterns: str) -> Path:
    """Return the folder of a checkpoint. Download matching files if it is on the Hub."""
    if Path(source).exists():
        return Path(source)
    try:
        return Path(snapshot_download(str(source), allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:
        raise ValueError(f"{source} is neither a folder nor a repository that the Hub gives: {error}") from error


def read_config(folder: Path, name: str, kind: str) -> dict[str, Any]:
    """Return the content of a checkpoint's JSON file."""
    path = folder / name
    if not path.is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) if folder.is_dir() else "a file"
        raise ValueError(f"{folder} is no checkpoint of {kind}: it has no {name} (found: {found or 'nothing'}).")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, not the config of a checkpoint of {kind}.")
    if "peft_type" in config:
        raise ValueError(f"{folder} is a PEFT adapter already, of type {config['peft_type']}.")
    return config


def read_tensors(folder: Path, *names: str) -> Tensors | None:
    """Return the tensors of the first of these files that exists, None if none does. No code in a pickle is run."""
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        return None
    try:
        tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is refused: it is a pickle with more than tensors in it, which could run code, or it is damaged. "
            "Save the checkpoint anew, with tensors alone."
        ) from error
    except Exception as error:  # each format's reader has errors of its own
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ValueError(f"{path} holds a {type(tensors).__name__}, not tensors by name.")
    return dict(tensors)


def take(tensors: Tensors, name: str, where: str, dims: int) -> torch.Tensor:
    """Return a tensor in float32, and check its number of dimensions."""
    if name not in tensors:
        raise ValueError(f"{where} has no tensor {name!r} (found: {', '.join(sorted(tensors)) or 'none'}).")
    tensor = tensors[name].float()
    if tensor.dim() != dims:
        raise ValueError(f"{name!r} of {where} is {list(tensor.shape)}, and should have {dims} dimension(s).")
    if not tensor.isfinite().all():
        raise ValueError(f"{name!r} of {where} holds values that are not finite: its training diverged.")
    return tensor


def check_shapes(unit: Tensors, where: str) -> Tensors:
    """Return the unit if its W is [r, d] and its b is [r], for its R [r, d]."""
    shape = unit["R"].shape
    for name, expected in (("W", shape), ("b", shape[:1])):
        if name in unit and unit[name].shape != expected:
            raise ValueError(
                f"The tensors of {where} do not fit each other: R is {list(shape)}, and {name} is "
                f"{list(unit[name].shape)}, not {list(expected)}."
            )
    return unit


def take_orthogonal(tensors: Tensors, name: str, where: str) -> torch.Tensor:
    """Return the matrix that torch's `orthogonal` parametrisation makes of its saved tensors.

    With its base B the weight is B Q(original), B applied to the longer side; Q is computed by torch itself.
    """
    original = take(tensors, f"{name}.parametrizations.weight.original", where, dims=2)
    rows, columns = original.shape
    module = orthogonal(nn.Linear(columns, rows, bias=False), use_trivialization=False)
    with torch.no_grad():
        module.get_parameter("parametrizations.weight.original").copy_(original)
        q = cast(torch.Tensor, module.weight)
        if (key := f"{name}.parametrizations.weight.0.base") not in tensors:
            return q
        base, longer = take(tensors, key, where, dims=2), max(rows, columns)
        if base.shape != (longer, longer):
            raise ValueError(f"{key!r} of {where} is {list(base.shape)}, not {[longer, longer]}.")
        return base @ q if rows >= columns else q @ base.mT
