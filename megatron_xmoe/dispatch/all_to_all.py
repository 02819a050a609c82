"""The plain dispatcher: one uneven all-to-all of routed rows, nothing padded (paper, section 4.1)."""

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    all_to_all,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_xmoe.dispatch.capacity import expert_capacity
from megatron_xmoe.dispatch.state import DispatchState
from megatron_xmoe.ops import RowsSource, build_routes_from_map, gather_rows, gather_sum, merge_order


class AllToAllDispatcher(MoETokenDispatcher):
    """Sends each routed row to the rank of its expert and sums the results per token.

    Implements Megatron's six dispatcher methods. Their signatures have no place for metadata, so the state of the
    pass between `dispatch_preprocess` and `combine_postprocess` is one frozen DispatchState in `self.state`.
    A pass has one host synchronisation, for the split sizes of the exchange.

    Where all experts are on this rank, nothing is sent: the tokens themselves go through the stages, and the experts
    take their rows from them. Where experts are sharded over expert-tensor-parallel ranks, these first gather each
    other's rows, and their partial results are summed and scattered back. Megatron's shared experts can be computed
    during the exchanges (`set_shared_experts`).
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        min_capacity: int = 0,
    ) -> None:
        """Args are those of Megatron's dispatchers, and the smallest capacity of an expert.

        `pg_collection` has the groups `ep`, `expt_tp` and `tp_ep`.
        """
        super().__init__(config=config, pg_collection=pg_collection)
        self.num_local_experts = num_local_experts
        self.min_capacity = min_capacity
        self.state: DispatchState | None = None
        self.all_experts_here = self.ep_size == 1 and self.tp_size == 1

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Put the rows to send in expert order and agree on their numbers.

        Args: hidden_states [S, B, H]; routing_map [T, E] bool; probs [T, E].

        Returns:
            rows [N, H], or the tokens [T, H] where nothing is sent; and weights [N].
        """
        config = self.config
        capacity = expert_capacity(
            *(routing_map.shape[0], config.moe_router_topk, routing_map.shape[1]),
            *(config.moe_expert_capacity_factor, self.min_capacity),
        )
        routes = build_routes_from_map(
            routing_map, probs, config.moe_router_topk, capacity, config.moe_token_drop_policy
        )
        if self.shared_experts is not None:  # before the host has to wait for the numbers
            self.shared_experts.pre_forward_comm(hidden_states)
        sent, received = self._exchange_counts(routes.tokens_per_expert)
        num_rows = sum(sent)
        expert_order, arrival_order = self._expert_major_order(received.flatten(0, 1), hidden_states.device)
        self.state = DispatchState(
            hidden_shape=hidden_states.shape,
            inverse=routes.inverse,
            token_ids=routes.token_ids[:num_rows],
            kept_per_expert=routes.tokens_per_expert,
            input_splits=sent,
            output_splits=received[self.tp_rank].sum(dim=1).tolist(),
            tensor_splits=received.sum(dim=(1, 2)).tolist(),
            tokens_per_expert=received.sum(dim=(0, 1)),
            expert_order=expert_order,
            arrival_order=arrival_order,
            probs_dtype=probs.dtype,
        )
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        if not self.all_experts_here:
            rows = gather_rows(rows, self.state.token_ids, routes.inverse)
        return rows, routes.combine_weights[:num_rows]

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Exchange rows [N, H] and weights [N]; returns what arrived, [M, H] and [M], by source rank."""
        if self.shared_experts is None:
            return self._send(hidden_states), self._send(probs)
        self.shared_experts.wait_current_stream()
        rows = self._send(hidden_states)
        # between the two exchanges: with one hardware queue it would otherwise wait for the second
        self.shared_experts.linear_fc1_forward_and_act(rows)
        return rows, self._send(probs)

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns rows [M, H] in expert order, rows of each local expert [E / G] (on the CPU) and weights [M]."""
        source, tokens_per_expert, probs = self.expert_rows(hidden_states, probs)
        return source.gathered(), tokens_per_expert, probs

    def expert_rows(self, hidden_states: Tensor, probs: Tensor) -> tuple[RowsSource, Tensor, Tensor]:
        """`dispatch_postprocess` for experts that gather their rows themselves, and need not keep them for backward."""
        if self.tp_size > 1:
            hidden_states, probs = (self._gather(hidden_states), self._gather(probs))
        state = self.state
        order, inverse = state.expert_order, state.arrival_order
        if self.all_experts_here:
            source = RowsSource(hidden_states, state.token_ids, state.inverse)
        elif order is not None:
            source = RowsSource(hidden_states, order, inverse.unsqueeze(1))
            probs = gather_rows(probs.unsqueeze(1), order, inverse.unsqueeze(1)).squeeze(1)
        else:
            source = RowsSource(hidden_states)
        return source, state.tokens_per_expert, probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Put expert outputs [M, H] back into the order of arrival, summed over expert-tensor-parallel ranks."""
        state = self.state
        if state.expert_order is not None:
            hidden_states = gather_rows(hidden_states, state.arrival_order, state.expert_order.unsqueeze(1))
        if self.tp_size > 1:  # summed in the router's precision, as Megatron does
            hidden_states = reduce_scatter_to_sequence_parallel_region(
                hidden_states.to(state.probs_dtype), group=self.tp_group, input_split_sizes=state.tensor_splits
            ).to(hidden_states.dtype)
        return hidden_states

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Return expert outputs [M, H] to the tokens' ranks: [N, H], in the order they were sent."""
        splits = self.state.input_splits, self.state.output_splits
        if self.shared_experts is None:
            return all_to_all(self.ep_group, hidden_states, *splits)
        self.shared_experts.wait_current_stream()
        rows = all_to_all(self.ep_group, hidden_states, *splits, use_nccl_stream=self.use_nccl_stream)
        self.shared_experts.linear_fc2_forward(rows)
        self.shared_experts.post_forward_comm()
        return rows

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Sum the rows of each token (the experts applied the weights already): [N, H] to [S, B, H]."""
        state, self.state = self.state, None
        output = gather_sum(hidden_states, state.inverse, token_ids=state.token_ids).view(state.hidden_shape)
        if self.shared_experts is not None:
            output = output + self.shared_experts.get_output()
        return output

    def _send(self, rows: Tensor) -> Tensor:
        splits = self.state.output_splits, self.state.input_splits
        return all_to_all(self.ep_group, rows, *splits, use_nccl_stream=self.use_nccl_stream)

    def _gather(self, rows: Tensor) -> Tensor:
        """Rows of all expert-tensor-parallel ranks, by rank."""
        return gather_from_sequence_parallel_region(
            rows, group=self.tp_group, output_split_sizes=self.state.tensor_splits
        )

    def _exchange_counts(self, tokens_per_expert: Tensor) -> tuple[list[int], Tensor]:
        """Rows for each rank [G], and rows on the CPU from each rank for each local expert, [ETP, G, E / G].

        The latter are those that each of the ETP expert-tensor-parallel ranks receives.
        """
        sent = tokens_per_expert.view(self.ep_size, self.num_local_experts)
        received = sent
        if self.ep_size > 1:
            received = torch.empty_like(sent)
            dist.all_to_all_single(received, sent.contiguous(), group=self.ep_group)
        everywhere = received
        if self.tp_size > 1:
            everywhere = received.new_empty(self.tp_size * self.ep_size, self.num_local_experts)
            dist.all_gather_into_tensor(everywhere, received.contiguous(), group=self.tp_group)
        both = torch.cat([sent, everywhere]).cpu()  # the one host synchronisation of a pass
        return both[: self.ep_size].sum(dim=1).tolist(), both[self.ep_size :].view(self.tp_size, *sent.shape)

    def _expert_major_order(
        self, received: Tensor, device: torch.device
    ) -> tuple[Tensor | None, Tensor | None]:
        """Reorder rows that arrive by rank, then expert, into expert, then rank.

        Args: received [ETP * G, E / G] on the CPU; the rows' device. Returns DispatchState's two index arrays, [M].
        """
        if received.shape[0] == 1 or self.num_local_experts == 1:
            return None, None
        return merge_order(received.to(device, non_blocking=True), int(received.sum()))
