"""Pilots and copies against loops over tokens; layouts of buffers of all ranks against each other; raw bits in rows."""

from collections import Counter, defaultdict

import pytest
import torch
from tolerances import assert_same

from megatron_xmoe.dispatch.layout import Counts, Layout
from megatron_xmoe.dispatch.pilots import Places, choose_copies, salt_of
from megatron_xmoe.kernels.reference_bypass import read_weights, read_words, write_weights
from megatron_xmoe.ops import build_routes
from megatron_xmoe.ops.raw_bits import bytes_of

PLACEMENTS = [(0, 0, 1, 1), (0, 1, 0, 1), (0, 0, 0, 1), (0, 0, 0, 1, 1, 1, 1, 1), (0, 1, 2, 0, 1, 2), (0, 0, 1)]
SIZES = [(1, 1), (1, 3), (3, 2), (2, 6), (4, 8)]  # experts of a rank, experts of a token


def chosen(node_of: tuple[int, ...], local: int, topk: int, tokens: int, rank: int, missing: float = 0.2):
    """Routes of a rank's tokens, as build_routes gives them, and the experts of each token."""
    generator = torch.Generator().manual_seed(rank)
    experts = len(node_of) * local
    ids = torch.rand(tokens, experts, generator=generator).topk(min(topk, experts)).indices
    ids[torch.rand(ids.shape, generator=generator) < missing] = -1
    routes = build_routes(ids, torch.rand(ids.shape, generator=generator), experts)
    return routes, [[e for e in row if e >= 0] for row in ids.tolist()]


def copies_of(node_of, local, topk, tokens=9, rank=1, salt: int | None = 5):
    """What is chosen on the CPU, with what it was chosen for."""
    routes, experts = chosen(node_of, local, topk, tokens, rank)
    places = Places.of(node_of, rank, local, "cpu")
    return choose_copies(routes, places, salt), routes, experts, places


def targets(bins: torch.Tensor, places: Places) -> torch.Tensor:
    """[T, K]: the rank to which a route's row is sent; G where the copy stays; -1 where no row is sent."""
    rank = bins.clamp_min(0) // places.width
    ranks = torch.arange(places.ranks + 1)
    sent = torch.tensor([*places.local_of, 0])[rank] == bins % places.width
    return torch.where((bins >= 0) & sent, ranks[rank], -1)


