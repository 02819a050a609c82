"""Passes through both dispatchers with ready-made routes, on any placement of the ranks on nodes, and what they sent.

The placement is said, not found out, so all of them run in one set of processes.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest import mock

import oracles
import torch
import torch.distributed as dist

B = 2


@dataclass(frozen=True)
class Passage:
    """Tokens, routes and placement."""

    node_of: tuple[int, ...]
    experts: int
    topk: int
    lengths: tuple[int, ...]
    """Sequence length of each rank, of two sequences."""

    kind: str = "any"
    """Of the routes: any, fewer than K, none, all to one expert, all to the first rank, all abroad."""

    hidden: int = 12
    dtype: torch.dtype = torch.float64
    probs_dtype: torch.dtype | None = None
    """Of the routing weights, if not that of the tokens."""

    pilot: str = "balanced"
    guard: bool = False
    capacity: float | None = None

    def __str__(self) -> str:
        extras = [self.kind] * (self.kind != "any") + [str(self.dtype)[6:]] * (self.dtype != torch.float64)
        extras += [f"probs-{str(self.probs_dtype)[6:]}"] * (self.probs_dtype is not None)
        extras += [f"h{self.hidden}"] * (self.hidden != 12) + [self.pilot] * (self.pilot != "balanced")
        extras += ["guard"] * self.guard
        extras += [f"capacity{self.capacity}"] * (self.capacity is not None)
        lengths = "".join(map(str, self.lengths))
        return "-".join(["".join(map(str, self.node_of)), f"e{self.experts}", f"k{self.topk}", lengths, *extras])

    @property
    def local(self) -> int:
        """Experts of a rank."""
        return self.experts // len(self.node_of)

    def node_of_expert(self, expert: int) -> int:
        """The node that computes it."""
        return self.node_of[expert // self.local]


def weights_of(case: Passage) -> torch.Tensor:
    """[E, H, H]: matrix of each expert, fp64."""
    generator = torch.Generator().manual_seed(7)
    shape = (case.experts, case.hidden, case.hidden)
    return torch.randn(shape, generator=generator, dtype=torch.float64) / case.hidden**0.5


def input_of(case: Passage, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens [S, B, H], map [T, E], weights [T, E] and gradient of the output [S, B, H], fp64."""
    generator = torch.Generator().manual_seed(100 + rank)
    length = case.lengths[rank]
    x, grad = torch.randn(2, length, B, case.hidden, generator=generator, dtype=torch.float64)
    scores = torch.rand(length * B, case.experts, generator=generator, dtype=torch.float64)
    if case.kind == "all abroad":
        home = torch.tensor([case.node_of_expert(e) == case.node_of[rank] for e in range(case.experts)])
        scores = scores - 2.0 * home
    routing_map = torch.zeros(length * B, case.experts, dtype=torch.bool)
    if case.kind == "all to one expert":
        routing_map[:, case.experts // 2] = True
    elif case.kind == "all to the first rank":
        routing_map[:, : case.local] = True
    elif case.kind != "none":
        routing_map.scatter_(1, scores.topk(case.topk).indices, True)
    if case.kind == "fewer than K":
        routing_map &= torch.rand(routing_map.shape, generator=generator) > 0.5
    probs = torch.rand(scores.shape, generator=generator, dtype=torch.float64) * routing_map
    return x, routing_map, probs, grad


def oracle(case: Passage, ranks: list[tuple]) -> tuple[list, torch.Tensor]:
    """Per rank (output, gradient of tokens, of weights), and the matrices' gradient summed over ranks."""
    total, results = torch.zeros_like(weights_of(case)), []
    for x, routing_map, probs, grad in ranks:

        def layer(x, probs, matrices, chosen=routing_map):
            experts = [lambda token, a=a: torch.tanh(a @ token) for a in matrices]
            return oracles.moe_layer(x.reshape(-1, x.shape[-1]), probs, chosen, experts).view(x.shape)

        output, (grad_x, grad_probs, grads) = oracles.gradients(layer, [x, probs, weights_of(case)], grad)
        total += grads
        results.append((output, grad_x, grad_probs * routing_map))
    return results, total


@dataclass
class Call:
    """One exchange."""

    group: tuple[int, ...]
    """Its ranks, as global ones."""

    sent: list[int] | None
    """Rows for each, None if all alike."""

    shape: tuple[int, ...]
    received_rows: int


@contextmanager
def listening() -> Iterator[tuple[list[Call], list[str]]]:
    """Notes all exchanges, and all transfers to the host."""
    calls, transfers = [], []
    exchange = dist.all_to_all_single

    def noted(output, rows, output_splits=None, input_splits=None, group=None, async_op=False):
        ranks = tuple(dist.get_process_group_ranks(group))
        calls.append(Call(ranks, input_splits, tuple(rows.shape), output.shape[0]))
        return exchange(output, rows, output_splits, input_splits, group=group, async_op=async_op)

    def noting(name):
        original = getattr(torch.Tensor, name)

        def noted(self, *args, **kwargs):
            transfers.append(name)
            return original(self, *args, **kwargs)

        return mock.patch.object(torch.Tensor, name, noted)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(dist, "all_to_all_single", noted))
        for name in ("cpu", "nonzero", "numpy"):
            stack.enter_context(noting(name))
        yield calls, transfers


