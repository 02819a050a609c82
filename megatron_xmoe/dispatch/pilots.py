"""Which of a token's routes travel as rows: pilots, and copies (paper, section 4.2). Pure index arithmetic.

A token needs one row on each rank that has experts of its choice: a *copy*, which all its routes there share. To
another node one row crosses the network, to the *pilot* rank, one of those that need a copy; the pilot rank forwards
it to the others. Inside its own node a token's rank sends the copies itself.

Letters: T tokens, K routes per token, E experts, L experts of a rank, G ranks of the expert-parallel group, R ranks of
the largest node.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from megatron_xmoe.ops import Routes
from megatron_xmoe.ops.bypass import NO_NODE, NODE_BIT, Numbered, operation

PilotRule = Literal["balanced", "first"]


@dataclass(frozen=True)
class Places:
    """Where the ranks of an expert-parallel group are, seen from one of them; tensors on a device."""

    rank: int
    """The rank that looks, in the group."""

    members: ndarray
    """[J] int64: ranks of its node, ascending."""

    width: int
    """R, the ranks of the largest node."""

    node_of: ndarray
    """[G] int64: node of each rank."""

    local_of: ndarray
    """[G] int64: place of each rank among those of its node."""

    experts_per_rank: int
    """L."""

    experts: Tensor
    """[E + 1, 3], see `number_copies` of `kernels.reference_bypass`. Other nodes have their number as node of a key;
    each rank of this node counts as a node of its own, because nothing is forwarded there."""

    bin_of: Tensor
    """[G + 1], see `number_copies`."""

    place_of: Tensor
    """[G + 1], see `number_copies`: a rank of this node gets what its own rank sends."""

    mirror: Tensor
    """[G * R] int64: where a table [G * R] of what each rank forwards to each of its node has what a rank receives from
    each of its node; where there is nothing, the entry of this rank's copies for itself, which is always 0."""

    @cached_property
    def local(self) -> int:
        """Place of the rank among those of its node."""
        return int(self.local_of[self.rank])

    @property
    def ranks(self) -> int:
        """G."""
        return len(self.node_of)

    @cached_property
    def remote(self) -> ndarray:
        """[G] bool: ranks of other nodes."""
        return self.node_of != self.node_of[self.rank]

    @cached_property
    def own_bins(self) -> ndarray:
        """[G] int64: bin of the pilots of each rank, and of copies for ranks of this node."""
        return np.arange(self.ranks) * self.width + self.local_of

    @cached_property
    def forwarded_to(self) -> ndarray:
        """[2, G, R] bool: the places to which another rank forwards rows, all but its own; then, for every rank, those
        to which this rank does."""
        to = np.arange(self.width) != self.local_of[:, None]
        return np.stack([to, np.broadcast_to(to[self.rank], to.shape)])

    @classmethod
    def of(cls, node_of: tuple[int, ...], rank: int, experts_per_rank: int, device: torch.device | str) -> "Places":
        """Args: node of each rank of the group; this rank; L; the device of the tensors."""
        nodes = [[r for r, n in enumerate(node_of) if n == node] for node in node_of]  # of each rank
        ranks, width, local = len(nodes), max(map(len, nodes)), nodes[rank].index(rank)
        local_of = np.array([members.index(r) for r, members in enumerate(nodes)])
        mirror = [
            members[j] * width + local_of[r] if j < len(members) and members[j] != r else rank * width + local
            for r, members in enumerate(nodes)
            for j in range(width)
        ]
        own = np.array(node_of) == node_of[rank]
        key = np.where(own, max(node_of) + 1 + local_of, node_of) << NODE_BIT | np.arange(ranks)
        experts = np.stack([key.repeat(experts_per_rank), _random(ranks * experts_per_rank, 1),
                            (_random(ranks, 2) | 1).repeat(experts_per_rank)], axis=1)  # fmt: skip
        bin_of = np.append(local_of, -ranks * width - 1)
        bin_of[rank] = (ranks - rank) * width
        return cls(
            rank=rank,
            members=np.array(nodes[rank]),
            width=width,
            node_of=np.array(node_of),
            local_of=local_of,
            experts_per_rank=experts_per_rank,
            experts=torch.tensor(np.append(experts, [[NO_NODE << NODE_BIT | ranks, 0, 1]], axis=0), device=device),
            bin_of=torch.tensor(bin_of, device=device),
            place_of=torch.tensor(np.append(np.where(own, local, local_of), 0), dtype=torch.int32, device=device),
            mirror=torch.tensor(mirror, device=device),
        )


def choose_copies(routes: Routes, places: Places, salt: int | None) -> Numbered:
    """Choose pilots, number all copies, and count them for the other ranks.

    Args:
        routes: of this rank's tokens; dropped ones have no copy.
        places: of the group.
        salt: of the hash that chooses pilots, by layer and rank; None takes the first rank of the node.
    """
    numbered = operation("number_copies", routes.inverse)(
        routes.inverse, routes.expert_ids, places.experts, places.bin_of, places.place_of, places.mirror,
        routes.tokens_per_expert, places.width, most_routes(places, routes.inverse.shape[1]), salt,
    )  # fmt: skip
    return Numbered(*numbered)


def most_routes(places: Places, per_token: int) -> int:
    """The most routes of a copy, min(K, L)."""
    return min(places.experts_per_rank, per_token)


def salt_of(layer_number: int | None, rank: int) -> int:
    """What the hash of pilots depends on besides the token: the layer and the rank in the group.

    A hash, not a counter of steps: a second forward pass for recomputation must choose the same pilots, and so must a
    run that is resumed. Pilots change from step to step because the tokens' experts, which are hashed as well, do.
    """
    return (((layer_number or 0) << 24) + rank) * 0x9E3779B97F4A7C15 & (2**62 - 1)


def _random(count: int, seed: int) -> ndarray:
    """[count] int64 without any pattern, always the same (splitmix64)."""
    x = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed << 32)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))).view(np.int64)
