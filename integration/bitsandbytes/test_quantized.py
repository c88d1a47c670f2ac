"""ReFT on a base that bitsandbytes has quantized, on a CPU."""

import pytest
import torch
from by_hand import VOCABULARY, ByHand, labels_of
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from trainers import assert_equal_tensors, gradients, losses, make_trainer, reft
from transformers import AutoModelForCausalLM

from peft_reft.quantized import keep_unpacked

pytest.importorskip("bitsandbytes")

QUANTIZED = {
    f"{kind}{'-double' * double}": dict(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    for kind in ("nf4", "fp4")
    for double in (False, True)
} | {"8bit": dict(load_in_8bit=True)}
COLUMNS = {"prefix": [[0, 1]] * 2, "suffix": [[10, 11]] * 2}


@pytest.fixture
def ids():
    return torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, load):
    """For each quantization the folder of an adapter that was made and saved on it, and edits visibly."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in QUANTIZED}
    torch.manual_seed(1)
    for kind, folder in folders.items():
        get_peft_model(load(**QUANTIZED[kind]), reft(init_weights=False)).save_pretrained(folder)
    return folders


def tensors(model):
    """Every parameter and buffer of a base model, and all that its weights were quantized with."""
    state = model.state_dict()
    assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())
    assert any(name.endswith(("absmax", "SCB")) for name in state)
    return {name: tensor.clone() for name, tensor in state.items() if "._reft." not in name}


def assert_unchanged(model, before):
    after = tensors(model)
    assert after.keys() == before.keys()
    assert not [name for name, tensor in before.items() if not torch.equal(after[name], tensor)]


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("kind", QUANTIZED)
def test_edits_are_exact_wherever_an_adapter_is_loaded(base, load, adapters, ids, kind):
    """On the quantization that it was made on, on every other, and on the base in full precision: edited by hand,
    each gives the same logits, for only the base is quantized, not the edit.
    """
    targets = {other: lambda options=options: load(**options) for other, options in QUANTIZED.items()}
    for make in [*targets.values(), lambda: AutoModelForCausalLM.from_pretrained(base, dtype="float32")]:
        model = PeftModel.from_pretrained(make(), adapters[kind], is_trainable=True).eval()
        by_hand = ByHand(make().eval(), model)
        keep_unpacked(by_hand.base)
        found = logits(model, input_ids=ids)
        torch.testing.assert_close(found, by_hand.logits(COLUMNS, input_ids=ids), atol=1e-4, rtol=1e-4)
        assert (found - logits(by_hand.base, input_ids=ids)).abs().max() > 0.1


@pytest.mark.parametrize("kind", QUANTIZED)
def test_dequantized(load, adapters, ids, kind):
    """In training, weights are dequantized before they are used: a base that is dequantized for good gives the same.

    In use, bitsandbytes rounds what a linear layer is given, to 8 bits (`load_in_8bit`) or, on some CPUs, to bfloat16:
    an adapted model is then as far from the dequantized one as the base model is without the adapter.
    """
    quantized = PeftModel.from_pretrained(load(**QUANTIZED[kind]), adapters[kind])
    dequantized = PeftModel.from_pretrained(load(**QUANTIZED[kind]).dequantize(), adapters[kind])
    dequantized_later = PeftModel.from_pretrained(load(**QUANTIZED[kind]), adapters[kind])
    dequantized_later.get_base_model().dequantize()
    inputs = dict(input_ids=ids, prompt_lengths=torch.tensor([8, 12]))
    expected = logits(dequantized.train(), **inputs)
    torch.testing.assert_close(logits(quantized.train(), **inputs), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(logits(dequantized_later.train(), **inputs), expected)
    assert torch.equal(logits(dequantized_later.eval(), **inputs), expected)

    distance = (logits(quantized.eval(), **inputs) - expected).abs().mean()
    with quantized.disable_adapter(), dequantized.disable_adapter():
        of_base = (logits(quantized, input_ids=ids) - logits(dequantized, input_ids=ids)).abs().mean()
    assert distance < 1.5 * of_base + 1e-5


@pytest.mark.parametrize("prepare", [False, True], ids=["as_loaded", "prepared"])
@pytest.mark.parametrize("kind", QUANTIZED)
def test_sft(tmp_path, load, tokenizer, pairs, kind, prepare):
    """The loss falls, no bit of the base changes, and what is saved gives the same on the base loaded anew."""
    model = load(**QUANTIZED[kind])
    if prepare:
        model = prepare_model_for_kbit_training(model)
    before = tensors(model)
    options = dict(max_steps=20, eval_strategy="steps", eval_steps=5)
    trainer = make_trainer(model, tmp_path, pairs, tokenizer, eval_data=pairs, peft_config=reft(r=8), **options)
    trainer.train()
    assert sum(losses(trainer)[-4:]) < 0.8 * sum(losses(trainer)[:4])
    trainer.model.eval()
    batch = tokenizer(pairs["prompt"][:2], return_tensors="pt", padding=True, return_token_type_ids=False)
    expected = logits(trainer.model, **batch)
    trainer.save_model(str(tmp_path / "adapter"))
    assert_unchanged(trainer.model.get_base_model(), before)
    reloaded = PeftModel.from_pretrained(load(**QUANTIZED[kind]), tmp_path / "adapter", is_trainable=True).eval()
    assert torch.equal(logits(reloaded, **batch), expected)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_evaluation_between_steps(load, adapters, ids, kind):
    """bitsandbytes packs 4-bit weights in evaluation on some CPUs, rounded, and has no gradient for what is packed."""
    inputs = dict(input_ids=ids, labels=labels_of(ids, [(6, 12)], [(8, 12)]))

    def step(model):
        model.train()(**inputs).loss.backward()
        return gradients(model)

    model = PeftModel.from_pretrained(load(**QUANTIZED[kind]), adapters[kind], is_trainable=True)
    before, expected = tensors(model.get_base_model()), step(model)
    for _ in range(2):
        logits(model.eval(), input_ids=ids.clone())
        assert_equal_tensors(step(model), expected, atol=0)
    assert_unchanged(model.get_base_model(), before)

    evaluated = load(**QUANTIZED[kind]).eval()
    logits(evaluated, input_ids=ids)  # before it is adapted: packed and unpacked again, some of it is rounded
    found = step(PeftModel.from_pretrained(evaluated, adapters[kind], is_trainable=True))
    found, expected = (torch.cat([g.flatten() for g in step.values()]) for step in (found, expected))
    assert (found - expected).norm() < 0.05 * expected.norm()
