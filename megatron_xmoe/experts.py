"""All local experts in one grouped computation over the padding-free buffer."""

from functools import partial

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import get_expert_parallel_rng_tracker_name
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint
from torch import Tensor
from torch.nn import Parameter

from megatron_xmoe.config import XMoEConfig
from megatron_xmoe.ops.activation import Activation
from megatron_xmoe.ops.grouped_gemm import Groups, backend_for
from megatron_xmoe.ops.grouped_mlp import ExpertWeights, grouped_mlp
from megatron_xmoe.ops.rows import RowsSource


class ExpertWeight(torch.nn.Module):
    """One matrix of every local expert, [E, N, D], under the name of the linear layer it stands for, and its bias."""

    def __init__(self, shape: tuple[int, int, int], config: TransformerConfig, partition_dim: int):
        super().__init__()
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
        # what Megatron reads off expert parameters: who reduces the gradient, and how the norm counts it
        sharded = config.expert_model_parallel_size > 1 or (
            config.expert_tensor_parallel_size != config.tensor_model_parallel_size
        )
        self.weight.allreduce = not sharded
        # a rank's rows of gated experts are of both halves, as Megatron's
        sharding = {"dim": partition_dim, "stride": 2 if config.gated_linear_unit and partition_dim == 1 else 1}
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, **sharding)
        self.bias = None
        if config.add_bias_linear:  # Megatron sees to it that no bias is shared
            self.bias = Parameter(torch.zeros(shape[:2], dtype=config.params_dtype, device=device))
            self.bias.allreduce = not sharded
            if partition_dim == 1:
                set_tensor_model_parallel_attributes(self.bias, is_parallel=True, **sharding)

    def forward(self) -> tuple[Tensor, Tensor | None]:
        """The parameters. To be called: Megatron may still be gathering them, and waits for that in a hook."""
        return self.weight, self.bias

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        # checkpoints hold an empty extra state per expert, for Transformer Engine's sake
        for key in [key for key in state_dict if key.startswith(f"{prefix}_extra_state")]:
            del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args)


