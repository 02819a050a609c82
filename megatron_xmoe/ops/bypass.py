"""Index arithmetic of redundancy bypassing (paper, section 4.2): few operations, no waiting for the host.

What it is for is in `dispatch.pilots` and `dispatch.bypass_plan`, which make the tables. Letters: T tokens, K routes
per token, E experts, G ranks, R ranks of the largest node, N = T * K, M things that were read.

A *bin* is what copies are numbered by: rank * R + place of who gets it, where rank is that of the pilot; G * R for
copies that stay, -1 for none. A table by bin has G * R + 2 entries, so that -1 is its last one. Negative indices count
from the end, as torch has it.
"""

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from megatron_xmoe.kernels.registry import triton_is_usable
from megatron_xmoe.ops.raw_bits import as_units, read_units
from megatron_xmoe.ops.routes import Routes, build_routes

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
    """[N] int32 in expert order: (number * R + place) * slots + slot of each route's copy, see `read_words`; anything
    after the last kept route."""

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
    staying = (bin_of.shape[0] - 1) * width
    if (fused := _kernels(inverse)) and inverse.shape[1] <= fused.MAX_PER_TOKEN:
        bins, *ordered = fused.order_copies(inverse, expert_ids, experts, bin_of, place_of, width, salt)
        placed = _by_bin(bins, staying)
        counts = placed.tokens_per_expert
        return Numbered(bins, *fused.number_copies(bins, *ordered, placed.inverse, counts, width, slots), counts)
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

    placed = _by_bin(bins, staying)
    counts = placed.tokens_per_expert
    number = placed.inverse - (counts.cumsum(0) - counts).to(torch.int32)[bins]
    tokens = torch.arange(bins.shape[0], dtype=torch.int32, device=bins.device).unsqueeze(1)
    number = torch.where(bins == staying, tokens, number)
    copy = torch.add(place_of[via], number.gather(1, leader), alpha=width)
    words = number.new_empty(position.numel() + 1)
    words[position] = torch.add(slot, copy, alpha=slots).to(torch.int32)
    return Numbered(bins, number, number.gather(1, pilot), words[:-1], counts)


def _by_bin(bins: Tensor, last: int) -> Routes:
    """Copies in the order of their bins, with weights that mean nothing."""
    return build_routes(bins, torch.empty(bins.shape, device=bins.device), last + 1)


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
    if fused := _kernels(bins):
        return fused.sources_of_rows(bins, number, table, rows)
    index = rows_of_copies(bins, number, table).clamp_(max=rows - 1)
    sources = table.new_full((rows,), -1)
    sources[index] = tokens.unsqueeze(1)
    return sources


def write_meta(
    units: Tensor, copies: Numbered, list_out: Tensor, weights: Tensor, expert_ids: Tensor, routes_out: Tensor,
    nowhere: int, numbers: Tensor,
) -> None:  # fmt: skip
    """Write lists and records into a buffer of units.

    Args:
        units: as many as needed behind the unit `nowhere`, to which entries of no list go.
        list_out: [G * R + 2, units of an index] where each bin's list begins, FAR for none.
        weights: [N]; expert_ids: [N].
        routes_out: [E, units of a record] where the records of an expert's rank begin, less the records before them.
        numbers: [N] at least, 0, 1, 2 and so on.
    """
    total, word, record = weights.shape[0], list_out.shape[1], routes_out.shape[1]
    words, weights = copies.words[:total], weights.contiguous()
    if fused := _kernels(units):
        fused.write_meta(
            units, copies.bins, copies.number, copies.pilot_number, list_out, words, weights, expert_ids, routes_out
        )
        return
    at = torch.add(list_out[copies.bins], copies.number.unsqueeze(2), alpha=word).clamp_(max=nowhere)
    units[at] = as_units(copies.pilot_number, units.dtype)
    at = torch.add(routes_out[expert_ids], numbers[:total].unsqueeze(1), alpha=record)
    units[at] = torch.cat([as_units(words, units.dtype), as_units(weights, units.dtype)], dim=1)


