"""Index arrays of redundancy bypassing: which rows to gather and to sum, from a layout and what arrived as metadata.

Tables are made on the host and sent to the device together; index arrays are looked up in them there. Nothing here
communicates or waits for a device. Meta rows hold, for each rank, lists of pilots to forward, by who gets them; then a
*record* for each route: its word and its weight. Positions of bits are counted in units, see `ops.raw_bits`.

Letters: T tokens, K routes per token, N routes sent, M routes received, F rows to forward, G ranks, R ranks of the
largest node, J ranks of this node, L experts of a rank, S most routes of a copy, B = G * R + 2 bins (see `ops.bypass`).
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from megatron_xmoe.dispatch.layout import Counts, Layout, starts
from megatron_xmoe.dispatch.pilots import Places
from megatron_xmoe.ops import bypass
from megatron_xmoe.ops.bypass import FAR, Numbered
from megatron_xmoe.ops.raw_bits import read_units, unit_bytes, units_of


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
    def there(self) -> "Tables":
        """Of the dispatch."""
        return self._tables(together=False, meta=True)

    @cached_property
    def back(self) -> "Tables":
        """Of the combine and its gradient."""
        return self._tables(together=True, meta=False)

    @cached_property
    def back_with_weights(self) -> "Tables":
        """Of the gradient of the dispatch."""
        return self._tables(together=True, meta=True)

    @cached_property
    def sizes(self) -> tuple[int, int, int]:
        """N, M and F."""
        (sent, received), lists = self.counts.routes, self.counts.lists[1]
        return int(sent.sum()), int(received.sum()), int(lists.sum())

    @cached_property
    def numbers(self) -> Tensor:
        """[max(T, N, M, F)] int64: 0, 1, 2 and so on."""
        return torch.arange(max(self.counts.tokens, *self.sizes), device=self.bins.device)

    def _tables(self, together: bool, meta: bool) -> "Tables":
        layout = Layout.of(self.counts, together, meta)
        arrays = row_tables(layout) | (meta_tables(layout, self.arrival_order) if meta else {})
        return Tables(layout, **on_device(arrays, self.bins.device))


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


@dataclass(frozen=True)
class Tables:
    """A layout's tables on the device, int64; those after `copies` only where there are meta rows."""

    layout: Layout

    sends: Tensor
    """[B]: first row, at the tokens, of the rows to send that are in a bin; FAR for others."""

    sums: Tensor
    """[B]: the same, and the first token for copies that stay; -FAR for others."""

    list_rows: Tensor
    """[J * G, 3]: of the rows that this rank forwards, by place and source: their row at the tokens, less the number of
    rows in segments before; the first pilot's row at the experts; that pilot's row among those between nodes * J + the
    place."""

    copies: Tensor
    """[G * J]: Layout.copies."""

    list_out: Tensor | None = None
    """[B, units of an index]: where the list of a bin begins, FAR for others."""

    routes_out: Tensor | None = None
    """[E, units of a record]: where records for the rank of an expert begin, less the records before them: for numbers
    of all sent routes."""

    list_in: Tensor | None = None
    """[J * G, units of an index]: where lists of a place and source begin, for numbers of all rows to forward."""

    routes_in: Tensor | None = None
    """[L * G, units of a record]: where records of a segment begin, for numbers of all received routes."""

    node_weights_in: Tensor | None = None
    """[L * G, units of a weight]: where their weights begin if the source is on this node, else FAR."""

    abroad_weights_in: Tensor | None = None
    """[L * G, units of a weight]: the same in the rows between nodes, if the source is on another."""

    sources: Tensor | None = None
    """[L * G]: rank of a segment's tokens * J."""

    list_ends: Tensor | None = None
    """[J * G]: rows to forward of the segments up to each; the last one is F."""

    route_ends: Tensor | None = None
    """[L * G]: the same of received routes; the last one is M."""


def units_of_numbers(counts: Counts) -> tuple[int, int, int]:
    """Units of a row, of an index and of a routing weight."""
    size = unit_bytes(counts.row_bytes)
    return counts.row_bytes // size, 4 // size, counts.weight_bytes // size


