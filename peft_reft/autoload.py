"""Import peft_reft when PEFT is imported, so that adapters load in processes that never name the package.

An installation copies this file to site-packages as the module `peft_reft_autoload`. torch calls its function at
`import torch`, by an entry point of the group `torch.backends`. The copy uses only the standard library, so torch is
imported even if the package is broken, or if the folder of an editable installation is gone.
The environment variable `PEFT_REFT_AUTOLOAD=0` switches it off.
"""

import functools
import os
import sys
import warnings
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from typing import Any

PEFT = "peft"
TRANSFORMERS = "transformers.integrations.peft"  # the module of transformers' own `load_adapter`
ACTIONS = "_reft_actions"  # the attribute of a spec with what is called at the end of the import
# peft_reft imports names from these packages, and a module has all its names only at the end of its import.
NEEDED = {"accelerate", "huggingface_hub", "peft", "safetensors", "torch", "transformers"}


def watch_imports() -> None:
    """Prepare the import of peft_reft at the end of the import of PEFT. Raise no error."""
    try:
        is_off = os.environ.get("PEFT_REFT_AUTOLOAD") == "0"
        if not is_off and not any(isinstance(finder, Watcher) for finder in sys.meta_path):
            watch(TRANSFORMERS, patch_load_adapter)
            watch(PEFT, import_package)
    except Exception as error:
        warn(error)


def watch(name: str, action: Callable[[], None]) -> None:
    """Have an action called at the end of the import of a module, failed or not. Call it now if that is over.

    The action calls `stop_watching` when it is not needed again.
    """
    watcher = next((finder for finder in sys.meta_path if isinstance(finder, Watcher)), None)
    if watcher is None:
        watcher = Watcher()
        sys.meta_path.insert(0, watcher)
    watcher.actions = {**watcher.actions, name: action}
    watcher.find_spec(name)  # the import may have begun


class Watcher:
    """A finder that finds no module. Python asks it at every import, so it sees which imports have begun."""

    def __init__(self) -> None:
        self.actions: dict[str, Callable[[], None]] = {}  # by the name of the module; replaced, never changed

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        for name, action in self.actions.items():
            if name in sys.modules:
                at_end_of_import(name, action)


class WatchedSpec(ModuleSpec):
    """The spec of a module whose import has begun. At its end, failed or not, Python sets `_initializing` to False."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "_initializing" and not value:
            self.__class__ = ModuleSpec  # type: ignore[assignment]
            for action in vars(self).pop(ACTIONS, ()):
                at_end_of_import(self.name, action)


def at_end_of_import(name: str, action: Callable[[], None]) -> None:
    """Call an action if the import of a module is over, or arrange it for the end of it. Raise no error."""
    try:
        if not is_watched_until_end(name, action):
            action()
    except Exception as error:
        warn(error)


def is_watched_until_end(name: str, action: Callable[[], None]) -> bool:
    """Watch a module if its import has begun and not ended. Return whether it is so."""
    spec: Any = getattr(sys.modules.get(name), "__dict__", {}).get("__spec__")
    # By its name, since peft_reft has one such class and the copy of this file has another.
    if type(spec) is not ModuleSpec and type(spec).__name__ != WatchedSpec.__name__:
        return False
    if not getattr(spec, "_initializing", False):
        return False
    actions = vars(spec).setdefault(ACTIONS, [])
    if action not in actions:
        actions.append(action)
    if type(spec) is ModuleSpec:
        spec.__class__ = WatchedSpec
    return spec._initializing  # another thread may have ended the import before the line above


def import_package() -> None:
    """Import peft_reft if PEFT is imported, as soon as no module that it needs is imported in part."""
    if PEFT not in sys.modules:  # its import has failed, and may be tried again
        return
    stop_watching(PEFT)
    modules = [name for name in list(sys.modules) if name.partition(".")[0] in NEEDED]
    if any(is_watched_until_end(name, import_package) for name in modules):
        return
    stop_watching(TRANSFORMERS)
    import peft_reft  # noqa: F401


def stop_watching(name: str) -> None:
    """Watch a module no longer, and take the finder away when it watches none."""
    for watcher in [finder for finder in sys.meta_path if isinstance(finder, Watcher)]:
        watcher.actions = {other: action for other, action in watcher.actions.items() if other != name}
        if not watcher.actions:
            sys.meta_path.remove(watcher)


def patch_load_adapter() -> None:
    """Let the first call of transformers' `load_adapter` import PEFT before it begins.

    The method imports PEFT itself. Without this, peft_reft would patch the method after that call has begun.
    """
    if TRANSFORMERS not in sys.modules:
        return
    stop_watching(TRANSFORMERS)
    mixin = sys.modules[TRANSFORMERS].PeftAdapterMixin
    method = mixin.load_adapter

    @functools.wraps(method)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        if mixin.load_adapter is not load_adapter:  # it has been patched
            return method(self, *args, **kwargs)
        mixin.load_adapter = method
        try:
            import peft  # noqa: F401
        except ImportError:
            pass  # transformers' own error says which PEFT it needs
        return mixin.load_adapter(self, *args, **kwargs)

    if "peft_reft" not in sys.modules:
        mixin.load_adapter = load_adapter


def warn(error: Exception) -> None:
    """Warn that the import of peft_reft has failed, or what peft_reft does at the end of another import."""
    failed = "does not work fully" if "peft_reft" in sys.modules else "cannot be imported"
    try:
        warnings.warn(
            f"peft_reft is installed, but {failed} ({type(error).__name__}: {error}), so that ReFT adapters cannot be "
            "loaded or trained. `import peft_reft` shows where it fails. Uninstall it or set the environment variable "
            "PEFT_REFT_AUTOLOAD=0 if you do not need it.",
            stacklevel=2,
        )
    except Warning:
        pass  # under `python -W error` it would break the import of another package
