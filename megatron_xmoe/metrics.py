"""Figures about X-MoE's layers in Megatron's loggers: load of the experts, traffic, padding, times, memory.

Recording costs no synchronisation and next to no time: load and traffic are what the host knows anyway, or counts that
stay on the device, times are events, and both are read at a report. Ranks exchange their sums when Megatron logs.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker, set_moe_metrics_tracker
from numpy import ndarray
from torch import Tensor

from megatron_xmoe import figures
from megatron_xmoe.figures import SUMS, TRAFFIC_SUMS
from megatron_xmoe.profiling import (
    ALL_STAGES,
    EXCHANGES,
    NO_STAGES,
    STAGES,
    MemoryProbe,
    StageClock,
    recording_tracker,
)
from megatron_xmoe.traffic import Traffic

MEMORY_INTERVAL = 50
"""Iterations from one look at the allocator to the next."""

MOST_WAITING = 256
"""Counts that wait on the device until they are sent to the host together."""


def recording() -> bool:
    """Whether figures of the pass that is under way are wanted; a dispatcher may ask before it collects them.

    Not where no gradient is recorded: in evaluation, and in the first of the two forward passes that activation
    recomputation makes.
    """
    return recording_tracker() is not None


def record_traffic(layer_number: int | None, traffic: Traffic, sent: ndarray) -> None:
    """Add a pass of a layer to the figures, if they are wanted. Does no work on the device.

    Args:
        layer_number: from 1 (layers of multi-token prediction come after the others), None outside of a model.
        traffic: what was sent.
        sent: int64, this rank's routes of each of the E experts that were not dropped; any shape.
    """
    tracker = recording_tracker()
    if tracker is not None and layer_number is not None:
        tracker.add_traffic(layer_number, traffic, sent)


def record_traffic_later(layer_number: int | None, sent: Tensor, traffic: Callable[[ndarray], Traffic]) -> None:
    """`record_traffic` where the host does not know the numbers yet, and does not wait for them.

    Args: sent, [E] int64 on the device, which is not written to any more; what was sent, given the same on the host.
    """
    tracker = recording_tracker()
    if tracker is not None and layer_number is not None:
        tracker.add_traffic_later(layer_number, sent, traffic)


def count_routes(layer_number: int | None, routing_map: Tensor) -> None:
    """Count the routes of each expert in a micro-batch, [T, E] bool, before any is dropped, if they are wanted.

    Only for layers that drop, which all of a model do or none: of others `record_traffic` says as much.
    """
    tracker = recording_tracker()
    if tracker is not None and layer_number is not None:
        tracker.count(layer_number, routing_map)


class LateCounts:
    """Counts that the device computes, for the host, which does not wait for them until it has to."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Callable[[ndarray], None]]] = []
        self._arriving: tuple[torch.cuda.Event, Tensor, list[Callable[[ndarray], None]]] | None = None

    def add(self, counts: Tensor, use: Callable[[ndarray], None]) -> None:
        """Have `use` called with the counts, [E] int64 on the device, by `read` or many calls later."""
        self._waiting.append((counts, use))
        if len(self._waiting) == MOST_WAITING:
            self._send()

    def read(self) -> None:
        """Use all. Waits for the device."""
        if self._waiting:
            self._send()
        self._use_arriving()

    def _send(self) -> None:
        self._use_arriving()  # as many passes ago, so it is there
        counts, uses = zip(*self._waiting, strict=True)
        on_host, there = torch.stack(counts).to("cpu", non_blocking=True), torch.cuda.Event()
        there.record()
        self._arriving = there, on_host, uses
        self._waiting.clear()

    def _use_arriving(self) -> None:
        if self._arriving is not None:
            there, on_host, uses = self._arriving
            there.synchronize()
            for counts, use in zip(on_host.numpy(), uses, strict=True):
                use(counts)
            self._arriving = None


