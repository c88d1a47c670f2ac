"""What crosses the network in a step is what the formulas behind docs/distributed.md say: three processes, counted."""

import json
import socket

import forks
import pytest
import torch
import traffic
from measure import bytes_of
from memory import SETTINGS, base_bytes, in_4bit, on_meta

pytest.importorskip("bitsandbytes")

PROCESSES = 3  # not a divisor of r, so that FSDP2 pads its shards
HEADERS = 10_000  # at most what gloo adds in a step, and DDP to keep buffers alike, in bytes


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """What each rank counted, by case."""
    file = tmp_path_factory.mktemp("traffic") / "counted.json"
    forks.run([traffic.__file__, "--processes", PROCESSES, "--json", file], timeout=240).check_returncode()
    return json.loads(file.read_text())


def model_of(setting):
    return on_meta(traffic.SMALL, SETTINGS[setting]())


@pytest.mark.parametrize("case", [case for case, (kind, *_) in traffic.CASES.items() if kind == "ddp"])
def test_ddp_reduces_the_gradients_of_the_adapter_alone(counted, case):
    _, setting, dtype = traffic.CASES[case]
    gradients = traffic.trained_bytes(model_of(setting), dtype.itemsize)
    for rank in counted:
        assert rank[case]["reduced"] == gradients
        over = rank[case]["sent"] - 2 * gradients * (PROCESSES - 1) / PROCESSES
        assert 0 <= over < HEADERS


def test_ddp_sends_the_base_once_at_the_start(counted):
    case, setting = "DDP: ReFT, r 8, f7+l7", "ReFT, r 8, f7+l7"
    base = base_bytes(traffic.SMALL, torch.float32, scales=False)
    assert base == bytes_of(in_4bit(traffic.SMALL).parameters())
    weights = base + traffic.trained_bytes(model_of(setting))
    over = sum(rank[case]["at start"] for rank in counted) - (PROCESSES - 1) * weights
    assert 0 <= over < HEADERS


@pytest.mark.parametrize("case", [case for case, (kind, *_) in traffic.CASES.items() if kind == "fsdp"])
def test_fsdp_gathers_the_base_and_reduces_the_gradients_of_the_adapter_alone(counted, case):
    """gloo scatters what it has reduced by an all-reduce, of two passes; NCCL does it in the one of the formula."""
    model = model_of(traffic.CASES[case][1])
    gathered, reduced = traffic.by_fsdp(model, PROCESSES)
    assert reduced > 1.05 * traffic.trained_bytes(model) * (PROCESSES - 1) / PROCESSES  # by the padding
    for rank in counted:
        assert 0 <= rank[case]["sent"] - gathered - 2 * reduced < HEADERS


def test_sockets_are_counted_by_what_they_send():
    before = traffic.bytes_sent()
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        client.sendall(bytes(70_000))
        assert traffic.bytes_sent() - before == 70_000


def test_trained_parameters_of_the_small_model():
    """2 layers of 2 units of 2 r d + r parameters, by hand."""
    assert traffic.trained_bytes(model_of("ReFT, r 8, f7+l7")) == 4 * 2 * 2 * (2 * 8 * 512 + 8)
    assert traffic.padded([torch.nn.Parameter(torch.empty(8, 512)), torch.nn.Parameter(torch.empty(8))], 3) == 9 * 513
