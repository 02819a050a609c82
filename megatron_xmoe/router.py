"""Megatron's router, with choice, weights and load-balancing losses in a few kernels: `--moe-router-fusion`.

Megatron's own fusion takes functions of Transformer Engine. One by one its unfused functions make about forty launches
per layer, which cost the host more time than the GPU needs to work on them.
"""

from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_xmoe.config import XMoEConfig
from megatron_xmoe.ops.router import Balance, RoutingRule, route


@dataclass(frozen=True)
class _Loss:
    """One of Megatron's load-balancing losses."""

    balance: Balance
    logged: dict
    """Arguments of Megatron's attach_and_log_load_balancing_loss."""


class FusedRouter(TopKRouter):
    """Megatron's router with fused routing; gate, expert bias, z-loss, logging and checkpoints are Megatron's.

    Among experts with equal scores it takes the lowest, where Megatron takes any.
    """

    def __init__(self, config, *args, xmoe: XMoEConfig | None = None, **kwargs):
        """Args are those of TopKRouter, and `xmoe`, the options of X-MoE (defaults if None).

        Raises:
            ValueError: a way of routing that has no kernel, or Triton cannot run here.
        """
        xmoe = xmoe or XMoEConfig(moe_backend="xmoe")
        reason = why_not_fused(config, config.num_moe_experts, xmoe)
        if reason:
            raise ValueError(f"--moe-router-fusion cannot be used: {reason}. Fix: leave it out")
        super().__init__(config, *args, **kwargs)
        self.rule = _rule(config, config.num_moe_experts)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Megatron's stage after the gate: experts and their weights, and losses attached to the weights.

        Args: logits [S, B, E]; padding_mask [S, B] bool, True for padding. Returns probs and routing_map, [T, E].
        """
        length, sequences, experts = logits.shape
        logits = logits.view(-1, experts)
        padding = None if padding_mask is None else padding_mask.reshape(-1)
        logits = self.apply_z_loss(logits, padding_mask=padding)
        losses = []
        if self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled():
            losses = self._losses(length, sequences, padding)
        if not any(loss.balance.per_sequence for loss in losses):
            sequences = 1
        counts = None
        if self.enable_expert_bias and torch.is_grad_enabled():
            counts = torch.zeros(experts, dtype=torch.int32, device=logits.device)
        probs, routing_map, *values = route(
            logits,
            self.rule,
            bias=self.expert_bias if self.score_function != "softmax" else None,
            padding=padding,
            added=counts,
            sequences=sequences,
            balances=[loss.balance for loss in losses],
        )
        if counts is not None:
            self.local_tokens_per_expert += counts
        for loss, value in zip(losses, values, strict=True):
            probs = self.attach_and_log_load_balancing_loss(probs, aux_loss=value, **loss.logged)
        return probs, routing_map

    def _losses(self, length: int, sequences: int, padding: Tensor | None) -> list[_Loss]:
        """Those that the options ask for, in Megatron's order."""
        found = []
        for kind, name, group in (
            ("aux_loss", "load_balancing_loss", self.tp_cp_group),
            ("seq_aux_loss", "seq_load_balancing_loss", self.tp_cp_group),
            ("global_aux_loss", "global_load_balancing_loss", self.tp_dp_cp_group),
        ):
            coefficient = self.get_aux_loss_coeff(kind)
            if coefficient == 0:
                continue
            per_sequence = kind == "seq_aux_loss"
            parts = sequences if per_sequence else 1  # the loss is their mean
            logged = {
                "aux_loss_coeff": coefficient,
                "aux_loss_name": name,
                "reduce_group": group,
                "needs_dp_avg": kind != "global_aux_loss",
                "valid_token_count": length * sequences,
            }
            tokens = length * sequences // parts
            everywhere = None
            if group.size() > 1 or padding is not None or kind == "global_aux_loss":
                everywhere = partial(self._everywhere, kind, group, tokens, logged if padding is not None else None)
            weight = coefficient * self.rule.experts / (self.rule.topk * parts)
            found.append(_Loss(Balance(weight, tokens, per_sequence, everywhere), logged))
        return found

    def _everywhere(
        self, kind: str, group: torch.distributed.ProcessGroup, tokens: int, padded: dict | None, routes: Tensor
    ) -> tuple[Tensor, int | Tensor]:
        """The routes [B or 1, E] that a loss takes, and the number of tokens that they are of, from this rank's.

        Args: kind of the loss; group that it is of; tokens of this rank, of one sequence where each is balanced by
            itself; with padding, where the number of valid tokens goes.
        """
        routes = reduce_from_tensor_model_parallel_region(routes, group)
        total = tokens * group.size()
        if padded is not None:
            total = routes.sum() / (self.rule.topk * len(routes))
            padded["valid_token_count"] = total * len(routes)  # the group's, as in Megatron, which sums in place
        if kind == "global_aux_loss":
            self.global_tokens_per_expert += routes[0]
            self.ga_steps += 1
            routes = (self.global_tokens_per_expert / self.ga_steps).unsqueeze(0)
        return routes, total


def why_not_fused(options, experts: int, xmoe: XMoEConfig) -> str:
    """Why the router's kernels do not serve these options on this machine, or ''.

    Args:
        options: Megatron's configuration or arguments, whose names for the router are the same.
        experts: E.
        xmoe: the options of X-MoE.
    """
    if xmoe.xmoe_router_fusion == "off":
        return "--xmoe-router-fusion off"
    balancing = options.moe_router_load_balancing_type
    for name in ("sinkhorn", "quantile_balancing"):
        if name in ([balancing] if isinstance(balancing, str) else balancing):
            return f"it has no kernel for --moe-router-load-balancing-type {name}"
    if options.moe_enable_routing_replay:
        return "it has no kernel for --moe-enable-routing-replay"
    if xmoe.xmoe_group_score != "sum":
        return f"it has no kernel for --xmoe-group-score {xmoe.xmoe_group_score}"
    return _rule(options, experts).obstacle("cuda" if torch.cuda.is_available() else "cpu", xmoe.xmoe_kernels)


def _rule(options, experts: int) -> RoutingRule:
    return RoutingRule(
        topk=options.moe_router_topk,
        experts=experts,
        score_function=options.moe_router_score_function,
        pre_softmax=options.moe_router_pre_softmax,
        scaling=options.moe_router_topk_scaling_factor or 1.0,
        groups=(options.moe_router_num_groups or 1) if options.moe_router_group_topk else 1,
        group_topk=options.moe_router_group_topk or 1,
    )
