"""Tiny models in each quantization that transformers loads and a CPU can run: quantized here, by the real packages.

`QUANTIZATIONS` has a function for each. It is given the folder of a base model and one to write to, and returns a
function that loads the quantized model. It imports what it needs, which may not be installed.
"""

import json
from functools import partial

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers.": "blk.",
}
TEXTS = ["red green blue one two three cat dog fox and the say twice please of " * 4] * 4  # to calibrate with


def loading(folder, config=None, **options):
    options = options if config is None else options | {"quantization_config": config()}
    return lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def write_config(base, folder, quantization):
    config = read_config(base) | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))


def torchao(base, folder, name, **options):
    import torchao.quantization as ao
    from transformers import TorchAoConfig

    return loading(base, lambda: TorchAoConfig(getattr(ao, name)(**options)))


def hqq(base, folder, bits):
    """By its own function: transformers 5.23 says that its loader for it is not available yet."""
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel

    def load():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        config = BaseQuantizeConfig(nbits=bits, group_size=64)
        AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=torch.float32, device="cpu")
        return model

    return load


def quanto(base, folder, weights):
    import optimum.quanto  # noqa: F401
    from transformers import QuantoConfig

    return loading(base, lambda: QuantoConfig(weights=weights))


def compressed_tensors(base, folder, scheme, dequantize=False):
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams
    from transformers import CompressedTensorsConfig

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    groups = {"group_0": preset_name_to_scheme(scheme, ["Linear"])}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            weights = module.quantization_scheme.weights
            groups = module.weight.unflatten(1, (-1, weights.group_size or module.in_features))
            if module.weight_scale.numel() == 1:
                groups = module.weight.reshape(1, 1, -1)
            scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), weights)
            module.weight_scale.data.copy_(scale)
            if hasattr(module, "weight_zero_point"):
                module.weight_zero_point.data.copy_(zero_point)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    return loading(folder, (lambda: CompressedTensorsConfig(dequantize=True)) if dequantize else None)


def gptqmodel(base, folder, method, bits):
    """With its kernels that have a gradient: those that it chooses by itself on a CPU may be for inference alone."""
    from gptqmodel import GPTQModel, QuantizeConfig
    from transformers import AwqConfig, GPTQConfig

    config = QuantizeConfig(bits=bits, group_size=64, method=method, format="gemm" if method == "awq" else "gptq")
    model = GPTQModel.load(str(base), config, device="cpu")
    model.quantize(TEXTS, batch_size=1)
    model.save(str(folder))
    if method == "awq":
        return loading(folder, lambda: AwqConfig(bits=bits, group_size=64, backend="torch_awq"))
    return loading(folder, lambda: GPTQConfig(bits=bits, group_size=64, backend="gptq_torch"))


def auto_round(base, folder):
    from auto_round import AutoRound

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    how = dict(scheme="W4A16", iters=0, disable_opt_rtn=True, device_map="cpu")
    AutoRound(model, tokenizer, **how).quantize_and_save(str(folder), format="auto_round")
    (made,) = folder.glob("*-w4g128")
    return loading(made)


def aqlm(base, folder):
    """Codes drawn at random: its package has layers for CPUs, what finds the codes of given weights is for GPUs."""
    import aqlm  # noqa: F401
    from transformers import AqlmConfig
    from transformers.integrations import replace_with_aqlm_linear

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = AqlmConfig(linear_weights_not_to_quantize=["lm_head"])
    replace_with_aqlm_linear(model, modules_to_not_convert=["lm_head"], quantization_config=config)
    tensors = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if name.endswith("codes"):
            tensors[name] = torch.randint(-(2**15), 2**15, tensor.shape, dtype=tensor.dtype, generator=generator)
        elif name.endswith("codebooks"):
            tensors[name] = torch.randn(tensor.shape, generator=generator)
        elif name.endswith("scales"):
            tensors[name] = torch.full(tensor.shape, 0.1)
    save_file({name: tensors[name] for name in model.state_dict()}, folder / "model.safetensors", {"format": "pt"})
    write_config(base, folder, config.to_dict())
    return loading(folder)


