"""Vision-language models: tokens of images are tokens of the prompt; a vision tower has a sequence of its own."""

import pytest
import torch
from by_hand import adapt_model, labels_of
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

TEXT = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
    max_position_embeddings=128,
)
VISION = dict(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=16,
    patch_size=4,
    initializer_range=0.2,
)
IMAGE = 63  # stands for an image in the text
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
OPTIONS = {
    "llava": dict(
        text_config=TEXT | dict(model_type="llama"),
        vision_config=VISION | dict(model_type="clip_vision_model"),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
    ),
    "gemma3": dict(
        text_config=TEXT | dict(head_dim=8, sliding_window=6, query_pre_attn_scalar=8),
        vision_config=VISION | dict(model_type="siglip_vision_model"),
        image_token_id=IMAGE,
        mm_tokens_per_image=16,
    ),
    "idefics3": dict(
        text_config=TEXT | dict(model_type="llama"),
        vision_config=VISION,
        image_token_id=IMAGE,
        scale_factor=2,
    ),
    "qwen2_vl": dict(
        text_config=TEXT | dict(rope_parameters=ROPE),
        vision_config=dict(
            depth=2, embed_dim=16, hidden_size=32, num_heads=2, mlp_ratio=2, patch_size=4, spatial_merge_size=2
        ),
        image_token_id=IMAGE,
        video_token_id=62,
        vision_start_token_id=60,
        vision_end_token_id=61,
    ),
}
TOKENS = {"llava": 16, "gemma3": 16, "idefics3": 4, "qwen2_vl": 4}  # of an image


def make(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **OPTIONS[family])
    model = AutoModelForImageTextToText.from_config(config).eval()
    if family == "gemma3":  # which begins without images
        torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    return model


def inputs_of(family: str) -> dict[str, torch.Tensor]:
    """Text, an image and text in each of two rows of TOKENS[family] + 8 tokens."""
    draw = torch.Generator().manual_seed(3)
    count = TOKENS[family]
    ids = torch.randint(2, 60, (2, count + 8), generator=draw)
    ids[0, 3 : 3 + count] = ids[1, 4 : 4 + count] = IMAGE
    ids[1, :2] = 0
    inputs = dict(input_ids=ids, attention_mask=(ids != 0).long())
    images = torch.randn(2, 3, 16, 16, generator=draw)
    if family == "gemma3":
        inputs["token_type_ids"] = (ids == IMAGE).long()
    if family == "idefics3":  # images of several sizes, padded
        seen = torch.ones(2, 1, 16, 16, dtype=torch.long)
        seen[1, 0, 8:] = 0
        return inputs | dict(pixel_values=images[:, None], pixel_attention_mask=seen)
    if family == "qwen2_vl":  # patches of all images in one row
        ids[0, 2] = ids[1, 3] = 60
        inputs["mm_token_type_ids"] = (ids == IMAGE).long()
        patches = torch.randn(32, 96, generator=draw)
        return inputs | dict(pixel_values=patches, image_grid_thw=torch.tensor([[1, 4, 4]] * 2))
    return inputs | dict(pixel_values=images)


GREEDY = dict(do_sample=False, max_new_tokens=5, return_dict_in_generate=True, output_logits=True)


