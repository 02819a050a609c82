"""Routing and row movement as differentiable functions. Needs torch only: no Megatron, no torch.distributed.

Under torch.compile they break the graph where they choose their kernels; the operators of `kernels.cpp` do not.
"""

from megatron_xmoe.ops.routes import Routes, build_routes, build_routes_from_map, merge_order
from megatron_xmoe.ops.rows import RowsSource, gather_rows, gather_sum

__all__ = ["Routes", "RowsSource", "build_routes", "build_routes_from_map", "gather_rows", "gather_sum", "merge_order"]
