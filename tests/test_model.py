"""ReFT in PEFT's surface: what a user of PEFT does with an adapter works with this one."""

import copy
import pickle
import warnings

import pytest
import torch
from by_hand import ENCODER, ByHand, config, logits, make_llama
from peft import (
    AutoPeftModel,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
    LoraConfig,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
)

from peft_reft import ReftConfig

SETTINGS = [  # layers, width, kind, options, trainable parameters as in the paper's tables 1 to 4
    (32, 4096, "llama", dict(r=8, share_weights=True), 2_097_408),
    (40, 5120, "llama", dict(r=8, share_weights=True), 3_277_120),
    (32, 4096, "llama", dict(r=4, layers_to_transform=[3, 9, 18, 24], share_weights=False), 262_176),
    (12, 768, "roberta", dict(r=1, positions="f1"), 18_444),
    (24, 1024, "roberta", dict(r=1, positions="f3"), 49_176),
]


@pytest.mark.parametrize(("layers", "d", "kind", "options", "count"), SETTINGS)
def test_parameter_counts_of_the_paper(layers, d, kind, options, count):
    shape = dict(num_hidden_layers=layers, hidden_size=d, intermediate_size=4 * d, num_attention_heads=d // 64)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape)) if kind == "llama" else RobertaModel(RobertaConfig(**shape))
    model = get_peft_model(model, ReftConfig(**{"positions": "f7+l7"} | options))
    assert model.get_nb_trainable_parameters()[0] == count


# Attaching


@pytest.fixture
def visits(monkeypatch):
    """Counts the modules that walks visit, PEFT's own walks included."""
    count = [0]

    def counted(walk):
        def replacement(*args, **kwargs):
            for visited in walk(*args, **kwargs):
                count[0] += 1
                yield visited

        return replacement

    for name in ("named_modules", "named_children"):
        monkeypatch.setattr(nn.Module, name, counted(getattr(nn.Module, name)))
    return count


def test_work_grows_with_layers_and_no_faster(tmp_path, visits):
    """To attach an adapter, to load one and to switch to it."""

    def work(layers):
        base, before = make_llama(layers), visits[0]
        model = get_peft_model(base, config())
        attached = visits[0]
        model.save_pretrained(tmp_path / str(layers))
        saved = visits[0]
        model.load_adapter(tmp_path / str(layers), "other")
        loaded = visits[0]
        model.set_adapter("other")
        return attached - before, loaded - saved, visits[0] - loaded

    for few, more, most in zip(work(4), work(8), work(16), strict=True):
        assert 0 < few < more and most - more == 2 * (more - few)


def test_blocks_stay_what_they_are(ids):
    base = make_llama()
    blocks, names = [type(block) for block in base.model.layers], list(base.state_dict())
    model = get_peft_model(base, config())
    assert [type(block) for block in base.model.layers] == blocks
    assert [name for name in base.state_dict() if "._reft." not in name] == names
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "._reft." in name}
    assert "base_model.model.model.layers.0._reft._reft_prefix.default._R" in trained


def test_zero_edit_at_the_start(ids):
    base = make_llama()
    expected = logits(base, ids)
    assert torch.equal(logits(get_peft_model(base, config(init_weights=True)), ids), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_adapter_dtype(ids, dtype):
    for autocast, expected in ((True, torch.float32), (False, dtype)):
        model = get_peft_model(make_llama().to(dtype), config(), autocast_adapter_dtype=autocast)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {expected}
        assert logits(model, ids).dtype == dtype


def test_reported_hidden_states_are_the_edited_ones(adapt, ids):
    def make():
        base = make_llama()
        base(input_ids=ids, output_hidden_states=True)  # so that transformers' hooks are there before ReFT's
        return base

    model, by_hand = adapt(make, positions="l2")
    with torch.no_grad():
        reported = model(input_ids=ids, output_hidden_states=True).hidden_states
        seen = []
        with by_hand.edits({"unit": [[10, 11]] * 2}):
            hooks = [b.register_forward_hook(lambda m, a, o: seen.append(o)) for b in by_hand.base.model.layers]
            by_hand.base(input_ids=ids)
        for hook in hooks:
            hook.remove()
    for found, expected in zip(reported[1:-1], seen[:-1], strict=True):  # the last one is normed
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_named_modules_are_edited_at_their_output(adapt, ids):
    model, by_hand = adapt(positions="f1+l1", target_modules=["mlp", "self_attn"], share_weights=True)
    expected = by_hand.logits({"unit": [[0, 11]] * 2}, input_ids=ids)
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-5, rtol=1e-5)
    assert (expected - by_hand.logits({"unit": [[]]}, input_ids=ids)).abs().max() > 0.1


