"""The kinds of data that TRL takes: which tokens are a prompt in each, told by lists of words."""

import copy
import json

import numpy
import PIL.Image
import pytest
import torch
from by_hand import ByHand, make_llama
from datasets import Dataset
from trainers import (
    columns_alone,
    common,
    first_batch,
    logits_alone,
    losses,
    make_trainer,
    mean_loss,
    prompt_ends,
    reft,
    split,
)
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from trl import SFTConfig, SFTTrainer

TOOL = {"type": "function", "function": {"name": "twice", "description": "says it", "parameters": {"type": "object"}}}


def says(role, text, word=None):
    call = [{"type": "function", "function": {"name": "twice", "arguments": {"word": word}}}] if word else None
    return {"role": role, "content": text, "tool_calls": call}


TURNS = [says("user", "say one fox"), says("assistant", "blue fox"), says("user", "two"), says("assistant", "dog")]
CALLING = [
    says("user", "say cat please"),
    says("assistant", "", word="cat"),
    says("tool", "cat cat"),
    says("assistant", "cat and cat"),
]
SYSTEM = [says("system", "the red fox")]
CHAT = dict(assistant_only_loss=True)

# the sample, options of the trainer, the expected answers
KINDS = {
    "prompt-completion": (
        {"prompt": "say one fox please", "completion": " red dog"},
        {},
        ["red dog <eos>"],
    ),
    "conversational prompt-completion": (
        {"prompt": TURNS[:3], "completion": TURNS[3:]},
        {},
        ["dog <eos>"],
    ),
    "conversational prompt-completion, answers alone": (
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        CHAT,
        ["blue fox <eos>", "dog <eos>"],
    ),
    "several turns": ({"messages": TURNS}, CHAT, ["blue fox <eos>", "dog <eos>"]),
    "system message": ({"messages": SYSTEM + TURNS}, CHAT, ["blue fox <eos>", "dog <eos>"]),
    "tools": (
        {"messages": SYSTEM + CALLING, "tools": json.dumps([TOOL])},
        CHAT,
        ["<call> twice cat <eos>", "cat and cat <eos>"],
    ),
    "tools, prompt-completion": (
        {"prompt": CALLING[:3], "completion": CALLING[3:], "tools": json.dumps([TOOL])},
        {},
        ["cat and cat <eos>"],
    ),
    "from labels": (
        {"input_ids": [6, 7, 8, 9, 10, 11, 12, 13], "labels": [-100] * 5 + [11, 12, 13]},
        {},
        ["three cat dog"],
    ),
    "from a completion mask": (
        {"input_ids": [6, 7, 8, 9, 10, 11, 12, 13], "completion_mask": [0] * 4 + [1] * 4},
        dict(completion_only_loss=True),
        ["two three cat dog"],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_precedes_each_answer_is_edited(tmp_path, base, tokenizer, kind):
    sample, options, answers = KINDS[kind]
    config = reft(init_weights=False)
    trainer = make_trainer(base, tmp_path, Dataset.from_list([sample] * 4), tokenizer, None, config, **options)
    batch = first_batch(trainer)
    sequences = split(batch)
    for ids, labels in sequences:
        words = tokenizer.convert_ids_to_tokens(ids[0])
        ends = prompt_ends(labels)
        assert len(ends) == len(answers)
        for end, answer in zip(ends, answers, strict=True):
            assert " ".join(words[end:]).startswith(answer)
            assert words[end - 1] == "<assistant>" or "input_ids" in sample or isinstance(sample["prompt"], str)
    assert ("<tools>" in words) == ("tools" in sample) and ("<system>" in words) == (
        "several" not in kind and "messages" in sample
    )
    by_hand = ByHand(make_llama(), trainer.model)
    expected = mean_loss(logits_alone(by_hand, sequences), sequences)
    found = trainer.compute_loss(trainer.model.train(), dict(batch))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with trainer.model.disable_adapter(), torch.no_grad():
        assert abs(trainer.compute_loss(trainer.model, dict(batch)) - expected) > 1e-3


@pytest.mark.parametrize("positions", ["f2", "all", "l2", "f2+l2", "prompt"])
def test_loss_on_the_prompt_too(tmp_path, base, tokenizer, pairs, positions):
    """completion_only_loss=False hides where prompts end: first tokens and all can be edited, last ones not."""
    config = reft(positions=positions, init_weights=False)
    trainer = make_trainer(base, tmp_path, pairs, tokenizer, None, config, completion_only_loss=False)
    if positions not in ("f2", "all"):
        with pytest.raises(ValueError, match=f"'{positions[:2]}.*first token on.*completion_only_loss"):
            trainer.train()
        return
    batch = first_batch(trainer)
    sequences = split(batch)
    columns = [0, 1] if positions == "f2" else list(range(99))
    by_hand = ByHand(make_llama(), trainer.model)
    expected = mean_loss(logits_alone(by_hand, sequences, lambda labels: {"unit": [columns]}), sequences)
    found = trainer.compute_loss(trainer.model.train(), batch)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# Vision-language data: the tokens of an image belong to the prompt

SIZE = {"height": 8, "width": 8}
IMAGE_TOKENS = 4  # an image of 8 x 8 in patches of 4 x 4
VISION_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> "
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'][0]['text'] }} <eos>"
    "{% endgeneration %} {% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}<eos> {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)


@pytest.fixture(scope="module")
def processor(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return LlavaProcessor(
        CLIPImageProcessorPil(size=SIZE, crop_size=SIZE),  # the one that needs no torchvision
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VISION_TEMPLATE,
    )


def make_llava(processor):
    torch.manual_seed(0)
    vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config = LlavaConfig(
        text_config=make_llama(layers=2).config,
        vision_config=CLIPVisionConfig(image_size=8, patch_size=4, projection_dim=16, **vision),
        image_token_id=processor.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=IMAGE_TOKENS,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    for projection in model.model.multi_modal_projector.parameters():
        torch.nn.init.normal_(projection, std=0.5)  # so that images are seen
    return model


def picture(number):
    return PIL.Image.fromarray(numpy.random.default_rng(number).integers(0, 255, (9, 12, 3), dtype=numpy.uint8))


VISION_KINDS = {
    "prompt-completion": (
        lambda text: {"prompt": f"<image> {text}", "completion": " red dog <eos>"},
        {},
        ["red dog <eos>"],
    ),
    "image at the end": (
        lambda text: {"prompt": f"{text} <image>", "completion": " red dog <eos>"},
        {},
        ["red dog <eos>"],
    ),
    "conversational prompt-completion": (
        lambda text: {"prompt": [says("user", text)], "completion": [says("assistant", "blue fox")]},
        {},
        ["blue fox <eos>"],
    ),
    "several turns": (
        lambda text: {"messages": [says("user", text), *TURNS[1:]]},
        CHAT,
        ["blue fox <eos>", "dog <eos>"],
    ),
}


@pytest.mark.parametrize("kind", VISION_KINDS)
def test_images_are_part_of_the_prompt(tmp_path, processor, kind):
    sample, options, answers = VISION_KINDS[kind]
    rows = [sample(text) | {"images": [picture(n)]} for n, text in enumerate(("say", "one two three", "fox", "cat"))]
    for row in rows:  # as users write them
        for message in row.get("messages", []):
            message.pop("tool_calls", None)
    base = make_llava(processor)
    trainer = SFTTrainer(
        copy.deepcopy(base),
        SFTConfig(**common(tmp_path, max_length=None, **options)),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
        peft_config=reft(positions="f2+l2", init_weights=False),
    )
    batch = first_batch(trainer)
    assert batch["pixel_values"].shape == (4, 3, 8, 8)
    sequences = split(batch)
    by_hand = ByHand(base, trainer.model)
    assert all("language_model.layers" in block for block in by_hand.tensors) and len(by_hand.tensors) == 2
    logits = []
    for number, (ids, labels) in enumerate(sequences):
        words = processor.tokenizer.convert_ids_to_tokens(ids[0])
        ends = prompt_ends(labels)
        assert words.count("<image>") == IMAGE_TOKENS and ends[0] > IMAGE_TOKENS
        assert all(" ".join(words[end:]).startswith(answer) for end, answer in zip(ends, answers, strict=True))
        inputs = dict(input_ids=ids, pixel_values=batch["pixel_values"][number, None])
        logits.append(by_hand.logits(columns_alone(labels), **inputs))
        inputs["pixel_values"] = -inputs["pixel_values"]
        assert (by_hand.logits(columns_alone(labels), **inputs) - logits[-1]).abs().max() > 1e-3
    expected = mean_loss(logits, sequences)
    found = trainer.compute_loss(trainer.model.train(), dict(batch))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with trainer.model.disable_adapter(), torch.no_grad():
        assert abs(trainer.compute_loss(trainer.model, dict(batch)) - expected) > 1e-3
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
