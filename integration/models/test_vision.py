"""Vision: all tokens of an image, its class token first, are the prompt; the two towers of CLIP are chosen by name."""

import pytest
import torch
from by_hand import VOCABULARY, adapt_model
from peft import PeftModel, get_peft_model
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    SwinConfig,
    SwinForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from peft_reft import ReftConfig

SHAPE = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    initializer_range=0.2,
    projection_dim=16,
)
VISION = SHAPE | dict(image_size=16, patch_size=4)  # a class token and 16 patches
TEXT = SHAPE | dict(vocab_size=VOCABULARY, eos_token_id=1, bos_token_id=0, pad_token_id=1)
MASK = torch.tensor([[1] * 12, [1] * 9 + [0] * 3])
MAKE = {
    "vit": lambda: ViTForImageClassification(ViTConfig(**VISION)),
    "clip classifier": lambda: CLIPForImageClassification(
        CLIPConfig(vision_config=VISION, text_config=TEXT, initializer_factor=3.0)
    ),
    "clip vision": lambda: CLIPVisionModel(CLIPVisionConfig(**VISION, initializer_factor=3.0)),
    "clip text": lambda: CLIPTextModel(CLIPTextConfig(**TEXT, initializer_factor=3.0)),
    "clip": lambda: CLIPModel(CLIPConfig(vision_config=VISION, text_config=TEXT, initializer_factor=3.0)),
}
COLUMNS = {
    "f1": {"unit": [[0]] * 2},  # the class token
    "f2+l2": {"prefix": [[0, 1]] * 2, "suffix": [[15, 16]] * 2},
    "prompt": {"unit": [list(range(17))] * 2},
    "all": {"unit": [list(range(17))] * 2},
}


def make(name):
    torch.manual_seed(0)
    return MAKE[name]().eval()


def images():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def first_output(model, **inputs):
    return next(iter(model(**inputs).values()))


@pytest.mark.parametrize("positions", COLUMNS)
@pytest.mark.parametrize("name", ["vit", "clip classifier", "clip vision"])
def test_images(name, positions):
    base = make(name)
    model, by_hand = adapt_model(base, task_type=None, positions=positions)
    inputs = dict(pixel_values=images())
    with by_hand.edits(COLUMNS[positions]):
        expected = first_output(base, **inputs)
    assert (expected - first_output(base, **inputs)).abs().max() > 1e-2
    assert_close(first_output(model.eval(), **inputs), expected)
    assert_close(first_output(model.train(), **inputs), expected)  # nothing needs to be told
    if "vision" not in name:
        labels = torch.tensor([0, 1])
        with torch.no_grad():
            assert_close(model(**inputs, labels=labels).logits, expected)


def test_other_sizes_of_images_and_of_hidden_states():
    """Swin's stages have ever fewer and wider tokens: each block is adapted in its own width, if it is named."""
    torch.manual_seed(0)
    options = dict(embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2, image_size=16, patch_size=2)
    base = SwinForImageClassification(SwinConfig(**options, initializer_range=0.2)).eval()
    model, by_hand = adapt_model(base, task_type=None, r=2, positions="f1+l1", target_modules=r".*blocks\.\d+")
    assert [len(units["prefix"]["R"][0]) for units in by_hand.tensors.values()] == [8, 16]
    inputs = dict(pixel_values=images())
    columns = {
        stage: {"prefix": [[0]] * 2, "suffix": [[last]] * 2} for stage, last in (("layers.0.", 63), ("layers.1.", 15))
    }
    with by_hand.edits(columns["layers.0."], "layers.0."), by_hand.edits(columns["layers.1."], "layers.1."):
        expected = first_output(base, **inputs)
    assert (expected - first_output(base, **inputs)).abs().max() > 1e-3
    assert_close(first_output(model, **inputs), expected)


def test_text_tower_alone(ids):
    base = make("clip text")
    model, by_hand = adapt_model(base, task_type=None, positions="f2+l2")
    inputs = dict(input_ids=ids, attention_mask=MASK)
    with by_hand.edits({"prefix": [[0, 1]] * 2, "suffix": [[10, 11], [7, 8]]}):
        expected = first_output(base, **inputs)
    keep = MASK.bool()
    assert (expected - first_output(base, **inputs))[keep].abs().max() > 1e-2
    for mode in map(model.train, (True, False)):
        assert_close(first_output(mode, **inputs)[keep], expected[keep])


TOWERS = {
    "text": {"text_model": {"prefix": [[0, 1]] * 2, "suffix": [[10, 11], [7, 8]]}},
    "vision": {"vision_model": {"prefix": [[0, 1]] * 2, "suffix": [[15, 16]] * 2}},
}
TOWERS["both"] = TOWERS["text"] | TOWERS["vision"]


@pytest.mark.parametrize("towers", TOWERS)
def test_towers_of_clip(ids, towers):
    base = make("clip")
    named = "|".join(TOWERS[towers])
    model, by_hand = adapt_model(base, task_type=None, positions="f2+l2", target_modules=rf".*({named}).*layers\.\d+")
    inputs = dict(input_ids=ids, attention_mask=MASK, pixel_values=images())

    def edits(tower):
        return by_hand.edits(TOWERS[towers].get(tower, {}), tower)  # no block of the tower where it is not adapted

    with edits("text_model"), edits("vision_model"), torch.no_grad():
        expected = base(**inputs)
        image = base.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
        text = base.get_text_features(input_ids=ids, attention_mask=MASK).pooler_output
    with torch.no_grad():
        unedited = base(**inputs)
        for mode in map(model.train, (True, False)):
            found = mode(**inputs)
            assert_close(found.image_embeds, expected.image_embeds)
            assert_close(found.text_embeds, expected.text_embeds)
            inner = mode.get_base_model()
            assert_close(inner.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output, image)
            assert_close(inner.get_text_features(input_ids=ids, attention_mask=MASK).pooler_output, text)
    for tower in ("text", "vision"):
        name = "image_embeds" if tower == "vision" else "text_embeds"
        assert ((unedited[name] - expected[name]).abs().max() > 1e-3) == (towers in (tower, "both"))


def test_towers_must_be_named():
    with pytest.raises(ValueError, match="'text_model.*layers'.*'vision_model.*layers'.*target_modules"):
        get_peft_model(make("clip"), ReftConfig())


def test_image_classifier_is_trained_and_saved(tmp_path):
    base = make("vit")
    base.save_pretrained(tmp_path / "base")
    config = ReftConfig(r=4, positions="f1", modules_to_save=["classifier"])
    model = get_peft_model(ViTForImageClassification.from_pretrained(tmp_path / "base"), config)
    model.gradient_checkpointing_enable()
    rows = [dict(pixel_values=image, labels=label) for label, image in enumerate(images())]
    args = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=20,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        label_names=["labels"],
        remove_unused_columns=False,
    )
    trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.5 * before
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(
        ViTForImageClassification.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    inputs = dict(pixel_values=images())
    assert torch.equal(first_output(loaded.eval(), **inputs), first_output(model.eval(), **inputs))
    head = model.get_base_model().classifier
    assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)
