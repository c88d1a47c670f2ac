"""DeepSpeed on two processes: the same training as in one, and the same whole adapter, however the base is sharded.

DeepSpeed comes as source that is built for the machine, so that the tests do without it where it is not installed:
DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed==0.19.8 ninja py-cpuinfo
"""

import pytest
from launch import NF4
from launch import train as train_distributed

pytestmark = pytest.mark.slow
pytest.importorskip("deepspeed")

ON_CPUS = {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "false"}  # accelerate knows DeepSpeed or CPUs, not both
SETTINGS = {"save_strategy": "steps", "save_steps": 3, "per_device_eval_batch_size": 2}
ONE_PROCESS = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}


def runs_in(folder, rows, describe):
    """What is run, by name, one after the other in one launch."""
    more = {"eval_data": rows[:8]}
    resume = {"resume": str(folder / "checkpointed" / "checkpoints" / "checkpoint-3")}
    runs = [
        describe("checkpointed", rows, more, **SETTINGS),
        describe("checkpointed, resumed", rows, more | resume, **SETTINGS),
        describe("accumulated", rows, per_device_train_batch_size=1, gradient_accumulation_steps=2),
        describe("clipped", rows, max_grad_norm=0.1, gradient_checkpointing=False),
        describe("nf4", rows, {"quantized": NF4}),
    ]
    return {run["name"]: run for run in runs}


@pytest.fixture(scope="module", params=["deepspeed_zero2", "deepspeed_zero3"])
def launched(request, tmp_path_factory, rows, describe):
    folder = tmp_path_factory.mktemp(request.param)
    runs = runs_in(folder, rows, describe)
    outcomes = train_distributed(request.param, folder, list(runs.values()), environment=ON_CPUS, new=True)
    return folder, runs, outcomes


def test_same_as_one_process(launched, in_one_process, assert_same, subtests):
    """Losses, gradients, evaluation and the saved adapter; a resumed run has the losses of the steps before, too."""
    folder, runs, outcomes = launched
    for name, ranks in outcomes.items():
        with subtests.test(name):
            assert {rank["wrapped"] for rank in ranks} == {"DeepSpeedEngine"}
            run = {key: value for key, value in runs[name].items() if key != "resume"}
            expected = in_one_process(run, **ONE_PROCESS)
            assert_same(folder / name, ranks, expected, resumed="resume" in runs[name])
