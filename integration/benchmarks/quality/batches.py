"""Examples as tokens, and batches of them, the same for all contenders. Needs torch alone."""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .data import Example


@dataclass(frozen=True)
class Sample:
    """The tokens of an example.

    Attributes:
        ids (`list[int]`): the prompt, and the answer with the token that ends it.
        prompt (`int`): how many of them are the prompt.
        label (`int`): a classifier's, or the index of the right choice.
        fork (`int`): where, in the answer, the choices begin to differ.
        rivals (`list[int]`): the token that each choice has there.
    """

    ids: list[int]
    prompt: int
    label: int = -1
    fork: int = 0
    rivals: list[int] = field(default_factory=list)


def encode(tokenizer: Any, example: Example) -> Sample:
    """The tokens of an example; prompt and answer are tokenized apart, as they are in use."""
    prompt = tokenizer(example.prompt)["input_ids"]
    if not example.answer:
        return Sample(prompt, len(prompt), int(example.gold))
    answer = answer_ids(tokenizer, example.answer)
    if not example.choices:
        return Sample(prompt + answer, len(prompt))
    choices = [answer_ids(tokenizer, choice) for choice in example.choices]
    fork = next(at for at, tokens in enumerate(zip(*choices, strict=False)) if len(set(tokens)) > 1)
    rivals = [choice[fork] for choice in choices]
    if len(set(rivals)) < len(rivals):
        raise ValueError(f"The choices {example.choices} do not all differ in the first token in which any two do.")
    return Sample(prompt + answer, len(prompt), int(example.gold), fork, rivals)


def answer_ids(tokenizer: Any, answer: str) -> list[int]:
    return [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


@dataclass(frozen=True)
class Batch:
    """Samples side by side.

    Attributes:
        input_ids, attention_mask (`torch.LongTensor`): of shape [batch, tokens].
        prompt_lengths (`torch.LongTensor`): of shape [batch].
        answer (`torch.BoolTensor`): of shape [batch, tokens], where the next token is one of the answer.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    prompt_lengths: torch.Tensor
    answer: torch.Tensor

    def targets(self) -> torch.Tensor:
        """The tokens of all answers, row after row, [answer tokens]."""
        return self.input_ids.roll(-1, dims=1)[self.answer]


def collate(samples: Sequence[Sample], pad: int, device: torch.device) -> Batch:
    """Samples with their answers, padded on the right."""
    rows = [torch.tensor(sample.ids) for sample in samples]
    columns = torch.arange(max(map(len, rows)))[None]  # [1, tokens]
    lengths = torch.tensor([len(row) for row in rows])[:, None]  # [batch, 1]
    prompts = torch.tensor([sample.prompt for sample in samples])
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    answer = (columns >= prompts[:, None] - 1) & (columns < lengths - 1)
    return Batch(*(tensor.to(device) for tensor in (ids, (columns < lengths).long(), prompts, answer)))


def collate_prompts(samples: Sequence[Sample], pad: int, device: torch.device) -> Batch:
    """Prompts to generate from, padded on the left."""
    rows = [torch.tensor(sample.ids[: sample.prompt]) for sample in samples]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left")
    prompts = torch.tensor([sample.prompt for sample in samples])
    mask = torch.arange(ids.shape[1])[None] >= ids.shape[1] - prompts[:, None]
    return Batch(*(tensor.to(device) for tensor in (ids, mask.long(), prompts, torch.zeros_like(mask))))


def draw_batches(samples: Sequence[Sample], batch_size: int, epochs: int, seed: int) -> list[list[int]]:
    """The rows of each batch, in the order of training: shuffled, rows of much the same length together."""
    draw, batches = random.Random(seed), []
    for _ in range(epochs):
        rows = list(range(len(samples)))
        draw.shuffle(rows)
        epoch = []
        for start in range(0, len(rows), 8 * batch_size):
            near = sorted(rows[start : start + 8 * batch_size], key=lambda row: len(samples[row].ids))
            epoch += [near[at : at + batch_size] for at in range(0, len(near), batch_size)]
        draw.shuffle(epoch)
        batches += epoch
    return batches


def by_length(samples: Sequence[Sample], batch_size: int) -> list[list[int]]:
    """All rows in batches with little padding, to be evaluated."""
    rows = sorted(range(len(samples)), key=lambda row: len(samples[row].ids))
    return [rows[at : at + batch_size] for at in range(0, len(rows), batch_size)]


def digest(batches: Sequence[Batch]) -> str:
    """What tells whether two trainings saw the same tokens in the same order."""
    found = hashlib.sha256()
    for batch in batches:
        found.update(json.dumps(batch.input_ids.tolist()).encode())
    return found.hexdigest()[:16]
