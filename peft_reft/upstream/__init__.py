"""Patches of other libraries, each with the reason why it is there."""

from ..quantized import keep_unpacked
from . import peft, trainer, transformers
from .patch import NOT_REPORTED, Patch, patch_class

PATCHES = (
    *peft.PATCHES,
    *peft.OF_REFT_MODELS,
    *transformers.PATCHES,
    trainer.INIT,
    *trainer.OF_TRAINERS,
    Patch(
        "bitsandbytes.nn.Linear4bit",
        "support_avx512bf16_for_cpu",
        keep_unpacked,
        why="bitsandbytes packs 4-bit weights on some CPUs for a kernel that passes no gradient",
        issue=NOT_REPORTED,
        scope="model",
    ),
)


def patch_upstream() -> None:
    """Apply the patches of classes, once. Those of objects are applied when a model or a trainer is made."""
    for patch in (*peft.PATCHES, *transformers.PATCHES):
        if patch.scope == "class":
            patch_class(patch)
    trainer.patch_trainer()


def active_patches() -> list[Patch]:
    """Return the patches that the installed versions need and that the user leaves in."""
    return [patch for patch in PATCHES if patch.is_due]
