"""Plain torch versions of the kernels: what runs where nothing is compiled, and the oracle of the compiled ones.

Every backend has these functions. Tensors are contiguous and on one device; rows are fp32, bf16, fp16 or fp64, indices
int32 or int64, and a negative index names no row. The accumulator is fp32 (fp64 for fp64 rows).
Letters: T tokens, K routes per token, E experts, R rows of the source or result, M rows, H hidden size.
"""

import torch
from torch import Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type in which rows of `dtype` are summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def build_routes(
    ids: Tensor, weights: Tensor, num_experts: int, capacity: int, by_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Order routes by expert, then token, then choice, and keep at most `capacity` of each expert.

    Args:
        ids: [T, K], negative for none. weights: [T, K]. num_experts: E.
        capacity: -1 keeps all. by_weight: the largest weights stay, the earliest among equals; otherwise the earliest.

    Returns:
        token_ids [T*K] int32 and expert_ids [T*K] int32, -1 after the last kept route; tokens_per_expert [E] int64;
        combine_weights [T*K], 0 after the last; inverse [T, K] int32, -1 where a choice was dropped.
    """
    tokens, per_token = ids.shape
    flat = ids.reshape(-1).to(torch.int64)
    flat = torch.where(flat < 0, num_experts, flat)
    position = torch.arange(flat.numel(), device=flat.device)
    counts = _count(flat, num_experts)
    starts = torch.cumsum(counts, 0) - counts
    order = torch.argsort(flat, stable=True)
    sorted_ids = flat[order]
    keep = sorted_ids < num_experts
    if capacity >= 0:
        rank = position - starts[sorted_ids]
        if by_weight:
            best = torch.argsort(weights.reshape(-1), descending=True, stable=True)
            best = best[torch.argsort(flat[best], stable=True)]
            rank_of_route = torch.empty_like(position).scatter_(0, best, position - starts[flat[best]])
            rank = rank_of_route[order]
        keep &= rank < capacity
    # dropped routes all go to one place past the end, which is cut off
    end = flat.numel()
    target = torch.where(keep, torch.cumsum(keep, 0) - 1, end)
    inverse = torch.full_like(flat, -1).scatter_(0, order, torch.where(keep, target, -1))
    return (
        _put(torch.div(order, max(per_token, 1), rounding_mode="floor").to(torch.int32), target, -1),
        _put(sorted_ids.to(torch.int32), target, -1),
        _count(torch.where(keep, sorted_ids, num_experts), num_experts)[:num_experts],
        _put(weights.reshape(-1)[order], target, 0),
        inverse.to(torch.int32).view(tokens, per_token),
    )


def choices_of_map(routing_map: Tensor, probs: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """The first K = `topk` experts of each row of a map, ascending, and their probs.

    Args: routing_map [T, E] bool. probs [T, E]. topk: at most E.

    Returns:
        ids [T, K] int32, filled up with -1; weights [T, K] in probs' dtype, filled up with 0.
    """
    chosen, ids = torch.sort(routing_map.to(torch.int8), dim=1, descending=True, stable=True)
    chosen, ids = chosen[:, :topk].bool(), ids[:, :topk]
    return torch.where(chosen, ids, -1).to(torch.int32), torch.where(chosen, probs.gather(1, ids), 0)


def gradient_of_map(grad: Tensor, inverse: Tensor, ids: Tensor, num_experts: int) -> Tensor:
    """The gradient of probs [T, E]: result[t, ids[t, k]] = grad[inverse[t, k]], 0 elsewhere.

    Args: grad [N], of the routes' weights. inverse [T, K] int32 as build_routes gives it, ids [T, K] int32 as
    choices_of_map does. num_experts: E.
    """
    of_choices = gather_rows(grad.unsqueeze(1), inverse.reshape(-1)).view(inverse.shape)
    result = grad.new_zeros(ids.shape[0], num_experts + 1)  # the last column takes the choices not made
    return result.scatter_(1, torch.where(ids < 0, num_experts, ids).to(torch.int64), of_choices)[:, :-1].contiguous()


def merge_order(counts: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Between the order (source, expert), in which rows arrive, and (expert, source).

    Args: counts [G, E] int64 on the device, with sum `num_rows` = M.

    Returns:
        to_expert_order [M] int32, the arrival position of each expert-major position, and its inverse.
    """
    experts = torch.arange(counts.shape[1], device=counts.device).repeat(counts.shape[0])
    expert_of_row = experts.repeat_interleave(counts.flatten(), output_size=num_rows)
    order = torch.argsort(expert_of_row, stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(num_rows, device=order.device))
    return order.to(torch.int32), inverse.to(torch.int32)


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """result[m] = x[index[m]], zeros for none. x [R, H], index [M]; returns [M, H]."""
    if x.shape[0] == 0:
        return x.new_zeros(index.shape[0], x.shape[1])
    rows = x.index_select(0, index.clamp_min(0))
    return rows.masked_fill_((index < 0).unsqueeze(1), 0)


def spread_rows(
    x: Tensor, index: Tensor, owners: Tensor, weights: Tensor | None, y: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """result[index[t, k]] = weights[t, k] * x[t], and dots[t, k] = y[index[t, k]] . x[t] where y is given.

    Args:
        x: [T, H]. index: [T, K], which names no row twice. weights: [T, K] in the accumulator's type, None for ones.
        owners: [R] the t of each row of the result, negative for rows that `index` does not name; they become zeros.
        y: [R, H] or None.

    Returns:
        [R, H] in x's dtype, and [T, K] in the accumulator's type or None.
    """
    rows = gather_rows(x, owners)
    if weights is not None:
        weight_of_row = weights.new_zeros(owners.shape[0] + 1)
        weight_of_row[torch.where(index < 0, owners.shape[0], index).reshape(-1)] = weights.reshape(-1)
        rows = (rows.to(weights.dtype) * weight_of_row[:-1].unsqueeze(1)).to(x.dtype)
    return rows, None if y is None else dot_rows(y, index, x)


def sum_rows(y: Tensor, index: Tensor, weights: Tensor | None, offsets: Tensor | None) -> Tensor:
    """result[t] = sum over k of weights[t, k] * y[index[t, k]], over k in ascending order in the accumulator's type.

    Args:
        y: [R, H]. index: [T, K]; or [P] with offsets [T + 1] int64, where row t sums over offsets[t] .. offsets[t + 1].
        weights: the shape of index, in the accumulator's type; None for ones.

    Returns:
        [T, H] in y's dtype.
    """
    dtype = accumulator(y.dtype)
    if weights is not None:
        weights = torch.where(index < 0, 0, weights)  # whatever they are: infinity times 0 is NaN
    if offsets is not None:
        rows = gather_rows(y, index).to(dtype)
        # row 0 takes the positions before offsets[0], the last row those from offsets[T]; neither is part of the result
        total = torch.zeros(offsets.shape[0] + 1, y.shape[1], dtype=dtype, device=y.device)
        owners = torch.searchsorted(offsets, torch.arange(index.shape[0], device=y.device), right=True)
        # with accumulation, index_put_ sorts first: unlike index_add_ on a GPU its order does not vary
        total.index_put_((owners,), rows if weights is None else rows * weights.unsqueeze(1), accumulate=True)
        return total[1:-1].to(y.dtype)
    total = torch.zeros(index.shape[0], y.shape[1], dtype=dtype, device=y.device)
    for k in range(index.shape[1]):
        rows = gather_rows(y, index[:, k]).to(dtype)
        total += rows if weights is None else rows * weights[:, k : k + 1]
    return total.to(y.dtype)


def dot_rows(y: Tensor, index: Tensor, x: Tensor) -> Tensor:
    """Row dot products y[index[t, k]] . x[t], 0 for none. y [R, H], x [T, H]; returns [T, K], accumulator's type."""
    dtype = accumulator(y.dtype)
    columns = [(gather_rows(y, index[:, k]).to(dtype) * x.to(dtype)).sum(dim=1) for k in range(index.shape[1])]
    dots = torch.stack(columns, dim=1) if columns else x.new_zeros(index.shape, dtype=dtype)
    return torch.where(index < 0, 0, dots)


def _count(ids: Tensor, num_experts: int) -> Tensor:
    """Occurrences [E + 1] int64 of each expert, and of E, which marks a route that does not exist."""
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
    return counts.scatter_add_(0, ids, torch.ones_like(ids))


def _put(values: Tensor, target: Tensor, fill: int) -> Tensor:
    """`values` [N] at the positions `target` [N], and `fill` elsewhere; a target of N is cut off."""
    result = values.new_full((values.numel() + 1,), fill)
    return result.scatter_(0, target, values)[:-1]
