"""No causal language model falls back from what docs/architectures.md says of it."""

import pytest
from sweep import cell, read_table, try_architecture
from tiny import KINDS

KIND = "causal"


def test_table_is_complete():
    """If not: python integration/architectures/sweep.py --write docs/architectures.md"""
    assert sorted(read_table()[KIND]) == sorted(KINDS[KIND])


@pytest.mark.parametrize("name", sorted(KINDS[KIND]))
def test_architecture(name):
    result = try_architecture(KIND, name)
    assert cell(result) == read_table()[KIND].get(name), result.reason
