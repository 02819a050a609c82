"""Tables of redundancy bypassing: where rows, words and weights begin, made on the host, for index arrays.

Made as late as they may be, and sent to the device by `bypass_plan.Plan`. The letters are those of `bypass_plan`.
"""

from dataclasses import dataclass

import numpy as np
from numpy import ndarray
from torch import Tensor

from megatron_xmoe.dispatch.layout import Layout, starts
from megatron_xmoe.dispatch.pilots import Places
from megatron_xmoe.ops.bypass import FAR


# Tables on the device, int64. Lists, records and weights begin at a position, less those before them: for numbers of
# all. Those of metadata are words; those of weights are bytes of the direct rows.
@dataclass(frozen=True)
class OutTables:
    """What a rank needs to send."""

    sends: Tensor
    """[B]: first of the direct rows to send that are in a bin; FAR for others."""

    list_out: Tensor
    """[B]: where the list of a bin begins, FAR for others."""

    routes_out: Tensor
    """[G]: where records for a rank begin."""


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
    """What a rank needs for what arrives."""

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
class WeightTables(RowTables):
    """What the gradient of a dispatch needs, which returns weights."""

    weights_in: Tensor
    """[L * G]: where weights of a segment begin at the experts."""

    weights_out: Tensor
    """[G]: where weights of a rank begin at the tokens."""


def by_bin(places: Places, of_ranks: ndarray) -> ndarray:
    """[B]: a number [G] of each rank for the bin of what is sent to it, FAR for other bins."""
    table = np.full(places.ranks * places.width + 2, FAR)
    table[places.own_bins] = of_ranks
    return table


def out_tables(layout: Layout) -> dict[str, ndarray]:
    """See OutTables."""
    counts, places = layout.counts, layout.counts.places
    begins = starts(counts.meta_words[0])
    list_out = np.full(places.ranks * places.width + 2, FAR)
    list_out[:-2] = (begins[:, None] + starts(counts.lists[0], 1)).ravel()
    list_out[places.own_bins] = FAR
    routes_out = begins + counts.list_sizes[0] - starts(counts.route_sizes[0]) * counts.record_words
    return {"sends": by_bin(places, layout.sent_to), "list_out": list_out, "routes_out": routes_out}


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


def in_tables(layout: Layout, arrival_order: bool) -> dict[str, ndarray]:
    """See InTables."""
    counts, members = layout.counts, len(layout.counts.places.members)
    begins = starts(counts.meta_words[1])
    list_in, list_sizes = segments(begins, counts.lists[1, :, :members], 1, by_source=False)
    routes_in, sizes = segments(
        begins + counts.list_sizes[1], counts.routes[1], counts.record_words, arrival_order
    )
    sources = np.broadcast_to(np.arange(len(begins))[:, None] * members, counts.routes[1].shape)
    return row_tables(layout) | {
        "list_in": list_in,
        "list_ends": list_sizes.cumsum(),
        "routes_in": routes_in,
        "route_ends": sizes.cumsum(),
        "sources": (sources if arrival_order else sources.T).ravel(),
    }


def weight_tables(layout: Layout, arrival_order: bool) -> dict[str, ndarray]:
    """See WeightTables."""
    counts, size = layout.counts, layout.counts.weight_bytes
    sent, arrived = layout.weights_at * counts.row_bytes
    return row_tables(layout) | {
        "weights_in": segments(arrived, counts.routes[1], size, arrival_order)[0],
        "weights_out": sent - starts(counts.route_sizes[0]) * size,
    }


def segments(begins: ndarray, sizes: ndarray, length: int, by_source: bool) -> tuple[ndarray, ndarray]:
    """Of segments, by source and one of its X parts or the other way round, [G * X] or [X * G]: where each begins, less
    what is before it; its size.

    Args: where each source begins [G]; sizes [G, X]; the length of each of so many things.
    """
    begins = begins[:, None] + starts(sizes, 1) * length
    if not by_source:
        begins, sizes = begins.T, sizes.T
    sizes = sizes.ravel()
    return begins.ravel() - starts(sizes) * length, sizes
