"""Index arithmetic of redundancy bypassing (paper, section 4.2) in plain torch, and the oracle of the compiled kernels.

What it is for is in `dispatch.pilots` and `dispatch.bypass_plan`, which make the tables. Letters: T tokens, K routes
per token, E experts, G ranks, L = E / G experts of a rank, R ranks of the largest node, N routes sent, M routes
received, F rows to forward, S segments.

A *bin* is what copies are numbered by: rank * R + place of who gets it, where rank is that of the pilot; G * R for
copies that stay, -1 for none. A table by bin has G * R + 2 entries, so that -1 is its last one. Negative indices count
from the end, as torch has it. Buffers are seen as flat arrays of *units*, of 4 or 2 bytes, see `ops.raw_bits`; a
*record* is a word of 4 bytes and a weight.
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
    units: Tensor, bins: Tensor, number: Tensor, pilot_number: Tensor, list_out: Tensor, words: Tensor,
    weights: Tensor, expert_ids: Tensor, routes_out: Tensor, local: int,
) -> None:  # fmt: skip
    """Write lists and records into a buffer of units, which lie before the last one.

    Args:
        bins, number, pilot_number, words: of `Numbered`.
        list_out: [G * R + 2] where each bin's list begins, FAR for none.
        weights: [N] contiguous; expert_ids: [N].
        routes_out: [G] where the records of a rank begin, less the records before them.
        local: L.
    """
    total, word, nowhere = weights.shape[0], 4 // units.itemsize, units.shape[0] - 1
    at = torch.add(list_out[bins], number, alpha=word)
    units[_following(at, word).clamp_(max=nowhere)] = as_units(pilot_number, units.dtype)
    values = torch.cat([as_units(words[:total], units.dtype), as_units(weights, units.dtype)], dim=1)
    units[_records(routes_out[expert_ids // local], values.shape[1])] = values


def read_lists(
    units: Tensor, ends: Tensor, list_in: Tensor, list_rows: Tensor, total: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Segments [F] int64 and numbers [F] int32 of rows to forward; the rows [F] int64 of their pilots.

    Args:
        ends: [S] rows of the segments up to each, the last one F.
        list_in: [S] where each segment's list begins, less the entries before it.
        list_rows: [S, 2] of `RowTables`.
        total: F.
    """
    segment = torch.searchsorted(ends, torch.arange(total, device=ends.device), right=True)
    number = read_units(units, _records(list_in[segment], 4 // units.itemsize), torch.int32)
    return segment, number, list_rows[:, 0][segment] + number


def read_routes(
    units: Tensor, ends: Tensor, routes_in: Tensor, sources: Tensor, copies: Tensor, total: int, width: int, slots: int,
    weight_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Records [M]: `segment`, `copy`, `number` and `slotted` of `Found`; row of the copy int64; weight.

    Args: as for the lists; sources [S] of each segment; copies, of `RowTables`; M; R; most routes of a copy; 4 for
        weights in fp32, 8 in fp64.
    """
    word, weight = 4 // units.itemsize, weight_bytes // units.itemsize
    segment = torch.searchsorted(ends, torch.arange(total, device=ends.device), right=True)
    at = _records(routes_in[segment], word + weight)
    place, number, slotted = read_words(read_units(units, at[:, :word], torch.int32), width, slots)
    copy = sources[segment] + place
    weights = read_units(units, at[:, word:], _weight_dtype(weight_bytes))
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


def write_weights(units: Tensor, segment: Tensor, weights: Tensor, begins: Tensor) -> None:
    """Write weights [M] into the records of their segments. Args: begins [S] as in read_routes."""
    word, weight = 4 // units.itemsize, weights.itemsize // units.itemsize
    units[_records(begins[segment], word + weight)[:, word:]] = as_units(weights, units.dtype)


def read_weights(units: Tensor, expert_ids: Tensor, routes_out: Tensor, local: int, weight_bytes: int) -> Tensor:
    """The weights [N] that `write_meta` put into records. Args: as there, and for read_routes."""
    word, weight = 4 // units.itemsize, weight_bytes // units.itemsize
    at = _records(routes_out[expert_ids // local], word + weight)[:, word:]
    return read_units(units, at, _weight_dtype(weight_bytes))


def as_units(values: Tensor, unit: torch.dtype) -> Tensor:
    """Numbers [...] as units [..., n]."""
    return values.contiguous().unsqueeze(-1).view(unit)


def read_units(units: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers [N] of `dtype`, whose units are at `index` [N, n]."""
    return units[index].view(dtype).squeeze(1)


def _records(first: Tensor, size: int) -> Tensor:
    """[N, size]: units of each of N records of this size; `first` [N] of the first one, less those before."""
    return _following(torch.add(first, torch.arange(first.shape[0], device=first.device), alpha=size), size)


def _following(at: Tensor, count: int) -> Tensor:
    """[..., count]: the units from each position [...] on."""
    return at.unsqueeze(-1) + torch.arange(count, device=at.device)


def _weight_dtype(weight_bytes: int) -> torch.dtype:
    return torch.float64 if weight_bytes == 8 else torch.float32
