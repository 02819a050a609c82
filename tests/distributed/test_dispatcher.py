"""The padding-free dispatcher on four processes: against Megatron's own layer, and against the loop oracle.

All layouts run in one set of processes. What they computed comes back and is compared here, case by case.
"""

from dataclasses import dataclass, replace
from itertools import groupby

import harness
import oracles
import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close

WORLD = 4
H, FFN, SHARED_FFN, B = 12, 8, 8, 2
UNEVEN = (3, 1, 5, 2)
"""Sequence length of each rank."""


@dataclass(frozen=True)
class Case:
    """A layer, a layout and the tokens of each rank."""

    ep: int
    experts: int
    topk: int
    tp: int = 1
    shared: bool = False
    lengths: tuple[int, ...] = UNEVEN
    forced: tuple[int, ...] = ()
    """Experts that the router is made to choose."""

    etp: int = 1
    """Tensor-parallel ranks that share an expert."""

    capacity: float | None = None
    overlap: bool = False
    """Shared experts are computed during the exchanges."""

    def __str__(self) -> str:
        extras = [f"tp{self.tp}"] * (self.tp > 1) + ["shared"] * self.shared
        extras += [f"etp{self.etp}"] * (self.etp > 1) + ["overlap"] * self.overlap
        extras += [f"capacity{self.capacity}"] * (self.capacity is not None)
        extras += [f"forced{''.join(map(str, self.forced))}"] * bool(self.forced)
        extras += ["even"] * (len(set(self.lengths)) == 1)
        return "-".join([f"ep{self.ep}", f"e{self.experts}", f"k{self.topk}", *extras])

    @property
    def local(self) -> int:
        """Experts of a rank."""
        return self.experts // self.ep

    def rank_of(self, expert: int, rank: int) -> int:
        """The rank that computes `expert` for the tokens of `rank`."""
        return rank // self.ep * self.ep + expert // self.local


LAYOUTS = [(1, 1), (1, 3), (2, 2), (2, 4), (4, 4), (4, 8)]  # expert parallel size, experts
LAYER_CASES = [
    *(Case(ep, experts, topk) for ep, experts in LAYOUTS for topk in range(1, experts + 1)),
    *(Case(ep, experts, min(2, experts), shared=True) for ep, experts in LAYOUTS),
    Case(4, 4, 2, lengths=(3, 3, 3, 3)),
    Case(4, 8, 2, forced=(0, 1)),  # the other three ranks receive nothing
    Case(2, 4, 1, forced=(2,)),
    Case(4, 4, 1, forced=(3,)),
    Case(4, 8, 3, tp=2, lengths=(2, 2, 4, 4)),
    Case(2, 4, 2, tp=2, lengths=(3, 3, 1, 1), shared=True),
]

# against Megatron's layer only: what the oracle does not know
MEGATRON_CASES = [
    Case(1, 2, 1, tp=2, etp=2, lengths=(2, 2, 4, 4)),
    Case(2, 2, 2, tp=2, etp=2, lengths=(3, 3, 1, 1)),
    Case(2, 8, 3, tp=2, etp=2, lengths=(3, 3, 1, 1), shared=True, overlap=True),
    Case(2, 8, 3, tp=2, etp=2, lengths=(3, 3, 1, 1), forced=(0, 1, 2)),  # one group's ranks receive nothing
    Case(2, 8, 3, tp=2, etp=2, lengths=(3, 3, 1, 1), capacity=0.8),
    Case(1, 3, 2, tp=4, etp=4, lengths=(2, 2, 2, 2), capacity=1.0),
    Case(4, 8, 3, capacity=0.6),
    Case(4, 8, 3, capacity=0.0),  # every route is dropped
    Case(4, 8, 3, shared=True, overlap=True),
    Case(1, 3, 2, shared=True, overlap=True),
]


def weights_of(case: Case) -> dict[str, torch.Tensor]:
    """All weights of a case's layer: the same on every rank and in the oracle."""
    generator = torch.Generator().manual_seed(case.experts * 100 + case.topk)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5

    router = random(case.experts, H)
    for expert in case.forced:
        router[expert] = 10 + random(H)  # tokens of such a case are positive
    return {
        "router": router,
        "fc1": random(case.experts, 2 * FFN, H),
        "fc2": random(case.experts, H, FFN),
        "shared_fc1": random(2 * SHARED_FFN, H),
        "shared_fc2": random(H, SHARED_FFN),
    }


