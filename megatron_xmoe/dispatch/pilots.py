"""Which of a token's routes travel as rows: pilots, and copies (paper, section 4.2). Pure index arithmetic.

A token needs one row on each rank that has experts of its choice: a *copy*, which all its routes there share. To
another node one row crosses the network, to the *pilot* rank, one of those that need a copy; the pilot rank forwards
it to the others. Inside its own node a token's rank sends the copies itself.

Letters: T tokens, K routes per token, E experts, L experts of a rank, G ranks of the expert-parallel group, R ranks of
the largest node.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from megatron_xmoe.ops import Routes, build_routes

PilotRule = Literal["balanced", "first"]
_NONE = torch.iinfo(torch.int64).max  # sorts after every key
_NODE, _RANK = 47, 16  # bits below a key's node, and of its rank; 31 bits are left for the hash
_MIX = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # splitmix64's multipliers, as signed numbers


@dataclass(frozen=True)
class Places:
    """Where the ranks of an expert-parallel group are, seen from one of them."""

    rank: int
    """The rank that looks, in the group."""

    members: tuple[int, ...]
    """Ranks of its node, ascending."""

    width: int
    """R, the ranks of the largest node."""

    node_of: ndarray
    """[G] int64: node of each rank."""

    local_of: ndarray
    """[G] int64: place of each rank among those of its node."""

    node_table: Tensor
    """`node_of` on a device."""

    local_table: Tensor
    """`local_of` there."""

    mirror: Tensor
    """[G * R] int64: where a table [G * R] of what each rank forwards to each of its node has what a rank receives from
    each of its node; G * R where there is nothing."""

    @property
    def local(self) -> int:
        """Place of the rank among those of its node."""
        return self.members.index(self.rank)

    @property
    def ranks(self) -> int:
        """G."""
        return len(self.node_of)

    @classmethod
    def of(cls, node_of: tuple[int, ...], rank: int, device: torch.device | str) -> "Places":
        """Args: node of each rank of the group; this rank; the device of the tables."""
        nodes = [[r for r, n in enumerate(node_of) if n == node] for node in node_of]  # of each rank
        width = max(map(len, nodes))
        local_of = [members.index(r) for r, members in enumerate(nodes)]
        mirror = [
            members[j] * width + local_of[r] if j < len(members) and members[j] != r else len(nodes) * width
            for r, members in enumerate(nodes)
            for j in range(width)
        ]
        tables = (torch.tensor(values, device=device) for values in (node_of, local_of, mirror))
        return cls(rank, tuple(nodes[rank]), width, np.array(node_of), np.array(local_of), *tables)


@dataclass(frozen=True)
class Copies:
    """The copies of a rank's tokens. [T, K] tables have a token's routes in an order of their own: by node, and in a
    node the pilot's rank first."""

    position: Tensor
    """[T, K] int64: the route in expert order, -1 for none."""

    counts: Tensor
    """[G, R] int64: in the column of the rank itself the rows to send to it, in others those that it shall forward."""

    target: Tensor
    """[T, K] int64: the rank to which the route's row is sent; G where the copy is for this rank itself; -1 where
    another route stands for it."""

    lists: Tensor
    """[T, K] int64: where a row is forwarded, rank that does it * R + place of who gets it; -1 where none is."""

    number: Tensor
    """[T, K] int64: the row's number among those for its target, or among those forwarded from the same rank to the
    same place; for this rank itself the token. Of any route that stands for a copy."""

    pilot_number: Tensor
    """[T, K] int64: the number of the token's pilot on that node among the rows for the same rank."""

    words: Tensor
    """[T * K] int32 in expert order: where the route finds its copy, see `find_copies`."""


