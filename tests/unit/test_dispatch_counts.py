"""What tools/benchmark_dispatch.py counts, and which command lines it refuses."""

import importlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

TOOLS = Path(__file__).resolve().parents[2] / "tools"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def wire() -> Iterator:
    """The module that counts."""
    sys.path.insert(0, str(TOOLS))
    try:
        yield importlib.import_module("dispatch_wire")
    finally:
        sys.path.remove(str(TOOLS))


@pytest.fixture
def rank_5_of_8() -> Iterator[None]:
    """This process as a rank of a world in which nobody else is."""
    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=8)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_rows_and_bytes_by_destination(wire, rank_5_of_8):
    """Rank 5 sends in a group of ranks 1, 3, 5 and 7; nodes hold three, three and two ranks."""
    group = dist.new_group([1, 3, 5, 7])
    listener = wire.Wire({1: 0, 3: 1, 5: 1, 7: 2}, 6, CPU)
    with listener.listening(), listener.in_part("there"):
        rows = torch.zeros(10, 6)
        dist.all_to_all_single(rows.new_zeros(4, 6), rows, [1] * 4, [1, 2, 3, 4], group=group)
        dist.all_to_all_single(torch.zeros(4, 3).long(), torch.zeros(4, 3).long(), group=group)
        dist.all_to_all_single(rows.new_zeros(10), rows.new_zeros(10), [1, 2, 3, 4], [1, 2, 3, 4], group, True)
    with listener.listening(), listener.in_part("back"):
        inner = dist.new_group([3, 5])
        dist.all_to_all_single(rows.new_zeros(10, 6), rows, input_split_sizes=[7, 3], group=inner)
        empty = rows.new_zeros(0, 6)
        dist.all_to_all_single(rows.new_zeros(2, 6), empty, [1, 1], [0, 0], inner)
    dist.all_to_all_single(rows.new_zeros(10, 6), rows, [5, 5], [5, 5], inner)  # nobody listens

    figures = ("rows", "inter_rows", "intra_rows", "inter_bytes", "intra_bytes", "within_node")
    sent = [tuple(getattr(exchange, name) for name in figures) for exchange in listener.exchanges]
    assert sent == [
        (10, 5, 2, 5 * 24, 2 * 24, False),
        (0, 0, 0, 2 * 24, 24, False),  # three 8-byte counts for each rank
        (0, 0, 0, 5 * 4, 2 * 4, False),
        (10, 0, 7, 0, 7 * 24, True),
        (0, 0, 0, 0, 0, True),
    ]
    assert listener.total("inter_bytes", ("there",)) == 5 * 24 + 2 * 24 + 5 * 4
    assert listener.total("intra_rows", ("back",)) == 7 and listener.total("inter_rows", ("back", "there")) == 5


@pytest.fixture
def times(wire):
    """Spans that last what they are told, in ms."""

    def span(milliseconds):
        made = wire.Span(CPU)
        made.start, made.end = 0.0, milliseconds / 1e3
        return made

    return span


def exchange(wire, part, within_node, span):
    """An exchange of which only the time is of interest."""
    return wire.Exchange(part, 1, 0, 0, 0, 0, within_node, span)


def test_stages_add_up(wire, times):
    """Every millisecond of the six parts is in one stage."""
    listener = wire.Wire({}, 6, CPU)
    for i, part in enumerate(wire.DISPATCH + wire.COMBINE):
        listener.spans[part] = times(100 * (i + 1))
    for part, within, ms in (
        ("dispatch_preprocess", False, 10),
        ("token_dispatch", False, 20),
        ("token_dispatch", True, 30),
        ("dispatch_postprocess", True, 5),
        ("token_combine", True, 40),
        ("token_combine", False, 50),
    ):
        listener.exchanges.append(exchange(wire, part, within, times(ms)))
    found = wire.stage_times(listener)
    assert tuple(found) == wire.STAGES
    assert list(found.values()) == pytest.approx([90, 10, 20, 35, 445, 400, 40, 50, 1010])
    assert sum(found.values()) == pytest.approx(2100)


def test_a_single_node_has_no_stage_inside_it(wire, times):
    listener = wire.Wire({}, 6, CPU)
    for part in wire.DISPATCH + wire.COMBINE:
        listener.spans[part] = times(10)
    for part, ms in (("dispatch_preprocess", 1), ("token_dispatch", 2), ("token_combine", 3)):
        listener.exchanges.append(exchange(wire, part, True, times(ms)))
    assert list(wire.stage_times(listener).values()) == pytest.approx([9, 1, 2, 0, 18, 10, 0, 3, 17])


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("--shapes 4,3,2,8", "is not T,K,E,H"),
        ("--shapes 4,1,2", "is not T,K,E,H"),
        ("--shapes 4,1,6,8", "6 experts of --shapes cannot be shared evenly by 4"),
        ("--expert-parallel-size 3", "--expert-parallel-size 3 does not divide 4 processes"),
        ("--check-syncs", "--check-syncs: a CPU has nothing to wait for"),
        ("--emulate-nodes 2", "--emulate-nodes is for NCCL"),
        ("--emulate-nodes 2 --ranks-per-node 2", "both divide the ranks"),
    ],
)
def test_refused_command_lines(wire, monkeypatch, capsys, command, told):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    tool = importlib.import_module("benchmark_dispatch")
    try:
        code = tool.run_tool(tool.PROG, tool.main, [*command.split(), "--device", "cpu"])
    except SystemExit as end:  # argparse's own
        code = end.code
    assert code == 2
    errors = capsys.readouterr().err
    assert told in errors and len(errors.splitlines()) == 1
    assert "Fix:" in errors or "argument" in errors


def test_a_launcher_is_needed(wire, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    tool = importlib.import_module("benchmark_dispatch")
    assert tool.run_tool(tool.PROG, tool.main, ["--device", "cpu"]) == 2
    assert "Fix: start it as torchrun" in capsys.readouterr().err


def test_waits_are_counted(wire, monkeypatch):
    """What torch warns of, and waiting for an event or for everything; other warnings are not waits."""
    cases = importlib.import_module("dispatch_cases")
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with cases._waits() as waits:
        assert modes == ["warn"]
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
        torch.cuda.synchronize()
        torch.cuda.Event().synchronize()
    assert len(waits) == 4 and modes == ["warn", "default"]
    with cases._waits() as none:
        torch.zeros(1)
    assert none == []
