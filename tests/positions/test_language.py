import itertools

import pytest
import torch
from by_hand import assert_edits, labels_of

from peft_reft.positions.language import PerRowPositions, Positions
from peft_reft.positions.prompts import Prompts
from peft_reft.positions.select import to_rows


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("f7+l7", (7, 7, None)),
        ("f1", (1, 0, None)),
        ("l13", (0, 13, None)),
        ("prompt", (0, 0, "prompt")),
        ("all", (0, 0, "all")),
    ],
)
def test_parse(text, expected):
    positions = Positions.parse(text)
    assert (positions.prefix, positions.suffix, positions.span) == expected and positions.text == text
    assert positions.middle


@pytest.mark.parametrize(
    "text",
    [
        "",
        "f",
        "l",
        "+",
        "7",
        "f-1",
        "f0",
        "l0",
        "f3+f4",
        "l7+f7",
        "f7l7",
        "f7+",
        "+l7",
        "f7 + l7",
        "f1.5",
        "F7",
        "everything",
        "f7-middle",
        "l7-middle",
        "prompt-middle",
        "f7+l7-mid",
    ],
)
def test_parse_refuses(text):
    with pytest.raises(ValueError, match=r"positions='.*' cannot be read.*'f<n>'.*'all'"):
        Positions.parse(text)


@pytest.mark.parametrize("value", [None, 7, ["f7"]])
def test_parse_refuses_what_is_no_string(value):
    with pytest.raises(ValueError, match="cannot be read"):
        Positions.parse(value)


def test_units():
    assert Positions.parse("f7+l7").units(share_weights=False) == ("prefix", "suffix")
    assert Positions.parse("f7+l7").units(share_weights=True) == ("unit",)
    for text in ("f7", "l7", "prompt", "all"):
        assert Positions.parse(text).units(share_weights=False) == ("unit",)


