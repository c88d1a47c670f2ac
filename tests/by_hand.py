"""Tiny models, and ReFT by hand: plain hooks on a base model that edit the columns which a test lists."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from peft_reft import ReftConfig

VOCABULARY = 64
IGNORED = -100
CACHE = "cache" if "cache" in signature(LlamaForCausalLM.forward).parameters else "past_key_values"

# A tiny encoder without dropout
ENCODER = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    initializer_range=0.2,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)

# Prompt and answer in one row: row 0 has a prompt of 5 tokens, row 1 of 8
TWO = dict(answers=([(5, 12)], [(8, 12)]))
MASK = torch.tensor([[1] * 12, [0] * 4 + [1] * 8])
GREEDY = dict(do_sample=False, max_new_tokens=6, pad_token_id=0)


def make_llama(layers: int = 3, **options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=None)
    config = LlamaConfig(
        vocab_size=VOCABULARY, num_hidden_layers=layers, initializer_range=0.2, **shape, **special, **options
    )
    return LlamaForCausalLM(config).eval()


def save_llama(folder: Path, tokenizer: Any, hidden_size: int, initializer_range: float) -> Path:
    """A folder with a model that is wide enough to be quantized, and its tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=initializer_range,
        pad_token_id=0,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, initializer_range=0.2, pad_token_id=0, eos_token_id=None
    )
    return GPT2LMHeadModel(config).eval()


def gram_schmidt(matrix: torch.Tensor) -> torch.Tensor:
    """Rows made orthonormal one after the other, in float64."""
    rows: list[torch.Tensor] = []
    for row in matrix.double():
        for other in rows + rows:  # twice is enough
            row = row - (row @ other) * other
        rows.append(row / row.norm())
    return torch.stack(rows)


def edit_by_hand(tensors: dict[str, torch.Tensor], h: torch.Tensor) -> torch.Tensor:
    """LoReFT of one hidden state [d], in float64.

    In units of the scale s it is h + sqrt(8 / r) s * R^T (W (h / s) + b), with the paper's parameters
    h + R^T (W h + b - R h).
    """
    R, W, b, h64 = tensors["R"].double(), tensors["W"].double(), tensors["b"].double(), h.double()
    if "exponents" not in tensors:
        rotation = gram_schmidt(R)
        return (h64 + rotation.T @ (W @ h64 + b - rotation @ h64)).to(h.dtype)
    exponents = tensors["exponents"].double()
    scale = torch.where(exponents == -128, 1.0, 2.0**exponents)  # not measured yet
    return (h64 + (8 / len(R)) ** 0.5 * scale * (R.T @ (W @ (h64 / scale) + b))).to(h.dtype)


