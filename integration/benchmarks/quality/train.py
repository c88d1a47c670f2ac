"""The training and the evaluation of one contender, in plain PyTorch: the same loop whatever the library."""

import gc
import time
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import torch
from measure import machine, peak_memory
from torch.nn.functional import cross_entropy
from transformers import get_linear_schedule_with_warmup

from .batches import Batch, Sample, by_length, collate, collate_prompts, digest
from .job import Job
from .learners import Learner, count_trained, make_learner
from .metrics import HIGHER_IS_BETTER, summarize


def run(job: Job) -> dict[str, Any]:
    """Train with each learning rate, and test what is best on the validation part.

    Returns:
        `dict`: the learning rate, the summaries of all on the validation part, with the best the losses of each part's
        rows and what the model makes of each test set, and what training took.
    """
    torch.set_num_threads(job.threads)
    search = Search(job)
    best = search.climb()
    learner, trained = search.learner, search.trained
    if trained:
        trained["peak_memory"] = peak_memory(lambda: largest_step(learner, job), job.device)
    tests = {name: evaluate(learner, job, samples, generating=True) for name, samples in job.tests.items()}
    losses = {name: outcome["losses"] for name, outcome in tests.items() if "losses" in outcome}
    losses["validation"] = search.outcome["losses"]
    adapter, head = count_trained(learner)
    found = {"learning_rate": best, "validation": search.found, "losses": losses, "tests": tests, "machine": machine()}
    return found | {"trainable_parameters": adapter, "head_parameters": head} | trained


class Search:
    """The best learning rate of a grid, taken to have one summit: from the middle on towards what is better.

    Of four rates three are tried. The learner of the best so far is kept.

    Attributes:
        found (`dict[str, dict[str, float]]`): by learning rate, the metrics on the validation part.
        learner (`Learner`), outcome, trained (`dict`): of the best, and what `evaluate` and `train` tell of it.
    """

    def __init__(self, job: Job):
        self.job = job
        self.rates = sorted(job.learning_rates) or [0.0]  # 0: nothing to train
        self.found: dict[str, dict[str, float]] = {}
        self.ranks: dict[int, tuple[float, ...]] = {}
        self.learner: Learner
        self.outcome: dict[str, Any]
        self.trained: dict[str, Any]

    def climb(self) -> float:
        last = len(self.rates) - 1
        best = max(last // 2, len(self.rates) // 2, key=self.rank)
        while self.rank(better := max(max(best - 1, 0), min(best + 1, last), key=self.rank)) > self.rank(best):
            best = better
        return self.rates[best]

    def rank(self, at: int) -> tuple[float, ...]:
        """How good a learning rate is; it is trained with when that is first asked."""
        if at not in self.ranks:
            job, rate = self.job, self.rates[at]
            learner = make_learner(job)
            trained = train(learner, job, rate) if job.learning_rates else {}
            outcome = evaluate(learner, job, job.validation, generating=False)
            found = summarize(validated_by(job), outcome, [sample.label for sample in job.validation])
            self.found[str(rate)] = found
            rank = ranking(job, found)
            if not self.ranks or rank > max(self.ranks.values()):
                self.learner, self.outcome, self.trained = learner, outcome, trained
            self.ranks[at] = rank
            del learner
            gc.collect()
        return self.ranks[at]


def validated_by(job: Job) -> str:
    """The scoring of the validation part, where nothing is generated."""
    return "loss" if job.scoring == "number" else job.scoring


def ranking(job: Job, found: dict[str, float]) -> tuple[float, ...]:
    """What is greater for the better of two; the loss decides between equals, and those that diverged are last."""
    if found["loss"] != found["loss"]:
        return (-float("inf"),)
    metric = job.metric if job.metric in found else "loss"
    return (found[metric] if HIGHER_IS_BETTER[metric] else -found[metric], -found["loss"])


# Training


def train(learner: Learner, job: Job, rate: float) -> dict[str, Any]:
    """Train a contender, and tell the seconds a step, the loss and what it has seen."""
    torch.manual_seed(job.seed)
    learner.train(True)
    parameters = [p for p in learner.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=job.weight_decay)
    steps = len(job.batches)
    schedule = get_linear_schedule_with_warmup(optimizer, round(steps * job.warmup_ratio), steps)
    seconds, losses, seen = [], [], []
    for rows in job.batches:
        samples = [job.train[row] for row in rows]
        batch = collate(samples, job.pad, torch.device(job.device))
        began = time.perf_counter()
        loss = loss_of(learner, job, batch, samples)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - began)
        seen.append(batch)
    return {
        "steps": steps,
        "seconds_a_step": median(seconds),
        "training_loss": sum(losses[-10:]) / len(losses[-10:]),
        "batches": digest(seen),
    }


