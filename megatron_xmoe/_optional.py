"""The one place that tries optional imports and keeps the reason when one fails."""

import importlib
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Availability:
    """Whether an optional module can be used, and why not."""

    name: str
    usable: bool
    reason: str


@cache
def probe(module: str) -> Availability:
    """Try to import `module` once and say what came of it.

    Any exception counts as unusable, not only ImportError: a Transformer Engine built for another CUDA or torch
    raises OSError or RuntimeError.
    """
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        reason = "not installed" if module.startswith(missing) else f"its dependency {missing} is not installed"
        return Availability(module, False, reason)
    except Exception as error:  # the reason is kept and shown, see above
        first_line = (str(error).splitlines() or [""])[0]
        return Availability(module, False, f"{type(error).__name__}: {first_line}")
    return Availability(module, True, f"version {getattr(imported, '__version__', 'unknown')}")


def transformer_engine() -> Availability:
    """Transformer Engine's PyTorch part, as Megatron imports it."""
    return probe("transformer_engine.pytorch")


def apex_layer_norm() -> Availability:
    """NVIDIA's Apex with its fused layer norm (the package of that name on PyPI is something else)."""
    return probe("apex.normalization.fused_layer_norm")


def extension(device_type: str) -> Availability:
    """Our compiled kernels, `megatron_xmoe._C`. Args: device_type, torch's "cuda" (also for AMD) or "cpu"."""
    found = probe("megatron_xmoe._C")
    if not found.usable or device_type == "cpu" or importlib.import_module("megatron_xmoe._C").has_gpu():
        return found
    return Availability(found.name, False, "built without GPU kernels")
