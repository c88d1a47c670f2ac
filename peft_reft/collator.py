"""Data collators that tell where prompts end."""

from collections.abc import Callable, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from .positions.prompts import IGNORED_LABEL, answer_starts, ranks, sequence_ids


@dataclass
class DataCollatorWithPromptLengths:
    """Adds `prompt_lengths` to the batches of another data collator, or raises an error.

    Trainers of transformers and TRL add them by themselves, to batches where one length a row can say where prompts
    end. This one is for loops of your own, and for a trainer that shall refuse all other batches:

    ```py
    >>> loader = DataLoader(dataset, batch_size=8, collate_fn=DataCollatorWithPromptLengths(collator))
    ```

    Args:
        collator (`Callable`): the data collator, whose batches have `labels` (-100 on the prompt), or a
            `completion_mask` (0 on the prompt) as those of TRL's preference trainers. They need an `attention_mask` if
            rows begin with padding.
    """

    collator: Callable[..., MutableMapping[str, Any]]

    def __call__(self, features: Any, *args: Any, **kwargs: Any) -> MutableMapping[str, Any]:
        """Return the batch of the wrapped collator, with `prompt_lengths` (`torch.LongTensor` [batch])."""
        batch = self.collator(features, *args, **kwargs)
        batch["prompt_lengths"] = find_prompt_lengths(batch)
        return batch


@dataclass
class PromptLengthsAdder:
    """Adds `prompt_lengths` to the batches of a trainer's data collator where it can, and leaves the others alone.

    Args:
        collator (`Callable`): the data collator.
        is_finding (`bool`): whether lengths are read off labels and completion masks. Those that the data set has as a
            column of its own stay in the batch in any case.
    """

    collator: Callable[..., Any]
    is_finding: bool = True

    def __call__(self, features: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the batch of the wrapped collator, with `prompt_lengths` [batch] if they are known."""
        rows = [row for row in features if isinstance(row, Mapping)] if isinstance(features, list) else []
        given = [row["prompt_lengths"] for row in rows if "prompt_lengths" in row]  # which the collator may take away
        batch = self.collator(features, *args, **kwargs)
        if not isinstance(batch, MutableMapping) or "prompt_lengths" in batch:
            return batch
        ids = batch.get("input_ids")
        if given and isinstance(ids, torch.Tensor) and len(given) == len(ids):
            batch["prompt_lengths"] = torch.as_tensor(given)
        elif self.is_finding and batch.get("attention_mask") is not None:  # or padding might be taken for a prompt
            with suppress(ValueError):  # the labels tell, as far as anything does
                batch["prompt_lengths"] = find_prompt_lengths(batch)
        return batch


def find_prompt_lengths(batch: MutableMapping[str, Any]) -> torch.Tensor:
    """Return the number of tokens before the answer in each row of a batch. Padding is not counted.

    Returns:
        `torch.LongTensor` [batch].

    Raises:
        ValueError: if one length a row cannot say where the prompts are.
    """
    ids: Any = batch.get("input_ids")
    labels: Any = batch.get("labels")
    mask, completion_mask = batch.get("attention_mask"), batch.get("completion_mask")
    if labels is None and isinstance(completion_mask, torch.Tensor):
        labels = completion_mask.masked_fill(completion_mask == 0, IGNORED_LABEL)
    given = [ids, labels] if mask is None else [ids, labels, mask]
    if not all(isinstance(tensor, torch.Tensor) and tensor.shape == given[0].shape for tensor in given):
        shapes = {name: list(value.shape) for name, value in batch.items() if isinstance(value, torch.Tensor)}
        raise ValueError(
            f"The data collator gave {shapes}, from which prompt_lengths cannot be told: it must give input_ids and, "
            "of the same shape, labels with -100 on the prompt or a completion_mask with 0 on it, and no other "
            "attention_mask."
        )
    valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    sequences = sequence_ids(batch, valid)
    if sequences is not None and (sequences != sequences[:, :1])[valid].any():
        raise ValueError(
            "The data collator gave rows that hold several sequences, for which one prompt length a row cannot do. "
            "Train without packing and padding_free, or override compute_loss so that the model is called with the "
            "labels."
        )
    rank, starts = ranks(valid, None), answer_starts((labels != IGNORED_LABEL) & valid, valid)
    if (starts & (rank == 0)).any():
        raise ValueError(
            "The data collator gave a row with labels from its first token on, so that it has no prompt. Give labels "
            "of -100 to the prompt (TRL: prompt-completion data with completion_only_loss)."
        )
    if (starts.sum(1) > 1).any():
        raise ValueError(
            "The data collator gave a row with several answers, as of a conversation with assistant_only_loss, for "
            "which one prompt length a row cannot do. Make each turn a sample of its own, with what precedes it as "
            "the prompt, or override compute_loss so that the model is called with the labels."
        )
    return rank.masked_fill(~starts, ids.shape[1]).amin(1).minimum(valid.sum(1))
