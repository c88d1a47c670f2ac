"""The benchmark runs, and measures what it says. How fast anything is, is not tested."""

import json
import sys
from dataclasses import replace

import pytest
import speed
import torch
from frozen import SIZES, TrainingStep, check_edits, make_base, make_floor, training_inputs
from measure import Contender, LiveMemory, Operators, benchmark, bytes_of
from safetensors.torch import load_file
from torch import nn
from workloads import LIVES, LORA, REFT, WORKLOADS, Import, Load, Setup, adapt, hollow, reft

TINY = Setup(SIZES["tiny"])
CONFIG = TINY.size.config
LAYERS = CONFIG.num_hidden_layers
WITHOUT_CURVE = {"training-step", "prefill", "decode", "attach", "save", "load", "switch", "import"}


def test_floor_trains_one_scalar():
    """Its gradient is that of finite differences; what lies below the lowest edited block has none."""
    lowest = 1
    base = make_base(CONFIG, dtype=torch.float64)
    floor = make_floor(base, lowest)
    inputs = training_inputs(TINY.size, torch.device("cpu"))
    needs = {}
    for index, block in enumerate(floor.model.layers):
        block.register_forward_hook(lambda _, args, output, index=index: needs.update({index: output.requires_grad}))
    labels = inputs.pop("labels")

    def loss(model):  # in float64: the model's own is in float32
        return nn.functional.cross_entropy(model(**inputs).logits[:, :-1].mT, labels[:, 1:])

    loss(floor).backward()
    assert needs == {index: index >= lowest for index in range(LAYERS)}
    [(name, bias)] = [(name, p) for name, p in floor.named_parameters() if p.requires_grad]
    assert (name, bias.shape) == (f"model.layers.{lowest}.bias_of_floor", ())
    assert torch.equal(loss(floor), loss(base))

    losses = []
    for step in (1e-4, -1e-4):
        handle = base.model.layers[lowest].register_forward_hook(lambda _, args, output, step=step: output + step)
        losses.append(loss(base))
        handle.remove()
    torch.testing.assert_close(
        bias.grad, (losses[0] - losses[1]) / 2e-4, rtol=1e-3, atol=0
    )  # the norms compute in float32


@pytest.mark.parametrize("lowest", [0, 1])
def test_floor_computes_gradients_of_activations_alone(lowest):
    """Seven products with weights in a block, and one for the logits; backward as many, above the lowest block."""
    floor = make_floor(make_base(CONFIG), lowest)
    with Operators() as operators:
        floor(**training_inputs(TINY.size, torch.device("cpu"))).loss.backward()
    assert operators.calls["aten.mm.default"] == (7 * LAYERS + 1) + (7 * (LAYERS - 1 - lowest) + 1)


def test_contenders_share_weights_and_train_their_own():
    base = make_base(CONFIG)
    weights = {tensor.data_ptr() for tensor in base.parameters()}
    for config in (*REFT.values(), *LORA.values()):
        model = adapt(base, config())
        own = [p for p in model.parameters() if p.data_ptr() not in weights]
        assert all(p.requires_grad for p in own)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(p.numel() for p in own) > 0
    assert not any(p.requires_grad for p in base.parameters())


def test_nothing_is_kept_from_step_to_step():
    model = adapt(make_base(CONFIG), reft())
    inputs = training_inputs(TINY.size, torch.device("cpu"))
    step = TrainingStep("ReFT", model, lambda: model(**inputs).loss)
    step.run()
    before = [(p, p._version, p.detach().clone()) for p in step.trained]
    step.prepare()
    assert all(p._version > version for p, version, _ in before)
    assert any(not torch.equal(p, value) for p, _, value in before)
    assert all(not p.grad.any() for p in step.trained)


def test_an_adapter_that_edits_nothing_is_refused():
    base, inputs = make_base(CONFIG), training_inputs(TINY.size, torch.device("cpu"))

    def step(name, model):
        return TrainingStep(name, model, lambda: model(**inputs).loss)

    floor, idle = step("floor", make_floor(base)), step("idle", adapt(base, reft(init_weights=True)))
    works = step("works", adapt(base, reft()))
    check_edits([floor, works], 1)
    with pytest.raises(RuntimeError, match="idle edits nothing"):
        check_edits([floor, works, idle], 1)
    with pytest.raises(RuntimeError, match="works differs"):
        check_edits([floor, works], 2)


class Told(Contender):
    """Says itself how long it took, and remembers when it ran."""

    calls_operators = False

    def __init__(self, name, seconds, log):
        super().__init__(name, {"part": 10})
        self.seconds, self.log = iter(seconds), log

    def prepare(self):
        self.log.append(f"prepare {self.name}")

    def run(self):
        self.log.append(self.name)
        return {"part": next(self.seconds)}