class XMoETracker(MoEMetricsTracker):
    """Megatron's tracker of MoE losses, with X-MoE's figures.

    Everything has the same shape on every rank, whatever layers its pipeline stage holds, so that ranks can sum it.
    """

    def __init__(self, num_layers: int, num_experts: int, log_interval: int, level: str, breakdown: bool):
        """Args:
        num_layers: of the whole model, those of multi-token prediction included.
        num_experts: E.
        log_interval: iterations between two reports; exchanges are timed in the last of them.
        level: "off", "summary" or "layers" of --xmoe-metrics.
        breakdown: print the time of each stage.
        """
        super().__init__()
        self.log_interval, self.level, self.breakdown = log_interval, level, breakdown
        self.num_layers, self.num_experts = num_layers, num_experts
        self._layers = range(1, num_layers + 1)
        self._clock = StageClock(STAGES if breakdown else EXCHANGES)
        self._timed = breakdown or log_interval == 1  # of other intervals the next report is not known yet
        self._memory = MemoryProbe()
        self._first_iteration: int | None = None
        self._device = torch.cuda.current_device()
        self._late = LateCounts()
        self._reset()

    def _reset(self) -> None:
        shape = self.num_layers, self.num_experts
        self._routed, self._sent = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        self._traffic = [[0] * len(TRAFFIC_SUMS) for _ in range(self.num_layers)]

    @property
    def watched_stages(self) -> frozenset[str]:
        """Stages that this wants to hear of."""
        if self._memory.armed:
            return ALL_STAGES
        return self._clock.stages if self._timed else NO_STAGES

    def count(self, layer_number: int, routing_map: Tensor) -> None:
        """Add the routes of one micro-batch: layer_number from 1; routing_map [T, E] bool."""
        self._late.add(routing_map.sum(dim=0), partial(self._add_routed, layer_number))

    def _add_routed(self, layer_number: int, counts: ndarray) -> None:
        self._routed[layer_number - 1] += counts

    def add_traffic(self, layer_number: int, traffic: Traffic, sent: ndarray) -> None:
        """Add what the pass under way of a layer (numbered from 1) sent: in all, and to each of the E experts."""
        self._add(layer_number, self._timed, traffic, sent)

    def _add(self, layer_number: int, timed: bool, traffic: Traffic, sent: ndarray) -> None:
        self._sent[layer_number - 1] += sent.reshape(-1)
        values = (
            *(1, timed, traffic.routes, traffic.routes_remote),
            *(traffic.inter_rows, traffic.inter_bytes, traffic.intra_rows, traffic.intra_bytes),
            *(traffic.saved_bytes, traffic.padding_rows, traffic.padding_rows * traffic.row_bytes),
        )
        row = self._traffic[layer_number - 1]
        for i, value in enumerate(values):
            row[i] += value

    def add_traffic_later(self, layer_number: int, sent: Tensor, traffic: Callable[[ndarray], Traffic]) -> None:
        """`add_traffic` once [E] `sent` is on the host."""
        timed = self._timed
        self._late.add(sent, lambda counts: self._add(layer_number, timed, traffic(counts), counts))

    def stage_begins(self, layer_number: int, stage: str) -> None:
        """A stage of a layer's forward pass begins."""
        self._memory.begin(layer_number, stage)
        if self._timed:
            self._clock.begin(layer_number, stage)

    def stage_ends(self, layer_number: int, stage: str) -> None:
        """The stage that began last ends."""
        if self._timed:
            self._clock.end(stage)
        self._memory.end(layer_number)

    def report(self, loss_scale: float, iteration: int, writer=None, wandb_writer=None, **options) -> str:
        """Megatron's report, once an iteration on every rank; at logged iterations with X-MoE's figures."""
        text = super().report(
            loss_scale=loss_scale, iteration=iteration, writer=writer, wandb_writer=wandb_writer, **options
        )
        is_first = self._first_iteration is None
        if is_first:
            self._first_iteration = iteration
        if iteration % self.log_interval == 0:
            text += self._log(iteration, writer, wandb_writer)
            self._first_iteration = iteration + 1
        self._memory.arm(is_first or iteration % MEMORY_INTERVAL == 1)
        self._timed = self.breakdown or (iteration + 1) % self.log_interval == 0
        return text

    def _log(self, iteration: int, writer, wandb_writer) -> str:
        """Sum over ranks; on the last one, whose loggers Megatron uses, write the figures and return the text."""
        reduced = self._reduce()
        if reduced is None:
            return ""
        loads, sums, extremes = reduced
        of_layers, overall = figures.figures_of_model(loads, sums)
        overall |= {name: float(of[-1]) for name, of in extremes.items()}
        scalars, text = {}, ""
        if self.level != "off":
            scalars |= {f"xmoe/{name}": value for name, value in overall.items()}
            text = figures.console_text(overall)
        if self.level == "layers":
            for name, values in (of_layers | {name: of[:-1] for name, of in extremes.items()}).items():
                tags = (f"xmoe-{name}/layer-{number:03d}" for number in self._layers)
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

    def _reduce(self) -> tuple[ndarray, dict[str, ndarray], dict[str, ndarray]] | None:
        """Since the last report, over all ranks: loads [L, E], SUMS by name [L], and extremes of ranks [L + 1].

        For the last rank; None on others, which do not wait for the result.
        """
        self._late.read()
        layers, experts = self._sent.shape
        shape = layers, experts + len(SUMS)
        packed = np.empty(layers * shape[1] + 3 * (layers + 1))  # one transfer each way
        sums = packed[: -3 * (layers + 1)].reshape(shape)
        sums[:, :experts] = np.maximum(self._routed, self._sent)  # layers that do not drop count what they send only
        sums[:, experts : -len(STAGES)] = self._traffic
        spent = self._clock.read()
        sums[:, -len(STAGES) :] = [[spent.get((layer, stage), 0.0) for stage in STAGES] for layer in self._layers]
        memory = [self._memory.peaks.get(layer, 0) for layer in self._layers]
        extremes = figures.extremes_of_rank(dict(zip(SUMS, sums.T[experts:], strict=True)), memory, dist.get_rank())
        packed[sums.size :] = extremes.view(np.float64).ravel()
        on_device = torch.from_numpy(packed).to(self._device, non_blocking=True)
        sums_on_device, extremes_on_device = on_device.split([sums.size, 3 * (layers + 1)])
        dist.all_reduce(sums_on_device)
        dist.all_reduce(extremes_on_device.view(torch.int64), op=dist.ReduceOp.MAX)
        self._reset()
        if dist.get_rank() != dist.get_world_size() - 1:
            return None
        packed = on_device.cpu().numpy()
        loads, columns = np.split(packed[: sums.size].reshape(shape), [experts], axis=1)
        extremes = packed[sums.size :].view(np.int64).reshape(-1, 3)
        return loads, dict(zip(SUMS, columns.T, strict=True)), figures.named_extremes(extremes)


def _write(scalars: dict[str, float], iteration: int, writer, wandb_writer) -> None:
    file_writer = getattr(writer, "file_writer", None)
    if file_writer is not None:  # of torch's writer: all values in one event, instead of an event each
        from torch.utils.tensorboard.summary import Summary

        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        file_writer.add_summary(Summary(value=values), iteration)
    elif writer is not None:
        for tag, value in scalars.items():
            writer.add_scalar(tag, value, iteration)
    if wandb_writer is not None:
        wandb_writer.log(scalars, iteration)


def install_metrics(level: str, breakdown: bool, num_layers: int, num_experts: int, log_interval: int) -> None:
    """Make Megatron's loggers show X-MoE's figures; see XMoETracker."""
    if level != "off" or breakdown:
        set_moe_metrics_tracker(XMoETracker(num_layers, num_experts, log_interval, level, breakdown))
