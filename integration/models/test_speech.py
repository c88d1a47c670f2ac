"""Speech: tokens that an encoder makes of sound, which no mask of the input counts, and the prompt of a decoder."""

import pytest
import torch
from by_hand import adapt_model
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
    WhisperConfig,
    WhisperForAudioClassification,
    WhisperForConditionalGeneration,
)

WHISPER = dict(
    vocab_size=64,
    num_mel_bins=8,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    d_model=32,
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
    max_source_positions=20,
    max_target_positions=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=1,
    decoder_start_token_id=2,
    init_std=0.3,
    dropout=0.0,
)
DECODER_BLOCKS = r".*decoder\.layers\.\d+"


def make_whisper():
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(WhisperConfig(**WHISPER)).eval()
    config = model.generation_config
    config.is_multilingual, config.max_length = True, 20
    config.lang_to_id, config.task_to_id = {"<|en|>": 3, "<|fr|>": 4}, {"transcribe": 5, "translate": 6}
    config.no_timestamps_token_id, config.prev_sot_token_id, config.max_initial_timestamp_index = 7, 8, 2
    config.suppress_tokens = config.begin_suppress_tokens = None
    return model


def sound(frames=40, rows=2):
    return 3 * torch.randn(rows, 8, frames, generator=torch.Generator().manual_seed(3))


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", ["f2+l2", "prompt"])
def test_encoder_of_whisper(ids, positions):
    """Its 20 tokens are made of 40 frames; silence is among them, whatever a mask says, which it does not look at."""
    model, by_hand = adapt_model(make_whisper(), task_type=None, positions=positions)
    columns = {"prefix": [[0, 1]] * 2, "suffix": [[18, 19]] * 2}
    columns = columns if positions == "f2+l2" else {"unit": [list(range(20))] * 2}
    inputs = dict(input_features=sound(), labels=ids[:, :5].contiguous())
    expected = by_hand.logits(columns, **inputs)
    assert (expected - by_hand.base(**inputs).logits).abs().max() > 1e-2
    mask = torch.tensor([[1] * 40, [1] * 12 + [0] * 28])
    for mode in map(model.train, (True, False)):
        with torch.no_grad():
            assert_close(mode(**inputs).logits, expected)
            assert_close(mode(**inputs, attention_mask=mask).logits, expected)
    options = dict(language="en", task="transcribe", max_new_tokens=8)
    with by_hand.edits(columns):
        expected = by_hand.base.generate(input_features=sound(), **options)
    assert torch.equal(model.generate(input_features=sound(), attention_mask=mask, **options), expected)
    assert not torch.equal(by_hand.base.generate(input_features=sound(), **options), expected)


@pytest.mark.parametrize("told", ["labels", "prompt_lengths"])
def test_decoder_of_whisper_in_training(ids, told):
    """Start, language and task precede the answer: say so, as they do in generate."""
    model, by_hand = adapt_model(make_whisper(), task_type=None, positions="f1+l2", target_modules=DECODER_BLOCKS)
    decoder_input_ids = torch.cat([torch.tensor([[2, 3, 5, 7]] * 2), ids[:, :4]], dim=1)
    labels = torch.cat([torch.full((2, 3), -100), ids[:, :5]], dim=1)
    say = dict(labels=labels) if told == "labels" else dict(prompt_lengths=torch.tensor([4, 4]))
    inputs = dict(input_features=sound(), decoder_input_ids=decoder_input_ids)
    expected = by_hand.logits({"prefix": [[0]] * 2, "suffix": [[2, 3]] * 2}, **inputs)
    with torch.no_grad():
        assert_close(model.train()(**inputs, **say).logits, expected)


LONG = dict(attention_mask=torch.ones(1, 110, dtype=torch.long), return_timestamps=True)
WAYS = {
    "language": dict(language="en", task="transcribe"),
    "detected language": {},
    "segments": LONG,
    "segments, no cache": LONG | dict(use_cache=False),
    "segments with what came before": LONG | dict(condition_on_prev_tokens=True),
    "tried again": LONG | dict(temperature=(0.0, 0.5), logprob_threshold=-0.1),
}


