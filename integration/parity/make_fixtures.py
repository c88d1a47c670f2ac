"""Make what `test_parity.py` compares with: checkpoints that pyreft and adapters save, and what they compute.

    PYTHON integration/parity/make_fixtures.py

in an environment with pyreft 0.1.0, pyvene 0.1.8, adapters 1.3.0 and transformers 4.57.6. It writes, under
`fixtures/`, tiny base models, and for each case a checkpoint as the peer writes it, `case.json` (how it was made) and
`reference.safetensors` (inputs and outputs). Positions are those of pyreft's own `get_intervention_locations`, for
which pyreft's datasets add a padding token to each row (the first, of a classifier the last), and those that adapters
finds itself.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import adapters
import pyreft
import torch
from safetensors.torch import save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5EncoderModel,
)

FIXTURES = Path(__file__).parent / "fixtures"
VOCABULARY, D, PAD = 48, 16, 1
PROMPTS = [8, 5, 4, 2, 1]  # lengths; the halves rule bites from the second on
TOKENS = 10  # of the longest row
SAME_PROMPTS = [6] * 3  # what is generated from; the halves rule bites
GREEDY = dict(max_new_tokens=6, do_sample=False, pad_token_id=PAD)
STEPS = 20
OPTIMIZER = dict(lr=2e-2, weight_decay=0.0)

SHAPE = dict(hidden_size=D, intermediate_size=32, num_attention_heads=2, initializer_range=0.1, vocab_size=VOCABULARY)
MODELS = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(num_hidden_layers=3, pad_token_id=PAD, bos_token_id=2, eos_token_id=None, **SHAPE)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=D,
            n_layer=2,
            n_head=2,
            n_positions=32,
            initializer_range=0.1,
            pad_token_id=PAD,
            bos_token_id=2,
            eos_token_id=None,
        )
    ),
    "roberta": lambda: RobertaForSequenceClassification(
        RobertaConfig(num_hidden_layers=2, num_labels=3, max_position_embeddings=32, pad_token_id=PAD, **SHAPE)
    ),
    "t5": lambda: T5EncoderModel(
        T5Config(vocab_size=VOCABULARY, d_model=D, d_kv=8, d_ff=32, num_layers=2, num_heads=2, pad_token_id=PAD)
    ),
}
DECODERS = ("llama", "gpt2")
COMPONENTS = {  # for models that pyvene does not know, as in pyreft's examples/loreft/train.py
    "roberta": "roberta.encoder.layer[{}].output",
    "t5": "encoder.block[{}].output",
}


@dataclass
class Case:
    """One checkpoint of pyreft, and how it is made.

    Attributes:
        ranks: of each layer that is edited, by its index.
        options: for the intervention's class.
        trained: parameters that are trained for some steps from what is saved in `initial/`: those whose name does
            not begin with one of `frozen`.
    """

    base: str
    intervention: str
    positions: str
    share_weights: bool = False
    ranks: dict[int, int] = field(default_factory=lambda: {0: 3, 1: 3})
    options: dict[str, Any] = field(default_factory=dict)
    trained: bool = False
    frozen: str | None = None
    dtype: str = "float32"
    head: bool = False


BOTH = "f4+l3"
PYREFT = {
    **{
        f"llama_{name}": Case("llama", f"{name.title()}Intervention", BOTH, ranks={0: 3, 2: 3})
        for name in ("loreft", "noreft", "consreft", "lobireft", "direft", "nodireft")
    },
    "llama_shared": Case("llama", "LoreftIntervention", BOTH, share_weights=True),
    "llama_prefix": Case("llama", "LoreftIntervention", "f3"),
    "llama_suffix": Case("llama", "LoreftIntervention", "l2"),
    "llama_ranks": Case("llama", "LoreftIntervention", BOTH, ranks={0: 1, 1: 2, 2: 3}),
    "llama_bias": Case("llama", "NoreftIntervention", BOTH, options={"add_bias": True}),
    "llama_bias_unused": Case("llama", "NodireftIntervention", "f3", options={"add_bias": True}),
    "llama_act_fn": Case("llama", "LoreftIntervention", BOTH, options={"act_fn": "gelu"}),
    "llama_bfloat16": Case("llama", "LoreftIntervention", BOTH, dtype="bfloat16"),
    "llama_loreft_trained": Case("llama", "LoreftIntervention", BOTH, trained=True),
    "llama_loreft_trained_but_r": Case("llama", "LoreftIntervention", BOTH, trained=True, frozen="rotate_layer"),
    "llama_noreft_trained": Case("llama", "NoreftIntervention", BOTH, trained=True),
    "llama_nodireft_trained": Case("llama", "NodireftIntervention", BOTH, trained=True, share_weights=True),
    "gpt2_loreft": Case("gpt2", "LoreftIntervention", BOTH),
    "gpt2_nodireft": Case("gpt2", "NodireftIntervention", "f2+l5", share_weights=True),
    "roberta_loreft": Case("roberta", "LoreftIntervention", "f2+l2", share_weights=True, head=True),
    "roberta_noreft": Case("roberta", "NoreftIntervention", "f2+l2"),
    "t5_loreft": Case("t5", "LoreftIntervention", BOTH),
    "t5_consreft": Case("t5", "ConsreftIntervention", BOTH, share_weights=True),
}


@dataclass
class AdaptersCase:
    """One checkpoint of adapters: the config's class and its arguments."""

    base: str
    config: str
    options: dict[str, Any]
    trained: bool = False
    safetensors: bool = False


