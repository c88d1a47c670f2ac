"""Encoders and classifiers: the whole input is the prompt whatever labels are; heads are trained, saved and loaded."""

import copy

import pytest
import torch
from by_hand import ENCODER, adapt_model
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
)

from peft_reft import ReftConfig

SHAPE = ENCODER | dict(pad_token_id=0)
RELATIVE = dict(pooler_dropout=0.0, relative_attention=True, pos_att_type=["p2c", "c2p"], max_position_embeddings=64)
QUIET = dict(qa_dropout=0.0, seq_classif_dropout=0.0)
FAMILIES = {
    "bert": {},
    "roberta": dict(max_position_embeddings=64),
    "electra": dict(embedding_size=16),
    "deberta": RELATIVE,
    "deberta-v2": RELATIVE,
    "modernbert": dict(bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, initializer_cutoff_factor=3.0),
    "distilbert": dict(dim=32, n_layers=2, n_heads=4, hidden_dim=64, dropout=0.0, attention_dropout=0.0, **QUIET),
}
CAUSAL = {
    "llama": dict(num_key_value_heads=2),
    "qwen3": dict(num_key_value_heads=2, head_dim=8),
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, **{f"{part}_pdrop": 0.0 for part in ("embd", "attn", "resid")}),
}
LABELS = torch.zeros(2, 12, dtype=torch.long)
LABELS[:, [0, 11]] = -100  # as on special tokens
LABELS[1, 4:] = 1
TASKS = {
    "classes": (AutoModelForSequenceClassification, dict(labels=torch.tensor([0, 1])), {}),
    "regression": (AutoModelForSequenceClassification, dict(labels=torch.tensor([0.5, -1.0])), dict(num_labels=1)),
    "several labels": (
        AutoModelForSequenceClassification,
        dict(labels=torch.eye(12)[:2]),  # of the input's shape, as it happens
        dict(num_labels=12, problem_type="multi_label_classification"),
    ),
    "token classes": (AutoModelForTokenClassification, dict(labels=LABELS), {}),
    "question answering": (
        AutoModelForQuestionAnswering,
        dict(start_positions=torch.tensor([2, 5]), end_positions=torch.tensor([4, 8])),
        {},
    ),
    "masked words": (AutoModelForMaskedLM, dict(labels=LABELS), {}),
    "embeddings": (AutoModel, {}, {}),
}
MASKS = {
    "right": torch.tensor([[1] * 12, [1] * 9 + [0] * 3]),
    "left": torch.tensor([[1] * 12, [0] * 3 + [1] * 9]),
    "none": None,
}
COLUMNS = {
    "right": {"prefix": [[0, 1], [0, 1]], "suffix": [[10, 11], [7, 8]]},
    "left": {"prefix": [[0, 1], [3, 4]], "suffix": [[10, 11], [10, 11]]},
    "none": {"prefix": [[0, 1], [0, 1]], "suffix": [[10, 11], [10, 11]]},
}


def make(family, auto=AutoModelForSequenceClassification, seed=0, **options):
    torch.manual_seed(seed)
    options = SHAPE | (FAMILIES | CAUSAL)[family] | options
    return auto.from_config(AutoConfig.for_model(family, **options)).eval()


@torch.no_grad()
def outputs(model, **inputs):
    """All that the model puts out, but the loss."""
    found = model(**inputs, return_dict=True)
    return [found[name] for name in ("logits", "start_logits", "end_logits", "last_hidden_state") if name in found]


def assert_close(found, expected, mask=None):
    """Where a token is no padding."""
    for one, other in zip(found, expected, strict=True):
        keep = mask.bool() if mask is not None and one.shape[:2] == mask.shape and one.shape[1] == 12 else ...
        torch.testing.assert_close(one[keep].view_as(other[keep]), other[keep], atol=1e-5, rtol=1e-5)


CASES = [(family, task, "right") for family in FAMILIES for task in TASKS]
CASES += [(family, task, padding) for family in FAMILIES for task in ("classes", "embeddings") for padding in MASKS]


@pytest.mark.parametrize(("family", "task", "padding"), list(dict.fromkeys(CASES)))
def test_tasks(ids, family, task, padding):
    auto, labels, options = TASKS[task]
    mask = MASKS[padding]
    inputs = dict(input_ids=ids) if mask is None else dict(input_ids=ids, attention_mask=mask)
    base = make(family, auto, **options)
    model, by_hand = adapt_model(base, task_type=None, positions="f2+l2")
    with by_hand.edits(COLUMNS[padding]):
        expected = outputs(base, **inputs)
    assert (expected[0] - outputs(base, **inputs)[0]).abs().max() > 1e-3, "the edit is too small to be seen"
    mask = None if task == "several labels" else mask
    for mode in map(model.train, (False, True)):
        assert_close(outputs(mode, **inputs), expected, mask)
        assert_close(outputs(mode, **inputs, **labels), expected, mask)
    loss = model(**inputs, **labels)
    if labels:
        loss.loss.backward()
        assert all(p.grad is not None for name, p in model.named_parameters() if "._reft." in name)


