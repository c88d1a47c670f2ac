"""What each process of a distributed test runs: TRL's SFTTrainer, as often as runs.json says, and what came of it.

    accelerate launch --config_file ... train.py folder

`folder`/runs.json holds a list of runs. Each has a `name`, a `base` (the folder of a model) and `data` (rows for SFT),
and as it likes `eval_data`, `reft` (fields of ReftConfig), `sft` (fields of SFTConfig), `dtype` (of the base),
`quantized` (fields of BitsAndBytesConfig), `environment` (in place of what the launcher sets) and `resume` (the folder
of a checkpoint).

Each rank writes `folder`/name/rank<n>.json: losses, norms of gradients, evaluations. Rank 0 writes the whole gradients
of the first and the last step to gradients.safetensors; the trainer saves the adapter to `folder`/name/adapter, and
save_pretrained, where it does not refuse, to `folder`/name/directly.
"""

import json
import os
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from safetensors.torch import save_file
from torch.distributed.fsdp import FullyShardedDataParallel, _optim_utils
from torch.distributed.fsdp._flat_param import FlatParamHandle
from torch.distributed.tensor import DTensor
from trainers import losses, make_trainer, reft
from transformers import AutoTokenizer, BitsAndBytesConfig, TrainerCallback

from peft_reft.model import plain_name


def allow_fsdp_on_cpus() -> None:
    """accelerate knows FSDP on accelerators alone: do for CPU processes what it does for those, and no more."""
    init = AcceleratorState.__init__

    def init_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            # FSDP1 wants the CPU without an index
            changed = {"distributed_type": DistributedType.FSDP, "device": torch.device("cpu")}
            vars(self).update(changed)
            PartialState._shared_state.update(changed)

    AcceleratorState.__init__ = init_with_fsdp
    # FSDP1 moves state dicts to the CPU, and frees or fills anew what it has moved from: here the very same tensors.
    FlatParamHandle.to_cpu = nullcontext
    unflatten = _optim_utils._unflatten_orig_param_states
    _optim_utils._unflatten_orig_param_states = lambda *args: unflatten(*args[:-1], cpu_offload=False)  # which copies
    torch.Tensor.pin_memory = lambda tensor: tensor  # offloaded shards, for copies to an accelerator
    torch.cpu.Stream.synchronize = lambda stream: None  # no such copies to wait for


def whole_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The gradients of all trained parameters, gathered from all ranks."""
    is_fsdp1 = isinstance(model, FullyShardedDataParallel)
    summon = FullyShardedDataParallel.summon_full_params
    with summon(model, with_grads=True, writeback=False) if is_fsdp1 else nullcontext():
        found = {plain_name(name): p.grad for name, p in model.named_parameters() if p.requires_grad}
        return {
            name: (grad.full_tensor() if isinstance(grad, DTensor) else grad).detach().cpu().clone()
            for name, grad in found.items()
        }


class RecordGradients(TrainerCallback):
    """Keeps the gradients, as they are after clipping, of the first and the last step."""

    def __init__(self):
        self.first, self.last = None, None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.last = whole_gradients(model)
        self.first = self.first or self.last


@contextmanager
def environment_of(run: dict):
    with mock.patch.dict(os.environ, run.get("environment", {})):
        yield


def make_trainer_of(run: dict, folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(run["base"])
    options = {"model_init_kwargs": {"dtype": run.get("dtype", "float32")}} | run.get("sft", {})
    eval_data = Dataset.from_list(run["eval_data"]) if "eval_data" in run else None
    config = reft(**run.get("reft", {}))
    data = Dataset.from_list(run["data"])
    quantized = {"quantization_config": BitsAndBytesConfig(**run["quantized"])} if "quantized" in run else None
    return make_trainer(run["base"], folder / "checkpoints", data, tokenizer, eval_data, config, quantized, **options)


def train(run: dict, folder: Path, callbacks=()) -> dict:
    """Train as `run` says, save the adapter, and return what came of it."""
    with environment_of(run):
        trainer = make_trainer_of(run, folder)
        recorded = RecordGradients()
        for callback in (recorded, *callbacks):
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=run.get("resume"))
        outcome = {
            "losses": losses(trainer),
            "grad_norms": [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry],
            "eval_losses": [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry],
            "wrapped": type(trainer.model_wrapped).__name__,
        }
        if "eval_data" in run:
            outcome["eval_losses"].append(trainer.evaluate()["eval_loss"])
        trainer.save_model(str(folder / "adapter"))
        rank = trainer.args.process_index
        try:
            trainer.model.save_pretrained(str(folder / "directly"), is_main_process=rank == 0)
        except (KeyError, RuntimeError, ValueError) as error:
            outcome["refused"] = str(error)
        if rank == 0:
            gradients = {
                f"{when}.{name}": grad for when in ("first", "last") for name, grad in vars(recorded)[when].items()
            }
            save_file(gradients, folder / "gradients.safetensors")
        (folder / f"rank{rank}.json").write_text(json.dumps(outcome))
        trainer.accelerator.wait_for_everyone()
    return outcome


def main(folder: Path) -> None:
    allow_fsdp_on_cpus()
    for run in json.loads((folder / "runs.json").read_text()):
        (folder / run["name"]).mkdir(exist_ok=True)
        train(run, folder / run["name"])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
