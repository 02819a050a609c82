"""tools/measure_metrics.py: trackers take turns, and what the recording turns cost is told apart from the others."""

import importlib
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(TOOLS), *sys.path])
    return importlib.import_module("measure_metrics")


def test_trackers_take_turns_of_a_log_interval(tool):
    time, used = [0.0], []
    turns = tool.Turns(("recording", "plain"), used.append, 3, lambda: time[0])
    for iteration in range(1, 14):
        time[0] += 2.0 if used[-1] == "recording" else 1.0
        turns.iteration_ends(iteration)
        assert len(used) == 1 + iteration // 3
    assert used == ["recording", "plain", "recording", "plain", "recording"]
    assert turns.seconds == [2.0, 1.0, 2.0, 1.0]


def test_summary_compares_each_recording_turn_with_those_around_it(tool):
    # iterations get longer by 10 ms a turn, which is no cost of the figures
    seconds = [9.0, 0.090, 0.102, 0.110, 0.1236, 0.130, 0.147, 0.150]
    text = tool.summary(seconds, warm_up=1)
    assert "3 turns of each kind" in text
    assert "123.60 ms" in text and "120.00 ms" in text
    assert text.splitlines()[-1].split()[3] == "3.00%"


def test_turns_without_a_partner_and_too_few_turns(tool):
    seconds = [1.0] * 9
    assert "3 turns of each kind" in tool.summary(seconds, warm_up=1)
    with pytest.raises(ValueError, match=r"7 turns; 8 are needed"):
        tool.summary(seconds[:7], warm_up=1)
