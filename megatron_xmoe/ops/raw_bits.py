"""Numbers as raw bits in rows of another type: how gradients of routing weights travel in the same exchange as rows."""

import torch
from torch import Tensor


def wire_dtype(dtype: torch.dtype) -> torch.dtype:
    """As what routing weights of `dtype` travel, with their exact value."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def bytes_of(rows: Tensor) -> Tensor:
    """A buffer [R, H] as its bytes, [n] uint8."""
    return rows.view(-1).view(torch.uint8)
