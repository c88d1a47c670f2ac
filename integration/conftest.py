"""A word-level tokenizer with a chat template, and data that a tiny model can learn."""

import random

import pytest
import torch
from by_hand import make_llama, random_ids
from cards import compile_template_once
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

compile_template_once()

# Marks what the assistant says, as TRL's assistant_only_loss needs it
CHAT_TEMPLATE = (
    "{% if tools %}<tools> {% for tool in tools %}{{ tool['function']['name'] }} {% endfor %}<eos> {% endif %}"
    "{% for message in messages %}<{{ message['role'] }}> "
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{% for call in message['tool_calls'] or [] %}<call> {{ call['function']['name'] }} "
    "{{ call['function']['arguments']['word'] }} {% endfor %}"
    "{% if message['content'] %}{{ message['content'] }} {% endif %}<eos>{% endgeneration %} "
    "{% else %}{{ message['content'] }} <eos> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
WORDS = [
    "red",
    "green",
    "blue",
    "one",
    "two",
    "three",
    "cat",
    "dog",
    "fox",
    "and",
    "the",
    "say",
    "twice",
    "please",
    "of",
]


@pytest.fixture
def ids() -> torch.Tensor:
    """Two rows of twelve tokens, none of them padding."""
    return random_ids()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<unk>", "<eos>", "<user>", "<assistant>", "<system>", *WORDS, "<tools>", "<tool>", "<call>"]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<eos>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, chat_template=CHAT_TEMPLATE, **special)
    return tokenizer


@pytest.fixture(scope="session")
def base(tmp_path_factory, tokenizer) -> str:
    """The folder of a tiny base model with that tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    make_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def sentences(count, shortest=4, longest=12):
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.randint(shortest, longest))) for _ in range(count)]


@pytest.fixture(scope="session")
def pairs() -> Dataset:
    """Prompts of different lengths, each with the same completion: what an edit of the prompt alone can teach."""
    return Dataset.from_list([{"prompt": text, "completion": " blue fox twice"} for text in sentences(16)])


@pytest.fixture(scope="session")
def chats() -> Dataset:
    """Conversations with two assistant turns."""
    texts = sentences(16)
    turns = lambda a, b: [  # noqa: E731
        {"role": "user", "content": a},
        {"role": "assistant", "content": "blue fox"},
        {"role": "user", "content": b},
        {"role": "assistant", "content": "red dog twice"},
    ]
    return Dataset.from_list([{"messages": turns(a, b)} for a, b in zip(texts, reversed(texts), strict=True)])
