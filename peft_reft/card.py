"""The model card of an adapter: what a reader must install and import to load it."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from peft import PeftModel

HEADING = "## How to load this ReFT adapter"
USE = f"""
{HEADING}

The adapter edits hidden states of its base model ([ReFT](https://huggingface.co/papers/2404.03592)). With PEFT it
needs the package `peft_reft`, whose import makes the method known to PEFT:

```
pip install peft_reft
```

```python
import peft_reft
from peft import AutoPeftModel

model = AutoPeftModel.from_pretrained("path or id of this repository")
```
"""


def describe_use(folder: str | Path) -> None:
    """Add to the model card in a folder, if there is one, how the adapter is loaded."""
    path = Path(folder) / "README.md"
    if not path.exists():
        return
    card = ModelCard.load(path)
    if HEADING not in card.text:
        card.text = f"{card.text.rstrip()}\n{USE}"
        card.save(path)


def keep_card_on_push() -> None:
    """Let `push_to_hub` of a model with a ReFT adapter push the adapter's card.

    transformers' `push_to_hub`, which PEFT uses, writes a blank card of a transformers model over the one that PEFT
    has saved. The card is completed between that and the upload; adapters of other methods are pushed as ever.
    """
    upload: Callable[..., Any] = PeftModel._upload_modified_files
    if "keeps_reft_card" in vars(upload):
        return

    @functools.wraps(upload)
    def upload_with_card(self: PeftModel, working_dir: str, *args: Any, **kwargs: Any) -> Any:
        if any(config.peft_type == "REFT" for config in self.peft_config.values()):
            self.create_or_update_model_card(working_dir)
            describe_use(working_dir)
        return upload(self, working_dir, *args, **kwargs)

    vars(upload_with_card)["keeps_reft_card"] = True
    PeftModel._upload_modified_files = upload_with_card  # type: ignore[assignment,method-assign]
