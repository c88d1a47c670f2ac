"""generate, in its forms, against greedy decoding without a cache by hand, edited at columns that are listed here."""

import copy
from collections import Counter

import pytest
import torch
from by_hand import CACHE, GREEDY, MASK, TWO, ByHand, assert_edits, generated, labels_of, make_gpt2, make_llama
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    MambaConfig,
    MambaForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    RwkvConfig,
    RwkvForCausalLM,
    StaticCache,
    StoppingCriteria,
)

from peft_reft import ReftConfig
from peft_reft.edits import apply
from peft_reft.edits.apply import edit
from peft_reft.runtime.generate import AFTER_PROMPT, CACHES, Generation, cached_tokens
from peft_reft.runtime.state import ModelToken

GENERATED = {
    "f2+l2": {"prefix": [[0, 1], [4, 5]], "suffix": [[10, 11], [10, 11]]},
    "f5+l5": {"prefix": [[0, 1, 2, 3, 4], [4, 5, 6, 7]], "suffix": [[7, 8, 9, 10, 11], [8, 9, 10, 11]]},
    "l3": {"unit": [[9, 10, 11], [9, 10, 11]]},
    "f1": {"unit": [[0], [4]]},
    "prompt": {"unit": [list(range(12)), list(range(4, 12))]},
    "all": {"unit": [list(range(99)), list(range(4, 99))]},
}


@pytest.mark.parametrize("positions", GENERATED)
@pytest.mark.parametrize("make", [make_llama, make_gpt2])
def test_generate(adapt, ids, positions, make):
    model, by_hand = adapt(make, positions=positions)
    expected = by_hand.generate(GENERATED[positions], ids, MASK)
    assert torch.equal(generated(model, ids), expected)
    inputs = dict(input_ids=ids[:1])
    base = by_hand.logits({unit: [[]] for unit in GENERATED[positions]}, **inputs)
    edited = by_hand.logits({unit: rows[:1] for unit, rows in GENERATED[positions].items()}, **inputs)
    assert (base - edited)[:, -1].abs().max() > 0.1, "the edit is too small to be seen"


@pytest.mark.parametrize("positions", GENERATED)
@pytest.mark.parametrize(
    "options",
    [
        dict(use_cache=False),
        dict(prefill_chunk_size=5),
        dict(cache_implementation="static"),
        dict(prompt_lookup_num_tokens=3),
    ],
    ids=lambda options: next(iter(options)),
)
def test_ways_to_generate(adapt, ids, positions, options):
    model, by_hand = adapt(positions=positions)
    if "prompt_lookup_num_tokens" in options:  # takes one row
        expected = by_hand.generate({unit: rows[:1] for unit, rows in GENERATED[positions].items()}, ids[:1])
        assert torch.equal(generated(model, ids[:1], MASK[:1], **options), expected)
    else:
        assert torch.equal(generated(model, ids, **options), by_hand.generate(GENERATED[positions], ids, MASK))


def test_generate_each_row_alone(adapt, ids):
    model, _ = adapt(positions="f2+l2")
    together = generated(model, ids)
    for row, start in enumerate((0, 4)):
        alone = generated(model, ids[row : row + 1, start:], None)
        assert torch.equal(alone[0], together[row, start:])


def test_generate_finds_padding_without_a_mask(adapt, ids):
    model, by_hand = adapt(positions="f2+l2")
    ids = ids.masked_fill(MASK == 0, 0)
    assert torch.equal(model.generate(ids, **GREEDY), by_hand.generate(GENERATED["f2+l2"], ids, MASK))


def test_generate_from_embeddings(adapt, ids):
    model, by_hand = adapt(positions="f2+l2")
    embeds = by_hand.base.get_input_embeddings()(ids)
    tokens = model.generate(inputs_embeds=embeds, attention_mask=MASK, **GREEDY)
    assert torch.equal(tokens, by_hand.generate(GENERATED["f2+l2"], ids, MASK)[:, 12:])


