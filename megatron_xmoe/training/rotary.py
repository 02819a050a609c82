"""Which rotary embedding a run uses, and why: for the set-up and for the start-up block."""

import argparse
from typing import NamedTuple

import torch

from megatron_xmoe.kernels.registry import candidates, triton_is_usable


class Rotary(NamedTuple):
    """Whether platform/rotary.py is to be installed, and what the start-up block says; "" where nothing is rotated."""

    ours: bool
    text: str


def rotary_embedding(args: argparse.Namespace) -> Rotary:
    """The choice for adjusted arguments and the kernels that are pinned."""
    if args.position_embedding_type not in ("rope", "yarn", "mrope") and not args.multi_latent_attention:
        return Rotary(False, "")
    if args.apply_rope_fusion:
        return Rotary(False, "fused by Transformer Engine")
    why_not = _why_not_ours(args)
    if why_not:
        return Rotary(False, f"Megatron's unfused function ({why_not})")
    return Rotary(True, "fused by Triton, one launch a tensor")


def _why_not_ours(args: argparse.Namespace) -> str:
    """Why this project's kernel is not used where Transformer Engine's is not, or ''."""
    if args.moe_backend != "xmoe":
        return "backend megatron"
    if args.xmoe_rope_fusion == "off":
        return "--xmoe-rope-fusion off"
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    if triton_is_usable(device_type):
        return ""
    (triton,) = (found for found in candidates(device_type) if found.name == "triton")
    return "plain torch is pinned" if triton.usable else f"no Triton kernel: {triton.reason}"
