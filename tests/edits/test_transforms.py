"""Transforms of an adapted model, compared with the same transforms of a base model that plain hooks edit."""

import io
from contextlib import contextmanager

import pytest
import torch
from by_hand import MASK, adapt_model, make_gpt2, make_llama, random_ids
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

# What is edited in two rows of twelve tokens, and in the second of them alone where the first four are padding
COLUMNS = {
    "f2": {"unit": [0, 1]},
    "f2+l2": {"prefix": [0, 1], "suffix": [10, 11]},
    "prompt": {"unit": list(range(12))},
    "all": {"unit": list(range(12))},
}
CASES = [("f2", "tanh"), ("f2+l2", None), ("f2+l2", "tanh"), ("prompt", None), ("all", "tanh")]


def orthonormal(matrix):
    rows = []
    for row in matrix:
        for other in rows:
            row = row - (row @ other) * other
        rows.append(row / row.norm())
    return torch.stack(rows)


class ByHand(torch.nn.Module):
    """The base model with LoReFT by hand at the listed columns of every row, with parameters that a call is given."""

    def __init__(self, base, columns, act_fn):
        super().__init__()
        self.base, self.columns = base, columns
        self.act = torch.tanh if act_fn else None

    @contextmanager
    def edits(self, parameters, columns):
        handles = []
        for name, block in self.base.named_modules():
            tensors = {key: tensor for key, tensor in parameters.items() if f"{name}._reft." in key}
            if not name or not tensors:
                continue

            def hook(module, args, output, tensors=tensors):
                for unit, listed in columns.items():
                    R, W, b = (
                        next(t for k, t in tensors.items() if unit in k and k.endswith(n))
                        for n in "._R ._W ._b".split()
                    )
                    chosen = torch.tensor([column in listed for column in range(output.shape[1])])[:, None]
                    if self.act is None:  # in units of a scale of one
                        edit = (8 / len(R)) ** 0.5 * (output @ W.T + b) @ R
                    else:
                        rotation = orthonormal(R)
                        edit = (self.act(output @ W.T + b) - output @ rotation.T) @ rotation
                    output = output + edit * chosen
                return output

            handles.append(block.register_forward_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __call__(self, parameters, columns=None, **inputs):
        with self.edits(parameters, columns or self.columns):
            return self.base(**inputs, use_cache=False).logits


@pytest.fixture(params=CASES, ids=str)
def pair(request):
    """The logits of an adapted model and of the one by hand, as functions of parameters, and what they are given."""
    positions, act_fn = request.param
    base = make_llama(2, attn_implementation="eager").double()  # other attention of torch has no forward derivatives
    model, _ = adapt_model(base, positions=positions, act_fn=act_fn, r=2)
    model = model.double()
    by_hand = ByHand(base, COLUMNS[positions], act_fn)
    parameters = {name: p.detach() for name, p in model.named_parameters() if "reft" in name}

    def logits(parameters, **inputs):
        return functional_call(model, parameters, (), inputs | {"use_cache": False}).logits

    return logits, by_hand, parameters, base.get_input_embeddings()(random_ids()).detach()


def both(pair, transformed):
    """What a function of (logits, parameters, embeddings) gives for the adapted model and for the one by hand."""
    logits, by_hand, parameters, embeddings = pair
    found, expected = transformed(logits, parameters, embeddings), transformed(by_hand, parameters, embeddings)
    assert any(leaf.abs().max() > 1e-4 for leaf in torch.utils._pytree.tree_leaves(expected))
    torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-6)


def loss_of(logits):
    return lambda parameters, embeddings: logits(parameters, inputs_embeds=embeddings).log_softmax(-1)[..., 3].mean()


def biases(parameters):
    return {name: tensor for name, tensor in parameters.items() if name.endswith("._b")}


def rows_of(parameters):
    return {name: tensor for name, tensor in parameters.items() if name.endswith("._R") and "layers.0" in name}


def test_gradients_and_those_of_each_sample(pair):
    both(pair, lambda logits, p, e: grad(loss_of(logits))(p, e))
    both(pair, lambda logits, p, e: vmap(grad(loss_of(logits)), (None, 0))(p, e[:, None]))


def test_forward_mode(pair):
    both(
        pair, lambda logits, p, e: jvp(loss_of(logits), (p, e), ({name: t.cos() for name, t in p.items()}, e.flip(0)))
    )

    def by_dual_numbers(logits, parameters, embeddings):
        with forward_ad.dual_level():
            loss = loss_of(logits)(parameters, forward_ad.make_dual(embeddings, embeddings.flip(0)))
            return forward_ad.unpack_dual(loss).tangent

    both(pair, by_dual_numbers)


def test_jacobians(pair):
    def last(logits, embeddings):
        return lambda some, all_of: logits(all_of | some, inputs_embeds=embeddings)[:, -1, :3]

    both(pair, lambda logits, p, e: jacrev(last(logits, e))(biases(p), p))
    both(pair, lambda logits, p, e: jacfwd(last(logits, e))(biases(p), p))


