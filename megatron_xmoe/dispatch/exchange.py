"""Exchanges of rows between the ranks of a group, in one place: uneven, started early, and guarded where needed.

RCCL can hang when a rank sends or receives nothing at all (paper, section 5.4). The guard has such a rank send itself
one row that nobody reads. It decides that alone, from its own numbers, so it costs no communication.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def guards_by_default() -> bool:
    """Whether this is ROCm, where a rank without rows can hang."""
    return torch.version.hip is not None


@dataclass
class Pending:
    """An exchange that is under way; what it reads and writes is kept alive until it is waited for."""

    output: Tensor
    work: dist.Work | None = None
    sent: Tensor | None = None
    guarded: tuple[Tensor, int] | None = None
    """Where rows really arrive, and the position of the row that is left out."""

    def wait(self) -> Tensor:
        """The rows that arrived; what the current stream does from now on comes after their arrival."""
        if self.work is not None:
            self.work.wait()
        if self.guarded is not None:
            rows, extra = self.guarded
            self.output[:extra] = rows[:extra]
            self.output[extra:] = rows[extra + 1 :]
        self.work = self.sent = self.guarded = None
        return self.output


def start_exchange(
    output: Tensor,
    rows: Tensor,
    output_splits: list[int],
    input_splits: list[int],
    group: ProcessGroup,
    guard: bool = False,
    own_stream: bool = True,
) -> Pending:
    """Start an uneven all-to-all and return at once.

    Args:
        output: [sum(output_splits), ...], contiguous; written by the time that `wait` allows it to be read.
        rows: [sum(input_splits), ...].
        output_splits, input_splits: rows from and for each rank of the group.
        guard: never exchange nothing at all (see above).
        own_stream: on a GPU, run on the group's stream, so that the current one can go on.
    """
    rows = rows.contiguous()
    if group.size() == 1:
        output.copy_(rows)
        return Pending(output)
    if guard and not (rows.shape[0] and output.shape[0]):
        me = group.rank()  # in the group: its global ranks need not be consecutive
        before, extra = sum(input_splits[:me]), sum(output_splits[:me])
        rows = torch.cat([rows[:before], rows.new_zeros(1, *rows.shape[1:]), rows[before:]])
        target = output.new_empty(output.shape[0] + 1, *output.shape[1:])
        output_splits = [n + (rank == me) for rank, n in enumerate(output_splits)]
        input_splits = [n + (rank == me) for rank, n in enumerate(input_splits)]
        work = dist.all_to_all_single(target, rows, output_splits, input_splits, group=group, async_op=own_stream)
        return Pending(output, work, rows, (target, extra))
    work = dist.all_to_all_single(output, rows, output_splits, input_splits, group=group, async_op=own_stream)
    return Pending(output, work, rows)


def exchange_rows(
    rows: Tensor,
    output_splits: list[int],
    input_splits: list[int],
    group: ProcessGroup,
    guard: bool = False,
    own_stream: bool = False,
) -> Tensor:
    """The rows that arrive, [sum(output_splits), ...]; differentiable. Args: see start_exchange."""
    if group.size() == 1:
        return rows
    return _Exchange.apply(rows, output_splits, input_splits, group, guard, own_stream)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, output_splits, input_splits, group, guard, own_stream):
        ctx.arguments = input_splits, output_splits, group, guard, own_stream
        output = rows.new_empty(sum(output_splits), *rows.shape[1:])
        return start_exchange(output, rows, output_splits, input_splits, group, guard, own_stream).wait()

    @staticmethod
    def backward(ctx, grad):
        return _Exchange.apply(grad, *ctx.arguments), None, None, None, None, None
