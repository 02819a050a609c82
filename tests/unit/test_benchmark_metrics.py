"""The table of tools/benchmark_metrics.py: what is measured apart is added up."""

import importlib
import sys
from pathlib import Path

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def test_recording_and_reports_are_apart(monkeypatch):
    """Recording adds 2 % to an iteration of 10 ms, and every tenth a report takes 0.5 ms more than Megatron's own."""
    monkeypatch.setattr(sys, "path", [str(TOOLS), *sys.path])
    tool = importlib.import_module("benchmark_metrics")
    iterations = {"off": [0.0099, 0.01, 0.02], "summary": [0.0099 * 1.01, 0.0102, 0.02 * 1.03]}
    reports = {"off": [0.0001] * 3, "summary": [0.0001, 0.0006, 0.009]}
    head, off, summary = tool.table(iterations, reports, 10).splitlines()
    assert head.split("quartiles")[1].split() == "a report report every 10 report every 1".split()
    assert off.split() == "off 10.00 ms 0.00% 0.00% to 0.00% 0.10 ms 0.00% 0.00%".split()
    assert summary.split() == "summary 10.20 ms 2.00% 1.00% to 3.00% 0.60 ms 2.50% 7.00%".split()
    assert len(tool.table(iterations, reports, 1).splitlines()[0]) == len(head) - 17
