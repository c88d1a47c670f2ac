"""Prompt lengths that a collator finds, against lengths that are listed here and against the model's own labels."""

import pytest
import torch
from by_hand import MASK, assert_edits, labels_of
from transformers import DataCollatorForSeq2Seq

from peft_reft import DataCollatorWithPromptLengths
from peft_reft.collator import PromptLengthsAdder

RIGHT = MASK.flip(1)
HOLES = torch.tensor([[1, 0, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 0, 1, 1, 1, 0, 1]])

# mask, answers of each row, expected lengths, columns that f2+l2 then edits
ROWS = {
    "none": (None, ([(5, 12)], [(8, 12)]), [5, 8], {"prefix": [[0, 1], [0, 1]], "suffix": [[3, 4], [6, 7]]}),
    "left": (MASK, ([(5, 12)], [(8, 12)]), [5, 4], {"prefix": [[0, 1], [4, 5]], "suffix": [[3, 4], [6, 7]]}),
    "right": (RIGHT, ([(5, 12)], [(4, 8)]), [5, 4], {"prefix": [[0, 1], [0, 1]], "suffix": [[3, 4], [2, 3]]}),
    "holes": (HOLES, ([(6, 12)], [(8, 10)]), [4, 5], {"prefix": [[0, 2], [2, 3]], "suffix": [[3, 5], [5, 7]]}),
    "labels over a hole": (HOLES, ([(3, 6)], [(5, 9)]), [2, 3], {"prefix": [[0], [2]], "suffix": [[2], [3, 4]]}),
    "text after": (MASK, ([(5, 7)], [(8, 9)]), [5, 4], {"prefix": [[0, 1], [4, 5]], "suffix": [[3, 4], [6, 7]]}),
    "labels on padding": (
        MASK,
        ([(5, 12)], [(0, 3), (8, 12)]),
        [5, 4],
        {"prefix": [[0, 1], [4, 5]], "suffix": [[3, 4], [6, 7]]},
    ),
    "no answer": (MASK, ([(5, 12)], []), [5, 8], {"prefix": [[0, 1], [4, 5]], "suffix": [[3, 4], [10, 11]]}),
}


def collate(**batch):
    return DataCollatorWithPromptLengths(lambda features: dict(batch))([])


@pytest.mark.parametrize("case", ROWS)
def test_prompt_lengths(adapt, ids, case):
    mask, answers, lengths, columns = ROWS[case]
    batch = dict(input_ids=ids) if mask is None else dict(input_ids=ids, attention_mask=mask)
    collated = collate(labels=labels_of(ids, *answers), **batch)
    assert collated["prompt_lengths"].tolist() == lengths and collated["prompt_lengths"].dtype == torch.long
    adapted = adapt(positions="f2+l2")
    adapted[0].train()
    assert_edits(adapted, columns, prompt_lengths=collated["prompt_lengths"], **batch)
    assert_edits(adapted, columns, labels=collated["labels"], **batch)


def test_completion_mask_in_place_of_labels(ids):
    """As in the batches of TRL's preference trainers."""
    mask = (labels_of(ids, [(5, 12)], [(8, 12)]) != -100).long()
    assert collate(input_ids=ids, completion_mask=mask, attention_mask=MASK)["prompt_lengths"].tolist() == [5, 4]


def test_arguments_and_batch_are_those_of_the_wrapped_collator(ids):
    class Tokenizer:
        padding_side = "right"

        def pad(self, features, **options):
            assert options["return_tensors"] == "pt"
            return {"input_ids": ids, "attention_mask": RIGHT}

    collator = DataCollatorForSeq2Seq(Tokenizer(), return_tensors="np")
    labels = labels_of(ids, [(5, 12)], [(4, 12)]).tolist()
    batch = DataCollatorWithPromptLengths(collator)([{"labels": row} for row in labels], return_tensors="pt")
    assert batch["prompt_lengths"].tolist() == [5, 4]
    assert batch["input_ids"] is ids and batch["labels"].tolist() == labels


REFUSED = {
    "several answers": (dict(answers=([(3, 5), (8, 12)], [(8, 12)])), "several answers.*compute_loss"),
    "labels from the first token on": (dict(answers=([(0, 12)], [(8, 12)])), "no prompt.*prompt-completion"),
    "labels from the first token after padding on": (dict(answers=([(5, 12)], [(2, 12)])), "no prompt"),
    "restarting positions": (dict(position_ids=torch.tensor([[*range(7), *range(5)]] * 2)), "several sequences"),
    "sequence lengths": (dict(cu_seq_lens_q=torch.tensor([0, 12, 20, 24])), "several sequences.*padding_free"),
    "no labels": (dict(labels=None), r"gave \{'input_ids': \[2, 12\].*completion_mask"),
    "class labels": (dict(labels=torch.tensor([0, 1])), r"'labels': \[2\]"),
    "labels in a list": (dict(labels=[[1], [2]]), "cannot be told"),
    "a prepared mask": (dict(attention_mask=torch.ones(2, 1, 12, 12)), r"'attention_mask': \[2, 1, 12, 12\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_one_length_a_row_cannot_say_is_refused(ids, case):
    batch, message = REFUSED[case]
    batch = dict(batch)
    answers = batch.pop("answers", ([(5, 12)], [(8, 12)]))
    with pytest.raises(ValueError, match=message):
        collate(**dict(input_ids=ids, attention_mask=MASK, labels=labels_of(ids, *answers)) | batch)


def test_positions_and_lengths_of_single_sequences_are_taken(ids):
    """Padding-free rows of one sequence, and the positions that a collator gives left-padded rows."""
    labels = labels_of(ids, [(5, 12)], [(8, 12)])
    positions = (MASK.cumsum(1) - 1).clamp(min=0)
    assert collate(input_ids=ids, labels=labels, attention_mask=MASK, position_ids=positions)[
        "prompt_lengths"
    ].tolist() == [5, 4]
    lengths = torch.tensor([0, 12])
    assert collate(input_ids=ids[:1], labels=labels[:1], cu_seq_lens_q=lengths)["prompt_lengths"].tolist() == [5]


def add(features=(), is_finding=True, **batch):
    return PromptLengthsAdder(lambda features: dict(batch), is_finding)(features)


def test_lengths_are_added_where_they_can_be(ids):
    batch = dict(input_ids=ids, attention_mask=MASK, labels=labels_of(ids, [(5, 12)], [(8, 12)]))
    assert add(**batch)["prompt_lengths"].tolist() == [5, 4]
    assert add(is_finding=False, **batch) == batch
    own = torch.tensor([1, 1])
    assert add(prompt_lengths=own, **batch)["prompt_lengths"] is own
    columns = [{"prompt_lengths": 3}, {"prompt_lengths": 2}]
    for is_finding in (True, False):
        assert add(columns, is_finding, **batch)["prompt_lengths"].tolist() == [3, 2]
    assert PromptLengthsAdder(lambda features: [ids])([]) == [ids]
    del batch["attention_mask"]  # without which -100 on the left may be padding
    assert add(**batch) == batch


@pytest.mark.parametrize("case", REFUSED)
def test_other_batches_are_left_alone(ids, case):
    options = dict(REFUSED[case][0])
    answers = options.pop("answers", ([(5, 12)], [(8, 12)]))
    batch = dict(input_ids=ids, attention_mask=MASK, labels=labels_of(ids, *answers)) | options
    found = add(**batch)
    assert found.keys() == batch.keys() and all(found[name] is batch[name] for name in batch)
