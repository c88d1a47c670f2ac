"""Which tokens of the prompt are edited: every rule compared with ReFT by hand at columns that are listed here."""

import pytest
import torch
from by_hand import IGNORED, MASK, TWO, assert_edits, labels_of, make_gpt2, make_llama

STRAIGHT = {
    "f2+l2": {"prefix": [[0, 1], [0, 1]], "suffix": [[3, 4], [6, 7]]},
    "f3+l1": {"prefix": [[0, 1], [0, 1, 2]], "suffix": [[4], [7]]},  # half of 5 is 2
    "f5+l5": {"prefix": [[0, 1], [0, 1, 2, 3]], "suffix": [[2, 3, 4], [4, 5, 6, 7]]},  # cut to half the prompt
    "f6": {"unit": [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]]},  # one end alone is cut to the prompt
    "l6": {"unit": [[0, 1, 2, 3, 4], [2, 3, 4, 5, 6, 7]]},
    "prompt": {"unit": [list(range(5)), list(range(8))]},
    "all": {"unit": [list(range(12)), list(range(12))]},
}


@pytest.mark.parametrize("positions", STRAIGHT)
@pytest.mark.parametrize("make", [make_llama, make_gpt2])
def test_labels(adapt, ids, positions, make):
    assert_edits(
        adapt(make, positions=positions), STRAIGHT[positions], input_ids=ids, labels=labels_of(ids, *TWO["answers"])
    )


@pytest.mark.parametrize("positions", STRAIGHT)
def test_prompt_lengths(adapt, ids, positions):
    assert_edits(adapt(positions=positions), STRAIGHT[positions], input_ids=ids, prompt_lengths=torch.tensor([5, 8]))


def test_shared_weights(adapt, ids):
    adapted = adapt(positions="f2+l2", share_weights=True)
    assert_edits(
        adapted, {"unit": [[0, 1, 3, 4], [0, 1, 6, 7]]}, input_ids=ids, labels=labels_of(ids, *TWO["answers"])
    )
    assert_edits(adapted, {"unit": [[0, 1, 3, 4], [0, 1, 6, 7]]}, input_ids=ids, prompt_lengths=torch.tensor([5, 8]))


@pytest.mark.parametrize("told", ["labels", "prompt_lengths"])
def test_right_padding(adapt, ids, told):
    mask = torch.tensor([[1] * 12, [1] * 9 + [0] * 3])
    say = (
        {"labels": labels_of(ids, [(5, 12)], [(4, 9)])}
        if told == "labels"
        else {"prompt_lengths": torch.tensor([5, 4])}
    )
    columns = {"prefix": [[0, 1], [0, 1]], "suffix": [[3, 4], [2, 3]]}
    assert_edits(adapt(positions="f2+l2"), columns, input_ids=ids, attention_mask=mask, **say)


@pytest.mark.parametrize("told", ["labels", "prompt_lengths"])
def test_left_padding(adapt, ids, told):
    mask = torch.tensor([[1] * 12, [0] * 3 + [1] * 9])
    say = (
        {"labels": labels_of(ids, [(5, 12)], [(7, 12)])}
        if told == "labels"
        else {"prompt_lengths": torch.tensor([5, 4])}
    )
    columns = {"prefix": [[0, 1], [3, 4]], "suffix": [[3, 4], [5, 6]]}
    assert_edits(adapt(positions="f2+l2"), columns, input_ids=ids, attention_mask=mask, **say)


@pytest.mark.parametrize("told", ["labels", "prompt_lengths"])
def test_holes_in_the_mask(adapt, ids, told):
    mask = torch.tensor([[1] * 12, [1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1]])
    say = (
        {"labels": labels_of(ids, [(5, 12)], [(8, 12)])}
        if told == "labels"
        else {"prompt_lengths": torch.tensor([5, 5])}
    )
    columns = {"prefix": [[0, 1], [0, 2]], "suffix": [[3, 4], [6, 7]]}  # five tokens before column 8: 0 2 3 6 7
    assert_edits(adapt(positions="f2+l2"), columns, input_ids=ids, attention_mask=mask, **say)


def test_position_ids_that_skip_padding_are_no_packed_rows(adapt, ids):
    """As generate and trainers make them from a mask: padding has any position, here that of the token after it."""
    mask = torch.tensor([[0] * 2 + [1] * 10, [1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1]])
    position_ids = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    columns = {"prefix": [[2, 3], [0, 2]], "suffix": [[6, 7], [6, 7]]}
    labels = labels_of(ids, [(8, 12)], [(8, 12)])
    inputs = dict(input_ids=ids, attention_mask=mask, position_ids=position_ids)
    assert_edits(adapt(positions="f2+l2"), columns, **inputs, labels=labels)
    assert_edits(adapt(positions="f2+l2"), columns, **inputs, prompt_lengths=torch.tensor([6, 5]))


