"""Figures about the experts: definitions by hand-computed numbers, what counts and what does not, and the ranges."""

import math
from collections import Counter
from unittest import mock

import harness
import numpy as np
import pytest
import torch
from test_layer import HIDDEN, classes, layer, tokens
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_xmoe import figures, metrics, profiling
from megatron_xmoe.metrics import XMoETracker
from megatron_xmoe.profiling import EXCHANGES, STAGES, MemoryProbe, StageClock, profile_range
from megatron_xmoe.traffic import Traffic, flat_traffic

EXPERTS, TOPK, TOKENS = 4, 2, 10


@pytest.fixture(scope="module", autouse=True)
def groups():
    with harness.single_process(), harness.model_parallel():
        yield


@pytest.fixture
def install():
    """Installs a tracker, and puts Megatron's own back."""
    from megatron.core.transformer.moe import moe_logging

    def make(level="layers", log_interval=1, breakdown=False, layers=1):
        moe_logging.set_moe_metrics_tracker(XMoETracker(layers, EXPERTS, log_interval, level, breakdown))
        return moe_logging.get_moe_metrics_tracker()

    yield make
    moe_logging.destroy_moe_metrics_tracker()


class Writer:
    """Stands in for TensorBoard's and W&B's writers."""

    def __init__(self):
        self.scalars, self.tensors = {}, {}

    def add_scalar(self, tag, value, iteration):
        self.scalars[tag, iteration] = value

    def add_tensor(self, tag, tensor, iteration):
        self.tensors[tag, iteration] = tensor

    def log(self, scalars, iteration):
        self.scalars |= {(tag, iteration): value for tag, value in scalars.items()}


def report(tracker, iteration, **writers):
    """Megatron's call after an iteration."""
    return tracker.report(loss_scale=1.0, iteration=iteration, track_names=[], num_layers=1, **writers)


def sums_of(**given):
    """SUMS of two layers, zeros where nothing is given."""
    zeros = np.zeros(2)
    return {name: np.array(given[name], dtype=float) if name in given else zeros for name in figures.SUMS}


def test_traffic_of_two_nodes():
    """Ranks 1 and 2 share a node; rank 2 sends 7 rows to itself, 2 inside the node, 3 + 5 out of it."""
    traffic = flat_traffic([3, 2, 7, 5], 2, ["a", "b", "b", "c"], 100, bytes_per_route=4, bytes_per_rank=16,
                           padded_rows=40)  # fmt: skip
    assert (traffic.routes, traffic.routes_remote, traffic.inter_rows, traffic.intra_rows) == (17, 8, 8, 2)
    assert traffic.inter_bytes == 2 * 8 * 100 + 4 * 8 + 2 * 16  # there and back, weights, counts for two ranks
    assert traffic.intra_bytes == 2 * 2 * 100 + 4 * 2 + 16
    assert traffic.padding_rows == 40 - 17
    assert traffic.redundancy == 0


def test_redundancy_of_traffic():
    pilots = Traffic(20, 16, 4, 9, row_bytes=10, inter_metadata=0, intra_metadata=0, padded_rows=20)
    assert pilots.redundancy == 0.75 and pilots.saved_bytes == 2 * 12 * 10
    inside = Traffic(20, 0, 0, 9, row_bytes=10, inter_metadata=0, intra_metadata=0, padded_rows=20)
    assert math.isnan(inside.redundancy)


