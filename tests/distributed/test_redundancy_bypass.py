"""Redundancy-bypassing dispatch on four and eight processes: against the plain dispatcher and the loop oracle.

Every placement of ranks on nodes runs in one set of processes; what they computed and sent is compared here.
"""

import os
from dataclasses import replace
from unittest import mock

import harness
import pytest
import torch
from bypass_cases import B, Passage, input_of, oracle, run_passages
from tolerances import RELATIVE_RMS, assert_close, assert_same, relative_rms_error

from megatron_xmoe import _optional

UNEVEN = (3, 1, 5, 2)
TWO, INTERLEAVED, THREE_ONE, SINGLES = (0, 0, 1, 1), (0, 1, 0, 1), (0, 0, 0, 1), (0, 1, 2, 3)

CASES = [
    *(Passage(TWO, 4, topk, UNEVEN) for topk in (1, 2, 3, 4)),
    *(Passage(TWO, 12, topk, UNEVEN) for topk in (1, 3, 8, 12)),
    *(Passage(node_of, 8, 3, UNEVEN) for node_of in (TWO, INTERLEAVED, THREE_ONE, SINGLES, (0, 1, 1, 0))),
    *(Passage(node_of, 8, 8, (2, 2, 2, 2)) for node_of in (INTERLEAVED, THREE_ONE)),
    *(Passage(TWO, 8, 3, UNEVEN, kind) for kind in ("fewer than K", "none", "all to one expert", "all abroad")),
    Passage(INTERLEAVED, 8, 2, UNEVEN, "all to the first rank"),
    Passage(TWO, 8, 3, (2, 0, 4, 1)),
    Passage(THREE_ONE, 8, 3, (0, 0, 5, 0)),
    Passage(TWO, 8, 3, (0, 0, 0, 0)),
    *(Passage(TWO, 8, 3, UNEVEN, capacity=factor) for factor in (0.6, 0.0)),
    *(Passage(TWO, 8, 3, UNEVEN, hidden=hidden, dtype=torch.float32) for hidden in (1, 12, 33)),
    Passage(THREE_ONE, 8, 3, UNEVEN, hidden=1),
    Passage(INTERLEAVED, 8, 3, UNEVEN, pilot="first"),
    Passage(TWO, 8, 3, (2, 0, 4, 1), guard=True),
    Passage(INTERLEAVED, 8, 2, UNEVEN, "all to the first rank", guard=True),
    *(Passage(TWO, 8, 3, UNEVEN, hidden=hidden, dtype=torch.bfloat16) for hidden in (1, 7, 16)),
    *(Passage(TWO, 8, 3, UNEVEN, dtype=torch.bfloat16, probs_dtype=dtype) for dtype in (torch.float32, torch.float64)),
    Passage(THREE_ONE, 8, 3, UNEVEN, hidden=7, dtype=torch.bfloat16, probs_dtype=torch.float64),
    Passage(TWO, 64, 6, (400, 400, 400, 400), hidden=2, dtype=torch.float32),  # enough to count shares
]
RECOMPUTED = (Passage(TWO, 8, 3, UNEVEN), Passage(INTERLEAVED, 8, 8, (2, 2, 2, 2)))
COUNTED = CASES[-1]
EIGHT = (3, 1, 0, 2, 2, 1, 4, 1)
PLACEMENTS_OF_EIGHT = [
    (0,) * 4 + (1,) * 4, (0, 0, 1, 1, 2, 2, 3, 3), (0, 0, 0, 1, 1, 1, 1, 1), (0, 1) * 4, (0, 1, 2, 0, 1, 2, 1, 1),
]  # fmt: skip
SLOW_CASES = [
    *(Passage(n, e, k, EIGHT) for n in PLACEMENTS_OF_EIGHT for e in (8, 24) for k in (1, 2, 5, 8, e) if k <= e),
    *(Passage(n, 16, 4, EIGHT, kind, pilot="first") for n in PLACEMENTS_OF_EIGHT for kind in ("any", "fewer than K")),
    *(Passage(n, 16, 4, EIGHT, capacity=0.7, dtype=torch.float32, guard=True) for n in PLACEMENTS_OF_EIGHT),
]


@pytest.fixture(scope="module")
def computed() -> dict:
    """What each of four ranks computed, by case."""
    ranks = harness.run_distributed(run_passages, 4, CASES, RECOMPUTED, timeout=600)
    return {case: [rank[case] for rank in ranks] for case in CASES}