@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_prepared_mask(adapt, ids, kind):
    attended = torch.ones(2, 1, 12, 12, dtype=torch.bool).tril()
    attended[1, :, :, 9:] = False  # right padding
    mask = attended if kind == "boolean" else torch.zeros(2, 1, 12, 12).masked_fill(~attended, torch.finfo().min)
    columns = {"prefix": [[0, 1], [0, 1]], "suffix": [[10, 11], [7, 8]]}
    model, by_hand = adapt(positions="f2+l2")
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
    expected = by_hand.logits(columns, input_ids=ids, attention_mask=mask)
    for row, end in enumerate((12, 9)):
        torch.testing.assert_close(logits[row, :end], expected[row, :end], atol=1e-5, rtol=1e-5)


def test_inputs_embeds(adapt, ids):
    model, by_hand = adapted = adapt(positions="f2+l2")
    embeds = by_hand.base.get_input_embeddings()(ids).detach()
    assert_edits(adapted, STRAIGHT["f2+l2"], inputs_embeds=embeds, labels=labels_of(ids, *TWO["answers"]))
    assert_edits(adapted, {"prefix": [[0, 1]] * 2, "suffix": [[10, 11]] * 2}, inputs_embeds=embeds)


def test_positional_arguments(adapt, ids):
    """To the base model: a PeftModel passes them on by name."""
    model, by_hand = adapt(positions="l2")
    mask = torch.tensor([[1] * 12, [1] * 9 + [0] * 3])
    with torch.no_grad():
        logits = model.get_base_model()(ids, mask).logits
        labelled = model.get_base_model()(ids, mask, None, None, None, labels_of(ids, [(5, 12)], [(5, 9)])).logits
    for found, columns in ((logits, [[10, 11], [7, 8]]), (labelled, [[3, 4], [3, 4]])):
        expected = by_hand.logits({"unit": columns}, input_ids=ids, attention_mask=mask)
        torch.testing.assert_close(found[1, :9], expected[1, :9], atol=1e-5, rtol=1e-5)


def test_every_answer_ends_a_prompt(adapt, ids):
    """Two assistant turns: the prefix edits come once, the suffix edits before each turn."""
    labels = labels_of(ids, [(4, 6), (9, 12)], [(5, 7), (10, 12)])
    columns = {"prefix": [[0, 1], [0, 1]], "suffix": [[2, 3, 7, 8], [3, 4, 8, 9]]}
    assert_edits(adapt(positions="f2+l2"), columns, input_ids=ids, labels=labels)
    columns = {"unit": [[0, 1, 2, 3, 6, 7, 8], [0, 1, 2, 3, 4, 7, 8, 9]]}
    assert_edits(adapt(positions="prompt"), columns, input_ids=ids, labels=labels)


def test_answers_are_not_edited_before_a_short_turn(adapt, ids):
    """The second prompt's last three tokens are one of its own and two of the first answer, which stay."""
    labels = labels_of(ids, [(4, 7), (8, 12)], [(4, 7), (8, 12)])
    assert_edits(adapt(positions="l3"), {"unit": [[1, 2, 3, 7]] * 2}, input_ids=ids, labels=labels)


def test_tokens_after_the_last_answer_are_in_no_prompt(adapt, ids):
    labels = labels_of(ids, [(4, 6)], [(5, 8)])
    assert_edits(adapt(positions="l2"), {"unit": [[2, 3], [3, 4]]}, input_ids=ids, labels=labels)


def test_prompt_that_fills_its_row(adapt, ids):
    labels = labels_of(ids, [(5, 12)], [])
    assert_edits(adapt(positions="l2"), {"unit": [[3, 4], [10, 11]]}, input_ids=ids, labels=labels)
    mask = torch.tensor([[1] * 12, [1] * 8 + [0] * 4])
    columns = {"prefix": [[0, 1], [0, 1, 2, 3]], "suffix": [[2, 3, 4], [4, 5, 6, 7]]}
    assert_edits(adapt(positions="f5+l5"), columns, input_ids=ids, attention_mask=mask, labels=labels)


