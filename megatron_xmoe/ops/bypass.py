"""Index arithmetic of redundancy bypassing (paper, section 4.2): few operations, no waiting for the host.

What it is for is in `dispatch.pilots` and `dispatch.bypass_plan`, which make the tables. Letters: T tokens, K routes
per token, E experts, G ranks, R ranks of the largest node, N = T * K, M things that were read.

A *bin* is what copies are numbered by: rank * R + place of who gets it, where rank is that of the pilot; G * R for
copies that stay, -1 for none. A table by bin has G * R + 2 entries, so that -1 is its last one. Negative indices count
from the end, as torch has it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_xmoe.ops.routes import build_routes

NODE_BIT, RANK_BITS = 47, 16  # of a key: node above, rank below; the 31 bits between are a hash
NO_NODE = 2**16 - 1  # of a route that does not exist: sorts after every node
FAR = 2**60  # in a table of positions: nowhere, also after a number was added
_RANK = (1 << RANK_BITS) - 1
_HASH = (1 << NODE_BIT) - 1 - _RANK
_WEYL = -0x61C8864680B583EB  # 2**64 over the golden ratio, as a signed number


@dataclass(frozen=True)
class Numbered:
    """Copies of a rank's tokens; [T, K] tables have a token's routes in the order of their keys."""

    bins: Tensor
    """[T, K] int64: the bin of a copy; -1 where another route stands for it."""

    number: Tensor
    """[T, K] int32: the copy's number in its bin; of those that stay the token. Of a bin -1 it means nothing."""

    pilot_number: Tensor
    """[T, K] int32: the number of the first copy on the same node."""

    words: Tensor
    """[N] int32 in expert order: (number * R + place) * slots + slot of each route's copy, see `read_words`."""

    counts: Tensor
    """[G * R + 1] int64: copies in each bin."""


def number_copies(
    inverse: Tensor, expert_ids: Tensor, experts: Tensor, bin_of: Tensor, place_of: Tensor, width: int, slots: int,
    salt: int | None,
) -> Numbered:  # fmt: skip
    """Give each token one copy on each rank that it needs, and on each node a pilot, and number them.

    Args:
        inverse, expert_ids: of `Routes`.
        experts: [E + 1, 3] int64 of each expert and, at last, of none: key without hash, hash, multiplier of its rank.
        bin_of: [G + 1] int64 of each rank and of none, less the rank of its pilot times R: its copies' bin.
        place_of: [G + 1] int32 of each rank: the place that copies with this pilot come from.
        width: R.
        slots: most routes of a copy.
        salt: of the hash; None leaves it out, so that the first rank of a node is the pilot.
    """
    position = inverse.to(torch.int64)
    # where a route is missing the arrays in expert order end with -1, and that is what a position of -1 means
    key, of_expert, of_rank = experts[expert_ids[position]].unbind(2)
    if salt is not None:
        key = key | _hash(of_expert, of_rank, salt)
    key, order = torch.sort(key, dim=1, stable=True)
    position = position.gather(1, order)
    ranks = key & _RANK
    leader, pilot = torch.searchsorted(key, key), torch.searchsorted(key, key & -(1 << NODE_BIT))
    slot = torch.arange(key.shape[1], device=key.device) - leader
    via = ranks.gather(1, pilot)
    bins = torch.add(bin_of[ranks], via, alpha=width).masked_fill_(slot > 0, -1)

    staying = (bin_of.shape[0] - 1) * width
    no_weights = torch.empty(bins.shape, device=bins.device)
    placed = build_routes(bins, no_weights, staying + 1)
    counts = placed.tokens_per_expert
    number = placed.inverse - (counts.cumsum(0) - counts).to(torch.int32)[bins]
    tokens = torch.arange(bins.shape[0], dtype=torch.int32, device=bins.device).unsqueeze(1)
    number = torch.where(bins == staying, tokens, number)
    copy = torch.add(place_of[via], number.gather(1, leader), alpha=width)
    words = number.new_empty(position.numel() + 1)
    words[position] = torch.add(slot, copy, alpha=slots).to(torch.int32)
    return Numbered(bins, number, number.gather(1, pilot), words[:-1], counts)


def _hash(of_expert: Tensor, of_rank: Tensor, salt: int) -> Tensor:
    """[T, K] int64 with 31 bits at their place in a key: equal for equal token, its experts, rank and salt."""
    tokens = torch.arange(salt, salt + of_expert.shape[0], device=of_expert.device)
    mixed = torch.add(of_expert.sum(1), tokens, alpha=_WEYL)
    return ((mixed ^ (mixed >> 32)).unsqueeze(1) * of_rank).bitwise_and_(_HASH)


def rows_of_copies(bins: Tensor, number: Tensor, table: Tensor) -> Tensor:
    """[T, K] int64: where a table [G * R + 2] says that copies are; negative for none, or far behind."""
    return table[bins] + number


def sources_of_rows(bins: Tensor, number: Tensor, table: Tensor, rows: int, tokens: Tensor) -> Tensor:
    """[rows] int64: the token of each row of a buffer, -1 for rows that are no copy; anything in the last one.

    Args: table [G * R + 2] as above, at least `rows - 1` for none; tokens [T], 0, 1, 2 and so on.
    """
    index = rows_of_copies(bins, number, table).clamp_(max=rows - 1)
    sources = table.new_full((rows,), -1)
    sources[index] = tokens.unsqueeze(1)
    return sources


def read_words(words: Tensor, width: int, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Take words [M] apart: the place that a route's copy comes from, its number among those of the same rank's tokens
    from there, and that number * slots + the route's number among those of its copy."""
    copy, slot = words // slots, words % slots
    number = copy // width
    return copy % width, number, torch.add(slot, number, alpha=slots)


def owners(sizes: Tensor, total: int) -> Tensor:
    """[total] int64: number of the segment of each of `total` things; `sizes` of the segments add up to it."""
    return torch.repeat_interleave(sizes, output_size=total)
