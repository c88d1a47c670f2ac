"""The workloads, with peft_reft, LoRA and the frozen model; `peers.py` has contenders that need other versions.

A workload is a function that yields, for each place on a scaling curve (None if there is none), the contenders; the
first of them is what the others are compared with.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from frozen import (
    PROMPT,
    Generating,
    Size,
    TrainingStep,
    check_edits,
    in_nf4,
    make_base,
    make_floor,
    prompts,
    same_weights,
    training_inputs,
)
from measure import Contender, now
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from peft_reft import ReftConfig

Groups = Iterator[tuple[float | None, list[Contender]]]
QV = ["q_proj", "v_proj"]


def reft(**options: Any) -> ReftConfig:
    """A config whose edits are not zero at the start, as they would be."""
    return ReftConfig(**{"task_type": "CAUSAL_LM", "r": 8, "positions": "f7+l7", "init_weights": False} | options)


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options)


REFT: dict[str, Callable[[], PeftConfig]] = {
    "ReFT, r 8, f7+l7": reft,
    "ReFT, r 8, f7": lambda: reft(positions="f7"),
    "ReFT, r 8, all": lambda: reft(positions="all"),
    "ReFT, r 64, f7+l7": lambda: reft(r=64),
}
LORA: dict[str, Callable[[], PeftConfig]] = {
    "LoRA, r 8, q and v": lambda: lora(r=8, target_modules=QV),
    "LoRA, r 16, all linear": lambda: lora(r=16, target_modules="all-linear"),
}


@dataclass(frozen=True)
class Setup:
    """Where and in what a workload runs."""

    size: Size
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    nf4: bool = False

    def make_base(self) -> LlamaForCausalLM:
        base = make_base(self.size.config, self.device, self.dtype)
        return in_nf4(base) if self.nf4 else base


# Models that compute


def adapt(base: nn.Module, config: PeftConfig) -> PeftModel:
    """The base with an adapter of its own; the weights of the base are shared."""
    torch.manual_seed(0)
    return get_peft_model(same_weights(base), config)


def training_steps(setup: Setup, base: nn.Module, configs: dict[str, PeftConfig]) -> list[Contender]:
    """The floor twice, and a training step for each config; ReFT told by labels alone and by `prompt_lengths`."""
    contenders: list[Contender] = []

    def add(name: str, model: nn.Module, lengths: bool = False) -> None:
        inputs = training_inputs(setup.size, setup.device, lengths)
        contenders.append(TrainingStep(name, model, lambda: model(**inputs).loss))

    add("floor", make_floor(base))
    add("floor, again", make_floor(base))
    for name, config in configs.items():
        add(name, adapt(base, config))
        if isinstance(config, ReftConfig) and "l" in config.positions.replace("all", ""):
            add(f"{name}, prompt_lengths", adapt(base, config), lengths=True)
    check_edits(contenders, 2)
    return contenders


def generations(
    setup: Setup, base: nn.Module, models: dict[str, nn.Module], new_tokens: int, inputs: dict[str, dict[str, Any]]
) -> list[Contender]:
    """The base twice, and each model in eval mode; `inputs` are what each model is given beside the prompts."""
    given = prompts(setup.size, setup.device)
    contenders: list[Contender] = [
        Generating(name, model.eval().generate, given | inputs.get(name, {}), new_tokens)  # type: ignore[operator, arg-type]
        for name, model in ({"base": base, "base, again": same_weights(base)} | models).items()
    ]
    check_edits(contenders, 2)
    return contenders


def training_step(setup: Setup) -> Groups:
    """Forward and backward of a batch; half of each row is prompt."""
    base = setup.make_base()
    yield None, training_steps(setup, base, {name: config() for name, config in (REFT | LORA).items()})


def prefill(setup: Setup) -> Groups:
    """`generate` of one token after prompts of the size's tokens."""
    yield None, generate(setup, 1)


def decode(setup: Setup) -> Groups:
    """`generate` of 24 tokens after prompts of 32; the time after the first token is decoding alone."""
    yield None, generate(replace(setup, size=replace(setup.size, tokens=PROMPT)), setup.size.new_tokens)


def generate(setup: Setup, new_tokens: int) -> list[Contender]:
    base = setup.make_base()
    models = {name: adapt(base, config()) for name, config in (REFT | LORA).items()}
    return generations(setup, base, models, new_tokens, {})


# An adapter for each row


def with_adapters(base: nn.Module, config: Callable[[], PeftConfig], number: int) -> tuple[PeftModel, list[str]]:
    """A model with a number of adapters, and their names."""
    model = adapt(base, config())
    names = ["default", *(f"adapter{index}" for index in range(1, number))]
    for name in names[1:]:
        model.add_adapter(name, config())
    return model, names


