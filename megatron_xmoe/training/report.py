"""The start-up block: which backend, kernels and groups are used, and why."""

import os
import socket
from collections import Counter

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.training import get_args, print_rank_0

from megatron_xmoe import _optional
from megatron_xmoe.config import XMoEConfig
from megatron_xmoe.dispatch.choice import dispatcher_for
from megatron_xmoe.kernels.grouped_gemm import choose_grouped_gemm
from megatron_xmoe.kernels.registry import kernels_in_use, triton_is_usable
from megatron_xmoe.parallel_state import node_topology
from megatron_xmoe.sequence_shard import block_mode
from megatron_xmoe.specs import uses_torch_attention
from megatron_xmoe.training.rotary import rotary_embedding
from megatron_xmoe.version import __version__

GROUPS = (
    ("tensor", parallel_state.get_tensor_model_parallel_group),
    ("pipeline", parallel_state.get_pipeline_model_parallel_group),
    ("data", parallel_state.get_data_parallel_group),
    ("expert", parallel_state.get_expert_model_parallel_group),
    ("expert-data", parallel_state.get_expert_data_parallel_group),
)
DISPATCHERS = {
    "alltoall": "one uneven all-to-all of routed rows, no padding",
    "rbd": "one row per token and node between nodes, no padding",
}


def print_report(xmoe: XMoEConfig, adjustments: list[str], stand_ins: int, repairs: int) -> None:
    """Print the block on rank 0. Called by every rank, once the process groups exist.

    Args:
        xmoe: the options.
        adjustments: options set by this program, a line each.
        stand_ins: number of torch and Megatron symbols replaced for a CPU run; 0 on a GPU.
        repairs: number of Megatron's functions that are repaired everywhere.
    """
    args = get_args()
    nodes = _nodes()
    lines = [f"megatron_xmoe {__version__}", f"backend      {_backend(xmoe, args)}"]
    if xmoe.moe_backend == "xmoe":
        kernels = kernels_in_use()
        lines += [
            *(f"dispatcher   {line}" for line in _dispatchers(xmoe, args)),
            f"experts      {_experts(xmoe, args)}",
            f"sequence     {_sequence(xmoe, args)}",
            f"kernels      {kernels.name}: {kernels.reason}",
        ]
    rotary = rotary_embedding(args).text
    lines += [
        f"attention    {_attention(args)}",
        *([f"rotary       {rotary}"] if rotary else []),
        f"device       {_device(stand_ins)}",
        f"repairs      {repairs} in Megatron-Core's wheel, see megatron_xmoe/platform (wheel.py, multi_tensor.py)",
        f"nodes        {nodes}",
        *(f"placement    {line}" for line in _placement(xmoe, args)),
        *(f"groups       {line}" for line in _groups()),
        *(f"set for you  {line}" for line in adjustments),
    ]
    width = max(map(len, lines))
    print_rank_0("\n".join(["-" * width, *lines, "-" * width]))


def _backend(xmoe: XMoEConfig, args) -> str:
    if xmoe.moe_backend == "xmoe":
        return f"xmoe (XMoELayer) for {args.num_experts} experts, top-{args.moe_router_topk}"
    if args.spec:
        return f"megatron, with the layers of --spec {' '.join(args.spec)}"
    if args.num_experts:
        return f"megatron (MoELayer, {args.moe_token_dispatcher_type} dispatcher); --moe-backend xmoe changes that"
    return "megatron (dense model)"


def _dispatchers(xmoe: XMoEConfig, args) -> list[str]:
    """Of every expert-parallel group; they can differ where groups lie on nodes differently."""
    topology = node_topology(parallel_state.get_expert_model_parallel_group(), xmoe.xmoe_ranks_per_node)
    choice = dispatcher_for(xmoe.xmoe_dispatcher, topology.node_of, args.moe_router_topk, args.num_experts)
    text = f"{choice.dispatcher}: {DISPATCHERS[choice.dispatcher]} ({choice.reason}; nodes by {topology.source})"
    texts: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    if len(set(texts)) == 1:
        return [text]
    return [f"on {ranks} processes {text}" for text, ranks in Counter(texts).items()]


def _placement(xmoe: XMoEConfig, args) -> list[str]:
    if not args.num_experts or (args.expert_model_parallel_size == 1 and xmoe.xmoe_ep_placement == "ep-first"):
        return []
    who = {"ep-first": "an expert-parallel group", "dp-first": "the replicas of an expert"}[xmoe.xmoe_ep_placement]
    alone = "; with one expert-parallel rank there is no choice" if args.expert_model_parallel_size == 1 else ""
    return [f"{xmoe.xmoe_ep_placement}: {who} on neighbouring ranks{alone}"]


def _experts(xmoe: XMoEConfig, args) -> str:
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    features = args.hidden_size, args.moe_ffn_hidden_size // args.expert_tensor_parallel_size
    products = choose_grouped_gemm(xmoe.xmoe_grouped_gemm, device_type, args.params_dtype, features)
    activation = "Triton" if device_type == "cuda" and triton_is_usable("cuda") else "plain torch"
    parts = [f"grouped; matrix products {products.name}: {products.reason}", f"activation by {activation}"]
    parts += ["with biases"] * args.add_bias_linear
    parts += ["recomputed from their input"] * xmoe.xmoe_recompute_activation
    parts += ["weight gradients added to main_grad"] * (xmoe.xmoe_gradient_accumulation_fusion == "on")
    return "; ".join(parts)


def _sequence(xmoe: XMoEConfig, args) -> str:
    size = args.tensor_model_parallel_size
    sizes = size, args.sequence_parallel, args.expert_tensor_parallel_size
    _, text = block_mode(xmoe.xmoe_sequence_shard, *sizes)
    if size > 1 and args.moe_shared_expert_intermediate_size:
        whole = xmoe.xmoe_shared_expert == "sequence"
        text += f"; shared experts {'whole on every rank' if whole else 'sharded over these ranks'}"
    return text


def _attention(args) -> str:
    if args.transformer_impl == "transformer_engine":
        return f"Transformer Engine, {_optional.transformer_engine().reason}"
    if not uses_torch_attention(args):
        return f"Megatron's unfused attention (--attention-backend {args.attention_backend.name}, softmax type " \
            f"{args.softmax_type})"
    return f"torch's scaled_dot_product_attention (Transformer Engine: {_optional.transformer_engine().reason})"


def _device(stand_ins: int) -> str:
    if stand_ins:
        return f"CPU, gloo; {stand_ins} torch.cuda stand-ins, listed in megatron_xmoe/platform/cpu.py"
    platform = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return f"{torch.cuda.get_device_name()}, {platform}"


def _nodes() -> str:
    """Number of hosts and processes on each, by an exchange of host names."""
    names: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(names, socket.gethostname())
    sizes = sorted(Counter(names).values())
    per_node = str(sizes[0]) if sizes[0] == sizes[-1] else ", ".join(map(str, sizes))
    launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in os.environ else "environment variables"
    return f"{len(sizes)} with {per_node} process(es) each (host names; started by {launcher})"


def _groups() -> list[str]:
    lines = []
    for name, get_group in GROUPS:
        ranks = dist.get_process_group_ranks(get_group())
        lines.append(f"{name} {len(ranks)}" + (f", rank 0 with {ranks}" if 1 < len(ranks) <= 16 else ""))
    return lines
