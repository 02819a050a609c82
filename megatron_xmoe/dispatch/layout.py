"""Sizes and places of everything that redundancy bypassing exchanges, computed on the host from one table of counts.

A pass *spreads* rows of tokens to experts (dispatch; backward of combine) and *collects* rows of experts for tokens
(combine; backward of dispatch). Both have buffers of rows in these sections:

    at the experts:  [ tokens of this rank | direct | forwarded ]
    at the tokens:   [ tokens of this rank | direct | forwarded, sent | direct, sent ]

"Direct" rows go from the tokens' rank to another over the whole group, by source rank: pilots from other nodes, copies
from the own one. Where gradients of routing weights return with them, *weight rows* follow those of each rank: raw bits
of these. "Forwarded" are the copies that pilots' ranks send on inside their node. A rank's copies for itself are not
sent: its tokens are in the buffer; only its weight rows are.

Indices and routing weights have an exchange of their own, of 4-byte words: for each rank the rows that it shall
forward, by who gets them, then a record for each route: its word (see `ops.bypass.Numbered`) and its weight.

Letters: G ranks of the group, R of the largest node, L experts of a rank, J ranks of this node.
"""

from dataclasses import dataclass
from functools import cached_property

from numpy import ndarray

from megatron_xmoe.dispatch.pilots import Places


@dataclass(frozen=True)
class Splits:
    """Rows, or words, to and from each rank of a group."""

    sent: list[int]
    received: list[int]

    @property
    def back(self) -> "Splits":
        """The same exchange in the other direction."""
        return Splits(self.received, self.sent)


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

    @property
    def record_words(self) -> int:
        """Of a route: its word and its weight."""
        return 1 + self.weight_bytes // 4

    @cached_property
    def meta_words(self) -> ndarray:
        """[2, G]: words of indices and routing weights."""
        return self.list_sizes + self.record_words * self.route_sizes

    @cached_property
    def weight_rows(self) -> ndarray:
        """[2, G]: rows that hold a weight of each route."""
        return (self.weight_bytes * self.route_sizes + self.row_bytes - 1) // self.row_bytes

    @cached_property
    def meta(self) -> Splits:
        """Words over the group."""
        return Splits(*self.meta_words.tolist())


@dataclass(frozen=True)
class Layout:
    """Where everything is in the buffers of one exchange: first rows, int64 on the host. See the module's docstring.

    Each part is computed when it is first asked for: an exchange starts before all of it is known.
    """

    counts: Counts
    weights: bool = False
    """Whether there are weight rows."""

    @cached_property
    def sizes(self) -> ndarray:
        """[2, G]: direct rows to and from each rank."""
        return self.counts.rows + self.counts.weight_rows if self.weights else self.counts.rows

    @cached_property
    def direct(self) -> Splits:
        """Over the group."""
        return Splits(*self.sizes.tolist())

    @cached_property
    def inside(self) -> Splits:
        """Inside the node: rows that this rank forwards, and that are forwarded to it."""
        counts = self.counts
        sent, received = counts.lists[1].sum(0)[: len(counts.places.members)], counts.forwarded.sum(0)
        return Splits(sent.tolist(), received.tolist())

    @cached_property
    def at_experts(self) -> tuple[int, int, int]:
        """First row of each section at the experts but the first, and the number of rows."""
        forwarded_at = self.counts.tokens + sum(self.direct.received)
        return self.counts.tokens, forwarded_at, forwarded_at + sum(self.inside.received)

    @cached_property
    def at_tokens(self) -> tuple[int, int]:
        """First row of the last section at the tokens, before which it is as at the experts; and the number of rows."""
        sent_at = self.at_experts[1] + sum(self.inside.sent)
        return sent_at, sent_at + sum(self.direct.sent)

    @cached_property
    def sent_to(self) -> ndarray:
        """[G] among the direct rows that are sent: those to each rank."""
        return starts(self.sizes[0])

    @cached_property
    def arrived(self) -> ndarray:
        """[G] at the experts: direct rows of each source."""
        return self.counts.tokens + starts(self.sizes[1])

    @cached_property
    def weights_at(self) -> ndarray:
        """[2, G]: first weight row for each rank among the direct rows that are sent; of each source among those that
        arrive."""
        return starts(self.sizes, 1) + self.counts.rows

    @cached_property
    def copies(self) -> ndarray:
        """[G, J] at the experts: copies of each source's tokens from each of this node."""
        places, forwarded = self.counts.places, self.counts.forwarded
        copies = self.at_experts[1] + starts(forwarded.sum(0)) + starts(forwarded)
        copies[:, places.local] = self.arrived
        copies[places.members] = self.arrived[places.members, None]
        copies[places.rank] = 0  # the tokens themselves
        return copies


def starts(sizes: ndarray, axis: int = 0) -> ndarray:
    """First positions of segments of these sizes, along an axis."""
    return sizes.cumsum(axis) - sizes
