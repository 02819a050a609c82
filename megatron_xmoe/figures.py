"""From sums over ranks and micro-batches to the figures that a person reads. Definitions: docs/metrics.md."""

import math

import torch
from torch import Tensor

from megatron_xmoe.profiling import EXCHANGES, STAGES

MIB = 2**20

TRAFFIC_SUMS = (
    *("passes", "routes", "routes_remote", "inter_rows", "inter_bytes", "intra_bytes"),
    *("padding_rows", "padding_bytes"),
)
SUMS = (*TRAFFIC_SUMS, *STAGES)
"""What is summed for each layer: a dispatcher's traffic, and milliseconds of each stage."""

PAPERS_NAMES = ("gate", "dispatch buffer", "all-to-all", "experts", "all-to-all", "combine")
"""What the paper's table calls the STAGES."""


def figures_of_layers(loads: Tensor, sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Figures [L] of L layers by name; NaN where there is nothing to divide by.

    Args:
        loads: [L, E] float64 routes that the router gave to each expert.
        sums: SUMS by name, [L] float64.
    """
    experts, routed = loads.shape[1], loads.sum(dim=1)
    shares = _divide(loads, routed.unsqueeze(1))
    entropy = -torch.xlogy(shares, shares).sum(dim=1)
    passes, exchanges = sums["passes"], sum(sums[stage] for stage in EXCHANGES)
    return {
        "load-max": shares.amax(dim=1) * experts,
        "load-entropy": entropy / math.log(experts) if experts > 1 else shares.sum(dim=1),
        "idle-experts": _divide((loads == 0).sum(dim=1), torch.where(routed > 0, experts, 0)),
        "drop-rate": 1 - _divide(sums["routes"], routed),
        "padding-avoided": _divide(sums["padding_rows"], sums["padding_rows"] + sums["routes"]),
        "padding-avoided-MiB": _divide(sums["padding_bytes"], passes) / MIB,
        "redundancy": 1 - _divide(sums["inter_rows"], sums["routes_remote"]),
        "inter-node-MiB": _divide(sums["inter_bytes"], passes) / MIB,
        "intra-node-MiB": _divide(sums["intra_bytes"], passes) / MIB,
        "alltoall-ms": _divide(exchanges, torch.where(exchanges > 0, passes, 0)),
    }


def overall_figures(loads: Tensor, sums: dict[str, Tensor]) -> dict[str, float]:
    """One figure of each kind for all layers: of their sums, but balance is the mean over layers."""
    of_layers = figures_of_layers(loads, sums)
    of_sums = figures_of_layers(
        loads.sum(dim=0, keepdim=True), {k: v.sum(dim=0, keepdim=True) for k, v in sums.items()}
    )
    overall = {name: value.item() for name, value in of_sums.items()}
    for name in ("load-max", "load-entropy", "idle-experts"):
        overall[name] = of_layers[name].nanmean().item()
    worst = of_layers["load-max"].nan_to_num(-1).max(dim=0)
    return overall | {"load-max-of-worst-layer": worst.values.item(), "worst-layer": worst.indices.item() + 1.0}


def relative_loads(loads: Tensor) -> Tensor:
    """Routes of each expert [L, E] divided by the even share; zeros in layers without routes."""
    return _divide(loads * loads.shape[1], loads.sum(dim=1, keepdim=True)).nan_to_num(0.0)


def console_text(figures: dict[str, float]) -> str:
    """The part of Megatron's log line that is X-MoE's."""
    parts = [
        f"expert load max/mean: {figures['load-max']:.2f} "
        f"(layer {figures['worst-layer']:.0f}: {figures['load-max-of-worst-layer']:.2f})",
        f"idle experts: {figures['idle-experts']:.1%}",
        f"dropped: {figures['drop-rate']:.1%}",
    ]
    if not math.isnan(figures["redundancy"]):  # routes leave the node
        parts.append(f"inter-node: {figures['inter-node-MiB']:.2f} MiB, {figures['redundancy']:.1%} saved")
    if not math.isnan(figures["alltoall-ms"]):
        parts.append(
            f"all-to-all (ms): {figures['alltoall-ms']:.2f} "
            f"(rank {figures['alltoall-slowest-rank']:.0f}: {figures['alltoall-slowest-ms']:.2f})"
        )
    return "".join(f" {part} |" for part in parts)


def breakdown_of(sums: dict[str, Tensor]) -> dict[str, float]:
    """Milliseconds of each stage in a forward pass, mean over layers, ranks and micro-batches."""
    passes = max(sums["passes"].sum().item(), 1.0)
    return {stage: sums[stage].sum().item() / passes for stage in STAGES}


def breakdown_table(breakdown: dict[str, float], first: int, last: int) -> str:
    """The paper's table: where the time of a layer's forward pass goes."""
    total = sum(breakdown.values())
    rows = [*zip(PAPERS_NAMES, STAGES, breakdown.values(), strict=True), ("total", "", total)]
    lines = [
        f" forward pass of an MoE layer, mean over layers, ranks and micro-batches of iterations {first} to {last}",
        f" {'stage':<16}{'range':<14}{'ms':>9}{'share':>8}",
    ]
    lines += [
        f" {name:<16}{stage and f'xmoe.{stage}':<14}{milliseconds:>9.3f}{milliseconds / (total or 1):>8.1%}"
        for name, stage, milliseconds in rows
    ]
    return "\n".join(lines)


def _divide(dividend: Tensor, divisor: Tensor) -> Tensor:
    return dividend.double() / torch.where(divisor > 0, divisor, math.nan)
