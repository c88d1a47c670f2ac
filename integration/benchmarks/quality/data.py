"""Rows of the data's files, as prompts and answers. Needs the standard library alone."""

import csv
import json
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .metrics import is_right
from .protocol import ModelToken, Task


@dataclass(frozen=True)
class Example:
    """A row.

    Attributes:
        prompt, answer (`str`): what the model is given, and what it is to answer; a classifier answers nothing.
        gold (`int` or `str`): the label; or the number or letter that the answer ends in; or which choice is right.
        choices (`list[str]`): the answers that the prompt lists, the right one among them.
    """

    prompt: str
    answer: str
    gold: int | str
    choices: list[str] = field(default_factory=list)


def find_folder(name: str, kind: str) -> Path:
    """A folder, or that of a repository of the Hub with the same files.

    Args:
        name (`str`): the folder, or the repository's id.
        kind (`str`): `"model"` or `"dataset"`.

    Raises:
        FileNotFoundError: if it is neither.
    """
    if Path(name).is_dir():
        return Path(name)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, repo_type=kind))
    raise FileNotFoundError(f"{name}: neither a folder with a {kind} nor the Hub id of one.")


# Files


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a file, whatever its format, with the fields that the templates name."""
    if file.suffix == ".json":
        return json.loads(file.read_text())
    if file.suffix == ".jsonl":
        return [row for line in file.read_text().splitlines() for row in normalize(json.loads(line))]
    with file.open(newline="") as lines:
        cells = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    # CoLA has source, label, mark and sentence; SST-2 label and sentence.
    return [{"sentence": row[-1], "label": int(row[-3] if len(row) == 4 else row[0])} for row in cells]


def normalize(row: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """GSM8K's own format, and that of Alpaca's seed tasks, in the fields of LLM-Adapters."""
    if "instances" in row:
        for instance in row["instances"]:
            yield {"instruction": row["instruction"], "answer": ""} | instance
    else:
        worked, _, number = row["answer"].partition("\n#### ")
        output = f"{re.sub('<<.*?>>', '', worked)} The answer is {number}."
        yield {"instruction": row["question"], "input": "", "output": output, "answer": number}


# Templates


def make_example(family: ModelToken, row: dict[str, Any]) -> Example:
    prompt = family.prompt_with_input if family.prompt_with_input and row["input"] else family.prompt
    if family.scoring == "label":
        return Example(prompt.format(**row), "", row["label"])
    answer = family.answer.format(**row).strip()
    prompt = prompt.format(**row)
    if family.scoring != "choice":
        return Example(prompt, answer, row["answer"])
    names = choices_in(row["instruction"])
    choices = [family.answer.format(**row | {"output": f"the correct answer is {name}"}) for name in names]
    return Example(prompt, answer, choices.index(answer), choices)


def choices_in(instruction: str) -> list[str]:
    """What the instruction says that one can answer: `... Answer format: true/false`."""
    return instruction.rpartition("Answer format: ")[2].strip().split("/")


# Subsets


@dataclass(frozen=True)
class Split:
    """The examples of a task, no row in two of the parts, and no question of a test file in the others.

    Attributes:
        train, validation (`list[Example]`): from the training files.
        tests (`dict[str, list[Example]]`): by test set.
        held_out (`int`): rows of the training files that are left out, since a test file asks the same.
        contradictory (`int`): rows of the training files that are left out, since their answer is not what they work
            out: one in four of math_data.
    """

    train: list[Example]
    validation: list[Example]
    tests: dict[str, list[Example]]
    held_out: int
    contradictory: int = 0


def question(example: Example) -> str:
    """What tells whether two rows ask the same: their words, whatever stands between them."""
    return " ".join(re.findall(r"\w+", example.prompt.lower()))


class Pool:
    """The rows of a file in an order that is always the same, to be taken from its beginning."""

    def __init__(self, family: ModelToken, file: Path):
        self.rows = [make_example(family, row) for row in read_rows(file)]
        random.Random(0).shuffle(self.rows)

    def take(self, count: int | None) -> list[Example]:
        taken, self.rows = self.rows[:count], self.rows[len(self.rows) if count is None else count :]
        return taken

    def drop_contradictions(self) -> int:
        """Leave out the rows whose worked answer does not end in theirs, and tell how many they are."""
        before = len(self.rows)
        self.rows = [row for row in self.rows if is_right(row.answer, str(row.gold))]
        return before - len(self.rows)

    def hold_out(self, questions: set[str]) -> int:
        """Leave out the rows that ask one of these questions, and tell how many they are."""
        before = len(self.rows)
        self.rows = [row for row in self.rows if question(row) not in questions]
        return before - len(self.rows)


def split_task(family: ModelToken, task: Task, folder: Path, size: dict[str, Any]) -> Split:
    """The examples of a task, as many as the size says: first for the tests, then for validation, then to train on."""
    pools = {file: Pool(family, folder / file) for file in dict.fromkeys([*task.test.values(), *task.train])}
    is_number = family.scoring == "number"
    contradictory = sum(pools[file].drop_contradictions() for file in task.train) if is_number else 0
    asked = {question(row) for file in task.test.values() if file not in task.train for row in pools[file].rows}
    tests = {name: pools[file].take(size["test"]) for name, file in task.test.items()}
    asked |= {question(row) for rows in tests.values() for row in rows}
    held_out = sum(pools[file].hold_out(asked) for file in task.train)

    def from_training_files(count: int | None) -> list[Example]:
        share = None if count is None else count // len(task.train)
        return [example for file in task.train for example in pools[file].take(share)]

    validation = from_training_files(size["validation"])
    held_out += sum(pools[file].hold_out({question(row) for row in validation}) for file in task.train)
    return Split(from_training_files(size["train"]), validation, tests, held_out, contradictory)
