"""Whether gradients pass through the linear layers of a quantized base."""

import copy

import pytest
import torch
from by_hand import labels_of, make_llama
from peft import get_peft_model
from torch import nn

from peft_reft import ReftConfig
from peft_reft.quantized import is_quantized, passed_gradient


class Rounding(nn.Linear):
    """Rounds what it is given to 8 bits, as kernels for inference do, with a gradient through the scale alone."""

    def forward(self, x):
        scale = x.abs().amax(-1, keepdim=True) / 127
        return super().forward((x / scale).round() * scale)


class Detached(nn.Linear):
    def forward(self, x):
        return super().forward(x).detach()


class StraightThrough(nn.Linear):
    def forward(self, x):
        scale = x.detach().abs().amax(-1, keepdim=True) / 127
        return super().forward(x + ((x / scale).round() * scale - x).detach())


def adapted(kind=nn.Linear):
    """A model, marked as one that transformers has quantized, with other layers in its last block."""
    model = make_llama()
    model.is_quantized = True
    for name in ("down_proj", "up_proj"):
        getattr(model.model.layers[-1].mlp, name).__class__ = kind
    return get_peft_model(model, ReftConfig(task_type="CAUSAL_LM", r=4, positions="f2+l2", init_weights=False))


@pytest.fixture
def inputs(ids):
    return dict(input_ids=ids, labels=labels_of(ids, [(5, 12)], [(8, 12)]))


@pytest.mark.parametrize("kind", [Rounding, Detached])
def test_layers_without_their_gradient_are_refused(inputs, kind):
    model = adapted(kind)
    which = "no" if kind is Detached else "a wrong"
    message = rf"model\.layers\.2\.mlp\.\w+_proj and layers like it .* pass {which} gradient"
    for each in (model, copy.deepcopy(model)):
        each.eval()(**inputs)
        with torch.no_grad():
            each.train()(**inputs)
        with pytest.raises(ValueError, match=message):
            each(**inputs)


@pytest.mark.parametrize("kind", [nn.Linear, StraightThrough])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_with_a_gradient_are_looked_at_once(monkeypatch, inputs, kind, dtype):
    seen = []
    monkeypatch.setattr(
        "peft_reft.quantized.passed_gradient", lambda layer: seen.append(layer) or passed_gradient(layer)
    )
    model, state = adapted(kind).to(dtype).train(), torch.get_rng_state()
    for _ in range(2):
        model(**inputs).loss.backward()
    assert [type(layer) for layer in seen] == [nn.Linear, kind][: 1 + (kind is not nn.Linear)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for layer in seen for p in layer.parameters())


def test_same_class_with_another_forward_is_of_another_kind(inputs):
    """As compressed-tensors gives layers."""
    model = adapted()
    layer = model.get_base_model().model.layers[-1].self_attn.q_proj
    layer.forward = lambda x: nn.functional.linear(x, layer.weight).detach()
    with pytest.raises(ValueError, match=r"layers\.2\.self_attn\.q_proj and layers like it .* pass no gradient"):
        model.train()(**inputs)


def test_unloaded_model_is_not_checked(inputs):
    base = adapted(Detached).unload()
    base.train()(**inputs)
    assert not base._forward_pre_hooks and "_reft_gradient_check" not in vars(base)


def test_what_is_quantized():
    model = make_llama()
    assert not is_quantized(model)
    model.model.is_quantized = True
    assert is_quantized(nn.Sequential(model))
