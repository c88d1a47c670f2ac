"""DDP on two processes: the same training as in one with the same global batch."""

import pytest
import torch
from by_hand import ByHand, assert_edits, labels_of, random_ids
from launch import train as train_distributed
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from train import make_trainer_of
from trainers import assert_equal_tensors
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow

HEADS = {"reft": {"modules_to_save": ["lm_head"]}}
PAPER = {"reft": {"standardize": False}}  # the scale is that of the first rows, which accumulation makes fewer


@pytest.fixture(scope="module")
def launched(tmp_path_factory, rows, describe):
    """The folder, the runs and what came of them: all in one launch, one after the other."""
    folder = tmp_path_factory.mktemp("ddp")
    preferences = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " one fox"} for row in rows]
    saving = {"save_strategy": "steps", "save_steps": 3}
    shuffled = {"train_sampling_strategy": "random", "gradient_accumulation_steps": 2} | saving
    middle = {name: {"resume": str(folder / name / "checkpoints" / "checkpoint-3")} for name in ("shuffled", "heads")}
    described = [
        describe("plain", rows, {"eval_data": rows[:8]}, per_device_eval_batch_size=2),
        describe("accumulated", rows, PAPER, gradient_accumulation_steps=2, per_device_train_batch_size=1),
        describe("uneven", rows[:9], gradient_checkpointing=False),
        describe("by device", rows, PAPER, gradient_accumulation_steps=2, average_tokens_across_devices=False),
        describe("shuffled", rows, **shuffled),
        describe("shuffled, resumed", rows, middle["shuffled"], **shuffled),
        describe("heads", rows, HEADS, **saving),
        describe("heads, resumed", rows, HEADS | middle["heads"], **saving),
        describe("preferences", preferences, max_length=None),
    ]
    outcomes = train_distributed("ddp", folder, described, new=True)
    return folder, {run["name"]: run for run in described}, outcomes


def mean_of_tokens(model, batches):
    """The mean loss over all targets of some batches."""
    targets = [batch["labels"][:, 1:].flatten() for batch in batches]
    logits = [model(**batch).logits[:, :-1].flatten(0, 1) for batch in batches]
    return cross_entropy(torch.cat(logits), torch.cat(targets))


@pytest.mark.parametrize(
    "name, accumulation", [("plain", 1), ("accumulated", 1), ("shuffled", 2), ("heads", 1), ("preferences", 1)]
)
def test_same_as_one_process(launched, in_one_process, assert_same, name, accumulation):
    """For preferences, too, where the reference of DPO is the same model with the adapter switched off."""
    folder, runs, outcomes = launched
    assert {rank["wrapped"] for rank in outcomes[name]} == {"DistributedDataParallel"}
    same_batch = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": accumulation}
    assert_same(folder / name, outcomes[name], in_one_process(runs[name], **same_batch))


def test_uneven_batches_are_filled_with_the_first_rows(launched, in_one_process, assert_same):
    """accelerate's `even_batches`: of the last batches, [8] and none, it makes [8, 0] and [1, 2]."""
    folder, runs, outcomes = launched
    run = runs["uneven"]
    filled = run | {"data": run["data"] + run["data"][:3]}
    assert_same(folder / "uneven", outcomes["uneven"], in_one_process(filled, per_device_train_batch_size=4))


def test_without_average_tokens_across_devices(launched, tmp_path):
    """A step's loss is the mean over devices of the mean over each one's tokens: by a plain loop."""
    folder, runs, outcomes = launched
    run, outcome = runs["by device"], outcomes["by device"]
    trainer = make_trainer_of(run | {"sft": run["sft"] | {"per_device_train_batch_size": 2}}, tmp_path)
    batches = list(trainer.get_train_dataloader())  # of 2 rows; the devices take turns
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=2e-2, weight_decay=0.0)
    expected_losses = []
    for step in range(6):
        devices = [
            mean_of_tokens(trainer.model, [batches[(4 * step + i) % 8] for i in (device, device + 2)])
            for device in range(2)
        ]
        assert abs(devices[0] - devices[1]) > 1e-3, "devices that agree tell nothing"
        loss = sum(devices) / 2
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected_losses.append(loss.item())
    for rank in outcome:
        assert rank["losses"] == pytest.approx(expected_losses, abs=1e-5)
    trainer.save_model(str(tmp_path / "adapter"))
    found, expected = (load_file(f / "adapter/adapter_model.safetensors") for f in (folder / "by device", tmp_path))
    assert_equal_tensors(found, expected)


@pytest.mark.parametrize("name", ["shuffled", "heads"])
def test_resumed_as_if_uninterrupted(launched, assert_same, name):
    folder, _, outcomes = launched
    resumed = f"{name}, resumed"
    assert_same(folder / resumed, outcomes[resumed], (folder / name, outcomes[name][0]), atol=1e-6, resumed=True)


@torch.no_grad()
def test_saved_adapter_edits_in_one_process(launched, base):
    folder, *_ = launched
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder / "plain/adapter"
    )
    ids = random_ids()
    inputs = {"input_ids": ids, "labels": labels_of(ids, [(5, 12)], [(8, 12)])}
    columns = {"prefix": [[0, 1], [0, 1]], "suffix": [[3, 4], [6, 7]]}
    assert_edits((model.eval(), ByHand(plain.eval(), model)), columns, **inputs)