def spare_rows(counts: Counts) -> int:
    """Rows behind a buffer that take what is written to no place in it: room for a routing weight."""
    return -(-8 // counts.row_bytes)


def row_tables(layout: Layout) -> dict[str, ndarray]:
    """The tables of every layout, see Tables."""
    counts, places = layout.counts, layout.counts.places
    members = len(places.members)
    sends = np.full((places.ranks, places.width), FAR)
    sends[np.arange(places.ranks), places.local_of] = layout.sent_to
    sends = np.append(sends, (FAR, FAR))
    sums = np.where(sends == FAR, -FAR, sends)
    sums[-2] = 0
    lists = counts.lists[1].sum(0)[:members]
    list_rows = np.empty((members, places.ranks, 3), np.int64)
    list_rows[:, :, 0] = (layout.forwards - starts(lists))[:, None]
    list_rows[:, :, 1] = layout.pilots
    list_rows[:, :, 2] = (layout.pilots - counts.tokens) * members + np.arange(members)[:, None]
    return {"sends": sends, "sums": sums, "list_rows": list_rows.reshape(-1, 3), "copies": layout.copies.ravel()}


def meta_tables(layout: Layout, arrival_order: bool) -> dict[str, ndarray]:
    """The tables of a layout with meta rows, see Tables."""
    counts, places = layout.counts, layout.counts.places
    members = len(places.members)
    units, word, weight = units_of_numbers(counts)
    record = word + weight
    (lists_to, lists_from), (routes_to, routes_from) = counts.lists, counts.routes
    lists_from = lists_from[:, :members]
    list_out = (layout.meta_out * units)[:, None] + starts(lists_to, 1) * word
    list_out[np.arange(places.ranks), places.local_of] = FAR
    list_in = (layout.meta_in * units)[:, None] + starts(lists_from, 1) * word
    routes_out = layout.meta_out * units + lists_to.sum(1) * word - starts(routes_to.sum(1)) * record
    routes_in = (layout.meta_in * units + lists_from.sum(1) * word)[:, None] + starts(routes_from, 1) * record
    sources = np.broadcast_to(np.arange(places.ranks)[:, None], routes_in.shape)
    if not arrival_order:
        routes_in, routes_from, sources = routes_in.T, routes_from.T, sources.T
    list_sizes, route_sizes, sources = lists_from.T.ravel(), routes_from.ravel(), sources.ravel()
    records = routes_in.ravel() - starts(route_sizes) * record
    weights, remote = records + word, places.remote[sources]
    return {
        "list_out": np.append(list_out, (FAR, FAR))[:, None] + np.arange(word),
        "routes_out": routes_out.repeat(routes_to.shape[1])[:, None] + np.arange(record),
        "list_in": (list_in.T.ravel() - starts(list_sizes) * word)[:, None] + np.arange(word),
        "routes_in": records[:, None] + np.arange(record),
        "node_weights_in": np.where(remote, FAR, weights)[:, None] + np.arange(weight),
        "abroad_weights_in": np.where(remote, weights - counts.tokens * units, FAR)[:, None] + np.arange(weight),
        "sources": sources * members,
        "list_ends": list_sizes.cumsum(),
        "route_ends": route_sizes.cumsum(),
    }


def on_device(arrays: dict[str, ndarray], device: torch.device) -> dict[str, Tensor]:
    """The arrays, int64, in one transfer."""
    flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays.values()]))
    parts = flat.to(device, non_blocking=True).split([array.size for array in arrays.values()])
    return {name: part.view(array.shape) for (name, array), part in zip(arrays.items(), parts, strict=True)}


def tokens_table(plan: Plan, tables: Tables) -> Tensor:
    """[T, K] int64: rows, at the tokens, that are copies of a token or sums for it; negative for none."""
    return bypass.rows_of_copies(plan.bins, plan.number, tables.sums)