def test_padding_of_ids_beside_embeddings(adapt, ids):
    """Without a mask, generate reads it off the ids though the model is given the embeddings."""
    model, by_hand = adapt(positions="f2+l2")
    ids = ids.masked_fill(MASK == 0, 0)
    embeds = by_hand.base.get_input_embeddings()(ids)
    tokens = model.generate(ids, inputs_embeds=embeds, **GREEDY)
    assert torch.equal(tokens, by_hand.generate(GENERATED["f2+l2"], ids, MASK))


def test_embeddings_that_are_partly_cached(adapt, ids):
    model, by_hand = adapt(positions="f2+l2")
    cache = DynamicCache(config=model.config)
    embeds = by_hand.base.get_input_embeddings()(ids[:1])
    with torch.no_grad():
        model(inputs_embeds=embeds[:, :7], use_cache=True, **{CACHE: cache})
    tokens = model.generate(inputs_embeds=embeds, **{CACHE: cache}, **GREEDY)
    expected = by_hand.generate({"prefix": [[0, 1]], "suffix": [[5, 6, 10, 11]]}, ids[:1])
    assert torch.equal(tokens, expected[:, 12:])


@pytest.mark.parametrize("options", [dict(num_beams=4), dict(num_beams=4, num_return_sequences=2)])
def test_beams(adapt, ids, options):
    """Beam search over the model by hand, which edits the same columns of every beam."""
    model, by_hand = adapt(positions="f2+l2")
    beams = {unit: [row for row in rows for _ in range(4)] for unit, rows in GENERATED["f2+l2"].items()}
    options = options | dict(return_dict_in_generate=True, output_scores=True)
    with by_hand.edits(beams):
        expected = generated(by_hand.base, ids, use_cache=False, **options)
    found = generated(model, ids, **options)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, atol=1e-5, rtol=1e-5)


def test_sampling(adapt, ids):
    model, by_hand = adapt(positions="f2+l2")
    options = dict(do_sample=True, num_return_sequences=3, return_dict_in_generate=True, output_logits=True)
    rows = {unit: [row for row in rows for _ in range(3)] for unit, rows in GENERATED["f2+l2"].items()}
    torch.manual_seed(5)
    with by_hand.edits(rows):
        expected = generated(by_hand.base, ids, use_cache=False, **options)
    for use_cache in (False, True):
        torch.manual_seed(5)
        found = generated(model, ids, use_cache=use_cache, **options)
        assert torch.equal(found.sequences, expected.sequences)
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)


def test_prompt_that_is_partly_cached(adapt, ids):
    """The prompt is all that the call was given; what the cache holds of it is edited as it was."""
    model, by_hand = adapt(positions="f2+l2")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids[:1, :7], prompt_lengths=torch.tensor([7]), use_cache=True, **{CACHE: cache})
    tokens = model.generate(input_ids=ids[:1], **{CACHE: cache}, **GREEDY)
    # Columns 5 and 6 were the end of a prompt when they were cached, columns 10 and 11 are the end of this one.
    assert torch.equal(tokens, by_hand.generate({"prefix": [[0, 1]], "suffix": [[5, 6, 10, 11]]}, ids[:1]))


def test_decoding_by_hand_equals_generate(adapt, ids):
    """A loop over forwards with a cache: one token after the prompt goes on with the answer."""
    model, by_hand = adapt(positions="f2+l2")
    tokens, given, cache = ids, ids, None
    with torch.no_grad():
        for _ in range(6):
            output = model(input_ids=given, use_cache=True, **{CACHE: cache})
            cache = output[CACHE]
            given = output.logits[:, -1:].argmax(-1)
            tokens = torch.cat([tokens, given], dim=1)
    assert torch.equal(tokens, generated(model, ids, torch.ones_like(ids)))


def test_generate_in_training_mode(adapt, ids):
    model, by_hand = adapt(positions="f2+l2")
    model.train()
    assert torch.equal(generated(model, ids), by_hand.generate(GENERATED["f2+l2"], ids, MASK))


