"""What crosses the network in a training step: ReFT beside LoRA, measured on CPU processes, computed for large models.

    python integration/benchmarks/traffic.py --processes 2

Starts its processes itself (gloo, on this machine), and prints Markdown. The bytes of a step are counted twice: by a
communication hook, which sees the gradients that DDP reduces, and by the kernel, which counts what the sockets of a
process have sent (TCP_INFO). `integration/distributed/test_traffic.py` holds both to the formulas.
"""

import argparse
import copy
import json
import os
import platform
import socket
import struct
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from memory import LARGE, SETTINGS, adapted, base_bytes, in_4bit, llama, make_batch, on_meta, print_table, size
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

SENT, AGAIN, UNSENT = 200, 208, 144  # where tcp_info has tcpi_bytes_sent, tcpi_bytes_retrans, tcpi_notsent_bytes
SMALL = llama(512, 2, 8, 4, 1024, 512)
NUMBERS = (2, 8, 64, 512)
LINKS = (1, 10, 100, 400)  # Gbit/s


# Measured


def bytes_sent() -> int:
    """What this process has written to its TCP sockets since they were opened, as the kernel counts it."""
    sent = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if not os.readlink(entry).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as opened:
                if opened.family in (socket.AF_INET, socket.AF_INET6) and opened.type == socket.SOCK_STREAM:
                    info = opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    sent += struct.unpack_from("Q", info, SENT)[0] - struct.unpack_from("Q", info, AGAIN)[0]
                    sent += struct.unpack_from("I", info, UNSENT)[0]
        except FileNotFoundError:  # closed by now
            continue
    return sent


def sent_by(do: Callable[[], Any]) -> int:
    dist.barrier()
    before = bytes_sent()
    do()
    dist.barrier()  # a few hundred bytes
    return bytes_sent() - before


def measure_ddp(base: nn.Module, setting: str, dtype: torch.dtype, rank: int) -> dict[str, int]:
    """The second step of DDP; the first rebuilds its buckets."""
    model = adapted(copy.deepcopy(base), SETTINGS[setting](), dtype)
    wrapped: list[DistributedDataParallel] = []
    at_start = sent_by(lambda: wrapped.append(DistributedDataParallel(model)))
    reduced: list[int] = []

    def count(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        reduced.append(bucket.buffer().nbytes)
        return allreduce_hook(None, bucket)

    wrapped[0].register_comm_hook(None, count)
    batch = make_batch(SMALL, 2, 24, 12 + rank, lengths=False)
    wrapped[0](**batch).loss.backward()
    reduced.clear()
    sent = sent_by(lambda: wrapped[0](**batch).loss.backward())
    return {"at start": at_start, "reduced": sum(reduced), "sent": sent}


def measure_fsdp(setting: str, rank: int) -> dict[str, int]:
    """The second step of FSDP2 on a float32 base, each block a unit."""
    base = LlamaForCausalLM(SMALL)
    model = adapted(base, SETTINGS[setting]())
    for block in base.model.layers:
        fully_shard(block)
    fully_shard(model)
    batch = make_batch(SMALL, 2, 24, 12 + rank, lengths=False)
    model(**batch).loss.backward()
    sent = sent_by(lambda: model(**batch).loss.backward())
    assert all((parameter.grad is None) != parameter.requires_grad for parameter in model.parameters())
    return {"sent": sent}


CASES = {
    **{f"DDP: {name}": ("ddp", name, torch.float32) for name in SETTINGS},
    "DDP, bfloat16: ReFT, r 8, f7+l7": ("ddp", "ReFT, r 8, f7+l7", torch.bfloat16),
    "FSDP2: ReFT, r 8, f7+l7": ("fsdp", "ReFT, r 8, f7+l7", torch.float32),
    "FSDP2: LoRA, r 8, q and v": ("fsdp", "LoRA, r 8, q and v", torch.float32),
}


def work(rank: int, processes: int, folder: str) -> None:
    torch.set_num_threads(1)
    base = in_4bit(SMALL)  # before there is a process group, in which only the first process would save it
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    found = {}
    for case, (kind, setting, dtype) in CASES.items():
        torch.manual_seed(0)
        found[case] = measure_ddp(base, setting, dtype, rank) if kind == "ddp" else measure_fsdp(setting, rank)
    dist.destroy_process_group()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))


