"""Numbers as raw bits in rows of another type: how gradients of routing weights travel in the same exchange as rows.

A buffer is looked at as a flat array of *units*, of 4 bytes where a row is a whole number of these, otherwise of 2.
"""

import torch
from torch import Tensor


def unit_bytes(row_bytes: int) -> int:
    """Bytes of a unit of a buffer whose rows have `row_bytes` bytes."""
    return 4 if row_bytes % 4 == 0 else 2


def wire_dtype(dtype: torch.dtype) -> torch.dtype:
    """As what routing weights of `dtype` travel, with their exact value."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def units_of(rows: Tensor) -> Tensor:
    """A buffer [R, H] as a flat array of units."""
    size = unit_bytes(rows.shape[1] * rows.element_size())
    return rows.view(-1).view(torch.int32 if size == 4 else torch.int16)
