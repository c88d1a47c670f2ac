"""FSDP on two processes: the same training as in one, and the same whole adapter, however the base is sharded."""

import pytest
import torch
from launch import train as train_distributed
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

STATE_DICTS = {"whole": "FULL_STATE_DICT", "sharded": "SHARDED_STATE_DICT"}
SETTINGS = {
    "gradient_checkpointing": False,
    "save_strategy": "steps",
    "save_steps": 3,
    "per_device_eval_batch_size": 2,
}


def runs_in(folder, rows, describe, version):
    """What is run, by name, one after the other in one launch."""
    runs = []

    def add(name, environment, more=None, **settings):
        more = {"eval_data": rows[:8], "environment": environment} | (more or {})
        runs.append(describe(name, rows, more, **SETTINGS | settings))

    for name, kind in STATE_DICTS.items():
        add(name, {"FSDP_STATE_DICT_TYPE": kind}, {"save_by_hand": True})
        checkpoint = folder / name / "checkpoints" / "checkpoint-3"
        add(f"{name}, resumed", {"FSDP_STATE_DICT_TYPE": kind}, {"resume": str(checkpoint)})
    add("blocks kept", {"FSDP_ACTIVATION_CHECKPOINTING": "false"})
    add("checkpointed by the trainer", {"FSDP_ACTIVATION_CHECKPOINTING": "false"}, gradient_checkpointing=True)
    if version == "fsdp2":  # FSDP1 tells what it has offloaded by its device, which is the same here
        add("offloaded", {"FSDP_OFFLOAD_PARAMS": "true"})
    return {run["name"]: run for run in runs}


@pytest.fixture(scope="module")
def expected(rows, describe, in_one_process):
    run = describe("one", rows, {"eval_data": rows[:8]}, **SETTINGS)
    return in_one_process(run, per_device_train_batch_size=4)


@pytest.fixture(scope="module", params=["fsdp2", "fsdp1"])
def launched(request, tmp_path_factory, rows, describe):
    folder = tmp_path_factory.mktemp(request.param)
    runs = runs_in(folder, rows, describe, request.param)
    return folder, runs, train_distributed(request.param, folder, list(runs.values()))


def test_same_as_one_process(launched, expected, assert_same, subtests):
    """Losses, gradients, evaluation and the saved adapter; a resumed run has the losses of the steps before, too."""
    folder, runs, outcomes = launched
    for name, ranks in outcomes.items():
        with subtests.test(name):
            assert_same(folder / name, ranks, expected, resumed="resume" in runs[name])


@pytest.mark.parametrize("name", STATE_DICTS)
def test_saved_without_the_trainer(launched, name):
    """By `save_pretrained` on every process, as docs/distributed.md says."""
    folder, _, _ = launched
    expected = load_file(folder / name / "adapter" / "adapter_model.safetensors")
    found = load_file(folder / name / "by hand" / "adapter_model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
