"""An adapter for each row of a batch, against each row alone with its adapter active."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from by_hand import ENCODER, GREEDY, MASK, VOCABULARY, labels_of, make_gpt2, make_llama
from peft import get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Blip2Config,
    Blip2ForConditionalGeneration,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LogitsProcessor,
    OPTConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_reft import ReftConfig
from peft_reft.edits import apply
from peft_reft.edits.apply import edit
from peft_reft.runtime.adapter_names import BASE, current_mixed_batch

ADAPTERS = {
    "ends": dict(r=4, positions="f2+l2"),
    "last": dict(r=2, positions="l3", intervention="direft", layers_to_transform=[0, 2]),
    "first": dict(r=3, positions="f1", intervention="noreft", act_fn="relu"),
    "shared": dict(r=4, positions="f3+l1", share_weights=True, act_fn="tanh"),
    "prompt": dict(r=5, positions="prompt", intervention="consreft", layers_to_transform=[1]),
    "all": dict(r=1, positions="all", intervention="lobireft", rank_pattern={"layers.1": 6}),
    "added": dict(r=2, positions="f2+l5", intervention="direft_orthogonal", act_fn="gelu"),
}
NAMES = ["last", "ends", BASE, "first", "all", "shared", "prompt", "ends", "added", "all"]
PROMPT_ONLY = ["last", BASE, "ends", "first", "added"]


def add_adapters(base, adapters=ADAPTERS, **options):
    torch.manual_seed(1)
    model = None
    for name, own in adapters.items():
        config = ReftConfig(**{"task_type": "CAUSAL_LM", "init_weights": False} | options | own)
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    for parameter in (p for name, p in model.named_parameters() if name.endswith("._R")):
        parameter.data += 0.1 * torch.randn_like(parameter)  # its rows are no longer orthonormal
    return model.eval()


@pytest.fixture
def model():
    return add_adapters(make_llama())


def make_bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**ENCODER | dict(num_hidden_layers=3, num_labels=3))).eval()


def make_rows(rows, tokens=12, padded=True):
    ids = torch.randint(2, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for row in range(rows if padded else 0):
        mask[row, : row % 5] = 0
    return ids, mask


def alone(model, name, call):
    """What a call gives with one adapter, or none, for all rows."""
    if name != BASE:
        model.set_adapter(name)
    with model.disable_adapter() if name == BASE else nullcontext(), torch.no_grad():
        return call()


def assert_rows_equal_each_alone(model, names, inputs):
    with torch.no_grad():
        found = model(**inputs, adapter_names=names).logits
    for row, name in enumerate(names):
        own = {key: value[row : row + 1] for key, value in inputs.items()}
        expected = alone(model, name, lambda own=own: model(**own).logits)
        seen = inputs["attention_mask"][row].bool() if expected.dim() == 3 else ...
        torch.testing.assert_close(found[row][seen], expected[0][seen], atol=1e-5, rtol=1e-5)
        base = alone(model, BASE, lambda own=own: model(**own).logits)
        assert name == BASE or (base - expected)[0][seen].abs().max() > 1e-2, "the edit is too small to be seen"


@pytest.mark.parametrize(
    "names", [NAMES, PROMPT_ONLY, ["ends", "ends"], ["all", BASE], [BASE, BASE], ["first"]], ids=len
)
@pytest.mark.parametrize("told", ["nothing", "labels", "prompt_lengths"])
def test_forward(model, names, told):
    ids, mask = make_rows(len(names))
    inputs = dict(input_ids=ids, attention_mask=mask)
    if told == "labels":
        inputs["labels"] = labels_of(ids, *([(7 + row % 4, 12)] for row in range(len(names))))
    elif told == "prompt_lengths":
        inputs["prompt_lengths"] = mask.sum(1) - 2
    assert_rows_equal_each_alone(model, names, inputs)


def test_padding_is_not_edited(model):
    names = ["all", "prompt", "ends", "all", "shared"]
    ids, mask = make_rows(5)
    inputs = dict(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    with torch.no_grad():
        found = model(**inputs, adapter_names=names).hidden_states[1]
        with model.disable_adapter():
            base = model(**inputs).hidden_states[1]
    assert torch.equal(found[mask == 0], base[mask == 0])
    assert not torch.equal(found[mask == 1], base[mask == 1])


def test_turns_of_a_conversation(model):
    names = ["ends", "last", "shared", "added"]
    ids, _ = make_rows(4, tokens=16)
    labels = labels_of(ids, *[[(4, 6), (9, 12), (14, 16)]] * 4)
    assert_rows_equal_each_alone(model, names, dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels))


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(num_beams=3),
        dict(num_beams=4, num_return_sequences=2),
        dict(use_cache=False),
        dict(prefill_chunk_size=5),
        dict(cache_implementation="static"),
    ],
    ids=str,
)
def test_generate(make, options):
    model = add_adapters(make())
    ids, mask = make_rows(len(NAMES))
    options = GREEDY | options
    found = model.generate(input_ids=ids, attention_mask=mask, adapter_names=NAMES, **options)
    each = len(found) // len(NAMES)
    distinct = set()
    for row, name in enumerate(NAMES):
        own = dict(input_ids=ids[row : row + 1], attention_mask=mask[row : row + 1], **options)
        expected = alone(model, name, lambda own=own: model.generate(**own))
        assert torch.equal(found[row * each : (row + 1) * each], expected), name
        base = alone(model, BASE, lambda own=own: model.generate(**own))
        distinct |= {name} if not torch.equal(base, expected) else set()
    assert len(distinct) >= 4, "too few adapters change what is generated"


def test_generate_of_a_model_without_peft_model(ids):
    """A model adapted through transformers' own add_adapter takes the names as well."""
    model = make_llama()
    torch.manual_seed(1)
    for name in ("ends", "last"):
        model.add_adapter(ReftConfig(task_type="CAUSAL_LM", init_weights=False, **ADAPTERS[name]), name)
    model.eval()
    names, inputs = ["ends", BASE], dict(input_ids=ids, attention_mask=MASK)
    found = model.generate(**inputs, adapter_names=names, **GREEDY)
    with torch.no_grad():
        logits = model(**inputs, adapter_names=names).logits
        model.set_adapter("ends")
        assert torch.equal(found[:1], model.generate(ids[:1], attention_mask=MASK[:1], **GREEDY))
        torch.testing.assert_close(logits[:1], model(ids[:1], attention_mask=MASK[:1]).logits, atol=1e-5, rtol=1e-5)
        model.disable_adapters()
        assert torch.equal(found[1:], model.generate(ids[1:], attention_mask=MASK[1:], **GREEDY))
        assert not torch.equal(found, model.generate(ids, attention_mask=MASK, **GREEDY))


