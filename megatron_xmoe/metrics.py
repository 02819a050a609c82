"""Figures about X-MoE's layers in Megatron's loggers: load of the experts, traffic, padding, times, memory.

Recording costs no synchronisation: counts stay on the device, traffic is what the host knows anyway, times are events
that are read once they have happened. Ranks exchange their sums when Megatron logs.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker, set_moe_metrics_tracker
from numpy import ndarray
from torch import Tensor

from megatron_xmoe import figures
from megatron_xmoe.figures import MIB, SUMS, TRAFFIC_SUMS
from megatron_xmoe.profiling import EXCHANGES, STAGES, MemoryProbe, StageClock, recording_tracker

MEMORY_INTERVAL = 10
"""Iterations from one look at the allocator to the next."""

_RANK_BITS = 24
_ABSENT = -(2**62)


@dataclass(frozen=True)
class Traffic:
    """What one forward pass of a layer sends for this rank's tokens; plain ints that the host knows anyway.

    A dispatcher fills it in after its one host synchronisation, from the split sizes. A row is the hidden state of a
    token. The combine sends as many rows back, and the backward pass moves the same rows again.
    """

    routes: int
    """Routes of this rank's tokens that were not dropped."""

    routes_remote: int
    """Those of them whose expert is on another node."""

    inter_rows: int
    """Rows sent to other nodes: `routes_remote` without redundancy bypassing, (token, node) pairs with it."""

    intra_rows: int
    """Rows sent to other ranks of the same node, those that come from another node and are passed on included."""

    row_bytes: int
    """Bytes of one row."""

    inter_metadata: int
    """Bytes sent to other nodes besides rows, in one forward pass: routing weights, counts, indices."""

    intra_metadata: int
    """The same, to other ranks of the same node."""

    padded_rows: int
    """Rows of a buffer [E, C] that pads each expert to the capacity, or without one to the largest expert's routes."""

    @property
    def redundancy(self) -> float:
        """Share of the routes to other nodes that need no row of their own; NaN where no route leaves the node."""
        return 1 - self.inter_rows / self.routes_remote if self.routes_remote else math.nan

    @property
    def inter_bytes(self) -> int:
        """Bytes to other nodes, dispatch and combine."""
        return 2 * self.inter_rows * self.row_bytes + self.inter_metadata

    @property
    def intra_bytes(self) -> int:
        """Bytes to other ranks of the node, dispatch and combine."""
        return 2 * self.intra_rows * self.row_bytes + self.intra_metadata

    @property
    def padding_rows(self) -> int:
        """Rows of the padded buffer that would be padding."""
        return self.padded_rows - self.routes


def flat_traffic(
    sent: Sequence[int],
    rank: int,
    node_of_rank: Sequence[int],
    row_bytes: int,
    bytes_per_route: int,
    bytes_per_rank: int,
    padded_rows: int,
) -> Traffic:
    """Traffic of a plain exchange, in which every route sends a row of its own.

    Args:
        sent: rows for each of the G ranks of the expert-parallel group.
        rank: this one in the group.
        node_of_rank: node of each of the G ranks, any labels.
        row_bytes: bytes of a row.
        bytes_per_route: metadata that goes with each row.
        bytes_per_rank: metadata that goes to each other rank.
        padded_rows: of the buffer [E, C].
    """
    own = node_of_rank[rank]
    inter = [rows for rows, node in zip(sent, node_of_rank, strict=True) if node != own]
    intra = [rows for i, (rows, node) in enumerate(zip(sent, node_of_rank, strict=True)) if node == own and i != rank]
    return Traffic(
        routes=sum(sent),
        routes_remote=sum(inter),
        inter_rows=sum(inter),
        intra_rows=sum(intra),
        row_bytes=row_bytes,
        inter_metadata=bytes_per_route * sum(inter) + bytes_per_rank * len(inter),
        intra_metadata=bytes_per_route * sum(intra) + bytes_per_rank * len(intra),
        padded_rows=padded_rows,
    )


def recording() -> bool:
    """Whether figures of the pass that is under way are wanted; a dispatcher may ask before it collects them.

    Not where no gradient is recorded: in evaluation, and in the first of the two forward passes that activation
    recomputation makes.
    """
    return recording_tracker() is not None


def record_traffic(layer_number: int | None, traffic: Traffic) -> None:
    """Add a pass of a layer to the figures, if they are wanted. Does no work on the device.

    Args: the layer's number from 1 (layers of multi-token prediction come after the others), None outside of a model;
        what was sent.
    """
    tracker = recording_tracker()
    if tracker is not None and layer_number is not None:
        tracker.add_traffic(layer_number, traffic)


