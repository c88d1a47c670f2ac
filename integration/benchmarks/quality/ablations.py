"""What to choose: ReFT with one choice varied at a time, on a task of protocol.yaml.

    python integration/benchmarks/quality/ablations.py --data DATA --ablations positions rank --seeds 0 1

The learning rate is chosen anew for each value, as in run.py, whose options these are otherwise; the results say the
rest. Finished runs are not run again.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
from quality.protocol import Ablation, Protocol, load_protocol
from quality.run import RECORDS, Prepared, Results, Setup, add_place, estimate, options_of, run_contender, setup_of

# Which of n layers
LAYERS = {
    "lower third": lambda n: range(n // 3),
    "middle third": lambda n: range(n // 3, 2 * n // 3),
    "upper third": lambda n: range(2 * n // 3, n),
    "four evenly": lambda n: [round(at * (n - 1) / 3) for at in range(4)],
}


def varied(setup: Setup, changes: dict[str, Any]) -> tuple[Setup, dict[str, Any]]:
    """A setup with what is changed in the size and in the training, and the other changes: ReFT's options."""
    if (layers := changes.get("layers_to_transform")) is not None:
        config = AutoConfig.from_pretrained(setup.model)
        changes = changes | {"layers_to_transform": [*LAYERS[layers](config.num_hidden_layers)]}
    size = {key: changes.get(key, value) for key, value in setup.size.items()}
    training = {key: changes.get(key, value) for key, value in setup.family.training.items()}
    options = {key: value for key, value in changes.items() if key not in size and key not in training}
    return replace(setup, family=replace(setup.family, training=training), size=size), options


def only(ablation: Ablation, values: Sequence[str] | None) -> Ablation:
    """An ablation with some of its values, or with all."""
    kept = {value: changes for value, changes in ablation.values.items() if values is None or value in values}
    return replace(ablation, values=kept)


def run_ablation(protocol: Protocol, setup: Setup, task_name: str, name: str, seeds: list[int], to: Results) -> None:
    """Run one choice with all of its values."""
    ablation, task = protocol.ablations[name], setup.family.tasks[task_name]
    for value, changes in ablation.values.items():
        own, options = varied(setup, changes)
        prepared = Prepared(own, task)
        for contender in ablation.contenders:
            given = options_of(protocol.contenders[contender], own.family, task) | options
            run_contender(prepared, contender, given, seeds, to, ablation=name, value=value)


def main() -> None:
    protocol = load_protocol()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=protocol.families, default="nlu")
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--data", required=True, help="a folder, or the Hub id of a data set")
    parser.add_argument("--ablations", nargs="+", choices=protocol.ablations, default=list(protocol.ablations))
    parser.add_argument("--values", nargs="+", help="of these ablations; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--out", type=Path, default=RECORDS / "ablations.jsonl")
    add_place(parser)
    parser.set_defaults(size="ablation")
    args = parser.parse_args()
    named = {name: only(protocol.ablations[name], args.values) for name in args.ablations}
    if unknown := {*(args.values or [])} - {value for ablation in named.values() for value in ablation.values}:
        parser.error(f"{', '.join(args.ablations)} has no value {', '.join(sorted(unknown))}")
    protocol = replace(protocol, ablations=named)
    setup = setup_of(args, protocol.families[args.family])
    results = Results(args.out)
    runs = sum(len(ablation.values) * len(ablation.contenders) for ablation in named.values())
    seconds = estimate(Prepared(setup, setup.family.tasks[args.task]), runs, len(args.seeds))
    print(f"about {seconds / 60:.0f} minutes, if nothing is there yet")
    for name in named:
        run_ablation(protocol, setup, args.task, name, args.seeds, results)


if __name__ == "__main__":
    main()
