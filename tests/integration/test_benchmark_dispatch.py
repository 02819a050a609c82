"""tools/benchmark_dispatch.py on four processes: what it tells, and that it notices dispatchers that are wrong."""

import json

import pytest
from jobs import REPOSITORY, run_script

SCRIPT = REPOSITORY / "tools" / "benchmark_dispatch.py"
SMALL = "--device cpu --shapes 96,3,16,24 --iterations 2 --warm-up 1 --ffn 16".split()


def test_both_dispatchers_over_nodes(tmp_path):
    """Nodes of two, uneven nodes and a single one; the counts are those that the routes demand."""
    figures = tmp_path / "figures.json"
    job = run_script(SCRIPT, *SMALL, "--ranks-per-node", "2", "1,3", "4", "--layer", "--json", figures, processes=4)
    assert job.output.count("results agree, and the rows between nodes are those that the routes demand") == 3
    assert "FAILED" not in job.output
    records = json.loads(figures.read_text())["figures"]
    assert [(record["nodes"], record["auto"]) for record in records] == [
        ([2, 2], "rbd"), ([1, 3], "rbd"), ([4], "alltoall")
    ]  # fmt: skip
    for record in records:
        plain, bypassing = record["alltoall"], record["rbd"]
        assert all(time > 0 for time in plain["layer"].values())
        assert plain["exchanges_forward"] == 4 and plain["exchanges_backward"] == 3
        assert plain["inter_rows"] + plain["intra_rows"] < 96 * 3  # some stay where they are
        for name in ("alltoall", "rbd"):
            assert record[name]["inter_rows"] == pytest.approx(record[name]["predicted_inter_rows"], rel=0.15)
        if record["nodes"] == [4]:
            assert bypassing["inter_rows"] == bypassing["inter_bytes"] == 0
            continue
        assert bypassing["inter_rows"] < 0.8 * plain["inter_rows"]
        assert bypassing["inter_bytes"] < plain["inter_bytes"]
        assert 0 < bypassing["exchanges_forward"] <= 6 and 0 < bypassing["exchanges_backward"] <= 4
        assert bypassing["stages"]["rows inside the node"] > 0


def test_redundancy_is_the_closed_form(tmp_path):
    """Enough uniformly routed tokens: within 1 %."""
    figures = tmp_path / "figures.json"
    options = "--device cpu --shapes 4096,8,64,4 --iterations 1 --warm-up 1 --ranks-per-node 2 1,3".split()
    run_script(SCRIPT, *options, "--json", figures, processes=4)
    for record in json.loads(figures.read_text())["figures"]:
        assert record["redundancy"]["predicted"] > 0.6
        assert record["redundancy"]["counted"] == pytest.approx(record["redundancy"]["predicted"], rel=0.01)


def test_dtype_and_several_groups():
    options = "--dtype bf16 --expert-parallel-size 2 --ranks-per-node 1,2,1".split()
    job = run_script(SCRIPT, *SMALL, *options, processes=4)
    assert "torch.bfloat16, nodes of (1, 1)" in job.output and "results agree" in job.output


FAULTS = {
    "rows that need not travel": (
        """
build = dispatch_cases.build_layer
dispatch_cases.build_layer = lambda setting, dispatcher, ffn: build(setting, "alltoall", ffn)
""",
        "FAILED: rbd: a rank sends",
    ),
    "wrong output": (
        """
from megatron_xmoe.dispatch import RedundancyBypassDispatcher as Bypass
finish = Bypass.combine_postprocess
Bypass.combine_postprocess = lambda self, rows: finish(self, rows + (rows.abs() > 2) * 1e-3)
""",
        "FAILED: output of rbd differ from alltoall's",
    ),
    "wrong gradients": (
        """
from megatron_xmoe.dispatch import RedundancyBypassDispatcher as Bypass
finish = Bypass.combine_postprocess
Bypass.combine_postprocess = lambda self, rows: finish(self, rows.detach() + 1.001 * (rows - rows.detach()))
""",
        "FAILED: gradients of rbd differ from alltoall's",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_dispatchers_are_noticed(fault, tmp_path):
    code, told = FAULTS[fault]
    script = tmp_path / "faulty.py"
    script.write_text(
        f"import runpy, sys\nsys.path[:0] = [{str(SCRIPT.parent)!r}]\nimport dispatch_cases\n{code}\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    job = run_script(script, *SMALL, "--ranks-per-node", "2", processes=4, fails=True)
    assert job.returncode == 1 and told in job.output, job.output + job.errors[-2000:]
