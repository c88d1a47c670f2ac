"""ReFT (representation finetuning, https://huggingface.co/papers/2404.03592) as a PEFT method.

Importing the package makes the method known to PEFT, so that `get_peft_model`, `PeftModel.from_pretrained` and
transformers' `load_adapter` take it as they take their own. An installed package is imported together with PEFT
(`autoload.py`).
"""

from .collator import DataCollatorWithPromptLengths
from .config import ReftConfig
from .model import ReftModel
from .registration import register
from .resume import last_whole_checkpoint
from .runtime.lengths import prompt_lengths
from .upstream import patch_upstream

__all__ = [
    "DataCollatorWithPromptLengths",
    "ReftConfig",
    "ReftModel",
    "last_whole_checkpoint",
    "prompt_lengths",
]
__version__ = "0.1.0"

register(ReftConfig, ReftModel)
patch_upstream()
