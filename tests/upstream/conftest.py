import pytest
import torch


@pytest.fixture
def changed():
    """Gives the names of a model's tensors that are not what they were."""

    def compare(model, before):
        return [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]

    return compare
