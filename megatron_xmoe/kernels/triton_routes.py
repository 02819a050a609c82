"""Routing metadata in Triton. csrc/routes.h has the exact semantics, triton_common.py says where it runs.

Letters: T tokens, K routes per token, N = T*K, E experts, G sources. A stable counting sort in two launches: each
program counts the experts of its stretch of routes; then each one adds up the table of counts [programs, E] to know
where its routes go. A third launch drops routes by weight.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_xmoe.kernels.triton_common import ceil_div, on, power_of_two
from megatron_xmoe.kernels.triton_selection import fill, key_of, select_kernel

MAX_EXPERTS = 4096  # counts of all experts are held in registers
ROUTES = 128  # ranked at a time, by comparing all pairs
MAX_PROGRAMS = 128  # about one for each multiprocessor of a large GPU
TILE = 8192  # elements of a tile
FEWEST_BINS = 128  # of a histogram
SEGMENT = 1024  # routes of an expert that are looked at together when some are dropped by weight


def build_routes(
    ids: Tensor, weights: Tensor, num_experts: int, capacity: int, by_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `kernels.reference.build_routes`.

    Raises:
        ValueError: more than 4096 experts.
    """
    _check_experts(num_experts)
    count, per_token = ids.numel(), ids.shape[1]
    token_ids, expert_ids = (torch.empty(count, dtype=torch.int32, device=ids.device) for _ in range(2))
    tokens_per_expert = torch.empty(num_experts, dtype=torch.int64, device=ids.device)
    combine_weights = torch.empty(count, dtype=weights.dtype, device=ids.device)
    inverse = torch.empty(ids.shape, dtype=torch.int32, device=ids.device)
    if count == 0:
        return token_ids, expert_ids, tokens_per_expert.zero_(), combine_weights, inverse
    by_weight = by_weight and capacity >= 0
    capacity = min(capacity, count)  # as a 32-bit number
    tile = places_tile(count, num_experts)
    programs = ceil_div(count, tile["ROUTES"] * tile["PARTS"])
    shape = {"K": per_token, "E": num_experts}
    table = torch.empty(programs, num_experts, dtype=torch.int32, device=ids.device)
    results = (token_ids, expert_ids, tokens_per_expert, combine_weights, inverse)
    with on(ids):
        counts_kernel[(programs,)](ids, table, count, E=num_experts, **_without_rows(tile))
        if not by_weight:
            places_kernel[(programs,)](
                ids, weights, table, *results, None, None, count, capacity, programs,
                **shape, CAPPED=capacity >= 0, **tile,
            )  # fmt: skip
            return results
        keys = torch.empty(count, dtype=_key_type(weights), device=ids.device)
        order, totals = torch.empty_like(token_ids), torch.empty_like(tokens_per_expert)
        places_kernel[(programs,)](
            ids, weights, table, None, None, totals, None, inverse, keys, order, count, capacity, programs,
            **shape, CAPPED=False, **tile,
        )  # fmt: skip
        select_kernel[(num_experts,)](
            keys, order, totals, weights, *results, count, capacity, **shape, **select_tile(num_experts)
        )
    return results


