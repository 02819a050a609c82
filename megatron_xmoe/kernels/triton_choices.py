"""A router's choices out of its map, and the gradient back, in Triton. csrc/routes.h has the exact semantics.

Letters: T tokens, K choices per token, E experts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_xmoe.kernels.triton_common import ceil_div, on, power_of_two

TILE = 4096  # elements of a tile
MOST_COLUMNS = 1024  # of it


def choices_of_map(routing_map: Tensor, probs: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """See `kernels.reference.choices_of_map`."""
    tokens, experts = routing_map.shape
    ids = torch.empty(tokens, topk, dtype=torch.int32, device=probs.device)
    weights = torch.empty(tokens, topk, dtype=probs.dtype, device=probs.device)
    if ids.numel() == 0:
        return ids, weights
    tile = choices_tile(experts)
    with on(probs):
        choices_kernel[(ceil_div(tokens, tile["TOKENS"]),)](
            routing_map.view(torch.uint8), probs, ids, weights, tokens,
            K=topk, E=experts, SLOTS=power_of_two(topk), **tile,
        )  # fmt: skip
    return ids, weights


def gradient_of_map(grad: Tensor, inverse: Tensor, ids: Tensor, num_experts: int) -> Tensor:
    """See `kernels.reference.gradient_of_map`."""
    tokens, per_token = ids.shape
    result = torch.empty(tokens, num_experts, dtype=grad.dtype, device=grad.device)
    if result.numel() == 0:
        return result
    tile = choices_tile(num_experts)
    with on(grad):
        choices_gradient_kernel[(ceil_div(tokens, tile["TOKENS"]), ceil_div(num_experts, tile["BLOCK"]))](
            grad, inverse, ids, result, tokens, K=per_token, E=num_experts, **tile
        )
    return result


def choices_tile(experts: int) -> dict[str, int]:
    """Launch parameters of both kernels."""
    block = min(power_of_two(experts), MOST_COLUMNS)
    return {"BLOCK": block, "TOKENS": max(1, TILE // block), "num_warps": 4}


@triton.jit(do_not_specialize=["tokens"])
def choices_kernel(
    chosen, probs, ids, weights, tokens,
    K: tl.constexpr, E: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """TOKENS rows of the map, BLOCK experts at a time."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row = token.to(tl.int64)[:, None]
    found = tl.zeros([TOKENS], dtype=tl.int32)
    for start in range(0, E, BLOCK):
        expert = start + tl.arange(0, BLOCK)
        mask = (token < tokens)[:, None] & (expert < E)[None, :]
        is_chosen = (tl.load(chosen + row * E + expert[None, :], mask=mask, other=0) != 0).to(tl.int32)
        slot = found[:, None] + tl.cumsum(is_chosen, axis=1) - is_chosen
        taken = (is_chosen > 0) & (slot < K)
        tl.store(ids + row * K + slot, tl.broadcast_to(expert[None, :], [TOKENS, BLOCK]), mask=taken)
        tl.store(weights + row * K + slot, tl.load(probs + row * E + expert[None, :], mask=taken, other=0), mask=taken)
        found += tl.sum(is_chosen, axis=1)
    slot = tl.arange(0, SLOTS)[None, :]
    mask = (token < tokens)[:, None] & (slot >= found[:, None]) & (slot < K)
    tl.store(ids + row * K + slot, tl.full([TOKENS, SLOTS], -1, tl.int32), mask=mask)
    tl.store(weights + row * K + slot, tl.zeros([TOKENS, SLOTS], weights.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def choices_gradient_kernel(
    grad, inverse, ids, result, tokens,
    K: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """TOKENS rows and BLOCK columns of the result: each element looks for itself among its token's choices."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = token.to(tl.int64)
    exists = token < tokens
    value = tl.zeros([TOKENS, BLOCK], result.dtype.element_ty)
    for k in range(K):
        choice = tl.load(ids + row * K + k, mask=exists, other=-1)
        place = tl.load(inverse + row * K + k, mask=exists, other=-1)
        moved = tl.load(grad + place, mask=place >= 0, other=0)
        value = tl.where(choice[:, None] == expert[None, :], moved[:, None], value)
    tl.store(result + row[:, None] * E + expert[None, :], value, mask=exists[:, None] & (expert < E)[None, :])
