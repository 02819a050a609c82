"""Index arithmetic of redundancy bypassing (paper, section 4.2) in plain torch, and the oracle of the compiled kernels.

What it is for is in `dispatch.pilots` and `dispatch.bypass_plan`, which make the tables. Letters: T tokens, K routes
per token, E experts, G ranks, L = E / G experts of a rank, R ranks of the largest node, N routes sent, M routes
received, F rows to forward, S segments.

A *bin* is what copies are numbered by: rank * R + place of who gets it, where rank is that of the pilot; G * R for
copies that stay, -1 for none. A table by bin has G * R + 2 entries, so that -1 is its last one. Negative indices count
from the end, as torch has it. Metadata are 4-byte words: lists of rows to forward, and *records* of a word and a
weight.
"""

import torch
from torch import Tensor

NODE_BIT, RANK_BITS = 47, 16  # of a key: node above, rank below; the 31 bits between are a hash
FAR = 2**60  # in a table of positions: nowhere, also after a number was added
_RANK = (1 << RANK_BITS) - 1
_HASH = (1 << NODE_BIT) - 1 - _RANK
_WEYL = -0x61C8864680B583EB  # 2**64 over the golden ratio, as a signed number


def number_copies(
    inverse: Tensor, expert_ids: Tensor, experts: Tensor, bin_of: Tensor, place_of: Tensor, mirror: Tensor,
    tokens_per_expert: Tensor, width: int, slots: int, salt: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Give each token one copy on each rank that it needs, and on each node a pilot, and number them.

    Args:
        inverse, expert_ids, tokens_per_expert: of `Routes`.
        experts: [E + 1, 3] int64 of each expert and, at last, of none: key without hash, hash, multiplier of its rank.
        bin_of: [G + 1] int64 of each rank and of none, less the rank of its pilot times R: its copies' bin.
        place_of: [G + 1] int32 of each rank: the place that copies with this pilot come from.
        mirror: [G * R] int64, see `Places`.
        width: R.
        slots: most routes of a copy.
        salt: of the hash; None leaves it out, so that the first rank of a node is the pilot.

    Returns:
        `bins`, `number`, `pilot_number`, `words` and `told` of `ops.bypass.Numbered`.
    """
    tokens, ranks = torch.arange(inverse.shape[0], device=inverse.device), bin_of.shape[0] - 1
    position, staying = inverse.to(torch.int64), ranks * width
    # where a route is missing the arrays in expert order end with -1, and that is what a position of -1 means
    key, of_expert, of_rank = experts[expert_ids[position]].unbind(2)
    if salt is not None:
        mixed = torch.add(of_expert.sum(1), tokens + salt, alpha=_WEYL)
        key = key | ((mixed ^ (mixed >> 32)).unsqueeze(1) * of_rank).bitwise_and_(_HASH)
    key, order = torch.sort(key, dim=1, stable=True)
    position = position.gather(1, order)
    of_key = key & _RANK
    leader, pilot = torch.searchsorted(key, key), torch.searchsorted(key, key & -(1 << NODE_BIT))
    slot = torch.arange(key.shape[1], device=key.device) - leader
    via = of_key.gather(1, pilot)
    bins = torch.add(bin_of[of_key], via, alpha=width).masked_fill_(slot > 0, -1)

    number, counts = _numbers_in_bins(bins, staying)
    number = torch.where(bins == staying, tokens.to(torch.int32).unsqueeze(1), number)
    copy = torch.add(place_of[via], number.gather(1, leader), alpha=width)
    words = number.new_empty(position.numel() + 1)
    words[position] = torch.add(slot, copy, alpha=slots).to(torch.int32)
    table = counts[:staying]
    parts = [part.view(ranks, -1) for part in (table, table[mirror], tokens_per_expert)]
    told = table.new_empty(2, ranks, sum(part.shape[1] for part in parts))
    torch.cat(parts, dim=1, out=told[0])
    return bins, number, number.gather(1, pilot), words[:-1], told


def _numbers_in_bins(bins: Tensor, last: int) -> tuple[Tensor, Tensor]:
    """[T, K] int32: number of each entry among those of its bin, -1 in the bin -1; entries [last + 2] of each bin."""
    flat = bins.reshape(-1)
    counts = torch.zeros(last + 2, dtype=torch.int64, device=bins.device)
    counts.index_put_((flat,), torch.ones_like(flat), accumulate=True)
    flat, order = torch.sort(flat, stable=True)
    ends = counts.roll(1).cumsum(0).roll(-1)  # the bin -1, which is the last of the table, comes first
    numbers = torch.arange(flat.numel(), device=bins.device) - (ends - counts)[flat]
    numbers = torch.empty_like(numbers).scatter_(0, order, numbers).view_as(bins)
    return torch.where(bins < 0, -1, numbers).to(torch.int32), counts


def sources_of_rows(bins: Tensor, number: Tensor, table: Tensor, rows: int) -> Tensor:
    """[rows] int64: the token of each row of a buffer, -1 for rows that are no copy; anything in the last one.

    Args: of `Numbered`; table [G * R + 2] of the first row of a bin, at least `rows - 1` for none.
    """
    index = (table[bins] + number).clamp_(max=rows - 1)
    sources = table.new_full((rows,), -1)
    sources[index] = torch.arange(bins.shape[0], device=bins.device).unsqueeze(1)
    return sources


def write_meta(
    meta: Tensor, bins: Tensor, number: Tensor, pilot_number: Tensor, list_out: Tensor, words: Tensor,
    weights: Tensor, expert_ids: Tensor, routes_out: Tensor, local: int,
) -> None:  # fmt: skip
    """Write lists and records into words of metadata, before the last one.

    Args:
        meta: [words] int32.
        bins, number, pilot_number, words: of `Numbered`.
        list_out: [G * R + 2] where each bin's list begins, FAR for none.
        weights: [N] contiguous; expert_ids: [N].
        routes_out: [G] where the records of a rank begin, less the records before them.
        local: L.
    """
    meta[(list_out[bins] + number).clamp_(max=meta.shape[0] - 1)] = pilot_number
    records = torch.cat([words[: weights.shape[0], None], raw(weights, torch.int32)], dim=1)
    meta[_consecutive(routes_out[expert_ids // local], records.shape[1])] = records


def read_lists(
    meta: Tensor, ends: Tensor, list_in: Tensor, list_rows: Tensor, total: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Segments [F] int64 and numbers [F] int32 of rows to forward; the rows [F] int64 of their pilots.

    Args:
        meta: [words] int32 that arrived.
        ends: [S] rows of the segments up to each, the last one F.
        list_in: [S] where each segment's list begins, less the entries before it.
        list_rows: [S, 2] of `RowTables`.
        total: F.
    """
    segment = torch.searchsorted(ends, torch.arange(total, device=ends.device), right=True)
    number = meta[_consecutive(list_in[segment], 1)].squeeze(1)
    return segment, number, list_rows[:, 0][segment] + number


def read_routes(
    meta: Tensor, ends: Tensor, routes_in: Tensor, sources: Tensor, copies: Tensor, total: int, width: int, slots: int,
    weight_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Records [M]: `segment`, `copy`, `number` and `slotted` of `Found`; row of the copy int64; weight.

    Args: as for the lists; sources [S] of each segment; copies, of `RowTables`; M; R; most routes of a copy; 4 for
        weights in fp32, 8 in fp64.
    """
    segment = torch.searchsorted(ends, torch.arange(total, device=ends.device), right=True)
    at = _consecutive(routes_in[segment], 1 + weight_bytes // 4)
    place, number, slotted = read_words(meta[at[:, 0]], width, slots)
    copy = sources[segment] + place
    weights = numbers(meta[at[:, 1:]], _weight_dtype(weight_bytes))
    return segment, copy, number, slotted, copies[copy] + number, weights


def read_words(words: Tensor, width: int, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Take words [M] apart: the place that a route's copy comes from, its number among those of the same rank's tokens
    from there, and that number * slots + the route's number among those of its copy."""
    copy, slot = words // slots, words % slots
    number = copy // width
    return copy % width, number, torch.add(slot, number, alpha=slots)


def routes_of_rows(copy: Tensor, slotted: Tensor, copies: Tensor, rows: int, slots: int) -> Tensor:
    """[rows, slots] int64: routes of each row, -1 for none. Args: of routes [M], see above; the first row of each
    copy's source and place."""
    table = copies.new_full((rows * slots,), -1)
    table[torch.add(slotted, copies[copy], alpha=slots)] = torch.arange(copy.shape[0], device=copy.device)
    return table.view(rows, slots)


def parts_of_sums(
    segment: Tensor, number: Tensor, list_rows: Tensor, first: int, rows: int, members: int, local: int
) -> Tensor:
    """[rows, members] int64: parts of each of `rows` rows, -1 for none: at `local` itself, `first` rows on, and behind
    all of them what returns of the forwarded rows.

    Args: segment and number [F] of the rows that were forwarded; list_rows [S, 2] of `RowTables`.
    """
    table = list_rows.new_full((rows, members), -1)
    table[:, local] = torch.arange(first, first + rows, device=table.device)
    returned = torch.arange(segment.shape[0], device=table.device) + (first + rows)
    table.view(-1)[torch.add(list_rows[:, 1][segment], number, alpha=members)] = returned
    return table


def write_weights(rows: Tensor, segment: Tensor, weights: Tensor, begins: Tensor) -> None:
    """Write weights [M] of received routes into the bytes of rows, uint8.

    Args: segment [M] of each route; begins [S] where a segment's weights begin, less those before them.
    """
    rows[_consecutive(begins[segment], weights.itemsize)] = raw(weights, torch.uint8)


def read_weights(rows: Tensor, expert_ids: Tensor, begins: Tensor, local: int, weight_bytes: int) -> Tensor:
    """The weights [N] of sent routes out of the bytes of rows, uint8.

    Args: expert_ids [N]; begins [G] where a rank's weights begin, less those before them; L; 4 for fp32, 8 for fp64.
    """
    at = _consecutive(begins[expert_ids // local], weight_bytes)
    return numbers(rows[at], _weight_dtype(weight_bytes))


def raw(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The bits of numbers [N] as [N, n] of a smaller type."""
    return values.contiguous().unsqueeze(1).view(dtype)


def numbers(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers [N] of `dtype`, whose bits are [N, n]."""
    return bits.view(dtype).squeeze(1)


def _consecutive(first: Tensor, size: int) -> Tensor:
    """[N, size]: positions of N things of this size; `first` [N]: where each would be, less those before it."""
    at = torch.add(first, torch.arange(first.shape[0], device=first.device), alpha=size)
    return at.unsqueeze(-1) + torch.arange(size, device=at.device)


def _weight_dtype(weight_bytes: int) -> torch.dtype:
    return torch.float64 if weight_bytes == 8 else torch.float32
