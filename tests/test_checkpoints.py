"""Checkpoints of a real `Trainer`, damaged file by file, and what training does that resumes from what is left."""

import functools
import shutil
from collections import OrderedDict, defaultdict
from pathlib import Path

import pytest
import torch
from by_hand import make_llama, random_ids
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
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