def test_figures_of_layers():
    """Layer 1: one expert idle, one with half of the routes; layer 2 has no experts at all."""
    loads = np.array([[4.0, 2, 2, 0], [0, 0, 0, 0]])
    sums = sums_of(passes=[4, 0], timed_passes=[2, 0], routes=[6, 0], routes_remote=[4, 0], inter_rows=[1, 0],
                   inter_bytes=[2**23, 0], intra_rows=[5, 0], intra_bytes=[2**22, 0], saved_bytes=[2**24, 0],
                   padding_rows=[2, 0], padding_bytes=[2**21, 0],
                   dispatch=[3, 0], combine=[1, 0])  # fmt: skip
    expected = {
        "load-max": 2.0,
        "load-entropy": (0.5 * 1 + 2 * 0.25 * 2) / 2,  # bits, of log2(4)
        "idle-experts": 0.25,
        "drop-rate": 0.25,
        "padding-avoided": 0.25,
        "padding-avoided-MiB": 0.5,
        "redundancy": 0.75,
        "inter-node-rows": 0.25,
        "inter-node-MiB": 2.0,
        "intra-node-rows": 1.25,
        "intra-node-MiB": 1.0,
        "saved-rows": 0.75,
        "saved-MiB": 4.0,
        "alltoall-ms": 2.0,
    }
    found = figures.figures_of_layers(loads, sums)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name][0].item() == pytest.approx(value), name
        assert math.isnan(found[name][1]), name
    assert figures.relative_loads(loads).tolist() == [[2, 1, 1, 0], [0, 0, 0, 0]]


def test_overall_figures():
    """Balance is the mean over layers, all else is of the sums; the worst layer is named."""
    loads = np.array([[2.0, 2, 2, 2], [8, 8, 0, 0]])
    sums = sums_of(passes=[1, 1], timed_passes=[1, 1], routes=[8, 12], routes_remote=[1, 9], inter_rows=[1, 4],
                   dispatch=[1, 5])  # fmt: skip
    of_layers, overall = figures.figures_of_model(loads, sums)
    assert of_layers["load-max"].tolist() == [1, 2]
    assert overall["load-max"] == 1.5 and overall["load-entropy"] == 0.75 and overall["idle-experts"] == 0.25
    assert overall["load-max-of-worst-layer"] == 2 and overall["worst-layer"] == 2
    assert overall["drop-rate"] == pytest.approx(1 - 20 / 24) and overall["redundancy"] == 0.5
    assert overall["alltoall-ms"] == 3


def test_one_expert_is_balanced():
    found = figures.figures_of_layers(np.array([[5.0], [0.0]]), sums_of())
    assert found["load-entropy"][0] == 1 and found["load-max"][0] == 1


def test_console_text():
    shown = {"load-max": 1.5, "worst-layer": 3.0, "load-max-of-worst-layer": 2.25, "idle-experts": 0.125,
             "drop-rate": 0.0, "redundancy": 0.5, "inter-node-MiB": 3.0, "saved-MiB": 2.9, "intra-node-MiB": 4.5,
             "alltoall-ms": 1.25,
             "alltoall-slowest-rank": 7.0, "alltoall-slowest-ms": 9.5}  # fmt: skip
    assert figures.console_text(shown) == (
        " expert load max/mean: 1.50 (layer 3: 2.25) | idle experts: 12.5% | dropped: 0.0% |"
        " inter-node: 3.00 MiB, 2.90 saved (50.0% of the rows) | intra-node: 4.50 MiB |"
        " all-to-all (ms): 1.25 (rank 7: 9.50) |"
    )
    assert "-node" not in figures.console_text(shown | {"redundancy": math.nan})  # one node


def test_breakdown_table():
    times = dict.fromkeys(STAGES, [0.0, 0.0]) | {"gate": [1.0, 1.0], "experts": [4.0, 2.0]}
    breakdown = figures.breakdown_of(sums_of(passes=[2, 2], timed_passes=[2, 2], **times))
    table = figures.breakdown_table(breakdown, 3, 4).splitlines()
    assert "iterations 3 to 4" in table[0]
    assert [line.split()[-2:] for line in table[2:]] == [
        ["0.500", "25.0%"], ["0.000", "0.0%"], ["0.000", "0.0%"], ["1.500", "75.0%"], ["0.000", "0.0%"],
        ["0.000", "0.0%"], ["2.000", "100.0%"],
    ]  # fmt: skip


