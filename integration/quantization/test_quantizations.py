"""ReFT on a base in every quantization that transformers loads and a CPU can run."""

import contextlib

import pytest
import torch
from by_hand import VOCABULARY, ByHand, labels_of
from peft import PeftModel, get_peft_model
from quantizations import QUANTIZATIONS
from trainers import reft
from transformers import AutoModelForCausalLM

from peft_reft.quantized import forget_check

COLUMNS = {"prefix": [[0, 1]] * 2, "suffix": [[6, 7]] * 2}
WITHOUT_GRADIENT = {  # that of rounded activations, and what has the weights alone in the same quantization
    "torchao int8, dynamic activations": "torchao int8",
    "torchao intx, dynamic activations": "torchao int8",
    "compressed-tensors W8A8": "compressed-tensors W8A16",
    "compressed-tensors FP8_DYNAMIC": "torchao float8",
    "BitNet bitlinear": "BitNet offline",
}
STRAIGHT_THROUGH = ["BitNet online", "BitNet offline"]  # rounds activations, with the gradient of not doing so
TRAINABLE = [kind for kind in QUANTIZATIONS if kind not in WITHOUT_GRADIENT]


@pytest.fixture(autouse=True)
def eager():
    """transformers compiles two functions of BitNet's layers, which takes longer than all tests of it."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def inputs():
    ids = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    return dict(input_ids=ids, labels=labels_of(ids, [(8, 12)], [(8, 12)]))


@pytest.fixture(scope="session")
def loaders():
    """What has been quantized, by kind."""
    return {}


@pytest.fixture
def quantized(loaders, base, tmp_path_factory):
    """Quantize, and give the function that loads what has been quantized."""

    def load(kind):
        if kind not in loaders:
            try:
                with contextlib.chdir(tmp_path_factory.mktemp("work")):  # where gptqmodel writes its logs
                    loaders[kind] = QUANTIZATIONS[kind](base, tmp_path_factory.mktemp("quantized"))
            except ModuleNotFoundError as error:
                pytest.skip(f"{error.name} is not installed")
        return loaders[kind]

    return load


@pytest.fixture
def load(kind, quantized):
    return quantized(kind)


def parts(name, tensor):
    """The plain tensors that a tensor is made of, if it is of a quantized kind, by name."""
    if hasattr(tensor, "__tensor_flatten__"):
        for part in tensor.__tensor_flatten__()[0]:
            yield from parts(f"{name}.{part}", getattr(tensor, part))
    else:
        yield name, tensor.detach().clone()


def tensors(model):
    """Every parameter and buffer of a base model, and all that its weights were quantized with."""
    found = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers(), *model.state_dict().items()]:
        if isinstance(tensor, torch.Tensor) and "._reft." not in name:
            found |= dict(parts(name, tensor))
    return found


def logits(model, input_ids):
    with torch.no_grad():
        return model(input_ids=input_ids).logits


def trained(model, lowest=False):
    return [p for name, p in model.named_parameters() if p.requires_grad and (not lowest or ".0._reft." in name)]


def slope(model, parameters, inputs, size=0.01):
    """The slope of the loss along its gradient, by small steps, and the gradient's norm, which must be the same."""
    gradients = [p.grad for p in parameters]
    norm = torch.stack([g.norm() for g in gradients]).norm()

    def loss_after(step):
        with torch.no_grad():
            for p, gradient in zip(parameters, gradients, strict=True):
                p += step / norm * gradient
            loss = model(**inputs).loss.double()
            for p, gradient in zip(parameters, gradients, strict=True):
                p -= step / norm * gradient
        return loss

    return ((loss_after(size) - loss_after(-size)) / (2 * size)).item(), norm.item()


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_edits(tmp_path, base, load, inputs, kind):
    """They are exact, here and on the base in full precision, which takes the same file."""
    torch.manual_seed(1)
    get_peft_model(load(), reft(init_weights=False)).save_pretrained(tmp_path / "adapter")
    for make in (load, lambda: AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)):
        model, unadapted = PeftModel.from_pretrained(make(), tmp_path / "adapter").eval(), make().eval()
        plain = logits(unadapted, inputs["input_ids"])
        found, expected = model(**inputs).logits, ByHand(unadapted, model).logits(COLUMNS, **inputs)
        assert (found - plain).abs().max() > 0.1
        if kind in WITHOUT_GRADIENT or kind in STRAIGHT_THROUGH:  # activations may be rounded up here and down there
            assert (found - expected).norm() < 0.01 * (found - plain).norm()
        else:
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", TRAINABLE)
def test_training(tmp_path, load, inputs, kind):
    torch.manual_seed(1)
    model = get_peft_model(load(), reft(init_weights=False)).train()
    model(**inputs).loss.backward()
    before = tensors(model.get_base_model())  # compressed-tensors unpacks its weights in the first call
    for some in (trained(model, lowest=True), trained(model)):
        by_steps, norm = slope(model, some, inputs, 0.1 if kind in STRAIGHT_THROUGH else 0.01)
        assert norm > 0 and abs(by_steps - norm) < 0.03 * norm

    optimizer = torch.optim.AdamW(trained(model), lr=2e-2)
    losses = []
    for _ in range(10):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]

    after = tensors(model.get_base_model())
    assert after.keys() == before.keys()
    assert not [name for name, tensor in before.items() if not torch.equal(after[name], tensor)]

    model.eval().save_pretrained(tmp_path / "trained")
    again = PeftModel.from_pretrained(load(), tmp_path / "trained").eval()
    ids = inputs["input_ids"].clone()  # which came with no labels
    assert torch.equal(logits(again, ids), logits(model, ids))


@pytest.mark.parametrize("kind", WITHOUT_GRADIENT)
def test_training_without_gradients_is_refused(quantized, load, inputs, kind):
    torch.manual_seed(1)
    model = get_peft_model(load(), reft(init_weights=False)).train()
    with pytest.raises(ValueError, match="model.layers.0.self_attn.q_proj and layers like it are quantized"):
        model(**inputs)
    model.eval()(**inputs)  # as it may be used

    # It would have trained wrongly: the first tokens' edits, which the answer reads by attention alone
    with_gradient = get_peft_model(quantized(WITHOUT_GRADIENT[kind])(), reft(init_weights=False))
    with_gradient.load_state_dict({k: v for k, v in model.state_dict().items() if "._reft." in k}, strict=False)
    forget_check(model.get_base_model())
    prefix = []
    for each in (model, with_gradient):
        each.train()(**inputs).loss.backward()
        unit = each.get_base_model().model.layers[0]._reft._reft_prefix["default"]
        prefix.append(torch.cat([p.grad.flatten() for p in unit.parameters()]))
    assert (prefix[0] - prefix[1]).norm() > 0.5 * prefix[1].norm() > 0
