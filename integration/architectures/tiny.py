"""Tiny models of every architecture that transformers registers: each config's sizes made small, by their names."""

import re
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

KINDS: dict[str, dict[str, str]] = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "classifier": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}

VOCABULARY = 96  # ids below 64 are text; special tokens of a modality lie above
LARGEST = 20_000_000  # parameters: a config that is not made small is refused on the meta device

# Names of fields -> the most that they may be
LAYERS = (
    r"num_hidden_layers|n_layers?|num_layers|\w*(en|de)coder_layers|attention_layers|depth"
    r"|num_global_layers|conf_num_hidden_layers"
)
SIZES = {
    LAYERS: 2,
    r"mamba_n_heads|mamba_num_heads": 8,
    r"(\w+_)?num_heads|\w*attention_heads|n_heads?|linear_num_(key|value)_heads|index\w*_n_heads|num_query_groups": 4,
    r"(\w+_)?num_key_value_heads|num_kv_heads|kv_n_heads": 2,
    r"(\w+_)?head_dim|mamba_d_head|d_kv|d_head|dim_head|attention_head_size|rotary_dim": 8,
    r"(\w+_)?(hidden_size|embed_dim|embedding_size|emb_dim|emb_size|embedding_dim)(_per_layer_input|_global)?"
    r"|d_model|d_latents|n_embd|dim|word_embed_proj_dim|lru_width|projector_(in|out)put_dim|\w*output_dim"
    r"|dim_model_base|adapter_(in|out)_dim": 32,
    r"(\w+_)?(intermediate_size|ffn_hidden_size|ffn_dim|feed_forward_size)|d_ff|dff|dim_ff|d_inner|n_inner|hidden_dim"
    r"|mamba_d_ssm": 64,
    r"(\w+_)?vocab_size(_per_layer_input)?|encoder_hash_byte_group_vocab": VOCABULARY,
    r"\w*lora_rank|adapter_rank": 8,
    r"(\w*_)?num_experts|num_local_experts|n_routed_experts": 4,
    r"num_experts_per_tok(en)?|moe_k|moe_topk|moe_top_k|experts_per_token": 2,
    r"n_group|num_expert_group|topk_group": 1,
    r"(ssm_)?state_size|mamba_d_state|mamba_dt_rank|time_step_rank|(mamba_)?chunk_size": 8,
    r"image_size": 16,
    r"patch_size": 4,
    r"max_(position_embeddings|target_positions|source_positions|seq_len)|n_positions": 128,
    r"num_filters": 2,
    r"initializer_range|init_std|initializer_factor": 0.2,
}
NEEDED = ("head_dim", "num_key_value_heads", "n_routed_experts", "num_experts_per_tok", "vocab_size")  # even if None
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "decoder_start_token_id": 2}
NO_TOKENS = ("eos_token_id", "forced_eos_token_id", "forced_bos_token_id", "suppress_tokens", "begin_suppress_tokens")

# What the names do not tell
SHARED_CACHE = dict(
    num_hidden_layers=4, num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2
)
INDEXER = dict(
    hc_lowrank=8, indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=8, indexer_compress_ratio=2
)
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": dict(attn_layer_indices=[1]),
    "blt": dict(num_hidden_layers=2),
    "cohere_compass_text": dict(rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}),
    "dbrx": dict(attn_config=dict(rope_theta=10000.0, clip_qkv=8.0)),
    "dots1": dict(n_shared_experts=1),
    "dots3_note": dict(head_dim=16, per_layer_config={}),
    "dots3_note_text": dict(head_dim=16, per_layer_config={}),
    "encoder-decoder": dict(
        encoder=dict(model_type="bert"), decoder=dict(model_type="bert", is_decoder=True, add_cross_attention=True)
    ),
    "gemma3n_text": SHARED_CACHE,
    "gemma4_text": SHARED_CACHE,
    "gemma4_unified_text": SHARED_CACHE,
    "granitemoehybrid": dict(layer_types=["linear_attention", "full_attention"]),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "layoutlmv3": dict(visual_embed=False, coordinate_size=6, shape_size=4),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "lilt": dict(hidden_size=48),
    "longcat_flash": dict(qk_head_dim=16),
    "mamba2": dict(num_heads=8),
    "mistral4": dict(head_dim=16),
    "mobilebert": dict(intra_bottleneck_size=32, true_hidden_size=32),
    "musicgen": dict(num_codebooks=1),
    "musicgen_melody": dict(num_codebooks=1),
    "qwen3_asr": dict(eos_token_id=[90]),
    "qwen4_exp": INDEXER,
    "qwen4_exp_text": INDEXER,
    "recurrent_gemma": dict(block_types=["recurrent", "attention"]),
    "reformer": dict(is_decoder=True, axial_pos_embds_dim=[16, 16], axial_pos_shape=[8, 16]),
    "xlstm": dict(hidden_size=64, embedding_dim=64, qk_dim_factor=1.0),
    "xmod": dict(default_language="en_XX"),
    "zamba": dict(
        attention_head_dim=16,
        attention_hidden_size=64,
        num_hidden_layers=4,
        layers_block_type=["linear_attention", "hybrid"] * 2,
    ),
    "zamba2": dict(attention_head_dim=16, attention_hidden_size=64),
}
CANNOT_RUN_ALONE = {
    "gemma4_assistant": "drafts from the cache of another model, and has no forward without it",
    "gemma4_unified_assistant": "drafts from the cache of another model, and has no forward without it",
    "voxtral_realtime": "reads a sound with every token, and has no forward without it",
}
FAILS_WITHOUT_REFT = {"xlstm": "as without ReFT, the mode that generates cannot be trained"}