ENDS = dict(prefix_positions=3, suffix_positions=2)
ADAPTERS = {
    "llama_loreft": AdaptersCase("llama", "LoReftConfig", ENDS | dict(r=3, layers=[0, 2])),
    "llama_noreft": AdaptersCase("llama", "NoReftConfig", ENDS | dict(r=3), safetensors=True),
    "llama_direft": AdaptersCase("llama", "DiReftConfig", ENDS | dict(r=3, tied_weights=True)),
    "llama_loreft_tied": AdaptersCase("llama", "LoReftConfig", ENDS | dict(r=3, tied_weights=True), safetensors=True),
    "llama_prefix": AdaptersCase("llama", "LoReftConfig", dict(prefix_positions=3, r=2)),
    "llama_suffix": AdaptersCase("llama", "LoReftConfig", dict(prefix_positions=0, suffix_positions=2, r=2)),
    "llama_act_fn": AdaptersCase("llama", "LoReftConfig", ENDS | dict(r=3, non_linearity="leakyrelu")),
    "llama_square": AdaptersCase("llama", "LoReftConfig", dict(prefix_positions=2, r=D, layers=[1])),
    "llama_loreft_trained": AdaptersCase("llama", "LoReftConfig", dict(prefix_positions=3, r=3), trained=True),
    "llama_direft_trained": AdaptersCase("llama", "DiReftConfig", dict(prefix_positions=3, r=3), trained=True),
    "gpt2_loreft": AdaptersCase("gpt2", "LoReftConfig", ENDS | dict(r=3)),
    "roberta_noreft": AdaptersCase("roberta", "NoReftConfig", ENDS | dict(r=2)),
    "t5_loreft": AdaptersCase("t5", "LoReftConfig", ENDS | dict(r=2)),
}


def load_base(name: str, dtype: str = "float32") -> PreTrainedModel:
    base = type(MODELS[name]()).from_pretrained(f"bases/{name}", dtype=getattr(torch, dtype))
    return base.eval()


def make_batch(prompts: list[int], leading: int, answered: bool) -> dict[str, torch.Tensor]:
    """Rows of prompts and perhaps answers, padded on the right, and on the left by `leading` tokens.

    Returns:
        `input_ids` and `attention_mask` [batch, tokens], `prompt_lengths` [batch], and `labels` [batch, tokens] for
        answers.
    """
    draw = torch.Generator().manual_seed(0)
    ids = torch.full((len(prompts), leading + TOKENS), PAD)
    labels = torch.full_like(ids, -100)
    for row, prompt in enumerate(prompts):
        end = prompt + 2 if answered else prompt
        ids[row, leading : leading + end] = torch.randint(3, VOCABULARY, (end,), generator=draw)
        labels[row, leading + prompt : leading + end] = ids[row, leading + prompt : leading + end]
    batch = {"input_ids": ids, "attention_mask": (ids != PAD).long(), "prompt_lengths": torch.tensor(prompts)}
    return batch | ({"labels": labels} if answered else {})


def make_prompts(leading: int) -> dict[str, torch.Tensor]:
    batch = make_batch(SAME_PROMPTS, leading, answered=False)
    return {name: batch[name][:, : leading + SAME_PROMPTS[0]] for name in ("input_ids", "attention_mask")}


def output_of(outputs: Any) -> torch.Tensor:
    return outputs["logits"] if "logits" in outputs else outputs["last_hidden_state"]


def with_pyreft(case: Case) -> Any:
    base = load_base(case.base, case.dtype)
    layers = [*case.ranks] if case.share_weights or "+" not in case.positions else [*case.ranks, *case.ranks]
    representations = [
        {
            "layer": layer,
            "component": COMPONENTS.get(case.base, "block_output").format(layer),
            "low_rank_dimension": case.ranks[layer],
            "intervention": getattr(pyreft.interventions, case.intervention)(
                **{"add_bias": False, "dtype": base.dtype} | case.options,
                embed_dim=D,
                low_rank_dimension=case.ranks[layer],
            ),
        }
        for layer in layers
    ]
    model = pyreft.get_reft_model(base, pyreft.ReftConfig(representations=representations))
    model.model.eval()
    return model