def test_decoding_runs_no_unit(adapt, ids, monkeypatch):
    calls = []

    def record(units, hidden_states, mask):
        calls.append(list(hidden_states.shape[::2]))
        return edit(units, hidden_states, mask)

    monkeypatch.setattr(apply, "edit", record)
    model, _ = adapt(positions="f2+l2")
    generated(model, ids)
    assert calls == [[2, 2]] * 3  # two units in three layers, at two tokens, once
    calls.clear()
    model, _ = adapt(positions="all")
    generated(model, ids)
    assert calls == [[1, 12]] * 3 + [[1, 1]] * 15


class Operations(TorchDispatchMode):
    """Counts the operations that run."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[str(function)] += 1
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("options", [{}, dict(cache_implementation="static"), dict(num_beams=2)], ids=str)
def test_decoding_runs_the_operations_of_the_base_model(adapt, ids, options):
    """What four tokens more cost: not even a gather at no tokens is added to it."""
    model, by_hand = adapt(positions="f2+l2")
    costs = []
    for generating in (by_hand.base, model):
        counts = []
        for new_tokens in (2, 6):
            with Operations() as operations:
                generated(generating, ids, max_new_tokens=new_tokens, **options)
            counts.append(operations.counts)
        costs.append(counts[1] - counts[0])
        prefill = counts[0]
    assert costs[0] == costs[1] and costs[0].total() > 100
    assert prefill["aten.index_put.default"] >= 3  # the mode sees edits where there are some


@pytest.mark.parametrize("how", ["keyword", "positional"])
def test_generation_config_that_says_nothing_of_padding(adapt, ids, how):
    """generate then takes the padding token of the model's own config, or that of the config it is given."""
    model, by_hand = adapt(positions="f2+l2")
    ids = ids.masked_fill(MASK == 0, 0)
    expected = by_hand.generate(GENERATED["f2+l2"], ids, MASK)
    silent = GenerationConfig(max_new_tokens=6, do_sample=False)
    given = (ids,) if how == "keyword" else (ids, silent)
    assert torch.equal(model.generate(*given, **({"generation_config": silent} if how == "keyword" else {})), expected)
    model.generation_config.pad_token_id = None
    telling = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(ids, generation_config=telling), expected)


def test_generate_within_generate(adapt, ids):
    """A call for another prompt, made by a logits processor: each keeps its own prompt."""
    model, by_hand = adapt(positions="l2")
    other = torch.cat([ids.flip(1), ids[:, :2]], dim=1)
    inner = []

    class Asks(LogitsProcessor):
        def __call__(self, input_ids, scores):
            inner.append(model.generate(input_ids=other, **GREEDY))
            return scores

    expected = by_hand.generate({"unit": [[10, 11]] * 2}, ids)
    assert torch.equal(generated(model, ids, None, logits_processor=[Asks()]), expected)
    expected = by_hand.generate({"unit": [[12, 13]] * 2}, other)
    assert len(inner) == 6 and all(torch.equal(tokens, expected) for tokens in inner)


@pytest.mark.parametrize("use_cache", [True, False])
def test_calls_within_generate(adapt, ids, use_cache):
    """As of a reward model that shares the base: what a logits processor asks has prompts of its own."""
    model, by_hand = adapt(positions="l2")
    other, end = ids.flip(1)[:, :9], lambda length: {"unit": [[length - 2, length - 1]] * 2}
    found = {"other": [], "other, told": [], "same, told": [], "same, generated": []}

    class Asks(LogitsProcessor):
        def __call__(self, input_ids, scores):
            lengths = torch.tensor([5, 5])
            found["other"].append(model(input_ids=other).logits)
            found["other, told"].append(model(input_ids=other, prompt_lengths=lengths).logits)
            found["same, told"].append(model(input_ids=input_ids, prompt_lengths=lengths).logits[:, :12])
            found["same, generated"].append(model.generate(input_ids, do_sample=False, max_new_tokens=2))
            return scores

    expected = by_hand.generate(end(12), ids)
    assert torch.equal(generated(model, ids, None, logits_processor=[Asks()], use_cache=use_cache), expected)
    logits = {
        "other": by_hand.logits(end(9), input_ids=other),
        "other, told": by_hand.logits(end(5), input_ids=other),
        "same, told": by_hand.logits(end(5), input_ids=ids),
    }
    for name, tensor in logits.items():
        for logits_found in found[name]:
            torch.testing.assert_close(logits_found, tensor, atol=1e-5, rtol=1e-5)
    for step, tokens in enumerate(found["same, generated"]):
        so_far = expected[:, : 12 + step]
        assert torch.equal(tokens, by_hand.generate(end(12 + step), so_far, new_tokens=2))


