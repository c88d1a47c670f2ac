import copy
from collections.abc import Callable

import pytest
import torch
from by_hand import VOCABULARY, ByHand, make_llama
from peft import PeftModel, get_peft_model
from torch import nn

from peft_reft import ReftConfig


@pytest.fixture
def adapt() -> Callable[..., tuple[PeftModel, ByHand]]:
    """Gives a tiny model with a ReFT adapter that edits visibly, in eval mode, and the same by hand."""

    def make(make_base: Callable[[], nn.Module] = make_llama, **options) -> tuple[PeftModel, ByHand]:
        base = make_base()
        options = {"task_type": "CAUSAL_LM", "r": 4, "init_weights": False} | options
        torch.manual_seed(1)
        model = get_peft_model(copy.deepcopy(base), ReftConfig(**options)).eval()
        return model, ByHand(base, model)

    return make


@pytest.fixture
def ids() -> torch.Tensor:
    """Two rows of twelve tokens, none of them padding."""
    return torch.randint(2, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(2))
