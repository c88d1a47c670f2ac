"""ReFT in sentence-transformers, which calls `model.forward(...)`: compared with a plain encoder that hooks edit."""

import copy

import pytest
import torch
from by_hand import ENCODER, ByHand
from datasets import Dataset
from transformers import BertConfig, BertModel

from peft_reft import ReftConfig

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")

from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss

TEXTS = ["red cat", "the green fox and the blue dog", "one two three say twice"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, tokenizer) -> str:
    """The folder of a tiny encoder with a tokenizer."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    BertModel(BertConfig(**ENCODER)).eval().save_pretrained(folder)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = None  # with one, texts become messages
    tokenizer.save_pretrained(folder)
    return str(folder)


def load(folder):
    return SentenceTransformer(folder, device="cpu")


def adapted(encoder, **options):
    model = load(encoder)
    torch.manual_seed(1)
    options = dict(r=2, positions="f1+l1", init_weights=False) | options
    model.add_adapter(ReftConfig(task_type="FEATURE_EXTRACTION", **options))
    return model


def embed_by_hand(model, encoder, texts):
    """The mean of what the last block puts out, of one text at a time: no padding."""
    base = BertModel.from_pretrained(encoder, add_pooling_layer=False).eval()
    by_hand = ByHand(base, model[0].model)
    embeddings = []
    for text in texts:
        ids = model.tokenizer(text, return_tensors="pt")["input_ids"]
        last = ids.shape[1] - 1
        with torch.no_grad(), by_hand.edits({"prefix": [[0]], "suffix": [[last]]}):
            embeddings.append(base(input_ids=ids).last_hidden_state[0].mean(0))
    return torch.stack(embeddings)


def assert_embeds(model, encoder):
    found = model.encode(TEXTS, convert_to_tensor=True, show_progress_bar=False)
    torch.testing.assert_close(found, embed_by_hand(model, encoder, TEXTS), atol=1e-5, rtol=1e-5)
    plain = load(encoder).encode(TEXTS, convert_to_tensor=True, show_progress_bar=False)
    assert (found - plain).abs().max() > 1e-2, "the edit is too small to be seen"
    return found


def tensors(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "._reft." in name}


def test_encode(encoder):
    assert_embeds(adapted(encoder), encoder)


def test_train_save_and_load(encoder, tmp_path):
    """The first step moves the adapter as the formula of the loss by hand does; the rest is what was saved."""
    model = adapted(encoder)
    before = tensors(model)
    data = Dataset.from_dict(dict(sentence1=TEXTS, sentence2=TEXTS[::-1], score=[0.0, 1.0, 0.5]))
    args = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=3,
        max_steps=1,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        weight_decay=0.0,
        max_grad_norm=0.0,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
    )
    trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=data, loss=CosineSimilarityLoss(model))
    trainer.train()
    after = tensors(model)
    frozen = {name: p for name, p in load(encoder).named_parameters()}
    for name, parameter in model.named_parameters():
        assert "._reft." in name or torch.equal(parameter, frozen[name])

    # The slope of the loss along the step, from two values of the loss by hand
    def loss():
        first, second = (embed_by_hand(model, encoder, texts) for texts in (TEXTS, TEXTS[::-1]))
        return (torch.cosine_similarity(first, second) - torch.tensor([0.0, 1.0, 0.5])).square().mean()

    parameters = dict(model.named_parameters())
    scale = 0.1
    losses = []
    for share in (scale, -scale):
        for name in before:
            parameters[name].data = before[name] + share * (after[name] - before[name])
        losses.append(loss())
    slope = (losses[0] - losses[1]) / (2 * scale)
    expected = -sum((after[name] - before[name]).square().sum() for name in before) / 0.1
    assert expected < -1e-6
    torch.testing.assert_close(slope, expected, rtol=0.05, atol=1e-6)
    for name in after:
        parameters[name].data = after[name]

    model.eval()
    found = assert_embeds(model, encoder)
    model.save_pretrained(str(tmp_path / "saved"))
    loaded = load(str(tmp_path / "saved"))
    torch.testing.assert_close(tensors(loaded), after)
    again = loaded.encode(TEXTS, convert_to_tensor=True, show_progress_bar=False)
    torch.testing.assert_close(again, found)
    assert_embeds(loaded, encoder)


def test_adapter_is_loaded_and_switched_off(encoder, tmp_path):
    model = adapted(encoder)
    found = assert_embeds(model, encoder)
    model[0].model.save_pretrained(tmp_path / "adapter")
    other = load(encoder)
    other.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(other.encode(TEXTS, convert_to_tensor=True), found)
    other.disable_adapters()
    torch.testing.assert_close(
        other.encode(TEXTS, convert_to_tensor=True), load(encoder).encode(TEXTS, convert_to_tensor=True)
    )
    other.enable_adapters()
    torch.testing.assert_close(other.encode(TEXTS, convert_to_tensor=True), found)