def test_all_rows_are_edited_in_one_pass(model, monkeypatch):
    """Neither a loop over adapters nor, after the prompt, any call at all where positions are of the prompt alone."""
    calls = []

    def record(units, hidden_states, mask):
        calls.append(list(hidden_states.shape))
        return edit(units, hidden_states, mask)

    monkeypatch.setattr(apply, "edit", record)
    ids, mask = make_rows(len(PROMPT_ONLY))
    model.generate(input_ids=ids, attention_mask=mask, adapter_names=PROMPT_ONLY, **GREEDY)
    assert calls == [[2, 5, 5, 32]] * 3
    calls.clear()
    ids, mask = make_rows(len(NAMES))
    model.generate(input_ids=ids, attention_mask=mask, adapter_names=NAMES, **GREEDY)
    assert [shape[2] for shape in calls] == [3, 12] * 3 + [1] * 15


def test_gradients_reach_each_adapter_from_its_own_rows(model):
    """In eval mode, as for saliency: the same gradients as from each row alone."""
    names = ["ends", "last", "shared", "ends"]
    ids, mask = make_rows(4)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    own = {n: p.requires_grad_() for n, p in model.named_parameters() if "._reft." in n}
    model(input_ids=ids, attention_mask=mask, adapter_names=names).logits.square().sum().backward()
    found = {n: p.grad.clone() for n, p in own.items() if p.grad is not None}
    model.zero_grad()
    for row, name in enumerate(names):
        model.set_adapter(name)
        model(input_ids=ids[row : row + 1], attention_mask=mask[row : row + 1]).logits.square().sum().backward()
    assert any(".shared." in n for n in found)
    for name, grad in found.items():
        expected = own[name].grad
        torch.testing.assert_close(
            grad, torch.zeros_like(grad) if expected is None else expected, atol=1e-3, rtol=1e-4
        )


