"""Tables and pictures of what run.py and ablations.py have found.

    python integration/benchmarks/quality/render.py --write docs/results.md

Writes what is between `<!-- results -->` and `<!-- /results -->` of the page anew, and the pictures beside it, into
results/: for each family the metric against the trained parameters, and one for each ablation.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))
from quality.protocol import Protocol, load_protocol
from quality.run import RECORDS, read_records

Record = dict[str, Any]
BEGIN, END = "<!-- results -->", "<!-- /results -->"
SHOWN = {"matthews": "Matthews", "accuracy": "accuracy", "choice_accuracy": "likeliest choice", "loss": "loss"}


def groups(records: Iterable[Record], *keys: str) -> dict[tuple, list[Record]]:
    """Records with the same values of keys, in the order in which they are met."""
    found: dict[tuple, list[Record]] = {}
    for record in records:
        found.setdefault(tuple(record.get(key) for key in keys), []).append(record)
    return found


def in_order(records: Iterable[Record], protocol: Protocol) -> list[Record]:
    """Records in the order of protocol.yaml, whichever was run first; what is not in it comes last."""

    def place(record: Record) -> list[int]:
        ablation, family = protocol.ablations.get(record["ablation"]), protocol.families.get(record["family"])
        listed: list[tuple[Iterable[str], str]] = [
            (protocol.ablations, record["ablation"]),
            (protocol.families, record["family"]),
            (family.tasks if family else (), record["task"]),
            (ablation.values if ablation else (), record["value"]),
            (protocol.contenders, record["name"]),
        ]
        places = [{name: at for at, name in enumerate(names)} for names, _ in listed]
        return [at.get(name, len(at)) for at, (_, name) in zip(places, listed, strict=True)]

    return sorted(records, key=place)


def check_alike(records: Iterable[Record]) -> None:
    """Raise a ValueError for records that may not stand in one table: their settings differ, or a seed comes twice."""
    for (family, task, ablation), own in groups(records, "family", "task", "ablation").items():
        what = f"{ablation or family}, {task}"
        if not ablation and len({json.dumps(common(record), sort_keys=True) for record in own}) > 1:
            raise ValueError(f"{what}: the records were made with different settings.")
        for (value, name), runs in groups(own, "value", "name").items():
            if len({json.dumps(run["settings"], sort_keys=True) for run in runs}) > 1:
                raise ValueError(f"{what}, {name} {value or ''}: the records were made with different settings.")
            if len({run["seed"] for run in runs}) < len(runs):
                raise ValueError(f"{what}, {name} {value or ''}: a seed comes twice.")


def common(record: Record) -> dict[str, Any]:
    """The settings that all contenders of a task have."""
    return {name: value for name, value in record["settings"].items() if name != "contender"}


# Numbers


def metrics_of(record: Record) -> list[str]:
    """What is reported: the task's metric; where answers are chosen, the likeliest choice besides."""
    metric = record["metric"]
    return [metric, "choice_accuracy"] if "choice_accuracy" in next(iter(record["tests"].values())) else [metric]


def on_average(record: Record, metric: str) -> float:
    """The mean over the test sets."""
    return mean(found[metric] for found in record["tests"].values())


def validation_loss(record: Record) -> float:
    """Of the learning rate that was chosen."""
    return record["validation"][str(record["learning_rate"])]["loss"]


def shown(values: list[float], metric: str) -> str:
    """The mean of seeds, and their standard deviation."""
    scale, digits = (1, 3) if metric == "loss" else (100, 1)
    spread = f" ± {scale * stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * mean(values):.{digits}f}{spread}"


def span(values: Iterable[int]) -> str:
    low, high = min(found := [*values]), max(found)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


# Tables

COSTS = ["seeds", "trained", "s a step", "peak memory", "learning rate"]


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)) + "\n"


