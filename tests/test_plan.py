"""Which tokens are edited: every rule compared with ReFT by hand at columns that are listed here."""

import copy
import threading
from inspect import signature

import pytest
import torch
from by_hand import make_gpt2, make_llama
from torch._dynamo.testing import CompileCounter
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    MambaConfig,
    MambaForCausalLM,
    StaticCache,
)

from peft_reft.generation import CACHES, cached_tokens
from peft_reft.plan import current_plan

IGNORED = -100
CACHE = "cache" if "cache" in signature(LlamaForCausalLM.forward).parameters else "past_key_values"


def labels_of(ids, *answers):
    """Labels that are targets in the given spans of each row, and -100 elsewhere."""
    labels = torch.full_like(ids, IGNORED)
    for row, spans in enumerate(answers):
        for start, end in spans:
            labels[row, start:end] = ids[row, start:end]
    return labels


def assert_edits(adapted, columns, **inputs):
    """The model's logits are those by hand at these columns, and differ from the base model's."""
    model, by_hand = adapted
    told = {name: inputs.pop(name) for name in ("labels", "prompt_lengths", "cu_seq_lens_q") if name in inputs}
    with torch.no_grad():
        logits = model(**inputs, **told).logits
    expected = by_hand.logits(columns, **inputs)
    mask = inputs.get("attention_mask")
    seen = torch.ones(logits.shape[:2], dtype=torch.bool) if mask is None or mask.dim() > 2 else mask.bool()
    torch.testing.assert_close(logits[seen], expected[seen], atol=1e-5, rtol=1e-5)
    if any(any(rows) for rows in columns.values()):
        base = by_hand.logits({unit: [[]] for unit in columns}, **inputs)
        assert (base - expected)[seen].abs().max() > 1e-2, "the edit is too small to be seen"


# Prompt and answer in one row: row 0 has a prompt of 5 tokens, row 1 of 8
TWO = dict(answers=([(5, 12)], [(8, 12)]))

