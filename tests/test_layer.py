import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peft_reft import ReftConfig
from peft_reft.edits.apply import edit, edit_rows
from peft_reft.edits.variants import VARIANTS
from peft_reft.layer import ReftLayer, adapted_modules, layer_of
from peft_reft.positions.select import Selection


def make_layer(**options):
    torch.manual_seed(0)
    layer = ReftLayer(16)
    layer.update_layer("default", 3, ReftConfig(init_weights=False, **options))
    return layer


def test_units_of_an_adapter():
    assert list(make_layer().units("default")) == ["prefix", "suffix"]
    assert list(make_layer(share_weights=True).units("default")) == ["unit"]
    assert make_layer().units("other") == {}


@pytest.fixture
def units():
    return make_layer().units("default")


def some_rows(indexed):
    """Of five tokens the prefix edits the third and the suffix the first, beside tokens of none."""
    if indexed:
        indices = torch.tensor([[[0]]]), torch.tensor([[[2, 3]], [[0, 4]]])
        return [Selection(("prefix", "suffix"), indices, torch.tensor([[[True, False]]] * 2))]
    prefix, suffix = torch.arange(5).view(1, 1, 5) == 2, torch.arange(5).view(1, 1, 5) == 0
    return [Selection(("prefix",), None, prefix), Selection(("suffix",), None, suffix)]


def edit_all(hidden_states, units, indexed):
    for rows in some_rows(indexed):
        hidden_states = edit_rows(hidden_states, units, rows)
    return hidden_states


