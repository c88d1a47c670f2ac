"""TRL's trainers on preferences: what policy and reference are, and which of their tokens are edited."""

import pytest
import torch
from by_hand import ByHand, make_llama
from datasets import Dataset
from peft import get_peft_model
from trainers import Watch, assert_equal_tensors, common, first_batch, reft, scores_alone, trained_tensors
from transformers import LlamaForSequenceClassification
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer

TRAINERS = {"DPO": (DPOTrainer, DPOConfig), "KTO": (KTOTrainer, KTOConfig)}
REFERENCES = {
    "adapter disabled": {},
    "precomputed": dict(precompute_ref_log_probs=True),
    "copy of the adapter": {},
}


@pytest.fixture(scope="module")
def preferences(pairs):
    """The same two answers to every prompt, one liked and one not."""
    says = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
    good, bad = says("assistant", "blue fox"), says("assistant", "red dog twice")
    prompts = [says("user", text) for text in pairs["prompt"]]
    rows = [
        {"prompt": prompt, "completion": good if n % 2 else bad, "label": bool(n % 2)}
        for n, prompt in enumerate(prompts)
    ]
    return {
        "DPO": Dataset.from_list([{"prompt": prompt, "chosen": good, "rejected": bad} for prompt in prompts]),
        "KTO": Dataset.from_list(rows),
    }


def make(kind, folder, data, tokenizer, model=None, eval_data=None, trainer_options=None, **options):
    trainer_class, config_class = TRAINERS[kind]
    return trainer_class(
        make_llama(2) if model is None else model,
        args=config_class(**common(folder, max_length=None, **options)),
        train_dataset=data,
        eval_dataset=eval_data,
        processing_class=tokenizer,
        peft_config=reft(init_weights=False) if model is None else None,
        **trainer_options or {},
    )


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("kind", TRAINERS)
def test_policy_and_reference(tmp_path, tokenizer, preferences, kind, reference):
    """Each scores the answers as by hand: the policy edited at its prompts, the reference not, or as it began."""
    model = get_peft_model(make_llama(2), reft(init_weights=False)) if reference == "copy of the adapter" else None
    start = None if model is None else trained_tensors(model)
    options = REFERENCES[reference]
    trainer = make(kind, tmp_path, preferences[kind], tokenizer, model, max_steps=2, learning_rate=0.2, **options)
    marker = tokenizer.convert_tokens_to_ids("<assistant>")
    if reference == "precomputed":
        by_hand, batch = ByHand(make_llama(2), trainer.model), first_batch(trainer)
        rows = [ids[mask] for ids, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)]
        scores = torch.stack([scores_alone(by_hand, ids, marker, edited=False).sum() for ids in rows])
        known = ("ref_chosen_logps", "ref_rejected_logps") if kind == "DPO" else ("ref_logps",)
        torch.testing.assert_close(torch.cat([batch[name] for name in known]), scores, atol=1e-4, rtol=1e-5)
    watch = Watch(trainer, make_llama(2), marker)
    trainer.train()
    # KTO scores answers to other prompts, too; what was precomputed came before the watch.
    policy = ["default"] * (2 if kind == "KTO" else 1)
    other = {"adapter disabled": [None], "precomputed": [], "copy of the adapter": ["ref"]}[reference]
    assert watch.calls == (policy + other * len(policy)) * 2
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert log[0]["loss"] != log[1]["loss"]
    if reference == "copy of the adapter":
        kept = {name: trainer.model.get_parameter(name.replace(".default.", ".ref.")).data for name in start}
        assert_equal_tensors(kept, start, atol=0)
        assert trainer.model.active_adapter == "default"


@pytest.mark.parametrize("reference", ["adapter disabled", "precomputed"])
@pytest.mark.parametrize("kind", TRAINERS)
def test_reference_is_the_base_model(tmp_path, tokenizer, preferences, kind, reference):
    """An adapter that is zero at first has the rewards of its reference, zero; training raises the margins."""
    trainer_class, config_class = TRAINERS[kind]
    options = common(tmp_path, max_length=None, max_steps=10, **REFERENCES[reference])
    trainer = trainer_class(
        make_llama(2),
        args=config_class(**options),
        train_dataset=preferences[kind],
        processing_class=tokenizer,
        peft_config=reft(r=8),
    )
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    margins = [entry["rewards/margins"] for entry in log if "rewards/margins" in entry]
    assert margins[0] == pytest.approx(0, abs=1e-5)
    assert log[0]["loss"] == pytest.approx(0.6931 if kind == "DPO" else 0.5, abs=1e-3)
    assert margins[-1] > 0.3 and log[-1]["loss"] < log[0]["loss"]