def gguf(base, folder, kind):
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = model.config
    writer = GGUFWriter(folder / "model.gguf", "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    for name, tensor in model.state_dict().items():
        for ours, theirs in GGUF_NAMES.items():
            name = name.replace(ours, theirs)
        if tensor.dim() == 1:
            writer.add_tensor(name, tensor.numpy())
        else:
            which = GGMLQuantizationType[kind]
            writer.add_tensor(name, quants.quantize(tensor.numpy(), which), raw_dtype=which)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return loading(folder, gguf_file="model.gguf")


def fine_grained_fp8(base, folder):
    """A checkpoint as DeepSeek-V3's: blocks of 128 x 128, each with an inverse scale."""
    from transformers import FineGrainedFP8Config

    tensors = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            blocks = tensor.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
            scale = blocks.abs().amax((1, 3), keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
            tensors[name] = (blocks / scale).to(torch.float8_e4m3fn).reshape(tensor.shape)
            tensors[f"{name}_scale_inv"] = scale[:, 0, :, 0].contiguous()
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    quantization = dict(quant_method="fp8", activation_scheme="dynamic", weight_block_size=[128, 128])
    write_config(base, folder, quantization)
    return loading(folder, lambda: FineGrainedFP8Config(dequantize=True))


def bitnet(base, folder, mode, linear_class="autobitlinear"):
    """Ternary weights: those of the base, rounded, online; checkpoints as Microsoft's, two bits each, offline."""
    from transformers.integrations.bitnet import pack_weights

    tensors = load_file(base / "model.safetensors")
    if mode == "offline":
        for name, tensor in list(tensors.items()):
            if name.endswith("_proj.weight"):
                scale = 1 / tensor.abs().mean().clamp(min=1e-5)
                tensors[name] = pack_weights((tensor * scale).round().clamp(-1, 1))
                inverse = linear_class == "autobitlinear"
                tensors[f"{name}_scale"] = (1 / scale if inverse else scale).reshape(1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    write_config(base, folder, dict(quant_method="bitnet", linear_class=linear_class, quantization_mode=mode))
    return loading(folder)


QUANTIZATIONS = {
    "torchao int8": partial(torchao, name="Int8WeightOnlyConfig"),
    "torchao intx, 4 bits": partial(torchao, name="IntxWeightOnlyConfig", weight_dtype=torch.int4),
    "torchao float8": partial(torchao, name="Float8WeightOnlyConfig"),
    "torchao int8, dynamic activations": partial(torchao, name="Int8DynamicActivationInt8WeightConfig"),
    "torchao intx, dynamic activations": partial(torchao, name="Int8DynamicActivationIntxWeightConfig"),
    "quanto int8": partial(quanto, weights="int8"),
    "quanto int4": partial(quanto, weights="int4"),
    "quanto int2": partial(quanto, weights="int2"),
    "quanto float8": partial(quanto, weights="float8"),
    "HQQ 8": partial(hqq, bits=8),
    "HQQ 4": partial(hqq, bits=4),
    "HQQ 2": partial(hqq, bits=2),
    "compressed-tensors W8A16": partial(compressed_tensors, scheme="W8A16"),
    "compressed-tensors W4A16": partial(compressed_tensors, scheme="W4A16"),
    "compressed-tensors W8A8": partial(compressed_tensors, scheme="W8A8"),
    "compressed-tensors FP8_DYNAMIC": partial(compressed_tensors, scheme="FP8_DYNAMIC"),
    "compressed-tensors FP8_DYNAMIC, dequantized": partial(compressed_tensors, scheme="FP8_DYNAMIC", dequantize=True),
    "GPTQ 4": partial(gptqmodel, method="gptq", bits=4),
    "GPTQ 8": partial(gptqmodel, method="gptq", bits=8),
    "AWQ 4": partial(gptqmodel, method="awq", bits=4),
    "AutoRound 4": auto_round,
    "AQLM": aqlm,
    "GGUF Q8_0": partial(gguf, kind="Q8_0"),
    "GGUF Q4_0": partial(gguf, kind="Q4_0"),
    "fine-grained FP8": fine_grained_fp8,
    "BitNet online": partial(bitnet, mode="online"),
    "BitNet offline": partial(bitnet, mode="offline"),
    "BitNet bitlinear": partial(bitnet, mode="offline", linear_class="bitlinear"),
}
