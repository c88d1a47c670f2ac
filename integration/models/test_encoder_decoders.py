"""Encoder-decoders: the encoder's prompt is its input, the decoder's what comes before the answer."""

import copy

import pytest
import torch
from by_hand import CACHE, adapt_model
from peft import AutoPeftModelForSeq2SeqLM
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForSequenceClassification,
    DataCollatorForSeq2Seq,
    DynamicCache,
    EncoderDecoderCache,
    GPT2Config,
    LogitsProcessor,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)

ENCODER_MASK = torch.tensor([[1] * 12, [1] * 9 + [0] * 3])
ENCODER = {"prefix": [[0, 1], [0, 1]], "suffix": [[10, 11], [7, 8]]}
NOWHERE = {"prefix": [[]], "suffix": [[]]}
GREEDY = dict(do_sample=False, max_new_tokens=5, return_dict_in_generate=True, output_logits=True)

SHAPE = dict(
    vocab_size=64,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
    dropout=0.0,
    attention_dropout=0.0,
    activation_dropout=0.0,
    encoder_layerdrop=0.0,
    decoder_layerdrop=0.0,
    init_std=0.3,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
    forced_eos_token_id=None,
    decoder_start_token_id=2,
)
FAMILIES = {
    "t5": dict(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        dropout_rate=0.0,
        eos_token_id=None,
    ),
    "bart": SHAPE,
    "marian": SHAPE,
}
DECODER_BLOCKS = r".*decoder\.(block|layers)\.\d+"
BOTH_BLOCKS = r".*(encoder|decoder)\.(block|layers)\.\d+"


def make(family):
    torch.manual_seed(0)
    return AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(family, **FAMILIES[family])).eval()


def adapt(base, **options):
    return adapt_model(base, **{"task_type": "SEQ_2_SEQ_LM", "positions": "f2+l2"} | options)


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def assert_generates(model, by_hand, columns, within="", **inputs):
    """The tokens and logits are those of generation without a cache by hand, and others than the base model's."""
    of_caches = ("cache_implementation", "use_cache")
    plain = {name: value for name, value in inputs.items() if name not in of_caches}
    rows = inputs.get("num_beams", 1)
    columns = {unit: [row for row in listed for _ in range(rows)] for unit, listed in columns.items()}
    with by_hand.edits(columns, within):
        expected = by_hand.base.generate(**plain, **GREEDY, use_cache=False)
    found = model.generate(**inputs, **GREEDY)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)
    unedited = by_hand.base.generate(**plain, **GREEDY)
    assert (unedited.logits[0] - expected.logits[0]).abs().max() > 1e-2, "the edit is too small to be seen"


@pytest.mark.parametrize("family", FAMILIES)
def test_encoder(tmp_path, ids, family):
    make(family).save_pretrained(tmp_path / "base")
    base = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
    model, by_hand = adapt(base)
    assert all("encoder." in block and "decoder" not in block for block in by_hand.tensors)
    inputs = dict(input_ids=ids, attention_mask=ENCODER_MASK)
    labelled = inputs | dict(labels=ids[:, :5].contiguous())
    expected = by_hand.logits(ENCODER, **labelled)
    assert (expected - by_hand.logits(NOWHERE, **labelled)).abs().max() > 1e-2
    for mode in map(model.train, (True, False)):  # labels and prompt_lengths are the decoder's
        with torch.no_grad():
            assert_close(mode(**labelled).logits, expected)
            assert_close(mode(**labelled, prompt_lengths=torch.tensor([1, 2])).logits, expected)
    assert_generates(model, by_hand, ENCODER, **inputs)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter").eval()
    assert_generates(loaded, by_hand, ENCODER, **inputs)


TOLD = {  # the first answer tokens are the decoder's 1st and 4th, so its prompts have 1 and 4 tokens
    "f2+l2": {"prefix": [[], [0, 1]], "suffix": [[0], [2, 3]]},
    "f3": {"unit": [[0], [0, 1, 2]]},
    "l1": {"unit": [[0], [3]]},
    "prompt": {"unit": [[0], [0, 1, 2, 3]]},
    "all": {"unit": [list(range(8))] * 2},
}


