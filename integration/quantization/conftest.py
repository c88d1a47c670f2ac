"""A base that is wide enough for the blocks of every quantization."""

import pytest
from by_hand import save_llama


@pytest.fixture(scope="session")
def base(tmp_path_factory, tokenizer):
    return save_llama(tmp_path_factory.mktemp("base"), tokenizer, hidden_size=128, initializer_range=0.1)
