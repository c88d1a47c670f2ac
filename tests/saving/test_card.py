import re

import pytest
import torch
from by_hand import make_llama
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForSequenceClassification, LlamaForCausalLM, PreTrainedTokenizerFast

from peft_reft import ReftConfig
from peft_reft.saving.card import HEADING, add_usage_section


def make_classifier():
    sizes = dict(num_hidden_layers=2, hidden_size=32, intermediate_size=64, num_attention_heads=4, vocab_size=64)
    return AutoModelForSequenceClassification.from_config(AutoConfig.for_model("bert", **sizes))


def save_base(base, folder):
    """Save a model and a tokenizer, and load the model from there."""
    base.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1}, unk_token="<unk>"))
    names = ["input_ids", "attention_mask"]
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", model_input_names=names).save_pretrained(folder)
    return type(base).from_pretrained(folder)


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "SEQ_CLS"])
def test_saved_card(tmp_path, task_type, capsys):
    base = save_base(make_llama() if task_type == "CAUSAL_LM" else make_classifier(), tmp_path / "base")
    model = get_peft_model(base, ReftConfig(task_type=task_type))
    for _ in range(2):  # a second time changes nothing
        model.save_pretrained(tmp_path / "adapter")
        card = ModelCard.load(tmp_path / "adapter" / "README.md")
        assert card.data.library_name == "peft" and card.data.base_model == str(tmp_path / "base")
        assert "reft" in card.data.tags and "transformers" in card.data.tags
        assert card.text.count("pip install peft_reft") == card.text.count(HEADING) == 1
        assert re.findall("^##? .*", card.text, re.MULTILINE)[1:3] == [HEADING, "## Model Details"]
    snippet = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]  # the first one, which readers paste
    exec(snippet.replace("path or id of this repository", str(tmp_path / "adapter")), names := {})
    assert isinstance(names["model"], PeftModel)
    if task_type == "CAUSAL_LM":
        assert names["tokens"].shape == (1, names["inputs"]["input_ids"].shape[1] + 64)
        assert capsys.readouterr().out.strip()
    else:
        assert names["outputs"].logits.shape == (1, 2)


@pytest.mark.parametrize(
    ("text", "headings"),
    [("# T\n\nIntro.\n\n## Quick start\n\nx\n", ["# T", HEADING, "## Quick start"]), ("x\n", [HEADING])],
)
def test_card_of_another_tool(tmp_path, text, headings):
    """The section comes before the sections that are there, or at the end of a card without any."""
    (tmp_path / "README.md").write_text(f"---\nlibrary_name: peft\n---\n\n{text}")
    add_usage_section(tmp_path, ReftConfig(base_model_name_or_path="user/base"))
    card = ModelCard.load(tmp_path / "README.md")
    assert re.findall("^##? .*", card.text, re.MULTILINE) == headings
    assert all(line in card.text for line in text.splitlines())
    assert 'AutoPeftModel.from_pretrained("path' in card.text and 'from_pretrained("user/base")' in card.text


def test_card_of_an_adapter_on_lora(tmp_path, ids):
    """Its lines load both, in the order that works."""
    save_base(make_llama(), tmp_path / "base")
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    lora = get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "base"), config)
    model = get_peft_model(lora, ReftConfig(task_type="CAUSAL_LM", init_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    text = ModelCard.load(tmp_path / "adapter" / "README.md").text
    snippet = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    exec(snippet.replace("path or id of this repository", str(tmp_path / "adapter")), names := {})
    assert torch.equal(names["model"](input_ids=ids).logits, model(input_ids=ids).logits)
    assert "peft_reft" not in ModelCard.load(tmp_path / "adapter" / "lora-default" / "README.md").text


def test_folder_without_card(tmp_path):
    add_usage_section(tmp_path, ReftConfig())
    assert not list(tmp_path.iterdir())


def test_cards_of_other_methods_stay_as_they_are(tmp_path):
    get_peft_model(make_llama(), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert "peft_reft" not in card.text and "reft" not in card.data.tags
