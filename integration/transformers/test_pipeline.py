"""pipeline("text-generation") with an adapted model: the tokens of each prompt alone, by hand."""

import copy

import pytest
import torch
from by_hand import ByHand
from peft import get_peft_model
from transformers import LlamaForCausalLM, pipeline

from peft_reft import ReftConfig

PROMPTS = [
    "red fox and the dog",
    "say blue twice please say",
    "one two three",
    "the cat of the fox and the dog please",
]
OPTIONS = dict(do_sample=False, max_new_tokens=5, return_tensors=True)


@pytest.fixture(params=["PeftModel", "load_adapter", "folder"])
def adapted(request, base, tokenizer, tmp_path):
    """What a pipeline is given for its model, and the same by hand."""
    torch.manual_seed(1)
    config = ReftConfig(task_type="CAUSAL_LM", r=4, positions="f2+l2", init_weights=False)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config).eval()
    by_hand = ByHand(LlamaForCausalLM.from_pretrained(base).eval(), model)
    if request.param == "PeftModel":
        return model, by_hand
    model.save_pretrained(tmp_path)
    if request.param == "folder":
        return str(tmp_path), by_hand
    model = LlamaForCausalLM.from_pretrained(base)
    model.load_adapter(str(tmp_path))
    return model, by_hand


def by_hand_alone(by_hand, tokenizer, text):
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    end = ids.shape[1]
    n = min(2, end // 2)  # the prompt of three tokens is edited at the first and at the last two
    columns = {"prefix": [[*range(n)]], "suffix": [[*range(max(end - 2, n), end)]]}
    found = by_hand.generate(columns, ids, new_tokens=5)
    assert not torch.equal(found, by_hand.generate({"prefix": [[]], "suffix": [[]]}, ids, new_tokens=5))
    return found[0].tolist()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_prompts(adapted, tokenizer, batch_size):
    model, by_hand = adapted
    generator = pipeline("text-generation", model=model, tokenizer=copy.deepcopy(tokenizer), device="cpu")
    found = generator(PROMPTS, batch_size=batch_size, eos_token_id=99, **OPTIONS)  # no token ends a sequence
    for text, [output] in zip(PROMPTS, found, strict=True):
        tokens = [token for token in output["generated_token_ids"] if token != tokenizer.pad_token_id]
        expected = by_hand_alone(by_hand, tokenizer, text)
        assert tokens == [token for token in expected if token != tokenizer.pad_token_id]


def test_conversations(adapted, tokenizer):
    """The prompt is the conversation so far with the beginning of the answer."""
    model, by_hand = adapted
    generator = pipeline("text-generation", model=model, tokenizer=copy.deepcopy(tokenizer), device="cpu")
    chat = [
        {"role": "system", "content": "say red"},
        {"role": "user", "content": "one two"},
        {"role": "assistant", "content": "blue fox"},
        {"role": "user", "content": "three cat"},
    ]
    [output] = generator(chat, eos_token_id=99, **OPTIONS)
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert output["generated_token_ids"] == by_hand_alone(by_hand, tokenizer, text)
