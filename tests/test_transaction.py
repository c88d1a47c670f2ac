"""Whatever fails while an adapter is added or loaded, the model is afterwards what it was before."""

import json
import sys

import pytest
import torch
from by_hand import VOCABULARY, make_llama, random_ids
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

import peft_reft.model
from peft_reft import ReftConfig
from peft_reft.layer import ReftLayer

IDS = random_ids()


def config(**options):
    defaults = {"task_type": "CAUSAL_LM", "r": 2, "positions": "f2+l2", "init_weights": False}
    return ReftConfig(**defaults | options)


class Fingerprint:
    """All that a model is: every attribute of its modules and configs, their tensors, and what the model puts out."""

    def __init__(self, model):
        self.found, self.kept = {}, []  # what is kept alive has no other's id
        modes = [(module, module.training) for module in model.modules()]
        with torch.no_grad():
            self.found["output"] = model.eval()(input_ids=IDS).logits.numpy().tobytes()
        for module, mode in modes:
            module.training = mode
        self.describe("", model)

    def describe(self, path, value):
        if isinstance(value, nn.Module | PreTrainedConfig | PeftConfig):
            if (key := f"object {id(value)}") in self.found:
                self.found[path] = key
                return
            self.kept.append(value)
            self.found[path], self.found[key] = key, type(value)
            self.describe(f"{path}:", vars(value))
        elif isinstance(value, torch.Tensor):
            self.kept.append(value)
            content = value.detach().numpy().tobytes()
            self.found[path] = id(value), value.data_ptr(), value.dtype, value.device, value.requires_grad, content
        elif isinstance(value, dict):
            self.found[path] = [str(key) for key in value]
            for key, item in value.items():
                self.describe(f"{path}.{key}", item)
        elif isinstance(value, list | tuple):
            self.found[path] = type(value), len(value)
            for i, item in enumerate(value):
                self.describe(f"{path}[{i}]", item)
        elif isinstance(value, set):
            self.found[path] = sorted(map(str, value))
        elif value is None or isinstance(value, bool | int | float | str):
            self.found[path] = value
        else:
            self.kept.append(value)
            self.found[path] = type(value), id(value)

    def differences(self, other):
        return [
            path for path in self.found | other.found if self.found.get(path, self) != other.found.get(path, other)
        ]


LEFTOVERS = {
    "a hook": lambda m: m.model.layers[0].register_forward_hook(lambda *args: None),
    "a pre-hook": lambda m: m.register_forward_pre_hook(lambda *args: None),
    "a flag": lambda m: m.lm_head.weight.requires_grad_(True),
    "a value": lambda m: m.lm_head.weight.data[0].add_(1e-6),
    "a dtype": lambda m: m.model.layers[0]._reft.half(),
    "another parameter": lambda m: setattr(m.lm_head, "weight", nn.Parameter(m.lm_head.weight.clone())),
    "another module": lambda m: setattr(m, "lm_head", nn.Sequential(m.lm_head)),
    "an attribute": lambda m: setattr(m.model, "_left", None),
    "a mode": lambda m: m.model.layers[1].train(not m.model.layers[1].training),
    "a tag": lambda m: m.add_model_tags("left"),
    "a config": lambda m: m.peft_config.update(second=config()),
    "a field of a config": lambda m: setattr(m.config, "pretraining_tp", 7),
    "an active adapter": lambda m: m.model.layers[0]._reft.set_adapter([]),
    "an adapter": lambda m: m.model.layers[0]._reft.update_layer("second", 2, config()),
    "positions": lambda m: m.model.layers[0]._reft.positions.update(second=None),
}


@pytest.mark.parametrize("leftover", LEFTOVERS)
def test_fingerprint_sees(leftover):
    model = inject_adapter_in_model(config(), make_model())
    before = Fingerprint(model)
    assert before.differences(Fingerprint(model)) == []
    LEFTOVERS[leftover](model)
    assert before.differences(Fingerprint(model))


# The models that an adapter is added to


def make_model():
    """A model with much about it that is not as it was made."""
    model = make_llama(2)
    model.model.embed_tokens.weight.requires_grad_(False)
    model.gradient_checkpointing_enable()
    model.add_model_tags("mine")
    model.model.layers[1].register_forward_hook(lambda module, args, output: None)
    model.config.pretraining_tp = 2
    return model.train()


def beside_reft():
    model = make_model()
    model.add_adapter(config(modules_to_save=["lm_head"], layers_to_transform=[0]), "first")
    return model


def beside_lora():
    model = make_model()
    model.add_adapter(LoraConfig(target_modules=["q_proj", "mlp.up_proj"], init_lora_weights=False), "lora")
    return model


def peft_model():
    model = get_peft_model(make_model(), config(), "first")
    model.add_adapter("other", config(r=3, modules_to_save=["lm_head"]))
    return model.train()


MODELS = dict(alone=make_model, beside_reft=beside_reft, beside_lora=beside_lora, peft_model=peft_model)

# The functions that add one, given a folder with its config, or that load one from there

