"""Which implementation of the experts' matrix products is used: chosen by a written table, with a reason.

`--xmoe-grouped-gemm` names a backend; with "auto" the first of the device's row in AUTO that can run is taken, and a
product per expert for fp32 and fp64.
"""

import os
from collections.abc import Iterable
from functools import cache

import torch
import torch.nn.functional as F

from megatron_xmoe import _optional
from megatron_xmoe.kernels.registry import Candidate, KernelChoice, spoken, triton_is_usable

BACKENDS = ("triton", "torch", "loop")
# kind of device -> what "auto" tries in 16 bits, in this order; on one H200 the MLP with Triton's products was ahead of
# that with torch's at four of five shapes, and level at the fifth (docs/benchmarks.md)
AUTO = {
    "cuda": ("triton", "torch", "loop"),
    "hip": ("triton", "loop"),
    "cpu": ("loop",),  # Triton's interpreter is for tests
}
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def grouped_gemm_candidates(device_type: str, dtype: torch.dtype, features: Iterable[int] = ()) -> list[Candidate]:
    """All backends.

    Args: device_type, torch's "cuda" (also for AMD) or "cpu"; dtype of rows and weights; feature sizes of the weights.
    """
    found = {
        "triton": _why_not_triton(device_type, dtype),
        "torch": _why_not_torch(device_type, dtype, tuple(features)),
        "loop": "",
    }
    usable = {
        "triton": "our Triton kernels, which gather the rows of the first product themselves",
        "torch": "torch's grouped_mm (CUTLASS)",
        "loop": "a product per expert, which runs everywhere",
    }
    return [Candidate(name, not reason, reason or usable[name]) for name, reason in found.items()]


def choose_grouped_gemm(
    pinned: str, device_type: str, dtype: torch.dtype, features: Iterable[int] = ()
) -> KernelChoice:
    """The backend named `pinned`, or for "auto" the first of the device's row in AUTO that can run.

    Args: see grouped_gemm_candidates.

    Raises:
        ValueError: an unknown name, or a named backend that cannot run here.
    """
    if pinned not in ("auto", *BACKENDS):
        raise ValueError(f"--xmoe-grouped-gemm {pinned} is unknown; it must be auto or one of {', '.join(BACKENDS)}")
    found = {c.name: c for c in grouped_gemm_candidates(device_type, dtype, features)}
    if pinned != "auto":
        if not found[pinned].usable:
            others = ", ".join(name for name in BACKENDS if found[name].usable)
            raise ValueError(
                f"--xmoe-grouped-gemm {pinned} cannot run on {spoken(device_type)}: {found[pinned].reason}. "
                f"Fix: leave it out, or use one of: {others}"
            )
        return KernelChoice(pinned, f"pinned; {found[pinned].reason}")
    order = AUTO["hip" if device_type == "cuda" and torch.version.hip else device_type]
    if dtype.itemsize > 2:  # Triton would use no tensor cores, to be as exact as this
        order = order[-1:]
    taken = next(name for name in order if found[name].usable)
    passed = "; ".join(f"{name}: {found[name].reason}" for name in order[: order.index(taken)])
    return KernelChoice(taken, f"{found[taken].reason}{f' (not {passed})' if passed else ''}")


def _why_not_triton(device_type: str, dtype: torch.dtype) -> str:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device_type != "cuda" and not interpreted:
        return "Triton's kernels need a GPU (or TRITON_INTERPRET=1, its slow interpreter)"
    if not _optional.triton().usable:
        return f"triton {_optional.triton().reason}"
    if not triton_is_usable(device_type):
        return "plain torch was asked for (--xmoe-kernels reference)"
    return "" if dtype in TRITON_DTYPES else f"no kernels for {dtype}"


def _why_not_torch(device_type: str, dtype: torch.dtype, features: tuple[int, ...]) -> str:
    """torch's grouped_mm takes bf16 on NVIDIA GPUs of compute capability 9 and above, with 16-byte aligned rows."""
    if device_type != "cuda":
        return "no GPU"
    if not hasattr(F, "grouped_mm"):
        return f"not in torch {torch.__version__}"
    if torch.version.hip is not None:
        return "not tried on ROCm"
    if _capability() < (9, 0):
        return "compute capability below 9.0"
    if dtype != torch.bfloat16:
        return f"{dtype} instead of bfloat16"
    unaligned = [size for size in features if size % 8]
    return f"feature size {unaligned[0]}, no multiple of 8" if unaligned else ""


@cache
def _capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability()
