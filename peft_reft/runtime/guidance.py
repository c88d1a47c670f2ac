"""Classifier-free guidance: a logits processor that asks the model about a second prompt."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import ClassifierFreeGuidanceLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor
from transformers.generation.logits_process import DiaClassifierFreeGuidanceLogitsProcessor

from .generate import current_generation

IN_ONE_BATCH = (ClassifierFreeGuidanceLogitsProcessor, DiaClassifierFreeGuidanceLogitsProcessor)


class PromptOfGuidance:
    """The model that guidance asks, told where the second prompt ends.

    Without a cache guidance gives the model all tokens so far, and only the first of its forwards tells the prompt.

    Args:
        model (`PreTrainedModel`): the model.
        names (`tuple[str, ...]`, *optional*): the adapter of each prompt, where they differ.
    """

    def __init__(self, model: Any, names: tuple[str, ...] | None):
        self.model, self.names = model, names
        self.lengths: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Any) -> Any:
        if self.lengths is None:
            self.lengths = attention_mask.sum(1)
        if kwargs.get("past_key_values") is None:
            kwargs["prompt_lengths"] = self.lengths
        if self.names is not None:
            rows = len(input_ids) // len(self.names)
            kwargs["adapter_names"] = [name for name in self.names for _ in range(rows)]
        return self.model(input_ids, attention_mask=attention_mask, **kwargs)


def guide_by_prompts(model: Any, method: Callable[..., Any], args: tuple, kwargs: dict[str, Any], is_own: bool) -> Any:
    """Run `_get_logits_processor` of an adapted model, and have guidance tell where its own prompt ends.

    Args:
        model (`PreTrainedModel`): the model.
        method: the method, which is given the model first.
        args, kwargs: the other arguments.
        is_own (`bool`): whether it is that of the model's class, not one that was put on the model.

    Raises:
        ValueError: if guidance runs the second prompt in the same forward as the first.
    """
    processors = method(model, *args, **kwargs)
    generation = current_generation()
    if generation is None or generation.model is not model:
        return processors
    for processor in processors:
        if isinstance(processor, IN_ONE_BATCH):
            raise ValueError(
                f"guidance_scale={processor.guidance_scale}: {type(model).__name__} runs the second prompt of "
                "classifier-free guidance in the rows of the first, which ReFT does not tell apart. Generate without "
                "it, or with the adapter unloaded."
            )
        if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor) and processor.model is model:
            mixed_batch = generation.mixed_batch
            processor.model = PromptOfGuidance(model, None if mixed_batch is None else mixed_batch.names)
    return processors