ADD = {
    "get_peft_model": lambda model, path: get_peft_model(model, ReftConfig.from_pretrained(path)),
    "inject": lambda model, path: inject_adapter_in_model(ReftConfig.from_pretrained(path), model),
    "add_adapter": lambda model, path: (
        model.add_adapter("default", ReftConfig.from_pretrained(path))
        if isinstance(model, PeftModel)
        else model.add_adapter(ReftConfig.from_pretrained(path))
    ),
}
LOAD = {
    "from_pretrained": lambda model, path: PeftModel.from_pretrained(model, path),
    "from_pretrained_to_train": lambda model, path: PeftModel.from_pretrained(model, path, is_trainable=True),
    "load_adapter": lambda model, path: model.load_adapter(str(path), adapter_name="default"),
    "load_over": lambda model, path: model.load_adapter(str(path), adapter_name="first"),
}
ROADS = [
    (make, road)
    for make in MODELS
    for road in ADD | LOAD
    if (road.endswith("adapter") or make != "peft_model")
    and (road != "from_pretrained_to_train" or make == "alone")
    and road != "load_over"
] + [("peft_model", "load_over")]


@pytest.fixture
def folder(tmp_path):
    get_peft_model(make_llama(2), config()).save_pretrained(tmp_path)
    return tmp_path


def change_config(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def fail_after(monkeypatch, owner, name, error, calls=1):
    """Have a function do its work for so many calls, and then raise an error."""
    function, count = getattr(owner, name), [0]

    def failing(*args, **kwargs):
        result = function(*args, **kwargs)
        count[0] += 1
        if count[0] == calls:
            raise error
        return result

    monkeypatch.setattr(owner, name, failing)


def truncate(folder, monkeypatch):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def lose_tensor(folder, monkeypatch):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[sorted(tensors)[-1]]
    save_file(tensors, file, metadata={"format": "pt"})


def interrupt_values(folder, monkeypatch):
    """After some or all values have been overwritten, in PEFT or in transformers."""
    fail_after(monkeypatch, nn.Module, "load_state_dict", KeyboardInterrupt)
    fail_after(monkeypatch, PreTrainedModel, "_load_pretrained_model", KeyboardInterrupt)


WHEN_ADDED = {
    "tokens out of range": lambda path, mp: change_config(path, trainable_token_indices=[VOCABULARY + 7]),
    "tokens of no module": lambda path, mp: change_config(path, trainable_token_indices={"nothing": [1]}),
    "saves reft": lambda path, mp: change_config(path, modules_to_save=["lm_head", "reft"]),
    "no memory": lambda path, mp: fail_after(mp, ReftLayer, "update_layer", MemoryError(), calls=2),
    "no memory for a head": lambda path, mp: (
        change_config(path, modules_to_save=["lm_head"]),
        fail_after(mp, nn.ModuleDict, "__setitem__", MemoryError(), calls=5),
    ),
    "interrupt": lambda path, mp: fail_after(mp, peft_reft.model, "hook_model", KeyboardInterrupt()),
    "interrupt at the end": lambda path, mp: fail_after(mp, PreTrainedModel, "add_model_tags", KeyboardInterrupt()),
}
WHEN_LOADED = {
    "truncated": truncate,
    "a tensor is missing": lose_tensor,
    "another rank": lambda path, mp: change_config(path, r=3),
    "interrupt of values": interrupt_values,
}
CASES = [
    (make, road, fault)
    for make, road in ROADS
    for fault in (WHEN_ADDED if road != "load_over" else {}) | (WHEN_LOADED if road in LOAD else {})
    if (road, fault) != ("load_over", "another rank")  # the config of the adapter that is there counts
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "road", "fault"), CASES, ids=lambda value: value.replace(" ", "_"))
def test_model_is_as_before(folder, monkeypatch, make, road, fault):
    model = MODELS[make]()
    before = Fingerprint(model)
    with monkeypatch.context() as patched:
        (WHEN_ADDED | WHEN_LOADED)[fault](folder, patched)
        with pytest.raises((Exception, KeyboardInterrupt)):
            (ADD | LOAD)[road](model, folder)
    assert before.differences(Fingerprint(model)) == []


def test_adapter_that_cannot_be_activated():
    """Beside one that saves a module, of which transformers' `add_adapter` activates the new adapter's, too."""
    model = beside_reft()
    before = Fingerprint(model)
    with pytest.raises(ValueError, match="Adapter second not found"):
        model.add_adapter(config(), "second")
    assert before.differences(Fingerprint(model)) == []
    model.add_adapter(config(modules_to_save=["lm_head"]), "second")
    assert model.active_adapters() == ["second"]


def interrupt_in(call, function):
    """Call a function, interrupt the Python call of that number within it, and return how many there were."""
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event == "call"
        if event == "call" and count == call:
            raise KeyboardInterrupt

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
        torch.set_grad_enabled(True)  # torch's own no_grad leaves gradients off if its __exit__ is interrupted
    return count


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "road"), [case for case in ROADS if case != ("beside_reft", "add_adapter")])
def test_interrupted_anywhere(folder, make, road):
    """Where `add_adapter` does not fail by itself, as beside an adapter that saves a module."""
    function = (ADD | LOAD)[road]
    own = interrupt_in(None, MODELS[make])
    calls = interrupt_in(None, lambda: function(MODELS[make](), folder)) - own
    model = None
    for sixth in range(6):
        if model is None:
            model = MODELS[make]()
            before = Fingerprint(model)
        try:
            interrupt_in(1 + calls * sixth // 6, lambda model=model: function(model, folder))
        except KeyboardInterrupt:
            assert before.differences(Fingerprint(model)) == [], f"interrupted after {sixth} sixths"
        else:  # the interrupt came in a destructor, where Python ignores it
            model = None
