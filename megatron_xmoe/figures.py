"""From sums over ranks and micro-batches to the figures that a person reads. Definitions: docs/metrics.md."""

import math

import numpy as np
from numpy import ndarray

from megatron_xmoe.profiling import EXCHANGES, STAGES

MIB = 2**20

TRAFFIC_SUMS = (
    *("passes", "timed_passes", "routes", "routes_remote", "inter_rows", "inter_bytes", "intra_rows", "intra_bytes"),
    *("saved_bytes", "padding_rows", "padding_bytes"),
)
SUMS = (*TRAFFIC_SUMS, *STAGES)
"""What is summed for each layer: a dispatcher's traffic, and milliseconds of each stage in passes that are timed."""

PAPERS_NAMES = ("gate", "dispatch buffer", "all-to-all", "experts", "all-to-all", "combine")
"""What the paper's table calls the STAGES."""

RANK_BITS = 24
ABSENT = -(2**62)


def figures_of_layers(loads: ndarray, sums: dict[str, ndarray]) -> dict[str, ndarray]:
    """Figures [L] of L layers by name; NaN where there is nothing to divide by.

    Args:
        loads: [L, E] float64 routes that the router gave to each expert.
        sums: SUMS by name, [L] float64.
    """
    experts, routed = loads.shape[1], loads.sum(axis=1)
    shares = _divide(loads, routed[:, None])
    entropy = -(shares * np.log(np.where(shares > 0, shares, 1))).sum(axis=1)
    passes, exchanges = sums["passes"], sum(sums[stage] for stage in EXCHANGES)
    timed = np.where(exchanges > 0, sums["timed_passes"], 0)
    return {
        "load-max": shares.max(axis=1) * experts,
        "load-entropy": entropy / math.log(experts) if experts > 1 else shares[:, 0],
        "idle-experts": np.where(routed > 0, (loads == 0).mean(axis=1), math.nan),
        "drop-rate": 1 - _divide(sums["routes"], routed),
        "padding-avoided": _divide(sums["padding_rows"], sums["padding_rows"] + sums["routes"]),
        "padding-avoided-MiB": _divide(sums["padding_bytes"], passes) / MIB,
        "redundancy": 1 - _divide(sums["inter_rows"], sums["routes_remote"]),
        "inter-node-rows": _divide(sums["inter_rows"], passes),
        "inter-node-MiB": _divide(sums["inter_bytes"], passes) / MIB,
        "intra-node-rows": _divide(sums["intra_rows"], passes),
        "intra-node-MiB": _divide(sums["intra_bytes"], passes) / MIB,
        "saved-rows": _divide(sums["routes_remote"] - sums["inter_rows"], passes),
        "saved-MiB": _divide(sums["saved_bytes"], passes) / MIB,
        "alltoall-ms": _divide(exchanges, timed),
    }


def figures_of_model(loads: ndarray, sums: dict[str, ndarray]) -> tuple[dict[str, ndarray], dict[str, float]]:
    """`figures_of_layers`, and one figure of each kind for all layers: of their sums, but balance is their mean."""
    columns = np.stack([*sums.values()])
    columns = np.concatenate([columns, columns.sum(axis=1, keepdims=True)], axis=1)
    with_total = np.concatenate([loads, loads.sum(axis=0, keepdims=True)])
    of_both = figures_of_layers(with_total, dict(zip(sums, columns, strict=True)))
    of_layers = {name: values[:-1] for name, values in of_both.items()}
    overall = {name: float(values[-1]) for name, values in of_both.items()}
    with_routes = loads.any(axis=1)
    for name in ("load-max", "load-entropy", "idle-experts"):
        overall[name] = float(of_layers[name][with_routes].mean()) if with_routes.any() else math.nan
    worst = int(np.where(with_routes, of_layers["load-max"], -1).argmax())
    overall |= {"load-max-of-worst-layer": float(of_layers["load-max"][worst]), "worst-layer": float(worst + 1)}
    return of_layers, overall


def extremes_of_rank(mine: dict[str, ndarray], memory: list[int], rank: int) -> ndarray:
    """[L + 1, 3] int64, to be maximised over ranks: all-to-all time a pass, its negative, bytes of memory.

    The last row is for all layers. Times are in ns and carry the rank in their low bits.

    Args: SUMS of this rank by name, [L]; bytes of each layer; the rank.
    """
    exchanges, passes = sum(mine[stage] for stage in EXCHANGES), mine["timed_passes"]
    exchanges, passes = (np.append(x, x.sum()) for x in (exchanges, passes))
    nanoseconds = np.rint(exchanges / np.maximum(passes, 1) * 1e6).astype(np.int64)
    ranked = (np.where(exchanges > 0, (x << RANK_BITS) + rank, ABSENT) for x in (nanoseconds, -nanoseconds))
    return np.stack([*ranked, [*memory, max(memory)]], axis=1)


def named_extremes(extremes: ndarray) -> dict[str, ndarray]:
    """Figures [L + 1] by name from the maxima, NaN where no rank had any; the last element is for all layers."""
    named = {}
    for name, sign, column in (("slowest", 1, extremes[:, 0]), ("fastest", -1, extremes[:, 1])):
        there = column != ABSENT
        named[f"alltoall-{name}-ms"] = np.where(there, sign * (column >> RANK_BITS) / 1e6, math.nan)
        named[f"alltoall-{name}-rank"] = np.where(there, column % 2**RANK_BITS, math.nan)
    memory = extremes[:, 2]
    return named | {"memory-MiB": np.where(memory > 0, memory / MIB, math.nan)}


def relative_loads(loads: ndarray) -> ndarray:
    """Routes of each expert [L, E] divided by the even share; zeros in layers without routes."""
    return np.nan_to_num(_divide(loads * loads.shape[1], loads.sum(axis=1, keepdims=True)))


def console_text(figures: dict[str, float]) -> str:
    """The part of Megatron's log line that is X-MoE's."""
    parts = [
        f"expert load max/mean: {figures['load-max']:.2f} "
        f"(layer {figures['worst-layer']:.0f}: {figures['load-max-of-worst-layer']:.2f})",
        f"idle experts: {figures['idle-experts']:.1%}",
        f"dropped: {figures['drop-rate']:.1%}",
    ]
    if not math.isnan(figures["redundancy"]):  # routes leave the node
        parts.append(
            f"inter-node: {figures['inter-node-MiB']:.2f} MiB, {figures['saved-MiB']:.2f} saved "
            f"({figures['redundancy']:.1%} of the rows)"
        )
        parts.append(f"intra-node: {figures['intra-node-MiB']:.2f} MiB")
    if not math.isnan(figures["alltoall-ms"]):
        parts.append(
            f"all-to-all (ms): {figures['alltoall-ms']:.2f} "
            f"(rank {figures['alltoall-slowest-rank']:.0f}: {figures['alltoall-slowest-ms']:.2f})"
        )
    return "".join(f" {part} |" for part in parts)


def breakdown_of(sums: dict[str, ndarray]) -> dict[str, float]:
    """Milliseconds of each stage in a forward pass, mean over layers, ranks and micro-batches."""
    passes = max(float(sums["timed_passes"].sum()), 1.0)
    return {stage: float(sums[stage].sum()) / passes for stage in STAGES}


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


def _divide(dividend: ndarray, divisor: ndarray) -> ndarray:
    return dividend / np.where(divisor > 0, divisor, math.nan)
