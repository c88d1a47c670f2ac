"""A running Hub and clients for it, one process each."""

import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
# The steps of each process, which take less than its imports; load_on_lora, which does not import peft_reft, is first.
PROCESSES = [
    ["push_adapter", "push_on_lora", "train_sft"],
    ["load_on_lora", "load_adapter", "load_sft"],
    ["download"],
    ["wrong_token"],
]


def _load_server() -> Any:
    """server.py by its path: this folder is no package, and `server` is too common a name for sys.path."""
    spec = importlib.util.spec_from_file_location("peft_reft_test_hub_server", HERE / "server.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def hub() -> Iterator[Any]:
    """The server, on a free port, for the whole session."""
    server = _load_server().HubServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="session")
def client(hub: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Returns what a step of client.py saw, in a fresh process with a fresh HF_HOME, which runs once a session."""
    folder = tmp_path_factory.mktemp("hub")
    done: dict[str, dict[str, Any]] = {}

    def run(step: str, token: str | None = None) -> dict[str, Any]:
        if step in done:
            return done[step]
        [steps] = [steps for steps in PROCESSES if step in steps]
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE_"))}
        environment = kept | {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(folder / f"home_{step}"),
            "HF_TOKEN": token or hub.token,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TRANSFORMERS_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            "CUDA_VISIBLE_DEVICES": "",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE.parents[1]), os.environ.get("PYTHONPATH")])),
        }
        command = [sys.executable, str(HERE / "client.py"), str(folder), *steps]
        process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=folder)
        if process.returncode:
            pytest.fail(f"one of {steps} failed:\n{process.stdout[-2000:]}\n{process.stderr[-6000:]}", pytrace=False)
        done.update((name, json.loads((folder / f"{name}.json").read_text())) for name in steps)
        return done[step]

    return run
