"""OLMoE, whose query and key norms span all heads together."""

from megatron_xmoe.checkpoint.families.base import ATTENTION, DENSE, EXPERTS, ROUTER, Config, Family, plain_rope
from megatron_xmoe.checkpoint.families.qwen import routing
from megatron_xmoe.checkpoint.names import ConversionError, entry

WIDE_NORMS = (
    entry("self_attention.q_layernorm.weight", "self_attn.q_norm.weight: Q"),
    entry("self_attention.k_layernorm.weight", "self_attn.k_norm.weight: KV"),
)


def check(config: Config) -> None:
    """Raises ConversionError for clipped queries, keys and values."""
    plain_rope(config)
    if config.clip_qkv is not None:
        raise ConversionError(f"config.json: clip_qkv is {config.clip_qkv}; Megatron's attention does not clip")


OLMOE = Family(
    name="OLMoE",
    model_types=("olmoe",),
    attention=lambda config: ATTENTION + WIDE_NORMS,
    dense=lambda config: DENSE,
    experts=lambda config: ROUTER + EXPERTS,
    has_experts=lambda config, layer: True,
    dims=lambda config: {"E": config.num_experts, "M": config.intermediate_size},
    arguments=lambda config: {**routing(config), "qk_layernorm": True, "xmoe_qk_norm": "all-heads"},
    check=check,
)
