"""Routing metadata of a padding-free token buffer (paper, section 4.1): the four ERI arrays and their inverse."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_xmoe.kernels.registry import kernel

Policy = Literal["probs", "position"]
MOST_ROUTES = 2**31 - 2**18  # positions are int32, and kernels look past the last one


@dataclass(frozen=True)
class Routes:
    """Which token goes to which expert, in expert order. A route is one (token, expert) pair.

    Letters: T tokens, K experts per token, E experts. Arrays over routes have T*K entries; the first
    `tokens_per_expert.sum()` of them are kept routes. Entries after those have token and expert -1 and weight 0: they
    may be cut off by a caller who knows the count, or left. So building needs no host synchronisation.
    """

    token_ids: Tensor
    """[T*K] int32: token of each route; order expert, then token, then the token's own order."""

    expert_ids: Tensor
    """[T*K] int32: expert of each route, ascending."""

    tokens_per_expert: Tensor
    """[E] int64: kept routes of each expert."""

    combine_weights: Tensor
    """[T*K]: routing weight of each route, differentiable."""

    inverse: Tensor
    """[T, K] int32: position in the arrays above of a token's k-th route, -1 where it has none or it was dropped."""


def build_routes(
    topk_ids: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    capacity: int | None = None,
    policy: Policy = "probs",
) -> Routes:
    """Sort a token's choices by expert, then by token, in O(T*K) memory and without a host synchronisation.

    Args:
        topk_ids: [T, K] int32 or int64 expert of each choice, below E, negative for none. Not checked: that would
            need a host synchronisation.
        topk_weights: [T, K] routing weights, any floating dtype, differentiable.
        num_experts: E.
        capacity: most routes of an expert (paper, section 4.1); None keeps all.
        policy: which routes stay: "probs" those of largest weight, the earliest token among equals; "position" those
            of the earliest tokens.

    Raises:
        ValueError: shapes or dtypes that do not fit, no expert at all, negative capacity, unknown policy.
    """
    if topk_ids.dim() != 2 or topk_ids.shape != topk_weights.shape:
        raise ValueError(
            f"topk_ids {tuple(topk_ids.shape)} and topk_weights {tuple(topk_weights.shape)} must both be [T, K]"
        )
    if topk_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"topk_ids are {topk_ids.dtype}; they must be int32 or int64")
    if num_experts < 1:
        raise ValueError(f"num_experts is {num_experts}; a layer needs at least one expert")
    dropping = _dropping(topk_ids.numel(), topk_weights, capacity, policy)
    return Routes(*_BuildRoutes.apply(topk_ids.contiguous(), topk_weights.contiguous(), num_experts, *dropping))


def build_routes_from_map(
    routing_map: Tensor, probs: Tensor, topk: int, capacity: int | None = None, policy: Policy = "probs"
) -> Routes:
    """Routes from the pair that Megatron's router gives.

    Args:
        routing_map: [T, E] bool, at most `topk` experts in a row (not checked; the first `topk` are taken).
        probs: [T, E] routing weights, differentiable.
        topk: K, the largest number of experts a token can have.
        capacity, policy: see build_routes.

    Raises:
        ValueError: shapes that differ, `topk` outside 1..E, and see build_routes.
    """
    if routing_map.dim() != 2 or routing_map.shape != probs.shape:
        raise ValueError(f"routing_map {tuple(routing_map.shape)} and probs {tuple(probs.shape)} must both be [T, E]")
    tokens, num_experts = routing_map.shape
    if not 1 <= topk <= num_experts:
        raise ValueError(f"topk is {topk}; it must be between 1 and the number of experts, {num_experts}")
    dropping = _dropping(tokens * topk, probs, capacity, policy)
    return Routes(*_RoutesOfMap.apply(routing_map.bool().contiguous(), probs.contiguous(), topk, *dropping))


def merge_order(counts: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Reorder rows that arrive by source, then expert, into expert, then source, and back.

    Args:
        counts: [G, E] int64 rows of each expert from each source.
        num_rows: M, the sum of `counts`, which the caller knows on the host. Not checked.

    Returns:
        [M] int32, the arrival position of each expert-major position; [M] int32, the inverse of it.
    """
    return kernel("merge_order", counts.device.type)(counts.contiguous(), num_rows)


def _dropping(num_routes: int, weights: Tensor, capacity: int | None, policy: Policy) -> tuple[int, bool]:
    """Checks what all routes have in common; the kernel's capacity, -1 for none, and whether weights decide."""
    if not weights.is_floating_point():
        raise ValueError(f"routing weights are {weights.dtype}; they must be floating point")
    if capacity is not None and capacity < 0:
        raise ValueError(f"capacity is {capacity}; it must be 0 or more, or None to keep all routes")
    if policy not in ("probs", "position"):
        raise ValueError(f"policy is {policy!r}; it must be 'probs' or 'position'")
    if num_routes > MOST_ROUTES:
        raise ValueError(f"{num_routes} routes; a rank can have at most {MOST_ROUTES}: use smaller micro-batches")
    return -1 if capacity is None else capacity, policy == "probs"


def _sorted(ctx, ids: Tensor, weights: Tensor, num_experts: int, capacity: int, by_weight: bool) -> tuple[Tensor, ...]:
    """The five arrays of Routes, in the forward pass of an autograd function whose results they are."""
    arrays = kernel("build_routes", weights.device.type)(ids, weights, num_experts, capacity, by_weight)
    token_ids, expert_ids, tokens_per_expert, _, inverse = arrays
    ctx.mark_non_differentiable(token_ids, expert_ids, tokens_per_expert, inverse)
    ctx.set_materialize_grads(False)  # it would fill zeros for four outputs that have no gradient
    return arrays


class _BuildRoutes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weights, num_experts, capacity, by_weight):
        arrays = _sorted(ctx, ids, weights, num_experts, capacity, by_weight)
        ctx.save_for_backward(arrays[-1])
        return arrays

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, _tokens, _experts, _counts, grad, _inverse):
        if grad is None:
            return None, None, None, None, None
        (inverse,) = ctx.saved_tensors
        rows = kernel("gather_rows", grad.device.type)(grad.contiguous().unsqueeze(1), inverse.reshape(-1))
        return None, rows.view_as(inverse), None, None, None


class _RoutesOfMap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, routing_map, probs, topk, capacity, by_weight):
        ctx.num_experts = probs.shape[1]
        ids, weights = kernel("choices_of_map", probs.device.type)(routing_map, probs, topk)
        arrays = _sorted(ctx, ids, weights, ctx.num_experts, capacity, by_weight)
        ctx.save_for_backward(arrays[-1], ids)
        return arrays

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, _tokens, _experts, _counts, grad, _inverse):
        if grad is None:
            return None, None, None, None, None
        gradient_of_map = kernel("gradient_of_map", grad.device.type)
        return None, gradient_of_map(grad.contiguous(), *ctx.saved_tensors, ctx.num_experts), None, None, None
