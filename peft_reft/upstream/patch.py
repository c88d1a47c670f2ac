"""Patches of other libraries: functions that are replaced in memory, each with a reason and an end."""

import functools
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

from packaging.version import Version

from ..runtime.adapted_class import adapt_class

NO_PATCHES = "PEFT_REFT_NO_PATCHES"  # an environment variable; "1" leaves the patches out
NOT_REPORTED = "not reported yet"

_warned: set[str] = set()  # the patches whose function has been found to have changed


@dataclass(frozen=True)
class Patch:
    """A function of another library that is replaced in memory.

    Args:
        owner (`str`): the full name of the class or module that has the function.
        name (`str`): the name of the function.
        replacement (`Callable`): what runs instead. It gets the function before the arguments of the function.
        why (`str`): what the function does without the patch.
        issue (`str`): the link to an issue of the library, or `NOT_REPORTED`.
        parameters (`tuple[str, ...]`): the first parameters of the function after self, which `replacement` relies on.
        fixed_in (`str`, *optional*): the version of the library from which on the patch is not needed.
        scope (`str`): "class" for all calls. "object" for those objects only that have a ReFT adapter.
            "model" for what `replacement` itself changes in each adapted model, which `NO_PATCHES` does not leave out.
    """

    owner: str
    name: str
    replacement: Callable[..., Any]
    why: str
    issue: str
    parameters: tuple[str, ...] = ()
    fixed_in: str | None = None
    scope: Literal["class", "object", "model"] = "class"

    @property
    def target(self) -> str:
        return f"{self.owner}.{self.name}"

    @property
    def is_due(self) -> bool:
        """Whether the installed version of the library needs the patch, and the user leaves it in."""
        if self.scope != "model" and os.environ.get(NO_PATCHES) == "1":
            return False
        return self.fixed_in is None or Version(version(self.owner.partition(".")[0])) < Version(self.fixed_in)

    def find_owner(self) -> Any:
        """Return the class or module, which must be imported."""
        module, _, name = self.owner.rpartition(".")
        return getattr(sys.modules[module], name)


def patch_class(patch: Patch) -> None:
    """Replace a method for all objects of its class, or a function of a module; once."""
    owner = patch.find_owner()
    static = inspect.getattr_static(owner, patch.name, None)
    method: Any = static.__func__ if isinstance(static, classmethod) else static
    if not patch.is_due or "patched_by_reft" in getattr(method, "__dict__", {}) or not check_function(patch, method):
        return

    @functools.wraps(method)
    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        return patch.replacement(method, self, *args, **kwargs)

    vars(patched)["patched_by_reft"] = True
    setattr(owner, patch.name, classmethod(patched) if isinstance(static, classmethod) else patched)


def patch_object(owner: Any, patches: Iterable[Patch]) -> None:
    """Replace methods of one object, by a subclass of its class that has the same name.

    Other objects of its class keep theirs.
    """
    due = [patch for patch in patches if patch.is_due]
    known = [patch for patch in due if check_function(patch, getattr(patch.find_owner(), patch.name, None))]
    if known:
        adapt_class(owner, {patch.name: functools.partial(run_replacement, patch.replacement) for patch in known})


def run_replacement(
    replacement: Callable[..., Any],
    owner: Any,
    method: Callable[..., Any],
    args: tuple,
    kwargs: dict[str, Any],
    is_own: bool,
) -> Any:
    """Run a replacement for a method of an adapted class."""
    return replacement(method, owner, *args, **kwargs)


def check_function(patch: Patch, function: Callable[..., Any] | None) -> bool:
    """Warn, once for each patch, if a function is not the one that the patch was made for.

    Returns:
        `bool`: whether there is a function to replace.
    """
    found = None if function is None else tuple(inspect.signature(function).parameters)[1:]
    is_as_before = found is not None and found[: len(patch.parameters)] == patch.parameters
    if not is_as_before and patch.target not in _warned:
        _warned.add(patch.target)
        changed = "does not exist" if found is None else f"has the parameters {', '.join(found)}"
        warnings.warn(
            f"peft_reft patches {patch.target}, which {changed} in the installed version. The first should be "
            f"{', '.join(patch.parameters) or 'self'}. Please report it with the output of `peft-reft env`. The patch "
            f"is there because {patch.why}.",
            stacklevel=3,
        )
    return function is not None
