"""Which checkpoint of a training run is whole.

A process that is killed while transformers' `Trainer` writes a checkpoint leaves a part of one. The `Trainer` resumes
from the highest number, whole or not: it fails, or goes on without the optimizer's state and says nothing.
"""

import json
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch.distributed.checkpoint import FileSystemReader

INCOMPLETE = "checkpoint-is-incomplete.txt"  # is there while transformers writes a just-in-time checkpoint
WEIGHTS = r"(adapter_model|model|pytorch_model)(\.safetensors|\.bin)(\.index\.json)?"


def last_whole_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint in a folder from which training goes on as if nothing had interrupted it.

    Newer ones that are not whole are left out, with a warning that says why. Files are compared with their own tables
    of contents; their data are not read.

    Args:
        folder (`str` or `Path`): `output_dir` of a transformers `Trainer`, which holds folders `checkpoint-<step>`.

    Returns:
        `str` or None: the path of the checkpoint, None if no checkpoint is whole.
    """
    names = {path.name.removeprefix("checkpoint-"): path for path in Path(folder).glob("checkpoint-*")}
    checkpoints = {int(step): path for step, path in names.items() if step.isdecimal() and path.is_dir()}
    for step, path in sorted(checkpoints.items(), reverse=True):
        defect = next(defects(path, step), None)
        if defect is None:
            return str(path)
        warnings.warn(f"{path} is not whole and is left out: {defect}.", stacklevel=2)
    return None


def defects(checkpoint: Path, step: int) -> Iterator[str]:
    """What is wrong with a checkpoint. Each check takes for granted that those before found nothing."""
    if (checkpoint / INCOMPLETE).exists():
        yield f"it holds {INCOMPLETE}"
    for path in sorted(checkpoint.rglob("*")):
        try:
            check_contents(path)
        except Exception as error:  # every format's reader has errors of its own
            yield f"{path.relative_to(checkpoint)} cannot be read ({error})"
    state = checkpoint / "trainer_state.json"  # written last by the main process
    if not state.exists():
        yield "trainer_state.json is missing"
    if json.loads(state.read_text())["global_step"] != step:
        yield "trainer_state.json is of another step"

    weights = [path for path in checkpoint.rglob("*") if re.fullmatch(WEIGHTS, path.name)]
    if any(path.stem == "adapter_model" and not path.with_name("adapter_config.json").exists() for path in weights):
        yield "adapter_config.json is missing"
    by_fsdp = any(checkpoint.glob("pytorch_model_fsdp*"))
    by_deepspeed = any(checkpoint.glob("global_step*"))
    if not (weights or by_fsdp or by_deepspeed):
        yield "the weights are missing"
    arguments = checkpoint / "training_args.bin"  # not there beside weights that FSDP has sharded
    if arguments.exists() and pickled_value(arguments, "save_only_model"):
        return
    processes = pickled_value(arguments, "num_processes") if arguments.exists() else None
    if by_deepspeed:
        yield from defects_of_deepspeed(checkpoint, processes)
    else:
        optimizers = [path.name for path in checkpoint.glob("optimizer*")]
        if not optimizers:
            yield "the optimizer's state is missing"
        if "optimizer.pt" not in optimizers and not by_fsdp:
            yield "the weights of FSDP are missing"
        if not (checkpoint / "scheduler.pt").exists():
            yield "scheduler.pt is missing"
    alone = processes in (1, None) and (checkpoint / "rng_state.pth").exists()
    if not alone and not has_all_ranks(checkpoint, r"rng_state_(\d+)\.pth", processes):
        yield "the state of a random number generator is missing"


def defects_of_deepspeed(checkpoint: Path, processes: int | None) -> Iterator[str]:
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


def has_all_ranks(folder: Path, pattern: str, processes: int | None) -> bool:
    """Whether a folder has a file of each process: if it is not known how many, of two or more, without a gap."""
    matches = (re.fullmatch(pattern, path.name) for path in folder.iterdir())
    ranks = {int(match[1]) for match in matches if match}
    return ranks >= set(range(processes or max({1} | ranks) + 1))


def check_contents(path: Path) -> None:
    """Raise an error if a file, or a folder that FSDP writes, does not hold what its own table of contents lists."""
    if path.is_dir():
        if re.fullmatch(r"(pytorch_model_fsdp|optimizer)_\d+", path.name):
            for part in FileSystemReader(path).read_metadata().storage_data.values():
                if (path / part.relative_path).stat().st_size < part.offset + part.length:
                    raise ValueError(f"{part.relative_path} is too short")
    elif path.suffix == ".json":
        contents = json.loads(path.read_text(encoding="utf-8"))
        if path.name.endswith(".index.json"):
            for name in contents["weight_map"].values():
                path.with_name(name).stat()
    elif path.suffix == ".safetensors":
        with safe_open(path, framework="pt"):
            pass
    elif path.suffix in (".pt", ".pth", ".bin"):
        zipfile.ZipFile(path).close()


def pickled_value(file: Path, name: str) -> Any:
    """A number, a bool or a string that an object saved by torch holds under a name; the pickle is read, not run."""
    with zipfile.ZipFile(file) as archive:
        (member,) = (member for member in archive.namelist() if member.endswith("/data.pkl"))
        steps = [(op.name, value) for op, value, _ in pickletools.genops(archive.read(member)) if "PUT" not in op.name]
    for (_, key), (kind, value) in pairwise(steps):
        if key == name:
            return {"NEWTRUE": True, "NEWFALSE": False}.get(kind, value)
    return None
