"""What the tests run in processes of their own: `HF_ENDPOINT` is read when `huggingface_hub` is imported.

`python client.py FOLDER STEP ...` runs some steps and writes what each saw to FOLDER/STEP.json; FOLDER outlives the
process, its `HF_HOME` does not.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

BASE, ADAPTER, FOLDER = "user/tiny-base", "user/adapter", "user/adapter-folder"
ON_LORA = "user/on-lora"
SFT_ADAPTER, COMPLETED = "user/sft-adapter", "user/sft-adapter-completed"
PROMPTS = ["what is the sum of two and three ?", "name a colour"]
ANSWERS = ["it is five .", "blue ."]


def sha256s(folder: str | Path) -> dict[str, str]:
    """The sha256 of every file under a folder, by its path in it."""
    files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def error_chain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[list[Any]]:
    """The error that a call raises and those behind it, outermost first: name, names of its bases, status, text."""
    chain = []
    try:
        function(*args, **kwargs)
    except Exception as raised:
        error: BaseException | None = raised
        while error is not None:
            status = getattr(getattr(error, "response", None), "status_code", None)
            chain.append([type(error).__name__, [base.__name__ for base in type(error).__mro__], status, str(error)])
            error = error.__cause__ or error.__context__
    return chain


def reft_config() -> Any:
    from peft_reft import ReftConfig

    return ReftConfig(task_type="CAUSAL_LM", r=4, positions="f2+l2")


def logits(model: Any, tokenizer: Any) -> dict[str, Any]:
    """The model's logits on padded prompts, as a hash (equal only bit for bit), and their sum for a person to read."""
    import torch

    model.eval()
    with torch.no_grad():
        values = model(**tokenizer(PROMPTS, return_tensors="pt", padding=True)).logits.float().contiguous()
    return {"sha256": hashlib.sha256(values.numpy().tobytes()).hexdigest(), "sum": values.double().abs().sum().item()}


def push_base() -> None:
    """A random Llama of two layers and its word-level tokenizer, pushed as a user pushes a model."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", "<eos>", *sorted({word for text in PROMPTS + ANSWERS for word in text.split()})]
    words_to_ids = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(words_to_ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).push_to_hub(BASE)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).push_to_hub(BASE)


def push_adapter(folder: Path) -> dict[str, Any]:
    import torch
    from huggingface_hub import HfApi
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    push_base()
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), reft_config())
    texts = [f"{prompt} {answer}" for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    batch["labels"][:, :3] = -100  # a prompt of three tokens, for the suffix edits to end at
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):  # so that the adapter is not the one that a fresh config would draw
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.push_to_hub(ADAPTER)
    model.save_pretrained(folder / "adapter")
    HfApi().create_repo(FOLDER)
    HfApi().upload_folder(repo_id=FOLDER, folder_path=folder / "adapter")
    seen = {"logits": logits(model, tokenizer), "files": sha256s(folder / "adapter")}
    with model.disable_adapter():
        seen["base_logits"] = logits(model, tokenizer)
    return seen


def load_adapter(folder: Path) -> dict[str, Any]:
    from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import peft_reft  # noqa: F401  (importing it registers the method with PEFT)

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    base = AutoModelForCausalLM.from_pretrained(BASE)
    missing = error_chain(PeftModel.from_pretrained, base, "user/nothing-here")
    peft = PeftModel.from_pretrained(base, ADAPTER)
    auto = AutoPeftModelForCausalLM.from_pretrained(ADAPTER)
    return {
        "peft_model": logits(peft, tokenizer),
        "auto_peft_model": logits(auto, tokenizer),
        "base_model": PeftConfig.from_pretrained(ADAPTER).base_model_name_or_path,
        "missing": missing,
    }


def push_on_lora(folder: Path) -> dict[str, Any]:
    """A ReFT adapter on a model with LoRA, and both pushed in one call."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    lora = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), config)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    seen = {"lora_logits": logits(lora, tokenizer)}
    config = reft_config()
    config.init_weights = False
    model = get_peft_model(lora, config)
    model.push_to_hub(ON_LORA)
    return seen | {"logits": logits(model, tokenizer)}


