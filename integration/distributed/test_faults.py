"""A process is killed: the job ends soon, with an error, and training goes on from the last whole checkpoint."""

import functools
import json
import time
import warnings
from pathlib import Path

import psutil
import pytest
from launch import end_with_children, start
from launch import train as train_distributed

from peft_reft import last_whole_checkpoint

pytestmark = pytest.mark.slow

DIE = Path(__file__).with_name("die.py")
# What is killed when, and the step of the last whole checkpoint; checkpoints are those of steps 2, 4 and 6
FAULTS = {
    "ddp": {
        "in a step": ({"rank": 1, "step": 5}, 4),
        "adapter": ({"rank": 0, "file": "checkpoint-4/adapter_model.safetensors"}, 2),
        "optimizer": ({"rank": 0, "file": "checkpoint-4/optimizer.pt"}, 2),
        "random numbers of another process": ({"rank": 1, "file": "checkpoint-4/rng_state_1.pth"}, 2),
        "state of the trainer": ({"rank": 0, "file": "checkpoint-6/trainer_state.json"}, 4),
    },
    "fsdp2": {
        "in a step": ({"rank": 1, "step": 5}, 4),
        "shard": ({"rank": 1, "file": "checkpoint-4/optimizer_0/__1_0.distcp"}, 2),
    },
}


SETTINGS = {"save_strategy": "steps", "save_steps": 2}
MORE = {"ddp": {"environment": {}}, "fsdp2": {"environment": {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}}}


@pytest.fixture(scope="module")
def make_run(rows, describe):
    """Gives a run whose losses show whether random numbers (dropout) go on as they were."""

    def make(config, name, **more):
        more = {"reft": {"dropout": 0.1}} | MORE[config] | more
        return describe(name, rows, more, gradient_checkpointing=config == "ddp", **SETTINGS)

    return make


def those_that_write_to(log):
    """The launcher and what it has started: they have no other name in common, if they are forks."""
    processes = psutil.process_iter(["open_files"])
    return [p for p in processes if any(file.path == str(log) for file in p.info["open_files"] or [])]


@pytest.fixture(scope="module")
def killed(tmp_path_factory, make_run):
    """Gives the folder of a training that was killed, its return code, how long it took to end, and what it left."""

    @functools.cache
    def kill(config, name):
        folder, (fault, _) = tmp_path_factory.mktemp(config), FAULTS[config][name]
        (folder / "runs.json").write_text(json.dumps([make_run(config, "run")]))
        log = folder / "log.txt"
        new = (config, name) == ("fsdp2", "in a step")  # to see how new interpreters end
        process = start(config, DIE, folder, json.dumps(fault), new=new, log=log)
        assert process.pid in [p.pid for p in those_that_write_to(log)]
        try:
            returncode = process.wait(timeout=300)  # a hang; starting alone may take long on a busy machine
            seconds = time.time() - float((folder / "died").read_text())
            left = psutil.wait_procs(those_that_write_to(log), timeout=10)[1]
        finally:
            end_with_children(process)
        return folder, returncode, seconds, left

    return kill


@pytest.mark.parametrize(("config", "name"), [(config, name) for config in FAULTS for name in FAULTS[config]])
def test_job_ends_with_an_error(killed, config, name):
    """Within a minute, and no process is left; the checkpoint that was being written is not taken for a whole one."""
    (folder, returncode, seconds, left), (fault, last) = killed(config, name), FAULTS[config][name]
    assert returncode != 0 and seconds < 60 and not left
    checkpoints = folder / "run" / "checkpoints"
    with warnings.catch_warnings(record=True) as caught:
        assert last_whole_checkpoint(checkpoints) == str(checkpoints / f"checkpoint-{last}")
    assert any("is not whole" in str(warning.message) for warning in caught) == ("file" in fault)


@pytest.mark.parametrize("config", FAULTS)
def test_resumed_as_if_nothing_had_happened(tmp_path, killed, make_run, assert_same, config, subtests):
    runs = [make_run(config, "uninterrupted")]
    for name in FAULTS[config]:
        folder, *_ = killed(config, name)
        runs.append(make_run(config, name, resume=last_whole_checkpoint(folder / "run" / "checkpoints")))
    outcomes = train_distributed(config, tmp_path, runs)
    expected = tmp_path / "uninterrupted", outcomes["uninterrupted"][0]
    for run in runs[1:]:
        with subtests.test(run["name"]):
            assert_same(tmp_path / run["name"], outcomes[run["name"]], expected, resumed=True)
