"""The class of an adapted model: a subclass of its own, whose `forward` and `generate` run inside something else.

`model(...)`, `model.forward(...)` and what other packages put on a model as its `forward` all run inside it. Python
binds a method of a class to the module it is called on: a copy of a model or a replica runs its own.
"""

import copyreg
import functools
import weakref
from collections.abc import Callable, Mapping
from types import MethodType, new_class
from typing import Any

from torch import nn

# Runs a method, as a function that takes the module first, with its other arguments (args, kwargs). The last argument
# is False for a method that was put on the module and True for that of its class.
Run = Callable[[Any, Callable[..., Any], tuple, dict[str, Any], bool], Any]

_put_on: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()  # function that runs another -> the other


def adapt_class(module: Any, runs: Mapping[str, Run]) -> None:
    """Change the class of a module to one whose methods are run by other functions; once.

    Args:
        module (`nn.Module`): the module, or another object (a trainer).
        runs (`Mapping[str, Callable]`): the function that runs each method, by the method's name.
    """
    if hasattr(type(module), "_reft_base"):
        return
    module.__class__ = adapted_class(type(module), runs)
    for name in runs:
        if name in vars(module):
            setattr(module, name, vars(module)[name])


def restore_class(module: nn.Module) -> None:
    """Undo `adapt_class`. A module whose class was changed again since (by FSDP2) keeps it."""
    base = vars(type(module)).get("_reft_base")
    if base is None:
        return
    module.__class__ = base
    for name, method in list(vars(module).items()):
        function = getattr(method, "__func__", None)
        if isinstance(method, PutOn):
            vars(module)[name] = method.args[-1]
        elif function in _put_on:
            vars(module)[name] = MethodType(_put_on[function], module)


def adapted_class(base: Any, runs: Mapping[str, Run]) -> Any:
    """Return the subclass of a class for its adapted modules. It has the same name."""
    known = next((subclass for subclass in base.__subclasses__() if vars(subclass).get("_reft_base") is base), None)
    if known is not None:
        return known
    runs = {name: run for name, run in runs.items() if hasattr(base, name)}

    def __setattr__(self: Any, name: str, value: Any) -> None:
        if name not in runs:
            base.__setattr__(self, name, value)
        elif getattr(value, "__self__", None) is self and value.__func__ in (members[name], getattr(base, name)):
            vars(self).pop(name, None)  # the class's own, as who puts it back has kept it
        else:
            base.__setattr__(self, name, put_on(self, value, runs[name]))

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        reduced = base.__reduce_ex__(self, protocol)
        is_plain = isinstance(reduced, tuple) and reduced[0] is copyreg.__newobj__  # type: ignore[attr-defined]
        # By its name pickle would find the base class.
        return (make_module, (base, runs), *reduced[2:]) if is_plain and type(self) is adapted else reduced

    members = {name: own_method(base, name, run) for name, run in runs.items()}
    attributes = {name: getattr(base, name) for name in ("__doc__", "__module__", "__qualname__")}
    attributes |= {"__setattr__": __setattr__, "__reduce_ex__": __reduce_ex__, "_reft_base": base}
    adapted = new_class(base.__name__, (base,), exec_body=lambda namespace: namespace.update(attributes | members))
    return adapted


def make_module(base: Any, runs: Mapping[str, Run]) -> Any:
    """Make a module of an adapted class without initialising it, as pickle does."""
    adapted = adapted_class(base, runs)
    return adapted.__new__(adapted)


def own_method(base: Any, name: str, run: Run) -> Callable[..., Any]:
    """Return the method of an adapted class."""

    @functools.wraps(getattr(base, name))
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return run(self, getattr(base, name), args, kwargs, True)

    return method


class PutOn(functools.partial):
    """A callable that was put on a module and that knows it itself, if any."""


def put_on(module: nn.Module, method: Callable[..., Any], run: Run) -> Callable[..., Any]:
    """Return what to put on a module in place of a method, so that `run` runs the method."""
    if getattr(method, "__self__", None) is not module:
        if isinstance(method, PutOn):
            return method
        return functools.update_wrapper(PutOn(run_put_on, run, module, method), method)
    function = method.__func__  # type: ignore[attr-defined]
    if function in _put_on:
        return method

    @functools.wraps(function)
    def method_of(self: Any, *args: Any, **kwargs: Any) -> Any:
        return run(self, function, args, kwargs, False)

    _put_on[method_of] = function
    return MethodType(method_of, module)


def run_put_on(run: Run, module: nn.Module, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Run a callable that takes no module."""
    return run(module, lambda _, *args, **kwargs: method(*args, **kwargs), args, kwargs, False)
