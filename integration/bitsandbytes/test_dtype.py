"""Adapters stay in float32 on a quantized base, whose trained parameters TRL's trainers cast to bfloat16."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from trainers import losses, make_trainer, reft
from trl import DPOConfig, DPOTrainer

from peft_reft.edits.intervention import Intervention

pytest.importorskip("bitsandbytes")


def tensors(model):
    units = {name: module for name, module in model.named_modules() if isinstance(module, Intervention)}
    assert units
    return {f"{name}.{key}": p for name, unit in units.items() for key, p in unit.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"load_in_8bit": True}], ids=["nf4", "8bit"])
def test_new_adapter(tmp_path, load, tokenizer, pairs, options):
    """It begins as the base model, exactly, which W = R rounded and orthonormalised would not, and is saved whole."""
    trainer = make_trainer(load(**options), tmp_path, pairs, tokenizer, peft_config=reft())
    model = trainer.model.eval()
    batch = tokenizer(pairs["prompt"][:2], return_tensors="pt", padding=True, return_token_type_ids=False)
    with torch.no_grad(), model.disable_adapter():
        expected = model(**batch).logits
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, expected)
    trainer.train()
    assert {p.dtype for p in tensors(trainer.model).values()} == {torch.float32}
    trainer.save_model(str(tmp_path / "adapter"))
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32, torch.int8}
    assert not all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in saved.values())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loaded_adapter(tmp_path, load, tokenizer, pairs, low_cpu_mem_usage):
    """An adapter that is trained further keeps the values that it had."""
    torch.manual_seed(0)
    get_peft_model(load(), reft(init_weights=False)).save_pretrained(tmp_path / "adapter")
    options = {"is_trainable": True, "low_cpu_mem_usage": low_cpu_mem_usage}
    model = PeftModel.from_pretrained(load(), tmp_path / "adapter", **options)
    before = {name: p.detach().clone() for name, p in tensors(model).items()}
    trainer = make_trainer(model, tmp_path, pairs, tokenizer)
    for name, p in tensors(trainer.model).items():
        assert p.dtype == torch.float32 and torch.equal(p, before[name])


def test_dpo(tmp_path, load, tokenizer, pairs):
    rows = pairs.map(lambda row: {"chosen": row["completion"], "rejected": " red dog"}, remove_columns="completion")
    args = DPOConfig(str(tmp_path), max_steps=2, use_cpu=True, bf16=False, report_to="none", save_strategy="no")
    options = dict(args=args, train_dataset=rows, processing_class=tokenizer, peft_config=reft())
    trainer = DPOTrainer(load(), **options)
    trainer.train()
    assert {p.dtype for p in tensors(trainer.model).values()} == {torch.float32}


def test_interrupted_run(tmp_path, load, tokenizer, pairs):
    """A checkpoint's tensors are loaded as they are, so the losses are those of a run that was not interrupted."""
    options = dict(save_strategy="steps", save_steps=3, max_steps=6)
    trainer = make_trainer(load(), tmp_path, pairs, tokenizer, peft_config=reft(), **options)
    trainer.train()
    resumed = make_trainer(load(), tmp_path, pairs, tokenizer, peft_config=reft(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(resumed) == losses(trainer)
    for name, p in tensors(resumed.model).items():
        assert torch.equal(p, tensors(trainer.model)[name])


def test_what_the_user_asks_for(tmp_path, load, tokenizer, pairs):
    model = get_peft_model(load(), reft())
    for module in model.modules():
        if isinstance(module, Intervention):
            module.bfloat16()
    trainer = make_trainer(model, tmp_path, pairs, tokenizer)
    trainer.train()
    assert {p.dtype for p in tensors(trainer.model).values()} == {torch.bfloat16}


def test_adapters_of_others(tmp_path, load, tokenizer, pairs):
    """LoRA's parameters are what TRL makes of them."""
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    trainer = make_trainer(load(), tmp_path, pairs, tokenizer, peft_config=config)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.bfloat16}
