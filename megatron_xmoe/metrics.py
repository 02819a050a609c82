"""Figures about the experts that Megatron's metrics do not have: how many routes each expert got."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_logging import (
    MoEMetricsTracker,
    get_moe_metrics_tracker,
    set_moe_metrics_tracker,
)
from torch import Tensor


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
    return isinstance(get_moe_metrics_tracker(), ExpertLoadTracker) and torch.is_grad_enabled()


def record_traffic(layer_number: int | None, traffic: Traffic) -> None:
    """Add a pass of a layer to the figures, if they are wanted. Does no work on the device.

    Args: the layer's number from 1 (layers of multi-token prediction come after the others), None outside of a model;
        what was sent.
    """
    if layer_number is not None and recording():
        get_moe_metrics_tracker().add_traffic(layer_number, traffic)


class ExpertLoadTracker(MoEMetricsTracker):
    """Megatron's tracker of MoE losses, which also counts routes per layer and expert and writes them to a file.

    Counts stay on the device during the forward pass; ranks exchange them once per logged iteration.
    """

    def __init__(self, path: Path, num_layers: int, num_experts: int, log_interval: int):
        """Args: file to append to; layers and experts of the whole model; iterations between two lines."""
        super().__init__()
        self.path = path
        self.log_interval = log_interval
        self.traffic: dict[int, list[Traffic]] = {}
        self.counts = torch.zeros(num_layers, num_experts, dtype=torch.int64, device=torch.cuda.current_device())

    def count(self, layer_number: int, routing_map: Tensor) -> None:
        """Add the routes of one micro-batch.

        Args: layer_number from 1; routing_map [T, E] bool.
        """
        self.counts[layer_number - 1] += routing_map.sum(dim=0)

    def add_traffic(self, layer_number: int, traffic: Traffic) -> None:
        """Keep what a micro-batch of a layer (numbered from 1) sent."""
        self.traffic.setdefault(layer_number, []).append(traffic)

    def report(self, loss_scale: float, iteration: int, **options) -> str:
        """Megatron's report, once per iteration on every rank; writes a line at every logged one."""
        text = super().report(loss_scale=loss_scale, iteration=iteration, **options)
        if iteration % self.log_interval == 0:
            dist.all_reduce(self.counts)
            if dist.get_rank() == 0:
                self._append(iteration)
            self.counts.zero_()
            self.traffic.clear()
        return text

    def _append(self, iteration: int) -> None:
        layers = {str(i + 1): row for i, row in enumerate(self.counts.tolist()) if any(row)}
        with self.path.open("a") as file:
            file.write(json.dumps({"iteration": iteration, "layers": layers}) + "\n")


def install_expert_load_tracker(path: str, num_layers: int, num_experts: int, log_interval: int) -> None:
    """Make Megatron's metrics write each expert's load to `path`, one JSON object a line.

    Lines are {"iteration": n, "layers": {"2": [routes of expert 0, 1, ...], ...}}, counted over all ranks since the
    line before. A resumed run appends; where an iteration stands twice, the later line is the valid one.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    set_moe_metrics_tracker(ExpertLoadTracker(Path(path), num_layers, num_experts, log_interval))


def count_routes(layer_number: int, routing_map: Tensor) -> None:
    """Count a micro-batch's routes if somebody asked for them."""
    if recording():
        get_moe_metrics_tracker().count(layer_number, routing_map)
