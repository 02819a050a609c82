"""The arguments that a checkpoint was saved with, against those that a HuggingFace configuration leads to."""

from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor

from megatron_xmoe.checkpoint.names import ConversionError
from megatron_xmoe.checkpoint.torch_dist import TorchDistReader

# argument -> value where a model's arguments leave it out; what shapes cannot tell, and outputs hang on
_ALWAYS: dict[str, object] = {
    "num_attention_heads": None,
    "multi_latent_attention": False,
    "position_embedding_type": "rope",
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "use_rope_scaling": False,
    "rotary_seq_len_interpolation_factor": None,
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-5,
    "apply_layernorm_1p": False,
    "layernorm_zero_centered_gamma": False,
    "swiglu": False,
    "squared_relu": False,
    "quick_geglu": False,
    "qk_layernorm": False,
    "qk_l2_norm": False,
    "xmoe_qk_norm": "per-head",
    "window_size": None,
    "softmax_type": "vanilla",
    "attention_output_gate": False,
}
_LATENT = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "rope_type")
_YARN = ("rotary_scaling_factor", "mscale", "mscale_all_dim")
_EXPERTS: dict[str, object] = {
    "moe_router_topk": 2,
    "moe_router_score_function": "softmax",
    "moe_router_enable_expert_bias": False,
    "moe_router_topk_scaling_factor": 1.0,
    "moe_router_num_groups": None,
    "moe_router_group_topk": None,
    "moe_apply_probs_on_input": False,
    "xmoe_combine_weights": "probs",
}


def compare_with_saved(arguments: dict[str, object], reader: TorchDistReader, config: Path) -> None:
    """Refuses a configuration of another model whose tensors have the same shapes.

    Args: arguments of the model that the configuration leads to; reader of the checkpoint; config, its path.

    Raises:
        ConversionError: the checkpoint was saved with another value; without saved arguments nothing is compared.
    """
    saved = vars(reader.common().get("args") or Namespace())
    for name, wanted in _wanted(arguments).items():
        if name not in saved:
            continue
        value = _value(name, saved)
        if value != wanted:
            raise ConversionError(
                f"{reader.folder} was saved with {name} {value}, and {config} leads to {wanted}. Fix: give the "
                "configuration of this model (--hf-config)"
            )


def check_frequencies(name: str, stored: Tensor, base: float, size: int) -> None:
    """Refuses stored frequencies of rotary positions that are not those of the model.

    Args: name, for the error; stored, [size / 2]; base of the positions; size, rotated channels of a head.

    Raises:
        ConversionError: they do not follow from the base.
    """
    expected = float(base) ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    tolerance = 1e-4 if stored.dtype.itemsize >= 4 else 1e-2
    if stored.shape != expected.shape or not torch.allclose(stored.double(), expected, rtol=tolerance, atol=1e-7):
        raise ConversionError(
            f"{name} does not follow from the base {base} and {size} rotated channels, which Megatron's positions are "
            "made of. Fix: correct the configuration's rotary base"
        )


def _value(name: str, saved: dict[str, object]) -> object:
    value = saved[name]
    if name == "num_query_groups" and (not saved.get("group_query_attention") or not value):
        return saved.get("num_attention_heads")
    if name == "moe_router_topk_scaling_factor":
        return 1.0 if value is None else value
    return value


def _wanted(arguments: dict[str, object]) -> dict[str, object]:
    wanted = {name: arguments.get(name, default) for name, default in _ALWAYS.items()}
    if arguments.get("multi_latent_attention"):
        wanted |= {name: arguments.get(name) for name in _LATENT}
        if arguments.get("rope_type") == "yarn":
            wanted |= {name: arguments.get(name) for name in _YARN}
    else:
        groups = arguments.get("num_query_groups", arguments["num_attention_heads"])
        wanted |= {"num_query_groups": groups, "kv_channels": arguments.get("kv_channels")}
    if arguments.get("num_experts"):
        wanted |= {name: arguments.get(name, default) for name, default in _EXPERTS.items()}
        if wanted["moe_router_score_function"] == "softmax":
            wanted["moe_router_pre_softmax"] = arguments.get("moe_router_pre_softmax", False)
        if wanted["moe_router_num_groups"]:
            wanted["xmoe_group_score"] = arguments.get("xmoe_group_score", "sum")
    return wanted
