"""Scripts in processes of their own, without the ten seconds that each new interpreter takes to import PEFT or TRL.

A new interpreter imports PEFT once, a fork of it TRL, and either forks for each script. A fork is a process as any
other: with a session, arguments, environment, folder and output of its own, and it can be killed. The package is not
imported before the fork. What a fork has from before are the seed of hashes, and what the imports have read of the
environment: no variable that a launcher sets is among that, but those of the Hub are.
"""

import atexit
import faulthandler
import functools
import gc
import importlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import types
from pathlib import Path
from typing import NoReturn

NUMBER = struct.Struct("i")
# What a script may find imported, and the modules
PEFT, TRL = "peft", "trl"
MODULES = {}
MODULES[PEFT] = ["peft"]
MODULES[TRL] = [
    "accelerate.commands.launch",
    "datasets",
    "torch.distributed.run",
    "transformers.models.llama.modeling_llama",
    "trl.trainer.dpo_trainer",
    "trl.trainer.grpo_trainer",
    "trl.trainer.sft_trainer",
]
SERVE, RUN = b"s", b"r"


class Fork:
    """A fork of this process that runs a script, with the methods of a `subprocess.Popen`.

    Args:
        command: a script and its arguments, or "-c", code and its arguments.
        env: all environment variables.
        cwd: the folder to run it in, if not this one.
        log: the file for its output, if not that of this process.
    """

    def __init__(self, command, env, cwd=None, log=None):
        self.command, self.returncode = command, None
        sys.stdout.flush()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666) if log else os.dup(1)
        self.pid = os.fork()
        if self.pid == 0:
            run_and_exit(command, env, cwd, output)
        os.close(output)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float = float("inf")) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.command, timeout)
            time.sleep(0.02)
        return self.returncode


def run_and_exit(command, env, cwd, output: int) -> NoReturn:
    """Be what a new interpreter is to a script. This process must not return to what it is a fork of."""
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):  # those of torchrun's agent
            signal.signal(number, signal.SIG_DFL)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.closerange(3, 4096)
        if env.get("PYTHONFAULTHANDLER"):
            faulthandler.enable()
        os.environ.clear()
        os.environ.update(env)
        if cwd:
            os.chdir(cwd)
        sys.stdout.reconfigure(line_buffering=True)
        sys.path[:0] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
        script, *sys.argv = command if command[0] == "-c" else (command[0], *command)
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        if script == "-c":
            text = sys.argv[0]
            sys.argv[0] = script
        else:
            text, main.__file__ = Path(script).read_text(), script
            sys.path.insert(0, str(Path(script).parent))
        exec(compile(text, script, "exec"), vars(main))
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Process:
    """What the server has forked: `pid`, and `wait` as a `subprocess.Popen` has it."""

    def __init__(self, command, connection: socket.socket):
        self.command, self.connection, self.returncode = command, connection, None
        self.pid = self._receive()

    def _receive(self) -> int:
        data = self.connection.recv(NUMBER.size)
        if len(data) != NUMBER.size:
            raise RuntimeError(f"The server did not run {self.command}")
        return NUMBER.unpack(data)[0]

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.connection.settimeout(timeout)
            try:
                self.returncode = self._receive()
            except TimeoutError:
                raise subprocess.TimeoutExpired(self.command, timeout) from None
            self.connection.close()
        return self.returncode


def _connect(server: socket.socket, word: bytes) -> socket.socket:
    """Have a server fork, and give a connection to the fork."""
    connection, its_end = socket.socketpair()
    with its_end:
        socket.send_fds(server, [word], [its_end.fileno()])
    return connection


@functools.cache
def _server(imported: str) -> socket.socket:
    """Start a server. It ends when this process does."""
    if imported == TRL:
        return _connect(_server(PEFT), SERVE)
    control, its_end = socket.socketpair()
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-P", __file__, str(its_end.fileno())],
        env=env | {"PEFT_REFT_AUTOLOAD": "0"},
        pass_fds=[its_end.fileno()],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    its_end.close()
    atexit.register(lambda: (control.close(), process.wait()))
    return control


def start(command, log: Path, imported=TRL, env=None, cwd=None) -> Process:
    """Run a script (see `Fork`) after some imports; its output goes to `log`, `env` is all of its environment."""
    command = [*map(str, command)]
    asked = {"command": command, "env": dict(env or os.environ), "cwd": str(cwd or Path.cwd()), "log": str(log)}
    connection = _connect(_server(imported), RUN)
    connection.sendall(json.dumps(asked).encode() + b"\n")
    return Process(command, connection)


def run(command, timeout: float = 600, **options) -> subprocess.CompletedProcess:
    """Run a script to its end, or kill it at the time limit; all of its output is in `stdout`."""
    with tempfile.NamedTemporaryFile("r", errors="replace") as log:
        process = start(command, log=log.name, **options)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(command, process.returncode, log.read())


def _keep(connection: socket.socket) -> None:
    """Fork for a script, and tell its pid and, at its end, its return code."""
    child = Fork(**json.loads(connection.makefile().readline()))
    connection.sendall(NUMBER.pack(child.pid))
    connection.sendall(NUMBER.pack(child.wait()))


def _serve(control: socket.socket, imported: str) -> None:
    for name in MODULES[imported]:
        importlib.import_module(name)
    gc.freeze()  # so that forks share the memory
    children = set()
    while True:
        word, connections, *_ = socket.recv_fds(control, 1, 1)
        if not word:
            return
        child = os.fork()
        if child == 0:
            connection = socket.socket(fileno=connections[0])
            _serve(connection, TRL) if word == SERVE else _keep(connection)
            os._exit(0)
        os.close(connections[0])
        children = {child for child in children | {child} if os.waitpid(child, os.WNOHANG)[0] == 0}


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])), PEFT)
