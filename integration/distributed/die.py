"""train.py with a process that is killed by SIGKILL, in mid-step or half-way through a file of a checkpoint.

    accelerate launch --config_file ... die.py folder '{"rank": 1, "step": 5}'
    accelerate launch --config_file ... die.py folder '{"rank": 0, "file": "checkpoint-4/optimizer.pt"}'

`folder`/died holds the time of its death.
"""

import io
import json
import os
import signal
import sys
import time
from pathlib import Path

import peft.peft_model
import safetensors.torch
import torch
import train
from transformers import TrainerCallback, TrainerState

from peft_reft.layer import ReftLayer

FOLDER, FAULT = Path(sys.argv[1]), json.loads(sys.argv[2])


def die(*_):
    (FOLDER / "died").write_text(str(time.time()))
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_backward(module, inputs, output) -> None:
    output.register_hook(die)


class DieInBackward(TrainerCallback):
    """Killed while the gradients of a step are computed, before the other processes have those of this one."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == FAULT["step"]:
            layer = next(module for module in model.modules() if isinstance(module, ReftLayer))
            layer.register_forward_hook(die_in_backward)


def write_half(file, contents: bytes) -> None:
    half = contents[: len(contents) // 2]
    if hasattr(file, "write"):
        file.write(half)
        file.flush()
    else:
        Path(file).write_bytes(half)
    die()


def is_the_file(file) -> bool:
    stream = getattr(file, "raw", file)  # within what torch's distributed checkpoints write to
    return str(getattr(stream, "name", stream)).endswith(FAULT["file"])


def die_while_writing() -> None:
    """Have what writes a checkpoint's files write half of the one that is named, and no more."""
    save, save_file, save_to_json = torch.save, safetensors.torch.save_file, TrainerState.save_to_json

    def save_or_die(obj, f, *args, **kwargs):
        if is_the_file(f):
            buffer = io.BytesIO()
            save(obj, buffer, *args, **kwargs)
            write_half(f, buffer.getvalue())
        save(obj, f, *args, **kwargs)

    def save_file_or_die(tensors, filename, **kwargs):
        if is_the_file(filename):
            write_half(filename, safetensors.torch.save(tensors, **kwargs))
        save_file(tensors, filename, **kwargs)

    def save_to_json_or_die(state, json_path):
        save_to_json(state, json_path)
        if is_the_file(json_path):
            write_half(json_path, Path(json_path).read_bytes())

    torch.save, peft.peft_model.safe_save_file = save_or_die, save_file_or_die
    TrainerState.save_to_json = save_to_json_or_die


if __name__ == "__main__":
    train.allow_fsdp_on_cpus()
    doomed = int(os.environ["RANK"]) == FAULT["rank"]
    if doomed and "file" in FAULT:
        die_while_writing()
    (run,) = json.loads((FOLDER / "runs.json").read_text())
    (FOLDER / run["name"]).mkdir(exist_ok=True)
    train.train(run, FOLDER / run["name"], [DieInBackward()] if doomed and "step" in FAULT else [])
