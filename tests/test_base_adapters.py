import copy
import warnings

import forks
import pytest
import torch
from by_hand import ByHand, generated, labels_of, make_llama
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from safetensors.torch import load_file
from torch.func import functional_call
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification, LlamaForCausalLM

from peft_reft import ReftConfig

SCALE = 2.0  # lora_alpha / r
COLUMNS = {"prefix": [[0, 1]] * 2, "suffix": [[3, 4]] * 2}  # of a prompt of five tokens
ALL = {"prefix": [[0, 1]] * 2, "suffix": [[10, 11]] * 2}  # of one of twelve


def lora_config(**options):
    options = dict(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]) | options
    return LoraConfig(init_lora_weights=False, **options)


def reft_config(**options):
    return ReftConfig(**dict(task_type="CAUSAL_LM", r=4, positions="f2+l2", init_weights=False) | options)


def on(model, config, name="default"):
    """PEFT warns of a model that is adapted a second time."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are trying to modify a model with PEFT for a second time")
        return get_peft_model(model, config, name)


@pytest.fixture
def base():
    return make_llama()


@pytest.fixture
def lora(base):
    torch.manual_seed(3)
    return get_peft_model(copy.deepcopy(base), lora_config()).eval()


@pytest.fixture
def model(lora):
    torch.manual_seed(4)
    return on(lora, reft_config()).eval()


def lora_by_hand(base, lora, name="default"):
    """The weights W + scale B A of what LoRA adapts, by the names of the base model's parameters."""
    tensors = {key.removeprefix("base_model.model."): value for key, value in lora.state_dict().items()}
    weights = {}
    for key, a in tensors.items():
        module, found, rest = key.partition(".lora_A.")
        if found and rest == f"{name}.weight":
            b = tensors[f"{module}.lora_B.{name}.weight"]
            weights[f"{module}.weight"] = base.get_parameter(f"{module}.weight").detach() + SCALE * b @ a
    assert len(weights) == 6
    return weights


def merged_by_hand(base, lora, name="default"):
    """The base model with LoRA in its weights."""
    merged = copy.deepcopy(base)
    merged.load_state_dict(lora_by_hand(base, lora, name), strict=False)
    return merged


@torch.no_grad()
def logits(model, ids, **inputs):
    return model(input_ids=ids.clone(), **inputs).logits


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def tuned(model):
    return {name: p for name, p in model.named_parameters() if ".lora_" in name or "._reft_" in name}


def a_step(model, ids):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()(input_ids=ids, labels=labels_of(ids, [(5, 12)], [(5, 12)])).loss.backward()
    optimizer.step()
    return model.eval()


# What is computed


def test_edits_are_those_on_the_merged_model(base, lora, model, ids):
    merged = merged_by_hand(base, lora)
    by_hand = ByHand(merged, model)
    expected = by_hand.logits(ALL, input_ids=ids)
    close(logits(model, ids), expected)
    labels = labels_of(ids, [(5, 12)], [(5, 12)])
    close(logits(model, ids, labels=labels), by_hand.logits(COLUMNS, input_ids=ids))
    for other in (base, merged):
        assert (logits(other, ids) - expected).abs().max() > 1e-2, "too small to be seen"
    tokens = by_hand.generate(ALL, ids)
    assert torch.equal(generated(model, ids, mask=torch.ones_like(ids)), tokens)
    assert not torch.equal(generated(merged, ids, mask=torch.ones_like(ids)), tokens)


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_gradients_of_both(base, lora, model, ids, checkpointing):
    """With no checkpointing, and with both kinds of it, `use_reentrant` or not."""
    labels = labels_of(ids, [(5, 12)], [(5, 12)])
    pairs = {}  # LoRA's tensors by module
    leaves = {name: p.detach().clone().requires_grad_() for name, p in tuned(model).items()}
    for name, leaf in leaves.items():
        module, _, matrix = name.removeprefix("base_model.model.").partition(".lora_")
        if matrix:
            pairs.setdefault(module, {})[matrix[0]] = leaf
    weights = {
        f"{module}.weight": base.get_parameter(f"{module}.weight").detach() + SCALE * pair["B"] @ pair["A"]
        for module, pair in pairs.items()
    }
    by_hand = ByHand(base, model)
    for block, units in by_hand.tensors.items():
        for unit, tensors in units.items():
            prefix = f"base_model.model.{block}._reft._reft_{unit}.default"
            units[unit] = tensors | {tensor: leaves[f"{prefix}._{tensor}"] for tensor in ("R", "W", "b")}
    with by_hand.edits(COLUMNS):
        functional_call(base, weights, kwargs=dict(input_ids=ids, labels=labels)).loss.backward()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(dict(use_reentrant=checkpointing))
    model.train()(input_ids=ids, labels=labels).loss.backward()
    for name, p in tuned(model).items():
        torch.testing.assert_close(p.grad, leaves[name].grad, atol=1e-5, rtol=1e-4, msg=name)
        if "layers.2._reft._reft_prefix" not in name:  # which no label sees
            assert p.grad.abs().max() > 1e-5, name


