"""The forward as compilers and devices see it: one graph for all prompts, in which nothing depends on values."""

import functools

import pytest
import torch
from by_hand import GREEDY, MASK, TWO, adapt_model, labels_of, make_llama, random_ids
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CompileConfig

from peft_reft import prompt_lengths
from peft_reft.runtime.plan import current_plan

# Two blocks share a plan as many do, and compile sooner
make_two_blocks = functools.partial(make_llama, 2)

PACKED = dict(position_ids=torch.arange(6).repeat(2)[None].expand(2, -1))


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.compiler.reset()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def with_gradients(run, model, **inputs):
    """The loss of a call, and the gradients that it gives to the model."""
    model.zero_grad()
    output = run(**inputs)
    loss = output.logits.square().mean() if output.loss is None else output.loss
    loss.backward()
    return loss.detach(), gradients(model)


# What tells where prompts end, for three batches of the same shape
PROMPTS = {
    "labels": [
        dict(labels=labels_of(random_ids(), *answers))
        for answers in (TWO["answers"], ([(3, 12)], [(9, 12)]), ([(2, 4), (6, 12)], []))
    ],
    "lengths": [dict(prompt_lengths=torch.tensor(lengths)) for lengths in ([5, 8], [3, 12], [1, 2])],
    "packed": [
        dict(labels=labels_of(random_ids(), *answers), **PACKED)
        for answers in (([(4, 6), (9, 12)], [(3, 6), (10, 12)]), ([(2, 6), (8, 12)], [(3, 6), (11, 12)]))
    ],
}


@pytest.mark.parametrize("told", PROMPTS)
@pytest.mark.parametrize("positions", ["f2", "f2+l2", "prompt", "all"])
def test_forward_and_backward_are_one_graph_for_all_prompts(adapt, ids, positions, told):
    model, _ = adapt(make_two_blocks, positions=positions)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.train(), fullgraph=True, backend=counter)
    for inputs in PROMPTS[told]:
        expected = with_gradients(model, model, input_ids=ids, **inputs)  # measures the scale
        found = with_gradients(compiled, model, input_ids=ids, **inputs)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert counter.frame_count == 1


def count_for_lengths(model):
    """How often a model is compiled for rows of four lengths, one after the other."""
    torch.compiler.reset()
    ids, counter = random_ids(), CompileCounter()
    compiled = torch.compile(model.train(), fullgraph=True, backend=counter)
    for length in (12, 11, 10, 9):
        compiled(input_ids=ids[:, :length], labels=labels_of(ids, [(5, 12)], [(8, 12)])[:, :length])
    return counter.frame_count


@pytest.fixture(scope="module")
def count_of_base():
    return count_for_lengths(make_two_blocks())


@pytest.mark.parametrize("positions", ["f2+l2", "all"])
def test_compiled_anew_for_other_lengths_no_more_often_than_the_base(adapt, ids, count_of_base, positions):
    model, _ = adapt(make_two_blocks, positions=positions)
    model.train()(input_ids=ids, labels=labels_of(ids, [(5, 12)], [(8, 12)]))  # measures the scale
    assert count_for_lengths(model) == count_of_base < 4


@pytest.mark.slow
@pytest.mark.parametrize("positions", ["f2+l2", "all"])
def test_compiled_by_inductor(adapt, ids, positions):
    model, _ = adapt(make_two_blocks, positions=positions)
    compiled = torch.compile(model.train(), fullgraph=True)
    for inputs in PROMPTS["labels"]:
        expected = with_gradients(model, model, input_ids=ids, **inputs)  # measures the scale
        found = with_gradients(compiled, model, input_ids=ids, **inputs)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def decode_with_a_static_cache(model):
    """The tokens of the last of three calls of `generate`, and the sizes of all graphs that they have compiled."""
    torch.compiler.reset()
    ids, graphs = random_ids(), []

    def note(graph, inputs):  # a function: transformers copies the config
        if len(graph.graph.nodes) > 1:  # a hook that runs no operation makes a graph without any
            graphs.append(len(graph.graph.nodes))
        return graph.forward

    config = CompileConfig(fullgraph=True, backend=note, mode=None)
    config._compile_all_devices = True
    options = dict(cache_implementation="static", compile_config=config)
    for length in (12, 9, 12):
        inputs = dict(input_ids=ids[:, :length], attention_mask=MASK[:, :length])
        tokens = model.generate(**inputs, **options, **GREEDY)
    return tokens, graphs


@pytest.fixture(scope="module")
def graphs_of_base():
    return decode_with_a_static_cache(make_two_blocks())[1]


@pytest.mark.parametrize("positions", ["f2+l2", "all"])
def test_decoding_with_a_static_cache_is_compiled_as_often_as_the_base(adapt, ids, graphs_of_base, positions):
    """transformers compiles the forwards of single tokens; they are as many graphs as without an adapter."""
    model, _ = adapt(make_two_blocks, positions=positions)
    expected = model.generate(input_ids=ids, attention_mask=MASK, **GREEDY)
    found, graphs = decode_with_a_static_cache(model)
    assert torch.equal(found, expected)
    assert len(graphs) == len(graphs_of_base) > 0
    assert (graphs == graphs_of_base) == (positions != "all")


