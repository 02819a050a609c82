"""Installing X-MoE into a model configuration, and making sure that it is what was built."""

from collections.abc import Callable, Iterable

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import nn

from megatron_xmoe.config import XMoEConfig
from megatron_xmoe.kernels.grouped_gemm import choose_grouped_gemm
from megatron_xmoe.kernels.registry import kernels_in_use, pin
from megatron_xmoe.layer import XMoELayer
from megatron_xmoe.specs import Spec, substituting


def apply_moe_backend(model_config, xmoe: XMoEConfig, stock_spec: Callable[..., Spec]) -> None:
    """Make Megatron build the model with the chosen MoE backend.

    Sets the layer spec of `model_config` (Megatron's GPTModelConfig) and adds a hook that checks the built model.

    Args:
        model_config: not yet used to build a model; changed in place.
        xmoe: the options; `moe_backend` "megatron" keeps Megatron's MoE layers and changes only what stands in for
            Transformer Engine and Apex.
        stock_spec: the spec callable that Megatron would use by itself.

    Raises:
        ValueError: backend "xmoe" for a model without experts, or with kernels that cannot run here.
    """
    if xmoe.moe_backend == "xmoe" and not model_config.transformer.num_moe_experts:
        raise ValueError(
            "--moe-backend xmoe for a model without experts: add --num-experts N, or leave --moe-backend out"
        )
    if xmoe.moe_backend == "xmoe":
        if xmoe.xmoe_kernels != "auto":
            pin(xmoe.xmoe_kernels)
        kernels_in_use()  # a pinned backend that cannot run here is an error now, not in the first step
        transformer = model_config.transformer
        features = transformer.hidden_size, transformer.moe_ffn_hidden_size // transformer.expert_tensor_parallel_size
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
        choose_grouped_gemm(xmoe.xmoe_grouped_gemm, device_type, transformer.params_dtype, features)
    model_config.transformer_layer_spec = substituting(stock_spec, xmoe)
    if xmoe.moe_backend == "xmoe":
        model_config.post_wrap_hooks.append(verify_no_stock_layer)


def verify_no_stock_layer(model_chunks: list[nn.Module]) -> list[nn.Module]:
    """Raise if a Mixture-of-Experts layer is not X-MoE's; returns the chunks unchanged, as Megatron's hooks do.

    Raises:
        RuntimeError: names the layers that stayed Megatron's own.
    """
    stock = [name for name, module in _named_modules(model_chunks) if _is_stock(module)]
    if stock:
        raise RuntimeError(
            f"--moe-backend xmoe, but {len(stock)} layer(s) are still Megatron's MoELayer: {', '.join(stock[:4])}. "
            "They were built from a spec that X-MoE did not see; this is a fault of megatron_xmoe, please report it"
        )
    return model_chunks


def _named_modules(model_chunks: list[nn.Module]) -> Iterable[tuple[str, nn.Module]]:
    for chunk in model_chunks:
        yield from chunk.named_modules()


def _is_stock(module: nn.Module) -> bool:
    return isinstance(module, MoELayer) and not isinstance(module, XMoELayer)
