"""Index arithmetic of redundancy bypassing in Triton: what `ops.bypass` does in plain torch, with the same results.

What a rank sends is here, what it reads in `triton_bypass_found`. Letters, bins and tables are explained in
`ops.bypass`. One kernel stands for many small operations that the host would launch one by one. No atomics: every
number is written by one program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_xmoe.kernels.triton_bypass_found import (
    BLOCK,
    add_forwarded,
    parts_of_pilots,
    read_lists,
    read_routes,
    routes_of_rows,
    write_weights,
)
from megatron_xmoe.kernels.triton_common import ceil_div, on, power_of_two

__all__ = [
    "add_forwarded",
    "number_copies",
    "order_copies",
    "parts_of_pilots",
    "read_lists",
    "read_routes",
    "routes_of_rows",
    "sources_of_rows",
    "write_meta",
    "write_weights",
]

MAX_PER_TOKEN = 128  # routes of a token that are compared pair by pair; their numbers have 8 bits in a link
PAIRS = 1024  # comparisons at a time


def order_copies(
    inverse: Tensor, expert_ids: Tensor, experts: Tensor, bin_of: Tensor, place_of: Tensor, width: int, salt: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The first half of `ops.bypass.number_copies`, for up to 128 routes of a token.

    Returns:
        [T, K] in the order of the keys: bins int64; positions in expert order int32, -1 for none; links int32, which
        are column of the copy's first route + 2**8 * column of the node's first + 2**16 * place it comes from.
    """
    tokens, per_token = inverse.shape
    bins = torch.empty(inverse.shape, dtype=torch.int64, device=inverse.device)
    positions, links = (torch.empty_like(inverse) for _ in range(2))
    if inverse.numel():
        tile, (high, low) = order_tile(per_token), divmod(salt or 0, 2**31)
        with on(inverse):
            order_kernel[(ceil_div(tokens, tile["TOKENS"]),)](
                inverse, expert_ids, experts, bin_of, place_of, bins, positions, links,
                tokens, experts.shape[0] - 1, width, low, high, K=per_token, BALANCED=salt is not None, **tile,
            )  # fmt: skip
    return bins, positions, links


