"""The example scripts run as they stand, in processes of their own, on a tiny model."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import forks
import pytest
import torch
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.slow


ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def run_anew(folder, script, *options):
    """Run a script in a new interpreter, as a user does."""
    command = [sys.executable, str(EXAMPLES / script), *map(str, options)]
    process = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    return process.stdout + process.stderr


def run(folder, script, *options):
    """Run a script in a process of its own that has imported TRL."""
    process = forks.run([EXAMPLES / script, *options], cwd=folder, env=ENVIRONMENT)
    assert process.returncode == 0, process.stdout[-6000:]
    return process.stdout


def run_here(folder, script, *options, monkeypatch):
    """Run a script in this process, which has imported all that takes a new one ten seconds."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [script, *map(str, options)])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


COMMON = ["--dtype", "float32", "--max_steps", 2, "--report_to", "none"]
REFT = ["--reft_r", 2, "--reft_positions", "f1+l2", "--reft_share_weights", "--reft_layers_to_transform", 0, -1]


def saved_config(folder):
    assert (folder / "adapter_model.safetensors").exists()
    config = json.loads((folder / "adapter_config.json").read_text())
    return {name: config[name] for name in ("r", "positions", "share_weights", "layers_to_transform")}


EXPECTED_CONFIG = {"r": 2, "positions": "f1+l2", "share_weights": True, "layers_to_transform": [0, -1]}


def test_sft(tmp_path, base, chats, pairs, monkeypatch):
    pairs.to_json(tmp_path / "pairs.jsonl")
    common = ["--model_name_or_path", base, *COMMON, "--per_device_train_batch_size", 2]
    output = run_anew(tmp_path, "sft.py", *common, *REFT, "--dataset_name", "pairs.jsonl", "--output_dir", "out")
    assert "trainable params: 260 ||" in output  # two layers, one unit of 2 * 2 * 32 + 2
    assert saved_config(tmp_path / "out") == EXPECTED_CONFIG
    chats.to_json(tmp_path / "chats.jsonl")
    options = ["--dataset_name", "chats.jsonl", "--assistant_only_loss", "--output_dir", "chat", "--use_cpu"]
    run_here(tmp_path, "sft.py", *common, *options, monkeypatch=monkeypatch)
    assert (tmp_path / "chat" / "adapter_model.safetensors").exists()


def test_sft_that_was_interrupted(tmp_path, base, pairs, monkeypatch):
    """A half-written checkpoint is left out, and the run ends where one ends that was not interrupted."""
    pairs.to_json(tmp_path / "pairs.jsonl")
    options = ["--model_name_or_path", base, *COMMON, *REFT, "--per_device_train_batch_size", 2, "--max_steps", 6]
    options += ["--dataset_name", "pairs.jsonl", "--save_steps", 2, "--reft_dropout", 0.1, "--learning_rate", 0.02]
    options += ["--output_dir", "out", "--resume_from_checkpoint", "true"]
    options += ["--use_cpu"]
    run_here(tmp_path, "sft.py", *options, monkeypatch=monkeypatch)  # which begins at the beginning
    uninterrupted = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name in ("adapter_model.safetensors", "checkpoint-6/trainer_state.json", "checkpoint-6/rng_state.pth"):
        (tmp_path / "out" / name).unlink()
    output = run(tmp_path, "sft.py", *options)
    assert "checkpoint-6 is not whole and is left out" in output
    resumed = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert resumed.keys() == uninterrupted.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in uninterrupted.items())
    state = json.loads((tmp_path / "out" / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["global_step"] == 6


@pytest.mark.parametrize("script", ["sft.py", "dpo.py", "grpo.py"])
def test_arguments_of_lora_and_help(tmp_path, script, monkeypatch, capsys):
    """`tests/test_arguments.py` has more of the parser that the scripts share."""
    with pytest.raises(SystemExit, match="2"):
        run_here(tmp_path, script, "--use_peft", "--lora_r", "8", monkeypatch=monkeypatch)
    assert "--use_peft, --lora_r: arguments of LoRA" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        run_here(tmp_path, script, "--help", monkeypatch=monkeypatch)
    text = capsys.readouterr().out
    assert "--reft_intervention" in "".join(text.splitlines()[:12]) and len(text.splitlines()) < 150


def test_dpo(tmp_path, base, pairs):
    rows = pairs.map(lambda row: {"chosen": row["completion"], "rejected": " red dog"}, remove_columns="completion")
    rows.to_json(tmp_path / "preferences.jsonl")
    common = ["--model_name_or_path", base, *COMMON, *REFT, "--per_device_train_batch_size", 2]
    output = run(tmp_path, "dpo.py", *common, "--dataset_name", "preferences.jsonl", "--output_dir", "out")
    assert "trainable params: 260 ||" in output and "rewards/margins" in output
    assert saved_config(tmp_path / "out") == EXPECTED_CONFIG


def test_grpo(tmp_path, base, pairs):
    prompts = [{"prompt": [{"role": "user", "content": text}]} for text in pairs["prompt"]]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    (tmp_path / "my_rewards.py").write_text(
        "def brevity(completions, **kwargs):\n    return [-len(turns[0]['content']) for turns in completions]\n"
    )
    common = ["--model_name_or_path", base, *COMMON, *REFT, "--per_device_train_batch_size", 4, "--logging_steps", 1]
    common += ["--num_generations", 4, "--max_completion_length", 5, "--dataset_name", "prompts.jsonl"]
    rewards = ["--reward_funcs", "my_rewards.brevity", "think_format_reward"]
    output = run(tmp_path, "grpo.py", *common, *rewards, "--output_dir", "out")
    assert "trainable params: 260 ||" in output
    assert "rewards/brevity/mean" in output and "rewards/think_format_reward/mean" in output
    assert saved_config(tmp_path / "out") == EXPECTED_CONFIG


def test_demo(tmp_path, base):
    pytest.importorskip("matplotlib", reason="needs the extra `demo`")
    pytest.importorskip("rich", reason="needs the extra `demo`")
    output = run(tmp_path, "demo/demo.py", "--model", base, "--steps", 2)
    assert "reloaded answers equal: True" in output
    folder = tmp_path / "reft-demo"
    assert {"adapter", "loss.png", "report.json"} <= {path.name for path in folder.iterdir()}
    report = json.loads((folder / "report.json").read_text())
    assert report["reloaded_answers_equal"] and len(report["answers"]) == 10
    assert report["trainable_parameters"] == 3 * (2 * 4 * 32 + 4)