class ByHand:
    """The base model with LoReFT by hand, sharing the adapter's tensors and nothing of the package's code.

    Args:
        base, model, adapter: the base model, the adapted one and the name of the adapter.
        view: gives a view [batch, tokens, d] or [batch, tokens, streams, d] of what a block puts out.
    """

    def __init__(
        self,
        base: nn.Module,
        model: nn.Module,
        adapter: str = "default",
        view: Callable[[torch.Tensor], torch.Tensor] = lambda hidden_states: hidden_states,
    ):
        self.base, self.view = base, view
        self.tensors: dict[str, dict[str, dict[str, torch.Tensor]]] = {}  # block -> unit -> tensors
        adapted = model.get_base_model() if isinstance(model, PeftModel) else model
        for name, tensor in adapted.state_dict().items():
            if "._reft." in name:
                block, _, rest = name.partition("._reft.")
                unit, name_of_adapter, tensor_name = rest.split(".")
                if name_of_adapter == adapter:
                    unit = unit.removeprefix("_reft_")
                    self.tensors.setdefault(block, {}).setdefault(unit, {})[tensor_name.removeprefix("_")] = (
                        tensor.detach()
                    )

    @contextmanager
    def edits(self, columns: dict[str, list[list[int]]], within: str = "", shortest: int = 1) -> Iterator[None]:
        """Edit, in each unit, the listed columns of each row, counted from the first token that the cache holds.

        Only in the blocks whose name has `within` in it, and in outputs of `shortest` tokens or more.
        """
        past = 0

        def look(module, args, kwargs):
            nonlocal past
            try:
                past = int(kwargs[CACHE].get_seq_length())
            except (AttributeError, KeyError, ValueError):  # no cache, or one that cannot tell
                past = 0

        handles = [self.base.register_forward_pre_hook(look, with_kwargs=True)]
        for block, units in self.tensors.items():
            if within not in block:
                continue

            def hook(module, args, output, units=units):
                first = output[0] if isinstance(output, tuple | list) else output
                edited = first.clone()
                hidden_states = self.view(edited)
                assert units.keys() == columns.keys(), "the test lists columns for other units"
                tokens = hidden_states if hidden_states.dim() > 2 else hidden_states[None]  # all in one row
                if tokens.shape[1] < shortest:
                    return None
                for unit, rows in columns.items():
                    for row, listed in enumerate(rows):
                        for column in (column - past for column in listed):
                            if 0 <= column < tokens.shape[1]:
                                states = tokens[row, column].view(-1, tokens.shape[-1])  # one, or a few streams
                                states.copy_(torch.stack([edit_by_hand(units[unit], state) for state in states]))
                return type(output)((edited, *output[1:])) if isinstance(output, tuple | list) else edited

            handles.append(self.base.get_submodule(block).register_forward_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def logits(self, columns: dict[str, list[list[int]]], **inputs) -> torch.Tensor:
        with self.edits(columns):
            return self.base(**inputs).logits

    @torch.no_grad()
    def generate(self, columns: dict[str, list[list[int]]], input_ids, attention_mask=None, new_tokens: int = 6):
        """Greedy decoding without a cache: every step is a forward over all tokens, edited at the same columns."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        for _ in range(new_tokens):
            position_ids = (mask.cumsum(1) - 1).clamp(min=0)
            logits = self.logits(columns, input_ids=input_ids, attention_mask=mask, position_ids=position_ids)
            input_ids = torch.cat([input_ids, logits[:, -1:].argmax(-1)], dim=1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        return input_ids


def adapt_model(base: nn.Module, **options) -> tuple[PeftModel, ByHand]:
    """A copy of a model with a ReFT adapter that edits visibly, in eval mode, and the same by hand."""
    options = {"task_type": "CAUSAL_LM", "r": 4, "init_weights": False} | options
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(base), ReftConfig(**options)).eval()
    return model, ByHand(base, model)


def random_ids() -> torch.Tensor:
    """Two rows of twelve tokens, none of them padding."""
    return torch.randint(2, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(2))


def labels_of(ids, *answers):
    """Labels that are targets in the given spans of each row, and -100 elsewhere."""
    labels = torch.full_like(ids, IGNORED)
    for row, spans in enumerate(answers):
        for start, end in spans:
            labels[row, start:end] = ids[row, start:end]
    return labels


def assert_edits(adapted, columns, **inputs):
    """The model's logits are those by hand at these columns, and differ from the base model's."""
    model, by_hand = adapted
    told = {name: inputs.pop(name) for name in ("labels", "prompt_lengths", "cu_seq_lens_q") if name in inputs}
    with torch.no_grad():
        logits = model(**inputs, **told).logits
    expected = by_hand.logits(columns, **inputs)
    mask = inputs.get("attention_mask")
    seen = torch.ones(logits.shape[:2], dtype=torch.bool) if mask is None or mask.dim() > 2 else mask.bool()
    torch.testing.assert_close(logits[seen], expected[seen], atol=1e-5, rtol=1e-5)
    if any(any(rows) for rows in columns.values()):
        base = by_hand.logits({unit: [[]] for unit in columns}, **inputs)
        assert (base - expected)[seen].abs().max() > 1e-2, "the edit is too small to be seen"


def generated(model, ids, mask=MASK, **options):
    return model.generate(input_ids=ids, attention_mask=mask, **GREEDY | options)


def config(**options):
    return ReftConfig(**{"task_type": "CAUSAL_LM", "r": 4, "positions": "f2+l2", "init_weights": False} | options)


@torch.no_grad()
def logits(model, ids):
    return model.eval()(input_ids=ids.clone()).logits  # which came with no labels
