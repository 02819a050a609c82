"""Packaging entry; the metadata is in pyproject.toml. Builds the compiled kernels, `megatron_xmoe._C`, where it can.

XMOE_BUILD_EXT=auto (the default) builds what this machine can, and leaves the rest out with a reason; 1 makes a failed
compilation an error; 0 builds nothing. torch must be importable, so pip needs --no-build-isolation. No GPU is needed:
TORCH_CUDA_ARCH_LIST or PYTORCH_ROCM_ARCH say what to compile for, else the GPUs that are here, else a default.
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
SOURCES = ["bindings.cpp", "bindings_bypass.cpp", "bindings_routes.cpp", "facts.cpp"]
SOURCES += ["cpu/rows.cpp", "cpu/routes.cpp", "cpu/bypass.cpp"]
CXX_FLAGS = ["-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall"]
CXX_FLAGS += ["-ffp-contract=off"]  # products are rounded before they are added, as in the other backends
DEFAULT_ARCHS = {"CUDA": "8.0;9.0+PTX", "HIP": "gfx90a;gfx942"}


class LeftOut(Exception):
    """Why a part is not built."""


@dataclass(frozen=True)
class Toolkit:
    """A GPU compiler that fits this torch."""

    name: str
    """"CUDA 13.0" or "HIP 6.4"."""

    compiler: str
    home: str
    archs: str
    flags: list[str]
    libraries: list[str]
    defines: list[str] = field(default_factory=list)


def mode() -> str:
    """What XMOE_BUILD_EXT asks for."""
    asked = os.environ.get("XMOE_BUILD_EXT") or "auto"
    if asked not in ("auto", "0", "1"):
        sys.exit(f"XMOE_BUILD_EXT={asked} is unknown; it must be auto, 1 or 0")
    return asked


def say(text: str) -> None:
    """One line of the summary."""
    print(f"megatron-xmoe: {text}", flush=True)


def cuda_flags(archs: str) -> list[str]:
    """nvcc's options for a list like "8.0;9.0a+PTX".

    Raises:
        LeftOut: something else is in the list.
    """
    flags = []
    for arch in re.split(r"[;, ]+", archs.strip("; ,")):
        found = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", arch)
        if not found:
            raise LeftOut(f"TORCH_CUDA_ARCH_LIST has '{arch}'; it must be a list like 8.0;9.0+PTX")
        number = "".join(found.groups("")[:3])
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if found[4]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def compiler_version(compiler: str, pattern: str) -> str:
    """Version X.Y of a GPU compiler.

    Raises:
        LeftOut: it does not run.
    """
    try:
        text = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LeftOut(f"{compiler} does not run: {error}") from error
    found = re.search(pattern, text)
    if not found:
        raise LeftOut(f"{compiler} --version names no version")
    return found[1]


def gpu_archs(torch, kind: str, variable: str) -> str:
    """What to compile for: the variable, else the GPUs of this machine, else the default."""
    if os.environ.get(variable):
        return os.environ[variable]
    found = set()
    try:
        for device in range(torch.cuda.device_count()):
            if kind == "HIP":
                found.add(torch.cuda.get_device_properties(device).gcnArchName.split(":")[0])
            else:
                found.add("{}.{}".format(*torch.cuda.get_device_capability(device)))
    except RuntimeError:  # devices are counted without the driver that would serve them
        found.clear()
    return ";".join(sorted(found)) or DEFAULT_ARCHS[kind]


def find_home(found: str | None, usual: str, name: str, header: str) -> tuple[str, str]:
    """The toolkit's folder and compiler: what torch found, which can be a wrapper without headers, or the usual place.

    Raises:
        LeftOut: neither has both.
    """
    for home in filter(None, (found, usual)):
        compiler = os.path.join(home, "bin", name)
        if os.path.exists(compiler) and os.path.exists(os.path.join(home, "include", header)):
            return home, compiler
    raise LeftOut(f"no {name} with its headers in {found or usual} (CUDA_HOME or ROCM_HOME says where)")


def find_toolkit(torch, torch_build) -> Toolkit:
    """The GPU compiler of the CUDA or HIP that torch was built for.

    Raises:
        LeftOut: torch is for the CPU, or there is no such compiler.
    """
    kind = "HIP" if torch.version.hip else "CUDA"
    wanted = torch.version.hip or torch.version.cuda
    if not wanted:
        raise LeftOut(f"torch {torch.__version__} is for the CPU only")
    if kind == "HIP":
        home, compiler = find_home(torch_build.ROCM_HOME, "/opt/rocm", "hipcc", "hip/hip_runtime.h")
    else:
        home, compiler = find_home(torch_build.CUDA_HOME, "/usr/local/cuda", "nvcc", "cuda_runtime.h")
    version = compiler_version(compiler, r"HIP version: (\d+\.\d+)" if kind == "HIP" else r"release (\d+\.\d+)")
    if version.split(".")[0] != wanted.split(".")[0]:
        raise LeftOut(f"{compiler} is of {kind} {version}, and torch {torch.__version__} is for {kind} {wanted}")
    if kind == "HIP":
        archs = gpu_archs(torch, kind, "PYTORCH_ROCM_ARCH")
        defines = ["-DUSE_ROCM=1", "-D__HIP_PLATFORM_AMD__=1"]
        targets = [f"--offload-arch={arch}" for arch in re.split(r"[;, ]+", archs)]
        flags = ["-fPIC", "-x", "hip", "-ffp-contract=off", *defines, *targets]
        return Toolkit(f"HIP {version}", compiler, home, archs, flags, ["amdhip64"], defines)
    archs = gpu_archs(torch, kind, "TORCH_CUDA_ARCH_LIST")
    flags = ["-Xcompiler=-fPIC", "--threads=0", *cuda_flags(archs)]
    return Toolkit(f"CUDA {version}", compiler, home, archs, flags, ["cudart"])


def compile_device_code(toolkit: Toolkit, folder: Path) -> list[str]:
    """Objects of every csrc/*.cu, compiled side by side unless that was done with the same sources and compiler.

    The files know nothing of torch, so this takes seconds, and hipcc takes them as they are.

    Raises:
        LeftOut: the compiler refuses one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    headers = "".join(path.read_text() for path in sorted((ROOT / "csrc").glob("*.h")))
    running, objects = [], []
    for source in sorted((ROOT / "csrc").glob("*.cu")):
        target, stamp = folder / f"{source.stem}.o", folder / f"{source.stem}.command"
        command = [toolkit.compiler, "-O3", "-std=c++17", *toolkit.flags, "-c", str(source), "-o", str(target)]
        objects.append(str(target))
        made_from = "\n".join([toolkit.name, " ".join(command), headers, source.read_text()])
        if target.exists() and stamp.exists() and stamp.read_text() == made_from:
            continue
        stamp.unlink(missing_ok=True)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        running.append((command, stamp, made_from, subprocess.Popen(command, **pipes)))
    failed = []
    for command, stamp, made_from, process in running:
        output = process.communicate()[0]
        print(" ".join(command), output, sep="\n", flush=True)
        if process.returncode == 0:
            stamp.write_text(made_from)
        else:
            failed.append(first_error(output))
    if failed:
        raise LeftOut(f"{toolkit.compiler} failed: {failed[0]}")
    return objects


def first_error(output: str, otherwise: object = "no message") -> str:
    """The line of a compiler's output that says most."""
    lines = [line.strip() for line in output.splitlines()]
    return next((line for line in lines if "error:" in line), str(otherwise))


@contextmanager
def recorded_output() -> Iterator[list[str]]:
    """What this process and its children print meanwhile: shown afterwards, and in the list."""
    recorded: list[str] = []
    with tempfile.TemporaryFile() as file:
        sys.stdout.flush()
        kept = os.dup(1), os.dup(2)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield recorded
        finally:
            sys.stdout.flush()
            for number, original in enumerate(kept, 1):
                os.dup2(original, number)
                os.close(original)
            file.seek(0)
            recorded.append(file.read().decode(errors="replace"))
            print(recorded[0], flush=True)


def write_facts(folder: Path, torch, toolkit: Toolkit | None) -> None:
    """The header that csrc/facts.cpp includes; left alone when it says the same."""
    facts = {
        "XMOE_SOURCES": runpy.run_path(str(ROOT / "megatron_xmoe/_optional.py"))["sources_digest"](ROOT),
        "XMOE_TORCH": torch.__version__,
        "XMOE_GPU": toolkit.name if toolkit else "",
        "XMOE_ARCHS": toolkit.archs if toolkit else "",
    }
    text = "".join(f'#define {name} "{value}"\n' for name, value in facts.items())
    header = folder / "xmoe_built.h"
    folder.mkdir(parents=True, exist_ok=True)
    if not header.exists() or header.read_text() != text:
        header.write_text(text)


def extension_and_command() -> dict:
    """Arguments of setup() for the compiled kernels.

    Raises:
        LeftOut: torch or a C++ compiler is not there.
    """
    compiler = os.environ.get("CXX") or "c++"
    if not shutil.which(compiler.split()[0]):
        raise LeftOut(f"there is no C++ compiler ({compiler}); on Debian and Ubuntu: apt-get install g++")
    try:
        import torch
        from torch.utils import cpp_extension as torch_build
    except Exception as error:  # a broken torch raises OSError or RuntimeError, too
        raise LeftOut(f"torch cannot be imported here ({error}); pip needs --no-build-isolation for that") from error

    class Build(torch_build.BuildExtension):
        """Compiles device code first, then the extension with it."""

        def build_extensions(self) -> None:
            self.force = True  # flags can change where sources do not; ninja knows what to compile
            toolkit, left_out, temporary = None, "", Path(self.build_temp).resolve()
            try:
                found = find_toolkit(torch, torch_build)
                self.add_device_code(found, compile_device_code(found, temporary / "device"))
                toolkit = found
            except LeftOut as reason:
                left_out = str(reason)
                if mode() == "1" and "failed" in left_out:
                    raise
            write_facts(temporary / "facts", torch, toolkit)
            self.extensions[0].include_dirs.append(str(temporary / "facts"))
            self.build_or_leave_out(f"CPU and {toolkit.name} ({toolkit.archs})" if toolkit else "CPU", left_out)

        def add_device_code(self, toolkit: Toolkit, objects: list[str]) -> None:
            extension = self.extensions[0]
            extension.extra_objects += objects
            extension.libraries += toolkit.libraries
            extension.include_dirs.append(os.path.join(toolkit.home, "include"))
            extension.library_dirs += [os.path.join(toolkit.home, part) for part in ("lib64", "lib")]
            extension.extra_compile_args += ["-DXMOE_WITH_GPU=1", *toolkit.defines]

        def build_or_leave_out(self, parts: str, left_out: str) -> None:
            built = Path(self.get_ext_fullpath(self.extensions[0].name))
            built.unlink(missing_ok=True)  # a failure must not leave what an earlier build made
            self.extensions[0].optional = False  # else distutils would swallow a failure
            try:
                with recorded_output() as output:
                    super().build_extensions()
            except Exception as error:
                self.extensions[0].optional = mode() == "auto"  # nothing to put in place
                if mode() == "1":
                    raise
                say(f"compiled kernels left out: the C++ compiler failed: {first_error(output[0], error)}")
                return
            say(f"compiled kernels built for {parts}")
            if left_out:
                say(f"GPU kernels left out: {left_out}")

    extension = torch_build.CppExtension(
        "megatron_xmoe._C",
        [f"csrc/{name}" for name in SOURCES],
        extra_compile_args=CXX_FLAGS,
        extra_link_args=["-fopenmp"],
        optional=mode() == "auto",
        depends=[str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.h"))],
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


def compiled_kernels() -> dict:
    """Arguments of setup() for the compiled kernels: none where they are not wanted, or auto mode finds it cannot."""
    if mode() == "0":
        say("compiled kernels left out: XMOE_BUILD_EXT=0")
        return {}
    try:
        return extension_and_command()
    except LeftOut as reason:
        if mode() == "1":
            sys.exit(f"XMOE_BUILD_EXT=1, but {reason}")
        say(f"compiled kernels left out: {reason}")
        return {}


if __name__ == "__main__":
    setup(**compiled_kernels())
