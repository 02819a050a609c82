"""The rule of the automatic dispatcher: its prediction, its decisions and what it says."""

from math import comb

import pytest
import torch

from megatron_xmoe.dispatch.choice import Choice, choose_dispatcher, network_rows


def nodes(*sizes: int) -> tuple[int, ...]:
    """Node of each rank, nodes one after the other."""
    return tuple(node for node, size in enumerate(sizes) for _ in range(size))


@pytest.mark.parametrize(
    ("ranks", "percent"), [(16, 75.1), (32, 54.8), (64, 33.8), (128, 18.5), (256, 9.2)]
)
def test_the_papers_redundancy(ranks, percent):
    """256 experts, top-8, eight ranks a node."""
    plain, once = network_rows(nodes(*[8] * (ranks // 8)), 8, 256)
    assert plain == pytest.approx(8 * (1 - 8 / ranks))
    assert 100 * (1 - once / plain) == pytest.approx(percent, abs=0.05)


@pytest.mark.parametrize(("n", "topk", "experts"), [(2, 8, 256), (4, 6, 64), (8, 1, 64), (2, 64, 64)])
def test_equal_nodes_follow_the_closed_form(n, topk, experts):
    distinct = n * (1 - comb(experts - experts // n, topk) / comb(experts, topk))
    plain, once = network_rows(nodes(*[4] * n), topk, experts)
    assert once == pytest.approx(distinct * (n - 1) / n)
    assert plain == pytest.approx(topk * (n - 1) / n)


@pytest.mark.parametrize(
    ("node_of", "topk", "experts"),
    [
        (nodes(3, 5), 3, 16),
        (nodes(1, 1, 2), 2, 8),
        ((0, 1, 0, 1, 1, 0), 4, 12),
        (nodes(2, 2), 1, 8),
        (nodes(2, 6), 8, 8),
    ],
)
def test_prediction_is_what_uniform_routing_gives(node_of, topk, experts):
    """Counted over many random tokens of every rank."""
    generator = torch.Generator().manual_seed(3)
    tokens, ranks = 20000, len(node_of)
    node_of_expert = torch.tensor(node_of).repeat_interleave(experts // ranks)
    sent = torch.zeros(2)
    for rank in range(ranks):
        chosen = torch.rand(tokens, experts, generator=generator).topk(topk).indices
        there = node_of_expert[chosen]
        for node in set(node_of) - {node_of[rank]}:
            sent += torch.tensor([(there == node).sum(), (there == node).any(dim=1).sum()])
    found = (sent / (tokens * ranks)).tolist()
    assert network_rows(node_of, topk, experts) == pytest.approx(found, rel=0.01)


@pytest.mark.parametrize(
    ("node_of", "topk", "experts", "expected"),
    [
        ((0,), 2, 8, Choice("alltoall", "1 expert-parallel rank on one node, so nothing crosses the network")),
        (nodes(8), 2, 8, Choice("alltoall", "8 expert-parallel ranks on one node, so nothing crosses the network")),
        (
            nodes(1, 1, 1, 1),
            2,
            8,
            Choice("alltoall", "4 expert-parallel ranks on 4 nodes of 1, so no node could pass a row on"),
        ),
        (
            nodes(2, 2),
            8,
            256,
            Choice(
                "rbd",
                "4 expert-parallel ranks on 2 nodes of 2: a token sends 1.00 rows over the network instead of 4.00 "
                "(75.1% fewer) with top-8 of 256 experts",
            ),
        ),
        (
            nodes(3, 4, 1),
            1,
            8,
            Choice(
                "alltoall",
                "8 expert-parallel ranks on 3 nodes of 3, 4 and 1: with rbd a token sends 0.59 rows over the network "
                "instead of 0.59 (0.0% fewer) with top-1 of 8 experts, and 10% would be worth it",
            ),
        ),
    ],
    ids=lambda value: value.dispatcher if isinstance(value, Choice) else None,
)
def test_decision(node_of, topk, experts, expected):
    assert choose_dispatcher(node_of, topk, experts) == expected


def test_little_to_save_is_not_worth_it():
    """The paper's largest layout saves 9.2 %, half of it 18.5 %."""
    assert choose_dispatcher(nodes(*[8] * 32), 8, 256).dispatcher == "alltoall"
    assert choose_dispatcher(nodes(*[8] * 16), 8, 256).dispatcher == "rbd"
