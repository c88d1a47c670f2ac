import warnings

import pytest
import torch
import transformers
from by_hand import make_gpt2, make_llama
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from peft_reft import ReftConfig
from peft_reft.targets import find_targets

# Blocks that were counted by hand from the model's printout: family, Auto class, name of the first, how many, width
TINY = dict(num_hidden_layers=3, hidden_size=32, intermediate_size=64, num_attention_heads=4, vocab_size=64)
FAMILIES = [
    ("llama", AutoModelForCausalLM, "model.layers.0", 3, {}),
    ("mistral", AutoModelForCausalLM, "model.layers.0", 3, {}),
    ("qwen2", AutoModelForCausalLM, "model.layers.0", 3, {}),
    ("qwen3_moe", AutoModelForCausalLM, "model.layers.0", 3, dict(num_experts=4, moe_intermediate_size=16)),
    ("mixtral", AutoModelForCausalLM, "model.layers.0", 3, dict(num_local_experts=2)),
    ("gemma3_text", AutoModelForCausalLM, "model.layers.0", 3, {}),
    ("phi", AutoModelForCausalLM, "model.layers.0", 3, {}),
    ("gpt2", AutoModelForCausalLM, "transformer.h.0", 3, dict(n_layer=3, n_embd=32, n_head=4)),
    ("gpt_neox", AutoModelForCausalLM, "gpt_neox.layers.0", 3, {}),
    ("gptj", AutoModelForCausalLM, "transformer.h.0", 3, dict(n_layer=3, n_embd=32, n_head=4, rotary_dim=8)),
    ("opt", AutoModelForCausalLM, "model.decoder.layers.0", 3, dict(ffn_dim=64, word_embed_proj_dim=32)),
    ("bloom", AutoModelForCausalLM, "transformer.h.0", 3, dict(n_layer=3, n_head=4)),
    ("falcon", AutoModelForCausalLM, "transformer.h.0", 3, {}),
    ("mpt", AutoModelForCausalLM, "transformer.blocks.0", 3, dict(d_model=32, n_heads=4, n_layers=3)),
    ("mamba", AutoModelForCausalLM, "backbone.layers.0", 3, {}),
    ("bert", AutoModel, "encoder.layer.0", 3, {}),
    ("roberta", AutoModel, "encoder.layer.0", 3, {}),
    ("electra", AutoModel, "encoder.layer.0", 3, dict(embedding_size=32)),
    ("deberta-v2", AutoModel, "encoder.layer.0", 3, {}),
    ("distilbert", AutoModel, "transformer.layer.0", 3, dict(n_layers=3, dim=32, n_heads=4, hidden_dim=64)),
    (
        "modernbert",
        AutoModel,
        "layers.0",
        3,
        dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2),
    ),
    ("vit", AutoModel, "layers.0", 3, {}),
    ("t5", AutoModelForSeq2SeqLM, "encoder.block.0", 3, dict(d_model=32, num_layers=3, num_heads=4, d_kv=8, d_ff=64)),
    (
        "bart",
        AutoModelForSeq2SeqLM,
        "model.encoder.layers.0",
        3,
        dict(d_model=32, encoder_layers=3, encoder_attention_heads=4),
    ),
]


@pytest.mark.parametrize(("family", "auto", "first", "count", "options"), FAMILIES, ids=[row[0] for row in FAMILIES])
def test_blocks_are_found_for_any_family(family, auto, first, count, options):
    with torch.device("meta"):
        model = auto.from_config(AutoConfig.for_model(family, **TINY | options))
    stem = first.removesuffix(".0")
    assert find_targets(model, ReftConfig(r=4)) == {f"{stem}.{index}": (32, 4) for index in range(count)}


def test_language_model_of_a_vision_language_model():
    text = dict(TINY, model_type="llama", num_key_value_heads=4)
    vision = dict(TINY, model_type="clip_vision_model", image_size=8, patch_size=4)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision)
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(config)
    assert list(find_targets(model, ReftConfig())) == [f"model.language_model.layers.{index}" for index in range(3)]


