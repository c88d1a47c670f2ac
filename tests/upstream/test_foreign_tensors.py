"""Tensors that an adapter does not need, in each way to load a checkpoint."""

import pytest
import torch
from by_hand import VOCABULARY, make_llama
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from peft_reft import ReftConfig

HEAD = "base_model.model.lm_head.weight"
SHARED = dict(task_type="CAUSAL_LM", r=2, positions="f2+l2", init_weights=False)


def into_new(model, folder, tensors):
    PeftModel.from_pretrained(model, folder)


def into_another(model, folder, tensors):
    model = get_peft_model(model, ReftConfig(modules_to_save=["lm_head"], **SHARED), adapter_name="first")
    model.load_adapter(folder, "second")


def into_the_same(model, folder, tensors):
    get_peft_model(model, ReftConfig(**SHARED)).load_adapter(folder, "default", is_trainable=True)


def as_state_dict(model, folder, tensors):
    set_peft_model_state_dict(get_peft_model(model, ReftConfig(**SHARED)), tensors)


def as_state_dict_of_plain_model(model, folder, tensors):
    model.add_adapter(ReftConfig(**SHARED))
    set_peft_model_state_dict(model, tensors)


def by_transformers(model, folder, tensors):
    is_safe = (folder / "adapter_model.safetensors").exists()
    model.load_adapter(str(folder), use_safetensors=None if is_safe else False)


def by_transformers_state_dict(model, folder, tensors):
    model.load_adapter(None, peft_config=ReftConfig(**SHARED), adapter_state_dict=tensors)


def on_resuming(model, folder, tensors):
    model = get_peft_model(model, ReftConfig(**SHARED))
    Trainer(model, TrainingArguments(str(folder), use_cpu=True, report_to="none"))._load_from_checkpoint(str(folder))


FOREIGN = {
    "base weight": "base_model.model.model.layers.0.mlp.up_proj.weight",
    "without prefix": "model.layers.0.mlp.up_proj.weight",
    "head": HEAD,
    "embedding": "base_model.model.model.embed_tokens.weight",
    "another adapter's module": "base_model.model.lm_head.modules_to_save.first.weight",
    "the module that another adapter replaces": "base_model.model.lm_head.original_module.weight",
    "another adapter's own": "base_model.model.model.layers.0._reft._reft_prefix.first._R",
}
WAYS = [into_new, into_another, into_the_same, as_state_dict, as_state_dict_of_plain_model]
WAYS += [by_transformers, by_transformers_state_dict, on_resuming]


@pytest.mark.parametrize("is_safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("load", WAYS)
def test_tensors_that_the_adapter_does_not_need(tmp_path, load, is_safe):
    get_peft_model(make_llama(), ReftConfig(**SHARED)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    own = load_file(file)
    file.unlink()
    for key in FOREIGN.values():
        tensors = own | {key: torch.full((2, 2) if "._" in key else make_llama().get_parameter(plain(key)).shape, 9.0)}
        if is_safe:
            save_file(tensors, file, metadata={"format": "pt"})
        else:
            torch.save(tensors, tmp_path / "adapter_model.bin")
        model = make_llama()
        parameters = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
        with pytest.raises(ValueError, match=rf"{key.removeprefix('base_model.model.')}|has no place"):
            load(model, tmp_path, tensors)
        assert all(torch.equal(p, before) for p, before in parameters.values())
        for name, tensor in model.state_dict().items():
            assert not (tensor == 9).any(), f"{key} was written to {name}"


def plain(key):
    """The name in the base model of what a key belongs to."""
    return ".".join(part for part in key.removeprefix("base_model.model.").split(".") if part not in INSERTED)


INSERTED = ("modules_to_save", "original_module", "first")


@pytest.mark.parametrize("load", [into_new, into_the_same, as_state_dict, by_transformers])
def test_embeddings_of_a_resized_vocabulary(tmp_path, load):
    """PEFT saves them with the adapter, in a model that was not resized alike they have no place."""
    make_llama().save_pretrained(tmp_path / "base")

    def resized(n=3):
        torch.manual_seed(n)  # of the new rows
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        if n:
            model.resize_token_embeddings(VOCABULARY + n)
        return model

    model = get_peft_model(resized(), ReftConfig(**SHARED))
    with torch.no_grad():
        model.get_input_embeddings().weight[-1] = 5.0
        model.get_output_embeddings().weight[-1] = 6.0
    with pytest.warns(UserWarning, match="resized"):
        model.save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert HEAD in tensors and FOREIGN["embedding"] in tensors
    loaded = resized()
    load(loaded, tmp_path / "adapter", tensors)
    assert loaded.get_input_embeddings().weight[-1].eq(5).all()
    assert loaded.get_output_embeddings().weight[-1].eq(6).all()
    with pytest.raises(ValueError, match="embed_tokens.weight.*Embeddings may be there if the vocabulary was resized"):
        load(resized(0), tmp_path / "adapter", tensors)
    more = tensors | {FOREIGN["base weight"]: torch.zeros(64, 32)}
    save_file(more, tmp_path / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="does not need: base_model.model.model.layers.0.mlp.up_proj.weight. They"):
        load(resized(), tmp_path / "adapter", more)
