"""TRL's SFTTrainer, unpatched and with its defaults: gradient checkpointing, its own collator and its fused loss."""

import json
import re
import warnings

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from trainers import (
    by_hand_of,
    first_batch,
    logits_alone,
    losses,
    make_trainer,
    mean_loss,
    prompt_ends,
    reft,
    split,
    trained_tensors,
)
from transformers import LlamaForCausalLM, TrainerCallback, set_seed

from peft_reft import layer
from peft_reft.edits.apply import edit_rows


@pytest.mark.parametrize("kind", ["pairs", "chats"])
def test_trainer_edits_the_prompt_alone(request, tmp_path, base, tokenizer, kind):
    """The trainer's own loss on its own batch is that of the base model edited by hand."""
    data = request.getfixturevalue(kind)
    options = dict(assistant_only_loss=True) if kind == "chats" else {}
    config = reft(init_weights=False)
    trainer = make_trainer(base, tmp_path, data, tokenizer, peft_config=config, **options)
    batch = first_batch(trainer)
    sequences = split(batch)
    assert {len(prompt_ends(labels)) for _, labels in sequences} == {2 if kind == "chats" else 1}
    expected = mean_loss(logits_alone(by_hand_of(trainer, base), sequences), sequences)
    found = trainer.compute_loss(trainer.model.train(), dict(batch))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with trainer.model.disable_adapter(), torch.no_grad():
        assert abs(trainer.compute_loss(trainer.model, dict(batch)) - expected) > 1e-3


@pytest.mark.parametrize("kind", ["pairs", "chats"])
def test_training_lowers_the_loss_and_leaves_the_base_alone(request, tmp_path, base, tokenizer, kind):
    data = request.getfixturevalue(kind)
    options = dict(assistant_only_loss=True) if kind == "chats" else {}
    trainer = make_trainer(base, tmp_path, data, tokenizer, data, reft(r=8), max_steps=60, **options)
    assert trainer.args.gradient_checkpointing
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < 0.5 * before
    frozen = LlamaForCausalLM.from_pretrained(base).state_dict()
    kept = trainer.model.get_base_model().state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in frozen.items())


def test_generation_after_training(tmp_path, base, tokenizer, pairs):
    """What was taught at the prompt's positions in training comes out in use, padded or not."""
    trainer = make_trainer(base, tmp_path, pairs, tokenizer, peft_config=reft(r=16, positions="f4+l4"), max_steps=150)
    trainer.train()
    prompts = pairs["prompt"][:6]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
    tokens = trainer.model.eval().generate(**batch, do_sample=False, max_new_tokens=3)
    texts = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :])
    assert sum(text == "blue fox twice" for text in texts) >= 5, texts
    with trainer.model.disable_adapter():
        tokens = trainer.model.generate(**batch, do_sample=False, max_new_tokens=3)
    assert "blue fox twice" not in tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :])


def test_checkpointing_changes_nothing(tmp_path, base, tokenizer, pairs):
    curves = []
    for checkpointing in (True, False):
        set_seed(0)
        trainer = make_trainer(base, tmp_path, pairs, tokenizer, None, reft(), gradient_checkpointing=checkpointing)
        trainer.train()
        curves.append(losses(trainer))
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)


def test_ready_peft_model_equals_peft_config(tmp_path, base, tokenizer, pairs):
    set_seed(0)
    by_config = make_trainer(base, tmp_path, pairs, tokenizer, peft_config=reft())
    set_seed(0)
    ready = get_peft_model(LlamaForCausalLM.from_pretrained(base), reft())
    by_model = make_trainer(ready, tmp_path, pairs, tokenizer)
    for name, tensor in trained_tensors(by_config.model).items():
        by_model.model.get_parameter(name).data.copy_(tensor)
    by_config.train()
    by_model.train()
    assert losses(by_config) == losses(by_model)


def test_resumed_training_is_bit_for_bit_the_uninterrupted_one(tmp_path, base, tokenizer, pairs):
    def train(folder, resume=False, **options):
        set_seed(0)
        saving = dict(save_strategy="steps", save_steps=4, lr_scheduler_type="linear")
        options = saving | options
        trainer = make_trainer(base, folder, pairs, tokenizer, None, reft(dropout=0.1), max_steps=8, **options)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = train(tmp_path / "run")
    resumed = train(tmp_path / "run", resume=str(tmp_path / "run" / "checkpoint-4"), save_strategy="no")
    assert losses(whole)[4:] == losses(resumed)[-4:] and len(losses(whole)) == 8
    expected, found = trained_tensors(whole.model), trained_tensors(resumed.model)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


class Spoil(TrainerCallback):
    """Makes the adapter worse after a step, so that the last checkpoint is not the best."""

    def __init__(self, after):
        self.after = after

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step > self.after:
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.data.normal_()


def test_load_best_model_at_end(tmp_path, base, tokenizer, pairs):
    every = dict(eval_strategy="steps", eval_steps=4, save_strategy="steps", save_steps=4, max_steps=12)
    trainer = make_trainer(base, tmp_path, pairs, tokenizer, pairs, reft(), load_best_model_at_end=True, **every)
    trainer.add_callback(Spoil(after=8))
    trainer.train()
    evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluations[2] > evaluations[1] < evaluations[0]
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-8")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluations[1], abs=1e-6)


