"""Write the experiments that put ReFT into PEFT's own comparison of methods (`method_comparison/` of its repository).

    python integration/benchmarks/method_comparison.py PEFT/method_comparison/MetaMathQA/experiments
    cd PEFT/method_comparison/MetaMathQA && python run.py -v experiments/reft/llama-3.2-3B-rank8

The comparison trains Llama-3.2-3B on MetaMathQA. Its labels cover the question as well as the answer, so nothing says
where the prompt ends, and its answers are worked solutions: both ask for positions="all".
"""

import argparse
import json
from pathlib import Path

from peft_reft import ReftConfig

RANKS = (1, 4, 8, 16)  # 172,060 to 2,752,960 parameters; LoRA of rank 32 has 9,175,040 there
TRAINING = {"optimizer_kwargs": {"lr": 2e-3, "weight_decay": 0.1}}  # the recommended rate; the comparison's own decay


def write(experiments: Path) -> list[Path]:
    """Write a folder for each rank, and return them."""
    folders = []
    for rank in RANKS:
        folder = experiments / "reft" / f"llama-3.2-3B-rank{rank}"
        ReftConfig(task_type="CAUSAL_LM", r=rank, positions="all").save_pretrained(str(folder))
        (folder / "training_params.json").write_text(json.dumps(TRAINING, indent=2) + "\n")
        folders.append(folder)
    return folders


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", type=Path, help="the folder of the comparison's experiments")
    for folder in write(parser.parse_args().experiments):
        print(folder)