def number_copies(
    bins: Tensor, positions: Tensor, links: Tensor, placed: Tensor, counts: Tensor, width: int, slots: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The second half: `number`, `pilot_number` and `words` of `Numbered`.

    Args: what the first half returns; inverse [T, K] int32 and counts [G * R + 1] of the routes built from the bins.
    """
    number, pilot_number = (torch.empty_like(positions) for _ in range(2))
    words = torch.empty(positions.numel(), dtype=torch.int32, device=bins.device)
    if bins.numel():
        with on(bins):
            number_kernel[(ceil_div(bins.numel(), BLOCK),)](
                bins, positions, links, placed, counts, counts.cumsum(0), number, pilot_number, words,
                bins.numel(), counts.shape[0] - 1, width, slots, K=bins.shape[1], BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip
    return number, pilot_number, words


def sources_of_rows(bins: Tensor, number: Tensor, table: Tensor, rows: int) -> Tensor:
    """See `ops.bypass.sources_of_rows`; the last entry is -1."""
    sources = table.new_full((rows,), -1)
    if bins.numel():
        with on(bins):
            sources_kernel[(ceil_div(bins.numel(), BLOCK),)](
                bins, number, table, sources, bins.numel(), rows - 1, table.shape[0] - 1,
                K=bins.shape[1], BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip
    return sources


def write_meta(
    units: Tensor, bins: Tensor, number: Tensor, pilot_number: Tensor, list_out: Tensor, words: Tensor, weights: Tensor,
    expert_ids: Tensor, routes_out: Tensor,
) -> None:  # fmt: skip
    """See `ops.bypass.write_meta`; words [N] and weights [N] contiguous."""
    if bins.numel() == 0:
        return
    word = list_out.shape[1]
    with on(units):
        meta_kernel[(ceil_div(bins.numel(), BLOCK),)](
            units, bins, number, pilot_number.view(units.dtype), list_out, words.view(units.dtype),
            weights.view(units.dtype), expert_ids, routes_out, bins.numel(), expert_ids.shape[0], list_out.shape[0] - 1,
            WORD=word, WEIGHT=routes_out.shape[1] - word, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip


def order_tile(per_token: int) -> dict[str, int]:
    """Launch parameters of order_kernel."""
    columns = power_of_two(per_token)
    tokens = max(1, PAIRS // columns**2)
    return {"COLUMNS": columns, "TOKENS": tokens, "num_warps": 4 if columns <= 32 else 8}


@triton.jit(do_not_specialize=["tokens", "none", "width", "salt_low", "salt_high"])
def order_kernel(
    inverse, expert_ids, experts, bin_of, place_of, bins, positions, links, tokens, none, width, salt_low, salt_high,
    K: tl.constexpr, BALANCED: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens: a route's place in the order of keys is the number of smaller ones."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, COLUMNS)
    exists = (token < tokens)[:, None] & (column < K)[None, :]
    position = tl.load(inverse + token[:, None] * K + column[None, :], mask=exists, other=-1)
    expert = tl.load(expert_ids + position, mask=position >= 0, other=0)
    row = experts + tl.where(position >= 0, expert, none).to(tl.int64) * 3
    key = tl.load(row, mask=exists, other=0x7FFFFFFFFFFFFFFF)
    if BALANCED:
        of_expert = tl.load(row + 1, mask=exists, other=0)
        of_rank = tl.load(row + 2, mask=exists, other=0)
        salt = (salt_high.to(tl.int64) << 31) + salt_low
        mixed = tl.sum(of_expert, axis=1) + (token + salt) * -0x61C8864680B583EB
        mixed = mixed ^ (mixed >> 32)
        key = key | ((mixed[:, None] * of_rank) & 0x7FFFFFFF0000)
    node = (key >> 47) << 47
    other = key[:, None, :]
    leader = tl.sum((other < key[:, :, None]).to(tl.int32), axis=2)
    before = (other == key[:, :, None]) & (column[None, None, :] < column[None, :, None])
    slot = tl.sum(before.to(tl.int32), axis=2)
    pilot = tl.sum((other < node[:, :, None]).to(tl.int32), axis=2)
    first = tl.min(tl.where(other >= node[:, :, None], other, 0x7FFFFFFFFFFFFFFF), axis=2)
    via = first & 0xFFFF
    bin = tl.load(bin_of + (key & 0xFFFF), mask=exists, other=0) + via * width
    place = tl.load(place_of + via, mask=exists, other=0)
    target = token[:, None] * K + leader + slot
    tl.store(bins + target, tl.where(slot == 0, bin, -1), mask=exists)
    tl.store(positions + target, position, mask=exists)
    tl.store(links + target, leader + (pilot << 8) + (place << 16), mask=exists)


@triton.jit
def _number(bins, placed, counts, ends, entry, token, staying, mask):
    """Numbers of copies in their bins."""
    bin = tl.load(bins + entry, mask=mask, other=0)
    index = tl.where(bin < 0, staying, bin)
    first = tl.load(ends + index, mask=mask, other=0) - tl.load(counts + index, mask=mask, other=0)
    number = tl.load(placed + entry, mask=mask, other=0) - first.to(tl.int32)
    return tl.where(bin == staying, token.to(tl.int32), number)


@triton.jit(do_not_specialize=["entries", "staying", "width", "slots"])
def number_kernel(
    bins, positions, links, placed, counts, ends, numbers, pilot_numbers, words, entries, staying, width, slots,
    K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK routes: their copy's number, and what they tell the expert's rank of it."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = entry < entries
    token = entry // K
    link = tl.load(links + entry, mask=mask, other=0)
    leader, pilot, place = link & 0xFF, (link >> 8) & 0xFF, link >> 16
    first = token * K
    number = _number(bins, placed, counts, ends, first + leader, token, staying, mask)
    word = (number * width + place) * slots + (entry - first - leader).to(tl.int32)
    position = tl.load(positions + entry, mask=mask, other=-1)
    tl.store(words + position, word, mask=position >= 0)
    number = _number(bins, placed, counts, ends, entry, token, staying, mask)
    tl.store(numbers + entry, number, mask=mask)
    number = _number(bins, placed, counts, ends, first + pilot, token, staying, mask)
    tl.store(pilot_numbers + entry, number, mask=mask)


@triton.jit(do_not_specialize=["entries", "last", "none"])
def sources_kernel(
    bins, numbers, table, sources, entries, last, none, K: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """BLOCK copies: writes their tokens where their rows are."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = entry < entries
    bin = tl.load(bins + entry, mask=mask, other=-1)
    number = tl.load(numbers + entry, mask=mask, other=0)
    row = tl.load(table + tl.where(bin < 0, none, bin)) + number
    tl.store(sources + row, entry // K, mask=mask & (row < last))


@triton.jit(do_not_specialize=["entries", "routes", "none"])
def meta_kernel(
    units, bins, numbers, pilots, list_out, words, weights, expert_ids, routes_out, entries, routes, none,
    WORD: tl.constexpr, WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK entries of lists, and BLOCK records, of which there are no more."""
    RECORD: tl.constexpr = WORD + WEIGHT
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = entry < entries
    bin = tl.load(bins + entry, mask=mask, other=-1)
    number = tl.load(numbers + entry, mask=mask, other=0)
    first = tl.load(list_out + tl.where(bin < 0, none, bin) * WORD)
    mask = mask & (first < (1 << 59))  # FAR and beyond is nowhere
    for unit in tl.static_range(WORD):
        value = tl.load(pilots + entry * WORD + unit, mask=mask, other=0)
        tl.store(units + first + number.to(tl.int64) * WORD + unit, value, mask=mask)
    mask = entry < routes
    expert = tl.load(expert_ids + entry, mask=mask, other=0).to(tl.int64)
    at = tl.load(routes_out + expert * RECORD, mask=mask, other=0) + entry * RECORD
    for unit in tl.static_range(WORD):
        tl.store(units + at + unit, tl.load(words + entry * WORD + unit, mask=mask, other=0), mask=mask)
    for unit in tl.static_range(WEIGHT):
        value = tl.load(weights + entry * WEIGHT + unit, mask=mask, other=0)
        tl.store(units + at + WORD + unit, value, mask=mask)
