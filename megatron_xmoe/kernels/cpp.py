"""The compiled kernels of `megatron_xmoe._C` as torch operators `megatron_xmoe::*`, for the CPU, CUDA and HIP.

The functions are those of `kernels.reference`. The operators are registered when the first of them is used; with their
fake versions they work on meta tensors and under torch.compile. They have no gradients of their own: `ops` has.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from megatron_xmoe.kernels.reference import accumulator

_registered: list[torch.library.Library] = []


def build_routes(
    ids: Tensor, weights: Tensor, num_experts: int, capacity: int, by_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `kernels.reference.build_routes`."""
    _register()
    return torch.ops.megatron_xmoe.build_routes(ids, weights, num_experts, capacity, by_weight)


def choices_of_map(routing_map: Tensor, probs: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """See `kernels.reference.choices_of_map`."""
    _register()
    return torch.ops.megatron_xmoe.choices_of_map(routing_map, probs, topk)


def gradient_of_map(grad: Tensor, inverse: Tensor, ids: Tensor, num_experts: int) -> Tensor:
    """See `kernels.reference.gradient_of_map`."""
    _register()
    return torch.ops.megatron_xmoe.gradient_of_map(grad, inverse, ids, num_experts)


def merge_order(counts: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """See `kernels.reference.merge_order`."""
    _register()
    return torch.ops.megatron_xmoe.merge_order(counts, num_rows)


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """See `kernels.reference.gather_rows`."""
    _register()
    return torch.ops.megatron_xmoe.gather_rows(x, index)


def spread_rows(
    x: Tensor, index: Tensor, owners: Tensor, weights: Tensor | None, y: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """See `kernels.reference.spread_rows`."""
    _register()
    rows, dots = torch.ops.megatron_xmoe.spread_rows(x, index, owners, weights, y)
    return rows, None if y is None else dots


def sum_rows(y: Tensor, index: Tensor, weights: Tensor | None, offsets: Tensor | None) -> Tensor:
    """See `kernels.reference.sum_rows`."""
    _register()
    return torch.ops.megatron_xmoe.sum_rows(y, index, weights, offsets)


def dot_rows(y: Tensor, index: Tensor, x: Tensor) -> Tensor:
    """See `kernels.reference.dot_rows`."""
    _register()
    return torch.ops.megatron_xmoe.dot_rows(y, index, x)


@torch.compiler.assume_constant_result
def _register() -> None:
    """Define the operators, once."""
    if _registered:
        return
    from megatron_xmoe import _C

    library = torch.library.Library("megatron_xmoe", "FRAGMENT")
    for schema, fake in _OPERATORS.items():
        name = schema.partition("(")[0]
        library.define(schema)
        kernel = getattr(_C, name)
        library.impl(name, partial(_on_cpu, kernel), "CPU")
        library.impl(name, partial(_on_gpu, kernel), "CUDA")
        torch.library.register_fake(f"megatron_xmoe::{name}", fake, lib=library)
    _registered.append(library)


def _on_cpu(kernel: Callable, *arguments):
    return kernel(*arguments, 0)


def _on_gpu(kernel: Callable, first: Tensor, *arguments):
    return kernel(first, *arguments, torch.cuda.current_stream(first.device).cuda_stream)


# Fake versions: the shapes and dtypes of the results.
def _fake_build_routes(ids, weights, num_experts, capacity, by_weight):
    flat = ids.new_empty(ids.shape[0] * ids.shape[1], dtype=torch.int32)
    counts = ids.new_empty(num_experts, dtype=torch.int64)
    combine_weights = weights.new_empty(flat.shape)
    return flat, torch.empty_like(flat), counts, combine_weights, ids.new_empty(ids.shape, dtype=torch.int32)


def _fake_choices_of_map(routing_map, probs, topk):
    tokens = routing_map.shape[0]
    return routing_map.new_empty(tokens, topk, dtype=torch.int32), probs.new_empty(tokens, topk)


def _fake_gradient_of_map(grad, inverse, ids, num_experts):
    return grad.new_empty(ids.shape[0], num_experts)


def _fake_merge_order(counts, num_rows):
    return counts.new_empty(num_rows, dtype=torch.int32), counts.new_empty(num_rows, dtype=torch.int32)


def _fake_gather_rows(x, index):
    return x.new_empty(index.shape[0], x.shape[1])


def _fake_spread_rows(x, index, owners, weights, y):
    tokens = 0 if y is None else x.shape[0]
    dots = x.new_empty(tokens, index.shape[1], dtype=accumulator(x.dtype))
    return x.new_empty(owners.shape[0], x.shape[1]), dots


def _fake_sum_rows(y, index, weights, offsets):
    return y.new_empty(index.shape[0] if offsets is None else offsets.shape[0] - 1, y.shape[1])


def _fake_dot_rows(y, index, x):
    return y.new_empty(index.shape, dtype=accumulator(y.dtype))


_OPERATORS = {
    "build_routes(Tensor ids, Tensor weights, SymInt num_experts, SymInt capacity, bool by_weight)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)": _fake_build_routes,
    "choices_of_map(Tensor routing_map, Tensor probs, SymInt topk) -> (Tensor, Tensor)": _fake_choices_of_map,
    "gradient_of_map(Tensor grad, Tensor inverse, Tensor ids, SymInt num_experts) -> Tensor": _fake_gradient_of_map,
    "merge_order(Tensor counts, SymInt num_rows) -> (Tensor, Tensor)": _fake_merge_order,
    "gather_rows(Tensor x, Tensor index) -> Tensor": _fake_gather_rows,
    "spread_rows(Tensor x, Tensor index, Tensor owners, Tensor? weights, Tensor? y) -> (Tensor, Tensor)": (
        _fake_spread_rows
    ),
    "sum_rows(Tensor y, Tensor index, Tensor? weights, Tensor? offsets) -> Tensor": _fake_sum_rows,
    "dot_rows(Tensor y, Tensor index, Tensor x) -> Tensor": _fake_dot_rows,
}
