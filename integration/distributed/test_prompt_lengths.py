"""Processes of which one has rows with one answer, whose lengths are in the batch, and the other rows with several.

Each finds its prompts in its own way, and both must gather the units of FSDP in step.
"""

import random

import pytest
from launch import train as train_distributed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rows():
    """Of the same length, as one process must have them to read for all; in turn with one answer and with two."""
    draw, rows = random.Random(3), []
    for n in range(12):
        ids = [draw.randrange(5, 30) for _ in range(12)]
        answered = range(7, 12) if n % 2 == 0 else [5, 6, 10, 11]
        labels = [token if column in answered else -100 for column, token in enumerate(ids)]
        rows.append({"input_ids": ids, "labels": labels})
    return rows


@pytest.mark.parametrize("config", ["ddp", "fsdp1"])
def test_each_process_finds_its_prompts(tmp_path, rows, describe, in_one_process, assert_same, config):
    settings = {"per_device_train_batch_size": 1, "gradient_checkpointing": False, "max_steps": 3}
    runs = [describe("read by each", rows, {"environment": {}}, **settings)]
    if config == "ddp":
        runs.append(describe("read by one", rows, {"streamed": True}, **settings))
    found = train_distributed(config, tmp_path, runs)
    expected = in_one_process(runs[0], per_device_train_batch_size=2)
    for run in runs:
        assert_same(tmp_path / run["name"], found[run["name"]], expected)
