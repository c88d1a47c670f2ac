"""Methods of transformers' generation that run in another way in an adapted model.

Each function takes the model, its method, the arguments of the method, and whether the method is that of the class.
"""

from collections.abc import Callable
from typing import Any

from ..layer import adapted_modules
from . import continuous_batching
from .generate import DecoderGeneration, current_generation


def run_init_continuous_batching(
    model: Any, method: Callable[..., Any], args: tuple, kwargs: dict[str, Any], is_own: bool
) -> Any:
    """Begin continuous batching: all of it begins here (`generate_batch`, too), and runs in another thread."""
    if adapted_modules(model):
        return continuous_batching.init_manager(method, model, *args, **kwargs)
    return method(model, *args, **kwargs)


def run_generate_batch(
    model: Any, method: Callable[..., Any], args: tuple, kwargs: dict[str, Any], is_own: bool
) -> Any:
    """Run `generate_batch`, which ignores arguments that it does not know.

    Raises:
        ValueError: if an adapter for each row is asked for.
    """
    if kwargs.get("adapter_names") is not None and adapted_modules(model):
        raise ValueError("generate_batch takes no adapter_names: its rows hold several requests. Use generate.")
    return method(model, *args, **kwargs)


def run_prepare_decoder_input_ids(
    model: Any, method: Callable[..., Any], args: tuple, kwargs: dict[str, Any], is_own: bool
) -> Any:
    """Remember the prompt of a decoder: `generate` knows it only here, apart from drafts."""
    input_ids, model_kwargs = method(model, *args, **kwargs)
    generation = current_generation()
    if isinstance(generation, DecoderGeneration) and generation.model is model:
        generation.begins_with = input_ids.shape[1]
    return input_ids, model_kwargs