def load_on_lora(folder: Path) -> dict[str, Any]:
    """The lines of the card, and LoRA alone."""
    import re

    from huggingface_hub import hf_hub_download
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), ON_LORA, subfolder="lora-default")
    seen = {"lora_logits": logits(lora, tokenizer)}
    card = Path(hf_hub_download(ON_LORA, "README.md")).read_text()
    code = re.search(r"```python\n(from peft.*?)```", card, re.DOTALL)[1]  # type: ignore[index]
    names: dict[str, Any] = {}
    exec(code.replace("path or id of this repository", ON_LORA), names)
    return seen | {"logits": logits(names["model"], tokenizer)}


def train_sft(folder: Path) -> dict[str, Any]:
    """Two steps of TRL's trainer, and its own push: adapter, tokenizer, training arguments and a card of TRL's."""
    from datasets import Dataset
    from huggingface_hub import HfApi
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    rows = [{"prompt": p, "completion": f" {a}"} for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    args = SFTConfig(
        output_dir=str(folder / "sft"),
        push_to_hub=True,
        hub_model_id=SFT_ADAPTER,
        hub_strategy="end",
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=0.1,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        model_init_kwargs={"dtype": "float32"},
    )
    trainer = SFTTrainer(model=BASE, args=args, train_dataset=Dataset.from_list(rows), peft_config=reft_config())
    trainer.train()
    trainer.push_to_hub()
    HfApi().create_repo(COMPLETED)
    HfApi().upload_folder(repo_id=COMPLETED, folder_path=folder / "sft")
    trainer.model.push_to_hub(COMPLETED)
    return {"logits": logits(trainer.model, AutoTokenizer.from_pretrained(BASE)), "files": sha256s(folder / "sft")}


def load_sft(folder: Path) -> dict[str, Any]:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    import peft_reft  # noqa: F401  (importing it registers the method with PEFT)

    model = AutoPeftModelForCausalLM.from_pretrained(SFT_ADAPTER)
    seen = {"logits": logits(model, AutoTokenizer.from_pretrained(SFT_ADAPTER))}
    with model.disable_adapter():
        seen["base_logits"] = logits(model, AutoTokenizer.from_pretrained(SFT_ADAPTER))
    return seen


def download(folder: Path) -> dict[str, Any]:
    """The client alone: the adapters whole, and one file at a time, past the cache of the other way."""
    from huggingface_hub import hf_hub_download, snapshot_download

    seen: dict[str, Any] = {"one_by_one": {}}
    for repo in (ADAPTER, FOLDER, SFT_ADAPTER):
        seen[repo] = sha256s(snapshot_download(repo, cache_dir=folder / "snapshots"))
    for name in seen[FOLDER]:
        data = Path(hf_hub_download(FOLDER, name, cache_dir=folder / "single")).read_bytes()
        seen["one_by_one"][name] = hashlib.sha256(data).hexdigest()
    seen["missing_repo"] = error_chain(hf_hub_download, "user/nothing-here", "adapter_config.json")
    seen["missing_file"] = error_chain(hf_hub_download, ADAPTER, "nothing-here.json")
    seen["missing_revision"] = error_chain(hf_hub_download, ADAPTER, "adapter_config.json", revision="nothing-here")
    return seen


def wrong_token(folder: Path) -> dict[str, Any]:
    """Run with a token in HF_TOKEN that the server does not know."""
    from huggingface_hub import HfApi, hf_hub_download

    api = HfApi()
    upload = {"path_or_fileobj": b"x", "path_in_repo": "adapter_config.json", "repo_id": ADAPTER}
    return {
        "create": error_chain(api.create_repo, "user/not-mine"),
        "upload": error_chain(api.upload_file, **upload),
        "download": error_chain(hf_hub_download, ADAPTER, "adapter_config.json"),
        "no_token": error_chain(hf_hub_download, ADAPTER, "adapter_config.json", token=False),
    }


if __name__ == "__main__":
    out = Path(sys.argv[1])
    for step in sys.argv[2:]:
        if step.startswith(("push", "load", "train")):
            import torch

            torch.manual_seed(0)
            torch.set_num_threads(1)  # the tests compare bits between processes
        (out / f"{step}.json").write_text(json.dumps(globals()[step](out)))
