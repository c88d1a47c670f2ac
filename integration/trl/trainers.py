"""Trainers on a tiny model, and what their batches should give: each sequence alone, edited by hand (f2+l2)."""

import torch
from by_hand import ByHand
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from peft_reft import ReftConfig


def reft(**options):
    return ReftConfig(**{"task_type": "CAUSAL_LM", "r": 4, "positions": "f2+l2"} | options)


def common(folder, **options):
    defaults = dict(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=2e-2,
        lr_scheduler_type="constant",
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return defaults | options


def make_trainer(model, folder, data, tokenizer, eval_data=None, peft_config=None, trainer_options=None, **options):
    model_options = {"model_init_kwargs": {"dtype": "float32"}} if isinstance(model, str) else {}
    return SFTTrainer(
        model=model,
        args=SFTConfig(**common(folder, **model_options | options)),
        train_dataset=data,
        eval_dataset=eval_data,
        processing_class=tokenizer,
        peft_config=peft_config,
        **trainer_options or {},
    )


def by_hand_of(trainer, base, **options):
    return ByHand(LlamaForCausalLM.from_pretrained(base).eval(), trainer.model, **options)


def first_batch(trainer):
    return dict(next(iter(trainer.get_train_dataloader())))


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trained_tensors(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_equal_tensors(found, expected, atol=1e-5):
    assert found.keys() == expected.keys() and expected
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=atol, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


# What a batch should give


def split(batch):
    """The sequences of a batch, each as ids and labels [1, n]: rows without padding, or parts of packed rows."""
    ids, labels = batch["input_ids"], batch["labels"]
    if "position_ids" in batch:
        starts = [t for t, position in enumerate(batch["position_ids"][0].tolist()) if position == 0]
        parts = [(0, slice(a, b)) for a, b in zip(starts, [*starts[1:], ids.shape[1]], strict=True)]
    else:
        parts = [(row, mask.nonzero()[:, 0]) for row, mask in enumerate(batch["attention_mask"])]
    return [(ids[row, part][None], labels[row, part][None]) for row, part in parts]


def prompt_ends(labels):
    """Where each answer of a sequence begins, found with a loop; where the sequence ends if it has none."""
    row = labels[0].tolist()
    return [t for t in range(1, len(row)) if row[t] != -100 and row[t - 1] == -100] or [len(row)]


def columns_alone(labels):
    """What f2+l2 edits in a sequence whose prompts have four tokens at least."""
    ends = prompt_ends(labels)
    assert ends[0] >= 4
    return {"prefix": [[0, 1]], "suffix": [[column for end in ends for column in (end - 2, end - 1)]]}


def logits_alone(by_hand, sequences, columns_of=columns_alone):
    return [by_hand.logits(columns_of(labels), input_ids=ids) for ids, labels in sequences]


def mean_loss(logits, sequences):
    """The mean loss over all labels of several sequences."""
    pairs = list(zip(logits, sequences, strict=True))
    total = sum(
        torch.nn.functional.cross_entropy(row[0, :-1], labels[0, 1:], reduction="sum") for row, (_, labels) in pairs
    )
    return total / sum((labels[:, 1:] != -100).sum() for _, labels in sequences)


# What trainers with a policy and a reference should be given


def adapter_in_use(model):
    """The adapter that PEFT has switched on, None for the base model."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    (names,) = {() if layer.disable_adapters else tuple(layer.active_adapters) for layer in layers}
    return names[0] if names else None


def scores_alone(by_hand, ids, marker, edited):
    """Log probabilities of the tokens of an answer, which follows the first marker in a row without padding."""
    end = ids.tolist().index(marker) + 1
    columns = {"prefix": [[0, 1]], "suffix": [[end - 2, end - 1]]} if edited else {"prefix": [[]], "suffix": [[]]}
    logits = by_hand.logits(columns, input_ids=ids[None])[0, end - 1 : -1]
    return logits.log_softmax(-1).gather(1, ids[end:, None])[:, 0]


class Watch:
    """Compares every call that scores completions with each of its rows alone, edited by hand.

    Args:
        trainer: the trainer.
        base: the model before it got an adapter.
        marker (`int`): the token that prompts end with.

    Attributes:
        calls (`list`): for each call the adapter that it should have used, found by the trainer's own switches.
    """

    def __init__(self, trainer, base, marker):
        self.model, self.base, self.marker, self.calls = trainer.model, base, marker, []
        self.inner = trainer.model.get_base_model()
        self.handle = self.inner.register_forward_hook(self.compare, with_kwargs=True)

    def compare(self, module, args, kwargs, output):
        if not hasattr(output, "log_probs"):
            return
        adapter = adapter_in_use(self.inner)
        self.calls.append(adapter)
        by_hand = ByHand(self.base, self.model, adapter=adapter or "default")
        for row, (ids, mask) in enumerate(zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True)):
            columns = mask.nonzero()[:, 0]
            expected = scores_alone(by_hand, ids[columns], self.marker, edited=adapter is not None)
            found = output.log_probs[row].detach()[columns[-len(expected) :] - 1]
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
            assert len(found) == (output.log_probs[row] != 0).sum()