def test_adapters_of_different_dtypes(model):
    names = ["ends", "last", "added"]
    for name, parameter in model.named_parameters():
        if ".last." in name:
            parameter.data = parameter.data.bfloat16()
    ids, mask = make_rows(3)
    assert_rows_equal_each_alone(model, names, dict(input_ids=ids, attention_mask=mask))


def test_classifier_with_a_head_for_each_adapter():
    model = add_adapters(make_bert(), {name: ADAPTERS[name] for name in ("ends", "last")}, task_type="SEQ_CLS")
    for parameter in model.get_base_model().classifier.modules_to_save["last"].parameters():
        torch.nn.init.normal_(parameter)
    ids, mask = make_rows(4, padded=False)
    names = ["last", "ends", BASE, "last"]
    assert_rows_equal_each_alone(model, names, dict(input_ids=ids, attention_mask=mask))


def test_encoder_decoder():
    torch.manual_seed(0)
    shape = dict(d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, vocab_size=64)
    base = T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, initializer_factor=2.0, **shape)).eval()
    names = ["last", BASE, "ends", "prompt"]
    model = add_adapters(base, {name: ADAPTERS[name] for name in names if name != BASE}, task_type="SEQ_2_SEQ_LM")
    ids, mask = make_rows(4)
    options = dict(do_sample=False, max_new_tokens=6, num_beams=2, num_return_sequences=2)
    found = model.generate(input_ids=ids, attention_mask=mask, adapter_names=names, **options)
    changed = 0
    for row, name in enumerate(names):
        own = dict(input_ids=ids[row : row + 1], attention_mask=mask[row : row + 1], **options)
        expected = alone(model, name, lambda own=own: model.generate(**own))
        assert torch.equal(found[2 * row : 2 * row + 2, : expected.shape[1]], expected)
        changed += not torch.equal(expected, alone(model, BASE, lambda own=own: model.generate(**own)))
    assert changed >= 2


