"""Index arithmetic of redundancy bypassing in Triton: what `ops.bypass` does in plain torch, with the same results.

Letters, bins and tables are explained there. One kernel stands for many small operations that the host would launch one
by one. No atomics: every number is written by one program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_xmoe.kernels.triton_common import ceil_div, on, power_of_two

MAX_PER_TOKEN = 128  # routes of a token that are compared pair by pair; their numbers have 8 bits in a link
BLOCK = 256  # things of a program
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


def read_lists(units: Tensor, ends: Tensor, list_in: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """See `ops.bypass.read_lists`."""
    segment = torch.empty(total, dtype=torch.int64, device=units.device)
    number = torch.empty(total, dtype=torch.int32, device=units.device)
    if total:
        with on(units):
            lists_kernel[(ceil_div(total, BLOCK),)](
                units, ends, list_in, segment, number, total, ends.shape[0],
                WORD=list_in.shape[1], **_search(ends),
            )  # fmt: skip
    return segment, number


def read_routes(
    units: Tensor, ends: Tensor, routes_in: Tensor, sources: Tensor, total: int, width: int, slots: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `ops.bypass.read_routes`."""
    segment, copy = (torch.empty(total, dtype=torch.int64, device=units.device) for _ in range(2))
    number, slotted = (torch.empty(total, dtype=torch.int32, device=units.device) for _ in range(2))
    weights = torch.empty(total, dtype=dtype, device=units.device)
    if total:
        weight = dtype.itemsize // units.element_size()
        with on(units):
            routes_kernel[(ceil_div(total, BLOCK),)](
                units, ends, routes_in, sources, segment, copy, number, slotted, weights.view(units.dtype),
                total, ends.shape[0], width, slots,
                WORD=routes_in.shape[1] - weight, WEIGHT=weight, **_search(ends),
            )  # fmt: skip
    return segment, copy, number, slotted, weights


def routes_of_rows(copy: Tensor, slotted: Tensor, copies: Tensor, rows: int, slots: int) -> Tensor:
    """See `ops.bypass.routes_of_rows`."""
    table = copies.new_full((rows, slots), -1)
    if copy.numel():
        with on(copy):
            rows_kernel[(ceil_div(copy.numel(), BLOCK),)](
                copy, slotted, copies, table, copy.numel(), slots, BLOCK=BLOCK, num_warps=4
            )
    return table


def parts_of_pilots(
    segment: Tensor, number: Tensor, list_rows: Tensor, first: int, rows: int, spare: int, members: int, local: int
) -> Tensor:
    """See `ops.bypass.parts_of_pilots`."""
    table = torch.empty(rows + spare, members, dtype=torch.int64, device=segment.device)
    programs, total = ceil_div(table.numel(), BLOCK), segment.numel()
    shape = {"BLOCK": BLOCK, "num_warps": 4}
    with on(segment):
        own_parts_kernel[(programs,)](table, table.numel(), rows, first, members, local, **shape)
        if total:
            parts_kernel[(ceil_div(total, BLOCK),)](segment, number, list_rows, table, total, members, **shape)
    return table


def add_forwarded(index: Tensor, segment: Tensor, number: Tensor, list_rows: Tensor) -> None:
    """See `ops.bypass.add_forwarded`."""
    total = segment.numel()
    if total:
        with on(index):
            forwarded_kernel[(ceil_div(total, BLOCK),)](
                segment, number, list_rows, index, total, BLOCK=BLOCK, num_warps=4
            )


