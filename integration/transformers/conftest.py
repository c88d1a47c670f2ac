"""Adapted models by both entry points: PEFT's, and transformers' own without a `PeftModel`."""

import copy

import pytest
import torch
from by_hand import ByHand, adapt_model, make_llama


@pytest.fixture(params=["get_peft_model", "load_adapter"])
def adapt(request, tmp_path):
    """Gives a tiny model with a ReFT adapter that edits visibly, in eval mode, and the same by hand."""

    def make(make_base=make_llama, **options):
        base, options = make_base(), {"positions": "f2+l2"} | options
        model, by_hand = adapt_model(base, **options)
        if request.param == "get_peft_model":
            return model, by_hand
        model.save_pretrained(tmp_path)
        other = copy.deepcopy(base)
        if request.param == "add_adapter":
            torch.manual_seed(1)
            other.add_adapter(model.peft_config["default"], "default")
        else:
            other.load_adapter(str(tmp_path), adapter_name="default")
        return other.eval(), ByHand(base, other)

    return make