def test_plain_forward_within_generate(adapt, ids):
    """On the sequences so far, without a cache: all of them are its prompt, as outside of generate."""
    model, by_hand = adapt(positions="l2")
    found = []

    class Asks(LogitsProcessor):
        def __call__(self, input_ids, scores):
            found.append((input_ids, model(input_ids=input_ids).logits))
            return scores

    generated(model, ids, None, logits_processor=[Asks()])
    for input_ids, logits in found:
        end = input_ids.shape[1]
        expected = by_hand.logits({"unit": [[end - 2, end - 1]] * 2}, input_ids=input_ids)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_another_adapter_within_generate(adapt, ids):
    """A reward model that is another adapter of the same base, asked by a criterion, in eval mode or generating."""
    model, by_hand = adapt(positions="f2+l2")
    model.add_adapter("reward", ReftConfig(task_type="CAUSAL_LM", r=2, positions="l3", init_weights=False))
    reward = ByHand(by_hand.base, model, "reward")
    found = []

    class Asks(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            model.set_adapter("reward")
            found.append((input_ids, model(input_ids=input_ids).logits, generated(model, input_ids, None)))
            model.set_adapter("default")
            return torch.zeros(len(input_ids), dtype=torch.bool)

    columns = {"prefix": [[0, 1]] * 2, "suffix": [[10, 11]] * 2}
    expected = by_hand.generate(columns, ids)
    assert torch.equal(generated(model, ids, None, stopping_criteria=[Asks()]), expected)
    assert len(found) == 6
    for input_ids, logits, tokens in found[::2]:
        end = input_ids.shape[1]
        columns = {"unit": [[end - 3, end - 2, end - 1]] * 2}
        torch.testing.assert_close(logits, reward.logits(columns, input_ids=input_ids), atol=1e-5, rtol=1e-5)
        assert torch.equal(tokens, reward.generate(columns, input_ids))


def test_another_model_within_generate(adapt, ids):
    model, by_hand = adapt(positions="f2+l2")
    other, other_by_hand = adapt(make_gpt2, positions="l3")
    found = []

    class Asks(LogitsProcessor):
        def __call__(self, input_ids, scores):
            found.append((input_ids, other(input_ids=input_ids).logits, generated(other, input_ids, None)))
            return scores

    expected = by_hand.generate({"prefix": [[0, 1]] * 2, "suffix": [[10, 11]] * 2}, ids)
    assert torch.equal(generated(model, ids, None, logits_processor=[Asks()]), expected)
    for input_ids, logits, tokens in found[::2]:
        end = input_ids.shape[1]
        columns = {"unit": [[end - 3, end - 2, end - 1]] * 2}
        torch.testing.assert_close(logits, other_by_hand.logits(columns, input_ids=input_ids), atol=1e-5, rtol=1e-5)
        assert torch.equal(tokens, other_by_hand.generate(columns, input_ids))


DRAFT = dict(num_assistant_tokens=3, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0)


def count_calls(module):
    calls = []
    module.register_forward_pre_hook(lambda module, args: calls.append(1))
    return calls


@pytest.mark.parametrize("target", ["adapted", "by hand"])
def test_draft_model_keeps_the_prompt(adapt, ids, target):
    """A draft that is as good as its target has every token accepted: four a call, so it edits the same tokens.

    It is called anew for every draft, with all tokens so far, and is told nothing of the prompt.
    """
    model, by_hand = adapt(positions="f2+l2")
    draft = copy.deepcopy(model).get_base_model()
    draft.generation_config.update(**DRAFT)
    columns = {"prefix": [[0, 1]], "suffix": [[10, 11]]}
    expected = by_hand.generate(columns, ids[:1], new_tokens=12)
    options = dict(assistant_model=draft, max_new_tokens=12)
    if target == "adapted":
        calls = count_calls(model.get_base_model())
        tokens = generated(model, ids[:1], None, **options)
    else:
        calls = count_calls(by_hand.base)
        with by_hand.edits(columns):
            tokens = generated(by_hand.base, ids[:1], None, **options)
    assert torch.equal(tokens, expected)
    assert len(calls) == 3
    # and a call that is not for a draft begins anew
    assert torch.equal(generated(draft, ids[:1], None, max_new_tokens=12), expected)


@pytest.mark.parametrize("exit_after", [1, 2])
def test_model_that_drafts_for_itself(adapt, ids, exit_after, monkeypatch):
    """Its first layers draft, edited as they are in the target: tokens are those without drafts."""
    model, by_hand = adapt(positions="f2+l2")
    columns = {"prefix": [[0, 1]], "suffix": [[10, 11]]}
    drafted = []
    generate = type(model.get_base_model()).generate

    def look(self, *args, **kwargs):
        tokens = generate(self, *args, **kwargs)
        if self.config.num_hidden_layers == exit_after:
            drafted.append((kwargs["input_ids"], tokens.sequences))
        return tokens

    monkeypatch.setattr(type(model.get_base_model()), "generate", look)
    tokens = generated(model, ids[:1], None, assistant_early_exit=exit_after, max_new_tokens=9)
    monkeypatch.undo()
    assert torch.equal(tokens, by_hand.generate(columns, ids[:1], new_tokens=9))
    by_hand.base.config.num_hidden_layers = exit_after
    assert len(drafted) > 1
    for given, sequences in drafted:
        expected = by_hand.generate(columns, given, new_tokens=sequences.shape[1] - given.shape[1])
        assert torch.equal(sequences, expected)


def test_answer_after_a_cached_prompt(adapt, ids):
    """Labels tell the answer from the prompt that the cache holds: it is not edited, in eval and in training."""
    model, by_hand = adapt(positions="f2+l2")
    expected = by_hand.logits({"prefix": [[0, 1]] * 2, "suffix": [[6, 7]] * 2}, input_ids=ids)[:, 8:]
    for mode in map(model.train, (False, True)):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            mode(input_ids=ids[:, :8], prompt_lengths=torch.tensor([8, 8]), use_cache=True, **{CACHE: cache})
            found = mode(input_ids=ids[:, 8:], labels=ids[:, 8:].contiguous(), use_cache=True, **{CACHE: cache}).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("given", ["ids", "embeddings"])
def test_new_tokens_alone_after_a_filled_cache_are_refused(adapt, ids, given):
    """Nothing says that they are new: they would be taken for what the cache holds, and not be edited."""
    model, by_hand = adapt(positions="l2")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids[:, :6], use_cache=True, **{CACHE: cache})
    new = ids[:, 6:]
    inputs = dict(input_ids=new) if given == "ids" else dict(inputs_embeds=by_hand.base.get_input_embeddings()(new))
    with pytest.raises(ValueError, match="given 6 tokens and a cache that holds 6.*Give the whole history"):
        model.generate(**inputs, **GREEDY, **{CACHE: cache})


