"""The reference implementation (pyreft) and AdapterHub's adapters, beside a floor of their own.

    PYTHON integration/benchmarks/peers.py training-step --size small --rounds 9 --threads 2 --json peers.json

`speed.py --peers PYTHON` runs it with the Python of another environment, since they need an older transformers: pyreft
0.1.0, pyvene 0.1.8 and adapters 1.3.0 with transformers 4.57.6. What is not installed is left out; what fails is
reported with its error.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from frozen import (
    PROMPT,
    SIZES,
    Generating,
    Size,
    TrainingStep,
    check_edits,
    make_base,
    make_floor,
    prompts,
    same_weights,
    training_inputs,
)
from measure import CLOCKS, Contender, benchmark, installed, machine, use_clock

R, N = 8, 7  # rank, and the first and the last tokens that are edited


def with_pyreft(base: Any) -> Any:
    """LoReFT on all layers; the prefix and the suffix have interventions of their own."""
    import pyreft

    model = same_weights(base)
    layers, d = list(range(model.config.num_hidden_layers)), model.config.hidden_size
    representations = [
        {
            "layer": layer,
            "component": "block_output",
            "low_rank_dimension": R,
            "intervention": pyreft.LoreftIntervention(
                embed_dim=d, low_rank_dimension=R, dropout=0.0, act_fn=None, dtype=next(model.parameters()).dtype
            ),
        }
        for layer in layers + layers
    ]
    return pyreft.get_reft_model(model, pyreft.ReftConfig(representations=representations))


def locations(model: Any, batch: int, end: int) -> list[list[list[int]]]:
    """The tokens that each intervention edits in each row, as pyreft's data collator and trainer pass them."""
    import pyreft

    count = len(model.interventions)
    row = pyreft.get_intervention_locations(last_position=end, positions=f"f{N}+l{N}", num_interventions=count)
    return torch.tensor([row] * batch).permute(1, 0, 2).tolist()


def with_adapters(base: Any) -> Any:
    """LoReFT of the same rank and positions; the suffix ends where the input ends."""
    import adapters

    model = same_weights(base)
    adapters.init(model)
    model.add_adapter(
        "reft", config=adapters.LoReftConfig(prefix_positions=N, suffix_positions=N, r=R, dropout=0.0, layers="all")
    )
    model.train_adapter("reft")
    return model


def training_steps(size: Size, device: torch.device, dtype: torch.dtype) -> list[tuple[str, Callable[[], Contender]]]:
    base, inputs = make_base(size.config, device, dtype), training_inputs(size, device)

    def floor(name: str) -> Contender:
        model = make_floor(base)
        return TrainingStep(name, model, lambda: model(**inputs).loss)

    def pyreft() -> Contender:
        model = with_pyreft(base)
        told = {name: inputs[name] for name in ("input_ids", "attention_mask")}

        def loss() -> torch.Tensor:
            where = {"sources->base": (None, locations(model, size.batch, size.tokens // 2))}
            return model(told, unit_locations=where, labels=inputs["labels"], use_cache=False)[1].loss

        return TrainingStep("pyreft", model, loss)

    def adapters() -> Contender:
        model = with_adapters(base)
        return TrainingStep("adapters", model, lambda: model(**inputs).loss)

    own = {"pyreft": pyreft, "adapters": adapters}
    return [("floor", lambda: floor("floor")), ("floor, again", lambda: floor("floor, again")), *own.items()]


def generations(
    size: Size, device: torch.device, dtype: torch.dtype, new_tokens: int
) -> list[tuple[str, Callable[[], Contender]]]:
    base, inputs = make_base(size.config, device, dtype), prompts(size, device)

    def pyreft() -> Contender:
        model = with_pyreft(base)
        model.model.eval()

        def generate(input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> torch.Tensor:
            where = {"sources->base": (None, locations(model, *input_ids.shape))}
            told = {"input_ids": input_ids, "attention_mask": attention_mask}
            return model.generate(told, unit_locations=where, intervene_on_prompt=True, **options)[1]

        return Generating("pyreft", generate, inputs, new_tokens)

    def adapters() -> Contender:
        return Generating("adapters", with_adapters(base).eval().generate, inputs, new_tokens)

    own = {"pyreft": pyreft, "adapters": adapters}
    again = same_weights(base)
    return [
        ("base", lambda: Generating("base", base.generate, inputs, new_tokens)),
        ("base, again", lambda: Generating("base, again", again.generate, inputs, new_tokens)),
        *own.items(),
    ]


WORKLOADS = {
    "training-step": training_steps,
    "prefill": lambda *setup: generations(*setup, new_tokens=1),
    "decode": lambda size, *setup: generations(replace(size, tokens=PROMPT), *setup, new_tokens=size.new_tokens),
}


def run(workload: str, size: Size, device: torch.device, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Rows as `measure.benchmark` makes them, and the errors of contenders that fail, by name."""
    contenders, errors = [], {}
    for name, make in WORKLOADS[workload](size, device, dtype):
        if name in ("pyreft", "adapters") and find_spec(name) is None:
            continue
        try:
            contender = make()
            contender.run()
            contenders.append(contender)
        except Exception as error:  # whatever it is, it is what a user would see
            errors[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    check_edits(contenders, 2)
    return {"results": benchmark(contenders, rounds), "errors": errors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    use_clock(args.clock)
    setup = SIZES[args.size], torch.device(args.device), getattr(torch, args.dtype)
    found = run(args.workload, *setup, args.rounds)
    args.json.write_text(json.dumps({"machine": machine() | installed("accelerate")} | found))


if __name__ == "__main__":
    main()
