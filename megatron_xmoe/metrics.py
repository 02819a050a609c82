"""Figures about the experts that Megatron's metrics do not have: how many routes each expert got."""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_logging import (
    MoEMetricsTracker,
    get_moe_metrics_tracker,
    set_moe_metrics_tracker,
)
from torch import Tensor


class ExpertLoadTracker(MoEMetricsTracker):
    """Megatron's tracker of MoE losses, which also counts routes per layer and expert and writes them to a file.

    Counts stay on the device during the forward pass; ranks exchange them once per logged iteration.
    """

    def __init__(self, path: Path, num_layers: int, num_experts: int, log_interval: int):
        """Args: file to append to; layers and experts of the whole model; iterations between two lines."""
        super().__init__()
        self.path = path
        self.log_interval = log_interval
        self.counts = torch.zeros(num_layers, num_experts, dtype=torch.int64, device=torch.cuda.current_device())

    def count(self, layer_number: int, routing_map: Tensor) -> None:
        """Add the routes of one micro-batch.

        Args: layer_number from 1; routing_map [T, E] bool.
        """
        self.counts[layer_number - 1] += routing_map.sum(dim=0)

    def report(self, loss_scale: float, iteration: int, **options) -> str:
        """Megatron's report, once per iteration on every rank; writes a line at every logged one."""
        text = super().report(loss_scale=loss_scale, iteration=iteration, **options)
        if iteration % self.log_interval == 0:
            dist.all_reduce(self.counts)
            if dist.get_rank() == 0:
                self._append(iteration)
            self.counts.zero_()
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
    """Count a micro-batch's routes if somebody asked for them.

    Skipped where no gradient is recorded: in evaluation, and in the first of the two forward passes that activation
    recomputation makes.
    """
    tracker = get_moe_metrics_tracker()
    if isinstance(tracker, ExpertLoadTracker) and torch.is_grad_enabled():
        tracker.count(layer_number, routing_map)
