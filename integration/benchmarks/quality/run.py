"""ReFT, the reference implementation and LoRA on the paper's tasks, on real models: one family of tasks a command.

    python integration/benchmarks/quality/run.py nlu --data DATA --tasks cola --seeds 0 1
    python integration/benchmarks/quality/run.py commonsense --data DATA --reference PYTHON

DATA is a folder (commonsense/, arithmetic/, instruction/, nlu/), or the Hub id of a data set with the same files;
PYTHON that of an environment with pyreft 0.1.0, pyvene 0.1.8 and transformers 4.57.6, without which the reference is
left out. What is trained, and how, is in protocol.yaml.

The first seed of a contender is trained with rates of the grid, from the middle on towards what is better; the other
seeds have the one that was best on the validation part. A contender may have rates of its own. A finished run is added
to the file as a line of JSON, and is not run again. To stop is safe at any time.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from quality import train
from quality.batches import Sample, draw_batches, encode
from quality.data import Example, find_folder, split_task
from quality.job import Job, run_elsewhere
from quality.metrics import summarize
from quality.models import find_model
from quality.protocol import ModelToken, Protocol, Task, load_protocol

RUN = ("family", "task", "seed", "metric", "settings")  # what decides how a run ends
IDENTITY = (*RUN, "name", "ablation", "value")  # and what it is called
RECORDS = Path(__file__).with_name("records")


@dataclass(frozen=True)
class Setup:
    """Where and on what runs are made.

    Attributes:
        family (`ModelToken`), size (`dict`): what is run, and on how many rows.
        data (`Path`), model (`str`): folders.
        model_name (`str`): what the results call the model.
        reference (`str`, *optional*): the Python of an environment with pyreft.
    """

    family: ModelToken
    size: dict[str, Any]
    data: Path
    model: str
    model_name: str
    reference: str | None = None
    device: str = "cpu"
    threads: int = 1


class Results:
    """The records of finished runs, a line of JSON each.

    Args:
        file (`Path`): which may not exist yet.
    """

    def __init__(self, file: Path):
        self.file = file
        self.records = read_records(file) if file.exists() else []

    def find(self, what: dict[str, Any], keys: Sequence[str] = IDENTITY) -> dict[str, Any] | None:
        """The record of a run, if it is finished."""
        what = json.loads(json.dumps(what))
        return next((record for record in self.records if all(record[key] == what[key] for key in keys)), None)

    def add(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as lines:
            lines.write(json.dumps(record) + "\n")


def read_records(file: Path) -> list[dict[str, Any]]:
    """Return the records of a file of results."""
    return [json.loads(line) for line in file.read_text().splitlines()]


@dataclass
class Prepared:
    """A task whose data is tokenized, for all contenders alike.

    Attributes:
        examples (`Split`): the data as text.
        train, validation, tests: the data as tokens; what is longer than the protocol's `max_tokens` is left out.
        dropped (`int`): how many rows that were.
    """

    setup: Setup
    task: Task
    train: list[Sample] = field(init=False)
    validation: list[Sample] = field(init=False)
    tests: dict[str, list[Sample]] = field(init=False)

    def __post_init__(self) -> None:
        setup = self.setup
        self.tokenizer = AutoTokenizer.from_pretrained(setup.model)
        self.examples = split_task(setup.family, self.task, setup.data, setup.size)
        self.dropped = 0
        self.train, _ = self.encode(self.examples.train)
        self.validation, _ = self.encode(self.examples.validation)
        self.gold: dict[str, list[Any]] = {}
        self.tests = {}
        for name, examples in self.examples.tests.items():
            self.tests[name], kept = self.encode(examples)
            self.gold[name] = [example.gold for example in kept]

    def encode(self, examples: Sequence[Example]) -> tuple[list[Sample], list[Example]]:
        """The samples of examples that are short enough, and these examples."""
        samples = [encode(self.tokenizer, example) for example in examples]
        longest = self.setup.family.training["max_tokens"]
        kept = [at for at, sample in enumerate(samples) if len(sample.ids) <= longest]
        self.dropped += len(samples) - len(kept)
        return [samples[at] for at in kept], [examples[at] for at in kept]

    def job(self, contender: dict[str, Any], seed: int, learning_rates: list[float]) -> Job:
        """A run of a contender."""
        setup, training = self.setup, self.setup.family.training
        return Job(
            model=setup.model,
            contender={name: value for name, value in contender.items() if name != "learning_rates"},
            scoring=setup.family.scoring,
            metric=self.task.metric,
            train=self.train,
            validation=self.validation,
            tests=self.tests,
            batches=draw_batches(self.train, training["batch_size"], setup.size["epochs"], seed),
            learning_rates=learning_rates,
            warmup_ratio=training["warmup_ratio"],
            weight_decay=training["weight_decay"],
            pad=self.tokenizer.pad_token_id,
            seed=seed,
            max_new_tokens=training.get("max_new_tokens", 0),
            device=setup.device,
            threads=setup.threads,
        )

    def sized(self) -> dict[str, Any]:
        """How large the run is: rows, epochs and lengths."""
        rows = {"train": len(self.train), "validation": len(self.validation)}
        rows |= {name: len(samples) for name, samples in self.tests.items()}
        lengths = [len(sample.ids) for sample in self.train]
        tokens = {"longest": max(lengths), "mean": sum(lengths) / len(lengths)}
        return {
            "rows": rows,
            "dropped": self.dropped,
            "held_out": self.examples.held_out,
            "contradictory": self.examples.contradictory,
            "tokens": tokens,
            "epochs": self.setup.size["epochs"],
        }


def options_of(contender: dict[str, Any], family: ModelToken, task: Task) -> dict[str, Any]:
    """A contender with the options that the family and the task have for ReFT, of which LoRA has the dropout; its own
    come first."""
    if contender["method"] == "lora":
        return {"lora_dropout": family.reft["dropout"]} | contender
    return family.reft | task.reft | contender if contender["method"] in ("reft", "pyreft") else contender


def run_contender(
    prepared: Prepared,
    name: str,
    options: dict[str, Any],
    seeds: Sequence[int],
    to: Results,
    ablation: str | None = None,
    value: str | None = None,
) -> None:
    """Run a contender with each seed, unless it is in the results already.

    `ablation` and `value` say what is varied, if anything is. What most ablations have as a value is run once.
    """
    setup, training = prepared.setup, prepared.setup.family.training
    trains = options["method"] != "base" or setup.family.scoring == "label"
    grid = options.get("learning_rates", training["learning_rates"]) if trains else []
    settings = {"contender": options, "training": training, "size": setup.size, "model": setup.model_name}
    rates = grid
    for seed in seeds if trains else seeds[:1]:
        what: dict[str, Any] = {"family": setup.family.name, "task": prepared.task.name, "name": name, "seed": seed}
        what |= {"ablation": ablation, "value": value, "metric": prepared.task.metric}
        what["settings"] = settings | {"first_seed": seeds[0]}
        found = to.find(what)
        if found is None:
            if (same := to.find(what, RUN)) is None:
                began = time.perf_counter()
                result = finished(prepared, run_job(setup, prepared.job(options, seed, rates)))
                same = result | {"seconds": time.perf_counter() - began, "commit": commit()}
            found = same | what
            to.add(found)
        print(line_of(found), flush=True)
        rates = [found["learning_rate"]]


def run_job(setup: Setup, job: Job) -> dict[str, Any]:
    if job.contender["method"] == "pyreft" and setup.reference:
        return run_elsewhere(setup.reference, job)
    return train.run(job)


def finished(prepared: Prepared, result: dict[str, Any]) -> dict[str, Any]:
    """A record of a result, with the metrics of each test set."""

    def decode(ids: list[int]) -> str:
        return prepared.tokenizer.decode(ids, skip_special_tokens=True)  # type: ignore[return-value]

    scoring = prepared.setup.family.scoring
    tests = {}
    for name, outcome in result["tests"].items():
        gold = [s.label for s in prepared.tests[name]] if scoring == "choice" else prepared.gold[name]
        tests[name] = summarize(scoring, outcome, gold, decode)
    return result | {"tests": tests, "sized": prepared.sized()}


def commit() -> str:
    """That of the code that ran, marked where files but the records differ from it; empty outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!records")
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


