import copy
import json

import pytest
import torch
from by_hand import ByHand, generated, make_llama
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from peft_reft import ReftConfig


@pytest.mark.parametrize(
    "change",
    [
        dict(positions="l2"),
        dict(share_weights=True),
        dict(layers_to_transform=[0]),
        dict(layers_to_transform=None),
        dict(intervention="consreft"),
    ],
)
def test_checkpoint_that_does_not_fit_in_load_adapter(tmp_path, ids, change):
    make_llama().save_pretrained(tmp_path / "base")
    options = dict(task_type="CAUSAL_LM", r=2, positions="f2+l2", init_weights=False, layers_to_transform=[0, 1])
    get_peft_model(make_llama(), ReftConfig(**options)).save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with pytest.raises(ValueError, match="checkpoint of adapter 'default' does not fit its config.*share_weights"):
            model.load_adapter(str(tmp_path / "adapter"))
        assert torch.equal(model(input_ids=ids).logits, expected)
    assert not any(".reft_" in name for name in model.state_dict())


def test_load_adapter_of_another_config(tmp_path, ids, changed):
    """A name that exists is refused by transformers itself; a config may be given beside the folder."""
    shared = dict(task_type="CAUSAL_LM", r=2, init_weights=False)
    get_peft_model(make_llama(), ReftConfig(positions="l1", **shared)).save_pretrained(tmp_path)
    model = make_llama()
    with pytest.raises(ValueError, match="another config.*positions='l2' in the model, 'l1' in the checkpoint"):
        model.load_adapter(str(tmp_path), peft_config=ReftConfig(positions="l2", **shared))
    assert list(model.state_dict()) == list(make_llama().state_dict()) and not hasattr(model, "peft_config")
    model.add_adapter(ReftConfig(positions="l2", **shared))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="already exists"):
        model.load_adapter(str(tmp_path), adapter_name="default")
    assert not changed(model, before)


# Several adapters by transformers' functions

REFTS = {
    "one": dict(r=2, positions="f2+l2"),
    "two": dict(r=3, positions="l1", layers_to_transform=[1]),
    "three": dict(r=2, positions="f1+l1", share_weights=True),
}
COLUMNS = {
    "one": {"prefix": [[0, 1]] * 2, "suffix": [[10, 11]] * 2},
    "two": {"unit": [[11]] * 2},
    "three": {"unit": [[0, 11]] * 2},
}


@pytest.fixture
def folders(tmp_path):
    """Three adapters of each kind in folders of their names."""
    for name, options in REFTS.items():
        reft = ReftConfig(task_type="CAUSAL_LM", init_weights=False, **options)
        get_peft_model(make_llama(), reft).save_pretrained(tmp_path / "reft" / name)
        lora = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj"])
        get_peft_model(make_llama(), lora).save_pretrained(tmp_path / "lora" / name)
    return tmp_path


def state_of(model):
    """The active adapters, what is trained of each adapter, and the mode."""
    flags = {}
    for name, parameter in model.named_parameters():
        parts = [part for part in name.split(".") if part in ("one", "two", "three", "new")]
        flags.setdefault("".join(parts), set()).add(parameter.requires_grad)
    return model.active_adapters() if hasattr(model, "peft_config") else None, flags, model.training


STEPS = [
    lambda m, load: load("one"),
    lambda m, load: load("two"),
    lambda m, load: m.set_adapter("one"),
    lambda m, load: load("three"),
    lambda m, load: m.disable_adapters(),
    lambda m, load: m.enable_adapters(),
    lambda m, load: m.set_adapter("two"),
    lambda m, load: m.delete_adapter("two"),
    lambda m, load: load("two"),
    lambda m, load: m.delete_adapter(["two", "one"]),
    lambda m, load: m.delete_adapter("three"),
    lambda m, load: load("one"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", [None, "new"])
@pytest.mark.parametrize("trained", [(), ("one",), ("two", "three")])
def test_several_adapters_by_load_adapter(folders, ids, trained, first):
    """Flags, modes and active adapters are those of LoRA's adapters, and the logits those by hand."""
    base, models = make_llama(), {"reft": make_llama(), "lora": make_llama()}
    if first is not None:
        models["reft"].add_adapter(ReftConfig(r=2, init_weights=False), first)
        models["lora"].add_adapter(LoraConfig(target_modules=["q_proj"]), first)
    for number, step in enumerate(STEPS):
        states = {}
        for kind, model in models.items():

            def load(name, kind=kind, model=model):
                model.load_adapter(str(folders / kind / name), adapter_name=name, is_trainable=name in trained)

            step(model, load)
            states[kind] = state_of(model)
        assert states["reft"] == states["lora"], f"step {number}"
        active = [] if number == 4 or states["reft"][0] is None else states["reft"][0]
        if active in (["one"], ["two"], ["three"], []):
            model = models["reft"]
            mode = model.training
            with torch.no_grad():
                found = model.eval()(input_ids=ids).logits
            model.train(mode)
            expected = (
                ByHand(base, model, active[0]).logits(COLUMNS[active[0]], input_ids=ids)
                if active
                else base(input_ids=ids).logits
            )
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_adapters_of_load_adapter_are_those_loaded_alone(folders, ids):
    model = make_llama()
    for name in REFTS:
        model.load_adapter(str(folders / "reft" / name), adapter_name=name)
    tokens = set()
    for name in REFTS:
        alone = make_llama()
        alone.load_adapter(str(folders / "reft" / name), adapter_name=name)
        model.set_adapter(name)
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, alone(input_ids=ids).logits)
        assert torch.equal(generated(model, ids), generated(alone, ids))
        tokens.add(tuple(generated(alone, ids).flatten().tolist()))
    assert len(tokens) == len(REFTS)
