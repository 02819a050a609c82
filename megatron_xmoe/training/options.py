"""Which of Megatron's options the X-MoE backend serves; the rest is refused by name at start-up.

Every option of Megatron's parser that concerns the Mixture-of-Experts block is in SERVED or REFUSED, and
UNAVAILABLE lists what this entry script cannot do with either backend. A test walks the parser, so that an option a
new Megatron brings cannot be ignored silently.
"""

import argparse
import re
from dataclasses import dataclass

from megatron_xmoe.training.errors import UsageError

# names of options that change the Mixture-of-Experts block or how it is scheduled
CONCERNS_EXPERTS = re.compile(
    r"moe|mtp|expert|recompute|cuda_graph|fp8|fp4|fsdp|offload|delay_wgrad|overlap_dispatch|ep_overlap|a2a"
)


@dataclass(frozen=True)
class Refusal:
    """Why an option is not served, and what to do instead."""

    reason: str
    way_out: str


# Served by Megatron's own router, experts or schedules around X-MoE's dispatcher, without code of ours.
SERVED = frozenset(
    """
    num_experts moe_ffn_hidden_size moe_layer_freq expert_model_parallel_size
    moe_router_topk moe_aux_loss_coeff moe_z_loss_coeff moe_router_score_function
    moe_router_pre_softmax moe_router_topk_scaling_factor moe_router_dtype moe_router_num_groups moe_router_group_topk
    moe_router_enable_expert_bias moe_router_bias_update_rate moe_shared_expert_intermediate_size
    moe_shared_expert_gate moe_per_layer_logging
    recompute_method recompute_num_layers
    """.split()
)

_LATER = "X-MoE does not serve it yet"
_OWN_EXPERTS = Refusal("it belongs to Transformer Engine's grouped experts, and X-MoE uses its own", "leave it out")
_OTHER_DISPATCHER = Refusal("it is an option of another dispatcher than X-MoE's", "leave it out")
_LOW_PRECISION = Refusal("X-MoE computes experts in bf16, fp16 or fp32", "leave it out")
_CUDA_GRAPH = Refusal("the rows of a padding-free buffer differ in number from step to step", "leave it out")
_FSDP = Refusal("X-MoE is tested with Megatron's own data parallelism", "use --use-distributed-optimizer")
_NOT_YET = Refusal(_LATER, "leave it out, or use --moe-backend megatron")
_OFFLOAD = Refusal(_LATER, "use --recompute-granularity full, or --moe-backend megatron")
_STAGES = Refusal("it reorders the layer's stages, which X-MoE's dispatcher is not tested for", _NOT_YET.way_out)

