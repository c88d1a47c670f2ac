import copy
import gc
import inspect
import io
import pickle
import sys
import types
import weakref
from collections import namedtuple

import pytest
import torch
from by_hand import GREEDY, TWO, ByHand, adapt_model, labels_of, make_llama
from peft import get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import LlamaForCausalLM

import peft_reft
from peft_reft import ReftConfig
from peft_reft.runtime.adapter_names import current_mixed_batch
from peft_reft.runtime.attach import unhook_model
from peft_reft.runtime.generate import current_generation
from peft_reft.runtime.plan import current_plan

COLUMNS = {"prefix": [[0, 1], [0, 1]], "suffix": [[3, 4], [6, 7]]}  # of f2+l2 in the prompts of TWO


def test_nothing_is_left_behind(adapt, ids):
    model, _ = adapt()
    model(input_ids=ids)
    model.generate(input_ids=ids, max_new_tokens=1)
    assert current_plan() is None and current_generation() is None
    with pytest.raises(ValueError):
        model(input_ids=ids, prompt_lengths=torch.tensor([99, 99]))
    with pytest.raises(ValueError):
        model.generate(input_ids=ids, max_new_tokens=-1)
    assert current_plan() is None and current_generation() is None


def test_block_called_outside_of_its_model(adapt):
    model, _ = adapt()
    block = model.get_base_model().model.layers[0]
    rotary = model.get_base_model().model.rotary_emb
    hidden_states = torch.randn(1, 4, 32)
    embeddings = rotary(hidden_states, torch.arange(4)[None])
    with pytest.raises(RuntimeError, match=r"LlamaDecoderLayer\) ran outside a call of its model"):
        block(hidden_states, position_embeddings=embeddings)
    with model.disable_adapter():
        block(hidden_states, position_embeddings=embeddings)


Pair = namedtuple("Pair", ["hidden_states", "rest"])


@pytest.mark.parametrize(
    "kind", [lambda first: first, lambda first: (first, 1), lambda first: [first, 1], lambda first: Pair(first, 1)]
)
def test_kinds_of_output(ids, kind):
    """A tensor, or the first of a tuple, a list or a named tuple, which stays one."""

    class Block(nn.Linear):
        def forward(self, x):
            return kind(super().forward(x))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block(8, 8)

        def forward(self, inputs_embeds):
            return self.block(inputs_embeds)

    torch.manual_seed(0)
    base, x = Model(), torch.randn(2, 5, 8)
    unedited = base.block.weight @ x.mT + base.block.bias[:, None]
    model = get_peft_model(base, ReftConfig(r=2, target_modules=["block"], positions="l1", init_weights=False)).eval()
    output = model(inputs_embeds=x)
    assert type(output) is type(kind(x))
    first = output if isinstance(output, torch.Tensor) else output[0]
    changed = (first - unedited.mT).abs().amax(-1) > 1e-3
    assert changed.tolist() == [[False] * 4 + [True]] * 2


def test_generate_that_another_package_replaced(ids):
    base = make_llama()
    calls = []
    plain = base.generate
    base.generate = lambda *args, **kwargs: calls.append(1) or plain(*args, **kwargs)
    replaced = base.generate
    model = get_peft_model(base, ReftConfig(task_type="CAUSAL_LM", r=4))
    model.generate(input_ids=ids, max_new_tokens=1)
    assert calls == [1]
    assert model.unload().generate is replaced


def test_second_adapter_adds_no_second_hooks(adapt, ids):
    model, _ = adapt()
    base = model.get_base_model()
    before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.modules()]
    model.add_adapter("second", ReftConfig(task_type="CAUSAL_LM", r=2))
    after = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.modules()]
    assert sum(after) == sum(before)
    whole, chunked = (model.generate(input_ids=ids, **GREEDY, **o) for o in ({}, dict(prefill_chunk_size=5)))
    assert torch.equal(whole, chunked)  # the prompt that generate remembers is still that of the model's plans


class Custom(nn.Module):
    """A causal language model that is not of transformers, around blocks that put out tuples."""

    class Block(nn.Linear):
        def forward(self, x):
            return super().forward(x), "weights"

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.steps = nn.ModuleList(self.Block(16, 16) for _ in range(2))

    def forward(self, input_ids, labels=None):
        x = self.embed(input_ids)
        for step in self.steps:
            x, kept = step(x)
            assert kept == "weights"
        return x


def test_custom_model(ids):
    torch.manual_seed(0)
    base = Custom()
    expected = base(ids)
    model = get_peft_model(base, ReftConfig(r=2, positions="l1", init_weights=False, target_modules=r"steps\.\d"))
    with torch.no_grad():
        changed = (model(ids) - expected).abs().amax(-1) > 1e-4
        assert changed.tolist() == [[False] * 11 + [True]] * 2
        changed = (model(ids, prompt_lengths=torch.tensor([3, 5])) - expected).abs().amax(-1) > 1e-4
        assert changed.nonzero().tolist() == [[0, 2], [1, 4]]