def test_rank_pattern(ids):
    model = get_peft_model(make_llama(), config(rank_pattern={"layers.1": 2}))
    assert [block._reft._reft_prefix["default"].R.shape[0] for block in model.get_base_model().model.layers] == [
        4,
        2,
        4,
    ]


def test_nothing_changes_before_an_error():
    base = make_llama()
    before = list(base.state_dict()), {name: p.requires_grad for name, p in base.named_parameters()}
    for options in (
        dict(r=33),
        dict(target_modules=["nothing"]),
        dict(layers_to_transform=[9]),
        dict(target_modules=["lm_head"]),
    ):
        with pytest.raises(ValueError):
            get_peft_model(base, config(**options))
    assert before == (list(base.state_dict()), {name: p.requires_grad for name, p in base.named_parameters()})
    assert not base._forward_pre_hooks and "generate" not in vars(base) and not hasattr(base, "peft_config")


def test_output_of_another_width_is_an_error(ids):
    """The module's width is the config's, as far as can be told when it is adapted; what it puts out is checked."""
    base = make_llama()
    base.model.layers[0].mlp.act_fn = nn.PReLU()  # has a weight, so that it is not refused for having none
    model = get_peft_model(base, config(target_modules=["act_fn"], layers_to_transform=[0], r=1))
    with pytest.raises(
        ValueError, match=r"PReLU\) put out of shape \[2, 12, 64\], not hidden states \[batch, tokens, 1\]"
    ):
        model.eval()(input_ids=ids)


def test_output_of_other_tokens_is_an_error(adapt, ids):
    class Halves(nn.Linear):
        def forward(self, x):
            return super().forward(x[:, ::2])

    base = make_llama()
    base.extra = Halves(32, 32)
    base.lm_head.register_forward_hook(lambda module, args, output: (base.extra(output[..., :32]), None)[1])
    model = get_peft_model(base, config(target_modules=["extra"])).eval()
    with pytest.raises(ValueError, match="put out 6 tokens where the model was given 12"):
        model(input_ids=ids)


# Saving and loading


def test_two_adapters_of_different_shape(ids):
    """Other rank, positions, layers and intervention: each edits as it would alone."""
    kinds = {
        "one": config(positions="f2+l2"),
        "two": config(r=2, positions="l3", layers_to_transform=[0, 2], share_weights=True),
    }
    columns = {"one": {"prefix": [[0, 1]] * 2, "suffix": [[10, 11]] * 2}, "two": {"unit": [[9, 10, 11]] * 2}}
    base = make_llama()
    model = get_peft_model(copy.deepcopy(base), kinds["one"], adapter_name="one")
    model.add_adapter("two", kinds["two"])
    for name in ("one", "two", "one"):
        model.set_adapter(name)
        by_hand = ByHand(base, model, adapter=name)
        torch.testing.assert_close(
            logits(model, ids), by_hand.logits(columns[name], input_ids=ids), atol=1e-5, rtol=1e-5
        )
        assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {name}
    model.base_model.set_adapter(["one", "two"])  # both, one after the other
    both = logits(model, ids)
    with by_hand.edits(columns["one"]):
        expected = ByHand(base, model, adapter="two").logits(columns["two"], input_ids=ids)
    torch.testing.assert_close(both, expected, atol=1e-5, rtol=1e-5)


def test_delete_adapter(ids):
    model = get_peft_model(make_llama(), config())
    base = logits(make_llama(), ids)
    model.add_adapter("two", config(r=2))
    with pytest.warns(UserWarning, match="now deleted"):
        model.delete_adapter("default")
    assert model.active_adapter == "two" and not any(".default." in name for name in model.state_dict())
    assert not torch.equal(logits(model, ids), base)
    model.delete_adapter("two")
    assert not any(".reft_" in name for name in model.state_dict())
    assert torch.equal(logits(model.base_model.model, ids), base)


def test_disable_adapter(ids):
    model = get_peft_model(make_llama(), config()).train()
    base = logits(make_llama(), ids)
    edited = logits(model, ids)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), base)
        model.train()
        model(input_ids=ids)  # where nothing is edited, nothing needs to be told, even in training
    assert torch.equal(logits(model, ids), edited)
    assert any(p.requires_grad for p in model.parameters())