def check_gradients(case: Passage, ranks: list[dict]) -> None:
    """The experts got the same rows; output and gradients are the plain dispatcher's and the oracle's."""
    for result in ranks:
        plain, rbd = result["alltoall"], result["rbd"]
        for name in ("arrived", "weights", "per_expert"):
            assert_same(rbd[name], plain[name])
        for name in ("output", "x", "probs", "matrices"):
            if case.dtype == torch.bfloat16:  # sums are rounded at the experts, in the node and at the token
                assert relative_rms_error(rbd[name], plain[name]) < 2 * RELATIVE_RMS[torch.bfloat16]
            else:
                assert_close(rbd[name], plain[name])
    if case.capacity is not None or case.dtype == torch.bfloat16 or sum(case.lengths) > 100:
        return  # the oracle drops nothing, its inputs are in fp64, and it is slow
    expected, matrices = oracle(case, [input_of(case, rank) for rank in range(len(ranks))])
    for result, (output, grad_x, grad_probs) in zip(ranks, expected, strict=True):
        rbd = result["rbd"]
        assert_close(rbd["output"], output, case.dtype)
        assert_close(rbd["x"], grad_x, case.dtype)
        assert_close(rbd["probs"] * (grad_probs != 0), grad_probs, case.dtype)
    assert_close(torch.cat([result["rbd"]["matrices"] for result in ranks]), matrices, case.dtype)


def check_exchanges(case: Passage, rank: int, result: dict) -> None:
    """Six exchanges forward and four backward, and one transfer to the host; all tables are made forward."""
    forward, backward = result["rbd"]["forward"], result["rbd"]["backward"]
    alone = case.node_of.count(case.node_of[rank]) == 1  # a group of one exchanges nothing
    assert (len(forward[0]), len(backward[0])) == ((4, 2) if alone else (6, 4))
    # one look at what was transferred
    assert forward[1] == ["cpu", "numpy"] and backward[1] == []
    assert (forward[2], backward[2]) == (3, 0)


