"""The model card of an adapter: what a reader must install to load it, and how it is used."""

import re
from pathlib import Path

from huggingface_hub import ModelCard
from peft import PeftConfig

HEADING = "## How to use this ReFT adapter"
USE = """{heading}

The adapter edits hidden states of its base model ([ReFT](https://huggingface.co/papers/2404.03592)). PEFT and
transformers load it where the package `peft_reft` is installed:

```
pip install peft_reft
```

```python
{load}
tokenizer = AutoTokenizer.from_pretrained("{base}")
{call}
```

"""
LOAD = """from peft import {auto_class}
from transformers import AutoTokenizer

model = {auto_class}.from_pretrained("path or id of this repository")"""
LOAD_BOTH = """from peft import PeftModel
from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained("{base}")
model = PeftModel.from_pretrained(model, "path or id of this repository", subfolder="{base_adapter}")
model = PeftModel.from_pretrained(model, "path or id of this repository")"""
GENERATE = """inputs = tokenizer("What is the capital of Italy?", return_tensors="pt")  # or apply_chat_template
tokens = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))"""
FORWARD = """outputs = model(**tokenizer("An example.", return_tensors="pt"))"""
AUTO_CLASSES = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}


def add_usage_section(folder: str | Path, config: PeftConfig) -> None:
    """Add to the model card in a folder, if there is one, how the adapter is used: before all other sections."""
    path = Path(folder) / "README.md"
    if not path.exists():
        return
    card = ModelCard.load(path)
    if HEADING not in card.text:
        base = config.base_model_name_or_path or "the base model"
        call = GENERATE if config.task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM") else FORWARD
        section = USE.format(heading=HEADING, load=loading_code(config, base), base=base, call=call)
        first = re.search(r"^## ", card.text, re.MULTILINE)
        start = first.start() if first else len(card.text)
        card.text = f"{card.text[:start].rstrip()}\n\n{section}{card.text[start:]}"
        card.save(path)


def loading_code(config: PeftConfig, base: str) -> str:
    """Return the lines that load an adapter, and before it the adapters of its base model."""
    auto_class = AUTO_CLASSES.get(config.task_type or "", "AutoPeftModel")
    base_adapters = getattr(config, "base_adapters", None)
    if not base_adapters:
        return LOAD.format(auto_class=auto_class)
    auto_class = auto_class.replace("Peft", "").removesuffix("ForFeatureExtraction")
    return LOAD_BOTH.format(auto_class=auto_class, base=base, base_adapter=base_adapters[0])