def mixed_batches(setup: Setup, base: nn.Module, rows: int, number: int, configs: dict[str, Callable]) -> Groups:
    """A batch of rows that use a number of adapters in turn."""
    made = {name: with_adapters(base, config, number) for name, config in configs.items()}
    inputs = {
        name: {"adapter_names": [names[row % number] for row in range(rows)]} for name, (_, names) in made.items()
    }
    models = {name: model for name, (model, _) in made.items()}
    setup = replace(setup, size=replace(setup.size, batch=rows, tokens=PROMPT))
    yield number, generations(setup, base, models, setup.size.new_tokens, inputs)


def mixed_batch(setup: Setup) -> Groups:
    """An adapter for each row: 1, 4, 16 and 64 rows with prompts of 32 tokens, and 24 new ones."""
    base = setup.make_base()
    for number in powers(4, setup.size.adapters):
        yield from mixed_batches(setup, base, number, number, REFT | LORA)


# Scaling curves


def powers(base: int, most: int) -> list[int]:
    """1 and the powers of a number, up to a bound."""
    return [base**exponent for exponent in range(most.bit_length()) if base**exponent <= most]


def ranks(setup: Setup) -> Groups:
    """A training step at ranks from 1 to 256, as far as the model's width goes."""
    base = setup.make_base()
    for r in powers(2, min(256, setup.size.config.hidden_size)):
        configs = {"ReFT, f7+l7": reft(r=r), "ReFT, all": reft(r=r, positions="all")}
        yield r, training_steps(setup, base, configs | {"LoRA, q and v": lora(r=r, target_modules=QV)})


def lengths(setup: Setup) -> Groups:
    """A training step of one row of 128 to 8192 tokens (of the size's tokens, to 64 times as many)."""
    base = setup.make_base()
    for times in powers(2, 64):
        tokens = times * setup.size.tokens
        at = replace(setup, size=replace(setup.size, batch=1, tokens=tokens))
        names = ("ReFT, r 8, f7+l7", "ReFT, r 8, f7", "LoRA, r 8, q and v")
        yield tokens, training_steps(at, base, {name: (REFT | LORA)[name]() for name in names})


def adapters(setup: Setup) -> Groups:
    """A batch of 64 rows that use 1 to 64 adapters."""
    base = setup.make_base()
    configs = {name: (REFT | LORA)[name] for name in ("ReFT, r 8, f7+l7", "LoRA, r 8, q and v")}
    for number in powers(2, setup.size.adapters):
        yield from mixed_batches(setup, base, setup.size.adapters, number, configs)


