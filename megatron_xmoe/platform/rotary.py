"""Fused rotary embedding without Transformer Engine, beneath all of Megatron's ways to it.

Megatron's own switch, `apply_rope_fusion`, asks for functions of Transformer Engine: it refuses interleaved pairs
without it, ignores a scale, and means other kernels where attention is latent. So the switch stays off, and the
function to which the unfused ways lead (plain, packed, latent) is replaced.
"""

import functools

from megatron_xmoe.ops.rotary import fuses, rotate
from megatron_xmoe.platform.patching import Replacement, apply


def install() -> list[Replacement]:
    """Make Megatron rotate by one kernel a tensor on the GPU; a second call changes nothing. Where Triton runs only.

    Raises:
        RuntimeError: the installed version has no such function.
    """
    apply(REPLACEMENTS)
    return list(REPLACEMENTS)


def _in_one_kernel(original):
    @functools.wraps(original)
    def _apply_rotary_pos_emb_bshd(
        t, freqs, rotary_interleaved=False, mla_rotary_interleaved=False, mscale=1.0, multi_latent_attention=None
    ):
        unusual = multi_latent_attention is not None or (rotary_interleaved and mla_rotary_interleaved)
        if unusual or not isinstance(mscale, int | float) or not fuses(t, freqs):
            return original(t, freqs, rotary_interleaved, mla_rotary_interleaved, mscale, multi_latent_attention)
        paired = rotary_interleaved or mla_rotary_interleaved  # latent attention: neighbours that come out apart
        return rotate(t, freqs, paired, rotary_interleaved, mscale)

    return _apply_rotary_pos_emb_bshd


REPLACEMENTS = [
    Replacement(
        "megatron.core.models.common.embeddings.rope_utils:_apply_rotary_pos_emb_bshd",
        _in_one_kernel,
        "it makes 12 launches for a tensor and 7 backward, and the fused function is Transformer Engine's",
    ),
]
