"""What each process of test_tensor_parallel.py runs: an adapter on sharded models, and adapters that are refused.

accelerate launch --config_file ... edit_shards.py folder llama qwen3
"""

import json
import sys
from pathlib import Path

import torch
from by_hand import GREEDY
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from trainers import gradients, reft
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig


def sharded(folder: Path, plan="auto"):
    config = DistributedConfig(tp_size=2, tp_plan=plan)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", distributed_config=config)
    assert any(isinstance(parameter, DTensor) for parameter in base.parameters())
    return base.eval()


def refusal(base, **options) -> str | None:
    try:
        get_peft_model(base, reft(**options))
    except ValueError as error:
        return str(error)


def main(folder: Path, names: list[str]) -> None:
    batch = load_file(folder / "batch.safetensors")
    for name in names:
        base = sharded(folder / name / "base")
        model = PeftModel.from_pretrained(base, folder / name / "adapter", is_trainable=True).eval()
        output = model(**batch)
        output.loss.backward()
        found = {"logits": output.logits.detach(), **gradients(model)}
        found["generated"] = model.generate(input_ids=batch["input_ids"], **GREEDY)
        rank = torch.distributed.get_rank()
        save_file(
            {key: tensor.contiguous() for key, tensor in found.items()}, folder / name / f"rank{rank}.safetensors"
        )
        model.save_pretrained(folder / name / "saved", is_main_process=rank == 0)
        torch.distributed.barrier()
    first = folder / names[0] / "base"
    targets = ("q_proj", "gate_proj", "o_proj", "down_proj", "self_attn", "mlp", "embed_tokens", "input_layernorm")
    errors = {target: refusal(sharded(first), target_modules=[target]) for target in targets}
    by_tokens = {"model.layers.*.post_attention_layernorm": "sequence_parallel"}
    errors["sequence_parallel"] = refusal(sharded(first, by_tokens))
    if rank == 0:
        (folder / "refused.json").write_text(json.dumps({key: text for key, text in errors.items() if text}))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