def locations(case: Case, count: int, prompts: list[int], leading: int) -> dict[str, Any]:
    """As pyreft's datasets and trainer pass them; what has no place in a short prompt goes to the padding token."""
    rows = [
        pyreft.get_intervention_locations(
            last_position=prompt,
            positions=case.positions,
            num_interventions=count,
            share_weights=case.share_weights,
            pad_mode="first" if leading else "last",
        )
        for prompt in prompts
    ]
    width = min(len(row[0]) for row in rows)  # of a prompt of one token pyreft gives more, all of them padding
    where = torch.tensor([[unit[:width] for unit in row] for row in rows])
    return {"sources->base": (None, (where + leading).permute(1, 0, 2).tolist())}


def train(parameters: list[torch.nn.Parameter], loss_of: Any) -> torch.Tensor:
    """The losses before each step."""
    optimizer, losses = torch.optim.AdamW(parameters, **OPTIMIZER), []
    for _ in range(STEPS):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def make_pyreft(case: Case, folder: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    model, found = with_pyreft(case), {}
    count = len(model.interventions)
    leading = int(case.base in DECODERS)
    batch = make_batch(PROMPTS, leading, answered=case.base in DECODERS)
    told = {name: batch[name] for name in ("input_ids", "attention_mask")}
    where = locations(case, count, PROMPTS, leading)
    if case.head:  # as pyreft's examples train the head of a classifier
        for name, parameter in model.model.named_parameters():
            parameter.requires_grad = name.startswith("classifier.")
            parameter.data += 0.1 * parameter.requires_grad
    if case.trained:
        model.save(str(folder / "initial"))
        parameters = [
            parameter
            for intervention in model.interventions.values()
            for name, parameter in intervention.named_parameters()
            if not (case.frozen and name.startswith(case.frozen))
        ]
        loss_of = lambda: model(told, unit_locations=where, labels=batch["labels"], use_cache=False)[1].loss  # noqa: E731
        found["losses"] = train(parameters, loss_of)
    with torch.no_grad():
        found |= batch | {"outputs": output_of(model(told, unit_locations=where)[1]).float()}
        if case.base in DECODERS:
            told, where = make_prompts(leading), locations(case, count, SAME_PROMPTS, leading)
            tokens = model.generate(told, unit_locations=where, intervene_on_prompt=True, **GREEDY)[1]
            found |= {"prompts": told["input_ids"], "tokens": tokens}
    model.save(str(folder / "checkpoint"), include_model=case.head)
    return found


def make_adapters(case: AdaptersCase, folder: Path) -> dict[str, torch.Tensor]:
    """Rows have no answer: adapters counts its last positions from the end of the row, wherever the prompt ends."""
    torch.manual_seed(1)
    model, found = load_base(case.base), {}
    adapters.init(model)
    model.add_adapter("fixture", config=getattr(adapters, case.config)(dropout=0.0, **case.options))
    model.train_adapter("fixture")
    assert model.active_adapters
    with torch.no_grad():  # R is drawn near 0 otherwise, and some of the biases are 0
        for name, parameter in model.named_parameters():
            if ".refts." in name and name.endswith(("bias", "projection.weight")):
                parameter.normal_(std=0.3)
    batch = make_batch([8, 6, 5], 0, answered=case.trained)
    told = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if case.trained:
        model.save_adapter(str(folder / "initial"), "fixture", use_safetensors=case.safetensors)
        parameters = [p for n, p in model.named_parameters() if ".refts." in n and p.requires_grad]
        found["losses"] = train(parameters, lambda: model(**told, labels=batch["labels"]).loss)
    model.eval()
    with torch.no_grad():
        found |= batch | {"outputs": output_of(model(**told))}
        if case.base in DECODERS and not case.options.get("suffix_positions"):
            # With a cache, adapters edits the first generated tokens too; last tokens move with each step.
            told = make_prompts(0)
            found |= {"prompts": told["input_ids"], "tokens": model.generate(**told, **GREEDY, use_cache=False)}
    model.save_adapter(str(folder / "checkpoint"), "fixture", use_safetensors=case.safetensors)
    return found


def main() -> None:
    shutil.rmtree(FIXTURES, ignore_errors=True)
    FIXTURES.mkdir()
    os.chdir(FIXTURES)  # adapters saves the path of the base model
    for name, make in MODELS.items():
        torch.manual_seed(0)
        make().save_pretrained(FIXTURES / "bases" / name)
    for peer, cases, make in (("pyreft", PYREFT, make_pyreft), ("adapters", ADAPTERS, make_adapters)):
        for name, case in cases.items():
            folder = FIXTURES / peer / name
            folder.mkdir(parents=True)
            found = make(case, folder)
            told = asdict(case)
            (folder / "case.json").write_text(json.dumps(told, indent=1) + "\n")
            save_file({key: tensor.contiguous() for key, tensor in found.items()}, folder / "reference.safetensors")
            print(peer, name, {key: list(tensor.shape) for key, tensor in found.items()})
    size = sum(path.stat().st_size for path in FIXTURES.rglob("*") if path.is_file())
    print(f"{size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
