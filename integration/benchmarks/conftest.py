"""Leaves out the tests that are marked `benchmarks`, unless they are asked for by that name."""

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "benchmarks" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("benchmarks")]
    items[:] = [item for item in items if not item.get_closest_marker("benchmarks")]
    config.hook.pytest_deselected(items=left_out)