@pytest.mark.parametrize("positions", TOLD)
@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_in_training(ids, family, positions):
    """The tokens of `decoder_input_ids` before the first one that is a label, or as many as prompt_lengths says."""
    model, by_hand = adapt(make(family), positions=positions, target_modules=DECODER_BLOCKS)
    labels = ids[:, :8].clone()
    labels[1, :3] = -100
    inputs = dict(input_ids=ids, attention_mask=ENCODER_MASK, decoder_input_ids=ids[:, 3:11])
    expected = by_hand.logits(TOLD[positions], **inputs)
    assert (expected - by_hand.base(**inputs).logits).abs().max() > 1e-2
    for told in (dict(labels=labels), dict(prompt_lengths=torch.tensor([1, 4]))):
        for mode in map(model.train, (True, False)):
            with torch.no_grad():
                assert_close(mode(**inputs, **told).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_inputs_that_are_made_of_labels(ids, family):
    """Labels alone: the prompt is the start token, as it is in generate."""
    model, by_hand = adapt(make(family), positions="l2", target_modules=DECODER_BLOCKS)
    labels = ids[:, :5].clone()
    labels[1, 3:] = -100
    inputs = dict(input_ids=ids, attention_mask=ENCODER_MASK, labels=labels)
    expected = by_hand.logits({"unit": [[0], [0]]}, **inputs)
    with torch.no_grad():
        assert_close(model.train()(**inputs).logits, expected)
    assert_generates(model.eval(), by_hand, {"unit": [[0], [0]]}, input_ids=ids, attention_mask=ENCODER_MASK)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["start token", "prompt", "padded prompt", "beams", "static", "no cache", "encoded"])
def test_decoder_in_generation(ids, family, how):
    """What the decoder is given to begin with is its prompt."""
    base = make(family)
    model, by_hand = adapt(base, positions="f2+l1", target_modules=DECODER_BLOCKS, share_weights=True)
    inputs = dict(input_ids=ids, attention_mask=ENCODER_MASK)
    columns = {"unit": [[0, 1, 3]] * 2}
    prompt = ids[:, :4].clone()
    prompt[:, 0] = base.config.decoder_start_token_id
    inputs["decoder_input_ids"] = prompt
    if how == "start token":
        del inputs["decoder_input_ids"]
        model, by_hand = adapt(base, positions="f3", target_modules=DECODER_BLOCKS)
        columns = {"unit": [[0]] * 2}
    elif how == "padded prompt":
        inputs["decoder_attention_mask"] = torch.tensor([[1] * 4, [1, 0, 1, 1]])
        model, by_hand = adapt(base, positions="f2", target_modules=DECODER_BLOCKS)
        columns = {"unit": [[0, 1], [0, 2]]}
    elif how == "beams":
        inputs |= dict(num_beams=3)
    elif how == "static":
        inputs["cache_implementation"] = "static"
    elif how == "no cache":
        inputs["use_cache"] = False
    elif how == "encoded":
        with torch.no_grad():
            inputs["encoder_outputs"] = base.get_encoder()(input_ids=ids, attention_mask=ENCODER_MASK)
        del inputs["input_ids"]
    assert_generates(model, by_hand, columns, **inputs)


@pytest.mark.parametrize("by", ["assistant", "lookup"])
@pytest.mark.parametrize(
    ("positions", "columns"),
    [
        ("prompt", {"unit": [[0, 1, 2, 3, 4]]}),
        ("l1", {"unit": [[4]]}),
        ("f2+l2", {"prefix": [[0, 1]], "suffix": [[3, 4]]}),
    ],
)
def test_decoder_that_drafts(ids, positions, columns, by):
    """Assisted decoding gives the decoder its prompt and drafts at once: drafts are no prompt."""
    base = make("t5")
    torch.manual_seed(5)
    assistant = copy.deepcopy(base)
    for parameter in assistant.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    how = dict(num_assistant_tokens=4, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0)
    assistant.generation_config.update(**how)
    model, by_hand = adapt(base, positions=positions, target_modules=DECODER_BLOCKS)
    prompt = torch.tensor([[0, 7, 8, 7, 8]])  # whose end comes again, so that lookup finds drafts
    inputs = dict(input_ids=ids[:1], decoder_input_ids=prompt)
    with by_hand.edits(columns):
        expected = base.generate(**inputs, **GREEDY, use_cache=False).sequences
    drafts = dict(assistant_model=assistant) if by == "assistant" else dict(prompt_lookup_num_tokens=3)
    lengths = []
    model.get_base_model().get_decoder().register_forward_hook(lambda *args: lengths.append(args[2][0].shape[1]))
    assert torch.equal(model.generate(**inputs, **GREEDY, **drafts).sequences, expected)
    assert lengths[0] >= 5 + 2, "too few drafts to be taken for a prompt"
    assert not torch.equal(base.generate(**inputs, **GREEDY).sequences, expected)