def choose_copies(routes: Routes, experts_per_rank: int, places: Places, salt: int | None) -> Copies:
    """Choose pilots and number all copies.

    Args:
        routes: of this rank's tokens; dropped ones have no copy.
        experts_per_rank: L.
        places: of the group.
        salt: of the hash that chooses pilots, by layer and rank; None takes the first rank of the node.
    """
    inverse = routes.inverse.to(torch.int64)
    tokens, per_token = inverse.shape
    kept = inverse >= 0
    experts = routes.expert_ids.index_select(0, inverse.clamp_min(0).flatten()).view_as(inverse)
    ranks = torch.where(kept, experts, 0).to(torch.int64) // experts_per_rank
    key = (places.node_table[ranks] << _NODE) | ranks
    if salt is not None:
        key |= _hash(torch.where(kept, experts, -1), ranks, salt) << _RANK
    key, order = torch.sort(torch.where(kept, key, _NONE), dim=1, stable=True)
    kept, position = key != _NONE, inverse.gather(1, order)
    ranks = torch.where(kept, key & ((1 << _RANK) - 1), 0)

    column = torch.arange(per_token, device=key.device)
    starts_copy, starts_node = _starts_run(key), _starts_run(key >> _NODE)
    leader = torch.where(starts_copy, column, 0).cummax(1).values
    pilot = torch.where(starts_node, column, 0).cummax(1).values
    own = places.node_table[ranks] == int(places.node_of[places.rank])
    here = ranks == places.rank
    sends = kept & torch.where(own, starts_copy & ~here, starts_node)
    forwards = kept & starts_copy & ~starts_node & ~own

    locals_, via = places.local_table[ranks], ranks.gather(1, pilot)
    lists = torch.where(forwards, via * places.width + locals_, -1)
    bins = torch.where(sends, ranks * places.width + locals_, lists)
    number_of_bins = places.ranks * places.width
    any_weights = routes.combine_weights.detach().view_as(bins)
    placed = build_routes(bins, any_weights, number_of_bins)
    counts = placed.tokens_per_expert
    number = placed.inverse - (counts.cumsum(0) - counts)[bins.clamp_min(0)]
    token = torch.arange(tokens, device=key.device).unsqueeze(1)
    number = torch.where(here, token, number)
    via_local = torch.where(own, places.local, places.local_table[via])
    slots = min(experts_per_rank, per_token)
    words = (number.gather(1, leader) * places.width + via_local) * slots + column - leader
    return Copies(
        position=position,
        counts=counts.view(places.ranks, places.width),
        target=torch.where(sends, ranks, torch.where(kept & here & starts_copy, places.ranks, -1)),
        lists=lists,
        number=number,
        pilot_number=number.gather(1, pilot),
        words=_put(words.to(torch.int32), position),
    )


def find_copies(words: Tensor, width: int, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Take a route's word apart: the place of the rank that its copy comes from, the copy's number among those from
    there and from the token's rank, and the route's number among those of its copy.

    Args: words [M]; R; the most routes of a copy, min(K, L).
    """
    numbers = words // slots
    return numbers % width, numbers // width, words % slots


def salt_of(layer_number: int | None, rank: int) -> int:
    """What the hash of pilots depends on besides the token: the layer and the rank in the group.

    A hash, not a counter of steps: a second forward pass for recomputation must choose the same pilots, and so must a
    run that is resumed. Pilots change from step to step because the tokens' experts, which are hashed as well, do.
    """
    return (((layer_number or 0) << 24) + rank) * 0x9E3779B97F4A7C15 & (2**62 - 1)


def _hash(experts: Tensor, ranks: Tensor, salt: int) -> Tensor:
    """[T, K] 31-bit numbers, equal for equal token, its experts (-1 for none), rank and salt."""
    token = torch.arange(experts.shape[0], device=experts.device)
    token = _mix(token + salt) + _mix(experts.to(torch.int64) + 1).sum(dim=1)
    return _mix(token.unsqueeze(1) + (ranks + 1) * _MIX[1]) >> 33 & 0x7FFFFFFF


def _mix(x: Tensor) -> Tensor:
    """A number for each number, without any pattern (splitmix64's last steps); int64, which wraps around."""
    x = (x ^ (x >> 30)) * _MIX[0]
    x = (x ^ (x >> 27)) * _MIX[1]
    return x ^ (x >> 31)


def _starts_run(keys: Tensor) -> Tensor:
    """[T, K] bool: where a key differs from the one before it in its row."""
    starts = torch.ones_like(keys, dtype=torch.bool)
    starts[:, 1:] = keys[:, 1:] != keys[:, :-1]
    return starts


def _put(values: Tensor, position: Tensor) -> Tensor:
    """`values` [T, K] at `position` [T, K] of an array [T * K]; -1 goes nowhere, other places are 0."""
    end = position.numel()
    target = torch.where(position < 0, end, position).flatten()
    return values.new_zeros(end + 1).scatter_(0, target, values.flatten())[:-1]
