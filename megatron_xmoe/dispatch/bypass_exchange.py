"""The communication of redundancy bypassing, both ways, and its gradients (paper, section 4.2)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_xmoe.dispatch import bypass_plan
from megatron_xmoe.dispatch.bypass_plan import Found, Plan
from megatron_xmoe.dispatch.exchange import Pending, start_exchange
from megatron_xmoe.dispatch.layout import Splits
from megatron_xmoe.ops import gather_sum
from megatron_xmoe.ops.bypass import Numbered
from megatron_xmoe.ops.raw_bits import wire_dtype
from megatron_xmoe.ops.rows import take_rows


@dataclass(frozen=True)
class Links:
    """What a rank is connected by."""

    group: ProcessGroup
    """The expert-parallel group."""

    node: ProcessGroup
    """Its ranks on this node, ascending."""

    guard: bool
    """Exchanges of nothing are avoided, see dispatch.exchange."""

    def direct(self, output: Tensor, rows: Tensor, splits: Splits) -> Pending:
        """Start an exchange over the whole group."""
        return start_exchange(output, rows, splits.received, splits.sent, self.group, self.guard)

    def inside(self, output: Tensor, rows: Tensor, splits: Splits) -> Pending:
        """Start an exchange inside the node."""
        return start_exchange(output, rows, splits.received, splits.sent, self.node, self.guard)


@dataclass
class Underway:
    """A dispatch whose first exchanges were started."""

    meta: Pending
    """Indices and routing weights."""

    rows: Tensor
    """Rows at the experts, as far as they arrived."""

    direct: Pending


@dataclass
class Arrived:
    """A dispatch that is done."""

    rows: Tensor
    """[M, H] what the experts compute."""

    weights: Tensor
    """[M] their routing weights."""

    found: Found


@torch.no_grad()
def start_dispatch(tokens: Tensor, weights: Tensor, copies: Numbered, plan: Plan, links: Links) -> Underway:
    """Send the indices and routing weights of all routes; then pilots to other nodes and copies inside this one.

    Args: tokens [T, H]; weights [N] of the routes in expert order; what was chosen for them.
    """
    outgoing = bypass_plan.write_meta(weights.to(wire_dtype(weights.dtype)), copies, plan)
    meta = links.direct(outgoing.new_empty(sum(plan.counts.meta.received)), outgoing, plan.counts.meta)
    return Underway(meta, *_send(tokens, plan, links))


@torch.no_grad()
def finish_dispatch(underway: Underway, plan: Plan, links: Links, dtype: torch.dtype) -> Arrived:
    """Forward what came from other nodes, and give each expert its rows.

    Args: `dtype` of the routing weights.
    """
    tables = plan.there  # made while the metadata is on its way
    meta = underway.meta.wait()
    *lists, pilots = bypass_plan.read_lists(plan, tables, meta)
    *routes, of_routes, weights = bypass_plan.read_routes(plan, tables, meta)
    rows = _forward(underway.rows, underway.direct, pilots, of_routes, plan, links)
    return Arrived(rows, weights.to(dtype), Found(*routes, *lists))


def spread(tokens: Tensor, plan: Plan, found: Found, links: Links) -> Tensor:
    """Rows [M, H] of the routes from rows of the tokens [T, H], with the metadata of an earlier dispatch."""
    rows, direct = _send(tokens, plan, links)
    pilots, of_routes = bypass_plan.rows_to_forward(plan, found), bypass_plan.rows_of_routes(plan, found)
    return _forward(rows, direct, pilots, of_routes, plan, links)


def _send(tokens: Tensor, plan: Plan, links: Links) -> tuple[Tensor, Pending]:
    """Rows at the experts, of which those of this rank's tokens [T, H] are there, and the exchange of direct ones."""
    first, forwarded, end = plan.layout.at_experts
    rows = tokens.new_empty(end, tokens.shape[1])
    direct = links.direct(rows[first:forwarded], take_rows(tokens, plan.sources), plan.layout.direct)
    rows[:first] = tokens
    return rows, direct


def _forward(
    rows: Tensor, direct: Pending, pilots: Tensor, of_routes: Tensor, plan: Plan, links: Links
) -> Tensor:
    """Rows [M, H] at `of_routes` [M], once the direct ones came and the `pilots` [F] were forwarded inside the node."""
    _, forwarded, end = plan.layout.at_experts
    direct.wait()
    links.inside(rows[forwarded:end], take_rows(rows[:forwarded], pilots), plan.layout.inside).wait()
    return take_rows(rows, of_routes)


def collect(
    rows: Tensor, plan: Plan, found: Found, links: Links, weights: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Sums [T, H] over the routes of each token, first at the experts, then in the node, then at the token's rank.

    Args: rows [M, H] of the routes; numbers [M] of the routes, which return to the tokens' ranks as they are.

    Returns:
        [T, H]; [N] the numbers of the routes that this rank sent, None without `weights`.
    """
    tables, layout = (
        (plan.there, plan.layout) if weights is None else (plan.gradient, plan.layout_with_weights)
    )
    _, forwarded, end = layout.at_experts
    back, total = layout.at_tokens
    summed = gather_sum(rows, bypass_plan.routes_of_rows(plan, found, tables, end))
    gathered = rows.new_empty(total, rows.shape[1])
    returned = links.inside(gathered[forwarded:back], summed[forwarded:], layout.inside.back)
    gathered[:forwarded] = summed[:forwarded]
    parts = bypass_plan.parts_of_sums(plan, found, tables, layout)
    returned.wait()
    sums = gather_sum(gathered[:back], parts)
    if weights is not None:
        bypass_plan.return_weights(plan, found, weights, sums)
    returned = links.direct(gathered[back:], sums, layout.direct.back)
    of_tokens = bypass_plan.tokens_table(plan, tables)
    returned.wait()
    output = gather_sum(gathered, of_tokens)
    if weights is None:
        return output, None
    return output, bypass_plan.returned_weights(plan, gathered[back:])


class Dispatch(torch.autograd.Function):
    """Gradients of a dispatch that was made: tokens [T, H] and weights [N] to rows [M, H] and weights [M]."""

    @staticmethod
    def forward(ctx, tokens, weights, arrived, plan, links):
        ctx.plan, ctx.found, ctx.links = plan, arrived.found, links
        ctx.weights_dtype = weights.dtype
        return arrived.rows, arrived.weights

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_rows, grad_weights):
        grad_weights = grad_weights.to(wire_dtype(grad_weights.dtype))
        tokens, weights = collect(grad_rows, ctx.plan, ctx.found, ctx.links, grad_weights)
        return tokens, weights.to(ctx.weights_dtype), None, None, None


class Combine(torch.autograd.Function):
    """Rows [M, H] of the routes to their sums [T, H] for each token."""

    @staticmethod
    def forward(ctx, rows, plan, found, links):
        ctx.plan, ctx.found, ctx.links = plan, found, links
        return collect(rows, plan, found, links)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return spread(grad, ctx.plan, ctx.found, ctx.links), None, None, None
