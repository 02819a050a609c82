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
from megatron_xmoe.kernels.grouped_gemm import choose_grouped_gemm
from megatron_xmoe.kernels.registry import kernels_in_use, triton_is_usable
from megatron_xmoe.specs import uses_torch_attention
from megatron_xmoe.version import __version__

GROUPS = (
    ("tensor", parallel_state.get_tensor_model_parallel_group),
    ("pipeline", parallel_state.get_pipeline_model_parallel_group),
    ("data", parallel_state.get_data_parallel_group),
    ("expert", parallel_state.get_expert_model_parallel_group),
    ("expert-data", parallel_state.get_expert_data_parallel_group),
)


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
            "dispatcher   alltoall: one uneven all-to-all of routed rows, no padding",
            f"experts      {_experts(xmoe, args)}",
            f"kernels      {kernels.name}: {kernels.reason}",
        ]
    lines += [
        f"attention    {_attention(args)}",
        f"device       {_device(stand_ins)}",
        f"repairs      {repairs} in Megatron-Core's wheel, listed in megatron_xmoe/platform/wheel.py",
        f"nodes        {nodes}",
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
