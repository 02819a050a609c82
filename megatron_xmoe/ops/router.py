"""The router's choice and weights with its load-balancing losses, differentiable: two launches there, one back.

For tensors where Triton runs; Megatron's own functions are the same in plain torch. Letters: T tokens, B sequences, K
experts per token, E experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from megatron_xmoe.kernels.registry import why_not_triton


@dataclass(frozen=True)
class RoutingRule:
    """How experts are chosen and weighed, in the words of Megatron's options."""

    topk: int
    experts: int
    score_function: str  # softmax, sigmoid or sqrtsoftplus
    pre_softmax: bool = False
    scaling: float = 1.0
    groups: int = 1
    group_topk: int = 1

    @cached_property
    def constants(self) -> dict[str, Any]:
        """Those of the kernels."""
        from megatron_xmoe.kernels.triton_router import SCORES

        return {
            "K": self.topk,
            "SCORE": SCORES[self.score_function],
            "PRE": self.pre_softmax,
            "SCALE": self.scaling,
            "GROUPS": self.groups,
            "GROUP_TOPK": self.group_topk,
            "GROUP_BEST": self.topk // self.group_topk,
        }

    def obstacle(self, device_type: str, pinned: str = "auto") -> str:
        """Why it has no kernel here, or ''. Args: pinned, a backend that is about to be pinned (--xmoe-kernels)."""
        reason = why_not_triton(device_type, pinned=pinned)
        if reason:
            return reason
        from megatron_xmoe.kernels.triton_router import MAX_SLOTS, slots

        if slots(self.experts, self.groups) > MAX_SLOTS:
            return f"{self.experts} experts are more than its kernels take, {MAX_SLOTS}"
        of_group, best = self.experts // self.groups, self.topk // self.group_topk
        if not 1 <= best <= of_group or self.topk > self.group_topk * of_group:
            return f"{self.group_topk} groups of {of_group} experts have no place for {self.topk} experts of a token"
        return ""


@dataclass(frozen=True)
class Balance:
    """A load-balancing loss: weight / total**2 * sum over experts of their routes times the sum of their scores."""

    weight: float

    total: int
    """Tokens that the routes are of; of one sequence, if each is balanced by itself."""

    per_sequence: bool = False
    """Each sequence is balanced by itself, and the losses are added up."""

    elsewhere: Callable[[Tensor], tuple[Tensor, int | Tensor]] | None = None
    """Gives routes and `total` in place of this rank's, from its own routes [B or 1, E] int64, which it may change."""


def route(
    logits: Tensor,
    rule: RoutingRule,
    bias: Tensor | None = None,
    padding: Tensor | None = None,
    added: Tensor | None = None,
    sequences: int = 1,
    balances: Sequence[Balance] = (),
) -> tuple[Tensor, ...]:
    """Experts of each token, their weights, and the losses.

    Args:
        logits: [T, E], the T / B positions of the sequences one after the other.
        bias: [E], added to the scores for the choice only; not for softmax.
        padding: [T] bool, True for tokens that losses and counts leave out.
        added: [E] int32, to which each expert's routes are added in place.
        sequences: B, where some loss is per sequence.
        balances: at most three.

    Returns:
        probs [T, E] in the logits' dtype; routing_map [T, E] bool; a loss for each of `balances`, fp32.
    """
    return _Route.apply(logits, rule, bias, padding, added, sequences, balances)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, rule, bias, padding, added, sequences, balances):
        from megatron_xmoe.kernels import triton_router

        logits = logits.contiguous()
        if padding is not None:
            padding = padding.contiguous().view(torch.uint8)
        tables = (bias, padding, added, rule.constants, sequences, bool(balances))
        probs, chosen, sums, counts = triton_router.route(logits, *tables)
        slopes, losses = None, []
        if balances:
            slopes = torch.empty(len(balances), sequences, rule.experts, dtype=torch.float32, device=logits.device)
        for slope, balance in zip(slopes if balances else (), balances, strict=True):
            losses.append(_loss(sums, counts, balance, slope))
        routing_map = chosen.view(torch.bool)
        ctx.save_for_backward(logits, routing_map, padding, slopes)
        ctx.rule, ctx.sequences = rule, sequences
        ctx.mark_non_differentiable(routing_map)
        return probs, routing_map, *losses

    @staticmethod
    def backward(ctx, grad_probs, _, *grad_losses):
        from megatron_xmoe.kernels import triton_router

        logits, routing_map, padding, slopes = ctx.saved_tensors
        grad_logits = triton_router.route_backward(
            *(logits, routing_map.view(torch.uint8), padding, grad_probs.contiguous(), slopes, grad_losses),
            *(ctx.rule.constants, ctx.sequences),
        )
        return grad_logits, None, None, None, None, None, None


def _loss(sums: Tensor, counts: Tensor, balance: Balance, slope: Tensor) -> Tensor:
    """One loss from the programs' tables [P, B, E]; writes its slope [B, E]."""
    from megatron_xmoe.kernels import triton_balance

    target, total = slope, balance.total
    if not balance.per_sequence and len(slope) > 1:  # all sequences are one
        sums, counts, target = sums.flatten(0, 1).unsqueeze(1), counts.flatten(0, 1).unsqueeze(1), slope[:1]
    if balance.elsewhere is not None:
        routes, total = balance.elsewhere(triton_balance.count(counts))
        counts = routes.unsqueeze(0)
    loss = triton_balance.balance(sums, counts, total, balance.weight, target)
    if target is not slope:
        slope[1:] = target
    return loss
