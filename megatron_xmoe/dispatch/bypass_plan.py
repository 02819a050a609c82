"""Index arrays of redundancy bypassing: which rows to gather and to sum, from a layout and what arrived as metadata.

All of it is arithmetic on small tables; nothing here communicates or waits for a device.
Letters: T tokens, K routes per token, N routes sent, M routes received, F rows to forward, G ranks, R ranks of the
largest node, J ranks of this node, S most routes of a copy.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from megatron_xmoe.dispatch.layout import Counts, Layout, starts
from megatron_xmoe.dispatch.pilots import Places, find_copies
from megatron_xmoe.dispatch.raw_bits import read_bits, unit_bytes
from megatron_xmoe.ops import merge_order


@dataclass(frozen=True)
class Plan:
    """What a rank knows of a pass once it has the counts; tensors on the device."""

    counts: Counts
    places: Places
    received: Tensor
    """[G, 2R + L] int64: `counts.received` on the device."""

    target: Tensor
    """[T, K] int32: rank to which a row of the token goes, G for this rank itself, -1 for none."""

    number: Tensor
    """[T, K] int32: the row's number among those for the rank; the token, where that is this rank."""

    route_ranks: Tensor
    """[N] int64: rank of each sent route, ascending."""

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

    def _tables(self, together: bool, meta: bool) -> "Tables":
        return Tables.of(Layout.of(self.counts, together, meta), self.received.device)


@dataclass(frozen=True)
class Found:
    """What a rank read from the meta rows it got. Routes in the order in which the experts get them."""

    arrival: Tensor
    """[M] int64: a route's number by source, then expert, then token."""

    source: Tensor
    """[M] int32: rank of its token."""

    copy: Tensor
    """[M] int32: source * J + the place that its copy comes from."""

    number: Tensor
    """[M] int32: the copy's number among those of this source from there."""

    slot: Tensor
    """[M] int32: the route's number among those of its copy."""

    list_source: Tensor
    """[F] int32, ordered by who gets a row that this rank forwards, then by source: rank of its token."""

    list_number: Tensor
    """[F] int32: its number among the source's pilots."""

    list_place: Tensor
    """[F] int32: place of who gets it."""


@dataclass(frozen=True)
class Tables:
    """A layout's tables on the device, int64, in one transfer; see Layout. Bits are counted in units."""

    layout: Layout
    pilots: Tensor
    copies: Tensor
    """[G * J]"""

    sent_to: Tensor
    forwards: Tensor
    """[J]: less what is forwarded to places before, so that a row's number among all forwarded ones can be added."""

    lists_in: Tensor
    """[G]: where a list of each source begins, less the length of the lists before: for numbers of all list entries."""

    routes_in: Tensor
    weights_in: Tensor
    lists_out: Tensor
    """[G * R]: where the list of each rank for each of its node begins."""

    routes_out: Tensor
    weights_out: Tensor

    @classmethod
    def of(cls, layout: Layout, device: torch.device) -> "Tables":
        """Args: a layout; where the tables are needed."""
        counts = layout.counts
        units, word, weight = units_of(counts)
        forwarded = counts.lists[1].sum(0)[: len(layout.forwards)]
        tables = {
            "pilots": layout.pilots,
            "copies": layout.copies,
            "sent_to": layout.sent_to,
            "forwards": layout.forwards - starts(forwarded),
        }
        for number, (side, meta) in enumerate((("out", layout.meta_out), ("in", layout.meta_in))):
            lists, per_rank = counts.lists[number], counts.routes[number].sum(1)
            per_list, first = lists.sum(1), starts(per_rank)
            tables[f"routes_{side}"] = meta * units + (per_list - first) * word
            tables[f"weights_{side}"] = meta * units + (per_list + per_rank) * word - first * weight
            if side == "out":
                tables["lists_out"] = (meta * units)[:, None] + (lists.cumsum(1) - lists) * word
            else:
                tables["lists_in"] = meta * units - starts(per_list) * word
        flat = np.concatenate([table.ravel() for table in tables.values()])
        parts = torch.from_numpy(flat).to(device, non_blocking=True).split([table.size for table in tables.values()])
        return cls(layout, **dict(zip(tables, parts, strict=True)))


def units_of(counts: Counts) -> tuple[int, int, int]:
    """Units of a row, of an index and of a routing weight."""
    size = unit_bytes(counts.row_bytes)
    return counts.row_bytes // size, 4 // size, counts.weight_bytes // size


