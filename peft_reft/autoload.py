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
from importlib.machinery import ModuleSpec
from typing import Any

PEFT = "peft"
TRANSFORMERS = "transformers.integrations.peft"  # the module of transformers' own `load_adapter`
# peft_reft imports names from these packages, and a module has all its names only at the end of its import.
NEEDED = {"accelerate", "huggingface_hub", "peft", "safetensors", "torch", "transformers"}


def watch_imports() -> None:
    """Prepare the import of peft_reft at the end of the import of PEFT. Raise no error."""
    try:
        is_off = os.environ.get("PEFT_REFT_AUTOLOAD") == "0"
        if not is_off and not any(isinstance(finder, Watcher) for finder in sys.meta_path):
            watcher = Watcher()
            sys.meta_path.insert(0, watcher)
            watcher.find_spec("torch")  # the import of PEFT or transformers may have begun, as both import torch
    except Exception as error:
        warn(error)


class Watcher:
    """A finder that finds no module. Python asks it at every import, so it sees which imports have begun."""

    def __init__(self) -> None:
        self.names = {PEFT, TRANSFORMERS}

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        for name in self.names:
            if name in sys.modules:
                at_end_of_import(name)


class WatchedSpec(ModuleSpec):
    """The spec of a module whose import has begun. At its end, failed or not, Python sets `_initializing` to False."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "_initializing" and not value:
            self.__class__ = ModuleSpec  # type: ignore[assignment]
            at_end_of_import(self.name)


def at_end_of_import(name: str) -> None:
    """Act on a module that is imported, or arrange it for the end of its import. Raise no error."""
    try:
        if not is_watched_until_end(name):
            patch_load_adapter() if name == TRANSFORMERS else import_package()
    except Exception as error:
        warn(error)


def is_watched_until_end(name: str) -> bool:
    """Watch a module if its import has begun and not ended. Return whether it is so."""
    spec: Any = getattr(sys.modules.get(name), "__dict__", {}).get("__spec__")
    if type(spec) not in (ModuleSpec, WatchedSpec) or not getattr(spec, "_initializing", False):
        return False
    spec.__class__ = WatchedSpec
    return spec._initializing  # another thread may have ended the import before the line above


def import_package() -> None:
    """Import peft_reft if PEFT is imported, as soon as no module that it needs is imported in part."""
    if PEFT not in sys.modules:  # its import has failed, and may be tried again
        return
    stop_watching(PEFT)
    if any(is_watched_until_end(name) for name in list(sys.modules) if name.partition(".")[0] in NEEDED):
        return
    stop_watching(TRANSFORMERS)
    import peft_reft  # noqa: F401


def stop_watching(name: str) -> None:
    """Watch a module no longer, and take the finder away when it watches none."""
    for watcher in [finder for finder in sys.meta_path if isinstance(finder, Watcher)]:
        watcher.names = watcher.names - {name}
        if not watcher.names:
            sys.meta_path.remove(watcher)


def patch_load_adapter() -> None:
    """Let the first call of transformers' `load_adapter` import PEFT before it begins.

    The method imports PEFT itself. Without this, peft_reft would complete the method after that call has begun.
    """
    if TRANSFORMERS not in sys.modules:
        return
    stop_watching(TRANSFORMERS)
    mixin = sys.modules[TRANSFORMERS].PeftAdapterMixin
    method = mixin.load_adapter

    @functools.wraps(method)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        if mixin.load_adapter is not load_adapter:  # it has been completed
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
    """Warn that the import of peft_reft has failed."""
    try:
        warnings.warn(
            f"peft_reft is installed, but cannot be imported ({type(error).__name__}: {error}), so that ReFT adapters "
            "cannot be loaded. `import peft_reft` shows where it fails. Uninstall it or set the environment variable "
            "PEFT_REFT_AUTOLOAD=0 if you do not need it.",
            stacklevel=2,
        )
    except Warning:
        pass  # under `python -W error` it would break the import of another package