@pytest.mark.parametrize("kind", TRAINERS)
def test_lengths_are_in_the_batch(tmp_path, tokenizer, preferences, kind):
    """Unless a reference model is given that has no adapter, and cannot take them."""
    trainer = make(kind, tmp_path, preferences[kind], tokenizer)
    batch = first_batch(trainer)
    marker = tokenizer.convert_tokens_to_ids("<assistant>")
    assert batch["prompt_lengths"].tolist() == [row.index(marker) + 1 for row in batch["input_ids"].tolist()]
    trainer.ref_model = make_llama(2)
    assert "prompt_lengths" not in first_batch(trainer)


@pytest.mark.parametrize("kind", TRAINERS)
def test_evaluation_with_metrics(monkeypatch, tmp_path, tokenizer, preferences, kind):
    """For compute_metrics the trainers call the model a second time, without labels."""
    seen = []
    options = dict(compute_metrics=lambda prediction: seen.append(prediction.predictions) or {})
    data = preferences[kind].select(range(4))
    trainer = make(kind, tmp_path, data, tokenizer, None, data, options)
    with monkeypatch.context() as context:
        context.setenv("PEFT_REFT_PROMPT_LENGTHS", "0")
        with pytest.raises(ValueError, match="compute_metrics.*DataCollatorWithPromptLengths"):
            trainer.evaluate()
    Watch(trainer, make_llama(2), tokenizer.convert_tokens_to_ids("<assistant>"))
    trainer.evaluate()
    batch = next(iter(trainer.get_eval_dataloader()))
    by_hand, found = ByHand(make_llama(2), trainer.model), torch.as_tensor(seen[0])
    for row, logits in enumerate(found):  # of DPO's rows the Trainer keeps as many as there are samples
        ids, mask = batch["input_ids"][row], batch["attention_mask"][row].bool()
        end = int((batch["completion_mask"][row] == 0)[mask].sum())
        columns = {"prefix": [[0, 1]], "suffix": [[end - 2, end - 1]]}
        expected = by_hand.logits(columns, input_ids=ids[mask][None])[0]
        torch.testing.assert_close(logits[mask], expected, atol=1e-5, rtol=1e-5)


def make_classifier():
    torch.manual_seed(0)
    config = make_llama(2).config
    config.num_labels = 1
    return LlamaForSequenceClassification(config).eval()


def test_reward_trainer(tmp_path, tokenizer, preferences):
    """A reward model reads prompt and answer: all that it is given is the prompt of its edits."""
    trainer = RewardTrainer(
        make_classifier(),
        args=RewardConfig(**common(tmp_path, max_length=None, max_steps=10)),
        train_dataset=preferences["DPO"],
        processing_class=tokenizer,
        peft_config=reft(task_type="SEQ_CLS", init_weights=False),
    )
    batch = first_batch(trainer)
    base = make_classifier()
    by_hand = ByHand(base, trainer.model)
    base.score.load_state_dict(trainer.model.get_base_model().score.modules_to_save["default"].state_dict())
    rewards = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
        length = int(mask.sum())
        columns = {"prefix": [[0, 1]], "suffix": [[length - 2, length - 1]]}
        rewards.append(by_hand.logits(columns, input_ids=ids[mask][None])[0, 0])
        assert (by_hand.logits({"prefix": [[]], "suffix": [[]]}, input_ids=ids[mask][None]) - rewards[-1]).abs() > 1e-3
    chosen, rejected = torch.stack(rewards).chunk(2)
    expected = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
    found = trainer.compute_loss(trainer.model.train(), dict(batch))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert log[-1]["accuracy"] == 1 and log[-1]["loss"] < log[0]["loss"]