STRAIGHT = {
    "f2+l2": {"prefix": [[0, 1], [0, 1]], "suffix": [[3, 4], [6, 7]]},
    "f3+l1": {"prefix": [[0, 1], [0, 1, 2]], "suffix": [[4], [7]]},  # half of 5 is 2
    "f5+l5": {"prefix": [[0, 1], [0, 1, 2, 3]], "suffix": [[3, 4], [4, 5, 6, 7]]},  # cut to half the prompt
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
    model, by_hand = adapt(positions="l2")
    mask = torch.tensor([[1] * 12, [1] * 9 + [0] * 3])
    with torch.no_grad():
        logits = model(ids, mask).logits
    expected = by_hand.logits({"unit": [[10, 11], [7, 8]]}, input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(logits[1, :9], expected[1, :9], atol=1e-5, rtol=1e-5)


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


def test_labels_everywhere(adapt, ids):
    """Plain language modelling: a prefix and all tokens can be edited, but no prompt ends anywhere."""
    mask = torch.tensor([[1] * 12, [0] * 3 + [1] * 9])
    labels = ids.masked_fill(mask == 0, IGNORED)
    inputs = dict(input_ids=ids, attention_mask=mask, labels=labels)
    assert_edits(adapt(positions="f2"), {"unit": [[0, 1], [3, 4]]}, **inputs)
    assert_edits(adapt(positions="all"), {"unit": [list(range(12)), list(range(3, 12))]}, **inputs)
    for positions in ("l1", "f2+l2", "prompt"):
        with pytest.raises(ValueError, match="labels from its first token on.*-100"):
            adapt(positions=positions)[0](**inputs)


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


# generate

GENERATED = {
    "f2+l2": {"prefix": [[0, 1], [4, 5]], "suffix": [[10, 11], [10, 11]]},
    "f5+l5": {"prefix": [[0, 1, 2, 3, 4], [4, 5, 6, 7]], "suffix": [[7, 8, 9, 10, 11], [8, 9, 10, 11]]},
    "l3": {"unit": [[9, 10, 11], [9, 10, 11]]},
    "f1": {"unit": [[0], [4]]},
    "prompt": {"unit": [list(range(12)), list(range(4, 12))]},
    "all": {"unit": [list(range(99)), list(range(4, 99))]},
}
MASK = torch.tensor([[1] * 12, [0] * 4 + [1] * 8])
GREEDY = dict(do_sample=False, max_new_tokens=6, pad_token_id=0)


def generated(model, ids, mask=MASK, **options):
    return model.generate(input_ids=ids, attention_mask=mask, **GREEDY | options)


@pytest.mark.parametrize("positions", GENERATED)
@pytest.mark.parametrize("make", [make_llama, make_gpt2])
def test_generate(adapt, ids, positions, make):
    model, by_hand = adapt(make, positions=positions)
    expected = by_hand.generate(GENERATED[positions], ids, MASK)
    assert torch.equal(generated(model, ids), expected)
    inputs = dict(input_ids=ids[:1])
    base = by_hand.logits({unit: [[]] for unit in GENERATED[positions]}, **inputs)
    edited = by_hand.logits({unit: rows[:1] for unit, rows in GENERATED[positions].items()}, **inputs)
    assert (base - edited)[:, -1].abs().max() > 0.1, "the edit is too small to be seen"


@pytest.mark.parametrize("positions", GENERATED)
@pytest.mark.parametrize(
    "options",
    [
        dict(use_cache=False),
        dict(prefill_chunk_size=5),
        dict(cache_implementation="static"),
        dict(prompt_lookup_num_tokens=3),
    ],
    ids=lambda options: next(iter(options)),
)
def test_ways_to_generate(adapt, ids, positions, options):
    model, by_hand = adapt(positions=positions)
    if "prompt_lookup_num_tokens" in options:  # takes one row
        expected = by_hand.generate({unit: rows[:1] for unit, rows in GENERATED[positions].items()}, ids[:1])
        assert torch.equal(generated(model, ids[:1], MASK[:1], **options), expected)
    else:
        assert torch.equal(generated(model, ids, **options), by_hand.generate(GENERATED[positions], ids, MASK))


def test_generate_each_row_alone(adapt, ids):
    model, _ = adapt(positions="f2+l2")
    together = generated(model, ids)
    for row, start in enumerate((0, 4)):
        alone = generated(model, ids[row : row + 1, start:], None)
        assert torch.equal(alone[0], together[row, start:])


def test_generate_finds_padding_without_a_mask(adapt, ids):
    model, by_hand = adapt(positions="f2+l2")
    ids = ids.masked_fill(MASK == 0, 0)
    assert torch.equal(model.generate(ids, **GREEDY), by_hand.generate(GENERATED["f2+l2"], ids, MASK))


def test_generate_from_embeddings(adapt, ids):
    model, by_hand = adapt(positions="f2+l2")
    embeds = by_hand.base.get_input_embeddings()(ids)
    tokens = model.generate(inputs_embeds=embeds, attention_mask=MASK, **GREEDY)
    assert torch.equal(tokens, by_hand.generate(GENERATED["f2+l2"], ids, MASK)[:, 12:])


@pytest.mark.parametrize("options", [dict(num_beams=3), dict(num_beams=3, num_return_sequences=2)])
def test_beams(adapt, ids, options):
    """Beam search over the model by hand, which edits the same columns of every beam."""
    model, by_hand = adapt(positions="f2+l2")
    beams = {unit: [row for row in rows for _ in range(3)] for unit, rows in GENERATED["f2+l2"].items()}
    with by_hand.edits(beams):
        expected = generated(by_hand.base, ids, use_cache=False, **options)
    assert torch.equal(generated(model, ids, **options), expected)


def test_sampling(adapt, ids):
    model, by_hand = adapt(positions="f2+l2")
    options = dict(do_sample=True, num_return_sequences=3, use_cache=False)
    rows = {unit: [row for row in rows for _ in range(3)] for unit, rows in GENERATED["f2+l2"].items()}
    torch.manual_seed(5)
    with by_hand.edits(rows):
        expected = generated(by_hand.base, ids, **options)
    for use_cache in (False, True):
        torch.manual_seed(5)
        assert torch.equal(generated(model, ids, **options | dict(use_cache=use_cache)), expected)


def test_prompt_that_is_partly_cached(adapt, ids):
    """The prompt is all that the call was given; what the cache holds of it is edited as it was."""
    model, by_hand = adapt(positions="f2+l2")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids[:1, :7], prompt_lengths=torch.tensor([7]), use_cache=True, **{CACHE: cache})
    tokens = model.generate(input_ids=ids[:1], **{CACHE: cache}, **GREEDY)
    # Columns 5 and 6 were the end of a prompt when they were cached, columns 10 and 11 are the end of this one.
    assert torch.equal(tokens, by_hand.generate({"prefix": [[0, 1]], "suffix": [[5, 6, 10, 11]]}, ids[:1]))


def test_decoding_by_hand_equals_generate(adapt, ids):
    """A loop over forwards with a cache: one token after the prompt goes on with the answer."""
    model, by_hand = adapt(positions="f2+l2")
    tokens, given, cache = ids, ids, None
    with torch.no_grad():
        for _ in range(6):
            output = model(input_ids=given, use_cache=True, **{CACHE: cache})
            cache = output[CACHE]
            given = output.logits[:, -1:].argmax(-1)
            tokens = torch.cat([tokens, given], dim=1)
    assert torch.equal(tokens, generated(model, ids, torch.ones_like(ids)))


def test_generate_in_training_mode(adapt, ids):
    model, by_hand = adapt(positions="f2+l2")
    model.train()
    assert torch.equal(generated(model, ids), by_hand.generate(GENERATED["f2+l2"], ids, MASK))


def test_decoding_runs_no_unit(adapt, ids, monkeypatch):
    from peft_reft.intervention import Intervention

    calls = []
    forward = Intervention.forward
    monkeypatch.setattr(Intervention, "forward", lambda self, h: calls.append(h.shape[1]) or forward(self, h))
    model, _ = adapt(positions="f2+l2")
    generated(model, ids)
    assert calls == [2] * 6  # two units in three layers, at two tokens, once
    calls.clear()
    model, _ = adapt(positions="all")
    generated(model, ids)
    assert calls == [12] * 3 + [1] * 15


@pytest.mark.parametrize("how", ["keyword", "positional"])
def test_generation_config_that_says_nothing_of_padding(adapt, ids, how):
    """generate then takes the padding token of the model's own config, or that of the config it is given."""
    model, by_hand = adapt(positions="f2+l2")
    ids = ids.masked_fill(MASK == 0, 0)
    expected = by_hand.generate(GENERATED["f2+l2"], ids, MASK)
    silent = GenerationConfig(max_new_tokens=6, do_sample=False)
    given = (ids,) if how == "keyword" else (ids, silent)
    assert torch.equal(model.generate(*given, **({"generation_config": silent} if how == "keyword" else {})), expected)
    model.generation_config.pad_token_id = None
    telling = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(ids, generation_config=telling), expected)


