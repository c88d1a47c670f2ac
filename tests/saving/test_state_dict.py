import pytest

from peft_reft.saving.state_dict import Key

KEYS = {
    "base_model.model.model.layers.0._reft._reft_prefix.default._R": (
        "base_model.model.model.layers.0",
        "prefix",
        "R",
        "default",
    ),
    "model.layers.0.mlp._reft._reft_unit.my-adapter._b": ("model.layers.0.mlp", "unit", "b", "my-adapter"),
    "0._reft._reft_suffix._W": ("0", "suffix", "W", None),
}


@pytest.mark.parametrize("key", KEYS)
def test_keys(key):
    assert Key.read(key) == KEYS[key] and str(Key(*KEYS[key])) == key


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.reft_prefix.default.R",
        "0._reft._reft_other._R",
        "0._reft._reft_unit",
        "0._reft._reft_unit.one.two._R",
    ],
)
def test_keys_of_something_else(key):
    assert Key.read(key) is None
