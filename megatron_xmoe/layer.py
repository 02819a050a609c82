"""X-MoE's Mixture-of-Experts layer."""

import copy
from dataclasses import replace
from functools import partial

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_xmoe.config import XMoEConfig
from megatron_xmoe.dispatch import AllToAllDispatcher, RedundancyBypassDispatcher
from megatron_xmoe.dispatch.base import PaddingFreeDispatcher
from megatron_xmoe.dispatch.choice import dispatcher_for
from megatron_xmoe.experts import XMoEGroupedMLP
from megatron_xmoe.metrics import count_routes
from megatron_xmoe.parallel_state import node_topology
from megatron_xmoe.profiling import profiled
from megatron_xmoe.routing import BestOfGroup, raw_logits
from megatron_xmoe.sequence_shard import BlockSequence, block_mode
from megatron_xmoe.shared_experts import ReplicatedSharedExperts


@profiled(route="gate", routed_experts_compute="experts")
class XMoELayer(MoELayer):
    """Megatron's MoELayer with a padding-free dispatcher, and with sequence sharding under tensor parallelism.

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
        """Args are those of MoELayer, and `xmoe`, the options of X-MoE (defaults if None).

        Raises:
            ValueError: Megatron's overlap of expert-parallel communication, or options that cannot work here.
        """
        if config.overlap_moe_expert_parallel_comm:
            raise ValueError(
                "--overlap-moe-expert-parallel-comm frees what X-MoE's layer needs for its backward pass: leave it out"
            )
        if pg_collection is None:
            pg_collection = get_default_pg_collection()
        xmoe = xmoe or XMoEConfig(moe_backend="xmoe")
        tensor_size = pg_collection.tp.size()
        mode, _ = block_mode(
            xmoe.xmoe_sequence_shard, tensor_size, config.sequence_parallel, pg_collection.expt_tp.size()
        )
        if xmoe.xmoe_shared_expert == "sequence" and tensor_size > 1 and config.moe_shared_expert_intermediate_size:
            submodules = replace(submodules, shared_experts=_replicated(submodules.shared_experts, mode))
        super().__init__(
            config=config,
            submodules=submodules,
            layer_number=layer_number,
            pg_collection=pg_collection,
            is_mtp_layer=is_mtp_layer,
            name=name,
        )
        self.xmoe = xmoe
        self.sequence = BlockSequence(mode, pg_collection)
        if self.xmoe.xmoe_group_score == "max":
            self.router.router_replay = BestOfGroup()
        # MoELayer builds one of its own dispatchers and has no seam for another
        self.token_dispatcher = self._build_dispatcher(pg_collection)
        self.token_dispatcher.copied_to_shards = self.sequence.copied_to_shards
        self.token_dispatcher.layer_number = self._number_in_model
        if self.shared_expert_overlap:
            self.token_dispatcher.set_shared_experts(self.shared_experts)
        if config.moe_expert_capacity_factor is not None:
            # the dispatcher drops while it sorts, so the router, whose dropping is O(T * E), must not
            self.router.config = copy.copy(self.router.config)
            self.router.config.moe_expert_capacity_factor = None

    def _build_dispatcher(self, pg_collection: ProcessGroupCollection) -> PaddingFreeDispatcher:
        xmoe, config = self.xmoe, self.config
        topology = node_topology(pg_collection.ep, xmoe.xmoe_ranks_per_node)
        choice = dispatcher_for(
            xmoe.xmoe_dispatcher, topology.node_of, config.moe_router_topk, config.num_moe_experts
        )
        guard = {"auto": None, "on": True, "off": False}[xmoe.xmoe_guard_empty_alltoall]
        arguments = (self.num_local_experts, config, pg_collection, topology, xmoe.xmoe_min_capacity, guard)
        if choice.dispatcher == "rbd":
            return RedundancyBypassDispatcher(
                *arguments, pilot=xmoe.xmoe_pilot, overlap=xmoe.xmoe_rbd_overlap == "on"
            )
        return AllToAllDispatcher(*arguments)

    def set_layer_number(self, layer_number: int) -> None:
        """Megatron says the layer's number once it is built; the dispatcher gets the number in the whole model."""
        super().set_layer_number(layer_number)
        self.token_dispatcher.layer_number = self._number_in_model

    @property
    def _number_in_model(self) -> int | None:
        """From 1; layers of multi-token prediction, which Megatron numbers anew, come after the others."""
        if self.layer_number is None or not self.is_mtp_layer:
            return self.layer_number
        return self.layer_number + self.config.num_layers

    def forward(
        self, hidden_states: Tensor, intermediate_tensors=None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """The layer: stage after stage, recomputed in the backward where that was asked for.

        Args: hidden_states [S, B, H]; intermediate_tensors, of CUDA graphs, which are not served; padding_mask [B, S].
        Returns output [S, B, H], and no bias.
        """
        if self.sequence.mode == "given":
            return super().forward(hidden_states, intermediate_tensors, padding_mask)
        # Megatron's refuses to train with tensor parallelism and without --sequence-parallel
        if padding_mask is not None:
            padding_mask = padding_mask.transpose(0, 1).bool()
        if self.moe_layer_recompute and self.training:
            return tensor_parallel.checkpoint(self._stages, False, hidden_states, padding_mask)
        return self._stages(hidden_states, padding_mask)

    def _stages(self, hidden_states: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, None]:
        shared_expert_output = self.shared_experts_compute(hidden_states)
        probs, routing_map = self.route(hidden_states, padding_mask)
        rows, weights = self.preprocess(hidden_states, probs, routing_map)
        output, bias = self.routed_experts_compute(*self.dispatch(rows, weights))
        return self.postprocess(self.combine(output), shared_expert_output), bias

    def route(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Megatron's routing of this rank's tokens. Where routes will be dropped, metrics may count them here.

        Args: hidden_states [S, B, H]; padding_mask [S, B] bool. Returns probs [T, E] and routing_map [T, E] bool.
        """
        drops = self.config.moe_expert_capacity_factor is not None
        if padding_mask is not None and self.router.enable_expert_bias and (drops or self.sequence.mode == "sharded"):
            raise ValueError(
                "a padding mask with --moe-router-enable-expert-bias, and dropping or a sharded sequence: what the "
                "bias follows would be counted wrongly. Fix: leave one of them out"
            )
        probs, routing_map = self.sequence.route(self._route, self.router, hidden_states, padding_mask)
        if drops:
            count_routes(self._number_in_model, routing_map)
        return probs, routing_map

    def _route(self, hidden_states: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        probs, routing_map = super().route(hidden_states, padding_mask)
        if self.xmoe.xmoe_combine_weights == "logits":
            probs = raw_logits(self.router, hidden_states, probs, routing_map)
        return probs, routing_map

    def preprocess(self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor) -> tuple[Tensor, Tensor]:
        """Megatron's stage before the exchange; with capacity dropping, the router's expert bias sees what is kept.

        Args: hidden_states [S, B, H]; probs [T, E]; routing_map [T, E] bool. Returns rows [N, H] and weights [N].
        """
        if self.shared_expert_overlap:
            share = self._shared_experts_input(hidden_states)
            self.shared_experts.pre_forward_comm(share)
            if share.is_cuda and self._shared_experts_are_replicated:  # it is dropped before they have read it
                share.record_stream(self.shared_experts.stream)
        rows, weights = super().preprocess(*self.sequence.enter(hidden_states, probs), routing_map)
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

    def shared_experts_compute(self, hidden_states: Tensor) -> Tensor | None:
        """Shared experts, unless they are computed during the exchanges: of [S, B, H], or of this rank's share."""
        return super().shared_experts_compute(self._shared_experts_input(hidden_states))

    def _shared_experts_input(self, hidden_states: Tensor) -> Tensor:
        return self.sequence.own(hidden_states) if self._shared_experts_are_replicated else hidden_states

    @property
    def _shared_experts_are_replicated(self) -> bool:
        return isinstance(self.shared_experts, ReplicatedSharedExperts)

    def postprocess(self, output: Tensor, shared_expert_output: Tensor | None) -> Tensor:
        """The block's output [S, B, H] from combined rows [N, H] and the shared experts' output."""
        if self.shared_expert_overlap:
            shared_expert_output = self.shared_experts.get_output()
        of_own_tokens = shared_expert_output if self._shared_experts_are_replicated else None
        output = self.sequence.leave(super().postprocess(output, of_own_tokens))
        if shared_expert_output is None or of_own_tokens is not None:
            return output
        return output + shared_expert_output


def _replicated(shared_experts: partial, mode: str) -> partial:
    """The builder of shared experts with whole weights on each rank, from that of Megatron's."""
    if mode == "duplicated":
        raise ValueError(
            "--xmoe-shared-expert sequence needs a sharded sequence: use --xmoe-sequence-shard on, or "
            "--xmoe-shared-expert tensor"
        )
    return partial(ReplicatedSharedExperts, *shared_experts.args, **shared_experts.keywords)
