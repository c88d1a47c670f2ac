"""generate in its many forms: tokens are those of the base model's generate, called alike, with edits by hand."""

import copy
import string
import threading

import pytest
import torch
from by_hand import CACHE, GREEDY, MASK, VOCABULARY, make_llama
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    TextIteratorStreamer,
)

# Of the two rows of MASK: prompts of twelve and of eight tokens, at whose ends positions are edited
COLUMNS = {"prefix": [[0, 1], [4, 5]], "suffix": [[10, 11], [10, 11]]}
PLAIN = pytest.mark.parametrize("adapt", ["get_peft_model"], indirect=True)


def copies(columns, n):
    """The same columns for `n` rows of each prompt."""
    return {unit: [row for row in rows for _ in range(n)] for unit, rows in columns.items()}


def first_row(columns):
    return {unit: rows[:1] for unit, rows in columns.items()}


def assert_same_tokens(model, by_hand, columns, *args, seed=5, **options):
    """The tokens of the adapted model are those by hand, and not those of the base model."""
    torch.manual_seed(seed)
    found = model.generate(*args, **options)
    torch.manual_seed(seed)
    with by_hand.edits(columns):
        expected = by_hand.base.generate(*args, **options)
    assert torch.equal(found, expected)
    torch.manual_seed(seed)
    plain = by_hand.base.generate(*args, **options)
    assert plain.shape != found.shape or not torch.equal(found, plain), "the edit is too small to be seen"
    return found


