"""What the dispatchers of padding-free token buffers share: dropping, expert tensor parallelism, shared experts."""

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from numpy import ndarray
from torch import Tensor

from megatron_xmoe.dispatch.capacity import expert_capacity
from megatron_xmoe.dispatch.exchange import guards_by_default
from megatron_xmoe.dispatch.state import DispatchState
from megatron_xmoe.ops import Routes, RowsSource, build_routes_from_map, gather_rows, merge_order
from megatron_xmoe.ops.grouped_gemm import Groups
from megatron_xmoe.parallel_state import NodeTopology


class PaddingFreeDispatcher(MoETokenDispatcher):
    """Base of the dispatchers, with the stages between arrival and the experts.

    Megatron's signatures of the six stages have no place for metadata, so the state of the pass between
    `dispatch_preprocess` and `combine_postprocess` is one frozen DispatchState in `self.state`.
    A pass has one host synchronisation, for the split sizes of the exchanges, and none where nothing is exchanged,
    nothing dropped, and the experts' products take numbers of rows from the device.

    Where experts are sharded over expert-tensor-parallel ranks, these first gather each other's rows, and their partial
    results are summed and scattered back. Where these ranks hold the same tokens, each has all rows already, and the
    partial results are only summed. Megatron's shared experts can be computed during the exchanges
    (`set_shared_experts`); the layer begins and ends them.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        topology: NodeTopology,
        min_capacity: int = 0,
        guard: bool | None = None,
    ) -> None:
        """Args are those of Megatron's dispatchers, and these.

        Args:
            pg_collection: has the groups `ep`, `expt_tp` and `tp_ep`.
            topology: nodes of the expert-parallel group.
            min_capacity: smallest capacity of an expert.
            guard: exchanges of nothing are avoided; None does so on ROCm.
        """
        super().__init__(config=config, pg_collection=pg_collection)
        self.num_local_experts = num_local_experts
        self.min_capacity = min_capacity
        self.guard = guards_by_default() if guard is None else guard
        self.topology = topology
        self.layer_number: int | None = None  # in the model, from 1; the layer sets it
        self.copied_to_shards = False  # expert-tensor-parallel ranks hold the same tokens; the layer sets it
        self.state: DispatchState | None = None

    @property
    def sources(self) -> int:
        """Expert-tensor-parallel ranks whose rows an expert gathers, ETP; 1 where all hold the same."""
        return 1 if self.copied_to_shards else self.tp_size

    @property
    def source(self) -> int:
        """This rank's place among them."""
        return 0 if self.copied_to_shards else self.tp_rank

    def capacity_of(self, num_tokens: int) -> int | None:
        """Most routes of an expert among a rank's tokens; None keeps all."""
        config = self.config
        return expert_capacity(
            *(num_tokens, config.moe_router_topk, config.num_moe_experts),
            *(config.moe_expert_capacity_factor, self.min_capacity),
        )

    def routes_of(self, routing_map: Tensor, probs: Tensor) -> Routes:
        """The router's choice [T, E] in expert order, less what is dropped."""
        config, capacity = self.config, self.capacity_of(routing_map.shape[0])
        return build_routes_from_map(routing_map, probs, config.moe_router_topk, capacity, config.moe_token_drop_policy)

    def padded_rows(self, kept: ndarray, num_tokens: int) -> int:
        """Rows of a buffer that pads each expert to the capacity, or without one to the largest expert's routes.

        Args: kept, this rank's routes of each expert; its tokens.
        """
        capacity = self.capacity_of(num_tokens)
        return kept.size * (int(kept.max()) if capacity is None else capacity)

    def of_tensor_ranks(self, received: Tensor) -> Tensor:
        """[ETP, G, E / G]: `received` [G, E / G], routes from each rank for each local expert, of each of the ETP
        `sources`."""
        if self.sources == 1:
            return received.unsqueeze(0)
        everywhere = received.new_empty(self.tp_size * received.shape[0], received.shape[1])
        dist.all_gather_into_tensor(everywhere, received.contiguous(), group=self.tp_group)
        return everywhere.view(self.tp_size, *received.shape)

    def arrival_state(self, received: Tensor, on_device: Tensor | None) -> dict:
        """Fields of DispatchState about what arrives.

        Args: received [ETP, G, E / G] on the CPU; the same on the rows' device, or None where the rows of a rank are in
            the experts' order already, whatever their sources.
        """
        order = None, None
        if on_device is not None and self.num_local_experts > 1 and received.shape[0] * received.shape[1] > 1:
            order = merge_order(on_device.flatten(0, 1), int(received.sum()))
        return {
            "tensor_splits": received.sum(dim=(1, 2)).tolist(),
            "tokens_per_expert": received.sum(dim=(0, 1)),
            "expert_order": order[0],
            "arrival_order": order[1],
        }

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns rows [M, H] in expert order, rows of each local expert [E / G] (on the CPU) and weights [M]."""
        source, groups, probs = self.expert_rows(hidden_states, probs)
        return source.gathered(), groups.counts, probs

    def groups_of(self, device: torch.device) -> Groups:
        """Which of the rows that arrived belong to which expert."""
        counts, ends = self.state.tokens_per_expert, self.state.ends
        return Groups.of(counts, device) if ends is None else Groups(counts, ends)

    def expert_rows(self, hidden_states: Tensor, probs: Tensor) -> tuple[RowsSource, Groups, Tensor]:
        """`dispatch_postprocess` for experts that gather their rows themselves, and need not keep them for backward."""
        if self.sources > 1:
            hidden_states, probs = (self._gather(hidden_states), self._gather(probs))
        elif self.tp_size > 1:  # each rank's gradient is that of its share of the experts
            hidden_states, probs = (
                copy_to_tensor_model_parallel_region(x, group=self.tp_group) for x in (hidden_states, probs)
            )
        order, inverse = self.state.expert_order, self.state.arrival_order
        source = RowsSource(hidden_states)
        if order is not None:
            source = RowsSource(hidden_states, order, inverse.unsqueeze(1))
            probs = gather_rows(probs.unsqueeze(1), order, inverse.unsqueeze(1)).squeeze(1)
        return source, self.groups_of(probs.device), probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Put expert outputs [M, H] back into the order of arrival, summed over expert-tensor-parallel ranks."""
        state = self.state
        if state.expert_order is not None:
            hidden_states = gather_rows(hidden_states, state.arrival_order, state.expert_order.unsqueeze(1))
        if self.tp_size == 1:
            return hidden_states
        precise = hidden_states.to(state.probs_dtype)  # summed in the router's precision, as Megatron does
        if self.sources > 1:
            total = reduce_scatter_to_sequence_parallel_region(
                precise, group=self.tp_group, input_split_sizes=state.tensor_splits
            )
        else:
            total = reduce_from_tensor_model_parallel_region(precise, group=self.tp_group)
        return total.to(hidden_states.dtype)

    def _gather(self, rows: Tensor) -> Tensor:
        """Rows of all expert-tensor-parallel ranks, by rank."""
        return gather_from_sequence_parallel_region(
            rows, group=self.tp_group, output_split_sizes=self.state.tensor_splits
        )
