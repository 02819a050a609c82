"""Index arrays of redundancy bypassing: which rows to gather and to sum, from a layout and what arrived as metadata.

Tables are made on the host, as late as they may be, and index arrays are looked up in them on the device. Nothing here
communicates or waits for a device. Meta rows hold, for each rank, lists of pilots to forward, by who gets them; then a
*record* for each route: its word and its weight. Positions of bits are counted in units, see `ops.raw_bits`.

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

from megatron_xmoe.dispatch.layout import Counts, Layout, starts
from megatron_xmoe.dispatch.pilots import Places
from megatron_xmoe.ops.bypass import FAR, Numbered, operation
from megatron_xmoe.ops.raw_bits import unit_bytes, units_of


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
        """Of the dispatch."""
        return Layout(self.counts, together=False, meta=True)

    @cached_property
    def out(self) -> "OutTables":
        """Of the dispatch, for what is sent first."""
        return OutTables(**self._on_device(out_tables(self.dispatching)))

    @cached_property
    def there(self) -> "InTables":
        """Of the dispatch, for what arrives."""
        tables = row_tables(self.dispatching) | in_tables(self.dispatching, self.arrival_order)
        return InTables(**self._on_device(tables))

    @cached_property
    def back(self) -> "BackTables":
        """Of the combine and its gradient."""
        layout = Layout(self.counts, together=True, meta=False)
        return BackTables(layout, **self._on_device(row_tables(layout) | back_tables(layout)))

    @cached_property
    def back_with_weights(self) -> "WeightTables":
        """Of the gradient of the dispatch."""
        layout = Layout(self.counts, together=True, meta=True)
        tables = row_tables(layout) | back_tables(layout) | weight_tables(layout, self.arrival_order)
        return WeightTables(layout, **self._on_device(tables))

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


# Tables on the device, int64. Records and lists begin at a unit, less those before them: for numbers of all.
@dataclass(frozen=True)
class OutTables:
    """What a dispatch needs to send its rows."""

    sends: Tensor
    """[B]: first row, at the tokens, of the rows to send that are in a bin; FAR for others."""

    list_out: Tensor
    """[B]: where the list of a bin begins, FAR for others."""

    routes_out: Tensor
    """[G]: where records for a rank begin."""


@dataclass(frozen=True)
class InTables:
    """What a dispatch needs for the rows that arrive."""

    list_rows: Tensor
    """[J * G, 3]: of the rows that this rank forwards, by place and source: their row at the tokens, less the number of
    rows in segments before; the first pilot's row at the experts; that pilot's row among those between nodes * J + the
    place."""

    copies: Tensor
    """[G * J]: Layout.copies."""

    list_in: Tensor
    """[J * G]: where lists of a place and source begin."""

    list_ends: Tensor
    """[J * G]: rows to forward of the segments up to each; the last one is F."""

    routes_in: Tensor
    """[L * G]: where records of a segment begin."""

    route_ends: Tensor
    """[L * G]: received routes of the segments up to each; the last one is M."""

    sources: Tensor
    """[L * G]: rank of a segment's tokens * J."""


@dataclass(frozen=True)
class BackTables:
    """Of a layout for the way back, and for the gradients that retrace it."""

    layout: Layout

    list_rows: Tensor
    """See InTables."""

    copies: Tensor
    """See InTables."""

    sends: Tensor
    """See OutTables."""

    sums: Tensor
    """[B]: the same, and the first token for copies that stay; -FAR for others."""


@dataclass(frozen=True)
class WeightTables(BackTables):
    """The same where weights travel, too."""

    routes_out: Tensor
    """See OutTables."""

    node_routes_in: Tensor
    """[L * G]: where records of a segment begin if the source is on this node, else FAR."""

    abroad_routes_in: Tensor
    """[L * G]: the same in the rows between nodes, if the source is on another."""


def units_of_numbers(counts: Counts) -> tuple[int, int, int]:
    """Units of a row, of an index and of a record."""
    size = unit_bytes(counts.row_bytes)
    return counts.row_bytes // size, 4 // size, (4 + counts.weight_bytes) // size