def test_labels_everywhere(adapt, ids):
    """Plain language modelling: a prefix and all tokens can be edited, but no prompt ends anywhere."""
    mask = torch.tensor([[1] * 12, [0] * 3 + [1] * 9])
    labels = ids.masked_fill(mask == 0, IGNORED)
    inputs = dict(input_ids=ids, attention_mask=mask, labels=labels)
    assert_edits(adapt(positions="f2"), {"unit": [[0, 1], [3, 4]]}, **inputs)
    assert_edits(adapt(positions="all"), {"unit": [list(range(12)), list(range(3, 12))]}, **inputs)
    hole = mask.clone()
    hole[:, 6] = 0  # no prompt begins behind a token that is left out
    for positions in ("l1", "f2+l2", "prompt"):
        for seen in (mask, hole):
            with pytest.raises(ValueError, match="labels from its first token on.*-100"):
                adapt(positions=positions)[0](**inputs | dict(attention_mask=seen))


def test_prompt_lengths_come_before_labels(adapt, ids):
    labels = labels_of(ids, *TWO["answers"])
    assert_edits(
        adapt(positions="l2"),
        {"unit": [[1, 2], [2, 3]]},
        input_ids=ids,
        labels=labels,
        prompt_lengths=torch.tensor([3, 4]),
    )


def test_empty_prompt_is_not_edited(adapt, ids):
    assert_edits(
        adapt(positions="f1+l1"),
        {"prefix": [[], [0]], "suffix": [[], [3]]},
        input_ids=ids,
        prompt_lengths=torch.tensor([0, 4]),
    )


def test_nothing_told(adapt, ids):
    """The whole input is the prompt in eval mode; in training it is not known, and not guessed."""
    model, _ = adapted = adapt(positions="f2+l2")
    assert_edits(adapted, {"prefix": [[0, 1]] * 2, "suffix": [[10, 11]] * 2}, input_ids=ids)
    model.train()
    with pytest.raises(ValueError, match="labels.*prompt_lengths"):
        model(input_ids=ids)
    prefix, _ = adapted = adapt(positions="f2")
    prefix.train()
    assert_edits(adapted, {"unit": [[0, 1]] * 2}, input_ids=ids)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (torch.tensor([5]), r"int64 \[1\].*LongTensor \[2\]"),
        (torch.tensor([[5], [8]]), r"\[2, 1\]"),
        (torch.tensor([5.0, 8.0]), "float32"),
        ([5, 8], r"\[5, 8\].*LongTensor"),
        (torch.tensor([5, -1]), r"\[5, -1\]"),
        (torch.tensor([5, 10]), r"\[5, 10\].*\[12, 9\]"),  # row 1 has nine tokens
    ],
)
def test_wrong_prompt_lengths(adapt, ids, lengths, message):
    mask = torch.tensor([[1] * 12, [1] * 9 + [0] * 3])
    with pytest.raises(ValueError, match=message):
        adapt()[0](input_ids=ids, attention_mask=mask, prompt_lengths=lengths)


# Packed rows

PACKED = dict(
    # row 0: sequences of 5 (prompt 3) and 7 (prompt 4); row 1: of 6 (prompt 2), 4 (prompt 3) and 2 (no answer)
    position_ids=torch.tensor([[*range(5), *range(7)], [*range(6), *range(4), *range(2)]]),
    answers=([(3, 5), (9, 12)], [(2, 6), (9, 10)]),
)


@pytest.mark.parametrize(
    ("positions", "columns"),
    [
        ("f1+l1", {"prefix": [[0, 5], [0, 6, 10]], "suffix": [[2, 8], [1, 8, 11]]}),
        ("l9", {"unit": [[0, 1, 2, 5, 6, 7, 8], [0, 1, 6, 7, 8, 10, 11]]}),
        ("f2", {"unit": [[0, 1, 5, 6], [0, 1, 6, 7, 10, 11]]}),
        ("prompt", {"unit": [[0, 1, 2, 5, 6, 7, 8], [0, 1, 6, 7, 8, 10, 11]]}),
    ],
)
def test_packed_rows(adapt, ids, positions, columns):
    labels = labels_of(ids, *PACKED["answers"])
    assert_edits(
        adapt(positions=positions), columns, input_ids=ids, position_ids=PACKED["position_ids"], labels=labels
    )


def test_packed_prompt_ends_with_its_own_sequence(adapt, ids):
    """Row 0: tokens after an answer, row 1: a sequence without one; neither is in the prompt of the next sequence."""
    position_ids = torch.tensor([[*range(6), *range(6)]] * 2)
    labels = labels_of(ids, [(2, 3), (10, 12)], [(10, 12)])
    columns = {"unit": [[0, 1, 8, 9], [4, 5, 8, 9]]}
    assert_edits(adapt(positions="l2"), columns, input_ids=ids, position_ids=position_ids, labels=labels)