def test_static_cache_by_hand(adapt, ids):
    """Its prepared mask has a column for every token that it could hold."""
    model, by_hand = adapt(positions="f2+l2")
    cache = StaticCache(config=model.config, max_cache_len=20)
    mask = torch.zeros(2, 1, 12, 20, dtype=torch.bool)
    mask[..., :12] = torch.ones(12, 12, dtype=torch.bool).tril()
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask, use_cache=True, **{CACHE: cache}).logits
    expected = by_hand.logits({"prefix": [[0, 1]] * 2, "suffix": [[10, 11]] * 2}, input_ids=ids)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_prepared_mask_that_lets_padding_attend_to_everything(adapt, ids):
    mask = torch.ones(2, 1, 12, 12, dtype=torch.bool).tril()
    mask[1, :, :, :4] = False
    mask[1, :, :4] = True
    model, by_hand = adapt(positions="f2+l2")
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask).logits
    expected = by_hand.logits(GENERATED["f2+l2"], input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1, 4:], expected[1, 4:], atol=1e-5, rtol=1e-5)


def make_mamba():
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=4,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=None,
    )
    return MambaForCausalLM(config).eval()


def test_state_space_model(adapt, ids):
    """Its cache does not tell how much it has seen."""
    model, by_hand = adapt(make_mamba, positions="l2")
    ids = ids[:1]
    expected = by_hand.generate({"unit": [[10, 11]]}, ids)
    assert torch.equal(model.generate(input_ids=ids, **GREEDY), expected)
    assert torch.equal(model.generate(input_ids=ids, use_cache=False, **GREEDY), expected)
    tokens, given, cache = ids, ids, {}
    with torch.no_grad():
        for _ in range(6):
            output = model(input_ids=given, use_cache=True, **cache)
            name = next(name for name in CACHES if output.get(name) is not None)
            cache = {name: output[name]}
            given = output.logits[:, -1:].argmax(-1)
            tokens = torch.cat([tokens, given], dim=1)
    assert torch.equal(tokens, expected)


