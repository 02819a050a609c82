"""The experts' matrix products over an expert-major, padding-free buffer, behind one interface for all backends.

Letters: M rows in expert order, R rows of the source, E experts, D features in, N features out, F FFN size. Rows of an
expert are contiguous. `index` [M] int32 names the source row of each row, where the rows are not in order themselves.
"""

from dataclasses import dataclass
from functools import cache, cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_xmoe.kernels.grouped_gemm import choose_grouped_gemm
from megatron_xmoe.kernels.registry import kernel


@dataclass(frozen=True)
class Groups:
    """Which rows belong to which expert."""

    counts: Tensor
    """[E] rows of each expert, on the CPU or the rows' device; zeros are allowed. Rows after those of the last expert
    are nobody's: what is computed for them has no meaning."""

    ends: Tensor
    """[E] int32, cumulative counts, on the rows' device."""

    @classmethod
    def of(cls, tokens_per_expert: Tensor, device: torch.device) -> "Groups":
        """From row counts [E], on the CPU or on `device`."""
        ends = tokens_per_expert.cumsum(0, dtype=torch.int32)
        return cls(tokens_per_expert, ends.to(device, non_blocking=True))

    @cached_property
    def sizes(self) -> list[int]:
        """The counts on the host, which waits for them where they are not there."""
        return self.counts.tolist()

    def parts(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Rows [M, ...] of each expert."""
        return rows[: sum(self.sizes)].split(self.sizes)

    def experts_of_rows(self, num_rows: int) -> Tensor:
        """[M] int32: the expert of each row, any for rows of none. Args: num_rows, M."""
        positions = torch.arange(num_rows, device=self.ends.device, dtype=self.ends.dtype)
        experts = torch.searchsorted(self.ends, positions, right=True, out_int32=True)
        return experts.clamp_(max=self.ends.shape[0] - 1)


class GroupedGemm:
    """A backend of the products.

    Nothing here is differentiable; ops.grouped_mlp is made of these.
    """

    gathers = False
    """Whether `multiply` gathers the rows itself, without a copy of them."""

    needs_sizes = True
    """Whether the host must know how many rows each expert has."""

    def multiply_add(
        self, rows: Tensor, weight: Tensor, bias: Tensor, groups: Groups, index: Tensor | None = None
    ) -> Tensor:
        """`multiply` plus the bias [E, N] of each row's expert; here added to rounded products, as Megatron does."""
        result = self.multiply(rows, weight, groups, index)
        result += bias.index_select(0, groups.experts_of_rows(result.shape[0]))
        return result

    def multiply(
        self, rows: Tensor, weight: Tensor, groups: Groups, index: Tensor | None = None, transposed: bool = False
    ) -> Tensor:
        """Each row times its expert's weight.

        Args:
            rows: [M, D], or [R, D] with `index`.
            weight: [E, N, D], one matrix as a linear layer has it; with `transposed` [E, D, N].

        Returns:
            [M, N] in rows' dtype.
        """
        raise NotImplementedError

    def weight_gradient(self, grad: Tensor, rows: Tensor, groups: Groups, into: Tensor | None = None) -> Tensor:
        """Gradient [E, N, D] of `weight` in `multiply`; zeros where there are no rows.

        Args:
            grad: [M, N]. rows: [M, D].
            into: [E, N, D], of any floating dtype: the gradient is added to it, and it is the result.
        """
        raise NotImplementedError


class Loop(GroupedGemm):
    """A product per expert."""

    def multiply(self, rows, weight, groups, index=None, transposed=False):
        rows, matrices = _gathered(rows, index), weight if transposed else weight.transpose(1, 2)
        result = rows.new_empty(rows.shape[0], matrices.shape[2])
        for part, matrix, out in zip(groups.parts(rows), matrices, groups.parts(result), strict=True):
            torch.mm(part, matrix, out=out)
        return result

    def multiply_add(self, rows, weight, bias, groups, index=None):
        rows = _gathered(rows, index)
        result = rows.new_empty(rows.shape[0], weight.shape[1])
        parts = zip(groups.parts(rows), weight, bias, groups.parts(result), strict=True)
        for part, matrix, one, out in parts:
            torch.addmm(one, part, matrix.t(), out=out)
        return result

    def weight_gradient(self, grad, rows, groups, into=None):
        result = grad.new_empty(len(groups.sizes), grad.shape[1], rows.shape[1]) if into is None else into
        for part, inputs, out in zip(groups.parts(grad), groups.parts(rows), result, strict=True):
            if into is None:
                torch.mm(part.t(), inputs, out=out)
            elif out.dtype == grad.dtype:
                out.addmm_(part.t(), inputs)
            elif grad.is_cuda:
                out += torch.mm(part.t(), inputs, out_dtype=out.dtype)
            else:  # which has no product with another type of result
                out.addmm_(part.t().to(out.dtype), inputs.to(out.dtype))
        return result


class TorchGroupedMM(GroupedGemm):
    """torch's grouped_mm. Its results are bf16, also where they are added to an fp32 tensor."""

    def multiply(self, rows, weight, groups, index=None, transposed=False):
        matrices = weight if transposed else weight.transpose(1, 2)
        return F.grouped_mm(_gathered(rows, index), matrices, offs=groups.ends)

    def weight_gradient(self, grad, rows, groups, into=None):
        result = F.grouped_mm(grad.t(), rows, offs=groups.ends)
        for expert, size in enumerate(groups.sizes):
            if size == 0:  # the kernel may leave the result of an empty group unwritten
                result[expert].zero_()
        return result if into is None else into.add_(result)


class TritonGemm(GroupedGemm):
    """Our Triton kernels."""

    gathers = True
    needs_sizes = False

    def __init__(self):
        from megatron_xmoe.kernels import triton_grouped_gemm

        self.kernels = triton_grouped_gemm

    def multiply(self, rows, weight, groups, index=None, transposed=False):
        return self.kernels.multiply(rows, weight, groups.ends, index, transposed)

    def weight_gradient(self, grad, rows, groups, into=None):
        return self.kernels.weight_gradient(grad, rows, groups.ends, into, accumulate=into is not None)


_CLASSES = {"loop": Loop, "torch": TorchGroupedMM, "triton": TritonGemm}


def backend(name: str) -> GroupedGemm:
    """The backend of a name, whether or not it can run here."""
    return _CLASSES[name]()


def backend_for(pinned: str, rows: Tensor, features: tuple[int, ...]) -> GroupedGemm:
    """The backend that kernels.grouped_gemm chooses for rows like these and weights of these feature sizes.

    Raises:
        ValueError: `pinned` is unknown or cannot run here.
    """
    return _backend_for(pinned, rows.device.type, rows.dtype, features)


@cache
def _backend_for(pinned: str, device_type: str, dtype: torch.dtype, features: tuple[int, ...]) -> GroupedGemm:
    return backend(choose_grouped_gemm(pinned, device_type, dtype, features).name)


def _gathered(rows: Tensor, index: Tensor | None) -> Tensor:
    return rows if index is None else kernel("gather_rows", rows.device.type)(rows.contiguous(), index.contiguous())
