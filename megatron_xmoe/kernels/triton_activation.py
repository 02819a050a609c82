"""Triton: what lies between the experts' two matrix products, in one pass each way. NVIDIA and AMD GPUs."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_xmoe.kernels.triton_common import ceil_div, on

KINDS = {"silu": 0, "gelu": 1, "squared_relu": 2}
ROWS, COLUMNS = 4, 256  # of a program's tile; a warp moves 16 bytes a lane of one row


@triton.jit
def activation(x, KIND: tl.constexpr):
    """The activation function of x (fp32) and its derivative."""
    if KIND == 0:  # x * sigmoid(x)
        sigmoid = 1 / (1 + tl.exp(-x))
        value = x * sigmoid
        slope = sigmoid * (1 + x * (1 - sigmoid))
    elif KIND == 1:  # x * normal distribution function of x
        below = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        value = x * below
        slope = below + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    else:
        positive = tl.maximum(x, 0.0)
        value = positive * positive
        slope = 2 * positive
    return value, slope


@triton.jit
def forward_kernel(
    hidden, weights, out, M, F: tl.constexpr,
    KIND: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[m] = f(hidden[m]) * weights[m], with a gate f(first half) * second half."""
    width = 2 * F if GATED else F
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = rows < M
    weight = tl.load(weights + rows, mask=there, other=0).to(tl.float32)
    for first in range(0, F, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        mask = there[:, None] & (columns < F)[None, :]
        source = hidden + rows[:, None] * width + columns[None, :]
        value, _ = activation(tl.load(source, mask=mask, other=0).to(tl.float32), KIND)
        if GATED:
            value *= tl.load(source + F, mask=mask, other=0).to(tl.float32)
        result = (value * weight[:, None]).to(out.dtype.element_ty)
        tl.store(out + rows[:, None] * F + columns[None, :], result, mask=mask)


@triton.jit
def backward_kernel(
    hidden, weights, grad, grad_hidden, grad_weights, M, F: tl.constexpr,
    KIND: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of hidden and weights; `grad`, the gradient of the result, is overwritten by the result itself."""
    width = 2 * F if GATED else F
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = rows < M
    weight = tl.load(weights + rows, mask=there, other=0).to(tl.float32)
    dots = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, F, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        mask = there[:, None] & (columns < F)[None, :]
        places = rows[:, None] * width + columns[None, :]
        value, slope = activation(tl.load(hidden + places, mask=mask, other=0).to(tl.float32), KIND)
        target = grad + rows[:, None] * F + columns[None, :]
        given = tl.load(target, mask=mask, other=0).to(tl.float32)
        scaled = given * weight[:, None]
        kind = grad_hidden.dtype.element_ty
        if GATED:
            other = tl.load(hidden + places + F, mask=mask, other=0).to(tl.float32)
            tl.store(grad_hidden + places + F, (scaled * value).to(kind), mask=mask)
            slope *= other
            value *= other
        tl.store(grad_hidden + places, (scaled * slope).to(kind), mask=mask)
        dots += given * value
        tl.store(target, (value * weight[:, None]).to(grad.dtype.element_ty), mask=mask)
    tl.store(grad_weights + rows, tl.sum(dots, axis=1), mask=there)


def activate(hidden: Tensor, weights: Tensor, kind: str, gated: bool) -> Tensor:
    """Activation of hidden [M, 2F] (gated) or [M, F], times weights [M]: [M, F] in hidden's dtype, in fp32 inside."""
    M, F = hidden.shape[0], hidden.shape[1] // (2 if gated else 1)
    out = torch.empty(M, F, dtype=hidden.dtype, device=hidden.device)
    if out.numel():
        with on(hidden):
            forward_kernel[(ceil_div(M, ROWS),)](hidden, weights, out, M, F, KINDS[kind], gated, ROWS, COLUMNS)
    return out


def activate_backward(
    hidden: Tensor, weights: Tensor, grad: Tensor, kind: str, gated: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `activate`, given that of its result; `grad` [M, F] is overwritten.

    Returns:
        gradient of hidden; the result of `activate` again (in `grad`'s memory); gradient of weights [M] in fp32.
    """
    M, F = grad.shape
    grad_hidden, grad_weights = torch.empty_like(hidden), torch.empty(M, dtype=torch.float32, device=hidden.device)
    if grad.numel():
        with on(hidden):
            backward_kernel[(ceil_div(M, ROWS),)](
                hidden, weights, grad, grad_hidden, grad_weights, M, F, KINDS[kind], gated, ROWS, COLUMNS
            )
    else:
        grad_weights.zero_()
    return grad_hidden, grad, grad_weights
