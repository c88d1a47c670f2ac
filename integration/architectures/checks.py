"""What is checked of every architecture, against its base model edited by plain hooks at columns listed here."""

import copy
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import numpy
import torch
from by_hand import IGNORED, ByHand
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel

from peft_reft import ReftConfig

TASKS = {"causal": "CAUSAL_LM", "classifier": "SEQ_CLS", "seq2seq": "SEQ_2_SEQ_LM"}
Columns = dict[str, list[list[int]]]  # unit -> row -> columns that it edits

# Rows of twelve tokens: of a causal model the second begins with four of padding, of others it ends with three
BEFORE_LABELS: Columns = {"prefix": [[0, 1], [4, 5]], "suffix": [[3, 4], [6, 7]]}  # labels from columns 5 and 8 on
WHOLE: dict[str, Columns] = {
    "causal": {"prefix": [[0, 1], [4, 5]], "suffix": [[10, 11], [10, 11]]},
    "classifier": {"prefix": [[0, 1], [0, 1]], "suffix": [[10, 11], [7, 8]]},
    "seq2seq": {"prefix": [[0, 1], [0, 1]], "suffix": [[10, 11], [7, 8]]},
}
NOTHING: Columns = {"prefix": [], "suffix": []}
GENERATION = dict(do_sample=False, max_new_tokens=4, min_new_tokens=4, pad_token_id=0, num_return_sequences=1) | dict(
    decoder_start_token_id=2
)

