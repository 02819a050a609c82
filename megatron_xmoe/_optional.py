"""The one place that tries optional imports and keeps the reason when one fails."""

import hashlib
import importlib
import os
import re
import shutil
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path


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


@cache  # it is asked for in every pass of a layer, and looking for files takes as long as several launches
def triton() -> Availability:
    """Triton, with what it needs when it compiles its launchers: a C compiler and Python's headers."""
    found = probe("triton")
    if not found.usable:
        return found
    if not any(map(shutil.which, filter(None, (os.environ.get("CC"), "gcc", "clang", "cc")))):
        return Availability(found.name, False, "there is no C compiler, which it needs at run time")
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return Availability(found.name, False, "Python.h is not there, which it needs at run time (python3-dev)")
    return found


def extension(device_type: str) -> Availability:
    """Our compiled kernels, `megatron_xmoe._C`. Args: device_type, torch's "cuda" (also for AMD) or "cpu"."""
    probe("torch")  # whose libraries the extension needs
    found = probe("megatron_xmoe._C")
    if not found.usable:
        return _unusable(found.reason.replace("not installed", "not built"))
    facts = extension_facts()
    sources = sources_digest(Path(__file__).resolve().parents[1])
    if sources and facts["sources"] != sources:
        return _unusable("built from other sources")
    version = importlib.import_module("torch").__version__
    if facts["torch"] != version:
        return _unusable(f"built for torch {facts['torch']}, and this is {version}")
    if device_type == "cpu":
        return Availability(found.name, True, f"compiled kernels with {facts['cpu']}")
    if not facts["gpu"]:
        return _unusable("built without GPU kernels")
    missing = next((gpu for gpu in _gpus() if not serves(facts["archs"], gpu)), None)
    if missing:
        return _unusable(f"built for {facts['archs']}, and a GPU here is {missing}")
    return Availability(found.name, True, f"compiled kernels for {facts['gpu']} ({facts['archs']})")


def serves(archs: str, gpu: str) -> bool:
    """Whether code for `archs`, like "8.0;9.0+PTX" or "gfx90a;gfx942", runs on a `gpu` like "9.0" or "gfx90a"."""
    if gpu.startswith("gfx"):
        return gpu in [arch.split(":")[0] for arch in re.split("[;, ]+", archs)]
    major, minor = map(int, gpu.split("."))
    for built_major, built_minor, special, ptx in re.findall(r"(\d+)\.(\d+)([af]?)(\+PTX)?", archs):
        built = int(built_major), int(built_minor)
        if built == (major, minor) or (not special and (built[0] == major and built[1] <= minor)):
            return True
        if ptx and not special and built <= (major, minor):
            return True
    return False


def _gpus() -> list[str]:
    """The kinds of GPU that torch sees."""
    runtime = importlib.import_module("torch")
    properties = [runtime.cuda.get_device_properties(device) for device in range(runtime.cuda.device_count())]
    if runtime.version.hip:
        return sorted({p.gcnArchName.split(":")[0] for p in properties})  # features follow the colon
    return sorted({f"{p.major}.{p.minor}" for p in properties})


def _unusable(reason: str) -> Availability:
    return Availability("megatron_xmoe._C", False, f"{reason}; to build it: python setup.py build_ext --inplace")


def extension_facts() -> dict[str, str]:
    """What `megatron_xmoe._C` says of its build: sources, torch, gpu, archs, compiler, cpu (its instruction set)."""
    return importlib.import_module("megatron_xmoe._C").build_facts()


@cache
def sources_digest(root: Path) -> str:
    """Ties `_C` to what it was built from: names and contents of the sources in `csrc` below `root`.

    Returns:
        16 hexadecimal digits; "" where there are no sources, as in an installed wheel.
    """
    found = sorted(path for path in (root / "csrc").rglob("*") if path.suffix in (".cpp", ".cu", ".h"))
    if not found:
        return ""
    total = hashlib.sha256()
    for path in found:
        total.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:16]
