"""Tests of tools/plot_run.py: runs that went on, figures that are derived, and errors."""

import importlib
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
LOSS, MIB = "lm loss", "xmoe/inter-node-MiB"


@pytest.fixture(scope="module")
def tools():
    """The tool's modules; they import one another, as they do when run as scripts."""
    sys.path.insert(0, str(TOOLS))
    try:
        yield Namespace(**{name: importlib.import_module(name) for name in ("run_events", "run_panels", "plot_run")})
    finally:
        sys.path.remove(str(TOOLS))


def session(tools, first, last, offset=0.0, load=None, **series):
    """What a start wrote that trained iterations `first` to `last`, two seconds each."""
    iterations = range(first, last + 1)
    losses = {i: 10.0 - i + offset for i in iterations}
    return tools.run_events.Session(
        begun=float(first),
        series={LOSS: losses, "batch-size": dict.fromkeys(iterations, 8.0), **series},
        seconds={i: 100 * offset + 2.0 * i for i in iterations},
        load=load,
        sequence_length=16,
    )


def test_iterations_that_were_computed_again_replace_the_older_ones(tools):
    run = tools.run_events.Run()
    run.add_session(session(tools, 1, 6, load=(6, [[1.0, 1.0]]), **{MIB: {2: 1.0, 4: 2.0, 6: 3.0}}))
    run.add_session(session(tools, 4, 8, offset=0.5, load=(8, [[2.0, 0.0]]), **{MIB: {4: 7.0}}))
    assert run[LOSS] == {1: 9.0, 2: 8.0, 3: 7.0, 4: 6.5, 5: 5.5, 6: 4.5, 7: 3.5, 8: 2.5}
    assert run[MIB] == {2: 1.0, 4: 7.0}
    assert run.resumed == [3] and run.load == (8, [[2.0, 0.0]])


def test_a_start_without_iterations_changes_nothing(tools):
    run = tools.run_events.Run()
    run.add_session(session(tools, 1, 3))
    run.add_session(tools.run_events.Session(9.0, {}, {}, None, None))
    assert sorted(run[LOSS]) == [1, 2, 3] and not run.resumed


def test_throughput_does_not_count_the_pause_between_two_starts(tools):
    run = tools.run_events.Run()
    run.add_session(session(tools, 1, 3))
    run.add_session(session(tools, 4, 5, offset=50.0))
    assert run.throughput == dict.fromkeys((2, 3, 5), 8 * 16 / 2)


def test_breakdown_leaves_out_the_first_report(tools):
    run = tools.run_events.Run()
    tags = {f"xmoe-breakdown/{stage}-ms": {2: 99.0, 4: 1.0, 6: 3.0} for stage in tools.run_events.STAGES}
    run.add_session(session(tools, 1, 6, **tags))
    assert run.breakdown == dict.fromkeys(tools.run_events.STAGES, 2.0)
    assert tools.run_events.Run().breakdown == {}


def test_stages_are_the_layers(tools):
    from megatron_xmoe import figures, profiling

    assert tools.run_events.STAGES == profiling.STAGES
    assert tuple(name.replace("\n", " ") for name in tools.run_panels.PAPERS_NAMES) == figures.PAPERS_NAMES


def test_panels_are_those_with_figures(tools):
    run = tools.run_events.Run()
    run.add_session(session(tools, 1, 4, **{"xmoe/intra-node-MiB": {2: 0.0}, MIB: {2: 0.0}}))
    assert [title for title, _ in tools.run_panels.panels_of(run)] == ["Loss", "Throughput"]
    run.add_session(session(tools, 5, 8, load=(8, [[1.0, 1.0]]), **{MIB: {6: 1.0}, "xmoe/load-max": {6: 1.5}}))
    titles = [title for title, _ in tools.run_panels.panels_of(run)]
    assert titles == ["Loss", "Throughput", "Experts' load", "Imbalance of the experts", "Bytes by link"]


def test_bytes_without_bypassing_are_drawn(tools):
    """Redundancy of 75 %: four times the rows would have crossed."""
    matplotlib = pytest.importorskip("matplotlib.figure", reason="pictures need matplotlib: pip install matplotlib")
    run = tools.run_events.Run()
    run.add_session(session(tools, 1, 4, **{MIB: {2: 1.0, 4: 2.0}, "xmoe/redundancy": {2: 0.75, 4: 0.0}}))
    axes = matplotlib.Figure().subplots()
    tools.run_panels.draw_bytes(axes, run)
    drawn = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert drawn == {"to other nodes": [1.0, 2.0], "to other nodes, had every route its own row": [4.0]}


def test_summary(tools):
    run = tools.run_events.Run()
    run.add_session(session(tools, 1, 4, **{"xmoe/load-max-of-worst-layer": {2: 3.0, 4: 1.25}}))
    run.add_session(session(tools, 3, 12, **{f"{LOSS} validation": {6: 5.0, 12: 4.0}}))
    assert tools.plot_run.summary(run) == [
        "training loss     9.000 at iteration 1, 2.500 at the end (mean of iterations 3 to 12)",
        "validation loss   5.000 at iteration 6, 4.000 at iteration 12",
        "resumed           from the checkpoint of iteration 2",
        "speed             64 tokens a second (median)",
        "busiest expert    3.0 times the even share at iteration 2, 3.0 times at iteration 2",
    ]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--tensorboard-dir", "{}", "--output", "run.gif"], "--output run.gif must end in .png, .svg, .pdf or .html"),
        (["--tensorboard-dir", "{}/none", "--output", "run.png"], "is not a folder: give the one of the training run"),
    ],
)
def test_errors_are_one_line(tools, arguments, complaint, tmp_path):
    done = subprocess.run(
        [sys.executable, TOOLS / "plot_run.py", *(part.format(tmp_path) for part in arguments)],
        capture_output=True, text=True, cwd=tmp_path, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and complaint in done.stderr and done.stderr.count("\n") == 1


def test_a_missing_package_is_named(tools, tmp_path, monkeypatch):
    """TensorBoard reads the events; without it the tool says what to install."""
    (tmp_path / "events.out.tfevents.1").touch()
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setitem(sys.modules, "tensorboard.backend", None)
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing", None)
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing.event_accumulator", None)
    with pytest.raises(tools.plot_run.UserError, match=r"is not installed: pip install matplotlib tensorboard"):
        tools.plot_run.main(["--tensorboard-dir", str(tmp_path), "--output", str(tmp_path / "run.png")])


def test_the_test_sets_loss_is_not_the_validations(tools):
    written = [Namespace(step=step, value=value) for step, value in ((50, 3.0), (100, 2.0), (100, 9.0))]
    assert tools.run_events.first_values(written) == {50: 3.0, 100: 2.0}
