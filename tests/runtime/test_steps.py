"""Forwards within `generate`: the inputs that it prepares are marked as its steps, and all others are calls aside."""

import copy
import functools
import inspect
import pickle
import threading
import types
from collections import Counter

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from by_hand import CACHE, GREEDY, MASK, ByHand, adapt_model, generated, make_llama
from peft import get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaForCausalLM, LlamaModel, LogitsProcessor

from peft_reft import ReftConfig
from peft_reft.runtime.generate import STEP

COLUMNS = {"prefix": [[0, 1], [4, 5]], "suffix": [[10, 11], [10, 11]]}  # of f2+l2 in the prompts of MASK
WAYS = [{}, dict(use_cache=False), dict(cache_implementation="static"), dict(prefill_chunk_size=5)]


def ends_at(length):
    return {"unit": [[length - 2, length - 1]] * 2}


# Calls aside


@pytest.mark.parametrize("use_cache", [True, False])
def test_forward_over_the_tokens_of_a_step(adapt, ids, use_cache):
    """The same tensor, or equal ids: all of them are its own prompt, as outside of generate."""
    model, by_hand = adapt(positions="l2")
    found = []

    class Asks(LogitsProcessor):
        def __call__(self, input_ids, scores):
            found.append((input_ids, model(input_ids=input_ids).logits, model(input_ids=input_ids.clone()).logits))
            return scores

    tokens = generated(model, ids, None, logits_processor=[Asks()], use_cache=use_cache)
    assert torch.equal(tokens, by_hand.generate(ends_at(12), ids))
    assert len(found) == 6
    for input_ids, *logits in found:
        expected = by_hand.logits(ends_at(input_ids.shape[1]), input_ids=input_ids)
        for each in logits:
            torch.testing.assert_close(each, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("is_told", [True, False])
def test_prepared_inputs_of_another_sequence(adapt, ids, is_told):
    """Inputs with a cache of their own, or with the length of the prompt, are no step, though they are prepared."""
    model, by_hand = adapt(positions="l2")
    found = []

    class Asks(LogitsProcessor):
        def __call__(self, input_ids, scores):
            cache = {} if is_told else {CACHE: DynamicCache(config=model.config)}
            told = {"prompt_lengths": torch.tensor([5, 5])} if is_told else {}
            prepared = model.prepare_inputs_for_generation(input_ids, use_cache=not is_told, **cache)
            found.append((input_ids, model(**prepared, **told).logits))
            return scores

    tokens = generated(model, ids, None, logits_processor=[Asks()])
    assert torch.equal(tokens, by_hand.generate(ends_at(12), ids))
    assert len(found) == 6
    for input_ids, logits in found:
        expected = by_hand.logits(ends_at(5 if is_told else input_ids.shape[1]), input_ids=input_ids)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


class Waits(TorchDispatchMode):
    """Counts what makes a device wait: values that Python reads."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function) in ("aten.equal.default", "aten._local_scalar_dense.default", "aten.is_nonzero.default"):
            self.counts[str(function)] += 1
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_steps_wait_for_no_values(adapt, ids, options):
    """Six tokens take no more waits than in the base model."""
    model, by_hand = adapt(positions="f2+l2")
    counts = []
    for generating in (by_hand.base, model):
        with Waits() as waits:
            generated(generating, ids, **options)
        counts.append(waits.counts)
    assert counts[0] == counts[1]


# Code that decodes in a way of its own


def tells(model, input_ids, attention_mask=None, **inputs):
    """Without a cache, by forwards that are told where the prompt ends."""
    told = torch.tensor([input_ids.shape[1]] * len(input_ids))
    for _ in range(6):
        logits = model(input_ids=input_ids, prompt_lengths=told).logits
        input_ids = torch.cat([input_ids, logits[:, -1:].argmax(-1)], dim=1)
    return input_ids


def prepares_twice(model, input_ids, attention_mask=None, **inputs):
    """Looks at the inputs of every step, of two chunks of the prompt at first, before it takes them."""
    cached, given, tokens = {CACHE: inputs[CACHE]}, [input_ids[:, :7], input_ids[:, 7:]], input_ids
    while tokens.shape[1] < input_ids.shape[1] + 6:
        for chunk in given:
            for _ in range(2):
                prepared = model.prepare_inputs_for_generation(chunk, use_cache=True, **cached)
            logits = model(**prepared).logits
        given = [logits[:, -1:].argmax(-1)]
        tokens = torch.cat([tokens, *given], dim=1)
    return tokens


@pytest.mark.parametrize("function", [tells, prepares_twice])
def test_custom_generate(adapt, ids, function):
    model, by_hand = adapt(positions="l5")
    found = model.generate(ids, custom_generate=function, **GREEDY)
    assert torch.equal(found, by_hand.generate({"unit": [[7, 8, 9, 10, 11]] * 2}, ids))


def test_custom_generate_that_tells_nothing(adapt, ids):
    """Without a cache its forwards are calls like those outside of generate, and there is the same warning."""
    model, by_hand = adapt(positions="l2")

    def asks(model, input_ids, **inputs):
        return torch.cat([input_ids, model(input_ids=input_ids).logits[:, -1:].argmax(-1)], dim=1)

    with pytest.warns(UserWarning, match="prompt_lengths.*once for each model"):
        found = model.generate(ids, custom_generate=asks, **GREEDY)
    assert torch.equal(found, by_hand.generate(ends_at(12), ids, new_tokens=1))


def skips_all(model, input_ids, attention_mask=None, **inputs):
    return model(input_ids=input_ids, use_cache=True, **{CACHE: inputs[CACHE]}).logits


def skips_later(model, input_ids, attention_mask=None, **inputs):
    logits = model(**model.prepare_inputs_for_generation(input_ids, **inputs)).logits
    return skips_all(model, logits[:, -1:].argmax(-1), **inputs)


def picks_fields(model, input_ids, attention_mask=None, **inputs):
    prepared = model.prepare_inputs_for_generation(input_ids, **inputs)
    return model(input_ids=prepared["input_ids"], **{CACHE: prepared[CACHE]}).logits


@pytest.mark.parametrize("function", [skips_all, skips_later, picks_fields])
def test_cache_of_the_call_in_a_forward_that_is_not_marked(adapt, ids, function):
    model, by_hand = adapt(positions="f2+l2")
    with pytest.raises(ValueError, match="call's own cache.*prepare_inputs_for_generation.*prompt_lengths"):
        model.generate(ids, custom_generate=function, **GREEDY)
    with model.disable_adapter():
        found = model.generate(ids, custom_generate=function, **GREEDY)
    torch.testing.assert_close(found, by_hand.base.generate(ids, custom_generate=function, **GREEDY))


def test_fewer_tokens_than_were_prepared(adapt, ids):
    """Which of them the prompt's are is not known."""
    model, _ = adapt(positions="l2")

    def takes_the_last(model, input_ids, attention_mask=None, **inputs):
        prepared = model.prepare_inputs_for_generation(input_ids, **inputs)
        return model(**prepared | {"input_ids": input_ids[:, -3:]}).logits

    with pytest.raises(ValueError, match="generate prepared 12 tokens, but the model was given 3"):
        model.generate(ids, custom_generate=takes_the_last, **GREEDY)


def test_inputs_that_are_used_elsewhere(adapt, ids):
    """After the call, or in another thread: nothing is known there of its prompts."""
    model, _ = adapt()
    kept, errors = [], []

    def run():
        try:
            model(**kept[0])
        except RuntimeError as error:
            errors.append(error)

    def keeps(model, input_ids, attention_mask=None, **inputs):
        kept.append(model.prepare_inputs_for_generation(input_ids, **inputs))
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return input_ids

    model.generate(ids, custom_generate=keeps, **GREEDY)
    run()
    assert len(errors) == 2 and all("prepared within `generate`" in str(error) for error in errors)


# Models


class Copies(LlamaForCausalLM):
    """Gives its ids on to the model within it in another tensor."""

    def forward(self, input_ids=None, **kwargs):
        return super().forward(input_ids=input_ids.clone(), **kwargs)


class CopyOfIds(LlamaModel):
    def forward(self, input_ids=None, **kwargs):
        return super().forward(input_ids=input_ids.clone(), **kwargs)


class CopiesWithin(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model = CopyOfIds(config)


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("kind", [Copies, CopiesWithin])
def test_model_that_copies_its_ids(ids, kind, options):
    base = kind(make_llama().config).eval()
    base.load_state_dict(make_llama().state_dict())
    torch.manual_seed(1)
    model, by_hand = adapt_model(base, positions="f2+l2")
    assert torch.equal(generated(model, ids, **options), by_hand.generate(COLUMNS, ids, MASK))


class Records(ModelHook):
    def __init__(self, seen):
        self.seen = seen

    def pre_forward(self, module, *args, **kwargs):
        self.seen.append(kwargs)
        return args, kwargs


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("how", ["method", "function", "accelerate"])
def test_what_is_put_on_a_model_sees_no_mark(adapt, ids, how, options):
    model, by_hand = adapt(positions="f2+l2")
    base, seen = model.get_base_model(), []
    before = base.forward

    def forward(self, *args, **kwargs):
        seen.append(kwargs)
        return before(*args, **kwargs)

    if how == "method":
        base.forward = types.MethodType(forward, base)
    elif how == "function":
        base.forward = lambda *args, **kwargs: forward(base, *args, **kwargs)
    else:
        add_hook_to_module(base, Records(seen))
    assert torch.equal(generated(model, ids, **options), by_hand.generate(COLUMNS, ids, MASK))
    assert len(seen) >= 6 and not any(STEP in kwargs for kwargs in seen)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["method", "function"])
def test_preparation_that_another_package_puts_on(ids, kind, when):
    base, calls = make_llama(), []
    before = base.prepare_inputs_for_generation if when == "before" else None

    @functools.wraps(LlamaForCausalLM.prepare_inputs_for_generation)
    def prepare(self, *args, **kwargs):
        calls.append(1)
        return before(*args, **kwargs)

    def put():
        method = types.MethodType(prepare, base)
        base.prepare_inputs_for_generation = method if kind == "method" else functools.partial(prepare, base)

    if when == "before":
        put()
        put_before = base.prepare_inputs_for_generation
    model = get_peft_model(base, ReftConfig(task_type="CAUSAL_LM", r=4, positions="f2+l2", init_weights=False)).eval()
    if when == "after":
        before = base.prepare_inputs_for_generation
        put()
    expected = ByHand(make_llama(), model).generate(COLUMNS, ids, MASK)
    assert torch.equal(generated(model, ids), expected)
    assert len(calls) == 6
    if when == "before":
        assert model.unload().prepare_inputs_for_generation == put_before


def test_signatures_and_what_unload_gives_back(adapt):
    """transformers reads off them which arguments generate may be given."""
    plain = make_llama()
    model, _ = adapt()
    base = model.get_base_model()
    names = ("prepare_inputs_for_generation", "_prepare_cache_for_generation", "_get_logits_processor")
    for name in names:
        assert inspect.signature(getattr(base, name)) == inspect.signature(getattr(plain, name))
    unloaded = model.unload()
    for name in names:
        assert getattr(unloaded, name).__func__ is getattr(LlamaForCausalLM, name)
    with pytest.raises(ValueError, match="not used by the model: .*unknown"):
        adapt()[0].generate(torch.ones(1, 3, dtype=torch.long), unknown=1)


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_mark_their_own_steps(adapt, ids, copy_of, options):
    model, by_hand = adapt(positions="f2+l2")
    for other in (copy_of(model), copy_of(model.get_base_model())):
        assert torch.equal(generated(other, ids, **options), by_hand.generate(COLUMNS, ids, MASK))


def test_calls_aside_in_training_mode(adapt, ids):
    """generate trains nothing: what is called within it need not be told where prompts end."""
    model, by_hand = adapt(positions="l2")
    found = []

    class Asks(LogitsProcessor):
        def __call__(self, input_ids, scores):
            found.append(model(input_ids=ids[:, :7]).logits)
            return scores

    generated(model.train(), ids, None, logits_processor=[Asks()])
    with pytest.raises(ValueError, match="requires the end"):
        model(input_ids=ids[:, :7])
    expected = by_hand.logits(ends_at(7), input_ids=ids[:, :7])
    assert len(found) == 6
    for logits in found:
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