def measure(processes: int) -> list[dict[str, dict[str, int]]]:
    """What each process counted, by case."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(work, (processes, folder), processes, start_method="fork")
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(processes)]


# Computed


def ring(number: int, processes: int, passes: int) -> int:
    """What a process sends in a ring: 2 passes to reduce and share a tensor of `number` bytes, 1 for either."""
    return passes * number * (processes - 1) // processes


def trained_bytes(model: nn.Module, itemsize: int = 4) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) * itemsize


def padded(parameters: Iterable[nn.Parameter], processes: int) -> int:
    """The numbers in parameters that FSDP2 shards by rows, as many on each process."""
    return sum(-(-len(p) // processes) * processes * (p.numel() // len(p)) for p in parameters)


def by_fsdp(model: nn.Module, processes: int, itemsize: int = 4) -> tuple[int, int]:
    """What a process sends in a step of FSDP2, to gather weights and to reduce gradients (of float32).

    Blocks are gathered in the forward and again in the backward pass, the rest once. Frozen weights have no gradients.
    """
    inside = {id(p) for name, p in model.named_parameters() if ".layers." in name}
    blocks = padded((p for p in model.parameters() if id(p) in inside), processes)
    rest = padded((p for p in model.parameters() if id(p) not in inside), processes)
    trained = padded((p for p in model.parameters() if p.requires_grad), processes)
    return ring((2 * blocks + rest) * itemsize, processes, 1), ring(4 * trained, processes, 1)


# Tables


def duration(number: int, gigabits: int) -> str:
    seconds = number * 8 / (gigabits * 1e9)
    return f"{seconds:,.1f} s" if seconds >= 1 else f"{seconds * 1e3:,.1f} ms"


def print_measured(processes: int) -> None:
    print(
        f"Measured: {processes} processes, gloo, hidden size {SMALL.hidden_size}, {SMALL.num_hidden_layers} layers.\n"
    )
    found = measure(processes)
    rows = []
    for case, (kind, setting, dtype) in CASES.items():
        model = on_meta(SMALL, SETTINGS[setting]())
        if kind == "ddp":
            hook, computed = f"{found[0][case]['reduced']:,}", ring(trained_bytes(model, dtype.itemsize), processes, 2)
        else:
            hook, computed = "", sum(by_fsdp(model, processes))
        sent = [ranks[case]["sent"] for ranks in found]
        rows.append([case, hook, f"{computed:,}", f"{min(sent):,} to {max(sent):,}"])
    print_table(["bytes a step", "gradients seen by the hook", "computed: sent by a process", "sent, by rank"], rows)


def print_computed(name: str, config: LlamaConfig) -> None:
    models = {setting: on_meta(config, SETTINGS[setting]()) for setting in SETTINGS}
    print(f"Computed: {name}, DDP. What each process sends in a step, of gradients in float32.\n")
    rows = [
        [setting, size(trained_bytes(model)), *(size(ring(trained_bytes(model), n, 2)) for n in NUMBERS)]
        for setting, model in models.items()
    ]
    print_table(["", "gradients", *(f"{n} processes" for n in NUMBERS)], rows)

    print(f"The time that takes with {NUMBERS[-1]} processes, each with a link of its own.\n")
    rows = [
        [setting, *(duration(ring(trained_bytes(model), NUMBERS[-1], 2), link) for link in LINKS)]
        for setting, model in models.items()
    ]
    print_table(["", *(f"{link} Gbit/s" for link in LINKS)], rows)
    print(
        f"Once, at the start, DDP sends the base to every process: {size(base_bytes(config, scales=False))} in NF4.\n"
    )

    print(f"Computed: {name}, FSDP2 on a base in bfloat16. What each process sends in a step.\n")
    rows = []
    for setting, model in models.items():
        steps = [by_fsdp(model, n, 2) for n in NUMBERS]
        rows.append([setting, *(f"{size(gathered)} + {size(reduced)}" for gathered, reduced in steps)])
        rows[-1].append(duration(sum(steps[-1]), LINKS[-1]))
    numbers = (f"{n} processes" for n in NUMBERS)
    print_table(["weights + gradients", *numbers, f"{NUMBERS[-1]} at {LINKS[-1]} Gbit/s"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write what each process counted there, and print nothing")
    args = parser.parse_args()
    if args.json:
        args.json.write_text(json.dumps(measure(args.processes)))
        return
    print(f"{platform.machine()} CPU, {os.cpu_count()} cores, torch {torch.__version__}\n")
    print_measured(args.processes)
    for name, config in LARGE.items():
        print_computed(name, config)


if __name__ == "__main__":
    main()
