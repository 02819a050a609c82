"""The options of X-MoE. Each field's docstring becomes the `--help` text of its command-line option."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class XMoEConfig:
    """Options of the X-MoE backend for Mixture-of-Experts layers (all start with --xmoe, except the switch)."""

    moe_backend: Literal["megatron", "xmoe"] = "megatron"
    """Who computes the Mixture-of-Experts layers. 'megatron' leaves Megatron-Core's own MoELayer in place. 'xmoe'
    replaces it by X-MoE's layer: the same router, experts, losses and checkpoints, but only routed rows are stored
    and sent (padding-free token buffers). Checkpoints move between the two in both directions."""

    xmoe_kernels: Literal["auto", "cpp", "triton", "reference"] = "auto"
    """Implementation of routing and row movement. 'auto' takes the first of cpp, triton and reference that can run here
    (or the one that the environment variable XMOE_KERNELS names) and says at start-up which and why; a name pins one,
    and the run stops if it cannot be used. 'cpp' is megatron_xmoe._C, compiled C++, CUDA or HIP; 'triton' needs a GPU;
    'reference' is plain torch and runs everywhere. `python -m megatron_xmoe.info` lists them."""

    xmoe_min_capacity: int = 0
    """Smallest capacity of an expert, in routes of one rank's micro-batch, with --moe-expert-capacity-factor. The
    factor's formula gives next to nothing for tiny micro-batches; X-MoE's paper uses 4."""

    xmoe_combine_weights: Literal["probs", "logits"] = "probs"
    """What an expert's output is multiplied by: the routing probability, or the router's raw logit. The original
    X-MoE's code uses logits, so its checkpoints need 'logits' to give the outputs they were trained to give."""

    xmoe_group_score: Literal["sum", "max"] = "sum"
    """What ranks the groups of --moe-router-num-groups: the sum of their best scores, as Megatron and DeepSeek-V3 have
    it, or the best score alone, as DeepSeek-V2 does."""

    xmoe_qk_norm: Literal["per-head", "all-heads"] = "per-head"
    """What --qk-layernorm normalises: each head of the queries and keys by itself, as Megatron does, or all heads
    together, as OLMoE does. Works with either backend."""

    xmoe_expert_load_file: str | None = None
    """File for the load of each expert: at every logged iteration rank 0 appends a line of JSON with the number of
    routes that each expert of each layer got since the line before. tools/plot_run.py draws it."""

    xmoe_grouped_gemm: Literal["auto", "triton", "torch", "loop"] = "auto"
    """Implementation of the experts' matrix products. 'triton' is this project's kernels, for NVIDIA and AMD GPUs;
    'torch' is torch's grouped_mm, for bf16 on NVIDIA GPUs of compute capability 9 and above; 'loop' is a product per
    expert and runs everywhere. 'auto' takes the first of them that can run on a GPU, and the loop on a CPU; a name pins
    one, and the run stops if it cannot be used. `python -m megatron_xmoe.info` lists them."""

    xmoe_recompute_activation: bool = False
    """Experts save only their input for backward and compute the first matrix product again, so that of an MoE layer
    with d hidden and n FFN size 2d instead of 2d + 4Kn bytes a token are kept (bf16, gated, top-K)."""

    xmoe_gradient_accumulation_fusion: Literal["auto", "on", "off"] = "auto"
    """Whether the experts' weight gradients are added to Megatron's main_grad (fp32 with
    --accumulate-allreduce-grads-in-fp32 or --bf16) by the matrix products themselves. 'auto' does unless
    --no-gradient-accumulation-fusion is given. Needs no Apex, unlike the same in Megatron's own layers."""
