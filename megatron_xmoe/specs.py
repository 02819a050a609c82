"""Layer specs: Megatron's own, with X-MoE's layer and with modules that need no Transformer Engine."""

import copy
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec, get_module
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import (
    LayerNormImpl,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import BaseTransformerLayer

from megatron_xmoe.attention import SDPACoreAttention
from megatron_xmoe.config import XMoEConfig
from megatron_xmoe.experts import XMoEGroupedMLP
from megatron_xmoe.layer import XMoELayer
from megatron_xmoe.norm import TorchNorm
from megatron_xmoe.qk_norm import with_query_key_norms
from megatron_xmoe.router import FusedRouter

Spec = ModuleSpec | TransformerBlockSubmodules


def xmoe_decoder_block_spec(config, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The decoder of a GPT model with X-MoE layers, for `--spec megatron_xmoe.specs xmoe_decoder_block_spec`.

    Args:
        config: Megatron's GPTModelConfig or TransformerConfig.
        vp_stage: virtual pipeline stage whose layers are wanted.
    """
    config = getattr(config, "transformer", config)
    spec = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=config.transformer_impl == "transformer_engine",
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
        vp_stage=vp_stage,
    )
    spec = substitute(spec, substitutions(config, XMoEConfig(moe_backend="xmoe")))
    return with_query_key_norms(spec, config, all_heads=False)


def substitutions(config: TransformerConfig, xmoe: XMoEConfig) -> dict[type, Any]:
    """Which of Megatron's modules are replaced by which of ours.

    Norm and attention are those that stand in for a missing Transformer Engine or Apex; where one of these is used,
    the spec does not contain the stand-ins and they do not change. Layer and experts change with backend "xmoe", the
    router with --moe-router-fusion.
    """
    table: dict[type, Any] = {WrappedTorchNorm: TorchNorm}
    if uses_torch_attention(config):
        table[DotProductAttention] = SDPACoreAttention
    if xmoe.moe_backend == "xmoe":
        table[MoELayer] = partial(XMoELayer, xmoe=xmoe)
        table[SequentialMLP] = partial(XMoEGroupedMLP, xmoe=xmoe)
        if config.moe_router_fusion:
            table[TopKRouter] = partial(FusedRouter, xmoe=xmoe)
    return table


def uses_torch_attention(config: TransformerConfig) -> bool:
    """Whether torch's fused attention takes the place of Megatron's unfused one.

    Not where the user chose the unfused one, nor for a softmax with an offset, which fused attention cannot compute.
    """
    return config.softmax_type == "vanilla" and config.attention_backend not in (AttnBackend.unfused, AttnBackend.local)


def substitute(spec: Any, table: dict[type, Any]) -> Any:
    """A copy of a layer spec in which the modules in `table` are replaced, at any depth; the original is untouched.

    Args:
        spec: a ModuleSpec, a submodules dataclass, a list of them, a `partial` that builds a module, or a class.
        table: class -> what takes its place (a class, or a partial whose arguments are added).
    """
    if isinstance(spec, type):
        return table.get(spec, spec)
    if isinstance(spec, partial):
        arguments = {name: substitute(value, table) for name, value in spec.keywords.items()}
        return partial(table.get(spec.func, spec.func), *spec.args, **arguments)
    if isinstance(spec, list):
        return [substitute(item, table) for item in spec]
    if isinstance(spec, ModuleSpec):
        result = copy.copy(spec)
        result.module, result.submodules = substitute(spec.module, table), substitute(spec.submodules, table)
        return result
    if is_dataclass(spec):
        return replace(spec, **{f.name: substitute(getattr(spec, f.name), table) for f in fields(spec) if f.init})
    return spec


def substituting(stock_spec: Callable[..., Spec], xmoe: XMoEConfig) -> Callable[..., Spec]:
    """The spec callable for Megatron's GPTModelConfig: the stock spec, with our modules in it.

    Its attribute `of_other_blocks` does the same to a spec that Megatron's model builder makes by itself, whatever the
    decoder's is: that of the layers that predict further tokens (platform/wheel.py calls it).

    Args:
        stock_spec: function of (GPTModelConfig, vp_stage) that gives the spec Megatron would use.
        xmoe: options; `moe_backend` decides whether MoE layers are replaced.
    """

    def transformer_layer_spec(config, vp_stage: int | None = None) -> Spec:
        spec = stock_spec(config, vp_stage)
        if isinstance(spec, ModuleSpec) and issubclass(get_module(spec), BaseTransformerLayer):
            # a single layer, as for dense models: Megatron would add the final norm by itself, unseen by us
            layers = get_num_layers_to_build(config.transformer, vp_stage)
            spec = TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=LayerNormImpl)
        return adapt(config, spec)

    def adapt(config, spec: Spec) -> Spec:
        spec = substitute(spec, substitutions(config.transformer, xmoe))
        return with_query_key_norms(spec, config.transformer, xmoe.xmoe_qk_norm == "all-heads")

    transformer_layer_spec.of_other_blocks = adapt
    return transformer_layer_spec
