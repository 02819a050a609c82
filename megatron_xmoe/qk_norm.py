"""Norms of queries and keys that Megatron's layer specs do not have."""

from dataclasses import is_dataclass, replace
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, reduce_from_tensor_model_parallel_region
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor


class AllHeadsNorm(torch.nn.Module):
    """RMSNorm over all heads together, as OLMoE has it; Megatron's own norms take each head by itself.

    Tensor-parallel ranks hold their heads' part of the weight and add up their squares.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, keys: bool = False):
        """Args are those of Megatron's LayerNormBuilder, `hidden_size` a head's width; `keys` for the key heads.

        Raises:
            ValueError: another norm than RMSNorm, or fewer key heads than tensor-parallel ranks.
        """
        super().__init__()
        heads, ranks = config.num_attention_heads, parallel_state.get_tensor_model_parallel_world_size()
        heads = (config.num_query_groups or heads) if keys else heads
        if config.normalization != "RMSNorm" or heads % ranks:
            raise ValueError(
                f"--xmoe-qk-norm all-heads needs --normalization RMSNorm and heads that divide by the tensor-parallel "
                f"size: {config.normalization}, {heads} heads, {ranks} ranks"
            )
        self.width, self.eps, self.ranks = heads * hidden_size, eps, ranks
        self.weight = torch.nn.Parameter(torch.ones(self.width // ranks))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise [S, B, heads of this rank, D], in fp32; same shape and dtype."""
        values = hidden.flatten(-2).float()
        squares = values.square().sum(-1, keepdim=True)
        if self.ranks > 1:  # summed forward; every rank's gradient goes back to every rank
            squares = copy_to_tensor_model_parallel_region(reduce_from_tensor_model_parallel_region(squares))
        normal = values * torch.rsqrt(squares / self.width + self.eps)
        return (normal.to(hidden.dtype) * self.weight.to(hidden.dtype)).view_as(hidden)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Megatron's sharded state: the weight is split over tensor-parallel ranks."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(
            state,
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        )


class PlainQueryMLASelfAttention(MLASelfAttention):
    """Latent attention whose query is a plain projection, and only whose compressed keys and values are normalised.

    So is DeepSeek-V2-Lite. Megatron-Core 0.19 takes --qk-layernorm to mean a norm of the query as well: its local spec
    is refused without a low-rank query, and Transformer Engine's would normalise the query's input once more.
    """

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
        return {
            "linear_q_proj": submodules.linear_q_proj,
            "linear_q_up_proj": IdentityOp,
            "linear_kv_up_proj": submodules.linear_kv_up_proj,
            "q_layernorm": IdentityOp,
            "kv_layernorm": submodules.kv_layernorm or IdentityOp,
        }


def with_query_key_norms(spec: Any, config: TransformerConfig, all_heads: bool) -> Any:
    """A copy of a layer spec with the query and key norms that the model needs.

    Args:
        spec: as for `substitute`; modules in it are not changed otherwise.
        config: of the model.
        all_heads: norms over all heads together.
    """
    if isinstance(spec, SelfAttentionSubmodules) and all_heads:
        return replace(spec, q_layernorm=AllHeadsNorm, k_layernorm=partial(AllHeadsNorm, keys=True))
    latent = isinstance(spec, ModuleSpec) and spec.module is MLASelfAttention
    if latent and config.q_lora_rank is None and config.qk_layernorm:
        return replace(spec, module=PlainQueryMLASelfAttention)
    if isinstance(spec, list):
        return [with_query_key_norms(item, config, all_heads) for item in spec]
    if isinstance(spec, ModuleSpec) or (is_dataclass(spec) and not isinstance(spec, type)):
        changes = {
            name: with_query_key_norms(getattr(spec, name), config, all_heads)
            for name in ("submodules", "layer_specs", "self_attention", "mtp_model_layer")
            if getattr(spec, name, None) is not None
        }
        return replace(spec, **changes) if changes else spec
    return spec
