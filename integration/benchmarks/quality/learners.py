"""The contenders: a base that computes with an adapter, by PEFT or by the reference implementation."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import register_parametrization
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging

from .batches import Batch
from .job import Job

HEAD = ("pooler", "classifier")  # a dense layer and the logits, as the head of the paper's RoBERTa has

logging.set_verbosity_error()  # that the head is new is said at every load
logging.disable_progress_bar()


class Learner:
    """The untouched base; of a classifier the head is trained.

    Attributes:
        model (`nn.Module`): what computes; what is trained is what requires gradients.
        base (`nn.Module`): the transformers model within.
    """

    def __init__(self, base: Any):
        self.base = self.model = base

    def train(self, mode: bool) -> None:
        """Switch all that computes between training and evaluation."""
        self.model.train(mode)

    def inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        """What the model's forward is told of prompts with answers."""
        return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}

    def labels(self, batch: Batch) -> torch.Tensor:
        """A classifier's logits, [batch, labels]."""
        return self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits

    def answers(self, batch: Batch) -> torch.Tensor:
        """The logits of the tokens of all answers, [answer tokens, vocabulary]."""
        with at_positions(self.base, batch.answer):
            return self.model(**self.inputs(batch), use_cache=False).logits

    def generate(self, batch: Batch, **options: Any) -> torch.Tensor:
        """What follows each prompt, [batch, new tokens]."""
        tokens = self.model.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **options)
        return tokens[:, batch.input_ids.shape[1] :]


@contextmanager
def at_positions(base: Any, where: torch.Tensor) -> Iterator[None]:
    """Have the head of a language model compute logits at some tokens alone: a vocabulary can be half of the work."""
    head = base.get_output_embeddings()
    forward = head.forward
    head.forward = lambda hidden_states: forward(hidden_states[where])  # no hook: pyvene removes those of others
    try:
        yield
    finally:
        del head.forward


class WithPeft(Learner):
    """LoRA by PEFT."""

    def __init__(self, base: Any, config: Any):
        from peft import get_peft_model

        super().__init__(base)
        self.model = get_peft_model(base, config)


class WithReft(WithPeft):
    """ReFT by this package, which is told where the prompts end.

    Args:
        mixed (`Sequence[str]`): the parameters, R or W, that are trained in a basis that mixes all coordinates of
            hidden states, as the reference's R is. They start from the same values.
    """

    def __init__(self, base: Any, config: Any, mixed: Sequence[str] = ()):
        from peft_reft.edits.intervention import Intervention

        super().__init__(base, config)
        for unit in [module for module in self.model.modules() if isinstance(module, Intervention)]:
            for name in mixed:
                register_parametrization(unit, f"_{name}", MixedBasis(unit.d).to(base.device))

    def inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        return super().inputs(batch) | {"prompt_lengths": batch.prompt_lengths}


class MixedBasis(nn.Module):
    """The rows of a matrix in a random basis of their space, the same for all matrices of a width."""

    basis: torch.Tensor

    def __init__(self, width: int):
        super().__init__()
        free = torch.randn(width, width, generator=torch.Generator().manual_seed(0))
        self.register_buffer("basis", torch.linalg.qr(free).Q)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows @ self.basis

    def right_inverse(self, rows: torch.Tensor) -> torch.Tensor:
        return rows @ self.basis.mT


def make_base(job: Job) -> Any:
    """The base, frozen but for the head of a classifier, of which the seed draws what was not pretrained."""
    if job.scoring != "label":
        base = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
        return base.requires_grad_(False).to(job.device)  # type: ignore[arg-type]
    base = AutoModelForSequenceClassification.from_pretrained(
        job.model, num_labels=job.num_labels, dtype=torch.float32
    )
    base.requires_grad_(False)
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(is_head(name))
    draw = torch.Generator().manual_seed(job.seed)  # the same whatever the version of transformers
    for module in base.classifier.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02, generator=draw)
            nn.init.zeros_(module.bias)
    return base.to(job.device)


def is_head(name: str) -> bool:
    """Whether a parameter belongs to a classifier's head."""
    return any(part in name.split(".") for part in HEAD)


def make_learner(job: Job) -> Learner:
    """A contender before it is trained."""
    base = make_base(job)
    torch.manual_seed(job.seed)
    options = dict(job.contender)
    method = options.pop("method")
    if method == "base":
        return Learner(base)
    if method == "pyreft":
        from .reference import WithPyreft

        return WithPyreft(base, **options)
    task_type = "SEQ_CLS" if job.scoring == "label" else "CAUSAL_LM"
    options |= {"task_type": task_type, "modules_to_save": list(HEAD) if job.scoring == "label" else None}
    if method == "reft":
        from peft_reft import ReftConfig

        mixed = options.pop("mixed", ())
        return WithReft(base, ReftConfig(**options), mixed)
    from peft import LoraConfig

    return WithPeft(base, LoraConfig(**options, exclude_modules=rf".*\b({'|'.join(HEAD)})\b.*"))


def count_trained(learner: Learner) -> tuple[int, int]:
    """The trained parameters of the adapter, and those of the head."""
    trained = {name: p.numel() for name, p in learner.model.named_parameters() if p.requires_grad}
    head = sum(count for name, count in trained.items() if is_head(name))
    return sum(trained.values()) - head, head
