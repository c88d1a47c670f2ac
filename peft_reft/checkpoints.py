"""Which checkpoint of a training run is whole.

A process that is killed while transformers' `Trainer` writes a checkpoint leaves a part of one. The `Trainer` resumes
from the highest number, whole or not: it fails, or goes on without the optimizer's state and says nothing.
"""

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from torch.distributed.checkpoint import FileSystemReader

STATE = "trainer_state.json"  # written last by the main process
INCOMPLETE = "checkpoint-is-incomplete.txt"  # is there while transformers writes a just-in-time checkpoint
WEIGHTS = r"(adapter_model|model|pytorch_model)(\.safetensors|\.bin)(\.index\.json)?"
BY_TORCH = (
    r"(adapter_model|pytorch_model.*|optimizer|scheduler|scaler|rng_state.*|training_args|.*_states)\.(pth?|bin)"
)
JSON = r"(trainer_state|(adapter_)?config|.*\.index)\.json"
SHARDS = r"(pytorch_model_fsdp|optimizer)_\d+"  # folders that FSDP writes


def last_whole_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint in a folder from which training goes on as if nothing had interrupted it.

    Newer ones that are not whole are left out, with a warning that says why. Files are compared with their own tables
    of contents; their data are not read. Among several processes, all call it, and all get what the first finds.

    Args:
        folder (`str` or `Path`): `output_dir` of a transformers `Trainer`, which holds folders `checkpoint-<step>`.

    Returns:
        `str` or None: the path of the checkpoint, None if no checkpoint is whole.

    Raises:
        FileNotFoundError: on a process that does not see the folder which the first one has found.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return find_last(folder)
    is_first = torch.distributed.get_rank() == 0
    (found,) = broadcast_object_list([find_last(folder) if is_first else None])
    if found is not None and not Path(found).is_dir():
        raise FileNotFoundError(f"{found}, which the first process resumes from, is not there for this one.")
    return found


def find_last(folder: str | Path) -> str | None:
    """What `last_whole_checkpoint` finds, by this process alone."""
    names = {path.name.removeprefix("checkpoint-"): path for path in Path(folder).glob("checkpoint-*")}
    checkpoints = {int(step): path for step, path in names.items() if step.isdecimal() and path.is_dir()}
    for step, path in sorted(checkpoints.items(), reverse=True):
        try:
            defect = next(defects(path, step), None)
        except Exception as error:  # every format's reader has errors of its own, and another run may take files away
            defect = f"it cannot be read ({error!r})"
        if defect is None:
            return str(path)
        warnings.warn(f"{path} is not whole and is left out: {defect}.", stacklevel=3)
    return None


def defects(checkpoint: Path, step: int) -> Iterator[str]:
    """What is wrong with a checkpoint. Each check takes for granted that those before found nothing."""
    if (checkpoint / INCOMPLETE).exists():
        yield f"it holds {INCOMPLETE}"
    for path in sorted(checkpoint.rglob("*")):
        try:
            check_contents(path)
        except Exception as error:
            yield f"{path.relative_to(checkpoint)} cannot be read ({error})"
    state = checkpoint / STATE
    if not state.exists():
        yield f"{STATE} is missing"
    if json.loads(state.read_text())["global_step"] != step:
        yield f"{STATE} is of another step"

    weights = [path for path in checkpoint.rglob("*") if re.fullmatch(WEIGHTS, path.name)]
    configs = {path.parent for path in checkpoint.rglob("adapter_config.json")}  # a folder for each
    adapters = {path.parent for path in weights if path.name.startswith("adapter_model.")}
    if adapters - configs:
        yield "adapter_config.json is missing"
    if configs - adapters and not any(path.parent == checkpoint for path in weights):
        yield "the weights of an adapter are missing"
    by_fsdp = any(checkpoint.glob("pytorch_model_fsdp*"))
    by_deepspeed = any(checkpoint.glob("global_step*"))
    if not (weights or by_fsdp or by_deepspeed):
        yield "the weights are missing"
    arguments = checkpoint / "training_args.bin"
    shards = [re.fullmatch(r"__(\d+)_.*\.distcp", path.name) for path in checkpoint.rglob("*.distcp")]
    if arguments.exists():
        attributes = saved_attributes(arguments)
        if attributes.get("save_only_model"):
            return
        processes = attributes["distributed_state"].num_processes
    elif shards:  # beside weights that FSDP has sharded there may be none
        processes = max(int(match[1]) for match in shards if match) + 1
    else:
        yield "training_args.bin is missing"
    if by_deepspeed:
        yield from defects_of_deepspeed(checkpoint, processes)
    else:
        if not any(re.fullmatch(r"optimizer(\.pt|\.bin|_\d+)", path.name) for path in checkpoint.iterdir()):
            yield "the optimizer's state is missing"
        if any(checkpoint.glob("optimizer_*/")) and not by_fsdp:
            yield "the weights of FSDP are missing"
        if not (checkpoint / "scheduler.pt").exists():
            yield "scheduler.pt is missing"
    alone = processes == 1 and (checkpoint / "rng_state.pth").exists()
    if not alone and not has_all_ranks(checkpoint, r"rng_state_(\d+)\.pth", processes):
        yield "the state of a random number generator is missing"


