"""tools/benchmark_dispatch.py on GPUs: results, rows on the wire, host synchronisations; in one node and over two."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "benchmark_dispatch.py"
SHAPES = "512,4,32,256;64,1,8,64;256,8,8,128"

pytestmark = pytest.mark.multi_gpu


def run(processes: int, figures: Path, *options: str) -> list[dict]:
    """The tool's records; it fails if results differ or if the host waits more often than once a forward pass."""
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
        assert all(record[name]["syncs"] == [1, 0] for name in ("alltoall", "rbd"))
    return records


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_one_node(dtype, tmp_path):
    for record in run(2, tmp_path / "figures.json", "--dtype", dtype):
        assert record["nodes"] == [2] and record["auto"] == "alltoall"


@pytest.mark.skipif(torch.cuda.device_count() < 4, reason="two nodes of two ranks need four GPUs")
@pytest.mark.parametrize("nodes", ["2", "1,3"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_emulated_nodes(dtype, nodes, tmp_path):
    many, _, every = run(4, tmp_path / "figures.json", "--dtype", dtype, "--emulate-nodes", nodes)
    assert many["rbd"]["inter_rows"] < 0.7 * many["alltoall"]["inter_rows"]
    assert 0 < every["rbd"]["exchanges_forward"] <= 6 and 0 < every["rbd"]["exchanges_backward"] <= 4
