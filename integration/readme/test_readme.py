"""What the README and the design promise a reader runs as it stands, on a tiny model in place of the one named."""

import re
from pathlib import Path

import pytest
import torch
from by_hand import make_llama
from peft import get_peft_model

from peft_reft import ReftConfig

README = Path(__file__).parents[2] / "README.md"
DOCS = README.parent / "docs"


@pytest.fixture
def folder(tmp_path, monkeypatch, tokenizer):
    """A working directory with a tiny base model in `base`."""
    make_llama().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    return tmp_path


PAGES = README, DOCS / "adapters.md", DOCS / "positions.md", DOCS / "lora.md"


def python_blocks(page=README):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def test_every_python_block_is_run():
    assert [len(python_blocks(page)) for page in PAGES] == [3, 1, 1, 3]


def test_first_snippet(folder, chats):
    """The data comes from the Hub in the README, and is given here."""
    code = python_blocks()[0].replace("Qwen/Qwen3-0.6B", "base")
    assert 'load_dataset("trl-lib/Capybara", split="train")' in code
    code = code.replace('load_dataset("trl-lib/Capybara", split="train")', "data")
    assert "assistant_only_loss=True" in code, "without it, conversations do not say where prompts end"
    options = "assistant_only_loss=True, max_steps=2, report_to='none'"  # on the device that there is
    exec(code.replace("assistant_only_loss=True", options), {"data": chats})
    assert (folder / "Qwen3-0.6B-ReFT" / "adapter_model.safetensors").exists()


def test_use_snippets(folder, capsys):
    """Train, then save, load, generate and push; and of docs/adapters.md, an adapter for each row."""
    training, using = python_blocks()[1:]
    exec(training.replace("Qwen/Qwen3-0.6B", "base"), names := {})
    assert "trainable params: 3,120 ||" in capsys.readouterr().out
    assert names["model"].active_peft_config.task_type == "CAUSAL_LM"
    grads = [p.grad for p in names["model"].parameters() if p.requires_grad]
    assert grads and all(grad is not None for grad in grads)
    pushing = 'model.push_to_hub("user/adapter")'
    assert pushing in using
    exec(using.replace(pushing, ""), names)
    assert names["tokens"].shape[1] > names["prompts"]["input_ids"].shape[1]
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} == {
        f.name for f in Path("adapter").iterdir()
    }
    (mixing,) = python_blocks(DOCS / "adapters.md")
    exec(mixing, names)
    assert names["tokens"].shape[0] == 3


def test_lengths_snippet():
    """Of docs/positions.md."""
    model = get_peft_model(make_llama(), ReftConfig(task_type="CAUSAL_LM", positions="l1", init_weights=False)).eval()
    names = {"model": model, "lengths": torch.tensor([2, 3]), "input_ids": torch.arange(1, 9).view(2, 4)}
    score = lambda model, input_ids: model(input_ids=input_ids).logits  # noqa: E731
    (scoring,) = python_blocks(DOCS / "positions.md")
    exec(scoring, names | {"score": score}, found := {})
    expected = model(input_ids=names["input_ids"], prompt_lengths=names["lengths"]).logits
    assert torch.equal(found["scores"], expected) and not torch.equal(score(model, names["input_ids"]), expected)


def test_lora_snippets(folder, capsys):
    """Of docs/lora.md: train and save, load, merge and load."""
    saving, loading, merging = python_blocks(DOCS / "lora.md")
    names, batch = {}, torch.tensor([[3, 4, 5, 6]])
    saving, trained = saving.replace("Qwen/Qwen3-0.6B", "base"), "# train model with any trainer"
    assert trained in saving
    step = "for p in model.parameters(): p.data.add_(0.01 * torch.randn_like(p)) if p.requires_grad else None\n"
    exec("import torch\n" + saving.replace(trained, step + trained), names)
    # a layer has LoRA of rank 8 on q (32 x 32) and v (32 x 16), and two edits of rank 4
    assert 3 * (8 * (32 + 32) + 8 * (32 + 16) + 2 * (2 * 4 * 32 + 4)) == 4248
    assert "trainable params: 4,248 ||" in capsys.readouterr().out
    for code in (loading, merging):
        exec(code.replace("Qwen/Qwen3-0.6B", "base"), loaded := dict(names))
        assert loaded["model"] is not names["model"]
        with torch.no_grad():
            expected, found = names["model"].eval()(input_ids=batch).logits, loaded["model"](input_ids=batch).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_coverage_names_tests_that_are_there():
    """Each `file.py::test` of the table, where `::test` alone is one of the file named before it in its row."""
    root, named = README.parent, set()
    for row in (DOCS / "coverage.md").read_text().splitlines():
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


def anchors(page):
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page", [README, README.parent / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))], ids=lambda p: p.name
)
def test_links_lead_somewhere(page):
    """A page can be renamed, and a heading reworded, without those who link to it seeing so."""
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        file = page if not path else page.parent / path
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target