def record_traffic_later(layer_number: int | None, counts: Tensor, traffic: Callable[[Tensor], Traffic]) -> None:
    """`record_traffic` where the host does not know the numbers yet, and does not wait for them.

    Args: counts on the device, which are not written to any more; what they mean, given them on the CPU.
    """
    tracker = recording_tracker()
    if tracker is not None and layer_number is not None:
        tracker.add_traffic_later(layer_number, counts, traffic)


def count_routes(layer_number: int | None, routing_map: Tensor) -> None:
    """Count the routes of each expert in a micro-batch, [T, E] bool, before any is dropped, if they are wanted."""
    tracker = recording_tracker()
    if tracker is not None and layer_number is not None:
        tracker.count(layer_number, routing_map)


class XMoETracker(MoEMetricsTracker):
    """Megatron's tracker of MoE losses, with X-MoE's figures.

    Everything has the same shape on every rank, whatever layers its pipeline stage holds, so that ranks can sum it.
    """

    def __init__(self, num_layers: int, num_experts: int, log_interval: int, level: str, breakdown: bool):
        """Args:
        num_layers: of the whole model, those of multi-token prediction included.
        num_experts: E.
        log_interval: iterations between two reports.
        level: "off", "summary" or "layers" of --xmoe-metrics.
        breakdown: print the time of each stage.
        """
        super().__init__()
        self.log_interval, self.level, self.breakdown = log_interval, level, breakdown
        self.num_layers, self.num_experts = num_layers, num_experts
        self._clock = StageClock(STAGES if breakdown else EXCHANGES)
        self._memory = MemoryProbe()
        self._later: deque = deque()
        self._first_iteration: int | None = None
        self._reset()

    def _reset(self) -> None:
        shape = (self.num_layers, self.num_experts)
        self._loads = torch.zeros(shape, dtype=torch.int64, device=torch.cuda.current_device())
        self._traffic = [[0] * len(TRAFFIC_SUMS) for _ in range(self.num_layers)]

    def count(self, layer_number: int, routing_map: Tensor) -> None:
        """Add the routes of one micro-batch: layer_number from 1; routing_map [T, E] bool."""
        self._loads[layer_number - 1] += routing_map.sum(dim=0)

    def add_traffic(self, layer_number: int, traffic: Traffic) -> None:
        """Add what one pass of a layer (numbered from 1) sent."""
        values = (
            *(1, traffic.routes, traffic.routes_remote, traffic.inter_rows, traffic.inter_bytes, traffic.intra_bytes),
            *(traffic.padding_rows, traffic.padding_rows * traffic.row_bytes),
        )
        row = self._traffic[layer_number - 1]
        for i, value in enumerate(values):
            row[i] += value

    def add_traffic_later(self, layer_number: int, counts: Tensor, traffic: Callable[[Tensor], Traffic]) -> None:
        """Add what follows from counts that the device has not computed yet."""
        on_host = counts.to("cpu", non_blocking=True)
        there = torch.cuda.Event()
        there.record()
        self._later.append((there, layer_number, on_host, traffic))

    def _add_what_arrived(self) -> None:
        while self._later and self._later[0][0].query():
            _, layer_number, counts, traffic = self._later.popleft()
            self.add_traffic(layer_number, traffic(counts))

    def stage_begins(self, layer_number: int, stage: str) -> None:
        """A stage of a layer's forward pass begins."""
        self._memory.begin(layer_number, stage)
        self._clock.begin(layer_number, stage)

    def stage_ends(self, layer_number: int, stage: str) -> None:
        """The stage that began last ends."""
        self._clock.end(stage)
        self._memory.end(layer_number)

    def report(self, loss_scale: float, iteration: int, writer=None, wandb_writer=None, **options) -> str:
        """Megatron's report, once an iteration on every rank; at logged iterations with X-MoE's figures."""
        text = super().report(
            loss_scale=loss_scale, iteration=iteration, writer=writer, wandb_writer=wandb_writer, **options
        )
        if self._first_iteration is None:
            self._first_iteration = iteration
        self._add_what_arrived()
        if iteration % self.log_interval == 0:
            text += self._log(iteration, writer, wandb_writer)
            self._first_iteration = iteration + 1
        if iteration % MEMORY_INTERVAL == 1:
            self._memory.arm()
        return text

    def _log(self, iteration: int, writer, wandb_writer) -> str:
        """Sum over ranks; on the last one, whose loggers Megatron uses, write the figures and return the text."""
        loads, sums, extremes = self._reduce()
        if dist.get_rank() != dist.get_world_size() - 1:
            return ""
        overall = figures.overall_figures(loads, sums) | {name: float(of[-1]) for name, of in extremes.items()}
        scalars, text = {}, ""
        if self.level != "off":
            scalars |= {f"xmoe/{name}": value for name, value in overall.items()}
            text = figures.console_text(overall)
        if self.level == "layers":
            of_layers = figures.figures_of_layers(loads, sums) | {name: of[:-1] for name, of in extremes.items()}
            for name, values in of_layers.items():
                tags = (f"xmoe-{name}/layer-{number:03d}" for number in range(1, self.num_layers + 1))
                scalars |= dict(zip(tags, values.tolist(), strict=True))
            if writer is not None:
                heat = torch.from_numpy(figures.relative_loads(loads).astype(np.float32))
                writer.add_tensor("xmoe-expert-load", heat, iteration)
        if self.breakdown:
            breakdown = figures.breakdown_of(sums)
            scalars |= {f"xmoe-breakdown/{stage}-ms": value for stage, value in breakdown.items()}
            print(figures.breakdown_table(breakdown, self._first_iteration, iteration), flush=True)
        _write({tag: value for tag, value in scalars.items() if not math.isnan(value)}, iteration, writer, wandb_writer)
        return text

    def _reduce(self) -> tuple[ndarray, dict[str, ndarray], dict[str, ndarray]]:
        """Since the last report, over all ranks: loads [L, E], SUMS by name [L], and extremes of ranks [L + 1]."""
        spent, layers = self._clock.read(), range(1, self.num_layers + 1)
        self._add_what_arrived()  # all of it: reading the clock has waited for the device
        times = [[spent.get((layer, stage), 0.0) for stage in STAGES] for layer in layers]
        mine = np.concatenate([np.array(part, dtype=np.float64) for part in (self._traffic, times)], axis=1)
        device = self._loads.device
        sums = torch.cat([self._loads.double(), torch.from_numpy(mine).to(device)], dim=1)
        extremes = torch.from_numpy(self._extremes(dict(zip(SUMS, mine.T, strict=True)))).to(device)
        dist.all_reduce(sums)
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
        self._reset()
        loads, columns = np.split(sums.cpu().numpy(), [self.num_experts], axis=1)
        return loads, dict(zip(SUMS, columns.T, strict=True)), _named_extremes(extremes.cpu().numpy())

    def _extremes(self, mine: dict[str, ndarray]) -> ndarray:
        """[L + 1, 3] int64, to be maximised over ranks: all-to-all time a pass, its negative, bytes of memory.

        The last row is for all layers. Times are in ns and carry the rank in their low bits.
        """
        exchanges, passes = sum(mine[stage] for stage in EXCHANGES), mine["passes"]
        exchanges, passes = (np.append(x, x.sum()) for x in (exchanges, passes))
        nanoseconds = np.rint(exchanges / np.maximum(passes, 1) * 1e6).astype(np.int64)
        memory = [self._memory.peaks.get(layer, 0) for layer in range(1, self.num_layers + 1)]
        ranked = (
            np.where(exchanges > 0, (x << _RANK_BITS) + dist.get_rank(), _ABSENT) for x in (nanoseconds, -nanoseconds)
        )
        return np.stack([*ranked, [*memory, max(memory)]], axis=1)


