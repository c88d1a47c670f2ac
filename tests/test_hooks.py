import copy
import gc
import weakref
from collections import namedtuple

import pytest
import torch
from by_hand import GREEDY, make_llama
from peft import get_peft_model, inject_adapter_in_model
from torch import nn

from peft_reft import ReftConfig
from peft_reft.generation import current_generation
from peft_reft.hooks import unhook_model
from peft_reft.plan import current_plan


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