class XMoEGroupedMLP(MegatronModule):
    """The experts of a rank as grouped matrix products: SwiGLU, GeGLU, GELU, squared ReLU, with and without biases.

    With expert tensor parallelism each rank has a share of the F columns of every expert, [E, 2F / etp, H] (its share
    of the gate, then of the other half) and [E, H, F / etp], and returns a partial sum of the outputs.

    Saves its input and the pre-activation for backward, and the routing weights: see ops.grouped_mlp.

    Checkpoints are those of Megatron's SequentialMLP and TEGroupedMLP: the same keys and shapes on disk.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: MLPSubmodules | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,
        xmoe: XMoEConfig | None = None,
    ):
        """Args are those of SequentialMLP (`submodules` and `name` describe linear layers that do not exist here), and
        `xmoe`, the options of X-MoE (defaults if None).

        Raises:
            ValueError: an FFN size that the expert-tensor-parallel ranks cannot share.
        """
        super().__init__(config=config)
        self.xmoe = xmoe or XMoEConfig(moe_backend="xmoe")
        # our scripts turn "auto" into "on"; a layer built without them does what its config says of the others
        fusion = {"auto": config.gradient_accumulation_fusion, "on": True, "off": False}
        self.into_main_grad = fusion[self.xmoe.xmoe_gradient_accumulation_fusion]
        shards = pg_collection.expt_tp.size()
        if config.moe_ffn_hidden_size % shards:
            raise ValueError(
                f"--moe-ffn-hidden-size {config.moe_ffn_hidden_size} is not divisible by "
                f"--expert-tensor-parallel-size {shards}: change one of them"
            )
        self.num_local_experts = num_local_experts
        self.ep_group, self.tp_group, self.dp_group = pg_collection.ep, pg_collection.expt_tp, pg_collection.expt_dp
        self.ffn = ffn = config.moe_ffn_hidden_size // shards
        hidden = config.hidden_size
        width = 2 * ffn if config.gated_linear_unit else ffn
        self.activation = Activation(
            config.activation_func,
            config.gated_linear_unit,
            config.activation_func_clamp_value,
            config.glu_linear_offset,
        )
        shape1, shape2 = (num_local_experts, width, hidden), (num_local_experts, hidden, ffn)
        self.linear_fc1 = ExpertWeight(shape1, config, partition_dim=1)
        self.linear_fc2 = ExpertWeight(shape2, config, partition_dim=2)
        if config.perform_initialization:
            self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        """Random weights, drawn expert by expert as SequentialMLP does, so that a seed means the same weights."""
        methods = self.config.init_method, self.config.output_layer_init_method
        for matrices in zip(self.linear_fc1.weight, self.linear_fc2.weight, strict=True):
            for matrix, init_method in zip(matrices, methods, strict=True):
                with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                    init_method(matrix)

    def forward(
        self,
        permuted_local_hidden_states: Tensor | RowsSource,
        tokens_per_expert: Tensor | Groups,
        permuted_probs: Tensor,
    ) -> tuple[Tensor, None]:
        """Apply the experts and the routing weights.

        Args:
            permuted_local_hidden_states: rows [M, H], expert-major; or where to take them from.
            tokens_per_expert: [E] int64, on the CPU or the rows' device; sums to at most M. Or what follows from it.
            permuted_probs: routing weights [M].

        Returns:
            [M, H], weighted, this rank's part of it where experts are sharded; and no bias.
        """
        source, probs = permuted_local_hidden_states, permuted_probs
        if not isinstance(source, RowsSource):
            source = RowsSource(source)
        if self.config.moe_apply_probs_on_input:
            rows = source.gathered()
            source = RowsSource((probs.unsqueeze(-1) * rows).to(rows.dtype))
            probs = torch.ones_like(probs)
        (weight1, bias1), (weight2, bias2) = self.linear_fc1(), self.linear_fc2()
        groups = tokens_per_expert
        if not isinstance(groups, Groups):
            groups = Groups.of(groups, probs.device)
        gemm = backend_for(self.xmoe.xmoe_grouped_gemm, source.tensor, (self.config.hidden_size, self.ffn))
        if gemm.needs_sizes or bias1 is not None:
            _ = groups.sizes  # the host waits for them now, if at all, and not in the backward pass
        output = grouped_mlp(
            source,
            probs,
            ExpertWeights(weight1, weight2, bias1, bias2),
            groups,
            self.activation,
            gemm,
            self.xmoe.xmoe_recompute_activation,
            self.into_main_grad,
        )
        return output, None

    def backward_dw(self) -> None:
        """Weight gradients are computed in the backward pass itself; nothing is delayed."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Megatron's sharded state, with the keys and shapes of SequentialMLP on disk: an entry per expert.

        Raises:
            ValueError: keys with the expert's number in them (Megatron 0.19 has no checkpoint format with them).
        """
        if (metadata or {}).get("singleton_local_shards"):
            raise ValueError("grouped experts save one array per weight: singleton_local_shards is not served")
        replica_id = (0, 0, self.dp_group.rank())
        axis, first = len(sharded_offsets), self.ep_group.rank() * self.num_local_experts
        offsets = [
            (*sharded_offsets, (axis, first + i, self.ep_group.size() * self.num_local_experts))
            for i in range(self.num_local_experts)
        ]
        state: ShardedStateDict = {}
        for name, module in (("linear_fc1", self.linear_fc1), ("linear_fc2", self.linear_fc2)):
            halves = 2 if name == "linear_fc1" and self.config.gated_linear_unit else 1
            shard = (self.tp_group.rank(), self.tp_group.size(), 0 if name == "linear_fc1" else 1)
            for parameter_name, parameter in module.named_parameters():
                state[f"{prefix}{name}.{parameter_name}"] = ShardedTensorFactory(
                    f"{prefix}experts.{name}.{parameter_name}",
                    parameter,
                    partial(_shards_of_experts, offsets=offsets, halves=halves, shard=shard),
                    partial(_stack_of_shards, halves=halves),
                    replica_id,
                )
            for i, offset in enumerate(offsets):  # Megatron's own experts look for one each
                state[f"{prefix}{name}._extra_state{i}"] = make_sharded_object_for_checkpoint(
                    None, f"{prefix}experts.{name}._extra_state", offset, (0, shard[0], replica_id[2])
                )
        return state


@torch.no_grad()
def _shards_of_experts(key: str, tensor: Tensor, replica_id, flattened_range, offsets, halves: int, shard):
    """Shards of a stacked weight [E, N, D] or bias [E, N], or of a state of its optimizer.

    Args:
        offsets: leading axes of each expert.
        halves: 2 where the first half of N is a gate that is saved by itself.
        shard: expert-tensor-parallel rank, their number, and the axis of an expert's matrix that they share (they
            share no bias).
    """
    assert flattened_range is None, "stacked experts are not flattened"
    rank, size, axis = shard if tensor.dim() == 3 else (0, 1, 0)
    return [
        ShardedTensor.from_rank_offsets(
            key,
            part,
            *offset,
            (len(offset) + axis, half * size + rank, halves * size),
            replica_id=replica_id,
            prepend_axis_num=len(offset),
        )
        for expert, offset in zip(tensor, offsets, strict=True)
        for half, part in enumerate(expert.chunk(halves))
    ]


@torch.no_grad()
def _stack_of_shards(parts: list[Tensor], halves: int) -> Tensor:
    """The stacked tensor [E, N, D] of loaded shards."""
    return torch.stack([torch.cat(parts[i : i + halves]) for i in range(0, len(parts), halves)])