def columns_of(family, end, prefix=5, suffix=2):
    """First and last columns of prompts that end before a column: three or two text tokens, then those of an image."""
    prompts = [list(range(end)), list(range(2, end))]
    return {
        "prefix": [row[: min(prefix, len(row) // 2)] for row in prompts],
        "suffix": [row[-min(suffix, len(row) // 2) :] for row in prompts],
    }


def assert_close(found, expected, mask, tolerance=1e-5):
    mask = mask.bool()
    torch.testing.assert_close(found[mask], expected[mask], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("family", OPTIONS)
def test_language_model_in_training(family):
    model, by_hand = adapt_model(make(family), positions="f5+l2")
    assert all("language_model" in block or "text_model" in block for block in by_hand.tensors)
    inputs, end = inputs_of(family), TOKENS[family] + 5
    columns = columns_of(family, end)
    labels = labels_of(inputs["input_ids"], *[[(end, end + 3)]] * 2)
    expected = by_hand.logits(columns, **inputs)
    assert (expected - by_hand.base(**inputs).logits)[inputs["attention_mask"].bool()].abs().max() > 1e-2
    lengths = torch.tensor([end, end - 2])
    for told in (dict(labels=labels), dict(prompt_lengths=lengths)):
        for mode in map(model.train, (True, False)):
            with torch.no_grad():
                assert_close(mode(**inputs, **told).logits, expected, inputs["attention_mask"])
    with pytest.raises(ValueError, match="prompt_lengths"):
        model.train()(**inputs)


@pytest.mark.parametrize("way", ["cache", "no cache", "static", "beams", "no images"])
@pytest.mark.parametrize("family", OPTIONS)
def test_language_model_in_generation(family, way):
    model, by_hand = adapt_model(make(family), positions="f5+l2")
    inputs, beams = inputs_of(family), dict(num_beams=3) if way == "beams" else {}
    if way == "no images":
        for name in ("pixel_values", "pixel_attention_mask", "image_grid_thw", "mm_token_type_ids", "token_type_ids"):
            inputs.pop(name, None)
        inputs["input_ids"].clamp_(max=50)
    columns = columns_of(family, TOKENS[family] + 8)
    columns = {unit: [row for row in rows for _ in range(beams.get("num_beams", 1))] for unit, rows in columns.items()}
    with by_hand.edits(columns):
        expected = by_hand.base.generate(**inputs, **GREEDY, **beams, use_cache=False)
    options = {"no cache": dict(use_cache=False), "static": dict(cache_implementation="static")}.get(way, {})
    found = model.generate(**inputs, **GREEDY, **beams, **options)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)
    base = by_hand.base.generate(**inputs, **GREEDY)
    assert (base.logits[0] - expected.logits[0][:: beams.get("num_beams", 1)]).abs().max() > 1e-2


def test_positions_of_three_dimensions():
    """Qwen2-VL's position ids [3, batch, tokens] are no packed rows, though they fall where an image ends."""
    model, by_hand = adapt_model(make("qwen2_vl"), positions="f5+l2")
    inputs = inputs_of("qwen2_vl")
    names = ("input_ids", "image_grid_thw", "attention_mask", "mm_token_type_ids")
    position_ids, _ = by_hand.base.model.get_rope_index(**{name: inputs[name] for name in names})
    assert position_ids.shape == (3, 2, 12) and (position_ids.diff() < 0).any()
    end = TOKENS["qwen2_vl"] + 5
    inputs |= dict(position_ids=position_ids)
    expected = by_hand.logits(columns_of("qwen2_vl", end), **inputs)
    with torch.no_grad():
        found = model.train()(**inputs, labels=labels_of(inputs["input_ids"], *[[(end, end + 3)]] * 2)).logits
    assert_close(found, expected, inputs["attention_mask"])


# Blocks of the vision tower. Idefics3's second image has padding in the lower half.
TOWER = r".*vision_(tower|model).*layers\.\d+"
TOWERS = {
    "llava": {"prefix": [[0, 1]] * 2, "suffix": [[15, 16]] * 2},
    "gemma3": {"prefix": [[0, 1]] * 2, "suffix": [[14, 15]] * 2},
    "idefics3": {"prefix": [[0, 1]] * 2, "suffix": [[14, 15], [6, 7]]},
}


@pytest.mark.parametrize("together", [False, True], ids=["tower", "tower and language model"])
@pytest.mark.parametrize("family", TOWERS)
def test_vision_tower(family, together):
    """Its prompt is the whole image, in training and in generation, whatever labels say of the text."""
    language = r"|.*(language_model|text_model).*layers\.\d+" if together else ""
    model, by_hand = adapt_model(make(family), positions="f2+l2", target_modules=TOWER + language)
    assert any("vision" in block for block in by_hand.tensors)
    inputs, end = inputs_of(family), TOKENS[family] + 5
    labels = labels_of(inputs["input_ids"], *[[(end, end + 3)]] * 2)
    with by_hand.edits(TOWERS[family], "vision"):
        with by_hand.edits(columns_of(family, end, 2), "language_model" if family != "idefics3" else "text_model"):
            with torch.no_grad():
                expected = by_hand.base(**inputs).logits
        with by_hand.edits(columns_of(family, end + 3, 2), "language_model" if family != "idefics3" else "text_model"):
            tokens = by_hand.base.generate(**inputs, **GREEDY, use_cache=False)
    seen = inputs["attention_mask"].bool()
    assert (expected - by_hand.base(**inputs).logits)[seen].abs().max() > 1e-3
    for told in (dict(labels=labels), dict(prompt_lengths=torch.tensor([end, end - 2]))):
        with torch.no_grad():
            assert_close(model.train()(**inputs, **told).logits, expected, seen)
    found = model.eval().generate(**inputs, **GREEDY)
    assert torch.equal(found.sequences, tokens.sequences)
    torch.testing.assert_close(found.logits, tokens.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("positions", ["prompt", "all", "f1", "l2"])
@pytest.mark.parametrize("family", ["qwen2_vl", "pixtral"])
def test_vision_tower_that_lays_all_images_in_one_row(family, positions):
    """Every patch is of the prompt; which are the first of an image is not told, so an error says what can be had."""
    if family == "pixtral":
        options = OPTIONS["llava"] | dict(
            vision_config=VISION | dict(model_type="pixtral", head_dim=8), vision_feature_select_strategy="full"
        )
        torch.manual_seed(0)
        base = AutoModelForImageTextToText.from_config(AutoConfig.for_model("llava", **options)).eval()
        inputs = inputs_of("llava") | dict(image_sizes=torch.tensor([[16, 16]] * 2))
    else:
        base, inputs = make(family), inputs_of(family)
    blocks = TOWER if family == "pixtral" else r".*visual\.blocks\.\d+"
    model, by_hand = adapt_model(base, positions=positions, target_modules=blocks)
    if positions in ("f1", "l2"):
        with pytest.raises(ValueError, match="lays its input .* into 1 rows of 32 tokens.*'prompt' or 'all'"):
            model(**inputs)
        return
    expected = by_hand.logits({"unit": [list(range(32))]}, **inputs)
    seen = inputs["attention_mask"].bool()
    assert (expected - base(**inputs).logits)[seen].abs().max() > 1e-3
    with torch.no_grad():
        assert_close(model.train()(**inputs, labels=inputs["input_ids"]).logits, expected, seen)
