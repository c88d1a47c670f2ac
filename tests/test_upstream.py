import copy
import json
import os
import sys
from types import SimpleNamespace

import forks
import pytest
import torch
from by_hand import VOCABULARY, ByHand, generated, make_llama
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, Trainer, TrainingArguments
from transformers.integrations import PeftAdapterMixin

from peft_reft import ReftConfig, upstream
from peft_reft.upstream.patch import complete_upstream


def test_twice_is_harmless():
    def methods():
        return PeftModel._upload_modified_files, PeftModel.load_adapter, PeftAdapterMixin.load_adapter

    before = methods()
    complete_upstream()
    assert methods() == before


# Here the import is tested; `tests/test_autoload.py` has what an installation does without it.
ENVIRONMENT = os.environ | {"PEFT_REFT_AUTOLOAD": "0"}


def run(code, *args):
    """Run code in a process that has imported PEFT, and nothing of ours."""
    return forks.run(["-c", code, *args], imported=forks.PEFT, env=ENVIRONMENT)


def test_import_brings_nothing_heavy():
    code = """
import sys
import peft
before = set(sys.modules)
import peft_reft
added = sys.modules.keys() - before
assert "peft_reft.upstream.patch" in added
heavy = ("accelerate", "datasets", "pandas", "pyarrow", "torch", "transformers")
assert not [name for name in added if name.split(".")[0] in heavy], added
"""
    process = run(code)
    assert process.returncode == 0, process.stdout


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
unit = base.model.layers[0]._reft.units("default")["prefix"]
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
    assert process.returncode == 0, process.stdout


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


# Into an adapter that exists

OTHER = {
    "intervention": ("noreft", "intervention='loreft' in the model, 'noreft' in the checkpoint"),
    "positions": ("f3+l2", r"positions='f2\+l2' in the model, 'f3\+l2' in the checkpoint"),
    "act_fn": ("relu", "act_fn=None in the model, 'relu' in the checkpoint"),
    "target_modules": (["mlp"], r"target_modules=None in the model, \['mlp'\]"),
}


def changed(model, before):
    """The tensors of a model that are not what they were."""
    return [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]


@pytest.mark.parametrize("field", OTHER)
@pytest.mark.parametrize("by", ["load_adapter", "from_pretrained"])
def test_checkpoint_of_another_config(tmp_path, field, by):
    """Its tensors fit the adapter that is there, and would edit something else."""
    value, message = OTHER[field]
    shared = dict(task_type="CAUSAL_LM", r=2, positions="f2+l2", init_weights=False)
    get_peft_model(make_llama(), ReftConfig(**shared | {field: value})).save_pretrained(tmp_path)
    model = get_peft_model(make_llama(), ReftConfig(**shared))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"was trained with another config.*'default': {message}.*from_pretrained"):
        if by == "load_adapter":
            model.load_adapter(tmp_path, "default", is_trainable=True)
        else:
            PeftModel.from_pretrained(make_llama(), tmp_path, config=ReftConfig(**shared))
    assert not changed(model, before) and model.peft_config["default"].positions == "f2+l2"
    model.load_adapter(tmp_path, "other")
    assert getattr(model.peft_config["other"], field) == value


def test_checkpoint_of_the_same_config(tmp_path):
    """Though it was written in another way, trained with dropout, and drawn otherwise."""
    shared = dict(task_type="CAUSAL_LM", positions="f2+l2")
    other = ReftConfig(r=3, rank_pattern={"layers.2": 2}, layers_to_transform=[-1, 0], dropout=0.1, **shared)
    source = get_peft_model(make_llama(), other)
    source.save_pretrained(tmp_path)
    config = ReftConfig(r=2, rank_pattern={"layers.0": 3}, layers_to_transform=[0, 2], init_weights=False, **shared)
    model = get_peft_model(make_llama(), config)
    model.load_adapter(tmp_path, "default")
    assert not changed(model, source.state_dict())


def test_checkpoint_of_another_method(tmp_path):
    lora, reft = LoraConfig(target_modules=["q_proj"]), ReftConfig(r=2, positions="f2+l2")
    for there, loaded, name in ((lora, reft, "LORA"), (reft, lora, "REFT")):
        get_peft_model(make_llama(), loaded).save_pretrained(tmp_path / name)
        model = get_peft_model(make_llama(), there)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=f"another config.*peft_type=.*{name}.* in the model"):
            model.load_adapter(tmp_path / name, "default")
        assert not changed(model, before)


def test_transformers_load_adapter_of_another_config(tmp_path, ids):
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


@pytest.mark.parametrize("name", ["default", "b"])
def test_resuming_with_another_config(tmp_path, ids, name):
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


@pytest.mark.parametrize("name", ["default", "second"])
def test_what_a_trainer_loads_without_peft(tmp_path, name):
    """FSDP's checkpoints and DeepSpeed's are read past `load_adapter`: the configs beside them are compared first."""
    config, model = ReftConfig(r=2, positions="l2"), get_peft_model(make_llama(1), ReftConfig(r=2, positions="l2"))
    model.add_adapter("second", config)
    model.save_pretrained(tmp_path)
    loads = []
    trainer, engine = SimpleNamespace(model=model), SimpleNamespace(module=model)
    for check, owner in ((upstream.check_resumed, trainer), (upstream.check_engine, engine)):
        check(lambda *args: loads.append(args), owner, str(tmp_path), "more")
        assert loads.pop() == (owner, str(tmp_path), "more")
    model.peft_config[name].positions = "f2"
    for check, owner in ((upstream.check_resumed, trainer), (upstream.check_engine, engine)):
        with pytest.raises(ValueError, match=f"another config.*'{name}': positions='f2' in the model, 'l2'"):
            check(lambda *args: loads.append(args), owner, str(tmp_path))
    assert not loads
    assert "completed_by_reft" in vars(Trainer._load_from_checkpoint)
    assert "completed_by_reft" in vars(sys.modules["transformers.trainer"].deepspeed_load_checkpoint)


