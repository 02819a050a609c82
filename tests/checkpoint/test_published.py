"""The tables against published models: a real configuration leads to the number of values that the model has."""

import math

import pytest
from published_models import PUBLISHED, YARN

from megatron_xmoe.checkpoint.families import load_config
from megatron_xmoe.checkpoint.families.base import spell_out
from megatron_xmoe.checkpoint.names import ConversionError, command_line

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
