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
{code}
```
"""
LOAD = """
import peft_reft
from peft import {auto_class}

model = {auto_class}.from_pretrained("path or id of this repository")
"""
LOAD_BOTH = """
import peft_reft
from peft import PeftModel
from transformers import {auto_class}

model = {auto_class}.from_pretrained("{base}")
model = PeftModel.from_pretrained(model, "path or id of this repository", subfolder="{base_adapter}")
model = PeftModel.from_pretrained(model, "path or id of this repository")
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
        card.text = f"{card.text.rstrip()}\n{USE.format(heading=HEADING, code=loading_code(config).strip())}"
        card.save(path)


def loading_code(config: PeftConfig) -> str:
    """The lines that load an adapter, after those of its base model if that had some when it was trained."""
    auto_class = AUTO_CLASSES.get(config.task_type or "", "AutoPeftModel")
    base_adapters = getattr(config, "base_adapters", None)
    if not base_adapters:
        return LOAD.format(auto_class=auto_class)
    base = config.base_model_name_or_path or "name of the base model"
    return LOAD_BOTH.format(auto_class=auto_class.replace("Peft", ""), base=base, base_adapter=base_adapters[0])
