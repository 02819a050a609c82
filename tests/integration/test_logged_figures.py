"""Figures of a real run: on the console, in TensorBoard's events, and in the pictures that are drawn of them."""

import base64
import re
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import REPOSITORY, TOY, run_job, run_script

EXPERT_LAYERS, ITERATIONS = (2, 3, 5, 6, 7), (2, 4)  # of six layers, and one of multi-token prediction
CONSOLE = re.compile(
    r"expert load max/mean: ([0-9.]+) \(layer (\d+): ([0-9.]+)\) \| idle experts: ([0-9.]+)% \| dropped: ([0-9.]+)% "
    r"\| all-to-all \(ms\): ([0-9.]+) \(rank (\d): ([0-9.]+)\) \|"
)
STAGE_NAMES = ["gate", "dispatch buffer", "all-to-all", "experts", "all-to-all", "combine", "total"]


@pytest.fixture(scope="module")
def events(tmp_path_factory) -> Path:
    """Folder with the events and the console of four iterations with two pipeline stages and recomputation."""
    pytest.importorskip("tensorboard", reason="events are written and read with TensorBoard: pip install tensorboard")
    folder = tmp_path_factory.mktemp("run")
    job = run_job(
        TOY, "--moe-backend", "xmoe", "--xmoe-metrics", "layers", "--xmoe-profile-breakdown", "--train-iters", "4",
        "--log-interval", "2", "--eval-interval", "3", "--eval-iters", "1", "--mtp-num-layers", "1",
        "--pipeline-model-parallel-size", "2", "--moe-expert-capacity-factor", "0.8", "--recompute-granularity",
        "selective", "--recompute-modules", "moe", "--tensorboard-dir", str(folder / "events"), processes=2,
    )  # fmt: skip
    (folder / "console").write_text(job.output)
    return folder


@pytest.fixture(scope="module")
def written(events):
    """TensorBoard's reader of the run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (path,) = (events / "events").glob("events.out.tfevents.*")
    reader = EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 0})
    reader.Reload()
    return reader


def test_console_says_what_tensorboard_has(events, written):
    lines = [line for line in (events / "console").read_text().splitlines() if CONSOLE.search(line)]
    assert [int(re.search(r"iteration +(\d+)/", line)[1]) for line in lines] == list(ITERATIONS)
    names = ("load-max", "worst-layer", "load-max-of-worst-layer", "idle-experts", "drop-rate", "alltoall-ms",
             "alltoall-slowest-rank", "alltoall-slowest-ms")  # fmt: skip
    for number, line in enumerate(lines):
        for name, text in zip(names, CONSOLE.search(line).groups(), strict=True):
            event = written.Scalars(f"xmoe/{name}")[number]
            value = event.value * (100 if name in ("idle-experts", "drop-rate") else 1)
            digits = len(text.partition(".")[2])
            assert float(text) == pytest.approx(value, abs=0.51 * 10**-digits), name
            assert event.step == ITERATIONS[number]


def test_dropped_routes(written):
    """In a micro-batch of 16 tokens with three routes each, an expert keeps ceil(16 * 3 / 12 * 0.8) = 4 at most."""
    dropped = [event.value for event in written.Scalars("xmoe/drop-rate")]
    assert all(0 < share < 0.9 for share in dropped)
    padding = [event.value for event in written.Scalars("xmoe/padding-avoided")]
    assert padding == pytest.approx([1 - 48 * (1 - share) / (12 * 4) for share in dropped])


def test_load_of_every_expert(written):
    from tensorboard.util.tensor_util import make_ndarray

    loads = [make_ndarray(event.tensor_proto) for event in written.Tensors("xmoe-expert-load")]
    assert len(loads) == len(ITERATIONS)
    for number, load in enumerate(loads):
        assert load.shape == (7, 12)
        assert [layer for layer in range(1, 8) if load[layer - 1].any()] == list(EXPERT_LAYERS)
        for layer in EXPERT_LAYERS:
            row = load[layer - 1]
            routes = row * (2 * 12 * 16 * 3 / 12)  # iterations, sequences, tokens, top-k, over experts
            assert routes == pytest.approx(routes.round(), abs=1e-3) and routes.sum() == pytest.approx(2 * 12 * 16 * 3)
            assert written.Scalars(f"xmoe-load-max/layer-{layer:03d}")[number].value == pytest.approx(row.max())


def test_table_of_stages(events, written):
    text = (events / "console").read_text()
    tables = re.findall(r"of iterations (\d) to (\d)\n stage.*\n((?: .*%\n){7})", text)
    assert [(first, last) for first, last, _ in tables] == [("1", "2"), ("3", "4")]
    for number, (_, _, rows) in enumerate(tables):
        found = [re.fullmatch(r" (.{16})(.{14}) *([0-9.]+) *([0-9.]+)%", row) for row in rows.splitlines()]
        assert [row[1].strip() for row in found] == STAGE_NAMES
        times = [float(row[3]) for row in found]
        assert sum(times[:-1]) == pytest.approx(times[-1], abs=0.005) and min(times) > 0
        for row, milliseconds in zip(found[:-1], times, strict=False):
            stage = row[2].strip().removeprefix("xmoe.")
            event = written.Scalars(f"xmoe-breakdown/{stage}-ms")[number]
            assert event.value == pytest.approx(milliseconds, abs=0.00051)


def test_pictures(events):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install matplotlib")
    picture, page = events / "run.png", events / "run.html"
    command = [sys.executable, REPOSITORY / "tools/plot_run.py", "--tensorboard-dir", events / "events"]
    done = subprocess.run([*command, "--output", picture, page], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "speed " in done.stdout and "busiest expert " in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    titles = re.findall(r'<img alt="([^"]*)" src="data:image/png;base64,([^"]*)">', text)
    assert [title for title, _ in titles] == [
        "Loss", "Throughput", "Experts&#x27; load", "Imbalance of the experts", "All-to-all", "Where the time goes",
    ]  # fmt: skip
    assert all(base64.b64decode(image).startswith(b"\x89PNG") for _, image in titles)
    rest = re.sub(r'src="data:[^"]*"', "", text)
    assert not re.search(r"https?:|<script|<link|src=|url\(", rest)  # nothing from elsewhere


def test_what_the_figures_cost():
    """tools/measure_metrics.py, with evaluation in every second turn."""
    tool = REPOSITORY / "tools" / "measure_metrics.py"
    options = [*TOY, *"--moe-backend xmoe --log-interval 2 --eval-interval 4 --eval-iters 1".split()]
    job = run_script(tool, *options, "--train-iters", "16")
    lines = [line for line in job.output.splitlines() if "iteration " in line and "expert load" in line]
    assert len(lines) == 4  # of eight
    assert re.search(r"in 3 turns of each kind(.*\n){3}the figures cost +-?[0-9.]+% ", job.output)
    short = run_script(tool, *options, "--train-iters", "14", fails=True)
    assert short.returncode == 2 and "--train-iters is 14; 8 turns of --log-interval 2 take 16" in short.errors
