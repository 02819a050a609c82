"""What becomes of each of Megatron's options that concern the Mixture-of-Experts block.

An option is served (with the test that shows it), served for some values, or refused with the reason and the way out.
docs/options.md is made from these tables (tools/render_options.py). A test walks Megatron's parser, so that an option
that a new Megatron brings cannot be ignored silently.
"""

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass

from megatron_xmoe import _optional
from megatron_xmoe.router import why_not_fused
from megatron_xmoe.sequence_shard import block_mode
from megatron_xmoe.training.arguments import xmoe_config_from_args

# names of options that change the Mixture-of-Experts block, how it is scheduled, or how its parameters are updated
CONCERNS_EXPERTS = re.compile(
    r"moe|mtp|expert|recompute|cuda_graph|fp8|fp4|fsdp|offload|delay_wgrad|overlap_dispatch|ep_overlap|a2a"
    r"|^optimizer$|(^|_)mup(_|$)"
)


@dataclass(frozen=True)
class Refusal:
    """Why an option is not served, and what to do instead."""

    reason: str
    way_out: str


@dataclass(frozen=True)
class Limit:
    """An option that is served for some values only."""

    rule: str
    served: Callable[[argparse.Namespace], bool]
    """Whether the arguments are within the rule."""

    way_out: str
    shown_by: tuple[str, ...] = ()
    """The cases of tests/option_cases.py that show the served values; none where they are the default."""


def _shown(table: dict[str, str]) -> dict[str, tuple[str, ...]]:
    """{case: options} turned into {option: cases}."""
    options = sorted({name for names in table.values() for name in names.split()})
    return {name: tuple(case for case, names in table.items() if name in names.split()) for name in options}


# option -> the cases of tests/option_cases.py that show it: same losses and updates as stock Megatron; together they
# have every value of an option that has a choice
SERVED: dict[str, tuple[str, ...]] = _shown(
    {
        "softmax": "num_experts moe_ffn_hidden_size moe_router_topk moe_router_load_balancing_type moe_aux_loss_coeff "
        "moe_z_loss_coeff moe_per_layer_logging moe_router_score_function expert_model_parallel_size",
        "softmax over all experts": "moe_router_pre_softmax moe_router_topk_scaling_factor moe_router_dtype",
        "sigmoid with expert bias in groups": "moe_router_score_function moe_router_topk_scaling_factor "
        "moe_router_num_groups moe_router_group_topk moe_router_enable_expert_bias moe_router_bias_update_rate "
        "moe_router_dtype moe_router_load_balancing_type",
        "square root of softplus": "moe_router_score_function moe_router_enable_expert_bias "
        "moe_router_load_balancing_type",
        "softmax in groups": "moe_router_num_groups moe_router_group_topk",
        "sinkhorn": "moe_router_load_balancing_type",
        "sinkhorn top-1": "moe_router_load_balancing_type",
        "quantile balancing": "moe_router_load_balancing_type moe_router_quantile_balancing_ema",
        "three auxiliary losses": "moe_router_load_balancing_type moe_aux_loss_coeff",
        "global auxiliary loss": "moe_router_load_balancing_type",
        "loss per token": "calculate_per_token_loss",
        "input jitter": "moe_input_jitter_eps",
        "forced imbalance": "moe_router_force_biased",
        "routing replay": "moe_enable_routing_replay",
        "routing trace": "moe_routing_trace_path moe_routing_trace_max_training_iters moe_routing_trace_capture_logits "
        "moe_routing_trace_capture_hidden_states moe_routing_trace_dump_weights",
        "shared experts": "moe_shared_expert_intermediate_size moe_shared_expert_gate",
        "overlapped shared experts": "moe_shared_expert_overlap",
        "capacity by weight": "moe_expert_capacity_factor moe_token_drop_policy",
        "capacity by position": "moe_expert_capacity_factor moe_token_drop_policy",
        "smallest capacity": "xmoe_min_capacity",
        "capacity with expert bias": "moe_expert_capacity_factor",
        "dense layers": "moe_layer_freq",
        "tensor-parallel experts": "expert_tensor_parallel_size sequence_parallel",
        "sharded sequence": "xmoe_sequence_shard",
        "sharded sequence by default": "xmoe_sequence_shard",
        "duplicated sequence": "xmoe_sequence_shard",
        "duplicated sequence, tensor-parallel experts": "xmoe_sequence_shard expert_tensor_parallel_size",
        "recomputed layers": "recompute_granularity recompute_method recompute_num_layers",
        "recomputed blocks": "recompute_method",
        "recomputed experts": "recompute_granularity",
        "recomputed attention": "recompute_activations",
        "recomputed experts by the old option": "moe_layer_recompute",
        "recomputed pre-activation": "xmoe_recompute_activation",
        "gradients added by the products": "xmoe_gradient_accumulation_fusion",
        "gradients added by the hooks": "xmoe_gradient_accumulation_fusion",
        "several tokens at once": "mtp_num_layers mtp_loss_scaling_factor",
        "several tokens over pipeline stages": "mtp_num_layers",
        "several tokens on a stage of their own": "mtp_num_layers",
        "several tokens by one layer": "mtp_use_repeated_layer mtp_detach_heads",
        "fp16": "fp16 initial_loss_scale hysteresis min_loss_scale",
        "bf16": "bf16 xmoe_gradient_accumulation_fusion",
    }
)