def read_lists(units: Tensor, ends: Tensor, list_in: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Segments [F] int64 and numbers [F] int32 of rows to forward.

    Args:
        ends: [S] rows of the segments up to each, the last one F.
        list_in: [S, units of an index] where each segment's list begins, less the entries before it.
        numbers: [F], 0, 1, 2 and so on.
    """
    if fused := _kernels(units):
        return fused.read_lists(units, ends, list_in, numbers.shape[0])
    segment = torch.searchsorted(ends, numbers, right=True)
    at = torch.add(list_in[segment], numbers.unsqueeze(1), alpha=list_in.shape[1])
    return segment, read_units(units, at, torch.int32)


def read_routes(
    units: Tensor, ends: Tensor, routes_in: Tensor, sources: Tensor, width: int, slots: int, dtype: torch.dtype,
    numbers: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Records [M]: segment int64; copy int64, its source's entry of `sources` + the place in its word; number and
    slotted int32, see `read_words`; weight of `dtype`.

    Args: as for the lists; sources [S] of each segment.
    """
    if fused := _kernels(units):
        return fused.read_routes(units, ends, routes_in, sources, numbers.shape[0], width, slots, dtype)
    record, weight = routes_in.shape[1], dtype.itemsize // units.element_size()
    segment = torch.searchsorted(ends, numbers, right=True)
    at = torch.add(routes_in[segment], numbers.unsqueeze(1), alpha=record)
    words = read_units(units, at[:, : record - weight], torch.int32)
    place, number, slotted = read_words(words, width, slots)
    return segment, sources[segment] + place, number, slotted, read_units(units, at[:, record - weight :], dtype)


def read_words(words: Tensor, width: int, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Take words [M] apart: the place that a route's copy comes from, its number among those of the same rank's tokens
    from there, and that number * slots + the route's number among those of its copy."""
    copy, slot = words // slots, words % slots
    number = copy // width
    return copy % width, number, torch.add(slot, number, alpha=slots)


def routes_of_rows(
    copy: Tensor, slotted: Tensor, copies: Tensor, rows: int, slots: int, numbers: Tensor
) -> Tensor:
    """[rows, slots] int64: routes of each row, -1 for none. Args: of routes, see above; the first row of each copy's
    source and place; numbers [M]."""
    if fused := _kernels(copy):
        return fused.routes_of_rows(copy, slotted, copies, rows, slots)
    table = copies.new_full((rows * slots,), -1)
    table[torch.add(slotted, copies[copy], alpha=slots)] = numbers
    return table.view(rows, slots)


def parts_of_pilots(
    segment: Tensor, number: Tensor, list_rows: Tensor, first: int, rows: int, spare: int, members: int, local: int,
    numbers: Tensor,
) -> Tensor:  # fmt: skip
    """[rows + spare, members] int64: parts of each of `rows` rows, -1 for none: at `local` itself, from `first` on.

    Args: segment and number [F] of the rows that were forwarded; list_rows [S, 3] of Tables; numbers [F].
    """
    if fused := _kernels(segment):
        return fused.parts_of_pilots(segment, number, list_rows, first, rows, spare, members, local)
    table = list_rows.new_full((rows + spare, members), -1)
    table[:rows, local] = torch.arange(first, first + rows, device=table.device)
    forwards, _, parts = list_rows[segment].unbind(1)
    table.view(-1)[torch.add(parts, number, alpha=members)] = forwards + numbers
    return table


def add_forwarded(index: Tensor, segment: Tensor, number: Tensor, list_rows: Tensor, numbers: Tensor) -> None:
    """Put into `index`, where rows are forwarded, the rows of their pilots. Args: see above."""
    if fused := _kernels(index):
        return fused.add_forwarded(index, segment, number, list_rows)
    forwards, pilots, _ = list_rows[segment].unbind(1)
    index[forwards + numbers] = pilots + number
    return None


def write_weights(
    units: Tensor, segment: Tensor, weights: Tensor, begins: Tensor, record: int, nowhere: int, numbers: Tensor
) -> None:
    """Write weights [M] where the records of their segments are. Args: begins [S, units of a weight] as in read_routes,
    FAR for those that go to the unit `nowhere`; units of a record; numbers [M]."""
    weights = weights.contiguous()
    if fused := _kernels(units):
        return fused.write_weights(units, segment, weights, begins, record)
    at = torch.add(begins[segment], numbers.unsqueeze(1), alpha=record).clamp_(max=nowhere)
    units[at] = as_units(weights, units.dtype)
    return None


def _kernels(x: Tensor) -> ModuleType | None:
    """The Triton kernels, where they may be used."""
    if not triton_is_usable(x.device.type, "bypass"):
        return None
    from megatron_xmoe.kernels import triton_bypass

    return triton_bypass
