import json
import os
import subprocess
import sys

import pytest
import torch
from by_hand import make_llama
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


# Here the import is tested; `tests/test_autoload.py` has what an installation does without it.
ENVIRONMENT = os.environ | {"PEFT_REFT_AUTOLOAD": "0"}


def run(code, *args):
    return subprocess.run([sys.executable, "-c", code, *args], env=ENVIRONMENT, capture_output=True, text=True)


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