def test_embeddings_of_a_batch_are_those_of_each_sentence(ids):
    """Mean pooling, as sentence encoders do it."""
    model, _ = adapt_model(make("bert", AutoModel), task_type="FEATURE_EXTRACTION", positions="f3+l3")
    mask = MASKS["right"]
    (states,) = outputs(model, input_ids=ids, attention_mask=mask)
    pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    for row, length in enumerate((12, 9)):
        (alone,) = outputs(model, input_ids=ids[row : row + 1, :length])
        torch.testing.assert_close(pooled[row], alone[0].mean(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("family", CAUSAL)
def test_causal_models_as_classifiers(ids, family, padding):
    """The last token of the prompt is the one that the model pools."""
    base = make(family)
    mask = MASKS[padding]
    ids = ids if mask is None else ids.masked_fill(mask == 0, 0)
    inputs = dict(input_ids=ids) if mask is None else dict(input_ids=ids, attention_mask=mask)
    model, by_hand = adapt_model(base, task_type=None, positions="l1", layers_to_transform=[-1])
    columns = {"unit": [[11], [8 if padding == "right" else 11]]}
    with by_hand.edits(columns):
        expected = outputs(base, **inputs)
    # an edit of the last block at another token would not reach the head
    assert (expected[0] - outputs(base, **inputs)[0]).abs().amin(0).max() > 1e-2
    for mode in map(model.train, (False, True)):
        assert_close(outputs(mode, **inputs, labels=torch.tensor([0, 1])), expected)


# Heads

HEADS = {  # family, task, its name in PEFT, the head where it is named
    "named": ("roberta", "classes", None, ["classifier"]),
    "of words, named": ("bert", "token classes", None, ["classifier"]),
    "automatic": ("roberta", "classes", "SEQ_CLS", None),
    "of words, automatic": ("bert", "token classes", "TOKEN_CLS", None),
    "of spans, automatic": ("electra", "question answering", "QUESTION_ANS", None),
    "of ModernBERT": ("modernbert", "classes", "SEQ_CLS", None),
    "of words, of ModernBERT": ("modernbert", "token classes", "TOKEN_CLS", None),
    # PEFT takes a head that is called qa_outputs
    "of spans, of ModernBERT": ("modernbert", "question answering", "QUESTION_ANS", ["classifier"]),
    "of a causal model": ("llama", "classes", "SEQ_CLS", None),
}


def train(tmp_path, model, rows, **options):
    """Some steps of transformers' own trainer: the losses of its evaluation before and after."""
    defaults = dict(max_steps=12, learning_rate=3e-2, use_cpu=True, report_to="none", disable_tqdm=True)
    args = TrainingArguments(output_dir=str(tmp_path / "run"), save_strategy="no", **defaults | options)
    trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    return before, trainer.evaluate()["eval_loss"], trainer


def rows_of(ids, labels):
    return [
        dict(input_ids=ids[row], attention_mask=MASKS["right"][row]) | {name: of[row] for name, of in labels.items()}
        for row in range(2)
    ]


@pytest.mark.parametrize("head", HEADS)
def test_heads_are_trained_and_saved(tmp_path, ids, head):
    """Trained by the plain trainer, and loaded onto a base whose head was drawn anew."""
    family, task, task_type, named = HEADS[head]
    auto, labels, _ = TASKS[task]
    base = make(family, auto)
    config = ReftConfig(task_type=task_type, r=4, positions="f1+l1", modules_to_save=named)
    model = get_peft_model(copy.deepcopy(base), config)
    before, after, trainer = train(tmp_path, model, rows_of(ids, labels))
    assert after < 0.7 * before
    trainer.save_model(str(tmp_path / "adapter"))
    inputs = dict(input_ids=ids, attention_mask=MASKS["right"])
    expected = outputs(model.eval(), **inputs)
    fresh, kept = make(family, auto, seed=7), base.state_dict()
    heads = ("classifier", "score", "qa_outputs")
    fresh.load_state_dict({k: t if k.startswith(heads) else kept[k] for k, t in fresh.state_dict().items()})
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    for one, other in zip(outputs(loaded, **inputs), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("task", ["classes", "token classes"])
def test_label_smoothing(tmp_path, ids, task):
    """The trainer then computes the loss itself, of a forward without labels: nothing needs to be told here."""
    auto, labels, _ = TASKS[task]
    task_type = "SEQ_CLS" if task == "classes" else "TOKEN_CLS"
    model = get_peft_model(make("bert", auto), ReftConfig(task_type=task_type, r=4, positions="f2+l2"))
    before, after, _ = train(tmp_path, model, rows_of(ids, labels), label_smoothing_factor=0.1)
    assert after < before


@pytest.mark.parametrize("task_type", ["SEQ_CLS", None])
def test_evaluation_finds_the_labels(tmp_path, ids, task_type):
    """The trainer reads the names of labels off the forward of the model inside, whatever wraps it."""
    model = get_peft_model(make("bert"), ReftConfig(task_type=task_type, r=4))
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    rows = rows_of(ids, TASKS["classes"][1])
    trainer = Trainer(model, args, eval_dataset=rows, compute_metrics=lambda p: dict(right=float(p.label_ids.sum())))
    metrics = trainer.evaluate()
    assert metrics["eval_right"] == 1.0 and metrics["eval_loss"] > 0


def test_base_of_a_causal_model_without_a_task(ids):
    """An AutoModel has no generate: it is an encoder, unless the task says that it goes on."""
    base = make("llama", AutoModel)
    model, by_hand = adapt_model(base, task_type=None, positions="l2")
    with by_hand.edits({"unit": [[10, 11]] * 2}):
        expected = outputs(base, input_ids=ids)
    assert_close(outputs(model.train(), input_ids=ids), expected)
    model = inject_adapter_in_model(ReftConfig(task_type="CAUSAL_LM", positions="l2"), base)
    with pytest.raises(ValueError, match="prompt_lengths"):
        model.train()(input_ids=ids)