def stops_after(token):
    class Stops(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids[:, -1] == token

    return [Stops()]


WAYS = {  # options, rows for each prompt
    "greedy": ({}, 1),
    "no cache": (dict(use_cache=False), 1),
    "static cache": (dict(cache_implementation="static"), 1),
    "chunks": (dict(prefill_chunk_size=5), 1),
    "samples": (dict(do_sample=True, num_return_sequences=3, top_p=0.9), 3),
    "beams": (dict(num_beams=4, num_return_sequences=2), 4),
    "sampled beams": (dict(num_beams=4, do_sample=True), 4),
    "beams in a static cache": (dict(num_beams=4, cache_implementation="static"), 4),
    "length": (dict(max_new_tokens=None, max_length=15), 1),
    "all logits": (dict(logits_to_keep=0), 1),
    "processors": (dict(repetition_penalty=1.3, no_repeat_ngram_size=2, min_p=0.1), 1),
    "allowed tokens": (dict(prefix_allowed_tokens_fn=lambda row, ids: [*range(3, 40)]), 1),
}


@pytest.mark.parametrize("way", WAYS)
def test_ways(adapt, ids, way):
    model, by_hand = adapt()
    options, rows = WAYS[way]
    options = GREEDY | dict(input_ids=ids, attention_mask=MASK) | options
    assert_same_tokens(model, by_hand, copies(COLUMNS, rows), **options)


@pytest.mark.parametrize("adapt", ["add_adapter"], indirect=True)
def test_added_adapter(adapt, ids):
    model, by_hand = adapt()
    assert not isinstance(model, PeftModel)
    assert_same_tokens(model, by_hand, COLUMNS, input_ids=ids, attention_mask=MASK, **GREEDY)


ONE_ROW = {
    "prompt lookup": dict(prompt_lookup_num_tokens=3),
    "draft of its own layers": dict(assistant_early_exit=2),
    "draft model": dict(assistant_model=make_llama(layers=1)),
    "sampled draft model": dict(assistant_model=make_llama(layers=1), do_sample=True),
}


@pytest.mark.parametrize("way", ONE_ROW)
def test_assisted(adapt, ids, way):
    model, by_hand = adapt()
    options = GREEDY | dict(max_new_tokens=12) | ONE_ROW[way]
    assert_same_tokens(model, by_hand, first_row(COLUMNS), ids[:1], **options)


@PLAIN
def test_adapted_draft_of_an_adapted_model(adapt, ids):
    """Each is edited by its own adapter; a `PeftModel` can be the draft, too."""
    model, by_hand = adapt()
    draft, _ = adapt(lambda: make_llama(layers=2), positions="l3")
    for assistant in (draft, draft.get_base_model(), model):
        options = GREEDY | dict(max_new_tokens=12)
        found = model.generate(ids[:1], assistant_model=assistant, **options)
        assert torch.equal(found, by_hand.generate(first_row(COLUMNS), ids[:1], new_tokens=12))


def test_stops(adapt, ids):
    """Rows that end at different steps: by the end-of-sequence token, or by a criterion."""
    model, by_hand = adapt()
    tokens = by_hand.generate(COLUMNS, ids, MASK)
    stop = next(step for step in range(13, 17) if tokens[0, step] not in tokens[1, 12:])
    end = int(tokens[0, stop])
    for options in (dict(eos_token_id=end), dict(stopping_criteria=stops_after(end), eos_token_id=1)):
        options = GREEDY | dict(input_ids=ids, attention_mask=MASK) | options
        found = assert_same_tokens(model, by_hand, COLUMNS, **options)
        assert found[0, stop + 1 :].eq(0).all() and torch.equal(found[1], tokens[1])


def test_stop_strings(adapt, ids):
    model, by_hand = adapt()
    letters = string.ascii_letters + string.digits + "-+"
    core = Tokenizer(models.WordLevel({letter: number for number, letter in enumerate(letters)}, unk_token="+"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tokens = by_hand.generate(first_row(COLUMNS), ids[:1])
    stop = letters[tokens[0, 13]] + letters[tokens[0, 14]]
    options = GREEDY | dict(stop_strings=[stop], tokenizer=PreTrainedTokenizerFast(tokenizer_object=core))
    found = assert_same_tokens(model, by_hand, first_row(COLUMNS), ids[:1], **options)
    assert torch.equal(found, tokens[:, :15])


def test_from_embeddings(adapt, ids):
    """Alone; with ids that only tell what was said; with ids of another length, which are not the prompt."""
    model, by_hand = adapt()
    embeds = by_hand.base.get_input_embeddings()(ids)
    options = GREEDY | dict(inputs_embeds=embeds, attention_mask=MASK)
    assert_same_tokens(model, by_hand, COLUMNS, **options)
    assert_same_tokens(model, by_hand, COLUMNS, ids, **options)
    assert_same_tokens(model, by_hand, COLUMNS, ids[:, -3:], **options)
    assert_same_tokens(model, by_hand, first_row(COLUMNS), inputs_embeds=embeds[:1], **GREEDY)


def test_without_a_prompt(adapt):
    """generate then begins with the token that begins sequences, which is the prompt."""
    model, by_hand = adapt(positions="l1")
    options = GREEDY | dict(bos_token_id=1)
    assert_same_tokens(model, by_hand, {"unit": [[0]]}, **options)


def test_reported_states(adapt, ids):
    """The states and logits that generate reports are those of one forward over all of its tokens."""
    model, _ = adapt()
    report = dict(return_dict_in_generate=True, output_hidden_states=True, output_logits=True)
    found = model.generate(ids, **GREEDY, **report)
    with torch.no_grad():
        output = model(
            input_ids=found.sequences[:, :-1], prompt_lengths=torch.tensor([12, 12]), output_hidden_states=True
        )
    for layer, expected in enumerate(output.hidden_states):
        states = torch.cat([step[layer] for step in found.hidden_states], dim=1)
        torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-5)
    logits = torch.stack(found.logits, dim=1)
    torch.testing.assert_close(logits, output.logits[:, 11:], atol=1e-5, rtol=1e-5)


def test_inference_mode(adapt, ids):
    model, by_hand = adapt()
    with torch.inference_mode():
        assert_same_tokens(model, by_hand, COLUMNS, ids, attention_mask=MASK, **GREEDY)


@PLAIN
def test_base_inside_a_peft_model(adapt, ids):
    model, by_hand = adapt()
    assert isinstance(model, PeftModel)
    expected = by_hand.generate(COLUMNS, ids, MASK)
    for generate in (model.generate, model.base_model.generate, model.base_model.model.generate):
        assert torch.equal(generate(ids, attention_mask=MASK, **GREEDY), expected)
        assert torch.equal(generate(inputs=ids, attention_mask=MASK, **GREEDY), expected)


# Caches


@pytest.mark.parametrize("new_alone", [False, True], ids=["all ids", "new ids"])
@pytest.mark.parametrize("chunk", [None, 2])
def test_turns_with_a_kept_cache(adapt, ids, new_alone, chunk):
    """A turn is edited at its own end when it is given; the history keeps the edits that it was cached with.

    The last token of an answer is not in the cache yet, and belongs to what the next call is given.
    """
    model, by_hand = adapt(positions="f2+l3")
    cache = DynamicCache(config=by_hand.base.config)
    tokens, ends = ids[:1, :0], []
    for turn in (ids[:1, :9], ids[1:, :2], ids[1:, 4:8]):
        seen = cache.get_seq_length()
        tokens = torch.cat([tokens, turn], dim=1)
        ends += range(max(seen, tokens.shape[1] - 3), tokens.shape[1])
        expected = by_hand.generate({"prefix": [[0, 1]], "suffix": [ends]}, tokens)
        options = GREEDY | ({} if chunk is None else dict(prefill_chunk_size=chunk)) | {CACHE: cache}
        given = dict(input_ids=tokens)
        if new_alone:  # as transformers wants it: with a mask for all
            given = dict(input_ids=tokens[:, seen:], attention_mask=torch.ones_like(tokens))
        found = model.generate(**given, **options)
        assert torch.equal(found if not new_alone else torch.cat([tokens[:, :seen], found], dim=1), expected)
        tokens = expected
    assert ends == [6, 7, 8, 14, 15, 16, 24, 25, 26]


@PLAIN
@pytest.mark.parametrize("positions", ["prompt", "all"])
def test_what_a_kept_cache_holds(adapt, ids, positions):
    """With "prompt", an answer is not edited though it is part of a later prompt, but for its last token."""
    model, by_hand = adapt(positions=positions)
    cache = DynamicCache(config=by_hand.base.config)
    first = model.generate(ids[:1], **GREEDY, **{CACHE: cache})
    turn = torch.cat([first, ids[1:, :4]], dim=1)
    columns = [*range(12), *range(17, 22)] if positions == "prompt" else [*range(99)]
    expected = by_hand.generate({"unit": [columns]}, turn)
    assert torch.equal(model.generate(turn, **GREEDY, **{CACHE: cache}), expected)


@PLAIN
def test_one_cached_prompt_for_many(adapt, ids):
    """Copies of a cache that holds the beginning of several prompts, cut back and used again."""
    model, by_hand = adapt(positions="l2")
    cache = DynamicCache(config=by_hand.base.config)
    with torch.no_grad():
        model(input_ids=ids[:1, :6], use_cache=True, **{CACHE: cache})  # a prompt of its own: edited at 4 and 5
    for rest in (ids[1:, :3], ids[1:, :5]):
        prompt = torch.cat([ids[:1, :6], rest], dim=1)
        end = prompt.shape[1]
        expected = by_hand.generate({"unit": [[4, 5, end - 2, end - 1]]}, prompt)
        used = copy.deepcopy(cache)
        assert torch.equal(model.generate(prompt, **GREEDY, **{CACHE: used}), expected)
        used.crop(6 - used.get_seq_length())
        assert torch.equal(model.generate(prompt, **GREEDY, **{CACHE: used}), expected)


TINY = dict(num_hidden_layers=2, hidden_size=32, intermediate_size=64, num_attention_heads=4, vocab_size=VOCABULARY)
WINDOWS = {  # every one shorter than the prompts
    "mistral": dict(num_key_value_heads=2, sliding_window=5),
    "gemma3_text": dict(
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"],
    ),
}


@PLAIN
@pytest.mark.parametrize("way", ["no cache", "greedy", "chunks", "static cache", "beams"])
@pytest.mark.parametrize("family", WINDOWS)
def test_sliding_windows(adapt, ids, family, way):
    """Caches that forget the prompt's beginning, in all layers or in some."""

    def make():
        torch.manual_seed(0)
        special = dict(initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=None)
        config = AutoConfig.for_model(family, **TINY | special | WINDOWS[family])
        return AutoModelForCausalLM.from_config(config).eval()

    model, by_hand = adapt(make)
    options, rows = WAYS[way]
    found = assert_same_tokens(
        model, by_hand, copies(COLUMNS, rows), **GREEDY | dict(input_ids=ids, attention_mask=MASK) | options
    )
    if rows == 1:
        assert torch.equal(found, by_hand.generate(COLUMNS, ids, MASK))


@PLAIN
def test_quantized_cache(adapt, ids):
    """Keys and values are rounded, so tokens are those of an edited base whose cache is quantized alike."""
    pytest.importorskip("hqq", reason="needs hqq, which quantizes the cache")
    model, by_hand = adapt()
    config = dict(backend="hqq", nbits=4, residual_length=4, q_group_size=8)
    options = GREEDY | dict(cache_implementation="quantized", cache_config=config)
    assert_same_tokens(model, by_hand, first_row(COLUMNS), ids[:1], **options)


@PLAIN
@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="transformers offloads a cache from a GPU alone")
def test_offloaded_cache(adapt, ids, cache):
    model, by_hand = adapt()
    expected = by_hand.generate(COLUMNS, ids, MASK)
    given = dict(input_ids=ids.to("cuda"), attention_mask=MASK.to("cuda"))
    tokens = model.to("cuda").generate(**given, cache_implementation=cache, **GREEDY)
    assert torch.equal(tokens.cpu(), expected)


# Ways of one's own


def greedily(model, input_ids, logits_processor, stopping_criteria, generation_config, **inputs):
    return GenerationMixin._sample(model, input_ids, logits_processor, stopping_criteria, generation_config, **inputs)


def without_a_cache(model, input_ids, attention_mask=None, **inputs):
    for _ in range(5):
        logits = model(**model.prepare_inputs_for_generation(input_ids, use_cache=False)).logits
        input_ids = torch.cat([input_ids, logits[:, -1:].argmax(-1)], dim=1)
    return input_ids


def contrastively(model, input_ids, attention_mask=None, **inputs):
    """Like contrastive search: each step tries some tokens, in copies of the cache."""
    cache = DynamicCache(config=model.config)
    logits = model(input_ids=input_ids, use_cache=True, **{CACHE: cache}).logits[:, -1]
    for _ in range(5):
        tried = logits.topk(3).indices
        wide = copy.deepcopy(cache)
        wide.batch_repeat_interleave(3)
        outlook = model(input_ids=tried.view(-1, 1), use_cache=True, **{CACHE: wide}).logits[:, -1]
        best = outlook.logsumexp(-1).view(tried.shape).argmin(-1, keepdim=True)
        token = tried.gather(1, best)
        input_ids = torch.cat([input_ids, token], dim=1)
        logits = model(input_ids=token, use_cache=True, **{CACHE: cache}).logits[:, -1]
    return input_ids


def in_groups(model, input_ids, attention_mask=None, **inputs):
    """Like diverse beams: two groups of a row each, the second of which avoids the first's token."""
    input_ids = input_ids.repeat_interleave(2, dim=0)
    cache = DynamicCache(config=model.config)
    given = input_ids
    for _ in range(5):
        logits = model(input_ids=given, use_cache=True, **{CACHE: cache}).logits[:, -1].clone()
        first = logits[::2].argmax(-1, keepdim=True)
        logits[1::2] = logits[1::2].scatter(1, first, -torch.inf)
        given = logits.argmax(-1, keepdim=True)
        input_ids = torch.cat([input_ids, given], dim=1)
    return input_ids


@pytest.mark.parametrize("function", [greedily, without_a_cache, contrastively, in_groups])
def test_custom_generate(adapt, ids, function):
    model, by_hand = adapt(positions="l2")
    columns = {"unit": [[10, 11]] * (4 if function is in_groups else 2)}
    assert_same_tokens(model, by_hand, columns, ids, custom_generate=function, **GREEDY)


def test_custom_generate_of_a_repository(adapt, ids, tmp_path):
    """As on the Hub, where transformers has moved contrastive search, DoLa, diverse and constrained beams."""
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate" / "generate.py").write_text(
        "from transformers import GenerationMixin\n\n\n"
        "def greedily(model, input_ids, logits_processor, stopping_criteria, generation_config, **inputs):\n"
        "    given = logits_processor, stopping_criteria, generation_config\n"
        "    return GenerationMixin._sample(model, input_ids, *given, **inputs)\n\n\n"
        "def generate(model, *args, **kwargs):\n"
        "    return GenerationMixin.generate(model, *args, custom_generate=greedily, **kwargs)\n"
    )
    model, by_hand = adapt()
    options = GREEDY | dict(custom_generate=str(tmp_path), trust_remote_code=True)
    assert torch.equal(model.generate(ids, **options), by_hand.generate(copies(first_row(COLUMNS), 2), ids))


