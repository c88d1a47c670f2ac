"""Losses and metrics that a trainer computes outside of the model's forward, which it then calls without labels."""

import pytest
import torch
from by_hand import ByHand, make_llama
from peft import get_peft_model
from trainers import (
    assert_equal_tensors,
    common,
    first_batch,
    gradients,
    logits_alone,
    losses,
    make_trainer,
    mean_loss,
    reft,
    split,
)
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from peft_reft import DataCollatorWithPromptLengths

SMOOTHING = 0.2


def focal_loss(outputs, labels, num_items_in_batch=None):
    """A loss function as users pass it: the mean of (1 - p) (-log p) over the labels."""
    logits, targets = outputs.logits[:, :-1], labels[:, 1:]
    log_p = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    seen = targets != -100
    return -((1 - log_p.exp()) * log_p)[seen].sum() / (
        seen.sum() if num_items_in_batch is None else num_items_in_batch
    )


LOSSES = {
    "loss function": ({}, dict(compute_loss_func=focal_loss)),
    "label smoothing": (dict(label_smoothing_factor=SMOOTHING), {}),
}


def loss_by_hand(case, logits, sequences):
    """Each sequence alone, each label in a loop."""
    terms = []
    for row, (_, labels) in zip(logits, sequences, strict=True):
        for t in range(1, labels.shape[1]):
            if labels[0, t] != -100:
                log_p = row[0, t - 1].log_softmax(-1)
                right = log_p[labels[0, t]]
                smooth = -(1 - SMOOTHING) * right - SMOOTHING * log_p.mean()
                terms.append(smooth if case == "label smoothing" else -(1 - right.exp()) * right)
    return torch.stack(terms).mean()


def make(case, folder, base, data, tokenizer, config=None, eval_data=None, **options):
    more, trainer_options = LOSSES[case]
    config = config or reft(init_weights=False)
    return make_trainer(base, folder, data, tokenizer, eval_data, config, trainer_options, **more | options)


@pytest.mark.parametrize("case", LOSSES)
def test_loss_without_labels_says_what_to_do(tmp_path, base, tokenizer, pairs, case):
    trainer = make(case, tmp_path, base, pairs, tokenizer)
    with pytest.raises(ValueError, match=r"trainer.data_collator = peft_reft.DataCollatorWithPromptLengths\(trainer"):
        trainer.train()


@pytest.mark.parametrize("case", LOSSES)
def test_data_collator_with_prompt_lengths(tmp_path, base, tokenizer, pairs, case):
    """Loss and gradients are those of each sequence alone, in training and in evaluation."""
    trainer = make(case, tmp_path, base, pairs, tokenizer, eval_data=pairs, per_device_eval_batch_size=16)
    trainer.data_collator = DataCollatorWithPromptLengths(trainer.data_collator)
    batch, model = first_batch(trainer), trainer.model
    sequences = split(batch)
    assert len({ids.shape[1] for ids, _ in sequences}) > 1  # so there is padding
    expected = loss_by_hand(case, logits_alone(ByHand(make_llama(), model), sequences), sequences)
    loss = trainer.compute_loss(model.train(), dict(batch))
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    loss.backward()
    found = gradients(model)
    alone = [model.eval()(input_ids=ids, labels=labels).logits for ids, labels in sequences]
    loss_by_hand(case, alone, sequences).backward()
    assert_equal_tensors(found, gradients(model))

    whole = split(next(iter(trainer.get_eval_dataloader())))
    expected = loss_by_hand(case, logits_alone(ByHand(make_llama(), model), whole), whole)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), abs=1e-5)

    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_transformers_own_trainer(tmp_path, base, tokenizer, pairs):
    """It takes the labels out of the batch for label smoothing."""
    ids = tokenizer([row["prompt"] + row["completion"] for row in pairs])["input_ids"]
    rows = [{"input_ids": row, "labels": [-100] * (len(row) - 3) + row[-3:]} for row in ids]
    model = get_peft_model(make_llama(), reft(init_weights=False))
    options = common(tmp_path, label_smoothing_factor=SMOOTHING)
    collator = DataCollatorForSeq2Seq(tokenizer)
    trainer = Trainer(model, TrainingArguments(**options), data_collator=collator, train_dataset=rows)
    with pytest.raises(ValueError, match="DataCollatorWithPromptLengths"):
        trainer.train()
    trainer.data_collator = DataCollatorWithPromptLengths(trainer.data_collator)
    batch = first_batch(trainer)
    sequences = split(batch)
    expected = loss_by_hand("label smoothing", logits_alone(ByHand(make_llama(), model), sequences), sequences)
    torch.testing.assert_close(trainer.compute_loss(model.train(), batch), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("chats", dict(assistant_only_loss=True), "several answers.*override compute_loss"),
        ("pairs", dict(padding_free=True, max_length=None), "several sequences.*padding_free"),
        ("pairs", dict(packing=True, max_length=40), "several sequences.*packing"),
        ("pairs", dict(completion_only_loss=False), "no prompt.*completion_only_loss"),
    ],
    ids=["chats", "padding-free", "packing", "no prompt"],
)
def test_what_one_length_a_row_cannot_say(request, tmp_path, base, tokenizer, kind, options, message):
    data = request.getfixturevalue(kind)
    trainer = make("label smoothing", tmp_path, base, data, tokenizer, **options)
    trainer.data_collator = DataCollatorWithPromptLengths(trainer.data_collator)
    with pytest.raises(ValueError, match=message):
        trainer.train()


class FocalTrainer(SFTTrainer):
    """The way that TRL advises in place of `compute_loss_func`: the model is called with the labels."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = focal_loss(outputs, inputs["labels"], num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


def test_conversations_with_a_loss_of_their_own(tmp_path, base, tokenizer, chats):
    trainer = FocalTrainer(
        make_llama(),
        SFTConfig(**common(tmp_path, assistant_only_loss=True)),
        train_dataset=chats,
        processing_class=tokenizer,
        peft_config=reft(init_weights=False),
    )
    batch = first_batch(trainer)
    sequences = split(batch)
    logits = logits_alone(ByHand(make_llama(), trainer.model), sequences)
    expected = loss_by_hand("loss function", logits, sequences)
    found = trainer.compute_loss(trainer.model.train(), dict(batch))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]


@pytest.mark.parametrize("wrapped", [False, True])
def test_metrics_of_the_logits(tmp_path, base, tokenizer, pairs, wrapped):
    """For compute_metrics TRL calls the model a second time, without labels."""
    seen = []
    options = dict(compute_metrics=lambda prediction: seen.append(prediction.predictions) or {})
    data = pairs.select(range(3))
    trainer = make_trainer(base, tmp_path, data, tokenizer, data, reft(init_weights=False), options)
    if not wrapped:
        with pytest.raises(ValueError, match="compute_metrics.*DataCollatorWithPromptLengths"):
            trainer.evaluate()
        return
    trainer.data_collator = DataCollatorWithPromptLengths(trainer.data_collator)
    loss = trainer.evaluate()["eval_loss"]
    sequences = split(next(iter(trainer.get_eval_dataloader())))
    expected = logits_alone(ByHand(make_llama(), trainer.model), sequences)
    assert loss == pytest.approx(mean_loss(expected, sequences).item(), abs=1e-5)
    for row, logits in enumerate(expected):
        found = torch.as_tensor(seen[0])[row, : logits.shape[1]]
        torch.testing.assert_close(found, logits[0], atol=1e-5, rtol=1e-5)