def test_language_model_below_a_classifier():
    """Of a classifier with two towers the one whose config is the text's is adapted."""
    text = dict(TINY, num_key_value_heads=4, head_dim=8)
    vision = dict(TINY, image_size=8, patch_size=4)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision)
    with torch.device("meta"):
        model = transformers.Gemma3ForSequenceClassification(config)
    assert list(find_targets(model, ReftConfig())) == [f"model.language_model.layers.{index}" for index in range(3)]


def test_decoder_that_is_a_head():
    """ModernBERT's causal model calls its head `decoder`."""
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
    config = AutoConfig.for_model("modernbert-decoder", **TINY | special)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert list(find_targets(model, ReftConfig())) == [f"model.layers.{index}" for index in range(3)]


SQUEEZEBERT = transformers.SqueezeBertConfig(**TINY, embedding_size=32)
REFORMER = transformers.ReformerConfig(
    hidden_size=32, axial_pos_embds_dim=[16, 16], axial_pos_shape=[8, 8], num_attention_heads=2, attention_head_size=8
)


PERCEIVER = transformers.PerceiverConfig(num_latents=8, d_latents=32, d_model=32, num_self_attends_per_block=2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: transformers.SqueezeBertModel(SQUEEZEBERT), "SqueezeBertEncoder calls their forward method itself"),
        (lambda: transformers.ReformerModel(REFORMER), "reversible"),
        (lambda: transformers.PerceiverForMaskedLM(PERCEIVER), "latents, which are no tokens"),
    ],
)
def test_blocks_that_hooks_cannot_edit(make, message):
    with torch.device("meta"):
        model = make()
    with pytest.raises(ValueError, match=f"ReFT cannot adapt {type(model).__name__}.*{message}"):
        find_targets(model, ReftConfig())


class Plain(nn.Module):
    """A model that is not of transformers."""

    def __init__(self):
        super().__init__()
        self.steps = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return x


def test_model_without_config():
    with pytest.raises(ValueError, match="'steps.0' cannot be adapted.*width of its output is not known"):
        find_targets(Plain(), ReftConfig())
    assert find_targets(Plain(), ReftConfig(r=2, target_modules=r"steps\.\d\.0")) == {
        "steps.0.0": (8, 2),
        "steps.1.0": (8, 2),
    }


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (dict(layers_to_transform=[0, 2]), ["model.layers.0", "model.layers.2"]),
        (dict(layers_to_transform=-1), ["model.layers.2"]),
        (dict(layers_to_transform=[-3, 1]), ["model.layers.0", "model.layers.1"]),
        (dict(exclude_modules=["layers.1"]), ["model.layers.0", "model.layers.2"]),
        (dict(exclude_modules=r".*\.[12]"), ["model.layers.0"]),
        (dict(target_modules=["mlp"]), [f"model.layers.{i}.mlp" for i in range(3)]),
        (dict(target_modules=["mlp"], layers_to_transform=[-1]), ["model.layers.2.mlp"]),
        (dict(target_modules=["mlp"], layers_to_transform=[1], layers_pattern="layers"), ["model.layers.1.mlp"]),
        (dict(target_modules=r".*layers\.[01]\.self_attn"), ["model.layers.0.self_attn", "model.layers.1.self_attn"]),
        (dict(target_modules=["embed_tokens"]), ["model.embed_tokens"]),
        (dict(target_modules=["model.norm"]), ["model.norm"]),
        (dict(layers_pattern="layers"), [f"model.layers.{i}" for i in range(3)]),
    ],
)
def test_choice_of_modules(options, names):
    assert list(find_targets(make_llama(), ReftConfig(**options))) == names


def test_rank_pattern():
    config = ReftConfig(r=4, rank_pattern={"layers.1": 2, r"layers\.2": 1})
    assert [r for _, r in find_targets(make_llama(), config).values()] == [4, 2, 1]