def columns_of(lengths, start=(0, 0)):
    """The columns that "f2+l2" names in prompts of these lengths that begin at these columns."""
    rows = list(zip(lengths, start, strict=True))
    return {
        "prefix": [[*range(first, first + min(2, length // 2))] for length, first in rows],
        "suffix": [[*range(first + length - min(2, length - length // 2), first + length)] for length, first in rows],
    }


def breaks_graph(module, args, output):
    torch._dynamo.graph_break()


@pytest.mark.parametrize("breaks", [None, "model.layers.0"])
def test_no_plan_is_left_by_a_compiled_forward(adapt, ids, breaks):
    """torch.compile may lose what traced code writes to a thread's value. Each call is edited by its own prompts."""
    model, by_hand = adapt(make_two_blocks, positions="f2+l2")
    if breaks:  # so that a part of the call is traced by itself
        model.get_base_model().get_submodule(breaks).register_forward_hook(breaks_graph)
    compiled = torch.compile(model, fullgraph=breaks is None, backend="eager")
    block = model.get_base_model().model.layers[1]
    with torch.no_grad():
        for lengths in ([5, 8], None, [3, 12], [2, 6]):
            told = {} if lengths is None else dict(prompt_lengths=torch.tensor(lengths))
            expected = by_hand.logits(columns_of(lengths or [12, 12]), input_ids=ids)
            torch.testing.assert_close(compiled(input_ids=ids, **told).logits, expected, atol=1e-5, rtol=1e-5)
            assert current_plan() is None
            with pytest.raises(RuntimeError, match="outside a call of its model"):
                block(torch.zeros(2, 12, 32), position_embeddings=(torch.ones(2, 12, 8),) * 2)
            other = dict(input_ids=ids[:, :9])
            found = model(**other, prompt_lengths=torch.tensor([7, 4])).logits
            torch.testing.assert_close(found, by_hand.logits(columns_of([7, 4]), **other), atol=1e-5, rtol=1e-5)


def test_no_plan_is_left_by_compiled_decoding(adapt, ids):
    """Prompts of several lengths one after the other, with a forward and an uncompiled generate in between."""
    model, by_hand = adapt(make_two_blocks, positions="f2+l2")
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    options = dict(cache_implementation="static", compile_config=config)
    for length in (12, 7, 9):
        given = dict(input_ids=ids[:, :length], attention_mask=MASK[:, :length])
        expected = by_hand.generate(columns_of([length, length - 4], (0, 4)), **given)
        assert torch.equal(model.generate(**given, **options, **GREEDY), expected)
        assert current_plan() is None
        with torch.no_grad():
            found = model(input_ids=ids[:, :5], prompt_lengths=torch.tensor([4, 5])).logits
        told = by_hand.logits(columns_of([4, 5]), input_ids=ids[:, :5])
        torch.testing.assert_close(found, told, atol=1e-5, rtol=1e-5)
        assert torch.equal(model.generate(**given, **GREEDY), expected)


@pytest.mark.slow
def test_exported(adapt, ids):
    """The program finds the prompts of other masks than those that it was exported with."""
    model, by_hand = adapt(make_two_blocks, positions="f2+l2")
    inputs = dict(input_ids=ids, attention_mask=MASK, use_cache=False)
    program = torch.export.export(model.get_base_model(), (), inputs).module()
    other = dict(input_ids=ids.flip(0), attention_mask=MASK.flip(0), use_cache=False)
    columns = {"prefix": [[4, 5], [0, 1]], "suffix": [[10, 11], [10, 11]]}
    expected, seen = by_hand.logits(columns, **other), MASK.flip(0).bool()
    torch.testing.assert_close(program(**other).logits[seen], expected[seen], atol=1e-5, rtol=1e-5)


# Without values


class Transfers(TorchDispatchMode):
    """Notes operations between tensors of several devices; numbers may come from anywhere."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs, output)) if torch.is_tensor(leaf) and leaf.dim()]
        if len({tensor.device for tensor in tensors}) > 1:
            self.found.append(str(function))
        return output


def prepared(mask):
    """As attention is given it [batch, 1, tokens, tokens]; transformers looks at the values of one that is not."""
    tokens = mask.shape[1]
    return (torch.ones(tokens, tokens).tril().bool() & mask.bool()[:, None, None]) | torch.eye(tokens).bool()


def test_lengths_that_are_told_around_compiled_calls(adapt, ids):
    """One graph for all lengths, and another one where nothing is told."""
    model, by_hand = adapt(make_two_blocks, positions="f2+l2")
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for lengths in ([5, 8], [3, 12], [4, 4]):
        columns = {"prefix": [[0, 1][: n // 2] for n in lengths], "suffix": [[n - 2, n - 1] for n in lengths]}
        with prompt_lengths(model, torch.tensor(lengths)), torch.no_grad():
            found = compiled(input_ids=ids).logits
        torch.testing.assert_close(found, by_hand.logits(columns, input_ids=ids), atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 1
    columns = {"prefix": [[0, 1], [0, 1]], "suffix": [[10, 11], [10, 11]]}
    with torch.no_grad():
        found = compiled(input_ids=ids).logits
    torch.testing.assert_close(found, by_hand.logits(columns, input_ids=ids), atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 2


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("told", PROMPTS)
@pytest.mark.parametrize("positions", ["f2", "f2+l2", "prompt", "all"])
def test_nothing_waits_for_values(positions, told, padded):
    """The meta device has none: what looks at one, or makes a shape of how many there are, fails there."""
    model, _ = adapt_model(make_llama(), positions=positions)
    inputs = PROMPTS[told][0] | (dict(attention_mask=prepared(MASK)) if padded else {})
    inputs = {name: tensor.to("meta") for name, tensor in (inputs | dict(input_ids=random_ids())).items()}
    model.to("meta").train()
    with Transfers() as transfers:
        model(**inputs).logits.sum().backward()
    assert not transfers.found
    assert gradients(model)