def test_status(ids):
    model = get_peft_model(make_llama(), config(layers_to_transform=[0, 2]))
    model.add_adapter("two", config(positions="l1"))
    for layers in (model.get_layer_status(), get_layer_status(model)):
        assert [layer.name for layer in layers] == [f"model.model.layers.{i}._reft" for i in (0, 2, 1)] or len(
            layers
        ) == 3
        assert {layer.module_type for layer in layers} == {"reft.ReftLayer"}
        assert layers[0].available_adapters == ["default", "two"] and layers[0].active_adapters == ["default"]
    status = get_model_status(model)
    assert status.adapter_model_type == "ReftModel" and status.num_adapter_layers == 3
    assert status.peft_types == {"default": "REFT", "two": "REFT"}
    assert status.trainable_params == 2 * 2 * (2 * 4 * 32 + 4)
    assert status.requires_grad == {"default": True, "two": False} and status.enabled is True


def test_print_trainable_parameters(capsys):
    get_peft_model(make_llama(), config()).print_trainable_parameters()
    assert "trainable params: 1,560 ||" in capsys.readouterr().out


def test_adapter_added_to_a_sharded_model_is_refused():
    """Each process would draw and train its own."""
    model = make_llama()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="Add adapters before FSDP shards the model"):
            get_peft_model(model, ReftConfig(task_type="CAUSAL_LM"))
    finally:
        torch.distributed.destroy_process_group()


def test_merging_is_refused(ids):
    model = get_peft_model(make_llama(), config())
    edited = logits(model, ids)
    for merge in (model.merge_and_unload, model.merge_adapter, model.unmerge_adapter):
        with pytest.raises(ValueError, match="cannot be merged.*PeftModel.from_pretrained"):
            merge()
    assert torch.equal(logits(model, ids), edited)


def test_unload(ids):
    base = make_llama()
    expected, names = logits(base, ids), list(base.state_dict())
    model = get_peft_model(base, config())
    model.generate(input_ids=ids, max_new_tokens=1)
    unloaded = model.unload()
    assert unloaded is base and list(base.state_dict()) == names
    assert torch.equal(logits(base, ids), expected)
    assert "generate" not in vars(base) and not hasattr(base, "peft_config") and "reft" not in (base.model_tags or [])
    for module in base.modules():
        assert not module._forward_pre_hooks and not any(v for v in vars(module) if "reft" in v)
        assert not [hook for hook in module._forward_hooks.values() if "peft_reft" in hook.__module__]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "The model was called in eval mode")
        assert not torch.equal(logits(get_peft_model(base, config()), ids), expected)  # and again


def test_unload_of_a_copy(ids):
    model = get_peft_model(make_llama(), config())
    edited = logits(model, ids)
    copy.deepcopy(model).unload()
    assert torch.equal(logits(model, ids), edited)


def test_pickled_model(ids):
    model = get_peft_model(make_llama(), config()).eval()
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert torch.equal(
        loaded.generate(ids, do_sample=False, max_new_tokens=3), model.generate(ids, do_sample=False, max_new_tokens=3)
    )


@pytest.mark.parametrize("adapted_by", ["get_peft_model", "inject_adapter_in_model"])
def test_module_saved_whole(tmp_path, ids, adapted_by):
    """The loaded model edits with its own adapter: the saved one is broken before it is used."""
    if adapted_by == "get_peft_model":
        model = get_peft_model(make_llama(), config()).eval()
    else:
        model = inject_adapter_in_model(config(), make_llama()).eval()
    options = dict(do_sample=False, max_new_tokens=3)
    expected, tokens = logits(model, ids), model.generate(ids, **options)
    torch.save(model, tmp_path / "model.pt")
    for parameter in model.parameters():
        parameter.data.zero_()
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits(loaded, ids), expected) and torch.equal(loaded.generate(ids, **options), tokens)
    labels = ids.clone()
    labels[:, :5] = -100
    loaded.train()(input_ids=ids, labels=labels).loss.backward()
    assert all(p.grad is not None for p in loaded.parameters() if p.requires_grad)
    assert torch.equal(copy.deepcopy(loaded).eval().generate(ids, **options), tokens)


