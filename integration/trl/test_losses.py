"""Losses and metrics that a trainer computes outside of the model's forward, which it then calls without labels."""

import pytest
import torch
from by_hand import ByHand, make_llama
from datasets import Dataset
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


@pytest.fixture
def switched_off(monkeypatch):
    """Trainers add no prompt_lengths by themselves."""
    monkeypatch.setenv("PEFT_REFT_PROMPT_LENGTHS", "0")


@pytest.mark.parametrize("case", LOSSES)
def test_loss_without_labels_says_what_to_do(switched_off, tmp_path, base, tokenizer, pairs, case):
    """In evaluation and prediction as well, where the model is in eval mode."""
    trainer = make(case, tmp_path, base, pairs, tokenizer, eval_data=pairs)
    for run in (trainer.train, trainer.evaluate, lambda: trainer.predict(trainer.eval_dataset)):
        with pytest.raises(ValueError, match=r"trainer.data_collator = peft_reft.DataCollatorWithPromptLengths\("):
            run()


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("case", LOSSES)
def test_loss_of_its_own(tmp_path, base, tokenizer, pairs, case, wrapped):
    """Loss and gradients are those of each sequence alone, in training and in evaluation."""
    trainer = make(case, tmp_path, base, pairs, tokenizer, eval_data=pairs, per_device_eval_batch_size=16)
    if wrapped:
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
    assert trainer.predict(trainer.eval_dataset).metrics["test_loss"] == pytest.approx(expected.item(), abs=1e-5)

    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]


def make_transformers_trainer(folder, tokenizer, pairs, **options):
    """transformers' own, on rows of ids whose last three tokens are the answer."""
    ids = tokenizer([row["prompt"] + row["completion"] for row in pairs])["input_ids"]
    rows = [{"input_ids": row, "labels": [-100] * (len(row) - 3) + row[-3:]} for row in ids]
    rows = Dataset.from_list(rows)
    return Trainer(
        get_peft_model(make_llama(), reft(init_weights=False)),
        TrainingArguments(**common(folder, **options)),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        train_dataset=rows,
        eval_dataset=rows,
    )