def test_calls_within_generate_have_adapters_of_their_own(model, ids):
    """A call that a logits processor makes, by any road, is not one of the mixed batch's."""
    names = ["last", BASE]
    model.set_adapter("ends")
    base, other, seen = model.get_base_model(), ids.flip(1), []
    expected = {
        "forward": model(input_ids=ids).logits,
        "mixed": model(input_ids=ids, adapter_names=["all", "first"]).logits,
        "generate": model.generate(input_ids=other, **GREEDY),
        "outer": model.generate(input_ids=ids, attention_mask=MASK, adapter_names=names, **GREEDY),
    }

    class Calls(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(torch.equal(base(input_ids=ids).logits, expected["forward"]))
            seen.append(torch.equal(model(input_ids=ids).logits, expected["forward"]))
            mixed = model(input_ids=ids, adapter_names=["all", "first"]).logits
            seen.append(torch.equal(mixed, expected["mixed"]))
            seen.append(torch.equal(base.generate(input_ids=other, **GREEDY), expected["generate"]))
            return scores

    inputs = dict(input_ids=ids, attention_mask=MASK, adapter_names=names, logits_processor=[Calls()])
    with torch.no_grad():
        assert torch.equal(model.generate(**inputs, **GREEDY), expected["outer"])
    assert len(seen) == 24 and all(seen)
    assert current_mixed_batch() is None


@pytest.mark.parametrize("make_other", [make_llama, make_bert])
def test_another_model_within_generate_keeps_its_own_adapter(model, ids, make_other):
    """A draft model, or one that gives rewards."""
    other = make_other()
    torch.manual_seed(2)
    other.add_adapter(ReftConfig(init_weights=False, positions="f2"), "ends")
    seen = []
    with torch.no_grad():
        expected = other.eval()(input_ids=ids).logits

    class Calls(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(torch.equal(other(input_ids=ids).logits, expected))
            return scores

    model.generate(input_ids=ids, adapter_names=["last", BASE], logits_processor=[Calls()], **GREEDY)
    assert len(seen) == 6 and all(seen)


def make_blip2():
    """BLIP-2 with adapters in its language model, and what it is given."""
    torch.manual_seed(0)
    layers = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    text = dict(vocab_size=64, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64, init_std=0.2)
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=None)
    config = Blip2Config(
        vision_config=dict(intermediate_size=64, image_size=8, patch_size=4, **layers),
        qformer_config=dict(intermediate_size=64, encoder_hidden_size=32, vocab_size=64, **layers),
        text_config=OPTConfig(**layers, **text, **special).to_dict(),
        num_query_tokens=4,
        image_token_id=5,
        initializer_range=0.2,
    )
    adapters = {name: ADAPTERS[name] | dict(target_modules=r".*decoder\.layers\.\d+") for name in ("ends", "last")}
    adapters["last"].pop("layers_to_transform")
    model = add_adapters(Blip2ForConditionalGeneration(config).eval(), adapters)
    ids = torch.cat([torch.full((3, 4), 5), torch.randint(6, VOCABULARY, (3, 8))], dim=1)
    return model, dict(input_ids=ids, pixel_values=torch.randn(3, 3, 8, 8), attention_mask=torch.ones_like(ids))


def test_generate_that_hands_on_to_an_inner_model():
    """BLIP-2 gives what it makes of its prompt to its language model's own generate."""
    model, inputs = make_blip2()
    names = ["last", BASE, "ends"]
    found = model.generate(**inputs, adapter_names=names, **GREEDY)
    rows = [alone(model, name, lambda: model.generate(**inputs, **GREEDY))[row] for row, name in enumerate(names)]
    assert torch.equal(found, torch.stack(rows))
    assert not torch.equal(found, alone(model, BASE, lambda: model.generate(**inputs, **GREEDY)))


def test_generate_of_an_inner_model_within_a_forward():
    """Its steps are calls of their own, not parts of the forward of the model around it."""
    model, inputs = make_blip2()
    model.set_adapter("ends")
    inner, embeddings, found = model.get_base_model().language_model, torch.randn(3, 9, 32), []

    def generate():
        return inner.generate(inputs_embeds=embeddings, attention_mask=torch.ones(3, 9, dtype=torch.long), **GREEDY)

    expected = generate()
    before = model(**inputs).logits
    hook = model.get_base_model().language_projection.register_forward_hook(lambda *_: found.append(generate()))
    torch.testing.assert_close(model(**inputs).logits, before)
    hook.remove()
    assert len(found) == 1 and torch.equal(found[0], expected)
    with model.disable_adapter():
        assert not torch.equal(generate(), expected)


def test_images_are_refused_under_different_adapters():
    """A row may have several images or none, so their number does not tell whose they are."""
    torch.manual_seed(0)
    layers = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    vision = CLIPVisionConfig(image_size=16, patch_size=4, **layers)
    text = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **layers)
    base = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=63))
    tower = dict(target_modules=r".*vision_tower.*layers\.\d+", positions="f2+l2", r=2)
    model = add_adapters(base.eval(), {"one": tower, "two": tower})
    ids, _ = make_rows(2, tokens=40)
    ids[:] = ids.clamp(max=60)
    ids[0, 2:34] = 63
    inputs = dict(input_ids=ids, pixel_values=torch.randn(2, 3, 16, 16))
    with pytest.raises(ValueError, match="cannot tell to which row of the text each belongs"):
        model(**inputs, adapter_names=["one", "two"])
    with torch.no_grad():
        found = model(**inputs, adapter_names=["two", "two"]).logits
        model.set_adapter("two")
        torch.testing.assert_close(found, model(**inputs).logits, atol=1e-5, rtol=1e-5)