def tiny_values(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a config that are to be small, and what they become."""
    given = config.to_dict()
    values: dict[str, Any] = {}
    special = iter(range(VOCABULARY - 1, 63, -1))
    for name, value in given.items():
        part = vars(config).get(name)
        if isinstance(part, PreTrainedConfig):
            values[name] = {"model_type": part.model_type} | tiny_values(part)
        elif isinstance(value, bool):
            continue
        elif isinstance(value, float) and "drop" in name:
            values[name] = 0.0
        elif name in NO_TOKENS:
            values[name] = None
        elif name in TOKENS:
            values[name] = TOKENS[name]
        elif name.endswith(("_token_id", "_token_index", "_tok_id", "_index_id")) and isinstance(value, int):
            values[name] = next(special)
        elif isinstance(value, int | float) or (value is None and name in NEEDED):
            size = next((size for rule, size in SIZES.items() if re.fullmatch(rule, name)), None)
            if size is not None:
                values[name] = size if value is None or name.startswith("init") else min(value, size)
    heads, kv_heads = given.get("num_attention_heads"), given.get("num_key_value_heads")
    if "num_key_value_heads" in values and heads == kv_heads:
        values["num_key_value_heads"] = values.get("num_attention_heads", heads)
    kinds = {n: list(dict.fromkeys(v)) for n, v in given.items() if is_kinds_of_layers(n, v)}
    depth = next((n for n in values if re.fullmatch(LAYERS, n)), None)
    if kinds and depth is not None:  # a layer of each kind
        values[depth] = max(2, *map(len, kinds.values()))
        values |= {n: (distinct * values[depth])[: values[depth]] for n, distinct in kinds.items()}
    return values


def is_kinds_of_layers(name: str, value: Any) -> bool:
    return isinstance(value, list | tuple) and "layer" in name and len(value) > 1 and isinstance(value[0], str)


def make_model(kind: str, model_type: str) -> PreTrainedModel:
    """A tiny model with drawn weights, in eval mode.

    Raises:
        ValueError: if it would not be tiny.
    """
    name = KINDS[kind][model_type]
    model_class = getattr(transformers, name if isinstance(name, str) else name[0])
    config_class = type(AutoConfig.for_model(model_type)) if model_type not in OVERRIDES else None
    if config_class is None or not issubclass(config_class, model_class.config_class):
        config_class = model_class.config_class
    overrides = OVERRIDES.get(model_type, {})
    values = tiny_values(
        config_class(**{k: v for k, v in overrides.items() if isinstance(v, dict) and "model_type" in v})
    )
    for key, value in overrides.items():
        values[key] = values[key] | value if isinstance(value, dict) and isinstance(values.get(key), dict) else value
    if kind == "classifier":
        values |= dict(num_labels=3, eos_token_id=3)  # some read the hidden state of the last such token
    if config_class().is_encoder_decoder:
        values["decoder_start_token_id"] = TOKENS["decoder_start_token_id"]
    config = config_class(**values)
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters")
    torch.manual_seed(0)
    return model_class(config).eval()
