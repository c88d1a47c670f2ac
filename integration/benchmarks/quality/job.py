"""A run: one contender is trained and evaluated, here or by a worker in another environment."""

import json
import subprocess
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .batches import Sample


@dataclass(frozen=True)
class Job:
    """All that a run needs, in JSON's types.

    Attributes:
        model (`str`): the folder of the base.
        contender (`dict`): its method and that method's options.
        scoring, metric (`str`): as in protocol.py.
        train, validation (`list[Sample]`), tests (`dict[str, list[Sample]]`): the data.
        batches (`list[list[int]]`): the rows of `train` in each step.
        learning_rates (`list[float]`): what to choose from on the validation part.
        seed (`int`): of all that is drawn in training.
    """

    model: str
    contender: dict[str, Any]
    scoring: str
    metric: str
    train: list[Sample]
    validation: list[Sample]
    tests: dict[str, list[Sample]]
    batches: list[list[int]]
    learning_rates: list[float]
    warmup_ratio: float
    weight_decay: float
    pad: int
    seed: int
    max_new_tokens: int = 0
    evaluation_batch_size: int = 16
    device: str = "cpu"
    threads: int = 1
    num_labels: int = field(default=2, kw_only=True)

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, file: Path) -> "Job":
        found = json.loads(file.read_text())

        def samples(rows: list[dict]) -> list[Sample]:
            return [Sample(**row) for row in rows]

        tests = {name: samples(rows) for name, rows in found["tests"].items()}
        parts = {"train": samples(found["train"]), "validation": samples(found["validation"]), "tests": tests}
        return cls(**found | parts)


def run_elsewhere(python: str, job: Job) -> dict[str, Any]:
    """Run a job with the Python of another environment; what it computes is as that of `train.run`."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "job.json", Path(folder) / "result.json"
        job.write(asked)
        subprocess.run([python, str(Path(__file__).with_name("worker.py")), str(asked), str(answered)], check=True)
        return json.loads(answered.read_text())