def spare_rows(counts: Counts) -> int:
    """Rows behind a buffer that take what is written to no place in it: room for a routing weight."""
    return -(-8 // counts.row_bytes)


def by_bin(places: Places, of_ranks: ndarray) -> ndarray:
    """[B]: a number [G] of each rank for the bin of what is sent to it, FAR for other bins."""
    table = np.full(places.ranks * places.width + 2, FAR)
    table[places.own_bins] = of_ranks
    return table


def row_tables(layout: Layout) -> dict[str, ndarray]:
    """What a rank that forwards rows, and experts, need of every layout."""
    places, members = layout.counts.places, len(layout.counts.places.members)
    list_rows = np.empty((members, places.ranks, 3), np.int64)
    list_rows[:, :, 0] = (layout.forwards - starts(layout.forwarded[0]))[:, None]
    list_rows[:, :, 1] = layout.pilots
    list_rows[:, :, 2] = (layout.pilots - layout.counts.tokens) * members + np.arange(members)[:, None]
    return {"list_rows": list_rows.reshape(-1, 3), "copies": layout.copies.ravel()}


def out_tables(layout: Layout) -> dict[str, ndarray]:
    """See OutTables."""
    counts, places = layout.counts, layout.counts.places
    units, word, _ = units_of_numbers(counts)
    list_out = np.full(places.ranks * places.width + 2, FAR)
    list_out[:-2] = ((layout.meta_out * units)[:, None] + starts(counts.lists[0], 1) * word).ravel()
    list_out[places.own_bins] = FAR
    return {"sends": by_bin(places, layout.sent_to), "list_out": list_out, "routes_out": routes_out(layout)}


def routes_out(layout: Layout) -> ndarray:
    """See OutTables."""
    counts, (units, word, record) = layout.counts, units_of_numbers(layout.counts)
    return layout.meta_out * units + counts.list_sizes[0] * word - starts(counts.route_sizes[0]) * record


def routes_in(layout: Layout, arrival_order: bool) -> tuple[ndarray, ndarray, ndarray]:
    """[L * G] of each segment: where its records begin, less those before; its routes; the rank of its tokens."""
    counts, (units, word, record) = layout.counts, units_of_numbers(layout.counts)
    sizes = counts.routes[1]
    begins = (layout.meta_in * units + counts.list_sizes[1] * word)[:, None] + starts(sizes, 1) * record
    sources = np.broadcast_to(np.arange(len(sizes))[:, None], sizes.shape)
    if not arrival_order:
        begins, sizes, sources = begins.T, sizes.T, sources.T
    sizes = sizes.ravel()
    return begins.ravel() - starts(sizes) * record, sizes, sources.ravel()


def in_tables(layout: Layout, arrival_order: bool) -> dict[str, ndarray]:
    """See InTables."""
    counts, members = layout.counts, len(layout.counts.places.members)
    units, word, _ = units_of_numbers(counts)
    lists = counts.lists[1, :, :members]
    list_in, list_sizes = (layout.meta_in * units)[:, None] + starts(lists, 1) * word, lists.T.ravel()
    begins, sizes, sources = routes_in(layout, arrival_order)
    return {
        "list_in": list_in.T.ravel() - starts(list_sizes) * word,
        "list_ends": list_sizes.cumsum(),
        "routes_in": begins,
        "route_ends": sizes.cumsum(),
        "sources": sources * members,
    }


def back_tables(layout: Layout) -> dict[str, ndarray]:
    """See BackTables."""
    sends = by_bin(layout.counts.places, layout.sent_to)
    sums = np.where(sends == FAR, -FAR, sends)
    sums[-2] = 0
    return {"sends": sends, "sums": sums}


def weight_tables(layout: Layout, arrival_order: bool) -> dict[str, ndarray]:
    """See WeightTables."""
    counts = layout.counts
    begins, _, sources = routes_in(layout, arrival_order)
    remote, before = counts.places.remote[sources], counts.tokens * units_of_numbers(counts)[0]
    return {
        "routes_out": routes_out(layout),
        "node_routes_in": np.where(remote, FAR, begins),
        "abroad_routes_in": np.where(remote, begins - before, FAR),
    }


def tokens_table(plan: Plan, tables: BackTables) -> Tensor:
    """[T, K] int64: rows, at the tokens, that are copies of a token or sums for it; negative for none."""
    return tables.sums[plan.bins] + plan.number


def rows_to_send(plan: Plan, sends: Tensor, end: int) -> Tensor:
    """[end + spare_rows] int64: token of each row at the tokens before `end` that is sent, -1 for other rows."""
    return operation("sources_of_rows", plan.bins)(plan.bins, plan.number, sends, end + spare_rows(plan.counts))


def write_meta(rows: Tensor, weights: Tensor, copies: Numbered, plan: Plan) -> None:
    """Write the meta rows of a dispatch among `rows` to send, with spare ones.

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


def routes_of_rows(plan: Plan, found: Found, tables: BackTables, rows: int) -> Tensor:
    """[rows, S] int64: routes of each row at the experts, -1 for none."""
    return operation("routes_of_rows", found.copy)(found.copy, found.slotted, tables.copies, rows, plan.slots)


def add_forwarded(index: Tensor, plan: Plan, found: Found) -> None:
    """Put into `index`, of rows at the tokens, the row at the experts of the pilot of each row that is forwarded."""
    operation("add_forwarded", index)(index, found.list_segment, found.list_number, plan.back.list_rows)


def parts_of_pilots(plan: Plan, found: Found, tables: BackTables) -> Tensor:
    """[P + spare_rows, J] int64: the rows, at the tokens, that make up the sum of each of the P rows between nodes."""
    first, end, _ = tables.layout.at_experts
    return operation("parts_of_pilots", found.list_segment)(
        found.list_segment, found.list_number, tables.list_rows, first, end - first, spare_rows(plan.counts),
        len(plan.places.members), plan.places.local,
    )  # fmt: skip


def return_weights(plan: Plan, found: Found, weights: Tensor, rows: Tensor, abroad: bool) -> None:
    """Write weights [M] of received routes into `rows` that return to where they came from.

    Args: rows between nodes for those from other nodes (`abroad`), or rows at the experts for those from this one;
        with spare rows.
    """
    tables = plan.back_with_weights
    begins = tables.abroad_routes_in if abroad else tables.node_routes_in
    operation("write_weights", rows)(units_of(rows), found.segment, weights.contiguous(), begins)


def returned_weights(plan: Plan, rows: Tensor) -> Tensor:
    """The weights [N] of sent routes that returned among `rows` at the tokens, in the wire's type."""
    return operation("read_weights", rows)(
        units_of(rows), plan.expert_ids, plan.back_with_weights.routes_out, plan.places.experts_per_rank,
        plan.counts.weight_bytes,
    )  # fmt: skip
