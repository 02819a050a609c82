"""`python -m megatron_xmoe.info`: versions, devices, and which kernels can be used here, or why not."""

import importlib
import os
import platform
from importlib import metadata

from megatron_xmoe import _optional
from megatron_xmoe.version import __version__


def main() -> None:
    """Print all of it. What fails is part of what is shown, so this always succeeds."""
    for title, section in (
        ("versions", versions),
        ("devices", devices),
        ("compiled kernels (megatron_xmoe._C)", build),
        ("kernels for routing and row movement", kernels),
        ("matrix products of the experts (bf16)", products),
    ):
        print(title)
        for name, text in section():
            print(f"  {name:20} {text}")


def versions() -> list[tuple[str, str]]:
    """Names and versions of what this package builds on."""
    torch = _optional.probe("torch")
    optional = {
        "triton": _optional.probe("triton"),
        "transformer engine": _optional.transformer_engine(),
        "apex": _optional.apex_layer_norm(),
    }
    return [
        ("megatron_xmoe", __version__),
        ("python", platform.python_version()),
        ("torch", _torch_version() if torch.usable else torch.reason),
        ("megatron-core", _installed("megatron-core")),
        *((name, found.reason.removeprefix("version ")) for name, found in optional.items()),
    ]


def devices() -> list[tuple[str, str]]:
    """The CPU and every GPU."""
    cores = len(os.sched_getaffinity(0))
    found = [("cpu", f"{platform.machine()}, {cores} core{'s' if cores > 1 else ''} for this process")]
    if not _optional.probe("torch").usable:
        return found
    torch = importlib.import_module("torch")
    for device in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(device)
        kind = properties.gcnArchName if torch.version.hip else f"sm_{properties.major}{properties.minor}"
        found.append((f"cuda:{device}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {kind}"))
    if torch.cuda.device_count() == 0:
        found.append(("gpu", "torch finds none"))
    return found


def build() -> list[tuple[str, str]]:
    """What was compiled."""
    if not _optional.probe("megatron_xmoe._C").usable:
        return [("not there", _optional.extension("cpu").reason)]
    facts = _optional.extension_facts()
    return [
        ("cpu part", f"uses {facts['cpu']}, compiler {facts['compiler']}"),
        ("gpu part", f"{facts['gpu']} for {facts['archs']}" if facts["gpu"] else "none"),
        ("built for torch", facts["torch"]),
        ("sources", facts["sources"]),
    ]


def kernels() -> list[tuple[str, str]]:
    """Per kind of device every backend, usable or why not, and which one is chosen for all operations."""
    if not _optional.probe("torch").usable:
        return [("none", "torch cannot be imported")]
    torch = importlib.import_module("torch")
    registry = importlib.import_module("megatron_xmoe.kernels.registry")
    pinned = os.environ.get(registry.ENVIRONMENT) or "auto"
    found = []
    for device_type in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for candidate in registry.candidates(device_type):
            state = "usable" if candidate.usable else "not usable"
            found.append((f"{device_type}: {candidate.name}", f"{state}: {candidate.reason}"))
        try:
            choice = registry.choose_kernels(pinned, device_type)
            found.append((f"{device_type}: chosen", f"{choice.name}{'' if pinned == 'auto' else ', pinned'}"))
        except ValueError as error:
            found.append((f"{device_type}: chosen", f"none: {error}"))
    return found


def products() -> list[tuple[str, str]]:
    """Per kind of device every backend of the experts' matrix products, usable or why not, and what "auto" takes."""
    if not _optional.probe("torch").usable:
        return [("none", "torch cannot be imported")]
    torch = importlib.import_module("torch")
    grouped_gemm = importlib.import_module("megatron_xmoe.kernels.grouped_gemm")
    found = []
    for device_type in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for candidate in grouped_gemm.grouped_gemm_candidates(device_type, torch.bfloat16):
            state = "usable" if candidate.usable else "not usable"
            found.append((f"{candidate.name} on {device_type}", f"{state}: {candidate.reason}"))
        choice = grouped_gemm.choose_grouped_gemm("auto", device_type, torch.bfloat16)
        found.append((f"auto on {device_type}", choice.name))
    return found


def _torch_version() -> str:
    torch = importlib.import_module("torch")
    built = f"HIP {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return f"{torch.__version__} ({built if torch.version.hip or torch.version.cuda else 'for the CPU'})"


def _installed(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
