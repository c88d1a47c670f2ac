"""Adding an adapter as a transaction: whatever fails, the model is afterwards what it was before."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedConfig

from .runtime.state import PerThread

_transactions = PerThread()  # those that are open, the outermost first, each as the snapshots that it would restore


@contextmanager
def transaction() -> Iterator[list["Snapshot"]]:
    """Restore what is remembered within the context if it ends with an error or an interrupt.

    Within another transaction it is part of that, which restores it, too, if something fails later.

    Yields:
        `list[Snapshot]`: what would be restored, from the last one to the first.
    """
    snapshots: list[Snapshot] = []
    outer = _transactions.value or ()
    _transactions.value = (*outer, snapshots)
    try:
        yield snapshots
    except BaseException:
        for snapshot in reversed(snapshots):
            snapshot.restore()
        raise
    finally:
        _transactions.value = outer


def remember(model: nn.Module, adapter_name: str | None = None) -> None:
    """Take a snapshot of a model for the open transactions, before the model is changed.

    Args:
        model (`torch.nn.Module`): the outermost module that may be changed.
        adapter_name (`str`, *optional*): an adapter whose values may be overwritten in place.
    """
    snapshot = Snapshot(model, adapter_name)
    for snapshots in _transactions.value:
        snapshots.append(snapshot)


class Snapshot:
    """What a model is made of: its modules and their attributes, hooks, configs and `requires_grad` flags.

    It refers to the parameters and copies none, but those of the adapter whose values may be overwritten.

    Args:
        model (`torch.nn.Module`): the model.
        adapter_name (`str`, *optional*): the adapter.
    """

    def __init__(self, model: nn.Module, adapter_name: str | None = None):
        modules = list(model.modules())
        objects = {id(module): module for module in modules} | {
            id(value): value
            for module in modules
            for value in vars(module).values()
            if isinstance(value, PreTrainedConfig)
        }
        values = (value for owner in objects.values() for value in vars(owner).values())
        containers = {id(value): value for value in values if isinstance(value, dict | list | set)}
        self.classes = [(module, type(module)) for module in modules]
        # The attributes of an object are a container as well. The last to be restored are those within.
        self.contents = [(c, c.copy()) for c in chain(map(vars, objects.values()), containers.values())]
        parameters = {id(p): p for module in modules for p in module._parameters.values() if p is not None}
        self.flags = [(parameter, parameter.requires_grad) for parameter in parameters.values()]
        tensors = () if adapter_name is None else tensors_of_adapter(modules, adapter_name)
        self.values = [(tensor, tensor.data, tensor.detach().clone()) for tensor in tensors]

    @torch.no_grad()
    def restore(self) -> None:
        """Make the model what it was. Objects that have not changed are not touched."""
        for module, own in self.classes:
            if type(module) is not own:
                module.__class__ = own
        for container, content in self.contents:
            if not is_same(container, content):
                container.clear()
                container.extend(content) if isinstance(container, list) else container.update(content)
        for parameter, requires_grad in self.flags:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad = requires_grad
        for tensor, data, value in self.values:
            tensor.data = data
            tensor.copy_(value)


def is_same(container: Any, content: Any) -> bool:
    """Whether a container holds the very objects that a copy of it holds, in the same order."""
    if len(container) != len(content):
        return False
    if isinstance(container, dict):
        pairs = zip(container.items(), content.items(), strict=True)
        return all(key == other_key and value is other for (key, value), (other_key, other) in pairs)
    return all(value is other for value, other in zip(container, content, strict=True))


def tensors_of_adapter(modules: list[nn.Module], adapter_name: str) -> Iterator[torch.Tensor]:
    """Yield the tensors of an adapter, and of the modules and tokens that are trained with it."""
    for module in modules:
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            for name in module.adapter_layer_names:
                parts = attrgetter(name)(module)
                if adapter_name in parts:
                    part = parts[adapter_name]
                    yield from chain(part.parameters(), part.buffers()) if isinstance(part, nn.Module) else [part]
