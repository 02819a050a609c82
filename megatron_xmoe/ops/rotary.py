"""Rotary position embedding with one kernel launch for a tensor, each way."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fuses(x: Tensor, angles: Tensor) -> bool:
    """Whether `rotate` takes these tensors, where Triton runs: on a GPU, with the same angles for all heads."""
    return x.is_cuda and angles.is_cuda and _fits(x, angles)


def _fits(x: Tensor, angles: Tensor) -> bool:
    if x.dim() != 4 or angles.dim() != 4 or x.dtype not in _DTYPES or angles.dtype != torch.float32:
        return False
    (S, B, _, D), (positions, batch, heads, R) = x.shape, angles.shape
    same_places = positions == S and batch in (1, B) and heads == 1
    return same_places and 0 < R <= D and R % 2 == 0 and not angles.requires_grad


def rotate(x: Tensor, angles: Tensor, paired: bool, paired_result: bool, scale: float = 1.0) -> Tensor:
    """Turn pairs of numbers of every head by the angles of its position; differentiable in x. See `fuses`.

    Letters: S positions, B micro-batch, N heads, D head size, R rotated columns of a head (the first ones).

    Args:
        x: [S, B, N, D] in 16 bits or fp32, of any strides.
        angles: [S, 1 or B, 1, R] fp32, radians, in the order of the result.
        paired, paired_result: whether the two numbers of a pair are neighbours, or R / 2 apart.
        scale: of cosines and sines.

    Returns:
        [S, B, N, D], contiguous, in x's dtype; computed in fp32 and rounded once.
    """
    return _Rotate.apply(x, angles, paired, paired_result, scale)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, angles, paired, paired_result, scale):
        from megatron_xmoe.kernels import triton_rotary

        ctx.save_for_backward(angles)
        ctx.how = paired, paired_result, scale
        return triton_rotary.rotate(x, angles, *ctx.how)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        from megatron_xmoe.kernels import triton_rotary

        (angles,) = ctx.saved_tensors
        return triton_rotary.rotate(grad, angles, *ctx.how, backward=True), None, None, None, None
