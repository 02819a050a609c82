"""setup.py's choice of what to build, the ties between `_C` and its sources, and `python -m megatron_xmoe.info`."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_xmoe import _optional
from megatron_xmoe.kernels import registry

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def setup() -> SimpleNamespace:
    """What setup.py defines."""
    return SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py")))


@pytest.fixture
def project(tmp_path) -> Path:
    """A copy of what a build reads."""
    for name in ("csrc", "megatron_xmoe"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def program(path: Path, text: str) -> str:
    """A shell script."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def build(project: Path, *, expect: int = 0, **environment: str) -> str:
    """What `setup.py build_ext --inplace` prints."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    environment = os.environ | {"TORCH_CUDA_ARCH_LIST": "no GPU part"} | environment
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def built(project: Path) -> list[Path]:
    """The extensions in the package."""
    return list((project / "megatron_xmoe").glob("_C*.so"))


class TestSetup:
    def test_zero_builds_nothing(self, project):
        assert "left out: XMOE_BUILD_EXT=0" in build(project, XMOE_BUILD_EXT="0")
        assert not built(project)

    def test_without_a_compiler(self, project):
        output = build(project, XMOE_BUILD_EXT="auto", CXX="/nowhere/c++")
        assert "megatron-xmoe: compiled kernels left out: there is no C++ compiler (/nowhere/c++)" in output
        output = build(project, expect=1, XMOE_BUILD_EXT="1", CXX="/nowhere/c++")
        assert "XMOE_BUILD_EXT=1, but there is no C++ compiler" in output

    def test_without_torch(self, project):
        broken = project / "broken"
        broken.mkdir()
        (broken / "torch.py").write_text("raise OSError('libcudart is not there')")
        compiler = program(project / "c++", "exit 1")
        output = build(project, XMOE_BUILD_EXT="auto", CXX=compiler, PYTHONPATH=str(broken))
        assert "left out: torch cannot be imported here (libcudart is not there)" in output

    @pytest.mark.parametrize("ninja", [True, False], ids=["ninja", "no ninja"])
    def test_a_compile_error_is_told_and_leaves_nothing(self, project, ninja):
        (project / "bin").mkdir()
        program(project / "bin/ninja", 'exec "$REAL_NINJA" "$@"' if ninja else "exit 1")
        path = {"PATH": f"{project / 'bin'}:{os.environ['PATH']}", "REAL_NINJA": shutil.which("ninja") or "false"}
        answers = 'case " $* " in *" -c "*) echo "rows.cpp:7: error: no such thing" >&2; exit 1;; esac\necho 12.2.0'
        compiler = program(project / "c++", answers)
        stale = project / f"build/lib.linux-{os.uname().machine}-cpython-{sys.version_info[0]}{sys.version_info[1]}"
        (stale / "megatron_xmoe").mkdir(parents=True)
        name = f"_C.cpython-{sys.version_info[0]}{sys.version_info[1]}-{os.uname().machine}-linux-gnu.so"
        (stale / "megatron_xmoe" / name).touch()
        output = build(project, XMOE_BUILD_EXT="auto", CXX=compiler, **path)
        assert "megatron-xmoe: compiled kernels left out: the C++ compiler failed: " in output
        assert "compiled kernels built" not in output
        assert "failed: rows.cpp:7: error: no such thing" in output or not ninja  # the summary has it
        assert not built(project)
        build(project, expect=1, XMOE_BUILD_EXT="1", CXX=compiler, **path)

    def test_an_unknown_mode_is_refused(self, project):
        assert "it must be auto, 1 or 0" in build(project, expect=1, XMOE_BUILD_EXT="yes")

    @pytest.mark.parametrize(
        ("archs", "flags"),
        [
            ("9.0", ["arch=compute_90,code=sm_90"]),
            (
                "8.0;9.0+PTX",
                ["arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90", "arch=compute_90,code=compute_90"],
            ),
            ("9.0a, 10.0", ["arch=compute_90a,code=sm_90a", "arch=compute_100,code=sm_100"]),
        ],
    )
    def test_architectures_for_nvcc(self, setup, archs, flags):
        assert setup.cuda_flags(archs) == [f"-gencode={flag}" for flag in flags]

    @pytest.mark.parametrize("archs", ["Hopper", "90", "9.0;", "9.0 +PTX"])
    def test_unknown_architectures(self, setup, archs):
        if archs == "9.0;":
            assert setup.cuda_flags(archs) == setup.cuda_flags("9.0")
            return
        with pytest.raises(setup.LeftOut, match="must be a list like"):
            setup.cuda_flags(archs)

    def test_architectures_without_a_gpu_or_a_wish(self, setup, monkeypatch):
        monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
        none = SimpleNamespace(cuda=SimpleNamespace(device_count=lambda: 0))
        assert setup.gpu_archs(none, "CUDA", "TORCH_CUDA_ARCH_LIST") == "8.0;9.0+PTX"
        assert setup.gpu_archs(none, "HIP", "PYTORCH_ROCM_ARCH") == "gfx90a;gfx942"
        two = SimpleNamespace(device_count=lambda: 2, get_device_capability=lambda device: (9 - device, 0))
        assert setup.gpu_archs(SimpleNamespace(cuda=two), "CUDA", "TORCH_CUDA_ARCH_LIST") == "8.0;9.0"


class TestToolkit:
    """Which GPU compiler fits torch."""

    @pytest.fixture
    def home(self, tmp_path) -> Path:
        (tmp_path / "bin").mkdir()
        (tmp_path / "include/hip").mkdir(parents=True)
        (tmp_path / "include/cuda_runtime.h").touch()
        (tmp_path / "include/hip/hip_runtime.h").touch()
        program(tmp_path / "bin/nvcc", "echo 'Cuda compilation tools, release 13.2, V13.2.1'")
        program(tmp_path / "bin/hipcc", "echo 'HIP version: 6.4.43482-0f2d60242'")
        return tmp_path

    @staticmethod
    def torch_for(cuda: str | None = None, hip: str | None = None) -> SimpleNamespace:
        cuda_api = SimpleNamespace(device_count=lambda: 0)
        return SimpleNamespace(version=SimpleNamespace(cuda=cuda, hip=hip), __version__="2.11.0", cuda=cuda_api)

    def test_cuda(self, setup, home, monkeypatch):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
        found = setup.find_toolkit(self.torch_for(cuda="13.0"), SimpleNamespace(CUDA_HOME=str(home)))
        assert (found.name, found.archs, found.compiler) == ("CUDA 13.2", "9.0", str(home / "bin/nvcc"))

    def test_hip(self, setup, home, monkeypatch):
        monkeypatch.delenv("PYTORCH_ROCM_ARCH", raising=False)
        found = setup.find_toolkit(self.torch_for(hip="6.3.1"), SimpleNamespace(ROCM_HOME=str(home)))
        assert (found.name, found.archs) == ("HIP 6.4", "gfx90a;gfx942")
        assert {"-DUSE_ROCM=1", "--offload-arch=gfx90a", "--offload-arch=gfx942"} <= set(found.flags)
        assert "-DUSE_ROCM=1" in found.defines

    def test_another_major_version(self, setup, home):
        with pytest.raises(setup.LeftOut, match="of CUDA 13.2, and torch 2.11.0 is for CUDA 12.8"):
            setup.find_toolkit(self.torch_for(cuda="12.8"), SimpleNamespace(CUDA_HOME=str(home)))

    def test_torch_for_the_cpu(self, setup):
        with pytest.raises(setup.LeftOut, match="for the CPU only"):
            setup.find_toolkit(self.torch_for(), SimpleNamespace())

    def test_a_wrapper_without_headers(self, setup, home):
        (home / "include/cuda_runtime.h").unlink()
        with pytest.raises(setup.LeftOut, match=f"no nvcc with its headers in {home}"):
            setup.find_home(str(home), "/nowhere", "nvcc", "cuda_runtime.h")
        with pytest.raises(setup.LeftOut, match="no nvcc with its headers in /nowhere"):
            setup.find_home(None, "/nowhere", "nvcc", "cuda_runtime.h")

    def test_device_code_is_compiled_once(self, setup, home, tmp_path):
        log = tmp_path / "log"
        script = f'echo called >> {log}\nfor last; do :; done\ntouch "$last"'
        compiler = program(tmp_path / "gpu", script)
        toolkit = setup.Toolkit("CUDA 13.2", compiler, str(home), "9.0", ["-a"], ["cudart"])
        objects = setup.compile_device_code(toolkit, tmp_path / "objects")
        sources = len(list((ROOT / "csrc").glob("*.cu")))
        assert len(objects) == sources >= 1
        assert setup.compile_device_code(toolkit, tmp_path / "objects") == objects
        assert log.read_text().count("called") == sources
        other = setup.Toolkit("CUDA 13.2", compiler, str(home), "9.0", ["-b"], ["cudart"])
        setup.compile_device_code(other, tmp_path / "objects")
        assert log.read_text().count("called") == 2 * sources

    def test_device_code_that_fails(self, setup, home, tmp_path):
        compiler = program(tmp_path / "gpu", 'echo "rows.cu(3): error: bad"\nexit 2')
        toolkit = setup.Toolkit("CUDA 13.2", compiler, str(home), "9.0", [], ["cudart"])
        with pytest.raises(setup.LeftOut, match=r"gpu failed: rows.cu\(3\): error: bad"):
            setup.compile_device_code(toolkit, tmp_path / "objects")


class TestExtension:
    """`_C` is used only where it was built from these sources and for these devices."""

    @pytest.fixture(autouse=True)
    def there(self, monkeypatch):
        """An extension that fits, and no GPU, until a test changes that."""
        self.facts = {"sources": _optional.sources_digest(ROOT), "gpu": "CUDA 13.0", "archs": "9.0", "cpu": "AVX2"}
        self.facts["torch"] = torch.__version__
        monkeypatch.setattr(_optional, "probe", lambda name: _optional.Availability(name, True, "version unknown"))
        monkeypatch.setattr(_optional, "extension_facts", lambda: self.facts)
        monkeypatch.setattr(_optional, "_gpus", lambda: [])
        self.monkeypatch = monkeypatch

    def test_it_fits(self):
        assert _optional.extension("cpu") == _optional.Availability(
            "megatron_xmoe._C", True, "compiled kernels with AVX2"
        )
        assert _optional.extension("cuda").reason == "compiled kernels for CUDA 13.0 (9.0)"

    @pytest.mark.parametrize("device_type", ["cpu", "cuda"])
    def test_other_sources(self, device_type):
        self.facts["sources"] = "0123456789abcdef"
        found = _optional.extension(device_type)
        assert not found.usable
        assert found.reason == "built from other sources; to build it: python setup.py build_ext --inplace"

    @pytest.mark.parametrize("device_type", ["cpu", "cuda"])
    def test_another_torch(self, device_type):
        self.facts["torch"] = "2.0.1"
        found = _optional.extension(device_type)
        assert not found.usable and found.reason.startswith("built for torch 2.0.1, and this is ")

    def test_an_installation_without_sources(self):
        self.monkeypatch.setattr(_optional, "sources_digest", lambda root: "")
        self.facts["sources"] = "0123456789abcdef"
        assert _optional.extension("cpu").usable

    def test_no_gpu_part(self):
        self.facts["gpu"] = ""
        assert _optional.extension("cpu").usable
        assert _optional.extension("cuda").reason.startswith("built without GPU kernels")

    def test_another_gpu(self):
        self.monkeypatch.setattr(_optional, "_gpus", lambda: ["9.0", "8.0"])
        found = _optional.extension("cuda")
        assert not found.usable and found.reason.startswith("built for 9.0, and a GPU here is 8.0")
        with pytest.raises(ValueError, match="a GPU here is 8.0"):
            registry.choose_kernels("cpp", "cuda")

    def test_not_built(self):
        missing = _optional.Availability("megatron_xmoe._C", False, "not installed")
        self.monkeypatch.setattr(_optional, "probe", lambda name: missing)
        reason = _optional.extension("cpu").reason
        assert reason == "not built; to build it: python setup.py build_ext --inplace"

    @pytest.mark.parametrize(
        ("archs", "gpu", "expected"),
        [
            ("9.0", "9.0", True),
            ("8.0", "8.9", True),
            ("8.9", "8.0", False),
            ("8.0", "9.0", False),
            ("8.0+PTX", "9.0", True),
            ("8.0;9.0+PTX", "12.0", True),
            ("8.0;9.0+PTX", "7.5", False),
            ("9.0a", "9.0", True),
            ("10.0a", "10.3", False),
            ("10.0f", "10.3", False),
            ("gfx90a;gfx942", "gfx942", True),
            ("gfx90a:sramecc+:xnack-", "gfx90a", True),
            ("gfx90a", "gfx942", False),
            ("gfx90a", "gfx90", False),
        ],
    )
    def test_architectures(self, archs, gpu, expected):
        assert _optional.serves(archs, gpu) is expected


@pytest.fixture
def asked_again():
    """Asks once more whether Triton can be used; what was found is forgotten afterwards."""

    def ask() -> _optional.Availability:
        _optional.triton.cache_clear()
        return _optional.triton()

    yield ask
    _optional.triton.cache_clear()


def test_triton_needs_a_c_compiler_and_headers(monkeypatch, tmp_path, asked_again):
    monkeypatch.setattr(_optional, "probe", lambda name: _optional.Availability(name, True, "version unknown"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not asked_again().usable and "C compiler" in asked_again().reason
    assert not registry.triton_is_usable("cuda")
    compiler = tmp_path / "gcc"
    compiler.write_text("")
    compiler.chmod(0o755)
    monkeypatch.setattr(_optional.sysconfig, "get_path", lambda name: str(tmp_path))
    assert not asked_again().usable and "Python.h" in asked_again().reason
    (tmp_path / "Python.h").write_text("")
    assert asked_again().usable and registry.triton_is_usable("cuda")
    monkeypatch.setenv("XMOE_KERNELS", "reference")
    assert not registry.triton_is_usable("cuda")


def test_a_faster_backend_takes_single_operations(monkeypatch):
    """On an NVIDIA GPU, unless a backend is pinned or the faster one cannot run."""
    usable = {"cpp": True, "triton": True, "reference": True}
    monkeypatch.setattr(registry, "_candidate", lambda name, device: registry.Candidate(name, usable[name], "why"))
    monkeypatch.setattr(registry.torch.version, "hip", None)
    found = lambda operation, pinned: registry._kernel.__wrapped__(operation, "cuda", pinned).__module__  # noqa: E731
    assert found("sum_rows", "auto").endswith("triton_rows") and found("gather_rows", "auto").endswith("cpp")
    assert "sum_rows by triton" in registry.choose_kernels("auto", "cuda").reason
    assert found("sum_rows", "cpp").endswith("cpp")
    usable["triton"] = False
    assert found("sum_rows", "auto").endswith("cpp")
    assert "sum_rows" not in registry.choose_kernels("auto", "cuda").reason


def test_the_digest_follows_the_sources(project):
    before = _optional.sources_digest(project)
    assert before == _optional.sources_digest(ROOT) and len(before) == 16
    digests = {before}
    header = project / "csrc/rows.h"
    for change in (
        lambda: header.write_text(header.read_text() + "\n"),
        lambda: header.rename(header.with_name("other.h")),
        lambda: (project / "csrc/added.cu").touch(),
    ):
        change()
        _optional.sources_digest.cache_clear()
        digests.add(_optional.sources_digest(project))
    assert len(digests) == 4
    (project / "csrc/notes.txt").touch()
    _optional.sources_digest.cache_clear()
    assert _optional.sources_digest(project) in digests
    assert _optional.sources_digest(project / "build") == ""


def info(**environment: str) -> str:
    """What `python -m megatron_xmoe.info` prints."""
    command = [sys.executable, "-m", "megatron_xmoe.info"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_info_names_versions_backends_and_reasons():
    lines = {line[:22].strip(): line[22:].strip() for line in info(XMOE_KERNELS="").splitlines()}
    assert lines["torch"].startswith(torch.__version__)
    assert lines["megatron-core"].startswith("0.19.")
    assert lines["cpu: triton"].startswith("not usable: Triton's kernels need a GPU")
    assert lines["cpu: reference"].startswith("usable: ")
    found = _optional.extension("cpu")
    assert lines["cpu: cpp"] == f"{'usable' if found.usable else 'not usable'}: {found.reason}"
    assert lines["cpu: chosen"] == ("cpp" if found.usable else "reference")
    assert lines["loop on cpu"].startswith("usable: ") and lines["torch on cpu"] == "not usable: no GPU"
    assert lines["auto on cpu"] == "loop"


def test_info_with_a_pinned_backend_that_cannot_run():
    assert "cpu: chosen          reference, pinned" in info(XMOE_KERNELS="reference")
    assert "cpu: chosen          none: --xmoe-kernels (or XMOE_KERNELS) fast is unknown" in info(XMOE_KERNELS="fast")


def test_info_without_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libcudart is not there')")
    shown = info(PYTHONPATH=str(tmp_path))
    assert "torch                OSError: libcudart is not there" in shown
    assert "torch cannot be imported" in shown
