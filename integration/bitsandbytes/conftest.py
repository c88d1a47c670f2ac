"""A base that is wide enough for bitsandbytes's blocks of 64 weights."""

import pytest
import torch
from by_hand import VOCABULARY
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="session")
def base(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.2, pad_token_id=0, eos_token_id=2, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def load(base):
    """Loads the base quantized as a `BitsAndBytesConfig` says, by default to NF4."""

    def load(**options):
        options = options or dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        config = BitsAndBytesConfig(**options)
        return AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype="float32")

    return load
