"""Numbers as raw bits in rows of another type: how indices and routing weights travel in the same exchange as rows.

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


def read_bits(rows: Tensor, position: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers [N] of `dtype` that begin at the units `position` [N] of a buffer [R, H]."""
    units = _units(rows)
    return units[_span(position, dtype, units)].view(dtype).squeeze(1)


def write_bits(rows: Tensor, position: Tensor, values: Tensor) -> None:
    """Put numbers `values` [N] at the units `position` [N] of a buffer [R, H], in place."""
    units = _units(rows)
    index = _span(position, values.dtype, units)
    units.scatter_(0, index.flatten(), values.contiguous().unsqueeze(1).view(units.dtype).flatten())


def _units(rows: Tensor) -> Tensor:
    size = unit_bytes(rows.shape[1] * rows.element_size())
    return rows.view(-1).view(torch.int32 if size == 4 else torch.int16)


def _span(position: Tensor, dtype: torch.dtype, units: Tensor) -> Tensor:
    """[N, n]: all units of numbers that begin at `position` [N]."""
    length = dtype.itemsize // units.element_size()
    return position.unsqueeze(1) + torch.arange(length, device=position.device)