@pytest.mark.parametrize("use_cache", [True, False])
def test_calls_within_generate_have_prompts_of_their_own(ids, use_cache):
    """A forward that a logits processor makes, with and without labels, changes nothing and is not changed."""
    model, by_hand = adapt(make("bart"), positions="l1", target_modules=DECODER_BLOCKS)
    labels = ids[:, :5].clone()
    labels[:, :2] = -100
    start = torch.cat([torch.full((2, 1), model.config.decoder_start_token_id), ids[:, 5:8]], dim=1)
    calls = (dict(input_ids=ids, labels=labels), dict(input_ids=ids, decoder_input_ids=start))
    with torch.no_grad():
        expected = [model(**call).logits for call in calls]
        tokens = model.generate(input_ids=ids, **GREEDY, use_cache=use_cache).sequences
    seen = []

    class Calls(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.extend(torch.equal(model(**call).logits, own) for call, own in zip(calls, expected, strict=True))
            return scores

    found = model.generate(input_ids=ids, **GREEDY, use_cache=use_cache, logits_processor=[Calls()]).sequences
    assert torch.equal(found, tokens) and len(seen) == 10 and all(seen)


def test_decoder_prompt_that_is_partly_cached(ids):
    """What the cache holds is edited as it was; the prompt of the call is all of it."""
    base = make("t5")
    model, by_hand = adapt(base, positions="f1+l1", target_modules=DECODER_BLOCKS)
    prompt = torch.cat([torch.zeros(1, 1, dtype=torch.long), ids[:1, :4]], dim=1)
    with torch.no_grad():
        encoded = base.get_encoder()(input_ids=ids[:1])
        cache = EncoderDecoderCache(DynamicCache(config=base.config), DynamicCache(config=base.config))
        told = dict(prompt_lengths=torch.tensor([3]), use_cache=True, **{CACHE: cache})
        model(encoder_outputs=encoded, decoder_input_ids=prompt[:, :3], **told)
    inputs = dict(encoder_outputs=encoded, decoder_input_ids=prompt, decoder_attention_mask=torch.ones_like(prompt))
    found = model.generate(**inputs, **GREEDY, **{CACHE: cache})
    with by_hand.edits({"prefix": [[0]], "suffix": [[2, 4]]}):
        expected = base.generate(**inputs, **GREEDY, use_cache=False)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)


