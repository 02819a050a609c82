"""The compiled index arithmetic of redundancy bypassing against plain torch, bit for bit: on the CPU and on a GPU.

`call(name, *args)` runs a function of kernels.cpp_bypass and returns its result on the CPU; `write(name, *args)` one
that writes into its first argument, and returns that.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tolerances import assert_same
from torch import Tensor

from megatron_xmoe.dispatch.pilots import Places, most_routes, salt_of
from megatron_xmoe.kernels import reference_bypass as reference
from megatron_xmoe.kernels.reference_bypass import FAR
from megatron_xmoe.ops import Routes, build_routes
from megatron_xmoe.ops.bypass import Numbered

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
    Case(UNEVEN, 128, 512, 5),  # the most that a block of a GPU takes
]
LARGE = [
    Case(tuple(r // 8 for r in range(64)), 4, 8, 4096, missing=0.0),
    Case(tuple(r // 8 for r in range(256)), 1, 8, 8191),
    Case(TWO, 64, 8, 16384, missing=0.0),
    Case(TWO, 32, 64, 2000),
]


def arguments(case: Case) -> tuple[Routes, Places, tuple]:
    """Random routes, places, and what number_copies gets."""
    generator = torch.Generator().manual_seed(case.tokens + case.topk)
    experts = len(case.node_of) * case.local
    ids = torch.rand(case.tokens, experts, generator=generator).topk(case.topk).indices
    ids[torch.rand(ids.shape, generator=generator) < case.missing] = -1
    routes = build_routes(ids, torch.rand(ids.shape, generator=generator), experts)
    places = Places.of(case.node_of, 1, case.local, "cpu")
    salt = salt_of(3, 1) if case.balanced else None
    tables = places.experts, places.bin_of, places.place_of, places.mirror
    sizes = places.width, most_routes(places, case.topk), salt
    return routes, places, (routes.inverse, routes.expert_ids, *tables, routes.tokens_per_expert, *sizes)


def check_copies(call: Call, case: Case) -> None:
    """Bins, numbers, words and counts, of any implementation."""
    routes, _, given = arguments(case)
    expected, found = Numbered(*reference.number_copies(*given)), Numbered(*call("number_copies", *given))
    for name in ("bins", "number", "pilot_number"):
        assert_same(getattr(found, name), getattr(expected, name))
    kept = int(routes.tokens_per_expert.sum())
    assert_same(found.words[:kept], expected.words[:kept])
    assert found.told.shape == expected.told.shape
    assert_same(found.told[0], expected.told[0])


def starts_of_bins(counts: Tensor, every: int, gap: int) -> tuple[Tensor, int]:
    """[G * R + 2]: begins of every so-many-th bin, with a gap before each, FAR for others; and the end of all."""
    counts = counts.flatten() * (torch.arange(counts.numel()) % every == 0)
    table = (counts + gap).cumsum(0) - counts
    table[counts == 0] = FAR
    return torch.cat([table, torch.tensor([FAR, FAR])]), int(counts.sum()) + gap * counts.shape[0] + gap


def check_writing(call: Call, write: Call, case: Case) -> None:
    """Tokens of the rows to send; lists and records."""
    routes, places, given = arguments(case)
    copies = Numbered(*reference.number_copies(*given))
    table, end = starts_of_bins(copies.told[0, :, : places.width], 2, 3)
    found, sources = (run(copies.bins, copies.number, table, end + 1)
                      for run in (lambda *args: call("sources_of_rows", *args), reference.sources_of_rows))  # fmt: skip
    assert_same(found[:-1], sources[:-1])
    kept = int(routes.tokens_per_expert.sum())
    experts = routes.expert_ids[:kept]
    for dtype in (torch.float32, torch.float64):
        routes_out = end + 5 * torch.arange(places.ranks)
        size = int(routes_out.max()) + (kept + 1) * (1 + dtype.itemsize // 4) + 4
        meta = torch.randint(-9, 0, (size,), dtype=torch.int32)
        weights = routes.combine_weights[:kept].to(dtype)
        rest = (copies.bins, copies.number, copies.pilot_number, table, copies.words, weights, experts, routes_out,
                case.local)  # fmt: skip
        written = meta.clone()
        reference.write_meta(written, *rest)
        found = write("write_meta", meta, *rest)
        assert_same(found[:-1], written[:-1])


def random_segments(sizes: list[int], length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, int]:
    """Segments of so many things of this length, one behind the other in disorder: numbers that are not negative, ends,
    begins and the sum of sizes."""
    generator = torch.Generator().manual_seed(sum(sizes) + length)
    order, begins, at = torch.randperm(len(sizes), generator=generator), torch.empty(len(sizes), dtype=torch.int64), 3
    for segment in order.tolist():
        begins[segment], at = at, at + sizes[segment] * length + 1
    numbers = torch.randint(0, torch.iinfo(dtype).max, (at + 9,), generator=generator, dtype=dtype)
    ends = torch.tensor(sizes).cumsum(0)
    return numbers, ends, begins - (ends - torch.tensor(sizes)) * length, int(ends[-1])


MANY = [[37 * i % 211 for i in range(256)], [5000, 0, 70_000]]
SEGMENTS = [[5], [0, 3, 0, 0, 7, 1, 0], [0, 0], [300, 0, 2, 290], list(range(40))]


def check_reading(call: Call, write: Call, sizes: list[int]) -> None:
    """Lists and routes as they arrive, and weights as they return."""
    meta, ends, begins, total = random_segments(sizes, 1, torch.int32)
    given = meta, ends, begins, torch.arange(len(sizes) * 2).view(-1, 2) ** 2, total
    for one, other in zip(call("read_lists", *given), reference.read_lists(*given), strict=True):
        assert_same(one, other)

    for dtype in (torch.float32, torch.float64):
        meta, ends, begins, total = random_segments(sizes, 1 + dtype.itemsize // 4, torch.int32)
        sources, copies = torch.arange(len(sizes)) * 7, torch.arange(len(sizes) * 7 + 3) ** 2
        given = meta, ends, begins, sources, copies, total, 3, 5, dtype.itemsize
        expected, found = reference.read_routes(*given), call("read_routes", *given)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)  # weights of any bits, NaNs among them
        assert found[5].dtype == dtype

        rows, _, begins, _ = random_segments(sizes, dtype.itemsize, torch.uint8)
        segment, weights, written = expected[0], found[5], rows.clone()
        reference.write_weights(written, segment, weights, begins)
        assert_same(write("write_weights", rows, segment, weights, begins), written)
        experts = (segment * 3 + 2).to(torch.int32)  # 3 of a rank
        for read in (reference.read_weights, lambda *args: call("read_weights", *args)):
            assert_same(read(written, experts, begins, 3, dtype.itemsize), weights)


def check_tables(call: Call, sizes: list[int]) -> None:
    """Routes of each row, and parts of sums."""
    generator = torch.Generator().manual_seed(len(sizes))
    slots, total = 3, sum(sizes)
    lengths, numbers = torch.tensor(sizes), torch.arange(total)
    segment = torch.arange(len(sizes)).repeat_interleave(lengths)
    copies = (lengths + 2).cumsum(0) - lengths
    slotted = torch.cat([torch.randperm(size * slots, generator=generator)[:size] for size in sizes]).to(torch.int32)
    given = segment, slotted, copies, int(copies[-1]) + sizes[-1] + 1, slots
    assert_same(call("routes_of_rows", *given), reference.routes_of_rows(*given))

    members, first = 4, 11
    within = (numbers - (lengths.cumsum(0) - lengths)[segment]).to(torch.int32)
    list_rows = torch.stack([first + copies, copies * members + 3], dim=1)
    given = segment, within, list_rows, first, int(copies[-1]) + sizes[-1] + 1, members, 2
    assert_same(call("parts_of_sums", *given), reference.parts_of_sums(*given))