def spare_rows(counts: Counts) -> int:
    """Rows behind a buffer that take what is written to no place in it: room for a routing weight."""
    return -(-8 // counts.row_bytes)


def tokens_table(plan: Plan, tables: Tables) -> Tensor:
    """[T, K] int64: rows, at the tokens, that are copies of a token or sums for it; -1 for none."""
    rows = tables.sent_to[plan.target.clamp_min(0)] + plan.number
    return torch.where(plan.target < 0, -1, rows)


def rows_to_send(plan: Plan, tables: Tables, first: int, end: int) -> Tensor:
    """[end - first + spare_rows] int64: token of each row that is sent, -1 where it is another row.

    Args: where, at the tokens, the rows begin and end.
    """
    rows = tokens_table(plan, tables) - first
    kept = (plan.target >= 0) & (plan.target < plan.places.ranks)
    tokens = torch.arange(rows.shape[0], device=rows.device).unsqueeze(1).expand_as(rows)
    index = rows.new_full((end - first + spare_rows(plan.counts),), -1)
    return index.scatter_(0, torch.where(kept, rows, end - first).flatten(), tokens.flatten())


def rows_to_forward(found: Found, tables: Tables) -> Tensor:
    """[F] int64: row, at the experts, of the pilot of each row that this rank forwards."""
    return tables.pilots[found.list_source] + found.list_number


def forwarded_rows(found: Found, tables: Tables) -> Tensor:
    """[F] int64: where, at the tokens, each row is that this rank forwards."""
    return tables.forwards[found.list_place] + torch.arange(found.list_place.shape[0], device=tables.forwards.device)


def rows_of_routes(found: Found, tables: Tables) -> Tensor:
    """[M] int64: row, at the experts, of each route's copy."""
    return tables.copies[found.copy] + found.number


def routes_of_rows(plan: Plan, found: Found, tables: Tables, rows: int) -> Tensor:
    """[rows, S] int32: routes of each row at the experts, -1 for none."""
    routes = torch.arange(found.slot.shape[0], dtype=torch.int32, device=found.slot.device)
    table = routes.new_full((rows * plan.slots,), -1)
    table.scatter_(0, rows_of_routes(found, tables) * plan.slots + found.slot, routes)
    return table.view(rows, plan.slots)


def parts_of_pilots(plan: Plan, found: Found, tables: Tables) -> Tensor:
    """[P + spare_rows, J] int64: the rows, at the tokens, that make up the sum of each of the P rows between nodes."""
    first, end, _ = tables.layout.at_experts
    width = len(plan.places.members)
    table = torch.full((end - first + spare_rows(plan.counts), width), -1, device=tables.pilots.device)
    table[: end - first, plan.places.local] = torch.arange(first, end, device=table.device)
    index = (rows_to_forward(found, tables) - first) * width + found.list_place
    table.view(-1).scatter_(0, index, forwarded_rows(found, tables))
    return table


def read_lists(plan: Plan, rows: Tensor, tables: Tables) -> tuple[Tensor, Tensor, Tensor]:
    """The lists of rows to forward: Found's `list_source`, `list_number` and `list_place`, from rows at the experts."""
    width = plan.places.width
    other = torch.arange(width, device=rows.device) != plan.places.local
    lists = (plan.received[:, :width] * other)[:, : len(plan.places.members)].contiguous()
    total = int(plan.counts.lists[1].sum())
    number = torch.arange(total, device=rows.device)
    source = _owners(lists.sum(1), total)
    found = read_bits(rows, tables.lists_in[source] + number * units_of(plan.counts)[1], torch.int32)
    order, _ = merge_order(lists, total)
    return source[order].to(torch.int32), found[order], _owners(lists.sum(0), total).to(torch.int32)


def read_routes(plan: Plan, rows: Tensor, tables: Tables) -> tuple[Tensor, ...]:
    """Found's `arrival`, `source`, `copy`, `number` and `slot`, from rows at the experts."""
    routes = plan.received[:, 2 * plan.places.width :].contiguous()
    total = int(plan.counts.routes[1].sum())
    arrival = torch.arange(total, device=rows.device)
    source = _owners(routes.sum(1), total)
    if not plan.arrival_order and routes.shape[1] > 1:
        arrival = merge_order(routes, total)[0].to(torch.int64)
        source = source[arrival]
    words = read_bits(rows, tables.routes_in[source] + arrival * units_of(plan.counts)[1], torch.int32)
    place, number, slot = find_copies(words, plan.places.width, plan.slots)
    copy = source * len(plan.places.members) + place
    return arrival, source.to(torch.int32), copy.to(torch.int32), number, slot


def _owners(counts: Tensor, total: int) -> Tensor:
    """[total] int64: owner of each of `counts` [G] things, ascending."""
    return torch.arange(counts.shape[0], device=counts.device).repeat_interleave(counts, output_size=total)
