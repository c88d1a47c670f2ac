"""Causal language models of every build: the same tokens in training as in generation."""

import pytest
import torch
from by_hand import TWO, adapt_model, generated, labels_of
from peft import PeftModel
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

TINY = dict(
    num_hidden_layers=2,
    hidden_size=32,
    intermediate_size=64,
    num_attention_heads=4,
    vocab_size=64,
    initializer_range=0.2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
GPT = dict(n_embd=32, n_layer=2, n_head=4, **{f"{part}_pdrop": 0.0 for part in ("embd", "attn", "resid")})
HEADS = dict(num_key_value_heads=2, head_dim=8)
SPACE = dict(mamba_d_state=4, mamba_n_heads=4, mamba_d_head=16, mamba_chunk_size=4, mamba_n_groups=1)
FAMILIES = {
    # mixtures of experts
    "mixtral": dict(num_local_experts=4, num_key_value_heads=2),
    "qwen3_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, **HEADS),
    "gpt_oss": dict(num_local_experts=4, sliding_window=6, **HEADS),
    "deepseek_v3": dict(
        n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=16,
        first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
        num_key_value_heads=4,
    ),
    # norms after blocks
    "gemma2": dict(sliding_window=6, query_pre_attn_scalar=8, **HEADS),
    "olmo2": dict(num_key_value_heads=2),
    # parallel blocks
    "gptj": dict(GPT, rotary_dim=4),
    "gpt_neox": {},
    "falcon": {},
    # state-space
    "mamba2": dict(state_size=4, num_heads=4, head_dim=16, n_groups=1, chunk_size=4),
    # hybrids
    "jamba": dict(
        num_experts=2, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4,
        num_key_value_heads=2, use_mamba_kernels=False,
    ),
    "bamba": dict(attn_layer_indices=[1], num_key_value_heads=2, **SPACE),
    "falcon_h1": dict(mamba_d_ssm=64, num_key_value_heads=2, **SPACE),
    "granitemoehybrid": dict(
        layer_types=["mamba", "attention"], num_local_experts=2, num_experts_per_tok=1, shared_intermediate_size=16,
        num_key_value_heads=2, **SPACE,
    ),
    "recurrent_gemma": dict(
        num_hidden_layers=3, lru_width=32, attention_window_size=6, head_dim=8, num_key_value_heads=1
    ),
    "lfm2": dict(layer_types=["conv", "full_attention"], num_key_value_heads=2),
    "qwen3_next": dict(
        num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"], **HEADS,
    ),
    # one block of attention that serves several layers
    "zamba2": dict(
        num_hidden_layers=4, layers_block_type=["mamba", "hybrid"] * 2, num_mem_blocks=1, mamba_d_state=4,
        mamba_ngroups=1,
        n_mamba_heads=4, mamba_headdim=16, chunk_size=4, num_key_value_heads=4, adapter_rank=4,
    ),
    "rwkv": dict(attention_hidden_size=32, context_length=32),
}  # fmt: skip


def make(family, **options):
    torch.manual_seed(0)
    options = TINY | FAMILIES[family] | options
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options)).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_training(ids, family):
    base = make(family)
    model, by_hand = adapt_model(base, positions="f2+l2")
    inputs = dict(input_ids=ids)
    labels = labels_of(ids, *TWO["answers"])
    expected = by_hand.logits({"prefix": [[0, 1], [0, 1]], "suffix": [[3, 4], [6, 7]]}, **inputs)
    assert (expected - base(**inputs).logits).abs().max() > 1e-3, "the edit is too small to be seen"
    for mode in map(model.train, (False, True)):
        for told in (dict(labels=labels), dict(prompt_lengths=torch.tensor([5, 8]))):
            with torch.no_grad():
                torch.testing.assert_close(mode(**inputs, **told).logits, expected, atol=1e-5, rtol=1e-5)
    model(**inputs, labels=labels).loss.backward()
    missing = [name for name, p in model.named_parameters() if "._reft." in name and p.grad is None]
    assert not missing


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation(ids, family, use_cache):
    base = make(family)
    model, by_hand = adapt_model(base, positions="f2+l2")
    columns = {"prefix": [[0, 1], [4, 5]], "suffix": [[10, 11], [10, 11]]}
    options = dict(return_dict_in_generate=True, output_logits=True)
    if family == "rwkv":  # mixes up the rows of a batch where it goes on from its state, adapted or not
        columns = {"prefix": [[0, 1]], "suffix": [[10, 11]]}
        ids, options = ids[:1], options | dict(mask=None)
    tolerance = 1e-3 if family == "zamba2" else 1e-4  # its steps differ by that from its forward, adapted or not
    with by_hand.edits(columns):
        expected = generated(base, ids, use_cache=False, **options)
    found = generated(model, ids, use_cache=use_cache, **options)
    torch.testing.assert_close(found.logits, expected.logits, atol=tolerance, rtol=tolerance)
    assert torch.equal(found.sequences, expected.sequences)
    unedited = generated(base, ids, use_cache=False, **options)
    assert (unedited.logits[0] - expected.logits[0]).abs().max() > 1e-3, "the edit is too small to be seen"


