"""The picture of docs/learning.md shows what it says: largest against median dimension, without the first token."""

import pytest
import scales
import torch
from by_hand import make_llama, random_ids


def test_measured_by_hand(tmp_path):
    model, ids = make_llama(3), random_ids()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[5] *= 300
    found = scales.measure(model, [row[None] for row in ids])
    assert {kind: len(values) for kind, values in found.items()} == {"block": 2, "norm": 2, "standard": 2}
    with torch.no_grad():
        hidden = [model(input_ids=row[None], output_hidden_states=True).hidden_states for row in ids]
    for layer in range(2):
        states = torch.cat([row[layer + 1][0, 1:] for row in hidden])
        normed = model.model.layers[layer + 1].input_layernorm(states)
        for kind, tensor in (("block", states), ("norm", normed)):
            rms = tensor.detach().double().pow(2).mean(0).sqrt()
            assert found[kind][layer] == pytest.approx((rms.max() / rms.median()).item(), rel=1e-4)
        assert found["standard"][layer] < 2  # powers of two are at most a factor of sqrt(2) off
    assert found["block"][1] > 30 > found["block"][0]
    scales.draw(found, tmp_path / "picture.svg")
    assert "<svg" in (tmp_path / "picture.svg").read_text()
