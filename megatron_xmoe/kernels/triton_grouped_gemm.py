"""Triton: the experts' matrix products over an expert-major buffer, for NVIDIA and AMD GPUs.

Letters: M rows in the buffer, E experts, D features in, N features out. Rows of an expert are contiguous; `ends` [E]
int32 holds the row after each expert's last. Programs are persistent: each takes one tile after the other. A tile of
rows belongs to one expert. Where the hardware has it, tiles travel through the tensor memory accelerator (TMA).
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.ragged_tma import create_ragged_descriptor, to_ragged_indices
from triton.tools.tensor_descriptor import TensorDescriptor

from megatron_xmoe.kernels.triton_common import ceil_div, on, power_of_two

MAP_BLOCK = 32  # row tiles of a program of the map kernel
LARGE_TILE = 213_016  # bytes of shared memory that the largest tile needs, its way out included
TMA_BYTES = 16  # what the length and the start of a row have to be a multiple of
GROUP = 4  # row tiles that are computed next to each other, for the sake of the L2 cache


@triton.jit
def map_kernel(
    ends, tiles, rows, limits, experts,
    E: tl.constexpr, E_BLOCK: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """First row, end of the expert's rows, and expert of each row tile; their number in `tiles`."""
    e = tl.arange(0, E_BLOCK)
    end = tl.load(ends + e, mask=e < E, other=0)
    start = tl.load(ends + e - 1, mask=(e > 0) & (e < E), other=0)
    count = tl.where(e < E, (end - start + BM - 1) // BM, 0)
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    passed = (tl.cumsum(count, axis=0)[None, :] <= tile[:, None]) & (e < E)[None, :]
    expert = tl.sum(passed.to(tl.int32), axis=1)
    before = tl.sum(tl.where(passed, count[None, :], 0), axis=1)
    total = tl.sum(count, axis=0)
    there = tile < total
    first = tl.load(ends + expert - 1, mask=there & (expert > 0), other=0)
    tl.store(rows + tile, first + (tile - before) * BM, mask=there)
    tl.store(limits + tile, tl.load(ends + expert, mask=there, other=0), mask=there)
    tl.store(experts + tile, expert, mask=there)
    if tl.program_id(0) == 0:
        tl.store(tiles, total)


@triton.jit
def place_of(tile, m_tiles, n_tiles, GROUP: tl.constexpr):
    """Row and column tile of a tile: GROUP row tiles next to each other take a column before the next one."""
    block = tile // (GROUP * n_tiles)
    height = tl.minimum(m_tiles - block * GROUP, GROUP)
    place = tile - block * GROUP * n_tiles
    return block * GROUP + place % height, place // height


@triton.jit
def part_of(x, row, row_end, column, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """x[row:row + ROWS, column:column + COLUMNS] of x [., width]; zeros from `row_end` and `width` on."""
    rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    mask = (rows < row_end)[:, None] & (columns < width)[None, :]
    return tl.load(x + rows.to(tl.int64)[:, None] * width + columns[None, :], mask=mask, other=0)


@triton.jit
def multiply_kernel(
    a, a_tma, w, w_tma, c, c_tma, index, tiles, tile_rows, tile_limits, tile_experts, programs, D, N,
    TRANSPOSED: tl.constexpr, GATHER: tl.constexpr, TMA: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """c[m] = a[m] times the weight of the row's expert, [N, D], or [D, N] where TRANSPOSED; a[index[m]] with GATHER."""
    m_tiles, n_tiles = tl.load(tiles), tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), m_tiles * n_tiles, programs):
        m, n = place_of(tile, m_tiles, n_tiles, GROUP)
        row, limit, expert = tl.load(tile_rows + m), tl.load(tile_limits + m), tl.load(tile_experts + m)
        n *= BN
        lines, columns = row + tl.arange(0, BM), n + tl.arange(0, BN)
        there = lines < limit
        if GATHER:
            a_rows = a + tl.load(index + lines, mask=there, other=0).to(tl.int64)[:, None] * D
        if not TMA:
            weight = w + expert.to(tl.int64) * N * D
        total = tl.zeros([BM, BN], tl.float32)
        for k in range(0, D, BK):
            if GATHER:
                features = k + tl.arange(0, BK)
                x = tl.load(a_rows + features[None, :], mask=there[:, None] & (features < D)[None, :], other=0)
            elif TMA:
                x = a_tma.load([row, k])
            else:
                x = part_of(a, row, limit, k, D, BM, BK)
            if TMA and TRANSPOSED:
                y = w_tma.load([expert, k, n]).reshape(BK, BN)
            elif TMA:
                y = w_tma.load([expert, n, k]).reshape(BN, BK).T
            elif TRANSPOSED:
                y = part_of(weight, k, D, n, N, BK, BN)
            else:
                y = part_of(weight, n, N, k, D, BN, BK).T
            total = tl.dot(x, y, total, input_precision="ieee")
        result = total.to(c.dtype.element_ty)
        whole = row + BM <= limit  # the accelerator would write into the next expert's rows
        if TMA and whole:
            c_tma.store([row, n], result)
        else:
            inside = there[:, None] & (columns < N)[None, :]
            tl.store(c + lines.to(tl.int64)[:, None] * N + columns[None, :], result, mask=inside)


@triton.jit
def weight_gradient_kernel(
    grad, grad_tma, x, x_tma, out, out_tma, ends, programs, E, N, D,
    TMA: tl.constexpr, ACCUMULATE: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out[e] = sum over the rows m of expert e of grad[m] (outer) x[m]: [N, D]; plus what is there if ACCUMULATE."""
    n_tiles, d_tiles = tl.cdiv(N, BN), tl.cdiv(D, BD)
    for tile in tl.range(tl.program_id(0), E * n_tiles * d_tiles, programs):
        expert = tile // (n_tiles * d_tiles)
        n, d = place_of(tile - expert * n_tiles * d_tiles, n_tiles, d_tiles, GROUP)
        n, d = n * BN, d * BD
        start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
        end = tl.load(ends + expert)
        total = tl.zeros([BN, BD], tl.float32)
        for row in range(start, end, BK):
            if TMA:  # zeros from `end` on; written out, because Triton's interpreter cannot run `load_ragged`
                bound, behind, first = to_ragged_indices(start, end - start, row - start)
                left = grad_tma.load([bound, behind, first, n]).reshape(BK, BN).T
                right = x_tma.load([bound, behind, first, d]).reshape(BK, BD)
            else:
                left, right = part_of(grad, row, end, n, N, BK, BN).T, part_of(x, row, end, d, D, BK, BD)
            total = tl.dot(left, right, total, input_precision="ieee")
        if out_tma is not None:
            out_tma.store([expert, n, d], total.to(out.dtype.element_ty).reshape(1, BN, BD))
        else:  # one half of the columns after the other, for which registers are left
            halves = total.reshape(BN, 2, BD // 2).permute(0, 2, 1).split()
            lines = n + tl.arange(0, BN)
            for half in tl.static_range(2):
                columns = d + half * (BD // 2) + tl.arange(0, BD // 2)
                inside = (lines < N)[:, None] & (columns < D)[None, :]
                target = out + expert.to(tl.int64) * N * D + lines.to(tl.int64)[:, None] * D + columns[None, :]
                result = halves[half]
                if ACCUMULATE:
                    result += tl.load(target, mask=inside, other=0).to(tl.float32)
                tl.store(target, result.to(out.dtype.element_ty), mask=inside)


def tile_of(tma: bool, itemsize: int, shared_memory: int) -> dict[str, int]:
    """Launch parameters: rows, columns and depth of a tile; on a Hopper found by trying on one H200, else a guess.

    Args: whether tiles travel through the accelerator; bytes of an element; shared memory that a program may have.
    """
    if tma and shared_memory >= LARGE_TILE:
        return {"BM": 128, "BN": 256, "BK": 64, "num_warps": 8, "num_stages": 3}
    if tma:  # consumer Blackwell has the accelerator, and 99 KiB
        return {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 2}
    tile = {"BM": 128, "BN": 128, "BK": 64 // itemsize, "num_warps": 8, "num_stages": 3}
    if torch.version.hip is not None:  # 64 KiB of shared memory
        tile.update(num_warps=4, num_stages=2)
    return tile


def multiply(
    rows: Tensor, weight: Tensor, ends: Tensor, index: Tensor | None = None, transposed: bool = False
) -> Tensor:
    """Each row times its expert's weight, summed in fp32.

    Args:
        rows: [M, D]; [R, D] with `index`. bf16, fp16 or fp32.
        weight: [E, N, D]; [E, D, N] where `transposed`. Dtype of rows.
        ends: [E] int32.
        index: [M] int32, no negative numbers: which of `rows` is each row of the buffer. None for a buffer.

    Returns:
        [M, N] in rows' dtype.
    """
    M, D = (rows if index is None else index).shape[0], rows.shape[1]
    N = weight.shape[2 if transposed else 1]
    out = rows.new_empty(M, N)
    if not out.numel():
        return out
    rows, weight = rows.contiguous(), weight.contiguous()
    tma = has_tma(rows.device) and fits_tma(rows, weight, out)
    tile = tile_of(tma, rows.element_size(), shared_memory(rows.device))
    BM, BN, BK = tile["BM"], tile["BN"], tile["BK"]
    with on(rows):
        programs = processors(rows.device) * (1 if tma else 2)
        multiply_kernel[(programs,)](
            rows, described(rows, BM, BK, there=tma and index is None),
            weight, described(weight, 1, *((BK, BN) if transposed else (BN, BK)), there=tma),
            out, described(out, BM, BN, there=tma),
            index, *tile_map(ends, M, BM), programs, D, N,
            TRANSPOSED=transposed, GATHER=index is not None, TMA=tma, GROUP=GROUP, **tile,
        )  # fmt: skip
    return out


def weight_gradient(
    grad: Tensor, rows: Tensor, ends: Tensor, out: Tensor | None = None, accumulate: bool = False
) -> Tensor:
    """Gradient of `multiply`'s weight, summed in fp32.

    Args:
        grad: [M, N], of the result. bf16, fp16 or fp32.
        rows: [M, D]. Dtype of grad.
        ends: [E] int32.
        out: [E, N, D], of any floating dtype, that takes the result; a new tensor of grad's dtype if None.
        accumulate: add to `out` what it holds.

    Returns:
        `out`: zeros for experts without rows.
    """
    E, N, D = ends.shape[0], grad.shape[1], rows.shape[1]
    if out is None:
        out = grad.new_empty(E, N, D)
    if not out.numel() or not grad.shape[0]:
        return out if accumulate else out.zero_()
    grad, rows = grad.contiguous(), rows.contiguous()
    tma = has_tma(grad.device) and fits_tma(grad, rows)
    tile = tile_of(tma, grad.element_size(), shared_memory(grad.device))
    tile["BN"], tile["BD"] = tile.pop("BM"), tile["BN"]
    with on(grad):
        BN, BD, BK = tile["BN"], tile["BD"], tile["BK"]
        programs = processors(grad.device) * (1 if tma else 2)
        weight_gradient_kernel[(programs,)](
            grad, create_ragged_descriptor(grad, (BK, BN)) if tma else None,
            rows, create_ragged_descriptor(rows, (BK, BD)) if tma else None,
            out, described(out, 1, BN, BD, there=tma and not accumulate and fits_tma(out)), ends, programs, E, N, D,
            TMA=tma, ACCUMULATE=accumulate, GROUP=GROUP, **tile,
        )  # fmt: skip
    return out


def tile_map(ends: Tensor, num_rows: int, rows_of_tile: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The number of row tiles [1], and of each its first row, the end of its expert's rows and its expert; int32."""
    num_experts = ends.shape[0]
    most = ceil_div(num_rows // rows_of_tile + num_experts, 4) * 4  # all three start at multiples of 16 bytes, always
    tiles = torch.empty(1, dtype=torch.int32, device=ends.device)
    rows, limits, experts = torch.empty(3, most, dtype=torch.int32, device=ends.device)
    map_kernel[(ceil_div(most, MAP_BLOCK),)](
        ends, tiles, rows, limits, experts, num_experts, power_of_two(num_experts), rows_of_tile, MAP_BLOCK
    )
    return tiles, rows, limits, experts


def fits_tma(*tensors: Tensor) -> bool:
    """Whether these have 16-bit elements and rows that start at multiples of 16 bytes, as the accelerator wants."""
    return all(
        x.element_size() == 2 and x.data_ptr() % TMA_BYTES == 0 and x.shape[-1] * x.element_size() % TMA_BYTES == 0
        for x in tensors
    )


@cache
def has_tma(device: torch.device) -> bool:
    """Whether the device has the accelerator (NVIDIA, from compute capability 9 on); the interpreter does as if."""
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program can have; a Hopper's where there is no GPU."""
    if device.type != "cuda":
        return 232_448
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors or compute units, which decides how many programs run; a few in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def described(x: Tensor, *block: int, there: bool) -> TensorDescriptor | None:
    """A contiguous tensor for the accelerator, in tiles of the shape `block`; None unless `there`."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(block)) if there else None
