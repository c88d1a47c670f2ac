"""Rows that hold several sequences, and sequences that are cut: what each sequence alone gives, edited by hand."""

import pytest
import torch
from trainers import (
    assert_equal_tensors,
    by_hand_of,
    columns_alone,
    first_batch,
    gradients,
    logits_alone,
    losses,
    make_trainer,
    mean_loss,
    prompt_ends,
    reft,
    split,
)

CHAT = dict(assistant_only_loss=True)
# Sequences have 8 to 16 tokens in `pairs`, of which the answer is 4, and about 17 to 33 in `chats`
CASES = {
    "packing": ("pairs", dict(packing=True, max_length=40)),
    "packing, chats": ("chats", dict(packing=True, max_length=80) | CHAT),
    "packing, eight rows": ("pairs", dict(packing=True, max_length=40, per_device_train_batch_size=8)),
    "packing, a sequence a row": ("pairs", dict(packing=True, max_length=16, per_device_train_batch_size=1)),
    "packing, cut": ("pairs", dict(packing=True, max_length=10)),
    "packing, chats cut in the first answer or before": ("chats", dict(packing=True, max_length=15) | CHAT),
    "padding-free": ("pairs", dict(padding_free=True, max_length=None)),
    "padding-free, chats": ("chats", dict(padding_free=True, max_length=None) | CHAT),
    "padding-free, padded": ("pairs", dict(padding_free=True, max_length=None, pad_to_multiple_of=64)),
    "padded": ("pairs", dict(pad_to_multiple_of=32)),
    "cut": ("pairs", dict(max_length=10)),
    "chats cut": ("chats", dict(max_length=20) | CHAT),
}


def with_sequences(trainer, batch, given):
    """The batch with or without the lengths of its sequences, which flash attention needs."""
    lengths = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
    return batch if given else {name: value for name, value in batch.items() if name not in lengths}


@pytest.mark.parametrize("case", CASES)
def test_each_sequence_is_edited_as_if_alone(request, tmp_path, base, tokenizer, case):
    """Logits are those by hand of each sequence alone, the loss follows, and so do gradients of the adapter."""
    kind, options = CASES[case]
    config = reft(init_weights=False)
    trainer = make_trainer(base, tmp_path, request.getfixturevalue(kind), tokenizer, None, config, **options)
    model, batch = trainer.model, first_batch(trainer)
    sequences = split(batch)
    if "padded" in case and "position_ids" in batch:  # a token of padding is a sequence of its own
        sequences = [(ids, labels) for ids, labels in sequences if ids.shape[1] > 1]
    answered = [bool((labels != -100).any()) for _, labels in sequences]
    assert all(answered) == (case not in ("packing, cut", "packing, chats cut in the first answer or before")), case
    expected = logits_alone(by_hand_of(trainer, base), sequences)
    loss = mean_loss(expected, sequences)

    model.eval()
    alone = [model(input_ids=ids, labels=labels).logits for ids, labels in sequences]
    mean_loss(alone, sequences).backward()
    expected_gradients = gradients(model)

    for given in (True, False) if "position_ids" in batch else (True,):
        inputs = with_sequences(trainer, batch, given)
        with torch.no_grad():
            logits = model.eval()(**inputs).logits
        if "position_ids" in inputs:
            logits = logits[0, : sum(row.shape[1] for row in expected)]
        else:
            logits = logits[inputs["attention_mask"].bool()]
        torch.testing.assert_close(logits, torch.cat(expected, dim=1)[0], atol=1e-5, rtol=1e-5)
        found = trainer.compute_loss(model.train(), inputs)
        torch.testing.assert_close(found, loss, atol=1e-5, rtol=1e-5)
        found.backward()
        assert_equal_tensors(gradients(model), expected_gradients)


# Wrapped packing joins sequences into one text, and cuts it wherever a row is full.

WRAPPED = dict(packing=True, packing_strategy="wrapped", max_length=12, per_device_train_batch_size=8)


@pytest.mark.parametrize("options", [WRAPPED, dict(max_length=12, truncation_mode="keep_end") | CHAT], ids=str)
def test_rows_that_begin_inside_an_answer_are_refused(request, tmp_path, base, tokenizer, options):
    """Their first tokens are an answer's; where the prompts begin that follow, nothing tells."""
    data = request.getfixturevalue("chats" if "assistant_only_loss" in options else "pairs")
    trainer = make_trainer(base, tmp_path, data, tokenizer, None, reft(), **options)
    with pytest.raises(ValueError, match="first token on.*packing_strategy='bfd', truncation_mode='keep_start'"):
        trainer.train()


def test_wrapped_rows_with_positions_that_they_hold(tmp_path, base, tokenizer, pairs):
    """A row is one text, as in the model's attention: last tokens precede each answer, first tokens are the row's."""
    columns = {
        "l2": lambda ends: [column for end in ends for column in range(max(0, end - 2), end)],
        "f2": lambda ends: list(range(min(2, ends[0]))),
        "all": lambda ends: list(range(99)),
    }
    for positions, of in columns.items():
        config = reft(positions=positions, init_weights=False)
        trainer = make_trainer(base, tmp_path, pairs, tokenizer, None, config, **WRAPPED)
        batch = first_batch(trainer)
        assert "position_ids" not in batch and (batch["labels"][:, 0] != -100).any()
        sequences = split(batch)
        if positions == "l2":  # a row without a prompt is refused as plain text is
            kept = [row for row, (ids, labels) in enumerate(sequences) if prompt_ends(labels)[0] < ids.shape[1]]
            batch = {name: tensor[kept] for name, tensor in batch.items()}
            sequences = split(batch)
            assert (batch["labels"][:, 0] != -100).any() and len(kept) > 2
        logits = logits_alone(
            by_hand_of(trainer, base), sequences, lambda labels, of=of: {"unit": [of(prompt_ends(labels))]}
        )
        found = trainer.compute_loss(trainer.model.train(), batch)
        torch.testing.assert_close(found, mean_loss(logits, sequences), atol=1e-5, rtol=1e-5)


def test_answers_that_are_split_off_are_refused(tmp_path, base, tokenizer, pairs):
    """bfd_split makes the rest of a long sequence one of its own: an answer without its prompt."""
    options = dict(packing=True, packing_strategy="bfd_split", max_length=9)
    trainer = make_trainer(base, tmp_path, pairs, tokenizer, None, reft(), **options)
    with pytest.raises(ValueError, match="labels from its first token on.*packing_strategy='bfd'"):
        trainer.train()
    trainer = make_trainer(base, tmp_path, pairs, tokenizer, None, reft(positions="f2"), **options)
    trainer.train()
    assert len(losses(trainer)) == 6


@pytest.mark.parametrize("side", ["keep_start", "keep_end"])
def test_prompts_that_fill_the_row(tmp_path, base, tokenizer, pairs, side):
    """TRL leaves out what has no label; what is kept of a prompt is edited as any prompt."""
    options = dict(max_length=10, truncation_mode=side, per_device_train_batch_size=16)
    trainer = make_trainer(base, tmp_path, pairs, tokenizer, None, reft(init_weights=False), **options)
    batch = first_batch(trainer)
    sequences = split(batch)
    assert (len(sequences) < 16) == (side == "keep_start")
    logits = logits_alone(by_hand_of(trainer, base), sequences, columns_alone)
    found = trainer.compute_loss(trainer.model.train(), batch)
    torch.testing.assert_close(found, mean_loss(logits, sequences), atol=1e-5, rtol=1e-5)
