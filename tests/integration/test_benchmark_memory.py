"""tools/benchmark_memory.py: the figures of real layers on gloo, against the formula of sequence sharding."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "benchmark_memory.py"


def run_tool(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(TOOL), *arguments], capture_output=True, text=True, timeout=400, env=environment
    )


@pytest.fixture(scope="module")
def figures(tmp_path_factory) -> dict:
    """Measured bytes by tensor-parallel size and mode."""
    path = tmp_path_factory.mktemp("memory") / "memory.json"
    done = run_tool("--preset", "toy", "--tp", "2", "4", "--modes", "off", "on", "sp", "checkpoint", "--steps", "1",
                    "--json", str(path))  # fmt: skip
    assert done.returncode == 0, done.stderr
    content = json.loads(path.read_text())
    assert "break-even at a sequence of 16" in done.stdout and content["break_even_sequence"] == 16
    return {(record["tp"], record["mode"]): record for record in content["figures"]}


@pytest.mark.parametrize("tp", [2, 4])
def test_activations_of_the_block_fall_by_the_number_of_ranks(figures, tp):
    off, on = figures[tp, "off"], figures[tp, "on"]
    assert abs(on["block_bytes"] * tp / off["block_bytes"] - 1) < 0.03
    expected = off["block_bytes"] * (tp - 1) / tp
    assert abs((off["block_bytes"] - on["block_bytes"]) / expected - 1) < 0.03
    # Megatron's own sharding does the same to the block, and more outside
    assert abs(figures[tp, "sp"]["block_bytes"] * tp / off["block_bytes"] - 1) < 0.03
    assert figures[tp, "sp"]["layer_bytes"] < on["layer_bytes"] < off["layer_bytes"]
    assert figures[tp, "checkpoint"]["block_bytes"] < off["block_bytes"] / 4


def test_what_is_counted_is_what_the_layer_keeps(figures):
    """A lower bound by hand, per token in bf16: the gate input and the experts pre-activations (K routes)."""
    hidden, ffn, topk, tokens = 64, 32, 4, 256
    assert figures[2, "off"]["block_bytes"] > tokens * 2 * (hidden + topk * ffn)
    assert figures[2, "off"]["paper_saving_bytes"] == 4 * topk * tokens * hidden / 2


@pytest.mark.parametrize(
    ("preset", "break_even"), [("small", 469), ("large", 512)], ids=["as DeepSeek-MoE", "as DeepSeek-V3"]
)
def test_formulas(preset, break_even):
    done = run_tool("--preset", preset, "--tp", "4", "--formulas")
    assert done.returncode == 0 and f"break-even at a sequence of {break_even}" in done.stdout
    if preset == "large":  # 4 * 8 * 4096 * 7168 * 3 / 4 bytes
        assert "SSMB saves 672.00 MiB a layer and micro-batch at TP 4" in done.stdout


def test_arbitrary_model():
    """Mixtral-8x7B in the paper: break-even at 14336."""
    done = run_tool("--ffn", "14336", "--topk", "2", "--sequence", "4096", "--tp", "2", "--formulas")
    assert "saves less than sharding experts" in done.stdout and "sequence of 14336" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tp", "3"), "--tp 3 must divide the processes, 4, the heads, 4, and the sequence, 256. Fix: "),
        (("--topk", "9"), "--topk 9 is more than --experts 8. Fix: change one"),
        (("--experts", "6"), "--experts 6 do not divide over 4 processes. Fix: change one"),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    done = run_tool(*arguments)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
