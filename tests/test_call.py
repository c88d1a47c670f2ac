"""What a call tells of its prompts, beside what tests/test_spans.py and tests/test_generation.py compare by hand."""

import pytest
import torch
from by_hand import TWO, adapt_model, assert_edits, generated, labels_of
from transformers import DynamicCache, GPT2Config, GPT2DoubleHeadsModel

from peft_reft.call import Call, Role
from peft_reft.generation import Family
from peft_reft.positions import Positions


def test_inner_model_of_a_causal_model_does_not_guess_either(adapt, ids):
    model, _ = adapt(positions="l2")
    inner = model.get_base_model().model.train()
    with pytest.raises(ValueError, match="prompt_lengths"):
        inner(input_ids=ids)
    with torch.no_grad():
        hidden_states = inner(input_ids=ids, prompt_lengths=torch.tensor([5, 8])).last_hidden_state
        logits = model.get_base_model().lm_head(hidden_states)
        assert torch.equal(logits, model(input_ids=ids, prompt_lengths=torch.tensor([5, 8])).logits)


def test_labels_that_are_withheld_from_a_second_call(adapt, ids):
    """As trainers do for compute_metrics: the whole input would be taken for the prompt."""
    adapted = adapt(positions="f2+l2")
    model, labels = adapted[0], labels_of(ids, *TWO["answers"])
    columns = {"prefix": [[0, 1], [0, 1]], "suffix": [[3, 4], [6, 7]]}
    assert_edits(adapted, columns, input_ids=ids, labels=labels)
    with pytest.raises(ValueError, match="twice.*DataCollatorWithPromptLengths"):
        model(input_ids=ids)
    assert_edits(adapted, columns, input_ids=ids, prompt_lengths=torch.tensor([5, 8]))
    whole = {"prefix": [[0, 1], [0, 1]], "suffix": [[10, 11], [10, 11]]}
    assert_edits(adapted, whole, input_ids=ids.clone())
    assert_edits(adapt(positions="f2+l2"), whole, input_ids=ids)  # another model
    assert generated(model, ids).shape[1] > 12  # a prompt that is generated from is whole
    model.base_model.disable_adapter_layers()
    model(input_ids=ids)
    model.base_model.enable_adapter_layers()
    model.train()(input_ids=ids, labels=labels)
    assert_edits((model.eval(), adapted[1]), whole, input_ids=ids.clone())
    adapted = adapt(positions="f2")
    for told in (dict(labels=labels), {}):
        assert_edits(adapted, {"unit": [[0, 1], [0, 1]]}, input_ids=ids, **told)


@pytest.mark.parametrize("choices", [3, 12])
def test_several_sequences_a_row(ids, choices):
    """The model itself lays them out as rows; as many choices as tokens are no reason to take them for tokens."""
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    adapted = adapt_model(GPT2DoubleHeadsModel(config).eval(), positions="f2+l2")
    several = ids.unsqueeze(1).expand(-1, choices, -1)
    for inputs in (dict(input_ids=several), dict(inputs_embeds=adapted[0].get_input_embeddings()(several))):
        with pytest.raises(
            ValueError, match=rf"Model was given input of shape \[2, {choices}, 12\], several sequences"
        ):
            adapted[0](**inputs)
    assert_edits(adapted, {"prefix": [[0, 1]] * 2, "suffix": [[10, 11]] * 2}, input_ids=ids)


def test_single_token_after_a_cache_that_cannot_tell_its_length():
    """It goes on with an answer."""

    class Silent(DynamicCache):
        def get_seq_length(self, *args):
            raise ValueError("only attention layers can tell")

    call = Call(Role(Family(), "causal", 0, ()), torch.nn.Identity(), False, {"cache": Silent()})
    assert call.prompts(Positions.parse("l1"), 1, 1, torch.device("cpu")) is None
