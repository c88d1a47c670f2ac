"""The experiments for PEFT's comparison of methods train as its script trains them."""

import json

import pytest
import torch
from by_hand import make_llama
from method_comparison import RANKS, write
from peft import PeftConfig, get_peft_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write(tmp_path_factory.mktemp("experiments"))


@pytest.mark.parametrize("rank", RANKS)
def test_trains_on_questions_and_answers(folders, rank):
    """Right padding, and labels on all but padding after the first end token."""
    folder = next(folder for folder in folders if folder.name.endswith(f"rank{rank}"))
    settings = json.loads((folder / "training_params.json").read_text())["optimizer_kwargs"]
    model = get_peft_model(make_llama(), PeftConfig.from_pretrained(str(folder)))
    width, blocks = model.config.hidden_size, model.config.num_hidden_layers
    assert model.get_nb_trainable_parameters()[0] == blocks * (2 * rank * width + rank)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), **settings)
    torch.manual_seed(0)
    ids, lengths, losses = torch.randint(2, 20, (4, 12)), [12, 9, 7, 5], []
    mask = torch.tensor([[1] * length + [0] * (12 - length) for length in lengths])
    labels = ids.clone()
    for row, length in enumerate(lengths):
        labels[row, length + 1 :] = -100
    for _ in range(10):
        optimizer.zero_grad()
        loss = model(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=int(mask.sum())).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
