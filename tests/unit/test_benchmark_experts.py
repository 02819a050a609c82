"""tools/benchmark_experts.py on a CPU: everything is timed, agrees, and keeps the bytes that it should."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHAPES = ((30, 32, 24, 6, 3), (16, 16, 8, 2, 1))


# the fewest repetitions: what is tested is what is computed, not how fast
PROGRAM = """
import sys
sys.path.insert(0, "tools")
import benchmark_ops
benchmark_ops.CPU_SECONDS = 0
import benchmark_experts
sys.exit(benchmark_experts.run_tool(benchmark_experts.PROG, benchmark_experts.main))
"""


def run(*arguments: str) -> subprocess.CompletedProcess:
    """The tool in a process of its own."""
    command = [sys.executable, "-c", PROGRAM, "--device", "cpu", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def result(request, tmp_path_factory) -> dict:
    """The figures, and what was printed."""
    file = tmp_path_factory.mktemp("figures") / "experts.json"
    shapes = ";".join(",".join(map(str, shape)) for shape in SHAPES)
    options = ("--dtype", request.param, "--threads", "1", "--stages", "--json", str(file))
    done = run("--shapes", shapes, *options)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text()) | {"printed": done.stdout, "size": 4 if request.param == "fp32" else 2}


def figures(result: dict, shape: tuple[int, ...]) -> dict[str, dict]:
    """Records of whole MLPs by system."""
    return {r["system"]: r for r in result["figures"] if tuple(r["shape"]) == shape and "stage" not in r}


@pytest.mark.parametrize("shape", SHAPES)
def test_systems(result, shape):
    found = figures(result, shape)
    assert found.keys() >= {"dense GEMM", "loop over experts", "grouped_mm, index ops", "Megatron SequentialMLP",
                            "X-MoE, loop", "X-MoE, loop, recomputed"}  # fmt: skip
    assert all(record["agrees"] for record in found.values())
    tokens, hidden, ffn, _, topk = shape
    for record in found.values():
        assert record["both_tflops"] == pytest.approx(18e-9 * tokens * topk * hidden * ffn / record["both_ms"])
        assert record["forward_tflops"] == pytest.approx(6e-9 * tokens * topk * hidden * ffn / record["forward_ms"])
        assert record["of_dense"] == pytest.approx(found["dense GEMM"]["both_ms"] / record["both_ms"])
    for peer in ("Liger", "ScatterMoE", "SonicMoE", "moe_ops"):
        assert f"{peer}: needs a GPU" in result["printed"]


@pytest.mark.parametrize("shape", SHAPES)
def test_kept_bytes(result, shape):
    """The formula plus index, inverse and routing weight (4 bytes each) of every route."""
    _, hidden, ffn, _, topk = shape
    found = figures(result, shape)
    assert found["X-MoE, loop"]["kept_bytes_a_token"] == result["size"] * (hidden + 2 * topk * ffn) + 12 * topk
    assert found["X-MoE, loop, recomputed"]["kept_bytes_a_token"] == result["size"] * hidden + 12 * topk
    assert found["grouped_mm, index ops"]["kept_bytes_a_token"] > 2 * found["X-MoE, loop"]["kept_bytes_a_token"]


def test_stages(result):
    stages = [r for r in result["figures"] if "stage" in r and tuple(r["shape"]) == SHAPES[0]]
    names = [record["stage"] for record in stages]
    assert names[0] == "metadata" and names.count("gather again") == 1 and len(set(names)) == len(names) == 14
    assert all(record["ms"] > 0 < record["floor_ms"] for record in stages)
    assert {record["stage"] for record in stages if record["bound"] == "dense"} == {
        "fc1", "fc2", "dgrad fc2", "wgrad fc2", "wgrad fc1", "dgrad fc1",
    }  # fmt: skip


@pytest.mark.parametrize("text", ["8,8,8,8", "8,8,8,2,3", "0,8,8,8,2", "a,b,c,d,e", ""])
def test_wrong_shapes(text, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import benchmark_experts

    with pytest.raises(SystemExit) as raised:
        benchmark_experts.parse(["--shapes", text])
    assert raised.value.code == 2 and "is not T,d,n,E,K" in capsys.readouterr().err
