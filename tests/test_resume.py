"""Checkpoints of a real `Trainer`, damaged file by file, and what training does that resumes from what is left."""

import functools
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import textwrap
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from by_hand import make_llama, random_ids
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from torch.distributed import checkpoint as distributed_checkpoint
from transformers import Trainer, TrainingArguments

from peft_reft import ReftConfig, last_whole_checkpoint

FILES = ["adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt"]
FILES += ["trainer_state.json", "training_args.bin", "README.md"]
DAMAGES = {
    "missing": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "cut in half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a byte short": lambda path: path.write_bytes(path.read_bytes().rstrip(b"\n")[:-1]),
}
HARMLESS = {("README.md", damage) for damage in DAMAGES}


def make_trainer(folder, adapted=True, **options):
    torch.manual_seed(3)
    model = make_llama(2)
    if adapted:
        model = get_peft_model(model, ReftConfig(task_type="CAUSAL_LM", r=2, positions="f2", dropout=0.1))
    rows = [{"input_ids": row, "labels": row} for row in random_ids().repeat(8, 1)]
    defaults = dict(
        max_steps=6,
        save_steps=2,
        logging_steps=1,
        learning_rate=2e-2,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    return Trainer(model, TrainingArguments(str(folder), **defaults | options), train_dataset=rows)


def train(folder, resume=None, **options):
    """Train to the end and return the loss of each step, those before the checkpoint as it has them."""
    trainer = make_trainer(folder, **options)
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the checkpoints of steps 2, 4 and 6, and the loss of each step."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, train(folder)


@pytest.fixture
def run(trained, tmp_path):
    """A copy of that folder with the checkpoints of steps 2 and 4."""
    for name in ("checkpoint-2", "checkpoint-4"):
        shutil.copytree(trained[0] / name, tmp_path / name)
    return tmp_path


def last_step(folder):
    found = last_whole_checkpoint(folder)
    return None if found is None else int(found.removeprefix(f"{folder}/checkpoint-"))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_no_damaged_file_is_overlooked(trained, run, name, damage):
    assert sorted(path.name for path in (run / "checkpoint-4").iterdir()) == sorted(FILES)
    assert last_step(run) == 4
    DAMAGES[damage](run / "checkpoint-4" / name)
    if (name, damage) in HARMLESS:
        assert last_step(run) == 4
        assert train(run, resume=str(run / "checkpoint-4")) == trained[1]
        return
    with pytest.warns(UserWarning, match="checkpoint-4 is not whole and is left out: .*"):
        found = last_whole_checkpoint(run)
    assert found == str(run / "checkpoint-2")
    if damage == "cut in half":  # training writes over what is left, whatever is wrong with it
        assert train(run, resume=found) == trained[1]


def test_the_trainer_alone_goes_on_without_the_optimizer(trained, run):
    """Why this is needed: no error, other losses."""
    (run / "checkpoint-4" / "optimizer.pt").unlink()
    losses = train(run, resume=True)
    assert losses[:5] == trained[1][:5] and losses[5] != trained[1][5]


def test_checkpoints_that_hold_the_model_only(tmp_path):
    train(tmp_path, save_only_model=True)
    assert not (tmp_path / "checkpoint-6" / "optimizer.pt").exists()
    assert last_step(tmp_path) == 6
    (tmp_path / "checkpoint-6" / "adapter_model.safetensors").unlink()
    with pytest.warns(UserWarning, match="the weights of an adapter are missing"):
        assert last_step(tmp_path) == 4


def test_weights_of_another_adapter(run):
    """PEFT saves adapters of other names in folders of their own; each has what belongs to it."""
    shutil.copytree(run / "checkpoint-4", run / "other", ignore=lambda _, names: set(names) - set(FILES[:2]))
    (run / "other").rename(run / "checkpoint-4" / "other")
    assert last_step(run) == 4
    (run / "checkpoint-4" / "adapter_model.safetensors").unlink()
    with pytest.warns(UserWarning, match="the weights of an adapter are missing"):
        assert last_step(run) == 2
    (run / "checkpoint-4" / "adapter_config.json").unlink()
    assert last_step(run) == 4  # of a model whose only adapter is the other


def test_settings_of_other_types(tmp_path):
    """Objects among the training arguments, of types that are read without their code."""
    settings = OrderedDict(a=1), defaultdict(list, a=[1]), functools.partial(print, 1), {3}, Path("a")
    trainer = make_trainer(tmp_path)
    trainer.args.settings = settings
    trainer.train()
    assert last_step(tmp_path) == 6


def test_shards_of_a_whole_model(tmp_path):
    train(tmp_path, adapted=False)
    for step in (4, 6):
        (tmp_path / f"checkpoint-{step}" / "model.safetensors").unlink()
        make_llama(2).save_pretrained(tmp_path / f"checkpoint-{step}", max_shard_size="30kB")
    assert last_step(tmp_path) == 6
    shards = sorted((tmp_path / "checkpoint-6").glob("model-*.safetensors"))
    assert len(shards) > 1
    left, stale = shards[-1], shards[-1].read_bytes()
    shutil.copy(shards[0], left)
    with pytest.warns(UserWarning, match=f"{left.name} does not have"):
        assert last_step(tmp_path) == 4
    left.write_bytes(stale)
    assert last_step(tmp_path) == 6
    left.unlink()
    with pytest.warns(UserWarning, match=f"model.safetensors.index.json cannot be read .*{shards[-1].name}"):
        assert last_step(tmp_path) == 4
    shutil.rmtree(tmp_path / "checkpoint-6")
    (tmp_path / "checkpoint-4" / "model.safetensors.index.json").unlink()
    with pytest.warns(UserWarning, match="the weights are missing"):
        assert last_step(tmp_path) == 2


def test_names_of_checkpoints(trained, run):
    """By number, not by letter; of a step that the state agrees with; folders alone."""
    shutil.copytree(run / "checkpoint-4", run / "checkpoint-best")
    (run / "checkpoint-9").write_text("a file")
    shutil.copytree(run / "checkpoint-4", run / "checkpoint-10")
    with pytest.warns(UserWarning, match="checkpoint-10.*trainer_state.json is of another step"):
        assert last_step(run) == 4
    state = run / "checkpoint-10" / "trainer_state.json"
    state.write_text(state.read_text().replace('"global_step": 4', '"global_step": 10'))
    assert last_step(run) == 10
    (run / "checkpoint-10" / "checkpoint-is-incomplete.txt").touch()  # as transformers' just-in-time checkpoints do
    with pytest.warns(UserWarning, match="checkpoint-10.*it holds checkpoint-is-incomplete.txt"):
        assert last_step(run) == 4


def test_second_crash(trained, run, monkeypatch):
    """A checkpoint that is written over one that a first crash has left is not whole by what was left."""
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(run, resume=str(run / "checkpoint-2"))
    monkeypatch.undo()
    assert (run / "checkpoint-4" / "optimizer.pt").exists()
    with pytest.warns(UserWarning, match="checkpoint-4.*trainer_state.json is missing"):
        assert last_step(run) == 2
    assert train(run, resume=str(run / "checkpoint-2")) == trained[1]
    assert last_step(run) == 6


def test_names_of_runs_are_no_settings(tmp_path):
    train(tmp_path, run_name="save_only_model")
    (tmp_path / "checkpoint-6" / "optimizer.pt").unlink()
    with pytest.warns(UserWarning, match="the optimizer's state is missing"):
        assert last_step(tmp_path) == 4


def test_a_state_of_another_kind(run):
    (run / "checkpoint-4" / "trainer_state.json").write_text("[]")
    with pytest.warns(UserWarning, match="checkpoint-4.*cannot be read"):
        assert last_step(run) == 2


def test_files_of_others(run):
    (run / "checkpoint-4" / "vocabulary.bin").write_bytes(b"not of torch")
    (run / "checkpoint-4" / "lines.json").write_text("{}\n{}\n")
    assert last_step(run) == 4


def test_no_checkpoint(tmp_path):
    assert last_whole_checkpoint(tmp_path) is None
    assert last_whole_checkpoint(tmp_path / "not there") is None
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.warns(UserWarning, match="trainer_state.json is missing"):
        assert last_whole_checkpoint(tmp_path) is None


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_no_damaged_adapter_is_loaded(run, name, damage):
    DAMAGES[damage](run / "checkpoint-4" / name)
    with pytest.raises((SafetensorError, ValueError)):
        PeftModel.from_pretrained(make_llama(2), str(run / "checkpoint-4"))
    model = make_llama(2)
    with pytest.raises((SafetensorError, ValueError, OSError)):
        model.load_adapter(str(run / "checkpoint-4"))


# Tables of contents that FSDP writes


def save_shards(checkpoint):
    """What FSDP would have written in place of the optimizer's state and of the weights."""
    tensors = {f"layers.{index}.weight": torch.randn(8, 8) for index in range(3)}
    for name in ("optimizer_0", "pytorch_model_fsdp_0"):
        distributed_checkpoint.save(tensors, checkpoint_id=checkpoint / name)
    (checkpoint / "optimizer.pt").unlink()


def test_shards_of_fsdp(run):
    save_shards(run / "checkpoint-4")
    assert last_step(run) == 4
    (file,) = (run / "checkpoint-4" / "optimizer_0").glob("*.distcp")
    contents = file.read_bytes()
    file.write_bytes(contents[:-1])
    with pytest.warns(UserWarning, match=f"optimizer_0 cannot be read .{file.name} is too short"):
        assert last_step(run) == 2
    file.unlink()
    with pytest.warns(UserWarning, match=f"optimizer_0 cannot be read .*{file.name}"):
        assert last_step(run) == 2
    file.write_bytes(contents)
    assert last_step(run) == 4
    (file.parent / ".metadata").unlink()
    with pytest.warns(UserWarning, match="optimizer_0 cannot be read .*metadata"):
        assert last_step(run) == 2


# Checkpoints of others, who may mean harm


class Runs:
    """An object whose pickle runs a command."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def archive_of(path, pickled, compression=zipfile.ZIP_STORED):
    """As torch.save writes it."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)


def archive_of_arguments(path, **attributes):
    torch.save(SimpleNamespace(**{"save_only_model": False} | attributes), path)


def sparse(path, size, end=b""):
    """A file of that size which takes no room on the disk."""
    with path.open("wb") as file:
        file.truncate(size)
        file.seek(size - len(end))
        file.write(end)


def nested(depth):
    """A key that takes 2 ** depth steps to be hashed."""
    return b"}" + b")" + b"2\x86" * depth + b"Ns"  # a dict, an empty tuple, twice the last in each next, None, put


def shared_state(count):
    """Many objects whose attributes were set from one dict of many."""
    pairs = b"".join(b"X" + struct.pack("<I", 6) + b"%06d" % index + b"N" for index in range(count))
    part = b"cx\nX\n)\x81h\x00b"
    state = b"}q\x00(" + pairs + b"u0"
    parts = b"".join(b"N" + part for _ in range(count))
    return b"\x80\x02" + state + b"cx\nM\n)\x81}(X\x0c\0\0\0storage_data}(" + parts + b"uub."


ATTACKS = {
    "a command in the table of FSDP": lambda folder: (
        save_shards(folder),
        (folder / "optimizer_0" / ".metadata").write_bytes(pickle.dumps(Runs(f"touch {folder.parent}/canary"))),
    ),
    "a command in the training arguments": lambda folder: archive_of(
        folder / "training_args.bin", pickle.dumps(Runs(f"touch {folder.parent}/canary"))
    ),
    "a memo of gigabytes": lambda folder: archive_of(
        folder / "training_args.bin", b"\x80\x02Nr" + (2**28).to_bytes(4, "little") + b"."
    ),
    "bytes of gigabytes": lambda folder: archive_of(
        folder / "training_args.bin", b"\x80\x05\x96" + (2**32).to_bytes(8, "little") + b"."
    ),
    "a compressed pickle": lambda folder: archive_of(folder / "training_args.bin", bytes(2**28), zipfile.ZIP_DEFLATED),
    "a key that is long to hash": lambda folder: archive_of(
        folder / "training_args.bin", b"\x80\x02" + nested(64) + b"."
    ),
    "a state that objects share": lambda folder: (
        save_shards(folder),
        (folder / "optimizer_0" / ".metadata").write_bytes(shared_state(30_000)),
    ),
    "countless processes": lambda folder: archive_of_arguments(
        folder / "training_args.bin", distributed_state=SimpleNamespace(num_processes=10**12)
    ),
    "brackets in brackets": lambda folder: (folder / "trainer_state.json").write_text("[" * 10**6),
    "a state of gigabytes": lambda folder: sparse(folder / "trainer_state.json", 2**33),
    "a header of gigabytes": lambda folder: sparse(folder / "adapter_model.safetensors", 2**33),
    "a header that is said to be": lambda folder: (folder / "adapter_model.safetensors").write_bytes(
        (2**36).to_bytes(8, "little") + b"{}"
    ),
    "a table of gigabytes": lambda folder: sparse(
        folder / "optimizer.pt", 2**32, struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 2**31, 2**31 - 22, 0)
    ),
    "a pipe": lambda folder: ((folder / "scheduler.pt").unlink(), os.mkfifo(folder / "scheduler.pt")),
}

