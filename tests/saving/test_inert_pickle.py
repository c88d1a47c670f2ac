"""Pickles of every protocol, read without their classes; what a pickle may not do is in test_resume.py."""

import pickle
from collections import OrderedDict
from pathlib import PurePosixPath

import pytest

from peft_reft.saving import inert_pickle
from peft_reft.saving.inert_pickle import Inert, read_inert


class Example:
    def __init__(self, **attributes):
        vars(self).update(attributes)


def as_plain(value):
    """Lists of what containers hold, and attributes by name."""
    if not isinstance(value, Inert):
        return value
    if isinstance(value.state, Inert):
        return {name: as_plain(attribute) for name, attribute in value.state.by_name.items()}
    return [as_plain(item) for item in value.items]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_values(protocol):
    values = [None, True, False, 0, 255, 2**16, -1, 2**70, 0.5, "a", "\u20ac" * 300, [], [1, [2]], {"a": {"b": 1}}]
    values += [(), (1,), (1, 2, 3), (1, 2, 3, 4), b"bytes" if protocol > 2 else 1]
    read = as_plain(read_inert(pickle.dumps(values, protocol)))
    assert read == [*values[:11], [], [1, [2]], ["a", ["b", 1]], [], [1], [1, 2, 3], [1, 2, 3, 4], values[-1]]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_objects(protocol):
    shared = Example(number=1)
    example = Example(name="a", inner=shared, again=shared, path=PurePosixPath("a"), items=OrderedDict(a=1))
    read = read_inert(pickle.dumps(example, protocol))
    assert read.attribute("name") == "a"
    assert read.attribute("inner") is read.attribute("again")
    assert read.attribute("inner").attribute("number") == 1
    assert isinstance(read.attribute("path"), Inert)
    if protocol > 1:
        assert read.attribute("items").by_name == {"a": 1}
    with pytest.raises(ValueError, match="a pickled object has no other"):
        read.attribute("other")


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (b"", "exhausted"),
        (b"N", "exhausted"),
        (b"R.", "takes what it did not give"),
        (b"(a.", "takes what it did not give"),
        (b"\x80\x05\x97.", "NEXT_BUFFER, which no checkpoint needs"),
        (b"\x80\x02\x8b\x01\x00\x00\x00\x01.", "LONG4, which no checkpoint needs"),
        (b"]" * 20 + b".", "more than 10 operations"),
    ],
)
def test_what_is_no_pickle_or_needless(monkeypatch, pickled, message):
    monkeypatch.setattr(inert_pickle, "MAX_OPERATIONS", 10)
    with pytest.raises(ValueError, match=message):
        read_inert(pickled)
