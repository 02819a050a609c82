"""What a pass of a layer sends, in numbers that the host knows anyway. Plain Python: it runs in every pass."""

import math
from collections.abc import Sequence
from typing import NamedTuple


class Traffic(NamedTuple):
    """What one forward pass of a layer sends for this rank's tokens; plain ints that the host knows anyway.

    A dispatcher fills it in after its one host synchronisation, from the split sizes. A row is the hidden state of a
    token. The combine sends as many rows back, and the backward pass moves the same rows again, with gradients of
    routing weights, which are not counted.
    """

    routes: int
    """Routes of this rank's tokens that were not dropped."""

    routes_remote: int
    """Those of them whose expert is on another node."""

    inter_rows: int
    """Rows sent to other nodes: `routes_remote` without redundancy bypassing, (token, node) pairs with it."""

    intra_rows: int
    """Rows sent to other ranks of the same node, those that come from another node and are passed on included."""

    row_bytes: int
    """Bytes of one row."""

    inter_metadata: int
    """Bytes sent to other nodes besides rows, in one forward pass: routing weights, counts, indices."""

    intra_metadata: int
    """The same, to other ranks of the same node."""

    padded_rows: int
    """Rows of a buffer [E, C] that pads each expert to the capacity, or without one to the largest expert's routes."""

    @property
    def redundancy(self) -> float:
        """Share of the routes to other nodes that need no row of their own; NaN where no route leaves the node."""
        return 1 - self.inter_rows / self.routes_remote if self.routes_remote else math.nan

    @property
    def saved_bytes(self) -> int:
        """Bytes of rows that routes to other nodes did not need, dispatch and combine."""
        return 2 * (self.routes_remote - self.inter_rows) * self.row_bytes

    @property
    def inter_bytes(self) -> int:
        """Bytes to other nodes, dispatch and combine."""
        return 2 * self.inter_rows * self.row_bytes + self.inter_metadata

    @property
    def intra_bytes(self) -> int:
        """Bytes to other ranks of the node, dispatch and combine."""
        return 2 * self.intra_rows * self.row_bytes + self.intra_metadata

    @property
    def padding_rows(self) -> int:
        """Rows of the padded buffer that would be padding."""
        return self.padded_rows - self.routes


def flat_traffic(
    sent: Sequence[int],
    rank: int,
    node_of_rank: Sequence[int],
    row_bytes: int,
    bytes_per_route: int,
    bytes_per_rank: int,
    padded_rows: int,
) -> Traffic:
    """Traffic of a plain exchange, in which every route sends a row of its own.

    Args:
        sent: rows for each of the G ranks of the expert-parallel group.
        rank: this one in the group.
        node_of_rank: node of each of the G ranks, any labels.
        row_bytes: bytes of a row.
        bytes_per_route: metadata that goes with each row.
        bytes_per_rank: metadata that goes to each other rank.
        padded_rows: of the buffer [E, C].
    """
    node = node_of_rank[rank]
    ranks_of_node = node_of_rank.count(node)
    rows_of_node = sum(rows for rows, other in zip(sent, node_of_rank, strict=True) if other == node)
    routes = sum(sent)
    inter, intra = routes - rows_of_node, rows_of_node - sent[rank]
    return Traffic(
        routes=routes,
        routes_remote=inter,
        inter_rows=inter,
        intra_rows=intra,
        row_bytes=row_bytes,
        inter_metadata=bytes_per_route * inter + bytes_per_rank * (len(sent) - ranks_of_node),
        intra_metadata=bytes_per_route * intra + bytes_per_rank * (ranks_of_node - 1),
        padded_rows=padded_rows,
    )
