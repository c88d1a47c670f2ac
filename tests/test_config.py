import copy
import dataclasses
import inspect
import json
import pickle

import pytest
import torch
from by_hand import adapt_model, make_llama
from peft import PeftConfig, get_peft_model
from transformers.activations import ACT2FN

from peft_reft import ReftConfig

# Every field of the design's section 7, with a value that is not its default
VALUES = dict(
    task_type="CAUSAL_LM",
    intervention="direft",
    r=3,
    rank_pattern={"layers.1": 2},
    positions="f2+l5",
    share_weights=True,
    layers_to_transform=[0, -1],
    layers_pattern="layers",
    target_modules=["mlp"],
    exclude_modules=["layers.2.mlp"],
    dropout=0.1,
    act_fn="gelu",
    init_weights="reference",
    standardize=False,
    modules_to_save=["lm_head"],
    trainable_token_indices=[1, 2],
)


def test_json_round_trip(tmp_path):
    config = ReftConfig(**VALUES)
    config.save_pretrained(tmp_path)
    for loaded in (ReftConfig.from_pretrained(tmp_path), PeftConfig.from_pretrained(tmp_path)):
        assert isinstance(loaded, ReftConfig)
        assert loaded == config
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "REFT" and {name: saved[name] for name in VALUES} == VALUES


def test_format_of_a_later_version(tmp_path):
    """Its fields would be dropped with a warning, and the adapter would edit wrongly."""
    ReftConfig().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    saved = json.loads(path.read_text())
    assert saved["format"] == 1
    path.write_text(json.dumps(saved | {"format": 2, "centre": True}))
    with pytest.raises(ValueError, match="format=2: this version.*pip install --upgrade peft_reft"):
        PeftConfig.from_pretrained(tmp_path)
    del saved["format"]
    path.write_text(json.dumps(saved))
    assert PeftConfig.from_pretrained(tmp_path) == ReftConfig()


def test_defaults_round_trip(tmp_path):
    ReftConfig().save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == ReftConfig()


def test_unknown_future_fields_are_tolerated(tmp_path):
    ReftConfig(**VALUES).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"from_the_future": 1}))
    with pytest.warns(UserWarning, match="from_the_future"):
        assert PeftConfig.from_pretrained(tmp_path) == ReftConfig(**VALUES)


def test_every_field_has_a_help_text():
    for field in dataclasses.fields(ReftConfig):
        assert field.metadata.get("help"), field.name
        if field.name in VALUES and field.name != "task_type":
            assert f"        {field.name} (" in ReftConfig.__doc__, field.name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(positions="f3+f4"), "positions='f3.f4' cannot be read"),
        (dict(positions=""), "positions='' cannot be read"),
        (dict(r=0), "r=0 is not a rank.*from 1"),
        (dict(r=-1), "r=-1 is not a rank"),
        (dict(r=2.0), "r=2.0 is not a rank"),
        (dict(r=True), "r=True is not a rank"),
        (dict(rank_pattern={"layers.1": 0}), "rank_pattern.'layers.1'.=0 is not a rank"),
        (dict(intervention="lora"), "intervention='lora' is unknown.*loreft, noreft"),
        (dict(intervention=["loreft"]), "intervention=.'loreft'. is unknown"),
        (dict(share_weights="yes"), "share_weights='yes' is neither True nor False"),
        (dict(target_modules="*("), "target_modules='..' is no regular expression"),
        (dict(act_fn="sigmoidal"), "act_fn='sigmoidal' is unknown.*gelu"),
        (dict(act_fn=["gelu"]), "act_fn=.'gelu'. is unknown"),
        (dict(act_fn="prelu"), "act_fn='prelu' has parameters.*weight.*would be lost.*'relu'"),
        (dict(act_fn="xielu"), "act_fn='xielu' has parameters.*alpha_p, alpha_n, beta, eps"),
        (dict(dropout=1.0), "dropout=1.0 is not a probability"),
        (dict(dropout=-0.1), "dropout=-0.1"),
        (dict(dropout=float("nan")), "dropout=nan"),
        (dict(dropout="0.1"), "dropout='0.1'"),
        (dict(init_weights="zero"), "init_weights='zero' is unknown.*'reference'"),
        (dict(init_weights=1), "init_weights=1 is unknown"),
        (dict(layers_to_transform=[]), r"layers_to_transform=\[\] names no layers"),
        (dict(layers_to_transform=["0"]), "names no layers"),
        (dict(layers_to_transform=[0, 2, 0]), "names a layer twice"),
        (dict(target_modules=[]), r"target_modules=\[\] names no module"),
        (dict(target_modules="all-linear"), "shorthand for linear layers"),
        (dict(target_modules=".*mlp", layers_to_transform=[0]), "cannot be used with target_modules='.*mlp'"),
        (dict(task_type="CAUSAL"), "Invalid task type"),
    ],
)
def test_wrong_values(options, message):
    with pytest.raises(ValueError, match=message):
        ReftConfig(**options)


