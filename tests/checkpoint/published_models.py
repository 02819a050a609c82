"""The configurations of published models, as far as they matter for shapes and routing."""

QWEN = {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "vocab_size": 151936, "hidden_size": 2048, "hidden_act": "silu"}
DEEPSEEK = {"rms_norm_eps": 1e-6, "rope_theta": 10000, "hidden_act": "silu", "attention_bias": False,
            "tie_word_embeddings": False, "moe_layer_freq": 1}  # fmt: skip
YARN = {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096}
HEADS = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
PUBLISHED = {
    "Qwen3-30B-A3B": {
        **QWEN, "model_type": "qwen3_moe", "head_dim": 128, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 48, "num_key_value_heads": 4, "max_position_embeddings": 40960,
        "mlp_only_layers": [], "decoder_sparse_step": 1, "sliding_window": None, "use_sliding_window": False,
    },
    "Qwen1.5-MoE-A2.7B": {
        **QWEN, "model_type": "qwen2_moe", "intermediate_size": 5632, "moe_intermediate_size": 1408,
        "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 60, "num_experts_per_tok": 4,
        "num_hidden_layers": 24, "num_key_value_heads": 16, "shared_expert_intermediate_size": 5632,
        "max_position_embeddings": 8192, "sliding_window": 32768, "use_sliding_window": False,
    },
    "Mixtral-8x7B": {
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "rope_theta": 1e6, "sliding_window": None, "vocab_size": 32000, "max_position_embeddings": 32768,
    },
    "OLMoE-1B-7B": {
        "model_type": "olmoe", "clip_qkv": None, "hidden_size": 2048, "intermediate_size": 1024, "num_experts": 64,
        "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 8, "num_hidden_layers": 16,
        "num_key_value_heads": 16, "rope_theta": 10000.0, "vocab_size": 50304, "max_position_embeddings": 4096,
    },
    "DeepSeek-MoE-16B": {
        **DEEPSEEK, "model_type": "deepseek", "first_k_dense_replace": 1, "hidden_size": 2048,
        "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2,
        "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 28,
        "num_key_value_heads": 16, "scoring_func": "softmax", "vocab_size": 102400, "max_position_embeddings": 4096,
    },
    "DeepSeek-V2-Lite": {
        **DEEPSEEK, **HEADS, "model_type": "deepseek_v2", "first_k_dense_replace": 1, "hidden_size": 2048,
        "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2,
        "n_group": 1, "topk_group": 1, "topk_method": "greedy", "num_attention_heads": 16, "num_experts_per_tok": 6,
        "num_hidden_layers": 27, "num_key_value_heads": 16, "q_lora_rank": None, "routed_scaling_factor": 1.0,
        "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}, "vocab_size": 102400,
        "max_position_embeddings": 163840,
    },
    "DeepSeek-V2": {
        **DEEPSEEK, **HEADS, "model_type": "deepseek_v2", "first_k_dense_replace": 1, "hidden_size": 5120,
        "intermediate_size": 12288, "moe_intermediate_size": 1536, "n_routed_experts": 160, "n_shared_experts": 2,
        "n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy", "num_attention_heads": 128,
        "num_experts_per_tok": 6, "num_hidden_layers": 60, "num_key_value_heads": 128, "q_lora_rank": 1536,
        "routed_scaling_factor": 16.0, "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        "vocab_size": 102400, "max_position_embeddings": 163840,
    },
    "DeepSeek-V3": {
        **DEEPSEEK, **HEADS, "model_type": "deepseek_v3", "first_k_dense_replace": 3, "hidden_size": 7168,
        "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1,
        "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc", "norm_topk_prob": True, "num_attention_heads": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "q_lora_rank": 1536,
        "num_nextn_predict_layers": 1, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "vocab_size": 129280,
        "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, "max_position_embeddings": 163840,
    },
}  # fmt: skip
