"""DeepSeek-MoE (V1), DeepSeek-V2 and V2-Lite, DeepSeek-V3."""

from megatron_xmoe.checkpoint.families.base import ATTENTION, DENSE, EXPERTS, ROUTER, Config, Family, plain_rope
from megatron_xmoe.checkpoint.names import ConversionError, Entry, entry
from megatron_xmoe.checkpoint.transforms import GATED

SHARED = (
    entry("mlp.shared_experts.linear_fc1.weight", "mlp.shared_experts.gate_proj.weight: S H",
          "mlp.shared_experts.up_proj.weight: S H", transform=GATED),
    entry("mlp.shared_experts.linear_fc2.weight", "mlp.shared_experts.down_proj.weight: H S"),
)  # fmt: skip
LATENT = (
    entry("self_attention.linear_kv_down_proj.weight", "self_attn.kv_a_proj_with_mqa.weight: KVD H"),
    entry("<kv_norm>.weight", "self_attn.kv_a_layernorm.weight: KVR"),
    entry("self_attention.linear_kv_up_proj.weight", "self_attn.kv_b_proj.weight: KVU KVR"),
    entry("self_attention.linear_proj.weight", "self_attn.o_proj.weight: H VO"),
)
QUERY = (entry("self_attention.linear_q_proj.weight", "self_attn.q_proj.weight: QU H"),)
LOW_RANK_QUERY = (
    entry("self_attention.linear_q_down_proj.weight", "self_attn.q_a_proj.weight: QR H"),
    entry("<q_norm>.weight", "self_attn.q_a_layernorm.weight: QR"),
    entry("self_attention.linear_q_up_proj.weight", "self_attn.q_b_proj.weight: QU QR"),
)
EXPERT_BIAS = (entry("mlp.router.expert_bias", "mlp.gate.e_score_correction_bias: E"),)
PREDICTION = (
    entry("enorm.weight", "enorm.weight: H"),
    entry("hnorm.weight", "hnorm.weight: H"),
    entry("eh_proj.weight", "eh_proj.weight: H 2H"),
    entry("final_layernorm.weight", "shared_head.norm.weight: H"),
)
PREDICTION_COPIES = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "shared_head.head.weight": "lm_head.weight",
}
LATENT_NORM_EPSILON = 1e-6  # of the latent norms in HuggingFace's code, whatever rms_norm_eps says


def latent_attention(config: Config) -> tuple[Entry, ...]:
    """Lines of multi-head latent attention, with or without a low-rank query."""
    return (QUERY if config.q_lora_rank is None else LOW_RANK_QUERY) + LATENT


def has_experts(config: Config, layer: int) -> bool:
    """All but the first `first_k_dense_replace` layers."""
    return layer >= config.first_k_dense_replace and layer % getattr(config, "moe_layer_freq", 1) == 0


def moe_dims(config: Config) -> dict[str, int]:
    """Dimension letters of experts and shared experts."""
    width, shared = config.moe_intermediate_size, config.n_shared_experts or 0
    return {"E": config.n_routed_experts, "M": width, "S": width * shared}


def moe_arguments(config: Config) -> dict[str, object]:
    """Megatron's arguments of experts and shared experts."""
    shared = moe_dims(config)["S"]
    return {
        "moe_router_topk": config.num_experts_per_tok,
        "moe_shared_expert_intermediate_size": shared or None,
        "moe_router_dtype": "fp32",
    }


def experts(config: Config, bias: bool = False) -> tuple[Entry, ...]:
    """Lines of a layer's experts."""
    shared = SHARED if config.n_shared_experts else ()
    return ROUTER + (EXPERT_BIAS if bias else ()) + EXPERTS + shared


def latent_dims(config: Config) -> dict[str, int]:
    """Dimension letters of latent attention: low ranks, what goes down to them and comes up from them."""
    heads, rope = config.num_attention_heads, config.qk_rope_head_dim
    return {
        **moe_dims(config),
        "QR": config.q_lora_rank or 0,
        "QU": heads * (config.qk_nope_head_dim + rope),
        "KVR": config.kv_lora_rank,
        "KVD": config.kv_lora_rank + rope,
        "KVU": heads * (config.qk_nope_head_dim + config.v_head_dim),
        "VO": heads * config.v_head_dim,
        "2H": 2 * config.hidden_size,
    }


def latent_arguments(config: Config) -> dict[str, object]:
    """Megatron's arguments of latent attention."""
    return {
        "multi_latent_attention": True,
        "q_lora_rank": config.q_lora_rank,
        "kv_lora_rank": config.kv_lora_rank,
        "qk_head_dim": config.qk_nope_head_dim,
        "qk_pos_emb_head_dim": config.qk_rope_head_dim,
        "v_head_dim": config.v_head_dim,
        "kv_channels": config.v_head_dim,
        "qk_layernorm": True,
        **_latent_rope(config),
        **moe_arguments(config),
    }