def test_packed_rows_by_lengths(adapt, ids):
    ids = ids[:1]
    labels, position_ids = labels_of(ids, PACKED["answers"][0]), PACKED["position_ids"][:1]
    columns = {"prefix": [[0, 5]], "suffix": [[2, 8]]}
    lengths = torch.tensor([0, 5, 12], dtype=torch.int32)
    assert_edits(
        adapt(positions="f1+l1"),
        columns,
        input_ids=ids,
        position_ids=position_ids,
        labels=labels,
        cu_seq_lens_q=lengths,
    )


def test_packed_sequences_equal_each_alone(adapt, ids):
    model, _ = adapt(positions="f1+l2")
    ids, position_ids = ids[:1], PACKED["position_ids"][:1]
    with torch.no_grad():
        packed = model(
            use_cache=False, input_ids=ids, position_ids=position_ids, labels=labels_of(ids, PACKED["answers"][0])
        ).logits
        alone = [
            model(input_ids=ids[:, a:b], labels=labels_of(ids[:, a:b], [(p, b - a)])).logits
            for a, b, p in ((0, 5, 3), (5, 12, 4))
        ]
    torch.testing.assert_close(packed, torch.cat(alone, 1), atol=1e-5, rtol=1e-5)


def test_packed_labels_everywhere(adapt, ids):
    """Packing hides each sequence's first label, which is no prompt of one token."""
    labels = ids.masked_fill(PACKED["position_ids"] == 0, IGNORED)
    inputs = dict(input_ids=ids, position_ids=PACKED["position_ids"], labels=labels)
    with pytest.raises(ValueError, match="labels from its first token on"):
        adapt(positions="l1")[0](**inputs)
    assert_edits(adapt(positions="f2"), {"unit": [[0, 1, 5, 6], [0, 1, 6, 7, 10, 11]]}, **inputs)


def test_sequence_that_begins_inside_an_answer(adapt, ids):
    """Cut out of a longer text: the ends of its later prompts are there, the beginning of none is."""
    inputs = dict(input_ids=ids, attention_mask=MASK)
    labels = labels_of(ids, [(0, 3), (7, 9)], [(4, 6), (10, 12)])
    assert_edits(adapt(positions="l2"), {"unit": [[5, 6], [8, 9]]}, labels=labels, **inputs)
    assert_edits(adapt(positions="prompt"), {"unit": [[3, 4, 5, 6], [6, 7, 8, 9]]}, labels=labels, **inputs)
    assert_edits(adapt(positions="f2"), {"unit": [[0, 1], [4, 5]]}, labels=labels, **inputs)
    for row in (slice(0, 1), slice(1, 2)):
        with pytest.raises(ValueError, match="first token on.*packing_strategy='bfd', truncation_mode='keep_start'"):
            adapt(positions="f2+l2")[0](input_ids=ids[row], attention_mask=MASK[row], labels=labels[row])


def test_single_sequence_in_packed_form(adapt, ids):
    """A row that happens to hold one sequence hides its first label, too."""
    labels = ids[:1].clone()
    labels[:, 0] = IGNORED
    inputs = dict(input_ids=ids[:1], labels=labels)
    assert_edits(adapt(positions="l1"), {"unit": [[0]]}, **inputs)  # not packed: a prompt of one token
    with pytest.raises(ValueError, match="labels from its first token on"):
        adapt(positions="l1")[0](**inputs, cu_seq_lens_q=torch.tensor([0, 12], dtype=torch.int32))


def test_packed_rows_have_no_single_length(adapt, ids):
    with pytest.raises(ValueError, match="several sequences"):
        adapt()[0](input_ids=ids, position_ids=PACKED["position_ids"], prompt_lengths=torch.tensor([3, 3]))


# Exact equality where nothing may be edited


def test_logits_before_the_edit_are_the_base_models(adapt, ids):
    model, by_hand = adapt(positions="l1")
    with torch.no_grad():
        logits = model(input_ids=ids, labels=labels_of(ids, [(5, 12)], [(5, 12)])).logits
    base = by_hand.logits({"unit": [[]]}, input_ids=ids)
    assert torch.equal(logits[:, :4], base[:, :4])
    assert not torch.allclose(logits[:, 4:], base[:, 4:], atol=1e-2)


def test_padding_is_never_edited(adapt, ids):
    """Not even under "all": a row's padding leaves the model as it would leave the base model."""
    model, by_hand = adapt(positions="all", layers_to_transform=[-1])
    mask = torch.tensor([[1] * 12, [1] * 9 + [0] * 3])
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
    base = by_hand.logits({"unit": [[]]}, input_ids=ids, attention_mask=mask)
    assert torch.equal(logits[1, 9:], base[1, 9:])
    assert not torch.allclose(logits[1, :9], base[1, :9], atol=1e-2)
