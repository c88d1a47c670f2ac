"""Blocks that torch.compile has compiled one by one, before or after they are adapted."""

import functools

import pytest
import torch
from accelerate.utils import compile_regions
from by_hand import TWO, ByHand, labels_of, make_llama
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_reft import ReftConfig

COLUMNS = {"prefix": [[0, 1], [0, 1]], "suffix": [[3, 4], [6, 7]]}  # of f2+l2 in the prompts of TWO
LENGTHS = torch.tensor([5, 8])

# Two blocks are compiled one by one as many are
make_base = functools.partial(make_llama, 2)


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.compiler.reset()


def by_wrapping(model):
    layers = model.model.layers
    for index, layer in enumerate(layers):
        layers[index] = torch.compile(layer, backend="eager")
    return model


def in_place(model):
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return model


def by_accelerate(model):
    return compile_regions(model, backend="eager")


def adapt(base):
    torch.manual_seed(1)
    config = ReftConfig(task_type="CAUSAL_LM", r=4, positions="f2+l2", init_weights=False)
    return get_peft_model(base, config).eval()


def adapted(compile_blocks, when):
    """An adapted model whose blocks are compiled."""
    if when == "before":
        return adapt(compile_blocks(make_base()))
    model = adapt(make_base())
    model.base_model.model = compile_blocks(model.base_model.model)
    return model


CASES = pytest.mark.parametrize("compile_blocks", [by_wrapping, in_place, by_accelerate])
WHEN = pytest.mark.parametrize("when", ["before", "after"])


@WHEN
@CASES
def test_edits_and_gradients(ids, compile_blocks, when):
    model, plain = adapted(compile_blocks, when), adapt(make_base())
    expected = ByHand(make_base(), plain).logits(COLUMNS, input_ids=ids)
    with torch.no_grad():
        found = model(input_ids=ids, prompt_lengths=LENGTHS).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for some in (model, plain):
        some.train()(input_ids=ids, labels=labels_of(ids, *TWO["answers"])).loss.backward()
    trained, others = ([p for p in some.parameters() if p.requires_grad] for some in (model, plain))
    assert len(trained) == len(others) == 12
    assert any(p.grad.abs().max() > 1e-4 for p in trained)
    for parameter, other in zip(trained, others, strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, atol=1e-6, rtol=1e-4)


@WHEN
@CASES
def test_saved(tmp_path, ids, compile_blocks, when):
    """The files are those of a model that is not compiled, and load into one."""
    model, plain = adapted(compile_blocks, when), adapt(make_base())
    model.save_pretrained(tmp_path / "compiled")
    plain.save_pretrained(tmp_path / "plain")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("compiled", "plain")]
    assert files[0].keys() == files[1].keys() and not any("_orig_mod" in key for key in files[0])
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    configs = [(tmp_path / name / "adapter_config.json").read_text() for name in ("compiled", "plain")]
    assert configs[0] == configs[1]
    check_loaded(make_base(), tmp_path / "compiled", plain, ids)


@CASES
def test_loaded_into_compiled_blocks(tmp_path, ids, compile_blocks):
    plain = adapt(make_base())
    plain.save_pretrained(tmp_path)
    check_loaded(compile_blocks(make_base()), tmp_path, plain, ids)


def check_loaded(base, folder, plain, ids):
    """With the adapter of a folder, a base model edits as `plain` does."""
    loaded = PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        found = loaded(input_ids=ids, prompt_lengths=LENGTHS).logits
    expected = ByHand(make_base(), plain).logits(COLUMNS, input_ids=ids)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_adapter_that_is_loaded_after_calls(tmp_path, ids):
    """What was traced before has no edits in it, and is traced again."""
    adapt(make_base()).save_pretrained(tmp_path)
    base = in_place(make_base())
    with torch.no_grad():
        before = base(input_ids=ids).logits
        loaded = PeftModel.from_pretrained(base, tmp_path).eval()
        found = loaded(input_ids=ids, prompt_lengths=LENGTHS).logits
    expected = ByHand(make_base(), loaded).logits(COLUMNS, input_ids=ids)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found - before).abs().max() > 1e-2


def test_compiled_model_says_what_to_do(tmp_path):
    adapt(make_base()).save_pretrained(tmp_path)
    compiled = torch.compile(make_base(), backend="eager")
    names = list(compiled.state_dict())
    for attempt in (lambda: PeftModel.from_pretrained(compiled, tmp_path), lambda: adapt(compiled)):
        with pytest.raises(ValueError, match=r"compiled by torch.compile\(model\).*before you compile it.*_orig_mod"):
            attempt()
        assert list(compiled.state_dict()) == names
