"""One transformer layer with a Mixture-of-Experts block, trained a step in any layout: for test_sequence_shard.py.

Weights and gradients travel as whole tensors, cut and put together by Megatron's own description of what is where (its
sharded state dict), so that one process and any layout can be compared.
"""

import logging
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from unittest import mock

import harness
import torch
import torch.distributed as dist
import torch.nn.functional as F

H, FFN, SHARED_FFN, EXPERTS, TOPK, B = 8, 8, 12, 8, 3, 2
MICRO_BATCHES = 4  # of the global batch


@dataclass(frozen=True)
class Layout:
    """Four processes: tensor, expert and expert-tensor parallel size; the rest is data parallelism."""

    tp: int = 1
    ep: int = 1
    etp: int = 1

    def __str__(self) -> str:
        return f"tp{self.tp}-ep{self.ep}" + f"-etp{self.etp}" * (self.etp > 1)


@dataclass(frozen=True)
class Case:
    """A model, how its block handles the sequence, and the length of it."""

    name: str
    options: tuple[tuple[str, object], ...] = ()
    """Of the TransformerConfig."""

    length: int = 8
    padded: int = 0
    """Padding at the end of the second sequence of each micro-batch."""

    shared: str | None = None
    """--xmoe-shared-expert, for a layer that has one."""

    logits: bool = False
    gate_bias: bool = False
    dispatcher: str = "alltoall"
    """With rbd, two ranks are a node."""

    def __str__(self) -> str:
        return self.name


@dataclass
class Result:
    """What one rank computed; whole tensors in pieces: (name, place in the whole) -> piece."""

    loss: float
    inputs: torch.Tensor
    """Gradient of this rank's micro-batches."""

    data_rank: tuple[int, int]
    gradients: dict[tuple, torch.Tensor] = field(default_factory=dict)
    state: dict[tuple, torch.Tensor] = field(default_factory=dict)
    """After a step of SGD."""


def config_of(case: Case, layout: Layout, sequence_parallel: bool, dtype: torch.dtype):
    """The transformer's configuration."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    options = {
        "moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1, "moe_z_loss_coeff": 0.05,
        "moe_router_dtype": "fp64" if dtype == torch.float64 else "fp32",
    } | {name: list(value) if isinstance(value, tuple) else value for name, value in case.options}  # fmt: skip
    return TransformerConfig(
        num_layers=1, hidden_size=H, num_attention_heads=4, num_moe_experts=EXPERTS, moe_router_topk=TOPK,
        moe_ffn_hidden_size=FFN, ffn_hidden_size=FFN, gated_linear_unit=True, activation_func=F.silu,
        moe_shared_expert_intermediate_size=SHARED_FFN if case.shared else None, add_bias_linear=False,
        bias_activation_fusion=False, gradient_accumulation_fusion=False, bias_dropout_fusion=False,
        masked_softmax_fusion=False, normalization="RMSNorm", hidden_dropout=0.0, attention_dropout=0.0,
        params_dtype=dtype, moe_token_dispatcher_type="alltoall", use_cpu_initialization=True,
        transformer_impl="local", tensor_model_parallel_size=layout.tp, sequence_parallel=sequence_parallel,
        expert_model_parallel_size=layout.ep, expert_tensor_parallel_size=layout.etp, **options,
    )  # fmt: skip


def build(case: Case, layout: Layout, mode: str, dtype: torch.dtype = torch.float64):
    """The layer in Megatron's block and data-parallel wrapper; `mode` is on, off, or sp for Megatron's own sharding."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.transformer_block import TransformerBlock

    from megatron_xmoe.config import XMoEConfig
    from megatron_xmoe.specs import substitute, substitutions

    config = config_of(case, layout, mode == "sp" and layout.tp > 1, dtype)
    xmoe = XMoEConfig(
        moe_backend="xmoe",
        xmoe_dispatcher=case.dispatcher if layout.ep > 2 else "alltoall",
        xmoe_ranks_per_node="2" if dist.get_world_size() > 1 else None,
        xmoe_sequence_shard="auto" if mode == "sp" else mode,
        xmoe_shared_expert=case.shared or "tensor",
        xmoe_combine_weights="logits" if case.logits else "probs",
    )
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    block = TransformerBlock(config, substitute(spec, substitutions(config, xmoe)), post_layer_norm=False)
    if case.dispatcher == "rbd" and layout.ep > 2:
        assert "Redundancy" in type(block.layers[0].mlp.token_dispatcher).__name__
    if case.gate_bias:
        for layer in block.layers:
            layer.mlp.router.bias = torch.nn.Parameter(torch.zeros(EXPERTS, dtype=dtype))
    for parameter in block.parameters():  # norms are built in fp32
        parameter.data = parameter.data.to(dtype)
    wrapper = DistributedDataParallelConfig(grad_reduce_in_fp32=False, overlap_grad_reduce=False)
    return DistributedDataParallel(config, wrapper, block)