def counting_tables() -> mock.MagicMock:
    """Counts the tables that redundancy bypassing makes on the host."""
    from megatron_xmoe.dispatch.bypass_plan import Plan

    return mock.patch.object(Plan, "_on_device", autospec=True, side_effect=Plan._on_device)


def dispatcher_of(case: Passage, kind: str, rank: int):
    """The plain dispatcher or the bypassing one, for the whole world as one expert-parallel group."""
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_xmoe.dispatch import AllToAllDispatcher, RedundancyBypassDispatcher
    from megatron_xmoe.parallel_state import NodeTopology

    class Groups:
        ep = parallel_state.get_expert_model_parallel_group()
        expt_tp = parallel_state.get_expert_tensor_parallel_group()
        tp_ep = parallel_state.get_expert_tensor_and_model_parallel_group()

    config = TransformerConfig(
        num_layers=1, hidden_size=case.hidden, num_attention_heads=1, num_moe_experts=case.experts,
        moe_router_topk=case.topk, expert_model_parallel_size=len(case.node_of), add_bias_linear=False,
        moe_ffn_hidden_size=8, moe_token_dispatcher_type="alltoall", moe_expert_capacity_factor=case.capacity,
        moe_router_load_balancing_type="none", moe_router_pre_softmax=True,
    )  # fmt: skip
    arguments = case.local, config, Groups, NodeTopology(case.node_of, rank, "said", Groups.ep), 0, case.guard
    if kind == "rbd":
        dispatcher = RedundancyBypassDispatcher(*arguments, pilot=case.pilot)
    else:
        dispatcher = AllToAllDispatcher(*arguments)
    dispatcher.layer_number = 3
    return dispatcher


def run_pass(case: Passage, dispatcher, rank: int, checkpointed: bool = False) -> dict:
    """Forward and backward through dispatch, experts and combine, in the case's dtype."""
    x, routing_map, probs, grad = input_of(case, rank)
    x, probs = x.to(case.dtype).requires_grad_(), probs.to(case.probs_dtype or case.dtype).requires_grad_()
    matrices = weights_of(case)[rank * case.local : (rank + 1) * case.local].to(case.dtype).requires_grad_()
    noted = {"pilots": []}

    def passing(x, probs, matrices):
        rows, weights = dispatcher.dispatch_preprocess(x, routing_map, probs)
        if hasattr(dispatcher.state, "plan"):
            noted["pilots"].append(dispatcher.state.plan.bins)
            noted["rows"] = dispatcher.state.plan.counts.rows[0]
            noted["traffic"] = dispatcher._traffic(dispatcher.state.plan.counts)
        rows, weights = dispatcher.token_dispatch(rows, weights)
        rows, tokens_per_expert, weights = dispatcher.dispatch_postprocess(rows, weights)
        noted.update(arrived=rows.detach(), weights=weights.detach(), per_expert=tokens_per_expert)
        parts = rows.split(tokens_per_expert.tolist())
        outputs = torch.cat([torch.tanh(part @ a.T) for part, a in zip(parts, matrices, strict=True)])
        outputs = (outputs * weights.unsqueeze(1)).to(case.dtype)
        return dispatcher.combine_postprocess(dispatcher.token_combine(dispatcher.combine_preprocess(outputs)))

    random_state = torch.get_rng_state()
    with listening() as (calls, transfers), counting_tables() as tables:
        if checkpointed:
            output = torch.utils.checkpoint.checkpoint(passing, x, probs, matrices, use_reentrant=False)
        else:
            output = passing(x, probs, matrices)
        noted["forward"] = list(calls), list(transfers), tables.call_count
    with listening() as (calls, transfers), counting_tables() as tables:
        output.backward(grad.to(case.dtype))
        noted["backward"] = list(calls), list(transfers), tables.call_count
    assert torch.equal(random_state, torch.get_rng_state()), "a random state was used"
    assert dispatcher.state is None or checkpointed
    return noted | {"output": output.detach(), "x": x.grad, "probs": probs.grad, "matrices": matrices.grad}


def run_passages(
    cases: list[Passage], repeated: tuple[Passage, ...] = (), kinds: tuple[str, ...] = ("alltoall", "rbd")
) -> dict:
    """Both dispatchers on this rank, by case; those to repeat also once more, recomputed in the backward pass."""
    import harness

    rank, results = dist.get_rank(), {}
    with harness.model_parallel(ep=dist.get_world_size()):
        for case in cases:
            results[case] = {kind: run_pass(case, dispatcher_of(case, kind, rank), rank) for kind in kinds}
            if case in repeated:
                results[case]["recomputed"] = run_pass(case, dispatcher_of(case, "rbd", rank), rank, checkpointed=True)
    return results
