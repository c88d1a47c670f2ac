"""The formulas behind docs/memory.md are what real 4-bit models keep, to the byte."""

import pytest
import torch
from measure import bytes_of
from memory import (
    LARGE,
    SETTINGS,
    SMALL,
    Run,
    adapted,
    alive_in_step,
    base_bytes,
    in_4bit,
    kept,
    kept_for_backward,
    make_batch,
    quant_tensors,
    state_bytes,
    trainable,
)

pytest.importorskip("bitsandbytes")

SHAPES = [(SMALL[0], 2, 40), (SMALL[1], 1, 33)]
TOLD = {"labels": False, "prompt_lengths": True}
LARGER = pytest.param(*SHAPES[1], marks=pytest.mark.benchmarks, id="larger")
BFLOAT16 = pytest.param(torch.bfloat16, marks=pytest.mark.benchmarks)


@pytest.mark.parametrize(("config", "batch", "tokens"), [pytest.param(*SHAPES[0], id="small"), LARGER])
@pytest.mark.parametrize("parameters", [torch.float32, BFLOAT16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_autograd_keeps(config, batch, tokens, dtype, parameters):
    inputs = {told: make_batch(config, batch, tokens, 24, lengths) for told, lengths in TOLD.items()}
    base = kept_for_backward(adapted(in_4bit(config, dtype), None), inputs["labels"])
    assert base == kept(config, None, Run(batch, tokens, False, dtype, parameters))[0]
    for name, setting in SETTINGS.items():
        model = adapted(in_4bit(config, dtype), setting(), parameters)
        for told in TOLD if name.startswith("ReFT") else ("labels",):
            run = Run(batch, tokens, TOLD[told], dtype, parameters)
            assert kept_for_backward(model, inputs[told]) - base == kept(config, setting(), run)[0], (name, told)


@pytest.mark.benchmarks
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_alive_between_forward_and_backward(checkpointing):
    """Seen from outside of autograd, by the lives of storages: the same, and less with gradient checkpointing."""
    config, batch, tokens = SHAPES[0]

    def measure(adapter, lengths):
        model = adapted(in_4bit(config), adapter)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        inputs = make_batch(config, batch, tokens, 24, lengths)
        alive_in_step(model, inputs)  # the first makes gradients
        model.zero_grad()
        return alive_in_step(model, inputs)

    base, base_peak = measure(None, False)
    loss = 4
    assert base - loss == kept(config, None, Run(batch, tokens, False, torch.float32), checkpointing)[0]
    for name, setting in SETTINGS.items():
        for lengths in (False, True) if name.startswith("ReFT") else (False,):
            between, peak = measure(setting(), lengths)
            computed, most = kept(config, setting(), Run(batch, tokens, lengths, torch.float32), checkpointing)
            assert between - base == computed, (name, lengths)
            gradients = 4 * trainable(config, setting())
            assert peak - base_peak <= most + gradients, (name, lengths)


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16], ids=str)
def test_what_an_adapter_takes(tmp_path, dtype):
    config = SMALL[0]
    base = in_4bit(config)
    assert base_bytes(config, torch.float32) == bytes_of([*base.parameters(), *quant_tensors(base)])
    for name, setting in SETTINGS.items():
        model = adapted(in_4bit(config), setting(), dtype)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained)
        model(**make_batch(config, 2, 40, 24, lengths=False)).loss.backward()
        optimizer.step()
        averages = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
        found = bytes_of(trained) + bytes_of([parameter.grad for parameter in trained]) + bytes_of(averages)
        assert found == state_bytes(trainable(config, setting()), dtype), name

        model.save_pretrained(tmp_path / name)
        file = (tmp_path / name / "adapter_model.safetensors").stat().st_size
        names = file - bytes_of(trained)
        assert 0 < names < 200 * len(trained), name


@pytest.mark.benchmarks
def test_parameters_of_large_models():
    """By hand, from the shapes of LLaMA's matrices."""
    for config in LARGE.values():
        layers, d, ffn = config.num_hidden_layers, config.hidden_size, config.intermediate_size
        kv = config.num_key_value_heads * config.head_dim
        unit = 2 * 8 * d + 8
        q_and_v = 8 * (d + d) + 8 * (d + kv)
        linear = 16 * (2 * (d + d) + 2 * (d + kv) + 3 * (d + ffn))
        counts = [2 * layers * unit, layers * unit, layers * unit, layers * q_and_v, layers * linear]
        assert [trainable(config, setting()) for setting in SETTINGS.values()] == counts
