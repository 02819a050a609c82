"""Routing in Triton: the choice of experts, their weights, tables for load-balancing losses, and all gradients.

Letters: T tokens, B sequences, K experts per token, E experts, P programs of a sequence. Token t belongs to sequence
t % B. Everything is computed in fp32, as Megatron does, and only results are rounded to the logits' type.

A program keeps whole rows of logits, in which each group of experts begins at a multiple of a power of two; an expert's
place in a row is its slot. triton_scores.py has what is computed of rows, triton_balance.py makes losses of the tables.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_xmoe.kernels.triton_common import ceil_div, on, power_of_two
from megatron_xmoe.kernels.triton_scores import best, in_best_groups, score, softmax, through_softmax, through_sum

SCORES = {"softmax": 0, "sigmoid": 1, "sqrtsoftplus": 2}
MAX_SLOTS = 4096  # a row of logits is held in registers
TILE = 2048  # elements of a program's rows
MAX_PROGRAMS = 256  # about two for each multiprocessor of a large GPU


def slots(experts: int, groups: int) -> int:
    """Slots of a row of logits."""
    return power_of_two(groups) * power_of_two(experts // groups)


def route(
    logits: Tensor,
    bias: Tensor | None,
    padding: Tensor | None,
    added: Tensor | None,
    constants: dict[str, Any],
    sequences: int,
    tally: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Chooses experts and weighs them.

    Args:
        logits: [T, E], contiguous.
        bias: [E], added to the scores for the choice only, or None; not for softmax.
        padding: [T] bool, tokens that are counted nowhere, or None.
        added: [E] int32, to which each expert's routes are added, or None.
        constants: of the kernels, see `ops.router.RoutingRule`.
        sequences: B.
        tally: whether a load-balancing loss follows.

    Returns:
        probs [T, E], 0 where an expert is not chosen; chosen [T, E] uint8; for the losses, sums of scores [P, B, E]
        and numbers of routes [P, B, E] without bias and groups.
    """
    tokens, experts = logits.shape
    probs = torch.empty_like(logits)
    chosen = torch.empty(tokens, experts, dtype=torch.uint8, device=logits.device)
    programs, tile = route_tile(tokens // sequences, sequences, experts, constants["GROUPS"])
    sums = counts = None
    if tally:
        sums = torch.empty(programs, sequences, experts, dtype=torch.float32, device=logits.device)
        counts = torch.empty(programs, sequences, experts, dtype=torch.int32, device=logits.device)
    with on(logits):
        route_kernel[(programs, sequences)](
            logits, bias, padding, probs, chosen, sums, counts, added, tokens // sequences,
            B=sequences, E=experts, **constants, **tile,
        )  # fmt: skip
    return probs, chosen, sums, counts


def route_backward(
    logits: Tensor,
    chosen: Tensor,
    padding: Tensor | None,
    grad_probs: Tensor,
    slopes: Tensor | None,
    grad_losses: tuple[Tensor, ...],
    constants: dict[str, Any],
    sequences: int,
) -> Tensor:
    """Gradient of the logits [T, E].

    Args:
        logits, chosen, padding, constants, sequences: of `route`.
        grad_probs: [T, E], contiguous.
        slopes: [L, B, E] fp32 of the L losses, see `balance`; None for none.
        grad_losses: the gradients of these L losses, at most three.
    """
    tokens, experts = logits.shape
    grad_logits = torch.empty_like(logits)
    programs, tile = route_tile(tokens // sequences, sequences, experts, constants["GROUPS"])
    used = {name: constants[name] for name in ("K", "SCORE", "PRE", "SCALE", "GROUPS")}
    gradients = (*grad_losses, None, None, None)[:3]
    with on(logits):
        route_backward_kernel[(programs, sequences)](
            logits, chosen, padding, grad_probs, slopes, *gradients, grad_logits, tokens // sequences,
            B=sequences, E=experts, **used, **tile,
        )  # fmt: skip
    return grad_logits


@cache
def route_tile(length: int, sequences: int, experts: int, groups: int) -> tuple[int, dict[str, int]]:
    """Programs of a sequence, at least one, and launch parameters of route_kernel and route_backward_kernel.

    A program takes PARTS times TOKENS tokens (a power of two: few variants are compiled).
    """
    columns = slots(experts, groups)
    tokens = min(power_of_two(length), max(1, TILE // columns))
    parts = power_of_two(ceil_div(length, tokens * max(1, MAX_PROGRAMS // sequences)))
    width = columns // power_of_two(groups)
    tile = {"WIDTH": width, "TOKENS": tokens, "PARTS": parts, "SLOTS": columns, "num_warps": 4}
    return max(1, ceil_div(length, tokens * parts)), tile


@triton.jit
def places(sequence, first, length, B: tl.constexpr, E: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
           TOKENS: tl.constexpr, SLOTS: tl.constexpr):  # fmt: skip
    """Of a tile: its tokens, those that exist, the experts of its slots, and which slots have one."""
    row = first + tl.arange(0, TOKENS)
    slot = tl.arange(0, SLOTS)
    group, inside = slot // WIDTH, slot % WIDTH
    expert = group * (E // GROUPS) + inside
    return row.to(tl.int64) * B + sequence, row < length, expert, (group < GROUPS) & (inside < E // GROUPS)


@triton.jit(do_not_specialize=["length"])
def route_kernel(
    logits, bias, padding, probs, chosen, sums, counts, added, length,
    B: tl.constexpr, K: tl.constexpr, E: tl.constexpr, SCORE: tl.constexpr, PRE: tl.constexpr, SCALE: tl.constexpr,
    GROUPS: tl.constexpr, GROUP_TOPK: tl.constexpr, GROUP_BEST: tl.constexpr,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, PARTS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """PARTS times TOKENS tokens of one sequence."""
    sequence = tl.program_id(1)
    scores_of_expert = tl.zeros([TOKENS, SLOTS], tl.float32)
    routes_of_expert = tl.zeros([TOKENS, SLOTS], tl.int32)
    routes_added = tl.zeros([TOKENS, SLOTS], tl.int32)
    for part in range(PARTS):
        first = (tl.program_id(0) * PARTS + part) * TOKENS
        token, exists, expert, has_expert = places(sequence, first, length, B, E, GROUPS, WIDTH, TOKENS, SLOTS)
        there = tl.broadcast_to(has_expert[None, :], [TOKENS, SLOTS])
        mask = there & exists[:, None]
        at = token[:, None] * E + expert[None, :]
        raw = tl.load(logits + at, mask=mask, other=0)
        if raw.dtype != tl.float64:
            raw = raw.to(tl.float32)
        x = raw.to(tl.float32)
        if SCORE != 0:
            scores, _ = score(x, there, SCORE)
        elif PRE or sums is not None:
            scores = softmax(x, there)
        rank = raw  # scores grow with logits, so that the best logits are the best scores
        if bias is not None:
            rank = scores + tl.load(bias + expert, mask=has_expert, other=0).to(tl.float32)[None, :]
        allowed = there
        if GROUPS > 1:
            of_group = rank  # Megatron adds up logits, where softmax follows the choice
            if bias is None and (PRE or SCORE != 0):
                of_group = scores
            allowed = in_best_groups(of_group, there, GROUPS, GROUP_TOPK, GROUP_BEST, WIDTH)
        picked = best(rank, allowed, K)
        if SCORE == 0:
            weight = tl.where(picked, scores, 0.0) if PRE else softmax(x, picked)
        else:
            weight = tl.where(picked, scores, 0.0)
            if K > 1:
                weight = weight / (tl.sum(weight, axis=1) + 1e-20)[:, None]
        tl.store(probs + at, (weight * SCALE).to(probs.dtype.element_ty), mask=mask)
        tl.store(chosen + at, picked.to(tl.uint8), mask=mask)
        counted = mask
        if padding is not None:
            counted = mask & (tl.load(padding + token, mask=exists, other=1) == 0)[:, None]
        if added is not None:
            routes_added += (picked & counted).to(tl.int32)
        if sums is not None:
            if bias is not None or GROUPS > 1:
                picked = best(raw, there, K)
            if SCORE != 0:
                scores = scores / (tl.sum(scores, axis=1) + 1e-20)[:, None]
            scores_of_expert += tl.where(counted, scores, 0.0)
            routes_of_expert += (picked & counted).to(tl.int32)
    _, _, expert, has_expert = places(sequence, 0, length, B, E, GROUPS, WIDTH, TOKENS, SLOTS)
    if added is not None:  # whole numbers, whose sum does not depend on the order
        total = tl.sum(routes_added, axis=0)
        tl.atomic_add(added + expert, total, mask=has_expert & (total > 0), sem="relaxed")
    if sums is not None:
        at = (tl.program_id(0) * B + sequence) * E + expert
        tl.store(sums + at, tl.sum(scores_of_expert, axis=0), mask=has_expert)
        tl.store(counts + at, tl.sum(routes_of_expert, axis=0), mask=has_expert)


@triton.jit(do_not_specialize=["length"])
def route_backward_kernel(
    logits, chosen, padding, grad_probs, slopes, grad_first, grad_second, grad_third, grad_logits, length,
    B: tl.constexpr, K: tl.constexpr, E: tl.constexpr, SCORE: tl.constexpr, PRE: tl.constexpr, SCALE: tl.constexpr,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, PARTS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Gradients of the logits of PARTS times TOKENS tokens of one sequence."""
    sequence = tl.program_id(1)
    _, _, expert, has_expert = places(sequence, 0, length, B, E, GROUPS, WIDTH, TOKENS, SLOTS)
    of_scores = tl.zeros([SLOTS], tl.float32)  # gradient of each score, the same for all tokens of the sequence
    if grad_first is not None:
        slope_at = slopes + sequence * E + expert
        of_scores += tl.load(grad_first).to(tl.float32) * tl.load(slope_at, mask=has_expert, other=0)
        if grad_second is not None:
            of_scores += tl.load(grad_second).to(tl.float32) * tl.load(slope_at + B * E, mask=has_expert, other=0)
        if grad_third is not None:
            of_scores += tl.load(grad_third).to(tl.float32) * tl.load(slope_at + 2 * B * E, mask=has_expert, other=0)
    for part in range(PARTS):
        first = (tl.program_id(0) * PARTS + part) * TOKENS
        token, exists, expert, has_expert = places(sequence, first, length, B, E, GROUPS, WIDTH, TOKENS, SLOTS)
        there = tl.broadcast_to(has_expert[None, :], [TOKENS, SLOTS])
        mask = there & exists[:, None]
        at = token[:, None] * E + expert[None, :]
        x = tl.load(logits + at, mask=mask, other=0).to(tl.float32)
        picked = tl.load(chosen + at, mask=mask, other=0) != 0
        given = tl.where(picked, tl.load(grad_probs + at, mask=mask, other=0).to(tl.float32) * SCALE, 0.0)
        balancing = tl.broadcast_to(of_scores[None, :], [TOKENS, SLOTS])
        if padding is not None:
            valid = tl.load(padding + token, mask=exists, other=1) == 0
            balancing = tl.where(valid[:, None], balancing, 0.0)
        if SCORE == 0:
            if PRE:
                gradient = through_softmax(softmax(x, there), given + balancing)
            else:
                gradient = through_softmax(softmax(x, picked), given)
                if grad_first is not None:
                    gradient += through_softmax(softmax(x, there), balancing)
        else:
            scores, slope = score(x, there, SCORE)
            gradient = given
            if K > 1:
                gradient = tl.where(picked, through_sum(tl.where(picked, scores, 0.0), given), 0.0)
            if grad_first is not None:
                gradient += through_sum(scores, balancing)
            gradient *= slope
        tl.store(grad_logits + at, gradient.to(grad_logits.dtype.element_ty), mask=mask)
