"""The memory that training adds to a 4-bit Llama: ReFT beside LoRA, measured at small shapes, computed for large ones.

    python integration/benchmarks/memory.py --batch 1 --tokens 2048

Prints Markdown. Parameters are counted in models on the meta device. What autograd keeps is a formula, which
`test_memory.py` holds to what it is seen to keep on real 4-bit bases (`kept_for_backward`).
"""

import argparse
import platform
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import transformers
from frozen import llama, make_batch
from measure import LiveMemory, storages
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from peft_reft import ReftConfig
from peft_reft.positions.language import Positions

LARGE = {"Llama-3 8B": llama(4096, 32, 32, 8, 14336), "Llama-3 70B": llama(8192, 80, 64, 8, 28672)}
SMALL = [llama(64, 2, 4, 2, 192, 96), llama(128, 3, 8, 2, 448, 160), llama(256, 4, 4, 4, 704, 512)]
SETTINGS = {
    "ReFT, r 8, f7+l7": lambda: ReftConfig(task_type="CAUSAL_LM", r=8, positions="f7+l7"),
    "ReFT, r 8, f7+l7, shared": lambda: ReftConfig(task_type="CAUSAL_LM", r=8, positions="f7+l7", share_weights=True),
    "ReFT, r 8, all": lambda: ReftConfig(task_type="CAUSAL_LM", r=8, positions="all"),
    "LoRA, r 8, q and v": lambda: LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"]),
    "LoRA, r 16, all linear": lambda: LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"),
}


# Models


def on_meta(config: LlamaConfig, adapter: PeftConfig) -> nn.Module:
    """The adapted model without any memory."""
    with torch.device("meta"):
        return get_peft_model(LlamaForCausalLM(config), adapter)


