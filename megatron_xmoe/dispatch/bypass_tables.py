"""Tables of redundancy bypassing: where rows and records begin, made on the host out of a layout, for index arrays.

Made as late as they may be, and sent to the device by `bypass_plan.Plan`. Positions of bits are counted in units, see
`ops.raw_bits`; the letters are those of `bypass_plan`.
"""

from dataclasses import dataclass

import numpy as np
from numpy import ndarray
from torch import Tensor

from megatron_xmoe.dispatch.layout import Counts, Layout, starts
from megatron_xmoe.dispatch.pilots import Places
from megatron_xmoe.ops.bypass import FAR
from megatron_xmoe.ops.raw_bits import unit_bytes


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
