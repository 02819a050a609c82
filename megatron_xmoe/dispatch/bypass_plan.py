"""Index arrays of redundancy bypassing: which rows to gather and to sum, from a layout and what arrived as metadata.

Index arrays are looked up on the device in tables of `dispatch.bypass_tables`. Nothing here communicates or waits for a
device. Meta rows hold, for each rank, lists of pilots to forward, by who gets them; then a *record* for each route: its
word and its weight.

Letters: T tokens, K routes per token, N routes sent, M routes received, F rows to forward, G ranks, R ranks of the
largest node, J ranks of this node, L experts of a rank, S most routes of a copy, B = G * R + 2 bins (see
`kernels.reference_bypass`).
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from megatron_xmoe.dispatch.bypass_tables import (
    BackTables,
    InTables,
    OutTables,
    RowTables,
    back_tables,
    in_tables,
    out_tables,
)
from megatron_xmoe.dispatch.layout import Counts, Layout
from megatron_xmoe.dispatch.pilots import Places
from megatron_xmoe.ops.bypass import Numbered, operation
from megatron_xmoe.ops.raw_bits import units_of


@dataclass(frozen=True)
class Plan:
    """What a rank knows of a pass once it has the counts; tensors on the device."""

    counts: Counts
    places: Places

    bins: Tensor
    """[T, K] int64, see `Numbered`."""

    number: Tensor
    """[T, K] int32, see `Numbered`."""

    expert_ids: Tensor
    """[N] int32: expert of each sent route, ascending."""

    slots: int
    """S."""

    arrival_order: bool
    """Whether received routes stay in order of arrival (source, expert) instead of (expert, source)."""

    @cached_property
    def dispatching(self) -> Layout:
        """Of the dispatch and its gradient."""
        return Layout(self.counts, meta=True)

    @cached_property
    def returning(self) -> Layout:
        """Of the combine and its gradient."""
        return Layout(self.counts, meta=False)

    @cached_property
    def out(self) -> OutTables:
        """Of the dispatch, for what is sent first."""
        return OutTables(**self._on_device(out_tables(self.dispatching)))

    @cached_property
    def there(self) -> InTables:
        """Of the dispatch, for what arrives, and of its gradient."""
        return InTables(**self._on_device(in_tables(self.dispatching, self.arrival_order)))

    @cached_property
    def back(self) -> BackTables:
        """Of the combine and its gradient."""
        return BackTables(**self._on_device(back_tables(self.returning)))

    @cached_property
    def received(self) -> tuple[int, int]:
        """M and F."""
        return int(self.counts.route_sizes[1].sum()), int(self.counts.list_sizes[1].sum())

    def prepare_return(self) -> None:
        """Make the tables of the combine now, where the host has time, and not between the experts and it."""
        _ = self.back

    def _on_device(self, arrays: dict[str, ndarray]) -> dict[str, Tensor]:
        """The arrays, int64, in one transfer, which the host does not wait for."""
        flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays.values()]))
        if self.bins.is_cuda:  # many tables of other memory would wait for their turn on the device
            flat = flat.pin_memory().to(self.bins.device, non_blocking=True)
        parts = flat.split([array.size for array in arrays.values()])
        return {name: part.view(array.shape) for (name, array), part in zip(arrays.items(), parts, strict=True)}


@dataclass(frozen=True)
class Found:
    """What a rank read from the meta rows it got. Routes in the order in which the experts get them."""

    segment: Tensor
    """[M] int64: the (expert, source), or (source, expert), of a route."""

    copy: Tensor
    """[M] int64: rank of its token * J + the place that its copy comes from."""

    number: Tensor
    """[M] int32: the copy's number among those of this source from there."""

    slotted: Tensor
    """[M] int32: that number * S + the route's number among those of its copy."""

    list_segment: Tensor
    """[F] int64, ascending: place of who gets a row that this rank forwards * G + rank of its token."""

    list_number: Tensor
    """[F] int32: the row's number among the source's pilots."""


def tokens_table(plan: Plan, tables: RowTables) -> Tensor:
    """[T, K] int64: rows, at the tokens, that are copies of a token or sums for it; negative for none."""
    return tables.sums[plan.bins] + plan.number


def rows_to_send(plan: Plan, sends: Tensor, rows: int) -> Tensor:
    """[rows + 1] int64: token of each direct row that is sent, -1 for meta rows; and a row for what has no place."""
    return operation("sources_of_rows", plan.bins)(plan.bins, plan.number, sends, rows + 1)


def write_meta(rows: Tensor, weights: Tensor, copies: Numbered, plan: Plan) -> None:
    """Write the meta rows of a dispatch among `rows` to send, behind which there is one more.

    Args: weights [N] in a type for the wire.
    """
    operation("write_meta", rows)(
        units_of(rows), copies.bins, copies.number, copies.pilot_number, plan.out.list_out, copies.words,
        weights.contiguous(), plan.expert_ids, plan.out.routes_out, plan.places.experts_per_rank,
    )  # fmt: skip


def read_lists(plan: Plan, tables: InTables, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The lists of rows to forward: Found's `list_segment` and `list_number`, and the rows [F] of their pilots, from
    rows at the experts."""
    return operation("read_lists", rows)(
        units_of(rows), tables.list_ends, tables.list_in, tables.list_rows, plan.received[1]
    )


def read_routes(
    plan: Plan, tables: InTables, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Found's `segment`, `copy`, `number` and `slotted`, the row [M] of each route's copy and the weights [M] in the
    wire's type, from rows at the experts."""
    return operation("read_routes", rows)(
        units_of(rows), tables.route_ends, tables.routes_in, tables.sources, tables.copies, plan.received[0],
        plan.places.width, plan.slots, plan.counts.weight_bytes,
    )  # fmt: skip


def rows_of_routes(plan: Plan, found: Found) -> Tensor:
    """[M] int64: row, at the experts, of each route's copy in the gradient of the combine."""
    return plan.back.copies[found.copy] + found.number


def routes_of_rows(plan: Plan, found: Found, tables: RowTables, rows: int) -> Tensor:
    """[rows, S] int64: routes of each row at the experts, -1 for none."""
    return operation("routes_of_rows", found.copy)(found.copy, found.slotted, tables.copies, rows, plan.slots)


def rows_to_forward(plan: Plan, found: Found) -> Tensor:
    """[F] int64: row, at the experts, of the pilot of each row that is forwarded in the gradient of the combine."""
    return plan.back.list_rows[:, 0][found.list_segment] + found.list_number


def parts_of_sums(plan: Plan, found: Found, tables: RowTables, layout: Layout) -> Tensor:
    """[P, J] int64: the rows, at the tokens, that make up the sum of each of the P direct rows."""
    first, end, _ = layout.at_experts
    return operation("parts_of_sums", found.list_segment)(
        found.list_segment, found.list_number, tables.list_rows, first, end - first, len(plan.places.members),
        plan.places.local,
    )  # fmt: skip


def return_weights(plan: Plan, found: Found, weights: Tensor, rows: Tensor) -> None:
    """Write weights [M] of received routes into the direct `rows` that return to where they came from."""
    operation("write_weights", rows)(units_of(rows), found.segment, weights.contiguous(), plan.there.weights_in)


def returned_weights(plan: Plan, rows: Tensor) -> Tensor:
    """The weights [N] of sent routes that returned among the direct `rows`, in the wire's type."""
    return operation("read_weights", rows)(
        units_of(rows), plan.expert_ids, plan.out.routes_out, plan.places.experts_per_rank,
        plan.counts.weight_bytes,
    )  # fmt: skip
