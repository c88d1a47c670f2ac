"""The frozen model, which is the floor, and the shapes, batches and runs that all contenders have in common.

Needs transformers alone, of any version: `peers.py` uses it in other environments.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from measure import Contender, now
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


def llama(d: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocabulary: int = 128256) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=d,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        vocab_size=vocabulary,
        pad_token_id=0,
    )


PROMPT = 32


@dataclass(frozen=True)
class Size:
    """A model, and what it is given.

    Attributes:
        config (`LlamaConfig`): its shape.
        batch, tokens (`int`): the batch that it is trained on; half of each row is prompt.
        new_tokens (`int`): how many are decoded after prompts of `PROMPT`.
        adapters (`int`): the most adapters, and rows, of a mixed batch.
    """

    config: LlamaConfig
    batch: int
    tokens: int
    new_tokens: int = 24
    adapters: int = 64


SIZES = {
    "tiny": Size(llama(64, 3, 4, 2, 96, 96), 2, 16, 3, 4),
    "small": Size(llama(256, 8, 4, 4, 704, 1024), 8, 128),
    "medium": Size(llama(512, 12, 8, 8, 1408, 2048), 2, 256),
    "large": Size(llama(1024, 8, 16, 8, 2816, 4096), 1, 256),
    "llama-2-7b": Size(llama(4096, 32, 32, 32, 11008, 32000), 2, 512),
    "llama-3-8b": Size(llama(4096, 32, 32, 8, 14336), 1, 2048),
}


# Inputs


def random_ids(config: LlamaConfig, batch: int, tokens: int) -> torch.Tensor:
    return torch.randint(1, config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(0))


def make_batch(config: LlamaConfig, batch: int, tokens: int, prompt: int, lengths: bool) -> dict[str, torch.Tensor]:
    """Rows of `tokens` tokens whose prompt has `prompt`, told by labels alone or by lengths besides."""
    ids = random_ids(config, batch, tokens)
    labels = ids.clone()
    labels[:, :prompt] = -100
    return {"input_ids": ids, "labels": labels} | ({"prompt_lengths": torch.full((batch,), prompt)} if lengths else {})


def on(device: torch.device, inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in inputs.items()}


def training_inputs(size: Size, device: torch.device, lengths: bool = False) -> dict[str, Any]:
    """What a trainer passes to a model: a batch with its attention mask, and no cache."""
    batch = make_batch(size.config, size.batch, size.tokens, size.tokens // 2, lengths)
    return on(device, batch | {"attention_mask": torch.ones_like(batch["input_ids"]), "use_cache": False})


def prompts(size: Size, device: torch.device) -> dict[str, Any]:
    """What `generate` is given: prompts without padding."""
    ids = random_ids(size.config, size.batch, size.tokens)
    return on(device, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


# Models


CPU = torch.device("cpu")


def make_base(config: LlamaConfig, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A model with random weights, none of which is trained."""
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    config.eos_token_id = None  # so that all generate as many tokens
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with device:
            return LlamaForCausalLM(config).requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(before)


def in_nf4(base: nn.Module) -> Any:
    """The model with the linear layers of its blocks quantized by bitsandbytes, in place."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, module in list(base.model.named_modules()):
        if isinstance(module, nn.Linear):
            weight = module.weight.data
            sizes = module.in_features, module.out_features
            quantized = Linear4bit(*sizes, bias=False, compute_dtype=weight.dtype, quant_type="nf4", device="meta")
            quantized.weight = Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4")
            base.model.set_submodule(name, quantized.to(weight.device))
    base.is_loaded_in_4bit = True  # which PEFT asks for
    return base


def same_weights(base: nn.Module) -> Any:
    """A copy of a model that shares its weights and buffers."""
    shared = [*base.parameters(), *base.buffers()]
    return copy.deepcopy(base, {id(tensor): tensor for tensor in shared})


def add_bias(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    return output + module.bias_of_floor


def make_floor(base: nn.Module, lowest: int = 0) -> Any:
    """The frozen model with the least that can be trained: a scalar, added to what the lowest edited block puts out.

    So its backward pass goes through activations down to that block, and through nothing else.
    """
    model = same_weights(base)
    block = model.model.layers[lowest]
    like = next(block.parameters())
    dtype = like.dtype if like.is_floating_point() else torch.float32
    block.register_parameter("bias_of_floor", nn.Parameter(torch.zeros((), device=like.device, dtype=dtype)))
    block.register_forward_hook(add_bias)
    return model


# Runs


class TrainingStep(Contender):
    """Forward and backward. Off the clock the parameters move a little, so that nothing is kept from step to step.

    The optimizer's step is not timed: it is the same for every method, but for the number of parameters.

    Args:
        name (`str`): the contender.
        model (`nn.Module`): what is trained is what requires gradients.
        forward (`Callable[[], torch.Tensor]`): gives the loss.
    """

    def __init__(self, name: str, model: nn.Module, forward: Callable[[], torch.Tensor]):
        super().__init__(name)
        self.model, self.forward = model.train(), forward
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(self.trained, lr=1e-6)

    def prepare(self) -> None:
        self.optimizer.step()
        # Not to None: gradients are the adapter's state, and no memory of the step.
        self.optimizer.zero_grad(set_to_none=False)

    def run(self) -> None:
        self.forward().backward()

    def outcome(self) -> torch.Tensor:
        """The loss."""
        return self.forward().detach()


class Stamps:
    """A streamer that notes when tokens come: the prompt, the first new token, and so on."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: torch.Tensor) -> None:  # which lie on the CPU
        self.times.append(now())

    def end(self) -> None:
        pass


class Generating(Contender):
    """Greedy decoding: the whole of it, the time to the first token, and that of all tokens after the first.

    Args:
        name (`str`): the contender.
        generate (`Callable`): a model's `generate`, or what takes the same arguments.
        inputs (`dict`): the prompts, and what else it is given.
        new_tokens (`int`): how many each row gets.
    """

    def __init__(self, name: str, generate: Callable[..., torch.Tensor], inputs: dict[str, Any], new_tokens: int):
        batch = len(inputs["input_ids"])
        measures = {"total": batch * new_tokens}
        if new_tokens > 1:
            measures |= {"first token": batch, "decode": batch * (new_tokens - 1)}
        super().__init__(name, measures)
        options = {"do_sample": False, "max_new_tokens": new_tokens, "pad_token_id": 0}
        self.generate, self.inputs, self.new_tokens = generate, inputs | options, new_tokens

    @torch.no_grad()
    def run(self) -> dict[str, float]:
        stamps, began = Stamps(), now()
        self.generate(**self.inputs, streamer=stamps)
        _, first, *later = stamps.times  # of the prompt, and of each token
        assert len(later) == self.new_tokens - 1, f"{self.name} made {len(later) + 1} tokens, not {self.new_tokens}"
        return {"first token": first - began, "decode": (later or [first])[-1] - first}

    @torch.no_grad()
    def outcome(self) -> torch.Tensor:
        """The logits of the first token."""
        options = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
        return self.generate(**self.inputs | options).logits[0]  # type: ignore[attr-defined]


def check_edits(contenders: list[Contender], unedited: int) -> None:
    """Raise a RuntimeError unless each contender computes something else than the floor.

    Args:
        contenders (`list[Contender]`): the floor and what is compared with it.
        unedited (`int`): how many of the first are the floor.
    """
    floor = contenders[0].outcome()
    for index, contender in enumerate(contenders):
        if torch.equal(contender.outcome(), floor) != (index < unedited):
            does = "differs from" if index < unedited else "edits nothing: it computes the same as"
            raise RuntimeError(f"{contender.name} {does} the floor.")
