"""How uneven the dimensions of hidden states are, layer by layer, and what edits read of them: a picture.

    python integration/benchmarks/scales.py MODEL --out docs/results/scales.svg

MODEL is a causal LM that normalises the input of its blocks (`input_layernorm`). The texts are the demo's. Prints a
row a layer: the largest root mean square of a dimension divided by the median one, in the output of the block, after
the next norm (what LoRA reads on its attention), and in units of the scale that peft_reft measures.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_reft.edits.scale import measure_exponents, scale_of

TEXTS = Path(__file__).parents[2] / "examples" / "demo" / "instructions.jsonl"
LABELS = {
    "block": "output of a block: what the paper's parameters read",
    "norm": "after the next norm: what LoRA reads",
    "standard": "in units of the scale: what edits read here",
}


def unevenness(states: torch.Tensor) -> float:
    """The largest root mean square of a dimension of states [tokens, d], divided by the median one."""
    rms = states.double().square().mean(0).sqrt()
    return (rms.max() / rms.median()).item()


@torch.no_grad()
def measure(model: torch.nn.Module, batches: list[torch.Tensor]) -> dict[str, list[float]]:
    """The unevenness in each layer but the last, whose output no block reads, by the keys of `LABELS`."""
    seen: dict[tuple[str, int], list[torch.Tensor]] = defaultdict(list)
    blocks = model.get_decoder().layers  # type: ignore[operator]

    def note(kind: str, layer: int):
        def hook(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
            seen[kind, layer].append(output[0, 1:])  # the first token is many times larger

        return hook

    for layer, block in enumerate(blocks[:-1]):
        block.register_forward_hook(note("block", layer))
        blocks[layer + 1].input_layernorm.register_forward_hook(note("norm", layer))
    for ids in batches:
        model(ids)
    found: dict[str, list[float]] = defaultdict(list)
    for layer in range(len(blocks) - 1):
        states = torch.cat(seen["block", layer])
        every = torch.ones(1, len(states), dtype=torch.bool)
        scale = scale_of(measure_exponents(states[None], every, torch.tensor(False)))
        found["block"].append(unevenness(states))
        found["norm"].append(unevenness(torch.cat(seen["norm", layer])))
        found["standard"].append(unevenness(states / scale))
    return found


def draw(found: dict[str, list[float]], file: Path) -> None:
    figure = Figure(figsize=(7.5, 4), layout="constrained")
    axes = figure.subplots()
    for (kind, label), marker in zip(LABELS.items(), "os^", strict=True):
        axes.plot(range(len(found[kind])), found[kind], marker=marker, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("layer")
    axes.set_ylabel("largest dimension / median dimension")
    axes.set_title("How uneven the dimensions of hidden states are", fontsize=10)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--texts", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("docs/results/scales.svg"))
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    rows = [json.loads(line) for line in TEXTS.read_text().splitlines()[: args.texts]]
    found = measure(model, [tokenizer(str(row), return_tensors="pt").input_ids for row in rows])
    print("| layer | block output | after the next norm | in units of the scale |\n| --- | --- | --- | --- |")
    for layer, values in enumerate(zip(*(found[kind] for kind in LABELS), strict=True)):
        print(f"| {layer} | {' | '.join(f'{value:.1f}' for value in values)} |")
    draw(found, args.out)


if __name__ == "__main__":
    main()
