import gc
from collections.abc import Callable

import pytest
import torch
from by_hand import ByHand, adapt_model, make_llama, random_ids
from cards import compile_template_once
from peft import PeftModel
from torch import nn

compile_template_once()


def pytest_configure(config: pytest.Config) -> None:
    """Drop what imports have printed so far, or pytest prints it after its last line."""
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture.is_globally_capturing():
        capture.read_global_capture()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Keep what was imported out of garbage collection, which takes a tenth of the tests' time otherwise."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def adapt() -> Callable[..., tuple[PeftModel, ByHand]]:
    """Gives a tiny model with a ReFT adapter that edits visibly, in eval mode, and the same by hand."""

    def make(make_base: Callable[[], nn.Module] = make_llama, **options) -> tuple[PeftModel, ByHand]:
        return adapt_model(make_base(), **options)

    return make


@pytest.fixture
def ids() -> torch.Tensor:
    """Two rows of twelve tokens, none of them padding."""
    return random_ids()