def test_second_derivatives(pair):
    """In forward over reverse mode, in reverse over reverse mode, and by autograd without transforms."""

    def with_respect_to(some, logits, parameters, embeddings):
        return lambda chosen: loss_of(logits)(parameters | chosen, embeddings)

    both(pair, lambda logits, p, e: hessian(with_respect_to(biases, logits, p, e))(biases(p)))
    both(pair, lambda logits, p, e: vjp(grad(with_respect_to(rows_of, logits, p, e)), rows_of(p))[1](rows_of(p)))

    def product(logits, parameters, embeddings):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in parameters.items()}
        first = torch.autograd.grad(loss_of(logits)(leaves, embeddings), tuple(leaves.values()), create_graph=True)
        # Sums of first derivatives alone: nothing that is differentiated here comes from the loss's own value.
        return torch.autograd.grad(sum(each.sum() for each in first), tuple(leaves.values()))

    both(pair, product)


@pytest.mark.parametrize("told", ["attention_mask", "prompt_lengths", "labels"])
def test_samples_whose_prompts_differ(told):
    """Under vmap each sample has its own prompt; the values of all are checked."""
    base = make_llama(2, attn_implementation="eager")
    model, _ = adapt_model(base, positions="f2+l2", r=2)
    by_hand, parameters, ids = ByHand(base, {}, None), dict(model.named_parameters()), random_ids()
    columns = {"prefix": [0, 1], "suffix": [3, 4]}, {"prefix": [0, 1], "suffix": [6, 7]}
    labels = torch.where(torch.arange(12) < torch.tensor([[5], [8]]), -100, ids)
    values = {"attention_mask": MASK, "prompt_lengths": torch.tensor([5, 8]), "labels": labels}[told]
    if told == "attention_mask":
        columns = {"prefix": [0, 1], "suffix": [10, 11]}, {"prefix": [4, 5], "suffix": [10, 11]}

    def logits(ids, value):
        return model(input_ids=ids[None], use_cache=False, **{told: value[None]}).logits

    found = vmap(logits)(ids, values)
    for row in range(2):
        inputs = {told: values[row : row + 1]} if told == "attention_mask" else {}
        seen = MASK[row].bool() if told == "attention_mask" else slice(None)
        expected = by_hand(parameters, columns[row], input_ids=ids[row : row + 1], **inputs)
        torch.testing.assert_close(found[row][:, seen], expected[:, seen], atol=1e-5, rtol=1e-5)
    if told == "prompt_lengths":
        with pytest.raises(ValueError, match=r"prompt_lengths \[5, 80\] must lie between 0"):
            vmap(logits)(ids, torch.tensor([5, 80]))


class Logits(torch.nn.Module):
    """A module with tensors alone, as torch.jit.trace wants it."""

    def __init__(self, model, *names):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors):
        return self.model(**dict(zip(self.names, tensors, strict=True)), use_cache=False).logits


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning:torch.jit")
@pytest.mark.parametrize("make_base", [make_llama, make_gpt2])
@pytest.mark.parametrize("positions", ["f2+l2", "all"])
def test_traced(make_base, positions):
    """By torch.jit.trace, saved and loaded: at the traced shape, for other tokens and another mask."""
    base, ids = make_base(), random_ids()
    model, _ = adapt_model(base, positions=positions)
    by_hand, parameters = ByHand(base, COLUMNS[positions], None), dict(model.named_parameters())
    padded = {"prefix": [4, 5], "suffix": [10, 11]} if positions == "f2+l2" else COLUMNS["all"]
    module, file = Logits(model, "input_ids", "attention_mask").eval(), io.BytesIO()
    with torch.no_grad():
        torch.jit.save(torch.jit.trace(module, (ids, torch.ones_like(ids)), check_trace=False), file)
        file.seek(0)
        traced = torch.jit.load(file)
        for other in (ids, ids.flip(1)):
            found, expected = traced(other, torch.ones_like(ids)), by_hand(parameters, input_ids=other)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        found = traced(ids, MASK)[1:, 4:]
        expected = by_hand(parameters, padded, input_ids=ids[1:], attention_mask=MASK[1:])[:, 4:]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning:torch.jit")
def test_traced_with_packed_rows():
    base, ids = make_llama(2), random_ids()[:1]
    model, _ = adapt_model(base, positions="f2")
    by_hand, parameters = ByHand(base, {"unit": [0, 1, 6, 7]}, None), dict(model.named_parameters())
    position_ids, lengths = torch.arange(6).repeat(2)[None], torch.tensor([0, 6, 12])
    traced = torch.jit.trace(
        Logits(model, "input_ids", "position_ids", "cu_seq_lens_q"), (ids, position_ids, lengths), check_trace=False
    )
    expected = by_hand(parameters, input_ids=ids.flip(1), position_ids=position_ids)
    torch.testing.assert_close(traced(ids.flip(1), position_ids, lengths), expected, atol=1e-5, rtol=1e-5)
