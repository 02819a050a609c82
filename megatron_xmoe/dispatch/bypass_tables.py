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
    """[B]: first of the direct rows to send that are in a bin; FAR for others."""

    list_out: Tensor
    """[B]: where the list of a bin begins among them, FAR for others."""

    routes_out: Tensor
    """[G]: where records for a rank begin among them."""


@dataclass(frozen=True)
class RowTables:
    """What a rank that forwards rows, experts and tokens need of a layout."""

    list_rows: Tensor
    """[J * G, 2]: of the rows that this rank forwards, by place and source: the first pilot's row at the experts; that
    row among the direct ones * J + the place."""

    copies: Tensor
    """[G * J]: Layout.copies."""

    sums: Tensor
    """[B]: first row, at the tokens, of what returns of the rows sent in a bin; the first token for copies that stay;
    -FAR for others."""


@dataclass(frozen=True)
class InTables(RowTables):
    """What a dispatch needs for the rows that arrive, and its gradient for those that return."""

    list_in: Tensor
    """[J * G]: where lists of a place and source begin, at the experts."""

    list_ends: Tensor
    """[J * G]: rows to forward of the segments up to each; the last one is F."""

    routes_in: Tensor
    """[L * G]: where records of a segment begin, at the experts."""

    route_ends: Tensor
    """[L * G]: received routes of the segments up to each; the last one is M."""

    sources: Tensor
    """[L * G]: rank of a segment's tokens * J."""

    weights_in: Tensor
    """[L * G]: routes_in among the direct rows."""


@dataclass(frozen=True)
class BackTables(RowTables):
    """What the combine and its gradient need."""

    sends: Tensor
    """See OutTables."""


def units_of_numbers(counts: Counts) -> tuple[int, int, int]:
    """Units of a row, of an index and of a record."""
    size = unit_bytes(counts.row_bytes)
    return counts.row_bytes // size, 4 // size, (4 + counts.weight_bytes) // size


def by_bin(places: Places, of_ranks: ndarray) -> ndarray:
    """[B]: a number [G] of each rank for the bin of what is sent to it, FAR for other bins."""
    table = np.full(places.ranks * places.width + 2, FAR)
    table[places.own_bins] = of_ranks
    return table


def row_tables(layout: Layout) -> dict[str, ndarray]:
    """See RowTables."""
    places, members = layout.counts.places, len(layout.counts.places.members)
    list_rows = np.empty((members, places.ranks, 2), np.int64)
    list_rows[:, :, 0] = layout.arrived
    list_rows[:, :, 1] = (layout.arrived - layout.counts.tokens) * members + np.arange(members)[:, None]
    sums = by_bin(places, layout.sent_to + layout.at_tokens[0])
    sums[sums == FAR] = -FAR
    sums[-2] = 0
    return {"list_rows": list_rows.reshape(-1, 2), "copies": layout.copies.ravel(), "sums": sums}


def out_tables(layout: Layout) -> dict[str, ndarray]:
    """See OutTables."""
    counts, places = layout.counts, layout.counts.places
    units, word, record = units_of_numbers(counts)
    list_out = np.full(places.ranks * places.width + 2, FAR)
    list_out[:-2] = ((layout.meta_out * units)[:, None] + starts(counts.lists[0], 1) * word).ravel()
    list_out[places.own_bins] = FAR
    routes_out = layout.meta_out * units + counts.list_sizes[0] * word - starts(counts.route_sizes[0]) * record
    return {"sends": by_bin(places, layout.sent_to), "list_out": list_out, "routes_out": routes_out}


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
    return row_tables(layout) | {
        "list_in": list_in.T.ravel() - starts(list_sizes) * word,
        "list_ends": list_sizes.cumsum(),
        "routes_in": begins,
        "route_ends": sizes.cumsum(),
        "sources": sources * members,
        "weights_in": begins - counts.tokens * units,
    }


def back_tables(layout: Layout) -> dict[str, ndarray]:
    """See BackTables."""
    return row_tables(layout) | {"sends": by_bin(layout.counts.places, layout.sent_to)}
