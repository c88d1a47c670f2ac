import json
import subprocess
import sys

import pytest
import torch
from by_hand import ByHand, generated, make_llama
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM
from transformers.integrations import PeftAdapterMixin

from peft_reft import ReftConfig
from peft_reft.upstream import complete_upstream


def test_twice_is_harmless():
    def methods():
        return PeftModel._upload_modified_files, PeftModel.load_adapter, PeftAdapterMixin.load_adapter

    before = methods()
    complete_upstream()
    assert methods() == before


def run(code, *args):
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)


def test_import_brings_nothing_heavy():
    code = """
import sys
import peft
before = set(sys.modules)
import peft_reft
added = sys.modules.keys() - before
assert "peft_reft.upstream" in added
heavy = ("accelerate", "datasets", "pandas", "pyarrow", "torch", "transformers")
assert not [name for name in added if name.split(".")[0] in heavy], added
"""
    process = run(code)
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("order", ["first", "last"])
def test_trainer_is_completed_whenever_it_is_imported(tmp_path, order):
    """The parameters that TRL has cast are restored, and a checkpoint that is written anew is not whole before."""
    code = """
import sys
from pathlib import Path
order, folder = sys.argv[1:]
if order == "first":
    from transformers import Trainer
import peft_reft
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
shape = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
base = LlamaForCausalLM(LlamaConfig(**shape))
model = get_peft_model(base, peft_reft.ReftConfig(r=2, task_type="CAUSAL_LM"))
unit = base.model.layers[0].reft.units("default")["prefix"]
unit.keep_dtype()  # as in a quantized model, which the Trainer does not move
base.quantization_method = "bitsandbytes"
for parameter in unit.parameters():
    parameter.data = parameter.to(torch.bfloat16)
assert ("transformers.trainer" in sys.modules) == (order == "first")
from transformers import Trainer
trainer = Trainer(model, TrainingArguments(folder, use_cpu=True, report_to="none"))
assert {parameter.dtype for parameter in unit.parameters()} == {torch.float32}
state = Path(folder) / "checkpoint-0" / "trainer_state.json"
state.parent.mkdir()
state.touch()
trainer.save_model = lambda *args, **kwargs: sys.exit(state.exists())
trainer._save_checkpoint(model, None)
"""
    process = run(code, order, str(tmp_path))
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize(("config", "completed"), [(ReftConfig, True), (LoraConfig, False)])
def test_card_is_completed_before_the_upload(tmp_path, monkeypatch, config, completed):
    """Of ReFT adapters alone. There is no Hub here, so the upload itself fails after that."""
    model = get_peft_model(make_llama(), config(task_type="CAUSAL_LM"))
    folders = []
    monkeypatch.setattr(PeftModel, "create_or_update_model_card", lambda self, folder: folders.append(folder))
    (tmp_path / "README.md").write_text("# A card")
    with pytest.raises(Exception, match="offline|Name or service"):
        model._upload_modified_files(str(tmp_path), "user/name", {})
    assert folders == ([str(tmp_path)] if completed else [])
    assert ("pip install peft_reft" in (tmp_path / "README.md").read_text()) == completed


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


def test_adapter_that_does_not_fit_is_taken_back(tmp_path, ids):
    options = dict(task_type="CAUSAL_LM", positions="f2+l2", init_weights=False)
    get_peft_model(make_llama(), ReftConfig(r=2, **options)).save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(r=3)))
    model = get_peft_model(make_llama(), ReftConfig(r=4, **options)).eval()
    with torch.no_grad():
        expected, names = model(input_ids=ids).logits, list(model.state_dict())
        with pytest.raises(
            ValueError, match=r"adapter 'second' does not fit its config.*is \[2\], not \[3\]|\[2, 32\]"
        ):
            model.load_adapter(tmp_path, adapter_name="second")
        assert list(model.peft_config) == ["default"] and list(model.state_dict()) == names
        assert torch.equal(model(input_ids=ids).logits, expected)


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