def test_loss_of_a_router(ids):
    """The auxiliary loss of a mixture of experts is that of the edited hidden states."""
    base = make("mixtral", output_router_logits=True, router_aux_loss_coef=1.0)
    model, by_hand = adapt_model(base, positions="f2+l2")
    labels = labels_of(ids, *TWO["answers"])
    with by_hand.edits({"prefix": [[0, 1], [0, 1]], "suffix": [[3, 4], [6, 7]]}):
        expected = base(input_ids=ids, labels=labels)
    found = model.train()(input_ids=ids, labels=labels)
    for name in ("loss", "aux_loss", "router_logits"):
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-5)
    assert (found.aux_loss - base(input_ids=ids).aux_loss).abs() > 1e-4


def test_block_that_is_called_for_several_layers(tmp_path, ids):
    """ALBERT has one block: its edit is made at each of its calls, and saved once."""
    torch.manual_seed(0)
    special = dict(embedding_size=16, num_hidden_layers=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    base = AutoModel.from_config(AutoConfig.for_model("albert", **TINY | special)).eval()
    base.save_pretrained(tmp_path / "base")
    model, by_hand = adapt_model(base, task_type=None, positions="f1+l2")
    assert len(by_hand.tensors) == 1
    calls = []
    hook = base.get_submodule(next(iter(by_hand.tensors))).register_forward_hook(lambda *args: calls.append(1))
    with by_hand.edits({"prefix": [[0]] * 2, "suffix": [[10, 11]] * 2}), torch.no_grad():
        expected = base(input_ids=ids).last_hidden_state
    assert len(calls) == 3
    hook.remove()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
        model.save_pretrained(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(AutoModel.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
        assert torch.equal(loaded.eval()(input_ids=ids).last_hidden_state, model(input_ids=ids).last_hidden_state)


def test_block_whose_weights_layers_share(tmp_path, ids):
    """Zamba2's layers share the weights of a transformer block, whose edits are each layer's own."""
    base = make("zamba2")
    base.save_pretrained(tmp_path / "base")
    model, by_hand = adapt_model(base, positions="l2", target_modules=["shared_transformer"])
    assert list(by_hand.tensors) == [f"model.layers.{layer}.shared_transformer" for layer in (1, 3)]
    expected = by_hand.logits({"unit": [[10, 11]] * 2}, input_ids=ids)
    assert (expected - base(input_ids=ids).logits).abs().max() > 1e-3
    with torch.no_grad():
        found = model(input_ids=ids).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        model.save_pretrained(tmp_path / "adapter")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        loaded = PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
        assert torch.equal(loaded(input_ids=ids).logits, found)


class Shared(torch.nn.Module):
    """A model that lists one block twice."""

    def __init__(self):
        super().__init__()
        block = torch.nn.Linear(16, 16)
        self.embed, self.steps = torch.nn.Embedding(64, 16), torch.nn.ModuleList([block, block])

    def forward(self, input_ids):
        hidden_states = self.embed(input_ids)
        for step in self.steps:
            hidden_states = step(hidden_states).tanh()
        return hidden_states


def test_module_that_is_listed_twice(tmp_path, ids):
    """It is adapted once, and edits at each of its calls."""
    torch.manual_seed(0)
    base = Shared()
    model, by_hand = adapt_model(base, positions="l2", target_modules=r"steps\.\d+", task_type=None)
    by_hand.tensors.pop("steps.1", None)  # the other name of the same
    with by_hand.edits({"unit": [[10, 11]] * 2}), torch.no_grad():
        expected = base(ids)
    assert (expected - base(ids)).abs().max() > 1e-2
    with torch.no_grad():
        torch.testing.assert_close(model(ids), expected, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Shared(), tmp_path).eval()
    assert torch.equal(loaded(ids), model(ids))
