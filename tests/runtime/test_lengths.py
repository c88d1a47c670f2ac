"""Prompt lengths that are told around code that calls a model, against columns that are listed here."""

import copy
import threading
from types import SimpleNamespace

import pytest
import torch
from by_hand import adapt_model, assert_edits, generated, labels_of, make_llama
from torch import nn
from transformers import DynamicCache, T5Config, T5ForConditionalGeneration

import peft_reft
from peft_reft import ReftConfig

LENGTHS = torch.tensor([5, 8])
COLUMNS = {"prefix": [[0, 1], [0, 1]], "suffix": [[3, 4], [6, 7]]}
WHOLE = {"prefix": [[0, 1], [0, 1]], "suffix": [[10, 11], [10, 11]]}


def test_calls_take_the_lengths(adapt, ids):
    adapted = adapt(positions="f2+l2")
    with peft_reft.prompt_lengths(adapted[0], LENGTHS):
        assert_edits(adapted, COLUMNS, input_ids=ids)
        assert_edits(adapted, COLUMNS, input_ids=ids.clone())
        own = {"prefix": [[0], [0, 1]], "suffix": [[1, 2], [7, 8]]}
        assert_edits(adapted, own, input_ids=ids, prompt_lengths=torch.tensor([3, 9]))
        with peft_reft.prompt_lengths(adapted[0], torch.tensor([6, 6])):
            assert_edits(adapted, {"prefix": [[0, 1]] * 2, "suffix": [[4, 5]] * 2}, input_ids=ids)
        assert_edits(adapted, COLUMNS, input_ids=ids, labels=labels_of(ids, [(3, 12)], [(3, 12)]))
        assert_edits((adapted[0].train(), adapted[1]), COLUMNS, input_ids=ids)
        adapted[0].eval()
    assert_edits(adapted, WHOLE, input_ids=ids.clone())


def test_generate_is_not_told(adapt, ids):
    """It takes all that it is given for the prompt; calls by hand with a cache go on with theirs."""
    model, by_hand = adapt(positions="f2+l2")
    expected = by_hand.generate(WHOLE, ids)
    with peft_reft.prompt_lengths(model, LENGTHS), torch.no_grad():
        assert torch.equal(generated(model, ids, mask=torch.ones_like(ids)), expected)
        cache = DynamicCache(config=model.config)
        first = model(input_ids=ids[:, :8], past_key_values=cache).logits
        second = model(input_ids=ids[:, 8:], past_key_values=cache).logits
        found = torch.cat([first, second], dim=1)
    torch.testing.assert_close(found, by_hand.logits(COLUMNS, input_ids=ids), atol=1e-5, rtol=1e-5)


def test_calls_within_generate_can_be_told(adapt, ids):
    model, by_hand = adapt(positions="f2+l2")
    seen = []

    def score(input_ids, scores):
        with peft_reft.prompt_lengths(model, LENGTHS):
            seen.append(model(input_ids=ids).logits)
        return scores

    found = generated(model, ids, mask=torch.ones_like(ids), logits_processor=[score])
    assert torch.equal(found, by_hand.generate(WHOLE, ids))
    expected = by_hand.logits(COLUMNS, input_ids=ids)
    assert len(seen) == 6
    for logits in seen:
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


class Wrapper(nn.Module):
    """As DistributedDataParallel wraps a model."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **inputs):
        return self.module(**inputs)


def test_wrapped_and_injected_models(ids):
    _, by_hand = adapt_model(make_llama(), positions="f2+l2")
    expected = by_hand.logits(COLUMNS, input_ids=ids)
    model, _ = adapt_model(make_llama(), positions="f2+l2")
    injected = make_llama()
    injected.add_adapter(ReftConfig(task_type="CAUSAL_LM", r=4, positions="f2+l2", init_weights=False))
    injected.load_state_dict(model.get_base_model().state_dict())
    forms = (model, model.get_base_model(), injected.eval(), Wrapper(model), torch.compile(model, backend="eager"))
    for form in forms:
        for told in (form, Wrapper(form)):
            with peft_reft.prompt_lengths(told, LENGTHS), torch.no_grad():
                torch.testing.assert_close(form(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_other_models_and_threads_are_not_told(adapt, ids):
    adapted, other = adapt(positions="f2+l2"), adapt(positions="f2+l2")
    copied = copy.deepcopy(adapted[0])
    with peft_reft.prompt_lengths(adapted[0], LENGTHS):
        assert_edits(other, WHOLE, input_ids=ids)
        assert_edits((copied, adapted[1]), WHOLE, input_ids=ids)
        found = SimpleNamespace()

        def run():
            with torch.no_grad():
                found.logits = adapted[0](input_ids=ids).logits

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    torch.testing.assert_close(found.logits, adapted[1].logits(WHOLE, input_ids=ids), atol=1e-5, rtol=1e-5)


def test_an_error_ends_it(adapt, ids):
    adapted = adapt(positions="f2+l2")
    with pytest.raises(KeyError), peft_reft.prompt_lengths(adapted[0], LENGTHS):
        raise KeyError
    assert_edits(adapted, WHOLE, input_ids=ids)


def test_decoder_of_an_encoder_decoder_model(ids):
    """The lengths are those of decoder_input_ids, and the encoder is not told."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    model, by_hand = adapt_model(
        T5ForConditionalGeneration(config).eval(),
        positions="l1",
        task_type="SEQ_2_SEQ_LM",
        target_modules=r".*(encoder|decoder)\.block\.\d+",
    )
    given = dict(input_ids=ids[:, :6], decoder_input_ids=ids)
    with peft_reft.prompt_lengths(model, LENGTHS), torch.no_grad():
        found = model(**given).logits
        assert model.get_encoder()(ids[:, :6]).last_hidden_state.shape == (2, 6, 32)
    with by_hand.edits({"unit": [[4], [7]]}, within="decoder"), by_hand.edits({"unit": [[5], [5]]}, within="encoder"):
        expected = by_hand.base(**given).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_told_is_refused(adapt, ids):
    model, _ = adapt(positions="f2+l2")
    for lengths, given in (([5, 8], r"\[5, 8\]"), (LENGTHS.float(), "float32"), (LENGTHS[None], r"\[1, 2\]")):
        with pytest.raises(ValueError, match=given), peft_reft.prompt_lengths(model, lengths):
            pass
    with pytest.raises(ValueError, match="LlamaForCausalLM has no ReFT adapter"):
        with peft_reft.prompt_lengths(make_llama(), LENGTHS):
            pass
    with peft_reft.prompt_lengths(model, LENGTHS), pytest.raises(ValueError, match=r"LongTensor \[1\]"):
        model(input_ids=ids[:1])
