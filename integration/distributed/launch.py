"""Runs `accelerate launch` with a file of examples/accelerate_configs/ on CPU processes, and reads what they wrote."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import forks
import psutil

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "accelerate_configs"
LAUNCH_FORKS = Path(__file__).with_name("launch_forks.py")
TRAIN = Path(__file__).with_name("train.py")
PATHS = [
    ROOT,
    ROOT / "tests",
    ROOT / "integration",
    ROOT / "integration" / "trl",
    ROOT / "integration" / "distributed",
]

# What CPUs need in place of what the files say for GPUs
ON_CPUS = {
    "ddp": [],
    "fsdp1": ["--fsdp_cpu_ram_efficient_loading", "false", "--fsdp_sync_module_states", "false"],  # needs a GPU
    "fsdp2": [],
}


NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_quant_storage": "float32",
    "bnb_4bit_compute_dtype": "float32",
}


@dataclass
class Launched:
    """What came of a launch.

    Attributes:
        returncode (`int`, *optional*): of the launcher; None if it was killed at the time limit.
        output (`str`): what launcher and processes printed.
    """

    returncode: int | None
    output: str


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def end_with_children(process: subprocess.Popen | forks.Process) -> None:
    """Kill a launcher and all that it has started; torchrun gives each worker a process group of its own."""
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    for member in family:
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            pass
    process.wait()


def start(
    config: str,
    script: Path,
    *arguments,
    options=(),
    processes: int = 2,
    environment=None,
    new: bool = False,
    log: Path,
):
    """Start `accelerate launch` and return the process; its output goes to `log`.

    Args:
        config: the name of a file in examples/accelerate_configs/, without its ending.
        script, arguments: what each process runs.
        options: more options of `accelerate launch`.
        environment: more environment variables.
        new: whether launcher and processes are new interpreters, as a user's are, or forks, which start sooner.
    """
    command = ["--config_file", CONFIGS / f"{config}.yaml", "--num_processes", processes]
    command += ["--main_process_port", free_port(), "--mixed_precision", "no"]
    command += [*ON_CPUS.get(config, []), *options, script, *arguments]
    paths = os.pathsep.join([*map(str, PATHS), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    settings |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONFAULTHANDLER": "1"}
    settings = os.environ | settings | (environment or {})
    if not new:
        return forks.start([LAUNCH_FORKS, *command], env=settings, log=log)
    command = [*map(str, [sys.executable, "-m", "accelerate.commands.launch", *command])]
    with log.open("w") as stream:
        return subprocess.Popen(command, env=settings, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)


def launch(config: str, script: Path, *arguments, timeout: float = 240, log: Path, **options) -> Launched:
    """Run `accelerate launch` to its end, or kill it with all its processes at the time limit."""
    process = start(config, script, *arguments, log=log, **options)
    try:
        returncode = process.wait(timeout)
    except subprocess.TimeoutExpired:
        returncode = None
    finally:
        end_with_children(process)
    return Launched(returncode, log.read_text(errors="replace"))


def train(config: str, folder: Path, runs: list[dict], **options) -> dict[str, list[dict]]:
    """Train as `runs` say (see train.py), one after the other in the same processes.

    Returns:
        what the ranks wrote for each run, by its name, in order of the ranks.
    """
    processes = options.get("processes", 2)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "runs.json").write_text(json.dumps(runs))
    launched = launch(config, TRAIN, folder, log=folder / "log.txt", **options)
    if "SIGSEGV" in launched.output:  # seen once in hundreds: torch's own, in gloo; there is only Python in peft_reft
        warnings.warn(f"A process crashed, and is launched once more:\n{launched.output[-6000:]}", stacklevel=2)
        for run in runs:
            shutil.rmtree(folder / run["name"], ignore_errors=True)
        launched = launch(config, TRAIN, folder, log=folder / "log.txt", **options)
    assert launched.returncode == 0, f"returncode {launched.returncode}\n{launched.output[-6000:]}"
    return {run["name"]: results(folder / run["name"], processes) for run in runs}


def results(folder: Path, processes: int) -> list[dict]:
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(processes)]