LIMITED: dict[str, Limit] = {
    "moe_token_dispatcher_type": Limit(
        "X-MoE brings its own all-to-all dispatcher",
        lambda args: args.moe_token_dispatcher_type == "alltoall",
        "use --moe-token-dispatcher-type alltoall or leave it out",
    ),
    "moe_pad_expert_input_to_capacity": Limit(
        "X-MoE pads nothing: dropped or not, only routed rows are stored and sent",
        lambda args: not args.moe_pad_expert_input_to_capacity,
        "leave it out; --moe-expert-capacity-factor drops without it",
    ),
    "moe_apply_probs_on_input": Limit(
        "with several experts a token, the weight of each is not the input's",
        lambda args: not args.moe_apply_probs_on_input or args.moe_router_topk == 1,
        "leave it out, or use --moe-router-topk 1",
        ("weights on the input",),
    ),
    "recompute_modules": Limit(
        "core_attn, mlp, moe and shared_experts can be recomputed; layernorm, mla_up_proj and gdn_norm_out with "
        "Transformer Engine only; moe_act in Megatron's grouped experts only",
        lambda args: set(args.recompute_modules or ()) <= _recomputable(),
        "leave those that cannot out, or use --recompute-granularity full",
        ("recomputed experts", "recomputed modules"),
    ),
    "ckpt_format": Limit(
        "its file names the weights as the class of the experts does, so it would not load into Megatron's own layers",
        lambda args: args.ckpt_format != "torch",
        "use --ckpt-format torch_dist",
    ),
    "optimizer": Limit(
        "others are not tested; most take matrices one by one, and X-MoE has those of a rank's experts in one tensor",
        lambda args: args.optimizer in ("adam", "sgd"),
        "use --optimizer adam or sgd, or --moe-backend megatron",
    ),
    "moe_router_force_load_balancing": Limit(
        "ranks with the same tokens would draw different routes for them",
        lambda args: not args.moe_router_force_load_balancing
        or not (sequence_mode(args) == "duplicated" or (args.seq_length or 0) % args.tensor_model_parallel_size),
        "use --xmoe-sequence-shard on or --sequence-parallel",
        ("forced balance",),
    ),
    "moe_router_fusion": Limit(
        "it takes X-MoE's kernels, for which Triton has to run here (and --xmoe-kernels not be reference); there is "
        "none for sinkhorn, quantile_balancing, --moe-enable-routing-replay, --xmoe-group-score max, more than 4096 "
        "experts, and groups that are too small or too many for --moe-router-topk",
        lambda args: not args.moe_router_fusion
        or not why_not_fused(args, args.num_experts, xmoe_config_from_args(args)),
        "leave it out: it is set for you where it is served",
    ),
}


def sequence_mode(args: argparse.Namespace) -> str:
    """What the Mixture-of-Experts block does with the sequence, see sequence_shard.block_mode."""
    size = args.tensor_model_parallel_size
    return block_mode(
        *(args.xmoe_sequence_shard, size, args.sequence_parallel, args.expert_tensor_parallel_size or size)
    )[0]


def _recomputable() -> set[str]:
    engine = {"layernorm", "mla_up_proj", "gdn_norm_out"} if _optional.transformer_engine().usable else set()
    return {"core_attn", "mlp", "moe", "shared_experts"} | engine


def _refused(table: dict[Refusal, str]) -> dict[str, Refusal]:
    """{refusal: options} turned into {option: refusal}."""
    return {name: refusal for refusal, names in table.items() for name in names.split()}


