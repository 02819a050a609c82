"""What a dispatch leaves behind for its combine."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_xmoe.dispatch.bypass_plan import Found, Plan
from megatron_xmoe.ops.bypass import Numbered


@dataclass(frozen=True)
class DispatchState:
    """Metadata of one pass through a layer: T tokens, K routes a token, N rows sent, M rows received, G ranks."""

    hidden_shape: torch.Size
    """Shape of the layer's input, [S, B, H]."""

    kept_per_expert: Tensor
    """[E] int64: this rank's routes of each expert that were not dropped."""

    tensor_splits: list[int]
    """Rows received by each expert-tensor-parallel rank, which gather them all; sums to M."""

    tokens_per_expert: Tensor
    """[E / G] int64: received rows of each local expert; sums to M. On the CPU, unless nothing is sent."""

    expert_order: Tensor | None
    """[M] int32: received row of each expert-major position; None where the order is the same already."""

    arrival_order: Tensor | None
    """[M] int32: expert-major position of each received row, the inverse of `expert_order`."""

    probs_dtype: torch.dtype
    """Of the routing weights, in which partial results of expert-tensor-parallel ranks are summed."""

    ends: Tensor | None = field(default=None, kw_only=True)
    """[E / G] int32 on the device, cumulative `tokens_per_expert`; None where they are not there yet."""


@dataclass(frozen=True)
class AllToAllState(DispatchState):
    """Of the plain dispatcher."""

    inverse: Tensor
    """[T, K] int32: the sent row of a token's k-th route, -1 where it has none."""

    token_ids: Tensor
    """[N] int32: the token of each sent row."""

    sent: Tensor | None
    """[G, E / G] int64 on the CPU: this rank's rows for each expert; None where nothing is sent."""

    input_splits: list[int]
    """Rows sent to each of the G ranks; sums to N. Empty where nothing is sent."""

    output_splits: list[int]
    """Rows received from each of the G ranks; sums to M (without expert tensor parallelism). The same."""


@dataclass(frozen=True)
class BypassState(DispatchState):
    """Of redundancy-bypassing dispatch."""

    plan: Plan
    copies: Numbered | None
    """What was chosen for this rank's tokens; None once it is sent."""

    found: Found | None = None
    """What the other ranks' choices mean here; None until it has arrived."""
