"""Whether each patch is still needed: the function of the library is run as it is, and must show its defect.

A test that fails here is good news. Delete the patch that it names, or give it `fixed_in`, and delete the test.
"""

import copy
import inspect
from types import SimpleNamespace

import pytest
import torch
from by_hand import make_llama
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import other
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments
from transformers.utils import hub

from peft_reft import ReftConfig, ReftModel
from peft_reft.resume import STATE
from peft_reft.upstream import PATCHES


def config(**options):
    return ReftConfig(**{"task_type": "CAUSAL_LM", "r": 2, "positions": "f2+l2", "init_weights": False} | options)


def lora(**options):
    return LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], **options)


def is_adapted(model, name="default"):
    return any(f".{name}._R" in key for key in model.state_dict())


def make_trainer(folder, model):
    return Trainer(model, TrainingArguments(str(folder), use_cpu=True, report_to="none"))


@pytest.fixture
def folder(tmp_path):
    """The folder of an adapter from which a tensor is missing."""
    get_peft_model(make_llama(1), config()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(min(tensors))
    save_file(tensors, file, metadata={"format": "pt"})
    return tmp_path


@pytest.fixture
def failing(monkeypatch):
    """Has what PEFT does after it has added an adapter fail."""

    def fail(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(ReftModel, "_cast_adapter_dtype", fail)


def keeps_what_failed(folder, failing):
    base = make_llama(1)
    with pytest.raises(MemoryError):
        get_peft_model(base, config())
    return is_adapted(base)


def keeps_what_was_not_loaded(folder, failing):
    base = make_llama(1)
    with pytest.raises(ValueError, match="does not fit its config"):
        PeftModel.from_pretrained(base, folder)
    return is_adapted(base)


def loads_another_config(folder, failing):
    get_peft_model(make_llama(1), config(positions="f3+l2")).save_pretrained(folder)
    get_peft_model(make_llama(1), config()).load_adapter(folder, "default")
    get_peft_model(make_llama(1), lora()).load_adapter(folder, "default")  # and that of another method
    return True


def puts_lora_on_reft(folder, failing):
    return isinstance(get_peft_model(get_peft_model(make_llama(1), config()), lora()), PeftModel)


def saves_reft_with_lora(folder, failing):
    below = get_peft_model(make_llama(1), lora())
    get_peft_model(below, config())
    return any("_reft" in key for key in get_peft_model_state_dict(below))


def does_not_wrap_units(folder, failing):
    model = get_peft_model(make_llama(1), config())
    policy = other.fsdp_auto_wrap_policy(model)
    unit = model.base_model.model.model.layers[0]._reft.units("default")["prefix"]
    return not policy(module=unit, recurse=False, nonwrapped_numel=0)


def loads_in_part(folder, failing):
    model = make_llama(1)
    model.load_adapter(str(folder))
    return is_adapted(model)


def keeps_what_is_not_active(folder, failing):
    model = make_llama(1)
    model.add_adapter(config(modules_to_save=["lm_head"]), "first")
    with pytest.raises(ValueError, match="Adapter second not found"):
        model.add_adapter(config(), "second")
    return is_adapted(model, "second")


def has_no_hook(folder, failing):
    """A trainer leaves what TRL has cast, and calls nothing that could override its methods."""
    model = get_peft_model(make_llama(1), config())
    unit = model.base_model.model.model.layers[0]._reft.units("default")["prefix"]
    unit.keep_dtype()
    unit.R.data = unit.R.data.bfloat16()
    trainer = make_trainer(folder, model)
    return type(trainer) is Trainer and unit.R.dtype == torch.bfloat16


CANARIES = {
    "peft.peft_model.PeftModel.__init__": keeps_what_failed,
    "peft.peft_model.PeftModel.from_pretrained": keeps_what_was_not_loaded,
    "peft.peft_model.PeftModel.load_adapter": loads_another_config,
    "peft.tuners.tuners_utils.BaseTuner.__init__": puts_lora_on_reft,
    "peft.tuners.tuners_utils.BaseTuner._get_adapter_state_dict": saves_reft_with_lora,
    "peft.utils.other.fsdp_auto_wrap_policy": does_not_wrap_units,
    "transformers.integrations.peft.PeftAdapterMixin.load_adapter": loads_in_part,
    "transformers.integrations.peft.PeftAdapterMixin.add_adapter": keeps_what_is_not_active,
    "transformers.trainer.Trainer.__init__": has_no_hook,
}
OF_CLASSES = {patch.target: patch for patch in PATCHES if patch.scope == "class"}


def test_each_patch_of_a_class_has_a_canary():
    assert CANARIES.keys() == OF_CLASSES.keys()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", CANARIES)
def test_class(target, folder, request, monkeypatch):
    patch = OF_CLASSES[target]
    static = inspect.getattr_static(patch.find_owner(), patch.name)
    original = getattr(static, "__func__", static).__wrapped__
    with monkeypatch.context() as context:
        failing = request.getfixturevalue("failing") if target.endswith("PeftModel.__init__") else None
        context.setattr(
            patch.find_owner(), patch.name, classmethod(original) if isinstance(static, classmethod) else original
        )
        try:
            has_defect = CANARIES[target](folder, failing)
        except ValueError as error:
            has_defect = error  # the library raises an error of its own
        assert has_defect is True, f"{target} is mended ({has_defect}): delete this patch"


# Of objects


def test_add_adapter(monkeypatch):
    model = get_peft_model(make_llama(1), config())
    monkeypatch.setattr(ReftModel, "_cast_adapter_dtype", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        PeftModel.add_adapter(model, "second", config())
    assert is_adapted(model, "second"), "PeftModel.add_adapter is mended: delete this patch"


def test_save_pretrained(tmp_path):
    model = get_peft_model(get_peft_model(make_llama(1), lora()), config())
    PeftModel.save_pretrained(model, str(tmp_path))
    assert not (tmp_path / "lora-default").exists(), "PeftModel.save_pretrained is mended: delete this patch"


def test_card(monkeypatch):
    """transformers writes its own card over that of PEFT, before the upload."""
    cards = []
    card = SimpleNamespace(save=lambda file: cards.append("blank card"))
    monkeypatch.setattr(
        hub, "hf_api", lambda: SimpleNamespace(create_repo=lambda *a, **k: SimpleNamespace(repo_id=""))
    )
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **kwargs: card)
    monkeypatch.setattr(PeftModel, "_upload_modified_files", lambda self, *args, **kwargs: cards.append("upload"))
    monkeypatch.setattr(PeftModel, "save_pretrained", lambda self, folder, **kwargs: cards.append("PEFT's card"))
    get_peft_model(make_llama(1), lora()).push_to_hub("user/name")
    assert cards == ["PEFT's card", "blank card", "upload"], "push_to_hub is mended: delete this patch"


def test_save_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path, get_peft_model(make_llama(1), config()))
    (tmp_path / "checkpoint-0").mkdir()
    (tmp_path / "checkpoint-0" / STATE).touch()
    trainer.save_model = lambda *args, **kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        Trainer._save_checkpoint(trainer, trainer.model, None)
    assert (tmp_path / "checkpoint-0" / STATE).exists(), "Trainer._save_checkpoint is mended: delete this patch"


def test_save_model(tmp_path):
    trainer = make_trainer(tmp_path, get_peft_model(make_llama(1), config()))
    trainer.is_fsdp_enabled = True
    trainer.accelerator = copy.copy(trainer.accelerator)
    plugin = SimpleNamespace(state_dict_type="SHARDED_STATE_DICT")
    trainer.accelerator.state = SimpleNamespace(fsdp_plugin=plugin)
    Trainer.save_model(trainer, str(tmp_path))
    assert not (tmp_path / "adapter_config.json").exists(), "Trainer.save_model is mended: delete this patch"