def pieces(model) -> dict[tuple, torch.Tensor]:
    """This rank's parameters and buffers, views of them: (name, place, whole shape) -> piece."""
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state = model.module.sharded_state_dict(metadata={"dp_cp_group": group})
    apply_factories(state)
    return {
        (entry.key, tuple(entry.global_offset), tuple(entry.global_shape)): entry.data
        for entry in nested_values(state)
        if isinstance(entry, ShardedTensor)
    }


def place_of(key: tuple, piece: torch.Tensor) -> tuple:
    """Index of a piece in the whole tensor."""
    _, offset, shape = key
    leading = len(shape) - piece.dim()
    return (*offset[:leading], *(slice(o, o + n) for o, n in zip(offset[leading:], piece.shape, strict=True)))


def whole(ranks: list[dict[tuple, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Whole tensors from all ranks' pieces; those that ranks have in common must be the same to rounding."""
    result: dict[str, torch.Tensor] = {}
    for found in ranks:
        for key, piece in found.items():
            tensor = result.setdefault(key[0], piece.new_full(key[2], float("nan")))
            before = tensor[place_of(key, piece)]
            assert before.isnan().all() or torch.allclose(before, piece, rtol=1e-9, atol=1e-12), key
            tensor[place_of(key, piece)] = piece
    assert not any(tensor.isnan().any() for tensor in result.values())
    return result


@torch.no_grad()
def fill(model) -> None:
    """The same whole weights in every layout."""
    for key, piece in pieces(model).items():
        if "expert_bias" in key[0]:
            continue
        generator = torch.Generator().manual_seed(sum(map(ord, key[0])))
        tensor = torch.randn(key[2], generator=generator, dtype=torch.float64)
        if "layernorm" in key[0] or "layer_norm" in key[0]:
            tensor = 1 + 0.1 * tensor
        else:
            tensor /= key[2][-1] ** 0.5
        piece.copy_(tensor[place_of(key, piece)])


def batch_of(case: Case, index: int, dtype: torch.dtype = torch.float64):
    """A micro-batch [S, B, H], the linear readout of the same shape, and the padding [B, S]."""
    generator = torch.Generator().manual_seed(1000 + index)
    x, readout = torch.randn(2, case.length, B, H, generator=generator, dtype=torch.float64).to(dtype)
    padding = torch.zeros(B, case.length, dtype=torch.bool)
    if case.padded:
        padding[1, -case.padded :] = True
        readout[-case.padded :, 1] = 0
    return x, readout, padding if case.padded else None


def forward(model, x: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
    """The block, of the whole sequence on every rank."""
    from megatron.core.tensor_parallel import (
        gather_from_sequence_parallel_region,
        scatter_to_sequence_parallel_region,
    )

    sharded = model.config.sequence_parallel
    if sharded:
        x = scatter_to_sequence_parallel_region(x)
    output = model(x, attention_mask=None, padding_mask=padding)
    return gather_from_sequence_parallel_region(output, tensor_parallel_output_grad=False) if sharded else output


def step(model, case: Case, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[float, torch.Tensor]:
    """Forward, backward and Megatron's finalisation of a global batch; returns the loss and gradients of the inputs."""
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    mine = range(rank, MICRO_BATCHES, size)
    per_token = model.config.calculate_per_token_loss
    scale = torch.tensor(1.0 if per_token else 1 / len(mine), dtype=dtype)
    MoEAuxLossAutoScaler.set_loss_scale(scale)
    model.zero_grad_buffer()
    model.train()
    losses, inputs, tokens = [], [], 0
    for index in mine:
        x, readout, padding = batch_of(case, seed * MICRO_BATCHES + index, dtype)
        x.requires_grad_()
        values = (forward(model, x, padding) * readout).sum()
        valid = case.length * B - case.padded
        tokens += valid
        losses.append(values.detach() / valid)
        (values if per_token else values / valid * scale).backward()
        inputs.append(x.grad)
    count = torch.tensor(tokens) if per_token else None
    finalize_model_grads([model], count)
    loss = torch.stack(losses).mean() / size
    dist.all_reduce(loss, group=parallel_state.get_data_parallel_group())
    get_moe_metrics_tracker().clear()
    factor = size if not per_token else 1
    return loss.item(), torch.stack(inputs) / factor


def run_case(case: Case, layout: Layout, mode: str) -> Result:
    """A step from the same weights; gradients, and the parameters after plain SGD."""
    from megatron.core import parallel_state

    with patched_globals():
        torch.manual_seed(5)
        model = build(case, layout, mode)
        fill(model)
        loss, inputs = step(model, case)
        rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        result = Result(loss, inputs, (rank, size))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.1 * parameter.main_grad)
            result.state = {key: piece.clone() for key, piece in pieces(model).items()}
            for parameter in model.parameters():
                parameter.copy_(parameter.main_grad)
            names = {key: piece.clone() for key, piece in pieces(model).items() if "expert_bias" not in key[0]}
        result.gradients = names
    return result


@contextmanager
def patched_globals():
    """What a step leaves in Megatron's global state."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from megatron.core.transformer.moe.router_replay import RouterReplay

    before = MoEAuxLossAutoScaler.main_loss_backward_scale
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    try:
        yield
    finally:
        MoEAuxLossAutoScaler.main_loss_backward_scale = before
        RouterReplay.clear_global_router_replay_instances()


def run_all(runs: list[tuple[Case, Layout, str]]) -> dict:
    """Results by run, layout by layout."""
    logging.disable(logging.WARNING)
    results = {}
    for layout in dict.fromkeys(layout for _, layout, _ in runs):
        with harness.model_parallel(tp=layout.tp, ep=layout.ep, etp=layout.etp):
            for run in runs:
                if run[1] == layout:
                    try:
                        results[run] = run_case(*run)
                    except Exception as error:
                        raise RuntimeError(f"{run[0].name} {layout} {run[2]}") from error
    return results


def reference_of(case: Case) -> Case:
    """What one process computes: the shared expert is whole there in any case."""
    return replace(case, shared="tensor" if case.shared else None)


def replicas_differ(layout: Layout, mode: str, shared: str, iterations: int) -> dict[str, int]:
    """Train in fp32 with plain SGD; in how many iterations each replicated parameter differs between ranks.

    A gradient that is not the same on all ranks, to the last bit, lets replicas drift apart.
    """
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    differing: dict[str, int] = {}
    case = Case("replicas", (("moe_shared_expert_gate", True),), shared=shared)
    with patched_globals():
        model = build(case, layout, mode, torch.float32)
        fill(model)
        replicated = {
            name: parameter
            for name, parameter in model.named_parameters()
            if not getattr(parameter, "tensor_model_parallel", False) and ".experts." not in name
        }
        for iteration in range(iterations):
            step(model, case, torch.float32, seed=iteration)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.sub_(0.05 * parameter.main_grad)
            for name, parameter in replicated.items():
                others = [torch.zeros_like(parameter) for _ in range(group.size())]
                dist.all_gather(others, parameter.detach(), group=group)
                same = all(torch.equal(other.view(torch.int32), others[0].view(torch.int32)) for other in others)
                differing[name] = differing.get(name, 0) + (not same)
    return differing


@dataclass
class Work:
    """What one pass through a block moved and computed on this rank."""

    gathers: tuple[int, int]
    """All-gathers of sequences in the forward and in the backward."""

    sent: int
    """Routes dispatched."""

    computed: int
    """Routes that the experts computed."""

    counted: int
    """Routes that were counted for the figures about experts."""


def work_of(layout: Layout, mode: str, length: int) -> Work:
    """A pass through one block, watched."""
    from megatron_xmoe.dispatch import all_to_all

    case, counted, seen, gathers = Case("work", length=length), [], [], []
    gather = dist.all_gather_into_tensor
    with patched_globals(), ExitStack() as stack:
        model = build(case, layout, mode)
        fill(model)
        block = model.module.layers[0].mlp
        compute, preprocess, sent = block.experts.forward, block.preprocess, []

        def watched_experts(rows, groups, probs):
            seen.append(int(groups.counts.sum()))
            return compute(rows, groups, probs)

        def watched_preprocess(*args):
            result = preprocess(*args)
            sent.append(len(result[1]))
            return result

        block.experts.forward, block.preprocess = watched_experts, watched_preprocess
        replace = lambda name, new: stack.enter_context(mock.patch.object(all_to_all, name, new))  # noqa: E731
        replace("recording", lambda: True)
        replace("record_traffic", lambda _layer, _traffic, sent: counted.append(int(sent.sum())))
        replace("record_traffic_later", lambda _layer, sent, _traffic: counted.append(int(sent.sum())))
        watch = lambda *args, **options: gathers.append(1) or gather(*args, **options)  # noqa: E731
        stack.enter_context(mock.patch.object(dist, "all_gather_into_tensor", watch))
        x, _, _ = batch_of(case, 0)
        output, _ = block(x.requires_grad_())
        forward = len(gathers)
        output.sum().backward()
        return Work((forward, len(gathers) - forward), sum(sent), sum(seen), int(sum(counted)))


def replayed(layout: Layout, mode: str, length: int) -> bool:
    """Whether recorded routes are replayed for other tokens, and give another result than new ones."""
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    case = Case("replay", (("moe_enable_routing_replay", True),), length=length)
    with patched_globals():
        model = build(case, layout, mode)
        fill(model)
        block = model.module.layers[0].mlp
        first, other = batch_of(case, 0)[0], batch_of(case, 1)[0]
        RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
        _, recorded = block.route(first)
        RouterReplay.set_replay_data(RouterReplay.get_recorded_data())
        RouterReplay.clear_global_router_replay_action()
        _, new = block.route(other)
        RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        _, again = block.route(other)
    has_tokens = recorded.numel() > 0
    return torch.equal(again, recorded) and torch.equal(new, recorded) != has_tokens


def run_checks(layouts: list[tuple[Layout, str, int]], replicas: list[tuple[Layout, str, str, int]]) -> dict:
    """Results of the three above, by their arguments."""
    logging.disable(logging.WARNING)
    results = {}
    for layout in dict.fromkeys(run[0] for run in [*layouts, *replicas]):
        with harness.model_parallel(tp=layout.tp, ep=layout.ep, etp=layout.etp):
            for run in layouts:
                if run[0] == layout:
                    results[run] = work_of(*run), replayed(*run)
            for run in replicas:
                if run[0] == layout:
                    results[run] = replicas_differ(*run)
    return results
