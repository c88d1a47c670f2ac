"""The example scripts run as they stand, in processes of their own, on a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.slow


def run(folder, script, *options):
    command = [sys.executable, str(EXAMPLES / script), *map(str, options)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    return process.stdout + process.stderr


def test_sft(tmp_path, base, chats, pairs):
    pairs.to_json(tmp_path / "pairs.jsonl")
    common = ["--model_name_or_path", base, "--dtype", "float32", "--max_steps", 2, "--use_cpu", "--bf16", "false"]
    common += ["--report_to", "none", "--per_device_train_batch_size", 2]
    reft = ["--reft_r", 2, "--reft_positions", "f1+l2", "--reft_share_weights", "--reft_layers", 0, -1]
    output = run(tmp_path, "sft.py", *common, *reft, "--dataset_name", "pairs.jsonl", "--output_dir", "out")
    assert "trainable params: 260 ||" in output  # two layers, one unit of 2 * 2 * 32 + 2
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert {name: config[name] for name in ("r", "positions", "share_weights", "layers_to_transform")} == {
        "r": 2,
        "positions": "f1+l2",
        "share_weights": True,
        "layers_to_transform": [0, -1],
    }
    chats.to_json(tmp_path / "chats.jsonl")
    run(tmp_path, "sft.py", *common, "--dataset_name", "chats.jsonl", "--assistant_only_loss", "--output_dir", "chat")
    assert (tmp_path / "chat" / "adapter_model.safetensors").exists()


def test_demo(tmp_path, base):
    pytest.importorskip("matplotlib", reason="needs the extra `demo`")
    pytest.importorskip("rich", reason="needs the extra `demo`")
    output = run(tmp_path, "demo/demo.py", "--model", base, "--steps", 2)
    assert "reloaded answers equal: True" in output
    folder = tmp_path / "reft-demo"
    assert {"adapter", "loss.png", "report.json"} <= {path.name for path in folder.iterdir()}
    report = json.loads((folder / "report.json").read_text())
    assert report["reloaded_answers_equal"] and len(report["answers"]) == 10
    assert report["trainable_parameters"] == len({3 * i // 9 for i in (1, 3, 5, 7)}) * (2 * 4 * 32 + 4)
