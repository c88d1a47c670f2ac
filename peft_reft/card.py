"""The model card of an adapter: what a reader must install and import to load it."""

from pathlib import Path

from huggingface_hub import ModelCard
from peft import PeftConfig

HEADING = "## How to load this ReFT adapter"
USE = """
{heading}

The adapter edits hidden states of its base model ([ReFT](https://huggingface.co/papers/2404.03592)). With PEFT it
needs the package `peft_reft`, whose import makes the method known to PEFT:

```
pip install peft_reft
```

```python
import peft_reft
from peft import {auto_class}

model = {auto_class}.from_pretrained("path or id of this repository")
```
"""
AUTO_CLASSES = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}


def describe_use(folder: str | Path, config: PeftConfig) -> None:
    """Add to the model card in a folder, if there is one, how the adapter is loaded."""
    path = Path(folder) / "README.md"
    if not path.exists():
        return
    card = ModelCard.load(path)
    if HEADING not in card.text:
        auto_class = AUTO_CLASSES.get(config.task_type or "", "AutoPeftModel")
        card.text = f"{card.text.rstrip()}\n{USE.format(heading=HEADING, auto_class=auto_class)}"
        card.save(path)