def line_of(record: dict[str, Any]) -> str:
    metrics = [
        f"{test} " + ", ".join(f"{name} {value:.4g}" for name, value in found.items())
        for test, found in record["tests"].items()
    ]
    trained = f"lr {record['learning_rate']:g}, {record['trainable_parameters']:,} parameters"
    took = f"{record.get('seconds_a_step', 0):.2f} s a step, {record['seconds']:.0f} s in all"
    return f"{record['task']} {record['name']} seed {record['seed']}: {'; '.join(metrics)}. {trained}, {took}"


def estimate(prepared: Prepared, contenders: int, seeds: int) -> float:
    """About how many seconds the runs of a task take, from a forward pass of the base on one batch.

    A step is about three forward passes. Generated tokens are not counted.
    """
    job = prepared.job({"method": "base"}, 0, [])
    torch.set_num_threads(job.threads)
    learner = train.make_learner(job)
    middle = sorted(job.train, key=lambda sample: len(sample.ids))[len(job.train) // 2]
    samples = [middle] * len(job.batches[0])
    batch = train.collate(samples, job.pad, torch.device(job.device))
    with torch.no_grad():
        train.loss_of(learner, job, batch, samples)  # the first is slower
        began = time.perf_counter()
        train.loss_of(learner, job, batch, samples)
        forward = time.perf_counter() - began
    evaluated = sum(map(len, job.tests.values())) / len(samples)
    validated = len(job.validation) / len(samples)
    searches = min(3, len(prepared.setup.family.training["learning_rates"]))  # of four rates three are tried
    trainings = (searches + seeds - 1) * (3 * len(job.batches) + validated) + seeds * evaluated
    return forward * contenders * trainings


def parse(protocol: Protocol) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=protocol.families)
    parser.add_argument("--data", required=True, help="a folder, or the Hub id of a data set")
    parser.add_argument("--out", type=Path, help="default: records/FAMILY.jsonl beside this script")
    parser.add_argument("--tasks", nargs="+", help="default: all of the family")
    parser.add_argument("--contenders", nargs="+", choices=protocol.contenders, default=list(protocol.contenders))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    add_place(parser)
    return parser.parse_args()