def test_heads_follow_the_call(ids):
    """Without a PeftModel around the model, and in a call of its own within generate."""
    adapters = {name: ADAPTERS[name] | dict(modules_to_save=["lm_head"]) for name in ("ends", "last")}
    model = add_adapters(make_llama(), adapters)
    for name, parameter in model.named_parameters():
        if "modules_to_save.last" in name:
            torch.nn.init.normal_(parameter)
    base, names, seen = model.get_base_model(), ["last", "ends"], []
    with torch.no_grad():
        expected, active = model(input_ids=ids, adapter_names=names).logits, model(input_ids=ids).logits
        assert torch.equal(base(input_ids=ids, adapter_names=names).logits, expected)

    class Calls(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(torch.equal(base(input_ids=ids).logits, active))
            return scores

    model.generate(input_ids=ids, adapter_names=names, logits_processor=[Calls()], **GREEDY)
    assert len(seen) == 6 and all(seen) and not torch.equal(active, expected)


def test_rows_that_need_no_end_may_lack_one(model, ids):
    """Each row's labels are asked for what its own adapter needs."""
    labels = labels_of(ids, [(0, 12)], [(5, 12)])
    for name in ("first", "all", BASE):
        with torch.no_grad():
            found = model(input_ids=ids, labels=labels, adapter_names=[name, "ends"]).logits
        own = dict(input_ids=ids[:1], labels=labels[:1])
        expected = alone(model, name, lambda own=own: model(**own).logits)
        torch.testing.assert_close(found[:1], expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="labels from its first token on"):
        model(input_ids=ids, labels=labels, adapter_names=["ends", "first"])


def test_continuous_batching_takes_no_names(model):
    with pytest.raises(ValueError, match="generate_batch takes no adapter_names"):
        model.generate_batch([[3, 4, 5]], adapter_names=["ends"])


def test_threads_have_mixed_batches_of_their_own(model, ids):
    batches = [["ends", "last"], ["all", BASE], [BASE, "first"], None]
    generate = lambda names: model.generate(input_ids=ids, adapter_names=names, **GREEDY)  # noqa: E731
    expected = [generate(names) for names in batches]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(generate, batches * 4))
    assert all(torch.equal(tokens, expected[index % 4]) for index, tokens in enumerate(found))
    assert not torch.equal(expected[0], expected[1])


def test_disabled_adapters_stay_disabled(model, ids):
    with torch.no_grad(), model.disable_adapter():
        expected = model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids, adapter_names=["ends", "all"]).logits, expected)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["ends"], "names 1 adapters, but the model is given 2 rows"),
        (["ends"] * 4, "names 4 adapters, but the model is given 2 rows"),
        (["ends", "lost"], "not there: lost.*There are added, all, .*__base__ for none"),
        ("ends", "adapter_names='ends' must be a list"),
        ([], r"adapter_names=\[\] must be a list"),
    ],
)
def test_wrong_names(model, ids, names, message):
    with pytest.raises(ValueError, match=message):
        model(input_ids=ids, adapter_names=names)
    assert current_mixed_batch() is None


@pytest.mark.parametrize("count", [1, 3, 4])
def test_names_that_do_not_fit_the_prompts(model, ids, count):
    with pytest.raises(ValueError, match=f"names {count} adapters, but the model is given 2 rows"):
        model.generate(input_ids=ids, adapter_names=["ends"] * count, num_beams=2, **GREEDY)
    assert current_mixed_batch() is None


def test_training_is_refused(model, ids):
    with pytest.raises(ValueError, match="training mode"):
        model.train()(input_ids=ids, adapter_names=["ends", "all"])


@pytest.mark.parametrize("active", ["ends", "last", "first"])
def test_modules_that_some_adapters_save(active):
    adapters = {
        "ends": ADAPTERS["ends"] | dict(modules_to_save=["lm_head"]),
        "last": ADAPTERS["last"],
        "first": ADAPTERS["first"] | dict(trainable_token_indices=list(range(20))),
    }
    model = add_adapters(make_llama(), adapters)
    for name, parameter in model.named_parameters():
        if "modules_to_save.ends" in name or "delta.first" in name:
            torch.nn.init.normal_(parameter)
    ids, mask = make_rows(5)
    names, inputs = ["last", "ends", BASE, "first", "ends"], dict(input_ids=ids, attention_mask=mask)
    assert_rows_equal_each_alone(model, names, inputs)
    model.set_adapter(active)
    with torch.no_grad():
        found = model(**inputs, adapter_names=names).logits
        model.set_adapter("ends")
        expected = model(input_ids=ids[1:2], attention_mask=mask[1:2]).logits
    torch.testing.assert_close(found[1:2][:, 1:], expected[:, 1:], atol=1e-5, rtol=1e-5)
    options = GREEDY | dict(num_beams=2)
    tokens = model.generate(**inputs, adapter_names=names, **options)
    for row in (1, 3):
        own = {key: value[row : row + 1] for key, value in inputs.items()}
        assert torch.equal(
            tokens[row : row + 1], alone(model, names[row], lambda own=own: model.generate(**own, **options))
        )