@pytest.mark.parametrize("smoothing", [0, SMOOTHING])
def test_transformers_own_trainer(tmp_path, tokenizer, pairs, smoothing):
    """It takes the labels out of the batch for label smoothing."""
    options = dict(label_smoothing_factor=smoothing, per_device_eval_batch_size=16)
    trainer = make_transformers_trainer(tmp_path, tokenizer, pairs, **options)
    by_hand = ByHand(make_llama(), trainer.model)

    def by_hand_of(batch):
        sequences = split(batch)
        logits = logits_alone(by_hand, sequences)
        return loss_by_hand("label smoothing", logits, sequences) if smoothing else mean_loss(logits, sequences)

    batch, whole = first_batch(trainer), next(iter(trainer.get_eval_dataloader()))
    expected = by_hand_of(batch)
    torch.testing.assert_close(trainer.compute_loss(trainer.model.train(), batch), expected, atol=1e-5, rtol=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(by_hand_of(whole).item(), abs=1e-5)


def test_transformers_own_trainer_switched_off(switched_off, tmp_path, tokenizer, pairs):
    trainer = make_transformers_trainer(tmp_path, tokenizer, pairs, label_smoothing_factor=SMOOTHING)
    for run in (trainer.train, trainer.evaluate, lambda: trainer.predict(trainer.eval_dataset)):
        with pytest.raises(ValueError, match="DataCollatorWithPromptLengths"):
            run()


def test_lengths_in_the_data_set(switched_off, tmp_path, base, tokenizer, pairs):
    """A column is no unused one, though no model's forward names it, and TRL's collator does not know it."""
    ids = tokenizer([row["prompt"] + row["completion"] for row in pairs])["input_ids"]
    rows = [{"input_ids": row, "labels": row, "prompt_lengths": len(row) - 3} for row in ids]
    trainers = (
        make_trainer(base, tmp_path, Dataset.from_list(rows), tokenizer, None, reft()),
        Trainer(
            get_peft_model(make_llama(), reft()),
            TrainingArguments(**common(tmp_path)),
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            train_dataset=Dataset.from_list(rows),
        ),
    )
    for trainer in trainers:
        batch = first_batch(trainer)
        assert batch["prompt_lengths"].tolist() == [len(ids[0]) - 3 for ids, _ in split(batch)]
        trainer.train()
        assert losses(trainer)[-1] < losses(trainer)[0]


UNSAYABLE = {
    "chats": ("chats", dict(assistant_only_loss=True), "several answers.*override compute_loss"),
    "padding-free": ("pairs", dict(padding_free=True, max_length=None), "several sequences.*padding_free"),
    "packing": ("pairs", dict(packing=True, max_length=40), "several sequences.*packing"),
    "no prompt": ("pairs", dict(completion_only_loss=False), "no prompt.*completion_only_loss"),
}


@pytest.mark.parametrize("case", UNSAYABLE)
def test_what_one_length_a_row_cannot_say(request, tmp_path, base, tokenizer, case):
    kind, options, message = UNSAYABLE[case]
    data = request.getfixturevalue(kind)
    trainer = make("label smoothing", tmp_path, base, data, tokenizer, eval_data=data, **options)
    for run in (trainer.train, trainer.evaluate):
        with pytest.raises(ValueError, match="keeps the labels"):
            run()
    trainer.data_collator = DataCollatorWithPromptLengths(trainer.data_collator)
    for run in (trainer.train, trainer.evaluate):
        with pytest.raises(ValueError, match=message):
            run()


@pytest.mark.parametrize("case", UNSAYABLE)
def test_what_one_length_a_row_cannot_say_stays_with_its_labels(request, tmp_path, base, tokenizer, case):
    """The batches are those of the trainer's own collator."""
    kind, options, _ = UNSAYABLE[case]
    trainer = make_trainer(base, tmp_path, request.getfixturevalue(kind), tokenizer, None, reft(), **options)
    batch = first_batch(trainer)
    assert "labels" in batch and "prompt_lengths" not in batch


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


@pytest.mark.parametrize("run", ["evaluate", "predict"])
def test_metrics_of_the_logits(tmp_path, base, tokenizer, pairs, run):
    """For compute_metrics, and for what predict gives, TRL calls the model a second time, without labels."""
    seen = []
    options = dict(compute_metrics=lambda prediction: seen.append(prediction.predictions) or {})
    data = pairs.select(range(3))
    trainer = make_trainer(base, tmp_path, data, tokenizer, data, reft(init_weights=False), options)
    if run == "predict":
        output = trainer.predict(trainer.eval_dataset)
        loss, found = output.metrics["test_loss"], output.predictions
    else:
        loss = trainer.evaluate()["eval_loss"]
        found = seen[0]
    sequences = split(next(iter(trainer.get_eval_dataloader())))
    expected = logits_alone(ByHand(make_llama(), trainer.model), sequences)
    assert loss == pytest.approx(mean_loss(expected, sequences).item(), abs=1e-5)
    for row, logits in enumerate(expected):
        torch.testing.assert_close(torch.as_tensor(found)[row, : logits.shape[1]], logits[0], atol=1e-5, rtol=1e-5)


def test_metrics_of_the_logits_switched_off(switched_off, tmp_path, base, tokenizer, pairs):
    options = dict(compute_metrics=lambda prediction: {})
    trainer = make_trainer(base, tmp_path, pairs, tokenizer, pairs, reft(), options)
    for run in (trainer.evaluate, lambda: trainer.predict(trainer.eval_dataset)):
        with pytest.raises(ValueError, match="compute_metrics.*DataCollatorWithPromptLengths"):
            run()