def test_classifier_free_guidance_is_refused(adapt, ids):
    model, _ = adapt()
    with pytest.raises(ValueError, match="guidance_scale=1.5.*second prompt"):
        model.generate(input_ids=ids, guidance_scale=1.5, max_new_tokens=1)


def test_generate_within_generate(adapt, ids):
    """A call for another prompt, made by a logits processor: each keeps its own prompt."""
    model, by_hand = adapt(positions="l2")
    other = ids[:1, :5]
    inner = []

    class Asks(LogitsProcessor):
        def __call__(self, input_ids, scores):
            inner.append(model.generate(input_ids=other, **GREEDY))
            return scores

    expected = by_hand.generate({"unit": [[10, 11]] * 2}, ids)
    assert torch.equal(generated(model, ids, None, logits_processor=[Asks()]), expected)
    expected = by_hand.generate({"unit": [[3, 4]]}, other)
    assert len(inner) == 6 and all(torch.equal(tokens, expected) for tokens in inner)


def test_answer_after_a_cached_prompt(adapt, ids):
    """Labels tell the answer from the prompt that the cache holds: it is not edited, in eval and in training."""
    model, by_hand = adapt(positions="f2+l2")
    expected = by_hand.logits({"prefix": [[0, 1]] * 2, "suffix": [[6, 7]] * 2}, input_ids=ids)[:, 8:]
    for mode in (model.eval(), model.train()):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            mode(input_ids=ids[:, :8], prompt_lengths=torch.tensor([8, 8]), use_cache=True, **{CACHE: cache})
            found = mode(input_ids=ids[:, 8:], labels=ids[:, 8:].contiguous(), use_cache=True, **{CACHE: cache}).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_static_cache_by_hand(adapt, ids):
    """Its prepared mask has a column for every token that it could hold."""
    model, by_hand = adapt(positions="f2+l2")
    cache = StaticCache(config=model.config, max_cache_len=20)
    mask = torch.zeros(2, 1, 12, 20, dtype=torch.bool)
    mask[..., :12] = torch.ones(12, 12, dtype=torch.bool).tril()
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask, use_cache=True, **{CACHE: cache}).logits
    expected = by_hand.logits({"prefix": [[0, 1]] * 2, "suffix": [[10, 11]] * 2}, input_ids=ids)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_prepared_mask_that_lets_padding_attend_to_everything(adapt, ids):
    mask = torch.ones(2, 1, 12, 12, dtype=torch.bool).tril()
    mask[1, :, :, :4] = False
    mask[1, :, :4] = True
    model, by_hand = adapt(positions="f2+l2")
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask).logits
    expected = by_hand.logits(GENERATED["f2+l2"], input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1, 4:], expected[1, 4:], atol=1e-5, rtol=1e-5)


