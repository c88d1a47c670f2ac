import pytest
import torch
from by_hand import gram_schmidt

from peft_reft.config import find_activation
from peft_reft.edits.apply import edit
from peft_reft.edits.intervention import Intervention
from peft_reft.edits.variants import VARIANTS

D, R = 16, 3

# The formulas of the design's table, in float64: R is the projection that is used
FORMULAS = {
    "loreft": lambda h, R, W, b, act: h + R.T @ (act(W @ h + b) - R @ h),
    "noreft": lambda h, R, W, b, act: h + R.T @ (act(W @ h + b) - R @ h),
    "direft": lambda h, R, W, b, act: h + R.T @ act(W @ h + b),
    "direft_orthogonal": lambda h, R, W, b, act: h + R.T @ act(W @ h + b),
    "consreft": lambda h, R, W, b, act: h + R.T @ (b - R @ h),
    "lobireft": lambda h, R, W, b, act: h + R.T @ b,
}
ORTHONORMAL = {"loreft", "direft_orthogonal", "consreft", "lobireft"}


def make(variant, init_weights=False, **options):
    torch.manual_seed(0)
    options["act_fn"] = find_activation(options.get("act_fn"))
    unit = Intervention(VARIANTS[variant], D, R, **options)
    unit.reset_parameters(init_weights)
    if init_weights is False:
        unit.R.data += 0.3 * torch.randn(R, D)  # as training moves it away from orthonormal rows
    return unit


def edited_by(unit, hidden_states, mask=None):
    """Edit hidden states [batch, n, d] by one unit."""
    return edit([unit], hidden_states.unsqueeze(0), None if mask is None else mask.unsqueeze(0)).squeeze(0)


@pytest.mark.parametrize("act_fn", [None, "relu", "gelu"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_formula(variant, act_fn):
    unit = make(variant, act_fn=act_fn)
    act = {None: lambda x: x, "relu": torch.relu, "gelu": torch.nn.functional.gelu}[act_fn]
    projection = gram_schmidt(unit.R) if variant in ORTHONORMAL else unit.R.double()
    source = None if unit.W is None else unit.W.double()
    hidden_states = torch.randn(2, 5, D)
    with torch.no_grad():
        edited = edited_by(unit, hidden_states)
    for h, found in zip(hidden_states.view(-1, D), edited.view(-1, D), strict=True):
        expected = FORMULAS[variant](h.double(), projection, source, unit.b.double(), act)
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_the_adapter_and_nothing_else(variant):
    unit = make(variant)
    linear = variant not in ("consreft", "lobireft")
    assert sum(p.numel() for p in unit.parameters()) == (2 * R * D + R if linear else R * D + R)
    assert unit.state_dict().keys() == ({"_R", "_W", "_b"} if linear else {"_R", "_b"})


@pytest.mark.parametrize("variant", VARIANTS)
def test_zero_edit_at_the_start(variant):
    unit = make(variant, init_weights=True)
    hidden_states = torch.randn(2, 5, D)
    equal = torch.equal(edited_by(unit, hidden_states), hidden_states)
    assert equal == (variant != "consreft")  # which takes R h away whatever its parameters are
    edited_by(unit, hidden_states).square().sum().backward()
    moved = [unit.b, unit.W] if unit.W is not None else [unit.b]
    assert any(p.grad.abs().max() > 0 for p in moved), "an edit of zero that cannot be trained"


def test_loreft_starts_at_the_projection():
    unit = make("loreft", init_weights=True)
    assert torch.equal(unit.W, unit.projection()) and not unit.b.any()
    torch.testing.assert_close(unit.R @ unit.R.T, 0.25 * torch.eye(R), atol=1e-6, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_reference_draws(variant):
    """As nn.Linear and nn.init.orthogonal_ draw, which is what pyreft calls, but for the length."""
    unit = make(variant, init_weights="reference")
    bound = D**-0.5
    if variant in ORTHONORMAL:
        torch.testing.assert_close(unit.R @ unit.R.T, 0.25 * torch.eye(R), atol=1e-6, rtol=0)
    else:
        assert unit.R.abs().max() <= bound
    if unit.W is not None:
        assert unit.W.abs().max() <= bound and unit.b.abs().max() <= bound and unit.W.std() > bound / 3
    else:
        assert 0 <= unit.b.min() and unit.b.max() <= 1
    assert not torch.equal(edited_by(unit, torch.ones(1, 1, D)), torch.ones(1, 1, D))


@pytest.mark.parametrize("variant", VARIANTS)
def test_random_edit(variant):
    hidden_states = torch.randn(2, 5, D)
    assert (edited_by(make(variant), hidden_states) - hidden_states).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameters", ["float32", "half"])
def test_computed_in_float32(dtype, parameters):
    """The result is the float32 one, rounded once."""
    unit = make("loreft")
    hidden_states = torch.randn(2, 5, D).to(dtype)
    if parameters == "half":
        unit = unit.to(dtype)
    exact = make("loreft")
    exact.load_state_dict(unit.state_dict())
    expected = edited_by(exact, hidden_states.float()).to(dtype)
    assert torch.equal(edited_by(unit, hidden_states), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(edited_by(unit, hidden_states), expected)


def test_gradients_in_half_precision():
    unit = make("loreft").to(torch.bfloat16)
    edited_by(unit, torch.randn(2, 5, D).bfloat16()).float().square().sum().backward()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() and p.grad.any() for p in unit.parameters())


def test_gradients_are_those_of_float32():
    """Of hidden states in half precision, which are kept as they are; on the way back they are rounded once."""
    hidden_states, weights = torch.randn(2, 5, D).bfloat16(), torch.randn(2, 5, D).bfloat16()
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        unit, h = make("loreft"), hidden_states.to(dtype, copy=True).requires_grad_()
        edited_by(unit, h).backward(weights.to(dtype))
        found.append([h.grad.bfloat16(), *(p.grad for p in unit.parameters())])
    assert all(torch.equal(half, full) for half, full in zip(*found, strict=True))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("act_fn", [None, "tanh"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients(variant, act_fn, masked):
    unit = make(variant, act_fn=act_fn).double()
    mask = torch.tensor([[True, False, True, True]]) if masked else None
    names = [f"unit.{name}" for name, _ in unit.named_parameters()]

    class Edited(torch.nn.Module):
        def __init__(self, unit):
            super().__init__()
            self.unit = unit

        def forward(self, hidden_states):
            return edited_by(self.unit, hidden_states, mask)

    def edited(hidden_states, *parameters):
        return torch.func.functional_call(Edited(unit), dict(zip(names, parameters, strict=True)), hidden_states)

    hidden_states = torch.randn(1, 4, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(edited, (hidden_states, *unit.parameters()))


def test_others_can_switch_dropout_off():
    """As TRL's trainers do with `disable_dropout`, which find it among the modules."""
    unit = make("loreft", dropout=0.5)
    assert [module.p for module in unit.modules() if isinstance(module, torch.nn.Dropout)] == [0.5]


def test_dropout_is_on_the_edited_state():
    unit = make("loreft", dropout=0.5)
    hidden_states = torch.randn(1, 50, D)
    kept = edited_by(unit.eval(), hidden_states)
    dropped = edited_by(unit.train(), hidden_states)
    zeros = dropped == 0
    assert 0.3 < zeros.float().mean() < 0.7
    torch.testing.assert_close(dropped[~zeros], 2 * kept[~zeros])
