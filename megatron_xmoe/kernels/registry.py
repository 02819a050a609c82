"""Which implementation of routing and row movement is used, chosen once and with a reason."""

from dataclasses import dataclass

PREFERENCE = ("reference",)
_REASONS = {"reference": "plain torch, which runs everywhere; this version ships no compiled kernels"}


@dataclass(frozen=True)
class KernelChoice:
    """The implementation in use."""

    name: str
    reason: str


def choose_kernels(pinned: str = "auto") -> KernelChoice:
    """The implementation for `pinned`, or the first in the order of preference that can run here.

    Raises:
        ValueError: an unknown name.
    """
    if pinned == "auto":
        return KernelChoice(PREFERENCE[0], _REASONS[PREFERENCE[0]])
    if pinned not in PREFERENCE:
        raise ValueError(f"--xmoe-kernels {pinned} is unknown; it must be auto or one of {', '.join(PREFERENCE)}")
    return KernelChoice(pinned, f"pinned by --xmoe-kernels; {_REASONS[pinned]}")
