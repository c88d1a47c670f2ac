"""A plan belongs to one call, and is found again by every part of it."""

import copy
import gc
import threading
import warnings
import weakref

import pytest
import torch
from by_hand import TWO, adapt_model, assert_edits, generated, labels_of, make_llama, random_ids
from peft import get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

from peft_reft import ReftConfig, layer
from peft_reft.edits.apply import edit_rows
from peft_reft.runtime.call import Call, ModuleRole
from peft_reft.runtime.checkpointing import CheckpointEdits, find_for_recompute, save_for_recompute
from peft_reft.runtime.generate import ModelToken
from peft_reft.runtime.plan import Plan, current_plan


def test_threads_do_not_see_each_others_plans(adapt, ids):
    model, _ = adapt(positions="f2+l2")
    prompts = [ids[:, : 6 + n] for n in range(4)]
    expected = [generated(model, prompt, torch.ones_like(prompt)) for prompt in prompts]
    wrong = []

    def generate(n):
        for _ in range(3):
            if not torch.equal(generated(model, prompts[n], torch.ones_like(prompts[n])), expected[n]):
                wrong.append(n)

    threads = [threading.Thread(target=generate, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_threads_that_do_different_things(adapt, ids):
    """Generation of several kinds beside training with recomputed blocks, on one model."""
    model, by_hand = adapt(positions="f2+l2")
    base = model.get_base_model()
    short = torch.ones(2, 7, dtype=torch.long)
    jobs = {
        "padded": lambda: generated(model, ids),
        "beams": lambda: generated(base, ids[:, 3:10], short, num_beams=2),
        "static": lambda: generated(model, ids[:, :8], None, cache_implementation="static"),
        "forward": lambda: model(input_ids=ids[:, :9], prompt_lengths=torch.tensor([4, 7])).logits,
    }
    with torch.no_grad():
        expected = {name: job() for name, job in jobs.items()}
    wrong = []

    def work(name):
        with torch.no_grad():
            for _ in range(4):
                if not torch.equal(jobs[name](), expected[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and current_plan() is None


@pytest.mark.parametrize(
    ("inputs", "prefix", "suffix"),
    [
        (dict(prompt_lengths=torch.tensor([5, 8])), 3, 3),  # both at once
        (dict(labels=labels_of(random_ids(), *TWO["answers"])), 2, 12),  # a row may have several answers
        (dict(labels=labels_of(random_ids(), [(5, 7), (11, 12)], [(8, 12)])), 2, 12),
        (dict(position_ids=torch.arange(6).repeat(2)[None].expand(2, -1)), 12, 12),  # and several sequences
    ],
)
def test_tokens_that_units_are_given(adapt, ids, monkeypatch, inputs, prefix, suffix):
    """No more than an edit can need, whatever the values: the others cost time, and memory in training."""
    model, by_hand = adapt(positions="f2+l3")
    given = {"prefix": set(), "suffix": set()}

    def record(hidden_states, units, rows):
        for unit in rows.units:
            given[unit].add(rows.mask.shape[2])
        return edit_rows(hidden_states, units, rows)

    monkeypatch.setattr(layer, "edit_rows", record)
    model(input_ids=ids, **inputs)
    assert given == {"prefix": {prefix}, "suffix": {suffix}}


def test_prefix_of_conversations(adapt, ids):
    """The first prompt's tokens, once, though each answer ends a prompt; rows with less than the prefix too."""
    labels = labels_of(ids, [(6, 8), (11, 12)], [(3, 5), (9, 12)])
    assert_edits(adapt(positions="f2"), {"unit": [[0, 1]] * 2}, input_ids=ids, labels=labels)
    short = labels_of(ids, [(1, 12)], [(3, 5), (9, 12)])
    assert_edits(adapt(positions="f2"), {"unit": [[0], [0, 1]]}, input_ids=ids, labels=short)
    columns = {"prefix": [[0, 1], [0]], "suffix": [[3, 4, 5, 8, 9, 10], [1, 2, 6, 7, 8]]}
    assert_edits(adapt(positions="f2+l3"), columns, input_ids=ids, labels=labels)


def test_threads_that_train(adapt, ids):
    """Blocks are run again in the backward pass, each with the plan of its own thread's call."""
    model, _ = adapt(positions="f2+l2")
    model.train().enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    parameters = [p for p in model.parameters() if p.requires_grad]
    batches = [(ids[:, :n], labels_of(ids[:, :n], [(n - 3, n)], [(n - 5, n)])) for n in (9, 10, 11, 12)]

    def grads(batch):
        return torch.autograd.grad(model(input_ids=batch[0], labels=batch[1]).loss, parameters)

    expected = [grads(batch) for batch in batches]
    found: dict[int, list] = {n: [] for n in range(4)}

    def work(n):
        for _ in range(3):
            found[n].append(grads(batches[n]))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n, several in found.items():
        assert len(several) == 3
        for gradient in several:
            torch.testing.assert_close(gradient, expected[n], atol=1e-6, rtol=1e-5)


def test_call_after_an_error(adapt, ids):
    model, _ = adapted = adapt(positions="l2")
    inner = model.get_base_model().model
    with pytest.raises(ValueError, match="attention_mask has 5 columns"):
        model(input_ids=ids, attention_mask=torch.ones(2, 5, dtype=torch.long))
    with (
        torch.no_grad()
    ):  # the inner model alone: a plan that was left behind would still say that there are 12 tokens
        inner(input_ids=ids[:, :6])
    assert_edits(adapted, {"unit": [[10, 11]] * 2}, input_ids=ids)


@pytest.mark.parametrize("interrupted", ["outer", "inner", "generate"])
def test_call_after_an_interrupt(adapt, ids, interrupted):
    """As when a notebook's cell is stopped: torch's hooks do not run then, and what they would end must not stay."""
    model, _ = adapted = adapt(positions="l2")
    inner = model.get_base_model().model

    def stop(*args):
        raise KeyboardInterrupt

    handle = inner.layers[1].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        if interrupted == "outer":
            model(input_ids=ids[:, :7], labels=labels_of(ids[:, :7], [(3, 7)], [(3, 7)]))
        elif interrupted == "inner":
            inner(input_ids=ids)  # the very ids that the whole model is given next
        else:
            model.generate(input_ids=ids[:, :7], max_new_tokens=2)
    handle.remove()
    if interrupted == "inner":
        assert_edits(adapted, {"unit": [[3, 4], [6, 7]]}, input_ids=ids, labels=labels_of(ids, *TWO["answers"]))
    else:  # the inner model alone would be taken for a part of the call that was stopped
        with torch.no_grad():
            hidden_states = inner(input_ids=ids).last_hidden_state
            logits = model.get_base_model().lm_head(hidden_states)
            assert torch.equal(logits, model(input_ids=ids).logits)
    assert current_plan() is None


def test_copy_plans_for_itself(adapt, ids):
    model, _ = adapt(positions="f2+l2")
    duplicate = copy.deepcopy(model)
    expected = generated(model, ids)
    for parameter in model.get_base_model().parameters():
        parameter.data.zero_()
    assert torch.equal(generated(duplicate, ids), expected)
    duplicate.train()
    duplicate(input_ids=ids, labels=labels_of(ids, *TWO["answers"])).loss.backward()
    trained = [p for p in duplicate.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None for p in trained)
    assert all(p.grad is None for p in model.parameters())


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("by", ["transformers", "transformers, reentrant", "torch"])
def test_checkpointing_with_another_call_before_backward(adapt, ids, by):
    """As in DPO: policy forward, reference forward, and only then the backward, which runs blocks again.

    transformers checkpoints a block's forward, torch's wrapper (which FSDP uses) its call with the hooks. (torch's
    reentrant wrapper loses gradients of the base model, too: it takes no tuples of tensors.)
    """
    labels = labels_of(ids, *TWO["answers"])
    model, _ = adapt(positions="f2+l2")
    model.train()
    model(input_ids=ids, labels=labels).loss.backward()
    expected = gradients(model)
    model.zero_grad()

    model.enable_input_require_grads()
    if by == "torch":
        layers = model.get_base_model().model.layers
        for index, block in enumerate(layers):
            layers[index] = checkpoint_wrapper(block, checkpoint_impl=CheckpointImpl.NO_REENTRANT)
    else:
        model.gradient_checkpointing_enable({"use_reentrant": "reentrant" in by})
    loss = model(input_ids=ids, labels=labels).loss
    with torch.no_grad():
        model(input_ids=ids.flip(1)[:, :9], prompt_lengths=torch.tensor([2, 3]))
    loss.backward()
    found = {name.replace("_checkpoint_wrapped_module.", ""): grad for name, grad in gradients(model).items()}
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("of_embeddings", [True, False])
def test_edits_are_checkpointed_with_their_block(adapt, ids, reentrant, of_embeddings):
    """They are made again with it in the backward pass, but for a block before which there is nothing to train."""
    model, by_hand = adapt(positions="f2+l2")
    labels = labels_of(ids, *TWO["answers"])
    model.train()
    model(input_ids=ids, labels=labels).loss.backward()
    expected = gradients(model)
    model.zero_grad()

    model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # has embeddings require gradients
    if not of_embeddings:
        model.get_base_model().disable_input_require_grads()
    blocks, calls = model.get_base_model().model.layers, [0, 0, 0]
    for number, block in enumerate(blocks):
        block._reft.register_forward_pre_hook(lambda *_, n=number: calls.__setitem__(n, calls[n] + 1))
    loss = model(input_ids=ids, labels=labels).loss
    assert calls == [1, 1, 1]
    loss.backward()
    assert calls == [2 if of_embeddings else 1, 2, 2]
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, atol=1e-6, rtol=1e-5)

    columns = {"prefix": [[0, 1], [0, 1]], "suffix": [[3, 4], [6, 7]]}
    for mode in (model.eval(), model.train()):  # edited once, in either
        assert_edits((mode, by_hand), columns, input_ids=ids, labels=labels)
    model.unload()
    assert not any(isinstance(block._gradient_checkpointing_func, CheckpointEdits) for block in blocks)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("target_modules", [["mlp"], r"model\.layers\.\d+(\.mlp)?"], ids=["within", "both"])
def test_modules_within_checkpointed_blocks(ids, target_modules, reentrant):
    """They may be given hidden states alone, by which no plan could be found again."""
    torch.manual_seed(0)
    config = ReftConfig(
        task_type="CAUSAL_LM", r=4, positions="f2+l2", init_weights=False, target_modules=target_modules
    )
    model = get_peft_model(make_llama(), config).train()
    labels = labels_of(ids, [(5, 12)], [(8, 12)])
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        loss = model(input_ids=ids, labels=labels).loss
        with torch.no_grad():
            model(input_ids=ids[:, :6], labels=labels[:, :6])  # has a plan of its own
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        model.zero_grad()
    for name, gradient in gradients[0].items():
        assert gradient.norm() > 0 or ".layers.2." in name  # after which no token reads the first ones
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_checkpointed_block_is_not_kept_alive(ids):
    model, _ = adapt_model(make_llama())
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    model(input_ids=ids, labels=labels_of(ids, *TWO["answers"])).loss.backward()
    block = weakref.ref(model.get_base_model().model.layers[-1])
    del model, _
    gc.collect()
    assert block() is None


@pytest.mark.parametrize("reentrant", [True, False])
def test_backward_with_an_adapter_that_the_forward_did_not_use(adapt, ids, reentrant):
    model, _ = adapt(positions="f2+l2")
    model.add_adapter("other", ReftConfig(task_type="CAUSAL_LM", r=2, positions="l3", init_weights=False))
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    loss = model(input_ids=ids, labels=labels_of(ids, *TWO["answers"])).loss
    model.set_adapter("other")
    with pytest.raises(RuntimeError, match="with adapters that its forward did not use.*Call backward.. before"):
        loss.backward()


def test_forward_of_a_block_that_is_called_alone(adapt, ids):
    """Without hooks, but with checkpointing: the call after it is edited all the same."""
    model, by_hand = adapt(positions="f2")
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    base, block, given = model.get_base_model(), model.get_base_model().model.layers[0], {}
    handle = block.register_forward_pre_hook(lambda _, *both: given.update(args=both[0], **both[1]), with_kwargs=True)
    base(input_ids=ids, prompt_lengths=torch.tensor([4, 4]))
    handle.remove()
    (hidden_states,) = given.pop("args")

    def call_block(*args):
        block.forward(hidden_states.clone().requires_grad_(), **given)

    base.model.register_forward_pre_hook(call_block)  # within the call
    for mode in (model, model.eval()):
        columns = {"unit": [[0, 1], [0, 1]]}
        assert_edits((mode, by_hand), columns, input_ids=ids, prompt_lengths=torch.tensor([4, 4]))


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["kept", "reentrant", "recomputed"])
@pytest.mark.parametrize("between", ["evaluation", "generation", "disabled", "other adapter", "error"])
def test_what_comes_between_forward_and_backward(adapt, ids, between, checkpointing):
    """An evaluation, samples of the policy, or a reference leave the gradients as they are."""
    labels = labels_of(ids, *TWO["answers"])
    model, _ = adapt(positions="f2+l2")
    model.add_adapter("other", ReftConfig(task_type="CAUSAL_LM", r=2, positions="l3", init_weights=False))
    model.train()
    model(input_ids=ids, labels=labels).loss.backward()
    expected = gradients(model)
    model.zero_grad()

    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    loss = model(input_ids=ids, labels=labels).loss
    with torch.no_grad():
        if between == "evaluation":
            model.eval()(input_ids=ids, labels=labels_of(ids, [(3, 12)], [(5, 9)]))
        elif between == "generation":
            model.eval().generate(input_ids=ids[:, :7], max_new_tokens=3)
        elif between == "disabled":
            with model.disable_adapter():
                model(input_ids=ids, labels=labels)
        elif between == "other adapter":
            model.set_adapter("other")
            model(input_ids=ids, labels=labels)
            model.set_adapter("default")
        else:
            with pytest.raises(ValueError):
                model(input_ids=ids, prompt_lengths=torch.tensor([99, 99]))
    model.train()
    loss.backward()
    found = gradients(model)
    assert found.keys() == expected.keys() and expected
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, atol=1e-6, rtol=1e-5)


def test_plan_is_recalled_with_certainty_or_not_at_all():
    """A tensor that two calls share, such as a mask that a model keeps, does not tell which call a module is of."""
    role = ModuleRole(ModelToken(), "causal", 0, ())
    first, second = (Plan(Call(role, torch.nn.Identity(), True, {})) for _ in range(2))
    own, other, shared = torch.ones(1), torch.ones(1), torch.ones(1)
    save_for_recompute(first, [own, shared])
    assert find_for_recompute([own, shared]) is first.for_recompute
    assert find_for_recompute([shared]) is first.for_recompute
    save_for_recompute(second, [other, shared])
    assert find_for_recompute([own, shared]) is first.for_recompute
    assert find_for_recompute([other, shared]) is second.for_recompute
    for tensors in ([shared], [own, other], [torch.ones(1)]):
        assert find_for_recompute(tensors) is None


def test_kept_plan_knows_how_many_tokens_there_were():
    """Without its arguments, a recomputed block must still tell the model's tokens from those that it added."""
    plan = Plan(
        Call(ModuleRole(ModelToken(), "full_input", 0, ()), nn.Identity(), True, {"input_ids": torch.zeros(2, 12)})
    )
    assert plan.for_recompute.call.tokens == 12


def test_training_batch_without_edits_is_warned_of_once(adapt, ids):
    """Only where no row has any, and in training."""
    model, _ = adapt(positions="f2+l2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=ids, prompt_lengths=torch.tensor([0, 0]))
        model.train()(input_ids=ids, prompt_lengths=torch.tensor([0, 1]))
    with pytest.warns(UserWarning, match=r"No token of a training batch.*positions='f2\+l2'.*trains nothing"):
        loss = model(input_ids=ids, prompt_lengths=torch.tensor([0, 0])).logits.sum()
    loss.backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=ids, prompt_lengths=torch.tensor([0, 0]))