def test_disabled_merged_and_unloaded(base, lora, model, ids):
    """Disabling gives the base model without both; unloading gives what ReFT was put on."""
    expected = logits(model, ids)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), logits(base, ids))
        assert torch.equal(generated(model, ids), generated(base, ids))
    assert torch.equal(logits(model, ids), expected)
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_and_unload()
    for take_away in (lora.unload, lora.merge_and_unload, lora.merge_adapter, lora.unmerge_adapter):
        with pytest.raises(ValueError, match="while it is the base model of a ReFT adapter"):
            take_away()
    assert torch.equal(logits(model, ids), expected)

    names = set(lora.state_dict()) - {name for name in lora.state_dict() if "._reft." in name}
    assert model.unload() is lora and set(lora.state_dict()) == names
    merged = merged_by_hand(base, lora)
    close(logits(lora, ids), logits(merged, ids))
    assert lora.get_base_model().peft_config is lora.peft_config
    close(logits(on(lora, reft_config(init_weights=True)), ids), logits(merged, ids))  # again, from zero
    lora = get_peft_model(copy.deepcopy(base), lora_config())
    on(lora, reft_config()).unload()
    lora.merge_adapter()
    lora.unmerge_adapter()
    assert isinstance(lora.merge_and_unload(), LlamaForCausalLM)


def test_lora_merged_in_place_before(base, lora, ids):
    merged = merged_by_hand(base, lora)
    lora.merge_adapter()
    model = on(lora, reft_config()).eval()
    close(logits(model, ids), ByHand(merged, model).logits(ALL, input_ids=ids))
    model.unload()
    lora.unmerge_adapter()
    close(logits(lora, ids), logits(merged, ids))


def test_module_that_both_adapt(base, ids, tmp_path):
    """The names are those of ReFT on the module of the base model."""
    lora = get_peft_model(copy.deepcopy(base), lora_config())
    model = on(lora, reft_config(target_modules=["down_proj"])).eval()
    by_hand = ByHand(merged_by_hand(base, lora), model)
    assert set(by_hand.tensors) == {f"model.layers.{i}.mlp.down_proj" for i in range(3)}
    close(logits(model, ids), by_hand.logits(ALL, input_ids=ids))
    model.save_pretrained(tmp_path)
    assert not [key for key in load_file(tmp_path / "lora-default" / "adapter_model.safetensors") if "reft" in key]
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora-default")
    assert torch.equal(logits(PeftModel.from_pretrained(loaded, tmp_path), ids), logits(model, ids))


def test_copy(model, ids):
    """Of both, with the model below within it."""
    twin = copy.deepcopy(model)
    below = twin.base_model.base_peft_model
    assert below is not model.base_model.base_peft_model and below.get_base_model() is twin.get_base_model()
    expected = logits(model, ids)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(logits(twin, ids), expected)