@pytest.mark.parametrize("factor, capacity", [(0.5, 3), (2.0, 10)])  # ceil(10 * 2 / 4 * factor)
def test_an_interval_holds_its_own_passes_only(install, factor, capacity):
    """Figures of two iterations come at the second, and the next interval begins anew."""
    tracker, writer, built = install(log_interval=2), Writer(), layer(classes()[1], moe_expert_capacity_factor=factor)
    maps = []
    for iteration in (1, 2, 3, 4):
        for micro_batch in range(iteration):
            _, routing_map = built.route(tokens(micro_batch))
            built(tokens(micro_batch))
            maps.append(routing_map)
        text = report(tracker, iteration, writer=writer)
        assert ("expert load" in text) == (iteration % 2 == 0)
        if iteration % 2 == 0:
            loads = sum(m.sum(dim=0) for m in maps)
            kept = sum(m.sum(dim=0).clamp_max(capacity) for m in maps)
            assert writer.scalars["xmoe/load-max", iteration] == pytest.approx((loads.max() / loads.sum() * 4).item())
            # `route` alone was counted as well as the whole pass
            expected = 1 - kept.sum().item() / (2 * loads.sum().item())
            assert writer.scalars["xmoe/drop-rate", iteration] == pytest.approx(expected)
            padded = len(maps) * EXPERTS * capacity
            assert writer.scalars["xmoe/padding-avoided", iteration] == pytest.approx(1 - kept.sum().item() / padded)
            heat = writer.tensors["xmoe-expert-load", iteration]
            assert heat[0].tolist() == pytest.approx((loads / loads.sum() * 4).tolist())
            maps.clear()
    assert {iteration for _, iteration in writer.scalars} == {2, 4}


def test_padding_without_capacity_is_that_of_the_largest_expert(install):
    tracker, writer, built = install(), Writer(), layer(classes()[1])
    _, routing_map = built.route(tokens())
    report(tracker, 1)
    built(tokens())
    report(tracker, 2, wandb_writer=writer)
    largest = routing_map.sum(dim=0).max().item()
    padding = EXPERTS * largest - TOKENS * TOPK
    assert writer.scalars["xmoe/padding-avoided", 2] == pytest.approx(padding / (EXPERTS * largest))
    assert writer.scalars["xmoe/padding-avoided-MiB", 2] == pytest.approx(padding * HIDDEN * 8 / 2**20)


@pytest.mark.parametrize("recompute", [False, True])
def test_evaluation_and_recomputation_are_not_counted(install, recompute):
    options = {"recompute_granularity": "selective", "recompute_modules": ["moe"]} if recompute else {}
    tracker, built = install(), layer(classes()[1], **options)
    with torch.no_grad():
        built(tokens(1))
    output, _ = built(tokens().requires_grad_())
    output.sum().backward()
    loads, sums, _ = tracker._reduce()
    assert loads.sum() == TOKENS * TOPK
    assert sums["passes"].tolist() == [1] and sums["routes"].tolist() == [TOKENS * TOPK]


def test_exchanges_are_timed_in_the_iteration_that_is_logged(install):
    tracker, built = install(log_interval=3), layer(classes()[1])
    timed = []
    for iteration in range(1, 7):
        tracker._memory.arm(False)
        timed.append(tracker.watched_stages == frozenset(EXCHANGES))
        built(tokens())
        if iteration == 6:
            _, sums, _ = tracker._reduce()
        report(tracker, iteration)
    assert timed == [False, False, True, False, False, True]
    assert sums["passes"].tolist() == [3] and sums["timed_passes"].tolist() == [1]
    assert sums["dispatch"][0] + sums["combine"][0] > 0


def test_clearing_after_an_evaluation_keeps_the_interval(install):
    """Megatron clears its own metrics after an evaluation, in the middle of an interval."""
    tracker, built = install(), layer(classes()[1])
    built(tokens())
    tracker.clear()
    built(tokens(1))
    assert tracker._reduce()[0].sum() == 2 * TOKENS * TOPK


