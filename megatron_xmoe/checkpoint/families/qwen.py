"""Qwen2-MoE and Qwen3-MoE."""

from megatron_xmoe.checkpoint.families.base import (
    ATTENTION,
    DENSE,
    EXPERTS,
    HEAD_NORMS,
    QKV_BIAS,
    ROUTER,
    Config,
    Family,
    plain_rope,
)
from megatron_xmoe.checkpoint.names import entry
from megatron_xmoe.checkpoint.transforms import GATED

SHARED = (
    entry("mlp.shared_experts.linear_fc1.weight", "mlp.shared_expert.gate_proj.weight: S H",
          "mlp.shared_expert.up_proj.weight: S H", transform=GATED),
    entry("mlp.shared_experts.linear_fc2.weight", "mlp.shared_expert.down_proj.weight: H S"),
    entry("mlp.shared_experts.gate_weight", "mlp.shared_expert_gate.weight: 1 H"),
)  # fmt: skip


def has_experts(config: Config, layer: int) -> bool:
    """Every `decoder_sparse_step`-th layer, but those listed in `mlp_only_layers`."""
    return layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0


def routing(config: Config) -> dict[str, object]:
    """Softmax over all experts; `norm_topk_prob` normalises over the chosen ones, which is softmax after top-k."""
    return {"moe_router_topk": config.num_experts_per_tok, "moe_router_pre_softmax": not config.norm_topk_prob}


QWEN2_MOE = Family(
    name="Qwen2-MoE",
    model_types=("qwen2_moe",),
    attention=lambda config: ATTENTION + (QKV_BIAS if config.qkv_bias else ()),
    dense=lambda config: DENSE,
    experts=lambda config: ROUTER + EXPERTS + SHARED,
    has_experts=has_experts,
    dims=lambda config: {
        "E": config.num_experts,
        "M": config.moe_intermediate_size,
        "S": config.shared_expert_intermediate_size,
        "1": 1,
    },
    arguments=lambda config: {
        **routing(config),
        "add_qkv_bias": config.qkv_bias,
        "moe_shared_expert_intermediate_size": config.shared_expert_intermediate_size,
        "moe_shared_expert_gate": True,
    },
    check=plain_rope,
)

QWEN3_MOE = Family(
    name="Qwen3-MoE",
    model_types=("qwen3_moe",),
    attention=lambda config: ATTENTION + HEAD_NORMS,
    dense=lambda config: DENSE,
    experts=lambda config: ROUTER + EXPERTS,
    has_experts=has_experts,
    dims=lambda config: {"E": config.num_experts, "M": config.moe_intermediate_size},
    arguments=lambda config: {**routing(config), "qk_layernorm": True},
    check=plain_rope,
)