def _latent_rope(config: Config) -> dict[str, object]:
    rope = config.rope_parameters
    if rope.get("rope_type", "default") == "default":
        return {"rope_type": "rope", "rotary_scaling_factor": 1.0}
    given = {name: rope.get(name) for name in ("original_max_position_embeddings", "beta_fast", "beta_slow")}
    # Megatron-Core 0.19 has no option for these
    fixed = {"original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
    scales = rope.get("mscale"), rope.get("mscale_all_dim")
    unlike = [f"{name} {value}" for name, value in given.items() if value not in (None, fixed[name])]
    one_scale = (scales[0] is None) != (scales[1] is None)
    if rope["rope_type"] != "yarn" or unlike or one_scale or rope.get("attention_factor"):
        raise ConversionError(
            f"config.json: rotary positions {rope} have no equal in Megatron-Core 0.19, which computes yarn with "
            f"{fixed}, and mscale with mscale_all_dim or neither"
        )
    mscale, all_dim = scales if scales[0] is not None else (1.0, 0.0)
    return {"rope_type": "yarn", "rotary_scaling_factor": rope["factor"], "mscale": mscale, "mscale_all_dim": all_dim}


def groups(config: Config) -> tuple[int, int] | None:
    """Groups of experts and how many of them a token may use; None without such a limit."""
    if not config.n_group or config.n_group == 1 or config.topk_group == config.n_group:
        return None
    return config.n_group, config.topk_group


def check_latent(config: Config) -> None:
    """Raises ConversionError for what Megatron's latent attention computes differently."""
    if config.rms_norm_eps != LATENT_NORM_EPSILON:
        raise ConversionError(
            f"config.json: rms_norm_eps is {config.rms_norm_eps}, but HuggingFace's latent norms always use "
            f"{LATENT_NORM_EPSILON}; Megatron has one epsilon for all norms"
        )


def check_v2(config: Config) -> None:
    """Raises ConversionError for routing or attention that has no equal."""
    check_latent(config)
    if config.topk_method not in ("greedy", "group_limited_greedy"):
        raise ConversionError(f"config.json: topk_method is {config.topk_method}; greedy methods are converted")
    if config.norm_topk_prob:
        raise ConversionError("config.json: norm_topk_prob is true; HuggingFace's DeepSeek-V2 ignores it")


def v2_arguments(config: Config) -> dict[str, object]:
    """Softmax over all experts, then the best; groups are ranked by their best expert."""
    arguments = {**latent_arguments(config), "moe_router_pre_softmax": True}
    if config.routed_scaling_factor != 1.0:
        arguments["moe_router_topk_scaling_factor"] = config.routed_scaling_factor
    limit = groups(config) if config.topk_method == "group_limited_greedy" else None
    if limit:
        arguments.update(moe_router_num_groups=limit[0], moe_router_group_topk=limit[1])
        if config.num_experts_per_tok // limit[1] != 1:  # Megatron adds that many scores of a group
            arguments["xmoe_group_score"] = "max"
    return arguments


def check_v3(config: Config) -> None:
    """Raises ConversionError for routing or attention that has no equal."""
    check_latent(config)
    if getattr(config, "scoring_func", "sigmoid") != "sigmoid" or not config.norm_topk_prob:
        raise ConversionError("config.json: DeepSeek-V3 routes by normalised sigmoid scores; another way is not known")
    if not getattr(config, "rope_interleave", True):
        raise ConversionError(
            "config.json: rope_interleave is false; Megatron's latent attention interleaves. Fix: none"
        )
    if groups(config) and config.num_experts_per_tok // config.topk_group != 2:
        raise ConversionError(
            f"config.json: num_experts_per_tok {config.num_experts_per_tok} is not twice topk_group "
            f"{config.topk_group}; Megatron ranks groups by num_experts_per_tok // topk_group experts, DeepSeek by two"
        )


def v3_arguments(config: Config) -> dict[str, object]:
    """Sigmoid scores, chosen with the expert bias and normalised without it."""
    arguments = {
        **latent_arguments(config),
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": config.routed_scaling_factor,
    }
    if limit := groups(config):
        arguments.update(moe_router_num_groups=limit[0], moe_router_group_topk=limit[1])
    return arguments


def check_v1(config: Config) -> None:
    """Raises ConversionError for routing that has no equal."""
    plain_rope(config)
    if getattr(config, "scoring_func", "softmax") != "softmax":
        raise ConversionError(f"config.json: scoring_func is {config.scoring_func}; DeepSeek-MoE uses softmax")


DEEPSEEK_V1 = Family(
    name="DeepSeek-MoE",
    model_types=("deepseek",),
    attention=lambda config: ATTENTION,
    dense=lambda config: DENSE,
    experts=experts,
    has_experts=has_experts,
    dims=moe_dims,
    arguments=lambda config: {
        **moe_arguments(config),
        "moe_router_pre_softmax": not getattr(config, "norm_topk_prob", False),
    },
    check=check_v1,
)

DEEPSEEK_V2 = Family(
    name="DeepSeek-V2",
    model_types=("deepseek_v2",),
    attention=latent_attention,
    dense=lambda config: DENSE,
    experts=experts,
    has_experts=has_experts,
    dims=latent_dims,
    arguments=v2_arguments,
    check=check_v2,
    latent=True,
)

DEEPSEEK_V3 = Family(
    name="DeepSeek-V3",
    model_types=("deepseek_v3",),
    attention=latent_attention,
    dense=lambda config: DENSE,
    experts=lambda config: experts(config, bias=True),
    has_experts=has_experts,
    dims=latent_dims,
    arguments=v3_arguments,
    check=check_v3,
    latent=True,
    prediction=PREDICTION,
    prediction_copies=PREDICTION_COPIES,
)
