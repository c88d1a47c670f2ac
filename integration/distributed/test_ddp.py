"""DDP on two processes: the same training as in one with the same global batch."""

import pytest
from launch import train as train_distributed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(rows, describe):
    """All in one launch, one after the other."""
    more = {"eval_data": rows[:8]}
    described = [
        describe("plain", rows, more, per_device_eval_batch_size=2),
        describe("accumulated", rows, gradient_accumulation_steps=2, per_device_train_batch_size=1),
        describe("uneven", rows[:11], max_steps=5, gradient_checkpointing=False),
        describe("shuffled", rows, train_sampling_strategy="random", gradient_accumulation_steps=2, max_steps=3),
        describe("by device", rows, average_tokens_across_devices=False),
        describe("heads", rows, {"reft": {"modules_to_save": ["lm_head"]}}),
    ]
    return {run["name"]: run for run in described}


@pytest.fixture(scope="module")
def launched(tmp_path_factory, runs):
    folder = tmp_path_factory.mktemp("ddp")
    return folder, train_distributed("ddp", folder, list(runs.values()))


@pytest.mark.parametrize(
    "name, settings",
    [
        ("plain", {"per_device_train_batch_size": 4}),
        ("accumulated", {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}),
        ("shuffled", {"per_device_train_batch_size": 4}),
        ("heads", {"per_device_train_batch_size": 4}),
    ],
)
def test_same_as_one_process(launched, runs, in_one_process, assert_same, name, settings):
    folder, outcomes = launched
    assert {rank["wrapped"] for rank in outcomes[name]} == {"DistributedDataParallel"}
    assert_same(folder / name, outcomes[name], in_one_process(runs[name], **settings))