def loss_of(learner: Learner, job: Job, batch: Batch, samples: Sequence[Sample]) -> torch.Tensor:
    if job.scoring == "label":
        labels = torch.tensor([sample.label for sample in samples], device=job.device)
        return cross_entropy(learner.labels(batch), labels)
    return cross_entropy(learner.answers(batch), batch.targets())


def largest_step(learner: Learner, job: Job) -> None:
    """Forward and backward of the batch with the longest row."""
    learner.train(True)
    batches = ([job.train[row] for row in rows] for rows in job.batches)
    samples = max(batches, key=lambda samples: max(len(sample.ids) for sample in samples))
    loss_of(learner, job, collate(samples, job.pad, torch.device(job.device)), samples).backward()
    learner.model.zero_grad()


# Evaluation


@torch.no_grad()
def evaluate(learner: Learner, job: Job, samples: Sequence[Sample], generating: bool) -> dict[str, Any]:
    """What a contender makes of samples.

    Returns:
        `dict`: the loss; by sample `"losses"` (their sum over the answer's tokens, and how many these are), and where
        the scoring is about them `"predicted"` (the likeliest label or choice), `"exact"` (whether greedy decoding
        gives the answer, token by token), `"generated"` (tokens).
    """
    learner.train(False)
    batches = by_length(samples, job.evaluation_batch_size)
    rows = [row for batch in batches for row in batch]
    found: dict[str, list[Any]] = {"losses": [], "predicted": [], "exact": [], "generated": []}
    for batch in batches:
        chosen = [samples[row] for row in batch]
        if job.scoring == "number" and generating:
            found["generated"] += generate(learner, job, chosen)
        elif job.scoring == "label":
            logits = learner.labels(collate(chosen, job.pad, torch.device(job.device)))
            labels = torch.tensor([sample.label for sample in chosen], device=logits.device)
            found["losses"] += [[loss, 1] for loss in cross_entropy(logits, labels, reduction="none").tolist()]
            found["predicted"] += logits.argmax(-1).tolist()
        else:
            for sample, logits in zip(chosen, answers(learner, job, chosen), strict=True):
                targets = torch.tensor(sample.ids[sample.prompt :], device=logits.device)
                found["losses"].append([cross_entropy(logits, targets, reduction="sum").item(), len(targets)])
                found["exact"].append(bool((logits.argmax(-1) == targets).all()))
                if sample.rivals:
                    found["predicted"].append(int(logits[sample.fork, sample.rivals].argmax()))
    back = sorted(range(len(rows)), key=rows.__getitem__)
    own: dict[str, Any] = {name: [values[at] for at in back] for name, values in found.items() if values}
    if "losses" in own:
        sums, tokens = zip(*own["losses"], strict=True)
        own["loss"] = sum(sums) / sum(tokens)
    return own


def answers(learner: Learner, job: Job, samples: Sequence[Sample]) -> Iterator[torch.Tensor]:
    """For each sample the logits at its answer, given the right tokens before, [answer tokens, vocabulary]."""
    logits = learner.answers(collate(samples, job.pad, torch.device(job.device)))
    yield from logits.split([len(sample.ids) - sample.prompt for sample in samples])


def generate(learner: Learner, job: Job, samples: Sequence[Sample]) -> list[list[int]]:
    """What greedy decoding gives for each prompt."""
    batch = collate_prompts(samples, job.pad, torch.device(job.device))
    options = {"do_sample": False, "max_new_tokens": job.max_new_tokens, "pad_token_id": job.pad}
    return learner.generate(batch, **options).tolist()
