"""Hidden states that are not [batch, tokens, d]: a rule for each family, and models that have it."""

import copy

import pytest
import torch
from by_hand import ByHand, generated
from peft import get_peft_model
from transformers import (
    FSMTConfig,
    FSMTForConditionalGeneration,
    Gemma3nTextConfig,
    LongformerConfig,
    LongformerForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
    XLNetLMHeadModel,
)
from transformers.models.gemma3n import Gemma3nForCausalLM

from peft_reft import ReftConfig
from peft_reft.runtime.block_outputs import edit_in_layout

TINY = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def edit_last_of_first_row(hidden_states):
    assert hidden_states.shape == (4, 4, 8)
    edited = hidden_states.clone()
    edited[0, 3] = -1
    return edited


# A batch as large as the number of tokens and streams, so that only the family tells which dimension is which
LAYOUTS = {
    "llama": ((4, 4, 8), (0, 3)),
    "xlnet": ((4, 4, 8), (3, 0)),
    "fsmt": ((4, 4, 8), (3, 0)),
    "deepseek_v4": ((4, 4, 4, 8), (0, 3)),
    "hy_v4": ((4, 4, 4, 8), (0, 3)),
    "gemma3n": ((4, 4, 4, 8), (slice(None), 0, 3)),
    "qwen4_exp": ((4, 4, 32), (0, 3)),
    "longformer": ((4, 16, 8), (0, 3)),
    "led": ((4, 16, 8), (0, 3)),
    "pegasus_x": ((4, 16, 8), (0, 3)),
    "big_bird": ((4, 16, 8), (0, 3)),
    "prophetnet": ((4, 12, 8), (0, 3)),
    "cpmant": ((4, 36, 8), (0, 35)),
}


@pytest.mark.parametrize("family", LAYOUTS)
def test_what_is_edited(family):
    shape, where = LAYOUTS[family]
    hidden_states = numbered(*shape)
    expected = hidden_states.clone()
    expected[where] = -1
    found = edit_in_layout(family, hidden_states, 8, 4, edit_last_of_first_row)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", [(4, 4, 16), (4, 4, 4, 8), (16, 8), (4, 4, 4)])
@pytest.mark.parametrize("family", ["llama", "xlnet", "longformer"])
def test_what_is_no_hidden_state(family, shape):
    assert edit_in_layout(family, numbered(*shape), 8, 4, edit_last_of_first_row) is None


def adapt(base, view, **options):
    torch.manual_seed(1)
    config = ReftConfig(**{"r": 4, "init_weights": False, "positions": "f2+l2"} | options)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    return model, ByHand(base, model, view=view)


def test_tokens_before_rows_in_xlnet(ids):
    """Twelve rows of twelve tokens: the shape alone does not tell."""
    torch.manual_seed(0)
    config = XLNetConfig(
        vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=64, initializer_range=0.2, dropout=0.0
    )
    base = XLNetLMHeadModel(config).eval()
    model, by_hand = adapt(base, lambda h: h.transpose(0, 1), task_type="CAUSAL_LM")
    ids = ids.repeat(6, 1)
    lengths = torch.tensor([5, 8] * 6)
    columns = {"prefix": [[0, 1]] * 12, "suffix": [[3, 4], [6, 7]] * 6}
    expected = by_hand.logits(columns, input_ids=ids)
    with torch.no_grad():
        found = model(input_ids=ids, prompt_lengths=lengths).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (expected - by_hand.logits({"prefix": [], "suffix": []}, input_ids=ids)).abs().max() > 0.1


def test_encoder_that_is_no_transformers_model(ids):
    """FSMT's encoder, which generate calls alone, with tokens before rows."""
    torch.manual_seed(0)
    layers = dict(encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4)
    sizes = dict(d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64, src_vocab_size=64, tgt_vocab_size=64)
    special = dict(langs=["en", "de"], init_std=0.2, pad_token_id=0, eos_token_id=None, forced_eos_token_id=None)
    base = FSMTForConditionalGeneration(FSMTConfig(**layers, **sizes, **special, decoder_start_token_id=2)).eval()
    model, by_hand = adapt(base, lambda h: h.transpose(0, 1), task_type="SEQ_2_SEQ_LM")
    mask = torch.tensor([[1] * 12, [1] * 9 + [0] * 3])
    options = dict(return_dict_in_generate=True, output_logits=True)
    found = generated(model, ids, mask, **options)
    with by_hand.edits({"prefix": [[0, 1], [0, 1]], "suffix": [[10, 11], [7, 8]]}):
        expected = generated(base, ids, mask, **options)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-5)
    assert (torch.stack(expected.logits) - torch.stack(generated(base, ids, mask, **options).logits)).abs().max() > 0.1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_padding_that_the_model_adds(ids, checkpointing):
    """Longformer pads to a multiple of its window: no edit falls there, in training with recomputation too."""
    torch.manual_seed(0)
    config = LongformerConfig(
        **TINY,
        attention_window=8,
        initializer_range=0.2,
        num_labels=3,
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
    )
    base = LongformerForSequenceClassification(config).eval()
    model, by_hand = adapt(base, lambda h: h)
    mask = torch.tensor([[1] * 12, [1] * 9 + [0] * 3])
    inputs = dict(input_ids=ids, attention_mask=mask)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    found = model(**inputs).logits
    found.sum().backward()
    expected = by_hand.logits({"prefix": [[0, 1], [0, 1]], "suffix": [[10, 11], [7, 8]]}, **inputs)
    torch.testing.assert_close(found.detach(), expected, atol=1e-5, rtol=1e-5)
    assert (expected - by_hand.logits({"prefix": [], "suffix": []}, **inputs)).abs().max() > 0.1


def test_streams_of_gemma3n(ids):
    torch.manual_seed(0)
    config = Gemma3nTextConfig(
        **TINY,
        num_key_value_heads=2,
        head_dim=8,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=64,
        laurel_rank=4,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
        initializer_range=0.2,
    )
    base = Gemma3nForCausalLM(config).eval()
    model, by_hand = adapt(base, lambda h: h.movedim(0, 2), task_type="CAUSAL_LM")
    columns = {"prefix": [[0, 1]] * 2, "suffix": [[10, 11]] * 2}
    expected = by_hand.logits(columns, input_ids=ids)
    with torch.no_grad():
        found = model(input_ids=ids).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (expected - by_hand.logits({"prefix": [], "suffix": []}, input_ids=ids)).abs().max() > 0.1


def test_module_within_a_block_has_the_layout_of_its_model():
    """A torch.nn.Linear of XLNet puts out tokens before rows: each row is edited as it is alone."""
    torch.manual_seed(0)
    config = XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=64, initializer_range=0.2)
    base = XLNetForSequenceClassification(config).eval()
    options = dict(task_type="SEQ_CLS", target_modules=r".*layer\.\d+\.ff\.layer_2", init_weights=False)
    model = get_peft_model(base, ReftConfig(r=4, positions="f1", **options)).eval()
    ids = torch.randint(5, 64, (6, 6))
    with torch.no_grad():
        found = model(input_ids=ids).logits
        alone = torch.cat([model(input_ids=row[None]).logits for row in ids])
        with model.disable_adapter():
            assert (model(input_ids=ids).logits - found).abs().max() > 1e-3
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)