def tokens_of(case: Case, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A rank's input [S, B, H], and the gradient of its output."""
    generator = torch.Generator().manual_seed(rank)
    x, grad = torch.randn(2, case.lengths[rank], B, H, generator=generator, dtype=torch.float64)
    return x.abs() if case.forced else x, grad


def build(case: Case, kind: type, experts: type | None = None) -> torch.nn.Module:
    """A layer of the given class in fp64, with the weights of the case; experts are Megatron's unless given."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1, hidden_size=H, num_attention_heads=4, num_moe_experts=case.experts, moe_router_topk=case.topk,
        moe_ffn_hidden_size=FFN, ffn_hidden_size=FFN, gated_linear_unit=True, activation_func=F.silu,
        moe_shared_expert_intermediate_size=SHARED_FFN if case.shared else None, add_bias_linear=False,
        bias_activation_fusion=False, gradient_accumulation_fusion=False, moe_router_load_balancing_type="none",
        moe_router_pre_softmax=case.topk == 1, moe_router_dtype="fp64", params_dtype=torch.float64,
        moe_token_dispatcher_type="alltoall", use_cpu_initialization=True, tensor_model_parallel_size=case.tp,
        sequence_parallel=case.tp > 1, expert_model_parallel_size=case.ep, expert_tensor_parallel_size=case.etp,
        moe_expert_capacity_factor=case.capacity, moe_shared_expert_overlap=case.overlap,
    )  # fmt: skip
    submodules = get_moe_module_spec(use_te=False, num_experts=case.experts).keywords["submodules"]
    layer = kind(config, submodules=replace(submodules, experts=experts) if experts else submodules)
    weights = weights_of(case)
    with torch.no_grad():
        layer.router.weight.copy_(weights["router"])
        for i, expert in enumerate(layer.local_expert_indices):
            for name in ("fc1", "fc2"):
                expert_weight(layer, i, name).copy_(shard_of(case, weights[name][expert], name))
        if case.shared:
            rank = torch.distributed.get_rank() % case.tp
            gate, up = weights["shared_fc1"].chunk(2)
            parts = [part.chunk(case.tp)[rank] for part in (gate, up)]
            layer.shared_experts.linear_fc1.weight.copy_(torch.cat(parts))
            layer.shared_experts.linear_fc2.weight.copy_(weights["shared_fc2"].chunk(case.tp, dim=1)[rank])
    return layer


def shard_of(case: Case, weight: torch.Tensor, name: str) -> torch.Tensor:
    """This rank's share of an expert's matrix; of gate and up each."""
    rank = torch.distributed.get_rank() % case.etp
    if name == "fc2":
        return weight.chunk(case.etp, dim=1)[rank]
    return torch.cat([part.chunk(case.etp)[rank] for part in weight.chunk(2)])


def expert_weight(layer: torch.nn.Module, local: int, name: str) -> torch.Tensor:
    """The weight of a local expert, of Megatron's experts or of grouped ones."""
    if hasattr(layer.experts, "local_experts"):
        return layer.experts.local_experts[local].get_submodule(f"linear_{name}").weight
    return layer.experts.get_submodule(f"linear_{name}").weight[local]


@dataclass
class Traffic:
    """What a dispatcher was asked to move in one pass."""

    input_splits: list[int]
    output_splits: list[int]
    sent_rows: int
    received_rows: int
    tokens_per_expert: list[int]


def watch(dispatcher) -> list[Traffic]:
    """Note the rows that a dispatcher moves, pass by pass."""
    passes, sent = [], []
    token_dispatch, dispatch_postprocess = dispatcher.token_dispatch, dispatcher.dispatch_postprocess

    def watched_dispatch(rows, probs):
        if dispatcher.ep_size > 1:  # otherwise nothing is sent, and the rows are the tokens
            assert probs.shape == rows.shape[:1]
        sent.append(probs.shape[0])
        return token_dispatch(rows, probs)

    def watched_postprocess(rows, probs):
        state = dispatcher.state
        result, tokens_per_expert, result_probs = dispatch_postprocess(rows, probs)
        counts = tokens_per_expert.tolist()
        assert result.shape == (sum(counts), rows.shape[1]) and result_probs.shape == (sum(counts),)
        passes.append(Traffic(state.input_splits, state.output_splits, sent.pop(), result.shape[0], counts))
        return result, tokens_per_expert, result_probs

    dispatcher.token_dispatch, dispatcher.dispatch_postprocess = watched_dispatch, watched_postprocess
    return passes


def gradients_of(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradient of every parameter, zeros where it has none; of grouped experts one by one, by Megatron's names."""
    grads = {}
    for name, parameter in layer.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        if name.startswith("experts.linear"):
            grads |= {name.replace("experts.", f"experts.local_experts.{i}."): g.clone() for i, g in enumerate(grad)}
        else:
            grads[name] = grad
    return grads


def run_layer(case: Case, layer: torch.nn.Module) -> dict:
    """Forward and backward of a whole layer on this rank."""
    watched = hasattr(layer, "xmoe") and case in LAYER_CASES
    passes = watch(layer.token_dispatcher) if watched else []
    x, grad = tokens_of(case, torch.distributed.get_rank())
    x.requires_grad_()
    output, _ = layer(x)
    output.backward(grad)
    return {"output": output.detach(), "x": x.grad, "parameters": gradients_of(layer), "traffic": passes}


def run_layers(case: Case) -> dict:
    """A case with Megatron's layer; with ours after it loaded the other's state dict; with ours and grouped experts."""
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from megatron_xmoe.experts import XMoEGroupedMLP
    from megatron_xmoe.layer import XMoELayer

    stock, xmoe = build(case, MoELayer), build(case, XMoELayer)
    xmoe.load_state_dict(stock.state_dict())
    layers = {"stock": stock, "xmoe": xmoe, "grouped": build(case, XMoELayer, XMoEGroupedMLP)}
    return {name: run_layer(case, layer) for name, layer in layers.items()}


@dataclass(frozen=True)
class Routing:
    """A layout, and a map and weights that no router made: rows of a map may be empty, and ranks may have no token."""

    name: str
    ep: int
    experts: int
    topk: int
    lengths: tuple[int, ...] = UNEVEN

    def __str__(self) -> str:
        return f"{self.name}-ep{self.ep}-k{self.topk}"

    @property
    def case(self) -> Case:
        """The layer that serves it."""
        return Case(self.ep, self.experts, self.topk, lengths=self.lengths)


STAGE_CASES = [
    *(Routing("any", ep, 8, 3) for ep in (1, 2, 4)),
    *(Routing("fewer than K", ep, 8, 3) for ep in (1, 2, 4)),
    *(Routing("no route at all", ep, 4, 2) for ep in (1, 4)),
    Routing("a rank without tokens", 4, 8, 2, lengths=(2, 0, 4, 1)),
    Routing("a rank without tokens", 4, 4, 1, lengths=(2, 3, 0, 1)),
    Routing("a rank without tokens", 2, 4, 2, lengths=(0, 3, 1, 0)),
    Routing("a rank without tokens", 1, 2, 1, lengths=(0, 3, 1, 2)),
    Routing("only one rank with tokens", 4, 8, 2, lengths=(0, 0, 5, 0)),
    Routing("no rank with tokens", 4, 8, 2, lengths=(0, 0, 0, 0)),
    Routing("all to one expert", 4, 8, 1),
    Routing("all to the first rank", 4, 8, 2),
    Routing("every expert", 4, 8, 8),
]


def routing_of(case: Routing, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Map [T, E] and weights [T, E] of a rank's tokens."""
    generator = torch.Generator().manual_seed(100 + rank)
    tokens = case.lengths[rank] * B
    scores = torch.rand(tokens, case.experts, generator=generator, dtype=torch.float64)
    routing_map = torch.zeros(tokens, case.experts, dtype=torch.bool)
    if case.name == "all to one expert":
        routing_map[:, 5] = True
    elif case.name == "all to the first rank":
        routing_map[:, :2] = True
    elif case.name != "no route at all":
        routing_map.scatter_(1, scores.topk(case.topk).indices, True)
    if case.name == "fewer than K":
        routing_map &= torch.rand(routing_map.shape, generator=generator) > 0.5
    return routing_map, torch.rand(scores.shape, generator=generator, dtype=torch.float64) * routing_map


def run_stages(layer, x, probs, routing_map) -> torch.Tensor:
    """A layer's stages after the router, as Megatron's forward calls them."""
    rows, row_probs = layer.preprocess(x, probs, routing_map)
    rows, row_probs = layer.dispatch(rows, row_probs)
    output, _ = layer.routed_experts_compute(rows, row_probs)
    return layer.postprocess(layer.combine(output), None)


def run_routing(routing: Routing) -> dict:
    """A case's stages with ready-made routes, with Megatron's experts and with grouped ones."""
    from megatron_xmoe.experts import XMoEGroupedMLP

    return {"xmoe": run_routing_with(routing, None), "grouped": run_routing_with(routing, XMoEGroupedMLP)}


def run_routing_with(routing: Routing, experts: type | None) -> dict:
    """A second pass has begun and ended before the first one's backward."""
    from megatron_xmoe.layer import XMoELayer

    rank = torch.distributed.get_rank()
    layer = build(routing.case, XMoELayer, experts)
    passes = watch(layer.token_dispatcher)
    routing_map, probs = routing_of(routing, rank)
    x, grad = tokens_of(routing.case, rank)
    x, probs = x.requires_grad_(), probs.requires_grad_()
    output = run_stages(layer, x, probs, routing_map)
    other = run_stages(layer, x.detach().flip(0), probs.detach().flip(0), routing_map.flip(0))
    output.backward(grad)
    return {
        "output": output.detach(),
        "other": other.detach(),
        "x": x.grad,
        "probs": probs.grad,
        "parameters": gradients_of(layer),
        "traffic": passes,
        "state": layer.token_dispatcher.state,
    }


def layout_of(case: Case | Routing) -> tuple[int, int, int]:
    """Tensor, expert and expert-tensor parallel size."""
    case = case if isinstance(case, Case) else case.case
    return case.tp, case.ep, case.etp


def run_all(cases: list[Case | Routing]) -> dict:
    """Everything that needs processes, layout by layout: results by case."""
    results = {}
    for (tp, ep, etp), some in groupby(sorted(cases, key=layout_of), key=layout_of):
        with harness.model_parallel(tp=tp, ep=ep, etp=etp):
            for case in some:
                results[case] = run_layers(case) if isinstance(case, Case) else run_routing(case)
    return results


@pytest.fixture(scope="module")
def computed() -> dict:
    """What each rank computed, by case."""
    ranks = harness.run_distributed(run_all, WORLD, [*LAYER_CASES, *MEGATRON_CASES, *STAGE_CASES], timeout=240)
    return {case: [rank[case] for rank in ranks] for case in ranks[0]}


@pytest.mark.parametrize("kind", ["xmoe", "grouped"])
@pytest.mark.parametrize("case", [*LAYER_CASES, *MEGATRON_CASES], ids=str)
def test_layer_is_megatrons(computed, case, kind):
    """Same output, same gradients of the input and of every parameter, on every rank, in fp64."""
    for result in computed[case]:
        stock, xmoe = result["stock"], result[kind]
        assert_close(xmoe["output"], stock["output"])
        assert_close(xmoe["x"], stock["x"])
        assert xmoe["parameters"].keys() == stock["parameters"].keys()
        for name, grad in xmoe["parameters"].items():
            assert_close(grad, stock["parameters"][name])


def collected(case: Case, ranks: list[dict]) -> dict[str, torch.Tensor]:
    """Gradients of the layer's weights summed over the ranks that share them, with all experts, by oracle name."""
    total = {name: torch.zeros_like(weight) for name, weight in weights_of(case).items()}
    for rank, result in enumerate(ranks):
        grads = result["parameters"]
        total["router"] += grads["router.weight"]
        for local in range(case.local):
            expert = rank % case.ep * case.local + local
            for name in ("fc1", "fc2"):
                total[name][expert] += grads[f"experts.local_experts.{local}.linear_{name}.weight"]
        if case.shared:
            for name in ("fc1", "fc2"):
                total[f"shared_{name}"] += grads[f"shared_experts.linear_{name}.weight"]
    return total


def layer_oracle(case: Case):
    """The whole layer for one rank's tokens, as a function of its input and the weights."""

    def layer(x, router, fc1, fc2, shared_fc1, shared_fc2):
        tokens = x.reshape(-1, H)
        probs, routing_map = oracles.router(tokens, router, case.topk, pre_softmax=case.topk == 1)
        output = oracles.moe_layer(tokens, probs, routing_map, experts_of(fc1, fc2))
        if case.shared:
            output = output + torch.stack([oracles.swiglu(token, shared_fc1, shared_fc2) for token in tokens])
        return output.view(x.shape)

    return layer


def experts_of(fc1: torch.Tensor, fc2: torch.Tensor) -> list:
    """Functions of one token."""
    return [lambda token, w1=w1, w2=w2: oracles.swiglu(token, w1, w2) for w1, w2 in zip(fc1, fc2, strict=True)]


@pytest.mark.parametrize("case", [c for c in LAYER_CASES if not (c.tp > 1 and c.shared)], ids=str)
def test_layer_is_the_oracles(computed, case):
    """Output, input gradient and the weights' gradients summed over ranks; Megatron's softmax is in fp32."""
    ranks = [result["xmoe"] for result in computed[case]]
    names, weights = zip(*weights_of(case).items(), strict=True)
    total = {name: torch.zeros_like(weight) for name, weight in weights_of(case).items()}
    for rank, result in enumerate(ranks):
        x, grad = tokens_of(case, rank)
        output, (grad_x, *grads) = oracles.gradients(layer_oracle(case), [x, *weights], grad)
        assert_close(result["output"], output, dtype=torch.float32)
        assert_close(result["x"], grad_x, dtype=torch.float32)
        for name, grad in zip(names, grads, strict=True):
            total[name] += grad
    found = collected(case, ranks)
    if case.forced and case.topk == 1:
        del found["router"]  # the chosen expert's weight is 1 but for less than fp32 can show
    for name, grad in found.items():
        assert_close(grad, total[name], dtype=torch.float32)


@pytest.mark.parametrize("kind", ["xmoe", "grouped"])
@pytest.mark.parametrize("routing", STAGE_CASES, ids=str)
def test_ready_made_routes_are_the_oracles(computed, routing, kind):
    """In fp64: output, gradients of tokens, routing weights and experts; also with another pass in between."""
    case, ranks = routing.case, [result[kind] for result in computed[routing]]
    weights = weights_of(case)
    total = {name: torch.zeros_like(weights[name]) for name in ("fc1", "fc2")}
    for rank, result in enumerate(ranks):
        x, grad = tokens_of(case, rank)
        routing_map, probs = routing_of(routing, rank)

        def layer(x, probs, fc1, fc2, chosen=routing_map):
            return oracles.moe_layer(x.reshape(-1, H), probs, chosen, experts_of(fc1, fc2)).view(x.shape)

        inputs = [x, probs, weights["fc1"], weights["fc2"]]
        output, (grad_x, grad_probs, *grads) = oracles.gradients(layer, inputs, grad)
        assert_close(result["output"], output)
        assert_close(result["x"], grad_x)
        assert_close(result["probs"], grad_probs * routing_map)
        other = layer(x.flip(0), probs.flip(0), weights["fc1"], weights["fc2"], routing_map.flip(0))
        assert_close(result["other"], other)
        for name, found in zip(total, grads, strict=True):
            total[name] += found
    found = collected(case, ranks)
    for name, expected in total.items():
        assert_close(found[name], expected)
    assert all(result["state"] is None for result in ranks)


def assert_padding_free(case: Case, maps: list[torch.Tensor], traffic: list[Traffic]) -> None:
    """Every rank sends exactly its routes, and receives exactly those of its experts."""
    for rank, moved in enumerate(traffic):
        group = range(rank // case.ep * case.ep, rank // case.ep * case.ep + case.ep)
        mine = slice((rank - group.start) * case.local, (rank - group.start + 1) * case.local)
        to_each = maps[rank].view(-1, case.ep, case.local).sum(dim=(0, 2)).tolist()
        from_each = [int(maps[source][:, mine].sum()) for source in group]
        if case.ep == 1:  # nothing is sent, and the host does not ask for the numbers
            assert moved.input_splits == moved.output_splits == []
        else:
            assert moved.input_splits == to_each and moved.sent_rows == int(maps[rank].sum())
            assert moved.output_splits == from_each
        assert moved.received_rows == sum(from_each)
        assert moved.tokens_per_expert == sum(maps[source][:, mine].sum(dim=0) for source in group).tolist()


@pytest.mark.parametrize("case", LAYER_CASES, ids=str)
def test_only_routed_rows_travel(computed, case):
    router = weights_of(case)["router"]
    maps = [
        oracles.router(tokens_of(case, rank)[0].reshape(-1, H), router, case.topk, case.topk == 1)[1]
        for rank in range(WORLD)
    ]
    traffic = [result["xmoe"]["traffic"] for result in computed[case]]
    assert all(len(passes) == 1 for passes in traffic)
    assert_padding_free(case, maps, [passes[0] for passes in traffic])
    sent = sum(passes[0].sent_rows for passes in traffic)
    assert sent == sum(case.lengths) * B * case.topk


@pytest.mark.parametrize("routing", STAGE_CASES, ids=str)
def test_only_ready_made_routes_travel(computed, routing):
    maps = [routing_of(routing, rank)[0] for rank in range(WORLD)]
    for i in range(2):
        traffic = [result["xmoe"]["traffic"][i] for result in computed[routing]]
        assert_padding_free(routing.case, maps, traffic)


def test_cases_are_what_they_say(computed):
    """Some ranks really receive nothing, and some really send nothing."""
    received = [result["xmoe"]["traffic"][0].received_rows for result in computed[Case(4, 8, 2, forced=(0, 1))]]
    assert received == [sum(UNEVEN) * B * 2, 0, 0, 0]
    case = next(c for c in STAGE_CASES if c.name == "a rank without tokens" and c.ep == 4)
    traffic = computed[case][1]["xmoe"]["traffic"][0]
    assert traffic.sent_rows == 0 < traffic.received_rows