def test_labels_that_are_no_next_tokens(ids):
    """A class for each row says nothing about the prompt, which is then the whole input."""
    torch.manual_seed(0)
    base = Custom()
    expected = base(ids)
    options = dict(r=2, positions="l1", init_weights=False, target_modules=r"steps\.\d")
    model = inject_adapter_in_model(ReftConfig(task_type="CAUSAL_LM", **options), base).eval()
    with torch.no_grad():
        changed = (model(ids, labels=torch.tensor([0, 1])) - expected).abs().amax(-1) > 1e-4
    assert changed.nonzero().tolist() == [[0, 11], [1, 11]]


def test_model_is_freed_without_the_garbage_collector(ids):
    model = get_peft_model(make_llama(), ReftConfig(task_type="CAUSAL_LM"))
    model.generate(input_ids=ids, max_new_tokens=1)
    gone = weakref.ref(model.get_base_model())
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_kind_stays_what_the_first_adapter_made_it(ids):
    """A second adapter for another task does not change what labels mean to the first."""
    options = dict(r=2, positions="l1", init_weights=False, target_modules=r"steps\.\d")
    model = inject_adapter_in_model(ReftConfig(task_type="CAUSAL_LM", **options), Custom(), "first")
    with pytest.warns(UserWarning, match="multiple adapters"):
        inject_adapter_in_model(ReftConfig(task_type="FEATURE_EXTRACTION", **options), model, "second")
    labels = ids.clone()
    labels[:, :5] = -100
    with torch.no_grad():
        changed = (model(ids, labels=labels) - Custom.forward(unload(model), ids)).abs().amax(-1) > 1e-4
    assert changed.nonzero().tolist() == [[0, 4], [1, 4]]


def unload(model):
    """The same model without what ReFT added."""
    model = copy.deepcopy(model)
    unhook_model(model)
    return model


# Calls of `forward`


def assert_called(run, by_hand, ids, columns=COLUMNS, **told):
    expected = by_hand.logits(columns, input_ids=ids)
    with torch.no_grad():
        torch.testing.assert_close(run(input_ids=ids, **told).logits, expected, atol=1e-5, rtol=1e-5)


def put_method(model):
    """As TRL's fused head is put on a model."""
    before = model.forward

    def forward(self, *args, **kwargs):
        assert self is model or isinstance(self, LlamaForCausalLM)
        return before(*args, **kwargs)

    model.forward = types.MethodType(forward, model)


def put_function(model):
    before = model.forward
    model.forward = lambda *args, **kwargs: before(*args, **kwargs)


def put_one_that_goes_on_within(model):
    """It never calls the forward that was there before."""

    def forward(self, input_ids, labels=None, **kwargs):
        hidden_states = self.model(input_ids, **kwargs).last_hidden_state
        return types.SimpleNamespace(logits=self.lm_head(hidden_states))

    model.forward = types.MethodType(forward, model)


@pytest.mark.parametrize("when", ["before", "after", "twice"])
@pytest.mark.parametrize("put", [None, put_method, put_function, put_one_that_goes_on_within])
def test_call_of_forward(ids, put, when):
    """`model.forward(...)` is a call like `model(...)`, whatever has been put on the model."""
    if put is None and when != "after":
        pytest.skip("nothing is put")
    base, labels = make_llama(), labels_of(ids, *TWO["answers"])
    if put is not None and when in ("before", "twice"):
        put(base)
    torch.manual_seed(1)
    model = get_peft_model(base, ReftConfig(task_type="CAUSAL_LM", r=4, init_weights=False, positions="f2+l2")).eval()
    if put is not None and when in ("after", "twice"):
        put(base)
    by_hand = adapt_model(make_llama(), positions="f2+l2")[1]
    for run in (base.forward, base, model.forward, model):
        assert_called(run, by_hand, ids, labels=labels)
        assert_called(run, by_hand, ids, prompt_lengths=torch.tensor([5, 8]))
    hidden_states = base.model.forward(input_ids=ids, prompt_lengths=torch.tensor([5, 8])).last_hidden_state
    expected = by_hand.logits(COLUMNS, input_ids=ids)
    torch.testing.assert_close(base.lm_head(hidden_states), expected, atol=1e-5, rtol=1e-5)
    assert current_plan() is None


def test_forward_that_runs_its_model_twice(ids):
    """The second time is a call of its own, with prompts of its own."""
    model, by_hand = adapt_model(make_llama(), positions="f2+l2")
    base = model.get_base_model()
    before = base.forward
    lengths = torch.tensor([5, 8]), torch.tensor([3, 9])
    base.forward = lambda ids: [before(ids, prompt_lengths=each).logits for each in lengths]
    with torch.no_grad():
        first, second = base(ids)
    torch.testing.assert_close(first, by_hand.logits(COLUMNS, input_ids=ids), atol=1e-5, rtol=1e-5)
    columns = {"prefix": [[0], [0, 1]], "suffix": [[1, 2], [7, 8]]}
    torch.testing.assert_close(second, by_hand.logits(columns, input_ids=ids), atol=1e-5, rtol=1e-5)


