"""A process is killed: the job ends soon, with an error, and training goes on from the last whole checkpoint."""

import json
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from launch import end_with_children, start
from launch import train as train_distributed

from peft_reft import last_whole_checkpoint

pytestmark = pytest.mark.slow

DIE = Path(__file__).with_name("die.py")
SETTINGS = {"save_strategy": "steps", "save_steps": 2}
SHARDED = {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}

# What is killed when, and the step of the last whole checkpoint; checkpoints are those of steps 2, 4 and 6
FAULTS = {
    "ddp": {
        "in a step": ({"rank": 1, "step": 5}, 4),
        "in the first process's step": ({"rank": 0, "step": 4}, 2),
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


def kill_in(config, folder, run, fault):
    """Train until a process is killed; returns what the launcher returned, and the seconds until it did."""
    folder.mkdir()
    (folder / "runs.json").write_text(json.dumps([run]))
    process = start(config, DIE, folder, json.dumps(fault), log=folder / "log.txt")
    try:
        returncode = process.wait(timeout=120)
    except subprocess.TimeoutExpired:
        returncode = None
    ended = time.time()
    left = [p for p in psutil.process_iter(["cmdline"]) if str(folder) in (p.info["cmdline"] or [])]
    end_with_children(process)
    assert (folder / "died").exists(), (folder / "log.txt").read_text()[-3000:]
    assert not left
    return returncode, ended - float((folder / "died").read_text())


@pytest.mark.parametrize("config", FAULTS)
def test_killed(tmp_path, rows, describe, assert_same, config, subtests):
    more = {"environment": SHARDED if config == "fsdp2" else {}, "reft": {"dropout": 0.1}}
    settings = SETTINGS | {"gradient_checkpointing": config == "ddp"}
    runs = [describe("uninterrupted", rows, more, **settings)]
    for name, (fault, last) in FAULTS[config].items():
        returncode, seconds = kill_in(config, tmp_path / name, describe("run", rows, more, **settings), fault)
        with subtests.test(f"{name}: ends with an error within a minute"):
            assert returncode not in (0, None) and seconds < 60
        checkpoints = tmp_path / name / "run" / "checkpoints"
        with subtests.test(f"{name}: the last whole checkpoint is found"):
            assert last_whole_checkpoint(checkpoints) == str(checkpoints / f"checkpoint-{last}")
        resume = {"resume": str(checkpoints / f"checkpoint-{last}")}
        runs.append(describe(f"{name}, resumed", rows, more | resume, **settings))
    outcomes = train_distributed(config, tmp_path / "resumed", runs)
    expected = tmp_path / "resumed" / "uninterrupted", outcomes["uninterrupted"][0]
    for run in runs[1:]:
        with subtests.test(run["name"]):
            assert_same(tmp_path / "resumed" / run["name"], outcomes[run["name"]], expected, resumed=True)
