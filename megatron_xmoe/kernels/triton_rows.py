"""Row movement in Triton. csrc/rows.h has the exact semantics, triton_common.py says where it runs.

Letters: T tokens, K routes per token, R rows of the source, M rows of the result, H hidden size, P listed positions.
A program holds a tile of rows x BLOCK columns; a thread moves 16 bytes at a time wherever H allows. Row numbers become
64-bit before they are multiplied. Launch parameters follow from shapes and types alone, so the same call gives the same
bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_xmoe.kernels.reference import accumulator
from megatron_xmoe.kernels.triton_common import ceil_div, on, power_of_two, vector_length, warp_size

TILE_BYTES = 2048  # of one row; 128 threads times 16 bytes
THREADS = 128
MAX_UNROLL = 16  # routes of a token whose rows are in flight together


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """out[m] = x[index[m]], zeros for none. x [R, H], index [M]; returns [M, H]."""
    count, hidden = index.shape[0], x.shape[1]
    out = x.new_empty(count, hidden)
    if out.numel() == 0:
        return out
    tile = gather_tile(hidden, x.dtype, warp_size(x.device))
    grid = ceil_div(count, tile["ROWS"]) * ceil_div(hidden, tile["BLOCK"])
    with on(x):
        gather_kernel[(grid,)](x, index, out, count, H=hidden, **tile)
    return out


def spread_rows(
    x: Tensor, index: Tensor, owners: Tensor, weights: Tensor | None = None, y: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """rows[index[t, k]] = weights[t, k] * x[t], and dots[t, k] = y[index[t, k]] . x[t] where y is given.

    Args:
        x: [T, H]. index: [T, K], which names no row twice.
        owners: [R], negative for the rows that `index` does not name; they become zeros.
        weights: [T, K] in the accumulator's type, or None for ones.
        y: [R, H] or None.

    Returns:
        rows [R, H]; dots [T, K] in the accumulator's type, 0 where index < 0, or None without y.
    """
    rows = x.new_empty(owners.shape[0], x.shape[1])
    dots = None if y is None else torch.empty(index.shape, dtype=accumulator(x.dtype), device=x.device)
    _spread(x, index, owners, weights, y, rows, dots)
    return rows, dots


def dot_rows(y: Tensor, index: Tensor, x: Tensor) -> Tensor:
    """dots[t, k] = y[index[t, k]] . x[t], 0 for none. y [R, H], x [T, H]; returns [T, K] in the accumulator's type."""
    dots = torch.empty(index.shape, dtype=accumulator(x.dtype), device=x.device)
    _spread(x, index, None, None, y, None, dots)
    return dots


def _spread(x, index, owners, weights, y, rows, dots) -> None:
    (tokens, per_token), hidden = index.shape, x.shape[1]
    if dots is not None and hidden == 0:
        dots.zero_()
    if hidden == 0:
        return
    tile = spread_tile(hidden, per_token, x.dtype, warp_size(x.device), dots is not None)
    programs = ceil_div(tokens, tile["TOKENS"]) * ceil_div(per_token, tile["ROUTES"])
    if dots is None:
        programs *= ceil_div(hidden, tile["BLOCK"])
    count = 0 if rows is None else rows.shape[0]
    grid = programs + ceil_div(count, tile["CLEARED"])
    if grid == 0:
        return
    with on(x):
        spread_kernel[(grid,)](
            x, index, owners, weights, y, rows, dots, tokens, count, programs,
            K=per_token, H=hidden, **tile,
        )  # fmt: skip


def sum_rows(y: Tensor, index: Tensor, weights: Tensor | None = None, offsets: Tensor | None = None) -> Tensor:
    """out[t] = sum over k of weights[t, k] * y[index[t, k]], from the first k to the last.

    Args:
        y: [R, H].
        index: [T, K], or with offsets flat [P]. -1 adds nothing.
        weights: shaped like index, in the accumulator's type, or None for ones.
        offsets: [T + 1] int64: token t sums over the positions offsets[t] up to offsets[t + 1].

    Returns:
        [T, H]
    """
    tokens, per_token = (index.shape[0], index.shape[1]) if offsets is None else (offsets.shape[0] - 1, None)
    hidden = y.shape[1]
    out = y.new_empty(tokens, hidden)
    if out.numel() == 0:
        return out
    tile = sum_tile(hidden, per_token, y.dtype, warp_size(y.device))
    grid = ceil_div(tokens, tile["TOKENS"]) * ceil_div(hidden, tile["BLOCK"])
    with on(y):
        sum_kernel[(grid,)](y, index, offsets, weights, out, tokens, K=per_token, H=hidden, **tile)
    return out


