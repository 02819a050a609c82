"""tools/benchmark_dispatch.py on GPUs: results, rows on the wire, host synchronisations; in one node and over two.

And the Triton kernels of redundancy bypassing on one GPU, against plain torch, bit for bit.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import bypass_kernel_cases as cases
import pytest
import torch

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
@pytest.mark.skipif(torch.cuda.device_count() < 4, reason="two nodes of two ranks need four GPUs")
@pytest.mark.parametrize("nodes", ["2", "1,3"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_emulated_nodes(dtype, nodes, tmp_path):
    many, _, every = run(4, tmp_path / "figures.json", "--dtype", dtype, "--emulate-nodes", nodes)
    assert many["rbd"]["inter_rows"] < 0.7 * many["alltoall"]["inter_rows"]
    assert 0 < every["rbd"]["exchanges_forward"] <= 6 and 0 < every["rbd"]["exchanges_backward"] <= 4


def moved(value, device: str):
    """Tensors on a device, also those in a tuple."""
    if isinstance(value, tuple):
        return tuple(moved(part, device) for part in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value


def call(name: str, *args):
    """A function of the kernels' module on the GPU, without a synchronisation; returns its result on the CPU."""
    from megatron_xmoe.kernels import triton_bypass

    arguments = moved(args, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = getattr(triton_bypass, name)(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return moved(result, "cpu")


def write(name: str, target: torch.Tensor, *args) -> torch.Tensor:
    """One that writes into its first argument, which is returned."""
    target = target.cuda()
    call(name, target, *args)
    return target.cpu()


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
class TestBypassKernels:
    """What tests/unit/test_triton_bypass.py runs in the interpreter, and larger cases."""

    @pytest.mark.parametrize("case", [*cases.CASES, *cases.LARGE], ids=str)
    def test_copies(self, case):
        cases.check_copies(call, case)

    @pytest.mark.parametrize("case", [*cases.CASES, *cases.LARGE], ids=str)
    def test_what_is_written(self, case):
        cases.check_writing(call, write, case)

    @pytest.mark.parametrize("sizes", cases.SEGMENTS + cases.MANY, ids=lambda sizes: f"{len(sizes)} of {sum(sizes)}")
    def test_what_is_read(self, sizes):
        cases.check_reading(call, write, sizes)

    @pytest.mark.parametrize("sizes", cases.SEGMENTS + cases.MANY, ids=lambda sizes: f"{len(sizes)} of {sum(sizes)}")
    def test_tables(self, sizes):
        cases.check_tables(call, write, sizes)

    @pytest.mark.parametrize("case", [*cases.CASES, *cases.LARGE], ids=str)
    def test_plain_torch_on_the_gpu(self, case):
        """The path of `auto` gives the CPU's bits, too."""
        routes, places, expected = cases.chosen(case)
        tables = moved((routes.inverse, routes.expert_ids, places.experts, places.bin_of, places.place_of), "cuda")
        salt, slots = cases.salt_of(3, 1) if case.balanced else None, cases.most_routes(places, case.topk)
        found = cases.bypass.number_copies(*tables, places.width, slots, salt)
        kept = int(routes.tokens_per_expert.sum())
        for name in ("bins", "number", "pilot_number", "counts"):
            cases.assert_same(getattr(found, name).cpu(), getattr(expected, name))
        cases.assert_same(found.words[:kept].cpu(), expected.words[:kept])
