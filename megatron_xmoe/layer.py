"""X-MoE's Mixture-of-Experts layer."""

import copy

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_xmoe.config import XMoEConfig
from megatron_xmoe.dispatch import AllToAllDispatcher
from megatron_xmoe.experts import XMoEGroupedMLP
from megatron_xmoe.metrics import count_routes
from megatron_xmoe.routing import BestOfGroup, raw_logits


class XMoELayer(MoELayer):
    """Megatron's MoELayer with a padding-free dispatcher.

    Router, shared experts, losses and the stages of the forward pass are Megatron's own, and the experts are whatever
    the spec says. Distributed checkpoints have the same keys and shapes, so they move between the two.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        name: str | None = None,
        xmoe: XMoEConfig | None = None,
    ):
        """Args are those of MoELayer, and `xmoe`, the options of X-MoE (defaults if None)."""
        if pg_collection is None:
            pg_collection = get_default_pg_collection()
        super().__init__(
            config=config,
            submodules=submodules,
            layer_number=layer_number,
            pg_collection=pg_collection,
            is_mtp_layer=is_mtp_layer,
            name=name,
        )
        self.xmoe = xmoe or XMoEConfig(moe_backend="xmoe")
        if self.xmoe.xmoe_group_score == "max":
            self.router.router_replay = BestOfGroup()
        # MoELayer builds one of its own dispatchers and has no seam for another
        self.token_dispatcher = AllToAllDispatcher(
            self.num_local_experts, config, pg_collection, self.xmoe.xmoe_min_capacity
        )
        if self.shared_expert_overlap:
            self.token_dispatcher.set_shared_experts(self.shared_experts)
        if config.moe_expert_capacity_factor is not None:
            # the dispatcher drops while it sorts, so the router, whose dropping is O(T * E), must not
            self.router.config = copy.copy(self.router.config)
            self.router.config.moe_expert_capacity_factor = None

    def route(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Megatron's routing; also counts each expert's routes where that was asked for.

        Args: hidden_states [S, B, H]; padding_mask [S, B] bool. Returns probs [T, E] and routing_map [T, E] bool.
        """
        probs, routing_map = super().route(hidden_states, padding_mask)
        if self.xmoe.xmoe_combine_weights == "logits":
            probs = raw_logits(self.router, hidden_states, probs, routing_map)
        number = self.layer_number
        if self.is_mtp_layer:  # these are numbered anew
            number += self.config.num_layers
        count_routes(number, routing_map)
        return probs, routing_map

    def preprocess(self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor) -> tuple[Tensor, Tensor]:
        """Megatron's stage before the exchange; with capacity dropping, the router's expert bias sees what is kept.

        Args: hidden_states [S, B, H]; probs [T, E]; routing_map [T, E] bool. Returns rows [N, H] and weights [N].
        """
        rows, weights = super().preprocess(hidden_states, probs, routing_map)
        drops = self.config.moe_expert_capacity_factor is not None
        if drops and self.router.enable_expert_bias and torch.is_grad_enabled():
            # Megatron counts after it has dropped; here the router has counted all, under the same condition
            kept = self.token_dispatcher.state.kept_per_expert
            self.router.local_tokens_per_expert += kept - routing_map.sum(dim=0)
        return rows, weights

    def routed_experts_compute(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        """Megatron's stage of the experts; grouped experts take their rows where the dispatcher has them.

        Args: hidden_states and probs as dispatched. Returns the experts' outputs for `combine`, and no bias.
        """
        if not isinstance(self.experts, XMoEGroupedMLP):
            return super().routed_experts_compute(hidden_states, probs)
        output, _ = self.experts(*self.token_dispatcher.expert_rows(hidden_states, probs))
        return self.token_dispatcher.combine_preprocess(output), None
