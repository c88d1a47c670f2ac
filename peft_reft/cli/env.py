"""`peft-reft env`: what a bug report needs to say of an installation."""

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from .. import __version__
from ..upstream import active_patches
from ..upstream.patch import NO_PATCHES

PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes")
SCOPES = {
    "class": "Patches of all calls",
    "object": "Patches of models with a ReFT adapter and of their trainers only",
    "model": "What is changed in each adapted model",
}


def run() -> int:
    """Print the versions and the active patches.

    Returns:
        `int`: the exit status, 0.
    """
    print("\n".join(report()))
    return 0


def report() -> Iterator[str]:
    """Give the lines of the report, in Markdown."""
    for name, value in versions().items():
        yield f"- {name}: {value}"
    patches = active_patches()
    for scope, title in SCOPES.items():
        yield f"\n{title}:\n"
        own = [patch for patch in patches if patch.scope == scope]
        yield from (f"- `{patch.target}`: {patch.why} ({patch.issue})" for patch in own)
        if not own:
            yield f"- none ({NO_PATCHES}=1 leaves them out, or the installed versions do not need them)"


def versions() -> dict[str, str]:
    """Return the versions of the packages and of what they run on, by name."""
    found = {"peft_reft": __version__} | {name: installed_version(name) for name in PACKAGES}
    return found | {"Python": platform.python_version(), "platform": platform.platform(), "CUDA": cuda()}


def installed_version(name: str) -> str:
    """Return the version of a package, which is not imported."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def cuda() -> str:
    """Return the version of CUDA and the devices."""
    if not torch.cuda.is_available():
        return f"{torch.version.cuda or 'not in this build of torch'}, no device"
    devices = (torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    return f"{torch.version.cuda}, {', '.join(devices)}"
