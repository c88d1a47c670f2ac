"""Tables and pictures of what run.py and ablations.py have found.

    python integration/benchmarks/quality/render.py results/*.json --write docs/results.md

Writes what is between `<!-- results -->` and `<!-- /results -->` of the page anew, and the pictures beside it, into
results/: for each family the metric against the trained parameters, and one for each ablation.
"""

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure

Record = dict[str, Any]
BEGIN, END = "<!-- results -->", "<!-- /results -->"
SHOWN = {"matthews": "Matthews", "accuracy": "accuracy", "choice_accuracy": "likeliest choice", "loss": "loss"}


def groups(records: Iterable[Record], *keys: str) -> dict[tuple, list[Record]]:
    """Records with the same values of keys, in the order in which they are met."""
    found: dict[tuple, list[Record]] = {}
    for record in records:
        found.setdefault(tuple(record.get(key) for key in keys), []).append(record)
    return found


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


# Tables


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)) + "\n"


def family_table(records: list[Record]) -> str:
    """A row a contender: each test set, their mean, and what training took."""
    tests = list(records[0]["tests"])
    metrics = metrics_of(records[0])
    average = ["mean"] if len(tests) > 1 else []
    head = ["", *[f"{test}{named(metric, metrics)}" for metric in metrics for test in [*tests, *average]]]
    rows = []
    for (name,), own in groups(records, "name").items():
        cells = []
        for metric in metrics:
            cells += [shown([record["tests"][test][metric] for record in own], metric) for test in tests]
            cells += [shown([on_average(record, metric) for record in own], metric)] if average else []
        rows.append([name, *cells, shown([validation_loss(record) for record in own], "loss"), *costs(own)])
    return table([*head, "validation loss", "seeds", "trained", "s a step", "peak memory", "learning rate"], rows)


def named(metric: str, metrics: list[str]) -> str:
    """How a column says which of several metrics it has."""
    return f" ({SHOWN[metric]})" if len(metrics) > 1 and metric != metrics[0] else ""


def costs(own: list[Record]) -> list[str]:
    first = own[0]
    cells = [str(len(own)), f"{first['trainable_parameters']:,}"]
    if "steps" not in first:
        return [*cells, "", "", ""]
    seconds = mean(record["seconds_a_step"] for record in own)
    return [*cells, f"{seconds:.2f}", f"{first['peak_memory'] / 2**20:,.0f} MiB", f"{first['learning_rate']:g}"]


def sized(record: Record) -> str:
    """What was sized, and on what it ran."""
    found, settings, machine = record["sized"], record["settings"], record["machine"]
    rows = ", ".join(f"{count:,} {name}" for name, count in found["rows"].items())
    lengths = f"{found['tokens']['mean']:.0f} tokens a row, at most {found['tokens']['longest']}"
    training = settings["training"]
    rates = ", ".join(f"{rate:g}" for rate in training["learning_rates"])
    head = f" All contenders train the head's {record['head_parameters']:,} parameters besides."
    left_out = f"{found['dropped']} left out for their length, {found['held_out']:,} since they are held out elsewhere"
    return (
        f"{settings['model']}. Rows: {rows} ({left_out}). {lengths}. "
        f"{found['epochs']} epochs, batches of {training['batch_size']}, learning rates {rates}. "
        f"{machine.get('gpu', machine['cpu'])}, {machine['threads']} threads, torch {machine['torch']}."
        + (head if record["head_parameters"] else "")
    )


def ablation_table(records: list[Record]) -> str:
    [metric, *_] = metrics_of(records[0])
    rows = []
    for (value, name), own in groups(records, "value", "name").items():
        values = [on_average(record, metric) for record in own]
        rows.append([value, name, shown(values, metric), *costs(own)])
    return table(["", "", SHOWN[metric], "seeds", "trained", "s a step", "peak memory", "learning rate"], rows)


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
    figure.savefig(file, dpi=120)


# The page


def render(records: list[Record], page: Path) -> str:
    """The tables, with links to the pictures that it draws beside the page."""
    parts = []
    for (family,), own in groups((r for r in records if not r["ablation"]), "family").items():
        parts.append(f"## {family}\n")
        for (task,), runs in groups(own, "task").items():
            [metric, *_] = metrics_of(runs[0])
            parts += [f"### {task}: {SHOWN[metric]}\n", family_table(runs), sized(runs[0]) + "\n"]
        draw_family(own, page.parent / "results" / f"{family}.png")
        parts.append(f"![{family}](results/{family}.png)\n")
    for (name,), own in groups((r for r in records if r["ablation"]), "ablation").items():
        draw_ablation(name, own, page.parent / "results" / f"ablation-{name}.png")
        link = f"![{name}](results/ablation-{name}.png)\n"
        parts += [f"## Ablation: {name}\n", ablation_table(own), sized(own[0]) + "\n", link]
    return "\n".join(parts)


def write(page: Path, rendered: str) -> None:
    """Put what is rendered between the marks of a page, and leave the rest as it is."""
    text = page.read_text() if page.exists() else f"# Results\n\n{BEGIN}\n{END}\n"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{rendered}{END}", text, flags=re.DOTALL))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--write", type=Path, default=Path("docs/results.md"), metavar="PAGE")
    args = parser.parse_args()
    records = [record for file in args.results for record in json.loads(file.read_text())]
    write(args.write, render(records, args.write))


if __name__ == "__main__":
    main()
