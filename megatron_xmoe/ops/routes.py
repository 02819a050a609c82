"""Routing metadata of a padding-free token buffer (paper, section 4.1): the four ERI arrays and their inverse."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_xmoe.ops import reference


@dataclass(frozen=True)
class Routes:
    """Which token goes to which expert, in expert order. A route is one (token, expert) pair.

    Letters: T tokens, K experts per token, E experts. Arrays over routes have T*K entries; the first
    `tokens_per_expert.sum()` of them exist, the rest (only where a token has fewer than K experts) are padding
    that must be cut off by a caller who knows the count. So building needs no host synchronisation.
    """

    token_ids: Tensor
    """[T*K] int64: token of each route; order expert, then token."""

    expert_ids: Tensor
    """[T*K] int64: expert of each route, ascending."""

    tokens_per_expert: Tensor
    """[E] int64: routes of each expert."""

    combine_weights: Tensor
    """[T*K]: routing weight of each route, differentiable."""

    inverse: Tensor
    """[T, K] int64: position in the arrays above of a token's k-th route, -1 where it has none."""


def build_routes(topk_ids: Tensor, topk_weights: Tensor, num_experts: int) -> Routes:
    """Sort a token's choices by expert, then by token, in O(T*K) memory and without a host synchronisation.

    Args:
        topk_ids: [T, K] integer expert of each choice, below E, -1 for none. Not checked: that would need a host
            synchronisation.
        topk_weights: [T, K] routing weights, differentiable.
        num_experts: E.

    Raises:
        ValueError: shapes that differ, or no expert at all.
    """
    if topk_ids.dim() != 2 or topk_ids.shape != topk_weights.shape:
        raise ValueError(
            f"topk_ids {tuple(topk_ids.shape)} and topk_weights {tuple(topk_weights.shape)} must both be [T, K]"
        )
    if num_experts < 1:
        raise ValueError(f"num_experts is {num_experts}; a layer needs at least one expert")
    tokens, per_token = topk_ids.shape
    flat = topk_ids.reshape(-1).to(torch.int64)
    flat = torch.where(flat < 0, num_experts, flat)
    order, tokens_per_expert = reference.sort_routes(flat, num_experts)
    position = torch.empty_like(order)
    position[order] = torch.arange(order.numel(), device=order.device)
    inverse = torch.where(flat < num_experts, position, -1).view(tokens, per_token)
    return Routes(
        token_ids=torch.div(order, max(per_token, 1), rounding_mode="floor"),
        expert_ids=flat[order],
        tokens_per_expert=tokens_per_expert,
        combine_weights=topk_weights.reshape(-1)[order],
        inverse=inverse,
    )


def build_routes_from_map(routing_map: Tensor, probs: Tensor, topk: int) -> Routes:
    """Routes from the pair that Megatron's router gives.

    Args:
        routing_map: [T, E] bool, at most `topk` experts in a row (not checked; the first `topk` are taken).
        probs: [T, E] routing weights, differentiable.
        topk: K, the largest number of experts a token can have.

    Raises:
        ValueError: shapes that differ, or `topk` outside 1..E.
    """
    if routing_map.dim() != 2 or routing_map.shape != probs.shape:
        raise ValueError(
            f"routing_map {tuple(routing_map.shape)} and probs {tuple(probs.shape)} must both be [T, E]"
        )
    num_experts = routing_map.shape[1]
    if not 1 <= topk <= num_experts:
        raise ValueError(f"topk is {topk}; it must be between 1 and the number of experts, {num_experts}")
    # the chosen experts come first in a stable descending sort, in ascending order; the rest is masked out
    chosen, ids = torch.sort(routing_map.to(torch.int8), dim=1, descending=True, stable=True)
    ids, chosen = ids[:, :topk], chosen[:, :topk].bool()
    return build_routes(torch.where(chosen, ids, -1), probs.gather(1, ids), num_experts)
