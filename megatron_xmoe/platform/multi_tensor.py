"""Norms and scaling of many tensors at once, in the places of Megatron's own for want of Transformer Engine and Apex.

Megatron's wait for the GPU once a tensor, and scale by a product and a copy a tensor. Part of backend xmoe.
"""

import functools

import torch

from megatron_xmoe.platform.patching import Replacement, apply, is_in_place


def install() -> list[Replacement]:
    """Put them in place; a second call changes nothing. Returns those that are, for the start-up report.

    Raises:
        RuntimeError: a symbol to replace does not exist in the installed version.
    """
    apply(REPLACEMENTS)
    return [replacement for replacement in REPLACEMENTS if is_in_place(replacement)]


def _if_local(make):
    """Leaves the functions of Transformer Engine and Apex as they are: only Megatron's own are replaced."""
    return lambda original: make(original) if original.__module__ == "megatron.core.utils" else original


@_if_local
def _norm_on_the_device(original):
    @functools.wraps(original)
    def l2_norm(chunk_size, noop_flag, tensor_lists, per_tensor, *args):
        tensors = [tensor for tensors in tensor_lists for tensor in tensors]
        if len({tensor.device for tensor in tensors}) != 1:  # none, or a part of the optimizer on the CPU
            return original(chunk_size, noop_flag, tensor_lists, per_tensor, *args)
        norms = torch.stack(torch._foreach_norm(tensors)).float()
        return torch.linalg.vector_norm(norms).view(1).to("cuda"), None

    return l2_norm


@_if_local
def _scale_together(original):
    @functools.wraps(original)
    def scale(chunk_size, noop_flag, tensor_lists, factor):
        sources, targets = tensor_lists
        if all(source is target for source, target in zip(sources, targets, strict=True)):
            if targets:
                torch._foreach_mul_(targets, factor)
        elif factor == 1:
            torch._foreach_copy_(targets, sources)
        else:
            original(chunk_size, noop_flag, tensor_lists, factor)

    return scale


_WHY = "without Transformer Engine and Apex {} a tensor"
_NORM = _WHY.format("it waits for the GPU once")
_SCALE = _WHY.format("it launches two kernels")

REPLACEMENTS = [  # where they are used, by whatever name
    Replacement("megatron.core.optimizer.clip_grads:l2_norm_impl", _norm_on_the_device, _NORM),
    Replacement("megatron.training.utils.common_utils:multi_tensor_l2norm", _norm_on_the_device, _NORM),
    Replacement("megatron.core.optimizer.clip_grads:multi_tensor_scale_impl", _scale_together, _SCALE),
    Replacement("megatron.core.optimizer.optimizer:multi_tensor_scale_impl", _scale_together, _SCALE),
]