def edited_by_hand(hidden_states, units):
    tokens = list(hidden_states.unbind(1))
    for column, unit in ((2, "prefix"), (0, "suffix")):
        tokens[column] = edit([units[unit]], tokens[column].view(1, 1, 1, -1)).view(1, -1)
    return torch.stack(tokens, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("indexed", [True, False])
def test_edit_rows_edits_the_listed_columns_alone(units, indexed, dtype):
    hidden_states = torch.randn(1, 5, 16).to(dtype)
    edited = edit_all(hidden_states, units, indexed)
    assert torch.equal(edited[:, [1, 3, 4]], hidden_states[:, [1, 3, 4]])
    torch.testing.assert_close(edited, edited_by_hand(hidden_states, units))
    assert (edited != hidden_states).any(-1).tolist() == [[True, False, True, False, False]]


@pytest.mark.parametrize("indexed", [True, False])
def test_tokens_that_stay_may_be_anything(units, indexed):
    """As what a model computes for padding: no number gets from there to others."""
    hidden_states = torch.randn(1, 5, 16)
    hidden_states[0, 1], hidden_states[0, 3] = float("nan"), float("inf")
    hidden_states.requires_grad_()
    edited = edit_all(hidden_states, units, indexed)
    torch.testing.assert_close(edited, edited_by_hand(hidden_states, units), equal_nan=True)
    edited[:, [0, 2]].sum().backward()
    assert hidden_states.grad.isfinite().all()


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("options", [{}, {"dropout": 0.5}, {"intervention": "direft", "act_fn": "relu"}], ids=str)
def test_gradients(indexed, options):
    """Of tokens that stay, also where one was gathered beside the edited ones, of those that are edited, of units."""
    units = make_layer(**options).units("default")
    weights = torch.randn(1, 5, 16)
    found = []
    for edited in (lambda h: edit_all(h, units, indexed), lambda h: edited_by_hand(h, units)):
        for unit in units.values():
            unit.zero_grad()
            unit.eval()  # without dropout, which draws
        hidden_states = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        (edited(hidden_states) * weights).sum().backward()
        found.append([hidden_states.grad, *(p.grad for unit in units.values() for p in unit.parameters())])
    torch.testing.assert_close(*found)
    assert torch.equal(found[0][0][:, [1, 3, 4]], weights[:, [1, 3, 4]])


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("act_fn", [None, "tanh"])
@pytest.mark.parametrize("intervention", VARIANTS)
def test_second_derivatives(intervention, act_fn, indexed):
    """In float64, compared with differences of first ones; those of tokens that stay are among them."""
    torch.manual_seed(0)
    layer = ReftLayer(6)
    layer.update_layer("default", 2, ReftConfig(init_weights=False, intervention=intervention, act_fn=act_fn))
    names = [name for name, _ in layer.double().named_parameters()]

    class Edited(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, hidden_states):
            return edit_all(hidden_states, self.layer.units("default"), indexed)

    def edited(hidden_states, *parameters):
        given = {f"layer.{name}": parameter for name, parameter in zip(names, parameters, strict=True)}
        return torch.func.functional_call(Edited(), given, hidden_states)

    hidden_states = torch.randn(1, 5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(edited, (hidden_states, *layer.parameters()))


def test_dropout_of_edited_tokens_alone():
    units = make_layer(dropout=0.999).units("default")
    hidden_states = torch.randn(1, 5, 16)
    for indexed in (True, False):
        edited = edit_all(hidden_states, units, indexed)
        assert torch.equal(edited[:, [1, 3, 4]], hidden_states[:, [1, 3, 4]])
        assert (edited[:, [0, 2]] == 0).float().mean() > 0.9


def of_two_rows():
    indices = torch.tensor([[[0], [1]]]), torch.tensor([[[2, 0]] * 2, [[7, 8]] * 2])
    return Selection(("prefix", "suffix"), indices, torch.tensor([[[True, False]] * 2] * 2))


def test_hidden_states_that_are_not_edited_are_not_kept_for_the_backward_pass():
    """The tokens that are taken and the weights are; `gather` would keep what it gathers from, on every layer."""
    units = make_layer().units("default")
    hidden_states = torch.randn(2, 500, 16, requires_grad=True) + 0
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.setdefault(tensor.untyped_storage().data_ptr(), tensor), lambda tensor: tensor
    ):
        edit_rows(hidden_states, units, of_two_rows())
    assert hidden_states.untyped_storage().data_ptr() not in kept
    d, r, rows = 16, 3, 2 * 2
    assert sum(t.untyped_storage().nbytes() for t in kept.values() if t.is_floating_point()) == 2 * 4 * (
        rows * (d + r) + 2 * r * d + 2 * d
    )


def test_hidden_states_and_their_gradient_are_copied_once():
    units = make_layer().units("default")
    hidden_states = torch.randn(2, 500, 16, requires_grad=True) + 0
    made = []

    class CountLarge(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **kwargs or {})
            made.extend(t for t in tree_leaves(output) if torch.is_tensor(t) and t.numel() >= 2 * 500 * 16)
            return output

    gradient = torch.randn(2, 500, 16)
    with CountLarge():
        torch.autograd.grad(edit_rows(hidden_states, units, of_two_rows()), hidden_states, gradient)
    own = {hidden_states.untyped_storage().data_ptr(), gradient.untyped_storage().data_ptr()}
    assert len({t.untyped_storage().data_ptr() for t in made} - own) == 2


def test_has_no_weight():
    """Code that looks for the weight of every module must not find one, nor run into an endless search."""
    layer = make_layer()
    assert not hasattr(layer, "weight") and not hasattr(layer, "bias")


def test_inactive_and_disabled_adapters_are_not_in_use():
    layer = make_layer()
    assert layer.adapters_in_use == ["default"]
    layer.set_adapter("other")
    assert layer.adapters_in_use == []
    layer.set_adapter("default")
    layer.enable_adapters(False)
    assert layer.adapters_in_use == []


def test_merge_is_refused():
    for merge in (make_layer().merge, make_layer().unmerge):
        with pytest.raises(ValueError, match="cannot be merged"):
            merge()


def test_finding_layers():
    block = torch.nn.Linear(2, 2)
    assert layer_of(block) is None
    block.add_module("_reft", make_layer())
    assert layer_of(block) is block._reft
    assert list(adapted_modules(torch.nn.Sequential(torch.nn.ReLU(), block))) == ["1"]
