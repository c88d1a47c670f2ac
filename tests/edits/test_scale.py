import copy
import math

import pytest
import torch
from by_hand import VOCABULARY, labels_of, make_llama, random_ids
from peft import PeftModel, get_peft_model

from peft_reft import ReftConfig
from peft_reft.edits.scale import UNMEASURED, measure_exponents, scale_of

D = 8


def adapt(base=None, **options):
    torch.manual_seed(1)
    shared = dict(task_type="CAUSAL_LM", r=2, positions="f2+l2", standardize=True)
    config = ReftConfig(**shared | options)
    return get_peft_model(base or make_llama(), config)


def layers(model):
    return [block._reft for block in model.get_base_model().model.layers]


def units(model, adapter="default"):
    return [unit for layer in layers(model) for unit in layer.units(adapter).values()]


def exponents_by_hand(rows):
    """Of hidden states, a list of rows of floats: the exponents of the root mean squares, in plain Python."""
    rms = [math.sqrt(sum(row[i] ** 2 for row in rows) / len(rows)) for i in range(len(rows[0]))]
    positive = sorted(value for value in rms if value > 0)
    floor = positive[(len(positive) - 1) // 2] / 16 if positive else 1.0
    return [round(math.log2(max(value, floor))) for value in rms]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_exponents(dtype):
    hidden_states = (torch.randn(2, 5, D) * torch.logspace(-2, 3, D)).to(dtype)
    counted = torch.tensor([[False, True, True, True, False], [True] * 5])
    found = measure_exponents(hidden_states, counted, torch.tensor(False))
    assert found.dtype == torch.int8
    assert found.tolist() == exponents_by_hand(hidden_states[counted].double().tolist())
    assert torch.equal(scale_of(found), torch.tensor([2.0**e for e in found.tolist()]))


def test_dimensions_that_are_zero_or_constant():
    hidden_states = torch.randn(1, 6, D)
    hidden_states[..., 0], hidden_states[..., 1] = 0.0, 40.0
    found = measure_exponents(hidden_states, torch.ones(1, 6, dtype=torch.bool), torch.tensor(False))
    assert found.tolist() == exponents_by_hand(hidden_states[0].double().tolist())
    assert found[1] == 5 and -6 < found[0] < -2


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_tokens_that_are_not_finite_are_left_out(wrong):
    hidden_states = torch.randn(1, 6, D)
    expected = exponents_by_hand(hidden_states[0, 1:].double().tolist())
    hidden_states[0, 0, 3] = wrong
    found = measure_exponents(hidden_states, torch.ones(1, 6, dtype=torch.bool), torch.tensor(False))
    assert found.tolist() == expected


@pytest.mark.parametrize("case", ["nothing counted", "all zero", "edited"])
def test_ones_where_nothing_can_be_measured(case):
    hidden_states = torch.zeros(1, 4, D) if case == "all zero" else 100 * torch.randn(1, 4, D)
    counted = torch.full((1, 4), case != "nothing counted")
    found = measure_exponents(hidden_states, counted, torch.tensor(case == "edited"))
    assert not found.any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_measured_in_the_first_training_call(side):
    """Without padding and without each row's first token, before any edit; later calls change nothing."""
    base, ids = make_llama(), random_ids()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    mask = mask if side == "left" else mask.flip(1)
    model = adapt(copy.deepcopy(base))
    with torch.no_grad():
        model.eval()(input_ids=ids, attention_mask=mask)
    assert all((unit.exponents == UNMEASURED).all() for unit in units(model))
    states = []
    handles = [layer.register_forward_hook(lambda m, a, out: states.append(out)) for layer in base.model.layers]
    base(input_ids=ids, attention_mask=mask)
    [handle.remove() for handle in handles]
    model.train()(input_ids=ids, attention_mask=mask, labels=labels_of(ids, [(8, 9)], [(8, 9)])).loss.backward()
    first = mask.cumsum(1) == 1
    for layer, state in zip(layers(model), states, strict=True):
        expected = exponents_by_hand(state[mask.bool() & ~first].double().tolist())
        assert [unit.exponents.tolist() for unit in layer.units("default").values()] == [expected] * 2
    before = [unit.exponents.clone() for unit in units(model)]
    model(input_ids=ids.flip(1), labels=labels_of(ids, [(4, 9)], [(4, 9)])).loss.backward()
    assert all(torch.equal(unit.exponents, e) for unit, e in zip(units(model), before, strict=True))


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_gradients_are_those_of_the_scaled_edit(checkpointing):
    """Of s R^T (W h / s + b) by autograd on the base model, in the call that measures, too."""
    base, ids = make_llama(1), random_ids()
    model = adapt(copy.deepcopy(base), positions="all").train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    labels = labels_of(ids, [(4, 9)], [(4, 12)])
    model(input_ids=ids, labels=labels).loss.backward()
    (unit,) = units(model)
    scale = 2.0 ** unit.exponents.float()
    R, W, b = (p.detach().clone().requires_grad_() for p in (unit.R, unit.W, unit.b))

    def hook(module, args, output):
        return output + 2 * scale * (((output / scale) @ W.T + b) @ R)  # sqrt(8 / 2)

    handle = base.model.layers[0].register_forward_hook(hook)
    base(input_ids=ids, labels=labels).loss.backward()
    handle.remove()
    assert R.grad.abs().max() > 1e-3 and not W.grad.any()
    for found, expected in zip((unit.R, unit.W, unit.b), (R, W, b), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, atol=1e-6, rtol=1e-4)


def test_a_later_adapter_has_the_scale_of_the_first():
    """So that a copy of the tensors (TRL's reference adapter) computes the same."""
    ids = random_ids()
    labels = labels_of(ids, [(4, 9)], [(4, 12)])
    model = adapt().train()
    model(input_ids=ids, labels=labels).loss.backward()
    [unit.R.data.normal_() for unit in units(model)]
    expected = model.eval()(input_ids=ids.clone()).logits
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    model.set_adapter("ref")
    assert torch.equal(model(input_ids=ids.clone()).logits, expected)


def test_an_edit_that_is_not_zero_keeps_its_units():
    ids = random_ids()
    model = adapt(init_weights=False).eval()
    before = model(input_ids=ids).logits
    model.train()(input_ids=ids, labels=labels_of(ids, [(4, 9)], [(4, 12)])).loss.backward()
    assert torch.equal(model.eval()(input_ids=ids.clone()).logits, before)
    assert not any(unit.exponents.any() for unit in units(model))


def test_weight_decay_leaves_an_untrained_edit_at_zero():
    ids = torch.randint(2, VOCABULARY, (2, 12))
    model = adapt()
    expected = model.eval()(input_ids=ids).logits
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.1)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    before = [p.clone() for p in trained]
    for _ in range(1000):
        optimizer.step()
    assert any(not torch.equal(p, old) for p, old in zip(trained, before, strict=True)), "nothing has decayed"
    assert torch.equal(model(input_ids=ids).logits, expected)