def test_megatrons_own_metrics_stay(install):
    tracker = install("summary", log_interval=2)
    tracker.record("z_loss", torch.tensor(3.0), layer_number=1, num_layers=1)
    text = tracker.report(loss_scale=1.0, iteration=1, track_names="z_loss", num_layers=1, pg_collection=None)
    assert text == " z_loss: 3.00 |"


def test_levels(install):
    """Tags do not depend on the values; 'off' with the table of stages writes that table alone."""
    tags = {}
    for level in ("off", "summary", "layers"):
        tracker, writer, built = install(level, breakdown=level == "off"), Writer(), layer(classes()[1])
        built(tokens())
        text = report(tracker, 1, writer=writer)
        assert ("expert load" in text) == (level != "off")
        tags[level] = {tag for tag, _ in writer.scalars}
        assert bool(writer.tensors) == (level == "layers")
    assert tags["off"] == {f"xmoe-breakdown/{stage}-ms" for stage in STAGES}
    assert {"xmoe/load-max", "xmoe/alltoall-ms", "xmoe/alltoall-slowest-rank"} < tags["summary"]
    assert "xmoe/redundancy" not in tags["summary"]  # one node: nothing to save
    assert tags["layers"] - tags["summary"] >= {"xmoe-load-max/layer-001", "xmoe-intra-node-MiB/layer-001"}


class Operations(TorchDispatchMode):
    """Counts torch's operations."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("factor, added", [(None, {}), (2.0, {"sum": 1, "detach": 1})])  # Tensor.numpy detaches
def test_what_recording_adds_to_a_pass(install, factor, added):
    """Nothing on the device, but where routes are dropped one operation that counts them before."""
    built, seen = layer(classes()[1], moe_expert_capacity_factor=factor), []
    for record in (False, True):
        if record:
            install("summary", log_interval=10)
        with Operations() as operations:
            built(tokens())
        seen.append(operations.seen)
    assert seen[1] - seen[0] == Counter(added) and not seen[0] - seen[1]


def test_a_report_is_two_exchanges(install, monkeypatch):
    """And between two reports there is none."""
    done = []
    monkeypatch.setattr(metrics.dist, "all_reduce", lambda *args, **options: done.append(args))
    tracker, built = install("layers", log_interval=3), layer(classes()[1], moe_expert_capacity_factor=2.0)
    for iteration in (1, 2, 3):
        built(tokens())
        report(tracker, iteration)
        assert len(done) == (2 if iteration == 3 else 0)


@pytest.mark.parametrize("factor", [None, 2.0])
def test_counts_of_many_passes_are_added_up(install, monkeypatch, factor):
    """Few wait on the device: of one expert-parallel rank all that is sent, or what is routed before dropping."""
    monkeypatch.setattr(metrics, "MOST_WAITING", 2)
    tracker, built = install(), layer(classes()[1], moe_expert_capacity_factor=factor)
    for number in range(5):
        built(tokens(number))
        assert len(tracker._late._waiting) == (number + 1) % 2
    loads, sums, _ = tracker._reduce()
    assert loads.sum() == sums["routes"] == 5 * TOKENS * TOPK and sums["passes"] == 5
    assert tracker._reduce()[0].sum() == 0


def test_late_counts_are_waited_for_late(monkeypatch):
    """Only when they are read, or when as many came after them."""
    waited = []
    monkeypatch.setattr(metrics, "MOST_WAITING", 3)
    monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda event: waited.append(len(used)))
    late, used = metrics.LateCounts(), []
    for number in range(7):
        late.add(torch.tensor([number]), lambda counts: used.append(counts.item()))
        assert used == [0, 1, 2][: 3 * (number >= 5)]
    late.read()
    assert used == list(range(7)) and waited == [0, 3, 6]


def test_tensorboard_gets_one_event(tmp_path, install):
    """The same points as from a writer that takes them one by one."""
    pytest.importorskip("tensorboard", reason="events are written and read with TensorBoard: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    tracker, built, one_by_one = install("layers", log_interval=1), layer(classes()[1]), Writer()
    built(tokens())
    with SummaryWriter(tmp_path) as writer, mock.patch.object(writer, "add_scalar") as add_scalar:
        with mock.patch.object(metrics, "_write", wraps=metrics._write) as write:
            report(tracker, 4, writer=writer)
        scalars = write.call_args.args[0]
    assert not add_scalar.called and len(scalars) > 20
    metrics._write(scalars, 4, one_by_one, None)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    points = {(tag, event.step): event.value for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}
    assert points == pytest.approx(one_by_one.scalars)
    (times,) = {tuple(event.wall_time for event in events.Scalars(tag)) for tag in events.Tags()["scalars"]}
    assert len(times) == 1


def test_nothing_is_recorded_without_a_tracker():
    """Megatron's own tracker is left as it is."""
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    built = layer(classes()[1])
    assert not metrics.recording()
    built(tokens())
    assert not get_moe_metrics_tracker().metrics


