"""One shape and one division into nodes of benchmark_dispatch.py: measured, compared, and told in a table."""

from argparse import Namespace
from collections.abc import Callable

import torch
import torch.distributed as dist
from dispatch_cases import (
    ONLY_DISPATCH_FFN,
    Pass,
    Setting,
    average,
    build_layer,
    count_syncs,
    largest,
    measure_dispatch,
    measure_layer,
    measure_stages,
    uniform_routes,
)
from dispatch_wire import COMBINE, DISPATCH, STAGES
from megatron.core import parallel_state

from megatron_xmoe.dispatch.choice import choose_dispatcher, network_rows
from megatron_xmoe.parallel_state import NodeTopology, node_topology

DISPATCHERS = ("alltoall", "rbd")
TOLERANCES = {torch.bfloat16: 5e-3, torch.float32: 1e-5}
"""Largest RMS of the difference over the RMS of the plain dispatcher's result."""


def measure(shape: tuple[int, ...], division: str | None, args: Namespace, say: Callable) -> dict:
    """Measures both dispatchers and prints the tables; returns a record for --json, with a list of problems."""
    tokens, topk, experts, hidden_size = shape
    setting = Setting(
        tokens, topk, experts, hidden_size, args.dtype, args.device, args.expert_parallel_size, division
    )
    topology = node_topology(parallel_state.get_expert_model_parallel_group(), division)
    choice = choose_dispatcher(topology.node_of, topk, experts)
    say(
        f"\nT{tokens} K{topk} E{experts} H{hidden_size} {args.dtype}, "
        f"nodes of {topology.node_sizes} ({topology.source})",
        f"auto: {choice.dispatcher}; {choice.reason}",
    )
    record = {"shape": shape, "dtype": str(args.dtype), "nodes": topology.node_sizes, "source": topology.source,
              "auto": choice.dispatcher, "problems": []}  # fmt: skip
    passes = _dispatch_and_combine(setting, topology, args, record)
    _tell_traffic(setting, record, say)
    _compare("output", passes, lambda p: [p.output], setting, record)
    _compare("gradients", passes, lambda p: p.gradients, setting, record)
    if args.layer or args.check_syncs:
        _whole_layer(setting, args, record, say)
    say(*(f"FAILED: {problem}" for problem in record["problems"]))
    if not record["problems"]:
        say("results agree, and the rows between nodes are those that the routes demand")
    return record


def _dispatch_and_combine(setting: Setting, topology: NodeTopology, args: Namespace, record: dict) -> dict[str, Pass]:
    node_of = dict(zip(dist.get_process_group_ranks(topology.ep_group), topology.node_of, strict=True))
    bypassing = topology.num_nodes > 1 and max(topology.node_sizes) > 1
    plain, once = network_rows(topology.node_of, setting.topk, setting.experts)
    pairs, routes = _demanded_rows(setting, topology)
    dispatchers = {name: build_layer(setting, name, ONLY_DISPATCH_FFN).token_dispatcher for name in DISPATCHERS}
    passes = measure_dispatch(setting, dispatchers, node_of, args.repeat)
    stages = measure_stages(setting, dispatchers, node_of, args.repeat)
    for name, result in passes.items():
        bypasses = name == "rbd" and bypassing
        record[name] = _figures(setting, result, once if bypasses else plain) | {"stages": stages[name]}
        sent, expected = record[name]["inter_rows"], average(pairs if bypasses else routes, setting.device)
        if sent != expected:
            record["problems"].append(f"{name}: a rank sends {sent} rows to other nodes in combine, not {expected}")
    return passes


def _demanded_rows(setting: Setting, topology: NodeTopology) -> tuple[int, int]:
    """(token, other node) pairs and routes to other nodes of this rank's tokens."""
    _, routing_map = uniform_routes(setting)
    node_of_expert = torch.tensor(topology.node_of, device=setting.device).repeat_interleave(
        setting.experts // setting.ep_size
    )
    others = [node for node in range(topology.num_nodes) if node != topology.node]
    there = [routing_map[:, node_of_expert == node] for node in others]
    return sum(int(m.any(dim=1).sum()) for m in there), sum(int(m.sum()) for m in there)


def _figures(setting: Setting, result: Pass, rows_a_token: float) -> dict:
    """A rank's average: rows of the way back, which carries nothing else; bytes of both ways; times."""

    def total(figure, parts):
        return average(result.wire.total(figure, parts), setting.device)

    rows = {name: total(name, COMBINE) for name in ("inter_rows", "intra_rows")}
    both = {name: total(name, DISPATCH + COMBINE) for name in ("inter_bytes", "intra_bytes")}
    back = total("inter_bytes", COMBINE) + total("intra_bytes", COMBINE)
    predicted = rows_a_token * setting.tokens
    return rows | both | {
        "predicted_inter_rows": predicted,
        "predicted_inter_bytes": 2 * predicted * setting.hidden_size * setting.dtype.itemsize,
        "metadata_bytes_a_route": (sum(both.values()) - 2 * back) / (setting.tokens * setting.topk),
        "exchanges_forward": int(largest(len(result.wire.exchanges), setting.device)),
        "exchanges_backward": int(largest(len(result.backward_wire.exchanges), setting.device)),
        "milliseconds": result.milliseconds,
    }