# What a block puts out, as [batch, tokens, d] or [batch, tokens, streams, d]
VIEWS: dict[tuple[str, str], Callable[[torch.Tensor], torch.Tensor]] = {
    ("causal", "cpmant"): lambda h: h[:, 32:],  # after its soft prompt
    ("causal", "gemma3n_text"): lambda h: h.movedim(0, 2),
    ("causal", "prophetnet"): lambda h: h[:, : h.shape[1] // 3],  # before streams that predict two more tokens
    ("causal", "qwen4_exp"): lambda h: h.unflatten(-1, (4, 32)),
    ("causal", "qwen4_exp_text"): lambda h: h.unflatten(-1, (4, 32)),
    ("causal", "xlnet"): lambda h: h.transpose(0, 1),
    ("classifier", "xlnet"): lambda h: h.transpose(0, 1),
    ("seq2seq", "fsmt"): lambda h: h.transpose(0, 1),
}
# Options that an architecture needs, since its blocks are not one list
ADAPTER_OPTIONS: dict[str, dict[str, Any]] = {
    "blt": dict(layers_pattern="local_encoder.layers"),
    "canine": dict(layers_pattern="initial_char_encoder.layer"),
    "flaubert": dict(layers_pattern="layer_norm2"),
    "funnel": dict(target_modules=r".*encoder\.blocks\.0\.\d+"),
    "hrm_text": dict(layers_pattern="H_module.layers"),
    "xlm": dict(layers_pattern="layer_norm2"),
}
OTHER_LABELS = ("git", "musicgen", "musicgen_melody")  # their loss asks for images, or for codes in place of ids
# As without ReFT: they change embeddings in place, which checkpointing makes leaves of the graph
NO_CHECKPOINTING = ("blt", "git")
# As without ReFT: keys and values that layers share are handed on past the checkpoint, without their gradient
NOT_REENTRANT = ("gemma3n_text", "gemma4_text", "gemma4_unified_text")
NO_CACHE = ("musicgen",)  # whose generate loses the prompt with a cache
ONE_ROW = ("rwkv",)  # decodes one row alone


class Failure(AssertionError):
    """A check that does not hold."""


def require(condition: Any, message: str) -> None:
    if not condition:
        raise Failure(message)


def close(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    require(found.shape == expected.shape, f"{what}: {list(found.shape)}, by hand {list(expected.shape)}")
    require(torch.isfinite(expected).all(), f"{what} of the base model are not finite")
    error, scale = (found - expected).abs().max().item(), max(1.0, expected.abs().max().item())
    require(error <= 2e-5 * scale, f"{what} differ from those by hand by {error:.1g}")


def visible(edited: torch.Tensor, unedited: torch.Tensor, what: str) -> None:
    change, scale = (edited - unedited).abs().max().item(), edited.abs().max().item()
    require(change > 1e-3 * scale, f"{what}: the edit cannot be seen, it changes them by {change:.1g}")


class Architecture:
    """A tiny base model, and the same adapted.

    Args:
        kind (`str`): `"causal"`, `"classifier"` or `"seq2seq"`.
        model_type (`str`): what transformers calls the architecture.
        base (`PreTrainedModel`): the base model.
        adapter_options: options of the `ReftConfig`.

    Raises:
        ValueError: if the package refuses to adapt it.
    """

    def __init__(self, kind: str, model_type: str, base: PreTrainedModel, **adapter_options: Any):
        view = VIEWS.get((kind, model_type), lambda h: h)
        if kind == "seq2seq" and not base.config.is_encoder_decoder:
            kind = "causal"  # a language model that is given sounds
        self.kind, self.model_type, self.base = kind, model_type, base
        self.config = ReftConfig(task_type=TASKS[kind], r=2, positions="f2+l2", init_weights=False, **adapter_options)
        draw()
        self.model = get_peft_model(copy.deepcopy(base), copy.deepcopy(self.config)).eval()
        self.by_hand = ByHand(base, self.model, view=view)
        for name, module in self.model.get_base_model().named_modules():
            if hasattr(module, "modules_to_save"):  # a head, which PEFT draws anew, and trains and saves
                base.get_submodule(name).load_state_dict(module.modules_to_save["default"].state_dict())
        rows = slice(0, 1 if model_type in ONE_ROW else 2)
        self.inputs = {name: tensor[rows] for name, tensor in inputs_for(kind).items()}
        self.whole, self.before_labels = (
            {unit: listed[rows] for unit, listed in columns.items()} for columns in (WHOLE[kind], BEFORE_LABELS)
        )
        self.told = {name: tensor[rows] for name, tensor in told_to(kind, model_type, self.inputs).items()}

    @torch.no_grad()
    def logits(self, model: Any, columns: Columns = NOTHING, **told: torch.Tensor) -> torch.Tensor:
        draw()
        with self.by_hand.edits(columns):
            logits = model(**self.inputs, **told).logits
        return logits[self.inputs["attention_mask"].bool()] if self.kind == "causal" else logits

    def check_forward(self) -> None:
        """Logits are those of the base model edited by hand, with labels and without, and not those of the base."""
        given = self.told if self.kind == "seq2seq" else {}  # where the decoder's input comes from
        unedited = self.logits(self.base, **given)
        expected = self.logits(self.base, self.whole, **given)
        close(self.logits(self.model, **given), expected, "logits")
        visible(expected, unedited, "logits")
        if self.kind == "causal":
            expected = self.logits(self.base, self.before_labels)
            close(self.logits(self.model, **self.told), expected, "logits with labels")
            visible(expected, unedited, "logits with labels")

    def gradients(self) -> dict[str, torch.Tensor]:
        draw()
        output = self.model.train()(**self.inputs, **self.told)
        loss = output.logits.pow(2).mean() if output.get("loss") is None else output.loss
        loss.backward()
        self.model.eval()
        gradients = {name: p.grad for name, p in self.model.named_parameters() if "._reft." in name}
        without = [name for name, gradient in gradients.items() if gradient is None]
        require(not without, f"no gradient for {len(without)} of {len(gradients)} parameters, such as {without[:1]}")
        frozen = [name for name, p in self.model.named_parameters() if p.grad is not None and not p.requires_grad]
        require(not frozen, f"gradients for the base model: {frozen[:1]}")
        self.model.zero_grad()
        return gradients

    def check_backward(self) -> None:
        """Every adapter parameter gets a finite gradient, some of it not zero; the base model gets none.

        With gradient checkpointing the gradients are the same.
        """
        gradients = self.gradients()
        require(all(torch.isfinite(g).all() for g in gradients.values()), "gradients are not finite")
        require(any(g.any() for g in gradients.values()), "all gradients are zero")
        if self.base.supports_gradient_checkpointing and self.model_type not in NO_CHECKPOINTING:
            for reentrant in (False,) if self.model_type in NOT_REENTRANT else (False, True):
                self.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
                if reentrant:
                    self.model.enable_input_require_grads()
                found = self.gradients()
                self.model.gradient_checkpointing_disable()
                for name, gradient in gradients.items():
                    close(found[name], gradient, f"gradients with checkpointing (reentrant: {reentrant})")

    def check_generate(self) -> None:
        """Tokens and logits of every step are those of the base model, edited by hand where it reads the prompt."""

        def steps(model: Any, columns: Columns, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
            draw()
            with torch.no_grad(), self.by_hand.edits(columns, shortest=12):
                options |= dict(return_dict_in_generate=True, output_logits=True)
                options |= dict(use_cache=False) if self.model_type in NO_CACHE else {}
                output = model.generate(**self.inputs, **GENERATION, **options)
            return output.sequences, torch.stack(output.logits)

        tokens, logits = steps(self.model, NOTHING)
        # Asked for hidden states, models read the whole prompt in every layer, even if the answer needs less.
        tokens_by_hand, expected = steps(self.base, self.whole, output_hidden_states=True)
        close(logits, expected, "logits in generation")
        require(torch.equal(tokens, tokens_by_hand), "generated tokens differ from those by hand")
        visible(expected, steps(self.base, NOTHING)[1], "logits in generation")

    def check_reload(self) -> None:
        """Saved, and loaded onto the base model, which is adapted by that, the adapter gives the same logits."""
        expected = self.logits(self.model, **self.told)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model.save_pretrained(folder)
            loaded = PeftModel.from_pretrained(self.base, folder).eval()
        require(torch.equal(self.logits(loaded, **self.told), expected), "the reloaded adapter gives other logits")

    def check_all(self) -> None:
        self.check_forward()
        self.check_backward()
        if self.kind != "classifier":
            self.check_generate()
        self.check_reload()


def draw() -> None:
    """Begin to draw anew: some models draw in their forward, for hashes or random attention."""
    torch.manual_seed(0)
    numpy.random.seed(0)


def inputs_for(kind: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 64, (2, 12), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, slice(0, 4) if kind == "causal" else slice(9, 12)] = 0
    if kind == "classifier":
        ids[0, 11] = ids[1, 8] = 3  # some read the hidden state of the end of the sequence
        ids = ids.masked_fill(mask == 0, 0)
    return {"input_ids": ids, "attention_mask": mask}


def told_to(kind: str, model_type: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What tells a model's forward its targets, and so its prompts."""
    if model_type in OTHER_LABELS:
        return {"prompt_lengths": torch.tensor([5, 4])}
    if kind == "classifier":
        return {"labels": torch.tensor([0, 2])}
    labels = inputs["input_ids"].clone()
    if kind == "causal":
        labels[0, :5] = labels[1:, :8] = IGNORED
    return {"labels": labels}