STATEFUL = {
    "rwkv": dict(attention_hidden_size=32, intermediate_size=64),
    "recurrent_gemma": dict(lru_width=32, intermediate_size=96, num_attention_heads=4),
}


@pytest.mark.parametrize("family", STATEFUL)
def test_state_that_is_kept_elsewhere(adapt, ids, family):
    """Under another name than a cache's, or within the model: generate gives one token a step all the same."""
    shape = dict(hidden_size=32, num_hidden_layers=3, vocab_size=64, initializer_range=0.2)
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=None)
    config = AutoConfig.for_model(family, **shape | special | STATEFUL[family])

    def make():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()

    model, by_hand = adapt(make, positions="l2")
    expected = ids[:1]
    for _ in range(6):
        logits = by_hand.logits({"unit": [[10, 11]]}, input_ids=expected)
        expected = torch.cat([expected, logits[:, -1:].argmax(-1)], dim=1)
    for use_cache in (True, False):
        assert torch.equal(generated(model, ids[:1], None, use_cache=use_cache), expected)
    with model.disable_adapter():
        assert not torch.equal(generated(model, ids[:1], None), expected)


def make_openai_gpt():
    torch.manual_seed(0)
    config = OpenAIGPTConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
    return OpenAIGPTLMHeadModel(config).eval()


@pytest.mark.parametrize("positions", GENERATED)
def test_model_that_has_no_use_for_its_cache(adapt, ids, positions):
    """generate makes a cache that the model leaves empty: every step is given all tokens, and edits the prompt's."""
    model, by_hand = adapt(make_openai_gpt, positions=positions)
    options = dict(return_dict_in_generate=True, output_logits=True)
    with by_hand.edits(GENERATED[positions]):
        expected = generated(by_hand.base, ids, **options)
    torch.testing.assert_close(generated(model, ids, **options).logits, expected.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("held", "state", "step"), [(0, False, (0, 5)), (3, False, AFTER_PROMPT), (0, True, AFTER_PROMPT)]
)
def test_more_tokens_than_the_prompt_has(held, state, step):
    """All tokens so far, where no cache holds any; drafts of the answer, where one does."""

    class Holds:
        def get_seq_length(self):
            return held

    generation = Generation(ModelToken(), valid=torch.ones(1, 3, dtype=torch.bool), seen=3)
    inputs = {"input_ids": torch.zeros(1, 5), "past_key_values": Holds(), "state": [] if state else None}
    assert generation.step(inputs) == step


