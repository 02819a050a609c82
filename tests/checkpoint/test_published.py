"""The tables against published models: a real configuration leads to the number of values that the model has."""

import math

import pytest

from megatron_xmoe.checkpoint.families import load_config
from megatron_xmoe.checkpoint.families.base import spell_out
from megatron_xmoe.checkpoint.names import ConversionError, command_line

# what config.json says, as far as it matters for shapes and routing
QWEN = {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "vocab_size": 151936, "hidden_size": 2048, "hidden_act": "silu"}
DEEPSEEK = {"rms_norm_eps": 1e-6, "rope_theta": 10000, "hidden_act": "silu", "attention_bias": False,
            "tie_word_embeddings": False, "moe_layer_freq": 1}  # fmt: skip
YARN = {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096}
HEADS = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
PUBLISHED = {
    "Qwen3-30B-A3B": {
        **QWEN, "model_type": "qwen3_moe", "head_dim": 128, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 48, "num_key_value_heads": 4, "max_position_embeddings": 40960,
        "mlp_only_layers": [], "decoder_sparse_step": 1, "sliding_window": None, "use_sliding_window": False,
    },
    "Qwen1.5-MoE-A2.7B": {
        **QWEN, "model_type": "qwen2_moe", "intermediate_size": 5632, "moe_intermediate_size": 1408,
        "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 60, "num_experts_per_tok": 4,
        "num_hidden_layers": 24, "num_key_value_heads": 16, "shared_expert_intermediate_size": 5632,
        "max_position_embeddings": 8192, "sliding_window": 32768, "use_sliding_window": False,
    },
    "Mixtral-8x7B": {
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "rope_theta": 1e6, "sliding_window": None, "vocab_size": 32000, "max_position_embeddings": 32768,
    },
    "OLMoE-1B-7B": {
        "model_type": "olmoe", "clip_qkv": None, "hidden_size": 2048, "intermediate_size": 1024, "num_experts": 64,
        "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 8, "num_hidden_layers": 16,
        "num_key_value_heads": 16, "rope_theta": 10000.0, "vocab_size": 50304, "max_position_embeddings": 4096,
    },
    "DeepSeek-MoE-16B": {
        **DEEPSEEK, "model_type": "deepseek", "first_k_dense_replace": 1, "hidden_size": 2048,
        "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2,
        "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 28,
        "num_key_value_heads": 16, "scoring_func": "softmax", "vocab_size": 102400, "max_position_embeddings": 4096,
    },
    "DeepSeek-V2-Lite": {
        **DEEPSEEK, **HEADS, "model_type": "deepseek_v2", "first_k_dense_replace": 1, "hidden_size": 2048,
        "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2,
        "n_group": 1, "topk_group": 1, "topk_method": "greedy", "num_attention_heads": 16, "num_experts_per_tok": 6,
        "num_hidden_layers": 27, "num_key_value_heads": 16, "q_lora_rank": None, "routed_scaling_factor": 1.0,
        "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}, "vocab_size": 102400,
        "max_position_embeddings": 163840,
    },
    "DeepSeek-V2": {
        **DEEPSEEK, **HEADS, "model_type": "deepseek_v2", "first_k_dense_replace": 1, "hidden_size": 5120,
        "intermediate_size": 12288, "moe_intermediate_size": 1536, "n_routed_experts": 160, "n_shared_experts": 2,
        "n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy", "num_attention_heads": 128,
        "num_experts_per_tok": 6, "num_hidden_layers": 60, "num_key_value_heads": 128, "q_lora_rank": 1536,
        "routed_scaling_factor": 16.0, "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        "vocab_size": 102400, "max_position_embeddings": 163840,
    },
    "DeepSeek-V3": {
        **DEEPSEEK, **HEADS, "model_type": "deepseek_v3", "first_k_dense_replace": 3, "hidden_size": 7168,
        "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1,
        "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc", "norm_topk_prob": True, "num_attention_heads": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "q_lora_rank": 1536,
        "num_nextn_predict_layers": 1, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "vocab_size": 129280,
        "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, "max_position_embeddings": 163840,
    },
}  # fmt: skip
BILLIONS = {"Qwen3-30B-A3B": 30.5, "Qwen1.5-MoE-A2.7B": 14.3, "Mixtral-8x7B": 46.7, "OLMoE-1B-7B": 6.92,
            "DeepSeek-MoE-16B": 16.4, "DeepSeek-V2-Lite": 15.7, "DeepSeek-V2": 235.7, "DeepSeek-V3": 671.0}  # fmt: skip


