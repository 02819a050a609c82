"""Families of models as tables: which tensors of HuggingFace's hold the values of which of Megatron's."""

from megatron_xmoe.checkpoint.families.base import Config, Family
from megatron_xmoe.checkpoint.families.deepseek import DEEPSEEK_V1, DEEPSEEK_V2, DEEPSEEK_V3
from megatron_xmoe.checkpoint.families.dense import LLAMA, MISTRAL, QWEN2, QWEN3
from megatron_xmoe.checkpoint.families.mixtral import MIXTRAL
from megatron_xmoe.checkpoint.families.olmoe import OLMOE
from megatron_xmoe.checkpoint.families.qwen import QWEN2_MOE, QWEN3_MOE
from megatron_xmoe.checkpoint.names import ConversionError

EXPERT_FAMILIES = (MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE, DEEPSEEK_V1, DEEPSEEK_V2, DEEPSEEK_V3)
DENSE_FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3)
FAMILIES: dict[str, Family] = {
    kind: family for family in EXPERT_FAMILIES + DENSE_FAMILIES for kind in family.model_types
}


def load_config(raw: dict, where: str) -> tuple[Family, Config]:
    """The family of a config.json and its configuration, completed with transformers' defaults.

    Args: raw, the parsed file; where, its path, for errors.

    Raises:
        ConversionError: no such family, or values that transformers refuses.
    """
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if not isinstance(kind, str) or kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ConversionError(f"{where}: model_type is {kind!r}. Fix: converted are {known}")
    from transformers import CONFIG_MAPPING  # takes a second to import

    # DeepSeek-MoE is not in transformers: a Llama with further values
    config_class = CONFIG_MAPPING["llama" if kind == "deepseek" else kind]
    try:
        config = config_class.from_dict({**raw, "model_type": config_class.model_type})
    except Exception as error:  # transformers validates with exceptions of many kinds
        raise ConversionError(f"{where}: {' '.join(str(error).split())}") from error
    numbers = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
    for name in numbers:
        value = getattr(config, name, None)
        if not isinstance(value, int) or value < 1:
            raise ConversionError(f"{where}: {name} is {value!r}; it must be a positive number")
    return FAMILIES[kind], config