def _named_extremes(extremes: ndarray) -> dict[str, ndarray]:
    """Figures [L + 1] by name, NaN where no rank had any; the last element is for all layers."""
    named = {}
    for name, sign, column in (("slowest", 1, extremes[:, 0]), ("fastest", -1, extremes[:, 1])):
        there = column != _ABSENT
        named[f"alltoall-{name}-ms"] = np.where(there, sign * (column >> _RANK_BITS) / 1e6, math.nan)
        named[f"alltoall-{name}-rank"] = np.where(there, column % 2**_RANK_BITS, math.nan)
    memory = extremes[:, 2]
    return named | {"memory-MiB": np.where(memory > 0, memory / MIB, math.nan)}


def _write(scalars: dict[str, float], iteration: int, writer, wandb_writer) -> None:
    if writer is not None:
        for tag, value in scalars.items():
            writer.add_scalar(tag, value, iteration)
    if wandb_writer is not None:
        wandb_writer.log(scalars, iteration)


def install_metrics(level: str, breakdown: bool, num_layers: int, num_experts: int, log_interval: int) -> None:
    """Make Megatron's loggers show X-MoE's figures; see XMoETracker."""
    if level != "off" or breakdown:
        set_moe_metrics_tracker(XMoETracker(num_layers, num_experts, log_interval, level, breakdown))