def family_table(records: list[Record]) -> str:
    """A row a contender: each test set, their mean, and what training took."""
    columns = [(metric, test) for metric in metrics_of(records[0]) for test in tests_of(records[0])]
    head = [heading(metric, test, metrics_of(records[0])) for metric, test in columns]
    rows = []
    for (name,), own in groups(records, "name").items():
        cells = [shown([value_of(record, metric, test) for record in own], metric) for metric, test in columns]
        rows.append([name, *cells, shown([validation_loss(record) for record in own], "loss"), *costs(own)])
    return table(["", *head, "validation loss", *COSTS], rows)


def tests_of(record: Record) -> list[str]:
    """The test sets, and their mean if there are several."""
    tests = list(record["tests"])
    return [*tests, "mean"] if len(tests) > 1 else tests


def value_of(record: Record, metric: str, test: str) -> float:
    return on_average(record, metric) if test == "mean" else record["tests"][test][metric]


def heading(metric: str, test: str, metrics: list[str]) -> str:
    """A test set, and which metric it is if it is not the task's."""
    return test if metric == metrics[0] else f"{test} ({SHOWN[metric]})"


def costs(own: list[Record]) -> list[str]:
    """The cells under COSTS."""
    first = own[0]
    cells = [str(len(own)), f"{first['trainable_parameters']:,}"]
    if "steps" not in first:
        return [*cells, "", "", ""]
    seconds = mean(record["seconds_a_step"] for record in own)
    return [*cells, f"{seconds:.2f}", f"{first['peak_memory'] / 2**20:,.0f} MiB", rate_of(first)]


def rate_of(record: Record) -> str:
    """The learning rate, with a mark if a better one may lie outside the grid."""
    settings, rate = record["settings"], record["learning_rate"]
    grid = settings["contender"].get("learning_rates", settings["training"]["learning_rates"])
    return f"{rate:g}" + (" (edge)" if len(grid) > 1 and rate in (min(grid), max(grid)) else "")


def ablation_table(records: list[Record]) -> str:
    [metric, *_] = metrics_of(records[0])
    rows = []
    for (value, name), own in groups(records, "value", "name").items():
        cells = [shown([on_average(record, metric) for record in own], metric)]
        rows.append([value, name, *cells, shown([validation_loss(record) for record in own], "loss"), *costs(own)])
    return table(["", "", SHOWN[metric], "validation loss", *COSTS], rows)


def sized(records: list[Record]) -> str:
    """What was sized, and on what it ran."""
    return " ".join([data_of(records), training_of(records), machine_of(records)]) + "\n"


def data_of(records: list[Record]) -> str:
    found = [record["sized"] for record in records]
    rows = ", ".join(f"{span(one['rows'][part] for one in found)} {part}" for part in found[0]["rows"])
    left_out = [f"{span(one['dropped'] for one in found)} for their length"]
    left_out += [f"{span(one['held_out'] for one in found)} since test or validation rows ask the same"]
    if any(one["contradictory"] for one in found):
        left_out += [f"{span(one['contradictory'] for one in found)} since they contradict themselves"]
    tokens = f"{mean(one['tokens']['mean'] for one in found):.0f} tokens a row on average"
    longest = max(one["tokens"]["longest"] for one in found)
    model = records[0]["settings"]["model"]
    return f"{model}. Rows: {rows}; left out: {', '.join(left_out)}. {tokens}, at most {longest}."


def training_of(records: list[Record]) -> str:
    epochs = span(record["sized"]["epochs"] for record in records)
    trainings = [record["settings"]["training"] for record in records]
    rates = sorted({rate for training in trainings for rate in training["learning_rates"]})
    grid = ", ".join(f"{rate:g}" for rate in rates)
    head = records[0]["head_parameters"]
    besides = f" All contenders train the head's {head:,} parameters besides." if head else ""
    return f"{epochs} epochs, batches of {trainings[0]['batch_size']}, learning rates {grid}.{besides}"