def check_rows(case: Passage, rank: int, result: dict) -> None:
    """A row for each (token, remote node) and (token, other rank of the node); at most 16 bytes a route besides, and
    back as many rows as a weight for each route takes. What the metrics get are rows and bytes of the exchanges."""
    world = tuple(range(len(case.node_of)))
    calls = [call for part in ("forward", "backward") for call in result["rbd"][part][0]]
    meta, dispatch, combine, combine_back, dispatch_back = (
        call for call in calls if call.group == world and call.sent is not None
    )
    assert combine.received_rows == sum(combine_back.sent)
    assert dispatch.sent == combine_back.sent
    routing_map = input_of(case, rank)[1]
    routes = [int(routing_map[:, there * case.local : (there + 1) * case.local].sum()) for there in world]
    row_bytes = case.hidden * case.dtype.itemsize
    weight_bytes = 8 if (case.probs_dtype or case.dtype) == torch.float64 else 4
    assert dispatch_back.received_rows == sum(dispatch.sent) + sum(-(-n * weight_bytes // row_bytes) for n in routes)
    abroad = [there for there in world if case.node_of[there] != case.node_of[rank]]
    assert sum(combine_back.sent[there] for there in abroad) == pairs_abroad(case, rank)
    for there in world:
        if there not in abroad:
            here = routing_map[:, there * case.local : (there + 1) * case.local].any(dim=1)
            assert combine_back.sent[there] == (0 if there == rank else int(here.sum()))
    others = [there for there in world if there not in (*abroad, rank)]
    forwarded = next((call.shape[0] for call in result["rbd"]["forward"][0] if call.group != world), 0)
    traffic, told = result["rbd"]["traffic"], 8 * (2 * max(map(case.node_of.count, case.node_of)) + case.local)
    assert traffic.inter_rows == sum(dispatch.sent[there] for there in abroad)
    assert traffic.intra_rows == sum(dispatch.sent[there] for there in others) + forwarded
    assert traffic.row_bytes == row_bytes
    assert traffic.inter_metadata == sum(4 * meta.sent[there] + told for there in abroad)
    assert traffic.intra_metadata == sum(4 * meta.sent[there] + told for there in others)
    copies = sum(int(routing_map.view(-1, len(world), case.local)[:, there].any(dim=1).sum()) for there in abroad)
    words = sum(4 * meta.sent[there] for there in abroad)
    assert words == (4 + weight_bytes) * sum(routes[there] for there in abroad) + 4 * (copies - traffic.inter_rows)
    assert words <= 16 * sum(routes[there] for there in abroad)
    assert all(4 * meta.sent[there] == (4 + weight_bytes) * routes[there] for there in (*others, rank))


def pairs_abroad(case: Passage, rank: int) -> int:
    """Distinct pairs of a token of this rank and another node."""
    routing_map = input_of(case, rank)[1]
    nodes = torch.tensor([case.node_of_expert(e) for e in range(case.experts)])
    others = set(case.node_of) - {case.node_of[rank]}
    return sum(int(routing_map[:, nodes == node].any(dim=1).sum()) for node in others)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients(computed, case):
    check_gradients(case, computed[case])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_exchanges(computed, case):
    for rank, result in enumerate(computed[case]):
        check_exchanges(case, rank, result)
        if not case.guard and case.capacity is None:
            check_rows(case, rank, result)


def test_share_of_rows_is_the_closed_form():
    """Uniform routing: a token reaches D = n (1 - C(E - E/n, K) / C(E, K)) nodes (paper, section 4.2)."""
    from math import comb

    nodes, experts, topk = 2, COUNTED.experts, COUNTED.topk
    reached = nodes * (1 - comb(experts - experts // nodes, topk) / comb(experts, topk))
    rows = sum(pairs_abroad(COUNTED, rank) for rank in range(4))
    assert rows / (sum(COUNTED.lengths) * B) == pytest.approx(reached * (nodes - 1) / nodes, rel=0.01)


def test_pilots_are_spread(computed):
    """Rows to the ranks of another node differ by chance only."""
    rows = [result["rbd"]["rows"] for result in computed[COUNTED]]
    for source, (first, second) in enumerate(((2, 3), (2, 3), (0, 1), (0, 1))):
        share = rows[source][first] / (rows[source][first] + rows[source][second])
        assert abs(share - 0.5) < 0.05


@pytest.mark.parametrize("case", RECOMPUTED, ids=str)
def test_recomputation_chooses_the_same_pilots(computed, case):
    for result in computed[case]:
        first, second = result["recomputed"]["pilots"]
        assert_same(first, second)
        for name in ("output", "x", "probs", "matrices"):
            assert_same(result["recomputed"][name], result["rbd"][name])


def test_guarded_ranks_always_exchange_something(computed):
    """Also in groups of ranks that are not neighbours; without the guard some exchange nothing in the same cases."""
    guarded = [case for case in CASES if case.guard]
    assert any(case.node_of == INTERLEAVED for case in guarded)
    for case in guarded:
        for kind in ("alltoall", "rbd"):
            passes = [result[kind] for result in computed[case]]
            assert all(min(call.shape[0], call.received_rows) > 0 for call in rows_of(passes))
    for case in guarded:
        open_ = computed[replace(case, guard=False)]
        for kind in ("alltoall", "rbd"):
            assert any(min(call.shape[0], call.received_rows) == 0 for call in rows_of(r[kind] for r in open_))


def rows_of(passes) -> list:
    """The exchanges of rows in passes, those of counts left out."""
    calls = [call for one in passes for part in ("forward", "backward") for call in one[part][0]]
    return [call for call in calls if call.sent is not None]


UNCOMPILED = [
    Passage(THREE_ONE, 8, 3, (0, 0, 5, 0)),
    Passage(TWO, 8, 3, UNEVEN, capacity=0.6),
    Passage(TWO, 8, 3, UNEVEN, hidden=1, dtype=torch.bfloat16),  # rows of two bytes
]


@pytest.mark.skipif(not _optional.extension("cpu").usable, reason="there is plain torch only")
def test_plain_torch_gives_the_same_bits(computed):
    """Whole passes with indices by plain torch, against those by the compiled kernels."""
    with mock.patch.dict(os.environ, XMOE_KERNELS="reference"):
        ranks = harness.run_distributed(run_passages, 4, UNCOMPILED, (), ("rbd",), timeout=600)
    for case in UNCOMPILED:
        for rank, (found, expected) in enumerate(zip((r[case]["rbd"] for r in ranks), computed[case], strict=True)):
            for name in ("arrived", "weights", "per_expert", "output", "x", "probs", "matrices"):
                assert_same(found[name], expected["rbd"][name])
            assert_same(found["pilots"][0], expected["rbd"]["pilots"][0])
            check_exchanges(case, rank, {"rbd": found})


@pytest.mark.slow
def test_eight_ranks():
    """The full matrix of placements."""
    ranks = harness.run_distributed(run_passages, 8, SLOW_CASES, timeout=1200)
    for case in SLOW_CASES:
        check_gradients(case, [rank[case] for rank in ranks])
        for rank, results in enumerate(ranks):
            check_exchanges(case, rank, results[case])
            if not case.guard:
                check_rows(case, rank, results[case])