def test_decoder_prompt_in_chunks_is_refused(ids):
    model, _ = adapt(make("t5"), target_modules=DECODER_BLOCKS)
    with pytest.raises(ValueError, match="prefill_chunk_size=2.*Generate without it"):
        model.generate(input_ids=ids, decoder_input_ids=ids[:, :5], prefill_chunk_size=2, max_new_tokens=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_encoder_and_decoder(ids, family):
    """Each has a plan of its own in one call."""
    model, by_hand = adapt(make(family), target_modules=BOTH_BLOCKS)
    assert {"encoder" in block for block in by_hand.tensors} == {True, False}
    labels = ids[:, :8].clone()
    labels[1, :3] = -100
    inputs = dict(input_ids=ids, attention_mask=ENCODER_MASK, decoder_input_ids=ids[:, 3:11])
    with by_hand.edits(ENCODER, "encoder.") if family == "t5" else by_hand.edits(ENCODER, "model.encoder."):
        expected = by_hand_decoder(by_hand, TOLD["f2+l2"], **inputs)
        with torch.no_grad():
            assert_close(model.train()(**inputs, labels=labels).logits, expected)
            assert_close(model(**inputs, prompt_lengths=torch.tensor([1, 4])).logits, expected)
        model.eval()
        prompt = ids[:, :4].clone()
        prompt[:, 0] = model.config.decoder_start_token_id
        columns = {"prefix": [[0, 1]] * 2, "suffix": [[2, 3]] * 2}
        inputs = dict(input_ids=ids, attention_mask=ENCODER_MASK, decoder_input_ids=prompt)
        with by_hand.edits(columns, "decoder."):
            expected = by_hand.base.generate(**inputs, **GREEDY, use_cache=False)
    found = model.generate(**inputs, **GREEDY)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def by_hand_decoder(by_hand, columns, **inputs):
    with by_hand.edits(columns, "decoder."):
        return by_hand.base(**inputs).logits


@pytest.mark.parametrize("positions", ["l1", "f1+l1", "prompt"])
def test_decoder_does_not_guess(ids, positions):
    model, _ = adapt(make("t5"), positions=positions, target_modules=DECODER_BLOCKS)
    inputs = dict(input_ids=ids, decoder_input_ids=ids[:, :5])
    with pytest.raises(ValueError, match="`labels` to the encoder-decoder model.*`prompt_lengths`.*decoder_input_ids"):
        model.train()(**inputs)
    with torch.no_grad():
        model.eval()(**inputs)  # the whole of the decoder's input


def test_decoder_of_a_classifier(ids):
    """Its decoder reads the whole input, and answers with a class."""
    torch.manual_seed(0)
    base = BartForSequenceClassification(BartConfig(**SHAPE | dict(eos_token_id=1))).eval()
    model, by_hand = adapt(base, positions="l1", target_modules=DECODER_BLOCKS, task_type=None)
    ids = ids.masked_fill(ENCODER_MASK == 0, 0)
    ids[0, 11] = ids[1, 8] = 1
    inputs = dict(input_ids=ids, attention_mask=ENCODER_MASK, decoder_attention_mask=ENCODER_MASK)
    expected = by_hand.logits({"unit": [[11], [8]]}, **inputs)
    assert (expected - base(**inputs).logits).abs().max() > 1e-2
    for mode in map(model.train, (True, False)):
        with torch.no_grad():
            assert_close(mode(**inputs, labels=torch.tensor([0, 1])).logits, expected)


@pytest.mark.parametrize("blocks", [None, DECODER_BLOCKS])
def test_trainer(tmp_path, ids, tokenizer, blocks):
    """transformers' own trainer for them, evaluation by generation included."""
    options = dict(FAMILIES["bart"], vocab_size=64, eos_token_id=1)
    torch.manual_seed(0)
    base = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("bart", **options))
    model, _ = adapt(base, positions="f4", target_modules=blocks, r=8, init_weights=True)
    rows = [dict(input_ids=row.tolist(), labels=[7, 8, 9, 1]) for row in ids]
    args = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=30,
        learning_rate=3e-2,
        use_cpu=True,
        report_to="none",
        predict_with_generate=True,
        generation_max_length=6,
        disable_tqdm=True,
    )
    collator = DataCollatorForSeq2Seq(tokenizer, model=model)
    trainer = Seq2SeqTrainer(model, args, data_collator=collator, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.7 * before


@pytest.mark.parametrize("family", FAMILIES)
def test_what_encoder_and_decoder_share_is_refused(family):
    with pytest.raises(ValueError, match="shared' cannot be adapted: it lies in neither the encoder nor the decoder"):
        adapt(make(family), target_modules=["shared"])


def make_captioner():
    """A vision transformer and GPT-2, of different widths."""
    torch.manual_seed(0)
    shape = dict(num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4, initializer_range=0.3)
    vision = ViTConfig(hidden_size=16, intermediate_size=32, **shape)
    quiet = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    special = dict(bos_token_id=1, eos_token_id=None, pad_token_id=0, decoder_start_token_id=1)
    shape = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=64, initializer_range=0.3)
    text = GPT2Config(add_cross_attention=True, is_decoder=True, **shape, **quiet, **special)
    model = VisionEncoderDecoderModel(VisionEncoderDecoderConfig(encoder=vision.to_dict(), decoder=text.to_dict()))
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 1, 0, None
    return model.eval()


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_models_that_are_put_together(ids, part):
    """An encoder of images and a decoder of text, each of a class that is used alone, too."""
    blocks = r"decoder\.transformer\.h\.\d+" if part == "decoder" else None
    model, by_hand = adapt(make_captioner(), target_modules=blocks, task_type=None)
    assert all(block.startswith(part) for block in by_hand.tensors)
    image = {"prefix": [[0, 1]] * 2, "suffix": [[15, 16]] * 2}
    labels = ids[:, :8].clone()
    labels[1, :3] = -100
    inputs = dict(pixel_values=torch.randn(2, 3, 16, 16), decoder_input_ids=ids[:, 3:11])
    expected = by_hand.logits(TOLD["f2+l2"] if part == "decoder" else image, **inputs)
    for told in (dict(labels=labels), dict(prompt_lengths=torch.tensor([1, 4]))):
        with torch.no_grad():
            assert_close(model.train()(**inputs, **told).logits, expected)
    inputs["decoder_input_ids"] = torch.cat([torch.ones(2, 1, dtype=torch.long), ids[:, :3]], dim=1)
    columns = {"prefix": [[0, 1]] * 2, "suffix": [[2, 3]] * 2} if part == "decoder" else image
    assert_generates(model.eval(), by_hand, columns, **inputs)
    assert_generates(model, by_hand, columns, **inputs, use_cache=False)