def locations(length, first_n, last_n, middle):
    """Both ends are cut to half; pyreft's `get_intervention_locations` does without the middle of an odd prompt."""
    if first_n and last_n:
        first_n, last_n = min(first_n, length // 2), min(last_n, length // 2 + (length % 2 if middle else 0))
    else:
        first_n, last_n = min(first_n, length), min(last_n, length)
    return list(range(first_n)), list(range(length - last_n, length))


SHORT = {  # prefix and suffix of f2+l2 in prompts of so many tokens
    1: ([], [0]),
    2: ([0], [1]),
    3: ([0], [1, 2]),
    4: ([0, 1], [2, 3]),
    5: ([0, 1], [3, 4]),
}


@pytest.mark.parametrize("length", SHORT)
def test_short_prompts(adapt, ids, length):
    """The suffix gets the odd token."""
    prefix, suffix = SHORT[length]
    columns = {"prefix": [prefix] * 2, "suffix": [suffix] * 2}
    labels = labels_of(ids, [(length, 12)], [(length, 12)])
    assert_edits(adapt(positions="f2+l2"), columns, input_ids=ids, labels=labels)
    assert_edits(adapt(positions="f2+l2"), columns, input_ids=ids, prompt_lengths=torch.tensor([length] * 2))
    assert_edits(adapt(positions="f2+l2"), columns, input_ids=ids[:, :length])
    if length % 2 and length < 4:
        suffix = suffix[1:]
    columns = {"prefix": [prefix] * 2, "suffix": [suffix] * 2}
    assert_edits(adapt(positions="f2+l2-middle"), columns, input_ids=ids, labels=labels)


@pytest.mark.parametrize(
    "text", ["f1+l1", "f3+l3", "f2+l5", "f5+l1", "f4", "l4", "f1+l1-middle", "f3+l3-middle", "f5+l2-middle"]
)
def test_select_for_every_length(text):
    positions = Positions.parse(text)
    for length in range(1, 13):
        valid = torch.ones(1, 12, dtype=torch.bool)
        spans = Prompts(
            valid, torch.arange(12)[None], torch.tensor([[length]]), torch.tensor([[length]]), one_prompt=True
        )
        masks = positions.select(spans, positions.units(share_weights=False))
        prefix, suffix = locations(length, positions.prefix, positions.suffix, "middle" not in text)
        listed = [mask[0].nonzero().flatten().tolist() for mask in masks.values()]
        assert listed == ([prefix, suffix] if len(masks) == 2 else [prefix + suffix])
        together = positions.select(spans, ("unit",))["unit"][0].nonzero().flatten().tolist()
        assert together == sorted({*prefix, *suffix})


def test_rows_hold_the_marked_columns_and_no_column_twice():
    """For each number of tokens that two units edit, up to their bounds, in rows that just hold them, or more."""
    for tokens in (7, 9):
        orders = [torch.randperm(tokens).tolist() for _ in range(4 * 3)]
        masks = {unit: torch.zeros(4 * 3, tokens, dtype=torch.bool) for unit in ("prefix", "suffix")}
        for row, (order, (first, last)) in enumerate(zip(orders, itertools.product(range(4), range(3)), strict=True)):
            masks["prefix"][row, order[:first]] = masks["suffix"][row, order[first : first + last]] = True
        (found,) = to_rows(masks, {"prefix": 3, "suffix": 2})
        batch, columns = found.indices
        assert found.units == ("prefix", "suffix")
        assert torch.equal(batch, torch.arange(12).view(1, 12, 1)) and columns.shape == found.mask.shape == (2, 12, 3)
        for row in range(12):
            assert len(set(columns[:, row].flatten().tolist())) == 6
            for index, mask in enumerate(masks.values()):
                edited = columns[index, row][found.mask[index, row]]
                assert sorted(edited.tolist()) == mask[row].nonzero().flatten().tolist()


def test_rows_without_a_bound_hold_all_columns():
    masks = {unit: torch.rand(2, 6) < 0.2 for unit in ("prefix", "suffix")}
    for most in ((None, None), (3, 3), (4, 1)):
        found = to_rows(masks, dict(zip(masks, most, strict=True)))
        assert [(rows.units, rows.indices) for rows in found] == [(("prefix",), None), (("suffix",), None)]
        assert all(torch.equal(rows.mask[0], masks[rows.units[0]]) for rows in found)
    gathered, whole = to_rows(masks, {"prefix": 5, "suffix": None})
    assert (gathered.units, whole.units) == (("prefix",), ("suffix",))
    assert whole.indices is None and gathered.indices[1].shape == gathered.mask.shape == (1, 2, 5)


def test_a_unit_without_tokens_is_left_out():
    masks = {unit: torch.zeros(2, 6, dtype=torch.bool) for unit in ("prefix", "suffix")}
    assert [rows.units for rows in to_rows(masks, {"prefix": 0, "suffix": 2})] == [("suffix",)]
    assert [rows.units for rows in to_rows(masks, {"prefix": 0, "suffix": None})] == [("suffix",)]


@pytest.mark.parametrize("asked_before", [False, True])
def test_positions_of_rows_are_those_of_each(asked_before):
    """Whatever was asked of them before, for as many rows as prompts were expanded to."""
    choices = [Positions.parse(text) for text in ("f3+l3-middle", "l2", "all", "prompt")] + [None]
    rows = PerRowPositions(tuple(choices))
    device = torch.device("cpu")
    if asked_before:
        needs_end, prefix = rows.needs(10, device)
        assert needs_end[:, 0].tolist() == [True] * 4 + [False] * 2 + [True] * 2 + [False] * 2
        assert prefix[:, 0].tolist() == [True] * 2 + [False] * 8
        rows.outside_prompts(("prefix", "suffix"), 10, 6, device)
    length = torch.full((10, 1), 5)
    spans = Prompts(torch.ones(10, 6, dtype=torch.bool), torch.arange(6).expand(10, -1), length, length)
    found = rows.select(spans, ("prefix", "suffix"))
    expected = {
        "prefix": [[0, 1], [], [], [], []],
        "suffix": [[3, 4], [3, 4], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4], []],
    }
    for unit, columns in expected.items():
        assert [row.nonzero()[:, 0].tolist() for row in found[unit]] == [each for each in columns for _ in range(2)]