def in_4bit(config: LlamaConfig, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model with random weights, quantized by bitsandbytes (NF4) and computing in `dtype`."""
    torch.manual_seed(0)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=quantization)


def adapted(base: nn.Module, adapter: PeftConfig | None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model as it is trained: embeddings require gradients, as for gradient checkpointing; parameters in `dtype`.

    So the frozen base keeps what it keeps whatever the adapter is, or without one.
    """
    base.requires_grad_(False).enable_input_require_grads()
    model = base if adapter is None else get_peft_model(base, adapter)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return model.train()


# Measured


def quant_tensors(model: nn.Module) -> list[torch.Tensor]:
    """What bitsandbytes keeps beside the packed weights: scales and code books."""
    states = [parameter.quant_state for parameter in model.parameters() if hasattr(parameter, "quant_state")]
    return [value for state in states for value in vars(state).values() if isinstance(value, torch.Tensor)]


def kept_for_backward(model: nn.Module, batch: dict[str, torch.Tensor]) -> int:
    """The bytes of distinct storages that autograd saves in a forward, weights and inputs not counted."""
    kept: list[torch.Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):  # type: ignore[func-returns-value]
        model(**batch)
    own = storages([*model.parameters(), *model.buffers(), *quant_tensors(model), *batch.values()])
    return sum(storage.nbytes() for key, storage in storages(kept).items() if key not in own)


def alive_in_step(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[int, int]:
    """Forward and backward: the bytes alive between the two, and at most."""
    with LiveMemory() as memory:
        loss = model(**batch).loss
        between = memory.alive
        loss.backward()
    return between, memory.peak


# Computed


@dataclass
class Run:
    """What is trained on: rows, their tokens, and what tells the prompt.

    Attributes:
        batch, tokens (`int`): shape of the input.
        lengths (`bool`): whether the batch has `prompt_lengths`, or labels alone.
        dtype (`torch.dtype`): of the base's hidden states.
        parameters (`torch.dtype`): of the adapter.
    """

    batch: int
    tokens: int
    lengths: bool
    dtype: torch.dtype = torch.bfloat16
    parameters: torch.dtype = torch.float32


def tokens_given(positions: Positions, unit: str, run: Run) -> int | None:
    """How many tokens of a row a unit is given; None for all of them, masked."""
    if positions.span or not (run.lengths or unit == "prefix" or not positions.suffix):
        return None
    n = {"prefix": positions.prefix, "suffix": positions.suffix, "unit": positions.prefix + positions.suffix}[unit]
    return n if n < run.tokens else None


def kept_by_unit(d: int, r: int, run: Run, n: int | None) -> int:
    """What the backward pass of a unit needs, in bytes: its input, and the matrices of LoReFT.

    The input in the model's dtype, all else in float32: W (h / s) + b, two matrices of the size of R, which are R and
    W in units of hidden states, and what they were multiplied by.
    """
    rows = run.batch * (run.tokens if n is None else n)
    return run.dtype.itemsize * rows * d + 4 * (rows * r + 2 * r * d + 2 * d)


def kept_by_plan(run: Run, given: list[int | None]) -> int:
    """What all layers share: a mask for each unit, and the rows and columns of tokens that are taken out."""
    taken = [n for n in given if n is not None]
    masks = run.batch * sum(run.tokens if n is None else n for n in given)
    return masks + 8 * run.batch * (sum(taken) + bool(taken))


def kept_by_reft(config: LlamaConfig, adapter: ReftConfig, run: Run) -> tuple[int, int]:
    """What is kept for the edits of one block, and what all blocks share, in bytes."""
    positions = Positions.parse(adapter.positions)
    given = [tokens_given(positions, unit, run) for unit in positions.units(adapter.share_weights)]
    block = sum(kept_by_unit(config.hidden_size, adapter.r, run, n) for n in given)
    return block, kept_by_plan(run, given)


def kept_by_lora(config: LlamaConfig, adapter: LoraConfig, run: Run) -> tuple[int, int]:
    """The same for LoRA: the inputs of the adapted projections, which a frozen base does not keep, and A x.

    Projections of one input share it, unless it must be cast to the dtype of the parameters. The input of the
    attention's output projection is kept by attention anyway.
    """
    c, cast = run.parameters.itemsize, run.parameters != run.dtype
    d, projections = config.hidden_size, {"q_proj": 0, "k_proj": 0, "v_proj": 0, "gate_proj": 1, "up_proj": 1}
    chosen = (
        [*projections, "o_proj", "down_proj"] if isinstance(adapter.target_modules, str) else adapter.target_modules
    )
    shared = {projections[name] for name in chosen if name in projections}
    numbers = len(chosen) * adapter.r + config.intermediate_size * ("down_proj" in chosen)
    numbers += d * (sum(name in projections for name in chosen) if cast else len(shared))
    numbers += d * (cast and "o_proj" in chosen)
    return c * run.batch * run.tokens * numbers, 0


def kept_by_base(config: LlamaConfig, adapter: None, run: Run) -> tuple[int, int]:
    """What one block of the frozen base keeps for a gradient to pass through it, and the rest of the model does.

    Its norms keep their input and its scale in float32, attention its queries, keys, values, output and the scale
    of its softmax, the MLP three states of its width; rotary embeddings, the last norm and the loss come once.
    """
    d, c, rows = config.hidden_size, run.dtype.itemsize, run.batch * run.tokens
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    norm = 4 * (d + 1)
    attention = c * (2 * d + 2 * kv_heads * config.head_dim) + 4 * heads
    block = rows * (2 * norm + attention + 3 * c * config.intermediate_size)
    loss = 4 * rows * config.vocab_size + 8 * (rows + (run.batch == 1)) + 4  # one row's labels are shifted in place
    return block, rows * norm + loss + 2 * c * run.tokens * config.head_dim


def kept(config: LlamaConfig, adapter: PeftConfig | None, run: Run, checkpointing: bool = False) -> tuple[int, int]:
    """What autograd keeps for an adapter (None: for the base itself), in bytes: from the forward on, and at most.

    Checkpointing keeps the input of each block and makes the rest again, a block at a time.
    """
    rules = {type(None): kept_by_base, ReftConfig: kept_by_reft, LoraConfig: kept_by_lora}
    block, once = rules[type(adapter)](config, adapter, run)
    layers = config.num_hidden_layers
    if not checkpointing:
        return layers * block + once, layers * block + once
    inputs = 0
    if adapter is None:
        inputs = layers * run.batch * run.tokens * config.hidden_size * run.dtype.itemsize + 8 * run.tokens
    return inputs + once, inputs + once + block


def state_bytes(parameters: int, dtype: torch.dtype) -> int:
    """Parameters, gradients and the two averages of Adam, all in one dtype."""
    return 4 * parameters * dtype.itemsize


def base_bytes(config: LlamaConfig, dtype: torch.dtype = torch.bfloat16, scales: bool = True) -> int:
    """An NF4 base: the blocks' projections in half a byte a weight, and the rest in `dtype`.

    Beside each projection, and no parameters: a float32 scale for 64 weights, and a code book of 16 numbers.
    """
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    blocks = [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]
    packed = sum(linear.weight.numel() for linear in blocks)
    parameters = packed // 2 + (model.num_parameters() - packed) * dtype.itemsize
    return parameters + scales * 4 * (packed // 64 + len(blocks) * 16)


def trainable(config: LlamaConfig, adapter: PeftConfig) -> int:
    return on_meta(config, adapter).get_nb_trainable_parameters()[0]  # type: ignore[operator]


# Tables


def size(number: int) -> str:
    return f"{number / 1e9:,.2f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"


def print_table(head: list[str], rows: Iterable[list[str]]) -> None:
    for row in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(row)} |")
    print()


def print_measured() -> None:
    """Formula and measurement side by side, for the largest of the small shapes."""
    config, batch, tokens, prompt = SMALL[-1], 2, 128, 64
    shape = f"hidden size {config.hidden_size}, {config.num_hidden_layers} layers, {batch} x {tokens} tokens"
    print(f"Measured: {shape}, NF4, float32. Adapters: what they add to the frozen base.\n")
    rows = []
    frozen: dict[bool, tuple[int, int]] = {}
    for name, setting in {"the frozen base": lambda: None, **SETTINGS}.items():
        for lengths in (False, True) if name.startswith("ReFT") and "all" not in name else (False,):
            run = Run(batch, tokens, lengths, torch.float32)
            row = [name + (", with prompt_lengths" if lengths else "")]
            for checkpointing in (False, True):
                model = adapted(in_4bit(config), setting())
                if checkpointing:
                    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
                inputs = make_batch(config, batch, tokens, prompt, lengths)
                alive_in_step(model, inputs)
                model.zero_grad()
                between, peak = alive_in_step(model, inputs)
                base = frozen.setdefault(checkpointing, (between, peak)) if setting() is not None else (4, 0)
                frozen.setdefault(checkpointing, (between, peak))
                computed = kept(config, setting(), run, checkpointing)[0]
                row += [f"{between - base[0]:,}", f"{computed:,}", f"{peak - base[1]:,}"]
            rows.append(row)
    columns = ["kept", "computed", "peak"]
    print_table(["bytes", *columns, *(f"{name}, checkpointing" for name in columns)], rows)


def print_computed(config: LlamaConfig, batch: int, tokens: int) -> None:
    rows = []
    for name, setting in SETTINGS.items():
        count = trainable(config, setting())
        states = [size(state_bytes(count, dtype)) for dtype in (torch.float32, torch.bfloat16)]
        rows.append([name, f"{count:,}", *states, size(4 * count)])
    head = ["", "trained parameters", "with gradients and Adam", "the same in bfloat16", "file"]
    print_table(head, rows)

    rows = []
    for name, setting in {"the frozen base": lambda: None, **SETTINGS}.items():
        adapter = setting()
        variants = {"": Run(batch, tokens, False)}
        if isinstance(adapter, ReftConfig) and adapter.positions != "all":
            variants = {", labels alone": Run(batch, tokens, False), ", `prompt_lengths`": Run(batch, tokens, True)}
        if isinstance(adapter, LoraConfig):
            variants = {
                ", float32": Run(batch, tokens, False),
                ", bfloat16": Run(batch, tokens, False, parameters=torch.bfloat16),
            }
        for variant, run in variants.items():
            found = [kept(config, adapter, run, checkpointing)[1] for checkpointing in (False, True)]
            rows.append([name + variant, *map(size, found)])
    print_table(["", "kept for the backward pass", "with gradient checkpointing"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=2048, help="more than the positions name")
    args = parser.parse_args()
    print(f"{platform.machine()} CPU, torch {torch.__version__}, transformers {transformers.__version__}\n")
    print_measured()
    for name, config in LARGE.items():
        where = f"{args.batch} x {args.tokens:,} tokens, hidden states in bfloat16"
        print(f"Computed: {name}, {where}. The base in NF4: {size(base_bytes(config))}.\n")
        print_computed(config, args.batch, args.tokens)


if __name__ == "__main__":
    main()
