"""transformers' tensor parallelism on two processes: the same edits and training as in one, the same whole adapter."""

import json

import pytest
import torch
from by_hand import GREEDY, TWO, VOCABULARY, ByHand, labels_of, make_llama
from launch import TRAIN, launch
from launch import train as train_distributed
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from trainers import assert_equal_tensors, gradients, reft
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3Config, Qwen3ForCausalLM

pytestmark = pytest.mark.slow

SHARDED = {"dtype": "float32", "distributed_config": {"tp_size": 2, "tp_plan": "auto"}}


SHAPE = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.2,
    pad_token_id=0,
    eos_token_id=None,
)
MODELS = {
    "llama": make_llama,
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=8)).eval(),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4)).eval(),
}
COLUMNS = {"prefix": [[0, 1]] * 2, "suffix": [[3, 4], [6, 7]]}  # f2+l2 of prompts of 5 and 8 tokens


@pytest.fixture(scope="module")
def batch():
    ids = torch.randint(6, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": labels_of(ids, *TWO["answers"])}


def test_edits(tmp_path, batch, subtests):
    """Logits are those of the edits by hand on the whole model, gradients and tokens those of one process."""
    models = {}
    save_file(batch, tmp_path / "batch.safetensors")
    for name, make in MODELS.items():
        torch.manual_seed(0)
        base = make()
        base.save_pretrained(tmp_path / name / "base")
        models[name] = base, get_peft_model(base, reft(init_weights=False)).eval()
        models[name][1].save_pretrained(tmp_path / name / "adapter")
    script = TRAIN.with_name("edit_shards.py")
    launched = launch("ddp", script, tmp_path, *MODELS, log=tmp_path / "log.txt")
    assert launched.returncode == 0, launched.output[-3000:]
    for name, (_, model) in models.items():
        with subtests.test(name):
            model.zero_grad()
            model(**batch).loss.backward()
            generated = model.generate(input_ids=batch["input_ids"], **GREEDY)
            plain = MODELS[name]().from_pretrained(tmp_path / name / "base").eval()
            logits = ByHand(plain, model).logits(COLUMNS, input_ids=batch["input_ids"])
            expected = {"logits": logits, "generated": generated, **gradients(model)}
            adapter = (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()
            for rank in range(2):
                assert_equal_tensors(load_file(tmp_path / name / f"rank{rank}.safetensors"), expected)
            assert (tmp_path / name / "saved" / "adapter_model.safetensors").read_bytes() == adapter
    refused = json.loads((tmp_path / "refused.json").read_text())
    assert all("puts out a part of the features on each process" in refused[n] for n in ("q_proj", "gate_proj"))
    assert "puts out a part of the tokens on each process" in refused["sequence_parallel"]
    assert refused.keys() == {"q_proj", "gate_proj", "sequence_parallel"}


def test_training(tmp_path, rows, describe, in_one_process, assert_same, subtests):
    """Each process has the whole batch, so that it is that of one process; the trainer refuses to resume."""
    more = {"eval_data": rows[:8], "reft": {"dropout": 0.1}}
    settings = {"per_device_eval_batch_size": 2}
    runs = [
        describe("plain", rows, more, **settings, gradient_checkpointing=False),
        describe("checkpointed", rows, more, **settings, gradient_accumulation_steps=2),
    ]
    sharded = [run | {"sft": run["sft"] | {"model_init_kwargs": SHARDED}} for run in runs]
    outcomes = train_distributed("ddp", tmp_path, sharded)
    for run in runs:
        with subtests.test(run["name"]):
            assert all(rank["sharded"] for rank in outcomes[run["name"]])
            assert_same(tmp_path / run["name"], outcomes[run["name"]], in_one_process(run))
