"""Which initialisation learns better: an edit of zero, or the draws of the paper's code? On the demo's model and data.

    python integration/benchmarks/init_weights.py MODEL --seeds 0 1 2

MODEL is the folder that `make demo` unpacks Gemma 3 270M into, or any causal LM. The settings are the demo's; the same
seed draws the same R and the same order of the data. Prints a row a run, and the means.
"""

import argparse
import platform
import statistics
import tempfile
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from peft_reft import ReftConfig

DATA = Path(__file__).parents[2] / "examples" / "demo" / "instructions.jsonl"


def run(name, init_weights, seed, learning_rate):
    rows = load_dataset("json", data_files=str(DATA), split="train")
    set_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    depth = model.config.get_text_config().num_hidden_layers
    config = ReftConfig(
        task_type="CAUSAL_LM",
        r=4,
        positions="f5+l5",
        share_weights=True,
        layers_to_transform=[depth * i // 9 for i in (1, 3, 5, 7)],
        init_weights=init_weights,
        standardize=False,
    )
    args = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=40,
        per_device_train_batch_size=8,
        learning_rate=learning_rate,
        warmup_steps=4,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
    )
    data = dict(train_dataset=rows.select(range(40)), eval_dataset=rows.select(range(40, 50)))
    tokenizer = AutoTokenizer.from_pretrained(name)
    trainer = SFTTrainer(model=model, args=args, processing_class=tokenizer, peft_config=config, **data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses[0], statistics.mean(losses[-5:]), trainer.evaluate()["eval_loss"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning_rate", type=float, default=4e-3)
    args = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print("init_weights  seed  first step  last 5 steps  held out")
    results = {True: [], "reference": []}
    for seed in args.seeds:
        for init_weights, rows in results.items():
            rows.append(run(args.model, init_weights, seed, args.learning_rate))
            print_row(init_weights, seed, rows[-1])
    for init_weights, rows in results.items():
        print_row(init_weights, "mean", [statistics.mean(column) for column in zip(*rows, strict=True)])


def print_row(init_weights, seed, losses):
    print(f"{init_weights!s:12}  {seed!s:4}  {losses[0]:10.3f}  {losses[1]:12.3f}  {losses[2]:8.3f}", flush=True)


if __name__ == "__main__":
    main()
