"""Core attention on torch's scaled_dot_product_attention, for the layer spec's `core_attention` slot."""

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor


class SDPACoreAttention(MegatronModule):
    """Attention by torch's fused kernels (flash on CUDA, ROCm and CPU), in place of Megatron's S x S scores.

    Letters: S query and C context length, B micro-batch, N query and G key heads of this rank, D and V head sizes.
    Serves grouped queries (G < N), MLA (V != D), causal and arbitrary masks, and sliding windows. Has no parameters,
    so checkpoints do not change. Softmax variants with an offset stay with Megatron's own module.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
    ):
        """Args are those of Megatron's attention modules; the head sizes that MLA names are read off the tensors.

        Raises:
            ValueError: context parallelism or a softmax with an offset.
        """
        super().__init__(config=config)
        if config.context_parallel_size != 1:
            raise ValueError(
                f"--context-parallel-size {config.context_parallel_size} needs Transformer Engine's attention, which "
                "is not installed: install it or use 1"
            )
        if config.softmax_type != "vanilla":
            raise ValueError(f"--softmax-type {config.softmax_type} is not a function of torch's fused attention")
        self.attn_mask_type = attn_mask_type
        head_size = k_channels or config.kv_channels
        # query-key layer scaling divides the scores by the layer number and multiplies them back in the softmax:
        # with fp32 softmax inside the fused kernel there is nothing left of it
        self.softmax_scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(head_size)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window_size = config.window_size if windowed else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [S, B, N, D]. key: [C, B, G, D]. value: [C, B, G, V].
            attention_mask: bool, broadcastable to [B, N, S, C], True where a key is hidden; None leaves the mask type
                to decide. A given mask is taken as it is, as in Megatron's own module; with a sliding window both
                apply. A query that may see no key gets zeros.

        Returns:
            [S, B, N*V].

        Raises:
            ValueError: packed sequences or an attention bias.
        """
        if packed_seq_params is not None or attention_bias is not None:
            raise ValueError("packed sequences and attention biases need Transformer Engine's attention")
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        mask, is_causal = self._mask(query, key, attention_mask, attn_mask_type or self.attn_mask_type)
        dropout = self.dropout if self.training else 0.0
        # without sequence parallelism, ranks of a tensor-parallel group hold different heads of the same tokens and
        # draw from different generators
        fork = dropout > 0 and not self.config.sequence_parallel
        with tensor_parallel.get_cuda_rng_tracker().fork() if fork else nullcontext():
            context = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=is_causal,
                scale=self.softmax_scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        return context.permute(2, 0, 1, 3).flatten(start_dim=2)

    def _mask(
        self, query: Tensor, key: Tensor, attention_mask: Tensor | None, mask_type: AttnMaskType
    ) -> tuple[Tensor | None, bool]:
        """torch's mask (True where a key is seen) and its causal flag."""
        queries, keys = query.shape[2], key.shape[2]
        if self.window_size is not None:
            visible = _window(queries, keys, self.window_size, query.device)
            return visible if attention_mask is None else visible & ~attention_mask, False
        if attention_mask is not None:
            return ~attention_mask, False
        causal = mask_type in (AttnMaskType.causal, AttnMaskType.padding_causal) and queries > 1
        if causal and queries != keys:  # the queries are the last ones of a longer context
            return _window(queries, keys, (-1, 0), query.device), False
        return None, causal


def _window(queries: int, keys: int, window: tuple[int, int], device: torch.device) -> Tensor:
    """[S, C] bool, True where a key lies at most window[0] before and window[1] after the query (-1: no bound)."""
    offset = torch.arange(keys, device=device) - torch.arange(keys - queries, keys, device=device).unsqueeze(1)
    visible = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if window[0] >= 0:
        visible &= offset >= -window[0]
    if window[1] >= 0:
        visible &= offset <= window[1]
    return visible
