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

from megatron_xmoe.ops.activation import Activation
from megatron_xmoe.ops.grouped_gemm import Groups, multiply, weight_gradient, why_not_grouped_mm


class ExpertWeight(torch.nn.Module):
    """One matrix of every local expert, [E, N, D], under the name of the linear layer it stands for."""

    def __init__(self, shape: tuple[int, int, int], config: TransformerConfig, partition_dim: int):
        super().__init__()
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
        # what Megatron reads off expert parameters: who reduces the gradient, and how the norm counts it
        sharded = config.expert_model_parallel_size > 1 or (
            config.expert_tensor_parallel_size != config.tensor_model_parallel_size
        )
        self.weight.allreduce = not sharded
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=partition_dim, stride=1)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        # checkpoints hold an empty extra state per expert, for Transformer Engine's sake
        for key in [key for key in state_dict if key.startswith(f"{prefix}_extra_state")]:
            del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args)


class XMoEGroupedMLP(MegatronModule):
    """The experts of a rank as grouped matrix products: SwiGLU, GeGLU, GELU, squared ReLU; no biases.

    With expert tensor parallelism each rank has a share of the F columns of every expert, [E, 2F / etp, H] (its share
    of the gate, then of the other half) and [E, H, F / etp], and returns a partial sum of the outputs.

    Saves its input rows and the pre-activation for backward, and the routing weights: 2Kd + 4Kn bytes a token in bf16
    with gated experts, where d is the hidden size, n the experts' FFN size and K the number of experts per token.

    Checkpoints are those of Megatron's SequentialMLP and TEGroupedMLP: the same keys and shapes on disk.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: MLPSubmodules | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,
    ):
        """Args are those of SequentialMLP; `submodules` and `name` describe linear layers that do not exist here.

        Raises:
            ValueError: biases, or an FFN size that the expert-tensor-parallel ranks cannot share.
        """
        super().__init__(config=config)
        if config.add_bias_linear:
            raise ValueError("grouped experts have no biases: use --disable-bias-linear")
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
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """Apply the experts and the routing weights.

        Args:
            permuted_local_hidden_states: rows [M, H], expert-major.
            tokens_per_expert: [E] int64 on the CPU; sums to M.
            permuted_probs: routing weights [M].

        Returns:
            [M, H], weighted, this rank's part of it where experts are sharded; and no bias.
        """
        rows, probs = permuted_local_hidden_states, permuted_probs
        if self.config.moe_apply_probs_on_input:
            rows = (probs.unsqueeze(-1) * rows).to(rows.dtype)
            probs = torch.ones_like(probs)
        weights = self.linear_fc1.weight, self.linear_fc2.weight
        groups = Groups.of(tokens_per_expert, rows.device)
        grouped = rows.is_cuda and not why_not_grouped_mm(rows.dtype, (self.config.hidden_size, self.ffn))
        return _GroupedMLP.apply(rows, probs, *weights, groups, self.activation, grouped), None

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
            state[f"{prefix}{name}.weight"] = ShardedTensorFactory(
                f"{prefix}experts.{name}.weight",
                module.weight,
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
    """Shards of a stacked weight [E, N, D], or of a state of its optimizer.

    Args:
        offsets: leading axes of each expert.
        halves: 2 where the first half of N is a gate that is saved by itself.
        shard: expert-tensor-parallel rank, their number, and the axis of an expert's matrix that they share.
    """
    assert flattened_range is None, "stacked experts are not flattened"
    rank, size, axis = shard
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


class _GroupedMLP(torch.autograd.Function):
    """fc1, activation times routing weight, fc2. Keeps the rows and the pre-activation for backward."""

    @staticmethod
    def forward(ctx, rows, probs, weight1, weight2, groups, activation, grouped):
        hidden = multiply(rows, weight1, groups, grouped)
        ctx.save_for_backward(rows, probs, weight1, weight2, hidden)
        ctx.groups, ctx.activation, ctx.grouped = groups, activation, grouped
        return multiply(activation.forward(hidden, probs), weight2, groups, grouped)

    @staticmethod
    def backward(ctx, grad):
        rows, probs, weight1, weight2, hidden = ctx.saved_tensors
        groups, grouped = ctx.groups, ctx.grouped
        grad = grad.contiguous()
        grad_activated = multiply(grad, weight2.transpose(1, 2), groups, grouped)
        grad_hidden, activated, grad_probs = ctx.activation.backward(hidden, probs, grad_activated)
        grad_weight2 = weight_gradient(grad, activated, groups, grouped)
        grad_weight1 = weight_gradient(grad_hidden, rows, groups, grouped)
        grad_rows = multiply(grad_hidden, weight1.transpose(1, 2), groups, grouped)
        return grad_rows, grad_probs, grad_weight1, grad_weight2, None, None, None