def test_contenders_take_turns():
    log = []
    times = {"a": [9.0, 1, 2, 4], "b": [9.0, 2, 6, 12], "c": [9.0, 1, 1, 1]}  # the first to warm up
    rows = benchmark([Told(name, seconds, log) for name, seconds in times.items()], rounds=3, x=5)
    ran = log[1::2]
    assert log[::2] == [f"prepare {name}" for name in ran]
    assert "".join(ran) == "abc" + "abcbcacab", "each round begins with another"
    a, b, c = rows
    assert (b["x"], b["contender"], b["seconds"]) == (5, "b", [2, 6, 12])
    assert (b["median"], b["ratio"], b["difference"][0]) == (6, (3, 2.5, 3), 4)
    assert b["tokens_a_second"] == 10 / 6
    assert a["ratio"] == (1, 1, 1)
    assert c["ratio"][0] == 0.5


def test_operators_and_memory_are_counted():
    x = torch.ones(8, 8)

    def compute():
        y = (x + 1).view(64)  # 256 bytes, and a view
        z = y * 2
        del y
        return z.add_(1) + torch.ones(64)  # in place; a third and a fourth

    with Operators() as operators:
        compute()
    assert operators.calls.total() == 5
    assert operators.made == 4 * 256
    with LiveMemory() as memory:
        compute()
        assert memory.alive == 0
        torch.ones(8)
    assert memory.peak == 3 * 256


def test_hollow_model_has_the_shape_and_no_memory():
    config = SIZES["llama-2-7b"].config
    model = hollow(config)
    assert model.num_parameters() == 6_738_415_616
    assert bytes_of(model.parameters()) < 2000


@pytest.mark.parametrize("name", LIVES)
def test_what_is_loaded_is_what_was_saved(name):
    contender = Load(name, LIVES[name], TINY.size, low_cpu_mem_usage=True)
    for _ in range(2):
        contender.prepare()
        contender.run()
    assert contender.model.active_adapter == "loaded"
    saved = load_file(f"{contender.folder.name}/adapter_model.safetensors")
    state = contender.model.state_dict()
    loaded = {key.replace(".loaded", ""): tensor for key, tensor in state.items() if ".loaded" in key}
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[key], saved[key]) for key in saved)


@pytest.mark.benchmarks
def test_quantized_base():
    """Its weights are those of the other one, but for rounding; all contenders train on it."""
    pytest.importorskip("bitsandbytes")
    setup = replace(TINY, nf4=True)
    base, exact = setup.make_base(), TINY.make_base()
    inputs = training_inputs(TINY.size, TINY.device)
    torch.testing.assert_close(base(**inputs).loss, exact(**inputs).loss, rtol=1e-2, atol=0)
    assert base.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    check_found(speed.run("training-step", setup, rounds=2), "training-step")


@pytest.mark.benchmarks
@pytest.mark.parametrize("workload", [name for name in WORKLOADS if name not in ("training-step", "import")])
def test_workloads_run(workload, tmp_path, capsys):
    found = speed.run(workload, TINY, rounds=2) | {"size": "tiny", "dtype": "float32"}
    check_found(found, workload)
    speed.report(found)
    printed = capsys.readouterr().out
    assert all(f"| {result['contender']} |" in printed for result in found["results"])
    speed.draw(found, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def check_found(found, workload):
    found = json.loads(json.dumps(found))
    groups = {}
    for result in found["results"]:
        groups.setdefault((result["x"], result["measure"]), []).append(result)
        assert len(result["seconds"]) == 2
        assert min(result["seconds"]) > 0
    assert any(x is None for x, _ in groups) == (workload in WITHOUT_CURVE)
    for results in groups.values():
        assert results[0]["ratio"] == [1, 1, 1]
        assert any(result["contender"].startswith("ReFT") for result in results)
        if "operators" in results[0] and workload != "load":
            for result in results:
                same = result["contender"] in speed.FLOORS
                assert (result["operators"] == results[0]["operators"]) == same, result["contender"]
    assert {"cpu", "cores", "threads", "torch", "transformers", "peft"} <= found["machine"].keys()


@pytest.fixture
def run_command(tmp_path, monkeypatch):
    """Run the script on the training step, and give what it found."""

    def run(*words):
        file, picture = tmp_path / "found.json", tmp_path / "found.png"
        command = ["speed.py", *"training-step --size tiny --rounds 2".split(), *words]
        monkeypatch.setattr(sys, "argv", [*command, "--json", str(file), "--png", str(picture)])
        speed.main()
        found = json.loads(file.read_text())
        check_found(found, "training-step")
        names = [result["contender"] for result in found["results"]]
        assert names[:3] == ["floor", "floor, again", "ReFT, r 8, f7+l7"]
        assert picture.exists()
        return found

    return run


def test_command_line(run_command, capsys):
    run_command()
    assert "| floor, again |" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.benchmarks
def test_command_line_with_peers(run_command, capsys):
    """With a Python that has none: their script measures a floor of its own."""
    found = run_command("--peers", sys.executable)
    peers = {result["contender"]: result["operators"] for result in found["peers"]["results"]}
    assert peers == dict.fromkeys(["floor", "floor, again"], found["results"][0]["operators"])
    assert found["peers"]["errors"] == {}
    assert "In another environment" in capsys.readouterr().out


@pytest.mark.benchmarks
def test_import_is_timed_in_a_process_of_its_own():
    contender = Import("peft_reft", after="peft")
    assert set(contender.run()) == set(contender.measures)
