"""Row movement: `gather_rows` and `gather_sum`, each the other's backward.

All data movement of X-MoE is one of these two with some index array: permute and unpermute (paper, section 4.1,
padding-free token buffers), the reordering after an exchange, and later pilots and replicas. Nothing here uses
atomics; a row's contributions are added in a fixed order in fp32.
"""

import torch
from torch import Tensor

from megatron_xmoe.ops import reference


def gather_rows(x: Tensor, index: Tensor, inverse: Tensor | None = None) -> Tensor:
    """Rows of `x` in the order of `index`.

    Args:
        x: [R, H], any floating dtype.
        index: [M] int32 or int64 in [-1, R); repeats are allowed, -1 gives a row of zeros.
        inverse: [R, K'] positions in the result that row r went to (-1 for none). When the caller knows it, the
            backward is a sum over it; otherwise the backward builds the same sum from `index`.

    Returns:
        [M, H], x's dtype. Differentiable in `x`.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check(x, index, dim=1)
    if inverse is not None and (inverse.dim() != 2 or inverse.shape[0] != x.shape[0]):
        raise ValueError(f"inverse has shape {tuple(inverse.shape)}; it must be [{x.shape[0]}, K'], a row per row of x")
    return _GatherRows.apply(x, index, inverse)


def gather_sum(
    y: Tensor, index: Tensor, weights: Tensor | None = None, token_ids: Tensor | None = None
) -> Tensor:
    """Weighted sums of rows: result[t] = sum over k of weights[t, k] * y[index[t, k]].

    Args:
        y: [R, H], any floating dtype.
        index: [T, K] int32 or int64 in [-1, R); -1 adds nothing.
        weights: [T, K], or None for ones. Differentiable (a row dot product).
        token_ids: [R] the t whose sum row r is part of (-1 for none), for callers who know that no row is used
            twice, as in an unpermute. The backward is then a gather; otherwise it sums over `index`.

    Returns:
        [T, H], y's dtype, summed in fp32 over k in ascending order. Differentiable in `y`.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check(y, index, dim=2)
    if weights is not None and weights.shape != index.shape:
        raise ValueError(f"weights have shape {tuple(weights.shape)}; they must match index, {tuple(index.shape)}")
    if token_ids is not None and token_ids.shape != y.shape[:1]:
        raise ValueError(f"token_ids has shape {tuple(token_ids.shape)}; it must be [{y.shape[0]}], one per row of y")
    return _GatherSum.apply(y, index, weights, token_ids)


def _check(rows: Tensor, index: Tensor, dim: int) -> None:
    if rows.dim() != 2:
        raise ValueError(f"rows have shape {tuple(rows.shape)}; they must be a matrix [R, H]")
    if index.dim() != dim or index.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"index has shape {tuple(index.shape)} and dtype {index.dtype}; it must have {dim} dimension(s) "
            "and be int32 or int64"
        )


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, index, inverse):
        ctx.num_rows = x.shape[0]
        ctx.save_for_backward(index, inverse)
        return reference.gather_rows(x, index)

    @staticmethod
    def backward(ctx, grad):
        index, inverse = ctx.saved_tensors
        if inverse is None:
            return reference.scatter_sum(grad, index, ctx.num_rows), None, None
        return reference.gather_sum(grad, inverse, None), None, None


class _GatherSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, index, weights, token_ids):
        ctx.num_rows = y.shape[0]
        # y itself is needed only for the weights' gradient
        ctx.save_for_backward(index, weights, token_ids, y if weights is not None else None)
        return reference.gather_sum(y, index, weights)

    @staticmethod
    def backward(ctx, grad):
        index, weights, token_ids, y = ctx.saved_tensors
        grad_weights = None if weights is None else reference.row_dot(y, index, grad).to(weights.dtype)
        if token_ids is not None:
            rows = reference.gather_rows(grad, token_ids)
            if weights is not None:
                rows = rows * reference.weights_of_rows(weights, index, ctx.num_rows).to(rows.dtype)
            return rows, None, grad_weights, None
        tokens, per_token = index.shape
        owners = torch.arange(tokens, device=index.device).repeat_interleave(per_token)
        rows = reference.gather_rows(grad, owners)
        if weights is not None:
            rows = rows * weights.reshape(-1, 1).to(rows.dtype)
        return reference.scatter_sum(rows, index.reshape(-1), ctx.num_rows), None, grad_weights, None
