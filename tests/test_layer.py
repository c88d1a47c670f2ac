import pytest
import torch

from peft_reft import ReftConfig
from peft_reft.layer import ReftLayer, adapted_modules, edit_rows, layer_of


def make_layer(**options):
    torch.manual_seed(0)
    layer = ReftLayer(16)
    layer.update_layer("default", 3, ReftConfig(init_weights=False, **options))
    return layer


def test_units_of_an_adapter():
    assert list(make_layer().units("default")) == ["prefix", "suffix"]
    assert list(make_layer(share_weights=True).units("default")) == ["unit"]
    assert make_layer().units("other") == {}


def test_edit_rows_edits_the_listed_columns_alone():
    layer = make_layer(share_weights=True)
    unit = layer.units("default")["unit"]
    hidden_states = torch.randn(2, 6, 16)
    indices = torch.tensor([[1, 4, 0], [5, 2, 3]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    edited = edit_rows(hidden_states, unit, indices, mask)
    changed = (edited != hidden_states).any(-1)
    assert changed.tolist() == [[False, True, False, False, True, False], [False] * 5 + [True]]
    torch.testing.assert_close(edited[0, 4], unit(hidden_states[0, 4]))
    everywhere = torch.zeros(2, 6, dtype=torch.bool)
    everywhere[0, [1, 4]] = everywhere[1, 5] = True
    torch.testing.assert_close(edit_rows(hidden_states, unit, None, everywhere), edited)


@pytest.mark.parametrize("indexed", [True, False])
def test_gradients_of_tokens_that_stay(indexed):
    """They are passed on once and unchanged, also where a token was gathered beside the edited ones."""
    unit = make_layer(share_weights=True).units("default")["unit"]
    hidden_states = torch.randn(1, 4, 16, requires_grad=True)
    indices = torch.tensor([[2, 0]]) if indexed else None
    mask = torch.tensor([[True, False]]) if indexed else torch.tensor([[False, False, True, False]])
    edit_rows(hidden_states, unit, indices, mask).sum().backward()
    assert torch.equal(hidden_states.grad[0, [0, 1, 3]], torch.ones(3, 16))
    assert not torch.equal(hidden_states.grad[0, 2], torch.ones(16))


def test_hidden_states_that_are_not_edited_are_not_kept_for_the_backward_pass():
    """The tokens that are taken and the weights are; `gather` would keep what it gathers from, on every layer."""
    unit = make_layer(share_weights=True).units("default")["unit"]
    hidden_states = torch.randn(2, 500, 16, requires_grad=True) + 0
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.setdefault(tensor.untyped_storage().data_ptr(), tensor), lambda tensor: tensor
    ):
        edit_rows(hidden_states, unit, torch.tensor([[2, 0]] * 2), torch.tensor([[True, False]] * 2))
    assert hidden_states.untyped_storage().data_ptr() not in kept
    d, r, rows = 16, 3, 2 * 2
    assert sum(t.untyped_storage().nbytes() for t in kept.values() if t.is_floating_point()) == 4 * (
        rows * (d + r) + 2 * r * d + r * r
    )


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
    block.add_module("reft", make_layer())
    assert layer_of(block) is block.reft
    assert list(adapted_modules(torch.nn.Sequential(torch.nn.ReLU(), block))) == ["1"]
