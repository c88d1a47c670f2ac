"""How fast: ReFT beside the frozen model, which is the floor, beside LoRA, and beside other implementations of ReFT.

    python integration/benchmarks/speed.py training-step --size small --json step.json --png step.png
    python integration/benchmarks/speed.py training-step --peers PYTHON    # of an environment with pyreft and adapters

All contenders take turns in one process, on the same base weights. Prints Markdown tables: the median of the seconds,
and of the ratios to the first contender, the floor, in the same round, with quartiles. `floor, again` and
`base, again` are the floor a second time: their ratio is the noise. Operators and memory are counted, and have none.
The workloads:

"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from frozen import SIZES
from measure import CLOCKS, Contender, benchmark, machine, use_clock
from workloads import WORKLOADS, Setup

WITH_PEERS = ("training-step", "prefill", "decode")
FLOORS = ("floor", "floor, again", "base", "base, again")


def chosen(contenders: list[Contender], only: str) -> list[Contender]:
    """The floor, and the contenders whose name a regular expression matches."""
    return [c for index, c in enumerate(contenders) if index == 0 or re.search(only, c.name)]


def run(workload: str, setup: Setup, rounds: int, only: str = "") -> dict[str, Any]:
    """Run a workload.

    Returns:
        `dict`: the workload, the machine, and the results as `measure.benchmark` gives them.
    """
    results = []
    for x, contenders in WORKLOADS[workload][0](setup):
        results += benchmark(chosen(contenders, only), rounds, x)
    return {"workload": workload, "machine": machine(), "results": results}


def run_peers(python: str, workload: str, size: str, setup: Setup, rounds: int) -> dict[str, Any]:
    """Run a workload in another environment, as `run` does, with the errors of contenders that fail."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "peers.json"
        options = {"size": size, "rounds": rounds, "threads": torch.get_num_threads(), "json": file}
        options |= {
            "clock": machine()["clock"],
            "device": setup.device,
            "dtype": str(setup.dtype).removeprefix("torch."),
        }
        words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        subprocess.run([python, Path(__file__).with_name("peers.py"), workload, *words], check=True)
        return json.loads(file.read_text())


# Tables


def seconds(value: float) -> str:
    return f"{value:.3f} s" if value >= 1 else f"{value * 1e3:.2f} ms"


def size_of(value: int) -> str:
    return f"{value / 2**20:,.2f} MiB"


def row_of(result: dict[str, Any], floor: dict[str, Any]) -> list[str]:
    """The cells of a result; what is counted, and not of tokens, is left empty where it does not apply."""
    ratio, low, high = result["ratio"]
    cells = [result["contender"], seconds(result["median"]), f"{ratio:.3f} ({low:.3f} to {high:.3f})"]
    cells.append(seconds(result["difference"][0]).replace("-0.00 ms", "0.00 ms"))
    speed = result["tokens_a_second"]
    cells.append(f"{speed:,.0f} ({1 / ratio:.3f})" if speed else "")
    for name, form in (("operators", "{:,}".format), ("launches", "{:,}".format), ("peak", size_of)):
        cells.append(f"{form(result[name])} ({result[name] / max(floor[name], 1):.3f})" if name in result else "")
    return cells


HEAD = ["", "median", "to the first", "difference", "tokens a second", "operators", "kernel launches", "peak memory"]


def print_table(results: list[dict[str, Any]]) -> None:
    """A table for each measure and place on the curve; columns that are empty are left out."""
    for x, measure in dict.fromkeys((result["x"], result["measure"]) for result in results):
        own = [result for result in results if (result["x"], result["measure"]) == (x, measure)]
        rows = [row_of(result, own[0]) for result in own]
        kept = [column for column in range(len(HEAD)) if any(row[column] for row in rows)]
        print(f"{measure}{'' if x is None else f', at {x:g}'}\n")
        for row in (HEAD, ["---"] * len(HEAD), *rows):
            print(f"| {' | '.join(row[column] for column in kept)} |")
        print()


# Pictures


