"""Which checkpoint of a training run is whole.

A process that is killed while transformers' `Trainer` writes a checkpoint leaves a part of one. The `Trainer` resumes
from the highest number, whole or not: it fails, or goes on without the optimizer's state and says nothing.
"""

import io
import json
import os
import re
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from safetensors import safe_open

from .saving.inert_pickle import MAX_BYTES, Inert, read_inert

STATE = "trainer_state.json"  # written last by the main process
INCOMPLETE = "checkpoint-is-incomplete.txt"  # is there while transformers writes a just-in-time checkpoint
WEIGHTS = r"(adapter_model|model|pytorch_model)(\.safetensors|\.bin)(\.index\.json)?"
BY_TORCH = (
    r"(adapter_model|pytorch_model.*|optimizer|scheduler|scaler|rng_state.*|training_args|.*_states)\.(pth?|bin)"
)
JSON = r"(trainer_state|(adapter_)?config|.*\.index)\.json"
SHARDS = r"(pytorch_model_fsdp|optimizer)_\d+"  # folders that FSDP writes


def last_whole_checkpoint(folder: str | Path) -> str | None:
    """Return the newest checkpoint in a folder from which training continues as if it had not been interrupted.

    Newer ones that are not whole are left out, with a warning that says why. Files are compared with their own tables
    of contents; their data are not read, and no code in them is run. Among several processes, all call it, and all
    get what the first finds.

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
    """Return the result of `last_whole_checkpoint` for one process."""
    names = {path.name.removeprefix("checkpoint-"): path for path in Path(folder).glob("checkpoint-*")}
    checkpoints = {int(step): path for step, path in names.items() if step.isdecimal() and path.is_dir()}
    for step, path in sorted(checkpoints.items(), reverse=True):
        try:
            defect = next(defects(path, step), None)
        except Exception as error:  # every format's reader has errors of its own, and another run may take files away
            defect = f"it cannot be read ({error!r:.300})"
        if defect is None:
            return str(path)
        warnings.warn(f"{path} is not whole and is left out: {defect}.", stacklevel=3)
    return None


def defects(checkpoint: Path, step: int) -> Iterator[str]:
    """Yield the defects of a checkpoint. Each check relies on the earlier ones."""
    if (checkpoint / INCOMPLETE).exists():
        yield f"it holds {INCOMPLETE}"
    for path in sorted(checkpoint.rglob("*")):
        try:
            check_contents(path)
        except Exception as error:
            yield f"{path.relative_to(checkpoint)} cannot be read ({error!s:.300})"
    state = checkpoint / STATE
    if not state.exists():
        yield f"{STATE} is missing"
    if json.loads(read_bounded(state))["global_step"] != step:
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
        saved = saved_arguments(arguments)
        if saved.attribute("save_only_model") is True:
            return
        processes = saved.attribute("distributed_state").attribute("num_processes")
        if not isinstance(processes, int):
            yield "training_args.bin does not have the number of processes"
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
    """Yield the defects of DeepSpeed's part of a checkpoint: a folder, and a file that names it."""
    latest = checkpoint / "latest"
    name = read_bounded(latest).decode() if latest.exists() else ""
    folder = checkpoint / name
    if Path(name).name != name or not name or not folder.is_dir():
        yield f"latest is missing, or the folder that it names ({name!r:.300})"
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
    return all(rank in ranks for rank in range(processes))  # which stops at the first, however many are asked for


def check_contents(path: Path) -> None:
    """Raise an error if a file, or a folder that FSDP writes, does not hold what its own table of contents lists."""
    if path.is_dir():
        if re.fullmatch(SHARDS, path.name):
            check_parts(path)
    elif re.fullmatch(JSON, path.name):
        contents = json.loads(read_bounded(path))
        if path.name.endswith(".index.json") and "weight_map" in contents:
            keys: dict[str, set[str]] = defaultdict(set)
            for key, file in contents["weight_map"].items():
                keys[file].add(key)
            for file, own in keys.items():
                check_shard(path.with_name(file), own)
    elif path.suffix == ".safetensors":
        check_shard(path, set())
    elif re.fullmatch(BY_TORCH, path.name):
        with open_archive(path):
            pass


def check_parts(folder: Path) -> None:
    """Raise an error if a file of a folder that FSDP writes does not have all parts that the folder's table lists."""
    metadata = read_inert(read_bounded(folder / ".metadata"))
    ends: dict[str, int] = defaultdict(int)
    for _, part in metadata.attribute("storage_data").pairs():
        file = part.attribute("relative_path")
        ends[file] = max(ends[file], part.attribute("offset") + part.attribute("length"))
    for file, end in ends.items():
        if Path(file).name != file or (folder / file).stat().st_size < end:
            raise ValueError(f"{file} is too short")


def check_shard(path: Path, keys: set[str]) -> None:
    """Raise an error if a file is missing that holds a part of a model, or does not have the tensors of these keys."""
    if path.suffix != ".safetensors":
        path.stat()
        return
    with BoundedFile(path) as file:
        if int.from_bytes(file.read(8), "little") > MAX_BYTES:
            raise ValueError(f"the header of {path.name} is longer than {MAX_BYTES} bytes")
    with safe_open(path, framework="pt") as shard:
        if missing := keys - set(shard.keys()):
            raise ValueError(f"{path.name} does not have {min(missing)}")


def saved_arguments(file: Path) -> Inert:
    """Return the content of a file that `torch.save` has written."""
    with open_archive(file) as archive:
        (member,) = (member for member in archive.infolist() if member.filename.endswith("/data.pkl"))
        if member.compress_type != zipfile.ZIP_STORED or member.file_size > MAX_BYTES:
            raise ValueError("its pickle is compressed, or too large")
        return read_inert(archive.read(member))


class BoundedFile(io.FileIO):
    """A file of which no more than `MAX_BYTES` is read at once."""

    def __init__(self, path: Path):
        if not path.is_file():  # to read from a pipe or a device may never end
            raise ValueError(f"{path.name} is not there, or is no file")
        super().__init__(path)

    def read(self, size: int | None = -1, /) -> bytes:
        left = os.fstat(self.fileno()).st_size - self.tell()
        size = left if size is None or size < 0 else min(size, left)
        if size > MAX_BYTES:
            raise ValueError(f"{size} bytes are to be read at once, more than {MAX_BYTES}")
        return super().read(size) or b""


def read_bounded(path: Path) -> bytes:
    """Return the content of a file."""
    with BoundedFile(path) as file:
        return file.read()


@contextmanager
def open_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a zip file. A damaged table of contents raises an error."""
    with BoundedFile(path) as file, zipfile.ZipFile(file) as archive:
        yield archive
