"""What the families share: tables of common blocks, Megatron's arguments for them, and how a model is spelled out."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_xmoe.checkpoint.names import ConversionError, Entry, Model, Rule, entry, layer_key, rules_of
from megatron_xmoe.checkpoint.transforms import GATED, QKV

Config = Any  # a transformers configuration
VOCABULARY_MULTIPLE = 128  # so that the embedding can be split over up to 128 tensor-parallel ranks

EMBEDDING = entry("embedding.word_embeddings.weight", "model.embed_tokens.weight: V H")
FINAL_NORM = entry("decoder.final_layernorm.weight", "model.norm.weight: H")
OUTPUT = entry("output_layer.weight", "lm_head.weight: V H")

NORMS = (
    entry("<input_norm>.weight", "input_layernorm.weight: H"),
    entry("<pre_mlp_norm>.weight", "post_attention_layernorm.weight: H"),
)
ATTENTION = (
    entry("self_attention.linear_qkv.weight", "self_attn.q_proj.weight: Q H", "self_attn.k_proj.weight: KV H",
          "self_attn.v_proj.weight: KV H", transform=QKV),
    entry("self_attention.linear_proj.weight", "self_attn.o_proj.weight: H Q"),
)  # fmt: skip
QKV_BIAS = (
    entry("self_attention.linear_qkv.bias", "self_attn.q_proj.bias: Q", "self_attn.k_proj.bias: KV",
          "self_attn.v_proj.bias: KV", transform=QKV),
)  # fmt: skip
HEAD_NORMS = (
    entry("self_attention.q_layernorm.weight", "self_attn.q_norm.weight: D"),
    entry("self_attention.k_layernorm.weight", "self_attn.k_norm.weight: D"),
)
DENSE = (
    entry("mlp.linear_fc1.weight", "mlp.gate_proj.weight: F H", "mlp.up_proj.weight: F H", transform=GATED),
    entry("mlp.linear_fc2.weight", "mlp.down_proj.weight: H F"),
)
ROUTER = (entry("mlp.router.weight", "mlp.gate.weight: E H"),)
EXPERTS = (
    entry("mlp.experts.experts.linear_fc1.weight", "mlp.experts.{e}.gate_proj.weight: M H",
          "mlp.experts.{e}.up_proj.weight: M H", transform=GATED),
    entry("mlp.experts.experts.linear_fc2.weight", "mlp.experts.{e}.down_proj.weight: H M"),
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """The table of one family of models.

    Args:
        name: for the report.
        model_types: `model_type` of HuggingFace's config.json.
        attention, dense, experts: functions of the config that give the lines of a block's table.
        has_experts: (config, layer) -> whether a layer has experts.
        dims: config -> dimension letters beyond those of `common_dims`.
        arguments: config -> Megatron's arguments beyond those of `common_arguments`.
        check: raises ConversionError for a configuration that Megatron's model cannot compute.
        latent: multi-head latent attention.
        prediction: lines of a multi-token-prediction layer around its transformer layer.
        prediction_copies: HuggingFace name in such a layer -> the tensor of the model that it repeats.
    """

    name: str
    model_types: tuple[str, ...]
    attention: Callable[[Config], tuple[Entry, ...]]
    dense: Callable[[Config], tuple[Entry, ...]]
    experts: Callable[[Config], tuple[Entry, ...]]
    has_experts: Callable[[Config, int], bool]
    dims: Callable[[Config], dict[str, int]]
    arguments: Callable[[Config], dict[str, object]]
    check: Callable[[Config], None] = field(default=lambda config: None)
    latent: bool = False
    prediction: tuple[Entry, ...] = ()
    prediction_copies: dict[str, str] = field(default_factory=dict)


def head_dim(config: Config) -> int:
    """Channels of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def common_dims(config: Config) -> dict[str, int]:
    """Dimension letters of a usual decoder: vocabulary, hidden, query and key widths, head, groups, dense FFN."""
    size, groups = head_dim(config), config.num_key_value_heads or config.num_attention_heads
    return {
        "V": config.vocab_size,
        "H": config.hidden_size,
        "Q": config.num_attention_heads * size,
        "KV": groups * size,
        "D": size,
        "G": groups,
        "F": config.intermediate_size,
    }


