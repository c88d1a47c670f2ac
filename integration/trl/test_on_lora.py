"""ReFT on a model with LoRA, both trained or LoRA frozen, by TRL's SFTTrainer with its defaults."""

import copy
import warnings

import pytest
import torch
from by_hand import ByHand
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from trainers import (
    common,
    first_batch,
    logits_alone,
    losses,
    make_trainer,
    mean_loss,
    reft,
    split,
    trained_tensors,
)
from transformers import AutoModelForCausalLM, LlamaForCausalLM, TrainerCallback, set_seed
from trl import DPOConfig, DPOTrainer


def make_lora(base, name="default", **options):
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], **options)
    return get_peft_model(LlamaForCausalLM.from_pretrained(base), config, name)


def make_both(base, lora=None, name="default", **options):
    set_seed(0)
    lora = lora or make_lora(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return get_peft_model(lora, reft(**options), name)


def kinds(tensors):
    return {kind for kind in ("lora", "reft") for name in tensors if f"{kind}_" in name}


def loaded(base, folder):
    """Both adapters, as a user loads them."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder, subfolder="lora-default")
    return PeftModel.from_pretrained(model, folder)


def merged(base, lora):
    """The base model with LoRA in its weights, by PEFT, and nothing of ReFT."""
    lora.save_pretrained(folder := f"{base}-lora")
    return PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), folder).merge_and_unload().eval()


def test_loss_is_that_of_the_edited_lora_model(tmp_path, base, tokenizer, pairs):
    lora = make_lora(base, init_lora_weights=False)
    model = make_both(base, lora, init_weights=False)
    trainer = make_trainer(model, tmp_path, pairs, tokenizer)
    batch = first_batch(trainer)
    sequences = split(batch)
    by_hand = ByHand(merged(base, lora), model)
    expected = mean_loss(logits_alone(by_hand, sequences), sequences)
    found = trainer.compute_loss(trainer.model.train(), dict(batch))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert kinds(trained_tensors(model)) == {"lora", "reft"}


@pytest.mark.parametrize("lora_is_trained", [True, False])
def test_saved_in_one_call(tmp_path, base, tokenizer, pairs, lora_is_trained):
    make_lora(base, init_lora_weights=False).save_pretrained(tmp_path / "lora")
    lora = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(base), tmp_path / "lora", is_trainable=lora_is_trained
    )
    model = make_both(base, lora)
    trainer = make_trainer(model, tmp_path / "run", pairs, tokenizer, max_steps=30)
    trainer.train()
    assert losses(trainer)[-1] < 0.7 * losses(trainer)[0]
    assert kinds(trained_tensors(model)) == ({"lora", "reft"} if lora_is_trained else {"reft"})
    trainer.save_model(str(tmp_path / "saved"))
    before = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    after = load_file(tmp_path / "saved" / "lora-default" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items()) != lora_is_trained
    batch = tokenizer(pairs["prompt"][:3], return_tensors="pt", padding=True, return_token_type_ids=False)
    with torch.no_grad():
        assert torch.equal(loaded(base, tmp_path / "saved")(**batch).logits, model.eval()(**batch).logits)


@pytest.mark.parametrize("names", [("default", "default"), ("qv", "default"), ("default", "edits")])
def test_resumed_training_is_bit_for_bit_the_uninterrupted_one(tmp_path, base, tokenizer, pairs, names):
    def train(resume=False, **options):
        set_seed(0)
        model = make_both(base, make_lora(base, names[0], lora_dropout=0.1), names[1], dropout=0.1)
        saving = dict(save_strategy="steps", save_steps=3, lr_scheduler_type="linear") | options
        trainer = make_trainer(model, tmp_path, pairs, tokenizer, max_steps=6, **saving)
        if resume:  # from what is saved, not from what is there
            for parameter in trained_parameters(model):
                parameter.data.normal_()
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = train()
    resumed = train(resume=str(tmp_path / "checkpoint-3"), save_strategy="no")
    assert losses(whole)[3:] == losses(resumed)[-3:] and len(losses(whole)) == 6
    expected, found = trained_tensors(whole.model), trained_tensors(resumed.model)
    assert kinds(expected) == {"lora", "reft"} and expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def trained_parameters(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class Spoil(TrainerCallback):
    """Makes both adapters worse after the sixth step, so that the last checkpoint is not the best."""

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step > 6:
            for parameter in trained_parameters(model):
                parameter.data.normal_()


def test_load_best_model_at_end(tmp_path, base, tokenizer, pairs):
    every = dict(eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=3, max_steps=9)
    trainer = make_trainer(make_both(base), tmp_path, pairs, tokenizer, pairs, load_best_model_at_end=True, **every)
    trainer.add_callback(Spoil())
    trainer.train()
    evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluations[2] > evaluations[1] < evaluations[0]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluations[1], abs=1e-6)
    assert kinds(trained_tensors(trainer.model)) == {"lora", "reft"}


def preferences(pairs):
    return pairs.map(lambda row: {"chosen": row["completion"], "rejected": " red dog"}, remove_columns=["completion"])


def test_reference_of_preferences(tmp_path, base, tokenizer, pairs):
    """TRL copies ReFT for it, on a LoRA that is frozen; on one that is trained, it would follow the training."""

    def make(model):
        args = DPOConfig(**common(tmp_path, max_steps=2))
        return DPOTrainer(model=model, args=args, train_dataset=preferences(pairs), processing_class=tokenizer)

    with pytest.raises(ValueError, match="Freeze them before ReFT is added.*no ref_model"):
        make(make_both(base))
    lora = make_lora(base, "qv", init_lora_weights=False)
    lora.set_requires_grad("qv", False)
    model = make_both(base, lora, init_weights=False)
    start = copy.deepcopy(model)
    trainer = make(model)
    trainer.train()
    batch = tokenizer(pairs["prompt"][:3], return_tensors="pt", padding=True, return_token_type_ids=False)
    with torch.no_grad():
        assert not torch.equal(model.eval()(**batch).logits, start.eval()(**batch).logits)
        model.set_adapter("ref")
        assert torch.equal(model(**batch).logits, start(**batch).logits)