def machine_of(records: list[Record]) -> str:
    """The devices, and the commits of the code."""
    machines = [record["machine"] for record in records]
    places = {
        f"{found.get('gpu', found['cpu'])}, {found['threads']} threads, torch {found['torch']}" for found in machines
    }
    commits = sorted({record["commit"] for record in records})
    return f"{'; '.join(sorted(places))}. Code of {', '.join(commits)}."


# Pictures


def draw_family(records: list[Record], file: Path) -> None:
    """The metric against the trained parameters, one panel a task; the untouched base is a line."""
    tasks = groups(records, "task")
    figure = Figure(figsize=(6 * len(tasks), 4.5), layout="constrained")
    for axes, ((task,), own) in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks.items(), strict=True):
        [metric, *_] = metrics_of(own[0])
        for (name,), runs in groups(own, "name").items():
            values, trained = [on_average(run, metric) for run in runs], runs[0]["trainable_parameters"]
            if not trained:
                axes.axhline(mean(values), color="gray", linestyle="--", linewidth=1, label=name)
                continue
            error = stdev(values) if len(values) > 1 else 0
            axes.errorbar(trained, mean(values), yerr=error, marker="o", capsize=3, linestyle="", label=name)
        axes.set_xscale("log")
        axes.set_xlabel("trained parameters")
        axes.set_ylabel(SHOWN[metric])
        axes.set_title(task, fontsize=10)
        axes.legend(fontsize=8)
    save(figure, file)


def draw_ablation(name: str, records: list[Record], file: Path) -> None:
    """The metric of each value, a line for each contender; a dot is a seed."""
    [metric, *_] = metrics_of(records[0])
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (contender,), own in groups(records, "name").items():
        values = {value: [on_average(r, metric) for r in runs] for (value,), runs in groups(own, "value").items()}
        [line] = axes.plot(list(values), [mean(found) for found in values.values()], marker="_", label=contender)
        for value, found in values.items():
            axes.plot([value] * len(found), found, ".", color=line.get_color(), alpha=0.6)
    axes.set_ylabel(SHOWN[metric])
    axes.set_title(f"{name}, {records[0]['task']}", fontsize=10)
    axes.tick_params(axis="x", labelrotation=30 if len(groups(records, "value")) > 7 else 0)
    axes.legend(fontsize=8)
    save(figure, file)


def save(figure: Figure, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})


# The page


def render(records: list[Record], page: Path) -> str:
    """The tables, with links to the pictures that it draws beside the page."""
    records = in_order(records, load_protocol())
    check_alike(records)
    parts = []
    for (family,), own in groups((r for r in records if not r["ablation"]), "family").items():
        parts.append(f"## {family}\n")
        for (task,), runs in groups(own, "task").items():
            [metric, *_] = metrics_of(runs[0])
            parts += [f"### {task}: {SHOWN[metric]}\n", family_table(runs), sized(runs)]
        draw_family(own, page.parent / "results" / f"{family}.svg")
        parts.append(f"![{family}](results/{family}.svg)\n")
    for (name, task), own in groups((r for r in records if r["ablation"]), "ablation", "task").items():
        picture = f"results/ablation-{name}-{task}.svg"
        draw_ablation(name, own, page.parent / picture)
        link = f"![{name}, {task}]({picture})\n"
        parts += [f"## Ablation: {name}, {task}\n", ablation_table(own), sized(own), link]
    return "\n".join(parts)


def write(page: Path, rendered: str) -> None:
    """Put what is rendered between the marks of a page, and leave the rest as it is."""
    text = page.read_text() if page.exists() else f"# Results\n\n{BEGIN}\n{END}\n"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{rendered}{END}", text, flags=re.DOTALL))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, help="files of records; default: all beside this script")
    parser.add_argument("--write", type=Path, default=Path("docs/results.md"), metavar="PAGE")
    args = parser.parse_args()
    files = args.results or sorted(RECORDS.glob("*.jsonl"))
    records = [record for file in files for record in read_records(file)]
    write(args.write, render(records, args.write))


if __name__ == "__main__":
    main()