def defects_of_deepspeed(checkpoint: Path, processes: int) -> Iterator[str]:
    """What is wrong with the part of a checkpoint that DeepSpeed writes: a folder, and a file that names it."""
    latest = checkpoint / "latest"
    name = latest.read_text() if latest.exists() else ""
    folder = checkpoint / name
    if not name or not folder.is_dir():
        yield f"latest is missing, or the folder that it names ({name!r})"
        return
    if not has_all_ranks(folder, r".*zero_pp_rank_(\d+)_.*optim_states\.pt", processes):
        yield "the optimizer's state of a process is missing"
    partitioned = r"zero_pp_rank_(\d+)_.*model_states\.pt"
    if not any(folder.glob("mp_rank_*_model_states.pt")) and not has_all_ranks(folder, partitioned, processes):
        yield "the model's state of a process is missing"


def has_all_ranks(folder: Path, pattern: str, processes: int) -> bool:
    """Whether a folder has a file of each process."""
    matches = (re.fullmatch(pattern, path.name) for path in folder.iterdir())
    ranks = {int(match[1]) for match in matches if match}
    return ranks >= set(range(processes))


def check_contents(path: Path) -> None:
    """Raise an error if a file, or a folder that FSDP writes, does not hold what its own table of contents lists."""
    if path.is_dir():
        if re.fullmatch(SHARDS, path.name):
            for part in FileSystemReader(path).read_metadata().storage_data.values():
                if (path / part.relative_path).stat().st_size < part.offset + part.length:
                    raise ValueError(f"{part.relative_path} is too short")
    elif re.fullmatch(JSON, path.name):
        contents = json.loads(path.read_text(encoding="utf-8"))
        if path.name.endswith(".index.json") and "weight_map" in contents:
            for file in set(contents["weight_map"].values()):
                check_shard(path.with_name(file), {key for key, f in contents["weight_map"].items() if f == file})
    elif path.suffix == ".safetensors":
        with safe_open(path, framework="pt"):
            pass
    elif re.fullmatch(BY_TORCH, path.name):
        zipfile.ZipFile(path).close()


def check_shard(path: Path, keys: set[str]) -> None:
    """Raise an error if a file is missing that holds a part of a model, or does not have the tensors of these keys."""
    if path.suffix != ".safetensors":
        path.stat()
        return
    with safe_open(path, framework="pt") as shard:
        if missing := keys - set(shard.keys()):
            raise ValueError(f"{path.name} does not have {min(missing)}")


class Inert(dict):
    """Stands for any class that a pickle names: keeps attributes and items, and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            vars(self).update(state)

    def append(self, item: Any) -> None:
        pass

    extend = add = append


class InertUnpickler(pickle.Unpickler):
    """Reads a pickle without running any code that it names."""

    def find_class(self, module: str, name: str) -> Any:
        return Inert

    def persistent_load(self, pid: Any) -> None:
        return None


def saved_attributes(file: Path) -> dict[str, Any]:
    """The attributes of an object that `torch.save` has written, of which plain values are as they were."""
    with zipfile.ZipFile(file) as archive:
        (member,) = (member for member in archive.namelist() if member.endswith("/data.pkl"))
        with archive.open(member) as stream:
            return vars(InertUnpickler(stream).load())
