"""Tiny random models of each family, from transformers, as HuggingFace checkpoints and with their own outputs.

Every tensor has random values, norms and biases too: with constants a converter could lose them unseen.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

VOCABULARY, LENGTH = 128, 12
BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
SPARSE = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
LATENT = BASE | {
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "mscale": 0.7,
    "mscale_all_dim": 0.8,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
}
DEEPSEEK_V1 = BASE | {
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 3,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
GROUPED = {"n_group": 4, "topk_group": 2}

# name -> (model_type, configuration): each part of a family's table is used by one of them
CASES: dict[str, tuple[str, dict]] = {
    "mixtral": ("mixtral", BASE | {"num_key_value_heads": 2, "num_local_experts": 4}),
    "qwen2_moe": (
        "qwen2_moe",
        BASE | SPARSE | {"num_key_value_heads": 2, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 2},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        BASE | SPARSE | {"num_key_value_heads": 2, "head_dim": 16, "norm_topk_prob": True, "mlp_only_layers": [1]},
    ),
    "olmoe": ("olmoe", BASE | {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}),
    "deepseek_v1": ("deepseek", DEEPSEEK_V1),
    "deepseek_v2_lite": ("deepseek_v2", LATENT | {"q_lora_rank": None, "rope_parameters": YARN}),
    "deepseek_v2": (
        "deepseek_v2",
        LATENT | GROUPED | {"q_lora_rank": 24, "topk_method": "group_limited_greedy", "routed_scaling_factor": 2.0},
    ),
    "deepseek_v3": ("deepseek_v3", LATENT | GROUPED | {"q_lora_rank": 24, "rope_parameters": YARN}),
    # all layers alike, so that Megatron stacks them; tied embeddings; a vocabulary that has to be padded
    "tied_odd_vocabulary": (
        "qwen2_moe",
        BASE | SPARSE | {"vocab_size": 101, "shared_expert_intermediate_size": 24, "tie_word_embeddings": True,
                         "num_key_value_heads": 4},
    ),
}  # fmt: skip


@dataclass
class Tiny:
    """A checkpoint and what its model computes.

    Args: tokens [B, S]; logits [B, S, V], float32; loss, mean cross entropy of the first row's next tokens.
    """

    directory: Path
    tokens: Tensor
    logits: Tensor
    loss: float


def make(name: str, directory: Path) -> Tiny:
    """Write the checkpoint of a case."""
    kind, values = CASES[name]
    torch.manual_seed(sum(map(ord, name)))
    model = deepseek_v1(values) if kind == "deepseek" else _from_transformers(kind, values)
    randomize(model)
    if kind == "deepseek":
        save_deepseek_v1(model, values, directory)
    else:
        model.save_pretrained(directory, max_shard_size="60KB")
    return measured(model, directory)


def _from_transformers(kind: str, values: dict):
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**values)).eval()


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    """Random values in every parameter and in the routers' biases."""
    buffers = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    for tensor in (*model.parameters(), *buffers):
        tensor.copy_(0.3 * torch.randn_like(tensor) + (tensor.dim() == 1))


@torch.no_grad()
def measured(model, directory: Path) -> Tiny:
    """What a model computes for random tokens."""
    tokens = torch.randint(0, model.config.vocab_size, (2, LENGTH + 1))
    logits = model(tokens[:, :-1]).logits.float()
    loss = torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:]).item()
    return Tiny(directory, tokens, logits, loss)


def deepseek_v1(values: dict):
    """DeepSeek-MoE, which transformers has no class for: its Llama with its DeepSeek-V2's experts in it."""
    keep = ("vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size max_position_embeddings "
            "num_key_value_heads rms_norm_eps").split()  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**{key: values[key] for key in keep})).eval()
    keep = "hidden_size moe_intermediate_size n_routed_experts n_shared_experts num_experts_per_tok".split()
    experts = CONFIG_MAPPING["deepseek_v2"](**LATENT | {key: values[key] for key in keep})
    experts._experts_implementation = "eager"
    for layer in model.model.layers[values["first_k_dense_replace"] :]:
        layer.mlp = DeepseekV2Moe(experts)
    return model


def save_deepseek_v1(model, values: dict, directory: Path) -> None:
    """The published format: a matrix for each expert."""
    directory.mkdir()
    config = {"architectures": ["DeepseekForCausalLM"], "model_type": "deepseek", **values}
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    save_file(per_expert(model.state_dict()), directory / "model.safetensors", metadata={"format": "pt"})


def per_expert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' stacked experts as one matrix each, as they are on disk."""
    result = {}
    for name, tensor in state.items():
        stem, _, last = name.rpartition(".")
        if last not in ("gate_up_proj", "down_proj") or not stem.endswith(".experts"):
            result[name] = tensor.contiguous()
            continue
        parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",)
        for expert, matrix in enumerate(tensor):
            for part, value in zip(parts, matrix.chunk(len(parts)), strict=True):
                result[f"{stem}.{expert}.{part}.weight"] = value.contiguous().clone()
    return result
