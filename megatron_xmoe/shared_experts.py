"""Shared experts whose weights every tensor-parallel rank holds whole, for its own share of the tokens."""

import copy
from collections.abc import Callable

import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker, get_data_parallel_rng_tracker_name
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_xmoe.sequence_shard import gradients_summed


class ReplicatedSharedExperts(SharedExpertMLP):
    """Megatron's shared experts for sequence-sharded blocks: replicated weights, gradients summed over the ranks.

    Checkpoints are those of the tensor-parallel shared experts: the same keys and shapes on disk.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        gate: bool,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
    ):
        """Args are those of SharedExpertMLP.

        Raises:
            ValueError: experts are sharded over tensor-parallel ranks; the group of whole experts is used here.
        """
        if pg_collection.expt_tp.size() > 1:
            raise ValueError(
                f"--xmoe-shared-expert sequence does not go with --expert-tensor-parallel-size "
                f"{pg_collection.expt_tp.size()}: use 1, or --xmoe-shared-expert tensor"
            )
        config, alone = copy.copy(config), copy.copy(pg_collection)
        alone.tp = pg_collection.expt_tp  # this rank
        # the gradient has to pass through the sum, and Megatron must not sum it once more
        config.gradient_accumulation_fusion = config.sequence_parallel = False
        config.init_method = _same_on_all_ranks(config.init_method)
        config.output_layer_init_method = _same_on_all_ranks(config.output_layer_init_method)
        super().__init__(config=config, submodules=submodules, gate=gate, pg_collection=alone, name=name)
        self.replicas = pg_collection.tp
        for parameter in self.parameters():
            parameter.tensor_model_parallel = False  # the gradient norm counts it once

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Shared experts of this rank's tokens [S_r, B, H]."""
        with gradients_summed(self, self.replicas):
            return super().forward(hidden_states)

    def pre_forward_comm(self, input, wait_current_stream: bool = True) -> None:
        """Begin the overlapped forward, with this rank's tokens."""
        with gradients_summed(self, self.replicas):
            super().pre_forward_comm(input, wait_current_stream)

    def linear_fc1_forward_and_act(self, overlapped_comm_output: Tensor | None = None) -> None:
        """First part of the overlapped forward."""
        with gradients_summed(self.linear_fc1, self.replicas):
            super().linear_fc1_forward_and_act(overlapped_comm_output)

    def linear_fc2_forward(self, overlapped_comm_output: Tensor | None = None) -> None:
        """Second part of the overlapped forward."""
        with gradients_summed(self.linear_fc2, self.replicas):
            super().linear_fc2_forward(overlapped_comm_output)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Megatron's sharded state; one of the tensor-parallel ranks writes it."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for entry in state.values():
            pipeline, _, data = entry.replica_id
            entry.replica_id = (pipeline, dist.get_rank(self.replicas), data)
        return state


def _same_on_all_ranks(init_method: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """An initialisation that draws from the random state that tensor-parallel ranks share."""

    def initialize(weight: Tensor) -> Tensor:
        with get_cuda_rng_tracker().fork(get_data_parallel_rng_tracker_name()):
            return init_method(weight)

    return initialize