@PLAIN
@pytest.mark.parametrize(
    "options",
    [
        dict(penalty_alpha=0.6, top_k=4),
        dict(dola_layers="low"),
        dict(num_beams=4, num_beam_groups=2, diversity_penalty=1.0),
        dict(num_beams=2, force_words_ids=[[5]]),
    ],
    ids=["contrastive", "dola", "diverse beams", "constrained beams"],
)
def test_ways_that_transformers_has_moved_to_the_hub(adapt, ids, options):
    """The adapter changes nothing here: transformers wants to be told that it may run the Hub's code."""
    model, _ = adapt()
    with pytest.raises(ValueError, match="trust_remote_code=True.*https://hf.co/transformers-community"):
        model.generate(ids, **GREEDY | options)


# Streams and threads


def test_stream_from_a_thread(adapt, tokenizer, ids):
    """Two calls at once, each in a thread of its own, read as they come."""
    model, by_hand = adapt()
    prompts = [ids[:1], ids[1:, :7]]
    streamers = [TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60) for _ in prompts]
    allowed = dict(prefix_allowed_tokens_fn=lambda row, given: [*range(6, len(tokenizer))])
    threads = [
        threading.Thread(target=model.generate, args=(prompt,), kwargs=GREEDY | allowed | dict(streamer=streamer))
        for prompt, streamer in zip(prompts, streamers, strict=True)
    ]
    for thread in threads:
        thread.start()
    texts = ["".join(streamer) for streamer in streamers]
    for thread in threads:
        thread.join()
    for prompt, text in zip(prompts, texts, strict=True):
        end = prompt.shape[1]
        with by_hand.edits({"prefix": [[0, 1]], "suffix": [[end - 2, end - 1]]}):
            expected = by_hand.base.generate(prompt, **GREEDY, **allowed)
        assert text == tokenizer.decode(expected[0, end:]) and len(text.split()) == 6


@pytest.mark.slow
@PLAIN
def test_compiled_static_cache(adapt, ids):
    """One graph for decoding, as for the base model, however many tokens; the tokens are those of the plain road."""
    from torch._dynamo.utils import counters
    from transformers import CompileConfig

    model, by_hand = adapt()
    config = CompileConfig(fullgraph=True, dynamic=False, backend="eager")
    config._compile_all_devices = True
    graphs = []
    for generating in (by_hand.base, model.get_base_model()):
        torch._dynamo.reset()
        counters.clear()
        for new_tokens in (6, 9):
            options = dict(cache_implementation="static", compile_config=config, max_cache_len=24)
            tokens = generating.generate(ids, **GREEDY | options | dict(max_new_tokens=new_tokens))
            graphs.append(counters["stats"]["unique_graphs"])
            if generating is not by_hand.base:
                expected = by_hand.generate(copies(first_row(COLUMNS), 2), ids, new_tokens=new_tokens)
                assert torch.equal(tokens, expected)
    assert graphs == [1, 1, 1, 1]
