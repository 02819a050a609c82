"""Index arithmetic of redundancy bypassing in Triton, second part: what a rank reads of the metadata that arrived, and
the tables of what it found. `triton_bypass` has the first part, and what holds for both.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_xmoe.kernels.triton_common import ceil_div, on

BLOCK = 256  # things of a program


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


def _search(ends: Tensor) -> dict[str, int]:
    return {"STEPS": ends.shape[0].bit_length(), "BLOCK": BLOCK, "num_warps": 4}


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
