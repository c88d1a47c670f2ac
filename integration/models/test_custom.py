"""Any module: transformers that users wrote themselves, with and without a task."""

import copy

import pytest
import torch
from by_hand import IGNORED, TWO, adapt_model, labels_of
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import BertConfig, BertModel

from peft_reft import ReftConfig

BLOCKS = r"encoder\.layers\.\d"
MASK = torch.tensor([[1] * 12, [1] * 9 + [0] * 3])


class Custom(nn.Module):
    """Of torch's own layers; its arguments are called as in transformers, which is how ReFT knows them."""

    def __init__(self, nested=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(64, 16), nn.Linear(16, 64)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)

    def forward(self, input_ids, attention_mask=None, labels=None):
        padding = None if attention_mask is None else attention_mask == 0
        logits = self.head(self.encoder(self.embed(input_ids), src_key_padding_mask=padding))
        if labels is None:
            return logits
        targets = labels[:, 1:].flatten()
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=IGNORED), logits


class Measured(Custom):
    """Has an argument of its own that is called prompt_lengths."""

    def forward(self, input_ids, prompt_lengths, attention_mask=None):
        return super().forward(input_ids, attention_mask) * prompt_lengths[:, None, None]


def adapt(base, task_type=None, positions="f2+l2"):
    config = ReftConfig(task_type=task_type, r=2, positions=positions, init_weights=False, target_modules=BLOCKS)
    torch.manual_seed(1)
    model = PeftModel(copy.deepcopy(base), config).eval()  # get_peft_model's class for causal models asks for generate
    return model, adapt_model(base, task_type=None, r=2, positions=positions, target_modules=BLOCKS)[1]


@torch.no_grad()
def expected_of(by_hand, columns, *args, **inputs):
    with by_hand.edits(columns):
        found = by_hand.base(*args, **inputs)
    assert (found - by_hand.base(*args, **inputs)).abs().max() > 1e-2
    return found


def assert_close(found, expected):
    keep = MASK.bool()
    torch.testing.assert_close(found[keep], expected[keep], atol=1e-5, rtol=1e-5)


PROMPTS = {"prefix": [[0, 1], [0, 1]], "suffix": [[3, 4], [6, 7]]}
WHOLE = {"prefix": [[0, 1], [0, 1]], "suffix": [[10, 11], [7, 8]]}


def test_without_a_task(ids):
    """The whole input is the prompt, unless prompt_lengths are given, whatever labels are."""
    model, by_hand = adapt(Custom())
    inputs = dict(input_ids=ids, attention_mask=MASK)
    whole, prompts = (expected_of(by_hand, columns, **inputs) for columns in (WHOLE, PROMPTS))
    for mode in map(model.train, (False, True)):
        assert_close(mode(**inputs), whole)
        assert_close(mode(**inputs, labels=labels_of(ids, *TWO["answers"]))[1], whole)
        assert_close(mode(**inputs, prompt_lengths=torch.tensor([5, 8])), prompts)


def test_with_a_task(ids):
    """Labels of a causal model say where the prompt ends, and in training something must."""
    model, by_hand = adapt(Custom(), task_type="CAUSAL_LM")
    inputs = dict(input_ids=ids, attention_mask=MASK)
    whole, prompts = (expected_of(by_hand, columns, **inputs) for columns in (WHOLE, PROMPTS))
    for mode in map(model.train, (False, True)):
        assert_close(mode(**inputs, labels=labels_of(ids, [(5, 12)], [(8, 9)]))[1], prompts)
        assert_close(mode(**inputs, prompt_lengths=torch.tensor([5, 8])), prompts)
    assert_close(model.eval()(input_ids=ids.clone(), attention_mask=MASK), whole)
    with pytest.raises(ValueError, match="prompt_lengths"):
        model.train()(**inputs)


@pytest.mark.parametrize("by", ["keyword", "position"])
def test_model_that_has_prompt_lengths_itself(ids, by):
    model, by_hand = adapt(Measured())
    lengths = torch.tensor([5, 8])
    expected = expected_of(by_hand, PROMPTS, ids, lengths)
    found = model(ids, prompt_lengths=lengths) if by == "keyword" else model.get_base_model()(ids, lengths)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    with pytest.raises(ValueError, match=r"prompt_lengths is torch.int64 \[1\], but must be a LongTensor \[2\]"):
        model(ids, prompt_lengths=torch.tensor([5]))


def test_training_and_saving(tmp_path, ids):
    config = ReftConfig(r=4, positions="l2", target_modules=BLOCKS, modules_to_save=["head"])
    model = get_peft_model(Custom(), config)
    labels = labels_of(ids, *TWO["answers"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(10):
        loss, logits = model(input_ids=ids, labels=labels, prompt_lengths=torch.tensor([5, 8]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Custom(), tmp_path).eval()
    torch.testing.assert_close(loaded(ids), model.eval()(ids), atol=1e-5, rtol=1e-5)


def test_nested_hidden_states_are_refused(ids):
    model, _ = adapt(Custom(nested=True))
    with torch.no_grad(), pytest.raises(ValueError, match="put out a nested tensor.*enable_nested_tensor"):
        model(input_ids=ids, attention_mask=MASK)


def test_other_modules_need_no_mask_nor_ids():
    """A module of vectors: all of them are the prompt."""
    base = Custom().encoder
    torch.manual_seed(1)
    options = dict(r=2, positions="f1+l1", init_weights=False, target_modules=r"layers\.\d")
    model = get_peft_model(copy.deepcopy(base), ReftConfig(**options)).eval()
    vectors = torch.randn(2, 6, 16)
    with torch.no_grad():
        changed = (model(vectors) - base.eval()(vectors)).abs().amax(-1) > 1e-3
    assert changed[:, [0, 5]].all()
    _, by_hand = adapt_model(base, task_type=None, **options)
    expected = expected_of(by_hand, {"prefix": [[0]] * 2, "suffix": [[5]] * 2}, vectors)
    torch.testing.assert_close(model(vectors), expected, atol=1e-5, rtol=1e-5)


class Wrapper(nn.Module):
    """A user's classifier around an encoder of transformers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
        quiet = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        self.backbone = BertModel(BertConfig(vocab_size=64, initializer_range=0.2, **shape, **quiet))
        self.head = nn.Linear(32, 2)

    def forward(self, input_ids, attention_mask):
        states = self.backbone(input_ids, attention_mask).last_hidden_state
        return self.head((states * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True))


def test_model_of_transformers_inside_another(tmp_path, ids):
    """The plan is made of what the model inside is given, here by position."""
    base = Wrapper().eval()
    options = dict(r=4, positions="f2+l2", target_modules=r".*layer\.\d", modules_to_save=["head"])
    model, by_hand = adapt_model(base, task_type=None, **options)
    inputs = dict(input_ids=ids, attention_mask=MASK)
    expected = expected_of(by_hand, WHOLE, **inputs)
    for mode in map(model.train, (False, True)):
        torch.testing.assert_close(mode(**inputs), expected, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Wrapper(), tmp_path).eval()
    assert torch.equal(loaded(**inputs), model.eval()(**inputs))