def model_of(name: str, predictions: int = 0, **changes):
    """The model of a published configuration."""
    return spell_out(*load_config(PUBLISHED[name] | changes, name), "local", predictions)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_number_of_values_is_the_published_one(name):
    rules = model_of(name).rules
    values = sum(math.prod(shape) for rule in rules for shape in rule.shapes)
    assert abs(values / 1e9 - BILLIONS[name]) < 0.005 * BILLIONS[name]
    sources = [source for rule in rules for source in rule.sources]
    assert len(sources) == len(set(sources))


def test_multi_token_prediction_has_the_published_size():
    added = model_of("DeepSeek-V3", predictions=1).rules[len(model_of("DeepSeek-V3").rules) :]
    # 11.5e9 without the embedding and the output, which are copies
    assert abs(sum(math.prod(shape) for rule in added for shape in rule.shapes) / 1e9 - 11.5) < 0.15
    assert all(source.startswith("model.layers.61.") for rule in added for source in rule.sources)


def test_real_routing_is_spelt_out():
    line = " ".join(command_line(model_of("DeepSeek-V2").arguments))
    assert "--moe-router-num-groups 8 --moe-router-group-topk 3 --xmoe-group-score max" in line
    assert "--moe-router-pre-softmax --moe-router-topk-scaling-factor 16.0" in line
    line = " ".join(command_line(model_of("DeepSeek-V3").arguments))
    assert "--moe-router-num-groups 8 --moe-router-group-topk 4" in line and "xmoe-group-score" not in line
    assert "--rope-type yarn --rotary-scaling-factor 40 --mscale 1.0 --mscale-all-dim 1.0" in line


@pytest.mark.parametrize(
    ("name", "changes", "rule"),
    [
        ("Qwen3-30B-A3B", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type is yarn"),
        ("Qwen3-30B-A3B", {"attention_bias": True}, "attention_bias"),
        ("Mixtral-8x7B", {"sliding_window": 4096}, "sliding_window is 4096"),
        ("OLMoE-1B-7B", {"clip_qkv": 8.0}, "clip_qkv is 8.0"),
        ("DeepSeek-MoE-16B", {"scoring_func": "sigmoid"}, "scoring_func"),
        ("DeepSeek-V2", {"rms_norm_eps": 1e-5}, "rms_norm_eps"),
        ("DeepSeek-V2-Lite", {"rope_scaling": {**YARN, "beta_fast": 16}}, "no equal"),
        ("DeepSeek-V3", {"num_experts_per_tok": 6}, "not twice topk_group"),
        ("DeepSeek-V3", {"norm_topk_prob": False}, "sigmoid"),
        ("DeepSeek-V3", {"rope_interleave": False}, "rope_interleave"),
        ("DeepSeek-V3", {"num_experts_per_tok": 1, "topk_group": 8}, "one expert per token"),
        ("Qwen3-30B-A3B", {"num_experts_per_tok": 1, "norm_topk_prob": True}, "one expert per token"),
        ("Mixtral-8x7B", {"num_experts_per_tok": 1}, "one expert per token"),
        ("Qwen3-30B-A3B", {"num_experts_per_tok": 0}, "positive"),
        ("Qwen3-30B-A3B", {"num_experts_per_tok": 1000}, "between 1 and 128"),
        ("Qwen3-30B-A3B", {"decoder_sparse_step": 0}, "config.json"),
        ("DeepSeek-MoE-16B", {"first_k_dense_replace": None}, "config.json"),
    ],
)
def test_what_megatron_would_compute_differently_is_refused(name, changes, rule):
    with pytest.raises(ConversionError, match=rule):
        model_of(name, **changes)
