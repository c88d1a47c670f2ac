"""What the README and the design promise a reader runs as it stands, on a tiny model in place of the one named."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from by_hand import make_llama

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture
def folder(tmp_path, monkeypatch, tokenizer):
    """A working directory with a tiny base model in `base`."""
    make_llama().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def python_blocks():
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_every_python_block_is_run():
    assert len(python_blocks()) == 4


def test_first_snippet(folder, chats):
    """The data comes from the Hub in the README, and is given here."""
    code = python_blocks()[0].replace("Qwen/Qwen3-0.6B", "base")
    assert 'load_dataset("trl-lib/Capybara", split="train")' in code
    code = code.replace('load_dataset("trl-lib/Capybara", split="train")', "data")
    assert "assistant_only_loss=True" in code, "without it, conversations do not say where prompts end"
    options = "assistant_only_loss=True, max_steps=2, report_to='none'"  # on the device that there is
    exec(code.replace("assistant_only_loss=True", options), {"data": chats})
    assert (folder / "Qwen3-0.6B-ReFT" / "adapter_model.safetensors").exists()


def test_use_snippet(folder, capsys):
    code = python_blocks()[1].replace("Qwen/Qwen3-0.6B", "base")
    exec(code, names := {})
    assert "trainable params: 3,120 ||" in capsys.readouterr().out
    assert names["tokens"].shape[1] > names["prompts"]["input_ids"].shape[1]
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} == {
        f.name for f in Path("adapter").iterdir()
    }
    exec(python_blocks()[2], names)
    assert names["tokens"].shape[0] == 3


def test_data_collator_snippet():
    batch = {"input_ids": torch.arange(8).view(2, 4), "labels": torch.tensor([[-100, 1, 2, 3], [-100, -100, 6, 7]])}
    trainer = SimpleNamespace(data_collator=lambda features: dict(batch))
    exec(python_blocks()[3], {"trainer": trainer})
    assert trainer.data_collator([])["prompt_lengths"].tolist() == [1, 2]


def test_coverage_names_tests_that_are_there():
    """Each `file.py::test` of the table, where `::test` alone is one of the file named before it in its row."""
    root, named = README.parent, set()
    for row in (root / "docs" / "coverage.md").read_text().splitlines():
        file = ""
        for path, test in re.findall(r"`([\w/]+/\w+\.py)?(?:::(test_\w+))?`", row):
            file = path or file
            if file and (path or test):
                named.add((file, test))
    assert len(named) > 60
    for file, test in named:
        path = root / file if file.startswith(("tests/", "examples/sft")) else root / "integration" / file
        assert path.exists() and f"def {test}" in path.read_text(), f"{file}::{test}"


SECTION_7 = """
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from peft_reft import ReftConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
import torch

model, tokenizer = AutoModelForCausalLM.from_pretrained("base"), AutoTokenizer.from_pretrained("base")
config = ReftConfig(
    task_type="CAUSAL_LM",
    intervention="loreft",
    r=8,
    positions="f7+l7",
    share_weights=False,
    layers_to_transform=None,
    layers_pattern=None,
    target_modules=None,
    exclude_modules=None,
    dropout=0.0,
    act_fn=None,
    init_weights=True,
    modules_to_save=None,
    trainable_token_indices=None,
)
model = get_peft_model(model, config)
model.print_trainable_parameters()
model.save_pretrained("adapter")
base = AutoModelForCausalLM.from_pretrained("base")
model = PeftModel.from_pretrained(base, "adapter")
other = AutoPeftModelForCausalLM.from_pretrained("adapter")
third = AutoModelForCausalLM.from_pretrained("base")
third.load_adapter("adapter")
prompts = ["red one and two", "green dog"]
inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
tokens = model.generate(**inputs, max_new_tokens=4)
batch, lengths = tokenizer(["red one and two", "say blue fox twice"], return_tensors="pt"), torch.tensor([2, 3])
logits = model(**batch, prompt_lengths=lengths).logits
"""


def test_what_a_user_writes(folder):
    """Section 7 of the design, line for line."""
    exec(SECTION_7, names := {})
    assert names["logits"].shape[:2] == names["batch"]["input_ids"].shape
