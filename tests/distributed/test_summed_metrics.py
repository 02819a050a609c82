"""Figures about the experts on four processes, against numbers counted by hand from every rank's routing maps."""

import math
from dataclasses import dataclass
from unittest import mock

import harness
import pytest
import torch

WORLD, EXPERTS, TOPK, HIDDEN, SEQUENCE, LAYERS = 4, 8, 3, 8, 6, 3
BYTES = 8  # of an element of a hidden state, of a routing weight and of a count
LAST_ITERATION = 2


@dataclass(frozen=True)
class Case:
    """A layout, and the layers (of three, numbered from 1) that a pipeline stage holds."""

    name: str
    ep: int = 1
    tp: int = 1
    pp: int = 1
    stages: tuple[tuple[int, ...], ...] = ((1, 3),)
    capacity: float | None = None
    recompute: bool = False
    rbd: bool = False
    """Redundancy bypassing, with two ranks on each node."""

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("one group", ep=4),
    Case("two groups", ep=2),
    Case("no exchange"),
    Case("capacity", ep=2, capacity=0.7),
    Case("recomputation", ep=2, recompute=True),
    Case("tensor parallel", ep=2, tp=2),
    Case("a stage without experts", ep=2, pp=2, stages=((), (2, 3))),
    Case("redundancy bypassing", ep=4, rbd=True),
    Case("redundancy bypassing, capacity", ep=4, rbd=True, capacity=0.7),
    Case("a layer on each stage", ep=2, pp=2, stages=((1,), (3,))),
]


class Writer:
    """Stands in for TensorBoard's writer."""

    def __init__(self):
        self.scalars, self.tensors = {}, {}

    def add_scalar(self, tag, value, iteration):
        self.scalars[tag, iteration] = value

    def add_tensor(self, tag, tensor, iteration):
        self.tensors[tag, iteration] = tensor


class Event:
    """Stands in for torch.cuda.Event: from one recording to the next, rank + 1 milliseconds go by."""

    now = 0.0

    def __init__(self, enable_timing: bool = False):
        self.when = math.nan

    def record(self) -> None:
        Event.now += torch.distributed.get_rank() + 1
        self.when = Event.now

    def synchronize(self) -> None:
        """It has happened."""

    def elapsed_time(self, end: "Event") -> float:
        return end.when - self.when