def add_place(parser: argparse.ArgumentParser) -> None:
    """The options that say on what runs are made."""
    parser.add_argument("--model", help="a folder or Hub id; default: the protocol's")
    parser.add_argument("--size", default="cpu", help="which of the protocol's sizes: cpu (default) or full")
    parser.add_argument("--reference", metavar="PYTHON", help="of an environment with pyreft")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())


def setup_of(args: argparse.Namespace, family: ModelToken) -> Setup:
    name = args.model or family.model
    return Setup(
        family=family,
        size=family.sizes[args.size],
        data=find_folder(args.data, "dataset"),
        model=find_model(name),
        model_name=Path(name).name,
        reference=args.reference,
        device=args.device,
        threads=args.threads,
    )


def main() -> None:
    protocol = load_protocol()
    args = parse(protocol)
    family = protocol.families[args.family]
    setup = setup_of(args, family)
    results = Results(args.out or RECORDS / f"{family.name}.jsonl")
    names = [name for name in args.contenders if args.reference or protocol.contenders[name]["method"] != "pyreft"]
    for task in (family.tasks[name] for name in args.tasks or family.tasks):
        prepared = Prepared(setup, task)
        print(f"{task.name}: {json.dumps(prepared.sized())}")
        print(f"about {estimate(prepared, len(names), len(args.seeds)) / 60:.0f} minutes, if nothing is there yet")
        for name in names:
            options = options_of(protocol.contenders[name], family, task)
            run_contender(prepared, name, options, args.seeds, results)


if __name__ == "__main__":
    main()