def merge_order(counts: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Between the order (source, expert), in which rows arrive, and (expert, source).

    Args: counts [G, E] int64 on the device, with sum `num_rows` = M.

    Returns:
        to_expert_order [M] int32, the arrival position of each expert-major position, and its inverse.

    Raises:
        ValueError: more than 4096 experts.
    """
    sources, experts = counts.shape
    _check_experts(experts)
    to_expert_order, to_arrival_order = (
        torch.empty(num_rows, dtype=torch.int32, device=counts.device) for _ in range(2)
    )
    if num_rows == 0:
        return to_expert_order, to_arrival_order
    tile = merge_tile(experts)
    splits = ceil_div(num_rows, sources * tile["BLOCK"])
    with on(counts):
        merge_kernel[(sources * splits,)](
            counts, to_expert_order, to_arrival_order, splits, G=sources, E=experts, **tile
        )
    return to_expert_order, to_arrival_order


def _check_experts(experts: int) -> None:
    if experts > MAX_EXPERTS:
        raise ValueError(
            f"{experts} experts are more than the Triton kernels take, {MAX_EXPERTS}. Fix: use other kernels "
            "(--xmoe-kernels cpp or reference; XMOE_KERNELS outside the training script)"
        )


def _key_type(weights: Tensor) -> torch.dtype:
    return torch.int64 if weights.dtype == torch.float64 else torch.int32


def _bins(experts: int) -> int:
    return max(FEWEST_BINS, power_of_two(experts))


def _without_rows(tile: dict[str, int]) -> dict[str, int]:
    return {name: value for name, value in tile.items() if name not in ("ROWS", "ROW_STEPS")}


def places_tile(count: int, experts: int) -> dict[str, int]:
    """Launch parameters of counts_kernel and places_kernel.

    A program takes PARTS times ROUTES routes (a power of two: few variants are compiled), and reads the table of counts
    in ROW_STEPS steps of ROWS rows.
    """
    bins = _bins(experts)
    parts = power_of_two(ceil_div(count, ROUTES * MAX_PROGRAMS))
    programs = power_of_two(ceil_div(count, ROUTES * parts))
    rows = min(programs, max(1, TILE // bins))
    return {
        "BINS": bins,
        "ROUTES": ROUTES,
        "PARTS": parts,
        "ROWS": rows,
        "ROW_STEPS": programs // rows,
        "num_warps": 4 if bins <= 512 else 8,
    }


def select_tile(experts: int) -> dict[str, int]:
    """Launch parameters of select_kernel."""
    return {"BINS": _bins(experts), "BLOCK": SEGMENT, "num_warps": 4}


def merge_tile(experts: int) -> dict[str, int]:
    """Launch parameters of merge_kernel."""
    bins = max(32, power_of_two(experts))
    return {"BINS": bins, "ROWS": max(1, TILE // 4 // bins), "BLOCK": max(32, min(256, TILE // bins)), "num_warps": 4}


@triton.jit
def _load_experts(ids, i, count, E: tl.constexpr):
    """Experts of routes i as int32, and which of them exist."""
    expert = tl.load(ids + i, mask=i < count, other=-1).to(tl.int32)
    exists = (expert >= 0) & (expert < E)
    return tl.where(exists, expert, 0), exists


@triton.jit(do_not_specialize=["count"])
def counts_kernel(
    ids, table, count, E: tl.constexpr, BINS: tl.constexpr, ROUTES: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """table[program, e] = routes of expert e among the program's."""
    program = tl.program_id(0)
    counts = tl.zeros([BINS], dtype=tl.int32)
    for part in range(PARTS):
        i = (program * PARTS + part) * ROUTES + tl.arange(0, ROUTES)
        expert, exists = _load_experts(ids, i, count, E)
        counts += tl.histogram(expert, BINS, mask=exists)
    bins = tl.arange(0, BINS)
    tl.store(table + program * E + bins, counts, mask=bins < E)


@triton.jit(do_not_specialize=["count", "capacity", "programs"])
def places_kernel(
    ids, weights, table, token_ids, expert_ids, tokens_per_expert, combine_weights, inverse, keys, order,
    count, capacity, programs,
    K: tl.constexpr, E: tl.constexpr, CAPPED: tl.constexpr, BINS: tl.constexpr, ROUTES: tl.constexpr,
    PARTS: tl.constexpr, ROWS: tl.constexpr, ROW_STEPS: tl.constexpr,
):  # fmt: skip
    """Writes each kept route to its place. With `order` it keeps all, and writes only their numbers and keys there."""
    program = tl.program_id(0)
    bins = tl.arange(0, BINS)
    before = tl.zeros([BINS], dtype=tl.int32)  # routes of an expert in earlier programs
    total = tl.zeros([BINS], dtype=tl.int32)
    for step in range(ROW_STEPS):
        row = step * ROWS + tl.arange(0, ROWS)
        mask = (row < programs)[:, None] & (bins < E)[None, :]
        counts = tl.load(table + row[:, None] * E + bins[None, :], mask=mask, other=0)
        total += tl.sum(counts, axis=0)
        before += tl.sum(tl.where((row < program)[:, None], counts, 0), axis=0)
    kept = tl.minimum(total, capacity) if CAPPED else total
    end = tl.cumsum(kept, axis=0)
    all_kept = tl.sum(kept, axis=0)
    place_of_expert = end - kept + before
    if program == 0:
        tl.store(tokens_per_expert + bins, kept.to(tl.int64), mask=bins < E)
    for part in range(PARTS):
        i = (program * PARTS + part) * ROUTES + tl.arange(0, ROUTES)
        expert, exists = _load_experts(ids, i, count, E)
        marked = tl.where(exists, expert, -1)
        earlier = (marked[None, :] == expert[:, None]) & (i[None, :] < i[:, None])
        place = tl.gather(place_of_expert, expert, 0) + tl.sum(earlier.to(tl.int32), axis=1)
        keep = exists & (place < tl.gather(end, expert, 0)) if CAPPED else exists
        place_of_expert += tl.histogram(expert, BINS, mask=exists)
        tl.store(inverse + i, tl.where(keep, place, -1), mask=i < count)
        weight = tl.load(weights + i, mask=keep, other=0)
        if order is None:
            tl.store(token_ids + place, i // K, mask=keep)
            tl.store(expert_ids + place, expert, mask=keep)
            tl.store(combine_weights + place, weight, mask=keep)
            fill(token_ids, expert_ids, combine_weights, i, (i >= all_kept) & (i < count))
        else:
            tl.store(order + place, i, mask=keep)
            tl.store(keys + place, key_of(weight), mask=keep)


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(
    counts, to_expert_order, to_arrival_order, splits,
    G: tl.constexpr, E: tl.constexpr, BINS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every `splits`-th stretch of BLOCK rows of one source."""
    source = tl.program_id(0) // splits
    bins = tl.arange(0, BINS)
    above = tl.zeros([BINS], dtype=tl.int32)  # rows of an expert from earlier sources
    total = tl.zeros([BINS], dtype=tl.int32)
    own = tl.zeros([BINS], dtype=tl.int32)
    for start in range(0, G, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < G)[:, None] & (bins < E)[None, :]
        part = tl.load(counts + row[:, None] * E + bins[None, :], mask=mask, other=0).to(tl.int32)
        total += tl.sum(part, axis=0)
        above += tl.sum(tl.where((row < source)[:, None], part, 0), axis=0)
        own += tl.sum(tl.where((row == source)[:, None], part, 0), axis=0)
    first = tl.sum(above, axis=0)
    arrival_end = first + tl.cumsum(own, axis=0)
    distance = tl.cumsum(total, axis=0) - total + above - (arrival_end - own)
    end = first + tl.sum(own, axis=0)
    begin = first + tl.program_id(0) % splits * BLOCK
    while begin < end:
        arrival = begin + tl.arange(0, BLOCK)
        expert = tl.sum((arrival[:, None] >= arrival_end[None, :]).to(tl.int32), axis=1)
        place = arrival + tl.gather(distance, tl.minimum(expert, BINS - 1), 0)
        tl.store(to_arrival_order + arrival, place, mask=arrival < end)
        tl.store(to_expert_order + place, arrival, mask=arrival < end)
        begin += splits * BLOCK