def build(case: Case, number: int) -> torch.nn.Module:
    """Layer `number`."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_xmoe.config import XMoEConfig
    from megatron_xmoe.layer import XMoELayer

    recompute = {"recompute_granularity": "selective", "recompute_modules": ["moe"]} if case.recompute else {}
    config = TransformerConfig(
        num_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=2, num_moe_experts=EXPERTS, moe_router_topk=TOPK,
        moe_ffn_hidden_size=4, ffn_hidden_size=4, add_bias_linear=False, bias_activation_fusion=False,
        gradient_accumulation_fusion=False, moe_router_load_balancing_type="none", params_dtype=torch.float64,
        moe_token_dispatcher_type="alltoall", use_cpu_initialization=True, tensor_model_parallel_size=case.tp,
        sequence_parallel=case.tp > 1, expert_model_parallel_size=case.ep, expert_tensor_parallel_size=1,
        pipeline_dtype=torch.float64, moe_expert_capacity_factor=case.capacity, **recompute,
    )  # fmt: skip
    torch.manual_seed(number)
    submodules = get_moe_module_spec(use_te=False, num_experts=EXPERTS).keywords["submodules"]
    xmoe = XMoEConfig(moe_backend="xmoe", xmoe_dispatcher="rbd", xmoe_ranks_per_node=2) if case.rbd else None
    layer = XMoELayer(config, submodules=submodules, xmoe=xmoe)
    layer.set_layer_number(number)
    return layer


def train(case: Case) -> dict:
    """Two iterations with one report: what was routed on this rank, and what the last rank wrote."""
    from megatron.core import parallel_state
    from megatron.core.transformer.moe import moe_logging

    from megatron_xmoe import metrics

    rank, writer = torch.distributed.get_rank(), Writer()
    layers = {n: build(case, n) for n in case.stages[parallel_state.get_pipeline_model_parallel_rank()]}
    metrics.install_metrics("layers", False, LAYERS, EXPERTS, LAST_ITERATION)
    maps: dict[int, list] = {number: [] for number in layers}
    generator = torch.Generator().manual_seed(rank)
    text = ""
    for iteration in range(1, LAST_ITERATION + 1):
        for micro_batch in range(2):
            x = torch.randn(SEQUENCE + micro_batch, 1, HIDDEN, generator=generator, dtype=torch.float64)
            for number, layer in layers.items():
                with torch.no_grad():
                    maps[number].append(layer.route(x)[1].tolist())
                    layer(x.flip(0))  # an evaluation
                layer(x.requires_grad_())[0].sum().backward()
        # as Megatron calls it
        text = moe_logging.get_moe_metrics_tracker().report(
            loss_scale=0.5, iteration=iteration, writer=writer if rank == WORLD - 1 else None, force_initialize=True,
            track_names=["load_balancing_loss"], num_layers=LAYERS,
        )  # fmt: skip
    moe_logging.destroy_moe_metrics_tracker()
    return {"maps": maps, "scalars": writer.scalars, "tensors": writer.tensors, "text": text}


def train_all(cases: list[Case]) -> list[dict]:
    """Case by case, in one set of processes."""
    results = []
    with mock.patch.object(torch.cuda, "Event", Event):
        for case in cases:
            with harness.model_parallel(tp=case.tp, ep=case.ep, pp=case.pp):
                results.append(train(case))
    return results


@pytest.fixture(scope="module")
def trained() -> dict[Case, list[dict]]:
    """By case, what each rank returned."""
    by_rank = harness.run_distributed(train_all, WORLD, CASES, timeout=400)
    return dict(zip(CASES, zip(*by_rank, strict=True), strict=True))


def counted(case: Case, ranks: list[dict], number: int) -> dict[str, float]:
    """A layer's figures, counted route by route. Ranks of an expert-parallel group are neighbours."""
    loads, passes, kept, crossing, traffic_bytes, padding = [0] * EXPERTS, 0, 0, 0, 0, 0
    holders = [rank for rank in range(WORLD) if number in ranks[rank]["maps"]]
    for rank in holders:
        for routing_map in ranks[rank]["maps"][number]:
            passes += 1
            counts = [sum(token[expert] for token in routing_map) for expert in range(EXPERTS)]
            loads = [total + count for total, count in zip(loads, counts, strict=True)]
            if case.capacity is not None:
                capacity = math.ceil(len(routing_map) * TOPK / EXPERTS * case.capacity)
                counts = [min(count, capacity) for count in counts]
            else:
                capacity = max(counts)
            kept += sum(counts)
            padding += EXPERTS * capacity - sum(counts)
            local = EXPERTS // case.ep
            elsewhere = sum(count for e, count in enumerate(counts) if e // local != rank % case.ep)
            crossing += elsewhere
            traffic_bytes += elsewhere * (2 * HIDDEN + 1) * BYTES + (case.ep - 1) * local * BYTES
    total = sum(loads)
    if case.rbd and case.capacity is None:
        routes, rows = crossing_nodes(ranks, number)
        traffic = {
            "redundancy": 1 - rows / routes,
            "inter-node-rows": rows / passes,
            "saved-rows": (routes - rows) / passes,
            "saved-MiB": (routes - rows) * 2 * HIDDEN * BYTES / passes / 2**20,
        }
    elif case.rbd:
        traffic = {}  # which routes are dropped is the dispatcher's
    else:
        traffic = {
            "intra-node-rows": crossing / passes,
            "intra-node-MiB": traffic_bytes / passes / 2**20,
            "inter-node-rows": 0.0,
            "inter-node-MiB": 0.0,
            "saved-rows": 0.0,
        }
    return traffic | {
        "load-max": max(loads) / total * EXPERTS,
        "load-entropy": -sum(n / total * math.log(n / total) for n in loads if n) / math.log(EXPERTS),
        "idle-experts": loads.count(0) / EXPERTS,
        "drop-rate": 1 - kept / total,
        "padding-avoided": padding / (padding + kept),
        "padding-avoided-MiB": padding * HIDDEN * BYTES / passes / 2**20,
        # dispatch and combine take rank + 1 ms each
        "alltoall-ms": sum(2 * (rank + 1) for rank in holders) / len(holders),
        "alltoall-slowest-ms": 2 * (holders[-1] + 1),
        "alltoall-slowest-rank": holders[-1],
        "alltoall-fastest-ms": 2 * (holders[0] + 1),
        "alltoall-fastest-rank": holders[0],
    }


def crossing_nodes(ranks: list[dict], number: int) -> tuple[int, int]:
    """Routes to the other node, and tokens that go there; four ranks, two on each node."""
    routes, rows = 0, 0
    for rank in range(WORLD):
        for token in (token for routing_map in ranks[rank]["maps"][number] for token in routing_map):
            abroad = sum(chosen for expert, chosen in enumerate(token) if expert // (EXPERTS // 2) != rank // 2)
            routes, rows = routes + abroad, rows + (abroad > 0)
    return routes, rows


@pytest.mark.parametrize("case", CASES, ids=str)
def test_figures_of_each_layer(case, trained):
    ranks = trained[case]
    written = {tag: value for (tag, iteration), value in ranks[-1]["scalars"].items() if iteration == LAST_ITERATION}
    numbers = {number for rank in ranks for number in rank["maps"]}
    assert numbers == {number for stage in case.stages for number in stage}
    for number in numbers:
        for name, value in counted(case, ranks, number).items():
            assert written[f"xmoe-{name}/layer-{number:03d}"] == pytest.approx(value, abs=1e-12), (name, number)
    absent = set(range(1, LAYERS + 1)) - numbers
    assert not [tag for tag in written if tag.endswith(tuple(f"layer-{number:03d}" for number in absent))]
    ours = {iteration for tag, iteration in ranks[-1]["scalars"] if tag.startswith("xmoe")}
    assert ours == {LAST_ITERATION}  # Megatron's are written at each


@pytest.mark.parametrize("case", CASES, ids=str)
def test_overall_figures(case, trained):
    ranks = trained[case]
    numbers = sorted({number for rank in ranks for number in rank["maps"]})
    by_layer = {number: counted(case, ranks, number) for number in numbers}
    written = {tag: value for (tag, iteration), value in ranks[-1]["scalars"].items() if iteration == LAST_ITERATION}
    means = ("load-max", "load-entropy", "idle-experts", "drop-rate", "padding-avoided-MiB", "intra-node-MiB")
    for name in means[: 5 if case.rbd else 6]:
        mean = sum(of[name] for of in by_layer.values()) / len(numbers)  # each layer routes as many tokens
        assert written[f"xmoe/{name}"] == pytest.approx(mean, abs=1e-12), name
    worst = max(numbers, key=lambda number: by_layer[number]["load-max"])
    assert written["xmoe/worst-layer"] == worst
    assert f"(layer {worst}: {by_layer[worst]['load-max']:.2f})" in ranks[-1]["text"]
    slowest = max(of["alltoall-slowest-rank"] for of in by_layer.values())
    assert written["xmoe/alltoall-slowest-rank"] == slowest
    assert f"(rank {slowest}: {2 * (slowest + 1):.2f})" in ranks[-1]["text"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_load_of_each_expert(case, trained):
    ranks = trained[case]
    loads = ranks[-1]["tensors"]["xmoe-expert-load", LAST_ITERATION]
    assert loads.shape == (LAYERS, EXPERTS)
    for number in range(1, LAYERS + 1):
        routes = [sum(column) for column in zip(*(
            token for rank in ranks for routing_map in rank["maps"].get(number, []) for token in routing_map
        ), strict=True)] or [0] * EXPERTS  # fmt: skip
        even = sum(routes) / EXPERTS or 1
        assert loads[number - 1].tolist() == pytest.approx([count / even for count in routes])


def test_only_the_last_rank_writes(trained):
    for ranks in trained.values():
        assert not any(rank["scalars"] or "expert load" in rank["text"] for rank in ranks[:-1])
