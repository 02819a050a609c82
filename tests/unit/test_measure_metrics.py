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
    """Two seconds a step, one more in turns that record; a hundred between iterations are not theirs."""
    time, used = [0.0], []

    class Training:
        @staticmethod
        def train_step(seconds):
            time[0] += seconds

        @staticmethod
        def training_log(loss, iteration):
            time[0] += 1.0 if used[-1] == "recording" else 0.0
            return loss

    turns = tool.Turns(("recording", "plain"), used.append, 3, lambda: time[0])
    turns.accompany(Training)
    for iteration in range(1, 14):
        Training.train_step(2.0)
        assert Training.training_log(0.5, iteration=iteration) == 0.5
        time[0] += 100
        assert len(used) == 1 + iteration // 3
    assert used == ["recording", "plain", "recording", "plain", "recording"]
    assert turns.seconds == [3.0, 2.0, 3.0, 2.0]


def test_summary_compares_each_recording_turn_with_those_around_it(tool):
    # iterations get longer by 10 ms a turn, which is no cost of the figures
    seconds = [9.0, 0.090, 0.102, 0.110, 0.1236, 0.130, 0.147, 0.150]
    text = tool.summary(seconds, warm_up=1)
    assert "3 turns of each kind" in text
    assert "123.60 ms" in text and "130.00 ms" in text
    assert text.splitlines()[-1].split()[3] == "3.00%"


def test_too_few_turns(tool):
    seconds = [1.0] * 9
    assert "3 turns of each kind" in tool.summary(seconds, warm_up=1)
    assert tool.turns_needed(1) == 8 and tool.summary(seconds[:8], warm_up=1)
    with pytest.raises(ValueError, match=r"2 turns of each kind are too few; 3"):
        tool.summary(seconds[:7], warm_up=1)


@pytest.mark.parametrize("options", ["", "--moe-backend megatron", "--moe-backend xmoe --xmoe-metrics off"])
def test_a_run_that_records_nothing_is_refused_at_once(tool, monkeypatch, capsys, options):
    monkeypatch.setattr(sys, "argv", ["measure_metrics.py", *options.split()])
    with pytest.raises(SystemExit, match="2"):
        tool.parse()
    assert "nothing is recorded" in capsys.readouterr().err