def positions(setup: Setup) -> Groups:
    """A training step that edits the first and the last n tokens of the prompt, n from 1 to half of it."""
    base = setup.make_base()
    for n in powers(2, setup.size.tokens // 4):
        yield 2 * n, training_steps(setup, base, {"ReFT, r 8": reft(positions=f"f{n}+l{n}")})


def layers(setup: Setup) -> Groups:
    """A training step that edits the first n layers, so that the floor is the same for all n."""
    base = setup.make_base()
    for n in powers(2, setup.size.config.num_hidden_layers):
        chosen = list(range(n))
        configs = {"ReFT, r 8, f7+l7": reft(layers_to_transform=chosen)}
        configs["LoRA, r 8, q and v"] = lora(r=8, target_modules=QV, layers_to_transform=chosen)  # type: ignore[assignment]
        yield n, training_steps(setup, base, configs)


# An adapter's life


def hollow(config: Any) -> LlamaForCausalLM:
    """A model of any shape that takes no memory: all values of a weight are one and the same number."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    for name, parameter in list(model.named_parameters()):
        parent, _, own = name.rpartition(".")
        weight = torch.zeros((), dtype=torch.float32).expand(parameter.shape)
        setattr(model.get_submodule(parent), own, nn.Parameter(weight, requires_grad=False))
    return model


class Attach(Contender):
    """`get_peft_model` of a model on the meta device."""

    calls_operators = False

    def __init__(self, name: str, config: Callable[[], PeftConfig], size: Size):
        super().__init__(name)
        self.config, self.size = config, size

    def prepare(self) -> None:
        with torch.device("meta"):
            self.model = LlamaForCausalLM(self.size.config)

    def run(self) -> None:
        get_peft_model(self.model, self.config())


class Save(Contender):
    """`save_pretrained` of an adapter, into a folder that has one already."""

    calls_operators = False

    def __init__(self, name: str, config: Callable[[], PeftConfig], size: Size):
        super().__init__(name)
        self.model = adapt_hollow(config, size)
        self.folder = tempfile.TemporaryDirectory()

    def run(self) -> None:
        self.model.save_pretrained(self.folder.name)


class Load(Contender):
    """`load_adapter` from disk (from the system's cache of it) beside another adapter, and the switch to it.

    Args:
        name (`str`), config (`Callable`), size (`Size`): what is loaded.
        low_cpu_mem_usage (`bool`): whether PEFT may leave out to initialise what is overwritten.
    """

    def __init__(self, name: str, config: Callable[[], PeftConfig], size: Size, low_cpu_mem_usage: bool):
        super().__init__(name, {"total": 0, "load": 0, "switch": 0})
        self.model, self.folder = adapt_hollow(config, size), tempfile.TemporaryDirectory()
        self.model.save_pretrained(self.folder.name)
        self.options = {"low_cpu_mem_usage": low_cpu_mem_usage}

    def prepare(self) -> None:
        if "loaded" in self.model.peft_config:
            self.model.set_adapter("default")
            self.model.delete_adapter("loaded")

    def run(self) -> dict[str, float]:
        began = now()
        self.model.load_adapter(self.folder.name, adapter_name="loaded", **self.options)  # type: ignore[arg-type]
        loaded = now()
        self.model.set_adapter("loaded")
        return {"load": loaded - began, "switch": now() - loaded}


class Switch(Contender):
    """`set_adapter`, to and fro between two adapters."""

    calls_operators = False

    def __init__(self, name: str, config: Callable[[], PeftConfig], size: Size):
        super().__init__(name)
        self.model, self.names = adapt_hollow(config, size), ["other", "default"]
        self.model.add_adapter("other", config())

    def run(self) -> None:
        self.names.reverse()
        self.model.set_adapter(self.names[0])


def adapt_hollow(config: Callable[[], PeftConfig], size: Size) -> PeftModel:
    return get_peft_model(hollow(size.config), config())


LIVES = {
    "LoRA, r 8, q and v": LORA["LoRA, r 8, q and v"],
    "LoRA, r 16, all linear": LORA["LoRA, r 16, all linear"],
    "ReFT, r 8, f7+l7": reft,
    "ReFT, r 8, f7+l7, shared": lambda: reft(share_weights=True),
}


def attach(setup: Setup) -> Groups:
    """`get_peft_model` on the meta device. Compared with LoRA: there is no floor."""
    yield None, [Attach(name, config, setup.size) for name, config in LIVES.items()]


def save(setup: Setup) -> Groups:
    """`save_pretrained`. Compared with LoRA."""
    yield None, [Save(name, config, setup.size) for name, config in LIVES.items()]


def load(setup: Setup) -> Groups:
    """`load_adapter` from disk and `set_adapter`. Compared with LoRA."""
    yield (
        None,
        [
            Load(f"{name}{', low_cpu_mem_usage' if low else ''}", config, setup.size, low)
            for name, config in LIVES.items()
            for low in (False, True)
        ],
    )


def switch(setup: Setup) -> Groups:
    """`set_adapter` between two adapters. Compared with LoRA."""
    yield None, [Switch(name, config, setup.size) for name, config in LIVES.items()]


class Import(Contender):
    """An import in a process of its own, after others that are not timed."""

    calls_operators = False

    def __init__(self, package: str, after: str):
        super().__init__(f"import {package}", {"import": 0})
        clock = (
            f"import time, {after}; began = time.perf_counter(); import {package}; print(time.perf_counter() - began)"
        )
        self.command = [sys.executable, "-c", clock]

    def run(self) -> dict[str, float]:
        root = Path(__file__).parents[2]
        env = os.environ | {"PEFT_REFT_AUTOLOAD": "0"}  # of an installation, which imports peft_reft with PEFT
        ended = subprocess.run(self.command, cwd=root, env=env, capture_output=True, text=True, check=True)
        return {"import": float(ended.stdout)}


def import_package(setup: Setup) -> Groups:
    """`import peft_reft` after `import peft`, beside the import of PEFT itself."""
    yield None, [Import("peft", after="torch"), Import("peft_reft", after="peft")]


WORKLOADS: dict[str, tuple[Callable[[Setup], Groups], str]] = {  # with the size that it has if none is named
    "training-step": (training_step, "small"),
    "prefill": (prefill, "medium"),
    "decode": (decode, "medium"),
    "mixed-batch": (mixed_batch, "small"),
    "attach": (attach, "llama-2-7b"),
    "save": (save, "llama-2-7b"),
    "load": (load, "llama-2-7b"),
    "switch": (switch, "llama-2-7b"),
    "import": (import_package, "tiny"),
    "ranks": (ranks, "small"),
    "lengths": (lengths, "small"),
    "adapters": (adapters, "small"),
    "positions": (positions, "small"),
    "layers": (layers, "small"),
}
