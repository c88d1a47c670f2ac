"""Continuous batching (`generate_batch`): the prompts of requests whose tokens share one row.

A manager of transformers runs the model in a thread of its own. Each forward is given tokens of several requests, some
at their prompt and some at their answer, and a cache by which the manager is found, which knows the requests.
"""

import copy
import inspect
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import ContinuousBatchingConfig

from ..positions.prompts import Prompts
from .generate import given_tokens

_managers: "weakref.WeakSet[Any]" = weakref.WeakSet()


def init_manager(method: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Return a manager that runs the adapted model in ways that ReFT can follow.

    Requests cannot share what the cache holds of prompts that begin alike: the tokens are the same, but not the edits.

    Args:
        method: transformers' own method.
        model (`PreTrainedModel`): the model.
        args, kwargs: the arguments of the method.

    Returns:
        `ContinuousBatchingManager`: the manager.

    Raises:
        ValueError: if the config asks for another way, or an older manager would be used.
    """
    given = inspect.signature(method).bind(model, *args, **kwargs)
    config = given.arguments.get("continuous_batching_config")
    if config is None:
        generation_config = given.arguments.get("generation_config") or model.generation_config
        config = getattr(generation_config, "continuous_batching_config", None) or ContinuousBatchingConfig()
    config = copy.copy(config)
    config.allow_block_sharing = False
    for option in ("use_cuda_graph", "use_async_batching"):
        if getattr(config, option) is None:  # left to transformers
            setattr(config, option, False)
    check_config(config)
    given.arguments["continuous_batching_config"] = config
    manager = method(*given.args, **given.kwargs)
    if manager not in _managers:
        if manager.batch_processor is not None:
            raise ValueError(
                "The model keeps a manager of continuous batching from before it had a ReFT adapter: call "
                "model.destroy_cached_continuous_batching_manager() first."
            )
        check_config(manager.continuous_batching_config)  # with what transformers resolved
        _managers.add(manager)
    return manager


def check_config(config: ContinuousBatchingConfig) -> None:
    """Raise a ValueError unless forwards run one after the other, in Python, and each request fills its own cache."""
    graphs = config.use_cuda_graph
    options = {
        "allow_block_sharing": config.allow_block_sharing,
        "use_cuda_graph": any(graphs) if isinstance(graphs, tuple) else graphs,
        "use_async_batching": config.use_async_batching,
        "varlen_compile_config": config.varlen_compile_config,
        "decode_compile_config": config.decode_compile_config,
    }
    for option, value in options.items():
        if value:
            raise ValueError(
                f"{option}={value!r}: ReFT cannot follow the prompts of continuous batching where forwards are "
                "replayed, compiled or overlap, or where they share a cache. Leave it to transformers' default."
            )


@dataclass(frozen=True)
class Requests:
    """What one forward is given of each request.

    Attributes:
        prompts (`list[int]`): tokens of the prompt.
        starts (`list[int]`): tokens that have been processed.
        given (`list[int]`): tokens that the forward is given.
    """

    prompts: list[int]
    starts: list[int]
    given: list[int]

    @classmethod
    def of(cls, cache: Any) -> "Requests | None":
        """Return the requests of the forward with this cache, None if it is not a manager's cache."""
        if cache is None or hasattr(cache, "get_seq_length"):
            return None
        for manager in list(_managers):
            processor = manager.batch_processor
            if processor is not None and processor.cache is cache:
                batch = processor.inputs_and_outputs.requests_in_batch
                given = [request.query_length for request in batch]
                states = [request.state for request in batch]
                # one that was interrupted begins again with what it had generated
                prompts = [state._true_initial_tokens or len(state.initial_tokens) for state in states]
                ends = [state.position_offset for state in states]  # with this forward
                return cls(prompts, [end - n for end, n in zip(ends, given, strict=True)], given)
        return None

    def window(self, arguments: Mapping[str, Any]) -> tuple[int, int] | None:
        """Return the columns of the forward, None if no token of a prompt is among them."""
        is_over = all(start >= prompt for start, prompt in zip(self.starts, self.prompts, strict=True))
        return None if is_over else (0, given_tokens(arguments) or 0)

    def spans(self, window: tuple[int, int], batch: int, device: torch.device) -> Prompts:
        """Return the prompts in the row [1, tokens]. Its filling up to a fixed length is in no prompt."""
        given = torch.tensor(self.given)
        rank = torch.cat([torch.arange(start, start + n) for start, n in zip(self.starts, self.given, strict=True)])
        length = torch.tensor(self.prompts).repeat_interleave(given)
        fill = (0, window[1] - len(rank))
        valid = torch.nn.functional.pad(torch.ones_like(rank, dtype=torch.bool), fill, value=False)
        rank, length = (torch.nn.functional.pad(tensor, fill) for tensor in (rank, length))
        valid, rank, length = (tensor[None].to(device) for tensor in (valid, rank, length))
        return Prompts(valid, rank, length, length)
