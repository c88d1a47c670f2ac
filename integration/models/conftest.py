import pytest
import torch
from by_hand import random_ids


@pytest.fixture
def ids() -> torch.Tensor:
    """Two rows of twelve tokens, none of them padding."""
    return random_ids()
