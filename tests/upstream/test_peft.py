import copy
import gc
import json
import pickle
import weakref

import pytest
import torch
from by_hand import make_llama
from peft import LoraConfig, PeftModel, PeftModelForCausalLM, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from peft_reft import ReftConfig


def make_reft(base=None):
    config = ReftConfig(task_type="CAUSAL_LM", r=2, positions="f2+l2", init_weights=False)
    return get_peft_model(make_llama(1) if base is None else base, config)


def make_lora():
    return get_peft_model(make_llama(1), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))


def test_methods_of_one_model():
    """A model with a ReFT adapter has methods of its own, in a class of the same name. Other models have none."""
    model = make_reft()
    assert isinstance(model, PeftModelForCausalLM) and type(model) is not PeftModelForCausalLM
    assert type(model).__name__ == "PeftModelForCausalLM" and type(model).__module__ == PeftModelForCausalLM.__module__
    assert type(model) is type(make_reft()) is type(copy.deepcopy(model)) is type(pickle.loads(pickle.dumps(model)))
    assert type(make_lora()) is PeftModelForCausalLM
    lora = make_lora()
    above = make_reft(lora)
    assert type(lora) is PeftModelForCausalLM and type(above) is type(model)
    assert above.unload() is lora and type(model.unload()) is LlamaForCausalLM


def test_copies_have_the_methods(tmp_path):
    """And write the adapters of the base model of the copy, not of the model."""
    model = make_reft(make_lora())
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for name, one in (("copied", copied), ("pickled", pickle.loads(pickle.dumps(copied)))):
        one.save_pretrained(tmp_path / name)
        saved = load_file(tmp_path / name / "lora-default" / "adapter_model.safetensors")
        assert any(tensor.any() for tensor in saved.values())


def test_model_is_freed():
    """The class of its own makes no reference cycle with what is in the model."""
    model = make_reft()
    weight = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert weight() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(("config", "is_reft"), [(ReftConfig, True), (LoraConfig, False)])
def test_card_is_written_before_the_upload(tmp_path, monkeypatch, config, is_reft):
    """Of ReFT adapters alone. There is no Hub here, so the upload itself fails after that."""
    model = get_peft_model(make_llama(), config(task_type="CAUSAL_LM"))
    folders = []
    monkeypatch.setattr(PeftModel, "create_or_update_model_card", lambda self, folder: folders.append(folder))
    (tmp_path / "README.md").write_text("# A card")
    with pytest.raises(Exception, match="offline|Name or service"):
        model._upload_modified_files(str(tmp_path), "user/name", {})
    assert folders == ([str(tmp_path)] if is_reft else [])
    assert ("pip install peft_reft" in (tmp_path / "README.md").read_text()) == is_reft


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


# Into an adapter that exists

OTHER = {
    "intervention": ("noreft", "intervention='loreft' in the model, 'noreft' in the checkpoint"),
    "positions": ("f3+l2", r"positions='f2\+l2' in the model, 'f3\+l2' in the checkpoint"),
    "act_fn": ("relu", "act_fn=None in the model, 'relu' in the checkpoint"),
    "target_modules": (["mlp"], r"target_modules=None in the model, \['mlp'\]"),
}


@pytest.mark.parametrize("field", OTHER)
@pytest.mark.parametrize("by", ["load_adapter", "from_pretrained"])
def test_checkpoint_of_another_config(tmp_path, field, by, changed):
    """Its tensors fit the adapter that is there, and would edit something else."""
    value, message = OTHER[field]
    shared = dict(task_type="CAUSAL_LM", r=2, positions="f2+l2", init_weights=False)
    get_peft_model(make_llama(), ReftConfig(**shared | {field: value})).save_pretrained(tmp_path)
    model = get_peft_model(make_llama(), ReftConfig(**shared))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"was trained with another config.*'default': {message}.*from_pretrained"):
        if by == "load_adapter":
            model.load_adapter(tmp_path, "default", is_trainable=True)
        else:
            PeftModel.from_pretrained(make_llama(), tmp_path, config=ReftConfig(**shared))
    assert not changed(model, before) and model.peft_config["default"].positions == "f2+l2"
    model.load_adapter(tmp_path, "other")
    assert getattr(model.peft_config["other"], field) == value


def test_checkpoint_of_the_same_config(tmp_path, changed):
    """Though it was written in another way, trained with dropout, and drawn otherwise."""
    shared = dict(task_type="CAUSAL_LM", positions="f2+l2")
    other = ReftConfig(r=3, rank_pattern={"layers.2": 2}, layers_to_transform=[-1, 0], dropout=0.1, **shared)
    source = get_peft_model(make_llama(), other)
    source.save_pretrained(tmp_path)
    config = ReftConfig(r=2, rank_pattern={"layers.0": 3}, layers_to_transform=[0, 2], init_weights=False, **shared)
    model = get_peft_model(make_llama(), config)
    model.load_adapter(tmp_path, "default")
    assert not changed(model, source.state_dict())


def test_checkpoint_of_another_method(tmp_path, changed):
    lora, reft = LoraConfig(target_modules=["q_proj"]), ReftConfig(r=2, positions="f2+l2")
    for there, loaded, name in ((lora, reft, "LORA"), (reft, lora, "REFT")):
        get_peft_model(make_llama(), loaded).save_pretrained(tmp_path / name)
        model = get_peft_model(make_llama(), there)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=f"another config.*peft_type=.*{name}.* in the model"):
            model.load_adapter(tmp_path / name, "default")
        assert not changed(model, before)
