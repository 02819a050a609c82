"""The Triton kernels of redundancy bypassing against plain torch, bit for bit: in the interpreter and on a GPU.

`call(name, *args)` runs a function of kernels.triton_bypass and returns its result on the CPU; `write(name, *args)`
one that writes into its first argument, and returns that.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tolerances import assert_same
from torch import Tensor

from megatron_xmoe.dispatch.pilots import Places, choose_copies, most_routes, salt_of
from megatron_xmoe.ops import Routes, build_routes, bypass
from megatron_xmoe.ops.bypass import FAR, Numbered
from megatron_xmoe.ops.raw_bits import as_units

Call = Callable[..., object]


@dataclass(frozen=True)
class Case:
    """Tokens of a rank, and where the ranks of its group are."""

    node_of: tuple[int, ...]
    local: int
    topk: int
    tokens: int
    missing: float = 0.2
    balanced: bool = True

    def __str__(self) -> str:
        nodes = f"{len(self.node_of)}r{len(set(self.node_of))}n"
        rule = "" if self.balanced else "-first"
        return f"{nodes}-l{self.local}-k{self.topk}-t{self.tokens}-m{self.missing}{rule}"


TWO, UNEVEN, MIXED = (0, 0, 1, 1), (0, 0, 0, 1), (2, 0, 1, 0, 1, 1, 2)
CASES = [
    *(Case(TWO, 3, topk, 37) for topk in (1, 2, 3, 8, 12)),
    *(Case(node_of, 4, 6, 300) for node_of in (UNEVEN, MIXED)),
    Case(MIXED, 4, 6, 61, balanced=False),
    Case(TWO, 4, 5, 33, missing=0.0),
    Case(TWO, 4, 5, 33, missing=1.0),
    Case(TWO, 4, 5, 0),
    Case(UNEVEN, 25, 64, 9),
    Case(UNEVEN, 33, 128, 3),
]
LARGE = [
    Case(tuple(r // 8 for r in range(64)), 4, 8, 4096, missing=0.0),
    Case(tuple(r // 8 for r in range(256)), 1, 8, 8191),
    Case(TWO, 64, 8, 16384, missing=0.0),
    Case(TWO, 32, 64, 2000),
]


def chosen(case: Case) -> tuple[Routes, Places, Numbered]:
    """Random routes, and what plain torch makes of them."""
    generator = torch.Generator().manual_seed(case.tokens + case.topk)
    experts = len(case.node_of) * case.local
    ids = torch.rand(case.tokens, experts, generator=generator).topk(case.topk).indices
    ids[torch.rand(ids.shape, generator=generator) < case.missing] = -1
    routes = build_routes(ids, torch.rand(ids.shape, generator=generator), experts)
    places = Places.of(case.node_of, 1, case.local, "cpu")
    return routes, places, choose_copies(routes, places, salt_of(3, 1) if case.balanced else None)


def check_copies(call: Call, case: Case) -> None:
    """Bins, numbers and words."""
    routes, places, expected = chosen(case)
    tables = places.experts, places.bin_of, places.place_of
    salt = salt_of(3, 1) if case.balanced else None
    bins, positions, links = call("order_copies", routes.inverse, routes.expert_ids, *tables, places.width, salt)
    assert_same(bins, expected.bins)
    placed = build_routes(bins, torch.ones(bins.shape), places.ranks * places.width + 1)
    slots = most_routes(places, case.topk)
    counts = placed.tokens_per_expert
    found = call("number_copies", bins, positions, links, placed.inverse, counts, places.width, slots)
    kept = int(routes.tokens_per_expert.sum())
    assert_same(found[0], expected.number)
    assert_same(found[1], expected.pilot_number)
    assert_same(found[2][:kept], expected.words[:kept])


def starts_of_bins(expected: Numbered, every: int, gap: int) -> tuple[Tensor, int]:
    """[G * R + 2]: begins of every so-many-th bin, with a gap before each, FAR for others; and the end of all."""
    counts = expected.counts * (torch.arange(expected.counts.shape[0]) % every == 0)
    counts[-1] = 0
    table = (counts + gap).cumsum(0) - counts
    table[counts == 0] = FAR
    return torch.cat([table, torch.tensor([FAR])]), int(counts.sum()) + gap * counts.shape[0] + gap


def check_writing(call: Call, write: Call, case: Case) -> None:
    """Tokens of the rows to send, and lists and records in units of either size."""
    routes, places, expected = chosen(case)
    table, end = starts_of_bins(expected, 2, 3)
    tokens = torch.arange(case.tokens)
    sources = bypass.sources_of_rows(expected.bins, expected.number, table, end + 1, tokens)
    found = call("sources_of_rows", expected.bins, expected.number, table, end + 1)
    assert_same(found[:-1], sources[:-1])
    kept = int(routes.tokens_per_expert.sum())
    for unit, dtype in ((torch.int32, torch.float32), (torch.int32, torch.float64), (torch.int16, torch.float32)):
        word = 4 // unit.itemsize
        record = word + dtype.itemsize // unit.itemsize
        list_out = torch.where(table == FAR, FAR, table * word).unsqueeze(1) + torch.arange(word)
        ranks = torch.arange(len(places.experts) - 1) // case.local
        routes_out = (end * word + 5 * ranks).unsqueeze(1) + torch.arange(record)
        nowhere = int(routes_out.max()) + (kept + 1) * record
        units = torch.randint(-9, 0, (nowhere + 4,), dtype=unit)
        experts, words = routes.expert_ids[:kept], expected.words[:kept]
        weights = routes.combine_weights[:kept].to(dtype)
        written = units.clone()
        bypass.write_meta(written, expected, list_out, weights, experts, routes_out, nowhere, torch.arange(kept))
        found = write("write_meta", units, expected.bins, expected.number, expected.pilot_number, list_out, words,
                      weights, experts, routes_out)  # fmt: skip
        assert_same(found[:nowhere], written[:nowhere])


def random_segments(sizes: list[int], record: int, unit: torch.dtype) -> tuple[Tensor, Tensor, Tensor, int]:
    """Segments of these sizes that lie one behind the other in disorder: units, ends, begins and the sum of sizes."""
    generator = torch.Generator().manual_seed(sum(sizes) + record)
    order, begins, at = torch.randperm(len(sizes), generator=generator), torch.empty(len(sizes), dtype=torch.int64), 3
    for segment in order.tolist():
        begins[segment], at = at, at + sizes[segment] * record + 1
    limits = torch.iinfo(unit)
    units = torch.randint(limits.min, limits.max, (at + 9,), generator=generator, dtype=unit)
    if unit == torch.int32:
        units &= 2**31 - 1  # words are not negative
    else:
        units[:] = units & 2**15 - 1
    ends = torch.tensor(sizes).cumsum(0)
    begins -= (ends - torch.tensor(sizes)) * record
    return units, ends, begins.unsqueeze(1) + torch.arange(record), int(ends[-1])


MANY = [[37 * i % 211 for i in range(256)], [5000, 0, 70_000]]
SEGMENTS = [[5], [0, 3, 0, 0, 7, 1, 0], [0, 0], [300, 0, 2, 290], list(range(40))]


def check_reading(call: Call, write: Call, sizes: list[int]) -> None:
    """Lists and routes as they arrive, and weights as they return."""
    for unit, dtype in ((torch.int32, torch.float32), (torch.int32, torch.float64), (torch.int16, torch.float32)):
        word, weight = 4 // unit.itemsize, dtype.itemsize // unit.itemsize
        units, ends, begins, total = random_segments(sizes, word, unit)
        numbers = torch.arange(total)
        expected = bypass.read_lists(units, ends, begins, numbers)
        for one, other in zip(call("read_lists", units, ends, begins, total), expected, strict=True):
            assert_same(one, other)

        units, ends, begins, total = random_segments(sizes, word + weight, unit)
        sources = torch.arange(len(sizes)) * 7
        expected = bypass.read_routes(units, ends, begins, sources, 3, 5, dtype, numbers)
        found = call("read_routes", units, ends, begins, sources, total, 3, 5, dtype)
        for one, other in zip(found[:4], expected[:4], strict=True):
            assert_same(one, other)
        assert_same(as_units(found[4], unit), as_units(expected[4], unit))  # any bits, NaNs among them

        begins = begins[:, word:].clone()
        begins[1::3] = FAR
        nowhere, weights = units.shape[0] - 4, torch.rand(total, dtype=dtype)
        written = units.clone()
        bypass.write_weights(written, expected[0], weights, begins, word + weight, nowhere, numbers)
        found = write("write_weights", units, expected[0], weights, begins, word + weight)
        assert_same(found[:nowhere], written[:nowhere])


def check_tables(call: Call, write: Call, sizes: list[int]) -> None:
    """Routes of each row, parts of pilots, and rows to forward."""
    generator = torch.Generator().manual_seed(len(sizes))
    slots, total = 3, sum(sizes)
    lengths, numbers = torch.tensor(sizes), torch.arange(total)
    segment = torch.arange(len(sizes)).repeat_interleave(lengths)
    copies = (lengths + 2).cumsum(0) - lengths
    slotted = torch.cat([torch.randperm(size * slots, generator=generator)[:size] for size in sizes]).to(torch.int32)
    rows = int(copies[-1]) + sizes[-1] + 1
    expected = bypass.routes_of_rows(segment, slotted, copies, rows, slots, numbers)
    assert_same(call("routes_of_rows", segment, slotted, copies, rows, slots), expected)

    members, first, spare = 4, 11, 2
    within = (numbers - (lengths.cumsum(0) - lengths)[segment]).to(torch.int32)
    pilots = first + copies
    list_rows = torch.stack([100 + 5 * torch.arange(len(sizes)), pilots, (pilots - first) * members + 3], dim=1)
    expected = bypass.parts_of_pilots(segment, within, list_rows, first, rows, spare, members, 2, numbers)
    found = call("parts_of_pilots", segment, within, list_rows, first, rows, spare, members, 2)
    assert_same(found, expected)
    index = torch.full((100 + 5 * len(sizes) + total,), -1)
    written = index.clone()
    bypass.add_forwarded(written, segment, within, list_rows, numbers)
    assert_same(write("add_forwarded", index, segment, within, list_rows), written)
