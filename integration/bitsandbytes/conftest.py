"""A base that is wide enough for bitsandbytes's blocks of 64 weights."""

import pytest
import torch
from by_hand import save_llama
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


@pytest.fixture(scope="session")
def base(tmp_path_factory, tokenizer):
    return save_llama(tmp_path_factory.mktemp("base"), tokenizer, hidden_size=64, initializer_range=0.2)


@pytest.fixture(scope="session")
def load(base):
    """Loads the base quantized as a `BitsAndBytesConfig` says, by default to NF4."""

    def load(**options):
        options = options or dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        config = BitsAndBytesConfig(**options)
        return AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype="float32")

    return load