def _tell_traffic(setting: Setting, record: dict, say: Callable) -> None:
    say(
        f"{'':10}{'rows to other nodes':>26}{'to its own':>12}{'MB to other nodes':>22}{'to its own':>12}"
        f"{'metadata':>10}{'exchanges':>11}{'dispatch':>11}{'combine':>10}{'both':>10}{'backward':>10}",
        f"{'':10}{'predicted':>13}{'counted':>13}{'':>12}{'predicted':>11}{'counted':>11}{'':>12}{'B/route':>10}"
        f"{'fwd + bwd':>11}{'ms':>11}{'ms':>10}{'ms':>10}{'ms':>10}",
    )
    for name in DISPATCHERS:
        f, ms = record[name], record[name]["milliseconds"]
        say(
            f"{name:10}{f['predicted_inter_rows']:13.1f}{f['inter_rows']:13.1f}{f['intra_rows']:12.1f}"
            f"{f['predicted_inter_bytes'] / 1e6:11.3f}{f['inter_bytes'] / 1e6:11.3f}{f['intra_bytes'] / 1e6:12.3f}"
            f"{f['metadata_bytes_a_route']:10.1f}{f['exchanges_forward']:7} + {f['exchanges_backward']}"
            f"{ms['dispatch']:11.3f}{ms['combine']:10.3f}{ms['both']:10.3f}{ms['backward']:10.3f}"
        )
    plain, bypassing = (record[name] for name in DISPATCHERS)
    if plain["inter_rows"]:
        record["redundancy"] = {
            kind: 1 - bypassing[rows] / plain[rows]
            for kind, rows in (("predicted", "predicted_inter_rows"), ("counted", "inter_rows"))
        }
        say("rows between nodes saved: " + ", ".join(f"{v:.2%} {kind}" for kind, v in record["redundancy"].items()))
    _tell_ratio("dispatch and combine", *(record[name]["milliseconds"]["both"] for name in DISPATCHERS), say)
    say(f"{'stages, ms':32}" + "".join(f"{name:>10}" for name in DISPATCHERS))
    for stage in STAGES:
        say(f"  {stage:30}" + "".join(f"{record[name]['stages'][stage]:10.3f}" for name in DISPATCHERS))


def _tell_ratio(what: str, plain: float, bypassing: float, say: Callable) -> None:
    say(f"{what}: rbd takes {bypassing / plain:.3f} of the time of alltoall ({plain / bypassing:.2f}x as fast)")


def _whole_layer(setting: Setting, args: Namespace, record: dict, say: Callable) -> None:
    layers = {name: build_layer(setting, name, args.ffn) for name in DISPATCHERS}
    if args.layer:
        times, results = measure_layer(setting, layers, args.repeat)
        for name in DISPATCHERS:
            record[name]["layer"] = times[name]
            say(f"layer, {name}: " + ", ".join(f"{what} {time_ms:.3f} ms" for what, time_ms in times[name].items()))
        for what in ("forward", "forward+backward"):
            _tell_ratio(f"layer {what}", *(times[name][what] for name in DISPATCHERS), say)
        _compare("layer's output", results, lambda result: [result[0]], setting, record)
        _compare("layer's gradient", results, lambda result: result[1], setting, record)
    for name in DISPATCHERS if args.check_syncs else ():
        record[name]["syncs"] = counts = count_syncs(setting, layers[name])
        say(f"layer, {name}: the host waits {counts[0]} time(s) in forward, {counts[1]} in backward")
        by_one = setting.dtype.itemsize > 2  # experts one after the other, by sizes that the host knows
        expected = int(setting.ep_size > 1 or by_one), 0
        if counts != expected:
            record["problems"].append(f"{name}: the host waits {counts} times in forward and backward, not {expected}")


def _compare(what: str, results: dict, tensors: Callable, setting: Setting, record: dict) -> None:
    """Note a problem if rbd's tensors are not alltoall's, on any rank; NaN is a difference."""
    expected, found = (tensors(results[name]) for name in DISPATCHERS)
    errors = [_relative_rms_error(f, e) for f, e in zip(found, expected, strict=True)]
    worst = largest(max(errors), setting.device)
    record[f"{what} error"] = worst
    if not worst <= TOLERANCES[setting.dtype]:
        record["problems"].append(f"{what} of rbd differ from alltoall's: relative RMS error {worst:.3g}")


def _relative_rms_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    scale = expected.double().square().mean().sqrt()
    error = ((found.double() - expected.double()).square().mean().sqrt() / scale).item()
    return error if error == error else float("inf")  # the largest of NaN and a number may be the number
