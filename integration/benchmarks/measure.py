"""How the benchmarks measure: contenders that take turns, operators, live memory, the machine. Needs torch alone."""

import gc
import os
import platform
import statistics
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel")  # and their variants, which go on from there


class Contender:
    """What takes part in a benchmark.

    Attributes:
        name (`str`): the same in every benchmark where it takes part in the same way.
        measures (`dict[str, int]`): what a run measures, with the tokens that it makes in that time, 0 if it is not
            about tokens. `"total"` is the whole run.
        calls_operators (`bool`): whether operators and memory of a run say anything.
    """

    calls_operators = True

    def __init__(self, name: str, measures: dict[str, int] | None = None):
        self.name, self.measures = name, measures or {"total": 0}

    def prepare(self) -> None:
        """What comes before a run, off the clock."""

    def run(self) -> dict[str, float] | None:
        """What is timed.

        Returns:
            `dict[str, float]`, *optional*: the seconds of the measures but `"total"`.
        """
        raise NotImplementedError

    def outcome(self) -> torch.Tensor:
        """What a run computes, to tell contenders apart."""
        raise NotImplementedError


# Seconds

# With one thread, the time that the process had a CPU is steadier where others use the machine.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
_chosen = "wall"


def use_clock(name: str) -> None:
    """Have `now` read one of `CLOCKS`."""
    global _chosen
    _chosen = name


def now() -> float:
    return CLOCKS[_chosen]()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_run(contender: Contender) -> dict[str, float]:
    """The seconds of one run, by measure."""
    contender.prepare()
    gc.collect()
    gc.disable()  # as `timeit` does
    try:
        synchronize()
        began = now()
        parts = contender.run()
        synchronize()
        return {"total": now() - began} | (parts or {})
    finally:
        gc.enable()


def take_turns(contenders: list[Contender], rounds: int, warm_up: int = 1) -> list[dict[str, list[float]]]:
    """Time contenders in turn; each round begins with another one, so that none always follows the same.

    Returns:
        `list[dict[str, list[float]]]`: for each contender, by measure, its seconds in each round.
    """
    gc.collect()
    gc.freeze()  # what is there by now need not be looked through before every run
    for _ in range(warm_up):
        for contender in contenders:
            time_run(contender)
    runs: list[list[dict[str, float]]] = [[] for _ in contenders]
    for turn in range(rounds):
        for index in range(len(contenders)):
            chosen = (turn + index) % len(contenders)
            runs[chosen].append(time_run(contenders[chosen]))
    gc.unfreeze()
    return [
        {measure: [run[measure] for run in own] for measure in contender.measures}
        for contender, own in zip(contenders, runs, strict=True)
    ]


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """The median, and the quartiles around it."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return median, low, high


def benchmark(contenders: list[Contender], rounds: int, x: float | None = None) -> list[dict[str, Any]]:
    """Measure contenders, the first of which is the floor.

    Args:
        contenders (`list[Contender]`): all that are compared.
        rounds (`int`): how often each of them runs.
        x (`float`, *optional*): where they are on a scaling curve.

    Returns:
        `list[dict]`: a row for each contender and measure, with seconds by round, their median, ratios to the floor of
        the same round and differences from it (median and quartiles), and for the whole run operators and memory.
    """
    rows, counted = [], [count(contender) for contender in contenders]
    seconds = take_turns(contenders, rounds)
    for contender, own, counts in zip(contenders, seconds, counted, strict=True):
        for measure, values in own.items():
            floor = seconds[0][measure]
            pairs = list(zip(values, floor, strict=True))
            median = statistics.median(values)
            row = {"x": x, "contender": contender.name, "measure": measure, "seconds": values, "median": median}
            row["ratio"] = quartiles([value / other for value, other in pairs])
            row["difference"] = quartiles([value - other for value, other in pairs])
            row["tokens_a_second"] = contender.measures[measure] / median
            rows.append(row | (counts if measure == "total" else {}))
    return rows


# Operators and memory


def count(contender: Contender) -> dict[str, Any]:
    """What one run does, without noise: operators by name, the bytes that they make, kernels launched, peak memory."""
    if not contender.calls_operators:
        return {}
    contender.prepare()
    contender.run()  # the first makes what stays
    contender.prepare()
    with Operators() as operators:
        contender.run()
    counts = {"operators": operators.calls.total(), "by_name": dict(operators.calls), "bytes_made": operators.made}
    contender.prepare()
    counts["peak"] = peak_memory(contender.run)
    if not torch.cuda.is_available():
        return counts
    contender.prepare()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        contender.run()
        synchronize()
    launches = (event.count for event in profiled.key_averages() if event.key.startswith(LAUNCHES))
    return counts | {"launches": sum(launches)}


def peak_memory(run: Callable[[], Any], device: str | None = None) -> int:
    """The bytes that live at most of what a run has made; weights, inputs and what was there before are not counted.

    On a GPU, which is meant where there is one and no `device` is named, it is what the allocator reports.
    """
    if not (torch.device(device).type == "cuda" if device else torch.cuda.is_available()):
        with LiveMemory() as memory:
            run()
        return memory.peak
    gc.collect()
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    synchronize()
    return torch.cuda.max_memory_allocated() - before


def storages(tensors: Iterable[Any]) -> dict[int, torch.UntypedStorage]:
    found = (tensor.untyped_storage() for tensor in tensors if isinstance(tensor, torch.Tensor))
    return {storage._cdata: storage for storage in found}


def bytes_of(tensors: Iterable[Any]) -> int:
    """The bytes of the distinct storages of tensors."""
    return sum(storage.nbytes() for storage in storages(tensors).values())


def is_view(func: Any) -> bool:
    """Whether an operator only looks at its input in another way."""
    aliases = [returned.alias_info for returned in func._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


class Operators(TorchDispatchMode):
    """Counts the ATen operators that compute something, by name, and the bytes of the storages that they make.

    Attributes:
        calls (`Counter`): how often each was called; views are left out, which launch no kernel.
        made (`int`): bytes, of all that was made, whether it still lives or not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter = Counter()
        self.made = 0

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = storages(tree_leaves((args, kwargs)))
        output = func(*args, **kwargs or {})
        if not is_view(func):
            self.calls[str(func)] += 1
        self.made += sum(s.nbytes() for key, s in storages(tree_leaves(output)).items() if key not in given)
        return output


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of the storages that operations have made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.counted, self.alive, self.peak = WeakIdKeyDictionary(), 0, 0

    def _freed(self, size: int) -> None:
        self.alive -= size

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = storages(tree_leaves((args, kwargs)))
        output = func(*args, **kwargs or {})
        for key, storage in storages(tree_leaves(output)).items():
            if key not in given and storage not in self.counted:
                size = storage.nbytes()
                self.counted[storage] = weakref.finalize(storage, self._freed, size)
                self.alive += size
        self.peak = max(self.peak, self.alive)
        return output


# The machine


def cpu_model() -> str:
    """What the kernel calls the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def installed(*packages: str) -> dict[str, str]:
    """The versions of packages that are installed."""
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def machine() -> dict[str, Any]:
    """What a measurement was made on."""
    found: dict[str, Any] = {"cpu": cpu_model(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    found["clock"] = _chosen
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    packages = ("torch", "transformers", "peft", "peft_reft", "pyreft", "pyvene", "adapters")
    return found | {"python": platform.python_version()} | installed(*packages)