REFUSED: dict[str, Refusal] = {
    **dict.fromkeys(
        """
        moe_expert_capacity_factor moe_token_drop_policy moe_router_force_load_balancing moe_router_force_biased
        moe_input_jitter_eps moe_router_quantile_balancing_ema moe_enable_routing_replay moe_shared_expert_overlap
        moe_use_upcycling moe_upcycling_granularity moe_routing_trace_path moe_routing_trace_max_training_iters
        moe_routing_trace_capture_logits moe_routing_trace_capture_hidden_states moe_routing_trace_dump_weights
        mtp_num_layers mtp_loss_scaling_factor mtp_use_repeated_layer mtp_detach_heads mtp_standalone
        mtp_hybrid_override_pattern moe_apply_probs_on_input moe_latent_size save_tokens_per_expert_interval
        recompute_modules moe_layer_recompute
        """.split(),
        _NOT_YET,
    ),
    **dict.fromkeys(
        """
        moe_grouped_gemm moe_single_grouped_weight moe_single_grouped_bias moe_mlp_glu_interleave_size
        use_grouped_gemm_for_shared_expert moe_shared_expert_glu_interleave_size
        expert_tensor_parallel_num_weight_shards
        """.split(),
        _OWN_EXPERTS,
    ),
    **dict.fromkeys(
        """
        moe_enable_deepep moe_flex_dispatcher_backend moe_permute_fusion_into_hybridep
        moe_hybridep_pad_uneven_dispatch_inputs moe_flex_dispatcher_num_sms moe_deepep_num_sms moe_hybridep_num_sms
        moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute moe_hybridep_num_sms_preprocessing
        moe_ncclep_static_shape moe_ncclep_zero_copy moe_permute_fusion moe_router_fusion
        moe_expert_rank_capacity_factor moe_paged_stash moe_paged_stash_page_size
        moe_paged_stash_buffer_size_factor_cuda moe_paged_stash_buffer_size_factor_cpu high_priority_a2a_comm_stream
        """.split(),
        _OTHER_DISPATCHER,
    ),
    **dict.fromkeys(
        """
        fp8 fp8_recipe fp8_quantizer_factory fp8_margin fp8_interval fp8_amax_history_len fp8_amax_compute_algo
        fp8_wgrad fp8_output_proj fp8_param_gather fp4 fp4_recipe fp4_quantizer_factory fp4_param_gather
        moe_router_padding_for_quantization moe_router_padding_for_fp8 keep_fp8_transpose_cache
        reuse_grad_buf_for_mxfp8_param_ag
        """.split(),
        _LOW_PRECISION,
    ),
    **dict.fromkeys(
        """
        enable_cuda_graph external_cuda_graph cuda_graph_impl cuda_graph_warmup_steps cuda_graph_scope_deprecated
        cuda_graph_modules optimizer_cuda_graph delay_offload_until_cuda_graph
        """.split(),
        _CUDA_GRAPH,
    ),
    **dict.fromkeys(
        """
        use_megatron_fsdp use_torch_fsdp2 fsdp_manual_registration fsdp_double_buffer strict_fsdp_dtensor_load
        torch_fsdp2_reshard_after_forward megatron_fsdp_main_params_dtype megatron_fsdp_main_grads_dtype
        megatron_fsdp_grad_comm_dtype megatron_fsdp_enable_fine_grained_param_gather
        megatron_fsdp_max_pool_double_buffer
        fsdp_db_use_persist_buf_on_alloc_fail
        """.split(),
        _FSDP,
    ),
    **dict.fromkeys(
        """
        cpu_offloading_num_layers cpu_offloading_retain_pinned_cpu_buffers fine_grained_activation_offloading
        offload_modules min_offloaded_tensor_size delta_offload_bytes_across_pp_ranks activation_offload_fraction
        fine_grained_offloading_max_inflight_offloads
        """.split(),
        _OFFLOAD,
    ),
    **dict.fromkeys(
        """
        overlap_moe_expert_parallel_comm delay_wgrad_compute overlap_dispatch_backward_with_experts_wgrad
        ep_overlap_early_attn_memory_release
        """.split(),
        _STAGES,
    ),
}

# Concern experts by name only: inference, reinforcement learning and the optimizer's own states.
UNRELATED = frozenset(
    """
    moe_backend
    inference_cuda_graph_scope inference_moe_disable_fused_quant_kernels inference_moe_token_dispatcher_type
    inference_dynamic_batching_num_cuda_graphs decode_only_cuda_graphs inference_cuda_graph_all_prefills
    inference_cuda_graph_max_tokens inference_dynamic_batching_cuda_graph_mixed_prefill_count
    inference_dynamic_batching_cuda_graph_sizing_distribution moe_pad_experts_for_cuda_graph_inference
    inference_disable_ep_consensus
    rl_offload_optimizer_during_inference rl_persist_cuda_graphs rl_training_cuda_graphs
    rl_inference_expert_model_parallel_size rl_inference_expert_tensor_model_parallel_size
    rl_offload_inference_model_weights_when_idle
    optimizer_cpu_offload optimizer_offload_fraction use_torch_optimizer_for_cpu_offload
    """.split()
)