REFUSED: dict[str, Refusal] = _refused(
    {
        Refusal(
            "it projects tokens by a linear layer of Transformer Engine around the dispatcher, which X-MoE is not "
            "tested with",
            "leave it out, or use --moe-backend megatron",
        ): "moe_latent_size",
        Refusal(
            "it looks into Transformer Engine's grouped experts, and X-MoE uses its own",
            "use --xmoe-metrics layers",
        ): "save_tokens_per_expert_interval",
        Refusal("Megatron sets it from --pipeline-model-parallel-layout", "leave it out"): "mtp_standalone",
        Refusal(
            "it is not tested, and tells vectors from matrices by axes, of which X-MoE's parameters have one more",
            "use --moe-backend megatron",
        ): "use_mup",
        Refusal("it belongs to hybrid models, and this script builds GPT models", "leave it out"):
        "mtp_hybrid_override_pattern",
        Refusal("it belongs to Transformer Engine's grouped experts, and X-MoE uses its own", "leave it out"):
        """
        moe_grouped_gemm moe_single_grouped_weight moe_single_grouped_bias moe_mlp_glu_interleave_size
        use_grouped_gemm_for_shared_expert moe_shared_expert_glu_interleave_size
        expert_tensor_parallel_num_weight_shards
        """,
        Refusal("it is an option of another dispatcher than X-MoE's", "leave it out"):
        """
        moe_enable_deepep moe_flex_dispatcher_backend moe_permute_fusion_into_hybridep
        moe_hybridep_pad_uneven_dispatch_inputs moe_flex_dispatcher_num_sms moe_deepep_num_sms moe_hybridep_num_sms
        moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute moe_hybridep_num_sms_preprocessing
        moe_ncclep_static_shape moe_ncclep_zero_copy moe_permute_fusion
        moe_expert_rank_capacity_factor moe_paged_stash moe_paged_stash_page_size
        moe_paged_stash_buffer_size_factor_cuda moe_paged_stash_buffer_size_factor_cpu high_priority_a2a_comm_stream
        """,
        Refusal("X-MoE computes experts in bf16, fp16 or fp32", "leave it out"):
        """
        fp8 fp8_recipe fp8_quantizer_factory fp8_margin fp8_interval fp8_amax_history_len fp8_amax_compute_algo
        fp8_wgrad fp8_output_proj fp8_param_gather fp4 fp4_recipe fp4_quantizer_factory fp4_param_gather
        moe_router_padding_for_quantization moe_router_padding_for_fp8 keep_fp8_transpose_cache
        reuse_grad_buf_for_mxfp8_param_ag
        """,
        Refusal("the rows of a padding-free buffer differ in number from step to step", "leave it out"):
        """
        enable_cuda_graph external_cuda_graph cuda_graph_impl cuda_graph_warmup_steps cuda_graph_scope_deprecated
        cuda_graph_modules optimizer_cuda_graph delay_offload_until_cuda_graph
        """,
        Refusal("X-MoE is tested with Megatron's own data parallelism", "use --use-distributed-optimizer"):
        """
        use_megatron_fsdp use_torch_fsdp2 fsdp_manual_registration fsdp_double_buffer strict_fsdp_dtensor_load
        torch_fsdp2_reshard_after_forward megatron_fsdp_main_params_dtype megatron_fsdp_main_grads_dtype
        megatron_fsdp_grad_comm_dtype megatron_fsdp_enable_fine_grained_param_gather
        megatron_fsdp_max_pool_double_buffer fsdp_db_use_persist_buf_on_alloc_fail
        """,
        Refusal(
            "it needs Transformer Engine's layers, which move their inputs to the host",
            "use --recompute-granularity selective --recompute-modules moe, or --moe-backend megatron",
        ): """
        cpu_offloading_num_layers cpu_offloading_retain_pinned_cpu_buffers fine_grained_activation_offloading
        offload_modules min_offloaded_tensor_size delta_offload_bytes_across_pp_ranks activation_offload_fraction
        fine_grained_offloading_max_inflight_offloads
        """,
        Refusal(
            "it runs a layer's stages out of order and frees their inputs early, which X-MoE's dispatcher is not "
            "tested for",
            "leave it out (--moe-shared-expert-overlap is served), or use --moe-backend megatron",
        ): """
        overlap_moe_expert_parallel_comm delay_wgrad_compute overlap_dispatch_backward_with_experts_wgrad
        ep_overlap_early_attn_memory_release
        """,
    }
)

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
    mup_width_mult mup_base_hidden_size mup_embedding_mult mup_output_mult mup_base_head_dim mup_attn_scale_power
    """.split()
)

_UPCYCLING = Refusal(
    "Megatron-Core 0.19's own upcycling fails in its training loop (load_checkpoint has no argument 'model', and the "
    "dense model is built with experts)",
    "make the checkpoint with tools/convert_checkpoint.py upcycle, and load that",
)
_PACKED = "packed sequences need Transformer Engine's attention"

# Not available in this entry script with either backend.
UNAVAILABLE: dict[str, Refusal] = {
    "moe_use_upcycling": _UPCYCLING,
    "moe_upcycling_granularity": _UPCYCLING,
    "yaml_cfg": Refusal("a YAML file replaces the whole command line, ours included", "give the options themselves"),
    "sft": Refusal(_PACKED, "pretrain on documents"),
    "dataloader_inter_document_masking": Refusal(_PACKED, "use --reset-attention-mask"),
    "hybrid_context_parallel": Refusal("its batches are not built here", "use --context-parallel-size"),
    "perform_rl_step": Refusal("this script pretrains", "use Megatron-LM's train_rl.py"),
    "inprocess_restart": Refusal("the job is started by torchrun, which restarts it", "use torchrun --max-restarts"),
    "hybrid_layer_pattern": Refusal("this script builds GPT models", "use Megatron-LM's pretrain_hybrid.py"),
    "hybrid_override_pattern": Refusal("this script builds GPT models", "use Megatron-LM's pretrain_hybrid.py"),
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


def spelling(name: str) -> str:
    """An option as the command line spells it, from its destination."""
    return SPELLINGS.get(name, f"--{name.replace('_', '-')}")