def test_signature_of_forward_and_class(ids):
    """What others read off a model stays, and unload gives back the class and what was put on the model."""
    base = make_llama()
    plain = inspect.signature(base.forward)
    model = get_peft_model(base, ReftConfig(task_type="CAUSAL_LM", r=4))
    assert inspect.signature(base.forward) == plain
    assert isinstance(base, LlamaForCausalLM) and str(type(base)) == str(LlamaForCausalLM)
    put_method(base)
    assert base.forward.__func__.__qualname__.startswith("put_method")
    first = base.forward
    base.forward = first  # as one puts it back
    assert base.forward == first
    unloaded = model.unload()
    assert type(unloaded) is LlamaForCausalLM and type(unloaded.model) is type(make_llama().model)
    assert unloaded.forward.__func__.__qualname__ == "put_method.<locals>.forward"
    torch.testing.assert_close(unloaded(ids).logits, make_llama()(ids).logits)


def test_forward_that_is_put_back_leaves_nothing(ids):
    base = make_llama()
    get_peft_model(base, ReftConfig(task_type="CAUSAL_LM", r=4))
    before = base.forward
    put_method(base)
    base.forward = before
    assert "forward" not in vars(base)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_forward_of_a_copy_is_its_own(ids, how):
    model, by_hand = adapt_model(make_llama(), positions="f2+l2")
    base = model.get_base_model()
    if how == "deepcopy":
        other = copy.deepcopy(base)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(base))
    else:
        buffer = io.BytesIO()
        torch.save(base, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert type(other) is type(base)
    for parameter in base.parameters():
        parameter.data.zero_()
    expected = ByHand(make_llama(), other).logits(COLUMNS, input_ids=ids)
    with torch.no_grad():
        found = other.forward(ids, labels=labels_of(ids, *TWO["answers"])).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert other.generate(input_ids=ids, **GREEDY).shape == (2, 18)


# Interrupts


def raise_interrupt(*args):
    raise KeyboardInterrupt


def state():
    return current_plan(), current_generation(), current_mixed_batch()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_interrupt_at_any_module(ids, checkpointed):
    """A later call of an inner model is that of a fresh one, and nothing keeps the model alive."""
    model, _ = adapt_model(make_llama(), positions="f2+l2")
    base, labels = model.get_base_model(), labels_of(ids, *TWO["answers"])
    if checkpointed:
        base.train()
        base.gradient_checkpointing_enable()
        base.enable_input_require_grads()
    told = dict(labels=labels)
    embeddings = torch.randn(2, 12, 32)
    later = dict(inputs_embeds=embeddings, prompt_lengths=torch.tensor([12, 12]))
    expected = base.model(**later).last_hidden_state
    reached = 0
    for module in base.modules():
        for register in (module.register_forward_pre_hook, module.register_forward_hook):
            handle = register(raise_interrupt)
            try:
                base(input_ids=ids, **told).loss.backward()
            except KeyboardInterrupt:
                reached += 1
            handle.remove()
            assert state() == (None, None, None)
    assert reached > 30
    torch.testing.assert_close(base.model(**later).last_hidden_state, expected)


def interrupt_at(run, options, number):
    """Run with an interrupt at the start of the function call of that number. Return whether there are so many."""
    count = 0
    package = peft_reft.__path__[0]

    def trace(frame, event, arg):
        nonlocal count
        if event == "call" and frame.f_code.co_filename.startswith(package):
            count += 1
            if count == number:
                raise KeyboardInterrupt
        return None

    sys.settrace(trace)
    try:
        run(**options)
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return count >= number


@pytest.mark.parametrize("kind", ["forward", "generate", "mixed"])
def test_interrupt_in_any_function(ids, kind, monkeypatch):
    """Signals come where a function begins: in all of the package's, one after the other."""
    # Python drops an interrupt that comes where an object is freed; pytest would keep it, and the model with it.
    monkeypatch.setattr(sys, "unraisablehook", lambda error: None)
    model, _ = adapt_model(make_llama(layers=1), positions="f2+l2")
    base, options = model.get_base_model(), dict(input_ids=ids)
    if kind == "forward":
        run, options["labels"] = base, labels_of(ids, *TWO["answers"])
    elif kind == "generate":
        run, options["max_new_tokens"] = base.generate, 2
    else:
        run, options["adapter_names"] = model, ["default", "__base__"]
    number = 1
    with torch.no_grad():
        run(**options)
        while interrupt_at(run, options, number):
            assert state() == (None, None, None), number
            number += 1
    assert number > 10
    gone = weakref.ref(base)
    del model, base, run
    gc.collect()
    assert gone() is None