def rows_to_send(plan: Plan, tables: Tables, end: int) -> Tensor:
    """[end + spare_rows] int64: token of each row at the tokens before `end` that is sent, -1 for other rows."""
    tokens = plan.numbers[: plan.counts.tokens]
    return bypass.sources_of_rows(plan.bins, plan.number, tables.sends, end + spare_rows(plan.counts), tokens)


def write_meta(rows: Tensor, weights: Tensor, copies: Numbered, plan: Plan, unsent: int) -> None:
    """Write the meta rows of a dispatch among `rows` to send; those from the row `unsent` on go nowhere.

    Args: weights [N] in a type for the wire.
    """
    tables, nowhere = plan.there, unsent * units_of_numbers(plan.counts)[0]
    bypass.write_meta(
        units_of(rows), copies, tables.list_out, weights, plan.expert_ids, tables.routes_out, nowhere, plan.numbers
    )


def read_lists(plan: Plan, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The lists of rows to forward: Found's `list_segment` and `list_number`, from rows at the experts."""
    tables = plan.there
    return bypass.read_lists(units_of(rows), tables.list_ends, tables.list_in, plan.numbers[: plan.sizes[2]])


def read_routes(plan: Plan, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Found's `segment`, `copy`, `number` and `slotted`, and the weights [M] of `dtype`, from rows at the experts."""
    tables, numbers = plan.there, plan.numbers[: plan.sizes[1]]
    return bypass.read_routes(
        units_of(rows), tables.route_ends, tables.routes_in, tables.sources, plan.places.width, plan.slots, dtype,
        numbers,
    )  # fmt: skip


def rows_of_routes(found: Found, tables: Tables) -> Tensor:
    """[M] int64: row, at the experts, of each route's copy."""
    return tables.copies[found.copy] + found.number


def routes_of_rows(plan: Plan, found: Found, tables: Tables, rows: int) -> Tensor:
    """[rows, S] int64: routes of each row at the experts, -1 for none."""
    numbers = plan.numbers[: plan.sizes[1]]
    return bypass.routes_of_rows(found.copy, found.slotted, tables.copies, rows, plan.slots, numbers)


def add_forwarded(index: Tensor, plan: Plan, found: Found, tables: Tables) -> None:
    """Put into `index`, of rows at the tokens, the row at the experts of the pilot of each row that is forwarded."""
    numbers = plan.numbers[: plan.sizes[2]]
    bypass.add_forwarded(index, found.list_segment, found.list_number, tables.list_rows, numbers)


def parts_of_pilots(plan: Plan, found: Found, tables: Tables) -> Tensor:
    """[P + spare_rows, J] int64: the rows, at the tokens, that make up the sum of each of the P rows between nodes."""
    first, end, _ = tables.layout.at_experts
    return bypass.parts_of_pilots(
        found.list_segment, found.list_number, tables.list_rows, first, end - first, spare_rows(plan.counts),
        len(plan.places.members), plan.places.local, plan.numbers[: plan.sizes[2]],
    )  # fmt: skip


def return_weights(plan: Plan, found: Found, weights: Tensor, rows: Tensor, abroad: bool) -> None:
    """Write weights [M] of received routes into `rows` that return to where they came from.

    Args: rows between nodes for those from other nodes (`abroad`), or rows at the experts for those from this one;
        with spare rows.
    """
    tables, (per_row, word, per_weight) = plan.back_with_weights, units_of_numbers(plan.counts)
    begins = tables.abroad_weights_in if abroad else tables.node_weights_in
    nowhere = (rows.shape[0] - spare_rows(plan.counts)) * per_row
    numbers = plan.numbers[: plan.sizes[1]]
    bypass.write_weights(units_of(rows), found.segment, weights, begins, word + per_weight, nowhere, numbers)


def returned_weights(plan: Plan, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights [N] of sent routes that returned among `rows` at the tokens."""
    _, word, per_weight = units_of_numbers(plan.counts)
    at = plan.back_with_weights.routes_out[:, word:][plan.expert_ids]
    at = torch.add(at, plan.numbers[: plan.sizes[0]].unsqueeze(1), alpha=word + per_weight)
    return read_units(units_of(rows), at, dtype)
