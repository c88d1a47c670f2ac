"""transformers' continuous batching, against each prompt alone by hand."""

import pytest
import torch
from by_hand import VOCABULARY, make_llama
from peft import PeftModel, get_peft_model
from transformers import (
    CompileConfig,
    ContinuousBatchingConfig,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
)

from peft_reft import ReftConfig
from peft_reft.edits.intervention import Intervention

COLUMNS = {  # of a prompt of n tokens; f5+l5 are cut to half of it, and the last tokens get an odd one
    "f2+l2": lambda n: {"prefix": [0, 1], "suffix": [n - 2, n - 1]},
    "f5+l5": lambda n: {"prefix": [*range(n // 2)][:5], "suffix": [*range(n // 2, n)][-5:]},
    "l3": lambda n: {"unit": [n - 3, n - 2, n - 1]},
    "prompt": lambda n: {"unit": [*range(n)]},
    "all": lambda n: {"unit": [*range(99)]},
}
# Pages and batches so small that prompts are cut, and share forwards with the answers of others
SMALL = dict(page_size=4, num_blocks=64, max_batch_tokens=10)


@pytest.fixture
def prompts():
    """Five prompts, of which three begin alike."""
    draw = torch.Generator().manual_seed(3)
    lengths = (12, 17, 4, 21, 9)
    drawn = [torch.randint(2, VOCABULARY, (n,), generator=draw).tolist() for n in lengths]
    drawn[1][:12], drawn[3][:8] = drawn[0], drawn[0][:8]
    return drawn


def generate_batch(model, prompts, new_tokens=6, sequences=1, **options):
    # sampling that takes the best token: transformers refuses several greedy sequences
    how = dict(do_sample=True, temperature=1e-5) if sequences > 1 else dict(do_sample=False)
    special = dict(eos_token_id=-1, pad_token_id=0)
    config = GenerationConfig(max_new_tokens=new_tokens, num_return_sequences=sequences, **how, **special)
    batching = ContinuousBatchingConfig(**SMALL | options)
    found = model.generate_batch(prompts, generation_config=config, continuous_batching_config=batching)
    assert all(output.error is None for output in found.values()), found
    return [output.generated_tokens for output in found.values()]


def alone(by_hand, prompts, columns, new_tokens=6):
    found = []
    for prompt in prompts:
        rows = {unit: [listed] for unit, listed in columns(len(prompt)).items()}
        tokens = by_hand.generate(rows, torch.tensor([prompt]), new_tokens=new_tokens)
        found.append(tokens[0, len(prompt) :].tolist())
    return found


@pytest.mark.parametrize("adapt", ["get_peft_model"], indirect=True)
@pytest.mark.parametrize("positions", COLUMNS)
def test_each_request_is_edited_as_it_would_be_alone(adapt, prompts, positions):
    model, by_hand = adapt(positions=positions)
    expected = alone(by_hand, prompts, COLUMNS[positions])
    assert generate_batch(model, prompts) == expected
    unedited = alone(by_hand, prompts, lambda n: {unit: [] for unit in COLUMNS[positions](n)})
    assert sum(edited != plain for edited, plain in zip(expected, unedited, strict=True)) >= 4


@pytest.mark.parametrize("adapt", ["get_peft_model"], indirect=True)
@pytest.mark.parametrize(
    "options", [dict(num_blocks=14), dict(scheduler_type="prefill_first"), dict(return_logprobs=True)], ids=str
)
def test_ways_to_schedule(adapt, prompts, options):
    """With few blocks, requests are interrupted and begin again with what they had generated, which is no prompt."""
    model, by_hand = adapt()
    expected = alone(by_hand, prompts, COLUMNS["f2+l2"], 20)
    assert generate_batch(model, prompts, 20, **options) == expected


@pytest.mark.parametrize("adapt", ["get_peft_model"], indirect=True)
def test_several_sequences_of_a_prompt(adapt, prompts):
    model, by_hand = adapt()
    expected = alone(by_hand, prompts, COLUMNS["f2+l2"])
    assert generate_batch(model, prompts, sequences=2) == [tokens for tokens in expected for _ in range(2)]


@pytest.mark.parametrize("adapt", ["get_peft_model"], indirect=True)
def test_windows(adapt, prompts):
    """Sliding and full attention in one model, each with a cache of its own."""

    def make():
        torch.manual_seed(0)
        shape = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
        layers = dict(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], sliding_window=6)
        special = dict(initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=None)
        return Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=VOCABULARY, **shape | layers | special)).eval()

    model, by_hand = adapt(make)
    assert generate_batch(model, prompts) == alone(by_hand, prompts, COLUMNS["f2+l2"])


