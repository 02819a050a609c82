"""The plain dispatcher: one uneven all-to-all of routed rows, nothing padded (paper, section 4.1)."""

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import all_to_all
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_xmoe.dispatch.state import DispatchState
from megatron_xmoe.ops import build_routes_from_map, gather_rows, gather_sum, merge_order


class AllToAllDispatcher(MoETokenDispatcher):
    """Sends each routed row to the rank of its expert and sums the results per token.

    Implements Megatron's six dispatcher methods. Their signatures have no place for metadata, so the state of the
    pass between `dispatch_preprocess` and `combine_postprocess` is one frozen DispatchState in `self.state`.
    A pass has one host synchronisation, for the split sizes of the exchange.
    """

    def __init__(
        self, num_local_experts: int, config: TransformerConfig, pg_collection: ProcessGroupCollection
    ) -> None:
        """Args: experts of this rank; Megatron's configuration; groups `ep`, `expt_tp` and `tp_ep`.

        Raises:
            ValueError: expert tensor parallelism.
        """
        super().__init__(config=config, pg_collection=pg_collection)
        if self.tp_size != 1:
            raise ValueError(
                f"expert tensor parallelism is {self.tp_size}; X-MoE does not shard experts over tensor-parallel "
                "ranks: use --expert-tensor-parallel-size 1"
            )
        self.num_local_experts = num_local_experts
        self.state: DispatchState | None = None

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Put the rows to send in expert order and agree on their numbers.

        Args: hidden_states [S, B, H]; routing_map [T, E] bool; probs [T, E]. Returns rows [N, H] and weights [N].
        """
        routes = build_routes_from_map(routing_map, probs, self.config.moe_router_topk)
        sent, received = self._exchange_counts(routes.tokens_per_expert)
        num_rows = sum(sent)
        expert_order, arrival_order = self._expert_major_order(received, hidden_states.device)
        self.state = DispatchState(
            hidden_shape=hidden_states.shape,
            inverse=routes.inverse,
            token_ids=routes.token_ids[:num_rows],
            input_splits=sent,
            output_splits=received.sum(dim=1).tolist(),
            tokens_per_expert=received.sum(dim=0),
            expert_order=expert_order,
            arrival_order=arrival_order,
        )
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        return gather_rows(tokens, self.state.token_ids, routes.inverse), routes.combine_weights[:num_rows]

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Exchange rows [N, H] and weights [N]; returns what arrived, [M, H] and [M], by source rank."""
        return self._send(hidden_states), self._send(probs)

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns rows [M, H] in expert order, rows of each local expert [E / G] (on the CPU) and weights [M]."""
        order, inverse = self.state.expert_order, self.state.arrival_order
        if order is not None:
            hidden_states = gather_rows(hidden_states, order, inverse.unsqueeze(1))
            probs = gather_rows(probs.unsqueeze(1), order, inverse.unsqueeze(1)).squeeze(1)
        return hidden_states, self.state.tokens_per_expert, probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Put expert outputs [M, H] back into the order of arrival."""
        if self.state.expert_order is None:
            return hidden_states
        return gather_rows(hidden_states, self.state.arrival_order, self.state.expert_order.unsqueeze(1))

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Return expert outputs [M, H] to the tokens' ranks: [N, H], in the order they were sent."""
        return all_to_all(self.ep_group, hidden_states, self.state.input_splits, self.state.output_splits)

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Sum the rows of each token (the experts applied the weights already): [N, H] to [S, B, H]."""
        state, self.state = self.state, None
        return gather_sum(hidden_states, state.inverse, token_ids=state.token_ids).view(state.hidden_shape)

    def _send(self, rows: Tensor) -> Tensor:
        return all_to_all(self.ep_group, rows, self.state.output_splits, self.state.input_splits)

    def _exchange_counts(self, tokens_per_expert: Tensor) -> tuple[list[int], Tensor]:
        """Rows for each rank [G], and rows from each rank for each local expert [G, E / G] on the CPU."""
        sent = tokens_per_expert.view(self.ep_size, self.num_local_experts)
        received = sent
        if self.ep_size > 1:
            received = torch.empty_like(sent)
            dist.all_to_all_single(received, sent.contiguous(), group=self.ep_group)
        sent, received = torch.stack([sent, received]).cpu()  # the one host synchronisation of a pass
        return sent.sum(dim=1).tolist(), received

    def _expert_major_order(
        self, received: Tensor, device: torch.device
    ) -> tuple[Tensor | None, Tensor | None]:
        """Reorder rows that arrive by rank, then expert, into expert, then rank.

        Args: received [G, E / G] on the CPU; the rows' device. Returns DispatchState's two index arrays, both [M].
        """
        if self.ep_size == 1 or self.num_local_experts == 1:
            return None, None
        return merge_order(received.to(device, non_blocking=True), int(received.sum()))
