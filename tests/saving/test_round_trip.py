"""An adapter is what it was when it has been saved and loaded, by each way there is."""

import pytest
import torch
from by_hand import VOCABULARY, config, logits, make_llama
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer


@pytest.fixture
def saved(tmp_path, adapt, ids):
    """A base model and a trained-looking adapter on disk, and the logits of both together."""
    base = make_llama()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "base"), config())
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path, logits(model, ids)


def base_of(path):
    return LlamaForCausalLM.from_pretrained(path / "base")


# The paper's settings, on the meta device


def test_saved_files(saved):
    path, _ = saved
    assert {file.name for file in (path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    tensors = load_file(path / "adapter" / "adapter_model.safetensors")
    units = [
        f"base_model.model.model.layers.{i}._reft._reft_{unit}" for i in range(3) for unit in ("prefix", "suffix")
    ]
    assert tensors.keys() == {f"{unit}._{name}" for unit in units for name in ("R", "W", "b", "exponents")}
    trained = [tensor.numel() for tensor in tensors.values() if tensor.is_floating_point()]
    assert sum(trained) == 6 * (2 * 4 * 32 + 4)
    assert {tensor.dtype for key, tensor in tensors.items() if key.endswith("exponents")} == {torch.int8}


@pytest.mark.parametrize("options", [{}, dict(low_cpu_mem_usage=True), dict(adapter_name="other")])
def test_from_pretrained(saved, ids, options):
    path, expected = saved
    model = PeftModel.from_pretrained(base_of(path), path / "adapter", **options)
    assert torch.equal(logits(model, ids), expected)
    assert not any(p.requires_grad for p in model.parameters())
    trainable = PeftModel.from_pretrained(base_of(path), path / "adapter", is_trainable=True, **options)
    assert {n for n, p in trainable.named_parameters() if p.requires_grad} == {
        n for n, _ in trainable.named_parameters() if "._reft." in n
    }


def test_auto_class(saved, ids):
    path, expected = saved
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(path / "adapter"), ids), expected)


def test_pickled_weights(saved, ids):
    path, expected = saved
    model = PeftModel.from_pretrained(base_of(path), path / "adapter")
    model.save_pretrained(path / "pickled", safe_serialization=False)
    assert (path / "pickled" / "adapter_model.bin").exists()
    assert torch.equal(logits(PeftModel.from_pretrained(base_of(path), path / "pickled"), ids), expected)


def test_subfolder_and_selected_adapters(saved, ids):
    path, expected = saved
    model = PeftModel.from_pretrained(base_of(path), path / "adapter", adapter_name="first")
    model.add_adapter("second", config(r=2))
    model.add_adapter("third", config(r=3))
    model.save_pretrained(path / "several", selected_adapters=["first", "second"])
    assert {file.name for file in (path / "several").iterdir()} == {"first", "second", "README.md"}
    loaded = PeftModel.from_pretrained(base_of(path), path / "several", subfolder="first")
    assert torch.equal(logits(loaded, ids), expected)


def test_state_dict_functions(saved, ids):
    path, expected = saved
    source = PeftModel.from_pretrained(base_of(path), path / "adapter")
    tensors = get_peft_model_state_dict(source)
    target = inject_adapter_in_model(config(), base_of(path), adapter_name="renamed")
    assert not torch.equal(logits(target, ids), expected)
    target.peft_config["renamed"].inference_mode = True
    set_peft_model_state_dict(target, tensors, adapter_name="renamed")
    assert torch.equal(logits(target, ids), expected)


def test_injection_from_a_state_dict(saved, ids):
    path, expected = saved
    tensors = load_file(path / "adapter" / "adapter_model.safetensors")
    tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    model = inject_adapter_in_model(config(), base_of(path), state_dict=tensors)
    set_peft_model_state_dict(model, tensors)
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(r=5), r"is \[4, 32\], not \[5, 32\]"),
        (dict(share_weights=True), "_reft_prefix._R has no place"),
        (dict(layers_to_transform=[0, 1]), "layers.2._reft.*has no place"),
        (dict(positions="l2"), "_reft_prefix._R has no place"),
        (dict(intervention="consreft"), "_W has no place"),
    ],
)
def test_checkpoint_that_does_not_fit_its_config(saved, options, message):
    path, _ = saved
    model = get_peft_model(base_of(path), config(**options))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = load_file(path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=rf"checkpoint of adapter 'default' does not fit.*{message}.*share_weights"):
        set_peft_model_state_dict(model, tensors)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_checkpoint_with_a_missing_tensor(saved):
    path, _ = saved
    file = path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.model.model.layers.1._reft._reft_suffix._W"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="layers.1._reft._reft_suffix.default._W is missing"):
        PeftModel.from_pretrained(base_of(path), path / "adapter")


