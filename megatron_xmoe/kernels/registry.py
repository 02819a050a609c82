"""Which implementation of routing and row movement is used: chosen once, by a written order, with a reason.

Backends are modules with the functions of `kernels.reference` and `kernels.reference_bypass`. `pin` (the training
script's --xmoe-kernels) or the environment variable XMOE_KERNELS names one; otherwise the first of PREFERENCE that can
run on the device is taken, except for the operations in FASTER.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module

import torch

from megatron_xmoe import _optional

ENVIRONMENT = "XMOE_KERNELS"
PREFERENCE = ("cpp", "triton", "reference")
FASTER = {"sum_rows": "triton"}
"""Operations that another backend does faster than the first on NVIDIA GPUs (one H200, docs/benchmarks.md)."""
_MODULES = {
    "cpp": ("cpp", "cpp_bypass"),
    "triton": ("triton_choices", "triton_routes", "triton_rows", "reference_bypass"),
    "reference": ("reference", "reference_bypass"),
}


@dataclass(frozen=True)
class Candidate:
    """Whether a backend can run on a kind of device, and why or why not."""

    name: str
    usable: bool
    reason: str


@dataclass(frozen=True)
class KernelChoice:
    """The backend in use."""

    name: str
    reason: str


def pin(name: str) -> None:
    """Use backend `name` from now on in this process and its children; "auto" lets the order decide.

    Raises:
        ValueError: an unknown name.
    """
    _check(name)
    os.environ[ENVIRONMENT] = name


def candidates(device_type: str) -> list[Candidate]:
    """All backends, in the order of preference. Args: device_type, torch's "cuda" (also for AMD) or "cpu"."""
    return [_candidate(name, device_type) for name in PREFERENCE]


def choose_kernels(pinned: str, device_type: str) -> KernelChoice:
    """The backend named `pinned`, or for "auto" the first that can run on the device.

    Raises:
        ValueError: an unknown name, or a named backend that cannot run here.
    """
    _check(pinned)
    found = candidates(device_type)
    if pinned != "auto":
        (candidate,) = (c for c in found if c.name == pinned)
        if not candidate.usable:
            others = ", ".join(c.name for c in found if c.usable)
            raise ValueError(
                f"--xmoe-kernels (or {ENVIRONMENT}) {pinned} cannot run on {spoken(device_type)}: {candidate.reason}. "
                f"Fix: leave it out, or use one of: {others}"
            )
        return KernelChoice(pinned, f"pinned; {candidate.reason}")
    taken = next(c for c in found if c.usable)
    passed = "; ".join(f"{c.name}: {c.reason}" for c in found[: found.index(taken)])
    elsewhere = _faster_elsewhere(pinned, device_type) if taken.name == "cpp" else []
    but = "".join(f"; {operation} by {FASTER[operation]}, which is faster" for operation in elsewhere)
    return KernelChoice(taken.name, f"{taken.reason}{f' (not {passed})' if passed else ''}{but}")


def kernels_in_use() -> KernelChoice:
    """The backend that tensors of this machine get: those on the GPU where there is one.

    Raises:
        ValueError: the pinned backend is unknown or cannot run here.
    """
    return choose_kernels(_pinned(), "cuda" if torch.cuda.is_available() else "cpu")


def kernel(operation: str, device_type: str) -> Callable:
    """The function `operation` of the backend in use for a kind of device.

    Raises:
        ValueError: the pinned backend is unknown or cannot run here.
    """
    return _kernel(operation, device_type, _pinned())


@cache
def _kernel(operation: str, device_type: str, pinned: str) -> Callable:
    name = choose_kernels(pinned, device_type).name
    if name == "cpp" and operation in _faster_elsewhere(pinned, device_type):
        name = FASTER[operation]
    return implementation(name, operation)


def _faster_elsewhere(pinned: str, device_type: str) -> list[str]:
    """The operations of FASTER, where it counts: nobody pinned a backend, and the other one runs on this device."""
    if pinned != "auto" or device_type != "cuda" or torch.version.hip is not None:
        return []
    return [operation for operation, name in FASTER.items() if _candidate(name, device_type).usable]


def triton_is_usable(device_type: str) -> bool:
    """Whether Triton may compute what only it has a kernel for: it can run there, and plain torch was not asked for."""
    return not why_not_triton(device_type)


def why_not_triton(device_type: str, pinned: str = "auto") -> str:
    """The reason why `triton_is_usable` says no, or ''. Args: pinned, a backend that is about to be pinned."""
    pinned = pinned if pinned != "auto" else _pinned()
    if pinned == "reference":
        return "plain torch is asked for (--xmoe-kernels reference)"
    found = _candidate("triton", device_type)
    return "" if found.usable else found.reason


def implementation(name: str, operation: str) -> Callable:
    """The function `operation` of backend `name`, whether or not it can run here."""
    modules = [import_module(f"megatron_xmoe.kernels.{part}") for part in _MODULES[name]]
    return next(getattr(module, operation) for module in modules if hasattr(module, operation))


def _pinned() -> str:
    return os.environ.get(ENVIRONMENT) or "auto"


def _candidate(name: str, device_type: str) -> Candidate:
    if name == "reference":
        return Candidate(name, True, "plain torch, which runs everywhere")
    if name == "cpp":
        found = _optional.extension(device_type)
        return Candidate(name, found.usable, found.reason)
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return Candidate(name, False, "Triton's kernels need a GPU (or TRITON_INTERPRET=1, its slow interpreter)")
    found = _optional.triton()
    return Candidate(name, found.usable, found.reason)


def _check(name: str) -> None:
    if name not in ("auto", *PREFERENCE):
        raise ValueError(
            f"--xmoe-kernels (or {ENVIRONMENT}) {name} is unknown; it must be auto or one of {', '.join(PREFERENCE)}"
        )


def spoken(device_type: str) -> str:
    """A kind of device in an error message."""
    return "a GPU" if device_type == "cuda" else f"a {device_type.upper()}"