DTYPES = {torch.float64: 1e-9, torch.float16: 0.05, torch.bfloat16: 0.4}  # logits are of the order of ten


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_changed_after_attachment(ids, dtype):
    base = make_llama()
    model = get_peft_model(copy.deepcopy(base), config()).eval()
    single = logits(model, ids)
    model, base = model.to(dtype), base.to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    columns = {"prefix": [[0, 1]] * 2, "suffix": [[10, 11]] * 2}
    found, expected = logits(model, ids), ByHand(base, model).logits(columns, input_ids=ids)
    assert found.dtype == dtype
    atol = DTYPES[dtype]
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)
    torch.testing.assert_close(found.float(), single, atol=max(atol, 1e-4), rtol=0)
    assert (logits(base, ids) - expected).abs().max() > 5 * atol
    tokens = model.generate(ids, do_sample=False, max_new_tokens=2)
    assert torch.equal(tokens[:, 12], expected[:, -1].argmax(-1))
    labels = ids.clone()
    labels[:, :5] = -100
    model.train()(input_ids=ids, labels=labels).loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == dtype for p in model.parameters() if p.requires_grad)


def test_moved_after_attachment(ids):
    """No tensor stays behind: on the meta device, where nothing mixes with tensors of another."""
    model = get_peft_model(make_llama(), config()).eval().to("meta")
    labels = torch.full_like(ids, -100)
    labels[:, 5:] = 1
    output = model.train()(input_ids=ids.to("meta"), labels=labels.to("meta"))
    output.loss.backward()
    assert output.logits.device.type == "meta"
    assert all(p.grad.device.type == "meta" for p in model.parameters() if p.requires_grad)
    model.eval()(input_ids=ids.to("meta"), prompt_lengths=torch.tensor([4, 5]))


def test_reft_beside_lora(ids):
    """Both are trained; unloading ReFT leaves LoRA."""
    base = make_llama()
    lora = get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    )
    with_lora = logits(lora, ids)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = inject_adapter_in_model(config(), base, adapter_name="reft")
    assert not torch.equal(logits(model, ids), with_lora)
    for parameter in (p for n, p in model.named_parameters() if "lora_" in n):
        parameter.requires_grad_(True)
    model.train()
    labels = ids.clone()
    labels[:, :5] = -100
    model(input_ids=ids, labels=labels).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n or "._reft." in n)


# Modules and embeddings that are trained beside the adapter


NAMES = ["b", "W", "R", "weight", "bias", "lora_A", "model", "base_model", "reft", "reft_", "reft_x", "reft_prefix"]
NAMES += ["unit", "default2", "def", "a_b", "my-adapter", "with space", "x/y", "a+b(", "lm_head", "mlp", "ref"]