def write_weights(units: Tensor, segment: Tensor, weights: Tensor, begins: Tensor, record: int) -> None:
    """See `ops.bypass.write_weights`."""
    total = segment.numel()
    if total:
        with on(units):
            weights_kernel[(ceil_div(total, BLOCK),)](
                units, segment, weights.view(units.dtype), begins, total,
                RECORD=record, WEIGHT=begins.shape[1], BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip


def order_tile(per_token: int) -> dict[str, int]:
    """Launch parameters of order_kernel."""
    columns = power_of_two(per_token)
    tokens = max(1, PAIRS // columns**2)
    return {"COLUMNS": columns, "TOKENS": tokens, "num_warps": 4 if columns <= 32 else 8}


def _search(ends: Tensor) -> dict[str, int]:
    return {"STEPS": ends.shape[0].bit_length(), "BLOCK": BLOCK, "num_warps": 4}


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


@triton.jit
def _segment(ends, number, segments, mask, STEPS: tl.constexpr):
    """How many segments end at or before a number."""
    low = number * 0
    high = low + segments
    for _ in range(STEPS):
        middle = (low + high) // 2
        open_ = mask & (low < high)
        passed = tl.load(ends + middle, mask=open_, other=0) <= number
        low = tl.where(open_ & passed, middle + 1, low)
        high = tl.where(open_ & ~passed, middle, high)
    return low


@triton.jit
def _word(units, at, mask, WORD: tl.constexpr):
    """int32 numbers that begin at units."""
    value = tl.load(units + at, mask=mask, other=0).to(tl.int32)
    if WORD == 2:
        value = (value & 0xFFFF) | (tl.load(units + at + 1, mask=mask, other=0).to(tl.int32) << 16)
    return value


@triton.jit(do_not_specialize=["total", "segments"])
def lists_kernel(
    units, ends, list_in, owners, numbers, total, segments,
    WORD: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK entries of the lists of rows to forward."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < total
    segment = _segment(ends, i, segments, mask, STEPS)
    at = tl.load(list_in + segment * WORD, mask=mask, other=0) + i * WORD
    tl.store(owners + i, segment, mask=mask)
    tl.store(numbers + i, _word(units, at, mask, WORD), mask=mask)


@triton.jit(do_not_specialize=["total", "segments", "width", "slots"])
def routes_kernel(
    units, ends, routes_in, sources, owners, copies, numbers, slotted, weights, total, segments, width, slots,
    WORD: tl.constexpr, WEIGHT: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK records of routes."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < total
    segment = _segment(ends, i, segments, mask, STEPS)
    at = tl.load(routes_in + segment * (WORD + WEIGHT), mask=mask, other=0) + i * (WORD + WEIGHT)
    word = _word(units, at, mask, WORD)
    copy = word // slots
    number = copy // width
    place = copy - number * width
    tl.store(owners + i, segment, mask=mask)
    tl.store(copies + i, tl.load(sources + segment, mask=mask, other=0) + place, mask=mask)
    tl.store(numbers + i, number, mask=mask)
    tl.store(slotted + i, number * slots + word - copy * slots, mask=mask)
    for unit in tl.static_range(WEIGHT):
        value = tl.load(units + at + WORD + unit, mask=mask, other=0)
        tl.store(weights + i * WEIGHT + unit, value, mask=mask)


@triton.jit(do_not_specialize=["total", "slots"])
def rows_kernel(copies_of, slotted, copies, table, total, slots, BLOCK: tl.constexpr):
    """BLOCK routes: writes their numbers to the rows of their copies."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < total
    first = tl.load(copies + tl.load(copies_of + i, mask=mask, other=0), mask=mask, other=0)
    tl.store(table + first * slots + tl.load(slotted + i, mask=mask, other=0), i, mask=mask)


@triton.jit(do_not_specialize=["entries", "rows", "first", "members", "local"])
def own_parts_kernel(table, entries, rows, first, members, local, BLOCK: tl.constexpr):
    """BLOCK entries of a table in which each row between nodes is a part of itself."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = i // members
    is_own = (i - row * members == local) & (row < rows)
    tl.store(table + i, tl.where(is_own, first + row, -1), mask=i < entries)


@triton.jit(do_not_specialize=["total", "members"])
def parts_kernel(segments, numbers, list_rows, table, total, members, BLOCK: tl.constexpr):
    """BLOCK rows that were forwarded: each is a part of its pilot."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < total
    row = list_rows + tl.load(segments + i, mask=mask, other=0) * 3
    number = tl.load(numbers + i, mask=mask, other=0).to(tl.int64)
    part = tl.load(row, mask=mask, other=0) + i
    tl.store(table + tl.load(row + 2, mask=mask, other=0) + number * members, part, mask=mask)


@triton.jit(do_not_specialize=["total"])
def forwarded_kernel(segments, numbers, list_rows, index, total, BLOCK: tl.constexpr):
    """BLOCK rows to forward: writes where their pilots are."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < total
    row = list_rows + tl.load(segments + i, mask=mask, other=0) * 3
    pilot = tl.load(row + 1, mask=mask, other=0) + tl.load(numbers + i, mask=mask, other=0)
    tl.store(index + tl.load(row, mask=mask, other=0) + i, pilot, mask=mask)


@triton.jit(do_not_specialize=["total"])
def weights_kernel(
    units, segments, weights, begins, total, RECORD: tl.constexpr, WEIGHT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """BLOCK weights that return."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < total
    first = tl.load(begins + tl.load(segments + i, mask=mask, other=0) * WEIGHT, mask=mask, other=0)
    mask = mask & (first < (1 << 59))  # FAR and beyond is nowhere
    for unit in tl.static_range(WEIGHT):
        value = tl.load(weights + i * WEIGHT + unit, mask=mask, other=0)
        tl.store(units + first + i * RECORD + unit, value, mask=mask)