def draw(found: dict[str, Any], file: Path) -> None:
    """Draw bars to the floor, or lines over the curve."""
    from matplotlib.figure import Figure

    groups: dict[str, list[dict[str, Any]]] = {}
    peers = [result for result in found.get("peers", {}).get("results", []) if result["contender"] not in FLOORS]
    for result in found["results"] + peers:
        groups.setdefault(result["measure"], []).append(result)
    curves = any(result["x"] is not None for result in found["results"])
    count = len(groups) * (2 if curves else 1)
    longest = max(map(len, groups.values()))
    figure = Figure(figsize=(8, count * (4 if curves else 1 + 0.3 * longest)), layout="constrained")
    axes = iter(figure.subplots(count, squeeze=False)[:, 0])
    for measure, results in groups.items():
        if curves:
            draw_lines(next(axes), results, "ratio", f"{measure}: times the first", 1)
            draw_lines(next(axes), results, "difference", f"{measure}: seconds above the first", 0)
        else:
            draw_bars(next(axes), results, f"{measure}: times the first")
    where = found["machine"]
    figure.suptitle(f"{found['workload']}, {where.get('gpu', where['cpu'])}, {where['threads']} threads", fontsize=10)
    figure.savefig(file, dpi=120)


def draw_bars(axes: Any, results: Iterable[dict[str, Any]], title: str) -> None:
    for result in reversed(list(results)):
        ratio, low, high = result["ratio"]
        axes.barh(result["contender"], ratio, xerr=[[ratio - low], [high - ratio]], color="#4c72b0", height=0.6)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_title(title, fontsize=10)


def draw_lines(axes: Any, results: list[dict[str, Any]], key: str, title: str, floor: float) -> None:
    for name in dict.fromkeys(result["contender"] for result in results):
        own = [result for result in results if result["contender"] == name]
        x = [result["x"] for result in own]
        axes.plot(x, [result[key][0] for result in own], marker="o", markersize=3, label=name)
        axes.fill_between(x, [result[key][1] for result in own], [result[key][2] for result in own], alpha=0.2)
    axes.set_xscale("log", base=2)
    axes.axhline(floor, color="black", linewidth=0.8)
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)


def main() -> None:
    described = "\n".join(f"  {name:14} {workload.__doc__}" for name, (workload, _) in WORKLOADS.items())
    parser = argparse.ArgumentParser(
        description=__doc__ + described, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workload", choices=WORKLOADS, metavar="workload")
    parser.add_argument("--size", choices=SIZES, help="of the model and its batch; the workload's own if not given")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch on the CPU")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: the time that the process had one")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", help="of the model, such as bfloat16")
    parser.add_argument("--nf4", action="store_true", help="quantize the model's linear layers")
    parser.add_argument("--only", default="", metavar="REGEX", help="contenders beside the floor")
    parser.add_argument("--peers", metavar="PYTHON", help="a Python that has pyreft or adapters")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    use_clock(args.clock)
    size = args.size or WORKLOADS[args.workload][1]
    setup = Setup(SIZES[size], torch.device(args.device), getattr(torch, args.dtype), args.nf4)
    found = run(args.workload, setup, args.rounds, args.only) | {"size": size, "dtype": args.dtype}
    found["dtype"] += ", NF4" * args.nf4
    if args.peers and args.workload in WITH_PEERS:
        found["peers"] = run_peers(args.peers, args.workload, size, setup, args.rounds)
    report(found)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    if args.png:
        draw(found, args.png)


def report(found: dict[str, Any]) -> None:
    config = SIZES[found["size"]].config
    shape = f"width {config.hidden_size}, {config.num_hidden_layers} layers, {found['dtype']}"
    print(f"{found['workload']}, {found['size']}: {shape}. {named(found['machine'])}.\n")
    print_table(found["results"])
    if "peers" in found:
        print(f"In another environment, beside its own floor. {named(found['peers']['machine'])}.\n")
        print_table(found["peers"]["results"])
        for name, error in found["peers"]["errors"].items():
            print(f"{name} fails: {error}\n")


def named(machine: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in machine.items())


if __name__ == "__main__":
    main()
