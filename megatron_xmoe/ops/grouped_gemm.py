"""The experts' matrix products over an expert-major, padding-free buffer.

Letters: M rows, E experts, D features in, N features out. Rows of an expert are contiguous; `ends` [E] int32 holds the
row after each expert's last, on the rows' device, and `sizes` the same as a list of row counts.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """Which rows belong to which expert."""

    sizes: list[int]
    """Rows of each expert; zeros are allowed."""

    ends: Tensor
    """[E] int32, cumulative sizes, on the rows' device."""

    @classmethod
    def of(cls, tokens_per_expert: Tensor, device: torch.device) -> "Groups":
        """From row counts [E] on the CPU."""
        ends = tokens_per_expert.cumsum(0).to(torch.int32)
        return cls(tokens_per_expert.tolist(), ends.to(device, non_blocking=True))


def why_not_grouped_mm(dtype: torch.dtype, features: Iterable[int]) -> str:
    """Why torch's grouped_mm (CUTLASS) cannot be used on the current device, or '' if it can.

    It takes bf16 on NVIDIA GPUs of compute capability 9 and above, with 16-byte aligned rows.

    Args: dtype of rows and weights; feature sizes of the weights.
    """
    if not torch.cuda.is_available():
        return "no GPU"
    if not hasattr(F, "grouped_mm"):
        return f"not in torch {torch.__version__}"
    if torch.version.hip is not None:
        return "not tried on ROCm"
    if torch.cuda.get_device_capability() < (9, 0):
        return "compute capability below 9.0"
    if dtype != torch.bfloat16:
        return f"{dtype} instead of bfloat16"
    unaligned = [size for size in features if size % 8]
    return f"feature size {unaligned[0]}, no multiple of 8" if unaligned else ""


def multiply(rows: Tensor, weight: Tensor, groups: Groups, grouped: bool) -> Tensor:
    """rows [M, D] times each expert's weight [E, N, D], transposed: [M, N] in rows' dtype."""
    if grouped:
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=groups.ends)
    parts = [part @ w.t() for part, w in zip(rows.split(groups.sizes), weight, strict=True)]
    return torch.cat(parts) if parts else rows.new_empty(0, weight.shape[1])


def weight_gradient(grad: Tensor, rows: Tensor, groups: Groups, grouped: bool) -> Tensor:
    """Gradient [E, N, D] of `weight` in `multiply`, from grad [M, N] and rows [M, D]; zeros where there are no rows."""
    if grouped:
        result = F.grouped_mm(grad.t(), rows, offs=groups.ends)
        for expert, size in enumerate(groups.sizes):
            if size == 0:  # the kernel may leave the result of an empty group unwritten
                result[expert].zero_()
        return result
    parts = zip(grad.split(groups.sizes), rows.split(groups.sizes), strict=True)
    return torch.stack([g.t() @ x for g, x in parts])
