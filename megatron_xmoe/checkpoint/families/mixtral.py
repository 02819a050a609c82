"""Mixtral."""

from megatron_xmoe.checkpoint.families.base import ATTENTION, DENSE, Family, plain_rope
from megatron_xmoe.checkpoint.names import entry
from megatron_xmoe.checkpoint.transforms import GATED

EXPERTS = (
    entry("mlp.router.weight", "block_sparse_moe.gate.weight: E H"),
    entry("mlp.experts.experts.linear_fc1.weight", "block_sparse_moe.experts.{e}.w1.weight: M H",
          "block_sparse_moe.experts.{e}.w3.weight: M H", transform=GATED),
    entry("mlp.experts.experts.linear_fc2.weight", "block_sparse_moe.experts.{e}.w2.weight: H M"),
)  # fmt: skip

MIXTRAL = Family(
    name="Mixtral",
    model_types=("mixtral",),
    attention=lambda config: ATTENTION,
    dense=lambda config: DENSE,
    experts=lambda config: EXPERTS,
    has_experts=lambda config, layer: True,
    dims=lambda config: {"E": config.num_local_experts, "M": config.intermediate_size},
    arguments=lambda config: {"moe_router_topk": config.num_experts_per_tok},
    check=plain_rope,
)
