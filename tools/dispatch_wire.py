"""What a dispatcher hands over to torch.distributed, and how long its parts take: for benchmark_dispatch.py.

Rows and bytes are counted from the split sizes of the exchanges themselves, not from what a dispatcher says it sends.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch
import torch.distributed as dist


class Span:
    """The time between two points of the current stream, or of a CPU's clock."""

    def __init__(self, device: torch.device):
        self.gpu = device.type == "cuda"
        self.start, self.end = self._now(), None

    def stop(self) -> None:
        """The second point."""
        self.end = self._now()

    def milliseconds(self) -> float:
        """The time; on a GPU both points must have been reached."""
        return self.start.elapsed_time(self.end) if self.gpu else (self.end - self.start) * 1e3

    def _now(self):
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass
class Exchange:
    """One all-to-all of this rank."""

    part: str
    """The part of the pass that made it."""

    rows: int
    """Rows of hidden states sent, to the own rank included; 0 for counts, weights and indices."""

    inter_rows: int
    """Of `rows`, to other nodes."""

    intra_rows: int
    """Of `rows`, to other ranks of the own node."""

    inter_bytes: int
    """Everything sent to other nodes."""

    intra_bytes: int
    """Everything sent to other ranks of the own node."""

    within_node: bool
    """Whether it was made in a group of the node's ranks only."""

    span: Span


@dataclass
class Wire:
    """Notes every all-to-all and the time of each part of a pass.

    Rows are what is as wide as a hidden state. In the backward pass some of them may hold gradients of weights.
    """

    node_of: dict[int, int]
    """Node of each global rank of the expert-parallel group."""

    hidden_size: int
    device: torch.device
    one_by_one: bool = False
    """Wait for every exchange where it is started, so that its time is its own."""

    exchanges: list[Exchange] = field(default_factory=list)
    spans: dict[str, Span] = field(default_factory=dict)
    part: str = ""

    @contextmanager
    def in_part(self, name: str) -> Iterator[None]:
        """What happens inside belongs to a part of the pass."""
        self.part, span = name, Span(self.device)
        yield
        span.stop()
        self.spans[name] = span

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note the exchanges of torch.distributed.all_to_all_single, in whichever thread they are made."""
        exchange = dist.all_to_all_single

        def noted(output, input, output_split_sizes=None, input_split_sizes=None, group=None, async_op=False):
            span = Span(self.device)
            result = exchange(output, input, output_split_sizes, input_split_sizes, group, async_op)
            if self.one_by_one and async_op:
                result.wait()
            span.stop()
            self.exchanges.append(self._note(input, input_split_sizes, group, span))
            return result

        with mock.patch.object(dist, "all_to_all_single", noted):
            yield

    def _note(self, sent: torch.Tensor, splits: list[int] | None, group, span: Span) -> Exchange:
        ranks = dist.get_process_group_ranks(group)
        splits = list(splits) if splits else [sent.shape[0] // len(ranks)] * len(ranks)
        me = dist.get_rank()
        inter = sum(n for n, rank in zip(splits, ranks, strict=True) if self.node_of[rank] != self.node_of[me])
        intra = sum(
            n for n, rank in zip(splits, ranks, strict=True) if self.node_of[rank] == self.node_of[me] and rank != me
        )
        bytes_each = sent.element_size() * (sent[:1].numel() if sent.shape[0] else 0)
        is_rows = sent.dim() == 2 and sent.shape[1] == self.hidden_size
        return Exchange(
            part=self.part,
            rows=sum(splits) if is_rows else 0,
            inter_rows=inter if is_rows else 0,
            intra_rows=intra if is_rows else 0,
            inter_bytes=inter * bytes_each,
            intra_bytes=intra * bytes_each,
            within_node=len({self.node_of[rank] for rank in ranks}) == 1,
            span=span,
        )

    def total(self, figure: str, parts: tuple[str, ...]) -> int:
        """Sum of a figure of Exchange over the exchanges of some parts."""
        return sum(getattr(exchange, figure) for exchange in self.exchanges if exchange.part in parts)

    def count(self, parts: tuple[str, ...]) -> int:
        """Number of exchanges in some parts."""
        return sum(exchange.part in parts for exchange in self.exchanges)


DISPATCH = ("dispatch_preprocess", "token_dispatch", "dispatch_postprocess")
COMBINE = ("combine_preprocess", "token_combine", "combine_postprocess")
STAGES = (
    "routing metadata",
    "counts exchange",
    "rows between nodes",
    "rows inside the node",
    "merge",
    "combine: prepare",
    "combine: rows inside the node",
    "combine: rows between nodes",
    "combine: sum",
)
"""Stages of the paper's figure 12, and of the way back."""


def stage_times(wire: Wire) -> dict[str, float]:
    """Milliseconds of each stage of a forward pass whose exchanges ran one by one.

    Exchanges of rows, and of metadata, over the whole group are counted as between nodes, wherever they go: those of
    the plain dispatcher, and those of redundancy bypassing, which have the copies for the own node, too; inside the
    node is then what pilots' ranks pass on.
    """

    def exchanged(parts, within=None):
        return sum(
            e.span.milliseconds()
            for e in wire.exchanges
            if e.part in parts and within in (None, e.within_node)
        )

    def spent(parts):
        return sum(wire.spans[part].milliseconds() for part in parts)

    first, later = DISPATCH[:1], DISPATCH[1:]
    flat = not any(not e.within_node for e in wire.exchanges)  # a single node: its one group is no inner stage
    inner, outer = (False, None) if flat else (True, False)
    times = {
        "routing metadata": spent(first) - exchanged(first),
        "counts exchange": exchanged(first),
        "rows between nodes": exchanged(later, outer),
        "rows inside the node": 0.0 if flat else exchanged(later, inner),
        "merge": spent(later) - exchanged(later),
        "combine: prepare": spent(COMBINE[:1]) - exchanged(COMBINE[:1]),
        "combine: rows inside the node": 0.0 if flat else exchanged(COMBINE, inner),
        "combine: rows between nodes": exchanged(COMBINE, outer),
        "combine: sum": spent(COMBINE[1:]) - exchanged(COMBINE[1:]),
    }
    return {name: max(time_ms, 0.0) for name, time_ms in times.items()}
