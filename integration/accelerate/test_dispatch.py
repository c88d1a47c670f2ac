"""Models whose parts accelerate places: on the CPU, offloaded to it from an executing device, or on disk."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from by_hand import GREEDY, MASK, ByHand, labels_of, make_llama
from peft import PeftModel, get_peft_model
from trainers import assert_equal_tensors, gradients, losses, make_trainer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from peft_reft import ReftConfig, layer
from peft_reft.edits.apply import edit_rows

COLUMNS = {"prefix": [[0, 1], [4, 5]], "suffix": [[10, 11], [10, 11]]}
PLACES = {"": "cpu"}
SPREAD = {  # a part of the blocks with their adapters on disk
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "cpu",
    "model.layers.2": "disk",
    "model.norm": "cpu",
    "lm_head": "disk",
}


def config(**options):
    return ReftConfig(**{"task_type": "CAUSAL_LM", "r": 4, "positions": "f2+l2", "init_weights": False} | options)


def place(model, how, folder):
    if how == "one device":
        return dispatch_model(model, device_map=PLACES, force_hooks=True)
    if how == "spread":
        return dispatch_model(model, device_map=SPREAD, main_device="cpu", offload_dir=folder, force_hooks=True)
    if how == "offloaded to the CPU":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, folder, execution_device=torch.device("cpu"))
    return model


WAYS = ["one device", "spread", "offloaded to the CPU", "offloaded to disk"]


def assert_edited(model, by_hand, ids):
    expected = by_hand.logits(COLUMNS, input_ids=ids, attention_mask=MASK)
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=MASK).logits
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1, 4:], expected[1, 4:], atol=1e-5, rtol=1e-5)
    tokens = model.generate(ids, attention_mask=MASK, **GREEDY)
    assert torch.equal(tokens, by_hand.generate(COLUMNS, ids, MASK))


@pytest.mark.parametrize("how", WAYS)
def test_placed_after_the_adapter_was_added(ids, tmp_path, how):
    base = make_llama()
    model = get_peft_model(copy.deepcopy(base), config()).eval()
    by_hand = ByHand(base, copy.deepcopy(model))
    place(model.get_base_model(), how, str(tmp_path))
    adapter = model.get_base_model().model.layers[0]._reft._reft_prefix["default"].R
    assert adapter.is_meta == (how != "one device")  # offloaded, like the block that it belongs to
    assert_edited(model, by_hand, ids)

    second = get_peft_model(copy.deepcopy(base), config()).eval()
    second.save_pretrained(tmp_path / "second")
    model.load_adapter(tmp_path / "second", "second")
    model.set_adapter("second")
    assert_edited(model, ByHand(base, second), ids)


@pytest.mark.parametrize("how", WAYS)
def test_adapter_added_to_a_placed_model(ids, tmp_path, how):
    """The adapter lies where its block executes, and is trained there."""
    base = make_llama()
    placed = place(copy.deepcopy(base), how, str(tmp_path))
    model = get_peft_model(placed, config()).eval()
    assert not any(p.is_meta for p in model.parameters() if p.requires_grad)
    by_hand = ByHand(base, model)
    assert_edited(model, by_hand, ids)
    labels = labels_of(ids, [(5, 12)], [(8, 12)])
    model.train()(input_ids=ids, attention_mask=MASK, labels=labels).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    plain = get_peft_model(copy.deepcopy(base), config())
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(model.get_parameter(name))
    plain.train()(input_ids=ids, attention_mask=MASK, labels=labels).loss.backward()
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(found[name], parameter.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("by", ["PeftModel", "load_adapter"])
def test_adapter_loaded_into_a_model_on_disk(ids, tmp_path, by):
    """Upstream would leave its tensors at what they were drawn as; what the error says works."""
    base = make_llama()
    base.save_pretrained(tmp_path / "base")
    saved = get_peft_model(copy.deepcopy(base), config()).eval()
    saved.save_pretrained(tmp_path / "adapter")
    folders = dict(offload_folder=str(tmp_path / "offloaded"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map=SPREAD, **folders).eval()
    assert model.model.layers[0].mlp.up_proj.weight.is_meta
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    with pytest.raises(ValueError, match="offloaded to disk.*accelerate.dispatch_model"):
        if by == "PeftModel":
            places = {f"base_model.model.{name}": place for name, place in SPREAD.items()}
            PeftModel.from_pretrained(model, tmp_path / "adapter", device_map=places, **folders)
        else:
            model.load_adapter(str(tmp_path / "adapter"))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected)  # PEFT has taken accelerate's hooks away

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = PeftModel.from_pretrained(model, tmp_path / "adapter")
    place(model.get_base_model(), "spread", str(tmp_path / "placed"))
    assert_edited(model.eval(), ByHand(base, saved), ids)


@pytest.mark.parametrize("by", ["PeftModel", "load_adapter"])
def test_adapter_loaded_into_a_placed_model(ids, tmp_path, by):
    base = make_llama()
    base.save_pretrained(tmp_path / "base")
    saved = get_peft_model(copy.deepcopy(base), config()).eval()
    saved.save_pretrained(tmp_path / "adapter")
    places = dict.fromkeys(SPREAD, "cpu")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map=places).eval()
    if by == "PeftModel":
        model = PeftModel.from_pretrained(model, tmp_path / "adapter", device_map=PLACES)
    else:
        model.load_adapter(str(tmp_path / "adapter"))
    assert_edited(model.eval(), ByHand(base, saved), ids)


# Several devices in one model


def test_each_block_is_edited_where_it_runs(ids, monkeypatch):
    """The last blocks are on the meta device, for which adapters and indices on the CPU would not do."""
    base, found = make_llama(), {}
    for module in (*base.model.layers[1:], base.model.norm, base.lm_head):
        add_hook_to_module(module.to("meta"), AlignDevicesHook(execution_device="meta"))
    model = get_peft_model(base, config()).train()

    def record(hidden_states, units, rows):
        tensors = [p for unit in rows.units for p in units[unit].parameters()] + [*(rows.indices or ()), rows.mask]
        found.setdefault(hidden_states.device.type, []).append((rows.units, tensors))
        return edit_rows(hidden_states, units, rows)

    monkeypatch.setattr(layer, "edit_rows", record)
    labels = labels_of(ids, [(5, 12)], [(8, 12)])
    for inputs in (dict(labels=labels), dict(prompt_lengths=torch.tensor([5, 4])), dict(position_ids=None)):
        found.clear()
        model.train("labels" in inputs)(input_ids=ids.clone(), attention_mask=MASK, **inputs)
        edited = {device: sorted(unit for units, _ in edits for unit in units) for device, edits in found.items()}
        assert edited == {"cpu": ["prefix", "suffix"], "meta": ["prefix"] * 2 + ["suffix"] * 2}
        for device, edits in found.items():
            assert {tensor.device.type for _, edit in edits for tensor in edit if tensor is not None} == {device}


@pytest.mark.skipif(torch.accelerator.device_count() < 2, reason="needs two accelerators")
def test_blocks_on_two_accelerators(ids, tmp_path):
    base = make_llama()
    base.save_pretrained(tmp_path)
    places = dict.fromkeys(SPREAD, 0) | {"model.layers.1": 1, "model.layers.2": 1, "model.norm": 1, "lm_head": 1}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places), config()).eval()
    plain = get_peft_model(base, config()).eval()
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(model.get_parameter(name))
    inputs = dict(input_ids=ids, attention_mask=MASK)
    expected = ByHand(make_llama(), plain).logits(COLUMNS, **inputs)
    found = model(**{name: tensor.to(0) for name, tensor in inputs.items()}).logits.cpu()
    torch.testing.assert_close(found[1, 4:], expected[1, 4:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[0], expected[0], atol=1e-4, rtol=1e-4)
    inputs["labels"] = labels_of(ids, [(5, 12)], [(8, 12)])
    for trained, device in ((model, 0), (plain, "cpu")):
        trained.train()(**{name: tensor.to(device) for name, tensor in inputs.items()}).loss.backward()
    found = {name: gradient.cpu() for name, gradient in gradients(model).items()}
    assert_equal_tensors(found, gradients(plain), atol=1e-4)


# Models that transformers places: what does not fit into memory lies on disk

PLACED = {
    "auto": dict(device_map="auto", max_memory={"cpu": 90_000}),  # of 127,872 bytes: two blocks and the head on disk
    "some blocks on disk": dict(device_map=SPREAD | {"lm_head": "cpu"}),
    "one device": dict(device_map={"": "cpu"}),
    "to be quantized, but that is left to GPUs": dict(
        device_map=SPREAD | {"lm_head": "cpu"},
        quantization_config=BitsAndBytesConfig(load_in_8bit=True, llm_int8_enable_fp32_cpu_offload=True),
    ),
}


@pytest.fixture
def load(base, tmp_path):
    """Loads the base, placed as PLACED says, or not at all."""

    def load(how=None):
        folders = dict(offload_folder=str(tmp_path / "offloaded")) if how else {}
        model = AutoModelForCausalLM.from_pretrained(base, dtype="float32", **PLACED.get(how, {}), **folders)
        assert ("disk" in getattr(model, "hf_device_map", {}).values()) == (how not in (None, "one device"))
        return model

    return load


def assert_same_adapter(folder, other):
    """Byte for byte: dtypes, keys, values."""
    names = ("adapter_model.safetensors", "adapter_config.json")
    assert all((folder / name).read_bytes() == (other / name).read_bytes() for name in names)


@pytest.mark.parametrize("how", PLACED)
def test_trained_in_a_loop_as_if_not_placed(ids, load, tmp_path, how):
    def train(how):
        torch.manual_seed(1)
        model = get_peft_model(load(how), config(dropout=0.1)).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        labels, found = labels_of(ids, [(5, 12)], [(8, 12)]), []
        for _ in range(3):
            loss = model(input_ids=ids, attention_mask=MASK, labels=labels).loss
            loss.backward()
            found.append({"loss": loss.detach()} | gradients(model))
            optimizer.step()
        model.save_pretrained(tmp_path / str(how))
        return found

    for found, expected in zip(train(how), train(None), strict=True):
        assert_equal_tensors(found, expected)
    assert_same_adapter(tmp_path / how, tmp_path / "None")


@pytest.mark.parametrize("how", ["some blocks on disk", "one device"])
def test_trained_by_sft_as_if_not_placed(load, pairs, tokenizer, tmp_path, how):
    """Losses and what is saved, resumed, too. TRL's loss reads the head's weight, which must not be on disk."""

    def train(how, name, resume=None):
        torch.manual_seed(1)
        options = dict(max_steps=4, save_strategy="steps", save_steps=2)
        trainer = make_trainer(load(how), tmp_path / name, pairs, tokenizer, peft_config=config(), **options)
        places = getattr(trainer.model, "hf_device_map", None)
        trainer.train(resume_from_checkpoint=resume and str(resume))
        trainer.save_model(str(tmp_path / name))
        assert getattr(trainer.model, "hf_device_map", None) == places  # not placed anew when resumed
        return losses(trainer)

    expected = train(None, "whole")
    assert train(how, "placed") == pytest.approx(expected, abs=1e-5)
    assert_same_adapter(tmp_path / "placed", tmp_path / "whole")
    assert train(how, "resumed", tmp_path / "placed" / "checkpoint-2") == pytest.approx(expected, abs=1e-5)
    assert_same_adapter(tmp_path / "resumed", tmp_path / "whole")