def test_widths_of_named_modules():
    targets = find_targets(make_llama(), ReftConfig(target_modules=["mlp", "up_proj", "norm"], inference_mode=True))
    assert {d for name, (d, _) in targets.items() if name.endswith("up_proj")} == {64}
    assert {d for name, (d, _) in targets.items() if name.endswith(("mlp", "norm"))} == {32}
    assert {
        d for d, _ in find_targets(make_gpt2(), ReftConfig(target_modules=["c_fc"], inference_mode=True)).values()
    } == {128}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(r=33), "r=33 is above the width.*from 1 to 32"),
        (dict(rank_pattern={"layers.1": 40}), "r=40 is above the width.*'model.layers.1'"),
        (dict(layers_to_transform=[0, 3]), r"not there: \[3\].*has 3.*from -3 to 2"),
        (dict(layers_to_transform=[-4]), r"not there: \[-4\]"),
        (dict(layers_to_transform=[2, -1]), "names a layer twice: of 3 layers, -1 is 2"),
        (dict(layers_pattern="blocks"), "layers_pattern='blocks'.*'model.layers'"),
        (
            dict(target_modules=["attention"]),
            "target_modules=.'attention'.: 'attention' matches no module of LlamaForCausalLM",
        ),
        (
            dict(target_modules="mlp"),
            r"'mlp' matches no module.*regular expression of complete names; a list, \['mlp'\], matches the ends",
        ),
        (dict(target_modules=["mlp", "nothing"]), "'nothing' matches no module"),
        (dict(target_modules=["model"]), "'model' cannot be adapted: it is a whole model"),
        (dict(target_modules=["mlp"], layers_pattern="blocks"), "layers_pattern='blocks' choose among layers"),
        (dict(target_modules=["lm_head"]), "'lm_head' cannot be adapted: it puts out logits"),
        (dict(target_modules=["layers"]), "'model.layers' cannot be adapted: it is a container"),
        (dict(target_modules=["rotary_emb"]), "'model.rotary_emb' cannot be adapted: it has no weights"),
        (dict(target_modules=["act_fn"]), "act_fn' cannot be adapted"),
        (dict(exclude_modules=["0", "1", "2"]), "exclude_modules=.* leave no module"),
        (dict(target_modules=["norm"], layers_to_transform=[0]), "layers_to_transform"),
    ],
)
def test_what_cannot_be_adapted(options, message):
    with pytest.raises(ValueError, match=message):
        find_targets(make_llama(), ReftConfig(**options))


def make_bert():
    return AutoModel.from_config(AutoConfig.for_model("bert", **TINY))


@pytest.mark.parametrize(
    ("make", "names", "inner"),
    [
        (make_llama, ["q_proj", "v_proj"], "self_attn.q_proj, self_attn.v_proj"),
        (make_llama, ["k_proj", "o_proj"], "self_attn.k_proj"),
        (make_llama, r".*\.(gate|up|down)_proj", "mlp.gate_proj, mlp.up_proj"),
        (make_gpt2, ["c_attn", "c_fc"], "attn.c_attn, mlp.c_fc"),
        (make_bert, ["dense"], "intermediate.dense"),
        (make_llama, ["o_proj", "down_proj"], None),
        (make_gpt2, ["c_proj"], None),
        (make_llama, ["self_attn", "mlp", "norm", "embed_tokens"], None),
        (make_llama, None, None),
    ],
)
def test_layers_that_put_out_no_hidden_states(make, names, inner):
    """As in a config that was written for LoRA: no error, as they can be edited, but not what ReFT is for."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        find_targets(make(), ReftConfig(target_modules=names))
        find_targets(make(), ReftConfig(target_modules=names, inference_mode=True))  # of an adapter that is loaded
    messages = [str(warning.message) for warning in caught if "target_modules" in str(warning.message)]
    assert len(messages) == (inner is not None)
    assert inner is None or f"the outputs of {inner} are queries, keys, values or activations" in messages[0]


def test_two_towers_have_no_one_list_of_layers():
    tower = dict(TINY, image_size=8, patch_size=4)
    config = transformers.CLIPConfig(text_config=TINY, vision_config=tower)
    with torch.device("meta"):
        model = transformers.CLIPModel(config)
    with pytest.raises(
        ValueError, match="'text_model.*layers'.*'vision_model.*layers'.*layers_pattern.*target_modules"
    ):
        find_targets(model, ReftConfig())
