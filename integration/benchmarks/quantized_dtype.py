"""Does an adapter on a quantized base learn worse in bfloat16, to which TRL casts it, than in float32?

    python integration/benchmarks/quantized_dtype.py                 # a tiny model, 500 steps
    python integration/benchmarks/quantized_dtype.py MODEL --seeds 0 1 --learning_rates 4e-3 --steps 40

The base is quantized to NF4 by bitsandbytes. MODEL is the folder that `make demo` unpacks Gemma 3 270M into, or any
causal LM, and learns the demo's data in the demo's settings; the tiny model learns what a second adapter, drawn at
random, has the same base answer. The same seed draws the same R, W and order of the data. Prints a row a run: the
loss of the first step and the mean of the last ten, the held-out loss, the share of the entries of R and W that a step
leaves as they are (of the first ten steps, of the last ten), and how far the rows that are used are from orthonormal.
"""

import argparse
import platform
import statistics
import tempfile
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from peft_reft import ReftConfig
from peft_reft.edits.intervention import Intervention

DATA = Path(__file__).parents[2] / "examples" / "demo" / "instructions.jsonl"
WORDS = 256
COLUMNS = ("dtype", "rate", "seed", "first", "last ten", "held out", "kept, first", "kept, last", "|RR'-I|")


def load(name):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    return AutoModelForCausalLM.from_pretrained(name, quantization_config=quantization, dtype=torch.float32)


def write_tiny_model(folder):
    """A random Llama of 0.9 M parameters, with a tokenizer of words."""
    torch.manual_seed(0)
    shape = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4)
    special = dict(pad_token_id=0, bos_token_id=None, eos_token_id=1)
    LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, initializer_range=0.2, **shape, **special)).save_pretrained(folder)
    words = {"<pad>": 0, "<eos>": 1} | {f"w{n}": n for n in range(2, WORDS)}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)


def answers_of_a_teacher(name, count):
    """Random prompts, and what the base with an adapter that is drawn at random answers greedily."""
    torch.manual_seed(1)
    teacher = get_peft_model(load(name), config_of(4, init_weights=False)).eval()
    prompts = torch.randint(2, WORDS, (count, 12))
    tokens = teacher.generate(prompts, do_sample=False, min_new_tokens=6, max_new_tokens=6)
    text = lambda row: " ".join(f"w{n}" for n in row)  # noqa: E731
    return Dataset.from_list(
        [{"prompt": text(row[:12]), "completion": " " + text(row[12:])} for row in tokens.tolist()]
    )


def config_of(depth, **options):
    layers = sorted({depth * i // 9 for i in (1, 3, 5, 7)})
    defaults = dict(task_type="CAUSAL_LM", r=4, positions="f5+l5", share_weights=True, layers_to_transform=layers)
    defaults["standardize"] = False
    return ReftConfig(**defaults | options)


def interventions(model):
    return [module for module in model.modules() if isinstance(module, Intervention)]


class CountKept(TrainerCallback):
    """The share of the entries of R and W that each step leaves as they are."""

    def __init__(self):
        self.shares = []

    def tensors(self, model):
        return torch.cat([tensor.detach().flatten() for unit in interventions(model) for tensor in (unit.R, unit.W)])

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.before = self.tensors(model).clone()

    def on_optimizer_step(self, args, state, control, model, **kwargs):
        self.shares.append((self.tensors(model) == self.before).float().mean().item())


def run(name, dtype, rate, seed, steps, train, held_out):
    set_seed(seed)
    model = load(name)
    args = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=rate,
        warmup_steps=steps // 10,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
    )
    kept = CountKept()
    trainer = SFTTrainer(
        model=get_peft_model(model, config_of(model.config.get_text_config().num_hidden_layers)),
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=AutoTokenizer.from_pretrained(name),
        callbacks=[kept],
    )
    for unit in interventions(trainer.model):
        unit.to(dtype)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    rows = [unit.projection().detach() for unit in interventions(trainer.model)]
    error = max((R @ R.mT - torch.eye(len(R))).abs().max().item() for R in rows)
    mean = statistics.mean
    ends = mean(losses[-10:]), trainer.evaluate()["eval_loss"]
    return losses[0], *ends, mean(kept.shares[:10]), mean(kept.shares[-10:]), error


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[4e-4, 1e-3, 4e-3])
    parser.add_argument("--steps", type=int, default=500)
    args = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    if args.model is None:
        args.model = tempfile.mkdtemp()
        write_tiny_model(args.model)
        data = answers_of_a_teacher(args.model, 4160)
        train, held_out = data.select(range(4096)), data.select(range(4096, 4160))
    else:
        data = load_dataset("json", data_files=str(DATA), split="train")
        train, held_out = data.select(range(40)), data.select(range(40, 50))
    print("".join(f"{column:>13}" for column in COLUMNS))
    for rate in args.learning_rates:
        means = {}
        for dtype in (torch.float32, torch.bfloat16):
            rows = [run(args.model, dtype, rate, seed, args.steps, train, held_out) for seed in args.seeds]
            for seed, row in zip(args.seeds, rows, strict=True):
                print_row(dtype, rate, seed, row)
            means[dtype] = [statistics.mean(column) for column in zip(*rows, strict=True)]
        for dtype, row in means.items():
            print_row(dtype, rate, "mean", row)


def print_row(dtype, rate, seed, row):
    cells = [str(dtype).removeprefix("torch."), f"{rate:g}", str(seed)]
    cells += [f"{loss:.4f}" for loss in row[:3]] + [f"{share:.1%}" for share in row[3:5]] + [f"{row[5]:.1e}"]
    print("".join(f"{cell:>13}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