def test_installing_nothing(monkeypatch):
    installed = []
    monkeypatch.setattr(metrics, "set_moe_metrics_tracker", installed.append)
    metrics.install_metrics("off", False, 1, 4, 1)
    assert not installed
    metrics.install_metrics("off", True, 1, 4, 1)
    metrics.install_metrics("summary", False, 1, 4, 1)
    assert len(installed) == 2


def test_breakdown_is_printed(install, capsys):
    tracker, built = install("off", breakdown=True, log_interval=2), layer(classes()[1])
    for iteration in (5, 6, 7, 8):
        built(tokens())
        report(tracker, iteration)
    printed = capsys.readouterr().out.splitlines()
    table, second = printed[:9], printed[9:]
    assert table[0].endswith("of iterations 5 to 6") and second[0].endswith("of iterations 7 to 8")
    assert [line.split()[-3] for line in table[2:8]] == [f"xmoe.{stage}" for stage in STAGES]
    assert all(float(line.split()[-2]) > 0 for line in table[2:])


class Clock:
    """Events of a device that gets further only when it is told to."""

    now, reached = 0.0, 0.0

    class Event:
        """Stands in for torch.cuda.Event."""

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.when = Clock.now

        def synchronize(self):
            Clock.reached = max(Clock.reached, self.when)

        def elapsed_time(self, end):
            assert end.when <= Clock.reached
            return end.when - self.when


@pytest.fixture
def clock(monkeypatch):
    Clock.now = Clock.reached = 0.0
    monkeypatch.setattr(torch.cuda, "Event", Clock.Event)
    return StageClock(("dispatch", "experts", "permute"))


def test_nested_stages_are_not_counted_twice(clock):
    """10 in experts, of which 3 + 1 in permute; gate is not asked for."""
    for stage, pause in (("gate", 1), ("experts", 2)):
        clock.begin(4, stage)
        Clock.now += pause
        clock.end(stage) if stage == "gate" else None
    for pause in (3, 1):
        clock.begin(4, "permute")
        Clock.now += pause
        clock.end("permute")
        Clock.now += 2
    clock.end("experts")
    assert clock.read() == {(4, "experts"): 6.0, (4, "permute"): 4.0}
    assert clock.read() == {}


def test_the_clock_waits_only_when_it_is_read(clock, monkeypatch):
    """It waits for none but the oldest stage of many, whose events are used again."""
    monkeypatch.setattr(profiling, "MOST_PENDING", 3)

    def run(stages):
        for _ in range(stages):
            clock.begin(1, "dispatch")
            Clock.now += 5
            clock.end("dispatch")

    run(3)
    assert Clock.reached == 0
    run(4)
    assert Clock.reached == 4 * 5 and len(clock._pending) == 3
    assert len({id(event) for _, _, *events in clock._pending for event in events} | set(map(id, clock._unused))) == 8
    assert clock.read() == {(1, "dispatch"): 35.0} and Clock.reached == Clock.now


