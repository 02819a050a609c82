"""What happens to values between HuggingFace's tensors and Megatron's: joining, splitting and reordering of rows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Dims = Mapping[str, int]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Transform:
    """A way to make one Megatron tensor of some HuggingFace tensors, and back without loss.

    Args:
        name: for the report.
        join: (HuggingFace tensors, dimensions of the model) -> Megatron's tensor.
        split: (Megatron's tensor, dimensions) -> the HuggingFace tensors.
    """

    name: str
    join: Callable[[Sequence[Tensor], Dims], Tensor]
    split: Callable[[Tensor, Dims], list[Tensor]]

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """Shape of Megatron's tensor for the shapes of HuggingFace's: rows are joined."""
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _join_qkv(parts: Sequence[Tensor], dims: Dims) -> Tensor:
    """Query, key and value rows, interleaved by query group: [q of group 0, k 0, v 0, q of group 1, ...]."""
    groups, rest = dims["G"], parts[0].shape[1:]
    grouped = [part.reshape(groups, -1, *rest) for part in parts]
    return torch.cat(grouped, dim=1).reshape(-1, *rest)


def _split_qkv(tensor: Tensor, dims: Dims) -> list[Tensor]:
    groups, rest = dims["G"], tensor.shape[1:]
    sizes = [dims["Q"] // groups, dims["KV"] // groups, dims["KV"] // groups]
    parts = tensor.reshape(groups, -1, *rest).split(sizes, dim=1)
    return [part.reshape(-1, *rest).contiguous() for part in parts]


COPY = Transform("copy", lambda parts, dims: parts[0], lambda tensor, dims: [tensor])
GATED = Transform(
    "gate and up joined",
    lambda parts, dims: torch.cat(list(parts)),
    lambda tensor, dims: [half.contiguous() for half in tensor.chunk(2)],
)
QKV = Transform("q, k, v interleaved", _join_qkv, _split_qkv)


def dequantize_blocks(weight: Tensor, scale: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Values of a block-quantised matrix, as DeepSeek-V3 is published.

    Args:
        weight: [N, K] in an 8-bit float type.
        scale: [ceil(N / block[0]), ceil(K / block[1])] fp32, the factor of each block.
        block: rows and columns of a block.
        dtype: of the result.

    Returns:
        [N, K] in `dtype`; the product is taken in fp32.
    """
    rows, columns = weight.shape
    result = torch.empty(rows, columns, dtype=dtype)
    for i in range(scale.shape[0]):  # a band of rows at a time: the fp32 copy stays small
        band = slice(i * block[0], min((i + 1) * block[0], rows))
        factors = scale[i].float().repeat_interleave(block[1])[:columns]
        result[band] = (weight[band].float() * factors).to(dtype)
    return result