@pytest.mark.parametrize("adapt", ["get_peft_model"], indirect=True)
def test_answers_run_no_unit(adapt, prompts, monkeypatch):
    model, _ = adapt()
    calls = []
    forward = Intervention.forward
    monkeypatch.setattr(Intervention, "forward", lambda self: calls.append(1) or forward(self))
    generate_batch(model, prompts[:1], max_batch_tokens=32)
    assert len(calls) == 6  # two units in three layers, once


def test_entry_points(adapt, prompts):
    model, by_hand = adapt()
    assert generate_batch(model, prompts) == alone(by_hand, prompts, COLUMNS["f2+l2"])
    expected = alone(by_hand, prompts, lambda n: {"prefix": [], "suffix": []})
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            assert generate_batch(model, prompts) == expected
    else:
        model.disable_adapters()
        assert generate_batch(model, prompts) == expected


@pytest.mark.parametrize("adapt", ["get_peft_model"], indirect=True)
@pytest.mark.parametrize("attention", ["sdpa", "paged|eager"])
def test_requests_added_to_a_running_manager(adapt, prompts, attention):
    """As a server does it, one after the other; the model generates as before when the manager has stopped."""
    model, by_hand = adapt()
    model.get_base_model().set_attn_implementation(attention)
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    manager = model.init_continuous_batching(config, ContinuousBatchingConfig(**SMALL))
    manager.start()
    try:
        names = [manager.add_request(prompt, streaming=True) for prompt in prompts]
        found = {}
        while not all(name in found and found[name].is_finished() for name in names):
            output = manager.get_result(timeout=60)
            assert output is not None and output.error is None
            found[output.request_id] = output
    finally:
        manager.stop()
    expected = alone(by_hand, prompts, COLUMNS["f2+l2"])
    assert [found[name].generated_tokens for name in names] == expected
    model.get_base_model().set_attn_implementation("sdpa")
    tokens = model.generate(torch.tensor(prompts[:1]), max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert tokens[0, 12:].tolist() == expected[0]


@pytest.mark.parametrize("adapt", ["get_peft_model"], indirect=True)
def test_generate_with_a_paged_cache(adapt, ids):
    model, by_hand = adapt()
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(**SMALL)
    tokens = model.generate(inputs=ids, cache_implementation="paged", continuous_batching_config=batching, **options)
    expected = by_hand.generate({"prefix": [[0, 1]] * 2, "suffix": [[10, 11]] * 2}, ids)
    assert torch.equal(tokens.view_as(expected), expected)


@pytest.mark.parametrize(
    "options",
    [
        dict(use_cuda_graph=True),
        dict(use_cuda_graph=(False, True)),
        dict(use_async_batching=True),
        dict(varlen_compile_config=CompileConfig()),
        dict(decode_compile_config=CompileConfig()),
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("adapt", ["get_peft_model"], indirect=True)
def test_ways_that_cannot_be_followed_are_refused_at_once(adapt, prompts, options):
    model, _ = adapt()
    with pytest.raises(ValueError, match=rf"{next(iter(options))}=.*cannot follow"):
        generate_batch(model, prompts, **options)


@pytest.mark.parametrize("persistent", [True, False])
def test_manager(prompts, persistent):
    """One from before the adapter is refused, one from after it is used again."""
    base = make_llama()
    config = GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=-1, pad_token_id=0)
    options = dict(generation_config=config, continuous_batching_config=ContinuousBatchingConfig(**SMALL))
    base.generate_batch(prompts, persistent_manager=persistent, **options)
    model = get_peft_model(base, ReftConfig(task_type="CAUSAL_LM", init_weights=False)).eval()
    if persistent:
        with pytest.raises(ValueError, match="destroy_cached_continuous_batching_manager"):
            model.generate_batch(prompts, **options)
        model.destroy_cached_continuous_batching_manager()
    first = model.generate_batch(prompts, persistent_manager=True, **options)
    again = model.generate_batch(prompts, persistent_manager=True, **options)
    model.destroy_cached_continuous_batching_manager()
    tokens = [[output.generated_tokens for output in found.values()] for found in (first, again)]
    assert tokens[0] == tokens[1] and len(tokens[0]) == 5
