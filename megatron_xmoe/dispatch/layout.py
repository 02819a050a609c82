"""Sizes and places of everything that redundancy bypassing exchanges, computed on the host from one table of counts.

A pass *spreads* rows of tokens to experts (dispatch; backward of combine) and *collects* rows of experts for tokens
(combine; backward of dispatch). Both have buffers of rows in these sections:

    at the experts:  [ tokens of this rank | between nodes | inside the node ]
    at the tokens:   [ tokens of this rank | between nodes | inside the node, sent | between nodes, sent ]

"Between nodes" has, by source rank, the pilots and then, in the dispatch, *meta rows*: raw bits of indices and routing
weights. "Inside the node" has what ranks of the node send each other: copies of their own tokens with their meta rows,
and copies that they forward. The forward pass of the dispatch sends all own ones before the forwarded ones; otherwise
they travel together, rank by rank. A rank's copies for itself are not sent: its tokens are in the buffer.

Letters: G ranks of the group, R of the largest node, L experts of a rank, J ranks of this node.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy import ndarray

from megatron_xmoe.dispatch.pilots import Places


@dataclass(frozen=True)
class Counts:
    """What this rank sends and receives: int64 arrays on the host; where there are two, sent and received."""

    places: Places
    tokens: int
    row_bytes: int
    weight_bytes: int
    """Of a routing weight on the wire, 4 or 8."""

    sent: ndarray
    """[G, 2R + L]: what is told to each rank: the rows sent to it (in its own place's column) and those that it shall
    forward to each of its node, [R]; rows that each of its node forwards to it, [R]; routes to its experts, [L]."""

    received: ndarray
    """[G, 2R + L]: what each rank tells this one."""

    @cached_property
    def rows(self) -> tuple[ndarray, ndarray]:
        """[G]: rows to and from each rank, those that others forward not counted."""
        local_of = self.places.local_of
        return self.sent[np.arange(len(local_of)), local_of], self.received[:, self.places.local]

    @cached_property
    def lists(self) -> tuple[ndarray, ndarray]:
        """[G, R]: rows that each rank shall forward to each of its node, and those that this rank shall, by source."""
        width, local_of = self.places.width, self.places.local_of
        other = np.arange(width) != local_of[:, None]
        return self.sent[:, :width] * other, self.received[:, :width] * other[self.places.rank]

    @cached_property
    def forwarded(self) -> ndarray:
        """[G, J]: rows of each rank's tokens that each of this node forwards to this rank."""
        width = self.places.width
        return self.received[:, width : width + len(self.places.members)]

    @cached_property
    def routes(self) -> tuple[ndarray, ndarray]:
        """[G, L]: routes to each rank's experts, and from each rank to this one's."""
        first = 2 * self.places.width
        return self.sent[:, first:], self.received[:, first:]

    @cached_property
    def meta_rows(self) -> tuple[ndarray, ndarray]:
        """[G]: rows of raw bits: 4 bytes a row to forward, 4 and a weight a route."""
        sizes = (
            4 * lists.sum(1) + (4 + self.weight_bytes) * routes.sum(1)
            for lists, routes in zip(self.lists, self.routes, strict=True)
        )
        return tuple((size + self.row_bytes - 1) // self.row_bytes for size in sizes)


@dataclass(frozen=True)
class Splits:
    """Rows to and from each rank of a group."""

    sent: list[int]
    received: list[int]

    @property
    def back(self) -> "Splits":
        """The same exchange in the other direction."""
        return Splits(self.received, self.sent)


@dataclass(frozen=True)
class Layout:
    """Where everything is in the buffers of one exchange: first rows, int64 on the host. See the module's docstring."""

    counts: Counts
    between: Splits
    """Between nodes, over the group."""

    inside: tuple[Splits, ...]
    """Inside the node: (own, forwarded), or (both,)."""

    pilots: ndarray
    """[G] at the experts: pilots of each source; of a source on this node, its own copies."""

    copies: ndarray
    """[G, J] at the experts: copies of each source's tokens from each of this node."""

    meta_in: ndarray
    """[G] at the experts: meta rows of each source."""

    sent_to: ndarray
    """[G] at the tokens: what was sent to each rank."""

    meta_out: ndarray
    """[G] at the tokens: meta rows for each rank."""

    forwards: ndarray
    """[J] at the tokens: what this rank forwards to each of the node."""

    @classmethod
    def of(cls, counts: Counts, together: bool, meta: bool) -> "Layout":
        """Args: `together`, one exchange inside the node and not two; whether there are meta rows."""
        places, (sent_rows, received_rows) = counts.places, counts.rows
        members, me = list(places.members), places.rank
        remote = places.remote
        sent, received = (rows + extra * meta for rows, extra in zip(counts.rows, counts.meta_rows, strict=True))
        sent_abroad, received_abroad = sent * remote, received * remote
        between = Splits(sent_abroad.tolist(), received_abroad.tolist())
        forwarded_out, forwarded_in = counts.lists[1].sum(0)[: len(members)], counts.forwarded.sum(0)
        own_out, own_in = sent[members], received[members]
        tokens, pilots = counts.tokens, counts.tokens + starts(received_abroad)
        inside_at = tokens + sum(between.received)
        if together:
            both_out, both_in = own_out + forwarded_out, own_in + forwarded_in
            inside = (_splits(both_out, both_in),)
            own_at = inside_at + starts(both_in)
            forwarded_at = own_at + own_in
            own_sent_at = inside_at + starts(both_out)
            forwards = own_sent_at + own_out
            back_at = inside_at + sum(inside[0].sent)
        else:
            inside = (_splits(own_out, own_in), _splits(forwarded_out, forwarded_in))
            own_at = inside_at + starts(own_in)
            forwarded_at = inside_at + sum(inside[0].received) + starts(forwarded_in)
            back_at, own_sent_at = 0, sum(between.sent) + starts(own_out)
            forwards = starts(forwarded_out)
        pilots[members] = own_at
        copies = forwarded_at + starts(counts.forwarded)
        copies[:, places.local] = pilots
        copies[members] = own_at[:, None]
        copies[me] = 0  # the tokens themselves
        sent_to = back_at + starts(sent_abroad)
        sent_to[members] = own_sent_at
        return cls(
            counts=counts,
            between=between,
            inside=inside,
            pilots=pilots,
            copies=copies,
            meta_in=pilots + received_rows,
            sent_to=sent_to,
            meta_out=sent_to + sent_rows,
            forwards=forwards,
        )

    @property
    def at_experts(self) -> tuple[int, int, int]:
        """First row of each section at the experts but the first, and the number of rows."""
        inside_at = self.counts.tokens + sum(self.between.received)
        return self.counts.tokens, inside_at, inside_at + sum(sum(splits.received) for splits in self.inside)

    @property
    def at_tokens(self) -> tuple[int, int, int, int]:
        """The same at the tokens."""
        inside_at = self.counts.tokens + sum(self.between.received)
        back_at = inside_at + sum(sum(splits.sent) for splits in self.inside)
        return self.counts.tokens, inside_at, back_at, back_at + sum(self.between.sent)


def _splits(sent: ndarray, received: ndarray) -> Splits:
    return Splits(sent.tolist(), received.tolist())


def starts(sizes: ndarray, axis: int = 0) -> ndarray:
    """First positions of segments of these sizes, along an axis."""
    return sizes.cumsum(axis) - sizes
