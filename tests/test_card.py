import re

import torch
from by_hand import make_llama
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from peft_reft import ReftConfig
from peft_reft.card import describe_use


def test_saved_card(tmp_path):
    base = make_llama()
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, ReftConfig(task_type="CAUSAL_LM"))
    for _ in range(2):  # a second time changes nothing
        model.save_pretrained(tmp_path / "adapter")
        card = ModelCard.load(tmp_path / "adapter" / "README.md")
        assert card.data.library_name == "peft" and card.data.base_model == str(tmp_path / "base")
        assert "reft" in card.data.tags and "transformers" in card.data.tags
        assert card.text.count("pip install peft_reft") == 1
    snippet = re.search(r"```python\n(import peft_reft\n.*?)```", card.text, re.DOTALL)[1]
    exec(snippet.replace("path or id of this repository", str(tmp_path / "adapter")), names := {})
    assert isinstance(names["model"], PeftModel)


def test_card_of_an_adapter_on_lora(tmp_path, ids):
    """Its lines load both, in the order that works."""
    make_llama().save_pretrained(tmp_path / "base")
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    lora = get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "base"), config)
    model = get_peft_model(lora, ReftConfig(task_type="CAUSAL_LM", init_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    text = ModelCard.load(tmp_path / "adapter" / "README.md").text
    snippet = re.search(r"```python\n(import peft_reft\n.*?)```", text, re.DOTALL)[1]
    exec(snippet.replace("path or id of this repository", str(tmp_path / "adapter")), names := {})
    assert torch.equal(names["model"](input_ids=ids).logits, model(input_ids=ids).logits)
    assert "peft_reft" not in ModelCard.load(tmp_path / "adapter" / "lora-default" / "README.md").text


def test_folder_without_card(tmp_path):
    describe_use(tmp_path, ReftConfig())
    assert not list(tmp_path.iterdir())


def test_cards_of_other_methods_stay_as_they_are(tmp_path):
    get_peft_model(make_llama(), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert "peft_reft" not in card.text and "reft" not in card.data.tags
