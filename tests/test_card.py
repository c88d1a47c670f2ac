import re

from by_hand import make_llama
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model

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


def test_folder_without_card(tmp_path):
    describe_use(tmp_path, ReftConfig())
    assert not list(tmp_path.iterdir())


def test_cards_of_other_methods_stay_as_they_are(tmp_path):
    get_peft_model(make_llama(), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert "peft_reft" not in card.text and "reft" not in card.data.tags
