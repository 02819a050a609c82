"""Dense decoders, as the starting point of upcycling."""

from megatron_xmoe.checkpoint.families.base import ATTENTION, DENSE, HEAD_NORMS, QKV_BIAS, Config, Family, plain_rope


def _dense(name: str, model_type: str, attention, arguments: dict[str, object]) -> Family:
    return Family(
        name=name,
        model_types=(model_type,),
        attention=lambda config: attention,
        dense=lambda config: DENSE,
        experts=lambda config: (),
        has_experts=_no_experts,
        dims=lambda config: {},
        arguments=lambda config: arguments,
        check=plain_rope,
    )


def _no_experts(config: Config, layer: int) -> bool:
    return False


LLAMA = _dense("Llama", "llama", ATTENTION, {})
MISTRAL = _dense("Mistral", "mistral", ATTENTION, {})
QWEN2 = _dense("Qwen2", "qwen2", ATTENTION + QKV_BIAS, {"add_qkv_bias": True})
QWEN3 = _dense("Qwen3", "qwen3", ATTENTION + HEAD_NORMS, {"qk_layernorm": True})
