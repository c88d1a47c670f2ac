"""Tries ReFT on every architecture that transformers registers for text, each built tiny, and writes the table.

    python integration/architectures/sweep.py --write docs/architectures.md
    python integration/architectures/sweep.py --kind causal --only llama gemma3_text

A model of each is attached to, run forward and backward, generated with, saved and loaded, and compared with its base
model edited by hand; `checks.py` has the checks, `tiny.py` makes configs small.
"""

import argparse
import functools
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE.parents[1] / "tests")]  # for checks.py and tiny.py, and by_hand.py

import transformers  # noqa: E402
from checks import ADAPTER_OPTIONS, Architecture  # noqa: E402
from tiny import CANNOT_RUN_ALONE, FAILS_WITHOUT_REFT, KINDS, make_model  # noqa: E402

SECONDS = 120  # for one architecture
TITLES = {"causal": "causal LM", "classifier": "sequence classification", "seq2seq": "sequence to sequence"}
PASSES, REFUSED, FAILS, NOT_BUILT, NOT_THERE = "yes", "refused", "fails", "not built", ""

INTRODUCTION = """\
# Architectures

This page lists every architecture that transformers registers for causal language models, sequence classifiers
and sequence-to-sequence models. Each is tested as a tiny model with random weights. "Yes" means that the default
choice of blocks, or the noted one, passes these checks:

- The logits equal those of the base model, edited by hand at the same tokens, with labels and without.
- Every adapter parameter gets a gradient, and gradient checkpointing gives the same gradients.
- Greedy generation gives the same tokens and logits as edits by hand.
- A saved and loaded adapter gives the same logits.
- Each edit changes the logits.

"Refused" means that adding an adapter raises `ValueError`.

`integration/architectures/sweep.py --write` wrote this page, with transformers {transformers}, peft {peft} and
torch {torch}.
`integration/architectures/test_architectures.py` checks every row."""


class Result(NamedTuple):
    """What came of one architecture: one of the words above, and why."""

    state: str
    reason: str = ""


def try_architecture(kind: str, model_type: str) -> Result:
    """Build one architecture and check it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if model_type in CANNOT_RUN_ALONE:
            return Result(NOT_BUILT, CANNOT_RUN_ALONE[model_type])
        try:
            base = make_model(kind, model_type)
        except ImportError as error:
            return Result(NOT_BUILT, re.search(r"\w+ requires the \w+ library", str(error))[0])  # type: ignore[index]
        options = ADAPTER_OPTIONS.get(model_type, {})
        if options and not is_refused(kind, model_type, base):
            return Result(FAILS, f"it needs {options}, but is adapted without, and not refused")
        try:
            architecture = Architecture(kind, model_type, base, **options)
        except ValueError as error:
            return Result(REFUSED, str(error))
        try:
            architecture.check_all()
        except Exception as error:
            reason = FAILS_WITHOUT_REFT.get(model_type) or str(error).partition("\n")[0]
            return Result(FAILS, f"{type(error).__name__}: {reason}")
    return Result(PASSES, ", ".join(f"{name}={value!r}" for name, value in options.items()))


def is_refused(kind: str, model_type: str, base: transformers.PreTrainedModel) -> bool:
    """Whether a model cannot be adapted with the default choice of blocks."""
    try:
        Architecture(kind, model_type, base)
    except ValueError:
        return True
    return False


def try_in_time(kind: str, model_type: str) -> Result:
    def stop(*_: object) -> None:
        raise TimeoutError(f"not done in {SECONDS} s")

    transformers.logging.set_verbosity_error()
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        return try_architecture(kind, model_type)
    except Exception:
        return Result(FAILS, traceback.format_exc(limit=-1).strip().rpartition("\n")[2])
    finally:
        signal.alarm(0)


def sweep(kinds: Iterable[str], only: list[str] | None, workers: int) -> dict[str, dict[str, Result]]:
    """The results by kind and architecture."""
    tasks = [(kind, name) for kind in kinds for name in sorted(KINDS[kind]) if not only or name in only]
    results: dict[str, dict[str, Result]] = {}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for (kind, name), result in zip(tasks, pool.map(try_in_time, *zip(*tasks, strict=True)), strict=True):
            results.setdefault(kind, {})[name] = result
            print(f"{kind:10} {name:26} {result.state:9} {result.reason[:160]}", flush=True)
    return results


def write_table(results: dict[str, dict[str, Result]]) -> str:
    """The page: counts, the reasons of what does not pass, and a row for each architecture."""
    lines = [
        INTRODUCTION.format(**{name: version(name).partition("+")[0] for name in ("transformers", "peft", "torch")}),
        "",
        "| | " + " | ".join(TITLES.values()) + " |",
        "|---" * (len(TITLES) + 1) + "|",
    ]
    for state in (PASSES, REFUSED, FAILS, NOT_BUILT):
        counts = [sum(result.state == state for result in results[kind].values()) for kind in TITLES]
        lines.append(f"| {state} | " + " | ".join(map(str, counts)) + " |")
    lines += ["", "## What does not pass, and why", ""]
    for kind, title in TITLES.items():
        for name, result in sorted(results[kind].items()):
            if result.state != PASSES:
                lines.append(f"- {name} ({title}), {result.state}: {result.reason}")
    lines += ["", "## All", "", "| architecture | " + " | ".join(TITLES.values()) + " |"]
    lines.append("|---" * (len(TITLES) + 1) + "|")
    for name in sorted(set().union(*results.values())):
        lines.append(f"| {name} | " + " | ".join(cell(results[kind].get(name)) for kind in TITLES) + " |")
    return "\n".join(lines) + "\n"


def cell(result: Result | None) -> str:
    """What the table says of a result."""
    if result is None:
        return NOT_THERE
    return f"yes, with `{result.reason}`" if result.state == PASSES and result.reason else result.state


@functools.cache
def read_table(path: Path = HERE.parents[1] / "docs" / "architectures.md") -> dict[str, dict[str, str]]:
    """The cells of the table, by kind and architecture."""
    rows = [line.strip("| ").split(" | ") for line in path.read_text().partition("## All")[2].splitlines()]
    rows = [[name, *cells, *[""] * (3 - len(cells))] for name, *cells in rows if name and cells][1:]
    table: dict[str, dict[str, str]] = {kind: {} for kind in TITLES}
    for name, *cells in rows:
        for kind, text in zip(TITLES, cells, strict=True):
            if text.strip():
                table[kind][name] = text.strip()
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, help="one kind of model (default: all)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these architectures")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table (of all)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    arguments = parser.parse_args()
    if arguments.write and (arguments.kind or arguments.only):
        parser.error("--write is for a sweep over all: leave out --kind and --only")
    start = time.perf_counter()
    results = sweep([arguments.kind] if arguments.kind else KINDS, arguments.only, arguments.workers)
    for kind, of_kind in results.items():
        states = [result.state for result in of_kind.values()]
        print(f"{kind}: " + ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)))
    print(f"{time.perf_counter() - start:.0f} s")
    if arguments.write:
        arguments.write.parent.mkdir(exist_ok=True)
        arguments.write.write_text(write_table(results))


if __name__ == "__main__":
    main()