LOOK = """
    import json, resource, sys, time, warnings
    from peft_reft import last_whole_checkpoint

    pages = int(open("/proc/self/statm").read().split()[0])
    limit = pages * resource.getpagesize() + 1200 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    results = {}
    for folder in sys.argv[1:]:
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = last_whole_checkpoint(folder)
        results[folder] = dict(
            found=found,
            warnings=[str(warning.message) for warning in caught],
            megabytes=(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024,
            seconds=time.process_time() - start,
        )
    print(json.dumps(results))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_checkpoints_that_mean_harm(trained, tmp_path):
    """They run nothing, take little, and are left out for a reason, in a process of little memory."""
    folders = {}
    for index, (name, attack) in enumerate(ATTACKS.items()):
        folder = folders[name] = tmp_path / str(index)
        for step in ("checkpoint-2", "checkpoint-4"):
            shutil.copytree(trained[0] / step, folder / step)
        attack(folder / "checkpoint-4")
    command = [sys.executable, "-c", textwrap.dedent(LOOK), *map(str, folders.values())]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    results = json.loads(process.stdout.splitlines()[-1])
    for name, folder in folders.items():
        result = results[str(folder)]
        assert result["found"] == str(folder / "checkpoint-2"), (name, result)
        (warning,) = result["warnings"]
        assert "checkpoint-4 is not whole" in warning and "MemoryError" not in warning, (name, warning)
        assert result["megabytes"] < 600 and result["seconds"] < 60, (name, result)
        assert not (folder / "canary").exists(), name
