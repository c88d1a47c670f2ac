"""Classifier-free guidance edits its own prompt, compared with two base models by hand."""

import pytest
import torch
from by_hand import MASK, ByHand, generated
from transformers import AutoConfig, MusicgenForCausalLM

from peft_reft import ReftConfig

COLUMNS = {"prefix": [[0, 1], [4, 5]], "suffix": [[10, 11], [10, 11]]}  # of the first prompts, by f2+l2


def guided(prompts, scale, new_tokens=5):
    """Greedy decoding by classifier-free guidance without a cache, by hand.

    Args:
        prompts: the prompt and the second one, each as (by hand, columns, ids, mask).
        scale: of the guidance.
    """
    answers = torch.empty(len(prompts[0][2]), 0, dtype=torch.long)
    for _ in range(new_tokens):
        scores = []
        for by_hand, columns, prompt, mask in prompts:
            tokens = torch.cat([prompt, answers], dim=1)
            mask = torch.cat([mask, torch.ones_like(answers)], dim=1)
            scores.append(by_hand.logits(columns, input_ids=tokens, attention_mask=mask)[:, -1].log_softmax(-1))
        best = (scale * (scores[0] - scores[1]) + scores[1]).argmax(-1, keepdim=True)
        answers = torch.cat([answers, best], dim=1)
    return torch.cat([prompts[0][2], answers], dim=1)


# The second prompt: its length, the columns of its edits, and its mask
SECOND_PROMPTS = {
    "the last token": (None, {"prefix": [[], []], "suffix": [[0], [0]]}, None),
    "negative": (7, {"prefix": [[0, 1], [0, 1]], "suffix": [[5, 6], [5, 6]]}, None),
    "padded": (7, {"prefix": [[0, 1], [3, 4]], "suffix": [[5, 6], [5, 6]]}, [[1] * 7, [0] * 3 + [1] * 4]),
}


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("second", SECOND_PROMPTS)
def test_classifier_free_guidance(adapt, ids, second, use_cache):
    """It asks the model about a second prompt, which is edited at its own tokens in every step."""
    model, by_hand = adapt(positions="f2+l2")
    length, columns, mask = SECOND_PROMPTS[second]
    negative = ids.flip(1)[:, :length] if length else ids[:, -1:]
    options = dict(guidance_scale=1.7, use_cache=use_cache, max_new_tokens=5)
    if length:
        options["negative_prompt_ids"] = negative
    if mask:
        options["negative_prompt_attention_mask"] = torch.tensor(mask)
    mask = torch.tensor(mask) if mask else torch.ones_like(negative)

    first = by_hand, COLUMNS, ids, MASK
    expected = guided([first, (by_hand, columns, negative, mask)], 1.7)
    assert torch.equal(generated(model, ids, **options), expected)
    nowhere = {"prefix": [[], []], "suffix": [[], []]}
    assert not torch.equal(guided([first, (by_hand, nowhere, negative, mask)], 1.7), expected)
    assert not torch.equal(guided([first, first], 1.7), expected)


@pytest.mark.parametrize("use_cache", [True, False])
def test_guidance_by_an_adapter_for_each_row(adapt, ids, use_cache):
    model, by_hand = adapt(positions="f2+l2")
    model.add_adapter("other", ReftConfig(task_type="CAUSAL_LM", r=2, positions="l3", init_weights=False))
    other, negative = ByHand(by_hand.base, model, "other"), ids.flip(1)[:, :7]
    options = dict(guidance_scale=1.7, negative_prompt_ids=negative, use_cache=use_cache, max_new_tokens=5)
    found = generated(model, ids, adapter_names=["default", "other"], **options)
    for row, (each, first, second) in enumerate(
        (
            (by_hand, {"prefix": [[0, 1]], "suffix": [[10, 11]]}, {"prefix": [[0, 1]], "suffix": [[5, 6]]}),
            (other, {"unit": [[9, 10, 11]]}, {"unit": [[4, 5, 6]]}),
        )
    ):
        own, own_mask, own_negative = ids[row : row + 1], MASK[row : row + 1], negative[row : row + 1]
        prompts = [(each, first, own, own_mask), (each, second, own_negative, torch.ones_like(own_negative))]
        assert torch.equal(found[row : row + 1], guided(prompts, 1.7))


def make_musicgen():
    torch.manual_seed(0)
    shape = dict(num_hidden_layers=2, hidden_size=32, ffn_dim=64, num_attention_heads=4)
    special = dict(pad_token_id=0, bos_token_id=0, eos_token_id=None)
    decoder = AutoConfig.for_model("musicgen_decoder", vocab_size=64, num_codebooks=1, **shape, **special)
    return MusicgenForCausalLM(decoder).eval()


def test_guidance_in_one_batch_is_refused(adapt, ids):
    """The second prompts follow the first in the same forward, and are none that `generate` was given."""
    model, _ = adapt(make_musicgen)
    with pytest.raises(ValueError, match="guidance_scale=2.*MusicgenForCausalLM runs the second prompt"):
        model.generate(input_ids=ids, guidance_scale=2.0, max_new_tokens=2, decoder_start_token_id=0)
