"""Index arrays of redundancy bypassing: which rows to gather and to sum, from a layout and what arrived as metadata.

Index arrays are looked up on the device in tables of `dispatch.bypass_tables`. Nothing here communicates or waits for a
device. Of metadata and weight rows see `dispatch.layout`.

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
    InTables,
    OutTables,
    RowTables,
    WeightTables,
    in_tables,
    out_tables,
    weight_tables,
)
from megatron_xmoe.dispatch.layout import Counts, Layout
from megatron_xmoe.dispatch.pilots import Places
from megatron_xmoe.ops.bypass import Numbered, operation
from megatron_xmoe.ops.raw_bits import bytes_of


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
    def layout(self) -> Layout:
        """Of all exchanges of rows but those of the dispatch's gradient."""
        return Layout(self.counts)

    @cached_property
    def layout_with_weights(self) -> Layout:
        """Of the dispatch's gradient."""
        return Layout(self.counts, weights=True)

    @cached_property
    def out(self) -> OutTables:
        """For what is sent first."""
        return OutTables(**self._on_device(out_tables(self.layout)))

    @cached_property
    def there(self) -> InTables:
        """For what arrives, and for what returns of it."""
        return InTables(**self._on_device(in_tables(self.layout, self.arrival_order)))

    @cached_property
    def gradient(self) -> WeightTables:
        """For the dispatch's gradient."""
        return WeightTables(**self._on_device(weight_tables(self.layout_with_weights, self.arrival_order)))

    @cached_property
    def sources(self) -> Tensor:
        """[rows] int64: token of each direct row that is sent."""
        rows = sum(self.layout.direct.sent)
        # one more row takes what has no place
        return operation("sources_of_rows", self.bins)(self.bins, self.number, self.out.sends, rows + 1)[:rows]

    @cached_property
    def received(self) -> tuple[int, int]:
        """M and F."""
        return int(self.counts.route_sizes[1].sum()), int(self.counts.list_sizes[1].sum())

    def prepare_gradient(self) -> None:
        """Make the tables of the dispatch's gradient now, where the host has time."""
        _ = self.gradient

    def _on_device(self, arrays: dict[str, ndarray]) -> dict[str, Tensor]:
        """The arrays, int64, in one transfer, which the host does not wait for."""
        flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays.values()]))
        if self.bins.is_cuda:  # many tables of other memory would wait for their turn on the device
            flat = flat.pin_memory().to(self.bins.device, non_blocking=True)
        parts = flat.split([array.size for array in arrays.values()])
        return {name: part.view(array.shape) for (name, array), part in zip(arrays.items(), parts, strict=True)}


@dataclass(frozen=True)
class Found:
    """What a rank read from the metadata it got. Routes in the order in which the experts get them."""

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


def write_meta(weights: Tensor, copies: Numbered, plan: Plan) -> Tensor:
    """[words] int32: the metadata that is sent. Args: weights [N] in a type for the wire."""
    words = sum(plan.counts.meta.sent)
    meta = plan.number.new_empty(words + 1)  # one more word takes what has no place
    operation("write_meta", meta)(
        meta, copies.bins, copies.number, copies.pilot_number, plan.out.list_out, copies.words, weights.contiguous(),
        plan.expert_ids, plan.out.routes_out, plan.places.experts_per_rank,
    )  # fmt: skip
    return meta[:words]


def read_lists(plan: Plan, tables: InTables, meta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The lists of rows to forward: Found's `list_segment` and `list_number`, and the rows [F] of their pilots, from
    metadata [words] that arrived."""
    return operation("read_lists", meta)(
        meta, tables.list_ends, tables.list_in, tables.list_rows, plan.received[1]
    )


def read_routes(
    plan: Plan, tables: InTables, meta: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Found's `segment`, `copy`, `number` and `slotted`, the row [M] of each route's copy and the weights [M] in the
    wire's type, from metadata [words] that arrived."""
    return operation("read_routes", meta)(
        meta, tables.route_ends, tables.routes_in, tables.sources, tables.copies, plan.received[0],
        plan.places.width, plan.slots, plan.counts.weight_bytes,
    )  # fmt: skip


def rows_of_routes(plan: Plan, found: Found) -> Tensor:
    """[M] int64: row, at the experts, of each route's copy."""
    return plan.there.copies[found.copy] + found.number


def routes_of_rows(plan: Plan, found: Found, tables: RowTables, rows: int) -> Tensor:
    """[rows, S] int64: routes of each row at the experts, -1 for none."""
    return operation("routes_of_rows", found.copy)(found.copy, found.slotted, tables.copies, rows, plan.slots)


def rows_to_forward(plan: Plan, found: Found) -> Tensor:
    """[F] int64: row, at the experts, of the pilot of each row that is forwarded."""
    return plan.there.list_rows[:, 0][found.list_segment] + found.list_number


def parts_of_sums(plan: Plan, found: Found, tables: RowTables, layout: Layout) -> Tensor:
    """[P, J] int64: the rows, at the tokens, that make up the sum of each of the P direct rows."""
    first, end, _ = layout.at_experts
    return operation("parts_of_sums", found.list_segment)(
        found.list_segment, found.list_number, tables.list_rows, first, end - first, len(plan.places.members),
        plan.places.local,
    )  # fmt: skip


def return_weights(plan: Plan, found: Found, weights: Tensor, rows: Tensor) -> None:
    """Write weights [M] of received routes into the direct `rows` that return to where they came from."""
    operation("write_weights", rows)(bytes_of(rows), found.segment, weights.contiguous(), plan.gradient.weights_in)


def returned_weights(plan: Plan, rows: Tensor) -> Tensor:
    """The weights [N] of sent routes that returned among the direct `rows`, in the wire's type."""
    return operation("read_weights", rows)(
        bytes_of(rows), plan.expert_ids, plan.gradient.weights_out, plan.places.experts_per_rank,
        plan.counts.weight_bytes,
    )  # fmt: skip
