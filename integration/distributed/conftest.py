"""Data whose answers differ in length, and the same trainings in one process."""

import random

import pytest
from safetensors.torch import load_file
from trainers import assert_equal_tensors


@pytest.fixture(scope="session")
def rows(pairs) -> list[dict]:
    """Prompts and answers of different lengths, so that a mean over answers is not a mean over tokens."""
    draw, words = random.Random(1), ["red", "green", "blue", "cat", "dog"]
    return [
        {"prompt": prompt, "completion": " " + " ".join(draw.choices(words, k=draw.randint(1, 8)))}
        for prompt in pairs["prompt"]
    ]


@pytest.fixture(scope="session")
def describe(base):
    """Gives a run for train.py: `settings` are those of SFTConfig."""

    def make(name, rows, more=None, **settings):
        common = {"per_device_train_batch_size": 2, "train_sampling_strategy": "sequential"}
        return {"name": name, "base": base, "data": rows, "sft": common | settings} | (more or {})

    return make


@pytest.fixture(scope="session")
def in_one_process(tmp_path_factory):
    """Train as a run says in this process, with other settings, and give the folder and what came of it."""
    from train import train

    def run(described, **settings):
        folder = tmp_path_factory.mktemp("one_process")
        return folder, train(described | {"sft": described["sft"] | settings, "environment": {}}, folder)

    return run


@pytest.fixture(scope="session")
def assert_same():
    """Compare a distributed run with one in one process: losses, norms, gradients and the saved adapter."""

    def compare(folder, ranks, expected, atol=1e-5, resumed=False):
        other, outcome = expected
        for rank in ranks:
            for name in ("losses", "grad_norms", "eval_losses"):
                assert rank[name] == pytest.approx(outcome[name], abs=atol), name
        for name in ("gradients.safetensors", "adapter/adapter_model.safetensors"):
            found, tensors = load_file(folder / name), load_file(other / name)
            if resumed:  # its first gradients are of another step
                found, tensors = ({k: v for k, v in d.items() if not k.startswith("first.")} for d in (found, tensors))
            assert_equal_tensors(found, tensors, atol=atol)
        assert (folder / "adapter/adapter_config.json").read_text() == (
            other / "adapter/adapter_config.json"
        ).read_text()

    return compare
