"""XMoELayer with redundancy bypassing against the same layer with the plain dispatcher, on four and eight ranks."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from unittest import mock

import harness
import pytest
from bypass_cases import listening
from test_dispatcher import Case, build, gradients_of, layout_of, tokens_of
from tolerances import assert_close

UNEVEN = (3, 1, 5, 2)
PAIRS = (2, 2, 4, 4)  # tensor-parallel ranks have equal numbers of tokens


@dataclass(frozen=True)
class Placed:
    """A layer and where its ranks are."""

    case: Case
    nodes: str
    """Of --xmoe-ranks-per-node."""

    overlap: str = "on"
    dispatcher: str = "rbd"

    bypasses: bool = True
    """Whether there is anything to bypass."""

    plain: tuple[int, ...] = ()
    """Ranks for whose expert-parallel group there is not."""

    def __str__(self) -> str:
        return f"{self.case}-nodes{self.nodes}-{self.dispatcher}" + "-in turn" * (self.overlap == "off")


SHARED = Case(4, 8, 3, shared=True, overlap=True, lengths=UNEVEN)
LAYERS = [
    Placed(Case(4, 8, 3), "2"),
    Placed(Case(4, 8, 3, capacity=0.6), "3,1"),
    Placed(Case(4, 8, 3, tp=2, lengths=PAIRS), "2"),
    Placed(SHARED, "2"),
    Placed(SHARED, "2", overlap="off"),
    Placed(replace(SHARED, overlap=False), "1,3"),
    Placed(Case(4, 8, 3), "2", dispatcher="auto"),
    Placed(Case(4, 8, 1), "2", dispatcher="auto", bypasses=False),  # one row for one expert saves nothing
    Placed(Case(4, 8, 3), "4", bypasses=False),
    Placed(Case(4, 8, 3), "1", bypasses=False),
    Placed(Case(2, 4, 2), "1", bypasses=False),
    Placed(Case(1, 3, 2), "2", bypasses=False),
]
EIGHT = (2, 2, 4, 4, 2, 2, 6, 6)
LAYERS_OF_EIGHT = [
    Placed(Case(4, 8, 3, tp=2, etp=2, lengths=EIGHT), "4"),  # expert-parallel groups of every other rank
    Placed(Case(4, 8, 3, tp=2, etp=2, lengths=EIGHT, capacity=0.7), "6,2"),
    Placed(Case(4, 4, 3, tp=2, etp=2, lengths=EIGHT, shared=True, overlap=True), "4"),
    Placed(Case(4, 8, 3, tp=2, etp=2, lengths=EIGHT), "3,5"),  # ranks that share experts see nodes of other sizes
    Placed(Case(4, 8, 3, tp=2, etp=2, lengths=EIGHT), "7,1", plain=(0, 2, 4, 6)),  # these are on one node
    Placed(Case(8, 16, 5, tp=2, lengths=EIGHT), "3,5"),
    Placed(Case(4, 8, 3, lengths=EIGHT), "2"),  # two groups, four nodes
]


def run(placed: Placed, dispatcher: str) -> dict:
    """Forward and backward of a layer on this rank."""
    import torch.distributed as dist

    from megatron_xmoe.config import XMoEConfig
    from megatron_xmoe.experts import XMoEGroupedMLP
    from megatron_xmoe.layer import XMoELayer

    xmoe = XMoEConfig(
        moe_backend="xmoe", xmoe_min_capacity=0, xmoe_dispatcher=dispatcher, xmoe_ranks_per_node=placed.nodes,
        xmoe_rbd_overlap=placed.overlap,
    )  # fmt: skip
    layer = build(placed.case, partial(XMoELayer, xmoe=xmoe), XMoEGroupedMLP)
    layer.set_layer_number(4)
    assert layer.token_dispatcher.layer_number == 4
    x, grad = tokens_of(placed.case, dist.get_rank())
    x.requires_grad_()
    shared, exchanges_before = layer.token_dispatcher.shared_experts, []
    with listening() as (exchanges, _):
        begin = getattr(shared, "linear_fc1_forward_and_act", None)
        noted = lambda *args: (exchanges_before.append(len(exchanges)), begin(*args))  # noqa: E731
        with mock.patch.object(shared, begin.__name__, noted) if begin else nullcontext():
            output, _ = layer(x)
    output.backward(grad)
    name = type(layer.token_dispatcher).__name__
    results = {"output": output.detach(), "x": x.grad, **gradients_of(layer)}
    return {"dispatcher": name, "exchanges before shared experts": exchanges_before, **results}


def run_all(layers: list[Placed]) -> dict:
    """Both dispatchers, by layer."""
    results = {}
    for placed in layers:
        tp, ep, etp = layout_of(placed.case)
        with harness.model_parallel(tp=tp, ep=ep, etp=etp):
            results[placed] = {name: run(placed, name) for name in ("alltoall", placed.dispatcher)}
    return results


def check(placed: Placed, results: dict, rank: int) -> None:
    """The same output and gradients by the expected dispatcher."""
    plain, other = (dict(results[name]) for name in ("alltoall", placed.dispatcher))
    begun = other.pop("exchanges before shared experts")
    plain.pop("exchanges before shared experts")
    if placed.case.overlap and placed.bypasses:  # counts, metadata, pilots; in turn also what is passed on
        assert begun == [3 if placed.overlap == "on" else 4]
    assert plain.pop("dispatcher") == "AllToAllDispatcher"
    bypasses = placed.bypasses and rank not in placed.plain
    assert other.pop("dispatcher") == ("RedundancyBypassDispatcher" if bypasses else "AllToAllDispatcher")
    assert plain.keys() == other.keys() and len(plain) >= 5
    for name, expected in plain.items():
        assert_close(other[name], expected)


@pytest.fixture(scope="module")
def computed() -> list[dict]:
    """What each of four ranks computed."""
    return harness.run_distributed(run_all, 4, LAYERS, timeout=600)


@pytest.mark.parametrize("placed", LAYERS, ids=str)
def test_layer(computed, placed):
    for rank, results in enumerate(computed):
        check(placed, results[placed], rank)


def test_layers_of_eight_ranks():
    """Experts shared by tensor-parallel ranks; uneven nodes; several expert-parallel groups."""
    for rank, results in enumerate(harness.run_distributed(run_all, 8, LAYERS_OF_EIGHT, timeout=1200)):
        for placed in LAYERS_OF_EIGHT:
            check(placed, results[placed], rank)
