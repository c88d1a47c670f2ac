"""Adapters in processes that do not import peft_reft: what the installation's entry point brings.

`tests/test_autoload.py` has the orders of imports and broken packages.
"""

import subprocess
import sys

import pytest
import torch
from by_hand import ByHand, random_ids
from installed import ROOT, WITHOUT, environment, install
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from peft_reft import ReftConfig

pytestmark = pytest.mark.slow

LOADERS = {
    "PeftModel": "from peft import PeftModel\n"
    "from transformers import AutoModelForCausalLM\n"
    "model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)",
    "AutoModel": "from transformers import AutoModelForCausalLM\n"
    "model = AutoModelForCausalLM.from_pretrained(adapter)",
    "pipeline": "from transformers import pipeline\n"
    "model = pipeline('text-generation', adapter, tokenizer=base, device='cpu').model",
    "Trainer": "from transformers import Trainer, LlamaForCausalLM\n"  # its module imports PEFT at its top
    "import peft\n"
    "model = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter)",
}


@pytest.fixture
def site(tmp_path):
    (tmp_path / "site").mkdir()
    install(tmp_path / "site")
    return tmp_path / "site"


@pytest.fixture
def adapter(base, tmp_path):
    """The folder of an adapter that edits visibly, and the model by hand."""
    torch.manual_seed(1)
    config = ReftConfig(task_type="CAUSAL_LM", r=4, positions="f2+l2", init_weights=False)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config).eval()
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", ByHand(LlamaForCausalLM.from_pretrained(base).eval(), model)


def run(site, base, adapter, code, **variables):
    return subprocess.run(
        [sys.executable, "-c", f"{WITHOUT}{base=}\nadapter={str(adapter)!r}\n{code}"],
        env=environment(site, ROOT, HF_HUB_OFFLINE="1", **variables),
        cwd=site,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("code", LOADERS.values(), ids=LOADERS)
def test_loaders(site, base, adapter, code):
    folder, by_hand = adapter
    ids = random_ids() % 24
    torch.save(ids, site / "ids")
    code += "\nimport torch\ntorch.save(model.eval()(torch.load('ids')).logits.detach(), 'logits')"
    process = run(site, base, folder, code)
    assert process.returncode == 0, process.stderr
    expected = by_hand.logits({"prefix": [[0, 1]] * 2, "suffix": [[10, 11]] * 2}, input_ids=ids)
    torch.testing.assert_close(torch.load(site / "logits"), expected)
    assert "cannot be imported" not in process.stderr


def test_switched_off(site, base, adapter):
    process = run(site, base, adapter[0], LOADERS["PeftModel"], PEFT_REFT_AUTOLOAD="0")
    assert process.returncode == 1 and "KeyError: 'REFT'" in process.stderr


def test_first_load_of_a_damaged_adapter(site, base, adapter):
    """transformers alone goes on without the tensors that are missing."""
    file = adapter[0] / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(min(tensors))
    save_file(tensors, file)
    process = run(site, base, adapter[0], LOADERS["AutoModel"])
    assert process.returncode == 1 and "does not fit its config" in process.stderr, process.stderr


def test_cost(site):
    """Less than 5 ms when torch is imported, and no module but its own."""
    code = """
import functools, importlib.metadata, sys, time, warnings
before = set(sys.modules)
[point] = importlib.metadata.Distribution.at("peft_reft-0.1.0.dist-info").entry_points.select(group="torch.backends")
start = time.process_time()
point.load()()
print(time.process_time() - start)
assert set(sys.modules) - before == {"peft_reft_autoload"}
"""
    command = [sys.executable, "-c", code]
    costs = [float(subprocess.check_output(command, env=environment(site), cwd=site)) for _ in range(20)]
    assert sorted(costs)[10] < 0.005, costs
