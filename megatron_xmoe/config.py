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

    xmoe_dispatcher: Literal["auto", "alltoall", "rbd"] = "auto"
    """How tokens reach their experts. 'alltoall' sends a row for each expert of a token. 'rbd', redundancy-bypassing
    dispatch, sends one row to each node, which hands it on inside the node, and sums a node's results before they
    return. 'auto' takes rbd where it saves enough of the network's rows, and says why at start-up. Where a rank is
    alone on its node everywhere, or all are on one, rbd has nothing to save and alltoall is used."""

    xmoe_pilot: Literal["balanced", "first"] = "balanced"
    """Which rank of another node gets a token's one row, with rbd: 'balanced' chooses among those with an expert of the
    token by a hash, the same when a step is recomputed or a run repeated; 'first' takes the first."""

    xmoe_rbd_overlap: Literal["on", "off"] = "on"
    """With rbd: shared experts with --moe-shared-expert-overlap run while rows are on the network. 'off' does one thing
    after the other. What the own node needs travels beside the rows for other nodes in either case."""

    xmoe_guard_empty_alltoall: Literal["auto", "on", "off"] = "auto"
    """A rank that would send or receive nothing in an exchange of tokens sends itself one row that nobody reads: RCCL
    can hang otherwise. 'auto' does so on AMD's GPUs."""

    xmoe_ranks_per_node: str | None = None
    """Processes on a node, or the sizes of consecutive nodes in the order of the ranks, like 3,5, repeated until all
    processes are counted. A node is a set of processes joined by links much faster than the network: a host as a rule,
    but larger where fast links join hosts. By default the launcher's variables tell (torchrun, srun), and where these
    do not, the hosts' names."""

    xmoe_ep_placement: Literal["ep-first", "dp-first"] = "ep-first"
    """Which ranks are neighbours, and so share a node: those of an expert-parallel group ('ep-first', Megatron's order;
    for many small experts, whose exchange of tokens costs most), or those that hold replicas of the same experts
    ('dp-first'; for few large experts, whose reduction of gradients costs most). Works with either backend of
    pretrain_xmoe.py."""

    xmoe_qk_norm: Literal["per-head", "all-heads"] = "per-head"
    """What --qk-layernorm normalises: each head of the queries and keys by itself, as Megatron does, or all heads
    together, as OLMoE does. Works with either backend of pretrain_xmoe.py."""

    xmoe_sequence_shard: Literal["auto", "on", "off"] = "auto"
    """What tensor-parallel ranks do in the Mixture-of-Experts block without --sequence-parallel. 'on': each takes its
    share of the sequence before the gate and gathers the outputs after the combine, so that activations of the block
    are divided by the tensor-parallel size; the ranks join expert or expert-data parallelism. 'off': each computes all
    tokens. Losses and gradients are the same. 'auto' is 'on' with --expert-tensor-parallel-size 1, which is X-MoE's
    default, and 'off' where experts are sharded. With --sequence-parallel the block is sharded already, and this adds
    nothing."""

    xmoe_shared_expert: Literal["tensor", "sequence"] = "tensor"
    """Shared experts of a sequence-sharded block. 'tensor': weights are sharded over the tensor-parallel ranks, as
    Megatron does it, and see the whole sequence. 'sequence': every rank has the whole weights and computes its share
    of the sequence; this needs more memory for weights and gradients and less for activations. Checkpoints are the
    same."""

    xmoe_grouped_gemm: Literal["auto", "triton", "torch", "loop"] = "auto"
    """Implementation of the experts' matrix products. 'triton' is this project's kernels, for NVIDIA and AMD GPUs;
    'torch' is torch's grouped_mm, for bf16 on NVIDIA GPUs of compute capability 9 and above; 'loop' is a product per
    expert and runs everywhere. 'auto' takes what was the fastest in measurements and says at start-up which and why; a
    name pins one, and the run stops if it cannot be used. `python -m megatron_xmoe.info` lists them."""

    xmoe_recompute_activation: bool = False
    """Experts save only their input for backward and compute the first matrix product again, so that of an MoE layer
    with d hidden and n FFN size 2d instead of 2d + 4Kn bytes a token are kept (bf16, gated, top-K)."""

    xmoe_gradient_accumulation_fusion: Literal["auto", "on", "off"] = "auto"
    """Whether the experts' weight gradients are added to Megatron's main_grad (fp32 with
    --accumulate-allreduce-grads-in-fp32 or --bf16) by the matrix products themselves. 'auto' does in pretrain_xmoe.py,
    and needs no Apex: --no-gradient-accumulation-fusion, without which stock Megatron does not start there, means
    Megatron's own layers only. 'off' leaves it to Megatron's hooks."""

    xmoe_router_fusion: Literal["auto", "off"] = "auto"
    """Whether this project's kernels choose experts, weigh them and compute the load-balancing losses, in a few
    launches instead of about forty. 'auto' sets --moe-router-fusion on a GPU where they serve the options and Triton
    can run, and says so at start-up; 'off' leaves Megatron's own functions, for comparison. For --moe-backend xmoe."""

    xmoe_rope_fusion: Literal["auto", "off"] = "auto"
    """Whether this project's kernel computes the rotary embedding, in one launch a tensor instead of twelve. 'auto'
    takes it where Triton can run and Transformer Engine's is not used. Megatron's --no-rope-fusion means the latter
    only (stock Megatron demands it without Transformer Engine, and for some models with it), so with it this kernel is
    used. 'off' leaves Megatron's own function, for comparison. For --moe-backend xmoe of pretrain_xmoe.py."""

    xmoe_metrics: Literal["off", "summary", "layers"] = "summary"
    """Figures about the experts in Megatron's log, every --log-interval iterations. 'summary' puts the balance of the
    experts, dropped routes, traffic between nodes and the time of the all-to-alls into the console's line, and these
    and more into TensorBoard and W&B. 'layers' adds a curve for each layer and the load of each expert, which
    tools/plot_run.py draws. docs/metrics.md defines them. For --moe-backend xmoe."""

    xmoe_profile_breakdown: bool = False
    """Print a table of where the time of an MoE layer's forward pass goes (gate, dispatch buffer, all-to-all, experts,
    all-to-all, combine), every --log-interval iterations, and write it to TensorBoard. Needs --moe-backend xmoe."""