# What is trained


@pytest.mark.parametrize("is_trainable", [True, False])
def test_lora_is_trained_if_it_was_trainable(base, lora, ids, tmp_path, is_trainable):
    lora.save_pretrained(tmp_path)
    below = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=is_trainable)
    model = on(below, reft_config())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    a_step(model, ids)
    for name, p in model.named_parameters():
        trained = "._reft_" in name or (is_trainable and ".lora_" in name)
        assert p.requires_grad == trained and torch.equal(p, before[name]) != trained, name
    trained = sum(p.numel() for name, p in tuned(model).items() if is_trainable or "._reft_" in name)
    assert model.get_nb_trainable_parameters() == (trained, sum(p.numel() for p in model.parameters()))


def test_trainable_or_not_by_name(lora, model):
    """Of the ReFT adapter, though LoRA's has the same name."""

    def trainable():
        return {
            kind: {p.requires_grad for n, p in tuned(model).items() if kind in n} for kind in (".lora_", "._reft_")
        }

    model.set_requires_grad("default", False)
    assert trainable() == {".lora_": {True}, "._reft_": {False}}
    model.set_adapter("default")
    assert trainable() == {".lora_": {True}, "._reft_": {True}}
    lora.set_adapter("default", inference_mode=True)
    assert trainable() == {".lora_": {False}, "._reft_": {True}}


def test_dtype_of_lora_is_kept(lora, ids, tmp_path):
    """TRL casts it on a quantized base, and ReFT is added, loaded and resumed above it."""
    for p in tuned(lora).values():
        p.data = p.data.bfloat16()
    model = on(lora, reft_config())
    parameters = tuned(model)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "default")
    model.load_adapter(tmp_path / "lora-default", "lora-default")
    assert all(p is parameters[name] for name, p in tuned(model).items())  # which an optimizer may hold
    for name, p in tuned(model).items():
        assert p.dtype == (torch.bfloat16 if ".lora_" in name else torch.float32)


def test_second_reft_adapter(lora, model, base, ids):
    """One that is trained would take LoRA away from the first; on a LoRA that is frozen it may."""
    names = set(model.state_dict())
    with pytest.raises(ValueError, match="Freeze them before ReFT is added"):
        model.add_adapter("second", reft_config())
    assert set(model.state_dict()) == names and list(model.peft_config) == ["default"]
    lora.set_adapter("default", inference_mode=True)
    model.add_adapter("second", reft_config())
    model.set_adapter("second")
    assert not any(p.requires_grad for name, p in tuned(model).items() if ".lora_" in name)
    by_hand = ByHand(merged_by_hand(base, lora), model, "second")
    close(logits(model.eval(), ids), by_hand.logits(ALL, input_ids=ids))
    for name in ("third", "fourth"):  # both with a head of their own
        model.add_adapter(name, reft_config(modules_to_save=["lm_head"]))
    lora.add_adapter("fifth", lora_config())
    with pytest.raises(ValueError, match="Both adapters are called 'fifth'"):
        model.add_adapter("fifth", reft_config(modules_to_save=["lm_head"]))
    assert list(model.peft_config) == ["default", "second", "third", "fourth"]


# Saving and loading

PLAIN = """
import sys

sys.modules["peft_reft"] = None
import torch
from peft import PeftModel, PeftType
from transformers import AutoModelForCausalLM

folder = sys.argv[1]
with torch.no_grad():
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(f"{folder}/base"), sys.argv[2])
    torch.save(model(torch.load(f"{folder}/ids.pt")).logits, f"{folder}/logits.pt")
assert "REFT" not in PeftType.__members__
"""


@pytest.fixture
def saved(base, lora, model, ids, tmp_path):
    """A folder with the base model and both adapters."""
    base.save_pretrained(tmp_path / "base")
    model.get_base_model().name_or_path = str(tmp_path / "base")
    torch.save(ids, tmp_path / "ids.pt")
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path


