"""ReFT (representation finetuning, https://huggingface.co/papers/2404.03592) as a PEFT method.

Importing the package makes the method known to PEFT, so that `get_peft_model`, `PeftModel.from_pretrained` and
transformers' `load_adapter` take it as they take their own. An installed package is imported together with PEFT
(`autoload.py`). Where PEFT is not installed, `peft_reft.edits` and `peft_reft.positions` need only torch.
"""

from typing import Any

try:
    import peft as _peft
except ModuleNotFoundError as error:
    if error.name != "peft":
        raise
    _peft = None  # type: ignore[assignment]

__all__ = [
    "DataCollatorWithPromptLengths",
    "ReftConfig",
    "ReftModel",
    "last_whole_checkpoint",
    "prompt_lengths",
]
__version__ = "0.1.0"

if _peft is None:

    def __getattr__(name: str) -> Any:
        if name in __all__:
            raise ImportError(f"peft_reft.{name} needs PEFT, which is not installed: pip install peft.")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

else:
    from .collator import DataCollatorWithPromptLengths
    from .config import ReftConfig
    from .model import ReftModel
    from .registration import register
    from .resume import last_whole_checkpoint
    from .runtime.lengths import prompt_lengths
    from .upstream import patch_upstream

    register(ReftConfig, ReftModel)
    patch_upstream()