@pytest.mark.parametrize("salt", [None, 5])
@pytest.mark.parametrize(("local", "topk"), SIZES)
@pytest.mark.parametrize("node_of", PLACEMENTS, ids=str)
def test_every_route_finds_its_copy(node_of, local, topk, salt):
    """One row for each (token, other node) and (token, rank of the own node); the rest is forwarded, all is found."""
    copies, routes, experts, places = copies_of(node_of, local, topk, salt=salt)
    me = places.rank
    sent, forwarded = {}, {}  # (target, number) -> token; (pilot's rank, who gets it, number) -> token
    for token, row in enumerate(targets(copies.bins, places).tolist()):
        for k, target in enumerate(row):
            number = int(copies.number[token, k])
            if 0 <= target < len(node_of):
                assert sent.setdefault((target, number), token) == token
            elif target == len(node_of):
                assert number == token
            elif (place := int(copies.bins[token, k])) >= 0:
                pilot, there = divmod(place, places.width)
                members = [r for r, node in enumerate(node_of) if node == node_of[pilot]]
                key = (pilot, members[there], number)
                assert key not in forwarded
                assert sent_token(copies, places, pilot, copies.pilot_number[token, k]) == token
                forwarded[key] = token
    expected_sent, expected_forwarded = Counter(), 0
    for chosen_experts in experts:
        ranks = {e // local for e in chosen_experts}
        expected_sent.update(node_of[r] for r in ranks if node_of[r] == node_of[me] and r != me)
        nodes = {node_of[r] for r in ranks} - {node_of[me]}
        expected_sent.update(nodes)
        expected_forwarded += sum(node_of[r] != node_of[me] for r in ranks) - len(nodes)
    assert Counter(node_of[target] for target, _ in sent) == expected_sent
    assert len(forwarded) == expected_forwarded
    # each route's word, as the expert's rank reads it
    total = int(routes.tokens_per_expert.sum())
    slots = min(local, routes.inverse.shape[1])
    place, number, slotted = read_words(copies.words[:total], places.width, slots)
    assert_same(slotted // slots, number)
    found = zip(*(part.tolist() for part in (place, number, slotted % slots)), strict=True)
    pairs = zip(routes.token_ids.tolist(), routes.expert_ids.tolist(), strict=True)
    seen = defaultdict(list)
    for (place, number, slot), (token, expert) in zip(found, pairs, strict=False):
        rank = expert // local
        via = [r for r, node in enumerate(node_of) if node == node_of[rank]][place]
        if rank == me:
            assert via == me and number == token
        elif via == rank or node_of[rank] == node_of[me]:
            assert sent[(rank, number)] == token and via in (rank, me)
        else:
            assert forwarded[(via, rank, number)] == token
        seen[token, rank].append(slot)
    assert all(sorted(slots) == list(range(len(slots))) for slots in seen.values())
    check_counts(copies, sent, forwarded, node_of, places)


def sent_token(copies, places, target: int, number: int) -> int:
    """The token whose row is this one of those sent to a rank."""
    (place,) = ((targets(copies.bins, places) == target) & (copies.number == number)).nonzero().tolist()
    return place[0]


def check_counts(copies, sent, forwarded, node_of, places) -> None:
    expected = torch.zeros(places.ranks, places.width, dtype=torch.int64)
    for target, _ in sent:
        expected[target, places.local_of[target]] += 1
    for pilot, rank, _ in forwarded:
        expected[pilot, places.local_of[rank]] += 1
    assert_same(copies.told[0, :, : places.width], expected)


def pilots(copies) -> list[list[int]]:
    """Sorted bins of each token."""
    return [sorted(row) for row in copies.bins.tolist()]


def test_pilots_are_spread_and_repeatable():
    """A fair share for every rank of a node, the same every time, other in another layer, rank or token."""
    node_of, tokens = (0, 1, 1, 1, 1), 4000
    first, second = (copies_of(node_of, 2, 10, tokens, rank=0, salt=salt_of(layer, 0))[0] for layer in (1, 2))
    places = Places.of(node_of, 0, 2, "cpu")
    again, routes, *_ = copies_of(node_of, 2, 10, tokens, rank=0, salt=salt_of(1, 0))
    assert_same(again.bins, first.bins)
    kept = int(routes.tokens_per_expert.sum())
    assert_same(again.words[:kept], first.words[:kept])
    assert sum(a != b for a, b in zip(pilots(first), pilots(second), strict=True)) > tokens / 2
    for copies in (first, second):
        rows = torch.tensor([int((targets(copies.bins, places) == rank).sum()) for rank in range(1, 5)])
        assert (rows / rows.sum() - 0.25).abs().max() < 0.03
    only_first = copies_of(node_of, 2, 10, tokens, rank=0, salt=None)[0]
    assert (targets(only_first.bins, places) == 1).sum() > 0.8 * tokens


def test_pilots_follow_the_routes():
    """The same tokens get other pilots in a step in which they choose other experts."""
    node_of, ids = (0, 1, 1, 1), torch.arange(8).expand(500, 8).clone()
    weights, places = torch.rand(500, 8), Places.of(node_of, 0, 2, "cpu")
    before = choose_copies(build_routes(ids, weights, 8), places, 1)
    ids[:, 0] = -1  # one of the own node's experts less: the candidates are the same
    after = choose_copies(build_routes(ids, weights, 8), places, 1)
    found = [targets(copies.bins, places) for copies in (before, after)]
    there = [torch.where(target < 4, target, 0).amax(dim=1) for target in found]
    assert (there[0] != there[1]).float().mean() > 0.5


def world_of_counts(node_of, local, topk, row_bytes=64, weight_bytes=4) -> list[Counts]:
    """What every rank of a world knows after the exchange of counts."""
    told = []
    for rank in range(len(node_of)):
        copies, routes, _, places = copies_of(node_of, local, topk, tokens=3 + 2 * rank, rank=rank)
        assert_same(copies.told[0, :, 2 * places.width :], routes.tokens_per_expert.view(len(node_of), -1))
        told.append(copies.told[0])
    return [
        Counts(Places.of(node_of, rank, local, "cpu"), 3 + 2 * rank, row_bytes, weight_bytes,
               torch.stack([told[rank], torch.stack([one[rank] for one in told])]).numpy())
        for rank in range(len(node_of))
    ]  # fmt: skip


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize(("local", "topk"), SIZES)
@pytest.mark.parametrize("node_of", PLACEMENTS, ids=str)
def test_ranks_agree_on_sizes(node_of, local, topk, weights):
    """What a rank sends to another is what that one receives from it, in every exchange."""
    layouts = [Layout(counts, weights) for counts in world_of_counts(node_of, local, topk)]
    for s, sender in enumerate(layouts):
        for d, receiver in enumerate(layouts):
            assert sender.direct.sent[d] == receiver.direct.received[s]
            assert sender.counts.meta.sent[d] == receiver.counts.meta.received[s]
            if s == d and not weights:
                assert sender.direct.sent[d] == 0
            if node_of[s] == node_of[d]:
                here = [r for r, node in enumerate(node_of) if node == node_of[s]]
                assert sender.inside.sent[here.index(d)] == receiver.inside.received[here.index(s)]


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("node_of", PLACEMENTS, ids=str)
def test_sections_do_not_overlap(node_of, weights):
    """At the experts, every row belongs to one copy or is a weight row, and the sections are filled to the last row."""
    for counts in world_of_counts(node_of, 2, 3):
        layout, places = Layout(counts, weights), counts.places
        taken = Counter(range(counts.tokens))
        for source in range(len(node_of)):
            for place in range(len(places.members)):
                via_itself = place == places.local if node_of[source] != node_of[places.rank] else None
                own = node_of[source] == node_of[places.rank]
                if own and places.members[place] != source:
                    continue
                rows = counts.rows[1][source] if own or via_itself else counts.forwarded[source, place]
                first = int(layout.copies[source, place])
                if source != places.rank:
                    taken.update(range(first, first + int(rows)))
            first = counts.tokens + int(layout.weights_at[1][source])
            taken.update(range(first, first + int(counts.weight_rows[1][source]) * weights))
        assert taken == Counter(range(layout.at_experts[-1]))


@pytest.mark.parametrize("hidden", [1, 2, 3, 8, 13])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weights_survive_in_rows(dtype, hidden):
    """Any bits, NaNs and subnormal numbers among them, wherever they are put; the rest of the rows is left alone."""
    rows, start = torch.ones(40, hidden, dtype=dtype), 3
    before, begins = rows.clone(), torch.tensor([start])
    weights = torch.tensor([0.1, float("nan"), -0.0, 1e-310, 3.0], dtype=torch.float64)
    write_weights(bytes_of(rows), torch.zeros(5, dtype=torch.int64), weights, begins)
    assert_same(read_weights(bytes_of(rows), torch.zeros(5, dtype=torch.int32), begins, 1, 8), weights)
    same = bytes_of(rows) == bytes_of(before)
    assert same[:start].all() and same[start + 40 :].all()
