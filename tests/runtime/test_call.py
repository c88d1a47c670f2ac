"""What a call tells of its prompts, besides what test_prompts.py and test_generate.py compare by hand."""

import gc
import warnings
import weakref

import pytest
import torch
from by_hand import ENCODER, TWO, adapt_model, assert_edits, generated, labels_of, make_llama
from transformers import (
    BertConfig,
    BertModel,
    DynamicCache,
    GPT2Config,
    GPT2DoubleHeadsModel,
    LlamaForSequenceClassification,
)

from peft_reft.positions.language import Positions
from peft_reft.runtime.call import Call, ModuleRole
from peft_reft.runtime.generate import ModelToken


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
    with pytest.raises(ValueError, match="came with labels.*DataCollatorWithPromptLengths"):
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
    several = ids.unsqueeze(1).repeat(1, choices, 1)
    with pytest.raises(ValueError, match=rf"Model was given input of shape \[2, {choices}, 12\], several sequences"):
        adapted[0](input_ids=several)
    assert_edits(adapted, {"prefix": [[0, 1]] * 2, "suffix": [[10, 11]] * 2}, input_ids=ids)


def test_single_token_after_a_cache_that_cannot_tell_its_length():
    """It goes on with an answer."""

    class Silent(DynamicCache):
        def get_seq_length(self, *args):
            raise ValueError("only attention layers can tell")

    call = Call(ModuleRole(ModelToken(), "causal", 0, ()), torch.nn.Identity(), False, {"cache": Silent()})
    assert call.prompts(Positions.parse("l1"), 1, 1, torch.device("cpu")) is None


def test_all_live_ids_that_came_with_labels_are_known(adapt, ids):
    """As where a loss is computed batch by batch, and logits afterwards."""
    model, _ = adapt(positions="f2+l2")
    others, labels = ids.flip(1), labels_of(ids, *TWO["answers"])
    model(input_ids=ids, labels=labels)
    model.train()(input_ids=others, labels=labels)
    for given in (ids, others):
        with pytest.raises(ValueError, match="came with labels"):
            model.eval()(input_ids=given)
    gone = weakref.ref(others)
    del others, given
    gc.collect()
    assert gone() is None


GUESS = r"eval mode.*positions='f2\+l2'.*peft_reft.prompt_lengths\(model, lengths\)"


def test_an_input_that_is_taken_for_the_prompt_is_warned_of_once(adapt, ids):
    model, _ = adapt(positions="f2+l2")
    with pytest.warns(UserWarning, match=GUESS):
        model(input_ids=ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=ids)


QUIET = {
    "labels": lambda model, ids: model(input_ids=ids, labels=labels_of(ids, *TWO["answers"])),
    "prompt_lengths": lambda model, ids: model(input_ids=ids, prompt_lengths=torch.tensor([5, 8])),
    "generate": lambda model, ids: generated(model, ids),
    "a cache": lambda model, ids: model(input_ids=ids, past_key_values=DynamicCache(config=model.config)),
    "one token": lambda model, ids: model(input_ids=ids[:, :1]),
    "no adapter": lambda model, ids: disabled(model, ids),
    "f2": lambda model, ids: model(input_ids=ids),
    "all": lambda model, ids: model(input_ids=ids),
}


def disabled(model, ids):
    with model.disable_adapter():
        model(input_ids=ids)


@pytest.mark.parametrize("case", QUIET)
def test_what_needs_no_guess_is_not_warned_of(adapt, ids, case):
    model, _ = adapt(positions=case if case in ("f2", "all") else "f2+l2")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*eval mode")
        QUIET[case](model, ids)


PADDED = {  # columns of padding, and what f2+l2 edits
    "right": ([[10, 11], []], {"prefix": [[0, 1], [0, 1]], "suffix": [[8, 9], [10, 11]]}),
    "left": ([[0, 1, 2], [0]], {"prefix": [[3, 4], [1, 2]], "suffix": [[10, 11], [10, 11]]}),
    "both": ([[0, 11], [11]], {"prefix": [[1, 2], [0, 1]], "suffix": [[9, 10], [9, 10]]}),
    "within": ([[0, 5], [6]], {"prefix": [[1, 2], [0, 1]], "suffix": [[10, 11], [10, 11]]}),  # text that equals it
}


def padded(ids, columns, pad=0):
    ids = ids.clone()
    for row, own in enumerate(columns):
        ids[row, own] = pad
    return ids


@pytest.mark.parametrize("case", PADDED)
def test_padding_that_only_ids_tell(adapt, ids, case):
    """The columns listed here, so that a score is the same in whatever batch a row is."""
    columns, edited = PADDED[case]
    assert_edits(adapt(positions="f2+l2"), edited, input_ids=padded(ids, columns))


def test_padding_that_only_ids_tell_in_training(adapt, ids):
    model, by_hand = adapt(positions="f2+l2")
    model.train()
    given = padded(ids, [[0, 1, 2], [11]])
    edited = {"prefix": [[3, 4], [0, 1]], "suffix": [[5, 6], [6, 7]]}
    assert_edits((model, by_hand), edited, input_ids=given, prompt_lengths=torch.tensor([4, 8]))
    labels = labels_of(given, [(7, 12)], [(8, 11)])
    assert_edits((model, by_hand), edited, input_ids=given, labels=labels)


@pytest.mark.parametrize("name", ["eos_token_id", "bos_token_id"])
def test_a_padding_token_that_text_begins_or_ends_with_is_text(ids, name):
    """As where the tokenizer has none of its own, and pads with another."""
    adapted = adapt_model(make_llama(), positions="f2+l2")
    base, model = adapted[1].base, adapted[0].get_base_model()
    for part in (base, model):
        setattr(part.config, name, 0)
        setattr(part.generation_config, name, [0, 5] if name == "eos_token_id" else 0)
    whole = {"prefix": [[0, 1], [0, 1]], "suffix": [[10, 11], [10, 11]]}
    assert_edits(adapted, whole, input_ids=padded(ids, [[0, 11], [11]]))


def test_padding_of_encoders_and_classifiers_that_only_ids_tell(ids):
    """They attend to it, but it is not edited; the classifier pools the last token before it, by the same rule."""
    ids = padded(ids, [[9, 10, 11], []])
    torch.manual_seed(0)
    encoder = BertModel(BertConfig(**ENCODER, pad_token_id=0)).eval()
    model, by_hand = adapt_model(encoder, positions="l1", task_type=None)
    with torch.no_grad(), by_hand.edits({"unit": [[8], [11]]}):
        expected = by_hand.base(ids).last_hidden_state
    torch.testing.assert_close(model(ids).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    classifier = LlamaForSequenceClassification(make_llama().config).eval()
    model, by_hand = adapt_model(classifier, positions="l1", task_type="SEQ_CLS")
    expected = by_hand.logits({"unit": [[8], [11]]}, input_ids=ids)
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)
    alone = by_hand.logits({"unit": [[8]]}, input_ids=ids[:1, :9])
    torch.testing.assert_close(expected[:1], alone, atol=1e-5, rtol=1e-5)
