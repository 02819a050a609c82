"""Plain torch versions of the primitives: the CPU path, and what compiled kernels are tested against.

Letters: T tokens, K routes per token, E experts, R rows of the source, M rows of the result, H hidden size.
"""

import torch
from torch import Tensor


def sort_routes(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Order routes by expert, then by token, and count them.

    Args:
        expert_ids: [T*K] int64, token-major; `num_experts` marks a route that does not exist.

    Returns:
        order [T*K]: the route at each sorted position, routes that do not exist last; tokens_per_expert [E] int64.
    """
    order = torch.argsort(expert_ids, stable=True)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=expert_ids.device)
    counts.scatter_add_(0, expert_ids, torch.ones_like(expert_ids))
    return order, counts[:num_experts]


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of `x` [R, H] at `index` [M]; an index of -1 gives a row of zeros. Returns [M, H] in x's dtype."""
    if x.shape[0] == 0:
        return x.new_zeros(index.shape[0], x.shape[1])
    rows = x.index_select(0, index.clamp_min(0))
    return rows.masked_fill_((index < 0).unsqueeze(1), 0)


def gather_sum(y: Tensor, index: Tensor, weights: Tensor | None) -> Tensor:
    """Weighted sums of rows: result[t] = sum over k of weights[t, k] * y[index[t, k]].

    Args:
        y: [R, H]. index: [T, K], -1 adds nothing. weights: [T, K] or None for ones.

    Returns:
        [T, H] in y's dtype, accumulated over k in ascending order in fp32 (fp64 for fp64 input).
    """
    total = torch.zeros(index.shape[0], y.shape[1], dtype=_accumulator(y), device=y.device)
    for k in range(index.shape[1]):
        rows = gather_rows(y, index[:, k]).to(total.dtype)
        total += rows if weights is None else rows * weights[:, k : k + 1].to(total.dtype)
    return total.to(y.dtype)


def scatter_sum(rows: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """Sum `rows` [M, H] into [num_rows, H] at `index` [M] (-1 is skipped): the backward of a gather without inverse.

    `index_put_` with accumulation sorts the index first, so the order of a row's contributions does not vary between
    runs, unlike `index_add_` on a GPU.
    """
    total = torch.zeros(num_rows + 1, rows.shape[1], dtype=_accumulator(rows), device=rows.device)
    target = torch.where(index < 0, num_rows, index)
    total.index_put_((target,), rows.to(total.dtype), accumulate=True)
    return total[:num_rows].to(rows.dtype)


def row_dot(y: Tensor, index: Tensor, grad: Tensor) -> Tensor:
    """Row dot products [T, K]: y[index[t, k]] . grad[t], in the accumulator's dtype; -1 gives 0."""
    dtype = _accumulator(y)
    columns = [
        (gather_rows(y, index[:, k]).to(dtype) * grad.to(dtype)).sum(dim=1) for k in range(index.shape[1])
    ]
    return torch.stack(columns, dim=1) if columns else grad.new_zeros(index.shape, dtype=dtype)


def weights_of_rows(weights: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """The weight of each row [R, 1], from weights [T, K] of an index [T, K] that names no row twice."""
    result = weights.new_zeros(num_rows + 1)
    result[torch.where(index < 0, num_rows, index).reshape(-1)] = weights.reshape(-1)
    return result[:num_rows].unsqueeze(1)


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
