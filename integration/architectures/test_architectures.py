"""No architecture falls back from what docs/architectures.md says of it."""

import pytest
from sweep import cell, read_table, try_architecture
from tiny import KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_table_is_complete(kind):
    """If not: python integration/architectures/sweep.py --write docs/architectures.md"""
    assert sorted(read_table()[kind]) == sorted(KINDS[kind])


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in sorted(KINDS[kind])])
def test_architecture(kind, name):
    result = try_architecture(kind, name)
    assert cell(result) == read_table()[kind].get(name), result.reason
