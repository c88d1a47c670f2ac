"""ReFT on LoRA on a base in 4 bits."""

import warnings

import pytest
import torch
from by_hand import ByHand
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from trainers import losses, make_trainer, reft, trained_tensors
from transformers import set_seed

pytest.importorskip("bitsandbytes")


def adapt(base, **options):
    set_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return get_peft_model(get_peft_model(base, config), reft(**options))


def test_edits_and_generation(load, ids):
    """Edits are those by hand on the LoRA model, which is that of PEFT alone."""
    model = adapt(load(), init_weights=False).eval()
    with torch.no_grad():
        found, tokens = model(input_ids=ids).logits, model.generate(ids, do_sample=False, max_new_tokens=3)
        by_hand = ByHand(adapt(load()).unload().get_base_model().eval(), model)
        columns = {"prefix": [[0, 1]] * 2, "suffix": [[10, 11]] * 2}
        torch.testing.assert_close(found, by_hand.logits(columns, input_ids=ids), atol=1e-4, rtol=1e-4)
        assert torch.equal(tokens, by_hand.generate(columns, ids, new_tokens=3))
        assert (found - by_hand.base(input_ids=ids).logits).abs().max() > 1e-2


def test_trained_saved_and_resumed(tmp_path, load, tokenizer, pairs, ids):
    def train(**options):
        set_seed(0)
        trainer = make_trainer(
            adapt(prepare_model_for_kbit_training(load())), tmp_path, pairs, tokenizer, max_steps=6, **options
        )
        return trainer

    trainer = train(save_strategy="steps", save_steps=3)
    before = trained_tensors(trainer.model)
    trainer.train()
    expected = trained_tensors(trainer.model)
    assert {name for name in before if "lora_" in name} and {name for name in before if "reft_" in name}
    same = [name for name in before if torch.equal(before[name], expected[name])]
    assert all("layers.1._reft._reft_prefix" in name for name in same), same  # which no label sees
    assert {p.dtype for name, p in expected.items() if "reft_" in name} == {torch.float32}
    resumed = train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(resumed)[-3:] == losses(trainer)[-3:]
    found = trained_tensors(resumed.model)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    trainer.save_model(str(tmp_path / "saved"))
    model = PeftModel.from_pretrained(load(), tmp_path / "saved", subfolder="lora-default")
    model = PeftModel.from_pretrained(model, tmp_path / "saved")
    for name, p in model.named_parameters():
        if "lora_" in name:  # in which PEFT computes in float32 then; TRL has cast it
            assert torch.equal(p, expected[name].float())
            p.data = p.data.bfloat16()
    with torch.no_grad():
        logits = trainer.model.eval()(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, logits, atol=1e-4, rtol=1e-4)
