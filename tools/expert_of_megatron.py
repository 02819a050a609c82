"""Megatron's experts without Transformer Engine, in a process group of this process alone, for benchmark_experts.py."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_xmoe.platform import cpu, wheel

if TYPE_CHECKING:
    from expert_systems import Inputs


def build(data: "Inputs") -> tuple[torch.nn.Module, Callable[[], Tensor]]:
    """SequentialMLP with the data's weights, and the function from tokens to combined output."""
    if not dist.is_initialized():
        if cpu.needed():
            cpu.install()
        wheel.install()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    experts = _experts(data)
    from megatron.core.transformer.moe.moe_utils import permute, unpermute

    tokens, _, _, num_experts, per_token = data.shape

    def forward() -> Tensor:
        ids = data.ids.long()
        routing_map = torch.zeros(tokens, num_experts, dtype=torch.bool, device=data.device).scatter_(1, ids, True)
        probs = data.probs.new_zeros(tokens, num_experts).scatter(1, ids, data.probs)
        rows, row_probs, order, *_ = permute(data.x, routing_map, probs=probs, num_out_tokens=tokens * per_token)
        output, _ = experts(rows, routing_map.sum(dim=0).cpu(), row_probs)
        return unpermute(output, order, restore_shape=data.x.shape)

    return experts, forward


def _experts(data: "Inputs") -> torch.nn.Module:
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.transformer_config import TransformerConfig

    _, hidden, ffn, num_experts, per_token = data.shape
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(0)
    config = TransformerConfig(
        num_layers=1, hidden_size=hidden, num_attention_heads=1, num_moe_experts=num_experts,
        moe_router_topk=per_token, moe_router_pre_softmax=per_token == 1, moe_ffn_hidden_size=ffn,
        ffn_hidden_size=ffn, gated_linear_unit=True, activation_func=torch.nn.functional.silu, add_bias_linear=False,
        gradient_accumulation_fusion=False, bias_activation_fusion=data.device.type == "cuda", params_dtype=data.dtype,
        perform_initialization=False, use_cpu_initialization=data.device.type == "cpu",
    )  # fmt: skip
    linear = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    experts = SequentialMLP(num_experts, config, linear, pg_collection=groups)
    with torch.no_grad():
        for expert, fc1, fc2 in zip(experts.local_experts, data.fc1, data.fc2, strict=True):
            expert.linear_fc1.weight.copy_(fc1)
            expert.linear_fc2.weight.copy_(fc2)
    return experts