# Tensors that an adapter does not need

HEAD = "base_model.model.lm_head.weight"
SHARED = dict(task_type="CAUSAL_LM", r=2, positions="f2+l2", init_weights=False)


def into_new(model, folder, tensors):
    PeftModel.from_pretrained(model, folder)


def into_another(model, folder, tensors):
    model = get_peft_model(model, ReftConfig(modules_to_save=["lm_head"], **SHARED), adapter_name="first")
    model.load_adapter(folder, "second")


def into_the_same(model, folder, tensors):
    get_peft_model(model, ReftConfig(**SHARED)).load_adapter(folder, "default", is_trainable=True)


def as_state_dict(model, folder, tensors):
    set_peft_model_state_dict(get_peft_model(model, ReftConfig(**SHARED)), tensors)


def as_state_dict_of_plain_model(model, folder, tensors):
    model.add_adapter(ReftConfig(**SHARED))
    set_peft_model_state_dict(model, tensors)


def by_transformers(model, folder, tensors):
    is_safe = (folder / "adapter_model.safetensors").exists()
    model.load_adapter(str(folder), use_safetensors=None if is_safe else False)


def by_transformers_state_dict(model, folder, tensors):
    model.load_adapter(None, peft_config=ReftConfig(**SHARED), adapter_state_dict=tensors)


def on_resuming(model, folder, tensors):
    model = get_peft_model(model, ReftConfig(**SHARED))
    Trainer(model, TrainingArguments(str(folder), use_cpu=True, report_to="none"))._load_from_checkpoint(str(folder))


FOREIGN = {
    "base weight": "base_model.model.model.layers.0.mlp.up_proj.weight",
    "without prefix": "model.layers.0.mlp.up_proj.weight",
    "head": HEAD,
    "embedding": "base_model.model.model.embed_tokens.weight",
    "another adapter's module": "base_model.model.lm_head.modules_to_save.first.weight",
    "the module that another adapter replaces": "base_model.model.lm_head.original_module.weight",
    "another adapter's own": "base_model.model.model.layers.0._reft._reft_prefix.first._R",
}
ROADS = [into_new, into_another, into_the_same, as_state_dict, as_state_dict_of_plain_model]
ROADS += [by_transformers, by_transformers_state_dict, on_resuming]


@pytest.mark.parametrize("is_safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("load", ROADS)
def test_tensors_that_the_adapter_does_not_need(tmp_path, load, is_safe):
    get_peft_model(make_llama(), ReftConfig(**SHARED)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    own = load_file(file)
    file.unlink()
    for key in FOREIGN.values():
        tensors = own | {key: torch.full((2, 2) if "._" in key else make_llama().get_parameter(plain(key)).shape, 9.0)}
        if is_safe:
            save_file(tensors, file, metadata={"format": "pt"})
        else:
            torch.save(tensors, tmp_path / "adapter_model.bin")
        model = make_llama()
        parameters = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
        with pytest.raises(ValueError, match=rf"{key.removeprefix('base_model.model.')}|has no place"):
            load(model, tmp_path, tensors)
        assert all(torch.equal(p, before) for p, before in parameters.values())
        for name, tensor in model.state_dict().items():
            assert not (tensor == 9).any(), f"{key} was written to {name}"


def plain(key):
    """The name in the base model of what a key belongs to."""
    return ".".join(part for part in key.removeprefix("base_model.model.").split(".") if part not in INSERTED)


INSERTED = ("modules_to_save", "original_module", "first")


@pytest.mark.parametrize("load", [into_new, into_the_same, as_state_dict, by_transformers])
def test_embeddings_of_a_resized_vocabulary(tmp_path, load):
    """PEFT saves them with the adapter, in a model that was not resized alike they have no place."""
    make_llama().save_pretrained(tmp_path / "base")

    def resized(n=3):
        torch.manual_seed(n)  # of the new rows
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        if n:
            model.resize_token_embeddings(VOCABULARY + n)
        return model

    model = get_peft_model(resized(), ReftConfig(**SHARED))
    with torch.no_grad():
        model.get_input_embeddings().weight[-1] = 5.0
        model.get_output_embeddings().weight[-1] = 6.0
    with pytest.warns(UserWarning, match="resized"):
        model.save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert HEAD in tensors and FOREIGN["embedding"] in tensors
    loaded = resized()
    load(loaded, tmp_path / "adapter", tensors)
    assert loaded.get_input_embeddings().weight[-1].eq(5).all()
    assert loaded.get_output_embeddings().weight[-1].eq(6).all()
    with pytest.raises(ValueError, match="embed_tokens.weight.*Embeddings may be there if the vocabulary was resized"):
        load(resized(0), tmp_path / "adapter", tensors)
    more = tensors | {FOREIGN["base weight"]: torch.zeros(64, 32)}
    save_file(more, tmp_path / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="does not need: base_model.model.model.layers.0.mlp.up_proj.weight. They"):
        load(resized(), tmp_path / "adapter", more)


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