@pytest.mark.parametrize("way", WAYS)
def test_decoder_of_whisper_in_generation(way):
    """Its generate decodes several times in one call: for the language, for every segment, again when it is unsure."""
    model, by_hand = adapt_model(make_whisper(), task_type=None, positions="f2", target_modules=DECODER_BLOCKS)
    inputs = dict(input_features=sound(110 if "return_timestamps" in WAYS[way] else 40, 1), max_new_tokens=8)
    torch.manual_seed(4)
    with by_hand.edits({"unit": [[0, 1]]}):
        expected = by_hand.base.generate(**inputs, **WAYS[way] | dict(use_cache=False))
    for mode in map(model.train, (False, True)):
        torch.manual_seed(4)
        assert torch.equal(mode.generate(**inputs, **WAYS[way]), expected)
    torch.manual_seed(4)
    assert by_hand.base.generate(**inputs, **WAYS[way]).tolist() != expected.tolist()


def test_segments_in_training_mode():
    """Positions that need the prompt's end find it in each segment, whatever the mode."""
    model, _ = adapt_model(make_whisper(), task_type=None, positions="l1", target_modules=DECODER_BLOCKS)
    inputs = dict(input_features=sound(110, 1), max_new_tokens=8, **LONG)
    tokens = [mode.generate(**inputs).tolist() for mode in map(model.train, (False, True))]
    assert tokens[0] == tokens[1]


def test_audio_classifier_of_whisper():
    """A Whisper without a decoder."""
    torch.manual_seed(0)
    base = WhisperForAudioClassification(WhisperConfig(**WHISPER)).eval()
    model, by_hand = adapt_model(base, task_type=None, positions="l2")
    inputs = dict(input_features=sound())
    expected = by_hand.logits({"unit": [[18, 19]] * 2}, **inputs)
    assert (expected - base(**inputs).logits).abs().max() > 1e-3
    for mode in map(model.train, (True, False)):
        with torch.no_grad():
            assert_close(mode(**inputs, labels=torch.tensor([0, 1])).logits, expected)


def make_wav2vec2():
    torch.manual_seed(0)
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    sound = dict(conv_dim=[16, 16], conv_stride=[4, 2], conv_kernel=[6, 3], num_feat_extract_layers=2)
    quiet = {f"{name}_dropout": 0.0 for name in ("hidden", "attention", "activation", "feat_proj", "final")}
    options = dict(num_conv_pos_embeddings=3, num_conv_pos_embedding_groups=2, layerdrop=0.0, apply_spec_augment=False)
    config = Wav2Vec2Config(**shape, **sound, **quiet, **options, initializer_range=0.2, classifier_proj_size=16)
    return Wav2Vec2ForSequenceClassification(config).eval()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_mask_of_samples(attention):
    """Wav2Vec2 makes 12 tokens of 106 samples, 5 of 50: its blocks are given the mask that counts tokens."""
    base = make_wav2vec2()
    base.set_attn_implementation(attention)
    samples = torch.randn(2, 106, generator=torch.Generator().manual_seed(3))
    mask = torch.tensor([[1] * 106, [1] * 50 + [0] * 56])
    inputs = dict(input_values=samples * mask, attention_mask=mask)
    model, by_hand = adapt_model(base, task_type=None, positions="f2+l2", layers_pattern="encoder.layers")
    expected = by_hand.logits({"prefix": [[0, 1]] * 2, "suffix": [[10, 11], [3, 4]]}, **inputs)
    assert (expected - base(**inputs).logits).abs().amax(1).min() > 1e-3
    for mode in map(model.train, (True, False)):
        with torch.no_grad():
            assert_close(mode(**inputs, labels=torch.tensor([0, 1])).logits, expected)


def test_modules_that_see_no_mask_of_tokens(ids):
    model, by_hand = adapt_model(make_wav2vec2(), task_type=None, positions="l1", target_modules=["feed_forward"])
    samples = torch.randn(2, 106)
    expected = by_hand.logits({"unit": [[11]] * 2}, input_values=samples)
    mask = torch.ones(2, 106, dtype=torch.long)
    with torch.no_grad():
        assert_close(model(input_values=samples).logits, expected)
        assert_close(model(input_values=samples, attention_mask=mask).logits, expected)
    mask[1, 50:] = 0
    with pytest.raises(ValueError, match=r"mask \[2, 106\] does not count the 12 tokens.*adapt blocks"):
        model(input_values=samples, attention_mask=mask)
