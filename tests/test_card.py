import pytest
from by_hand import make_llama
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model

from peft_reft import ReftConfig
from peft_reft.card import describe_use, keep_card_on_push


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
        assert card.text.count("pip install peft_reft") == 1 and "import peft_reft" in card.text


def test_folder_without_card(tmp_path):
    describe_use(tmp_path)
    assert not list(tmp_path.iterdir())


def test_cards_of_other_methods_stay_as_they_are(tmp_path):
    get_peft_model(make_llama(), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert "peft_reft" not in card.text and "reft" not in card.data.tags


def test_upload_is_wrapped_once():
    before = PeftModel._upload_modified_files
    keep_card_on_push()
    assert PeftModel._upload_modified_files is before


@pytest.mark.parametrize(("config", "completed"), [(ReftConfig, True), (LoraConfig, False)])
def test_card_is_completed_before_the_upload(tmp_path, monkeypatch, config, completed):
    """Of ReFT adapters alone. There is no Hub here, so the upload itself fails after that."""
    model = get_peft_model(make_llama(), config(task_type="CAUSAL_LM"))
    folders = []
    monkeypatch.setattr(PeftModel, "create_or_update_model_card", lambda self, folder: folders.append(folder))
    (tmp_path / "README.md").write_text("# A card")
    with pytest.raises(Exception, match="offline"):
        model._upload_modified_files(str(tmp_path), "user/name", {})
    assert folders == ([str(tmp_path)] if completed else [])
    assert ("pip install peft_reft" in (tmp_path / "README.md").read_text()) == completed