@pytest.mark.filterwarnings("ignore:Adapter name:UserWarning")  # PEFT's, of a name that its prefix begins with
@pytest.mark.parametrize("name", NAMES)
def test_names_of_adapters(tmp_path, ids, name):
    """Adapters that are saved, loaded, switched, mixed in a batch and deleted edit as by hand under any name."""
    kinds = {"default": config(), name: config(positions="l1", r=2)}
    columns = {"default": {"prefix": [[0, 1]] * 2, "suffix": [[10, 11]] * 2}, name: {"unit": [[11]] * 2}}
    model = get_peft_model(make_llama(), kinds["default"])
    model.add_adapter(name, kinds[name])
    by_hand = {each: ByHand(make_llama(), model, each).logits(columns[each], input_ids=ids) for each in kinds}
    assert (by_hand["default"] - by_hand[name]).abs().max() > 0.1
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 24
    assert len(get_peft_model_state_dict(model, adapter_name=name)) == 12
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path)
    loaded.load_adapter(tmp_path / name, name)
    plain = make_llama()  # without a PeftModel
    plain.load_adapter(str(tmp_path), "default")
    inject_adapter_in_model(kinds[name], plain, name)
    set_peft_model_state_dict(plain, load_file(tmp_path / name / "adapter_model.safetensors"), name)
    for each in (name, "default"):
        loaded.set_adapter(each)
        plain.set_adapter(each)
        for found in (logits(loaded, ids), logits(plain, ids)):
            torch.testing.assert_close(found, by_hand[each], atol=1e-5, rtol=1e-5)
        plain.save_pretrained(tmp_path / "plain" / each)
        again = make_llama()
        again.load_adapter(str(tmp_path / "plain" / each), each)
        assert torch.equal(logits(again, ids), logits(plain, ids))
    with torch.no_grad():
        mixed = loaded(input_ids=ids, adapter_names=[name, "default"]).logits
    torch.testing.assert_close(mixed, torch.stack([by_hand[name][0], by_hand["default"][1]]), atol=1e-5, rtol=1e-5)
    with pytest.warns(UserWarning, match="now deleted"):
        loaded.delete_adapter("default")
    torch.testing.assert_close(logits(loaded, ids), by_hand[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["layers", "0", "_reft", "_reft_prefix", "_R"])
@pytest.mark.parametrize("first", [True, False], ids=["first", "second"])
def test_names_that_are_parts_of_keys(ids, name, first):
    model = None if first else get_peft_model(make_llama(), config())
    before = None if first else (logits(model, ids), list(model.state_dict()))
    with pytest.raises(
        ValueError, match=rf"cannot be called '{name}' here.*model.layers.0._reft.*another adapter_name"
    ):
        if first:
            get_peft_model(make_llama(), config(), adapter_name=name)
        else:
            model.add_adapter(name, config())
    if not first:
        assert torch.equal(logits(model, ids), before[0]) and list(model.state_dict()) == before[1]
        assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize(
    ("name", "options", "refused"),
    [
        ("mlp", dict(target_modules=["mlp"]), "model.layers.0.mlp._reft"),
        ("lm_head", dict(modules_to_save=["lm_head"]), "lm_head.modules_to_save.weight"),
        ("weight", dict(modules_to_save=["lm_head"]), "lm_head.modules_to_save.weight"),
        ("token_adapter", dict(trainable_token_indices=[5]), "embed_tokens.token_adapter"),
    ],
)
def test_names_that_are_parts_of_what_another_adapter_saves(name, options, refused):
    """Whichever of the two comes first."""
    for names in ((name, "default"), ("default", name)):
        kinds = {"default": config(**options), name: config()}
        model = get_peft_model(make_llama(), kinds[names[0]], adapter_name=names[0])
        with pytest.raises(ValueError, match=rf"cannot be called '{name}' here.*{refused}"):
            model.add_adapter(names[1], kinds[names[1]])


# Encoders, through every Auto class

KINDS = {
    "SEQ_CLS": (BertForSequenceClassification, AutoPeftModelForSequenceClassification, torch.tensor([0, 1])),
    "TOKEN_CLS": (BertForTokenClassification, AutoPeftModelForTokenClassification, None),
    "QUESTION_ANS": (BertForQuestionAnswering, AutoPeftModelForQuestionAnswering, None),
    "FEATURE_EXTRACTION": (BertModel, AutoPeftModelForFeatureExtraction, None),
    None: (BertModel, AutoPeftModel, None),
}


def first_output(model, **inputs):
    with torch.no_grad():
        return next(iter(model.eval()(**inputs, return_dict=True).values()))


@pytest.mark.parametrize("task", KINDS)
def test_encoders(tmp_path, ids, task):
    """The whole input is the prompt, whatever the labels are, in training as in use."""
    model_class, auto_class, labels = KINDS[task]
    torch.manual_seed(0)
    base = model_class(BertConfig(**ENCODER)).eval()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(model_class.from_pretrained(tmp_path / "base"), config(task_type=task))
    mask = torch.tensor([[1] * 12, [1] * 9 + [0] * 3])
    columns = {"prefix": [[0, 1], [0, 1]], "suffix": [[10, 11], [7, 8]]}
    found = first_output(model, input_ids=ids, attention_mask=mask)
    by_hand = ByHand(base, model)
    if task in ("SEQ_CLS", "TOKEN_CLS"):  # their heads were drawn anew, and are trained and saved
        head = model.get_base_model().classifier.modules_to_save["default"]
        base.classifier.load_state_dict(head.state_dict())
    if task == "QUESTION_ANS":
        base.qa_outputs.load_state_dict(model.get_base_model().qa_outputs.modules_to_save["default"].state_dict())
    with by_hand.edits(columns):
        expected = first_output(base, input_ids=ids, attention_mask=mask)
    keep = slice(None) if found.dim() == 2 and task == "SEQ_CLS" else mask.bool()
    torch.testing.assert_close(found[keep], expected[keep], atol=1e-5, rtol=1e-5)
    assert (found - first_output(base, input_ids=ids, attention_mask=mask))[keep].abs().max() > 1e-3
    if task == "TOKEN_CLS":  # labels of -100 on special tokens are no prompt
        labels = torch.zeros_like(ids)
        labels[:, [0, 11]] = -100
    if labels is not None:
        with torch.no_grad():
            told = model.train()(input_ids=ids, attention_mask=mask, labels=labels).logits
        torch.testing.assert_close(told[keep], expected[keep], atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "adapter")
    loaded = auto_class.from_pretrained(tmp_path / "adapter")
    assert torch.equal(first_output(loaded, input_ids=ids, attention_mask=mask), found)
