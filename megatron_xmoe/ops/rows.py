"""Row movement: `gather_rows` and `gather_sum`, each the other's backward.

All data movement of X-MoE is one of these two with some index array: permute and unpermute (paper, section 4.1,
padding-free token buffers), the reordering after an exchange, the pilots and copies of redundancy
bypassing. Nothing here uses atomics; a row's contributions are added in a fixed order in fp32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_xmoe.kernels.reference import accumulator
from megatron_xmoe.kernels.registry import kernel


def gather_rows(x: Tensor, index: Tensor, inverse: Tensor | None = None) -> Tensor:
    """Rows of `x` in the order of `index`.

    Args:
        x: [R, H], any floating dtype.
        index: [M] int32 or int64 in [-1, R); repeats are allowed, -1 gives a row of zeros.
        inverse: [R, K'] every position in the result that row r went to (-1 for none), where the caller knows it. Each
            row is then read once, and the backward is a sum over it; otherwise the backward sorts `index`.

    Returns:
        [M, H], x's dtype. Differentiable in `x`, once.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    _check(x, index, dim=1)
    if inverse is not None and (inverse.dim() != 2 or inverse.shape[0] != x.shape[0]):
        raise ValueError(f"inverse has shape {tuple(inverse.shape)}; it must be [{x.shape[0]}, K'], a row per row of x")
    return _GatherRows.apply(x, index, inverse)


def gather_sum(y: Tensor, index: Tensor, weights: Tensor | None = None, token_ids: Tensor | None = None) -> Tensor:
    """Weighted sums of rows: result[t] = sum over k of weights[t, k] * y[index[t, k]].

    Args:
        y: [R, H], any floating dtype.
        index: [T, K] int32 or int64 in [-1, R); -1 adds nothing.
        weights: [T, K], or None for ones. Differentiable (a row dot product).
        token_ids: [R] the t whose sum row r is part of (-1 for none), for callers who know that no row is used
            twice, as in an unpermute. The backward then moves rows; otherwise it sorts `index`.

    Returns:
        [T, H], y's dtype, summed in fp32 (fp64 for fp64) over k in ascending order. Differentiable in `y`, once.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    _check(y, index, dim=2)
    if weights is not None and weights.shape != index.shape:
        raise ValueError(f"weights have shape {tuple(weights.shape)}; they must match index, {tuple(index.shape)}")
    if token_ids is not None and token_ids.shape != y.shape[:1]:
        raise ValueError(f"token_ids has shape {tuple(token_ids.shape)}; it must be [{y.shape[0]}], one per row of y")
    return _GatherSum.apply(y, index, weights, token_ids)


@dataclass(frozen=True)
class RowsSource:
    """Rows that are not gathered yet: `tensor` [R, H] in the order of `index` [M].

    Who computes with them need not keep the gathered rows for backward, nor make them at all.
    """

    tensor: Tensor
    """[R, H], differentiable."""

    index: Tensor | None = None
    """[M] int32 or int64 in [0, R), repeats allowed; None where `tensor` is in order already."""

    inverse: Tensor | None = None
    """[R, K'] every position of each row, -1 for none; see gather_rows."""

    def gathered(self) -> Tensor:
        """The rows [M, H]. Differentiable."""
        return self.tensor if self.index is None else gather_rows(self.tensor, self.index, self.inverse)


def take_rows(x: Tensor, index: Tensor | None, inverse: Tensor | None = None) -> Tensor:
    """gather_rows without a gradient; `index` None leaves x [R, H] as it is."""
    if index is None:
        return x
    if inverse is not None and inverse.shape[1] > 1:
        return _spread(x, inverse, index)[0]
    return kernel("gather_rows", x.device.type)(x.contiguous(), index.contiguous())


def give_back_rows(grad: Tensor, index: Tensor | None, inverse: Tensor | None, num_rows: int) -> Tensor:
    """The backward of take_rows: from the gradient [M, H] of its result that of x, [R, H] with R = num_rows."""
    if index is None:
        return grad
    if inverse is None:
        sources = torch.arange(index.shape[0], device=index.device)
        return _scatter_sum(grad, sources, index, num_rows)
    if inverse.shape[1] == 1:
        return kernel("gather_rows", grad.device.type)(grad.contiguous(), inverse.reshape(-1))
    return kernel("sum_rows", grad.device.type)(grad.contiguous(), inverse.contiguous(), None, None)


def first_rows(x: Tensor, number: int) -> Tensor:
    """The first rows, or entries; x itself where these are all, whose gradient is then no copy."""
    return x if x.shape[0] == number else x[:number]


def _check(rows: Tensor, index: Tensor, dim: int) -> None:
    if rows.dim() != 2 or not rows.is_floating_point():
        raise ValueError(f"rows have shape {tuple(rows.shape)}, {rows.dtype}; they must be a matrix [R, H] of floats")
    if index.dim() != dim or index.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"index has shape {tuple(index.shape)} and dtype {index.dtype}; it must have {dim} dimension(s) "
            "and be int32 or int64"
        )


def _spread(
    x: Tensor, index: Tensor, owners: Tensor, weights: Tensor | None = None, y: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Rows of x [T, H] to all their places `index` [T, K] in [R, H]; see kernels.reference.spread_rows."""
    return kernel("spread_rows", x.device.type)(
        x.contiguous(), index.contiguous(), owners.to(index.dtype).contiguous(), weights, y
    )


def _scatter_sum(
    rows: Tensor, sources: Tensor, targets: Tensor, num_rows: int, weights: Tensor | None = None
) -> Tensor:
    """result[targets[p]] += weights[p] * rows[sources[p]] in ascending p. Arrays are [P], the result [R, H].

    The contributions of a row are listed by a stable sort, so that they are added in a fixed order.
    """
    targets, order = torch.sort(targets, stable=True)
    offsets = torch.searchsorted(targets, torch.arange(num_rows + 1, device=targets.device, dtype=targets.dtype))
    weights = None if weights is None else weights[order]
    return kernel("sum_rows", rows.device.type)(rows.contiguous(), sources[order], weights, offsets)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, index, inverse):
        ctx.num_rows = x.shape[0]
        ctx.save_for_backward(index, inverse)
        return take_rows(x, index, inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return give_back_rows(grad, *ctx.saved_tensors, ctx.num_rows), None, None


class _GatherSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, index, weights, token_ids):
        ctx.num_rows = y.shape[0]
        # y itself is needed only for the weights' gradient
        ctx.save_for_backward(index, weights, token_ids, y if ctx.needs_input_grad[2] else None)
        return kernel("sum_rows", y.device.type)(y.contiguous(), index.contiguous(), _accumulated(weights, y), None)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        index, weights, token_ids, y = ctx.saved_tensors
        index, grad = index.contiguous(), grad.contiguous()
        needs_rows, _, needs_weights, _ = ctx.needs_input_grad
        scales = _accumulated(weights, grad)
        rows = dots = None
        if needs_rows and token_ids is not None:
            rows, dots = _spread(grad, index, token_ids, scales, y.contiguous() if needs_weights else None)
        elif needs_rows:
            tokens = torch.arange(index.shape[0], device=index.device).repeat_interleave(index.shape[1])
            flat = None if scales is None else scales.reshape(-1)
            rows = _scatter_sum(grad, tokens, index.reshape(-1), ctx.num_rows, flat)
        if needs_weights and dots is None:
            dots = kernel("dot_rows", grad.device.type)(y.contiguous(), index, grad)
        return rows, None, None if dots is None else dots.to(weights.dtype), None


def _accumulated(weights: Tensor | None, rows: Tensor) -> Tensor | None:
    """Weights in the type in which `rows` are summed."""
    return None if weights is None else weights.to(accumulator(rows.dtype)).contiguous()