def test_memory_of_the_first_pass_after_arming(monkeypatch):
    """Layer 1 rises by 30 and falls to 20; its second pass, and passes before arming, are not looked at."""
    readings = iter([100, 110, 130, 120, 200, 207])
    monkeypatch.setattr(profiling, "allocated_bytes", lambda: next(readings))
    probe = MemoryProbe()

    def run(number, *stages):
        for stage in stages:
            probe.begin(number, stage)
            probe.end(number)

    run(1, *STAGES)
    probe.arm()
    run(1, "gate", "experts", "unpermute")
    run(2, "gate")
    run(1, *STAGES)
    probe.arm(False)
    run(3, *STAGES)
    assert probe.peaks == {1: 30, 2: 7} and next(readings, None) is None


@pytest.mark.parametrize("first", [1, 7], ids=["new", "resumed"])
def test_memory_is_reported(install, monkeypatch, first):
    size = iter(range(0, 2**40, 2**20))
    monkeypatch.setattr(profiling, "allocated_bytes", lambda: next(size))
    tracker, writer, built = install(), Writer(), layer(classes()[1])
    for iteration in (first, first + 1):
        built(tokens())
        report(tracker, iteration, writer=writer)
    looks = next(size)
    built(tokens())  # disarmed by the second report
    assert next(size) == looks + 2**20
    assert ("xmoe/memory-MiB", first) not in writer.scalars  # armed by the first report
    ends = 9  # gate, permute, dispatch, permute in permute, unpermute, experts around these three, combine, unpermute
    for tag in ("xmoe/memory-MiB", "xmoe-memory-MiB/layer-001"):
        assert writer.scalars[tag, first + 1] == ends


def test_extremes_of_ranks():
    """What the maximum over ranks means: the longest time with its rank, the shortest with its rank, most memory."""
    bits, absent = figures.RANK_BITS, figures.ABSENT
    ranks = [(3_000_000, 0), (1_500_000, 7), (9_000_000, 5)]  # ns, rank
    slowest = max((ns << bits) + rank for ns, rank in ranks)
    fastest = max((-ns << bits) + rank for ns, rank in ranks)
    named = figures.named_extremes(np.array([[slowest, fastest, 3 * 2**20], [absent, absent, 0]]))
    assert {name: values[0].item() for name, values in named.items()} == {
        "alltoall-slowest-ms": 9.0, "alltoall-slowest-rank": 5.0, "alltoall-fastest-ms": 1.5,
        "alltoall-fastest-rank": 7.0, "memory-MiB": 3.0,
    }  # fmt: skip
    assert all(math.isnan(values[1]) for values in named.values())


def test_ranges_in_torchs_profiler():
    built = layer(classes()[1])
    with torch.profiler.profile() as profiler:
        built(tokens())
    shown = Counter(event.name for event in profiler.events() if event.name.startswith("xmoe."))
    expected = {f"xmoe.{stage}": 1 for stage in STAGES} | {"xmoe.permute": 3, "xmoe.unpermute": 2}
    assert shown == expected


def test_nvtx_ranges(monkeypatch):
    """Megatron switches them on; they nest, and are closed even if a stage fails."""
    from megatron.core.utils import configure_nvtx_profiling

    open_ranges, seen = [], []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: (open_ranges.append(name), seen.append(name)))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", open_ranges.pop)
    built = layer(classes()[1])
    built(tokens())
    assert not seen
    configure_nvtx_profiling(True)
    try:
        built(tokens())
        with pytest.raises(ValueError), profile_range("gate"):
            raise ValueError
    finally:
        configure_nvtx_profiling(False)
    arrival = ["permute", "permute", "unpermute"]  # `dispatch_postprocess` and in it `expert_rows`; the way back
    stages = ["gate", "permute", "dispatch", "experts", *arrival, "combine", "unpermute", "gate"]
    ours = [name for name in seen if name.startswith("xmoe.")]  # Megatron's own are among them
    assert ours == [f"xmoe.{stage}" for stage in stages] and not open_ranges
