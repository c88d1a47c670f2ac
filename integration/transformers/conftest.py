"""Adapted models by both entry points: PEFT's, and transformers' own without a `PeftModel`."""

import copy

import pytest
import torch
from by_hand import VOCABULARY, ByHand, make_llama
from peft import get_peft_model

from peft_reft import ReftConfig


@pytest.fixture(params=["get_peft_model", "load_adapter"])
def adapt(request, tmp_path):
    """Gives a tiny model with a ReFT adapter that edits visibly, in eval mode, and the same by hand."""

    def make(make_base=make_llama, **options):
        base = make_base()
        options = {"task_type": "CAUSAL_LM", "r": 4, "positions": "f2+l2", "init_weights": False} | options
        torch.manual_seed(1)
        model = copy.deepcopy(base)
        if request.param == "add_adapter":
            model.add_adapter(ReftConfig(**options), "default")
        else:
            wrapped = get_peft_model(model, ReftConfig(**options))
            if request.param == "load_adapter":
                wrapped.save_pretrained(tmp_path)
                model = copy.deepcopy(base)
                model.load_adapter(str(tmp_path), adapter_name="default")
            else:
                model = wrapped
        return model.eval(), ByHand(base, model)

    return make


@pytest.fixture
def ids() -> torch.Tensor:
    """Two rows of twelve tokens, none of them padding."""
    return torch.randint(2, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(2))
