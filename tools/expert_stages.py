"""Times the stages of this project's MLP one by one, each beside its own floor, for benchmark_experts.py.

A stage that multiplies has the dense product of the same size as its floor, any other the time in which the device
copies the bytes that it must read and write. Both are measured in the same run.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from expert_systems import Inputs

from megatron_xmoe.kernels.registry import kernel
from megatron_xmoe.ops import build_routes
from megatron_xmoe.ops.activation import Activation
from megatron_xmoe.ops.grouped_gemm import Groups, backend
from megatron_xmoe.ops.rows import give_back_rows, take_rows

Timer = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Stage:
    """A part of the forward or backward pass."""

    name: str
    call: Callable[[], object]
    floor: Callable[[], object]
    """The dense product, or a copy of as many bytes."""

    bound: str
    """'dense' or 'copy'."""


def stages(name: str, data: Inputs) -> list[Stage]:
    """The stages in the order in which they run, with one backend."""
    tokens, hidden, ffn, experts, per_token = data.shape
    gemm, activation, device = backend(name), Activation(F.silu, True), data.device
    x, fc1, fc2 = data.x.detach(), data.fc1.detach(), data.fc2.detach()
    routes = build_routes(data.ids, data.probs.detach(), experts)
    groups = Groups.of(routes.tokens_per_expert.cpu(), device)
    index, inverse, probs = routes.token_ids, routes.inverse, routes.combine_weights
    rows = take_rows(x, index, inverse)
    source, at = (x, index) if gemm.gathers else (rows, None)
    wide = gemm.multiply(source, fc1, groups, at)
    activated = activation.forward(wide, probs)
    grad_rows, narrow = torch.randn_like(x[:1]).expand(len(index), hidden).contiguous(), activated.clone()
    one1, one2 = fc1[0], fc2[0]

    def copy_of(elements: int) -> Callable[[], object]:
        source = torch.zeros(elements * x.element_size() // 2, dtype=torch.int8, device=device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    moved, sent = copy_of(tokens * (1 + per_token) * hidden), grad_rows.t()
    spread = kernel("spread_rows", device.type)
    gather = Stage("gather", lambda: take_rows(x, index, inverse), moved, "copy")
    return [
        Stage("metadata", lambda: build_routes(data.ids, probs.view(tokens, per_token), experts),
              copy_of(tokens * per_token * 12), "copy"),
        *[gather] * (not gemm.gathers),
        Stage("fc1, with the gather" if gemm.gathers else "fc1", lambda: gemm.multiply(source, fc1, groups, at),
              lambda: grad_rows @ one1.t(), "dense"),
        Stage("activation", lambda: activation.forward(wide, probs), copy_of(len(index) * 3 * ffn), "copy"),
        Stage("fc2", lambda: gemm.multiply(activated, fc2, groups), lambda: narrow @ one2.t(), "dense"),
        Stage("combine", lambda: give_back_rows(grad_rows, index, inverse, tokens), moved, "copy"),
        Stage("combine backward", lambda: spread(data.grad, inverse, index, None, None), moved, "copy"),
        Stage("dgrad fc2", lambda: gemm.multiply(grad_rows, fc2, groups, transposed=True), lambda: grad_rows @ one2,
              "dense"),
        Stage("activation backward", lambda: activation.backward(wide, probs, narrow), copy_of(len(index) * 6 * ffn),
              "copy"),
        Stage("wgrad fc2", lambda: gemm.weight_gradient(grad_rows, activated, groups), lambda: sent @ narrow, "dense"),
        Stage("gather again", gather.call, gather.floor, "copy"),
        Stage("wgrad fc1", lambda: gemm.weight_gradient(wide, rows, groups), lambda: wide.t() @ grad_rows, "dense"),
        Stage("dgrad fc1", lambda: gemm.multiply(wide, fc1, groups, transposed=True), lambda: wide @ one1, "dense"),
        Stage("gather backward", lambda: give_back_rows(grad_rows, index, inverse, tokens), moved, "copy"),
    ]  # fmt: skip


def measure(name: str, data: Inputs, milliseconds: Timer) -> list[dict]:
    """Times every stage, prints a line each, and returns a record each."""
    print(f"  stages of X-MoE, {name:22}{'ms':>9}{'floor ms':>10}{'of floor':>10}")
    records = []
    with torch.no_grad():
        for stage in stages(name, data):
            time_ms, floor_ms = milliseconds(stage.call), milliseconds(stage.floor)
            print(f"    {stage.name:36}{time_ms:9.3f}{floor_ms:10.3f}{floor_ms / time_ms:10.0%}  {stage.bound}")
            record = {"stage": stage.name, "ms": time_ms, "floor_ms": floor_ms, "bound": stage.bound}
            records.append({"shape": data.shape, "system": f"X-MoE, {name}", **record})
    total = sum(record["ms"] for record in records)
    floors = sum(record["floor_ms"] for record in records)
    print(f"    {'sum':36}{total:9.3f}{floors:10.3f}{floors / total:10.0%}", flush=True)
    return records
