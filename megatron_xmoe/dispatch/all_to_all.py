"""The plain dispatcher: one uneven all-to-all of routed rows, nothing padded (paper, section 4.1)."""

import math
from dataclasses import replace

import torch
import torch.distributed as dist
from numpy import ndarray
from torch import Tensor

from megatron_xmoe.dispatch.base import PaddingFreeDispatcher
from megatron_xmoe.dispatch.exchange import exchange_rows
from megatron_xmoe.dispatch.state import AllToAllState
from megatron_xmoe.metrics import record_traffic, record_traffic_later, recording
from megatron_xmoe.ops import Routes, RowsSource, gather_rows, gather_sum
from megatron_xmoe.ops.grouped_gemm import Groups
from megatron_xmoe.ops.rows import first_rows
from megatron_xmoe.profiling import profiled
from megatron_xmoe.traffic import Traffic, flat_traffic


@profiled(
    dispatch_preprocess="permute",
    token_dispatch="dispatch",
    dispatch_postprocess="permute",
    expert_rows="permute",
    combine_preprocess="unpermute",
    token_combine="combine",
    combine_postprocess="unpermute",
)
class AllToAllDispatcher(PaddingFreeDispatcher):
    """Sends each routed row to the rank of its expert and sums the results per token. See PaddingFreeDispatcher.

    Where all experts are on this rank, nothing is sent: the tokens themselves go through the stages, and the experts
    take their rows from them. If nothing is dropped either, no number is needed here on the host; experts that need
    their numbers of rows there wait themselves.
    """

    @property
    def all_experts_here(self) -> bool:
        """Whether this rank has every expert, whole."""
        return self.ep_size == 1 and self.tp_size == 1

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Put the rows to send in expert order and agree on their numbers.

        Args: hidden_states [S, B, H]; routing_map [T, E] bool; probs [T, E].

        Returns:
            rows [N, H], or the tokens [T, H] where nothing is sent; and weights [N].
        """
        routes, drops = self.routes_of(routing_map, probs), self.capacity_of(probs.shape[0]) is not None
        if self.all_experts_here and not drops:
            return self._keep(hidden_states, routes)
        counts = self._exchange_counts(routes.tokens_per_expert)
        on_host = counts.to("cpu", non_blocking=True)
        there = torch.cuda.Event()
        there.record()
        # what the device does while the host reads the counts
        ends = counts[1:].sum(dim=(0, 1)).cumsum(0, dtype=torch.int32)
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        if not (drops or self.all_experts_here):  # any rows after the last route's are cut off
            rows = gather_rows(rows, routes.token_ids, routes.inverse)
        there.synchronize()  # the one host synchronisation
        sent, received = on_host[0], on_host[1:]
        num_rows = int(sent.sum())
        self.state = AllToAllState(
            hidden_shape=hidden_states.shape,
            inverse=routes.inverse,
            token_ids=routes.token_ids[:num_rows],
            kept_per_expert=routes.tokens_per_expert,
            sent=sent,
            input_splits=sent.sum(dim=1).tolist(),
            output_splits=received[self.source].sum(dim=1).tolist(),
            probs_dtype=probs.dtype,
            ends=ends,
            **self.arrival_state(received, counts[1:]),
        )
        if not self.all_experts_here:
            if drops:
                rows = gather_rows(rows, self.state.token_ids, routes.inverse)
            rows = first_rows(rows, num_rows)
        return rows, first_rows(routes.combine_weights, num_rows)

    def _keep(self, hidden_states: Tensor, routes: Routes) -> tuple[Tensor, Tensor]:
        """`dispatch_preprocess` of tokens that stay here with all their routes."""
        weights, counts = routes.combine_weights, routes.tokens_per_expert
        if recording():
            sizes = _sizes(hidden_states.shape, hidden_states, weights)
            record_traffic_later(self.layer_number, counts, lambda sent: self._traffic(sent, *sizes))
        self.state = AllToAllState(
            hidden_shape=hidden_states.shape,
            inverse=routes.inverse,
            token_ids=routes.token_ids,
            kept_per_expert=counts,
            sent=None,
            input_splits=[],
            output_splits=[],
            tensor_splits=[],
            tokens_per_expert=counts,
            expert_order=None,
            arrival_order=None,
            probs_dtype=weights.dtype,
            ends=counts.cumsum(0, dtype=torch.int32),
        )
        return hidden_states.reshape(-1, hidden_states.shape[-1]), weights

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Exchange rows [N, H] and weights [N]; returns what arrived, [M, H] and [M], by source rank."""
        splits = self.state.output_splits, self.state.input_splits
        if self.shared_experts is not None:
            self.shared_experts.wait_current_stream()
        rows = self._exchange(hidden_states, *splits)
        if self.shared_experts is not None:
            # between the two exchanges: with one hardware queue it would otherwise wait for the second
            self.shared_experts.linear_fc1_forward_and_act(rows)
        weights = self._exchange(probs, *splits)
        if self.state.sent is not None and recording():  # now that the device has something to do
            sent = self.state.sent.numpy()
            sizes = _sizes(self.state.hidden_shape, hidden_states, probs)
            record_traffic(self.layer_number, self._traffic(sent, *sizes), sent)
        return rows, weights

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See PaddingFreeDispatcher; for experts that want the numbers of their rows on the host."""
        rows, counts, probs = super().dispatch_postprocess(hidden_states, probs)
        counts = counts.cpu()
        num_rows = int(counts.sum())
        if self.all_experts_here:
            self.state = replace(self.state, token_ids=self.state.token_ids[:num_rows])
        return first_rows(rows, num_rows), counts, first_rows(probs, num_rows)

    def expert_rows(self, hidden_states: Tensor, probs: Tensor) -> tuple[RowsSource, Groups, Tensor]:
        """See PaddingFreeDispatcher; the rows of experts that are all here are taken from the tokens."""
        if not self.all_experts_here:
            return super().expert_rows(hidden_states, probs)
        return RowsSource(hidden_states, self.state.token_ids, self.state.inverse), self.groups_of(probs.device), probs

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Return expert outputs [M, H] to the tokens' ranks: [N, H], in the order they were sent."""
        splits = self.state.input_splits, self.state.output_splits
        if self.shared_experts is None:
            return self._exchange(hidden_states, *splits)
        self.shared_experts.wait_current_stream()
        rows = self._exchange(hidden_states, *splits)
        self.shared_experts.linear_fc2_forward(rows)
        self.shared_experts.post_forward_comm()
        return rows

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Sum the rows of each token (the experts applied the weights already): [N, H] to [S, B, H]."""
        state, self.state = self.state, None
        return gather_sum(hidden_states, state.inverse, token_ids=state.token_ids).view(state.hidden_shape)

    def _exchange(self, rows: Tensor, output_splits: list[int], input_splits: list[int]) -> Tensor:
        return exchange_rows(
            rows, output_splits, input_splits, self.ep_group, self.guard, own_stream=self.use_nccl_stream
        )

    def _traffic(self, sent: ndarray, tokens: int, row_bytes: int, weight_bytes: int) -> Traffic:
        """What a pass sends: rows, a weight with each, and each rank's counts.

        Args: sent [G, E / G] or [E], routes of each expert; number of tokens; bytes of a row and of a weight.
        """
        return flat_traffic(
            sent.reshape(self.ep_size, -1).sum(axis=1).tolist(),
            rank=self.ep_rank,
            node_of_rank=self.topology.node_of,
            row_bytes=row_bytes,
            bytes_per_route=weight_bytes,
            bytes_per_rank=self.num_local_experts * sent.itemsize,
            padded_rows=self.padded_rows(sent, tokens),
        )

    def _exchange_counts(self, tokens_per_expert: Tensor) -> Tensor:
        """[1 + ETP, G, E / G] on the device: routes for each expert of each rank, and those received by each of the ETP
        `sources`."""
        sent = tokens_per_expert.view(self.ep_size, self.num_local_experts)
        received = sent
        if self.ep_size > 1:
            received = torch.empty_like(sent)
            dist.all_to_all_single(received, sent.contiguous(), group=self.ep_group)
        return torch.cat([sent.unsqueeze(0), self.of_tensor_ranks(received)])


def _sizes(shape: torch.Size, rows: Tensor, weights: Tensor) -> tuple[int, int, int]:
    """Tokens of a layer's input of this shape; bytes of a row and of a routing weight."""
    return math.prod(shape[:-1]), shape[-1] * rows.element_size(), weights.element_size()