def test_files_are_those_of_each_alone(saved, base, lora, model, ids):
    files = {str(path.relative_to(saved / "adapter")) for path in (saved / "adapter").rglob("*") if path.is_file()}
    each = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert files == each | {f"lora-default/{name}" for name in each}
    for folder, config, kind in (
        ("adapter", reft_config(), "._reft_"),
        ("adapter/lora-default", lora_config(), ".lora_"),
    ):
        alone = get_peft_model_state_dict(get_peft_model(copy.deepcopy(base), config))
        tensors = load_file(saved / folder / "adapter_model.safetensors")
        assert {key: t.shape for key, t in tensors.items()} == {key: t.shape for key, t in alone.items()}
        for name, p in tuned(model).items():
            if kind in name:
                assert torch.equal(tensors[name.replace(".default", "")], p)
    assert get_peft_model_state_dict(lora).keys() == alone.keys()


def test_lora_in_a_process_that_does_not_know_reft(saved, base, lora, ids):
    process = forks.run(["-c", PLAIN, saved, saved / "adapter" / "lora-default"], imported=forks.PEFT)
    assert process.returncode == 0, process.stdout
    close(torch.load(saved / "logits.pt"), logits(merged_by_hand(base, lora), ids))


@pytest.mark.parametrize("below", ["default", "qv"])
@pytest.mark.parametrize("above", ["default", "edits"])
def test_loaded_again(base, ids, tmp_path, below, above):
    torch.manual_seed(5)
    lora = get_peft_model(copy.deepcopy(base), lora_config(), below)
    model = a_step(on(lora, reft_config(), above), ids)
    model.save_pretrained(tmp_path)
    subfolder = f"lora-{below}"
    assert not (tmp_path / subfolder / below).exists()
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, subfolder=subfolder)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = PeftModel.from_pretrained(loaded, tmp_path if above == "default" else tmp_path / above)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert torch.equal(generated(loaded, ids), generated(model, ids))
    close(logits(loaded, ids), ByHand(merged_by_hand(base, lora, below), model, above).logits(ALL, input_ids=ids))
    assert not any(p.requires_grad for p in loaded.parameters())


def test_other_order_is_an_error(saved, base, model):
    reft = get_peft_model(copy.deepcopy(base), reft_config())
    names = set(reft.state_dict())
    for attempt in (
        lambda: PeftModel.from_pretrained(reft, saved / "adapter" / "lora-default"),
        lambda: get_peft_model(reft, lora_config()),
    ):
        with pytest.raises(ValueError, match="ReFT comes last"):
            attempt()
        assert set(reft.state_dict()) == names and isinstance(reft.peft_config["default"], ReftConfig)
    with pytest.raises(ValueError, match="model.add_adapter"):
        get_peft_model(model, reft_config())


def test_on_the_base_model_alone_it_warns(saved, base, lora, model, ids):
    """And it is right where LoRA was merged into it."""
    with pytest.warns(UserWarning, match="with other adapters, which are not there: lora-default"):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), saved / "adapter")
    close(logits(loaded, ids), ByHand(base, model).logits(ALL, input_ids=ids))
    with pytest.warns(UserWarning, match="Load them first"):
        loaded = PeftModel.from_pretrained(model.unload().merge_and_unload(), saved / "adapter")
    merged = merged_by_hand(base, PeftModel.from_pretrained(copy.deepcopy(base), saved / "adapter/lora-default"))
    close(logits(loaded, ids), ByHand(merged, loaded).logits(ALL, input_ids=ids))
    loaded.save_pretrained(saved / "again")  # still on that base
    with pytest.warns(UserWarning, match="lora-default"):
        PeftModel.from_pretrained(copy.deepcopy(base), saved / "again")


