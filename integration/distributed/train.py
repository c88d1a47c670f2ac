"""What each process of a distributed test runs: a trainer of TRL's, as often as runs.json says, and what came of it.

    accelerate launch --config_file ... train.py folder

`folder`/runs.json holds a list of runs. Each has a `name`, a `base` (the folder of a model) and `data` (rows for SFT,
or for DPO), and as it likes `eval_data`, `reft` (fields of ReftConfig), `sft` (fields of SFTConfig or DPOConfig),
`dtype` (of the base), `quantized` (fields of BitsAndBytesConfig), `environment` (in place of what the launcher sets),
`resume` (the folder of a checkpoint), `directly` (true to have the adapter saved by save_pretrained, too) and
`streamed` (true for an iterable data set, which one process reads for all).

Each rank writes `folder`/name/rank<n>.json: losses, norms of gradients, evaluations. Rank 0 writes the whole gradients
of the first and the last step to gradients.safetensors; the trainer saves the adapter to `folder`/name/adapter,
save_pretrained to `folder`/name/gathered, with the state dict that accelerate gathers, and to `folder`/name/directly,
called by all ranks without one, where it does not refuse.
"""

import json
import os
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import torch
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from safetensors.torch import save_file
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._flat_param import FlatParamHandle
from torch.distributed.tensor import DTensor
from trainers import common, losses, make_trainer, reft
from transformers import AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import DPOConfig, DPOTrainer

from peft_reft.model import plain_name


def allow_fsdp_on_cpus() -> None:
    """accelerate knows FSDP on accelerators alone: do for CPU processes what it does for those, and no more."""
    init = AcceleratorState.__init__

    def init_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            for config in (fsdp_plugin.state_dict_config, fsdp_plugin.optim_state_dict_config):
                if config is not None:
                    config.offload_to_cpu = False  # a move that copies nothing here, of one buffer for all states
            self.fsdp_plugin = fsdp_plugin
            # FSDP1 wants the CPU without an index
            changed = {"distributed_type": DistributedType.FSDP, "device": torch.device("cpu")}
            vars(self).update(changed)
            PartialState._shared_state.update(changed)

    AcceleratorState.__init__ = init_with_fsdp
    # FSDP1 offloads a state dict to the CPU by a move, and frees what it has moved: here the very same tensors.
    FlatParamHandle.to_cpu = nullcontext
    # Offloading pins memory for transfers to the accelerator; without one that is an error.
    torch.Tensor.pin_memory = lambda tensor, device=None: tensor


def allow_tensor_parallelism_on_cpus() -> None:
    """accelerate refuses CPUs when it is told how a model is sharded, though transformers has sharded it by then."""
    ParallelismConfig._validate_accelerator = lambda config, accelerator: None


def whole_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The gradients of all trained parameters, gathered from all ranks."""
    is_fsdp1 = isinstance(model, FullyShardedDataParallel)
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True) if is_fsdp1 else nullcontext():
        found = {plain_name(name): p.grad for name, p in model.named_parameters() if p.requires_grad}
        return {
            name: (grad.full_tensor() if isinstance(grad, DTensor) else grad).detach().cpu().clone()
            for name, grad in found.items()
        }


def gradients_of_deepspeed(engine) -> dict[str, torch.Tensor]:
    from deepspeed.utils import safe_get_full_grad

    found = {plain_name(name): p for name, p in engine.module.named_parameters() if p.requires_grad}
    return {name: safe_get_full_grad(p).detach().clone() for name, p in found.items()}


def clipped(gradients: dict[str, torch.Tensor], max_norm: float) -> dict[str, torch.Tensor]:
    norm = torch.nn.utils.get_total_norm(gradients.values())
    return {name: grad * min(1, max_norm / (norm + 1e-6)) for name, grad in gradients.items()}


class RecordGradients(TrainerCallback):
    """Keeps the gradients, as they are after clipping, of the first and the last step."""

    def __init__(self, trainer):
        self.trainer, self.first, self.last = trainer, None, None

    def on_train_begin(self, args, state, control, **kwargs):
        engine = self.trainer.deepspeed
        if engine is not None:  # it clips and steps before the trainer calls on_pre_optimizer_step
            step = engine.step
            engine.step = lambda: [self.record(clipped(gradients_of_deepspeed(engine), args.max_grad_norm)), step()]

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.trainer.deepspeed is None:
            self.record(whole_gradients(model))

    def record(self, gradients):
        self.last = gradients
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
    data = data.to_iterable_dataset() if run.get("streamed") else data
    if "chosen" in data.column_names:
        arguments = DPOConfig(**common(folder / "checkpoints", **options))
        return DPOTrainer(
            run["base"], args=arguments, train_dataset=data, processing_class=tokenizer, peft_config=config
        )
    quantized = {"quantization_config": BitsAndBytesConfig(**run["quantized"])} if "quantized" in run else None
    return make_trainer(run["base"], folder / "checkpoints", data, tokenizer, eval_data, config, quantized, **options)


def train(run: dict, folder: Path, callbacks=()) -> dict:
    """Train as `run` says, save the adapter, and return what came of it."""
    with environment_of(run):
        trainer = make_trainer_of(run, folder)
        recorded = RecordGradients(trainer)
        for callback in (recorded, *callbacks):
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=run.get("resume"))
        outcome = {
            "losses": losses(trainer),
            "grad_norms": [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry],
            "eval_losses": [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry],
            "wrapped": type(trainer.model_wrapped).__name__,
            "sharded": any(isinstance(p, DTensor) for p in trainer.model.parameters()),
        }
        if "eval_data" in run:
            outcome["eval_losses"].append(trainer.evaluate()["eval_loss"])
        trainer.save_model(str(folder / "adapter"))
        rank = trainer.args.process_index
        if run.get("directly"):
            model, accelerator = trainer.model, trainer.accelerator
            state_dict = accelerator.get_state_dict(model)
            if accelerator.is_main_process:
                accelerator.unwrap_model(model).save_pretrained(str(folder / "gathered"), state_dict=state_dict)
            try:
                trainer.model.save_pretrained(str(folder / "directly"), is_main_process=rank == 0)
            except (KeyError, RuntimeError, ValueError) as error:
                outcome["refused"] = str(error)
        if rank == 0:
            gradients = {
                f"{when}.{name}": grad for when in ("first", "last") for name, grad in getattr(recorded, when).items()
            }
            save_file(gradients, folder / "gradients.safetensors")
        (folder / f"rank{rank}.json").write_text(json.dumps(outcome))
        trainer.accelerator.wait_for_everyone()
    return outcome


def main(folder: Path) -> None:
    allow_fsdp_on_cpus()
    allow_tensor_parallelism_on_cpus()
    for run in json.loads((folder / "runs.json").read_text()):
        (folder / run["name"]).mkdir(exist_ok=True)
        train(run, folder / run["name"])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
