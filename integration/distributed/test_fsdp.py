"""FSDP on two processes: the same training as in one, and the same whole adapter, however the base is sharded."""

import functools

import pytest
import torch
from launch import NF4
from launch import train as train_distributed
from safetensors.torch import load_file
from trainers import assert_equal_tensors

pytestmark = pytest.mark.slow

# In place of what the files of examples/accelerate_configs/ set
SHARDED = {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
KEPT = {"FSDP_ACTIVATION_CHECKPOINTING": "false"}
OFFLOADED = {"FSDP_OFFLOAD_PARAMS": "true"}
MIXED = {"ACCELERATE_MIXED_PRECISION": "bf16"}

FEW = {"max_steps": 2}
NORM = {"reft": {"modules_to_save": ["norm"]}}
PAPER = {"reft": {"standardize": False}}  # the scale is that of the first rows, which accumulation makes fewer

# FSDP1 needs an accelerator to offload: without one it adds up the gradients of all steps, LoRA's too. And it ends in
# the middle of saving what is in modules_to_save.
ONLY_FSDP2 = ("offloaded", "norm")


def describe_all(describe, rows, folder, version):
    """The runs of a launch. R, W and b of rank 3 make uneven shards."""
    saving = {"save_strategy": "steps", "save_steps": 3}
    accumulated = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}

    def run(name, more=None, environment=None, **settings):
        settings = {"gradient_checkpointing": False} | settings
        return describe(name, rows, {"environment": environment or {}, "directly": True} | (more or {}), **settings)

    def resumed(name, more=None, environment=None, **settings):
        checkpoint = folder / name / "checkpoints" / "checkpoint-3"
        return run(f"{name}, resumed", {"resume": str(checkpoint)} | (more or {}), environment, **settings)

    runs = [
        run("whole", {"eval_data": rows[:8]}, per_device_eval_batch_size=2, **saving),
        resumed("whole", {"eval_data": rows[:8]}, per_device_eval_batch_size=2, **saving),
        run("sharded", {"reft": {"r": 3}}, SHARDED | KEPT, **saving),
        resumed("sharded", {"reft": {"r": 3}}, SHARDED | KEPT, **saving),
        run("checkpointed by the trainer", PAPER, KEPT, gradient_checkpointing=True, **accumulated),
        run("nf4", {"quantized": NF4}),
        run("bfloat16", {"dtype": "bfloat16"}, **FEW),
        run("mixed precision", None, MIXED, bf16=True, **FEW),
        run("offloaded", None, OFFLOADED | KEPT),
        run("norm", NORM, KEPT, **saving),  # under activation checkpointing PEFT does not find it
        resumed("norm", NORM, KEPT, **saving),
    ]
    return [run for run in runs if version == 2 or not run["name"].startswith(ONLY_FSDP2)]


@pytest.fixture(scope="module")
def launched(tmp_path_factory, rows, describe):
    """Gives the folder, the runs and what came of them: all of a version in one launch, one after the other."""

    @functools.cache
    def launch(version):
        config = f"fsdp{version}"
        folder = tmp_path_factory.mktemp(config)
        runs = describe_all(describe, rows, folder, version)
        outcomes = train_distributed(config, folder, runs, new=version == 1)  # test_faults.py has one of fsdp2.yaml
        wrapper = {1: "FullyShardedDataParallel", 2: "FSDPPeftModelForCausalLM"}[version]
        assert {rank["wrapped"] for ranks in outcomes.values() for rank in ranks} == {wrapper}
        return folder, {run["name"]: run for run in runs}, outcomes

    return launch


@pytest.fixture(scope="module")
def alone(launched, in_one_process):
    """Gives the same training in one process, with the same batches: it is one for both versions."""

    @functools.cache
    def train(name):
        _, runs, _ = launched(2)
        return in_one_process(runs[name], per_device_train_batch_size=4, gradient_accumulation_steps=1)

    return train


def of_each_version(*names):
    cases = [(version, name) for version in (2, 1) for name in names if version == 2 or name not in ONLY_FSDP2]
    return pytest.mark.parametrize("version, name", cases)


@of_each_version("whole", "sharded", "checkpointed by the trainer", "nf4", *ONLY_FSDP2)
def test_same_as_one_process(launched, alone, assert_same, version, name):
    """In float32: losses, gradients and the adapter that is saved."""
    folder, _, outcomes = launched(version)
    assert_same(folder / name, outcomes[name], alone(name))


@of_each_version("whole", "sharded", "norm")
def test_resumed_as_if_uninterrupted(launched, assert_same, version, name):
    folder, runs, outcomes = launched(version)
    resumed = f"{name}, resumed"
    assert_same(folder / resumed, outcomes[resumed], (folder / name, outcomes[name][0]), atol=1e-6, resumed=True)


@of_each_version("bfloat16", "mixed precision")
def test_bfloat16_as_in_one_process(launched, alone, version, name):
    """To its precision; the adapter stays in float32."""
    folder, _, outcomes = launched(version)
    other, expected = alone(name)
    for rank in outcomes[name]:
        assert rank["losses"] == pytest.approx(expected["losses"], rel=1e-2)
        assert rank["grad_norms"] == pytest.approx(expected["grad_norms"], rel=5e-2)
    found, same = (load_file(f / "adapter/adapter_model.safetensors") for f in (folder / name, other))
    assert {tensor.dtype for tensor in found.values()} == {torch.float32, torch.int8}
    assert found.keys() == same.keys()


@pytest.mark.parametrize("version", [2, 1])
def test_save_pretrained_saves_the_whole_adapter_or_refuses(launched, version):
    """With a gathered state dict; without one, called by all processes, never a part or a shard of the adapter."""
    folder, runs, outcomes = launched(version)
    for name, run in runs.items():
        refused = [rank for rank in outcomes[name] if "refused" in rank]
        directly = folder / name / "directly/adapter_model.safetensors"
        saved = load_file(folder / name / "adapter" / directly.name)
        assert_equal_tensors(load_file(folder / name / "gathered" / directly.name), saved, atol=0)
        assert bool(refused) == ("modules_to_save" in run.get("reft", {})) != directly.exists(), name
        if not refused:
            assert_equal_tensors(load_file(directly), saved, atol=0)
