"""ReFT and LoRA on the same base in 4 bits: does the loss fall, how much memory, how many seconds a step?

    python integration/benchmarks/four_bit.py MODEL --steps 50

MODEL is any causal LM, by name or folder; the data are the demo's. On a GPU the compute dtype is bfloat16, and the
peak of its allocated memory is printed; on a CPU it is float32, and there is none. The methods take turns, so that
seconds compare, and each of them loads the base anew.
"""

import argparse
import copy
import gc
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from peft_reft import ReftConfig

DATA = Path(__file__).parents[2] / "examples" / "demo" / "instructions.jsonl"
METHODS = {
    "ReFT, r 8, f7+l7": (ReftConfig(task_type="CAUSAL_LM", r=8, positions="f7+l7"), 4e-3),
    "LoRA, r 8, q and v": (LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"]), 4e-4),
    "LoRA, r 16, all linear": (LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"), 4e-4),
}


class Clock(TrainerCallback):
    """Seconds of each step, with all that the device had to do for it."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        synchronize()
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        synchronize()
        self.seconds.append(time.perf_counter() - self.began)


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def run(name, peft_config, learning_rate, steps, batch_size, seed=0):
    """Train for some steps.

    Returns:
        `dict`: trainable parameters, loss of the first step, mean of the last five, held-out loss, seconds of each
        step but the first three, and the peak of memory allocated on the GPU in bytes, None on a CPU.
    """
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    gc.collect()  # the model of the run before
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    set_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(name, quantization_config=quantization, dtype=dtype)
    args = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        warmup_steps=steps // 10,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
    )
    rows, clock = load_dataset("json", data_files=str(DATA), split="train"), Clock()
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=rows.select(range(40)),
        eval_dataset=rows.select(range(40, 50)),
        processing_class=AutoTokenizer.from_pretrained(name),
        peft_config=copy.deepcopy(peft_config),  # PEFT writes into it
        callbacks=[clock],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return dict(
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        first=losses[0],
        last=statistics.mean(losses[-5:]),
        held_out=trainer.evaluate()["eval_loss"],
        seconds=clock.seconds[3:],
        peak=torch.cuda.max_memory_allocated() if on_gpu else None,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch_size", type=int, default=6)
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}, batch {args.batch_size}\n")
    turns = [
        {method: run(args.model, *how, args.steps, args.batch_size, seed) for method, how in METHODS.items()}
        for seed in range(args.turns)
    ]
    print("| | trainable parameters | first loss | last 5 losses | held out | seconds a step | peak memory |")
    print("|---|---|---|---|---|---|---|")
    for method in METHODS:
        runs = [turn[method] for turn in turns]
        mean = {key: statistics.mean(run[key] for run in runs) for key in ("first", "last", "held_out")}
        seconds = statistics.median(second for run in runs for second in run["seconds"])
        peak = f"{max(run['peak'] for run in runs) / 2**20:,.0f} MiB" if runs[0]["peak"] else "(CPU)"
        losses = " | ".join(f"{loss:.3f}" for loss in mean.values())
        print(f"| {method} | {runs[0]['parameters']:,} | {losses} | {seconds:.3f} | {peak} |")


if __name__ == "__main__":
    main()