def make_mamba():
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=4,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=None,
    )
    return MambaForCausalLM(config).eval()


def test_state_space_model(adapt, ids):
    """Its cache does not tell how much it has seen."""
    model, by_hand = adapt(make_mamba, positions="f2+l2")
    ids = ids[:1]
    expected = by_hand.generate({"prefix": [[0, 1]], "suffix": [[10, 11]]}, ids)
    assert torch.equal(model.generate(input_ids=ids, **GREEDY), expected)
    assert torch.equal(model.generate(input_ids=ids, use_cache=False, **GREEDY), expected)
    tokens, given, cache = ids, ids, {}
    with torch.no_grad():
        for _ in range(6):
            output = model(input_ids=given, use_cache=True, **cache)
            name = next(name for name in CACHES if output.get(name) is not None)
            cache = {name: output[name]}
            given = output.logits[:, -1:].argmax(-1)
            tokens = torch.cat([tokens, given], dim=1)
    assert torch.equal(tokens, expected)


def test_cache_of_an_unknown_kind():
    with pytest.raises(ValueError, match="cache of type object.*continuous batching"):
        cached_tokens(object())


# A plan belongs to one call


def test_threads_do_not_see_each_others_plans(adapt, ids):
    model, _ = adapt(positions="f2+l2")
    prompts = [ids[:, : 6 + n] for n in range(4)]
    expected = [generated(model, prompt, torch.ones_like(prompt)) for prompt in prompts]
    wrong = []

    def generate(n):
        for _ in range(3):
            if not torch.equal(generated(model, prompts[n], torch.ones_like(prompts[n])), expected[n]):
                wrong.append(n)

    threads = [threading.Thread(target=generate, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_call_after_an_error(adapt, ids):
    model, _ = adapted = adapt(positions="l2")
    inner = model.get_base_model().model
    with pytest.raises(ValueError, match="attention_mask has 5 columns"):
        model(input_ids=ids, attention_mask=torch.ones(2, 5, dtype=torch.long))
    with (
        torch.no_grad()
    ):  # the inner model alone: a plan that was left behind would still say that there are 12 tokens
        inner(input_ids=ids[:, :6])
    assert_edits(adapted, {"unit": [[10, 11]] * 2}, input_ids=ids)


@pytest.mark.parametrize("interrupted", ["outer", "inner", "generate"])
def test_call_after_an_interrupt(adapt, ids, interrupted):
    """As when a notebook's cell is stopped: torch's hooks do not run then, and what they would end must not stay."""
    model, _ = adapted = adapt(positions="l2")
    inner = model.get_base_model().model

    def stop(*args):
        raise KeyboardInterrupt

    handle = inner.layers[1].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        if interrupted == "outer":
            model(input_ids=ids[:, :7], labels=labels_of(ids[:, :7], [(3, 7)], [(3, 7)]))
        elif interrupted == "inner":
            inner(input_ids=ids[:, :7])
        else:
            model.generate(input_ids=ids[:, :7], max_new_tokens=2)
    handle.remove()
    with torch.no_grad():
        hidden_states = inner(input_ids=ids).last_hidden_state
        logits = model.get_base_model().lm_head(hidden_states)
        assert torch.equal(logits, model(input_ids=ids).logits)
    assert_edits(adapted, {"unit": [[3, 4], [6, 7]]}, input_ids=ids, labels=labels_of(ids, *TWO["answers"]))
    assert current_plan() is None


def test_inner_model_of_a_causal_model_does_not_guess_either(adapt, ids):
    model, _ = adapt(positions="l2")
    inner = model.get_base_model().model.train()
    with pytest.raises(ValueError, match="prompt_lengths"):
        inner(input_ids=ids)
    with torch.no_grad():
        hidden_states = inner(input_ids=ids, prompt_lengths=torch.tensor([5, 8])).last_hidden_state
        logits = model.get_base_model().lm_head(hidden_states)
        assert torch.equal(logits, model(input_ids=ids, prompt_lengths=torch.tensor([5, 8])).logits)


def test_copy_plans_for_itself(adapt, ids):
    model, _ = adapt(positions="f2+l2")
    duplicate = copy.deepcopy(model)
    expected = generated(model, ids)
    for parameter in model.get_base_model().parameters():
        parameter.data.zero_()
    assert torch.equal(generated(duplicate, ids), expected)
    duplicate.train()
    duplicate(input_ids=ids, labels=labels_of(ids, *TWO["answers"])).loss.backward()
    trained = [p for p in duplicate.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None for p in trained)
    assert all(p.grad is None for p in model.parameters())


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("by", ["transformers", "transformers, reentrant", "torch"])
def test_checkpointing_with_another_call_before_backward(adapt, ids, by):
    """As in DPO: policy forward, reference forward, and only then the backward, which runs blocks again.

    transformers checkpoints a block's forward, torch's wrapper (which FSDP uses) its call with the hooks. (torch's
    reentrant wrapper loses gradients of the base model, too: it takes no tuples of tensors.)
    """
    labels = labels_of(ids, *TWO["answers"])
    model, _ = adapt(positions="f2+l2")
    model.train()
    model(input_ids=ids, labels=labels).loss.backward()
    expected = gradients(model)
    model.zero_grad()

    model.enable_input_require_grads()
    if by == "torch":
        layers = model.get_base_model().model.layers
        for index, block in enumerate(layers):
            layers[index] = checkpoint_wrapper(block, checkpoint_impl=CheckpointImpl.NO_REENTRANT)
    else:
        model.gradient_checkpointing_enable({"use_reentrant": "reentrant" in by})
    loss = model(input_ids=ids, labels=labels).loss
    with torch.no_grad():
        model(input_ids=ids.flip(1)[:, :9], prompt_lengths=torch.tensor([2, 3]))
    loss.backward()
    found = {name.replace("_checkpoint_wrapped_module.", ""): grad for name, grad in gradients(model).items()}
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("positions", ["f2+l2", "prompt", "all"])
def test_compiled_in_one_graph_for_all_prompts(adapt, ids, positions):
    model, _ = adapt(positions=positions)
    counter = CompileCounter()
    compiled = torch.compile(model.train(), fullgraph=True, backend=counter)
    for answers in (TWO["answers"], ([(3, 12)], [(9, 12)]), ([(2, 4), (6, 12)], [])):
        inputs = dict(input_ids=ids, labels=labels_of(ids, *answers))
        assert compiled(**inputs).loss == model(**inputs).loss
    assert counter.frame_count == 1
