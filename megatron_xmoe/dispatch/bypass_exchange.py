"""The communication of redundancy bypassing, both ways, and its gradients (paper, section 4.2)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_xmoe.dispatch import bypass_plan
from megatron_xmoe.dispatch.bypass_plan import Found, Plan
from megatron_xmoe.dispatch.bypass_tables import spare_rows
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
    """The expert-parallel group, between nodes."""

    node: ProcessGroup
    """Its ranks on this node, ascending."""

    guard: bool
    """Exchanges of nothing are avoided, see dispatch.exchange."""

    def between(self, output: Tensor, rows: Tensor, splits: Splits) -> Pending:
        """Start an exchange over the whole group."""
        return start_exchange(output, rows, splits.received, splits.sent, self.group, self.guard)

    def inside(self, output: Tensor, rows: Tensor, splits: Splits) -> Pending:
        """Start an exchange inside the node."""
        return start_exchange(output, rows, splits.received, splits.sent, self.node, self.guard)


@dataclass
class Underway:
    """A dispatch whose first exchanges were started."""

    rows: Tensor
    """Rows at the experts, as far as they arrived."""

    between: Pending
    own: Pending


@dataclass
class Arrived:
    """A dispatch that is done."""

    rows: Tensor
    """[M, H] what the experts compute."""

    weights: Tensor
    """[M] their routing weights."""

    found: Found


@torch.no_grad()
def start_dispatch(
    tokens: Tensor, weights: Tensor, copies: Numbered, plan: Plan, links: Links, overlap: bool
) -> Underway:
    """Send pilots to other nodes and copies inside this one, with the indices and routing weights of all routes.

    Args: tokens [T, H]; weights [N] of the routes in expert order; what was chosen for them; whether the copies are
        sent while the pilots are.
    """
    layout = plan.dispatching
    to_nodes = sum(layout.between.sent)
    total = to_nodes + sum(layout.inside[0].sent)
    outgoing = take_rows(tokens, bypass_plan.rows_to_send(plan, plan.out.sends, total))
    bypass_plan.write_meta(outgoing, weights.to(wire_dtype(weights.dtype)), copies, plan)
    first, inside, end = layout.at_experts
    rows = tokens.new_empty(end, tokens.shape[1])
    between = links.between(rows[first:inside], outgoing[:to_nodes], layout.between)
    if not overlap:
        between.wait()
    own_end = inside + sum(layout.inside[0].received)
    own = links.inside(rows[inside:own_end], outgoing[to_nodes:total], layout.inside[0])
    if not overlap:
        own.wait()
    rows[:first] = tokens
    return Underway(rows, between, own)


@torch.no_grad()
def finish_dispatch(underway: Underway, plan: Plan, links: Links, dtype: torch.dtype) -> Arrived:
    """Forward what came from other nodes, and give each expert its rows.

    Args: `dtype` of the routing weights.
    """
    rows, layout = underway.rows, plan.dispatching
    _, inside, end = layout.at_experts
    own_end = inside + sum(layout.inside[0].received)
    tables = plan.there  # made while the rows are on their way
    underway.between.wait()
    *lists, pilots = bypass_plan.read_lists(plan, tables, rows)
    forwarded = links.inside(rows[own_end:end], take_rows(rows[:inside], pilots), layout.inside[1])
    underway.own.wait()
    *routes, index, weights = bypass_plan.read_routes(plan, tables, rows)
    forwarded.wait()
    return Arrived(take_rows(rows, index), weights.to(dtype), Found(*routes, *lists))


def spread(tokens: Tensor, plan: Plan, found: Found, links: Links) -> Tensor:
    """Rows [M, H] of the routes from rows of the tokens [T, H], with the metadata of an earlier dispatch."""
    tables = plan.back
    layout = tables.layout
    _, inside, back, total = layout.at_tokens
    index = bypass_plan.rows_to_send(plan, tables.sends, total)
    first, _, end = layout.at_experts
    rows = tokens.new_empty(end, tokens.shape[1])
    between = links.between(rows[first:inside], take_rows(tokens, index[back:total]), layout.between)
    rows[:first] = tokens
    bypass_plan.add_forwarded(index, plan, found)
    of_routes = bypass_plan.rows_of_routes(plan, found)
    between.wait()
    links.inside(rows[inside:], take_rows(rows[:inside], index[inside:back]), layout.inside[0]).wait()
    return take_rows(rows, of_routes)


def collect(
    rows: Tensor, plan: Plan, found: Found, links: Links, weights: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Sums [T, H] over the routes of each token, first at the experts, then in the node, then at the token's rank.

    Args: rows [M, H] of the routes; numbers [M] of the routes, which return to the tokens' ranks as they are.

    Returns:
        [T, H]; [N] the numbers of the routes that this rank sent, None without `weights`.
    """
    tables = plan.back if weights is None else plan.back_with_weights
    layout = tables.layout
    first, inside, end = layout.at_experts
    _, _, back, total = layout.at_tokens
    summed = gather_sum(rows, bypass_plan.routes_of_rows(plan, found, tables, end + spare_rows(plan.counts)))
    if weights is not None:
        bypass_plan.return_weights(plan, found, weights, summed, abroad=False)
    gathered = rows.new_empty(total, rows.shape[1])
    returned = links.inside(gathered[inside:back], summed[inside:end], layout.inside[0].back)
    gathered[:inside] = summed[:inside]
    parts = bypass_plan.parts_of_pilots(plan, found, tables)
    returned.wait()
    pilots = gather_sum(gathered[:back], parts)
    if weights is not None:
        bypass_plan.return_weights(plan, found, weights, pilots, abroad=True)
    returned = links.between(gathered[back:], pilots[: inside - first], layout.between.back)
    of_tokens = bypass_plan.tokens_table(plan, tables)
    returned.wait()
    sums = gather_sum(gathered, of_tokens)
    if weights is None:
        return sums, None
    return sums, bypass_plan.returned_weights(plan, gathered)


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
