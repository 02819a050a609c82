"""Triton: rotary position embedding of a tensor in one pass, forward and backward. NVIDIA and AMD GPUs.

Letters: S positions, B micro-batch, N heads, D head size, R rotated columns of a head (the first ones). The two numbers
of a pair are next to each other ("paired") or R / 2 apart. Computes in fp32 and rounds once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_xmoe.kernels.triton_common import ceil_div, on, power_of_two, warp_size

TILE = 1024  # pairs that a program has in hand: 128 threads with 8 of them, 16 bytes of bf16
THREADS = 128
HEADS = 2  # at a time: threads with other heads of a row compute the same cosines, which take longer than the memory


def rotate(
    x: Tensor, angles: Tensor, paired: bool, paired_result: bool, scale: float = 1.0, backward: bool = False
) -> Tensor:
    """The first R columns of every head turned by the angles of its position, and the others as they are.

    Args:
        x: [S, B, N, D] in 16 bits or fp32, of any strides; backward: the gradient of the result.
        angles: [S, 1 or B, 1, R] fp32, radians, in the order of the result; R is even and at most D.
        paired, paired_result: whether the numbers of a pair are neighbours, in the input and in the result of the
            forward pass.
        scale: of cosines and sines.
        backward: gives the gradient of the input instead.

    Returns:
        [S, B, N, D], contiguous, in x's dtype.
    """
    S, B, N, D = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    if angles.stride(3) != 1:
        angles = angles.contiguous()
    of_position = angles.stride(0), angles.stride(1) if angles.shape[1] > 1 else 0
    tile = rotate_tile(N, D, angles.shape[3], warp_size(x.device))
    with on(x):
        rotate_kernel[(ceil_div(S * B, tile["ROWS"]),)](
            x, angles, out, S * B, B, *x.stride(), *of_position, N=N, D=D, R=angles.shape[3], SCALE=scale,
            PAIRED=paired, PAIRED_RESULT=paired_result, BACKWARD=backward, **tile,
        )  # fmt: skip
    return out


def rotate_tile(heads: int, size: int, rotated: int, warp: int) -> dict[str, int]:
    """Launch parameters of rotate_kernel."""
    pairs = power_of_two(rotated // 2)
    together = min(power_of_two(heads), HEADS)
    return {
        "PAIRS": pairs,
        "HEADS": together,
        "ROWS": max(1, TILE // (pairs * together)),
        "REST": power_of_two(size - rotated),
        "num_warps": THREADS // warp,
    }


@triton.jit(do_not_specialize=["rows"])
def rotate_kernel(
    x, angles, out, rows, batch, s_stride, b_stride, n_stride, d_stride, angle_s_stride, angle_b_stride,
    N: tl.constexpr, D: tl.constexpr, R: tl.constexpr, SCALE: tl.constexpr,
    PAIRED: tl.constexpr, PAIRED_RESULT: tl.constexpr, BACKWARD: tl.constexpr,
    PAIRS: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """ROWS of the S * B rows, all heads; cosines and sines are computed once for all heads of a row."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    s, b = (row // batch)[:, None, None], (row % batch)[:, None, None]
    of_row = angles + s * angle_s_stride + b * angle_b_stride
    angle1, angle2 = _load_pairs(of_row, 1, inside[:, None, None], R, PAIRS, PAIRED_RESULT)
    cos1, sin1 = tl.cos(angle1) * SCALE, tl.sin(angle1) * SCALE
    cos2, sin2 = tl.cos(angle2) * SCALE, tl.sin(angle2) * SCALE
    for start in range(0, N, HEADS):
        head = (start + tl.arange(0, HEADS))[None, :, None]
        mask = inside[:, None, None] & (head < N)
        source = x + s * s_stride + b * b_stride + head.to(tl.int64) * n_stride
        target = out + (row[:, None, None] * N + head) * D
        if BACKWARD:
            first, second = _load_pairs(source, d_stride, mask, R, PAIRS, PAIRED_RESULT)
            turned1, turned2 = first * cos1 + second * sin2, second * cos2 - first * sin1
            _store_pairs(target, turned1, turned2, mask, R, PAIRS, PAIRED)
        else:
            first, second = _load_pairs(source, d_stride, mask, R, PAIRS, PAIRED)
            turned1, turned2 = first * cos1 - second * sin1, second * cos2 + first * sin2
            _store_pairs(target, turned1, turned2, mask, R, PAIRS, PAIRED_RESULT)
        if R < D:
            column = (R + tl.arange(0, REST))[None, None, :]
            kept = tl.load(source + column * d_stride, mask=mask & (column < D), other=0)
            tl.store(target + column, kept, mask=mask & (column < D))


@triton.jit
def _load_pairs(rows, stride, mask, R: tl.constexpr, PAIRS: tl.constexpr, PAIRED: tl.constexpr):
    """Both numbers of all pairs, in fp32; rows and mask [.., .., 1]."""
    pair = tl.arange(0, PAIRS)[None, None, :]
    there = mask & (pair < R // 2)
    if PAIRED:
        column = 2 * pair[:, :, :, None] + tl.arange(0, 2)[None, None, None, :]
        both = tl.load(rows[:, :, :, None] + column * stride, mask=there[:, :, :, None], other=0)
        first, second = tl.split(both)
    else:
        first = tl.load(rows + pair * stride, mask=there, other=0)
        second = tl.load(rows + (pair + R // 2) * stride, mask=there, other=0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _store_pairs(rows, first, second, mask, R: tl.constexpr, PAIRS: tl.constexpr, PAIRED: tl.constexpr):
    """Writes both numbers of all pairs to contiguous rows."""
    pair = tl.arange(0, PAIRS)[None, None, :]
    there = mask & (pair < R // 2)
    kind = rows.dtype.element_ty
    if PAIRED:
        column = 2 * pair[:, :, :, None] + tl.arange(0, 2)[None, None, None, :]
        both = tl.join(first.to(kind), second.to(kind))
        tl.store(rows[:, :, :, None] + column, both, mask=there[:, :, :, None])
    else:
        tl.store(rows + pair, first.to(kind), mask=there)
        tl.store(rows + pair + R // 2, second.to(kind), mask=there)
