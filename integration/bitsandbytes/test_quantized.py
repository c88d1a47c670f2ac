"""ReFT on a base that bitsandbytes has quantized: the plain road, on a CPU."""

import pytest
import torch
from by_hand import ByHand
from peft import PeftModel, get_peft_model
from trl import SFTConfig, SFTTrainer

from peft_reft import ReftConfig

pytest.importorskip("bitsandbytes")

QUANTIZED = {
    "nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
    "8bit": dict(load_in_8bit=True),
}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_edits_are_exact_on_a_quantized_base(load, kind):
    """The quantized model edited by hand gives the same logits: only the base is quantized, not the edit."""
    torch.manual_seed(1)
    config = ReftConfig(task_type="CAUSAL_LM", r=4, positions="f2+l2", init_weights=False)
    model = get_peft_model(load(**QUANTIZED[kind]), config).eval()
    by_hand = ByHand(load(**QUANTIZED[kind]).eval(), model)
    ids = torch.randint(3, 64, (2, 12))
    expected = by_hand.logits({"prefix": [[0, 1]] * 2, "suffix": [[10, 11]] * 2}, input_ids=ids)
    with torch.no_grad():
        found = model(input_ids=ids).logits
        base_logits = by_hand.base(input_ids=ids).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (found - base_logits).abs().max() > 0.1


@pytest.mark.parametrize("kind", QUANTIZED)
def test_sft_on_a_quantized_base(tmp_path, load, tokenizer, pairs, kind):
    model = load(**QUANTIZED[kind])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    args = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=20,
        per_device_train_batch_size=4,
        learning_rate=2e-2,
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    config = ReftConfig(task_type="CAUSAL_LM", r=8, positions="f2+l2")
    trainer = SFTTrainer(model=model, args=args, train_dataset=pairs, processing_class=tokenizer, peft_config=config)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    after = trainer.model.get_base_model().state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

    trainer.save_model(str(tmp_path / "adapter"))
    reloaded = PeftModel.from_pretrained(load(**QUANTIZED[kind]), tmp_path / "adapter").eval()
    batch = tokenizer(pairs["prompt"][:2], return_tensors="pt", padding=True, return_token_type_ids=False)
    with torch.no_grad():
        assert torch.equal(reloaded(**batch).logits, trainer.model.eval()(**batch).logits)
