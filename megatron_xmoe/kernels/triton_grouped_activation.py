"""Triton: the experts' first matrix product and their activation in one pass, for NVIDIA and AMD GPUs.

Letters and conventions are those of triton_grouped_gemm.
"""

import triton
import triton.language as tl
from torch import Tensor

from megatron_xmoe.kernels.triton_activation import KINDS, activation
from megatron_xmoe.kernels.triton_common import on
from megatron_xmoe.kernels.triton_grouped_gemm import (
    GROUP,
    described,
    fits_tma,
    has_tma,
    part_of,
    place_of,
    processors,
    tile_map,
    tile_of,
)


@triton.jit
def activate_kernel(
    a, a_tma, w, w_tma, probs, hidden, out, tiles, tile_rows, tile_limits, tile_experts, programs, D, F,
    KIND: tl.constexpr, GATED: tl.constexpr, TMA: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """hidden[m] = a[m] times the expert's weight, [F, D] or [2F, D] if GATED; out[m] its activation times probs[m]."""
    m_tiles, n_tiles = tl.load(tiles), tl.cdiv(F, BN)
    width = 2 * F if GATED else F
    for tile in tl.range(tl.program_id(0), m_tiles * n_tiles, programs):
        m, n = place_of(tile, m_tiles, n_tiles, GROUP)
        row, limit, expert = tl.load(tile_rows + m), tl.load(tile_limits + m), tl.load(tile_experts + m)
        n *= BN
        if not TMA:
            weight = w + expert.to(tl.int64) * width * D
        total, other = tl.zeros([BM, BN], tl.float32), tl.zeros([BM, BN], tl.float32)
        for k in range(0, D, BK):
            if TMA:
                x = a_tma.load([row, k])
                total = tl.dot(x, w_tma.load([expert, n, k]).reshape(BN, BK).T, total, input_precision="ieee")
                if GATED:
                    other = tl.dot(x, w_tma.load([expert, F + n, k]).reshape(BN, BK).T, other, input_precision="ieee")
            else:
                x = part_of(a, row, limit, k, D, BM, BK)
                total = tl.dot(x, part_of(weight, n, F, k, D, BN, BK).T, total, input_precision="ieee")
                if GATED:
                    other = tl.dot(x, part_of(weight, F + n, width, k, D, BN, BK).T, other, input_precision="ieee")
        lines, columns = row + tl.arange(0, BM), n + tl.arange(0, BN)
        there = lines < limit
        inside = there[:, None] & (columns < F)[None, :]
        target = hidden + lines.to(tl.int64)[:, None] * width + columns[None, :]
        rounded = total.to(hidden.dtype.element_ty)  # backward sees this, so the activation does too
        tl.store(target, rounded, mask=inside)
        value, _ = activation(rounded.to(tl.float32), KIND)
        if GATED:
            rounded = other.to(hidden.dtype.element_ty)
            tl.store(target + F, rounded, mask=inside)
            value *= rounded.to(tl.float32)
        value *= tl.load(probs + lines, mask=there, other=0).to(tl.float32)[:, None]
        target = out + lines.to(tl.int64)[:, None] * F + columns[None, :]
        tl.store(target, value.to(out.dtype.element_ty), mask=inside)


def multiply_activate(
    rows: Tensor, weight: Tensor, probs: Tensor, ends: Tensor, kind: str, gated: bool
) -> tuple[Tensor, Tensor]:
    """`multiply`, with the activation and the routing weights in the same pass.

    Args:
        rows: [M, D]. bf16, fp16 or fp32.
        weight: [E, F, D]; [E, 2F, D], first the gate's half, if `gated`. Dtype of rows.
        probs: routing weights [M].
        ends: [E] int32.
        kind: of triton_activation.KINDS.

    Returns:
        what `multiply` gives, [M, F] or [M, 2F], and its activation times probs, [M, F]; in rows' dtype.
    """
    (M, D), width = rows.shape, weight.shape[1]
    F = width // 2 if gated else width
    hidden, out = rows.new_empty(M, width), rows.new_empty(M, F)
    if not out.numel():
        return hidden, out
    rows, weight, probs = rows.contiguous(), weight.contiguous(), probs.contiguous()
    tma = has_tma(rows.device) and fits_tma(rows, weight)
    tile = tile_of(tma, rows.element_size(), gated)
    BM, BN, BK = tile["BM"], tile["BN"], tile["BK"]
    with on(rows):
        programs = processors(rows.device) * (1 if tma else 2)
        activate_kernel[(programs,)](
            rows, described(rows, BM, BK, there=tma), weight, described(weight, 1, BN, BK, there=tma),
            probs, hidden, out, *tile_map(ends, M, BM), programs, D, F,
            KIND=KINDS[kind], GATED=gated, TMA=tma, GROUP=GROUP, **tile,
        )  # fmt: skip
    return hidden, out
