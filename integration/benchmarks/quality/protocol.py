"""What is run: the families, tasks and contenders that protocol.yaml describes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).with_name("protocol.yaml")


@dataclass(frozen=True)
class Task:
    """What one adapter is trained for.

    Attributes:
        name (`str`): as the command line and the results call it.
        train (`list[str]`): the files that the training and the validation rows come from, in equal parts.
        test (`dict[str, str]`): the file of each test set. One that is trained on, too, gives each row to one of them.
        metric (`str`): what is reported, and what the learning rate is chosen by where nothing is generated (else
            the loss is): see metrics.py.
        reft (`dict`): what ReFT has on this task alone, beside what it has in the family.
    """

    name: str
    train: list[str]
    test: dict[str, str]
    metric: str
    reft: dict[str, Any]


@dataclass(frozen=True)
class ModelToken:
    """Tasks that have a model, a prompt and a way to score in common.

    Attributes:
        scoring (`str`): `"label"` (a classifier's), `"choice"` (the answer is one of those that the prompt lists),
            `"number"` (a number or a letter in a generated text) or `"loss"` (of the given answer).
        sizes (`dict`): by name, the rows for training, validation and each test set (None: all), and the epochs.
    """

    name: str
    model: str
    scoring: str
    prompt: str
    reft: dict[str, Any]
    training: dict[str, Any]
    sizes: dict[str, dict[str, Any]]
    tasks: dict[str, Task]
    prompt_with_input: str = ""
    answer: str = ""


@dataclass(frozen=True)
class Ablation:
    """One choice, and what it can be.

    Attributes:
        values (`dict[str, dict]`): by name, the options that it changes.
        contenders (`list[str]`): what has these options.
    """

    values: dict[str, dict[str, Any]]
    contenders: list[str] = field(default_factory=lambda: ["paper-loreft"])


@dataclass(frozen=True)
class Protocol:
    contenders: dict[str, dict[str, Any]]
    families: dict[str, ModelToken]
    ablations: dict[str, Ablation]


def load_protocol(file: Path = FILE) -> Protocol:
    described = yaml.safe_load(file.read_text())
    families = {}
    for name, family in described["families"].items():
        tasks = {key: Task(key, **{"reft": {}} | task) for key, task in family.pop("tasks").items()}
        families[name] = ModelToken(name, tasks=tasks, **family)
    ablations = {name: Ablation(**ablation) for name, ablation in described["ablations"].items()}
    return Protocol(described["contenders"], families, ablations)