def test_save_model(tmp_path, base, tokenizer, pairs):
    trainer = make_trainer(base, tmp_path, pairs, tokenizer, peft_config=reft())
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    saved = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert saved["peft_type"] == "REFT" and saved["base_model_name_or_path"] == base
    assert "pip install peft_reft" in (tmp_path / "saved" / "README.md").read_text()
    batch = tokenizer(pairs["prompt"][:3], return_tensors="pt", padding=True, return_token_type_ids=False)
    with torch.no_grad():
        expected = trainer.model.eval()(**batch).logits
        for loaded in (
            AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved"),
            PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "saved"),
        ):
            assert torch.equal(loaded.eval()(**batch).logits, expected)


def test_card_of_trl(tmp_path, base, tokenizer, pairs):
    """TRL writes its card when it saves a checkpoint. Its own quick start loads `hub_model_id`."""
    trainer = make_trainer(base, tmp_path, pairs, tokenizer, peft_config=reft(), save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "README.md").read_text()
    assert re.findall("^## .*", card, re.MULTILINE)[:2] == ["## How to use this ReFT adapter", "## Quick start"]
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    exec(snippet.replace("path or id of this repository", str(tmp_path)), names := {})
    assert names["tokens"].shape[1] > names["inputs"]["input_ids"].shape[1]


def test_data_without_prompts(tmp_path, base, tokenizer, pairs):
    """Plain language modelling has no prompt whose end could be edited; its beginning can be."""
    texts = pairs.map(lambda row: {"text": row["prompt"] + row["completion"]}, remove_columns=pairs.column_names)
    trainer = make_trainer(base, tmp_path, texts, tokenizer, peft_config=reft())
    with pytest.raises(ValueError, match="labels from its first token on.*prompt-completion"):
        trainer.train()
    for positions in ("f2", "all"):
        trainer = make_trainer(base, tmp_path, texts, tokenizer, peft_config=reft(positions=positions))
        trainer.train()
        assert losses(trainer)[-1] < losses(trainer)[0]


def given_tokens(trainer, monkeypatch):
    """How many tokens of each row each unit of a training step is given."""
    given = {}

    def record(hidden_states, units, rows):
        for unit in rows.units:
            given.setdefault(unit, set()).add(rows.mask.shape[2])
        return edit_rows(hidden_states, units, rows)

    with monkeypatch.context() as context:
        context.setattr(layer, "edit_rows", record)
        trainer.compute_loss(trainer.model.train(), first_batch(trainer))
    return given


def test_edits_take_few_tokens(tmp_path, base, tokenizer, pairs, chats, monkeypatch):
    """As many as positions name, for a row has one answer, and not all that labels could end a prompt at."""
    options = dict(peft_config=reft(), gradient_checkpointing=False)
    trainer = make_trainer(base, tmp_path, pairs, tokenizer, **options)
    assert given_tokens(trainer, monkeypatch) == {"prefix": {2}, "suffix": {2}}
    monkeypatch.setenv("PEFT_REFT_PROMPT_LENGTHS", "0")
    trainer = make_trainer(base, tmp_path, pairs, tokenizer, **options)
    batch = first_batch(trainer)
    assert "prompt_lengths" not in batch
    assert given_tokens(trainer, monkeypatch) == {"prefix": {2}, "suffix": {batch["input_ids"].shape[1]}}


def test_collator_stays_where_it_is(tmp_path, base, tokenizer, pairs):
    """TRL looks at its class, and users wrap it or put another in its place."""
    trainer = make_trainer(base, tmp_path, pairs, tokenizer, pairs, reft())
    collator = trainer.data_collator
    for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader()):
        assert "prompt_lengths" in next(iter(loader))
    assert trainer.data_collator is collator and type(collator).__module__.startswith("trl.")
    trainer.data_collator = lambda features: collator(features) | {"prompt_lengths": torch.ones(len(features)).long()}
    assert first_batch(trainer)["prompt_lengths"].tolist() == [1] * 4


def test_other_models_and_choices_are_left_alone(tmp_path, base, tokenizer, pairs):
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    for config in (reft(positions="all"), lora, None):
        trainer = make_trainer(base, tmp_path, pairs, tokenizer, peft_config=config)
        assert "prompt_lengths" not in first_batch(trainer)


@pytest.mark.parametrize("is_trainable", [False, True])
def test_frozen_adapter(tmp_path, base, tokenizer, pairs, is_trainable):
    """Is said before anything is trained; evaluation needs no trained parameter."""
    make_trainer(base, tmp_path / "first", pairs, tokenizer, peft_config=reft()).save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(base), tmp_path / "adapter", is_trainable=is_trainable
    )
    trainer = make_trainer(loaded, tmp_path, pairs, tokenizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.get_eval_dataloader(trainer.train_dataset)
        assert not [w for w in caught if "Nothing of this model is trained" in str(w.message)]
        trainer.get_train_dataloader()
    found = [str(w.message) for w in caught if "Nothing of this model is trained" in str(w.message)]
    assert len(found) == (not is_trainable) and all("is_trainable=True" in message for message in found)


def test_prompt_of_one_token(tmp_path, base, tokenizer, pairs):
    """An empty prompt after a token that begins each sequence: the suffix is trained."""
    ids = tokenizer([row["completion"] for row in pairs])["input_ids"]
    rows = Dataset.from_list([{"input_ids": [5, *row], "labels": [-100, *row]} for row in ids])
    trainer = make_trainer(base, tmp_path, rows, tokenizer, peft_config=reft(positions="f7+l7", init_weights=False))
    batch = first_batch(trainer)
    sequences = split(batch)
    columns = {"prefix": [[]], "suffix": [[0]]}
    expected = mean_loss(logits_alone(by_hand_of(trainer, base), sequences, lambda labels: columns), sequences)
    found = trainer.compute_loss(trainer.model.train(), dict(batch))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert all(entry["grad_norm"] > 0 for entry in trainer.state.log_history if "grad_norm" in entry)
