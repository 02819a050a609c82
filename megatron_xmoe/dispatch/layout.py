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
    """What this rank sends and receives: int64 arrays on the host, whose first index is 0 for sent, 1 for received."""

    places: Places
    tokens: int
    row_bytes: int
    weight_bytes: int
    """Of a routing weight on the wire, 4 or 8."""

    told: ndarray
    """[2, G, 2R + L]: what is told to each rank, and what each tells this one: the rows sent to it (in its own place's
    column) and those that it shall forward to each of its node, [R]; rows that each of its node forwards to it, [R];
    routes to its experts, [L]."""

    @cached_property
    def lists(self) -> ndarray:
        """[2, G, R]: rows that each rank shall forward to each of its node, and those that this rank shall, by
        source."""
        return self.told[:, :, : self.places.width] * self.places.forwarded_to

    @cached_property
    def list_sizes(self) -> ndarray:
        """[2, G]: sums of the lists over the places."""
        return self.lists.sum(2)

    @cached_property
    def rows(self) -> ndarray:
        """[2, G]: rows to and from each rank, those that others forward not counted."""
        return self.told[:, :, : self.places.width].sum(2) - self.list_sizes

    @cached_property
    def forwarded(self) -> ndarray:
        """[G, J]: rows of each rank's tokens that each of this node forwards to this rank."""
        width = self.places.width
        return self.told[1, :, width : width + len(self.places.members)]

    @cached_property
    def routes(self) -> ndarray:
        """[2, G, L]: routes to each rank's experts, and from each rank to this one's."""
        return self.told[:, :, 2 * self.places.width :]

    @cached_property
    def route_sizes(self) -> ndarray:
        """[2, G]: sums of the routes over the experts."""
        return self.routes.sum(2)

    @cached_property
    def meta_rows(self) -> ndarray:
        """[2, G]: rows of raw bits: 4 bytes a row to forward, 4 and a weight a route."""
        size = 4 * self.list_sizes + (4 + self.weight_bytes) * self.route_sizes
        return (size + self.row_bytes - 1) // self.row_bytes


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
    """Where everything is in the buffers of one exchange: first rows, int64 on the host. See the module's docstring.

    Each part is computed when it is first asked for: an exchange starts before all of it is known.
    """

    counts: Counts
    together: bool
    """One exchange inside the node, and not two."""

    meta: bool
    """Whether there are meta rows."""

    @cached_property
    def sizes(self) -> ndarray:
        """[2, G]: rows of all kinds for and from each rank, but forwarded ones."""
        return self.counts.rows + self.counts.meta_rows if self.meta else self.counts.rows

    @cached_property
    def abroad(self) -> ndarray:
        """[2, G]: those of ranks of other nodes."""
        return self.sizes * self.counts.places.remote

    @cached_property
    def between(self) -> Splits:
        """Between nodes, over the group."""
        return Splits(*self.abroad.tolist())

    @cached_property
    def own(self) -> ndarray:
        """[2, J]: rows of this node's ranks."""
        return self.sizes[:, self.counts.places.members]

    @cached_property
    def forwarded(self) -> ndarray:
        """[2, J]: rows that this rank forwards to each of its node, and that each forwards to it."""
        counts = self.counts
        return np.stack([counts.lists[1].sum(0)[: len(counts.places.members)], counts.forwarded.sum(0)])

    @cached_property
    def inside(self) -> tuple[Splits, ...]:
        """Inside the node: (own, forwarded), or (both,)."""
        parts = (self.own + self.forwarded,) if self.together else (self.own, self.forwarded)
        return tuple(Splits(*part.tolist()) for part in parts)

    @cached_property
    def at_experts(self) -> tuple[int, int, int]:
        """First row of each section at the experts but the first, and the number of rows."""
        inside_at = self.counts.tokens + sum(self.between.received)
        return self.counts.tokens, inside_at, inside_at + sum(sum(splits.received) for splits in self.inside)

    @cached_property
    def at_tokens(self) -> tuple[int, int, int, int]:
        """The same at the tokens."""
        inside_at = self.counts.tokens + sum(self.between.received)
        back_at = inside_at + sum(sum(splits.sent) for splits in self.inside)
        return self.counts.tokens, inside_at, back_at, back_at + sum(self.between.sent)

    @cached_property
    def sent_to(self) -> ndarray:
        """[G] at the tokens: what was sent to each rank."""
        abroad = self.abroad[0]
        sent_to = starts(abroad)
        if self.together:
            sent_to += self.at_tokens[2]
            own_at = self.at_tokens[1] + starts(self.own[0] + self.forwarded[0])
        else:
            own_at = sum(self.between.sent) + starts(self.own[0])
        sent_to[self.counts.places.members] = own_at
        return sent_to

    @cached_property
    def meta_out(self) -> ndarray:
        """[G] at the tokens: meta rows for each rank."""
        return self.sent_to + self.counts.rows[0]

    @cached_property
    def forwards(self) -> ndarray:
        """[J] at the tokens: what this rank forwards to each of the node."""
        if self.together:
            return self.sent_to[self.counts.places.members] + self.own[0]
        return starts(self.forwarded[0])

    @cached_property
    def _inside_in(self) -> tuple[ndarray, ndarray]:
        """[J] at the experts: own copies of each rank of the node, and what it forwards."""
        inside_at = self.at_experts[1]
        if self.together:
            own_at = inside_at + starts(self.own[1] + self.forwarded[1])
            return own_at, own_at + self.own[1]
        own_end = inside_at + sum(self.inside[0].received)
        return inside_at + starts(self.own[1]), own_end + starts(self.forwarded[1])

    @cached_property
    def pilots(self) -> ndarray:
        """[G] at the experts: pilots of each source; of a source on this node, its own copies."""
        pilots = self.counts.tokens + starts(self.abroad[1])
        pilots[self.counts.places.members] = self._inside_in[0]
        return pilots

    @cached_property
    def meta_in(self) -> ndarray:
        """[G] at the experts: meta rows of each source."""
        return self.pilots + self.counts.rows[1]

    @cached_property
    def copies(self) -> ndarray:
        """[G, J] at the experts: copies of each source's tokens from each of this node."""
        places, (own_at, forwarded_at) = self.counts.places, self._inside_in
        copies = forwarded_at + starts(self.counts.forwarded)
        copies[:, places.local] = self.pilots
        copies[places.members] = own_at[:, None]
        copies[places.rank] = 0  # the tokens themselves
        return copies


def starts(sizes: ndarray, axis: int = 0) -> ndarray:
    """First positions of segments of these sizes, along an axis."""
    return sizes.cumsum(axis) - sizes