def _block(hidden: int, dtype: torch.dtype) -> int:
    return min(power_of_two(hidden), TILE_BYTES // dtype.itemsize)


def _warps(elements: int, dtype: torch.dtype, warp: int) -> int:
    """Warps of a tile: one access of a thread covers it, with THREADS threads at most."""
    threads = min(THREADS, max(warp, elements * dtype.itemsize // 16))
    return power_of_two(threads // warp)


def gather_tile(hidden: int, dtype: torch.dtype, warp: int) -> dict[str, int | str]:
    """Launch parameters of gather_kernel."""
    block = _block(hidden, dtype)
    rows = max(4, TILE_BYTES // dtype.itemsize // block)
    return {"ROWS": rows, "BLOCK": block, "STORE": "", "num_warps": _warps(rows * block, dtype, warp)}


def spread_tile(hidden: int, per_token: int, dtype: torch.dtype, warp: int, dot: bool) -> dict[str, int | str]:
    """Launch parameters of spread_kernel; `dot`: with the row dot products."""
    block = _block(hidden, dtype)
    tokens = max(1, TILE_BYTES // dtype.itemsize // block)
    return {
        "VECTOR": vector_length(hidden, dtype.itemsize),
        "ROUTES": min(power_of_two(per_token), MAX_UNROLL),
        "TOKENS": tokens,
        "BLOCK": block,
        "CLEARED": 16,
        "LOAD": "",
        "STORE": "",
        "num_warps": _warps(tokens * block, dtype, warp),
    }


def sum_tile(hidden: int, per_token: int | None, dtype: torch.dtype, warp: int) -> dict[str, int | str]:
    """Launch parameters of sum_kernel; no `per_token` where it varies."""
    block = _block(hidden, dtype)
    tokens = max(1, TILE_BYTES // dtype.itemsize // block)
    return {
        "TOKENS": tokens,
        "BLOCK": block,
        "UNROLL": 4 if per_token is None else max(1, min(per_token, MAX_UNROLL)),
        "LOAD": "",
        "STORE": "",
        "num_warps": _warps(tokens * block, dtype, warp),
        "enable_fp_fusion": False,  # products are rounded before they are added, as in the other backends
    }


@triton.jit(do_not_specialize=["count"])
def gather_kernel(
    x, index, out, count,
    H: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """ROWS rows of the result, BLOCK columns."""
    blocks = tl.cdiv(H, BLOCK)
    program = tl.program_id(0)
    m = (program // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = (columns < H)[None, :]
    source = tl.load(index + m, mask=m < count, other=-1).to(tl.int64)
    from_rows = x + source[:, None] * H + columns[None, :]
    values = tl.load(from_rows, mask=(source >= 0)[:, None] & inside, other=0)
    to_rows = out + m[:, None] * H + columns[None, :]
    tl.store(to_rows, values, mask=(m < count)[:, None] & inside, cache_modifier=STORE)


@triton.jit(do_not_specialize=["tokens", "count", "programs"])
def spread_kernel(
    x, index, owners, weights, y, rows, dots, tokens, count, programs,
    K: tl.constexpr, H: tl.constexpr, VECTOR: tl.constexpr, ROUTES: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK: tl.constexpr, CLEARED: tl.constexpr, LOAD: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """The first `programs` take TOKENS tokens and ROUTES of their routes; the others clear rows that nobody owns.

    Without dots a program has BLOCK columns, with dots all of them. None for rows leaves out the movement.
    """
    program = tl.program_id(0)
    if program < programs:
        blocks = 1 if dots is not None else tl.cdiv(H, BLOCK)
        parts = tl.cdiv(K, ROUTES) if K > 0 else 1
        first = program % blocks * BLOCK
        token = (program // blocks // parts).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
        route = program // blocks % parts * ROUTES + tl.arange(0, ROUTES)
        at = token[:, None] * K + route[None, :]
        there = (token < tokens)[:, None] & (route < K)[None, :]
        row = tl.load(index + at, mask=there, other=-1).to(tl.int64)
        weight = None if weights is None else tl.load(weights + at, mask=there, other=0)
        if dots is None:
            _spread_block(x, rows, y, token, tokens, row, weight, first, H, BLOCK, VECTOR, LOAD, STORE)
        else:
            sums = tl.zeros([TOKENS, ROUTES, BLOCK // VECTOR], dtype=dots.dtype.element_ty)
            for start in range(0, H, BLOCK):
                sums += _spread_block(x, rows, y, token, tokens, row, weight, start, H, BLOCK, VECTOR, LOAD, STORE)
            tl.store(dots + at, tl.where(row < 0, 0, tl.sum(sums, axis=2)), mask=there)
    elif rows is not None:
        r = (program - programs).to(tl.int64) * CLEARED + tl.arange(0, CLEARED)
        free = tl.load(owners + r, mask=r < count, other=0) < 0
        if tl.max(free.to(tl.int32), axis=0) > 0:
            zeros = tl.zeros([CLEARED, BLOCK], dtype=rows.dtype.element_ty)
            for start in range(0, H, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                to_rows = rows + r[:, None] * H + columns[None, :]
                tl.store(to_rows, zeros, mask=free[:, None] & (columns < H)[None, :])


@triton.jit
def _spread_block(
    x, rows, y, token, tokens, row, weight, start,
    H: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, LOAD: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """Moves columns start .. start + BLOCK; returns the products with y, summed over each VECTOR columns."""
    columns = start + tl.arange(0, BLOCK)
    inside = columns < H
    from_x = x + token[:, None] * H + columns[None, :]
    values = tl.load(from_x, mask=(token < tokens)[:, None] & inside[None, :], other=0, eviction_policy=LOAD)
    values = values[:, None, :]
    place = row[:, :, None] * H + columns[None, None, :]
    mask = (row >= 0)[:, :, None] & inside[None, None, :]
    products = None
    if y is not None:
        accumulator: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
        others = tl.load(y + place, mask=mask, other=0, eviction_policy=LOAD)
        products = values.to(accumulator) * others.to(accumulator)
        shape: tl.constexpr = [row.shape[0], row.shape[1], BLOCK // VECTOR, VECTOR]
        products = tl.sum(tl.reshape(products, shape), axis=3)
    if rows is not None:
        if weight is None:
            moved = tl.broadcast_to(values, [row.shape[0], row.shape[1], BLOCK])
        else:
            moved = (values.to(weight.dtype) * weight[:, :, None]).to(x.dtype.element_ty)
        tl.store(rows + place, moved, mask=mask, cache_modifier=STORE)
    return products


@triton.jit(do_not_specialize=["tokens"])
def sum_kernel(
    y, index, offsets, weights, out, tokens,
    K: tl.constexpr, H: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
    LOAD: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """TOKENS rows of the result, BLOCK columns; UNROLL rows of the source are loaded before they are added."""
    accumulator: tl.constexpr = tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32
    blocks = tl.cdiv(H, BLOCK)
    program = tl.program_id(0)
    token = (program // blocks).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    columns = program % blocks * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([TOKENS, BLOCK], dtype=accumulator)
    if offsets is None:
        for start in range(0, K, UNROLL):
            at = token * K + start
            end = tl.where(token < tokens, token * K + K, 0)
            sums = _add_rows(sums, y, index, weights, at, end, columns, H, UNROLL, LOAD)
    else:
        at = tl.load(offsets + token, mask=token < tokens, other=0)
        end = tl.load(offsets + token + 1, mask=token < tokens, other=0)
        while tl.max(end - at, axis=0) > 0:  # Triton 3.6's interpreter cannot run a range of unknown length
            sums = _add_rows(sums, y, index, weights, at, end, columns, H, UNROLL, LOAD)
            at += UNROLL
    to_rows = out + token[:, None] * H + columns[None, :]
    mask = (token < tokens)[:, None] & (columns < H)[None, :]
    tl.store(to_rows, sums.to(out.dtype.element_ty), mask=mask, cache_modifier=STORE)


@triton.jit
def _add_rows(
    sums, y, index, weights, at, end, columns, H: tl.constexpr, UNROLL: tl.constexpr, LOAD: tl.constexpr
):  # fmt: skip
    """Adds the rows listed at positions at .. at + UNROLL, as far as they are before `end`."""
    for k in tl.static_range(UNROLL):
        row = tl.load(index + at + k, mask=at + k < end, other=-1).to(tl.int64)
        from_rows = y + row[:, None] * H + columns[None, :]
        mask = (row >= 0)[:, None] & (columns < H)[None, :]
        values = tl.load(from_rows, mask=mask, other=0, eviction_policy=LOAD).to(sums.dtype)
        if weights is not None:
            weight = tl.load(weights + at + k, mask=at + k < end, other=0)
            values *= tl.where(row < 0, 0, weight)[:, None]
        sums += values
    return sums
