"""Load-balancing losses in Triton, from the tables of triton_router.py. B sequences, E experts, P rows of a table."""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_xmoe.kernels.triton_common import on, power_of_two

TILE = 8192  # elements of a table that are added up at a time


def count(counts: Tensor) -> Tensor:
    """Numbers of routes [B, E] int64 from the programs' [P, B, E]."""
    rows, sequences, experts = counts.shape
    result = torch.empty(sequences, experts, dtype=torch.int64, device=counts.device)
    with on(counts):
        balance_kernel[(1,)](
            None, counts, None, None, None, result, 0, rows, 0,
            WEIGHT=0.0, B=sequences, E=experts, **balance_tile(experts),
        )  # fmt: skip
    return result


def balance(sums: Tensor, counts: Tensor, total: int | Tensor, weight: float, slope: Tensor) -> Tensor:
    """A load-balancing loss: weight / total**2 * sum over sequences and experts of routes * scores.

    Args:
        sums: scores [P, B, E] fp32, of which those of a sequence and expert are added up.
        counts: routes [P, B, E], or [1, B, E] if they were added up already; any type.
        total: tokens that the counts are of, of a sequence.
        slope: [B, E] fp32, to which the gradient of the sums is written.

    Returns:
        the loss, fp32 without dimensions.
    """
    rows, sequences, experts = sums.shape
    loss = torch.empty((), dtype=torch.float32, device=sums.device)
    on_device = isinstance(total, Tensor)
    with on(sums):
        balance_kernel[(1,)](
            sums, counts, total if on_device else None, loss, slope, None, rows, counts.shape[0],
            0 if on_device else total, WEIGHT=weight, B=sequences, E=experts, **balance_tile(experts),
        )  # fmt: skip
    return loss


@cache
def balance_tile(experts: int) -> dict[str, int]:
    """Launch parameters of balance_kernel."""
    columns = power_of_two(experts)
    return {"SLOTS": columns, "ROWS": max(1, TILE // columns), "num_warps": 8}


@triton.jit(do_not_specialize=["sum_rows", "count_rows", "total"])
def balance_kernel(
    sums, counts, total_on_device, loss, slope, counted, sum_rows, count_rows, total,
    WEIGHT: tl.constexpr, B: tl.constexpr, E: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: adds up tables [rows, B, E], writes numbers of routes if wanted, and the loss and its slope."""
    expert = tl.arange(0, SLOTS)
    if loss is not None:
        tokens = total.to(tl.float32)
        if total_on_device is not None:
            tokens = tl.load(total_on_device).to(tl.float32)
        factor = WEIGHT / (tokens * tokens)
        result = tl.zeros([SLOTS], tl.float32)
    for sequence in range(B):
        routes = column_sums(counts, sequence, count_rows, B, E, SLOTS, ROWS)
        if counted is not None:
            tl.store(counted + sequence * E + expert, routes.to(counted.dtype.element_ty), mask=expert < E)
        if loss is not None:
            gradient = routes.to(tl.float32) * factor
            tl.store(slope + sequence * E + expert, gradient, mask=expert < E)
            result += gradient * column_sums(sums, sequence, sum_rows, B, E, SLOTS, ROWS)
    if loss is not None:
        tl.store(loss, tl.sum(tl.where(expert < E, result, 0.0), axis=0))


@triton.jit
def column_sums(table, sequence, rows, B: tl.constexpr, E: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr):
    """Sum over the rows of table[:, sequence, :], in a fixed order."""
    column = tl.arange(0, SLOTS)
    total = tl.zeros([SLOTS], table.dtype.element_ty)
    start = tl.full([], 0, tl.int32)
    while start < rows:
        row = start + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (column < E)[None, :]
        part = tl.load(table + (row[:, None] * B + sequence) * E + column[None, :], mask=mask, other=0)
        total += tl.sum(part, axis=0).to(table.dtype.element_ty)
        start += ROWS
    return total