def make_gemma4():
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gemma4_text",
        **TINY | dict(num_hidden_layers=4),
        num_key_value_heads=2,
        head_dim=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=64,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=None,
        per_layer_config={},
    )
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("positions", ["f2+l2", "l1", "all"])
def test_layers_that_are_given_the_last_tokens_alone(adapt, ids, positions):
    """Gemma 4's last layers write no cache: of a prompt they are given the token whose logits are asked for."""
    model, by_hand = adapt(make_gemma4, positions=positions)
    whole = {"l1": {"unit": [[11], [11]]}} | GENERATED
    seen = []
    model.get_base_model().model.layers[-1].register_forward_hook(lambda *args: seen.append(args[2].shape[1]))
    tokens = generated(model, ids)
    assert max(seen) == 1
    assert torch.equal(tokens, by_hand.generate(whole[positions], ids, MASK))
    assert not torch.equal(tokens, generated(by_hand.base, ids))


def make_rwkv():
    torch.manual_seed(0)
    config = RwkvConfig(
        vocab_size=64, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2, eos_token_id=None
    )
    return RwkvForCausalLM(config).eval()


def test_state_in_place_of_a_cache(adapt, ids):
    """RWKV carries its state on: a token that comes with one goes on with an answer."""
    model, by_hand = adapt(make_rwkv, positions="l2")
    for block in (*by_hand.base.rwkv.blocks, *model.get_base_model().rwkv.blocks):
        with torch.no_grad():  # drawn as zeros, they would read nothing of other tokens
            for linear in (block.attention.output, block.attention.value, block.attention.receptance):
                linear.weight.copy_(torch.eye(32))
    expected = by_hand.logits({"unit": [[10, 11]]}, input_ids=torch.cat([ids[:1], ids[1:, :1]], dim=1))[:, -1:]
    with torch.no_grad():
        state = model(input_ids=ids[:1], use_cache=True).state
        found = model(input_ids=ids[1:, :1], state=state, use_cache=True).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_cache_of_an_unknown_kind():
    with pytest.raises(ValueError, match="cache of type object.*continuous batching"):
        cached_tokens(object())


def test_cache_that_cannot_tell_its_length():
    """transformers' caches raise where no layer is one of attention."""

    class Silent(DynamicCache):
        def get_seq_length(self, *args):
            raise ValueError("only attention layers can tell")

    assert cached_tokens(Silent()) is None


TINY = dict(num_hidden_layers=2, hidden_size=32, intermediate_size=64, num_attention_heads=4, vocab_size=64)
FAMILIES = {
    "gemma3_text": dict(num_key_value_heads=2, head_dim=8, sliding_window=6),
    "qwen3": dict(num_key_value_heads=2, head_dim=8),
    "mistral": dict(num_key_value_heads=2, sliding_window=6),
    "opt": dict(ffn_dim=64, word_embed_proj_dim=32),
    "gpt_neox": {},
    "phi": {},
    "cohere": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(adapt, ids, family):
    """Sliding windows, learned and rotary positions, parallel blocks, norms after blocks: trained and used alike."""

    def make():
        torch.manual_seed(0)
        special = dict(initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=None)
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(family, **TINY | special | FAMILIES[family])
        ).eval()

    model, _ = adapted = adapt(make, positions="f2+l2")
    columns = {"prefix": [[0, 1], [0, 1]], "suffix": [[3, 4], [6, 7]]}
    if family != "cohere":  # whose logits are scaled down
        assert_edits(adapted, columns, input_ids=ids, labels=labels_of(ids, *TWO["answers"]))
    assert torch.equal(generated(model, ids), adapted[1].generate(GENERATED["f2+l2"], ids, MASK))