def test_on_another_base_it_does_not(base, tmp_path):
    get_peft_model(copy.deepcopy(base), reft_config()).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)


def test_weights_put_into_both(saved, base, lora, model, ids):
    """What a `Trainer` does when it resumes: it names an adapter by its folder."""
    expected = logits(model, ids)
    for p in tuned(model).values():
        p.data.mul_(2)
    assert not torch.equal(logits(model, ids), expected)
    model.load_adapter(saved / "adapter", "default", is_trainable=True)
    model.load_adapter(saved / "adapter" / "lora-default", "lora-default", is_trainable=True)
    assert torch.equal(logits(model, ids), expected) and list(model.peft_config) == list(lora.peft_config)
    assert all(p.requires_grad for p in tuned(model).values())


def test_adapter_that_transformers_loaded(saved, base, lora, model, ids, tmp_path):
    """It has given the model no PeftModel; PEFT's own saves both then, by their names."""
    below = AutoModelForCausalLM.from_pretrained(saved / "adapter" / "lora-default").eval()
    assert not isinstance(below, PeftModel) and below.peft_config["default"].peft_type == "LORA"
    with pytest.raises(ValueError, match="has an adapter 'default' already, of type LORA"):
        on(below, reft_config())
    above = on(below, reft_config(), "edits").eval()
    by_hand = ByHand(merged_by_hand(base, lora), above, "edits")
    close(logits(above, ids), by_hand.logits(ALL, input_ids=ids))
    above.save_pretrained(tmp_path / "both")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "both")
    loaded = PeftModel.from_pretrained(loaded, tmp_path / "both" / "edits")
    close(logits(loaded, ids), logits(above, ids))
    with pytest.warns(UserWarning, match="lora-default"):
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "both" / "edits")


def test_injected_without_a_peft_model(base, lora, model, ids):
    """Two adapters of one name are refused; each of two is saved alone, by transformers and by PEFT."""
    injected = inject_adapter_in_model(lora_config(), copy.deepcopy(base))
    with pytest.raises(ValueError, match="Give the new one another adapter_name"):
        inject_adapter_in_model(reft_config(), injected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inject_adapter_in_model(reft_config(), injected, "edits")
    for config, name in ((lora_config(), "default"), (reft_config(), "edits")):
        alone = get_peft_model_state_dict(get_peft_model(copy.deepcopy(base), config))
        state_dict = get_peft_model_state_dict(injected, adapter_name=name)
        assert {f"base_model.model.{key}" for key in state_dict} == alone.keys()


# Modules that are trained beside an adapter


@pytest.mark.parametrize("is_trainable", [True, False])
def test_head_that_lora_trains(base, ids, tmp_path, is_trainable):
    """It stays in use, and trained or not, and is saved with LoRA alone."""
    lora = get_peft_model(copy.deepcopy(base), lora_config(modules_to_save=["lm_head"]), "qv")
    a_step(lora, ids).save_pretrained(tmp_path)
    merged = merged_by_hand(base, lora, "qv")
    merged.lm_head.load_state_dict(lora.get_base_model().lm_head.modules_to_save["qv"].state_dict())
    assert (merged.lm_head.weight - base.lm_head.weight).abs().max() > 1e-3
    below = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "qv", "qv", is_trainable=is_trainable)
    model = on(below, reft_config()).eval()
    close(logits(model, ids), ByHand(merged, model).logits(ALL, input_ids=ids))
    head = model.get_base_model().lm_head.modules_to_save["qv"].weight
    model.set_adapter("default")
    assert head.requires_grad == is_trainable
    a_step(model, ids)
    assert torch.equal(head, merged.lm_head.weight) != is_trainable
    model.save_pretrained(tmp_path / "both")
    assert not [key for key in load_file(tmp_path / "both/adapter_model.safetensors") if "lm_head" in key]
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "both" / "lora-qv", "qv")
    assert torch.equal(logits(PeftModel.from_pretrained(loaded, tmp_path / "both"), ids), logits(model, ids))


