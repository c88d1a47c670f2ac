"""Which configs are of the same adapter."""

import pytest
from by_hand import make_llama
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_reft import ReftConfig
from peft_reft.saving.compatibility import check_config, differences

DIFFERENT = [  # (own, other, the fields that are named)
    (dict(), dict(intervention="noreft"), ["intervention"]),
    (dict(r=4), dict(r=2), ["r"]),
    (dict(rank_pattern={"layers.1": 2}), dict(rank_pattern={"layers.2": 2}), ["rank_pattern"]),
    (dict(r=4, rank_pattern={"layers.1": 2}), dict(r=2), ["r", "rank_pattern"]),
    (dict(positions="f2+l2"), dict(positions="f3+l2"), ["positions"]),
    (dict(positions="f1"), dict(positions="l1"), ["positions"]),
    (dict(share_weights=True), dict(share_weights=False), ["share_weights"]),
    (dict(layers_to_transform=[0, 1]), dict(layers_to_transform=[1, 2]), ["layers_to_transform"]),
    (dict(layers_to_transform=[9]), dict(layers_to_transform=[1]), ["layers_to_transform"]),  # of another model
    (dict(target_modules=["mlp"]), dict(target_modules=["self_attn"]), ["target_modules"]),
    (dict(target_modules=["mlp"]), dict(), ["target_modules"]),
    (dict(exclude_modules=["model.layers.1"]), dict(), ["exclude_modules"]),
    (dict(act_fn="relu"), dict(act_fn="gelu"), ["act_fn"]),
    (dict(modules_to_save=["lm_head"]), dict(), ["modules_to_save"]),
    (dict(trainable_token_indices=[1, 2]), dict(trainable_token_indices=[2, 1]), ["trainable_token_indices"]),
    (dict(intervention="direft", positions="l1"), dict(), ["intervention", "positions"]),
]

SAME = [
    (dict(dropout=0.1, init_weights=False, inference_mode=True), dict(revision="main")),
    (dict(init_weights="reference", standardize=False), dict(standardize=False)),
    (dict(layers_to_transform=[-1, 0]), dict(layers_to_transform=[0, 2])),
    (dict(layers_to_transform=[0, 1, 2]), dict(layers_to_transform=None)),
    (dict(layers_to_transform=1), dict(layers_to_transform=[1], layers_pattern="layers")),
    (dict(target_modules=["mlp", "self_attn"]), dict(target_modules=["self_attn", "mlp"])),
    (dict(target_modules=["mlp"]), dict(target_modules=r".*\.mlp")),
    (dict(exclude_modules=["model.layers.1"]), dict(layers_to_transform=[0, 2])),
    (dict(r=4, rank_pattern={"layers.1": 2, "nothing": 3}), dict(r=2, rank_pattern={"layers.[02]": 4})),
    (dict(positions="l2", share_weights=True), dict(positions="l2", share_weights=False)),
    (dict(intervention="consreft", act_fn="relu"), dict(intervention="consreft")),
    (dict(modules_to_save=["lm_head"]), dict(modules_to_save=["lm_head", "score"])),
    (dict(modules_to_save=[]), dict(modules_to_save=None)),
    (dict(trainable_token_indices=[1, 2]), dict(trainable_token_indices={"embed_tokens": [1, 2]})),
    (dict(task_type="CAUSAL_LM"), dict(task_type=None)),
]


def configs(own, other):
    shared = dict(task_type="CAUSAL_LM", r=4, positions="f2+l2")
    return ReftConfig(**shared | own), ReftConfig(**shared | other)


@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapted"])
@pytest.mark.parametrize(("own", "other", "fields"), DIFFERENT)
def test_configs_that_differ(own, other, fields, adapted):
    model = make_llama()
    if adapted and own.get("layers_to_transform") != [9]:
        model = get_peft_model(model, configs(own, other)[0]).get_base_model()
    assert differences(model, *configs(own, other)) == fields
    assert differences(model, *configs(other, own)) == fields


@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapted"])
@pytest.mark.parametrize(("own", "other"), SAME)
def test_configs_that_choose_the_same(own, other, adapted):
    model = make_llama()
    if adapted:
        model = get_peft_model(model, configs(own, other)[0]).get_base_model()
    assert differences(model, *configs(own, other)) == []


def test_task_of_a_model_that_is_not_of_transformers():
    """It says whether the whole input is the prompt."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    options = dict(target_modules=["0"], r=2)
    own, other = ReftConfig(task_type="CAUSAL_LM", **options), ReftConfig(**options)
    assert differences(model, own, other) == ["task_type"] and differences(model, own, own) == []


def test_the_error():
    model = get_peft_model(make_llama(), ReftConfig(r=2, positions="l1"), adapter_name="mine")
    with pytest.raises(ValueError) as error:
        check_config(model, "mine", model.peft_config["mine"], ReftConfig(r=3, positions="f1"), "folder/sub")
    for part in (
        "folder/sub",
        "'mine'",
        "positions='l1' in the model, 'f1' in",
        "r=2 in the model, 3 in",
        "adapter_name that is new",
    ):
        assert part in str(error.value)
    assert "from_pretrained('folder/sub')" in str(error.value) and "set_peft_model_state_dict" in str(error.value)
    with pytest.raises(ValueError, match="peft_type"):
        check_config(model, "mine", model.peft_config["mine"], LoraConfig(), "folder")
    check_config(model, "mine", LoraConfig(r=1), LoraConfig(r=2), "folder")  # no business of ours
