import json

import pytest
import torch
from by_hand import make_llama
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM
from transformers.integrations import PeftAdapterMixin

from peft_reft import ReftConfig
from peft_reft.upstream import complete_upstream


def test_twice_is_harmless():
    def methods():
        return PeftModel._upload_modified_files, PeftModel.load_adapter, PeftAdapterMixin.load_adapter

    before = methods()
    complete_upstream()
    assert methods() == before


@pytest.mark.parametrize(("config", "completed"), [(ReftConfig, True), (LoraConfig, False)])
def test_card_is_completed_before_the_upload(tmp_path, monkeypatch, config, completed):
    """Of ReFT adapters alone. There is no Hub here, so the upload itself fails after that."""
    model = get_peft_model(make_llama(), config(task_type="CAUSAL_LM"))
    folders = []
    monkeypatch.setattr(PeftModel, "create_or_update_model_card", lambda self, folder: folders.append(folder))
    (tmp_path / "README.md").write_text("# A card")
    with pytest.raises(Exception, match="offline|Name or service"):
        model._upload_modified_files(str(tmp_path), "user/name", {})
    assert folders == ([str(tmp_path)] if completed else [])
    assert ("pip install peft_reft" in (tmp_path / "README.md").read_text()) == completed


@pytest.mark.parametrize(
    "change",
    [
        dict(positions="l2"),
        dict(share_weights=True),
        dict(layers_to_transform=[0]),
        dict(layers_to_transform=None),
        dict(intervention="consreft"),
    ],
)
def test_checkpoint_that_does_not_fit_in_load_adapter(tmp_path, ids, change):
    make_llama().save_pretrained(tmp_path / "base")
    options = dict(task_type="CAUSAL_LM", r=2, positions="f2+l2", init_weights=False, layers_to_transform=[0, 1])
    get_peft_model(make_llama(), ReftConfig(**options)).save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with pytest.raises(ValueError, match="checkpoint of adapter 'default' does not fit its config.*share_weights"):
            model.load_adapter(str(tmp_path / "adapter"))
        assert torch.equal(model(input_ids=ids).logits, expected)
    assert not any(".reft_" in name for name in model.state_dict())


def test_adapter_that_does_not_fit_is_taken_back(tmp_path, ids):
    options = dict(task_type="CAUSAL_LM", positions="f2+l2", init_weights=False)
    get_peft_model(make_llama(), ReftConfig(r=2, **options)).save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(r=3)))
    model = get_peft_model(make_llama(), ReftConfig(r=4, **options)).eval()
    with torch.no_grad():
        expected, names = model(input_ids=ids).logits, list(model.state_dict())
        with pytest.raises(
            ValueError, match=r"adapter 'second' does not fit its config.*is \[2\], not \[3\]|\[2, 32\]"
        ):
            model.load_adapter(tmp_path, adapter_name="second")
        assert list(model.peft_config) == ["default"] and list(model.state_dict()) == names
        assert torch.equal(model(input_ids=ids).logits, expected)