def trained(steps=2, **options):
    """An adapter after some steps of SGD, which has no state."""
    model = adapt(**options)
    for _ in range(steps):
        step(model)
    return model


def step(model):
    ids = random_ids()
    model.train()(input_ids=ids, labels=labels_of(ids, [(4, 9)], [(4, 12)])).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.5 * parameter.grad
                parameter.grad = None


def edit_by_hand(unit, h, variant, act):
    """The design's table with R s and W / s in place of R and W, in float64; h is [tokens, d]."""
    scale = 2.0 ** unit.exponents.double()
    R, W, b, h = (8 / unit.r) ** 0.5 * unit.R.double() * scale, unit.W.double() / scale, unit.b.double(), h.double()
    source = act(h @ W.T + b)
    return h + (source - h @ R.T if variant == "noreft" and act is not EQUAL else source) @ R


def EQUAL(x):
    return x


@pytest.mark.parametrize(
    "variant, act_fn",
    [(v, None) for v in ("loreft", "noreft", "direft", "direft_orthogonal")]
    + [("noreft", "tanh"), ("direft", "tanh")],
)
@torch.no_grad()
def test_formula(variant, act_fn):
    base, ids = make_llama(1), random_ids()
    with torch.enable_grad():
        model = trained(base=copy.deepcopy(base), intervention=variant, act_fn=act_fn, positions="all").eval()
    (unit,), act = units(model), torch.tanh if act_fn else EQUAL
    states = {}
    base.model.layers[0].register_forward_hook(lambda m, a, output: states.setdefault("base", output))
    base(input_ids=ids)
    model.get_base_model().model.norm.register_forward_pre_hook(lambda m, args: states.setdefault("edited", args[0]))
    model(input_ids=ids)
    expected = edit_by_hand(unit, states["base"].view(-1, 32), variant, act).view_as(states["base"])
    assert (expected - states["base"]).abs().max() > 1e-2
    torch.testing.assert_close(states["edited"].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ["loreft", "direft_orthogonal", "consreft", "lobireft"])
def test_kept_in_the_units_of_hidden_states(variant):
    """Where rows must stay orthonormal about an activation or a constant."""
    model = adapt(intervention=variant, act_fn="relu")
    assert not any(unit.is_standardized or "_exponents" in unit.state_dict() for unit in units(model))


def test_the_papers_start_is_in_the_units_of_hidden_states():
    with pytest.raises(ValueError, match="init_weights='reference' draws.*Pass standardize=False"):
        ReftConfig(init_weights="reference")


def test_trained_on_from_a_file_as_if_it_had_not_been_saved(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path, is_trainable=True)
    for _ in range(2):
        step(model), step(loaded)
        for unit, other in zip(units(model), units(loaded), strict=True):
            assert all(torch.equal(unit.state_dict()[key], other.state_dict()[key]) for key in unit.state_dict())


def test_loaded_by_transformers_beside_another_scale(tmp_path):
    """Each keeps its own, whichever is loaded first."""
    ids, expected = random_ids(), {}
    for name, layers in (("small", None), ("large", [1])):
        base = make_llama()
        with torch.no_grad():
            base.model.embed_tokens.weight *= 1 if name == "small" else 30
        model = trained(base=base, layers_to_transform=layers)
        model.save_pretrained(tmp_path / name)
        expected[name] = PeftModel.from_pretrained(make_llama(), tmp_path / name)(input_ids=ids).logits
    model = make_llama()
    for name in expected:
        model.load_adapter(str(tmp_path / name), name)
    for name, logits in expected.items():
        model.set_adapter(name)
        assert torch.equal(model(input_ids=ids).logits, logits)


def test_saved_before_it_is_trained(tmp_path):
    """It is measured in the first training call after it was loaded."""
    adapt().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path, is_trainable=True)
    step(loaded)
    assert all((unit.exponents != UNMEASURED).all() for unit in units(loaded))


@torch.no_grad()
def test_mixed_batch():
    ids = random_ids()
    with torch.enable_grad():
        model = trained(positions="l3")
    model.add_adapter("plain", ReftConfig(task_type="CAUSAL_LM", r=4, positions="l3", init_weights=False))
    model.eval()
    expected = []
    for name, row in zip(("default", "plain"), ids, strict=True):
        model.set_adapter(name)
        expected.append(model(input_ids=row[None]).logits)
    found = model(input_ids=ids, adapter_names=["default", "plain"]).logits
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=1e-5)