# Served for some values only: {option: (rule, function of the arguments that says whether the value is served, fix)}.
LIMITED = {
    "moe_token_dispatcher_type": (
        "X-MoE brings its own all-to-all dispatcher",
        lambda args: args.moe_token_dispatcher_type == "alltoall",
        "use --moe-token-dispatcher-type alltoall or leave it out",
    ),
    "moe_pad_expert_input_to_capacity": (
        "X-MoE pads nothing",
        lambda args: not args.moe_pad_expert_input_to_capacity,
        "leave it out",
    ),
    "expert_tensor_parallel_size": (
        "X-MoE does not shard experts over tensor-parallel ranks yet",
        lambda args: args.expert_tensor_parallel_size in (None, 1),
        "use --expert-tensor-parallel-size 1",
    ),
    "moe_router_load_balancing_type": (
        "X-MoE is not tested with it yet",
        lambda args: not {"sinkhorn", "quantile_balancing"} & set(_as_list(args.moe_router_load_balancing_type)),
        "use aux_loss, seq_aux_loss, global_aux_loss or none",
    ),
    "recompute_granularity": (
        "selective recomputation is not served yet",
        lambda args: args.recompute_granularity in (None, "full"),
        "use --recompute-granularity full",
    ),
    "recompute_activations": (
        "it stands for selective recomputation, which is not served yet",
        lambda args: not args.recompute_activations,
        "use --recompute-granularity full",
    ),
    "ckpt_format": (
        "its file names the weights as the class of the experts does, so it would not load into Megatron's own layers",
        lambda args: args.ckpt_format != "torch",
        "use --ckpt-format torch_dist",
    ),
    "sequence_parallel": (
        "with tensor parallelism the MoE block needs a share of the sequence on each rank",
        lambda args: args.tensor_model_parallel_size == 1 or args.sequence_parallel,
        "add --sequence-parallel",
    ),
}

# Options that the command line spells otherwise than their destination.
SPELLINGS = {
    "fp8": "--fp8-format",
    "fp4": "--fp4-format",
    "fp8_wgrad": "--no-fp8-wgrad",
    "cuda_graph_scope_deprecated": "--cuda-graph-scope",
    "strict_fsdp_dtensor_load": "--no-strict-fsdp-dtensor-load",
    "torch_fsdp2_reshard_after_forward": "--torch-fsdp2-no-reshard-after-forward",
}

SCRIPT = "pretrain_xmoe.py"

# Not available in this entry script with either backend.
UNAVAILABLE: dict[str, Refusal] = {
    "yaml_cfg": Refusal("a YAML file replaces the whole command line, ours included", "give the options themselves"),
    "sft": Refusal("packed sequences need Transformer Engine's attention", "pretrain on documents"),
    "dataloader_inter_document_masking": Refusal(
        "packed sequences need Transformer Engine's attention", "use --reset-attention-mask"
    ),
    "hybrid_context_parallel": Refusal("its batches are not built here", "use --context-parallel-size"),
    "perform_rl_step": Refusal("this script pretrains", "use Megatron-LM's train_rl.py"),
    "inprocess_restart": Refusal("the job is started by torchrun, which restarts it", "use torchrun --max-restarts"),
    "hybrid_layer_pattern": Refusal("this script builds GPT models", "use Megatron-LM's pretrain_hybrid.py"),
    "hybrid_override_pattern": Refusal("this script builds GPT models", "use Megatron-LM's pretrain_hybrid.py"),
}


def check_options(args: argparse.Namespace, defaults: dict[str, object]) -> None:
    """Refuse what is not served.

    Args:
        args: parsed and adjusted arguments, not yet validated by Megatron; those that --use-checkpoint-args took from
            a checkpoint count as well.
        defaults: destination -> default of every option.

    Raises:
        UsageError: the first option that is not served, the reason, and the way out.
    """
    changed = [name for name in sorted(defaults) if getattr(args, name, defaults[name]) != defaults[name]]
    for name in changed:
        if name in UNAVAILABLE:
            _refuse(name, args, UNAVAILABLE[name], SCRIPT)
    if args.mtp_num_layers and args.pipeline_model_parallel_size > 1:
        _refuse("mtp_num_layers", args, Refusal("its batches are built for one pipeline stage", "use one"), SCRIPT)
    if args.moe_backend != "xmoe":
        return
    for name in changed:
        if name in REFUSED:
            _refuse(name, args, REFUSED[name], "--moe-backend xmoe")
    for name, (rule, served, fix) in LIMITED.items():
        if not served(args):
            _refuse(name, args, Refusal(rule, fix), "--moe-backend xmoe")


def _refuse(name: str, args: argparse.Namespace, refusal: Refusal, who: str) -> None:
    value, option = getattr(args, name), SPELLINGS.get(name, f"--{name.replace('_', '-')}")
    if value is False and name not in SPELLINGS:
        what = f"does not run without {option}"
    else:
        what = f"does not take {option}" if isinstance(value, bool) else f"does not take {option} {value}"
    raise UsageError(f"{who} {what}: {refusal.reason}. Fix: {refusal.way_out}")


def _as_list(value) -> list:
    return value if isinstance(value, list) else [value]
