"""tools/benchmark_dispatch.py on GPUs: results, rows on the wire, host synchronisations; in one node and over two.

And the index arithmetic of redundancy bypassing on one GPU, against plain torch on the CPU, bit for bit.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import bypass_kernel_cases as cases
import pytest
import torch

from megatron_xmoe import _optional
from megatron_xmoe.kernels import cpp_bypass, reference_bypass

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "benchmark_dispatch.py"
SHAPES = "512,4,32,256;64,1,8,64;256,8,8,128"


def run(processes: int, figures: Path, *options: str, waits: int = 1) -> list[dict]:
    """The tool's records; it fails if results differ, or if the host waits more often in a forward pass."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", str(SCRIPT),
         "--shapes", SHAPES, "--layer", "--ffn", "64", "--check-syncs", "--iterations", "3", "--json", str(figures),
         *options],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    records = json.loads(figures.read_text())["figures"]
    assert len(records) == 3
    for record in records:
        assert all(record[name]["syncs"] == [waits, 0] for name in ("alltoall", "rbd"))
    return records


@pytest.mark.gpu
def test_one_gpu(tmp_path):
    """Where nothing is exchanged the host waits for nothing."""
    for record in run(1, tmp_path / "figures.json", "--dtype", "bf16", waits=0):
        assert record["rbd"]["inter_rows"] == record["rbd"]["intra_rows"] == 0


@pytest.mark.multi_gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_one_node(dtype, tmp_path):
    for record in run(2, tmp_path / "figures.json", "--dtype", dtype):
        assert record["nodes"] == [2] and record["auto"] == "alltoall"


@pytest.mark.multi_gpu
@pytest.mark.parametrize("nodes", ["2", "1,3"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_emulated_nodes(dtype, nodes, tmp_path):
    """With fewer than four GPUs the nodes share them."""
    if torch.cuda.device_count() < int(nodes[-1]):
        pytest.skip(f"a node of {nodes[-1]} ranks needs as many GPUs")
    many, _, every = run(4, tmp_path / "figures.json", "--dtype", dtype, "--emulate-nodes", nodes)
    assert many["rbd"]["inter_rows"] < 0.7 * many["alltoall"]["inter_rows"]
    assert (every["rbd"]["exchanges_forward"], every["rbd"]["exchanges_backward"]) == (6, 4)


def moved(value, device: str):
    """Tensors on a device, also those in a tuple."""
    if isinstance(value, tuple):
        return tuple(moved(part, device) for part in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value


def caller(module: ModuleType) -> Callable:
    """Calls its functions on the GPU, without a synchronisation; their results come back to the CPU."""

    def call(name: str, *args):
        arguments = moved(args, "cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            result = getattr(module, name)(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return moved(result, "cpu")

    return call


def writer(module: ModuleType) -> Callable:
    """The same for functions that write into their first argument, which is returned."""

    def write(name: str, target: torch.Tensor, *args) -> torch.Tensor:
        target = target.cuda()
        caller(module)(name, target, *args)
        return target.cpu()

    return write


def backends() -> list:
    """Plain torch, and the compiled kernels where they are built for this GPU."""
    built = _optional.extension("cuda")
    skip = pytest.mark.skipif(not built.usable, reason=built.reason)
    return [reference_bypass, pytest.param(cpp_bypass, marks=skip)]


@pytest.mark.gpu
@pytest.mark.parametrize("module", backends(), ids=lambda module: module.__name__.rpartition(".")[2])
class TestBypassKernels:
    """What tests/unit/test_bypass_kernels.py runs on the CPU, and larger cases, against plain torch on the CPU."""

    @pytest.mark.parametrize("case", [*cases.CASES, *cases.LARGE], ids=str)
    def test_copies(self, module, case):
        cases.check_copies(caller(module), case)

    @pytest.mark.parametrize("case", [*cases.CASES, *cases.LARGE], ids=str)
    def test_what_is_written(self, module, case):
        cases.check_writing(caller(module), writer(module), case)

    @pytest.mark.parametrize("sizes", cases.SEGMENTS + cases.MANY, ids=lambda sizes: f"{len(sizes)} of {sum(sizes)}")
    def test_what_is_read(self, module, sizes):
        cases.check_reading(caller(module), writer(module), sizes)

    @pytest.mark.parametrize("sizes", cases.SEGMENTS + cases.MANY, ids=lambda sizes: f"{len(sizes)} of {sum(sizes)}")
    def test_tables(self, module, sizes):
        cases.check_tables(caller(module), sizes)