@pytest.mark.parametrize("name", sorted(ACT2FN))
def test_activations_that_would_not_be_saved_are_refused(name):
    """Whatever transformers has: what is accepted is saved whole, and what is not has tensors of its own."""
    tensors = [*ACT2FN[name].parameters(), *ACT2FN[name].buffers()]
    if tensors:
        with pytest.raises(ValueError, match=f"act_fn='{name}' has parameters or buffers of its own"):
            ReftConfig(act_fn=name)
        return
    model, _ = adapt_model(make_llama(1), act_fn=name, positions="f2")
    assert {key.rsplit(".", 1)[1] for key, p in model.named_parameters() if p.requires_grad} == {"_R", "_W", "_b"}


def test_activations_that_a_user_registers(monkeypatch):
    monkeypatch.setitem(ACT2FN, "normed", (torch.nn.BatchNorm1d, {"num_features": 4, "affine": False}))
    with pytest.raises(ValueError, match="act_fn='normed' has parameters or buffers of its own .running_mean"):
        ReftConfig(act_fn="normed")
    monkeypatch.setitem(ACT2FN, "sine", lambda: torch.sin)
    assert ReftConfig(act_fn="sine").act_fn == "sine"


def test_saved_configs_with_such_activations(tmp_path):
    ReftConfig(**VALUES).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"act_fn": "prelu"}))
    with pytest.raises(ValueError, match="act_fn='prelu' has parameters"):
        PeftConfig.from_pretrained(tmp_path)


def test_activations_are_looked_at_where_they_are_used():
    """A config that is changed after it was made is not looked at again."""
    config = ReftConfig(task_type="CAUSAL_LM")
    config.act_fn = "prelu"
    with pytest.raises(ValueError, match="act_fn='prelu' has parameters"):
        get_peft_model(make_llama(1), config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(lora_alpha=16),
            "lora_alpha'. Nothing in ReFT corresponds to LoRA's lora_alpha: leave it out.",
        ),
        (dict(use_rslora=True), "Nothing in ReFT corresponds to LoRA's use_rslora"),
        (dict(bias="none"), "Nothing in ReFT corresponds to LoRA's bias"),
        (dict(lora_dropout=0.1), "LoRA's lora_dropout corresponds to dropout"),
        (
            dict(lora_alpha=16, lora_dropout=0.1),
            "lora_alpha: leave it out. LoRA's lora_dropout corresponds to dropout",
        ),
        (dict(position="l1"), "position is unknown: did you mean positions?"),
        (dict(xyz=1), "xyz is unknown: choose from .*, intervention, r, rank_pattern, positions"),
    ],
)
def test_unknown_arguments(options, message):
    with pytest.raises(TypeError, match="ReftConfig got an unexpected keyword argument '.*" + message):
        ReftConfig(r=8, **options)


def test_it_is_a_dataclass():
    """The error for unknown arguments takes nothing away: signature, repr, replace, pickle, equality."""
    config = ReftConfig(**VALUES)
    names = [field.name for field in dataclasses.fields(ReftConfig)]
    assert list(inspect.signature(ReftConfig).parameters) == names and "r=3" in repr(config)
    assert dataclasses.replace(config, r=4) == ReftConfig(**VALUES | {"r": 4}) != config
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    with pytest.raises(TypeError, match="positional"):
        ReftConfig(*[None] * 99)


def test_sets_and_ranges_become_lists():
    config = ReftConfig(target_modules={"mlp", "attn"}, layers_to_transform=range(2), exclude_modules=("x",))
    assert config.target_modules == ["attn", "mlp"]
    assert config.layers_to_transform == [0, 1]
    assert config.exclude_modules == ["x"]
