"""TRL's trainers that generate: what they sample, and the policy and the reference that score it."""

import pytest
import torch
from by_hand import ByHand, make_llama
from datasets import Dataset
from peft import get_peft_model
from trainers import Watch, assert_equal_tensors, common, reft, trained_tensors
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

TRAINERS = {"GRPO": (GRPOTrainer, GRPOConfig), "RLOO": (RLOOTrainer, RLOOConfig)}
HALF = 32  # of the tiny model's vocabulary


def share_of_low_tokens(completion_ids, **kwargs):
    """A trivial task."""
    return [sum(token < HALF for token in ids) / len(ids) for ids in completion_ids]


@pytest.fixture(scope="module")
def questions(pairs):
    return Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in pairs["prompt"]])


def make(kind, folder, data, tokenizer, model=None, config=None, **options):
    trainer_class, config_class = TRAINERS[kind]
    defaults = dict(per_device_train_batch_size=8, num_generations=4, max_completion_length=5)
    return trainer_class(
        make_llama(2) if model is None else model,
        share_of_low_tokens,
        config_class(**common(folder, **defaults | options)),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=(config or reft(init_weights=False)) if model is None else None,
    )


OPTIONS = {
    "no reference": dict(beta=0.0),
    "adapter disabled": dict(beta=0.1),
    "copy of the adapter": dict(beta=0.1),
    "each sample twice": dict(beta=0.1, num_iterations=2),
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", TRAINERS)
def test_policy_and_reference(tmp_path, tokenizer, questions, kind, options):
    """What is sampled is scored as by hand: by the policy edited at its prompts, by the reference not."""
    copied = options == "copy of the adapter"
    model = get_peft_model(make_llama(2), reft(init_weights=False)) if copied else None
    start = None if model is None else trained_tensors(model)
    settings = dict(max_steps=2, learning_rate=0.2) | OPTIONS[options]
    trainer = make(kind, tmp_path, questions, tokenizer, model, **settings)
    watch = Watch(trainer, make_llama(2), tokenizer.convert_tokens_to_ids("<assistant>"))
    trainer.train()
    reference = [] if options == "no reference" else ["ref" if copied else None]
    twice = "each sample twice" == options
    old = ["default"] if twice or kind == "RLOO" else []  # the policy as it was when it sampled
    sampling, training = old + reference, ["default"]
    assert watch.calls == (sampling + training * 2 if twice else (sampling + training) * 2)
    if copied:
        kept = {name: trainer.model.get_parameter(name.replace(".default.", ".ref.")).data for name in start}
        assert_equal_tensors(kept, start, atol=0)


@pytest.mark.parametrize("continuous", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", TRAINERS)
def test_samples_are_those_of_the_edited_model(tmp_path, tokenizer, questions, kind, continuous):
    """With top_k=1, what the trainer samples is what greedy decoding by hand gives for each prompt alone."""
    bounded = dict(page_size=4, num_blocks=256, max_batch_tokens=64)  # or the cache takes half of the free memory
    options = dict(top_k=1, use_transformers_continuous_batching=continuous)
    options |= dict(transformers_continuous_batching_config=bounded)
    trainer = make(kind, tmp_path, questions, tokenizer, max_steps=1, **options)
    by_hand, plain, compared = ByHand(make_llama(2), trainer.model), make_llama(2), 0
    batch = next(iter(trainer.get_train_dataloader()))
    sampled = trainer._generate_and_score_completions(batch)
    differ = 0
    for prompt, mask, answer, answer_mask in zip(
        sampled["prompt_ids"],
        sampled["prompt_mask"].bool(),
        sampled["completion_ids"],
        sampled["completion_mask"].bool(),
        strict=True,
    ):
        ids, end = prompt[mask][None], int(mask.sum())
        found = answer[answer_mask].tolist()
        columns = {"prefix": [[0, 1]], "suffix": [[end - 2, end - 1]]}
        expected = by_hand.generate(columns, ids, new_tokens=5)[0, end:].tolist()
        assert found == expected[: len(found)] and (len(found) == 5 or found[-1] == tokenizer.eos_token_id)
        differ += found != plain.generate(ids, do_sample=False, max_new_tokens=5)[0, end:].tolist()
        compared += 1
    assert compared == 8 and differ > 4


@pytest.mark.parametrize("kind", TRAINERS)
def test_reward_rises(tmp_path, tokenizer, questions, kind):
    options = dict(per_device_train_batch_size=32, num_generations=8, max_completion_length=2, beta=0.01)
    options |= dict(max_steps=30, learning_rate=0.1)
    trainer = make(kind, tmp_path, questions, tokenizer, config=reft(r=8), **options)
    trainer.train()
    rewards = torch.tensor([entry["reward"] for entry in trainer.state.log_history if "reward" in entry])
    assert rewards[-5:].mean() > rewards[:5].mean() + 0.2, rewards
    frozen = make_llama(2).state_dict()
    kept = trainer.model.get_base_model().state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in frozen.items())