def test_saved_and_loaded_within_wrappers(saved, ids):
    """FSDP's activation checkpointing wraps the blocks, whose paths then differ from the keys of the state dict."""
    folder, expected = saved
    model = get_peft_model(LlamaForCausalLM.from_pretrained(folder / "base"), config())
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, LlamaDecoderLayer))
    assert "_checkpoint_wrapped_module" in "".join(name for name, _ in model.named_modules())
    model.load_adapter(folder / "adapter", "default")
    assert torch.equal(logits(model, ids), expected)
    model.save_pretrained(folder / "again")
    tensors, again = (load_file(folder / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    assert tensors.keys() == again.keys() and all(torch.equal(again[key], tensor) for key, tensor in tensors.items())


def test_saving_half_an_adapter_is_refused(saved):
    folder, _ = saved
    model = get_peft_model(LlamaForCausalLM.from_pretrained(folder / "base"), config())
    tensors = model.state_dict()
    lost = next(key for key in tensors if key.endswith("default._W"))
    with pytest.raises(ValueError, match="is not whole.*_W is missing.*accelerator.get_state_dict"):
        model.save_pretrained(folder / "half", state_dict={k: v for k, v in tensors.items() if k != lost})
    with pytest.raises(ValueError, match=r"_W is \[64\], not \[4, 32\]"):  # what a process has of it under FSDP1
        model.save_pretrained(folder / "half", state_dict=tensors | {lost: tensors[lost].flatten()[:64]})
    with pytest.raises(ValueError, match="is missing"):
        model.save_pretrained(folder / "half", state_dict={})
    assert not (folder / "half" / "adapter_model.safetensors").exists()


def test_transformers_load_adapter(saved, ids):
    path, expected = saved
    model = base_of(path)
    model.load_adapter(str(path / "adapter"), adapter_name="reloaded")
    assert torch.equal(logits(model, ids), expected)
    generated = model.generate(input_ids=ids, do_sample=False, max_new_tokens=4)
    wrapped = PeftModel.from_pretrained(base_of(path), path / "adapter")
    assert torch.equal(generated, wrapped.generate(input_ids=ids, do_sample=False, max_new_tokens=4))
    model.disable_adapters()
    assert torch.equal(logits(model, ids), logits(base_of(path), ids))
    model.enable_adapters()
    assert model.active_adapters() == ["reloaded"]
    model.delete_adapter("reloaded")
    assert torch.equal(logits(model, ids), logits(base_of(path), ids))


def test_transformers_add_adapter(saved, ids):
    path, _ = saved
    model = base_of(path)
    model.add_adapter(config(), adapter_name="new")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "._reft." in n
    }
    expected = logits(model, ids)
    model.save_pretrained(path / "saved")
    assert torch.equal(logits(PeftModel.from_pretrained(base_of(path), path / "saved"), ids), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(path / "saved"), ids), expected)


# Several adapters


def test_adapter_that_is_loaded_is_not_initialised(saved, ids, monkeypatch):
    path, expected = saved
    drawn, draw = [], nn.init.orthogonal_
    monkeypatch.setattr(nn.init, "orthogonal_", lambda tensor, gain=1: drawn.append(tensor) or draw(tensor, gain))
    model, state = get_peft_model(base_of(path), config()), torch.get_rng_state()
    assert len(drawn) == 6
    model.load_adapter(path / "adapter", adapter_name="loaded")
    assert len(drawn) == 6 and torch.equal(torch.get_rng_state(), state)
    model.set_adapter("loaded")
    assert torch.equal(logits(model, ids), expected)
    model.add_adapter("new", config())
    assert len(drawn) == 12


def test_interrupted_load_leaves_no_adapter(saved, monkeypatch):
    """Nor one of zeros, which what is loaded was to overwrite."""

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    path, _ = saved
    model = get_peft_model(base_of(path), config())
    monkeypatch.setattr("peft.peft_model.load_peft_weights", interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.load_adapter(path / "adapter", adapter_name="loaded")
    assert list(model.peft_config) == ["default"] and not any(".loaded." in name for name in model.state_dict())
    model.add_adapter("new", config())
    assert all(p.any() for name, p in model.named_parameters() if ".new." in name)


def test_adapter_loaded_beside_another(saved, ids):
    path, expected = saved
    model = get_peft_model(base_of(path), config(r=2))
    model.load_adapter(path / "adapter", adapter_name="loaded")
    assert not torch.equal(logits(model, ids), expected)
    model.set_adapter("loaded")
    assert torch.equal(logits(model, ids), expected)


def train_a_step(model, **inputs):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.train()
    model(**inputs).loss.backward()
    optimizer.step()
    return model.eval()


def test_modules_to_save(saved, ids):
    path, _ = saved
    model = get_peft_model(base_of(path), config(modules_to_save=["lm_head"]))
    labels = ids.clone()
    labels[:, :5] = -100
    train_a_step(model, input_ids=ids, labels=labels)
    model.save_pretrained(path / "with_head")
    loaded = PeftModel.from_pretrained(base_of(path), path / "with_head")
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    head = model.get_base_model().lm_head
    assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)
    assert not hasattr(model.unload().lm_head, "modules_to_save")


def test_trainable_token_indices(saved, ids):
    path, _ = saved
    model = get_peft_model(base_of(path), config(trainable_token_indices=[int(ids[0, 0]), 5]))
    labels = ids.clone()
    labels[:, :5] = -100
    before = model.get_input_embeddings().weight.clone()
    train_a_step(model, input_ids=ids, labels=labels)
    changed = (model.get_input_embeddings()(torch.arange(VOCABULARY)) - before).abs().amax(1) > 0
    assert changed[ids[0, 0]] and changed.sum() <= 2
    model.save_pretrained(path / "with_tokens")
    loaded = PeftModel.from_pretrained(base_of(path), path / "with_tokens")
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_resized_embeddings(saved, ids):
    path, _ = saved
    base = base_of(path)
    base.resize_token_embeddings(VOCABULARY + 3)
    model = get_peft_model(base, config())
    with pytest.warns(UserWarning, match="embedding"):
        model.save_pretrained(path / "resized")
    target = base_of(path)
    target.resize_token_embeddings(VOCABULARY + 3)
    loaded = PeftModel.from_pretrained(target, path / "resized")
    assert torch.equal(logits(loaded, ids), logits(model, ids))


# Names of adapters