def test_head_that_reft_trains(base, ids, tmp_path):
    """It is saved with ReFT alone."""
    lora = get_peft_model(copy.deepcopy(base), lora_config())
    model = a_step(on(lora, reft_config(modules_to_save=["lm_head"]), "edits"), ids)
    model.save_pretrained(tmp_path)
    assert not [key for key in load_file(tmp_path / "lora-default/adapter_model.safetensors") if "lm_head" in key]
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora-default")
    assert torch.equal(logits(PeftModel.from_pretrained(loaded, tmp_path / "edits", "edits"), ids), logits(model, ids))
    assert not hasattr(model.unload().get_base_model().lm_head, "modules_to_save")


@pytest.mark.parametrize(
    ("below", "above", "names", "match"),
    [
        (
            dict(modules_to_save=["lm_head"]),
            {},
            ("default", "default"),
            "another name, for example adapter_name='edits'",
        ),
        ({}, dict(modules_to_save=["lm_head"]), ("default", "default"), "another name"),
        ({}, dict(trainable_token_indices=[1]), ("default", "default"), "another name"),
        (dict(modules_to_save=["lm_head"]), dict(modules_to_save=["lm_head"]), ("qv", "edits"), "lm_head already"),
        (dict(trainable_token_indices=[1]), dict(trainable_token_indices=[2]), ("qv", "edits"), "already, so the"),
    ],
)
def test_modules_that_both_would_save(base, ids, below, above, names, match):
    lora = get_peft_model(copy.deepcopy(base), lora_config(**below), names[0]).eval()
    before, expected = set(lora.state_dict()), logits(lora, ids)
    with pytest.raises(ValueError, match=match):
        on(lora, reft_config(**above), names[1])
    assert set(lora.state_dict()) == before and torch.equal(logits(lora, ids), expected)


def test_classifier(ids, tmp_path):
    """LoRA has the head, so ReFT is given no task type."""
    torch.manual_seed(0)
    shape = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    base = BertForSequenceClassification(BertConfig(**shape)).eval()
    config = LoraConfig(task_type="SEQ_CLS", init_lora_weights=False, target_modules=["query"])
    lora = get_peft_model(copy.deepcopy(base), config, "qv")
    with pytest.raises(ValueError, match="LORA adapter trains and saves classifier already.*task_type"):
        on(lora, reft_config(task_type="SEQ_CLS"), "edits")
    model = on(lora, reft_config(task_type=None)).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora-qv", "qv")
    loaded = PeftModel.from_pretrained(loaded, tmp_path)
    assert torch.equal(logits(loaded, ids), logits(model, ids))


# What cannot be


def test_other_base_models(base):
    mixed = get_peft_model(copy.deepcopy(base), lora_config(), mixed=True)
    with pytest.raises(ValueError, match="PeftMixedModel, which PEFT cannot save"):
        on(mixed, reft_config())
    prompts = get_peft_model(copy.deepcopy(base), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="cannot be put on this PeftModel .of PREFIX_TUNING"):
        on(prompts, reft_config())
    activated = get_peft_model(copy.deepcopy(base), lora_config(alora_invocation_tokens=[1, 2]))
    with pytest.raises(ValueError, match="activated LoRA"):
        on(activated, reft_config())


def test_config_that_does_not_fit_changes_nothing(lora, ids):
    before, expected = set(lora.state_dict()), logits(lora, ids)
    with pytest.raises(ValueError):
        on(lora, reft_config(target_modules=["lm_head"]))
    assert set(lora.state_dict()) == before and torch.equal(logits(lora, ids), expected)
    assert lora.get_base_model().peft_config is lora.peft_config
    lora.merge_and_unload()


def test_auto_class_says_what_is_missing(saved):
    with pytest.warns(UserWarning, match="lora-default"):
        AutoPeftModelForCausalLM.from_pretrained(saved / "adapter")
