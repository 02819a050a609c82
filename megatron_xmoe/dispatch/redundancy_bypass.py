"""Redundancy-bypassing dispatch (RBD): one row per token and node crosses the network (paper, section 4.2)."""

from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from numpy import ndarray
from torch import Tensor

from megatron_xmoe.dispatch.base import PaddingFreeDispatcher
from megatron_xmoe.dispatch.bypass_exchange import Combine, Dispatch, Links, finish_dispatch, start_dispatch
from megatron_xmoe.dispatch.bypass_plan import Plan
from megatron_xmoe.dispatch.layout import Counts
from megatron_xmoe.dispatch.pilots import PilotRule, Places, choose_copies, most_routes, salt_of
from megatron_xmoe.dispatch.state import BypassState
from megatron_xmoe.metrics import record_traffic, recording
from megatron_xmoe.ops.raw_bits import wire_dtype
from megatron_xmoe.ops.rows import first_rows
from megatron_xmoe.parallel_state import NodeTopology
from megatron_xmoe.profiling import profiled
from megatron_xmoe.traffic import Traffic

LARGEST_WORD = 2**31 - 1


@profiled(
    dispatch_preprocess="permute",
    token_dispatch="dispatch",
    dispatch_postprocess="permute",
    expert_rows="permute",
    combine_preprocess="unpermute",
    token_combine="combine",
    combine_postprocess="unpermute",
)
class RedundancyBypassDispatcher(PaddingFreeDispatcher):
    """Sends a token once to each other node and once to each rank of a node, and sums its results the same way back.

    Six exchanges forward: counts; indices and routing weights, in sum at most 16 bytes a route; pilots to other nodes,
    and copies inside the own one; copies of what other nodes sent; and two for the way back. Four backward. The counts
    say the sizes of all of them, so the host waits for the device once, and not at all in the backward pass.

    Experts get their rows in the same order as from the plain dispatcher. Sums are rounded once on each level.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        topology: NodeTopology,
        min_capacity: int = 0,
        guard: bool | None = None,
        pilot: PilotRule = "balanced",
        overlap: bool = True,
    ) -> None:
        """Args are those of PaddingFreeDispatcher, and these.

        Args:
            topology: nodes of the expert-parallel group; several, and one of them with several ranks.
            pilot: "balanced" spreads pilots over a node's ranks by a hash; "first" takes the first that has an expert.
            overlap: shared experts do not wait for what crosses the network.
        """
        super().__init__(num_local_experts, config, pg_collection, topology, min_capacity, guard)
        self.pilot = pilot
        self.overlap = overlap
        self.links = Links(self.ep_group, topology.intra_group, self.guard)
        self.places = self._places("cpu")

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Choose pilots and agree on all numbers.

        Args: hidden_states [S, B, H]; routing_map [T, E] bool; probs [T, E].

        Returns:
            Tokens [T, H], and the weights [N] of this rank's routes.

        Raises:
            ValueError: more tokens than an index on the wire can number.
        """
        routes = self.routes_of(routing_map, probs)
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        self._check_size(*routes.inverse.shape)
        if self.places.mirror.device != tokens.device:
            self.places = self._places(tokens.device)
        salt = salt_of(self.layer_number, self.ep_rank) if self.pilot == "balanced" else None
        copies = choose_copies(routes, self.places, salt)
        told, received, on_device = self._exchange_counts(copies.told)
        counts = Counts(
            places=self.places,
            tokens=tokens.shape[0],
            row_bytes=tokens.shape[1] * tokens.element_size(),
            weight_bytes=wire_dtype(probs.dtype).itemsize,
            told=told,
        )
        sent = int(counts.route_sizes[0].sum())
        plan = Plan(
            counts=counts,
            places=self.places,
            bins=copies.bins,
            number=copies.number,
            expert_ids=routes.expert_ids[:sent],
            slots=most_routes(self.places, routes.inverse.shape[1]),
            arrival_order=self.tp_size > 1,  # ranks that share experts may reach them by different dispatchers
        )
        self.state = BypassState(
            hidden_shape=hidden_states.shape,
            kept_per_expert=routes.tokens_per_expert,
            probs_dtype=probs.dtype,
            plan=plan,
            copies=copies,
            **self.arrival_state(received, None if self.tp_size == 1 else on_device),
        )
        return tokens, first_rows(routes.combine_weights, sent)

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Exchange tokens [T, H] and weights [N]; returns rows [M, H] and weights [M] of the routes to this rank.

        They are in expert order; with expert tensor parallelism in the order of the plain dispatcher's arrival.
        """
        plan = self.state.plan
        if self.shared_experts is not None:
            self.shared_experts.wait_current_stream()
        underway = start_dispatch(hidden_states.detach(), probs.detach(), self.state.copies, plan, self.links)
        # from here on the host has time: pilots are on the network
        if recording():
            record_traffic(self.layer_number, self._traffic(plan.counts), plan.counts.routes[0])
        if self.overlap and self.shared_experts is not None:
            self.shared_experts.linear_fc1_forward_and_act()
        arrived = finish_dispatch(underway, plan, self.links, probs.dtype)
        del underway  # the rows as they arrived
        if torch.is_grad_enabled():
            plan.prepare_gradient()
        self.state = replace(self.state, copies=None, found=arrived.found)
        rows, weights = Dispatch.apply(hidden_states, probs, arrived, plan, self.links)
        if not self.overlap and self.shared_experts is not None:
            self.shared_experts.wait_current_stream()
            self.shared_experts.linear_fc1_forward_and_act(rows)
        return rows, weights

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Sum expert outputs [M, H] on the way back to the tokens' ranks: [T, H]."""
        state = self.state
        if self.shared_experts is not None:
            self.shared_experts.wait_current_stream()
        output = Combine.apply(hidden_states, state.plan, state.found, self.links)
        if self.shared_experts is not None:
            if not self.overlap:
                self.shared_experts.wait_current_stream()
            self.shared_experts.linear_fc2_forward(output)
            self.shared_experts.post_forward_comm()
        return output

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Sums [T, H] in the layer's shape [S, B, H]."""
        state, self.state = self.state, None
        return hidden_states.view(state.hidden_shape)

    def _places(self, device: torch.device | str) -> Places:
        return Places.of(self.topology.node_of, self.topology.rank, self.num_local_experts, device)

    def _exchange_counts(self, told: Tensor) -> tuple[ndarray, Tensor, Tensor]:
        """On the host: `told` [2, G, 2R + L] of `Numbered`, now with what each rank tells this one; and the routes
        [ETP, G, L] that its `sources` are told of, whose R can be others. And these on the device."""
        dist.all_to_all_single(told[1], told[0], group=self.ep_group)
        size, received = told.numel(), self.of_tensor_ranks(told[1, :, -self.num_local_experts :])
        both = told.flatten() if self.sources == 1 else torch.cat([told.flatten(), received.flatten()])
        both = both.cpu()  # the one host synchronisation of a pass
        on_host = both[:size].view(told.shape)
        if self.sources == 1:
            return on_host.numpy(), on_host[1:, :, -self.num_local_experts :], received
        return on_host.numpy(), both[size:].view(received.shape), received

    def _traffic(self, counts: Counts) -> Traffic:
        remote = counts.places.remote
        other = np.arange(self.ep_size) != self.ep_rank
        rows, routes = counts.rows[0], counts.route_sizes[0]
        # besides indices and weights, each rank gets its counts
        metadata = 4 * counts.meta_words[0] + counts.told.shape[2] * counts.told.itemsize
        return Traffic(
            routes=int(routes.sum()),
            routes_remote=int(routes[remote].sum()),
            inter_rows=int(rows[remote].sum()),
            intra_rows=int(rows[~remote].sum() + counts.list_sizes[1].sum()),
            row_bytes=counts.row_bytes,
            inter_metadata=int(metadata[remote].sum()),
            intra_metadata=int(metadata[~remote & other].sum()),
            padded_rows=self.padded_rows(counts.routes[0], counts.tokens),
        )

    def _check_size(self, tokens: int, topk: int) -> None:
        per_token = self.places.width * most_routes(self.places, topk)
        if tokens * per_token > LARGEST_WORD:
            raise ValueError(
                f"{tokens} tokens of a rank's micro-batch; with {self.places.width} ranks on a node redundancy "
                f"bypassing takes at most {LARGEST_WORD // per_token}. Fix: use smaller micro-batches, or "
                "--xmoe-dispatcher alltoall"
            )