def common_arguments(config: Config, latent: bool) -> dict[str, object]:
    """Megatron's arguments of a usual decoder with rotary positions, RMSNorm and SwiGLU."""
    groups = config.num_key_value_heads or config.num_attention_heads
    padded = -(-config.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    arguments: dict[str, object] = {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "seq_length": min(config.max_position_embeddings, 4096),
        "padded_vocab_size": padded,
        "position_embedding_type": "rope",
        "rotary_base": rotary_base(config),
        "swiglu": True,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config.rms_norm_eps,
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "init_method_std": config.initializer_range,
    }
    if not latent:
        arguments["kv_channels"] = head_dim(config)
        if groups != config.num_attention_heads:
            arguments.update(group_query_attention=True, num_query_groups=groups)
    return arguments


def rotary_base(config: Config) -> int:
    """Base of the rotary positions; Megatron's option takes whole numbers."""
    theta = config.rope_parameters["rope_theta"]
    if int(theta) != theta:
        raise ConversionError(f"config.json: rope_theta is {theta}; Megatron's --rotary-base takes whole numbers")
    return int(theta)


def plain_rope(config: Config) -> None:
    """Raises ConversionError for scaled rotary positions."""
    kind = config.rope_parameters.get("rope_type", "default")
    if kind != "default":
        raise ConversionError(
            f"config.json: rope_type is {kind}; Megatron-Core 0.19 computes this family with plain rotary positions. "
            "Fix: remove rope_scaling if the checkpoint was trained without it"
        )


def common_check(config: Config) -> None:
    """Raises ConversionError for what Megatron's decoder has no equal of, in any family."""
    if config.hidden_act not in ("silu", "swish"):
        raise ConversionError(f"config.json: hidden_act is {config.hidden_act}; only silu (SwiGLU) is converted")
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise ConversionError(
            f"config.json: sliding_window is {config.sliding_window}; Megatron's attention here is global. "
            "Fix: set it to null if the sequences you train on are not longer"
        )
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        raise ConversionError("config.json: attention_bias or mlp_bias is true; the entry script has no such biases")


def spell_out(family: Family, config: Config, implementation: str, predictions: int = 0) -> Model:
    """Every tensor of a model with both its names.

    Args:
        family: the table.
        config: of the model.
        implementation: local or transformer_engine, which name some norms differently.
        predictions: multi-token-prediction layers that the checkpoint holds.

    Raises:
        ConversionError: the configuration has no equal in Megatron.
    """
    try:
        common_check(config)
        family.check(config)
        dims = common_dims(config) | family.dims(config)
        arguments = common_arguments(config, family.latent) | family.arguments(config)
        pattern = [family.has_experts(config, layer) for layer in range(config.num_hidden_layers)]
        _check_numbers(arguments, dims, any(pattern))
    except (AttributeError, TypeError, KeyError, ZeroDivisionError) as error:
        raise ConversionError(f"config.json: a value is missing or of the wrong kind ({error})") from error
    if any(pattern):
        arguments |= {"moe_backend": "xmoe", "num_experts": dims["E"], "moe_ffn_hidden_size": dims["M"]}
        if not all(pattern):
            arguments["moe_layer_freq"] = [int(experts) for experts in pattern]
    if predictions:
        arguments["mtp_num_layers"] = predictions
    rules, aliases = list(_rules(family, config, dims, pattern, implementation)), {}
    for i in range(predictions):
        prefix = f"model.layers.{config.num_hidden_layers + i}."
        key = f"mtp.layers.{i}."
        rules += rules_of(family.prediction, dims, key, prefix)
        lines = _layer(family, config, True, implementation)
        rules += rules_of(lines, dims, f"{key}transformer_layer.", prefix)
        aliases |= {prefix + name: model for name, model in family.prediction_copies.items()}
    if config.tie_word_embeddings:
        aliases = {copy: "model.embed_tokens.weight" if of == "lm_head.weight" else of for copy, of in aliases.items()}
        aliases["lm_head.weight"] = "model.embed_tokens.weight"
    return Model(rules, dims, aliases, arguments)


def _check_numbers(arguments: dict[str, object], dims: dict[str, int], experts: bool) -> None:
    """Raises ConversionError for values that would be left out of the command line unseen, or that Megatron refuses."""
    positive = ["layernorm_epsilon", "max_position_embeddings", "rotary_base"] + ["moe_router_topk"] * experts
    for name in positive:
        value = arguments[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ConversionError(f"config.json: what becomes {name} is {value!r}; it must be a positive number")
    if not experts:
        return
    topk = arguments["moe_router_topk"]
    if not isinstance(topk, int) or topk > dims["E"]:
        raise ConversionError(f"config.json: {topk!r} experts per token; it must be between 1 and {dims['E']}, all")
    if topk == 1 and not arguments.get("moe_router_pre_softmax"):
        raise ConversionError(
            "config.json: one expert per token with normalised probabilities, which are all 1 and teach the router "
            "nothing; Megatron does not compute that. Fix: norm_topk_prob false, if the model was trained so"
        )


def _rules(family: Family, config: Config, dims, pattern: list[bool], implementation: str) -> Iterable[Rule]:
    yield from rules_of((EMBEDDING,), dims, "", "")
    layers, mixed = len(pattern), any(pattern) and not all(pattern)
    for layer, experts in enumerate(pattern):
        key = f"decoder.layers.{layer}." if mixed else "decoder.layers."
        axes = ((), ()) if mixed else ((layer,), (layers,))
        lines = _layer(family, config, experts, implementation)
        yield from rules_of(lines, dims, key, f"model.layers.{layer}.", axes)
    yield from rules_of((FINAL_NORM,), dims, "", "")
    if not config.tie_word_embeddings:
        yield from rules_of((OUTPUT,), dims, "", "")


def _layer(family: Family, config: Config, experts: bool, implementation: str) -> list[Entry]:
    block = family.experts(config) if experts else family.dense(config)
    lines = (*NORMS, *family.attention(config), *block)
    return [replace(line, megatron=layer_key(line.megatron, implementation, family.latent, experts)) for line in lines]
