"""A base that is wide enough for the blocks of every quantization."""

import pytest
import torch
from by_hand import VOCABULARY
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="session")
def base(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    shape = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.1, pad_token_id=0, eos_token_id=2, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
