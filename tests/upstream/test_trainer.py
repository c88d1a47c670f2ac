import copy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from by_hand import make_llama
from installed import ROOT, WITHOUT, environment, install
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from peft_reft import ReftConfig
from peft_reft.upstream.trainer import check_engine, check_resumed

# The parameters that TRL has cast are restored, and a checkpoint that is written again is not complete before.
USE = """
import sys
from pathlib import Path
import peft_reft
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
shape = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
base = LlamaForCausalLM(LlamaConfig(**shape))
model = get_peft_model(base, peft_reft.ReftConfig(r=2, task_type="CAUSAL_LM"))
unit = base.model.layers[0]._reft.units("default")["prefix"]
unit.keep_dtype()  # as in a quantized model, which the Trainer does not move
base.quantization_method = "bitsandbytes"
for parameter in unit.parameters():
    parameter.data = parameter.to(torch.bfloat16)
assert ("transformers.trainer" in sys.modules) == was_imported
from transformers import Trainer
trainer = Trainer(model, TrainingArguments(sys.argv[1], use_cpu=True, report_to="none"))
assert {parameter.dtype for parameter in unit.parameters()} == {torch.float32}
state = Path(sys.argv[1]) / "checkpoint-0" / "trainer_state.json"
state.parent.mkdir()
state.touch()
trainer.save_model = lambda *args, **kwargs: sys.exit(state.exists())
trainer._save_checkpoint(model, None)
"""
MIDDLE = """
import sys
class Middle:
    def find_spec(self, name, path=None, target=None):
        if name == "transformers.trainer_optimizer":
            assert sys.modules["transformers.trainer"].__spec__._initializing
            import peft_reft
sys.meta_path.insert(0, Middle())
import transformers.trainer
"""
ORDERS = {
    "peft_reft first": "was_imported = False",
    "peft first": "import peft\nwas_imported = False",
    "trainer first": "from transformers import Trainer\nwas_imported = True",
    "trl first": "import trl\nfrom trl import SFTTrainer\nwas_imported = True",
    "in the middle": f"{MIDDLE}\nwas_imported = True",
}
SLOW = [pytest.param(order, "1", marks=pytest.mark.slow) for order in ORDERS]
SLOW += [pytest.param(order, "0", marks=pytest.mark.slow) for order in ("peft first", "trl first", "in the middle")]


@pytest.mark.parametrize(("order", "autoload"), [("peft_reft first", "0"), ("trainer first", "0"), *SLOW])
def test_trainer_is_patched_whenever_it_is_imported(tmp_path, order, autoload):
    (tmp_path / "site").mkdir()
    install(tmp_path / "site")
    variables = environment(tmp_path / "site", ROOT) | {"PEFT_REFT_AUTOLOAD": autoload}
    command = [sys.executable, "-c", f"{WITHOUT}{ORDERS[order]}\n{USE}", str(tmp_path / "output")]
    process = subprocess.run(command, env=variables, capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == 0, process.stderr


def make_trainer(folder, config=None, kind=Trainer):
    model = make_llama(1) if config is None else get_peft_model(make_llama(1), config)
    return kind(model, TrainingArguments(str(folder), use_cpu=True, report_to="none"))


class Kind(Trainer):
    def save_model(self, *args, **kwargs):
        super().save_model(*args, **kwargs)
        self.has_saved = True


def test_trainers_of_reft_only(tmp_path):
    """Other trainers keep the methods of their class. The class has the same name, and `super()` works."""
    for config in (None, LoraConfig(target_modules=["q_proj"])):
        assert type(make_trainer(tmp_path, config)) is Trainer
    trainer = make_trainer(tmp_path, ReftConfig(r=2), Kind)
    assert isinstance(trainer, Kind) and type(trainer) is not Kind and type(trainer).__name__ == "Kind"
    assert type(trainer) is type(make_trainer(tmp_path, ReftConfig(r=2), Kind))
    trainer.save_model()
    assert trainer.has_saved and (tmp_path / "adapter_config.json").exists()


@pytest.mark.parametrize("name", ["default", "b"])
def test_resuming_with_another_config(tmp_path, ids, changed, name):
    """A run goes on with the config that it began with, alone; beside an adapter whose name is that of a tensor."""
    rows = [{"input_ids": row, "labels": row.index_fill(0, torch.arange(4), -100)} for row in ids.repeat(2, 1)]
    shared = dict(max_steps=2, save_steps=1, per_device_train_batch_size=2, use_cpu=True, report_to="none")

    def train(positions, **options):
        model = get_peft_model(make_llama(1), ReftConfig(task_type="CAUSAL_LM", r=2, positions=positions))
        model.add_adapter("b", ReftConfig(task_type="CAUSAL_LM", r=2, positions=positions))
        model.set_adapter(name)
        trainer = Trainer(model, TrainingArguments(str(tmp_path), **shared), train_dataset=rows)
        before = copy.deepcopy(model.state_dict())
        try:
            trainer.train(**options)
        except ValueError:
            assert not changed(model, before)
            raise
        return model.state_dict()

    trained = train("l2")
    resumed = train("l2", resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert any(f".{name}." in key for key in trained)
    for key, tensor in trained.items():
        torch.testing.assert_close(resumed[key], tensor, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="another config.*positions='f2' in the model, 'l2' in the checkpoint"):
        train("f2", resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


class Engine(SimpleNamespace):
    is_deepspeed_enabled = True
    is_fsdp_enabled = False


def with_engine(method, trainer, checkpoint, *others):
    return check_engine(method, trainer, None, None, checkpoint, *others)


@pytest.mark.parametrize("name", ["default", "second"])
def test_what_a_trainer_loads_without_peft(tmp_path, name):
    """FSDP's checkpoints and DeepSpeed's are read past `load_adapter`: the configs beside them are compared first."""
    config, model = ReftConfig(r=2, positions="l2"), get_peft_model(make_llama(1), ReftConfig(r=2, positions="l2"))
    model.add_adapter("second", config)
    model.save_pretrained(tmp_path)
    loads, trainer = [], Engine(model=model)
    for check in (check_resumed, with_engine):
        check(lambda *args: loads.append(args), trainer, str(tmp_path), "more")
        assert loads.pop()[-2:] == (str(tmp_path), "more")
    model.peft_config[name].positions = "f2"
    for check in (check_resumed, with_engine):
        with pytest.raises(ValueError, match=f"another config.*'{name}': positions='f2' in the model, 'l2'"):
            check(lambda *args: loads.append(args), trainer, str(tmp_path))
    assert not loads


@pytest.mark.parametrize("auto_find_batch_size", [False, True])
def test_deepspeed_resumes_with_another_config(tmp_path, auto_find_batch_size):
    trainer = make_trainer(tmp_path / "checkpoint-1", ReftConfig(r=2, positions="l2"))
    trainer.save_model()
    trainer.state.save_to_json(str(tmp_path / "checkpoint-1" / "trainer_state.json"))
    trainer = make_trainer(tmp_path, ReftConfig(r=2, positions="f2"))
    trainer.is_deepspeed_enabled, trainer.args.auto_find_batch_size = True, auto_find_batch_size
    with pytest.raises(ValueError, match="another config.*positions='f2' in the model, 'l2'"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
